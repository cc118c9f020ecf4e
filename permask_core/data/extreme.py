"""Multi-label problems with very many labels: a synthetic one with planted structure, and a reader of public data sets.

The labels of such problems are long-tailed: a few are frequent, most have a handful of examples. They are stored as a
list of ids for each point, never as an array [points, labels].

Sources: Bhatia et al., "The Extreme Classification Repository: Multi-label Datasets & Code", 2016 (the text format);
Ullah et al., "Navigating Extremes: Dynamic Sparsity in Large Output Spaces", NeurIPS 2024.
"""

import math
import os
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_array

from permask_core.runs.checks import check_integer, is_integer
from permask_core.runs.progress import progress


@dataclass(frozen=True, eq=False)
class MultiLabel:
    """Points that each have any number of labels.

    ``features`` are float32 [n, d]: a tensor, or a SciPy CSR array of bags of words. The labels of point i are
    ``labels[offsets[i]:offsets[i + 1]]``, int32, ascending and without duplicates; ``offsets`` are int64 [n + 1].
    ``clusters``, int64 [n_labels], is the cluster of each label, if known.
    """

    features: torch.Tensor | csr_array
    offsets: torch.Tensor
    labels: torch.Tensor
    n_labels: int
    clusters: torch.Tensor | None = None

    def __len__(self):
        return len(self.offsets) - 1

    @property
    def frequencies(self):
        """Return how many points have each label, int64 [n_labels]."""
        return torch.bincount(self.labels, minlength=self.n_labels)

    def pairs(self):
        """Return the point and the label of each positive pair, both int64 [offsets[-1]]."""
        return torch.arange(len(self)).repeat_interleave(self.offsets.diff()), self.labels.long()

    def subset(self, chosen):
        """Return the points with the indices ``chosen``, int64 [m], in that order."""
        counts = self.offsets.diff()[chosen]
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        places = torch.arange(offsets[-1]) + (self.offsets[chosen] - offsets[:-1]).repeat_interleave(counts)
        features = self.features[chosen.numpy() if isinstance(self.features, csr_array) else chosen]
        return replace(self, features=features, offsets=offsets, labels=self.labels[places])


# ---- Planted ---------------------------------------------------------------------------------------------------------

class MultiLabelProblem(NamedTuple):
    """A problem with a known solution: ``train`` and ``test`` points, the ``latent`` features of each label, int32
    [n_labels, 2 ``per_set``], and the ``rotation`` [n_features, n_features] that hides them."""

    train: MultiLabel
    test: MultiLabel
    latent: torch.Tensor
    rotation: torch.Tensor


def make_multilabel(n_labels=10_000, *, n_train=30_000, n_test=2_000, n_features=128, n_clusters=100, per_set=4,
                    most=3, noise=0.1, zipf=1.0, seed=0):
    """Draw a long-tailed problem that one sparse row for each label solves, once a rotation is inverted.

    The following are drawn, all from the seed:

    1. For each cluster, ``per_set`` latent features; for each label, its cluster and ``per_set`` further latent
       features. All are uniform and independent: a feature that is drawn twice counts twice.
    2. The rotation Q, the orthogonal factor of a normal matrix.
    3. For each point, a number of labels, uniform from 1 to ``most``, then each label independently: label l has a
       probability proportional to (l + 1)^-``zipf``. A label that is drawn twice counts once.
    4. The features of a point, x = z Q + e, where z_j is the number of times that feature j is among the latent
       features of its labels and their clusters, and e is normal with standard deviation ``noise``.

    Labels are sorted by expected frequency. On x Q^T, a row of ones at the latent features of a label is a matched
    filter for that label, but a model only sees x.

    Parameters
    ----------
    n_labels, n_train, n_test, n_features, n_clusters, per_set, most : int
    noise, zipf : float
        At least 0.
    seed : int

    Returns
    -------
    MultiLabelProblem

    Raises
    ------
    ValueError
        If a number is out of range.
    """
    for name, value in (("n_labels", n_labels), ("n_train", n_train), ("n_test", n_test), ("n_features", n_features),
                        ("n_clusters", n_clusters), ("per_set", per_set), ("most", most)):
        check_integer(name, value, 1)
    for name, value in (("noise", noise), ("zipf", zipf)):
        if not isinstance(value, Real) or not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value!r}: expected a number of at least 0")
    if not is_integer(seed) or not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed!r}: expected an integer of at least 0 and below 2**63")
    drawn = torch.Generator().manual_seed(int(seed))
    clusters = torch.randint(n_clusters, (n_labels,), generator=drawn)
    common = torch.randint(n_features, (n_clusters, per_set), generator=drawn, dtype=torch.int32)
    own = torch.randint(n_features, (n_labels, per_set), generator=drawn, dtype=torch.int32)
    latent = torch.cat([common[clusters], own], 1)
    rotation = torch.linalg.qr(torch.randn(n_features, n_features, generator=drawn)).Q
    share = torch.arange(1, n_labels + 1, dtype=torch.float64).pow(-zipf).cumsum(0)

    def points(n):
        counts = torch.randint(1, most + 1, (n,), generator=drawn)
        uniform = torch.rand(int(counts.sum()), generator=drawn, dtype=torch.float64)
        labels = torch.searchsorted(share, uniform * share[-1], right=True).clamp_(max=n_labels - 1)
        point, labels, offsets = _merged(torch.arange(n).repeat_interleave(counts), labels, n, n_labels)
        z = torch.zeros(n, n_features)
        places = point[:, None] * n_features + latent[labels.long()]
        z.view(-1).index_add_(0, places.view(-1), torch.ones(places.numel()))
        x = (z @ rotation).add_(torch.randn(n, n_features, generator=drawn), alpha=noise)
        return MultiLabel(x, offsets, labels, n_labels, clusters)

    return MultiLabelProblem(points(n_train), points(n_test), latent, rotation)


