"""What every page of the built book weighs, and where its links lead; no browser needed."""

from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

from bs4 import BeautifulSoup

LIMIT = 2_000_000  # bytes of a page with its pictures, scripts and style sheets


@cache
def parsed(path: Path) -> BeautifulSoup:
    """The page at `path`."""
    return BeautifulSoup(path.read_text(encoding="utf8"), "html.parser")


@cache
def anchors(path: Path) -> frozenset:
    """The ids that a link to the page at `path` can name."""
    return frozenset(tag["id"] for tag in parsed(path).find_all(id=True))


def local(page: Path, address: str) -> tuple[Path, str] | None:
    """The file and the anchor that `address` on `page` leads to, or None where it leaves the book."""
    parts = urlsplit(address)
    if parts.scheme or parts.netloc:
        return None
    return (page.parent / unquote(parts.path)).resolve() if parts.path else page, unquote(parts.fragment)


def test_internal_links_resolve(book, page):
    path = book / page
    dead = []
    for link in parsed(path).find_all("a", href=True):
        if (found := local(path, link["href"])) is not None:
            target, anchor = found
            if not target.is_file() or (anchor and target.suffix == ".html" and anchor not in anchors(target)):
                dead.append(link["href"])
    assert dead == []


def test_page_is_light(book, page):
    path = book / page
    found = parsed(path).select("img, script[src], link[rel=stylesheet]")
    files = {local(path, tag.get("src") or tag["href"]) for tag in found} - {None}
    size = path.stat().st_size + sum(file.stat().st_size for file, _ in files)
    assert size < LIMIT, f"{page} with what it loads is {size:,} bytes, the limit is {LIMIT:,}"
