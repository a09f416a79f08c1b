"""Estimates of how much a model solves, from several samples of every problem."""
