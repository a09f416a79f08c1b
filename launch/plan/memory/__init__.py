"""Memory of a run's processes by phase, against the GPUs that they get, and the layout that follows from both."""
