"""The teacher service: models that read what the student wrote, and the checks that a teacher fits its student."""
