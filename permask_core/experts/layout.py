"""Where a network keeps its experts and routers: one row of a table for each kind of block, as data.

A block computes h(x) = sum over the chosen experts j of g_j(x) f_j(x). In transformers 5, as in
:mod:`permask_core.models.moe`, it calls its experts with the tokens [n, hidden], the indices of their experts and the
weights g of these, both [n, top_k]. This call is all that the other modules of this package rely on: what is passed is
what the block uses, after any normalisation, and a call with one index and a weight of 1 computes one expert.
"""

from typing import NamedTuple

import torch
from torch import nn

from permask_core.matching.groups import Entry, Group, Groups, Tap, listed


class Layout(NamedTuple):
    """Where a kind of block keeps things. ``experts`` and ``router`` are the names of its two modules, and ``top_k`` is
    that of the router's number of experts for a token. ``count`` is the entry of the model's configuration with the
    number of experts.

    ``packing`` of the weights of E experts with I units: "halves" (``gate_up_proj`` [E, 2 I, hidden], gate first),
    "interleaved" (``gate_up_proj`` [E, hidden, 2 I], gate and up in turn) or "plain" (``up_proj`` [E, I, hidden],
    without a gate); ``down_proj`` is [E, hidden, I], for "interleaved" [E, I, hidden]. If an output is linear in the up
    projection, the block is ``scalable``: a unit's row of up may be multiplied by any number but 0, and its column of
    down divided by it.
    """

    experts: str = "experts"
    router: str = "gate"
    packing: str = "halves"
    scalable: bool = True
    top_k: str = "top_k"
    count: str = "num_local_experts"


# By the name of the block's class. "num_local_experts" is an alias in the configurations that have another name for it.
LAYOUTS = {
    "Mixture": Layout(router="router"),  # permask_core.models.moe
    "MixtralSparseMoeBlock": Layout(),
    "Qwen2MoeSparseMoeBlock": Layout(),
    "Qwen3MoeSparseMoeBlock": Layout(),
    "OlmoeSparseMoeBlock": Layout(),
    "DeepseekV3MoE": Layout(),
    "Glm4MoeMoE": Layout(),
    "GptOssMLP": Layout(router="router", packing="interleaved", scalable=False),  # (up + 1) and clamps are not linear
}


class Block(NamedTuple):
    """A block of a model: its ``experts`` and ``router`` modules and its :class:`Layout`."""

    experts: nn.Module
    router: nn.Module
    layout: Layout

    @property
    def count(self):
        """The number of routed experts."""
        return len(self.router.weight)

    @property
    def top_k(self):
        """The number of experts for each token."""
        return getattr(self.router, self.layout.top_k)

    @property
    def scalable(self):
        """Whether the :class:`Layout` and the block allow units to be rescaled."""
        return self.layout.scalable and hasattr(self.experts, "gate_up_proj")


def moe_blocks(model, layouts=LAYOUTS):
    """Return the blocks of a model that have routed experts.

    Parameters
    ----------
    model : torch.nn.Module
    layouts : dict of str to Layout
        By the name of the block's class. For another architecture pass ``LAYOUTS | {"ClassOfTheBlock": Layout(...)}``.

    Returns
    -------
    dict of str to Block
        By the name of the block's module, in the order of the model.

    Raises
    ------
    ValueError
        If no block is known; the message has the tensors that may hold experts.

    Examples
    --------
    >>> from permask_core.models import build_model
    >>> model = build_model("moe", (11,), 15, layers=2, experts=4)
    >>> {name: (block.count, block.top_k) for name, block in moe_blocks(model).items()}
    {'blocks.0.mixture': (4, 2), 'blocks.1.mixture': (4, 2)}
    """
    found = {}
    for name, module in model.named_modules():
        if layout := layouts.get(type(module).__name__):
            for part in (layout.experts, layout.router):
                if not hasattr(module, part):
                    raise ValueError(f"the block {name!r} has no {part!r}: expected the names in its layout, "
                                     f"{layout}; it has {listed(dict(module.named_children()))}")
            found[name] = Block(getattr(module, layout.experts), getattr(module, layout.router), layout)
    if not found:
        raise ValueError(_unknown(model, layouts))
    return found


