"""Keeps what a release leaves behind, for the tests of the releases that follow.

python -m tests.golden pack VERSION [CHECKOUT]    its sources, of this checkout or another, as an archive
python -m tests.golden write VERSION [SCENE...]   regions that it writes: it is built from that archive
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.golden.versions import HERE, ROOT, environment, pack


def main(action: str, version: str, *rest: str) -> None:
    if action == "pack":
        kept = pack(Path(*rest) if rest else ROOT, version)
        print(f"{kept}: {kept.stat().st_size >> 10} KiB")
    elif action == "write":
        folder = HERE / "regions" / version
        script = [sys.executable, str(HERE / "scenes.py"), str(folder), *rest]
        subprocess.run(script, env=environment(version), check=True)
        for file in sorted(folder.iterdir()):
            print(f"{file}: {file.stat().st_size} bytes")
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) > 2 else sys.exit(__doc__)
