"""The house rules that a script can see: imports go downward, files stay small, the engine stays pure."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "shmsock"

# Room (first part of the name under shmsock) -> floor. A room may import its own floor and those below it,
# where no two rooms of one floor import each other. The package itself, on top, gathers the public names.
FLOORS = {
    "native": 0,
    "errors": 1,
    "address": 1,
    "region": 1,
    "engine": 2,
    "hypervisors": 2,
    "wakeup": 2,
    "aio": 3,
    "anyio": 3,
    "testing": 4,
    "server": 4,
    "guests": 4,
    "run": 4,
    "observe": 4,
    "doctor": 5,
    "integrations": 5,
    "bench": 5,
    "install": 5,
    "forward": 5,
    "commands": 6,
    "public": 4,
    "cli": 7,
    "__main__": 8,
    "": 7,
}
EXEMPT = {"", "__main__"}

# The engine knows no event loop, no clock, no thread and no way to map memory.
ENGINE = "engine"
NOT_IN_ENGINE = {
    "anyio", "asyncio", "concurrent", "datetime", "mmap", "multiprocessing", "select", "selectors", "signal",
    "socket", "subprocess", "threading", "time", "trio", "uvloop",
}  # fmt: skip

MAX_LINES = 700
MAX_EXAMPLE_LINES = 60


def module_name(file: Path, package: Path) -> str:
    parts = file.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(package: Path) -> dict[str, Path]:
    return {module_name(file, package): file for file in sorted(package.rglob("*.py"))}


def imports(name: str, file: Path, known: dict[str, Path]) -> Iterator[tuple[int, str]]:
    """Line and full module name of all that a file imports, lazily and for type checkers too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), file.name)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = node.level - (file.name == "__init__.py")
                parent = name.split(".")[: -up or None]
                base = ".".join([*parent, *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                is_module = inner in known or inner == "shmsock.native._core"
                yield node.lineno, inner if is_module else base


def room(name: str) -> str:
    return name.partition(".")[2].partition(".")[0]


def floor_breaches(package: Path) -> list[str]:
    known = modules(package)
    breaches = []
    beside: dict[str, set[str]] = {}
    for name, file in known.items():
        here = room(name)
        if here not in FLOORS:
            breaches.append(f"{name}: a room without a floor; give it one in FLOORS")
            continue
        if here in EXEMPT:
            continue
        for line, target in imports(name, file, known):
            if target.partition(".")[0] != package.name:
                continue
            there = room(target)
            if FLOORS.get(there, 99) > FLOORS[here]:
                breaches.append(f"{name}:{line} (floor {FLOORS[here]}) imports {target} from above")
            elif there != here and FLOORS[there] == FLOORS[here]:
                beside.setdefault(here, set()).add(there)
    breaches += [
        f"{here} and {there} import each other"
        for here, others in beside.items()
        for there in others
        if here < there and here in reachable(there, beside)
    ]
    return breaches


def reachable(start: str, edges: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    todo = [start]
    while todo:
        new = edges.get(todo.pop(), set()) - found
        found |= new
        todo += new
    return found


def engine_breaches(package: Path) -> list[str]:
    known = modules(package)
    return [
        f"{name}:{line} imports {target}"
        for name, file in known.items()
        if room(name) == ENGINE
        for line, target in imports(name, file, known)
        if target.partition(".")[0] in NOT_IN_ENGINE
    ]


def long_files(folder: Path, suffixes: set[str], limit: int) -> list[str]:
    counted = {
        file: len(file.read_text(encoding="utf-8").splitlines())
        for file in sorted(folder.rglob("*"))
        if file.suffix in suffixes
    }
    return [f"{file.relative_to(folder.parent)}: {n} lines" for file, n in counted.items() if n > limit]


# What others can change is copied first, and then only the copy is looked at: in the core rings are named
# where they are set, in calls that copy or prefetch, and nowhere else;
# in Python they are sliced, which copies.
RING = re.compile(r"->\s*[rt]x\b")
COPIES = re.compile(
    r"\b(sh_copy_in|sh_copy_out|sh_prefetch|sh_prefetch_write|pread|recv)\([^;]*\);"
    r"|->[rt]x = (?!ep->)[^;]*;"
)


def ring_breaches(package: Path) -> list[str]:
    breaches = []
    for file in sorted(package.rglob("*.[ch]")):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            left = COPIES.sub("", line)
            if RING.search(left):
                breaches.append(f"{file.relative_to(package.parent)}:{number} uses a ring: {line.strip()}")
    for name, file in modules(package).items():
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"), file.name)))
        sliced = {n.value for n in nodes if isinstance(n, ast.Subscript) and isinstance(n.slice, ast.Slice)}
        breaches += [
            f"{name}:{n.lineno} uses a ring"
            for n in nodes
            if isinstance(n, ast.Attribute)
            and n.attr == "rx"
            and isinstance(n.ctx, ast.Load)
            and n not in sliced
        ]
    return breaches


def circles(package: Path) -> list[str]:
    """Modules that import each other, by whatever way; for type checkers counts too."""
    known = modules(package)
    edges = {
        name: {target for _, target in imports(name, file, known) if target in known and target != name}
        for name, file in known.items()
    }
    ways = {name: reachable(name, edges) for name in known}
    return [name for name in known if name in ways[name]]


# Numbers of the core are typed in the core: what Python calls by the same name is made of what cffi exports.
COLD_READERS = {"shmsock.observe.snapshot", "shmsock.region.occupants"}


def typed_twice(package: Path, exported: dict[str, int]) -> list[str]:
    """Constants in Python whose value is written out, and which the core has under that name too."""
    found = []
    for name, file in modules(package).items():
        if room(name) not in ("engine", "wakeup") and name not in COLD_READERS:
            continue
        for node in ast.parse(file.read_text(encoding="utf-8"), file.name).body:
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            value = getattr(node, "value", None)
            pairs = [(target, value)]
            if isinstance(target, ast.Tuple):
                values = value.elts if isinstance(value, ast.Tuple) else [value] * len(target.elts)
                pairs = list(zip(target.elts, values, strict=True))
            for key, written in pairs:
                if not isinstance(key, ast.Name) or written is None or not is_number(written):
                    continue
                same = [c for c in exported if c.endswith("_" + key.id.strip("_"))]
                if same:
                    found.append(f"{name}:{node.lineno} types {key.id}, which is {same[0]}")
    layout = package / "engine" / "layout.py"
    for literal in ast.walk(ast.parse(layout.read_text(encoding="utf-8"))) if layout.exists() else ():
        if isinstance(literal, ast.Constant) and type(literal.value) is int:
            text = ast.get_source_segment(layout.read_text(encoding="utf-8"), literal) or ""
            if text.startswith("0x") and set(text[2:]) != {"F"}:
                found.append(f"shmsock.engine.layout:{literal.lineno} types {text}")
    return found


def is_number(node: ast.AST) -> bool:
    """An int that is written out, in whatever way."""
    return not any(isinstance(n, (ast.Name, ast.Attribute)) for n in ast.walk(node)) or (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range"
    )


def exported_numbers() -> dict[str, int]:
    from shmsock.native._core import lib

    names = {name: getattr(lib, name) for name in dir(lib) if name.startswith("SH_")}
    return {name: value for name, value in names.items() if isinstance(value, int)}


# Words that others write are read by functions of engine/layout.py, which return what they have checked.
READERS = {"shmsock.engine.layout", "shmsock.engine.memory"}


def raw_reads(package: Path) -> list[str]:
    """Where a word or bytes of the region are read elsewhere."""
    return [
        f"{name}:{node.lineno} reads the region"
        for name, file in modules(package).items()
        if room(name) in ("engine", "aio", "anyio", "commands", "observe", "wakeup") and name not in READERS
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), file.name))
        if isinstance(node, ast.Attribute)
        and node.attr in ("load", "read", "_base")
        and getattr(node.value, "attr", getattr(node.value, "id", "")) == "memory"
    ]


