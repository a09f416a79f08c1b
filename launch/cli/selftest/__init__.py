"""`opd selftest`: what this machine can do, measured in minutes, as a table and as JSON for a bug report."""
