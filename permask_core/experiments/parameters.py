"""The parameters of all notebooks: each name has one meaning and one type, and the order is fixed.

The first code cell of a notebook, with the tag "parameters", assigns some of these names; the next cell, with the tag
"check", calls :func:`check_parameters`. This module has no slow imports, so that errors are raised immediately.
"""

import ast
import contextlib
import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import NamedTuple

from permask_core.runs.checks import nearest


class Parameter(NamedTuple):
    """The allowed values of a parameter: the name of the ``type``, a function that tells whether a value ``fits``, a
    text of what is ``expected``, and an ``example`` in YAML. None is always allowed and means that it is not given."""

    type: str
    fits: Callable[[object], bool]
    expected: str
    example: str


def _is(kind, value):
    return isinstance(value, kind) and not isinstance(value, bool)


def _integer(low, example="3"):
    return Parameter("int", lambda value: _is(Integral, value) and value >= low, f"an integer of at least {low}",
                     example)


def _number(low, high=math.inf, *, inclusive=False, example="0.5"):
    def fits(value):
        return _is(Real, value) and value < math.inf and (
            low < value < high or inclusive and value in (low, high))

    ends = "[]" if inclusive else "()"
    expected = (f"a number in {ends[0]}{low}, {high}{ends[1]}" if high < math.inf else
                f"a number {'of at least' if inclusive else 'above'} {low}")
    return Parameter("float", fits, expected, example)


def _text(*known, example="name"):
    return Parameter("str", lambda value: type(value) is str and (value in known if known else bool(value)),
                     f"one of {', '.join(known)}" if known else "a text", known[0] if known else example)


def _list(of, example=None):
    def fits(value):
        return (type(value) is list and value and all(of.fits(one) for one in value)
                and all(value.count(one) == 1 for one in value))  # a run counted twice would narrow intervals

    return Parameter("list", fits, f"a list of different values, each {of.expected}", example or f"[{of.example}]")


_FLAG = Parameter("bool", lambda value: type(value) is bool, "true or false", "true")
_MAPPING = Parameter("dict", lambda value: type(value) is dict and all(type(key) is str for key in value),
                     "a mapping of names to values", "{epochs: 2}")
_SPARSITY = _number(0, 1, example="0.9")
_MATCHINGS = ("weights", "activations")

# In the order of a notebook's parameters.
VOCABULARY = {
    # data and networks
    "preset": _text(), "pairs": _list(_text(), "[digits]"), "pair": _text(), "dataset": _text(),
    "model": _text(example="mlp"), "traced": _text(), "inputs": _integer(1, "768"), "outputs": _integer(1, "768"),
    "labels": _integer(2, "1000"),
    # comparisons
    "methods": _list(_text(), "[dense, rigl]"), "attributes": _list(_text(), "[Young]"),
    "widths": _list(_number(0), "[0.5, 1]"), "width": _number(0), "timed_width": _number(0),
    "sparsities": _list(_SPARSITY, "[0.9, 0.97]"), "sparsity": _SPARSITY, "studied": _SPARSITY, "kept": _SPARSITY,
    "temperatures": _list(_number(0), "[1, 4]"), "fan_in": _integer(1), "rewinds": _list(_integer(0), "[0, 2]"),
    "rewind": _integer(0), "matchings": _list(_text(*_MATCHINGS, "ticket")), "matching": _text(*_MATCHINGS),
    "matched_at": _integer(0), "matched_epochs": _list(_integer(0), "[2, 20]"), "matched_images": _integer(1),
    "matched_layers": _list(_text(), "[fc1]"), "imp": _text("rewind", "finetune"), "unseen": _integer(0),
    # repetitions
    "seeds": _integer(1), "first_seed": _integer(0, "0"), "networks": _integer(1), "draws": _integer(1, "1000"),
    # training
    "epochs": _integer(1), "imp_epochs": _integer(1), "steps": _integer(1), "batch_size": _integer(1, "128"),
    "accumulate": _integer(1), "precision": _text("float32", "bf16"), "lr": _number(0, example="0.1"),
    "sparse_lr": _number(0, example="0.05"), "warmup": _number(0, inclusive=True), "initial_scale": _number(0),
    "recipe": _MAPPING, "rewiring": _MAPPING, "every": _integer(1), "min_salient": _number(0, 1, inclusive=True),
    "alpha": _number(0, 1, inclusive=True), "teacher_options": _MAPPING, "student_options": _MAPPING,
    # measurement
    "points": _integer(2), "grid": _integer(2), "planted": _integer(1), "batches": _list(_integer(1), "[1, 64]"),
    "counts": _list(_integer(1), "[1, 4]"), "seconds": _number(0), "level": _number(0, 1),
    "individuals": _integer(2, "300"),
    # files, folders and processes
    "image_size": _integer(1), "options": _MAPPING, "data_root": _text(example="data"), "download": _FLAG,
    "verify": _FLAG, "readers": _integer(0), "processes": _integer(1), "workers": _integer(1),
    "batched": _integer(1), "result": _text(example="results.json"), "folder": _text(example="build/batch"),
    "runs": _text(example="runs"), "output": _text(example="results"),
}