def test_the_core_s_numbers_are_typed_once() -> None:
    from shmsock.address import MAX_SECTIONS
    from shmsock.engine.layout import MAX_PEERS

    assert typed_twice(PACKAGE, exported_numbers()) == []
    assert MAX_SECTIONS == MAX_PEERS  # names and addresses are known without the core


def test_words_of_others_are_read_in_one_place() -> None:
    assert raw_reads(PACKAGE) == []


def test_no_two_modules_import_each_other() -> None:
    assert circles(PACKAGE) == []


def test_imports_go_downward() -> None:
    assert floor_breaches(PACKAGE) == []


def test_engine_knows_no_loop_and_no_clock() -> None:
    assert engine_breaches(PACKAGE) == []


def test_nothing_is_decided_on_bytes_that_others_can_change() -> None:
    assert ring_breaches(PACKAGE) == []


def test_files_are_small() -> None:
    assert long_files(PACKAGE, {".py", ".pyi", ".c", ".h"}, MAX_LINES) == []


def test_examples_are_short() -> None:
    assert long_files(ROOT / "examples", {".py"}, MAX_EXAMPLE_LINES - 1) == []


def test_no_test_folder_is_named_after_a_dependency() -> None:
    declared = re.search(r"^dependencies = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared is not None
    names = set(re.findall(r'"([a-z0-9_-]+)', declared[1])) | {"asyncio", "uvloop", "trio", "pytest"}
    assert {"cffi", "anyio"} <= names
    assert [p for p in (ROOT / "tests").rglob("*") if p.is_dir() and p.name in names] == []


# The rules can fail: a made-up package breaks each of them.


@pytest.fixture
def package(tmp_path: Path) -> Path:
    for file, text in {
        "__init__.py": "from shmsock.aio import streams",
        "errors.py": "",
        "address.py": "from .errors import X",
        "engine/__init__.py": "",
        "engine/node.py": "import struct\nfrom ..native import _core\nfrom .. import errors",
        "engine/links.py": "from . import node\nfrom .node import Node",
        "aio/__init__.py": "import asyncio",
        "aio/streams.py": "from shmsock.engine.engine import Node",
        "native/__init__.py": "",
    }.items():
        path = tmp_path / "shmsock" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "shmsock"


def test_good_package_passes(package: Path) -> None:
    assert floor_breaches(package) == []
    assert engine_breaches(package) == []


@pytest.mark.parametrize(
    "line",
    [
        "import shmsock.aio.streams",
        "from shmsock.aio import streams",
        "from ..aio.streams import Reader",
        "from .. import aio",
        "from .. import open_connection",
        "from shmsock import open_connection",
        "def f():\n    from ..aio import streams",
    ],
)
def test_upward_import_is_found(package: Path, line: str) -> None:
    (package / "engine" / "bad.py").write_text(line)
    (breach,) = floor_breaches(package)
    assert breach.startswith("shmsock.engine.bad:")
    assert breach.endswith("from above")


def test_upward_import_in_a_package_file_is_found(package: Path) -> None:
    (package / "engine" / "__init__.py").write_text("from ..aio import streams")
    assert len(floor_breaches(package)) == 1


def test_unknown_room_is_found(package: Path) -> None:
    (package / "attic.py").write_text("")
    assert "without a floor" in floor_breaches(package)[0]


def test_rooms_importing_each_other_are_found(package: Path) -> None:
    (package / "errors.py").write_text("from .address import X")
    assert floor_breaches(package) == ["address and errors import each other"]


@pytest.mark.parametrize("line", ["import time", "from asyncio import sleep", "import concurrent.futures"])
def test_impure_engine_is_found(package: Path, line: str) -> None:
    (package / "engine" / "bad.py").write_text(line)
    assert len(engine_breaches(package)) == 1


@pytest.mark.parametrize(
    "line",
    [
        "end = memchr(ep->rx + at, '\\n', n);",
        "const uint8_t *from = p->ep->rx;",
        "if (ep->rx[at] == '\\n')",
        "sh_copy_in(to, ep->rx, n); return memcmp(ep->rx, to, n);",
    ],
)
def test_a_look_into_a_ring_is_found_in_c(package: Path, line: str) -> None:
    (package / "native" / "bad.c").write_text(f"{{\n    {line}\n}}\n")
    assert len(ring_breaches(package)) == 1


@pytest.mark.parametrize(
    "line",
    [
        "conn.rx.find(b'x')",
        "re.search(b'x', conn.rx)",
        "b'x' in conn.rx",
        "self.rx[0:1] if self.rx == b'' else 0",
    ],
)
def test_a_look_into_a_ring_is_found_in_python(package: Path, line: str) -> None:
    (package / "engine" / "connection.py").write_text(line)
    assert len(ring_breaches(package)) == 1


def test_modules_in_a_circle_are_found(package: Path) -> None:
    assert circles(package) == []
    (package / "engine" / "node.py").write_text("if TYPE_CHECKING:\n    from shmsock.engine.links import X")
    assert circles(package) == ["shmsock.engine.links", "shmsock.engine.node"]


@pytest.mark.parametrize(
    "line",
    [
        "EOF = -2",
        "EOF: int = -2",
        "EMPTY, EOF = -1, -2",
        "EMPTY, EOF = range(2)",
        "MAX_RING = 1 << 30",
        "_EOF = -2",
    ],
)
def test_a_number_that_is_typed_twice_is_found(package: Path, line: str) -> None:
    (package / "engine" / "bad.py").write_text(line)
    (breach,) = typed_twice(package, {"SH_EOF": -2, "SH_MAX_RING": 1 << 30})
    assert breach.startswith("shmsock.engine.bad:1 types ")


def test_an_offset_that_is_typed_is_found(package: Path) -> None:
    (package / "engine" / "layout.py").write_text("def f(at):\n    return at + 0x140 & 0xFFFF\n")
    assert typed_twice(package, {}) == ["shmsock.engine.layout:2 types 0x140"]


@pytest.mark.parametrize("line", ["self.home.memory.load(at)", "memory.read(at, 8)", "load = x.memory.load"])
def test_a_word_that_is_read_elsewhere_is_found(package: Path, line: str) -> None:
    (package / "engine" / "links.py").write_text(line)
    assert raw_reads(package) == ["shmsock.engine.links:1 reads the region"]


def test_long_file_is_found(package: Path) -> None:
    (package / "errors.py").write_text("\n" * 701)
    assert long_files(package, {".py"}, MAX_LINES) == ["shmsock/errors.py: 701 lines"]


# -- the core's C files: none calls back up


def c_code(file: Path) -> str:
    """Without comments and strings."""
    text = re.sub(r"/\*.*?\*/", " ", file.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.sub(r'"(\\.|[^"\\])*"', '""', text)


def c_functions(file: Path) -> dict[str, tuple[bool, set[str]]]:
    """What a file defines: whether it is static, and all names in it. Functions begin in the first column."""
    found = {}
    for piece in re.split(r"^(?=\w)", c_code(file), flags=re.MULTILINE):
        if head := re.match(r"([\w \t*]*?)\b(\w+)\([^;{}]*\)\s*\{", piece):
            found[head[2]] = ("static" in head[1], set(re.findall(r"\b[A-Za-z_]\w*\b", piece[head.end() :])))
    return found


def c_circles(package: Path) -> list[str]:
    """A file that uses a function of another stands above it. What is inline in a header is its user's."""
    folder = package / "native"
    inline: dict[str, set[str]] = {}
    for header in sorted(folder.rglob("*.h")):
        inline.update({name: names for name, (_, names) in c_functions(header).items()})
    files = {file: c_functions(file) for file in sorted(folder.rglob("*.c"))}
    home = {name: file for file, made in files.items() for name, (private, _) in made.items() if not private}
    below: dict[str, set[str]] = {}
    for file in files:
        names = set(re.findall(r"\b[A-Za-z_]\w*\b", c_code(file)))
        while more := {n for name in names & inline.keys() for n in inline[name]} - names:
            names |= more
        below[str(file.relative_to(folder))] = {
            str(home[name].relative_to(folder)) for name in names & home.keys() if home[name] != file
        }
    return [
        f"{file} and {other} call each other"
        for file in below
        for other in sorted(reachable(file, below))
        if file < other and file in reachable(other, below)
    ]


def test_no_c_file_calls_back_up() -> None:
    assert c_circles(PACKAGE) == []


@pytest.mark.parametrize("where", ["c", "header"])
def test_c_files_that_call_each_other_are_found(package: Path, where: str) -> None:
    native = package / "native"
    (native / "low.c").write_text("/* above() */\nint low(void) { return 1; }\n")
    (native / "high.c").write_text(
        "static int own(void) { return low(); }\nint high(void)\n{\n    return own();\n}\n"
    )
    assert c_circles(package) == []
    (native / "low.h").write_text("static inline int through(void) { return high(); }\n")
    assert c_circles(package) == []
    call = "through" if where == "header" else "high"
    (native / "low.c").write_text(f"int low(void) {{ return 1; }}\nint back(void) {{ return {call}(); }}\n")
    assert c_circles(package) == ["high.c and low.c call each other"]


# Words that others can change are loaded in foreign.h, and where what was loaded is checked at once. (Of the
# cold paths' functions Python checks what they return.)
C_LOADERS = {
    "wake.c": {"sh_any_notified"},
    "link.c": {"sh_node_new", "sh_node_claim", "collect", "sh_acknowledge", "sh_restart", "sh_adopt"},
    "spin.c": {"has_to_wake", "sh_spin_on"},
    "ring.h": {"sh_writable", "sh_copy_ring"},
    "ring.c": {"sh_notify_slot", "sh_see_head", "follow", "sh_refresh", "sh_rearm_touched"},
    "slots.c": {"sh_ep_at"},
    "grow.c": {"move"},
    "datagram.c": {"is_bound", "reads_on", "get"},
    "handshake.c": {"sh_message_recv", "sh_ep_open"},
    "heartbeat.c": {"beat", "load_kicks", "sh_heartbeat_start"},
    "pump.c": {"is_suspicious", "sh_safety", "news"},
    "memory.c": {"sh_load64", "sh_read_bytes", "sh_listen_find", "sh_listen_still", "sh_survey"},
    "node.h": {"sh_holds"},
    "speed.c": {"sh_time_reads"},
}
RAW_LOAD = {"sh_load", "sh_peek", "sh_copy_in"}


def load_breaches(package: Path) -> list[str]:
    folder = package / "native"
    return [
        f"{file.relative_to(folder)}: {name}() loads a word that others can change"
        for file in sorted(folder.rglob("*.[ch]"))
        if file.name not in ("atomics.h", "foreign.h", "fake.c")
        for name, (_, names) in c_functions(file).items()
        if names & RAW_LOAD and name not in C_LOADERS.get(file.name, ())
    ]


def test_few_functions_load_what_others_can_change() -> None:
    assert load_breaches(PACKAGE) == []
    for name, loaders in C_LOADERS.items():
        found = c_functions(PACKAGE / "native" / name)
        assert {loader for loader in loaders if found[loader][1] & RAW_LOAD} == loaders


def test_a_raw_load_is_found(package: Path) -> None:
    (package / "native" / "spin.c").write_text(
        "int has_to_wake(void) { return sh_load(p, 0); }\nint other(void)\n{\n    return sh_load(p, 0);\n}\n"
    )
    assert load_breaches(package) == ["spin.c: other() loads a word that others can change"]
