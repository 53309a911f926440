"""anyio over shared memory, on asyncio or trio (`.[trio]`): python anyio_echo.py asyncio|trio"""

import sys

import anyio
from anyio.abc import ByteStream

from shmsock.anyio import connect_shm, create_shm_listener

PORT = 7003


async def echo(stream: ByteStream) -> None:
    async with stream:
        async for data in stream:
            await stream.send(data)


async def main() -> None:
    async with await create_shm_listener(local_port=PORT) as listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, echo)
        async with await connect_shm("localhost", PORT) as stream:
            for word in (b"hello", b"world"):
                await stream.send(word)
                print((await stream.receive()).decode())
        tasks.cancel_scope.cancel()


if __name__ == "__main__":
    if sys.argv[1:] not in (["asyncio"], ["trio"]):
        sys.exit(__doc__)
    try:
        anyio.run(main, backend=sys.argv[1])
    except BaseException as problem:
        while hasattr(problem, "exceptions"):  # the task group's: what went wrong in it
            problem = problem.exceptions[0]
        if isinstance(problem, KeyboardInterrupt):
            sys.exit(130)
        if isinstance(problem, (OSError, ValueError, LookupError, EOFError, anyio.EndOfStream)):
            sys.exit(f"anyio_echo: {problem}")  # LookupError: trio is not installed
        raise
