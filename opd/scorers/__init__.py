"""Scorers: the parts of a method that score the tokens of its trajectories."""
