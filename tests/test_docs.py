"""The documents: their links lead somewhere, their commands and names exist, and what can be generated was.

`python -m tests.test_docs` (`make docs`) writes what is generated (GENERATED).
"""

from __future__ import annotations

import ast
import asyncio
import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import click
import pytest

import shmsock
from shmsock.cli import cli
from shmsock.engine import counters
from shmsock.engine.layout import default_slots
from shmsock.engine.memory import Memory, native_core
from shmsock.engine.settings import Settings
from shmsock.native._core import lib
from shmsock.observe.snapshot import MOST
from shmsock.region.sizes import format_size

ROOT = Path(__file__).resolve().parent.parent
TUNING = ROOT / "docs" / "tuning.md"
LIMITS = ROOT / "docs" / "limits.md"
DOCUMENTS = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "shmsock").rglob("*.md"),
        *(ROOT / "tests").rglob("*.md"),
    ]
)


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


for_each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)


def read(document: Path) -> str:
    return document.read_text(encoding="utf-8")


# -- links -------------------------------------------------------------------------------------------------

LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ +(.+?) *$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(document: Path, text: str) -> list[str]:
    broken = []
    for target in LINK.findall(FENCE.sub("", text)):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        there = (document.parent / file).resolve()
        if (file and not there.exists()) or (anchor and anchor not in anchors(read(there) if file else text)):
            broken.append(target)
    return broken


@for_each_document
def test_links_lead_somewhere(document: Path) -> None:
    assert broken_links(document, read(document)) == []


def test_every_guide_is_found_from_the_readme_and_on_the_site() -> None:
    linked = {target.partition("#")[0] for target in LINK.findall(read(ROOT / "README.md"))}
    guides = {name_of(guide) for guide in (ROOT / "docs").glob("*.md")}
    assert guides - linked == set()
    contents = read(ROOT / "docs" / "site" / "conf.py").split()
    assert {guide for guide in guides if guide.removesuffix(".md") not in contents} == set()


# -- commands ----------------------------------------------------------------------------------------------


def code(text: str) -> Iterator[str]:
    """Lines of indented and fenced blocks that are no Python, continued ones in one, and what stands in
    backticks."""
    text = re.sub(r"^```python$.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    blocks = [*re.findall(r"^    +(.+)$", text.replace("\\\n", " "), re.MULTILINE)]
    blocks += [
        line for block in FENCE.findall(text) for line in block.replace("\\\n", " ").splitlines()[1:-1]
    ]
    yield from (line.partition("  #")[0].strip() for line in blocks)
    yield from re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def unknown_options(words: list[str]) -> list[str]:
    """Subcommands and options of a `shmsock ...` that there are not."""
    command: click.Command = cli
    context = click.Context(cli)
    given = iter(words[1:])
    for word in given:
        if word == "--":  # the rest is another program's
            break
        if word.startswith("-"):
            options = {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
            if word.partition("=")[0] not in options | {"--help", "-h"}:
                return [*words, word]
        elif isinstance(command, click.Group) and re.fullmatch(r"[a-z-]+", word):
            found = command.get_command(context, word)
            if found is None and command is cli:
                return [*words, word]
            command = found or command
    return []


@for_each_document
def test_commands_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), re.MULTILINE))
    wrong: list[object] = []
    for line in code(read(document)):
        words = line.split() if "'" in line else shlex.split(line)
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        if words[:1] == ["shmsock"]:
            wrong += unknown_options(words)
        elif words[:1] == ["make"] and len(words) == 2 and words[1] not in targets:
            wrong.append(line)
        wrong += [w for w in words if re.fullmatch(r"examples/\S+\.\w+", w) and not (ROOT / w).exists()]
    assert wrong == []


PLACE = re.compile(r"(?:shmsock|docs|tests|examples|benchmarks)/[\w./-]*\w")


@for_each_document
def test_files_that_are_named_exist(document: Path) -> None:
    if document.name == "CHANGELOG.md":
        return  # it tells of what was
    named = {word for word in re.findall(r"`([^`\n]+)`", read(document)) if PLACE.fullmatch(word)}
    assert {word for word in named if not (ROOT / word).exists()} == set()


PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def compiled(block: str) -> CodeType:
    code: CodeType = compile(block, "a document", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    return code


@for_each_document
def test_python_in_documents_is_python(document: Path) -> None:
    for block in PYTHON.findall(read(document)):
        compiled(block)


def test_the_readme_does_what_it_says(
    shm_region: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SHMSOCK_NAME", "vm-b")
    names: dict[str, Any] = {"shmsock": shmsock}

    async def run() -> None:
        for block in PYTHON.findall(read(ROOT / "README.md")):
            await eval(compiled(block), names)
        for end in ("writer", "server"):
            names[end].close()
            await names[end].wait_closed()

    asyncio.run(run())
    assert capsys.readouterr().out == "b'hello'\n"


NAMED = re.compile(r"`([\w.]+)` +\(`([\w/.]+\.(?:py|c|h))`\)")
BOTH = re.compile(r"`([\w.]+)`,? and `([\w.]+)`\s+\(both `([\w/.]+)`\)")


def is_defined(name: str, file: Path) -> bool:
    """Does that file define it? `Class.method` of Python; functions, macros and structures of C."""
    source = read(file)
    if file.suffix != ".py":
        return bool(
            re.search(rf"^(?:[\w* ]*[ *]|# *define ){name}\(|^struct {name} {{", source, re.MULTILINE)
        )
    places = ast.parse(source).body
    for part in name.split("."):
        found = [n for n in places if isinstance(n, DEFINES) and n.name == part]
        if not found:
            return False
        places = found[0].body
    return True


DEFINES = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def test_what_the_architecture_names_is_there() -> None:
    text = " ".join(read(ROOT / "docs" / "architecture.md").split())
    named = [*NAMED.findall(text)]
    named += [(name, file) for one, two, file in BOTH.findall(text) for name in (one, two)]
    assert len(named) > 50
    missing = [
        f"{name} ({file})"
        for name, file in named
        if not (ROOT / "shmsock" / file).exists() or not is_defined(name, ROOT / "shmsock" / file)
    ]
    assert missing == []
    files = set(re.findall(r"`((?:native|engine|aio|anyio|region)/[\w./]*)`", text))
    assert {file for file in files if not (ROOT / "shmsock" / file).exists()} == set()


def test_names_of_the_core_are_those_of_the_core() -> None:
    """Of each `sh_...` in a document or a model; `sh_ep_*` is all that begin so."""
    core = "\n".join(read(file) for file in (ROOT / "shmsock" / "native").rglob("*.[ch]"))
    files = [*DOCUMENTS, *(ROOT / "tests" / "models").glob("*.pml")]
    named = {(name_of(file), name) for file in files for name in re.findall(r"\b(?:sh|SH)_\w+", read(file))}
    assert [at for at in sorted(named) if not re.search(rf"\b{at[1]}", core)] == []


# -- what is generated or said twice -----------------------------------------------------------------------


def between(what: str) -> re.Pattern[str]:
    return re.compile(rf"(?<=<!-- {what} -->\n).*?(?=<!-- /{what} -->)", re.DOTALL)


def shown(default: object) -> str:
    if isinstance(default, int) and not isinstance(default, bool) and default >= 1024 and default % 1024 == 0:
        return f"{default >> 20} MiB" if default % (1 << 20) == 0 else f"{default >> 10} KiB"
    return f"{default:g}" if isinstance(default, float) else str(default)


def settings_table() -> str:
    """All fields of Settings: name, default, and what its docstring says of it."""
    said = dict(re.findall(r"`(\w+)`: (.*?)(?=\s*`\w+`: |\s*\Z)", Settings.__doc__ or "", re.DOTALL))
    fields = dataclasses.fields(Settings)
    assert list(said) == [field.name for field in fields]
    rows = [f"| `{f.name}` | {shown(f.default)} | {' '.join(said[f.name].split())} |" for f in fields]
    return "\n".join(["| setting | default | what |", "|---|---|---|", *rows]) + "\n"


def connections_table() -> str:
    """By the size of a region and its peers: what one program gets."""
    rows, peers = [], (2, 4, 16, 64)
    memory = Memory(native_core(), bytearray(lib.SH_HEADER_SIZE))
    for size in (1 << 20, 16 << 20, 64 << 20, 256 << 20, 1 << 30, 2 << 30, 8 << 30):
        slots = [default_slots(memory, size, n) for n in peers]
        rows.append(
            f"| {format_size(size)} | " + " | ".join(f"{n * 7 // 8:,}" if n else "-" for n in slots) + " |"
        )
    head = "| region | " + " | ".join(f"{n} peers" for n in peers) + " |"
    return "\n".join([head, "|---" * (len(peers) + 1) + "|", *rows]) + "\n"


#: What is generated: in which document, between which marks, and by what.
GENERATED = {
    "settings": (TUNING, settings_table),
    "connections": (LIMITS, connections_table),
}


@pytest.mark.parametrize("what", GENERATED)
def test_tables_are_those_of_the_code(what: str) -> None:
    document, table = GENERATED[what]
    found = between(what).search(read(document))
    assert found is not None
    assert found[0] == table(), "run `make docs`"


def test_bounds_are_those_of_the_code() -> None:
    rows = dict(re.findall(r"^\| (.*?) \| (.*?) \|", read(LIMITS), re.MULTILINE))
    defaults = Settings()
    for what, most in {
        "peers of a region": lib.SH_MAX_PEERS,
        "slots of a section": lib.SH_MAX_SLOTS,
        "the smallest ring": lib.SH_MIN_RING,
        "the largest ring": lib.SH_MAX_RING >> 30,
        "a section": lib.SH_MIN_RING,
        "listening ports, and ports of datagrams, of a peer": lib.SH_LISTENERS,
        "connects towards one peer that have no answer": defaults.max_connects,
        "messages on their way between two peers": lib.SH_MAX_MESSAGES,
        "a datagram": lib.SH_DATAGRAM_MAX,
        "datagrams that wait in an endpoint": defaults.datagram_queue_bytes >> 20,
        "slots that `shmsock ss`, `top` and `info` look at": MOST,
    }.items():
        assert re.match(rf"{most:,}\b", rows[what]), what


def test_environment_variables_are_those_of_the_code() -> None:
    source = "\n".join(read(file) for file in (ROOT / "shmsock").rglob("*.py"))
    read_there = set(re.findall(r"environ[^\n]*?\"(SHMSOCK_[A-Z_]+)\"", source))
    assert read_there == set(re.findall(r"^\| `(SHMSOCK_[A-Z_]+)`", read(TUNING), re.MULTILINE))


def test_files_that_are_named_by_version_are_of_this_one() -> None:
    named = re.findall(r"shmsock-(\d+\.\d+\.\d+)", "".join(map(read, (ROOT / "docs").glob("*.md"))))
    assert set(named) == {shmsock.__version__}


def test_counters_are_those_of_the_code() -> None:
    for guide in ("doorbells.md", "differences-from-tcp.md"):
        text = read(ROOT / "docs" / guide)
        named = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) | set(
            re.findall(r"`(datagrams_\w+)`", text)
        )
        assert named
        assert named <= {*counters.OF_CORE, *counters.OF_ENGINE}, guide


def test_rules_are_those_of_the_code() -> None:
    """Each `SYNC X` in the code is a rule of LAYOUT.md, and each rule is there at both ends."""
    source = [read(file) for kind in ("c", "h", "py") for file in (ROOT / "shmsock").rglob(f"*.{kind}")]
    used = re.findall(r"SYNC ([A-Z]\w*)", "\n".join(source))
    _, _, ordering = read(ROOT / "shmsock" / "native" / "LAYOUT.md").partition("\n## Ordering\n")
    rules = re.findall(r"^\| ([A-Z]\w*) \|", ordering.partition("\n## ")[0], re.MULTILINE)
    assert set(used) - {"X"} == set(rules)
    partners = {"F1": "R1", "R1": "F1", "F2": "R2", "R2": "F2"}
    assert [rule for rule in rules if used.count(rule) + (partners.get(rule) in used) < 2] == []


PLACES = {"Header": "HEADER", "Section": "SECTION", "Pair": "PAIR", "Slot": "SLOT"}
WORDS = {"P, the tx word": "TX_WORD", "C, the rx word": "RX_WORD", "dev, ino": "DEV"}


def test_offsets_are_those_of_the_code() -> None:
    """The tables of LAYOUT.md against core.h, which layout.h asserts; and its message against the same."""
    lib = native_core().lib
    constants = {
        name for name in dir(lib) if re.match(r"SH_(HEADER|SECTION|PAIR|SLOT|MESSAGE)_[A-Z_]+$", name)
    }
    told = {}
    text = read(ROOT / "shmsock" / "native" / "LAYOUT.md")
    for heading, prefix in PLACES.items():
        table = re.search(rf"^## {heading}.*?\n\n(\|.*?)\n\n", text, re.MULTILINE | re.DOTALL)
        assert table is not None
        for offset, word in re.findall(r"^\| (\w+) \| [^|]+ \| ([^|]+) \|", table[1], re.MULTILINE):
            name = f"SH_{prefix}_{WORDS.get(word, word).upper()}"
            if name in constants:
                told[name] = int(offset, 0)
    message = re.search(r"^Message: (.*?), zeros to 64", text, re.MULTILINE | re.DOTALL)
    assert message is not None
    for word, offset in re.findall(r"`(\w+)`\s+(\d+)", message[1]):
        told[f"SH_MESSAGE_{word.upper()}"] = int(offset)
    sizes = {name for name in constants if name.endswith("_SIZE")}
    assert told == {name: getattr(lib, name) for name in constants - sizes - {"SH_SECTION_INO"}}
    assert f"Version: {lib.SH_VERSION}." in text


def test_figures_stand_in_one_place() -> None:
    rows = re.findall(r"^\| (?:64|connect).*\|$", read(ROOT / "README.md"), re.MULTILINE)
    assert len(rows) == 5
    kept = read(ROOT / "docs" / "benchmarks.md")
    assert [row for row in rows if row.removesuffix("|") not in kept] == []


# -- words that were given up: docs/glossary.md has those that came for them ---------------------------------

#: Nowhere.
OLD_NAMES = """
    Ear EOF_AT_REL Inbox KNOBS Keeper MUTE Outbox RANG SH_FLOWS SH_GLANCE SH_LOOK_REL SH_LOOKS SH_N_BELLS
    SH_N_MUTED SH_N_RUNG SH_REL SHMSOCK_ACCELERATOR STORM Turn _Outbox _Turn fabric fruitless keeper
    sh_bells_differ sh_doubt sh_ep_take sh_expect sh_flows sh_glance sh_keeper sh_know sh_look sh_look_at
    sh_look_again sh_mute sh_muted sh_p_word sh_polled sh_pump_on sh_reach sh_read_begin sh_read_now
    sh_ring_bell sh_rings sh_rung sh_take sh_take_later
"""
#: Not in documents, models and the core. (In Python `bell` is a variable, the object for a doorbell.)
OLD_WORDS = """
    accelerator accelerators bell bells calm fabric fruitless glance keeper knob knobs mute muted rang REL
    rung storm storms
"""
CODE = [
    file
    for folder in ("shmsock", "tests", "examples", "docs", ".ci")
    for file in (ROOT / folder).rglob("*")
    if (file.suffix in {".c", ".h", ".md", ".pml", ".py", ".pyi"} or folder == ".ci") and file.is_file()
]


def given_up(words: str, file: Path, flags: int = 0) -> list[str]:
    pattern = re.compile(rf"(?<![\w])(?:{'|'.join(words.split())})(?![\w])", flags)
    lines = enumerate(read(file).splitlines(), 1)
    return [f"{name_of(file)}:{n}: {found[0]}" for n, line in lines if (found := pattern.search(line))]


def test_old_names_do_not_come_back() -> None:
    assert [hit for file in CODE if file != Path(__file__) for hit in given_up(OLD_NAMES, file)] == []


def test_documents_models_and_core_use_the_words_of_the_glossary() -> None:
    core = (ROOT / "shmsock" / "native").rglob("*.[ch]")
    files = [*DOCUMENTS, *(ROOT / "tests" / "models").iterdir(), *core]
    told = [file for file in files if file.is_file() and file.name != "CHANGELOG.md"]
    assert [hit for file in told for hit in given_up(OLD_WORDS, file, re.IGNORECASE)] == []


# -- the checks can fail -----------------------------------------------------------------------------------


def test_a_broken_link_is_found() -> None:
    text = "# One\n[a](README.md) [b](none.md) [c](#one) [d](#two) [e](README.md#limits) [f](README.md#none)"
    assert broken_links(ROOT / "made-up.md", text) == ["none.md", "#two", "README.md#none"]


@pytest.mark.parametrize(
    "line", ["shmsock creat x", "shmsock create x --sized 2M", "shmsock bench serve --x"]
)
def test_a_wrong_command_is_found(line: str) -> None:
    assert unknown_options(line.split())
    assert list(code(f"    {line}\n")) == [line]


@pytest.mark.parametrize("line", ["shmsock create x --size 2M", "shmsock bench connect vm-b", "shmsock info"])
def test_a_right_command_is_let_pass(line: str) -> None:
    assert unknown_options(line.split()) == []


def test_a_word_that_came_back_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "a.c").write_text("sh_look(ep);\nsh_lookup(ep);\nThe Bell.\n")
    assert given_up(OLD_NAMES, tmp_path / "a.c") == ["a.c:1: sh_look"]
    assert given_up(OLD_WORDS, tmp_path / "a.c", re.IGNORECASE) == ["a.c:3: Bell"]


def generate(what: str) -> None:
    document, table = GENERATED[what]
    text = between(what).sub(lambda _: table(), read(document))
    document.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    for what in GENERATED:
        generate(what)
