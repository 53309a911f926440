"""Adapters for libraries, one module each: each imports its library, and nothing else imports it."""
