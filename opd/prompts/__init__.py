"""Prompt sources: pure functions of the step."""
