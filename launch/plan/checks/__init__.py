"""Checks of a plan before anything is started, one module per part of a run."""
