"""The ends of a benchmark: one process each, the same code over every network.

handlers.py, beside this folder, runs it as a package of its own, so that what measures TCP imports
nothing of shmsock. Nothing in here may import shmsock but by the name that --module gives.
"""
