"""Is this teacher fit to teach this student? Checks of the running parts, through the ports alone."""
