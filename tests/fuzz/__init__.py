"""Figures of many tries: each module is a command, and a part of each is among the tests."""
