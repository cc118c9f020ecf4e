"""Bring the README's picture and table up to date with the last build: `make readme`.

The notebook left them in build/source/book/results; copies go to book/readme, so that the repository's page shows what
a build measured, with the numbers of every run, the versions and the commit beside it. Nothing in the README's table is
typed by hand.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "book" / "readme"
SECTION = re.compile(r"(<!-- results:[^>]*-->\n).*?(<!-- /results -->)", re.DOTALL)


def with_table(readme: str, table: str) -> str:
    """Return the text of the README with `table` between its two result marks.

    Raises
    ------
    ValueError
        If the marks are not there.
    """
    if not SECTION.search(readme):
        raise ValueError("README.md has no section between <!-- results: ... --> and <!-- /results -->")
    return SECTION.sub(lambda match: f"{match[1]}\n{table}\n{match[2]}", readme)


def main() -> None:
    """Copy the results and rewrite the README."""
    built = ROOT / "build" / "source" / "book" / "results"
    if not (built / "permuted_masks.md").exists():
        sys.exit(f"{built} holds no results: run make first")
    KEPT.mkdir(exist_ok=True)
    for ending in ("svg", "md"):
        shutil.copy(built / f"permuted_masks.{ending}", KEPT)
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    record = json.loads((built / "permuted_masks.json").read_text(encoding="utf8"))
    record = {"command": "make readme", "commit": commit or "unknown", **record}
    (KEPT / "permuted_masks.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf8")
    readme = ROOT / "README.md"
    table = (KEPT / "permuted_masks.md").read_text(encoding="utf8")
    readme.write_text(with_table(readme.read_text(encoding="utf8"), table), encoding="utf8")


if __name__ == "__main__":
    main()
