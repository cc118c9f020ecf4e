"""The cost of aligning a mask, the share of a gap that it closes, and whether matching finds a known permutation.

Costs are epochs of training of :mod:`permask_core.experiments.permuted_masks`. The share of a gap is a ratio of means
with the interval of Fieller, "Some Problems in Interval Estimation", 1954. The known permutation is planted: a network
is permuted at random and perturbed, and the recovered permutation is compared by its effect on the mask.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from scipy import special

from permask_core.masks import check_bool, check_fit
from permask_core.matching import check_groups, permute, random_permutations
from permask_core.matching.groups import indices
from permask_core.matching.weights import STATISTICS
from permask_core.pruning import check_sparsity, full_rounds
from permask_core.runs.checks import check_one_of

METHODS = ("lth", "permuted", "naive", "random", "imp")
SMALLEST_GAP = 0.02  # in accuracy; a smaller gap is of the size of differences between seeds


# ---- Costs -----------------------------------------------------------------------------------------------------------

class Cost(NamedTuple):
    """Epochs of training: those ``shared`` by all networks that use A's mask (A and its pruning), and the ``dense`` and
    ``sparse`` epochs of the network itself."""

    shared: int
    dense: int
    sparse: int

    @property
    def own(self):
        """Return the epochs of the network itself, dense plus sparse."""
        return self.dense + self.sparse


def cost(experiment, method, sparsity):
    """Return the epochs of training that one sparse network needs.

    Parameters
    ----------
    experiment : permask_core.experiments.permuted_masks.Experiment
    method : {"lth", "permuted", "naive", "random", "imp"}
        ``imp`` prunes B itself and does not use A. ``permuted`` trains dense B until the epoch of matching, or until
        the rewind point if that is later; A is trained to its end in any case.
    sparsity : float
        In (0, 1); it determines the number of pruning rounds.

    Returns
    -------
    Cost

    Raises
    ------
    ValueError
        If the method is unknown or the sparsity out of range.
    """
    check_one_of("method", method, METHODS)
    check_sparsity(sparsity)
    found = experiment.epochs + full_rounds(sparsity, experiment.imp_rate) * experiment.imp_epochs
    dense = {"lth": 0, "imp": found, "permuted": max(experiment.matched_at, experiment.rewind)}
    return Cost(0 if method == "imp" else found, dense.get(method, experiment.rewind),
                experiment.epochs - experiment.rewind)


# ---- Gaps ------------------------------------------------------------------------------------------------------------

class GapShare(NamedTuple):
    """The closed ``share`` of a ``gap`` (mean LTH minus mean naive), its interval [``low``, ``high``], and ``n`` seeds.
    If the share is undefined it is NaN, and ``undefined`` is the reason."""

    share: float
    low: float
    high: float
    gap: float
    n: int
    undefined: str = ""


def gap_share(permuted, naive, lth, confidence=0.95):
    """Return the share of the gap between the naive mask and the ticket that a permuted mask closes: a ratio of means.

    Parameters
    ----------
    permuted, naive, lth : array-like, shape [n]
        Accuracies in [0, 1], one for each seed in the same order; at least two. With another permuted mask as ``lth``,
        the result is the share of its gain that is preserved.
    confidence : float
        In (0, 1).

    Returns
    -------
    GapShare
        (mean permuted - mean naive) / (mean LTH - mean naive): 0 is naive, 1 is LTH. The interval is Fieller's for
        paired values: the shares s for which a t-test of permuted - naive - s (LTH - naive) finds no difference from 0.
        It is undefined if the gap is at most 2 points, or not significantly above 0 at this confidence.

    Raises
    ------
    ValueError
        If the shapes differ, there are fewer than two seeds, an accuracy is not in [0, 1], or the confidence is out of
        range.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: expected a number in (0, 1)")
    values = {"permuted": permuted, "naive": naive, "lth": lth}
    values = {name: np.asarray(one, dtype=float) for name, one in values.items()}
    for name, one in values.items():
        if one.ndim != 1 or len(one) < 2 or one.shape != values["lth"].shape:
            raise ValueError(f"{name} has the shape {list(one.shape)}, lth {list(values['lth'].shape)}: expected one "
                             "value for each of the same seeds, at least two")
        if not ((one >= 0) & (one <= 1)).all():
            raise ValueError(f"{name} is {one.tolist()}: expected accuracies in [0, 1]")
    gained, lost = values["permuted"] - values["naive"], values["lth"] - values["naive"]
    n, x, y = len(lost), float(gained.mean()), float(lost.mean())
    if y <= SMALLEST_GAP:
        why = f"LTH is {100 * y:+.1f} points from naive: expected more than {100 * SMALLEST_GAP:g}"
        return GapShare(math.nan, math.nan, math.nan, y, n, why)
    t2 = float(special.stdtrit(n - 1, (1 + confidence) / 2)) ** 2
    (xx, xy), (_, yy) = np.cov(gained, lost) / n
    a, b, c = y * y - t2 * yy, x * y - t2 * xy, x * x - t2 * xx  # the ends are the roots of a s^2 - 2 b s + c
    if a <= 0:
        why = f"at {100 * confidence:g} % LTH minus naive, {100 * y:.1f} points in the mean, may be 0"
        return GapShare(math.nan, math.nan, math.nan, y, n, why)
    half = math.sqrt(max(b * b - a * c, 0))  # below 0 only by rounding
    return GapShare(x / y, float((b - half) / a), float((b + half) / a), y, n)


