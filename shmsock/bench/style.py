"""How a system looks, the same in every picture: its colour, its line, and how its bars are filled."""

from __future__ import annotations

from typing import Any

__all__ = ["bar", "colour", "line", "on_asyncio"]

KERNEL = "#5f6368"
COLOURS = (
    # What can be told apart by most eyes, and in print; the first that a label has in it.
    ("doorbells", "#d55e00"),
    ("dax", "#009e73"),
    ("stock", "#56b4e9"),
    ("shmsock.anyio", "#cc79a7"),
    ("shmsock", "#0072b2"),
    ("UNIX", "#a08a5b"),
    ("pyzmq", "#e69f00"),
    ("Pipe", "#882255"),
    ("iceoryx2", "#44aa99"),
    ("C loop", "#000000"),
)


def colour(label: str) -> str:
    return next((found for name, found in COLOURS if name in label), KERNEL)


def line(label: str) -> dict[str, Any]:
    """Of TCP's and UDP's the line has dots, of asyncio's own loop gaps."""
    style = "--" if on_asyncio(label) else "-" if "TCP" not in label and "UDP" not in label else "-."
    return {"color": colour(label), "linestyle": style, "marker": "s" if on_asyncio(label) else "o"}


def bar(label: str) -> dict[str, Any]:
    if on_asyncio(label):
        return {"facecolor": "white", "edgecolor": colour(label), "hatch": "////"}
    return {"facecolor": colour(label), "edgecolor": colour(label)}


def on_asyncio(label: str) -> bool:
    return "asyncio" in label and "uvloop" not in label
