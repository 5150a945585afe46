"""Jobs on a Slurm cluster: how they are written, queued, watched, and what is checked before."""
