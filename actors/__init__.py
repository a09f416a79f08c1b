"""The student as a writer: vLLM behind `opd.ports.StudentEngine`. Importing it does not import vLLM."""
