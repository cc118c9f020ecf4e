"""Chapters as readers use them who need contrast, large letters, a keyboard, a narrow screen or paper."""

import importlib.resources

import pytest

from permask_core.display import DYNAMIC, METHODS
from permask_core.display.control import READABLE

AXE = (importlib.resources.files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf8")

# The entries of the reference are similar: the first stands for all.
FAULTS = """async options => {
    const exclude = ["dl.py ~ dl.py", "mjx-container"].filter(one => document.querySelector(one)).map(one => [one]);
    const found = await axe.run({exclude}, {resultTypes: ["violations"], preload: false, ...options});
    return found.violations.filter(one => ["serious", "critical"].includes(one.impact))
        .flatMap(one => one.nodes.map(node => `${one.id}: ${node.html.slice(0, 150)}`));
}"""
# All rules, with one that axe still calls experimental.
STRUCTURE = {"rules": {"label-content-name-mismatch": {"enabled": True}}}

# The smallest letters of every figure on the page, in pixels.
LETTERS = """async () => {
    const sizes = {};
    for (const image of document.querySelectorAll(".permask-frame img")) {
        const text = decodeURIComponent(await (await fetch(image.src)).text());
        const [letters, width] = ["data-letters", "width"].map(name => +text.match(name + `=["']([0-9.]+)`)[1]);
        sizes[image.alt.slice(0, 60)] = letters * image.getBoundingClientRect().width / width;
    }
    return sizes;
}"""

SCROLLERS = ".bd-article :is(pre, .permask-frame, .permask-scroll, .pst-scrollable-table-container)"
CUT = """selector => [...document.querySelectorAll(selector)].filter(
    one => one.checkVisibility() && one.scrollWidth > one.clientWidth + 1)
    .map(one => [one.outerHTML.slice(0, 100), one.tabIndex, getComputedStyle(one).backgroundAttachment])"""

WRAPPED = """names => [...document.querySelectorAll(".bd-article :is(th, td)")].filter(cell => {
    if (!names.includes(cell.innerText.trim().replace(/ \\((weights|activations)\\)$/, ""))) return false;
    const range = document.createRange(), height = () => range.getBoundingClientRect().height;
    range.selectNodeContents(cell);
    const before = height();
    cell.style.whiteSpace = "nowrap";
    return height() < before;
}).map(cell => cell.innerText)"""

OUTSIDE = """() => {
    const edge = document.querySelector(".bd-article-container").getBoundingClientRect().right + 1;
    return [...document.querySelectorAll(".bd-article :is(pre, table, img, mjx-container > svg)")].filter(
        one => one.checkVisibility() && (one.getBoundingClientRect().right > edge ||
                                         one.matches("pre") && one.scrollWidth > one.clientWidth + 1))
        .map(one => one.outerHTML.slice(0, 100));
}"""


def test_axe_finds_nothing_serious_in_light_and_in_dark(visit, sample):
    page = visit("file", sample)
    page.evaluate(AXE)
    for mode, options in (("light", STRUCTURE), ("dark", {"runOnly": ["color-contrast"]})):  # the structure is the same
        page.evaluate("mode => Object.assign(document.documentElement.dataset, {theme: mode, mode})", mode)
        assert page.evaluate(FAULTS, options) == [], mode


def test_what_is_cut_shows_it_and_is_reached_by_keyboard(visit, chapter):
    page = visit("http", chapter)
    names = [look.label for look in (METHODS | DYNAMIC).values()]
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_timeout(50)  # for the observer of sizes
        for element, tab, attachment in page.evaluate(CUT, SCROLLERS):
            assert tab == 0 and attachment.startswith("local, local, scroll, scroll"), f"{width} px: {element}"
    assert page.evaluate(WRAPPED, names) == []
    small = {alt: size for alt, size in page.evaluate(LETTERS).items() if size < READABLE - 0.05}
    assert small == {}
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 700, "height": 900})  # about A4 within its margins
    assert page.evaluate(OUTSIDE) == []


def test_a_control_speaks_resets_and_is_kept_in_the_address(visit, explorable):
    page = visit("file", explorable)
    for i, explore in enumerate(page.locator(".permask-explore").all()):
        form, image = explore.locator("form"), explore.locator("img")
        first, button = form.locator("input").first, form.get_by_role("button", name="Reset", include_hidden=True)
        assert not button.is_visible()
        before = image.get_attribute("alt"), image.get_attribute("src")
        if slider := first.get_attribute("type") == "range":
            assert first.get_attribute("aria-valuetext") == form.locator("output").first.text_content()
        else:
            first = form.locator("fieldset").first.locator("input:checked")
        first.focus()
        page.keyboard.press("ArrowRight")
        if not button.is_visible():  # a slider at its end
            page.keyboard.press("ArrowLeft")
        changed = image.get_attribute("alt"), image.get_attribute("src")
        if slider:
            assert first.get_attribute("aria-valuetext") == form.locator("output").first.text_content()
        assert button.is_visible() and changed != before
        if i == 0:
            again = page.context.new_page()
            again.goto(page.url)
            again.wait_for_function("alt => document.querySelector('.permask-explore img').alt == alt", arg=changed[0])
            again.close()
        button.focus()
        page.keyboard.press("Enter")
        page.wait_for_function("button => button.hidden", arg=button.element_handle())
        assert (image.get_attribute("alt"), image.get_attribute("src")) == before
        assert "#" not in page.url and first.evaluate("one => one.form.contains(document.activeElement)")


@pytest.mark.parametrize("motion", ["reduce", "no-preference"])
def test_the_start_of_a_path_is_dragged_on_the_figure(visit, explorable, motion):
    page = visit("file", explorable, motion)
    images = page.locator(".permask-drag").all()
    if not images:
        pytest.skip("nothing to drag on this page")
    for image in images:
        image.scroll_into_view_if_needed()
        explore = page.locator(".permask-explore", has=image)
        sliders = explore.locator("input[type=range]")
        before = sliders.evaluate_all("all => all.map(one => one.value)")
        box = image.bounding_box()
        page.mouse.move(box["x"] + 0.12 * box["width"], box["y"] + 0.75 * box["height"])
        page.mouse.down()
        page.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + 0.2 * box["height"], steps=3)
        page.mouse.up()
        assert sliders.evaluate_all("all => all.map(one => one.value)") != before
        assert ("@keyframes" in image.get_attribute("src")) == (motion == "no-preference")
