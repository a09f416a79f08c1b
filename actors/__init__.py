"""The student as a writer: vLLM behind `opd.ports.StudentEngine`. Importing this package does not import vLLM."""
