"""FanInAttention against torch's own attention with masked weights."""

import copy
from itertools import product

import pytest
import torch
from torch import nn

from permask_core.masks import apply_masks
from permask_core.sparse import FanInAttention, FanInLinear, condense
from permask_core.sparse.dynamic import constant_fan_in_masks

SIZE, HEADS, LENGTH, SOURCE, BATCH = 12, 3, 5, 7, 4
CAUSAL = torch.ones(LENGTH, LENGTH).triu(1).bool()


def attentions(seed=0, out=True, **settings):
    """Torch's attention under masks, its masks, and the fan-in attention."""
    torch.manual_seed(seed)
    dense = nn.MultiheadAttention(SIZE, HEADS, **settings).double()
    for bias in (dense.in_proj_bias, dense.out_proj.bias):
        if bias is not None:
            nn.init.normal_(bias)
    masks = constant_fan_in_masks({"in_proj_weight": dense.in_proj_weight, "out_proj.weight": dense.out_proj.weight},
                                  0.4, seed=seed)
    more = constant_fan_in_masks({"v": dense.out_proj.weight}, 0.6, seed=1)["v"]
    masks["in_proj_weight"][2 * SIZE:] = more  # values have more connections
    masks["in_proj_weight"][3] = False  # an ablated neuron
    layer = FanInAttention.from_dense(dense, masks["in_proj_weight"], masks["out_proj.weight"] if out else None)
    if not out:
        del masks["out_proj.weight"]
    return apply_masks(dense, masks), masks, layer


def inputs(kind, batched, batch_first):
    """query, key, value; "self": one tensor; "cross": two; "apart": three."""
    shape = [(LENGTH if kind == "self" else length, BATCH, SIZE) for length in (LENGTH, SOURCE, SOURCE)]
    x = [torch.randn(one).double() for one in shape]
    x = [x[0]] * 3 if kind == "self" else [x[0], x[1], x[1]] if kind == "cross" else x
    if not batched:
        return [one[:, 0] for one in x]
    return [one.transpose(0, 1).contiguous() for one in x] if batch_first else x


def masks_for(kind, batched, source):
    batch, boolean = BATCH if batched else 1, kind.endswith("bool")
    given = {}
    if "2d" in kind or "3d" in kind:
        shape = (LENGTH, source) if "2d" in kind else (batch * HEADS, LENGTH, source)
        given["attn_mask"] = torch.rand(shape) < 0.3 if boolean else torch.randn(shape).double()
        if boolean:
            given["attn_mask"][..., 0] = False  # a query without any key has no outputs
    if "padding" in kind:
        shape = (batch, source) if batched else (source,)
        given["key_padding_mask"] = torch.rand(shape) < 0.3 if boolean else torch.randn(shape).double()
        if boolean:
            given["key_padding_mask"][..., 0] = False
    return given


def assert_same(dense, layer, x, **given):
    """Outputs, weights and gradients."""
    results = []
    for attention in (dense, layer):
        leaves = {id(one): one.clone().requires_grad_() for one in x}
        y, weights = attention(*(leaves[id(one)] for one in x), **given)
        attention.zero_grad()
        y.sin().sum().backward()
        packed = [attention.in_proj_weight.grad] if attention is dense else [
            one._spread(one.values.grad) for one in (layer.q_proj, layer.k_proj, layer.v_proj)]
        results.append((y.detach(), weights, torch.cat(packed), [leaf.grad for leaf in leaves.values()]))
    (y, weights, gradient, of_x), (found, found_weights, found_gradient, found_of_x) = results
    torch.testing.assert_close(found, y)
    torch.testing.assert_close(found_of_x, of_x)
    assert (found_weights is None) == (weights is None) == (not given.get("need_weights", True))
    if weights is not None:
        torch.testing.assert_close(found_weights, weights)
    kept = torch.cat([one.mask() for one in (layer.q_proj, layer.k_proj, layer.v_proj)])
    torch.testing.assert_close(found_gradient, gradient * kept)


