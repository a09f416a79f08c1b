"""What a run is given from outside: prompt files, tokenizers, graders of answers."""
