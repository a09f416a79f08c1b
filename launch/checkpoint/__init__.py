"""Checkpoints of a run: when they are due, how they are written, how a run resumes from one."""
