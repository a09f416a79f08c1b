"""One run while it lasts: session, training, evaluation, export, doctor."""
