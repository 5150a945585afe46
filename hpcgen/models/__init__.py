"""Generative models: one file each, `forward` is the loss, `sample` gives crystals."""
