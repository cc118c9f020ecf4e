"""The merge doctor: why the network halfway between two networks is worse than they are.

Each cause has a remedy, and its share of the damage is what the remedy removes: other groups, a better search, units
that tracing left fixed, new statistics (Jordan et al., "REPAIR: REnormalizing Permuted Activations for Interpolation
Repair", ICLR 2023). Other causes are found by exact tests: groups or modules that compute another function, and a
network that is bad on the data. What no remedy removes is described by the similarity of units and layers.
"""

import copy
import math
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch.nn import functional as F

from permask_core.data.batches import batches_of, count, parts_of, to_device
from permask_core.evaluation.connectivity import angle, check_labels, check_states, interpolate_network
from permask_core.matching import (
    Entry,
    Group,
    activation_correlations,
    check_groups,
    derangements,
    draw_stable_weights,
    function_change,
    match_activations,
    match_weights,
    permutation_groups,
    permute,
    random_permutations,
)
from permask_core.matching.batchnorm import resettable
from permask_core.matching.groups import listed
from permask_core.matching.nested import parts_of as inner_parts
from permask_core.matching.permutations import assign, move_
from permask_core.matching.similarity import units_at
from permask_core.matching.weights import check_pair
from permask_core.models import device_of
from permask_core.runs.checks import check_integer
from permask_core.training.loop import evaluate, predict

MERGED = 0.1  # nats; a smaller rise of the loss is no damage
LISTED = 0.05  # a cause with a smaller share of the damage is no finding
PARTNER = 0.5  # a unit has a partner if the correlation with it is at least this
TORN = 0.3  # the layers of a stream need different orders if their mean cosine rises by this in orders of their own
PARTED = 0.1  # networks differ in their units if more of them have no partner
CHANGED = 1e-3  # standard deviations of the outputs; a smaller change of a function is rounding
TINY = 1e-12  # a smaller product of norms is that of weights that are all 0
TRIED = 1000  # inputs on which other inputs and outputs are tried
OUTSIDE = ("they meet the network's input", "they reach the network's output")  # units that are no hidden units


class Finding(NamedTuple):
    """A ``cause``, its ``share`` of the damage in [0, 1] and the measurement as a ``text``. It is ``certain`` if a test
    failed that does not depend on the damage."""

    cause: str
    share: float
    text: str
    certain: bool = False


@dataclass(frozen=True)
class Diagnosis:
    """The result of :func:`diagnose`, all of which ``print`` shows.

    Attributes
    ----------
    findings : tuple
        Each a :class:`Finding`. Certain ones come first, then by their share of the damage. An unexplained rest is one
        of them.
    rise : float
        The damage in nats: the loss halfway between A, matched once and without correction, and B, above that of the
        better of the two ends. NaN if their tensors differ.
    halfway : dict of dict
        Loss halfway in nats, by the order of A and by correction ("none", "reset" or "repair").
    ends : dict of dict
        ``loss`` in nats and ``accuracy`` in [0, 1] of A and B, and ``reset``, the loss after a reset of BatchNorm.
    units : dict of dict
        By group, matched by activations: the number of ``units`` that are not constant in B, the mean ``correlation``
        of their activations with those in A, and the share ``without`` a partner, for which it is below 0.5.
    streams : dict of dict
        By group that several layers write, and by layer: the cosine of the weights of A and B in the common order of
        units, in the order that is best for this layer, and by chance, in the best order for mixed weights.
    control : float
        The share of weights that one search puts in place if B is a shuffled copy of A: 1 if it finds the permutation.
    """

    findings: tuple
    rise: float
    halfway: dict
    ends: dict
    units: dict
    streams: dict
    control: float

    def __str__(self):
        verdict = ("A and B cannot be averaged." if math.isnan(self.rise) else
                   f"{'A and B merge' if self.rise < MERGED else 'A and B do not merge'}: the loss halfway is "
                   f"{self.rise:.2f} nats above that of the better network.")
        lines = [verdict, *(f"{100 * one.share:4.0f} %  {one.cause}: {one.text}" for one in self.findings)]
        streams = {name: dict(zip(("in common order", "alone", "by chance"), values))
                   for layers in self.streams.values() for name, values in layers.items()}
        for head, rows in (("Loss halfway (nats)", self.halfway), ("The networks themselves", self.ends),
                           ("Matched units", self.units), ("Cosine of layers that share their units", streams)):
            lines += [head, *(f"  {name:20} " + ", ".join(f"{key} {value:.3g}" for key, value in row.items())
                              for name, row in rows.items())] if rows else []
        if self.halfway:
            lines.append(f"One search finds {self.control:.0%} of a planted permutation.")
        return "\n".join(lines)


