"""The commands of `opd` and what a user reads of them."""
