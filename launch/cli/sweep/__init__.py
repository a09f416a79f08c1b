"""`opd train -m`: one run for each combination of values, planned together, in one directory."""
