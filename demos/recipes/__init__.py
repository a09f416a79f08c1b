"""Scripts that make the small checkpoints this project ships or trains on."""
