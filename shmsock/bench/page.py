"""`shmsock bench --html`: one page that says what is faster, by how much and how sure that is.

It needs nothing but itself, and each of its figures says where in the JSON it stands.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any

from shmsock.bench.compare import spread
from shmsock.bench.measures import COST, IDLE, MEASURES, SWEEPS, Column, Measure, with_cost
from shmsock.bench.plot import Panel, panels
from shmsock.bench.style import colour
from shmsock.bench.verdict import SAID, how_sure
from shmsock.bench.words import percent, ratio, share

__all__ = ["page"]

COSTS = {column.key for column in COST}
KNOWN = {
    "cpu": "",
    "cpus": "CPUs:",
    "hypervisor": "in",
    "kernel": "Linux",
    "python": "",
    "uvloop": "uvloop",
    "shmsock": "shmsock",
    "commit": "at",
    "region": "region",
    "memory": "memory",
    "load": "load",
    "load_after": "afterwards",
}
SETUP = ("virtualization", "qemu", "guest_kernel", "network", "memory")
HOW = (
    "Both sides of a ratio are measured one after the other, in each round, by the same program. A ratio is "
    "the median of the ratios of the rounds; its range is from the lowest round to the highest (from nine "
    "rounds on without the outermost, as long as it is 95 % sure). The median of all rounds that could be "
    "taken is in it with a probability of {sure}, whatever the distribution, as long as the load stays "
    "what it was. Dots are rounds. They disagree when the highest is more than twice the lowest. CPU time is "
    "that of the two processes, as their own kernels count it; the host's is that of both QEMU processes. "
    "The probe spins at both ends, and counts the time that passes without it: others had the processor."
)
STYLE = Path(__file__).with_name("page.css")
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""A browser holds the page to it: nothing is asked of anybody."""


def page(report: dict[str, Any]) -> str:
    """The whole of it."""
    parts = [_head(report), _verdicts(report), _warnings(report)]
    drawn = panels(report)
    first = [panel for panel in drawn if panel.wide]
    parts += [_figure(panel) for panel in first]
    parts += ['<div class="two">', *(_figure(panel) for panel in drawn if not panel.wide), "</div>"]
    parts += ["<h2>All figures</h2>", *_tables(report), *_sweeps(report), _where(report), _how(report)]
    title = "shmsock beside TCP"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<style>\n{STYLE.read_text(encoding='utf-8')}</style></head>\n"
        "<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _data(value: float, text: str, *at: str) -> str:
    """A figure: as it is told, as it is, and the way to it in the JSON (RFC 6901)."""
    way = "".join("/" + part.replace("~", "~0").replace("/", "~1") for part in at)
    return f'<data value="{value!r}" data-at="{escape(way)}">{escape(text)}</data>'


def _head(report: dict[str, Any]) -> str:
    known = report["machine"]
    facts = [
        f"{report['rounds']} rounds of {report['seconds']:g} s",
        report.get("began", "").replace("T", " "),
        report.get("virtualization", "").upper(),
        f"shmsock {known['shmsock']}" + (f" at {known['commit']}" if "commit" in known else ""),
    ]
    return f"<h1>Shared memory beside TCP</h1><p class=facts>{escape(' · '.join(filter(None, facts)))}</p>"


def _verdicts(report: dict[str, Any]) -> str:
    """What the rows of the table come to, one line for each system."""
    rows = []
    for found in report.get("verdict", []):
        tiles = "".join(_tiles(report, found["who"]))
        name = f'<span class=swatch style="background:{colour(found["who"])}"></span>{escape(found["who"])}'
        said = f"<b>{name}</b> beside {escape(found['than'])}: {escape(found['text'])}."
        rows.append(f"<section class=verdict><p>{said}</p><div class=tiles>{tiles}</div></section>")
    sure = f"<p class=sure>{escape(how_sure(report))}</p>" if rows else ""
    return "\n".join(rows) + sure


