"""The built book and a headless Chromium for it.

Without a built book or a browser these tests are skipped with the reason; PERMASK_REQUIRE_BROWSER=1, which continuous
integration sets, makes that an error.
"""

import os
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

BOOK = Path(__file__).parents[2] / "build" / "_build" / "html"
BROWSERS = (os.environ.get("CHROMIUM", "chromium"), "chromium-browser", "google-chrome")
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-sync", "--no-first-run"]
OPTIONS += ["--disable-background-networking", "--disable-component-update"]  # the browser's own requests


def pytest_generate_tests(metafunc):
    """One test per page (any page), chapter (a page other than the listings of source code, which are similar, so that
    one and their index are enough), explorable (a page with controls) or draggable (with a point to drag)."""
    pages = sorted(BOOK.rglob("*.html"))
    listings = [path for path in pages if "_modules" in path.parts]
    texts = {path: path.read_text(encoding="utf8") for path in pages if path not in listings[2:]}
    chapters = [path for path, text in texts.items() if 'http-equiv="Refresh"' not in text]  # which leads to another
    explorables = [path for path, text in texts.items() if 'class="permask-explore"' in text]
    draggables = [path for path, text in texts.items() if '"drag": [' in text]
    kinds = {"page": pages, "chapter": chapters, "explorable": explorables, "draggable": draggables}
    for kind in kinds.keys() & set(metafunc.fixturenames):
        # Without a book there is still one test, to say so.
        metafunc.parametrize(kind, [path.relative_to(BOOK).as_posix() for path in kinds[kind]] or ["none"])


def unavailable(reason):
    """Skip because of `reason`, or fail where a browser test must not be skipped."""
    (pytest.fail if os.environ.get("PERMASK_REQUIRE_BROWSER") == "1" else pytest.skip)(reason)


@pytest.fixture(scope="session")
def book():
    """The folder of the built book."""
    if not (BOOK / "index.html").exists():
        unavailable(f"no built book at {BOOK}: run make")
    return BOOK


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium."""
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        unavailable(f"no browser: none of {', '.join(BROWSERS)} is on the path")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=OPTIONS)
        yield chromium
        chromium.close()


class Silent(SimpleHTTPRequestHandler):
    """A file server that does not log its requests."""

    def log_message(self, *args):
        """Say nothing."""


@pytest.fixture(scope="session")
def addresses(book):
    """The address of the book for each scheme that a reader may use."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=book)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield {"http": f"http://127.0.0.1:{server.server_port}", "file": book.as_uri()}
        server.shutdown()


@pytest.fixture
def visit(browser, addresses):
    """Open a page by its scheme and path, offline; afterwards nothing may have gone wrong on it."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    problems = []

    def open_page(scheme, path, motion="reduce"):
        base = addresses[scheme]

        def gate(route):
            if route.request.url.startswith((base, "data:", "blob:")):
                route.continue_()
            else:
                problems.append(f"request outside: {route.request.url}")
                route.abort()

        context.route("**/*", gate)
        page = context.new_page()
        page.emulate_media(reduced_motion=motion)
        page.on("requestfailed", lambda request: problems.append(f"failed request: {request.url} {request.failure}"))
        page.on("response", lambda reply: reply.status >= 400 and problems.append(f"{reply.status}: {reply.url}"))
        page.on("pageerror", lambda error: problems.append(f"page error: {error}"))
        page.on("console", lambda line: line.type == "error" and problems.append(f"console: {line.text}"))
        # A late request would be made under either scheme; that none is costs half a second.
        page.goto(f"{base}/{path}", wait_until="networkidle" if scheme == "http" else "load")
        return page

    yield open_page
    context.close()
    assert not problems, "\n".join(problems)
