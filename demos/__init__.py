"""Embedded demonstrations: generated tasks, their prompts and the recipes that made their models."""
