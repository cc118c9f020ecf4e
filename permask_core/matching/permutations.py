"""Permute the units of weights or masks, and solve the assignment problem that finds permutations."""

import torch
from scipy.optimize import linear_sum_assignment

from permask_core.matching.groups import check_groups, depth, indices, listed, shortened

LARGE = 200  # units: smaller assignments are solved without prices
SHARING, SMOOTHNESS = 2, 0.3  # iterations for the first prices, and their smoothness in deviations of similarities


class Permutations(dict):
    """A dict of str to torch.Tensor for :func:`permute`, with the ``objective`` (a list of floats) of the search that
    found it."""

    def __init__(self, permutations=(), objective=()):
        super().__init__(permutations)
        self.objective = list(objective)


def permute(groups, permutations, tensors):
    """Move the units of a network, or of its masks.

    Parameters
    ----------
    groups : dict of str to Group
    permutations : dict of str to torch.Tensor
        For each group to move, an int64 tensor [size]: unit i of the result is unit ``permutation[i]`` of ``tensors``.
    tensors : dict of str to torch.Tensor
        A ``state_dict`` or masks. Each tensor is permuted along every axis that a group owns, so a weight moves with
        its outputs and its inputs. The number of zeros does not change.

    Returns
    -------
    dict of str to torch.Tensor
        The same keys; tensors in no group are shared with ``tensors``.

    Raises
    ------
    ValueError
        If the groups do not fit the tensors, a key is not a group, or a value is not a permutation of its units.
    """
    check_groups(groups, tensors)
    orders = {}
    for name, permutation in permutations.items():
        if name not in groups:
            raise ValueError(f"permutations has {name!r}, which is not a group: expected one of {listed(groups)}")
        size, order = groups[name].size, torch.as_tensor(permutation).cpu()
        if order.is_floating_point() or not torch.equal(order.long().sort().values, torch.arange(size)):
            raise ValueError(f"permutation {name!r} is not a permutation of {size} units: got "
                             f"{shortened(order.tolist(), 120)}")
        orders[name] = order.long()
    touched = {entry.tensor for name in orders for entry in groups[name].entries}
    moved = {name: tensor.detach().clone() if name in touched else tensor for name, tensor in tensors.items()}
    permute_(groups, orders, moved)
    return moved


def check_flat(groups):
    """Raise ValueError if a group is nested in a unit of another one."""
    for name, group in groups.items():
        if group.within is not None:
            raise ValueError(f"group {name!r} is within a unit of {group.within[0]!r}: expected groups without parts, "
                             "as match_weights and match_activations support them")


def permute_(groups, permutations, tensors):
    """:func:`permute` in place and without checks; parts are permuted before their unit moves."""
    for name in sorted(permutations, key=lambda name: -depth(groups, name)):
        move_(groups[name], permutations[name], tensors)


def unpermute_(groups, permutations, tensors):
    """Undo :func:`permute_` exactly."""
    for name in sorted(permutations, key=lambda name: depth(groups, name)):
        move_(groups[name], permutations[name].argsort(), tensors)


def move_(group, permutation, tensors):
    """Permute one group in place, in those of its tensors that are in the dict."""
    leaving = (permutation != torch.arange(group.size)).nonzero()[:, 0]  # only a few late in a search
    for entry in group.entries:
        if entry.tensor in tensors:
            tensor, positions = tensors[entry.tensor], indices(entry, group.size)
            part = tensor if entry.rows is None else tensor[slice(*entry.rows)]
            to, origin = (positions[units].flatten().to(tensor.device) for units in (leaving, permutation[leaving]))
            part.index_copy_(entry.axis, to, part.index_select(entry.axis, origin))


def random_permutations(groups, *, seed):
    """Return a uniformly random permutation for each group, for :func:`permute`."""
    generator = torch.Generator().manual_seed(int(seed))
    return {name: torch.randperm(group.size, generator=generator) for name, group in groups.items()}


def assign(similarity):
    """Return the permutation with the largest total similarity.

    Parameters
    ----------
    similarity : torch.Tensor, shape [target units, source units]

    Returns
    -------
    torch.Tensor
        int64 [units]: the source unit assigned to each target unit.
    """
    return assign_again(similarity)[0]


def assign_again(similarity, prices=None):
    """:func:`assign`, faster with the ``prices`` of a problem that resembles this one.

    Prices are the variables of the dual problem: with the right ones, each target unit is assigned the source unit that
    has the largest similarity plus price. With others the search for shortest augmenting paths takes longer, but has
    the same result. The prices are first raised until every source unit is the best for some target unit, which halves
    the time of the search.

    Parameters
    ----------
    similarity : torch.Tensor, shape [target units, source units]
    prices : torch.Tensor or None, float64 [source units]
        By default those of a smoothed problem.

    Returns
    -------
    (torch.Tensor, torch.Tensor or None)
        The permutation, and the prices of the source units in the new order; None for a small problem.
    """
    similarity = similarity.cpu()
    if len(similarity) < LARGE:
        return _cheapest(-similarity.double().numpy()), None
    prices = _smoothed_prices(similarity) if prices is None else prices
    costs = -prices.numpy() - similarity.numpy()  # numpy's memory is in huge pages, which are allocated faster
    costs -= costs.min(1, keepdims=True)
    costs -= (raised := costs.min(0))
    order = _cheapest(costs)
    return order, (prices + torch.from_numpy(raised))[order]


def _cheapest(costs):
    rows, columns = linear_sum_assignment(costs)
    assert (rows == range(len(rows))).all()  # scipy returns rows in order
    return torch.from_numpy(columns).long()


def _smoothed_prices(similarity):
    """Return the prices of a problem in which units are shared: the entropy of the shares makes it smooth, and a few
    of Sinkhorn's iterations solve it approximately (Cuturi, "Sinkhorn Distances", NeurIPS 2013)."""
    smoothness = max(SMOOTHNESS * float(similarity.double().std()), torch.finfo(torch.float32).tiny)
    gains = ((similarity - similarity.amax(1, keepdim=True)) / smoothness).float()
    prices = gains.new_zeros(len(gains))
    for _ in range(SHARING):
        prices = -(gains - (gains + prices).logsumexp(1, keepdim=True)).logsumexp(0)
    return prices.double() * smoothness