def _merged(point, labels, n, n_labels):
    """Sort pairs of point and label, without duplicates: points int64 [m], labels int32 [m], and offsets [n + 1]."""
    keys = torch.unique(point * n_labels + labels)
    point = keys // n_labels
    offsets = torch.zeros(n + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(point, minlength=n), 0, out=offsets[1:])
    return point, (keys % n_labels).int(), offsets


# ---- The repository's text format ------------------------------------------------------------------------------------

def read_sparse_text(path, description=None):
    """Read a file of the Extreme Classification Repository.

    The first line has three numbers: ``points features labels``. Each further line is one point: its labels, separated
    by commas, then its features as ``feature:value``, separated by spaces: ``3,17 0:0.5 12:1.25``. Labels and features
    are numbered from 0. The line of a point without labels begins with a space; without features it ends after the
    labels.

    Parameters
    ----------
    path : path-like
    description : str, optional
        Text of a progress bar.

    Returns
    -------
    MultiLabel
        The features are a CSR array [points, features], float32; there are no clusters. A duplicate label counts once;
        the values of a duplicate feature are added.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file has a different format; the message has the line number.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    with path.open(encoding="ascii", errors="backslashreplace") as file:
        header = file.readline().split()
        if len(header) != 3 or not all(size.isdecimal() and len(size) < 20 and int(size) > 0 for size in header):
            raise ValueError(f"line 1 of {path} is {' '.join(header)[:80]!r}: expected three numbers above 0, those "
                             "of points, features and labels")
        n, n_features, n_labels = map(int, header)
        if max(n_features, n_labels) >= 2 ** 31:
            raise ValueError(f"line 1 of {path} announces {n_features} features and {n_labels} labels: expected fewer "
                             "than 2^31")
        needed, memory = 8 * (n + n_features + n_labels), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > memory / 2:
            raise ValueError(f"line 1 of {path} announces {n} points, {n_features} features and {n_labels} labels: one "
                             f"number for each takes {needed / 1e9:.1f} GB, and this machine has {memory / 1e9:.1f} GB "
                             "of memory: expected at most half of it")
        labels, columns, values = [], [], []
        for number, line in enumerate(progress(file, description, total=n), 2):
            if number > n + 1:
                if line.strip():
                    raise ValueError(f"line {number} of {path} is {line.strip()[:80]!r}: expected the end after the "
                                     f"{n} points that line 1 announces")
                continue
            try:
                for parts, part in zip((labels, columns, values), _point(line, n_features, n_labels)):
                    parts.append(part)
            except ValueError as error:
                raise ValueError(f"line {number} of {path}: {error}") from None
    if len(labels) < n:
        raise ValueError(f"{path} ends after line {len(labels) + 1}: expected the {n} points that line 1 announces")
    indptr = np.cumsum([0, *map(len, columns)])
    features = csr_array((np.concatenate(values), np.concatenate(columns), indptr), shape=(n, n_features))
    features.sum_duplicates()
    counts = torch.tensor([len(part) for part in labels])
    _, labels, offsets = _merged(torch.arange(n).repeat_interleave(counts), torch.from_numpy(np.concatenate(labels)),
                                 n, n_labels)
    return MultiLabel(features, offsets, labels, n_labels)


def _point(line, n_features, n_labels):
    """Return the labels (int64), features (int32) and values (float32) of a line."""
    first, _, rest = line.rstrip().partition(" ")
    if ":" in first:
        first, rest = "", line
    labels = _numbers(first.split(",") if first else [], np.int64, (0, n_labels - 1), "label")
    pairs = [pair.split(":") for pair in rest.split()]
    for pair in pairs:
        if len(pair) != 2:
            raise ValueError(f"{':'.join(pair)!r} is not a pair: expected feature:value")
    columns = _numbers([column for column, _ in pairs], np.int32, (0, n_features - 1), "feature")
    largest = float(np.finfo(np.float32).max)
    return labels, columns, _numbers([value for _, value in pairs], np.float32, (-largest, largest), "value")


def _numbers(texts, dtype, limits, what):
    kind = float if dtype is np.float32 else int
    low, high = limits
    try:
        numbers = [kind(text) for text in texts]
        if all(low <= number <= high for number in numbers):
            return np.array(numbers, dtype)
    except ValueError:
        pass
    for text in texts:
        try:
            wrong = not low <= kind(text) <= high
        except ValueError:
            wrong = True
        if wrong:
            raise ValueError(f"the {what} is {text[:80]!r}: expected "
                             + ("a finite number" if kind is float else f"an integer from {low} to {high}"))
