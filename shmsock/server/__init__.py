"""The ivshmem server."""
