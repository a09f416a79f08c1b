"""Objectives: what is minimized per token."""
