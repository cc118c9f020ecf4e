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
