"""Inputs of a run: prompt files, tokenizers, graders of answers."""
