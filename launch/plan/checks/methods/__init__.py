"""Checks of a method as it stands in a run: what it could learn at all, and whether that is what its settings say."""
