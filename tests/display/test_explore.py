"""The control as a reader without a kernel gets it (parsed as a page), and as one with a kernel moves it."""

import base64
import itertools
import json
import re
import urllib.parse
import xml.etree.ElementTree as ElementTree
import zlib

import ipywidgets
import pytest
from bs4 import BeautifulSoup

from permask_core.display import explore, new_figure, show
from permask_core.runs.progress import is_live

CHOICES = {"sparsity": [0.5, 0.9, 0.99], "method": ["naive", "permuted"],
           "layer_name": {"first": "fc1", "second": "fc2"}}


@pytest.fixture(autouse=True)
def static(monkeypatch):
    monkeypatch.setenv("PERMASK_DISPLAY", "static")


def draw(**values):
    figure, axes = new_figure(width=2, height=1.5)
    axes.set_title(" ".join(map(str, values.values())))
    return figure


def page(*arguments, **options):
    return BeautifulSoup(explore(draw, *arguments, **options).data, "html.parser")


def given(soup):
    """What the script of a control is given."""
    return json.loads(re.search(r"=(\{.*\}),box=", soup.script.string)[1])


def frames(soup):
    """Source and alternative text of all frames, put together as the script does it."""
    packed = json.loads(zlib.decompress(base64.b64decode(given(soup)["packed"])))
    return [(" <".join(packed["parts"][i] for i in pieces), alt) for alt, pieces in packed["frames"]]


def svg(source):
    kind, _, data = source.partition(",")
    assert kind == "data:image/svg+xml"
    return ElementTree.fromstring(urllib.parse.unquote(data))


def test_one_frame_for_every_combination_in_the_order_of_the_script():
    """The script numbers a frame by the controls in the order of the page, the last one running fastest."""
    soup = page(alt="{sparsity} {method} {layer_name}", **CHOICES)
    choices = given(soup)["choices"]
    rows = soup.select("[data-choice]")
    assert [int(row["data-choice"]) for row in rows] == [0, 1, 2]
    assert choices == [["sparsity", ["0.5", "0.9", "0.99"]], ["method", ["naive", "permuted"]],
                       ["layer_name", ["first", "second"]]]
    sizes, drawn = [len(labels) for _, labels in choices], frames(soup)
    assert len(drawn) == 12
    values = [list(v.values()) if isinstance(v, dict) else v for v in CHOICES.values()]
    for at in itertools.product(*map(range, sizes)):
        index = 0
        for size, i in zip(sizes, at):
            index = index * size + i
        assert drawn[index][1] == " ".join(str(v[i]) for v, i in zip(values, at))
    assert len({source for source, _ in drawn}) == 12
    assert (soup.img["src"], soup.img["alt"]) == drawn[0]


@pytest.mark.parametrize("start, shown", [
    ({}, "0.5 naive fc1"), ({"sparsity": 0.99, "layer_name": "fc2"}, "0.99 naive fc2"),
    ({"method": "permuted"}, "0.5 permuted fc1")])
def test_what_is_seen_first_is_what_the_controls_say(start, shown):
    soup = page(alt="{sparsity} {method} {layer_name}", start=start, **CHOICES)
    assert [image["alt"] for image in soup.select("img")] == [shown]
    slider = soup.select_one("input[type=range]")
    sparsities = [str(value) for value in CHOICES["sparsity"]]
    assert sparsities[int(slider["value"])] == soup.select_one("output").text == shown.split()[0]
    assert slider["aria-valuetext"] == shown.split()[0] and (slider["min"], slider["max"]) == ("0", "2")
    (method,), (layer,) = (fieldset.select("input[checked]") for fieldset in soup.select("fieldset"))
    assert CHOICES["method"][int(method["value"])] == shown.split()[1]
    assert [*CHOICES["layer_name"].values()][int(layer["value"])] == shown.split()[2]


def test_numbers_are_a_slider_and_anything_else_buttons_with_names():
    soup = page(alt="x", **CHOICES, on=[True, False], only=[7])
    assert [row.select_one("input")["type"] for row in soup.select("[data-choice]")] == ["range", *["radio"] * 3]
    names = [tag.text for tag in soup.select("legend, label[for]")]
    assert names == ["sparsity", "method", "layer name", "on"]  # of one value there is nothing to choose
    groups = {}
    for radio in soup.select("input[type=radio]"):
        groups.setdefault(radio["name"], []).append(radio.parent.text)
    assert list(groups.values()) == [["naive", "permuted"], ["first", "second"], ["True", "False"]]


