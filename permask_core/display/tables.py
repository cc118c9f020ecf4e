"""Tables of results as HTML: the same in a notebook, in the rendered book, and without a kernel."""

import html
import re
from numbers import Number

from IPython.display import HTML

_STYLE = """<style>
.permask-table{border-collapse:collapse;margin:1rem auto;font-size:.9em;font-variant-numeric:tabular-nums}
.permask-table caption{caption-side:top;text-align:left;padding:0 0 .4rem;color:inherit}
.permask-scroll{overflow-x:auto}
.permask-table th,.permask-table td{padding:.25rem .55rem;text-align:left;border:0;background:none}
.permask-table td{white-space:nowrap}
.permask-table th{vertical-align:bottom}
.permask-table .number{text-align:right}
.permask-table thead th{border-bottom:1.5px solid currentColor}
.permask-table tbody tr+tr td{border-top:1px solid rgba(128,128,128,.25)}
</style>"""


def table(rows, *, caption=""):
    """An HTML table of records.

    Parameters
    ----------
    rows : list of dict
        One dict per row, all with the same keys in the same order: the column heads. Numbers stand right; format them
        as strings to choose their digits.
    caption : str
        What the table shows, how many seeds, which unit.

    Returns
    -------
    IPython.display.HTML

    Raises
    ------
    ValueError
        If there are no rows, or a row has other keys than the first.
    """
    if not rows:
        raise ValueError("a table needs at least one row")
    heads = list(rows[0])
    for i, row in enumerate(rows):
        if list(row) != heads:
            raise ValueError(f"row {i} has the columns {list(row)}: expected {heads}")
    numeric = {head: all(_is_number(row[head]) for row in rows) for head in heads}

    def cell(tag, head, value):
        return f"<{tag}{' class=number' if numeric[head] else ''}>{html.escape(str(value))}</{tag}>"

    top = "".join(cell("th scope=col", head, head).replace("</th scope=col>", "</th>") for head in heads)
    body = "".join("<tr>" + "".join(cell("td", head, row[head]) for head in heads) + "</tr>" for row in rows)
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return HTML(f'{_STYLE}<div class="permask-scroll"><table class="permask-table">{title}<thead><tr>{top}</tr></thead>'
                f'<tbody>{body}</tbody></table></div>')


def _is_number(value):
    return isinstance(value, Number) or re.match(r"[-−+<]? ?[\d.]|$", str(value)) is not None
