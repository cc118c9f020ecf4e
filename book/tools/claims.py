"""Report the claims of the book from its executed notebooks: ``claims.py summary``, ``page FILE`` or ``check``.

``summary`` prints how many claims hold in this build and lists those that do not, and ends with status 1 if a notebook
failed. ``page`` writes the list of all claims for the chapter *Claims*. ``check`` is for continuous integration, where
chance must not cause failures: it fails only if more claims fail than their rates allow (:func:`allowed`), or if a
claim that held in every repetition also fails with other seeds.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

from book.tools.execute import PARTIAL, run, seeded
from permask_core.data.measured import measured_claims
from permask_core.display.claims import Claim, rate_text, rates
from permask_core.display.tables import table
from permask_core.runs.notebooks import notebook_version, read_claims

ROOT = Path(__file__).resolve().parents[2]
BUILT = ROOT / "build" / "source" / "notebooks"
CONFIDENCE = 0.999  # probability that chance does not exceed the bound of a build
OTHER_SEEDS = 500_000  # added for the second try of a claim; far from the seeds of any repetition


class Page(NamedTuple):
    """A chapter: its ``name``, ``title`` and ``part`` of the book, its error ``failed`` ("" if none), its ``claims``,
    and their ``rates`` by sentence (empty if this version was not repeated)."""

    name: str
    title: str
    part: str
    failed: str
    claims: list
    rates: dict


def read_book() -> list[Page]:
    """Return the executed notebooks in the order of the book.

    Raises
    ------
    FileNotFoundError
        If a chapter was not executed.
    """
    pages = []
    for part in yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf8"))["parts"]:
        for name in (Path(chapter["file"]).name for chapter in part["chapters"]
                     if chapter["file"].startswith("notebooks/")):
            path = BUILT / f"{name}.ipynb"
            executed = json.loads(path.read_text(encoding="utf8"))
            text = "\n".join("".join(cell["source"]) for cell in executed["cells"] if cell["cell_type"] == "markdown")
            version = notebook_version(ROOT / "notebooks" / f"{name}.ipynb")
            failed = executed["metadata"].get(PARTIAL, "")
            pages.append(Page(name, re.search(r"^# (.+)$", text, re.MULTILINE)[1], part["caption"], failed,
                              [] if failed else read_claims(path), rates(name, version)))
    return pages


def failing(pages: list[Page]) -> list[tuple[Page, dict]]:
    """Return the claims that do not hold in this build, each with its page."""
    return [(page, one) for page in pages for one in page.claims if not one["holds"]]


def allowed(pages: list[Page], repeated: dict, confidence: float = CONFIDENCE) -> int:
    """Return how many claims may fail in one build by chance.

    Claims of one page share their networks and fail together, so pages are the units. The model of a page is that it
    loses as many claims as in one of its n repetitions, each with equal probability, or with probability 1/(n + 1) one
    more than in the worst repetition. The sum over the pages, which are independent in the model, is within the bound
    with probability `confidence`. A page that was not repeated may lose all its claims.

    Parameters
    ----------
    pages
        Result of :func:`read_book`.
    repeated
        ``pages`` of :func:`permask_core.data.measured.measured_claims`.
    """
    total, unknown = np.ones(1), 0
    for page in pages:
        if not page.rates:
            unknown += len(page.claims)
            continue
        lost = {}
        for made in repeated[page.name]["claims"].values():
            for name, one in made.items():
                lost[name] = lost.get(name, 0) + (not one["holds"])
        counts = [*lost.values(), max(lost.values()) + 1]
        total = np.convolve(total, np.bincount(counts) / len(counts))
    return int(np.searchsorted(total.cumsum(), confidence)) + unknown


def line(page: Page, one: dict) -> str:
    """Return a claim as one line of text."""
    return f'{page.name}: "{one["sentence"]}" ({one["evidence"]}; {rate_text(page.rates.get(one["sentence"]))})'


def summary(pages: list[Page]) -> int:
    """Print how many claims hold and which notebooks failed, and return the status: 1 if a notebook failed."""
    lost, made = failing(pages), sum(len(page.claims) for page in pages)
    print(f"Claims: {made - len(lost)} of {made} hold in this build{'; these do not:' if lost else '.'}")
    for page, one in lost:
        print(f"  {line(page, one)}")
    broken = [page for page in pages if page.failed]
    for page in broken:
        print(f"Failed: {page.name}, {page.failed}")
    return bool(broken)


def write_page(pages: list[Page]) -> str:
    """Return the results part of the chapter *Claims* as Markdown."""
    lost, made = failing(pages), sum(len(page.claims) for page in pages)
    repeated = measured_claims()
    blocks = [f"**{made - len(lost)} of {made} claims hold in this build.**"]
    old = [page for page in pages if page.claims and not page.rates]
    if old:
        blocks.append(f"Of {'one page' if len(old) == 1 else f'{len(old)} pages'} the code has changed since the "
                      "repetitions, so nothing is known of how often the claims there hold.")
    if any(page.rates for page in pages):
        blocks.append(table(_repetitions(pages, repeated), caption="The repetitions, and how many claims held in each. "
                            f"Measured in advance: {repeated['command']}.").data)
    part = ""
    for page in (page for page in pages if page.claims or page.failed):
        if page.part != part:
            part = page.part
            blocks.append(f"## {part}")
        blocks.append(f"### {{doc}}`{page.title} </notebooks/{page.name}>`")
        if page.failed:
            blocks.append("This page failed in this build, so nothing is known about its claims.")
        blocks += [Claim(**one, rate=rate_text(page.rates.get(one["sentence"])))._repr_mimebundle_()[0]["text/html"]
                   for one in page.claims]
    return "\n\n".join(blocks) + "\n"


def _repetitions(pages, repeated):
    current = {page.name for page in pages if page.rates}
    rows = []
    for name, settings in repeated["repetitions"].items():
        found = [made[name]["holds"] for page in current for made in repeated["pages"][page]["claims"].values()
                 if name in made]
        variables = ", ".join(f"{key}={value}" for key, value in settings["environment"].items())
        machines = settings["machines"]
        commits = list(dict.fromkeys(one["commit"] for one in machines))
        rows.append({"repetition": name, "claims held": f"{sum(found)} of {len(found)}",
                     "processor": ", ".join(dict.fromkeys(one["processor"] for one in machines)),
                     "commit": commits[0] + f" and {len(commits) - 1} more" * (len(commits) > 1) if commits else "",
                     "what is different": variables or f"every seed plus {settings['seeds']}"})
    return rows


def check(pages: list[Page]) -> int:
    """Print failures of claims that exceed chance, and return the status: 1 if there are any."""
    lost, bound = failing(pages), allowed(pages, measured_claims()["pages"])
    print(f"{len(lost)} claims do not hold; chance allows {bound}.")
    wrong = len(lost) > bound
    always = [(page, one) for page, one in lost
              if (rate := page.rates.get(one["sentence"])) is not None and rate[0] == rate[1]]
    for page in dict.fromkeys(page.name for page, _ in always):
        source, target = ROOT / "notebooks" / f"{page}.ipynb", ROOT / "build" / "again" / f"{page}.ipynb"
        target.parent.mkdir(parents=True, exist_ok=True)
        failed = run(source, target, seeded(source, OTHER_SEEDS))
        again = {} if failed else {one["sentence"]: one["holds"] for one in read_claims(target)}
        for sentence in (one["sentence"] for of, one in always if of.name == page):
            holds = again.get(sentence, False)
            print(f'{page}: "{sentence}" held in every repetition and not in this build; with other seeds it '
                  f"{'holds' if holds else 'fails again'}. {failed}")
            wrong |= not holds
    return int(wrong)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("summary", "page", "check"))
    parser.add_argument("file", type=Path, nargs="?", help="output file of `page`")
    given = parser.parse_args()
    book = read_book()
    if given.what == "page":
        given.file.write_text(write_page(book), encoding="utf8")
    else:
        sys.exit({"summary": summary, "check": check}[given.what](book))
