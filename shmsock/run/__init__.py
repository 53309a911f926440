"""What `shmsock run` puts into a program that knows nothing of shared memory."""
