"""What the pages on Fashion-MNIST say of the stored grid."""

import pandas as pd
import pytest

from permask_core.data.measured import measured_grid
from permask_core.data.mnist import GARMENTS
from permask_core.display import select
from permask_core.experiments.alignment import gap_share
from permask_core.experiments.presets import PERMUTED_MASKS

ROWS = pd.DataFrame(measured_grid("fashion_mnist", "fashion_mnist")["rows"]).fillna({"matching": ""})
CHOSEN = ROWS["preset"].map({name: one.settings.get("rewind") for name, one in PERMUTED_MASKS.items()})
NETWORKS = dict(list(ROWS[ROWS["rewind"] == CHOSEN].groupby(["model", "width"])))


def accuracy(rows, method, s, by=""):
    return select(rows, "accuracy", method=method, sparsity=s, matching=by).mean()


def share(width, rewind, s, by="activations"):
    rows = ROWS[(ROWS["model"] == "mlp") & (ROWS["width"] == width) & (ROWS["rewind"] == rewind)]
    given = ("permuted", by), ("naive", ""), ("lth", "")
    return gap_share(*(select(rows, "accuracy", method=m, sparsity=s, matching=one) for m, one in given))


def test_seeds_that_chose_the_settings_are_not_reported():
    assert ROWS["seed"].min() == 5
    for (model, width), rows in NETWORKS.items():
        assert rows["seed"].nunique() >= (5 if model == "mlp" else 3), (model, width)
        counts = rows.groupby(["method", "matching", "sparsity"])["seed"].nunique()
        assert counts.nunique() == 1  # every method of every pair


@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_the_order_of_the_methods_at_97_percent(network):
    rows = NETWORKS[network]
    ticket, naive, random = (accuracy(rows, method, 0.97) for method in ("lth", "naive", "random"))
    assert ticket > naive > random
    if network != ("mlp", 0.25):
        for by in ("weights", "activations"):
            assert ticket > accuracy(rows, "permuted", 0.97, by) > naive


def test_from_the_initialisation_the_permutation_closes_little_and_from_epoch_1_more_than_half():
    for width in (0.25, 0.5, 1, 2):
        assert share(width, 0, 0.97).share < 1 / 3 and share(width, 0, 0.97, "weights").share < 1 / 3
        assert share(width, 1, 0.97).share > 1 / 2


def test_the_width_matters_less_than_the_start():
    starts = [[share(width, k, 0.97).share for width in (0.25, 0.5, 1, 2)] for k in (0, 1)]
    assert min(starts[1]) - max(starts[0]) > max(starts[1]) - min(starts[1])


def test_later_rewind_points_gain_nothing_over_epoch_1():
    first, *later = (share(2, k, 0.97) for k in (1, 2, 3))
    assert all(abs(one.share - first.share) < 0.1 for one in later)


BARRIERS = pd.DataFrame(measured_grid("fashion_mnist", "basins_and_connectivity")["rows"])


def barrier(method, **where):
    return select(BARRIERS, "barrier", method=method, **where).mean()


def test_matching_after_the_first_epoch_removes_nearly_all_of_the_barrier_at_every_width():
    for width in (0.25, 0.5, 1, 2):
        where = {"sparsity": 0, "width": width}
        assert barrier("permuted", matched_at=6, **where) < 0.05 * barrier("naive", **where)
    left = {k: barrier("permuted", matched_at=k, **where) / barrier("naive", **where) for k in range(4)}
    assert left.pop(0) > 0.9 and max(left.values()) < 0.05


def test_the_ticket_lies_in_the_basin_of_the_pruned_solution_and_the_permuted_solution_only_partly():
    for sparsity in (0.9, 0.97, 0.99):
        ticket, permuted, naive = (barrier(m, sparsity=sparsity) for m in ("lth", "permuted", "naive"))
        assert ticket < 0.01 and permuted < naive
    assert permuted > naive / 2  # at 99 %


def test_permuted_networks_are_diverse_but_their_ensemble_does_not_reach_the_ticket():
    rows = pd.DataFrame(measured_grid("fashion_mnist", "functional_diversity")["rows"])
    mean = rows.groupby("method").mean(numeric_only=True)
    for measure in ("disagreement", "kl", "js"):
        assert mean[measure].idxmin() == "lth"
    assert mean.loc["permuted", "disagreement"] > 5 * mean.loc["lth", "disagreement"]
    assert mean.loc["permuted", "accuracy"] < mean.loc["lth", "accuracy"]
    assert mean["ensemble"].nlargest(2).index.sort_values().tolist() == ["dense", "pruned"]
    assert mean.loc["permuted", "ensemble"] < mean.loc["lth", "ensemble"]
    own, others = (mean.loc["permuted", f"disagreement_with_{key}tickets"] for key in ("", "other_"))
    assert own < others


