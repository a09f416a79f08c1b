"""The training loop, its rollout buffer, staleness schedule, step clock and ledger of trajectories."""
