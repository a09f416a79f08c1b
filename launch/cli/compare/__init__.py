"""`opd compare`: arms of one budget with tuned rates, their runs and what they are planned with."""
