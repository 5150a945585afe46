"""How one field of a crystal is noised, and how a step un-noises it."""
