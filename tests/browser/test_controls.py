"""The controls of figures: from the keyboard, with a mouse, and in the address of the page."""

import pytest

SHOWN = """explore =>
    [...explore.querySelectorAll("img")].filter(image => image.checkVisibility()).map(image => image.src)"""


def test_every_control_changes_the_picture_from_the_keyboard(visit, explorable):
    page = visit("http", explorable)
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
def test_the_start_of_a_path_is_dragged_on_the_figure(visit, draggable, motion):
    page = visit("file", draggable, motion)
    images = page.locator(".permask-drag").all()
    assert images, "no figure of the book has a point to drag"
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
