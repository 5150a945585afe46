"""Campaigns: crystals by the million from a trained model, block by block, the same on any number of processes."""
