"""What the page on published fairness says of published values, and of the stored studies next to them."""

import pytest

from tests.notebooks import run

CIFAR = ("ResNet56 → ResNet20/CIFAR-100", "DenseNet169 → DenseNet121/CIFAR-100")
IMAGENET = ("ResNet50 → ResNet18/ImageNet", "ViT-Base → TinyViT/ImageNet")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The names of the page."""
    return run("published_fairness", {}, tmp_path_factory.mktemp("page"), draw=False).space


@pytest.fixture(scope="module")
def beyond(page):
    """For each setting the temperatures at which #SC and #TC are beyond chance."""
    return {setting: {short: list(own["temperature"][own[short] > page["most"][setting]]) for short in ("#SC", "#TC")}
            for setting, own in page["counts"].groupby("setting")}


@pytest.mark.parametrize("setting", CIFAR)
def test_counts_on_cifar_begin_at_the_level_of_chance(setting, beyond):
    assert min(beyond[setting]["#SC"]) in (7, 8) and max(beyond[setting]["#SC"]) == 10  # "up to six or seven"
    with_teacher = beyond[setting]["#TC"]
    assert {2, 10} <= {*with_teacher} and not {5, 6, 7, 8} & {*with_teacher}


@pytest.mark.parametrize("setting", IMAGENET)
def test_all_counts_on_imagenet_are_above_chance(setting, page, beyond):
    assert all(len(found) == 9 for found in beyond[setting].values())
    own = page["published_counts"].query("setting == @setting")["count"]
    assert (own > 2 * page["most"][setting]).mean() > 0.8


def test_published_differences_fall_to_a_temperature_of_10_and_rise_again(page):
    for column in page["COMPARED"][:-1]:
        low, middle, high = (page["in_paper"][*column.split(), t] for t in (1, 10, 40))
        assert low > middle < high


def test_differences_on_celeba_fall_by_more_than_their_intervals(page):
    for measure in ("EOD", "DPD"):
        cold, hot = (page["published_sample"](measure, "distilled", t) for t in (1, 10))
        fall = page["welch_comparison"](hot, cold)
        assert fall.high < 0 and -fall.difference > 3 * (fall.high - fall.low) / 2
        assert page["sampling"] > -fall.difference / 2  # other test images


def test_trifeature_has_the_published_trend_in_parts(page):
    change = page["change"]
    for training in page["TASKS"]:
        assert change(training, "texture EOD", 1, 10).high < 0
        assert change(training, "texture EOD", 10, 40).difference < 0
        assert change(training, "individual", 1, 10).difference < 0
        assert abs(1 - page["shares"][training]) < (1 - page["shares"]["published"]) / 3
    assert change("balanced", "colour EOD", 1, 10).difference > -0.002
    assert change("colour tied to the shape", "colour EOD", 1, 10).difference > 0


def test_individual_fairness_is_in_another_order_than_published(page):
    paper = page["published"].query("dataset == 'Trifeature' and measure == 'individual'")
    assert paper.loc[paper["value"].idxmin(), "role"] == "teacher"
    assert paper.loc[paper["value"].idxmax(), "role"] == "student"
    for lines in page["before"].values():
        means = lines.fillna({"temperature": 0}).groupby(["role", "temperature"])["individual"].mean()
        assert means.idxmax() == ("teacher", 0)


def test_few_classes_differ_between_dense_networks(page):
    assert sum(page["null"].values()) <= 3  # of twenty tests at 0.05; four or more come in one case of sixty


def test_sparse_networks_resemble_their_dense_ones_up_to_90_only(page):
    common = page["common"]
    assert all(common("shapes", m, s) > 0.3 for m in ("pruned", "lth") for s in (0.8, 0.9))
    assert all(abs(common(task, m, s)) < 0.2 for task, m, s in page["places"] if s >= 0.98)
    welch, paired, corrected = page["totals"]
    assert abs(welch - paired) < 0.1 * welch and corrected > 3 * 0.5 * len(page["places"])


def test_fewer_classes_are_affected_where_other_classes_are_lost_in_each_seed(page):
    fewer, recurring = (page[name] for name in ("fewer", "recurring"))
    assert fewer("naive")[1] < fewer("naive")[0] and fewer("random")[1] <= 2
    assert recurring("shapes", "naive", 0.99) < recurring("shapes", "naive", 0.95) - 0.2


def test_the_worst_shape_is_another_at_99_in_three_seeds(page):
    chosen = page["accuracies_of"]("shapes", "lth").argmin(1)
    assert {*chosen} == {2}  # plus
    lth = {s: 100 * page["accuracies_of"]("shapes", "lth", s) for s in (0.95, 0.99)}
    assert (lth[0.95].argmin(1) == chosen).all() and (lth[0.99].argmin(1) != chosen).sum() == 3
    assert [f"{lth[0.99][:, 2].mean():.0f}", f"{lth[0.99].min(1).mean():.0f}"] == ["19", "14"]
