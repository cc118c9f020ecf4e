"""Tables of results as HTML: the same in a notebook, in the rendered book, and without a kernel."""

import html
import re
from numbers import Number

import pandas as pd
from IPython.display import HTML

SHORT = 24  # letters of a head that is one line on a narrow screen, where the table scrolls anyway
LONG = 24  # letters of a cell whose text wraps

_STYLE = """<style>
.permask-table{border-collapse:collapse;margin:0 auto;font-size:.9em;font-variant-numeric:tabular-nums}
.permask-results{margin:1.2rem 0;padding:0}
.permask-results figcaption{margin:0 auto .5rem;max-width:46rem;font-size:.9em;font-weight:400;
color:inherit;text-align:left}
.permask-scroll{overflow-x:auto}
@media(max-width:600px){.permask-table th.short{white-space:nowrap}}
.permask-table th,.permask-table td{padding:.25rem .55rem;text-align:left;border:0;background:none}
.permask-table td{white-space:nowrap}
.permask-table td.long{white-space:normal;min-width:9rem}
.permask-table th{vertical-align:bottom}
.permask-table .number{text-align:right}
.permask-table thead th{border-bottom:1.5px solid currentColor}
.permask-table tbody tr+tr td{border-top:1px solid rgba(128,128,128,.25)}
</style>"""


def table(rows, *, caption=""):
    """Return an HTML table of records.

    Parameters
    ----------
    rows : list of dict or pandas.DataFrame
        One dict for each row, all with the same keys in the same order, which are the column heads. For a DataFrame,
        the named levels of its index and its columns. Numbers are right-aligned; format them as strings to choose the
        digits. None is blank.
    caption : str
        What the table shows, the number of seeds and the unit.

    Returns
    -------
    IPython.display.HTML

    Raises
    ------
    ValueError
        If there are no rows, or the keys of a row differ from those of the first.
    """
    rows = records(rows)
    if not rows:
        raise ValueError("a table has no rows: expected at least one")
    heads = list(rows[0])
    for i, row in enumerate(rows):
        if list(row) != heads:
            raise ValueError(f"row {i} has the columns {list(row)}: expected {heads}")
    numeric = {head: all(_is_number(row[head]) for row in rows) for head in heads}

    def cell(tag, head, value):
        text = "" if value is None else html.escape(str(value))
        kinds = ["number"] * numeric[head] + ["short"] * (tag == "th" and len(text) <= SHORT)
        kinds += ["long"] * (tag == "td" and len(text) > LONG)
        classes = f' class="{" ".join(kinds)}"' if kinds else ""
        return f"<{tag}{' scope=col' if tag == 'th' else ''}{classes}>{text}</{tag}>"

    top = "".join(cell("th", head, head) for head in heads)
    body = "".join("<tr>" + "".join(cell("td", head, row[head]) for head in heads) + "</tr>" for row in rows)
    # A caption of a figure, not of the table, because on a narrow screen only the table should scroll sideways.
    title = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    grid = f'<table class="permask-table"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'
    return HTML(f'{_STYLE}<figure class="permask-results">{title}<div class="permask-scroll">{grid}</div></figure>')


def records(rows):
    """Return rows as a list of dict; a DataFrame's named index is included, and missing values are None."""
    if not isinstance(rows, pd.DataFrame):
        return rows
    named = [name for name in rows.index.names if name is not None]
    rows = rows.reset_index(named).astype(object)
    return rows.where(rows.notna(), None).to_dict("records")


def _is_number(value):
    return value is None or isinstance(value, Number) or re.match(r"[-−+<]? ?[\d.]|$", str(value)) is not None
