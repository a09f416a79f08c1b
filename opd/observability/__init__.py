"""Observability of a run: spans of work, utilization, roofline, alerts."""
