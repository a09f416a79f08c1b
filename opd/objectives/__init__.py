"""What is minimized per token."""
