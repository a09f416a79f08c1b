"""Checks of whether a teacher is fit to teach a student, made on the running parts through the ports alone."""
