"""The parts of ``make bench``; :mod:`jobs.benchmark` is the command."""
