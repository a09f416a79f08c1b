"""Models that read what the student wrote and testify about it, behind `opd.ports.LogprobTeacher`."""
