"""Interactive figures, with or without a kernel.

Without a kernel (the rendered book, nbviewer, a notebook run by papermill) every combination of the choices is drawn
in advance; plain HTML controls and a short script switch between the frames, without a network and also from
``file://``. In a live notebook ``draw`` is called whenever an ipywidgets control changes. Frames are SVG images in data
URLs: each has its own ids and its own alternative text.
"""

import html
import io
import itertools
import json
import math
import re
import urllib.parse
from numbers import Number

from IPython.display import HTML

from permask_core.runs.progress import is_live

LARGEST = 2_500_000  # bytes of HTML in one control; a page of the book stays below 3 MB
_serial = itertools.count(1)

_STYLE = """<style>
.permask-figure{margin:1rem 0;max-width:100%}
.permask-figure img{display:block;width:100%;height:auto;margin:0 auto;background:#fff;border-radius:6px;
filter:none!important}
.permask-figure img[hidden]{display:none}
.permask-figure figcaption{max-width:46rem;margin:.4rem auto 0;font-size:.9em;font-weight:400;
color:inherit;text-align:left}
.permask-controls{display:flex;flex-wrap:wrap;gap:.5rem 1.6rem;max-width:46rem;margin:.6rem auto 0;align-items:center}
.permask-controls fieldset,.permask-controls label.permask-range{border:0;margin:0;padding:0;display:flex;
flex-wrap:wrap;gap:.2rem .7rem;align-items:center;font-size:.92em}
.permask-controls legend{float:left;padding:0;margin:0;width:auto;font-size:1em;font-weight:600}
.permask-controls .permask-name{font-weight:600}
.permask-controls input{accent-color:#0072B2;margin:0 .25rem 0 0}
.permask-controls input[type=range]{width:12rem;max-width:60vw}
.permask-controls output{min-width:3.5em;font-variant-numeric:tabular-nums}
</style>"""

_SCRIPT = """<script>(function(){
var box=document.getElementById(%(id)s);if(!box)return;
var sizes=%(sizes)s,labels=%(labels)s,frames=box.querySelectorAll("img"),rows=box.querySelectorAll("[data-choice]");
function update(){var at=0;rows.forEach(function(row){
var i=+row.dataset.choice,input=row.querySelector("input[type=range]")||row.querySelector("input:checked");
at=at*sizes[i]+ +input.value;var out=row.querySelector("output");if(out)out.textContent=labels[i][+input.value]});
frames.forEach(function(frame,i){frame.hidden=i!==at})}
box.addEventListener("input",update);update()})()</script>"""


def explore(draw, *, alt, caption="", start=None, **choices):
    """Show a figure with one control for each choice: a slider for numbers, buttons for other values.

    Parameters
    ----------
    draw : callable
        ``draw(**values)`` returns a Matplotlib figure. It is called with one value for each choice and must depend only
        on these, because without a kernel every combination is drawn in advance.
    alt : str or callable
        Alternative text of a frame: a format string over the choices (``"accuracy at {sparsity:.0%}"``), or
        ``alt(**values)``.
    caption : str
        What to see in the figure; plain text below it.
    start : dict, optional
        The initial value of each choice; by default the first value.
    **choices : sequence
        The values of each choice, in order. A dict has values by label. A choice with only one value has no control.

    Returns
    -------
    IPython.display.HTML or ipywidgets.VBox
        Shown if it is the last expression of a cell.

    Raises
    ------
    ValueError
        If a choice has no values, ``start`` names an unknown choice or value, or the drawn frames exceed 2.5 MB.
    """
    choices = {name: _labelled(name, values) for name, values in choices.items()}
    at = {name: 0 for name in choices}
    for name, value in (start or {}).items():
        if name not in choices:
            raise ValueError(f"start names {name!r}: expected one of {', '.join(choices) or 'no choices'}")
        values = list(choices[name].values())
        if value not in values:
            raise ValueError(f"start[{name!r}] is {value!r}: expected one of {values}")
        at[name] = values.index(value)

    fixed = {name: next(iter(values.values())) for name, values in choices.items() if len(values) == 1}
    choices = {name: values for name, values in choices.items() if name not in fixed}

    def frame(values):
        values = fixed | values
        return _image(draw(**values), alt(**values) if callable(alt) else alt.format(**values))

    make = _widget if is_live() and choices else _page
    return make(frame, choices, at, caption)


def show(figure, *, alt, caption=""):
    """Show a Matplotlib figure as an SVG with alternative text and a caption.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
    alt : str
        Description of the figure for readers who cannot see it.
    caption : str
        What to see in the figure; plain text.

    Returns
    -------
    IPython.display.HTML
    """
    return explore(lambda: figure, alt=lambda: alt, caption=caption)


