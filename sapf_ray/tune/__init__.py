"""Grids: many runs described by one YAML file, on Ray Tune."""
