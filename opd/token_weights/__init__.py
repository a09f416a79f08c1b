"""Token weights: which tokens count, and how much."""
