"""Sampling of the synthetic data set."""
