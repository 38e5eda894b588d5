"""What knows the paper: its tables, accounting, grids, matrices and figures."""
