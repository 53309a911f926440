"""What `make release` refuses, and the workflow for forks: valid, pinned, its steps in the Makefile."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import shmsock
from release import check
from release.wheels import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def git(root: Path, *arguments: str) -> str:
    who = ["-c", "user.name=shmsock", "-c", "user.email=shmsock@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *who, *arguments], cwd=root, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One that can be released."""
    for path, text in {
        "shmsock/__init__.py": '__version__ = "1.2.3"\n',
        "CHANGELOG.md": "# Changelog\n\n## [Unreleased]\n\n## [1.2.3] - 2026-01-02\n\n### Added\n- It.\n",
        ".gitignore": ".cache\n",
    }.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "All of it")
    monkeypatch.setattr(check, "ROOT", tmp_path)
    monkeypatch.setattr(check, "TESTED", tmp_path / ".cache" / "tested")
    check.note_tested()
    return tmp_path


def test_a_release(tree: Path) -> None:
    assert list(check.problems(tree)) == []


@pytest.mark.parametrize(
    ("path", "old", "new", "said"),
    [
        ("CHANGELOG.md", "## [Unreleased]\n", "## [Unreleased]\n- More.\n", "has changes under [Unreleased]"),
        ("CHANGELOG.md", "## [Unreleased]\n\n", "", "does not begin with [Unreleased]"),
        ("CHANGELOG.md", " - 2026-01-02", "", "does not go on with `## [1.2.3] - YEAR"),
        ("shmsock/__init__.py", "1.2.3", "1.2.4", "does not go on with `## [1.2.4] - YEAR"),
    ],
)
def test_what_does_not_agree(tree: Path, path: str, old: str, new: str, said: str) -> None:
    (tree / path).write_text((tree / path).read_text().replace(old, new))
    git(tree, "commit", "-q", "-a", "-m", "Something else")
    check.note_tested()
    found = list(check.problems(tree))
    assert found
    assert said in found[0]


def test_what_git_knows(tree: Path) -> None:
    git(tree, "tag", "v1.2.3")
    (tree / "left").write_text("")
    check.note_tested()
    git(tree, "commit", "-q", "--allow-empty", "-m", "Nothing")
    assert [p.partition(":")[0] for p in check.problems(tree)] == [
        "the tree is not clean",
        "there is a tag v1.2.3",
    ]
    git(tree, "add", ".")
    git(tree, "commit", "-q", "-m", "What nobody tested")
    assert "`make test` was not run" in list(check.problems(tree))[-1]


def test_the_version_is_that_of_the_changelog() -> None:
    assert check.version() == shmsock.__version__
    coming, newest, *_ = check.changes().items()
    assert coming[1] or newest[0].startswith(f"[{shmsock.__version__}]")


def lint(*argv: str | Path) -> subprocess.CompletedProcess[str]:
    beside: Sequence[str | Path] = [Path(sys.executable).parent / argv[0], *argv[1:]]
    return subprocess.run(beside, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def problem_of(workflow: Path) -> str:
    schema = lint("check-jsonschema", "--builtin-schema", "vendor.github-workflows", workflow)
    audit = lint("zizmor", "--offline", "--no-progress", "--quiet", workflow)
    own = [] if not (actionlint := shutil.which("actionlint")) else [lint(actionlint, workflow)]
    return "".join(done.stdout for done in (schema, audit, *own) if done.returncode)


def test_workflows_are_valid(tmp_path: Path) -> None:
    assert WORKFLOWS
    for workflow in WORKFLOWS:
        assert problem_of(workflow) == ""
        spoilt = tmp_path / workflow.name
        text = workflow.read_text()
        spoilt.write_text(re.sub(r"@[0-9a-f]{40} # (\S+)", r"@\1", text))
        assert "unpinned-uses" in problem_of(spoilt)
        spoilt.write_text(text.replace("runs-on:", "runs-in:"))
        assert "runs-in" in problem_of(spoilt)


def test_workflows_call_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for workflow in WORKFLOWS:
        steps = re.findall(r"^\s*(?:- )?run: (.*)$", workflow.read_text(), re.MULTILINE)
        assert steps
        assert [s for s in steps if s != ".ci/run" and s.removeprefix("make ") not in targets] == []
