"""Checks what a release needs, and says what comes next: `make release`. It publishes nothing."""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from release.wheels import SUMS

__all__ = ["changes", "problems", "version"]

ROOT = Path(__file__).resolve().parent.parent
TESTED = ROOT / ".cache" / "tested"

NEXT = """\
dist/ has {version}: {files} files, and {sums}. Nothing was published. Next:

    git tag -s v{version} -m 'shmsock {version}' && git push origin v{version}
    .venv/bin/twine upload dist/*.tar.gz dist/*.whl
    (the notes of the release: what CHANGELOG.md has of {version}; with it {sums})
"""


def version(root: Path = ROOT) -> str:
    """What shmsock/__init__.py says, which is where everything else has it from."""
    for node in ast.parse((root / "shmsock" / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return str(ast.literal_eval(node.value))
    raise ValueError("shmsock/__init__.py has no __version__")


def changes(root: Path = ROOT) -> dict[str, str]:
    """The sections of CHANGELOG.md, by their headings."""
    text = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    parts = re.split(r"^## (.*)\n", text, flags=re.MULTILINE)
    return {heading: body.strip() for heading, body in zip(parts[1::2], parts[2::2], strict=True)}


def problems(root: Path = ROOT) -> Iterator[str]:
    """What keeps the tree from being a release."""
    now = version(root)
    if left := _git(root, "status", "--porcelain"):
        yield f"the tree is not clean: {left.splitlines()[0].strip()} (git status)"
    headings = list(changes(root))
    if not headings or headings[0] != "[Unreleased]":
        yield "CHANGELOG.md does not begin with [Unreleased]"
    elif changes(root)["[Unreleased]"]:
        yield f"CHANGELOG.md has changes under [Unreleased]: they belong to {now}"
    if not re.fullmatch(rf"\[{re.escape(now)}\] - \d{{4}}-\d\d-\d\d", [*headings, "", ""][1]):
        yield f"CHANGELOG.md does not go on with `## [{now}] - YEAR-MONTH-DAY`"
    if f"v{now}" in _git(root, "tag").split():
        yield f"there is a tag v{now}: give shmsock/__init__.py the next version"
    tested = TESTED.read_text().strip() if TESTED.exists() else ""
    if tested != _git(root, "rev-parse", "HEAD^{tree}"):
        yield "`make test` was not run to its end with this tree"


def note_tested() -> None:
    """Remember that this tree passed all tests, if it is one that git knows."""
    if (ROOT / ".git").exists() and not _git(ROOT, "status", "--porcelain"):
        TESTED.parent.mkdir(exist_ok=True)
        TESTED.write_text(_git(ROOT, "rev-parse", "HEAD^{tree}"))


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("before", "after", "tested"))
    what = parser.parse_args().what
    if what == "tested":
        note_tested()
    elif what == "before":
        if found := list(problems()):
            sys.exit("".join(f"release: {problem}\n" for problem in found))
    else:
        files = [*Path(ROOT, "dist").glob("*.whl"), *Path(ROOT, "dist").glob("*.tar.gz")]
        print(NEXT.format(version=version(), files=len(files), sums=SUMS), end="")


if __name__ == "__main__":
    main()
