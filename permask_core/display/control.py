"""Interactive figures, with or without a kernel.

Without a kernel (the rendered book, nbviewer, a notebook run by papermill) every combination of the choices is drawn
in advance; plain HTML controls and a short script switch between the frames, without a network and also from
``file://``. In a live notebook ``draw`` is called whenever an ipywidgets control changes. A frame is an SVG image in a
data URL, with its own ids and its own alternative text. Only the initial frame is an element of the page; all frames
follow compressed, with the parts that they have in common stored once. The address of the page keeps what was chosen.
"""

import base64
import html
import io
import itertools
import json
import math
import re
import urllib.parse
import zlib
from numbers import Number

from IPython.display import HTML
from matplotlib.text import Text

from permask_core.runs.progress import is_live

LARGEST = 500_000  # bytes of the compressed frames of one control; a page of the book stays below 2 MB
READABLE = 9  # pixels: where letters would be smaller, a figure scrolls sideways
_serial = itertools.count(1)

# Colours are those of a figure on white, in dark pages too; at a cut edge of a frame there is a shadow.
STYLE = """
.permask-figure{margin:1rem 0;max-width:100%}
.permask-frame{overflow-x:auto;margin:0 auto;border-radius:6px;background:linear-gradient(90deg,#fff 40%,#fff0) 0/3rem,
linear-gradient(270deg,#fff 40%,#fff0) 100%/3rem,linear-gradient(90deg,#0008,#0000) 0/1rem,
linear-gradient(270deg,#0008,#0000) 100%/1rem,#fff;background-repeat:no-repeat;
background-attachment:local,local,scroll,scroll}
.permask-frame img{display:block;width:100%;height:auto;background:none!important;filter:none!important;
mix-blend-mode:multiply;min-width:var(--least)}
.permask-frame img[hidden]{display:none}
.permask-figure figcaption{max-width:46rem;margin:.4rem auto 0;font-size:.9em;font-weight:400;
color:inherit;text-align:left}
.permask-controls{display:flex;flex-wrap:wrap;gap:.5rem 1.6rem;max-width:46rem;margin:.6rem auto 0;align-items:center}
.permask-controls fieldset,.permask-range{border:0;margin:0;padding:0;display:flex;
flex-wrap:wrap;gap:.2rem .7rem;align-items:center;font-size:.92em}
.permask-controls legend{float:left;padding:0;margin:0;width:auto;font-size:1em;font-weight:600}
.permask-range label{font-weight:600}
.permask-controls input{accent-color:#0072B2;margin:0 .25rem 0 0}
.permask-controls input[type=range]{width:12rem;max-width:60vw}
.permask-controls output{min-width:3.5em;font-variant-numeric:tabular-nums}
.permask-drag{cursor:crosshair}
.permask-controls button{font-size:.92em;padding:.1rem .7rem}
@media print{.permask-controls{display:none}.permask-frame{background:#fff}.permask-frame img{min-width:0}}
"""

