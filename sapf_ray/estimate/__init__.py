"""What a run will cost in hours and memory, from measured costs of a unit of work."""
