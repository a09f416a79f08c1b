"""Commands of `opd`: argument parsing, help pages and error messages."""
