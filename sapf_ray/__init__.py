"""Differentially private image synthesis on Ray."""

__version__ = "0.1.0"
