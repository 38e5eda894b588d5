"""The commands of ``sapf``: parse, call, print; what one needs is imported inside its function."""
