"""Mutation testing of the core: small faults are put into the code, and a test has to fail for each."""