def _tiles(report: dict[str, Any], who: str) -> Iterator[str]:
    """The ratios of the verdict, large; and the CPU time of idle connections, of which there is no ratio."""
    measures = report["measures"]
    for name, key, what, more, less in SAID:
        seen = measures.get(name, {}).get("results", {}).get(who, {}).get("beside", {}).get(key)
        if seen is None:
            continue
        low, high, value = seen["low"], seen["high"], seen["ratio"]
        if not less:
            low, high = 1 / high, 1 / low  # of a cost less is better
        kind = "unsure" if not seen["agree"] else "good" if low > 1 else "bad" if high < 1 else "same"
        kind = kind if seen["sure"] else "same"
        word = less if less and value < 1 else more
        at = ("measures", name, "results", who, "beside", key)
        large = _data(value, _factor(value, not less), *at, "ratio")
        rounds = "" if seen["agree"] else "<b class=odd>rounds disagree:</b> "
        yield _tile(kind, what.removesuffix(" takes"), large, word, rounds + _low_to_high(seen, at, not less))
    idle = measures.get("idle", {}).get("results", {})
    if "cpu" in idle.get(who, {}):
        others = ", ".join(f"{label} {percent(r['cpu'])}" for label, r in idle.items() if "TCP" in label)
        large = _data(idle[who]["cpu"], percent(idle[who]["cpu"]), "measures", "idle", "results", who, "cpu")
        yield _tile("same", "ten idle connections", large, "of a CPU", escape(f"both ends; {others}"))


def _tile(kind: str, what: str, large: str, word: str, small: str) -> str:
    return (
        f'<div class="tile {kind}"><span>{escape(what)}</span><strong>{large}</strong> {escape(word)}'
        f"<small>{small}</small></div>"
    )


def _factor(value: float, is_cost: bool) -> str:
    """ "12x": so many times faster, or slower, as the terminal has it; a cost is told as it is."""
    return ratio(value if is_cost or value >= 1 else 1 / value, False) + "x"


def _low_to_high(seen: dict[str, Any], at: tuple[str, ...], is_cost: bool) -> str:
    """The lesser first. Where one end is slower and one faster, each says which it is."""
    keys = ["low", "high"]
    is_slower, is_both = seen["high"] < 1 and not is_cost, seen["low"] < 1 <= seen["high"] and not is_cost
    if is_slower:
        keys.reverse()
    told = {key: _factor(seen[key], is_cost) for key in keys}
    if is_both:
        told = {"low": f"{told['low']} slower", "high": f"{told['high']} faster"}
    return " to ".join(_data(seen[key], told[key], *at, key) for key in keys)


def _warnings(report: dict[str, Any]) -> str:
    found = report.get("warnings", [])
    if found:
        items = "".join(f"<li>{escape(text)}</li>" for text in found)
        return f"<div class=warnings><b>Not sure</b><ul>{items}</ul></div>"
    fine = "Rounds agree, and both ends had their processors."
    return f"<p class=fine>{fine}</p>" if "probe" in report else ""