def check_parameters(space, *, minimum=(), **known):
    """Check the parameters of a notebook, and report all errors at once.

    Parameters
    ----------
    space : dict
        The names of the notebook: ``globals()``.
    minimum : mapping, optional
        A higher minimum in this notebook by name of the parameter, such as ``{"seeds": 2}``.
    **known
        By name of a parameter, a text or a list of texts: the values allowed in this notebook. For ``preset`` these are
        names in :mod:`permask_core.experiments.presets`.

    Raises
    ------
    ValueError
        With a line for each error: a name that the notebook does not have, a value of the wrong type or out of range.

    Examples
    --------
    >>> check_parameters({"__annotations__": {"seeds": int}, "seeds": 0})
    Traceback (most recent call last):
    ValueError: seeds is 0: expected an integer of at least 1, as in -y 'seeds: 3'
    """
    own, (injected, needed) = list(space.get("__annotations__", {})), _cells(space)
    if "model" in own:
        from permask_core.models import MODELS

        known.setdefault("model", MODELS)
    faults = [f"unknown parameter {name!r}{nearest(name, own)}: expected some of {', '.join(own)}"
              for name in injected if name not in own]
    for name in own:
        value, parameter = space[name], VOCABULARY[name]
        if value is None and name not in needed:
            continue
        if not parameter.fits(value):
            faults.append(f"{name} is {value!r}: expected {parameter.expected}, as in -y '{name}: {parameter.example}'")
        elif name in dict(minimum) and value < minimum[name]:
            faults.append(f"{name} is {value!r}: expected at least {minimum[name]}")
        else:
            faults += [f"{name} is {value!r}: unknown {one!r}{nearest(one, known[name])}; expected "
                       f"{'some' if type(value) is list else 'one'} of {', '.join(known[name])}"
                       for one in (value if type(value) is list else [value]) if name in known
                       and one not in known[name]]
    if faults:
        raise ValueError("\n".join(faults))


def _cells(space):
    """Return, from IPython's history of cells, the names that papermill assigned in its own cell, and those that the
    notebook itself sets to a value other than None."""
    injected, needed = [], []
    for source in space.get("In", ()):
        with contextlib.suppress(SyntaxError):  # raised by IPython commands
            for node in ast.parse(source).body:
                if isinstance(node, ast.Assign) and source.startswith("# Parameters\n"):
                    injected += [target.id for target in node.targets]
                elif isinstance(node, ast.AnnAssign) and not (isinstance(node.value, ast.Constant)
                                                              and node.value.value is None):
                    needed.append(node.target.id)
    return injected, needed
