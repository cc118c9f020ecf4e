"""Every chapter of the built book as a reader sees it: offline, by keyboard, on a narrow screen, on paper."""

import importlib.resources

from permask_core.display import DYNAMIC, METHODS
from permask_core.display.control import READABLE

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
    const sizes = [];
    for (const image of document.querySelectorAll(".permask-frame img:not([hidden])")) {
        const text = decodeURIComponent(await (await fetch(image.src)).text());
        const [letters, width] = ["data-letters", "width"].map(name => +text.match(name + `=["']([0-9.]+)`)[1]);
        sizes.push([image.alt.slice(0, 60), letters * image.getBoundingClientRect().width / width]);
    }
    return sizes;
}"""

# Of every figure with two to four panels that is too wide: where they begin from the top, and whether each is drawn.
STACKS = """async () => {
    const frames = [...document.querySelectorAll(".permask-frame:has(> img[src^='data:']:not(.permask-drag))")].filter(
        frame => {
            const source = frame.querySelector("img").src;
            const read = name => source.match(name + "='([^']*)'")[1].split(" ");
            const cuts = read("data-cuts"), least = 9 * cuts.at(-1) / read("data-letters")[0];
            return 2 < cuts.length && cuts.length < 6 && least > frame.clientWidth;
        });
    const panels = frames.map(frame => [...frame.querySelectorAll(".permask-panel")]);
    await Promise.all(panels.flat().map(panel => panel.decode()));
    return panels.map(all => all.map(panel => [panel.offsetTop, panel.naturalWidth > 0]));
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


def check_whole(page):
    """Mathematics is set and pictures are there; `visit` reports what failed to load."""
    assert page.evaluate(RAW_LATEX) == []
    assert page.evaluate(BROKEN_IMAGES) == []
    assert page.locator("mjx-merror").count() == 0


def test_chapter_from_a_folder_is_whole_and_axe_finds_nothing_serious_in_light_and_in_dark(visit, chapter):
    page = visit("file", chapter)
    check_whole(page)
    page.evaluate(AXE)
    for mode, options in (("light", STRUCTURE), ("dark", {"runOnly": ["color-contrast"]})):  # the structure is the same
        page.evaluate("mode => Object.assign(document.documentElement.dataset, {theme: mode, mode})", mode)
        assert page.evaluate(FAULTS, options) == [], mode


def test_chapter_over_http_is_whole_and_what_is_cut_shows_it_and_is_reached_by_keyboard(visit, chapter):
    page = visit("http", chapter)
    check_whole(page)
    names = [look.label for look in (METHODS | DYNAMIC).values()]
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_timeout(50)  # for the observer of sizes
        for element, tab, attachment in page.evaluate(CUT, SCROLLERS):
            assert tab == 0 and attachment.startswith("local, local, scroll, scroll"), f"{width} px: {element}"
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for panels in page.evaluate(STACKS):
        assert len(panels) > 1, "a figure is not stacked"
        tops, drawn = zip(*panels)
        assert list(tops) == sorted(set(tops)) and all(drawn)
    assert page.evaluate(WRAPPED, names) == []
    assert [(alt, size) for alt, size in page.evaluate(LETTERS) if size < READABLE - 0.05] == []
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 700, "height": 900})  # about A4 within its margins
    assert page.evaluate(OUTSIDE) == []
