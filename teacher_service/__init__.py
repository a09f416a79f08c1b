"""Teacher models that score the tokens of trajectories: in this process or behind a server."""
