"""Published figures as data: as many as the source has, and consistent with what it says of them."""

import math
from collections import Counter

import pytest

from permask_core.data.published import (
    published_affected_classes,
    published_dynamic_sparse_training,
    published_fairness,
    published_functional_diversity,
    published_losses_halfway,
    published_permuted_masks,
    published_tickets,
)


def test_affected_classes():
    rows = published_affected_classes()
    assert Counter(row["setting"] for row in rows) == {
        "ResNet56 → ResNet20/CIFAR-100": 9, "DenseNet169 → DenseNet121/CIFAR-100": 9, "ResNet50 → ResNet18/ImageNet": 9,
        "ViT-Base → TinyViT/ImageNet": 9}
    for setting in {row["setting"] for row in rows}:
        own = [row for row in rows if row["setting"] == setting]
        assert [row["temperature"] for row in own] == list(range(2, 11))
        counts = [row["student_classes"] for row in own]
        assert counts == sorted(counts) and own[0]["teacher_classes"] > own[-1]["teacher_classes"]  # what it claims
        assert all(0.6 < row["student_accuracy"] < row["teacher_accuracy"] < 0.9 for row in own)
    assert {"temperature": 10, "student_classes": 22, "teacher_classes": 11}.items() <= rows[8].items()


def test_fairness():
    rows = published_fairness()
    differences = [row for row in rows if row["measure"] in ("EOD", "DPD")]
    assert len(differences) == 6 * 2 * 15 and len(rows) == len(differences) + (12 + 2) + 3 * 12
    for row in rows:
        assert (row["temperature"] is None) == (row["role"] != "distilled") and row["read_from"] in ("table", "figure")
        assert 0 <= row["value"] <= 1
    by = {(row["dataset"], row["attribute"], row["measure"], row["role"], row["temperature"]): row for row in rows}
    assert by["Trifeature", "colour", "EOD", "teacher", None]["value"] == 0
    assert by["CelebA", "Young", "EOD", "distilled", 10]["value"] == pytest.approx(0.0498)
    assert by["HateXplain", "race", "EOD", "distilled", 20]["read_from"] == "figure"
    deviations = {key: row["sd"] for key, row in by.items() if row["sd"] is not None}
    assert Counter(key[:3] for key in deviations) == {("CelebA", "Young", "EOD"): 12, ("CelebA", "Young", "DPD"): 12,
                                                      ("CelebA", "", "accuracy"): 12}
    assert deviations["CelebA", "Young", "EOD", "distilled", 1] == pytest.approx(0.0011)
    for (dataset, attribute, measure, role, t), row in by.items():
        if role == "distilled" and t == 10 and measure in ("EOD", "DPD"):  # the trend that it claims
            assert row["value"] < by[dataset, attribute, measure, role, 1]["value"]
            assert row["value"] < by[dataset, attribute, measure, role, 40]["value"]


def test_dynamic_sparse_training():
    rows = published_dynamic_sparse_training()
    assert Counter(row["setting"] for row in rows) == {
        "ResNet18/CIFAR-10": 1 + 4 * 3, "ResNet50/ImageNet": 4, "ViT-B/16/ImageNet": 1 + 2 * 3}
    by = {(row["setting"], row["sparsity"], row["method"]): row["accuracy"] for row in rows}
    assert len(by) == len(rows)
    for (setting, level, method), accuracy in by.items():
        assert (level == 0) == (method == "dense") and 0.5 < accuracy < 1
        assert accuracy < by.get((setting, 0.0, "dense"), 1.0) or method == "dense"
        sparser = [by[key] for key in by if key[0] == setting and key[2] == method and key[1] > level]
        assert all(value < accuracy for value in sparser)
        if method == "srigl":  # what it claims of ablation
            assert by[setting, level, "srigl+ablation"] > accuracy
    assert by["ResNet18/CIFAR-10", 0.99, "srigl"] == pytest.approx(0.9147)
    assert by["ViT-B/16/ImageNet", 0.9, "rigl"] == pytest.approx(0.764)


def test_functional_diversity():
    rows = published_functional_diversity()
    by = {(row["setting"], row["method"]): row for row in rows}
    known = {(row["setting"], row["width"]) for row in published_permuted_masks()}
    assert len(by) == len(rows) == 2 * 5 and all((row["setting"], row["width"]) in known for row in rows)
    for (setting, method), row in by.items():
        assert row["sparsity"] == 0.9 and 0 < row["accuracy_spread"] < 0.004
        if method == "dense":
            assert row["ensemble"] is row["disagreement"] is row["kl"] is row["js"] is None
            continue
        assert row["js"] <= row["kl"] / 2 and row["js"] <= math.log(2)  # what the measures cannot break
        assert 0 < row["ensemble"] - row["accuracy"] < row["disagreement"]  # nor this
        if method != "lth":  # what it claims: the ticket is the least diverse, by all measures
            assert all(row[name] > 2 * by[setting, "lth"][name] for name in ("disagreement", "kl", "js"))
        published = [one["accuracy"] for one in published_permuted_masks() if one["setting"] == setting
                     and one["width"] == row["width"] and one["sparsity"] == 0.9 and one["method"] == method
                     and one["rewind"] == 25]
        assert all(abs(row["accuracy"] - one) < 0.03 for one in published)
    assert by["ResNet20/CIFAR-100", "naive"]["js"] == 0.348
    assert by["ResNet20/CIFAR-10", "pruned"]["ensemble"] == pytest.approx(0.9325)


def test_tickets():
    lth, scratch = published_tickets()
    assert (lth["method"], scratch["method"]) == ("lth", "scratch")
    assert lth["setting"] == scratch["setting"] == "ResNet50/ImageNet"
    assert lth["accuracy"] > scratch["accuracy"] and lth["disagreement"] < scratch["disagreement"]
    assert lth["ensemble"] - lth["accuracy"] < scratch["ensemble"] - scratch["accuracy"]
    assert scratch == {"setting": "ResNet50/ImageNet", "method": "scratch", "accuracy": pytest.approx(0.7116),
                       "ensemble": pytest.approx(0.7405), "disagreement": 0.203}


def test_losses_halfway():
    rows = published_losses_halfway()
    assert [row["width"] for row in rows] == [1, 4, 8, 16] and {row["setting"] for row in rows} == {"ResNet20/CIFAR-10"}
    losses = [row["loss"] for row in rows]
    assert losses == sorted(losses, reverse=True) and 0 < losses[-1] < losses[0] < math.log(10)  # nats; chance: ln 10
