"""Remote procedure calls, JSON-RPC 2.0, a line each: python json_rpc.py serve

From elsewhere: python json_rpc.py HOST METHOD ARGUMENTS, for example: python json_rpc.py vm-b add 20 22
"""

import asyncio
import json
import sys
from typing import Any

import shmsock

PORT = 7003
METHODS: dict[str, Any] = {"add": lambda *them: sum(them), "divide": lambda a, b: a / b, "upper": str.upper}


async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        async for line in reader:
            answer: dict[str, Any] = {"jsonrpc": "2.0", "id": None}
            try:
                call = json.loads(line)
                answer["id"] = call["id"]
                answer["result"] = METHODS[call["method"]](*call["params"])
            except Exception as problem:  # whatever was asked for: who did gets to know
                answer["error"] = {"code": -32000, "message": f"{type(problem).__name__}: {problem}"}
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
    except (OSError, ValueError):
        pass  # the client is gone, or sent a line that is longer than the reader's limit
    finally:
        writer.close()


async def serve() -> None:
    server = await shmsock.start_server(handle, port=PORT)
    print("listening on {!r}, port {}".format(*server.sockets[0].getsockname()), flush=True)
    await server.serve_forever()


async def call(host: str, method: str, *params: Any) -> Any:
    reader, writer = await shmsock.open_connection(host, PORT)
    writer.write(json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode() + b"\n")
    answer = json.loads(await reader.readline() or b'{"error": {"message": "the server is gone"}}')
    writer.close()
    return answer["result"] if "result" in answer else sys.exit(f"json_rpc: {answer['error']['message']}")


if __name__ == "__main__":
    if sys.argv[1:] != ["serve"] and len(sys.argv) < 3:
        sys.exit(__doc__)
    arguments = [int(text) if text.lstrip("-").isdecimal() else text for text in sys.argv[3:]]
    try:
        print(asyncio.run(serve() if sys.argv[1] == "serve" else call(sys.argv[1], sys.argv[2], *arguments)))
    except KeyboardInterrupt:
        sys.exit(0 if sys.argv[1] == "serve" else 130)
    except (OSError, ValueError) as problem:
        sys.exit(f"json_rpc: {problem}")
