"""What lies in a run directory: written safely, read back within bounds."""
