"""A region seen from outside, read-only, as data: who is attached, and what goes on."""
