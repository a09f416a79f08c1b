"""Generated tasks and their graders: pure functions of a random generator, no files, no network."""
