"""What the page on structured tickets says of stored results."""

import numpy as np
import pandas as pd
import pytest

from permask_core.data.measured import measured_structured_tickets
from permask_core.evaluation.statistics import mean_interval

LEVELS = [0.9, 0.95, 0.97, 0.985]


@pytest.fixture(scope="module")
def rows():
    return pd.DataFrame(measured_structured_tickets()["rows"]).assign(accuracy=lambda rows: 100 * rows["accuracy"])


@pytest.fixture(scope="module")
def accuracy(rows):
    """In percent, [seeds, (method, scope, sparsity)]."""
    return rows.pivot(index="seed", columns=["method", "scope", "sparsity"], values="accuracy").sort_index(axis=1)


@pytest.fixture(scope="module")
def cost(accuracy):
    """By method, constant fan-in minus zeros anywhere in points, [seeds, sparsities]."""
    return {method: accuracy[method, "fan_in"] - accuracy[method, "global"] for method in ("lth", "permuted", "naive")}


@pytest.fixture(scope="module")
def speed():
    """Times as fast as dense, [seeds, (backend, batch, sparsity)]."""
    times = pd.DataFrame(measured_structured_tickets()["times"])
    seconds = pd.DataFrame([*times["median_seconds"]])
    ratios = times[["seed", "batch", "sparsity"]].join(seconds.rdiv(seconds["dense"], axis=0))
    return ratios.pivot(index="seed", columns=["batch", "sparsity"])


def test_neurons_of_a_moved_ticket_have_the_same_fan_in_in_every_seed(rows):
    moved = rows[rows["method"] == "permuted"]
    assert (moved.groupby(["scope", "sparsity"])["achieved"].nunique() == 1).all()
    for _, own in moved[moved["scope"] == "fan_in"].groupby("sparsity"):
        connections = [*own["connections"]]
        assert all(one == connections[0] for one in connections)
        assert all(least == most for least, most, _ in connections[0].values())


def test_condensed_training_ends_in_the_same_accuracy(rows):
    moved = rows[(rows["method"] == "permuted") & (rows["scope"] == "fan_in")]
    assert len(moved) == 40 and (100 * moved["condensed_accuracy"] == moved["accuracy"]).all()


def test_the_form_costs_less_than_a_point_up_to_97_percent_and_more_on_the_way(cost):
    for method in ("lth", "permuted"):
        assert (cost[method][LEVELS[:3]].mean().abs() < 1).all()
    assert -3 < mean_interval(cost["lth"][0.985]).high < -1 and mean_interval(cost["permuted"][0.985]).high < -6
    assert mean_interval(cost["lth"][0.97]).low > 0 > mean_interval(cost["permuted"][0.97]).high
    assert mean_interval(cost["naive"][0.97]).low > 5 and cost["naive"][0.9].mean() < 0
    transfer = cost["permuted"] - cost["lth"]
    assert all(mean_interval(transfer[s]).high < 0 for s in LEVELS[1:])


def test_condensed_layers_are_fastest_for_many_examples_and_trimmed_ones_for_one(speed):
    for batch, s in [(batch, s) for batch in (1, 256) for s in LEVELS]:
        assert abs(speed["zeros", batch, s].mean() - 1) < 0.05
    for than in ("trimmed", "CSR"):
        assert all(mean_interval(speed["fan-in", 256, s] / speed[than, 256, s]).low > 1 for s in LEVELS[:3])
    assert all(mean_interval(speed["trimmed", 1, s] / speed["fan-in", 1, s]).low > 1 for s in LEVELS[1:])


def test_at_the_same_speed_the_form_is_ahead_by_less_than_a_point(accuracy, speed):
    for s, other in zip(LEVELS, LEVELS[1:]):
        faster = all(speed["fan-in", 256, s].mean() > speed[name, 256, other].mean() for name in ("trimmed", "CSR"))
        assert faster == (s < 0.97)
        assert 0 < (accuracy["permuted", "fan_in", s] - accuracy["permuted", "global", other]).mean() < 1


def test_the_rule_chooses_97_percent(cost, speed):
    chosen = max(np.array(LEVELS)[cost["permuted"].loc[:4, LEVELS].mean() >= -1])
    loss = mean_interval(cost["permuted"][chosen].loc[5:])
    assert chosen == 0.97 and loss.low > -2 and loss.high < 0.5
    assert mean_interval(speed["fan-in", 256, chosen]).low > 6.4
    assert mean_interval(speed["fan-in", 1, chosen]).low > 1.2
