"""Ray actors: placed, watched, replaced, and pooled behind the ports of `opd`."""