# The number of a frame is read from the controls in their order, the last one running fastest. The address keeps what
# differs from the start, as #box.choice=label&...
_SCRIPT = """<script>(async()=>{
const {box:name,packed,choices,drag}=%s,box=document.getElementById(name);if(!box)return;
const bytes=Uint8Array.from(atob(packed),c=>c.charCodeAt()),image=box.querySelector("img"),
form=box.querySelector("form"),reset=form.querySelector("button"),
rows=[...form.querySelectorAll("[data-choice]")].map(row=>[...row.querySelectorAll("input")]),
{parts,frames}=await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))).json(),
at=row=>+(row.find(input=>input.checked)||row[0]).value,
still=matchMedia("(prefers-reduced-motion:reduce)").matches,
moving="<style>@keyframes run{from{stroke-dasharray:250;stroke-dashoffset:250}to{stroke-dasharray:250;"+
"stroke-dashoffset:0}}[id^=moving] path{animation:run .8s}</style></svg>",
put=(row,i)=>row[0].type=="range"?row[0].value=i:row[i].checked=true,
given=()=>new URLSearchParams(location.hash.slice(1)),key=i=>name+"."+choices[i][0];
function update(){
let frame=0;
rows.forEach((row,i)=>{const label=choices[i][1][at(row)],output=row[0].parentNode.querySelector("output");
frame=frame*choices[i][1].length+at(row);
if(output){output.textContent=label;row[0].setAttribute("aria-valuetext",label)}});
const [alt,pieces]=frames[frame],source=pieces.map(i=>parts[i]).join(" <");
image.alt=alt;image.src=still?source:source.replace("</svg>",moving);
reset.hidden=rows.flat().every(input=>input.value==input.defaultValue&&input.checked==input.defaultChecked)}
function restore(){
let found=false;
rows.forEach((row,i)=>{const j=choices[i][1].indexOf(given().get(key(i)));if(j>=0){put(row,j);found=true}});
if(found){update();box.scrollIntoView()}}
function changed(){
update();
const hash=given();
for(const one of [...hash.keys()])if(!one.includes("."))hash.delete(one);
rows.forEach((row,i)=>reset.hidden?hash.delete(key(i)):hash.set(key(i),choices[i][1][at(row)]));
history.replaceState(null,"",`${hash}`?"#"+hash:location.href.split("#")[0])}
form.addEventListener("input",changed);
form.addEventListener("submit",event=>event.preventDefault());
form.addEventListener("reset",()=>setTimeout(()=>{changed();rows[0].find(input=>input.matches(":checked,[type=range]"))
.focus()}));
addEventListener("hashchange",restore);
if(drag){
const move=event=>{
const frame=image.getBoundingClientRect(),
near=[(event.clientX-frame.left)/frame.width,(event.clientY-frame.top)/frame.height].map((place,axis)=>{
const gaps=drag[axis][1].map(own=>Math.abs(own-place)),least=Math.min(...gaps);
return least<.1?gaps.indexOf(least):-1});
if(near.includes(-1))return;
near.forEach((j,axis)=>put(rows[drag[axis][0]],j));changed()};
image.classList.add("permask-drag");image.draggable=false;
image.addEventListener("click",move);
image.addEventListener("pointermove",event=>event.buttons&1&&event.pointerType!="touch"&&move(event))}
restore()})()</script>"""