def test_two_controls_on_a_page_have_ids_of_their_own():
    one, two = page(alt="x", a=[1, 2]), page(alt="x", a=[1, 2])
    ids = [soup.select_one(".permask-explore")["id"] for soup in (one, two)]
    assert ids[0] != ids[1]
    for name, soup in zip(ids, (one, two)):
        assert given(soup)["box"] == name and soup.select_one("label[for]")["for"] == soup.input["id"]


def test_the_same_drawing_is_the_same_to_the_byte():
    def without_id(text):
        return re.sub(r"permask-explore-\d+", "", text)

    assert without_id(explore(draw, alt="x", a=[1, 2]).data) == without_id(explore(draw, alt="x", a=[1, 2]).data)


def test_frames_are_drawings_and_nothing_comes_from_outside():
    soup = page(alt="x", a=["one & <two>", 'three "%#"'])
    for source, _ in frames(soup):
        root = svg(source)
        assert root.tag.endswith("svg") and float(root.get("width").removesuffix("pt")) == pytest.approx(2 * 72)
    assert not soup.select("[href], link, script[src], img:not([src^=data])")


def test_a_frame_is_as_wide_as_its_smallest_letters_need():
    """Seven inches are 504 points: letters of 8 points have 9 pixels where these are 567 pixels wide."""
    figure, axes = new_figure(width=7, height=2)
    axes.set_title("letters", fontsize=8)
    soup = BeautifulSoup(show(figure, alt="x").data, "html.parser")
    assert svg(soup.img["src"]).get("data-letters") == "8"
    assert soup.select_one(".permask-frame")["style"] == "max-width:46.0rem;--least:567px"


def cuts(figure):
    soup = BeautifulSoup(show(figure, alt="x").data, "html.parser")
    return [int(x) for x in svg(soup.img["src"]).get("data-cuts").split()]


def test_a_figure_is_cut_between_its_panels_and_nowhere_else():
    figure, axes = new_figure(2, 3, width=7, height=4)
    axes[0, 2].set_ylabel("belongs to the third column")
    first, second, third, last = cuts(figure)
    assert (first, last) == (0, 504) and 140 < second < 180 and 300 < third < 340

    figure, (left, right) = new_figure(1, 2, width=7, height=4)
    figure.colorbar(right.imshow([[0, 1]]), ax=right)
    assert len(cuts(figure)) == 3  # a colour bar is no panel
    figure.supxlabel("below both")
    assert cuts(figure) == [0, 504]


def test_two_numbers_can_be_dragged_in_the_first_axes():
    def plane(x, y):
        figure, axes = new_figure(width=2, height=2)
        figure.set_layout_engine("none")
        axes.set(position=[0.5, 0.5, 0.5, 0.5], xlim=(0, 1), ylim=(0, 1))
        return figure

    soup = BeautifulSoup(explore(plane, alt="x", y=[0, 1], x=[0, 0.5, 1], drag=("x", "y")).data, "html.parser")
    assert given(soup)["drag"] == [[1, [0.5, 0.75, 1.0]], [0, [0.5, 0.0]]]  # from the left and from the top


NASTY = '<b>"&amp;\'</script><img src=x onerror=alert(1)>'


def test_text_stays_text():
    soup = page(alt=lambda **values: NASTY, caption=NASTY, **{NASTY: ["a", NASTY]}, n={NASTY: 1, "b": 2})
    assert len(frames(soup)) == 4 and {alt for _, alt in frames(soup)} == {soup.img["alt"]} == {NASTY}
    assert not soup.select("b, [onerror]")
    assert soup.figcaption.text == NASTY and soup.legend.text == NASTY.replace("_", " ")
    assert [label.text for label in soup.select("fieldset label")] == ["a", NASTY] and soup.output.text == NASTY
    assert len(soup.select("script")) == 1 and soup.script.string.rstrip().endswith("()")
    assert given(soup)["choices"] == [[NASTY, ["a", NASTY]], ["n", [NASTY, "b"]]]


