"""Wires the applications together: Ray, Hydra and wandb are imported here and nowhere else."""
