"""Finds out what keeps a machine from talking over shared memory: files of checks, which give findings."""