def explore(draw, *, alt, caption="", start=None, drag=(), **choices):
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
    drag : (str, str), optional
        Two choices of numbers that are the coordinates of a point in the first axes: the reader can also click there or
        drag. Lines whose ``gid`` is ``"moving"`` are drawn from their start when a choice changes, except for readers
        who prefer reduced motion.
    **choices : sequence
        The values of each choice, in order. A dict has values by label. A choice with only one value has no control.

    Returns
    -------
    IPython.display.HTML or ipywidgets.VBox
        Shown if it is the last expression of a cell.

    Raises
    ------
    ValueError
        If a choice has no values, ``start`` names an unknown choice or value, or the compressed frames exceed 0.5 MB.
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
        return draw(**values), alt(**values) if callable(alt) else alt.format(**values)

    if is_live() and choices:
        return _widget(frame, choices, at, caption)
    return _page(frame, choices, at, caption, drag)


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
    """Return the text of an SVG of a Matplotlib figure, without a date, so that equal figures give equal texts.

    ``data-letters`` is the size of its smallest letters and ``data-cuts`` the edges of its panels from left to right,
    both in points. A narrow screen may cut the figure there and stack the panels.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    letters = [text.get_fontsize() for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    text = buffer.getvalue()
    data = f'data-letters="{min(letters, default=10):g}" data-cuts="{_cuts(figure)}"'
    text = text[text.index("<svg"):].replace("<svg", f"<svg {data}", 1)
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    # Two decimals are a hundredth of a point; further digits would be half of the page.
    text = re.sub(r'(?<= )(?:d|x|y)="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)
    return re.sub(r"\s*\n\s*", "\n", text)


def _cuts(figure):
    """Return the edges of the panels of a figure; a colour bar belongs to its left, a title of the whole to all."""
    whole = any(text.get_text() for text in figure.texts) or figure.legends or len(figure.axes) < 2
    strips = []
    for (left, right), joins in sorted((tuple(axes.get_tightbbox().intervalx), axes.get_label() == "<colorbar>")
                                       for axes in ([] if whole else figure.axes)):
        if strips and (joins or left < strips[-1][1]):
            strips[-1][1] = max(right, strips[-1][1])
        else:
            strips.append([left, right])
    inner = [(before + after) / 2 for (_, before), (after, _) in itertools.pairwise(strips)]
    return " ".join(f"{72 * x / figure.dpi:.0f}" for x in (0, *inner, figure.bbox.width))


def framed(image, svg):
    """Return the HTML of an image in a frame that scrolls sideways where the letters of the SVG would be too small."""
    width, letters = (float(re.search(f' {name}="([\\d.]+)', svg)[1]) for name in ("width", "data-letters"))
    # Seven inches fill the column, so that letters have the same size in narrow and wide figures.
    widest = min(46, width / 72 / 7 * 46)
    least = min(READABLE * width / letters, 16 * widest)
    return (f'<div class="permask-frame" style="max-width:{widest:.1f}rem;--least:{least:.0f}px">{image}</div>')


def _source(text):
    # Every %xx takes three characters instead of one; with single quotes, only rare characters need it.
    text = text.replace("'", "&#39;").replace('"', "'").replace("\n", " ")
    return "data:image/svg+xml," + urllib.parse.quote(text, safe="<> =:/;,()!*?@$+'[]|^`{}~-._")


def _figure(text, alt, caption):
    image = framed(f'<img src="{_source(text)}" alt="{html.escape(alt)}">', text)
    caption = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f'<figure class="permask-figure">{image}{caption}</figure>'


def _page(frame, choices, at, caption, drag):
    """Draw every combination, with the last choice varying fastest, as in the mixed-radix index of the script."""
    shown = 0
    for name, values in choices.items():
        shown = shown * len(values) + at[name]
    frames, parts, size, places = [], {}, 0, None
    count = math.prod(map(len, choices.values()))
    for i, values in enumerate(itertools.product(*(values.values() for values in choices.values()))):
        figure, alt = frame(dict(zip(choices, values)))
        text = svg(figure)
        if i == shown:
            picture = _figure(text, alt, caption)
        pieces = _source(text).split(" <")
        new = [piece for piece in dict.fromkeys(pieces) if piece not in parts]
        parts |= {piece: len(parts) + j for j, piece in enumerate(new)}
        frames.append((alt, [parts[piece] for piece in pieces]))
        size += len(zlib.compress("".join(new).encode()))
        if size > LARGEST:
            raise ValueError(f"{i + 1} of {count} frames take {size:,} bytes, the limit is {LARGEST:,}: "
                             "offer fewer values, or draw less in each")
        places = places or (drag and _places(figure, choices, drag))
    if not choices:
        return HTML(f"<style>{STYLE}</style>{picture}")
    name = f"permask-explore-{next(_serial)}"
    rows = "".join(_control(name, i, *choice, at[choice[0]]) for i, choice in enumerate(choices.items()))
    packed = zlib.compress(json.dumps({"parts": list(parts), "frames": frames}).encode(), 9)
    script = _SCRIPT % json.dumps({
        "box": name, "packed": base64.b64encode(packed).decode(), "drag": places or None,
        "choices": [(own, list(values)) for own, values in choices.items()]}).replace("<", "\\u003c")
    return HTML(f'<style>{STYLE}</style><div class="permask-explore" id="{name}" role="group" '
                f'aria-label="Figure with controls">{picture}<form class="permask-controls" autocomplete="off">'
                f'{rows}<button type="reset" hidden>Reset</button></form></div>{script}')


def _places(figure, choices, drag):
    """Return for each of two choices its number, and where its values lie: fractions from the left and the top."""
    axes = figure.axes[0]
    places = []
    for axis, name in enumerate(drag):
        points = [(value, 0) if axis == 0 else (0, value) for value in choices[name].values()]
        at = figure.transFigure.inverted().transform(axes.transData.transform(points))[:, axis]
        places.append((list(choices).index(name), [round(float(1 - one if axis else one), 4) for one in at]))
    return places


def _control(box, i, name, values, at):
    title, labels = html.escape(name.replace("_", " ")), [html.escape(label) for label in values]
    if _is_slider(values.values()):
        return (f'<div class="permask-range" data-choice="{i}"><label for="{box}-{i}">{title}</label>'
                f'<input type="range" id="{box}-{i}" min="0" max="{len(labels) - 1}" value="{at}" '
                f'aria-valuetext="{labels[at]}"><output for="{box}-{i}" aria-live="off">{labels[at]}</output></div>')
    buttons = "".join(
        f'<label><input type="radio" name="{box}-{i}" value="{j}"{" checked" if j == at else ""}>{label}</label>'
        for j, label in enumerate(labels))
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
        figure, alt = frame(values)
        picture.value = f"<style>{STYLE}</style>{_figure(svg(figure), alt, caption)}"

    for one in controls.values():
        one.observe(update, "value")
    update()
    return ipywidgets.VBox([picture, ipywidgets.HBox(list(controls.values()), layout={"flex_flow": "row wrap"})])
