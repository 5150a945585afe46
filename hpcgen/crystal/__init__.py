"""Geometry of periodic crystals; knows neither files nor learning."""
