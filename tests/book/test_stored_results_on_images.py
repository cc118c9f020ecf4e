"""What the pages on images and on many labels say of stored results, measured or published."""

import itertools

import pandas as pd
import pytest

from permask_core.data.measured import measured_extreme, measured_extreme_memory, measured_noisy_digits
from permask_core.data.published import published_dynamic_sparse_training, published_permuted_masks
from permask_core.evaluation.statistics import paired_comparison
from permask_core.experiments import permuted_masks

LTH, NAIVE, RANDOM = ("lth", ""), ("naive", ""), ("random", "")
BY_WEIGHTS, BY_ACTIVATIONS = ("permuted", "weights"), ("permuted", "activations")


@pytest.fixture(scope="module")
def noisy_digits():
    """Accuracies of the longer run in percent: a line for each pair."""
    rows = pd.DataFrame(measured_noisy_digits()["rows"])
    return 100 * rows.pivot(index="seed", columns=["width", "sparsity", "method", "matching"], values="accuracy")


@pytest.fixture(scope="module")
def published():
    """Published accuracies in percent with ResNet20: a line for each setting, a column for each method."""
    rows = pd.DataFrame(published_permuted_masks()).query("setting != 'VGG11/CIFAR-10' and method != 'dense'")
    return 100 * rows.pivot(index=["setting", "width", "sparsity", "rewind"], columns="method", values="accuracy")


def test_cifar_the_permuted_mask_is_ahead_where_the_network_is_narrow(noisy_digits):
    places = list(itertools.product((0.5, 1.0), (0.9, 0.95, 0.97, 0.985)))

    def leads(method):
        return [paired_comparison(noisy_digits[*at, *method], noisy_digits[*at, *NAIVE]) for at in places]

    assert all(d.difference > 0 for d in leads(BY_ACTIVATIONS)) and sum(d.low > 0 for d in leads(BY_ACTIVATIONS)) == 6
    assert sum(d.low > 0 for d in leads(BY_WEIGHTS)) == 1


def test_cifar_the_ticket_is_ahead_at_the_smallest_width_the_more_so_the_sparser(noisy_digits):
    narrow = noisy_digits[0.5]
    ahead = [paired_comparison(narrow[s, *LTH], narrow[s, *BY_ACTIVATIONS]) for s in (0.9, 0.95, 0.97, 0.985)]
    assert all(d.low > 0 for d in ahead) and [d.difference for d in ahead] == sorted(d.difference for d in ahead)


def test_cifar_at_width_2_all_methods_are_within_two_points(noisy_digits):
    means = noisy_digits[2.0].drop(columns=0.0, level="sparsity").mean().unstack("sparsity")
    assert means.shape == (5, 4) and (means.max() - means.min()).max() < 2


def test_cifar_no_interval_separates_the_naive_mask_from_a_random_one(noisy_digits):
    for at in itertools.product((0.5, 1.0, 2.0), (0.9, 0.95, 0.97, 0.985)):
        d = paired_comparison(noisy_digits[*at, *NAIVE], noisy_digits[*at, *RANDOM])
        assert d.low <= 0 <= d.high


def test_cifar_the_share_of_the_gap_that_is_closed_grows_with_the_width(noisy_digits, published):
    def shares(means):
        gap = means["lth"] - means["naive"]
        return ((means["permuted"] - means["naive"]) / gap)[gap > 2].tolist()

    measured = noisy_digits.drop(columns="weights", level="matching").mean().xs(0.985, level="sparsity")
    half, whole = shares(measured.droplevel("matching").unstack("method"))  # at width 2 there is no gap
    assert 0 < half < whole < 1
    for data in ("CIFAR-10", "CIFAR-100"):
        found = shares(published.xs((f"ResNet20/{data}", 0.97, 25), level=("setting", "sparsity", "rewind")))
        assert found == sorted(found) and len(found) > 1


def test_cifar_a_seed_at_one_rewind_point_and_two_sparsities_is_a_small_part():
    preset, base = permuted_masks.PRESETS["cifar10-resnet20"], permuted_masks.preset("cifar10-resnet20")
    part = preset.change_grid(rewinds=[25], sparsities=[0.9, 0.97], seeds=1)
    epochs = [sum(one[kind] for kind in ("dense", "pruning", "sparse")) for grid in (preset.grid, part)
              for one in permuted_masks.training_cost(base, grid, 50_000, {1: 1.0})]
    assert epochs[1] < epochs[0] / 20


def test_cifar_sized_the_published_order_is_the_same_and_an_early_checkpoint_brings_more(published):
    found = published.loc[(slice(None), 1, [0.9, 0.97], [0, 10]), :]
    assert len(found) == 8 and (found["lth"] > found["permuted"]).all() and (found["permuted"] > found["naive"]).all()
    leads = (found["permuted"] - found["naive"]).unstack("rewind")
    assert leads[0].max() <= 1 and leads[10].sum() > 2 * leads[0].sum()


def test_sparse_training_on_images_ablation_is_needed_at_99_percent_and_in_the_transformer():
    rows = pd.DataFrame(published_dynamic_sparse_training()).query("sparsity > 0")
    found = 100 * rows.pivot(index=["setting", "sparsity"], columns="method", values="accuracy")
    behind = found[["srigl", "srigl+ablation"]].rsub(found["rigl"], axis=0)
    resnet, transformer = behind.loc["ResNet18/CIFAR-10"], behind.loc["ViT-B/16/ImageNet"]
    assert (len(resnet), len(transformer)) == (4, 2)
    assert resnet["srigl+ablation"].abs().max() < 0.15 and (resnet["srigl"] > 1).tolist() == [False, False, False, True]
    assert transformer["srigl"].min() > 4 and transformer["srigl+ablation"].max() < 0.5


def test_extreme_labels_none_of_the_gains_shows_and_a_bottleneck_is_far_behind():
    rows = measured_extreme()["rows"]

    def at_1(group):
        found = pd.DataFrame([row | {"p": 100 * row["precision"][group]["1"]} for row in rows])
        return found.pivot(index="seed", columns="method", values="p")

    everywhere, tail = at_1("all"), at_1("tail")
    static = paired_comparison(everywhere["set"], everywhere["static"])
    assert -2 < static.difference and static.high < 0 and static.wins == 0
    for helped in ("set+auxiliary", "set+intermediate"):
        d = paired_comparison(everywhere[helped], everywhere["set"])
        assert d.low < 0 < d.high
    assert paired_comparison(everywhere["set"], everywhere["bottleneck"]).low > 5
    assert tail.drop(columns="dense").max(axis=None) < 2 and 15 < tail["dense"].mean() < 25


def test_extreme_labels_a_million_labels_fit_on_a_laptop():
    memory = measured_extreme_memory()
    peak = max(memory[form]["bytes"] for form in ("training", "training_with_set"))
    assert memory["labels"] == 10**6 and peak < 2 * 2**30 < memory["computed"]["dense"] / 5
