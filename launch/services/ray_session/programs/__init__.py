"""Programs that a local session of Ray starts in place of slower ones of its own; they import no package."""
