"""Matching by continuous relaxations: a matrix with rows and columns that sum to 1 in the place of a permutation.

:func:`match_many` climbs the objective of weight matching for all groups at once by the algorithm of Frank and Wolfe,
for one network or several that are moved onto a target: Crisostomi et al., "C2M3: Cycle-Consistent Multi-Model
Merging", NeurIPS 2024. :func:`match_loss` descends the loss of a network under a mask that moves: Peña et al.,
"Re-basin via Implicit Sinkhorn Differentiation", CVPR 2023, here with gradients through the iterations.
"""

from math import fsum

import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from permask_core.data.batches import batches_of
from permask_core.masks import check_fit
from permask_core.matching.groups import check_groups, depth, indices
from permask_core.matching.permutations import Permutations, assign, check_flat, permute
from permask_core.matching.weights import check_pair, climb, matched
from permask_core.models import device_of, evaluation_mode
from permask_core.runs.checks import check_integer

STEPS = torch.linspace(0, 1, 11).tolist()  # sizes that a line search tries
TOLERANCE = 1e-6  # relative gain of a step, or of a round over the networks, that ends a search


# ---- Soft permutations -----------------------------------------------------------------------------------------------

def mix(groups, matrices, tensors):
    """Mix the units of tensors: :func:`~permask_core.matching.permute` with matrices instead of permutations.

    Parameters
    ----------
    groups : dict of str to Group
    matrices : dict of str to torch.Tensor
        For each group to mix [size, size]: unit i of the result is the sum over j of ``matrix[i, j]`` times unit j of
        ``tensors``. A permutation p is the matrix ``torch.eye(size)[p]``.
    tensors : dict of str to torch.Tensor

    Returns
    -------
    dict of str to torch.Tensor
        The same keys; gradients reach the matrices and the tensors.
    """
    mixed = dict(tensors)
    for name in sorted(matrices, key=lambda name: -depth(groups, name)):  # parts before the unit that has them
        matrix = matrices[name]
        for entry in groups[name].entries:
            if entry.tensor in mixed:
                whole = mixed[entry.tensor]
                part = whole if entry.rows is None else whole[slice(*entry.rows)]
                units, positions = part.movedim(entry.axis, 0), indices(entry, len(matrix)).to(whole.device)
                new = torch.tensordot(matrix.to(whole), units[positions], 1).flatten(0, 1)
                new = units.index_copy(0, positions.flatten(), new).movedim(0, entry.axis)
                start, stop = entry.rows or (0, len(whole))
                mixed[entry.tensor] = new if entry.rows is None else torch.cat([whole[:start], new, whole[stop:]])
    return mixed


# ---- One network or several, by Frank and Wolfe ----------------------------------------------------------------------

def match_many(groups, sources, target, *, steps=100, seed=0):
    """Move several networks onto a target and onto one another.

    The objective is the sum of the inner products of all pairs among the target and the moved sources. Permutations
    between two sources follow from those onto the target, so they agree along every cycle of networks.

    Parameters
    ----------
    groups : dict of str to Group
        Groups that are not nested.
    sources : sequence of dict of str to torch.Tensor
        At least one ``state_dict``. With one, the objective is that of :func:`~permask_core.matching.match_weights`.
    target : dict of str to torch.Tensor
    steps : int
        Maximal number of steps of the relaxed search, which starts from matrices with equal numbers. The permutations
        that are closest to its end are then improved by weight matching, one network after another.
    seed : int
        Seed of the order of groups in weight matching.

    Returns
    -------
    list of Permutations
        One for each source. ``objective`` is that of all networks: at the start of the weight matching, and after each
        round over the networks.

    Raises
    ------
    ValueError
        If there are no sources, a group is nested, ``steps`` is not an integer of at least 1, or for the reasons of
        :func:`~permask_core.matching.match_weights`.

    Examples
    --------
    >>> from permask_core.matching import Entry, Group
    >>> groups, target = {"hidden": Group(3, (Entry("w", 0),))}, {"w": torch.tensor([[1.0], [2.0], [3.0]])}
    >>> [found["hidden"].tolist() for found in match_many(groups, [{"w": target["w"][[2, 0, 1]]}, target], target)]
    [[1, 2, 0], [0, 1, 2]]
    """
    check_integer("steps", steps, 1)
    check_flat(groups)
    if not (sources := list(sources)):
        raise ValueError("there are no sources: expected at least one network to move")
    for source in sources:
        check_pair(source, target)
        check_groups(groups, source, whole=True)
    weights, goal = [matched(groups, source, target)[0] for source in sources], matched(groups, target, target)[1]
    matrices = _frank_wolfe(groups, weights, goal, steps)
    found = [Permutations({name: assign(matrix) for name, matrix in own.items()}) for own in matrices]
    moved = [permute(groups, own, one) for own, one in zip(found, weights)]
    objective, generator = [float(_objective([*moved, goal]))], torch.Generator().manual_seed(int(seed))
    while len(objective) < 2 or objective[-1] - objective[-2] > TOLERANCE * abs(objective[-1]):
        for i, one in enumerate(weights):
            others = {name: sum(x[name] for x in (*moved[:i], *moved[i + 1:], goal)) for name in goal}
            found[i] = climb(groups, dict(found[i]), one, others, generator)
            moved[i] = permute(groups, found[i], one)
        objective.append(float(_objective([*moved, goal])))
    return [Permutations(own, objective) for own in found]


