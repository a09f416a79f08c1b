"""Prompts of the embedded tasks."""