def diagnose(model_a, model_b, batches, *, groups=None, seed=0, restarts=5):
    """Explain why two networks do not merge, or why a mask of A does not fit B.

    Parameters
    ----------
    model_a, model_b : torch.nn.Module
        Two networks with the same inputs and classes, on one device. Neither is changed. The network halfway between
        them has the modules of A.
    batches : Split, (torch.Tensor, torch.Tensor) or iterable of batches
        Inputs with their classes, int64 [inputs], for :func:`~permask_core.data.batches.batches_of`, held in memory.
        Losses and statistics are computed on them; a few hundred inputs are enough.
    groups : dict of str to Group, optional
        The groups with which the merge failed. They are tested, and compared with the default, those that
        :func:`~permask_core.matching.permutation_groups` finds.
    seed : int
        Seed of the searches and of the control.
    restarts : int
        Number of searches for a better permutation.

    Returns
    -------
    Diagnosis
        If names or shapes of tensors differ, this is the only finding.

    Raises
    ------
    ValueError
        If the data have no classes of A, a weight is not finite, the groups do not fit, A cannot be traced and there
        are no groups, or it has no units that can be permuted.

    Examples
    --------
    >>> from permask_core.models import build_model
    >>> a, b = (build_model("mlp", (1, 8, 8), 10) for _ in range(2))
    >>> found = diagnose(a, b, (torch.randn(50, 1, 8, 8), torch.arange(50) % 10))
    >>> found.rise, found.control
    (0.0, 1.0)
    """
    check_integer("restarts", restarts, 1)
    data = [*batches_of(check_labels(batches, model_a))]
    a, b = model_a.state_dict(), model_b.state_dict()
    try:
        check_pair(a, b)
    except ValueError as error:
        ends = {name: evaluate(own, data)._asdict() for name, own in (("A", model_a), ("B", model_b))}
        return Diagnosis((Finding("architecture", 1.0, f"{error}.", True),), math.nan, {}, ends, {}, {}, math.nan)
    check_states([a, b])
    example = parts_of(data[0][0], max(1, count(data[0][0]) // 8))[0]
    traced = _trace(model_a, example, groups)
    check_groups(groups or traced, a, whole=True)
    merge = _Merge(model_a, b, data, ("none", "reset", "repair") if resettable(model_a) else ("none", "repair"))
    control, fixed = _control(traced, a, seed), _fixed_layers(traced, a)

    def match(groups, restarts=1):
        return permute(groups, match_weights(groups, a, b, seed=seed, restarts=restarts), a)

    # From the merge that failed to better ones.
    merge.attempt("", "matched", match(groups or traced))
    if groups:
        merge.attempt("groups", "traced groups", match(traced))
    merge.attempt("search", f"{restarts} searches", match(traced, restarts))
    moved = merge.steps[-1].state
    if all(group.taps or name in inner_parts(traced) for name, group in traced.items()):
        moved = permute(traced, match_activations(traced, merge.fitted(a), merge.fitted(b), data), a)
        failed = control < 1 or angle(moved, b) < angle(merge.steps[-1].state, b)
        merge.attempt("search" if failed else "objective", "matched activations", moved)
    if fixed:
        merge.attempt("fixed units", "moved fixed units", _match_alone(fixed, merge.steps[-1].state, b)[0])

    ends = {"A": merge.end(a), "B": merge.end(b)}
    units = _agreement(traced, merge.fitted(moved), merge.fitted(b), data)
    streams = {name: _match_alone(layers, moved, b)[1] for name, layers in _streams(traced, a).items()}
    found = [_modules(model_a, model_b, a, example, (ends["B"]["loss"] - evaluate(model_b, data).loss) / 2),
             groups and _groups(groups, traced, model_a, example, merge.steps), _search(merge.steps, b, control),
             _objective(merge.steps, b), _fixed_units(merge.steps, _match_alone(fixed, moved, b)[1]),
             _statistics(merge.steps, ends), _bad_end("A", model_a, a, ends, data),
             _bad_end("B", model_b, b, ends, data), _rest(merge.steps, ends, units, streams, control)]
    rise = merge.steps[0].losses["none"] - min(map(_own, ends.values()))
    found = [Finding(cause, min(1.0, max(0.0, nats) / rise) if rise > 0 else 0.0, text, certain)
             for cause, nats, text, certain in filter(None, found)]
    found = [one for one in found if one.certain or rise >= MERGED and one.share >= LISTED]
    found.sort(key=lambda one: (not one.certain, -one.share))
    return Diagnosis(tuple(found), rise, {"as they are": merge.halfway(a)} | merge.tried, ends, units, streams, control)


class _Step(NamedTuple):
    """A remedy of a cause: the state of A that it gives, and the losses halfway by correction."""

    cause: str
    name: str
    state: dict
    losses: dict

    def least(self):
        return min(self.losses.values())

    def best(self):
        """Return the best correction; of those that are equally good, the simplest."""
        return min(self.losses, key=lambda kind: round(self.losses[kind], 3))


class _Merge:
    """Merges of states of A with B, in the modules of A: ``steps`` from the one that failed to the best, and the losses
    of all that were ``tried``."""

    def __init__(self, model, b, data, corrections):
        self.model, self.b, self.data, self.corrections = model, b, data, corrections
        self.steps, self.tried = [], {}

    def attempt(self, cause, name, state):
        """Apply a remedy if it lowers the loss halfway."""
        self.tried[name] = self.halfway(state)
        step = _Step(cause, name, state, self.tried[name])
        if not self.steps or step.least() < self.steps[-1].least():
            self.steps.append(step)

    def halfway(self, state):
        """Return the loss halfway between a state and B, by correction."""
        return {kind: evaluate(self._between(state, self.b, kind), self.data).loss for kind in self.corrections}

    def fitted(self, state):
        """Return the network with a state and, if it has BatchNorm, with statistics of these data."""
        return self._between(state, state, self.corrections[-2])

    def end(self, state):
        """Return loss and accuracy of a state, and the loss after a reset."""
        end = evaluate(self.model, self.data, state=state)._asdict()
        return end | ({"reset": evaluate(self.fitted(state), self.data).loss} if "reset" in self.corrections else {})

    def _between(self, one, other, kind):
        return interpolate_network(self.model, one, other, correction=kind, batches=self.data)


def _own(end):
    """Return the loss of a network itself, with the better of the two statistics."""
    return min(end["loss"], end.get("reset", math.inf))


# ---- Findings --------------------------------------------------------------------------------------------------------
# Each returns (cause, nats of the damage, text, certain), or None. If A and B are equally good, the nats add up to the
# damage. A bad end explains half of what its own loss falls by, because the rest is measured from the mean of the ends.

def _saved(applied, cause):
    """Return what the remedies of a cause remove, in nats: the mean of before and after the statistics are corrected.
    Also return the step before them and the last of them, or None if none was applied."""
    steps = [(before, after) for before, after in pairwise(applied) if after.cause == cause]
    kinds = "none", applied[-1].best()
    nats = sum(before.losses[kind] - after.losses[kind] for before, after in steps for kind in kinds) / 2
    return nats, (steps[0][0], steps[-1][1]) if steps else None


def _falls(before, after):
    return f"With {after.name}, the loss halfway is {after.least():.2f} instead of {before.least():.2f} nats."


def _search(applied, b, control):
    nats, steps = _saved(applied, "search")
    if steps is None:
        return None
    before, after = (angle(step.state, b) for step in steps)
    return "search", nats, (f"One search ends {'in a local optimum ' * (after < before)}{before:.1f} degrees from B, "
                            f"{steps[1].name} at {after:.1f}. One search finds {control:.0%} of a planted permutation. "
                            f"{_falls(*steps)}"), False


def _objective(applied, b):
    nats, steps = _saved(applied, "objective")
    if steps is None:
        return None
    before, after = (angle(step.state, b) for step in steps)
    return "objective", nats, (f"Units that respond similarly have different weights: {after:.1f} degrees from B, "
                               f"where the closest weights are at {before:.1f}. {_falls(*steps)}"), False


def _fixed_units(applied, cosines):
    nats, steps = _saved(applied, "fixed units")
    if steps is None:
        return None
    tied, alone, _ = (sum(one) / len(cosines) for one in zip(*cosines.values()))
    return "fixed units", nats, (f"Tracing leaves {listed(cosines, 3)} fixed, but their cosine with B is {tied:.2f}, "
                                 f"and in another order {alone:.2f}. {_falls(*steps)}"), False


def _statistics(applied, ends):
    first, last = applied[0], applied[-1]
    kind = last.best()
    name = "a reset" if kind == "reset" else "REPAIR"
    text = f"With {name}, the loss halfway is {last.losses[kind]:.2f} instead of {last.losses['none']:.2f} nats."
    for end, one in ends.items():
        if one["loss"] - _own(one) > MERGED:
            text += (f" The statistics of {end} do not fit these inputs: after a reset, its own loss is "
                     f"{_own(one):.2f} instead of {one['loss']:.2f} nats.")
    return "statistics", sum(step.losses["none"] - step.losses[kind] for step in (first, last)) / 2, text, False


def _rest(applied, ends, units, streams, control):
    """What no remedy removes, with what is known about it."""
    rest = applied[-1].least() - sum(map(_own, ends.values())) / 2
    text = f"With all remedies, the loss halfway is {rest:.2f} nats above the mean of A and B."
    name = max(streams, key=lambda name: _lost(streams[name]), default=None)
    if name and _lost(streams[name]) >= TORN:
        tied, alone, chance = (sum(one) / len(streams[name]) for one in zip(*streams[name].values()))
        return "residual stream", rest, (f"{text} The layers of the stream {name!r} need different orders: their mean "
                                         f"cosine with B is {alone:.2f} if each is matched alone ({chance:.2f} by "
                                         f"chance), and {tied:.2f} in the common order."), rest >= MERGED
    n = sum(one["units"] for one in units.values())
    if not n:
        return "unexplained", rest, text + " No units could be compared.", False
    correlation, without = (sum(one[key] * one["units"] for one in units.values()) / n
                            for key in ("correlation", "without"))
    text += f" Matched units have a mean correlation of {correlation:.2f}; {without:.0%} have no partner."
    if without < PARTED:
        return "unexplained", rest, text + " No measurement here explains it.", False
    if control < 1:
        text += f" One search finds only {control:.0%} of a planted permutation, so a better one may exist."
    return "different units", rest, text + " Wider networks usually have more units in common.", False


def _lost(layers):
    """Return by how much the cosine of a layer rises, beyond chance, if it is matched alone; mean of the layers."""
    return sum(alone - max(tied, chance) for tied, alone, chance in layers.values()) / len(layers)


def _modules(model_a, model_b, state, example, nats):
    """The modules of A and B compute different functions of the same weights."""
    twin = copy.deepcopy(model_b)
    twin.load_state_dict(state)
    one, other = (predict(net, [example]).double() for net in (model_a, twin))
    change = float((one - other).abs().max() / one.std())
    if change < CHANGED:
        return None
    modules = dict(model_b.named_modules())
    differ = [f"{name!r} is {net} in A and {modules.get(name)} in B" for name, net in model_a.named_modules()
              if not any(net.children()) and repr(net) != repr(modules.get(name))]
    return "architecture", nats, (f"With the weights of A, the modules of B change the outputs by {change:.2g} "
                                  f"standard deviations{': ' * bool(differ)}{listed(differ, 3)}."), True


def _groups(groups, traced, model, example, applied):
    """The given groups change the function, or leave out units that tracing finds."""
    nats, steps = _saved(applied, "groups")
    drawn, orders = draw_stable_weights(model, example), derangements(groups)
    changes = {name: function_change(groups, {name: orders[name]}, drawn, example) for name in groups}
    worst = max(changes, key=changes.get)
    wrong = changes[worst] > CHANGED
    if not (wrong or steps):
        return None
    sizes = [sum(group.size for group in one.values()) for one in (groups, traced)]
    have = {entry[:2] for group in groups.values() for entry in group.entries}
    lost = [f"{entry.tensor}[{entry.axis}]" for group in traced.values() for entry in group.entries
            if entry[:2] not in have]
    text = (f"Permuting group {worst!r} changes the outputs by {changes[worst]:.2g} of their standard deviations."
            if wrong else f"The groups preserve the function, but move {sizes[0]} of {sizes[1]} units.")
    return "groups", nats, " ".join([text, *[f"The groups lack {listed(lost, 4)}."] * bool(lost),
                                     *[_falls(*steps)] * bool(steps)]), wrong


def _bad_end(name, model, state, ends, data):
    """A network is bad on these data: it expects other outputs or inputs, does not know some classes, or is worse."""
    few = data[:max(1, TRIED // count(data[0][0]))]
    own, y = evaluate(model, few, state=state), torch.cat([y for _, y in few]).cpu()
    worse = min(own.loss, ends[name].get("reset", math.inf)) - min(map(_own, ends.values()))
    chance = float(y.bincount().max()) / len(y)
    at_chance = own.accuracy < chance + 0.1 * (1 - chance)
    healed = own.loss - ends[name].get("reset", math.inf) > MERGED  # only its statistics are wrong
    if worse < MERGED and (healed or not at_chance):
        return None
    logits = predict(model, few, state=state)
    losses = {("outputs", "its outputs in another order"): _loss_reordered(logits, y)}
    losses |= {("inputs", what): evaluate(model, [(change(x), y) for x, y in few], state=state).loss
               for what, change in _changes(few[0][0]).items()}
    (cause, what), loss = min(losses.items(), key=lambda one: one[1])
    if loss < min(own.loss, _entropy(y)) / 2:
        return cause, (own.loss - loss) / 2, (f"With {what}, the loss of {name} itself is {loss:.2f} instead of "
                                              f"{own.loss:.2f} nats."), True
    unknown = [c for c, n in enumerate(y.bincount().tolist()) if n >= 5 and not (logits.argmax(1) == y)[y == c].any()]
    text = (f"{name} has a loss of {own.loss:.2f} nats and an accuracy of {own.accuracy:.0%}, where the most frequent "
            f"class has a share of {chance:.0%}.")
    if unknown:
        text += f" It is never right about the classes {listed(map(str, unknown))}."
    return "data", worse / 2, text, at_chance or bool(unknown)


def _changes(x):
    """Return changes of inputs by name, for errors that are common in preprocessing."""
    if not (isinstance(x, torch.Tensor) and x.is_floating_point()):
        return {}
    changes = {f"inputs times {2.0**k:g}": partial(torch.mul, other=2.0**k) for k in range(-8, 9) if k} | {
        "negated inputs": torch.neg, "standardised inputs": lambda x: (x - x.mean()) / x.std(),
        "inverted inputs (minimum and maximum exchanged)": lambda x: x.amax() + x.amin() - x}
    if x.ndim == 4 and x.shape[1] > 1:
        changes["channels in reverse order"] = lambda x: x.flip(1)
    if x.ndim == 4 and x.shape[2] == x.shape[3]:
        changes["rows and columns of the images exchanged"] = lambda x: x.transpose(2, 3)
    return changes


def _entropy(y):
    """Return the loss of a network whose outputs are the shares of the classes."""
    shares = y.bincount() / len(y)
    return float(torch.special.entr(shares).sum())


def _loss_reordered(logits, y):
    """Return the loss with the best order of the outputs, which is found on one half of the inputs and used on the
    other."""
    logs = F.log_softmax(logits.double(), 1)
    fit = torch.zeros(logs.shape[1], logs.shape[1], dtype=logs.dtype).index_add_(0, y[::2], logs[::2])
    return float(F.nll_loss(logs[1::2][:, assign(fit)], y[1::2]))


# ---- Units -----------------------------------------------------------------------------------------------------------

def _trace(model, example, groups):
    """Return the groups that tracing finds, or the given ones if it finds none."""
    try:
        traced = permutation_groups(model, to_device(example, device_of(model)))
    except ValueError:
        if groups is None:
            raise
        return groups
    if not (traced or groups):
        why = "; ".join(dict.fromkeys(one.why for one in traced.fixed))
        raise ValueError(f"{type(model).__name__} has no units that can be permuted" + (why and f": {why}"))
    return traced or groups


def _control(groups, state, seed):
    """Return the share of weights that one search puts in place if the target is a shuffled copy."""
    shuffled = permute(groups, random_permutations(groups, seed=seed), state)
    found = permute(groups, match_weights(groups, state, shuffled, seed=seed), state)
    names = {entry.tensor for group in groups.values() for entry in group.entries}
    return float(torch.cat([(found[name] == shuffled[name]).flatten().cpu() for name in names]).double().mean())


def _agreement(groups, source_model, target_model, data):
    """Return number, mean correlation and share without a partner of the matched units of each group that has taps."""
    found, read = {}, {name: group for name, group in groups.items() if group.taps and group.within is None}
    for name, every in (activation_correlations(read, source_model, target_model, data) if read else {}).items():
        matched = every.diagonal()[every.any(1)] / len(read[name].taps)
        found[name] = {"units": len(matched), "correlation": float(matched.sum()) / max(1, len(matched)),
                       "without": float((matched < PARTNER).sum()) / max(1, len(matched))}
    return found


def _fixed_layers(groups, state):
    """Return the hidden units that are in no group, as a group for each layer and axis."""
    layers = {}
    for tensor, axis, size, why in getattr(groups, "fixed", ()):
        if why not in OUTSIDE and state[tensor].ndim and size == state[tensor].shape[axis]:
            layers.setdefault((tensor.rpartition(".")[0], axis, size), []).append(Entry(tensor, axis))
    return {f"{entries[0].tensor}[{axis}]": Group(size, tuple(entries)) for (_, axis, size), entries in layers.items()}


def _streams(groups, state):
    """Return the layers of each group that several layers write, as groups of their own.

    A vector, such as a bias or the weight of a norm, belongs to the layer before it. A layer of zeros is left out.
    """
    streams = {}
    for name, group in groups.items():
        layers = []
        for entry in group.entries:
            if state[entry.tensor].ndim > 1 or not layers:
                layers.append([])
            layers[-1].append(entry)
        layers = [entries for entries in layers if units_at(state[entries[0].tensor], entries[0]).any()]
        if group.within is None and sum(entries[0].axis == 0 for entries in layers) > 1:
            streams[name] = {f"{entries[0].tensor}[{entries[0].axis}]": Group(group.size, tuple(entries))
                             for entries in layers}
    return streams


def _match_alone(layers, source, target):
    """Match each layer alone. Return the new source, and for each layer the cosine of its weights in the source and in
    the target before and after, and by chance: after it is matched with its own weights in a random order."""
    moved, cosines = {name: tensor.detach().clone() for name, tensor in source.items()}, {}
    for name, group in layers.items():
        entry = max(group.entries, key=lambda entry: source[entry.tensor].numel())
        one, other = (units_at(state[entry.tensor].detach().double(), entry).cpu() for state in (target, source))
        mixed = other[:, torch.randperm(other.shape[1], generator=torch.Generator().manual_seed(0))]
        order, by_chance = assign(one @ other.T), assign(one @ mixed.T)
        move_(group, order, moved)
        size = (one.norm() * other.norm()).clamp(min=TINY)
        cosines[name] = tuple(float((one * found).sum() / size) for found in (other, other[order], mixed[by_chance]))
    return moved, cosines