# ---- A planted permutation -------------------------------------------------------------------------------------------

@torch.no_grad()
def plant_permutation(groups, state, *, noise=0.0, seed=0):
    """Permute the units of a network at random and perturb its weights.

    Parameters
    ----------
    groups : dict of str to permask_core.matching.Group
    state : dict of str to torch.Tensor
        A ``state_dict``.
    noise : float
        Standard deviation of independent normal noise on each tensor, relative to that of the tensor's values; at least
        0. Integers and running statistics get no noise.
    seed : int

    Returns
    -------
    (dict of str to torch.Tensor, dict of str to torch.Tensor)
        The new state, and the permutations for :func:`permask_core.matching.permute` that move ``state`` onto it
        without the noise.

    Raises
    ------
    ValueError
        If the noise is negative or not finite.
    """
    if not (math.isfinite(noise) and noise >= 0):
        raise ValueError(f"noise is {noise!r}: expected a number of at least 0, in standard deviations of the weights")
    truth, generator = random_permutations(groups, seed=seed), torch.Generator().manual_seed(seed)
    moved = permute(groups, truth, state)
    for name, tensor in moved.items():
        if tensor.is_floating_point() and name.rsplit(".", 1)[-1] not in STATISTICS:
            drawn = torch.randn(tensor.shape, generator=generator).to(tensor)
            moved[name] = tensor + noise * tensor.std(correction=0) * drawn
    return moved, truth


def mask_overlap(one, other):
    """Return the fraction of the kept weights of one mask that the other mask also keeps.

    Parameters
    ----------
    one, other : Masks
        Masks with the same keys and shapes, such as one ticket after two permutations.

    Returns
    -------
    float
        The number of weights that both keep divided by the number that ``one`` keeps, over all tensors, in [0, 1].

    Raises
    ------
    ValueError
        If the masks do not fit, or the first keeps no weight.
    """
    check_bool(one)
    check_bool(other)
    shapes = [{name: list(mask.shape) for name, mask in masks.items()} for masks in (one, other)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the masks have the shapes {shapes[0]} and {shapes[1]}: expected the same")
    kept = sum(int(mask.sum()) for mask in one.values())
    if not kept:
        raise ValueError("the first mask keeps no weight: expected at least one")
    return sum(int((mask & other[name]).sum()) for name, mask in one.items()) / kept


def idle_units(groups, masks, state):
    """Return which units have lost all connections, so that their position does not matter to the mask.

    Parameters
    ----------
    groups : dict of str to permask_core.matching.Group
    masks : Masks
    state : dict of str to torch.Tensor
        The ``state_dict`` of the network, for the tensors of the groups that have no mask: a tensor of two or more
        axes, such as a convolution on a shortcut, connects all its units; a bias or a parameter of a norm connects
        none.

    Returns
    -------
    dict of str to torch.Tensor
        For each group a bool tensor [size].

    Raises
    ------
    ValueError
        If the groups do not fit the masks or the state, or the masks the state.
    """
    check_fit(masks, state)
    check_groups(groups, masks)
    check_groups(groups, state, whole=True)
    idle = {}
    for name, group in groups.items():
        idle[name] = torch.ones(group.size, dtype=torch.bool)
        for entry in group.entries:
            if entry.tensor in masks:
                mask = masks[entry.tensor] if entry.rows is None else masks[entry.tensor][slice(*entry.rows)]
                idle[name] &= ~mask.movedim(entry.axis, 0)[indices(entry, group.size)].flatten(1).any(1)
            elif state[entry.tensor].ndim > 1:
                idle[name][:] = False
    return idle


def shared_positions(found, truth, classes=None):
    """Return the fraction of the units that two permutations move to the same position, over all groups.

    Parameters
    ----------
    found, truth : dict of str to torch.Tensor
        Permutations of the same groups.
    classes : dict of str to torch.Tensor, optional
        The classes of units of the source that are interchangeable, such as those of
        :func:`permask_core.matching.mask_symmetry.twin_classes` for its masks. Then the fraction is the largest over
        all permutations within the classes, applied before ``found``. It is attained if each unit counts whose class
        is right, because the units of a class can be exchanged freely.

    Returns
    -------
    float
        In [0, 1].

    Raises
    ------
    ValueError
        If the groups or their sizes differ.

    Examples
    --------
    Of three units, the last two are dead:

    >>> found, truth = {"fc1": torch.tensor([0, 1, 2])}, {"fc1": torch.tensor([0, 2, 1])}
    >>> f"{shared_positions(found, truth):.2f}", shared_positions(found, truth, {"fc1": torch.tensor([0, 1, 1])})
    ('0.33', 1.0)
    """
    given = (found, truth) if classes is None else (found, truth, classes)
    sizes = [{name: len(order) for name, order in one.items()} for one in given]
    if not sizes[0] or any(one != sizes[0] for one in sizes):
        of_classes = "" if classes is None else f", the classes of {sizes[2]}"
        raise ValueError(f"the permutations are of {sizes[0]} and {sizes[1]} units{of_classes}: expected the same "
                         "groups")
    if classes is not None:
        found, truth = ({name: classes[name][order] for name, order in one.items()} for one in (found, truth))
    return sum(int((found[name] == truth[name]).sum()) for name in truth) / sum(sizes[0].values())
