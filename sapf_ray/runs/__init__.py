"""A run's furniture: context, directory, log, clocks, gauges, tracking, storage."""
