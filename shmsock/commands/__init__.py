"""One file for each subcommand of `shmsock`."""
