"""A method as a value: slots, what objectives promise, and their composition."""
