"""Invariance, scorer and term-sum checks: those of a certificate that compare no gradient with a promise."""