def _labelled(name, values):
    if not isinstance(values, dict):
        labels = [_label(value) for value in values]
        if len(set(labels)) < len(labels):
            raise ValueError(f"choice {name!r} has equal labels, {', '.join(labels)}: give a dict of values by label")
        values = dict(zip(labels, values))
    if not values:
        raise ValueError(f"choice {name!r} has no values")
    return values


def _label(value):
    return f"{value:g}" if isinstance(value, Number) and not isinstance(value, bool) else str(value)


def _is_slider(values):
    return all(isinstance(value, Number) and not isinstance(value, bool) for value in values)


def svg(figure):
    """Return the text of an SVG of a Matplotlib figure, without a date, so that equal figures give equal texts."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg"):]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    # Two decimals are a hundredth of a point; further digits would be half of the page.
    text = re.sub(r'(?<= )(?:d|x|y)="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)
    return re.sub(r"\s*\n\s*", "\n", text)


def _image(figure, alt):
    # Every %xx takes three characters instead of one; with single quotes, only rare characters need it.
    text = svg(figure).replace("'", "&#39;").replace('"', "'").replace("\n", " ")
    source = "data:image/svg+xml," + urllib.parse.quote(text, safe="<> =:/;,()!*?@$+'[]|^`{}~-._")
    # Seven inches fill the column, so that letters have the same size in narrow and wide figures.
    width = min(46, figure.get_figwidth() / 7 * 46)
    return f'<img src="{source}" alt="{html.escape(alt)}" style="max-width:{width:.1f}rem"'


def _figure(images, caption):
    text = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f'<figure class="permask-figure">{images}{text}</figure>'


def _page(frame, choices, at, caption):
    """Draw every combination, with the last choice varying fastest, as in the mixed-radix index of the script."""
    shown = 0
    for name, values in choices.items():
        shown = shown * len(values) + at[name]
    images, size = [], 0
    count = math.prod(map(len, choices.values()))
    for i, values in enumerate(itertools.product(*(values.values() for values in choices.values()))):
        images.append(frame(dict(zip(choices, values))) + (">" if i == shown else " hidden>"))
        size += len(images[-1])
        if size > LARGEST:
            raise ValueError(f"{i + 1} of {count} frames take {size:,} bytes, the limit is {LARGEST:,}: "
                             "offer fewer values, or draw less in each")
    if not choices:
        return HTML(_STYLE + _figure(images[0], caption))
    name = f"permask-explore-{next(_serial)}"
    rows = "".join(_control(name, i, *choice, at[choice[0]]) for i, choice in enumerate(choices.items()))
    script = _SCRIPT % {"id": json.dumps(name), "sizes": json.dumps([len(v) for v in choices.values()]),
                        "labels": json.dumps([list(v) for v in choices.values()]).replace("<", "\\u003c")}
    return HTML(f'{_STYLE}<div class="permask-explore" id="{name}" role="group" aria-label="Figure with controls">'
                f'{_figure("".join(images), caption)}<div class="permask-controls">{rows}</div></div>{script}')


def _control(box, i, name, values, at):
    title, labels = html.escape(name.replace("_", " ")), list(values)
    if _is_slider(values.values()):
        return (f'<label class="permask-range" data-choice="{i}"><span class="permask-name">{title}</span>'
                f'<input type="range" min="0" max="{len(labels) - 1}" step="1" value="{at}" autocomplete="off">'
                f"<output>{html.escape(labels[at])}</output></label>")
    buttons = "".join(
        f'<label><input type="radio" name="{box}-{i}" value="{j}" autocomplete="off"{" checked" if j == at else ""}>'
        f"{html.escape(label)}</label>" for j, label in enumerate(labels))
    return f'<fieldset data-choice="{i}"><legend>{title}</legend>{buttons}</fieldset>'


def _widget(frame, choices, at, caption):
    import ipywidgets  # needed only with a live kernel

    def control(name, values):
        kind = ipywidgets.SelectionSlider if _is_slider(values.values()) else ipywidgets.ToggleButtons
        return kind(options=list(values.items()), value=list(values.values())[at[name]],
                    description=name.replace("_", " "), style={"description_width": "initial"})

    controls = {name: control(name, values) for name, values in choices.items()}
    picture = ipywidgets.HTML()

    def update(_=None):
        values = {name: control.value for name, control in controls.items()}
        picture.value = _STYLE + _figure(frame(values) + ">", caption)

    for one in controls.values():
        one.observe(update, "value")
    update()
    return ipywidgets.VBox([picture, ipywidgets.HBox(list(controls.values()), layout={"flex_flow": "row wrap"})])
