"""asyncio: the driver of the engine, and what asyncio users see of it. (A package `asyncio` in here would
shadow asyncio itself.)"""
