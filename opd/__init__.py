"""The pure library of on-policy distillation: types, methods and the loop (torch, numpy, standard library)."""
