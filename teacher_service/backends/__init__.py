"""One file per way of reading: each implements `opd.ports.LogprobTeacher`."""
