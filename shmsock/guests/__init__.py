"""QEMU guests: what they are booted from, and commands that run in them."""
