"""Updates: from a gradient to new weights."""
