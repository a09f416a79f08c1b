"""What a plan checks before anything is started, one module per part of a run."""
