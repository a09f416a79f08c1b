"""One file per way to host a teacher."""
