"""What people install beside the package: files of the system, and shmsock where there is no network."""

__all__ = ["BundleError"]


class BundleError(Exception):
    """A bundle cannot be made; says why."""
