"""One module per source; the table of sources imports each when it is first requested."""