def _unknown(model, layouts):
    maybe = [(name, tensor) for name, tensor in model.named_parameters() if tensor.ndim > 2 or "expert" in name]
    if not maybe:
        return f"{type(model).__name__} has no experts: no parameter has more than two axes or 'expert' in its name"
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name, _ in maybe}
    tensors = [f"{name} {list(tensor.shape)} of {type(owners[name]).__name__}" for name, tensor in maybe]
    return (f"{type(model).__name__} has no block of a known class ({', '.join(layouts)}). Tensors that may "
            f"hold experts: {listed(tensors, 4)}. Describe the block by "
            "layouts=LAYOUTS | {'ClassOfTheBlock': Layout(...)}")


def run_expert(block, j, x):
    """Return the outputs f_j(x) [n, hidden] of one expert for tokens x [n, hidden], before the router's weight.

    This is the block's own arithmetic, called with one expert and a weight of 1; hooks are not called.
    """
    if not len(x):
        return torch.zeros_like(x)
    chosen = torch.full((len(x), 1), int(j), device=x.device)
    return block.experts.forward(x, chosen, x.new_ones(len(x), 1))


def expert_tensors(block, j):
    """Return the weights of one expert by name, as for linear layers: ``gate.weight`` and ``up.weight`` [units,
    hidden], ``down.weight`` [hidden, units], and biases if there are any.

    The tensors are views of the model's: what is written to them in place is written to the model.

    Examples
    --------
    >>> from permask_core.models import build_model
    >>> block = moe_blocks(build_model("moe", (11,), 15))["blocks.0.mixture"]
    >>> {name: list(tensor.shape) for name, tensor in expert_tensors(block, 3).items()}
    {'gate.weight': [128, 64], 'up.weight': [128, 64], 'down.weight': [64, 128]}
    """
    own = {name: tensor.detach()[j] for name, tensor in block.experts.named_parameters()}
    if not hasattr(block.experts, "gate_up_proj"):
        found = {"up.weight": own["up_proj"], "up.bias": own.get("up_proj_bias"), "down.weight": own["down_proj"]}
    elif block.layout.packing == "interleaved":
        weight, bias = own["gate_up_proj"].T, own.get("gate_up_proj_bias")
        found = {"gate.weight": weight[::2], "up.weight": weight[1::2], "down.weight": own["down_proj"].T}
        if bias is not None:
            found |= {"gate.bias": bias[::2], "up.bias": bias[1::2]}
    else:
        gate, up = own["gate_up_proj"].chunk(2)
        found = {"gate.weight": gate, "up.weight": up, "down.weight": own["down_proj"]}
    return {name: tensor for name, tensor in (found | {"down.bias": own.get("down_proj_bias")}).items()
            if tensor is not None}


class Expert(nn.Module):
    """One expert as a network of linear layers, which shares its weights: for matching and for reading its units.

    Parameters
    ----------
    block : Block
    j : int
    """

    def __init__(self, block, j):
        super().__init__()
        tensors = expert_tensors(block, j)
        for name in ("gate", "up", "down"):
            if (weight := tensors.get(f"{name}.weight")) is not None:
                layer = nn.Linear(*weight.shape[::-1], bias=f"{name}.bias" in tensors, device="meta")
                for kind in dict(layer.named_parameters()):
                    setattr(layer, kind, nn.Parameter(tensors[f"{name}.{kind}"], requires_grad=False))
                setattr(self, name, layer)
        self.act, self.interleaved = [block.experts], block.layout.packing == "interleaved"  # a list: not a submodule

    def forward(self, x):
        (experts,) = self.act
        if not hasattr(self, "gate"):
            return self.down(experts.act_fn(self.up(x)))
        gate, up = self.gate(x), self.up(x)
        units = (experts._apply_gate(torch.stack([gate, up], -1).flatten(-2)) if self.interleaved
                 else experts.act_fn(gate) * up)
        return self.down(units)


def unit_groups(tensors):
    """Return the permutation group of the units of one expert, for :mod:`permask_core.matching`.

    A unit is a row of gate, the same row of up, their biases, and a column of down. The bias of down belongs to no
    unit.

    Examples
    --------
    >>> from permask_core.models import build_model
    >>> block = moe_blocks(build_model("moe", (11,), 15))["blocks.0.mixture"]
    >>> print(unit_groups(expert_tensors(block, 0)).describe())
    units: 128 units
        gate.weight[0], up.weight[0], down.weight[1]
    """
    entries = [Entry(name, 0) for name in ("gate.weight", "gate.bias", "up.weight", "up.bias") if name in tensors]
    return Groups({"units": Group(len(tensors["up.weight"]), (*entries, Entry("down.weight", 1)),
                                  (Tap("down", "input", -1),))})
