"""Who writes the trajectories."""
