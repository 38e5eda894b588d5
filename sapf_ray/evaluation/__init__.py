"""Scores of synthetic images: Fréchet distance and downstream accuracy."""
