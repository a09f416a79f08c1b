"""The loss of a step: packing, attention over packed rows, chunks of logits, metrics that add up."""
