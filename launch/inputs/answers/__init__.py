"""Answers as values: what a reference says, what a completion ends with, and whether the two are equal."""
