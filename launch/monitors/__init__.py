"""Trackers and metrics of a run: wandb, terminal, trace."""
