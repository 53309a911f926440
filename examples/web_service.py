"""A Starlette service, in this folder: shmsock run --listen 8000 -- uvicorn web_service:app

Nothing in it knows of shared memory: it is on TCP port 8000 as ever, and peers reach it too. Its client:
python web_service.py http://vm-b:8000 (localhost: this machine). `pip install uvicorn starlette httpx`
"""

import asyncio
import sys
from collections.abc import AsyncIterator

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from shmsock.integrations.httpx import AsyncShmTransport

notes: dict[str, str] = {}


async def note(request: Request) -> JSONResponse:
    name = request.path_params["name"]
    if request.method == "PUT":
        notes[name] = (await request.body()).decode()
    return JSONResponse({"name": name, "text": notes.get(name)}, 200 if name in notes else 404)


async def count(request: Request) -> StreamingResponse:
    async def lines() -> AsyncIterator[str]:
        for number in range(request.path_params["to"]):
            yield f"{number}\n"

    return StreamingResponse(lines(), media_type="text/plain")


app = Starlette(
    routes=[Route("/notes/{name}", note, methods=["GET", "PUT"]), Route("/count/{to:int}", count)]
)


async def main(url: str) -> None:
    async with httpx.AsyncClient(base_url=url, transport=AsyncShmTransport()) as client:
        (await client.put("/notes/today", content="it works")).raise_for_status()
        print("today:", (await client.get("/notes/today")).json()["text"])
        print("tomorrow:", (await client.get("/notes/tomorrow")).status_code)
        async with client.stream("GET", "/count/3") as answer:
            print("counted:", *[line async for line in answer.aiter_lines()])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        asyncio.run(main(sys.argv[1]))
    except KeyboardInterrupt:
        sys.exit(130)
    except (httpx.HTTPError, httpx.InvalidURL) as problem:
        sys.exit(f"web_service: {problem}")
