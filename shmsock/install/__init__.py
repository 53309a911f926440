"""What people install beside the package: files of the system, and shmsock where there is no network."""
