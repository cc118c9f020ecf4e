"""Claims: what they show, what they refuse, and when they have a rate."""

import numpy as np
import pytest
from bs4 import BeautifulSoup

from permask_core.display import ahead, claim, claims, evidence
from permask_core.evaluation.statistics import mean_interval, paired_comparison


@pytest.fixture
def shown(monkeypatch):
    """What was displayed, in order."""
    seen = []
    monkeypatch.setattr(claims, "display", seen.append)
    return seen


@pytest.fixture
def repeated(monkeypatch):
    """A page of which one version was repeated four times."""
    made = {name: {"holds": name != "two threads", "evidence": "n = 3"} for name in ("a", "b", "avx2", "two threads")}
    pages = {"page": {"version": "v1", "claims": {"A is ahead.": made}}}
    monkeypatch.setattr(claims, "measured_claims", lambda: {"repetitions": {}, "pages": pages})


@pytest.mark.parametrize("holds, words", [(True, "A is ahead."), (False, "Not in this run: A is ahead."),
                                          (np.bool_(True), "A is ahead.")])
def test_claim_is_one_line_with_mark_sentence_and_evidence(shown, holds, words):
    claim("A is ahead.", holds, "5 of 5 pairs; 1 < 2")
    page = BeautifulSoup(shown[0]._repr_mimebundle_()[0]["text/html"], "html.parser")
    (line,) = page.select(".permask-claim")
    assert line.b.text == ("✓" if holds else "✗") and line.b["aria-label"]
    assert line.span.text == f"{words} 5 of 5 pairs; 1 < 2"


def test_claim_is_text_outside_of_notebooks(capsys):
    claim("A is ahead.", False, "1 of 5 pairs")
    assert capsys.readouterr().out == "does not hold here: A is ahead. (1 of 5 pairs)\n"


@pytest.mark.parametrize("sentence, holds, found, message", [
    ("A is ahead.", True, "", "the claim 'A is ahead.' has the evidence ''"),
    ("A is ahead.", True, None, "has the evidence None"),
    (" ", True, "n = 3", "the sentence of a claim is ' '"),
    ("A is ahead.", np.array([True, False]), "n = 3", "holds = array"),
    ("A is ahead.", 1, "n = 3", "holds = 1: expected True or False"),
])
def test_claim_without_evidence_or_verdict_is_refused(shown, sentence, holds, found, message):
    with pytest.raises(ValueError) as caught:
        claim(sentence, holds, found)
    assert message in str(caught.value) and not shown


def test_evidence_has_n_and_the_interval():
    a, b = np.array([91.2, 93.0, 92.1, 90.7]), np.array([88.0, 91.5, 92.4, 87.3])
    d = paired_comparison(a, b)
    assert evidence(d) == f"3 of 4 pairs; {d.difference:+.1f} points, 95 % interval {d.low:+.1f} to {d.high:+.1f}"
    mean = mean_interval([0.011, 0.012, 0.013])
    text = evidence(mean, unit="nats", blocks="seeds")
    assert text == f"{mean.mean:.4f} nats, 95 % interval {mean.low:.4f} to {mean.high:.4f}, n = 3 seeds"


@pytest.mark.parametrize("values", [[2.0, 2.0, 2.0], [0.0, 0.0]])
def test_evidence_of_equal_values_is_text(values):
    assert evidence(mean_interval(values)).startswith(f"{values[0]:.1f} points, 95 % interval {values[0]:.1f} to")


@pytest.mark.parametrize("a, b", [([3.0, 1.0, 2.5], [1.0, 2.0, 1.0]), ([1.0, 2.0], [3.0, 1.5])])
def test_ahead_is_the_sign_of_the_paired_difference(a, b):
    d = paired_comparison(a, b)
    assert ahead(a, b, "nats", "families") == (d.difference > 0, evidence(d, "nats", "families"))


def test_one_block_has_no_interval():
    assert ahead([0.25], [0.5], "nats") == (False, "-0.25 nats, n = 1")
    with pytest.raises(ValueError):
        ahead([1.0, 2.0], [1.0])


@pytest.mark.parametrize("page, expected", [
    ("page@v1", "held in 3 of 4 repetitions"), ("page@v2", "not yet repeated"), ("other@v1", "not yet repeated")])
def test_rate_is_of_this_version_of_this_page(shown, repeated, monkeypatch, page, expected):
    monkeypatch.setenv(claims.PAGE, page)
    claim("A is ahead.", True, "n = 3")
    claim("B is ahead.", True, "n = 3")
    assert [one.rate for one in shown] == [expected, "not yet repeated"]
    assert expected in repr(shown[0]) and expected in shown[0]._repr_mimebundle_()[0]["text/html"]


@pytest.mark.parametrize("page", [None, ""])
def test_own_parameters_have_no_rate(shown, repeated, monkeypatch, page):
    monkeypatch.delenv(claims.PAGE, raising=False) if page is None else monkeypatch.setenv(claims.PAGE, page)
    claim("A is ahead.", True, "n = 3")
    assert shown[0].rate == "" and "repe" not in repr(shown[0])
