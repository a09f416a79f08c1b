"""Composition of a command line: overrides, options and files into one configuration, and advice about wrong ones."""
