"""Claims: findings of a notebook, each in one line with its evidence and its replication rate.

What must hold (an identity, a planted solution) is asserted. A finding may fail on another machine or with other seeds:
it is a claim, which reports whether it holds in this run and never stops the run. A claim is shown as HTML and text,
and is stored as JSON in the metadata of its output in the executed notebook. How often claims held when the notebooks
were repeated is stored in ``permask_core/data/measured/claims.json``.
"""

import html
import os
from typing import NamedTuple

import numpy as np
from IPython.display import display

from permask_core.data.measured import measured_claims
from permask_core.evaluation.statistics import Interval, paired_comparison
from permask_core.runs.notebooks import KEY, PAGE

_STYLE = """<style>
.permask-claim{max-width:46rem;margin:.25rem auto;font-size:.92em;line-height:1.45;display:flex;gap:.55rem}
.permask-claim b{flex:none;width:1.1em;font-weight:700;text-align:center}
.permask-claim small{font-size:.92em;opacity:.78}
</style>"""


class Claim(NamedTuple):
    """A claim as shown by :func:`claim`. ``rate`` is a text on how often it held before; empty if unknown."""

    sentence: str
    holds: bool
    evidence: str
    rate: str

    def __repr__(self):
        return f"{'holds' if self.holds else 'does not hold here'}: {self.sentence} ({self._behind})"

    def _repr_mimebundle_(self, include=None, exclude=None):
        mark, label = ("✓", "holds in this run") if self.holds else ("✗", "does not hold in this run")
        lead = "" if self.holds else "<em>Not in this run:</em> "
        line = (f'{_STYLE}<div class="permask-claim" data-holds="{str(self.holds).lower()}">'
                f'<b role="img" aria-label="{label}" title="{label}">{mark}</b>'
                f"<span>{lead}{html.escape(self.sentence)} <small>{html.escape(self._behind)}</small></span></div>")
        found = {"sentence": self.sentence, "holds": self.holds, "evidence": self.evidence}
        return {"text/html": line, "text/plain": repr(self)}, {KEY: found}

    @property
    def _behind(self):
        return "; ".join(part for part in (self.evidence, self.rate) if part)


def claim(sentence, holds, evidence):
    """Show one line: whether a sentence about the results holds, the evidence, and how often it held before.

    Parameters
    ----------
    sentence : str
        The finding. The sentence identifies the claim on its page, so numbers that differ from run to run belong to the
        evidence.
    holds : bool
        Whether it holds in this run.
    evidence : str
        The numbers: what was measured, n and an interval. :func:`evidence` formats those of a comparison.

    Raises
    ------
    ValueError
        If the sentence or the evidence is empty, or ``holds`` is not a single bool.

    Examples
    --------
    >>> claim("Permuted is ahead of naive in every pair.", True, "5 of 5 pairs; +5.2 points, 95 % interval 3.5 to 6.8")
    holds: Permuted is ahead of naive in every pair. (5 of 5 pairs; +5.2 points, 95 % interval 3.5 to 6.8)
    """
    if not isinstance(sentence, str) or not sentence.strip():
        raise ValueError(f"the sentence of a claim is {sentence!r}: expected text")
    if not isinstance(evidence, str) or not evidence.strip():
        raise ValueError(f"the claim {sentence!r} has the evidence {evidence!r}: expected text with its numbers")
    if not isinstance(holds, bool | np.bool_):
        raise ValueError(f"the claim {sentence!r} has holds = {holds!r}: expected True or False (.all() or .any() of "
                         "several)")
    display(Claim(sentence, bool(holds), evidence, _rate(sentence)))


def evidence(found, unit="points", blocks="pairs"):
    """Return the evidence of a comparison or a mean as text, with n and the interval.

    Parameters
    ----------
    found : Paired or Interval
        Result of :func:`permask_core.evaluation.statistics.paired_comparison` or
        :func:`~permask_core.evaluation.statistics.mean_interval`.
    unit, blocks : str
        The unit of the values, and the name of the n samples.

    Returns
    -------
    str

    Examples
    --------
    >>> from permask_core.evaluation.statistics import mean_interval, paired_comparison
    >>> evidence(paired_comparison([5, 7, 6], [1, 2, 3]))
    '3 of 3 pairs; +4.0 points, 95 % interval +1.5 to +6.5'
    >>> evidence(mean_interval([0.1, 0.2, 0.3]), unit="nats", blocks="seeds")
    '0.20 nats, 95 % interval -0.05 to 0.45, n = 3 seeds'
    """
    width = found.high - found.low
    digits = 1 if not np.isfinite(width) or width <= 0 else int(np.clip(1 - np.floor(np.log10(width)), 1, 4))
    if isinstance(found, Interval):
        return (f"{found.mean:z.{digits}f} {unit}, 95 % interval {found.low:.{digits}f} to {found.high:.{digits}f}, "
                f"n = {found.n} {blocks}")
    return (f"{found.wins} of {found.n} {blocks}; {found.difference:+z.{digits}f} {unit}, 95 % interval "
            f"{found.low:+z.{digits}f} to {found.high:+z.{digits}f}")


def ahead(a, b, unit="points", blocks="pairs"):
    """Return whether ``a`` is above ``b`` in the mean, and the evidence: the arguments of :func:`claim` after the
    sentence.

    Parameters
    ----------
    a, b : array-like, shape [n]
        Values of the same blocks in the same order. A single block has no interval.
    unit, blocks : str
        As in :func:`evidence`.

    Returns
    -------
    (bool, str)

    Examples
    --------
    >>> ahead([5, 7, 6], [1, 2, 3])
    (True, '3 of 3 pairs; +4.0 points, 95 % interval +1.5 to +6.5')
    >>> ahead([0.25], [0.125], unit="nats")
    (True, '+0.12 nats, n = 1')
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.size == b.size == 1:
        return bool(a[0] > b[0]), f"{a[0] - b[0]:+.2g} {unit}, n = 1"
    return bool(a.mean() > b.mean()), evidence(paired_comparison(a, b), unit, blocks)


def rates(page, version):
    """Return how often each claim of a page held when its notebook was repeated.

    Parameters
    ----------
    page, version : str
        The notebook's name, and its :func:`permask_core.runs.notebooks.notebook_version`.

    Returns
    -------
    dict
        A pair (held, made) by sentence: the claim held in ``held`` of ``made`` repetitions. Empty if no repetition used
        this version of the notebook.
    """
    stored = measured_claims()["pages"].get(page, {})
    if stored.get("version") != version:
        return {}
    return {sentence: (sum(one["holds"] for one in made.values()), len(made))
            for sentence, made in stored["claims"].items()}


def rate_text(rate):
    """Return a rate as text: ``held in 12 of 13 repetitions``, or ``not yet repeated`` for None."""
    return "not yet repeated" if rate is None else f"held in {rate[0]} of {rate[1]} repetitions"


def _rate(sentence):
    page, _, version = os.environ.get(PAGE, "").partition("@")
    return rate_text(rates(page, version).get(sentence)) if page else ""
