"""Rollouts: the parts of a method that generate its trajectories."""
