"""The gradient certificate: comparison of a method's expected gradient with its promise (`docs/certificate.md`)."""
