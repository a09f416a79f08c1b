"""Methods as values: the protocols of their parts, the promises of objectives, sums of terms, and their composition."""
