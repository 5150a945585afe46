"""The one training loop: any number of ranks, saved and resumed without a trace."""
