"""Weight matching: the permutation that brings the weights of one network closest to another's.

Ainsworth et al., "Git Re-Basin: Merging Models modulo Permutation Symmetries", ICLR 2023, section 3.2 and algorithm 1.
Minimising the distance is maximising the sum of inner products; that is a hard problem over all groups at once, and a
linear assignment over one group while the others are held: so one group after another, in random order, until nothing
is gained.
"""

import torch

from permask_core.matching.groups import check_groups
from permask_core.matching.permutations import _move, assign

STATISTICS = ("running_mean", "running_var")  # they describe data, not the function's weights: moved, but not matched


def match_weights(groups, source, target, *, seed=0):
    """Permutations that move ``source`` onto ``target``, by weight matching.

    Parameters
    ----------
    groups : dict of str to Group
    source, target : dict of str to torch.Tensor
        Two ``state_dict`` of one architecture. BatchNorm's running statistics stay out of the cost.
    seed : int
        Of the order in which groups are visited; the result is a local optimum and may depend on it.

    Returns
    -------
    dict of str to torch.Tensor
        As :func:`permute` takes them: ``permute(groups, permutations, source)`` lies close to ``target``.

    Raises
    ------
    ValueError
        If keys or shapes differ, the groups do not fit, or a weight is not finite.
    """
    _check_pair(source, target)
    check_groups(groups, source, whole=True)
    matched = {entry.tensor for group in groups.values() for entry in group.entries
               if entry.tensor.rsplit(".", 1)[-1] not in STATISTICS}
    moved, goal = ({name: state[name].detach().double() for name in matched} for state in (source, target))
    for name in sorted(matched):
        if not (moved[name].isfinite().all() and goal[name].isfinite().all()):
            raise ValueError(f"{name!r} holds NaN or infinite weights: they cannot be matched")
    permutations = {name: torch.arange(group.size) for name, group in groups.items()}
    generator = torch.Generator().manual_seed(seed)
    names, improved = list(groups), True
    while improved:
        improved = False
        for i in torch.randperm(len(names), generator=generator).tolist():
            group = groups[names[i]]
            entries = [entry for entry in group.entries if entry.tensor in matched]
            similarity = sum(_units(goal, entry) @ _units(moved, entry).T for entry in entries)
            step = assign(similarity)
            gain = similarity[torch.arange(group.size), step].sum() - similarity.trace()
            # Relative to the sum of magnitudes, below which a gain is rounding and the search might never end.
            if gain > 1e-12 * similarity.abs().max() * group.size:
                permutations[names[i]] = permutations[names[i]][step]
                moved = _move(group, step, moved)
                improved = True
    return permutations


def _units(tensors, entry):
    """The weights at an entry as a matrix [units, everything else]."""
    return tensors[entry.tensor].movedim(entry.axis, 0)[entry.positions].flatten(1)


def _check_pair(source, target):
    for name in [*source, *(name for name in target if name not in source)]:
        if name not in source or name not in target:
            raise ValueError(f"{name!r} is in the {'target' if name in target else 'source'} only: expected two "
                             "state_dicts of one architecture")
        if source[name].shape != target[name].shape:
            raise ValueError(f"{name!r} has shape {list(source[name].shape)} in the source and "
                             f"{list(target[name].shape)} in the target")