def _figure(panel: Panel) -> str:
    """An SVG in the page. Names within it are its own: two of them would have the same ones."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=panel.inches, layout="constrained")
    panel.draw(figure.subplots())
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = out.getvalue()[out.getvalue().index("<svg") :]
    text = re.sub(r"<!--.*?-->\s*", "", re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL))
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{panel.name}-", text)
    text = re.sub(r'^<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg role="img" viewBox="\1">', text, count=1)
    title = escape(panel.title)
    text = text.replace('role="img"', f'role="img" aria-label="{title}"', 1).replace("xlink:href", "href")
    return f"<figure><figcaption>{title}</figcaption>{text}</figure>"


def _tables(report: dict[str, Any]) -> Iterator[str]:
    for name, kept in report.get("measures", {}).items():
        columns = [c for c in _columns(name) if any(c.key in r for r in kept["results"].values())]
        beside = [c for c in columns if any(c.key in r.get("beside", {}) for r in kept["results"].values())]
        heads = [c.heading for c in columns] + [f"{c.heading}, beside" for c in beside]
        rows = []
        for label, r in kept["results"].items():
            at = ("measures", name, "results", label)
            cells = [_data(r[c.key], c.show(r[c.key]), *at, c.key) if c.key in r else "" for c in columns]
            cells += [_range(r.get("beside", {}).get(c.key), (*at, "beside", c.key), c.cost) for c in beside]
            rows.append((label, cells))
        yield _table(f"{kept['title']}, {kept['where']}", heads, rows)


def _columns(name: str) -> tuple[Column, ...]:
    measure: Measure = MEASURES.get(name) or next((m for m in IDLE if m.name == name), MEASURES["echo"])
    known = {c.key: c for c in (*measure.columns, *with_cost(measure).columns)}
    return tuple(known.values())


def _range(seen: dict[str, Any] | None, at: tuple[str, ...], is_cost: bool) -> str:
    if seen is None:
        return ""
    odd = "" if seen["agree"] else ' <b class=odd title="rounds disagree">!</b>'
    word = "" if is_cost else " faster" if seen["ratio"] >= 1 else " slower"
    large = _data(seen["ratio"], _factor(seen["ratio"], is_cost) + word, *at, "ratio")
    return f"<b>{large}</b> <small>{_low_to_high(seen, at, is_cost)}{odd}</small>"


def _sweeps(report: dict[str, Any]) -> Iterator[str]:
    known = {sweep.name: sweep for sweep in SWEEPS}
    for name, kept in report.get("sweeps", {}).items():
        sweep, results = known[name], kept["results"]
        show: Callable[[float], str] = sweep.column.show
        values = list(next(iter(results.values())))
        rows = []
        for label, found in results.items():
            at = ("sweeps", name, "results", label)
            figures = [(value, found[value][kept["figure"]]) for value in values]
            rows.append(
                (label, [_data(seen, show(seen), *at, value, kept["figure"]) for value, seen in figures])
            )
        yield _table(f"{kept['title']}, {kept['where']}", [sweep.say(int(value)) for value in values], rows)


def _table(title: str, heads: list[str], rows: list[tuple[str, list[str]]]) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in ("", *heads))
    body = "".join(
        f'<tr><th><span class=swatch style="background:{colour(label)}"></span>{escape(label)}</th>'
        + "".join(f"<td>{cell}</td>" for cell in cells)
        + "</tr>"
        for label, cells in rows
    )
    return f"<div class=table><h3>{escape(title)}</h3><table><tr>{head}</tr>{body}</table></div>"


def _where(report: dict[str, Any]) -> str:
    """Machine, kernels, QEMU, memory: whatever the run has found out."""
    ends = {"where the run was started": report["machine"]}
    for end in ("client", "server"):
        for taken in report.get("probe", [])[:1]:
            ends[f"{end}'s end"] = {**taken[end], **taken[end].get("machine", {})}
    facts = [(end, ", ".join(_facts(known))) for end, known in ends.items()]
    facts += [(key.replace("_", " "), _said(report[key])) for key in SETUP if report.get(key)]
    rows = (f"<tr><th>{escape(what)}</th><td class=text>{escape(text)}</td></tr>" for what, text in facts)
    return f"<h2>Measured on</h2><table class=facts>{''.join(rows)}</table>"


def _said(what: Any) -> str:
    return "; ".join(f"{who}: {text}" for who, text in what.items()) if isinstance(what, dict) else str(what)


def _facts(known: dict[str, Any]) -> Iterator[str]:
    for key, name in KNOWN.items():
        if known.get(key) not in (None, ""):
            yield f"{name} {known[key]}".strip()


def _how(report: dict[str, Any]) -> str:
    return f"<h2>How to read it</h2><p>{HOW.format(sure=share(spread(range(report['rounds']))['sure']))}</p>"
