"""Contents of a run directory: written safely, read back within bounds."""
