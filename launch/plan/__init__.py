"""Plan of a run: all checks and estimates that are possible before anything is started."""
