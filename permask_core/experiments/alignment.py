"""What aligning a mask costs, how much of a gap it closes, and whether it finds a permutation that is known.

The costs are epochs of training, for what :mod:`permask_core.experiments.permuted_masks` trains. A gap is closed by the
share that a ratio of means says, with the interval of Fieller, "Some Problems in Interval Estimation", 1954. The known
permutation is planted: a network is moved at random and disturbed, and what is found is compared as the mask sees it.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats

from permask_core.masks import check_bool, check_fit
from permask_core.matching import check_groups, permute, random_permutations
from permask_core.matching.groups import indices
from permask_core.matching.weights import STATISTICS
from permask_core.pruning import check_sparsity, full_rounds
from permask_core.runs.checks import check_one_of

METHODS = ("lth", "permuted", "naive", "random", "imp")
SMALLEST_GAP = 0.02  # in accuracy: a smaller one is of the size of what seeds change


# ---- Costs -----------------------------------------------------------------------------------------------------------

class Cost(NamedTuple):
    """Epochs of training: what is ``shared`` by all that use A's mask (A and its pruning), and what the network itself
    needs, ``dense`` and ``sparse``."""

    shared: int
    dense: int
    sparse: int

    @property
    def own(self):
        """The epochs of the network itself, dense and sparse together."""
        return self.dense + self.sparse


def cost(experiment, method, sparsity):
    """The epochs of training behind one sparse network.

    Parameters
    ----------
    experiment : permask_core.experiments.permuted_masks.Experiment
    method : {"lth", "permuted", "naive", "random", "imp"}
        ``imp`` prunes B itself, and needs nothing of A. ``permuted`` trains dense B as far as it is matched, or to the
        rewind point if that is later; A, which is trained to its end anyway, has every earlier state.
    sparsity : float
        In (0, 1), which says how many rounds of pruning there are.

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
    """The ``share`` of a ``gap`` (mean LTH minus mean naive) that is closed, its interval [``low``, ``high``], and
    ``n`` seeds; NaN where it is not defined, and then ``undefined`` says why."""

    share: float
    low: float
    high: float
    gap: float
    n: int
    undefined: str = ""


def gap_share(permuted, naive, lth, confidence=0.95):
    """How much of the way from the naive mask to the ticket a permuted one goes: a ratio of means.

    Parameters
    ----------
    permuted, naive, lth : array-like, shape [n]
        Accuracies in [0, 1], one for each seed in the same order; at least two. With another permuted mask in place of
        ``lth`` it is the share of that one's gain which is kept.
    confidence : float
        In (0, 1).

    Returns
    -------
    GapShare
        (mean permuted - mean naive) / (mean LTH - mean naive): 0 as naive, 1 as LTH. The interval is Fieller's for
        paired values: the shares s for which a t-test of permuted - naive - s (LTH - naive) sees no difference from 0.
        Not defined where the gap is at most 2 points, or not sure to be above 0 at this confidence.

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
            raise ValueError(f"{name} holds {one.tolist()}: expected accuracies in [0, 1]")
    gained, lost = values["permuted"] - values["naive"], values["lth"] - values["naive"]
    n, x, y = len(lost), float(gained.mean()), float(lost.mean())
    if y <= SMALLEST_GAP:
        why = f"LTH is {100 * y:+.1f} points from naive: expected more than {100 * SMALLEST_GAP:g}"
        return GapShare(math.nan, math.nan, math.nan, y, n, why)
    t2 = float(stats.t.ppf((1 + confidence) / 2, n - 1)) ** 2
    (xx, xy), (_, yy) = np.cov(gained, lost) / n
    a, b, c = y * y - t2 * yy, x * y - t2 * xy, x * x - t2 * xx  # the ends are the roots of a s^2 - 2 b s + c
    if a <= 0:
        why = f"at {100 * confidence:g} % LTH minus naive, {100 * y:.1f} points in the mean, may be 0"
        return GapShare(math.nan, math.nan, math.nan, y, n, why)
    half = math.sqrt(max(b * b - a * c, 0))  # below 0 by rounding alone
    return GapShare(x / y, float((b - half) / a), float((b + half) / a), y, n)


# ---- A planted permutation -------------------------------------------------------------------------------------------

@torch.no_grad()
def plant_permutation(groups, state, *, noise=0.0, seed=0):
    """A network whose units were moved at random and whose weights were disturbed, and how they were moved.

    Parameters
    ----------
    groups : dict of str to permask_core.matching.Group
    state : dict of str to torch.Tensor
        A ``state_dict``.
    noise : float
        Of independent normal noise on each tensor: its standard deviation over that of the tensor's values, at least 0.
        Whole numbers and running statistics stay as they are.
    seed : int

    Returns
    -------
    (dict of str to torch.Tensor, dict of str to torch.Tensor)
        The new state, and the permutations that move ``state`` onto it without the noise, as
        :func:`permask_core.matching.permute` takes them.

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
    """The share of the kept weights of one mask that the other keeps as well.

    Parameters
    ----------
    one, other : Masks
        With the same keys and shapes, as the same ticket has them after two permutations.

    Returns
    -------
    float
        How many weights both keep over how many ``one`` keeps, in [0, 1], over all tensors together.

    Raises
    ------
    ValueError
        If they do not fit, or the first keeps nothing.
    """
    check_bool(one)
    check_bool(other)
    shapes = [{name: list(mask.shape) for name, mask in masks.items()} for masks in (one, other)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the masks have the shapes {shapes[0]} and {shapes[1]}: expected the same")
    kept = sum(int(mask.sum()) for mask in one.values())
    if not kept:
        raise ValueError("the first mask keeps no weight: there is nothing to overlap")
    return sum(int((mask & other[name]).sum()) for name, mask in one.items()) / kept


def idle_units(groups, masks, state):
    """Which units have lost all their connections: where such a unit goes does not matter to the mask.

    Parameters
    ----------
    groups : dict of str to permask_core.matching.Group
    masks : Masks
    state : dict of str to torch.Tensor
        The network's ``state_dict``, which tells what the groups name beside the masks: a tensor of two or more axes
        without a mask, as a shortcut's convolution, connects all its units; a bias or what belongs to a normalisation
        connects none.

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


def shared_positions(found, truth):
    """The share of the units that two permutations put at the same place, over all groups together.

    Parameters
    ----------
    found, truth : dict of str to torch.Tensor
        Of the same groups.

    Returns
    -------
    float
        In [0, 1].

    Raises
    ------
    ValueError
        If the groups or their sizes differ.
    """
    sizes = [{name: len(order) for name, order in one.items()} for one in (found, truth)]
    if not sizes[0] or sizes[0] != sizes[1]:
        raise ValueError(f"the permutations are of {sizes[0]} and {sizes[1]} units: expected the same groups")
    return sum(int((found[name] == truth[name]).sum()) for name in truth) / sum(sizes[0].values())
