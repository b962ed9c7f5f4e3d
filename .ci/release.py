"""Makes a release of what is committed, on this machine alone: nothing is pushed.

    python .ci/release.py 1.2.3

gives the version and today's date to the files that tell them, builds the source distribution and the wheels,
has their descriptions checked, and commits and tags. Where something fails the tree is as it was before.
"""

from __future__ import annotations

import datetime
import re
import subprocess
import sys
from pathlib import Path

BUILD = ("make", "--no-print-directory", "distributions")
SEMANTIC = r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(rc[1-9]\d*)?"
# Where a version stands. Builds read the first; a test holds the others to it.
PLACES = {
    "contrastive_ops/__init__.py": r'(?<=^__version__ = ").*(?="$)',
    "CITATION.cff": r"(?<=^version: ).*$",
}
CHANGELOG = "CHANGELOG.md"


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.strip()


def objections(version: str) -> list[str]:
    """What is in the way of a release of that version."""
    found = []
    if not re.fullmatch(SEMANTIC, version):
        found.append(f"{version!r} is no version such as 1.2.3 or 1.2.3rc1")
    if git("status", "--porcelain"):
        found.append("there are changes that are not committed: commit or stash them")
    if git("tag", "--list", f"v{version}"):
        found.append(f"the tag v{version} exists")
    section = rf"^## {re.escape(version)} \(unreleased\)\n+- "
    if not re.search(section, Path(CHANGELOG).read_text(), re.MULTILINE):
        found.append(f'{CHANGELOG} has no section "## {version} (unreleased)" that says what is new')
    return found


def write(version: str, day: datetime.date) -> None:
    changes = {CHANGELOG: (rf"(?<=^## {re.escape(version)} \()unreleased(?=\)$)", day.isoformat())}
    changes |= {file: (pattern, version) for file, pattern in PLACES.items()}
    for file, (pattern, value) in changes.items():
        text, count = re.subn(pattern, value, Path(file).read_text(), flags=re.MULTILINE)
        if count != 1:
            raise ValueError(f"{file} has {count} lines for the version or its date")
        Path(file).write_text(text)


def release(version: str, build: tuple[str, ...] = BUILD) -> None:
    """In the folder of the repository."""
    if found := objections(version):
        sys.exit("no release: " + "; ".join(found))
    try:
        write(version, datetime.datetime.now(datetime.UTC).date())
        subprocess.run(build, check=True)
        git("commit", "--all", "--message", f"Version {version}")
    except BaseException:
        git("checkout", "HEAD", "--", CHANGELOG, *PLACES)
        raise
    git("tag", "--annotate", "--message", f"Version {version}", f"v{version}")
    print(f"committed and tagged v{version}; what is to be published lies in dist. git push --follow-tags")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    release(sys.argv[1])
