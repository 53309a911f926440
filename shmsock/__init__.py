"""Sockets for asyncio over QEMU ivshmem shared memory."""
