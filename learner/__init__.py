"""The student in training: one DeepSpeed rank per process, plain Python (`launch/` applies Ray to it)."""