def test_show_is_one_frame_without_controls():
    soup = BeautifulSoup(show(draw(a=1), alt="braces {stay}", caption="what to see").data, "html.parser")
    assert [frame["alt"] for frame in soup.select("img")] == ["braces {stay}"]
    assert not soup.select("input, script, [hidden]")
    assert soup.figcaption.text == "what to see"
    assert not BeautifulSoup(show(draw(a=1), alt="x").data, "html.parser").select("figcaption")


def test_no_value_is_lost_where_labels_are_alike():
    for values in ([1_000_000, 1_000_001], [0.12345671, 0.12345672], ["1", 1]):
        try:
            drawn = frames(page(alt="x", n=values))
        except ValueError as error:
            assert "n" in str(error)
        else:
            assert len(drawn) == 2


@pytest.mark.parametrize("options, message", [
    ({"a": []}, "choice 'a' has no values"),
    ({"a": [1], "start": {"b": 1}}, "start names 'b': expected one of a"),
    ({"a": [1, 2], "start": {"a": 3}}, "start['a'] is 3: expected one of [1, 2]"),
])
def test_bad_input_is_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        explore(draw, alt="x", **options)


def test_too_much_for_a_page_is_refused_and_drawing_stops():
    drawn = []

    def heavy(n):
        drawn.append(n)
        figure, axes = new_figure()
        axes.plot(range(20_000), [(i * 7919 * (n + 1)) % 1009 for i in range(20_000)], "o", rasterized=False)
        return figure

    with pytest.raises(ValueError, match=r"of 500 frames take [\d,]+ bytes, the limit is 500,000: offer fewer"):
        explore(heavy, alt="x", n=list(range(500)))
    assert len(drawn) < 20


@pytest.mark.parametrize("forced", ["", "live"])
def test_with_a_kernel_the_same_draw_follows_the_widgets(monkeypatch, forced):
    monkeypatch.setenv("PERMASK_DISPLAY", forced)
    monkeypatch.setenv("JPY_SESSION_NAME", "some.ipynb")
    calls = []

    def counted(**values):
        calls.append(values)
        return draw(**values)

    box = explore(counted, alt="{sparsity} {method} {layer_name}", caption="<c>", start={"method": "permuted"},
                  **CHOICES)
    assert isinstance(box, ipywidgets.VBox)
    picture, controls = box.children[0], box.children[1].children

    def seen():
        return BeautifulSoup(picture.value, "html.parser").select_one("img:not([hidden])")["alt"]

    assert [type(control) for control in controls] == [ipywidgets.SelectionSlider, *[ipywidgets.ToggleButtons] * 2]
    assert seen() == "0.5 permuted fc1" and "&lt;c&gt;" in picture.value
    controls[0].value = 0.99
    controls[2].index = 1
    assert seen() == "0.99 permuted fc2"
    assert [tuple(call.values()) for call in calls] == [  # nothing is drawn beforehand
        (0.5, "permuted", "fc1"), (0.99, "permuted", "fc1"), (0.99, "permuted", "fc2")]


@pytest.mark.parametrize("forced, mark, live", [
    (None, None, False), (None, "JPY_SESSION_NAME", True), (None, "VSCODE_PID", True),
    (None, "COLAB_RELEASE_TAG", True),
    ("static", "JPY_SESSION_NAME", False), ("live", None, True), ("", "VSCODE_CWD", True)])
def test_who_is_looking(monkeypatch, forced, mark, live):
    for name in ("PERMASK_DISPLAY", "JPY_SESSION_NAME", "VSCODE_PID", "VSCODE_CWD", "COLAB_RELEASE_TAG"):
        monkeypatch.delenv(name, raising=False)
    if forced is not None:
        monkeypatch.setenv("PERMASK_DISPLAY", forced)
    if mark:
        monkeypatch.setenv(mark, "1")
    assert is_live() == live


def test_an_unknown_mode_is_refused(monkeypatch):
    monkeypatch.setenv("PERMASK_DISPLAY", "statically")
    with pytest.raises(ValueError, match="PERMASK_DISPLAY='statically': expected live or static"):
        explore(draw, alt="x", a=[1])
