"""Planted labels are what the docstring says is drawn; files of the text format come back as they were written."""

import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from permask_core.data.extreme import make_multilabel, read_sparse_text


@pytest.fixture(scope="module")
def problem():
    return make_multilabel(2000, n_train=5000, n_test=400, n_clusters=20)


def labels_of(data):
    return [part.tolist() for part in data.labels.split(data.offsets.diff().tolist())]


def test_labels_are_lists_per_point(problem):
    for data, n in ((problem.train, 5000), (problem.test, 400)):
        assert len(data) == n and data.features.shape == (n, 128) and data.features.dtype == torch.float32
        assert data.offsets.dtype == torch.int64 and data.offsets.shape == (n + 1,) and data.labels.dtype == torch.int32
        assert data.offsets[0] == 0 and data.offsets[-1] == len(data.labels)
        lists = labels_of(data)
        assert all(1 <= len(labels) <= 3 and labels == sorted(set(labels)) for labels in lists)
        assert {len(labels) for labels in lists} == {1, 2, 3}
        assert data.n_labels == 2000 and 0 <= data.labels.min() and data.labels.max() < 2000
        assert data.clusters.shape == (2000,) and set(data.clusters.tolist()) == set(range(20))


def test_frequencies_follow_the_power_law():
    data = make_multilabel(1000, n_train=20_000, n_test=1, n_features=2, most=1, zipf=1.0).train
    share = 1 / torch.arange(1, 1001, dtype=torch.float64)
    expected = 20_000 * share / share.sum()
    found = data.frequencies.double()
    assert found.sum() == 20_000 and found.shape == (1000,)
    for first, last in ((0, 1), (1, 10), (10, 100), (100, 1000)):  # four standard deviations of a Poisson number
        total = expected[first:last].sum()
        assert (found[first:last].sum() - total).abs() < 4 * total.sqrt()


def test_features_are_the_latent_ones_rotated():
    problem = make_multilabel(300, n_train=200, n_test=1, n_features=64, n_clusters=10, noise=0.0)
    z = torch.zeros(200, 64)
    for point, labels in enumerate(labels_of(problem.train)):
        for label in labels:
            for feature in problem.latent[label].tolist():
                z[point, feature] += 1
    assert torch.allclose(problem.train.features @ problem.rotation.T, z, atol=1e-4)
    clusters = problem.train.clusters
    for cluster in range(10):  # the first half of a label's latent features is its cluster's
        assert len(problem.latent[clusters == cluster, :4].unique(dim=0)) == 1
    noisy = make_multilabel(300, n_train=200, n_test=1, n_features=64, n_clusters=10, noise=0.5).train
    assert (noisy.features - problem.train.features).std().item() == pytest.approx(0.5, rel=0.02)


def test_the_planted_rows_solve_it(problem):
    """Matched filters on the latent features, as many weights a label as were planted, rank a true label first."""
    filters = torch.zeros(2000, 128).scatter_add_(1, problem.latent.long(), torch.ones(problem.latent.shape))
    logits = problem.test.features @ problem.rotation.T @ filters.T - filters.square().sum(1) / 2
    first = logits.argmax(1).tolist()
    hits = [label in labels for label, labels in zip(first, labels_of(problem.test))]
    assert np.mean(hits) > 0.95


