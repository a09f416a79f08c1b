"""How a gradient becomes new weights."""
