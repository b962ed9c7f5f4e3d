"""Fetches what the kernels in a wheel are built against: each minor version of torch that is supported.

    python .ci/torches.py FOLDER [MINOR...]

leaves the headers of each and the libraries that are linked in FOLDER/<minor>, and nothing else in FOLDER.
They come out of torch's own wheels, of which most is thrown away again; nothing is installed. One Python's
serve all: the headers are the same, and a build takes no more than the names from the libraries.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MINORS = ("2.9", "2.10", "2.11", "2.12", "2.13", "2.14")
PYTHON = "3.12"  # every one of these has a wheel for it
KEPT = re.compile(
    r"torch/include/.*|torch/lib/(lib)?(c10|torch|torch_cpu|torch_python)\.\w+|torch-[^/]*/METADATA"
)


def fetch(minor: str, folder: Path) -> None:
    download = "pip download --quiet --disable-pip-version-check --no-deps --only-binary :all:"
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        wheels, unpacked = Path(name, "wheels"), Path(name, "unpacked")
        which = ["--python-version", PYTHON, "--dest", str(wheels), f"torch=={minor}.*"]
        subprocess.run([sys.executable, "-m", *download.split(), *which], check=True)
        (wheel,) = wheels.iterdir()
        with zipfile.ZipFile(wheel) as content:
            content.extractall(unpacked, [name for name in content.namelist() if KEPT.fullmatch(name)])
        unpacked.rename(folder)  # at the end: what is there is whole


def main() -> None:
    folder, minors = Path(sys.argv[1]), sys.argv[2:] or MINORS
    folder.mkdir(parents=True, exist_ok=True)
    for other in folder.iterdir():
        if other.name not in minors:
            shutil.rmtree(other)
    for minor in minors:
        if not (folder / minor).exists():
            print(f"torch {minor}: its headers and libraries, out of its wheel", flush=True)
            fetch(minor, folder / minor)


if __name__ == "__main__":
    main()
