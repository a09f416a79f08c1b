"""Rollout engine of the student: vLLM behind `opd.ports.StudentEngine`. Importing it does not import vLLM."""
