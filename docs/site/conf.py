"""The site: the documents of the repository at their places, so that links hold in both, and a reference.

`make docs`: sphinx-build -c docs/site . build/site
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

import shmsock
import shmsock.anyio
from shmsock.observe.metrics import RegionCollector
from shmsock.observe.rates import View
from shmsock.observe.snapshot import Content

project = "shmsock"
author = "The shmsock authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_click"]
root_doc = "README"
include_patterns = ["*.md", "docs/*.md", "docs/site/**.md", "shmsock/native/*.md", "tests/models/*.md"]
exclude_patterns = [
    ".*",
    "benchmarks",
    "build",
    "dist",
    "examples",
    "node_modules",
    "*.egg-info",
]  # not walked

myst_heading_anchors = 4  # as GitHub makes them
highlight_language = "none"
nitpicky = True
# Nothing is known here of other packages; what a user gets as an asyncio.DatagramTransport has no page.
nitpick_ignore_regex = [("py:.*", r"(?!shmsock\.).*"), ("py:class", r".*\.ShmDatagramTransport")]

default_role = "literal"
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
smartquotes = False  # they join the dashes of options
python_maximum_signature_line_length = 80

html_theme = "furo"
html_title = "shmsock"
html_copy_source = html_show_sourcelink = html_show_copyright = html_show_sphinx = False
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_last_updated_fmt = None

CONTENTS = """

```{toctree}
:hidden:
:caption: Set up
docs/install
docs/vms
docs/sizing
docs/containers
docs/doorbells
```

```{toctree}
:hidden:
:caption: Use
docs/porting
docs/forwarding
docs/observing
docs/tuning
docs/differences-from-tcp
docs/limits
docs/trust
docs/compatibility
docs/reliability
docs/benchmarks
```

```{toctree}
:hidden:
:caption: Reference
docs/site/reference/shmsock
docs/site/reference/exceptions
docs/site/reference/anyio
docs/site/reference/integrations
docs/site/reference/testing
docs/site/reference/commands
docs/site/reference/json
docs/site/reference/metrics
docs/site/reference/environment
```

```{toctree}
:hidden:
:caption: Project
CHANGELOG
CONTRIBUTING
SECURITY
docs/releasing
docs/architecture
shmsock/native/LAYOUT
tests/models/README
docs/glossary
```
"""

#: "`region`, `name`: see attach(). `settings`: ...": a parameter begins where a sentence does.
PARAMETER = re.compile(r"(?:^|(?<=[.)] ))((?:`\w+`(?:, | and )?)+(?: and the [\w ,]+)?): ")
SENTENCE = re.compile(r"(?<=[.)]) (?=(?:Returns?|Raises?) )")
ADDRESS = re.compile(r"\b(tcp|udp|http)(?=:\S)")
CALLED = re.compile(r"(?<![\w.`])((?:Node\.|shmsock\.)?\w+)\(\)")
NAMES = {called: f"shmsock.{name}" for name in shmsock.__all__ for called in (name, f"shmsock.{name}")}
NAMES["Node.aclose"] = "shmsock.Node.aclose"
ANYIO = {name: f"shmsock.anyio.{name}" for name in shmsock.anyio.__all__}


def in_rest(text: str, names: dict[str, str]) -> str:
    """Write a docstring as reStructuredText: each parameter in a line of its own, calls as links."""
    parts = []
    for part in text.split("\n\n"):
        if part.startswith("    "):
            parts.append(f".. code-block:: python\n\n{part}")
            continue
        part = CALLED.sub(lambda m: f":py:obj:`{m[0]} <{names[m[1]]}>`" if m[1] in names else m[0], part)
        if PARAMETER.search(part):
            part = SENTENCE.sub("\n\n", " ".join(part.split()))
            part = PARAMETER.sub(r"\n* \1: ", part).replace(" \n", "\n").replace("\n* ", "\n\n* ", 1)
        parts.append(part)
    return "\n\n".join(parts)


def on_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    names = NAMES | ANYIO if name.startswith("shmsock.anyio") else ANYIO | NAMES
    lines[:] = in_rest("\n".join(lines), names).splitlines()


def on_command(app: Sphinx, context: Any, lines: list[str]) -> None:
    """Give what keeps its lines (behind \\b) as it is; a star is no markup, and an address no link."""
    shown: list[str] = []
    for line in lines:
        kept = line.startswith("| ")
        if kept and not (shown and shown[-1].startswith("   ")):
            shown += [".. code-block:: text", ""]
        if not line.startswith(".. "):
            line = "   " + line[2:] if kept else ADDRESS.sub(r"\1\\", line.replace("*", r"\*"))
        shown.append(line)
    lines[:] = shown


def metrics() -> str:
    view = View(0, "", Content("formatted"), [], [], False, 0, "")
    ends = {"counter": "_total", "info": "_info"}
    rows = [
        f"| `{m.name}{ends.get(m.type, '')}` | {m.type} | {', '.join(m._labelnames)} | {m.documentation} |"
        for m in RegionCollector("", lambda: view).collect()
    ]
    return "\n".join(["| name | type | labels | what |", "|---|---|---|---|", *rows])


def environment() -> str:
    """Take the table of docs/tuning.md, with links from here."""
    tuning = (Path(__file__).resolve().parents[1] / "tuning.md").read_text(encoding="utf-8")
    rows = [line for line in tuning.splitlines() if line.startswith("| `SHMSOCK_")]
    table = "\n".join(["| variable | default | what |", "|---|---|---|", *rows])
    return re.sub(r"\]\((\w+\.md)", r"](../../\1", table)


def on_source(app: Sphinx, name: str, source: list[str]) -> None:
    if name == root_doc:
        source[0] += CONTENTS
    elif name.endswith("reference/metrics"):
        source[0] = source[0].replace("METRICS", metrics())
    elif name.endswith("reference/environment"):
        source[0] = source[0].replace("VARIABLES", environment())


def on_finish(app: Sphinx, error: Exception | None) -> None:
    if error is None and app.builder.name == "html":
        shutil.copy(Path(app.outdir, "README.html"), Path(app.outdir, "index.html"))


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", on_docstring)
    for part in ("description", "options", "arguments", "epilog"):
        app.connect(f"sphinx-click-process-{part}", on_command)
    app.connect("source-read", on_source)
    app.connect("build-finished", on_finish)