@pytest.mark.parametrize("model, width, rewind", [("mlp", 2, 0), ("lenet5", 1, 1)])
def test_in_points_shirts_pay_most_for_a_mask_and_as_a_multiple_of_the_errors_other_garments(model, width, rewind):
    rows = ROWS[(ROWS["model"] == model) & (ROWS["width"] == width) & (ROWS["rewind"] == rewind)]
    columns = [f"right.{one}" for one in GARMENTS]
    dense = 1 - rows.loc[rows["method"] == "dense", columns].mean()
    where = (rows["method"] == "permuted") & (rows["matching"] == "activations") & (rows["sparsity"] == 0.97)
    sparse = 1 - rows.loc[where, columns].mean()
    assert (sparse - dense).idxmax() == "right.shirt" and 0.07 < (sparse - dense).max() < 0.1
    similar = [f"right.{one}" for one in ("T-shirt", "pullover", "dress", "coat", "shirt")]
    others = [one for one in columns if one not in similar]
    assert (sparse - dense)[others].mean() < 0.02
    assert sparse[others].mean() / dense[others].mean() > sparse[similar].mean() / dense[similar].mean()


def test_distilled_students_are_less_accurate_than_students_without_a_teacher():
    rows = pd.DataFrame(measured_grid("fashion_mnist", "garments")["rows"])
    for _, own in rows.groupby("seed"):
        (teacher,), (alone,) = (own[own["role"] == role].to_dict("records") for role in ("teacher", "student"))
        taught = own[own["role"] == "distilled"].set_index("temperature")
        assert abs(teacher["accuracy"] - alone["accuracy"]) < 0.01
        lost = alone["accuracy"] - taught["accuracy"]
        assert lost.min() > 0 and lost[1] < 0.01 < lost[40] < 0.02
        assert taught["agreement"].min() > alone["agreement"]


def test_connections_that_move_pay_at_high_sparsity():
    rows = pd.DataFrame(measured_grid("fashion_mnist", "sparse_training_on_images")["rows"])
    rows = rows[(rows["model"] == "mlp") & (rows["recipe.epochs"] == 6)]
    starts = {"set": "random", "rigl": "random", "srigl": "fan_in", "srigl+ablation": "fan_in"}
    for sparsity, own in rows[rows["sparsity"] > 0].groupby("sparsity"):
        of = own.pivot(index="seed", columns="method", values="accuracy")
        gains = [of[moving] - of[start] for moving, start in starts.items()]
        if sparsity < 0.96:
            assert all(abs(gain.mean()) < 0.005 for gain in gains)
        else:
            assert all((gain > 0).all() for gain in gains)
        assert abs((of["srigl+ablation"] - of["srigl"]).mean()) < 0.001
        ablated = own[own["method"] == "srigl+ablation"]
        assert (ablated["active"] / ablated["neurons"]).mean() > 0.95
    assert sparsity == 0.99 and (of["rigl"] > of["srigl"]).all() and (of["rigl"] > of["srigl+ablation"]).all()


def test_moving_connections_for_as_long_as_a_ticket_takes_comes_close_to_the_ticket():
    rows = pd.DataFrame(measured_grid("fashion_mnist", "sparse_training_on_images")["rows"])
    rows = rows[(rows["model"] == "mlp") & (rows["sparsity"] == 0.99)]
    seeds = set(rows.loc[rows["recipe.epochs"] == 48, "seed"])
    mean = rows[rows["seed"].isin(seeds)].groupby(["method", "recipe.epochs"])["accuracy"].mean()
    own = ROWS[(ROWS["model"] == "mlp") & (ROWS["width"] == 2) & (ROWS["rewind"] == 0) & ROWS["seed"].isin(seeds)]
    ticket, permuted = accuracy(own, "lth", 0.99), accuracy(own, "permuted", 0.99, "activations")
    assert len(seeds) > 1
    assert 0 < ticket - mean["set", 48] < 0.01 and 0 < ticket - mean["rigl", 48] < 0.01
    assert 0.01 < ticket - mean["srigl+ablation", 48] < 0.03 and 0.035 < ticket - mean["random", 48] < 0.045
    assert 0 < permuted - mean["rigl", 6] < 0.01
