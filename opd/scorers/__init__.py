"""Who reads the trajectories, and what they testify."""
