"""Tidy tables as CSV: written completely or not at all, and read with their types."""

import csv
import json
from pathlib import Path

from permask_core.runs.files import write_whole
from permask_core.runs.store import plain


def write_table(path, rows):
    """Write rows to a temporary file that is then renamed to ``path``.

    Parameters
    ----------
    path : path-like
    rows : list of dict
        Values are anything that JSON holds. Each entry of a dict gets its own column, as in :func:`columns`.
    """
    rows = [columns(row) for row in rows]
    heads = list(dict.fromkeys(key for row in rows for key in row))
    with write_whole(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, heads, lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)


def columns(values, prefix=""):
    """Return a row as a flat dict: each entry of an inner dict gets the name "key.inner key".

    Examples
    --------
    >>> columns({"seed": 3, "options": {"size": 32}})
    {'seed': 3, 'options.size': 32}
    """
    flat = {}
    for key, value in values.items():
        name = f"{prefix}.{key}" if prefix else key
        flat |= columns(value, name) if isinstance(value, dict) else {name: value}
    return flat


def read_table(path):
    """Read a table that :func:`write_table` wrote, as a list of dict without the values that are None or empty.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If a row has fewer or more values than there are columns.
    """
    with Path(path).open(newline="") as file:
        lines = list(csv.reader(file))
    for n, line in enumerate(lines[1:], 2):
        if len(line) != len(lines[0]):
            raise ValueError(f"{path} has {len(line)} values in row {n}: expected {len(lines[0])}; is it cut off?")
    return [{key: _value(cell) for key, cell in zip(lines[0], line) if cell} for line in lines[1:]]


def _cell(value):
    if value is None:
        return ""
    # Also quoted as JSON: strings that look like numbers (a commit "1e5"), and those with a carriage return, which CSV
    # would read as the end of the line.
    if not isinstance(value, str) or value and (_value(value) != value or "\r" in value):
        return json.dumps(value, default=plain)
    return value


def _value(cell):
    try:
        return json.loads(cell)
    except ValueError:
        return cell