def test_the_seed_decides():
    one, same, other = (make_multilabel(100, n_train=50, n_test=20, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.train.features, same.train.features) and torch.equal(one.test.labels, same.test.labels)
    assert not torch.equal(one.train.features, other.train.features)


def test_a_million_labels_take_seconds():
    data = make_multilabel(1_000_000, n_train=1000, n_test=10).train
    assert data.n_labels == 1_000_000 and data.labels.max() > 100_000


@pytest.mark.parametrize("options, message", [
    ({"n_labels": 0}, "n_labels is 0"), ({"n_train": 1.5}, "n_train is 1.5"), ({"most": 0}, "most is 0"),
    ({"noise": -1}, "noise is -1"), ({"zipf": float("inf")}, "zipf is inf"), ({"seed": -1}, "seed is -1"),
])
def test_a_number_out_of_range_is_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_multilabel(**options)


def test_subset_keeps_points_and_labels_together(problem):
    chosen = torch.tensor([7, 3, 3, 399])
    part, whole = problem.test.subset(chosen), labels_of(problem.test)
    assert torch.equal(part.features, problem.test.features[chosen])
    assert labels_of(part) == [whole[i] for i in chosen.tolist()]
    empty = problem.test.subset(chosen[:0])
    assert len(empty) == 0 and empty.offsets.tolist() == [0] and len(empty.labels) == 0


# ---- Text files ------------------------------------------------------------------------------------------------------

LINES = ["5 6 4", "3,1 0:0.5 5:1.25", " 2:1e-3", "0", "", "2,2,0 1:1 1:2 0:-4"]


@pytest.fixture
def written(tmp_path):
    def write(*lines):
        path = tmp_path / "train.txt"
        path.write_text("\n".join(lines) + "\n")
        return path
    return write


def test_a_file_comes_back(written):
    data = read_sparse_text(written(*LINES))
    assert labels_of(data) == [[1, 3], [], [0], [], [0, 2]] and data.n_labels == 4 and data.clusters is None
    expected = np.zeros((5, 6), np.float32)
    expected[0, [0, 5]], expected[1, 2], expected[4, [0, 1]] = [0.5, 1.25], 1e-3, [-4, 3]
    assert data.features.dtype == np.float32 and (data.features.toarray() == expected).all()
    assert data.frequencies.tolist() == [2, 1, 1, 1]
    part = data.subset(torch.tensor([4, 0]))
    assert (part.features.toarray() == expected[[4, 0]]).all() and labels_of(part) == [[0, 2], [1, 3]]


def test_what_was_written_at_random_is_read(written):
    generator = np.random.default_rng(0)
    x = generator.random((50, 30)).astype(np.float32) * (generator.random((50, 30)) < 0.2)
    lists = [sorted(generator.choice(100, generator.integers(0, 5), replace=False).tolist()) for _ in range(50)]
    data = read_sparse_text(written("50 30 100", *(
        ",".join(map(str, labels)) + "".join(f" {j}:{row[j]!s}" for j in np.flatnonzero(row))
        for labels, row in zip(lists, x))))
    assert labels_of(data) == lists and (data.features.toarray() == x).all()


@pytest.mark.parametrize("number, line, message", [
    (0, "5 6", "line 1 of .* is '5 6': expected three numbers"),
    (0, "1 5 2147483648", "expected fewer than 2.31"), (0, "5 6 0", "line 1 of .* is '5 6 0'"),
    (0, "0,1 2:3", "line 1 of "), (1, "4 0:1", "line 2 of .*: the label is '4': expected an integer from 0 to 3"),
    (2, "1,x 0:1", "line 3 of .*: the label is 'x'"), (2, "1,, 0:1", "line 3 of .*: the label is ''"),
    (3, "1 6:1", "line 4 of .*: the feature is '6': expected an integer from 0 to 5"),
    (3, "1 -1:1", "line 4 of .*: the feature is '-1'"), (4, "1 2", "line 5 of .*: '2' is not a pair"),
    (4, "1 2:3:4", "line 5 of .*: '2:3:4' is not a pair"), (5, "1 2:nan", "line 6 .* 'nan': expected a finite number"),
    (5, "1 2:1e39", "line 6 of .*: the value is '1e39'"), (5, "1 2:é", "line 6 of .*: the value is "),
])
def test_a_damaged_line_is_named(number, line, message, written):
    lines = list(LINES)
    lines[number] = line
    with pytest.raises(ValueError, match=message):
        read_sparse_text(written(*lines))


def test_a_wrong_number_of_lines_is_named(written):
    with pytest.raises(ValueError, match="ends after line 5: expected the 5 points"):
        read_sparse_text(written(*LINES[:-1]))
    with pytest.raises(ValueError, match="line 7 of .* is '1 2:3': expected the end after the 5 points"):
        read_sparse_text(written(*LINES, "1 2:3"))
    assert len(read_sparse_text(written(*LINES, "", " "))) == 5
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_sparse_text("nowhere.txt")


@pytest.mark.parametrize("header, said", [
    ("1 1 2147483647", "line 1 of {path} announces 1 points, 1 features and 2147483647 labels: one number for each "
                       "takes 17.2 GB, and this machine has 16.0 GB of memory: expected at most half of it"),
    ("99999999999 1 1", "line 1 of {path} announces 99999999999 points"),
    ("1" * 5000 + " 1 1", "line 1 of {path} is '1111"),
])
def test_what_does_not_fit_into_memory_is_refused_by_the_first_line(tmp_path, monkeypatch, header, said):
    path = tmp_path / "train.txt"
    path.write_text(f"{header}\n0 0:1\n")
    sizes = {"SC_PHYS_PAGES": 4_000_000, "SC_PAGE_SIZE": 4000}
    monkeypatch.setattr("permask_core.data.extreme.os.sysconf", sizes.__getitem__)
    with pytest.raises(ValueError, match=re.escape(said.format(path=path))) as error:
        read_sparse_text(path)
    assert len(str(error.value)) < 400


@given(st.binary(max_size=60))
def test_every_error_of_the_reader_names_the_file(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "hostile.txt")
        path.write_bytes(b"2 3 4\n" + content)
        try:
            assert len(read_sparse_text(path)) == 2
        except ValueError as error:
            assert str(path) in str(error)
