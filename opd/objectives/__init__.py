"""What is minimised per token."""
