"""The gradient certificate: does a composed method train what its name says? (`docs/certificate.md`)"""