@pytest.mark.parametrize("kind", ["self", "cross", "apart"])
@pytest.mark.parametrize("batched, batch_first", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("need_weights, average", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_same_outputs_weights_and_gradients(kind, batched, batch_first, need_weights, average, bias):
    dense, _, layer = attentions(batch_first=batch_first, bias=bias)
    x = inputs(kind, batched, batch_first)
    assert_same(dense, layer, x, need_weights=need_weights, average_attn_weights=average)


@pytest.mark.parametrize("kind, batched", [
    (shape + end, batched) for shape, end, batched in product(["2d", "3d", "padding", "2d padding", "3d padding"],
                                                              ["", " bool"], [True, False])])
@pytest.mark.parametrize("need_weights", [True, False])
def test_masks_of_every_kind(kind, batched, need_weights):
    dense, _, layer = attentions(batch_first=True)
    assert_same(dense, layer, inputs("apart", batched, True), need_weights=need_weights,
                **masks_for(kind, batched, SOURCE))


@pytest.mark.parametrize("padding", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_causal_attention_needs_its_mask(padding, need_weights):
    dense, _, layer = attentions(batch_first=True)
    x, given = inputs("self", True, True), {"need_weights": need_weights, "is_causal": True}
    if padding:
        given["key_padding_mask"] = torch.zeros(BATCH, LENGTH).bool()
    assert_same(dense, layer, x, attn_mask=CAUSAL, **given)
    with pytest.raises(ValueError, match="is_causal is True and attn_mask None: expected the mask"):
        layer(*x, **given)


def test_dropout_is_applied_in_training_only():
    _, _, layer = attentions(batch_first=True, dropout=0.5)
    x = inputs("self", True, True)
    for need_weights in (True, False):
        one, two = (layer(*x, need_weights=need_weights)[0] for _ in range(2))
        assert not torch.equal(one, two)
    weights = layer(*x, average_attn_weights=False)[1]
    assert 0.3 < (weights == 0).double().mean() < 0.7  # of 300
    layer.eval()
    assert torch.equal(layer(*x)[0], layer(*x)[0])


@pytest.mark.parametrize("settings", [{"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 5}, {"vdim": 5}])
def test_attention_with_further_parameters_is_refused(settings):
    dense = nn.MultiheadAttention(SIZE, HEADS, **settings)
    with pytest.raises(ValueError, match="add_bias_kv, add_zero_attn, kdim or vdim: expected none"):
        FanInAttention.from_dense(dense, torch.ones(3 * SIZE, SIZE).bool())


def test_condense_makes_it_with_or_without_its_output_layer():
    x = inputs("cross", True, True)
    for out in (True, False):
        dense, masks, _ = attentions(out=out, batch_first=True)
        before = copy.deepcopy(dense.state_dict())
        condensed, rest, left = condense(dense, masks)
        assert not rest and not left and isinstance(condensed.out_proj, FanInLinear) == out
        assert_same(dense, condensed, x)
        assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
        own = {tensor.untyped_storage().data_ptr() for tensor in dense.state_dict().values()}
        assert not own & {tensor.untyped_storage().data_ptr() for tensor in condensed.state_dict().values()}


def test_what_condense_leaves():
    class Block(nn.Module):
        def __init__(self, attention):
            super().__init__()
            self.attention = attention

        def forward(self, x):
            return self.attention(x, x, x)[0]

    dense, masks, _ = attentions(batch_first=True)
    model, masks = Block(dense), {f"attention.{name}": mask for name, mask in masks.items()}
    uneven = masks["attention.out_proj.weight"].clone()
    uneven[0] = True
    x, change = torch.randn(2, 3, SIZE).double(), {"attention.out_proj.weight": uneven}
    condensed, rest, reasons = condense(model, masks | change, x)
    assert isinstance(condensed.attention, FanInAttention) and list(rest) == list(reasons) == list(change)
    assert "row 1 of the mask" in reasons["attention.out_proj.weight"] and rest.keys() <= condensed.state_dict().keys()
    torch.testing.assert_close(condensed(x), apply_masks(copy.deepcopy(model), masks | change)(x))
    uneven = masks["attention.in_proj_weight"].index_fill(0, torch.tensor(0), True)
    for change, reason in (({"attention.in_proj_weight": uneven}, "row 1 "),
                           ({"attention.in_proj_bias": torch.arange(3 * SIZE) % 2 == 0}, "in_proj_bias has a mask")):
        with pytest.raises(ValueError, match=f"attention.in_proj_weight: .*{reason}"):
            condense(model, masks | change)
