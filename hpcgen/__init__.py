"""Generative design of inorganic crystals on HPC clusters."""

__version__ = "0.1.0"