def _frank_wolfe(groups, weights, goal, steps):
    """Return the matrices of each network at a maximum of the relaxed objective."""
    start = next(iter(goal.values()))
    matrices = [{name: start.new_full((group.size, group.size), 1 / group.size) for name, group in groups.items()}
                for _ in weights]

    def value(own):
        return _objective([*(mix(groups, one, state) for one, state in zip(own, weights)), goal])

    for _ in range(steps):
        flat = [matrix.requires_grad_() for own in matrices for matrix in own.values()]
        now = value(matrices)
        gradients = iter(torch.autograd.grad(now, flat))
        with torch.no_grad():  # the linear objective is largest at a permutation
            ends = [{name: torch.eye(len(matrix)).to(matrix)[assign(next(gradients))] for name, matrix in own.items()}
                    for own in matrices]
            ways = [[{name: matrix + step * (end[name] - matrix) for name, matrix in own.items()}
                     for own, end in zip(matrices, ends)] for step in STEPS]
            values = [float(value(way)) for way in ways]
            best = max(range(len(STEPS)), key=values.__getitem__)
            matrices = [{name: matrix.detach() for name, matrix in own.items()} for own in ways[best]]
        if values[best] - values[0] <= TOLERANCE * abs(values[best]):
            break
    return matrices


def _objective(states):
    """Return the sum of the inner products of all pairs of networks."""
    pairs = [(one, other) for i, one in enumerate(states) for other in states[:i]]
    return sum((one[name] * other[name]).sum() for one, other in pairs for name in one)


# ---- A mask that moves, by the loss of the network -------------------------------------------------------------------

def match_loss(groups, masks, model, batches, *, start=None, lr=0.1, temperature=0.3, iterations=20):
    """Move masks so that a network under the moved masks has a low loss.

    The network is trained with a soft mask, whose units are mixed, by the gradients of the logits of the mixture.

    Parameters
    ----------
    groups : dict of str to Group
        Groups that are not nested.
    masks : Masks
    model : torch.nn.Module
        Its weights do not change. It runs in evaluation mode, on its device.
    batches : Split, tuple of torch.Tensor, or iterable of batches
        One pass: a step of Adam for each batch (inputs, targets).
    start : dict of str to torch.Tensor, optional
        Permutations to start from, such as those of :func:`~permask_core.matching.match_weights`: their logits are 1,
        all others 0. By default all are 0.
    lr, temperature : float
        Learning rate of Adam, and temperature by which logits are divided.
    iterations : int
        See :func:`sinkhorn`.

    Returns
    -------
    Permutations
        Those at the end, or ``start`` if its mean loss over the batches is not higher. ``objective`` is minus the loss
        of each step, with the soft mask.

    Raises
    ------
    ValueError
        If a group is nested, the masks do not fit, there are no batches, or a number is out of range.
    """
    check_flat(groups)
    check_fit(masks, model.state_dict())
    check_groups(groups, masks)
    check_integer("iterations", iterations, 1)
    if not (lr > 0 and temperature > 0):
        raise ValueError(f"lr is {lr} and temperature {temperature}: expected positive numbers")
    device, state = device_of(model), {name: tensor.detach() for name, tensor in model.state_dict().items()}
    kept = {name: mask.to(device, state[name].dtype) for name, mask in masks.items()}
    logits = {name: torch.zeros(group.size, group.size, device=device) if start is None else hard(start[name], device)
              for name, group in groups.items()}
    optimizer = torch.optim.Adam([one.requires_grad_() for one in logits.values()], lr)

    def loss(matrices, inputs, targets):
        moved = mix(groups, matrices, kept)
        under = state | {name: state[name] * mask for name, mask in moved.items()}
        return cross_entropy(functional_call(model, under, (inputs,)), targets)

    def mean_loss(orders):
        matrices = {name: hard(order, device) for name, order in orders.items()}
        found = [(loss(matrices, x, y).item(), len(x)) for x, y in batches_of(batches, device)]
        return fsum(value * n for value, n in found) / sum(n for _, n in found)

    with evaluation_mode(model):
        objective = []
        for inputs, targets in batches_of(batches, device):
            optimizer.zero_grad()
            with torch.enable_grad():
                value = loss({name: sinkhorn(one / temperature, iterations) for name, one in logits.items()}, inputs,
                             targets)
            value.backward()
            optimizer.step()
            objective.append(-value.item())
        end = {name: assign(one.detach()) for name, one in logits.items()}
        return Permutations(end if start is None else min(start, end, key=mean_loss), objective)


def hard(order, device):
    """Return a permutation as a matrix, float32."""
    return torch.eye(len(order), device=device)[order.to(device)]


def sinkhorn(logits, iterations=20):
    """Return a matrix with positive numbers whose columns sum to 1 and whose rows nearly do.

    Parameters
    ----------
    logits : torch.Tensor
        [n, n]; exp(logits) is scaled in rows and columns, in turn.
    iterations : int
        Sinkhorn, "A Relationship Between Arbitrary Positive Matrices and Doubly Stochastic Matrices", 1964.
    """
    for _ in range(iterations):
        logits = logits - logits.logsumexp(1, keepdim=True)
        logits = logits - logits.logsumexp(0, keepdim=True)
    return logits.exp()
