"""Every page of the built book, as a reader without a network sees it."""

import pytest

# Mathematics that MathJax has not set, outside code, where LaTeX is meant to be read.
RAW_LATEX = r"""() => {
    const visible = document.body.cloneNode(true);
    visible.querySelectorAll("mjx-container, code, pre, script, style").forEach(node => node.remove());
    return visible.textContent.match(/\\\(|\\\[|\$\$|\\[dt]?frac\b|\\begin\{/g) || [];
}"""

# decode() also fetches a picture that waits to be scrolled to, and fails for a broken one.
BROKEN_IMAGES = """async () => {
    const broken = [];
    for (const image of document.images) {
        await image.decode().catch(() => {});
        if (!image.naturalWidth) broken.push("does not load: " + image.src.slice(0, 120));
        if (!image.alt.trim()) broken.push("has no alt text: " + image.src.slice(0, 120));
    }
    return broken;
}"""

SHOWN = """explore =>
    [...explore.querySelectorAll("img")].filter(image => image.checkVisibility()).map(image => image.src)"""


@pytest.fixture
def visit(browser, addresses):
    """Open a page by its scheme and path, offline; afterwards nothing may have gone wrong on it."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, reduced_motion="reduce")
    problems = []

    def open_page(scheme, path):
        base = addresses[scheme]

        def gate(route):
            if route.request.url.startswith((base, "data:", "blob:")):
                route.continue_()
            else:
                problems.append(f"request outside: {route.request.url}")
                route.abort()

        context.route("**/*", gate)
        page = context.new_page()
        page.on("requestfailed", lambda request: problems.append(f"failed request: {request.url} {request.failure}"))
        page.on("response", lambda reply: reply.status >= 400 and problems.append(f"{reply.status}: {reply.url}"))
        page.on("pageerror", lambda error: problems.append(f"page error: {error}"))
        page.on("console", lambda line: line.type == "error" and problems.append(f"console: {line.text}"))
        page.goto(f"{base}/{path}", wait_until="load")
        page.wait_for_load_state("networkidle")
        page.evaluate("() => window.MathJax?.startup?.promise")
        return page

    yield open_page
    context.close()
    assert not problems, "\n".join(problems)


def check_whole(page):
    """Mathematics is set and pictures are there; what went wrong in loading, `visit` tells."""
    assert page.evaluate(RAW_LATEX) == []
    assert page.evaluate(BROKEN_IMAGES) == []
    assert page.locator("mjx-merror").count() == 0


def test_page_is_whole_over_http(visit, page):
    check_whole(visit("http", page))


def test_chapter_is_whole_from_a_folder_and_fits_a_narrow_screen(visit, chapter):
    page = visit("file", chapter)
    check_whole(page)
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize("scheme", ["http", "file"])
def test_every_control_changes_the_picture_from_the_keyboard(visit, scheme, explorable):
    page = visit(scheme, explorable)
    explores = page.locator(".permask-explore").all()
    assert explores, "no page of the book has a control"
    for explore in explores:
        controls = explore.locator("input[type=range], input[type=radio]:checked").element_handles()
        assert controls, "a figure with controls that has none"
        for control in controls:
            before = explore.evaluate(SHOWN)
            assert len(before) == 1, f"{len(before)} frames are shown at once"
            at_end = control.evaluate("input => input.type === 'range' && input.value === input.max")
            control.focus()
            page.keyboard.press("ArrowLeft" if at_end else "ArrowRight")
            after = explore.evaluate(SHOWN)
            changed = len(after) == 1 and after != before  # pictures are long; keep them out of the message
            assert changed, f"{control.evaluate('input => input.outerHTML')} leaves the picture as it was"
