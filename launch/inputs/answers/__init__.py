"""Answers as values: reading a reference, finding a completion's answer, and testing the two for equality."""
