"""Select and format numbers from the rows of an experiment: a list of dict or a DataFrame with one row for each run."""

import math

import numpy as np
import pandas as pd

from permask_core.evaluation.statistics import Interval, Paired, mean_interval


def select(rows, column, **where):
    """Return a column of the rows that match, ordered by seed.

    Parameters
    ----------
    rows : pandas.DataFrame or list of dict
    column : str
        Numbers, or lists of equal length.
    **where
        Columns and their required values: ``method="naive", sparsity=0.97``; None matches missing values.

    Returns
    -------
    numpy.ndarray, shape [rows that match, ...]

    Raises
    ------
    ValueError
        If no row matches.

    Examples
    --------
    >>> rows = [{"method": "lth", "seed": 1, "loss": 0.3}, {"method": "lth", "seed": 0, "loss": 0.2}]
    >>> select(rows, "loss", method="lth").tolist()
    [0.2, 0.3]
    """
    found = pd.DataFrame(rows)
    for key, value in where.items():
        found = found[found[key].isna() if value is None else found[key] == value]
    if found.empty:
        raise ValueError(f"no result with {', '.join(f'{key} {value!r}' for key, value in where.items())}")
    return np.array(found.sort_values("seed", kind="stable")[column].tolist())


def accuracies(rows, **where):
    """Return the test accuracies in percent of the rows that match, ordered by seed; parameters as in
    :func:`select`."""
    return 100 * select(rows, "accuracy", **where)


def spread(values):
    """:func:`permask_core.evaluation.statistics.mean_interval`, in which a single value is an interval of width
    zero."""
    values = np.asarray(values)
    if len(values) > 1:
        return mean_interval(values)
    return Interval(values[0], math.nan, values[0], values[0], 1)


def plus_minus(values, digits=1):
    """Return a mean and half the width of its 95 % interval as text; a single value has no interval.

    Parameters
    ----------
    values : array-like, shape [n], Interval or Paired
        A paired comparison is written with its sign.
    digits : int
        Number of digits after the decimal point.

    Returns
    -------
    str

    Examples
    --------
    >>> plus_minus([96.1, 96.5, 96.3]), plus_minus([0.25], 2)
    ('96.3 ± 0.5', '0.25')
    >>> pd.DataFrame({"method": ["lth"] * 2, "loss": [1, 3]}).groupby("method")["loss"].agg(plus_minus)["lth"]
    '2.0 ± 12.7'
    """
    if isinstance(values, Paired):
        return f"{values.difference:+z.{digits}f} ± {values.high - values.difference:.{digits}f}"
    found = values if isinstance(values, Interval) else spread(values)
    return f"{found.mean:z.{digits}f}" + (f" ± {found.high - found.mean:.{digits}f}" if found.n > 1 else "")


def provenance(measured):
    """Return the provenance of stored results, as a sentence for a caption.

    Parameters
    ----------
    measured : dict
        A dict with ``command``, ``commit``, ``versions`` and ``device``, as in :mod:`permask_core.data.measured`.

    Returns
    -------
    str
    """
    return (f"Measured in advance: {measured['command']}, commit {measured['commit']}, torch "
            f"{measured['versions']['torch']}, {measured['device']}.")
