"""A run's configuration: composed by Hydra, checked, typed."""
