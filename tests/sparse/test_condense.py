"""condense: the same outputs as the masked model from fan-in layers, and which layers are not replaced, and why."""

import copy
import io
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from permask_core.masks import apply_masks, check_fit
from permask_core.models import build_model, evaluation_mode
from permask_core.models.vision import torchvision
from permask_core.sparse import FanInAttention, FanInConv2d, FanInLayer, FanInLinear, condense
from permask_core.sparse.dynamic import constant_fan_in_masks
from permask_core.training import Recipe, fit

X, WIDE = (2, 5), (2, 4, 6, 5)
SWIN = {"swin_t": lambda **sizes: torchvision.models.SwinTransformer(**sizes),
        "swin_v2_t": lambda **sizes: torchvision.models.SwinTransformer(
            **sizes, block=torchvision.models.swin_transformer.SwinTransformerBlockV2,
            downsample_layer=torchvision.models.swin_transformer.PatchMergingV2)}


def masks_of(model, *names, density=0.4, seed=0):
    """For the weights of linear layers and convolutions, or those named."""
    state = model.state_dict()
    names = names or [f"{name}.weight" for name, module in model.named_modules()
                      if isinstance(module, nn.Linear | nn.Conv2d)]
    return constant_fan_in_masks({name: state[name] for name in names}, density, seed=seed)


def assert_condensed(model, masks, x, left=()):
    """The condensed copy agrees with the masked model, and the model itself is as before."""
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    condensed, rest, reasons = condense(model, masks, x)
    assert set(reasons) == set(left) and all(reasons.values())
    assert rest.keys() == set(left) and all(torch.equal(mask, masks[name]) for name, mask in rest.items())
    assert condense(model, masks).left == reasons  # what these models read is seen in their code, too
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with evaluation_mode(condensed):
        found = condensed(x)
    with evaluation_mode(masked := apply_masks(copy.deepcopy(model), masks)):
        wanted = masked(x)
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    assert not own & {tensor.untyped_storage().data_ptr() for tensor in condensed.state_dict().values()}
    for name in masks:
        module = condensed.get_submodule(name.rpartition(".")[0])
        assert isinstance(module, FanInLayer | FanInAttention) == (name not in left)
    return condensed


def assert_trains_and_loads(model, masks, condensed, x):
    """Gradients are those of the masked dense model, a step uses them, and a file goes into another condensed copy."""
    model, condensed, x = apply_masks(copy.deepcopy(model), masks).double(), condensed.double(), x.double()
    for network in (model.train(), condensed.train()):
        nn.functional.cross_entropy(network(x), torch.arange(len(x)) % 3).backward()
    found, wanted = dict(condensed.named_parameters()), dict(model.named_parameters())
    layers = {name: module for name, module in condensed.named_modules() if isinstance(module, FanInLayer)}
    for name, attention in model.named_modules():  # its packed parameters as those of three layers
        if isinstance(attention, nn.MultiheadAttention) and isinstance(condensed.get_submodule(name), FanInAttention):
            for kind in ("weight", "bias"):
                packed = wanted.pop(f"{name}.in_proj_{kind}").grad.chunk(3)
                wanted |= {f"{name}.{one}_proj.{kind}": SimpleNamespace(grad=part) for one, part in zip("qkv", packed)}
    for name, layer in layers.items():
        grad = wanted.pop(f"{name}.weight").grad.flatten(1)
        torch.testing.assert_close(layer.values.grad, grad[layer.rows].gather(1, layer.indices.long()))
        assert layer.values.grad.any() or not grad.any()
        del found[f"{name}.values"]
    for name, parameter in wanted.items():
        torch.testing.assert_close(found[name].grad, parameter.grad)
    before = [layer.values.detach().clone() for layer in layers.values()]
    torch.optim.SGD(condensed.parameters(), 0.01, momentum=0.9).step()
    for old, layer in zip(before, layers.values()):
        torch.testing.assert_close(layer.values, old - 0.01 * layer.values.grad)
    file = io.BytesIO()
    torch.save(condensed.state_dict(), file)
    file.seek(0)
    other = condense(model, {name: mask.roll(1, 1) for name, mask in masks.items()}).model
    other.load_state_dict(torch.load(file, weights_only=True))
    with evaluation_mode(condensed, other):
        assert torch.equal(condensed(x), other(x)) and condensed(x).isfinite().all()


def test_mlp():
    model = build_model("mlp", (1, 8, 8), 10, width=0.2)
    masks, x = masks_of(model), torch.randn(5, 1, 8, 8)
    assert list(masks) == ["fc1.weight", "fc2.weight", "head.weight"]
    condensed = assert_condensed(model, masks, x)
    for name, mask in masks.items():
        layer = condensed.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(layer.mask(), mask)
    assert_trains_and_loads(model, masks, condensed, x)
    sizes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert not [t for t in condensed.state_dict().values() if t.ndim == 2 and t.shape in sizes.values()]


def test_vit_with_its_attention():
    model = build_model("vit_b_16", (3, 32, 32), 4, width=1 / 12)
    nn.init.normal_(model.heads.head.weight)  # torchvision's is 0, behind which nothing could go wrong
    weights = [name for name, tensor in model.named_parameters() if tensor.ndim == 2]
    masks, x = masks_of(model, *weights), torch.randn(2, 3, 32, 32)
    condensed = assert_condensed(model, masks, x)
    attention = condensed.encoder.layers[0].self_attention
    assert isinstance(attention, FanInAttention) and isinstance(attention.out_proj, FanInLinear)
    assert_trains_and_loads(model, masks, condensed, x)


NETWORKS = {"resnet18": lambda: torchvision.models.resnet18(num_classes=3),
            "resnet50": lambda: build_model("resnet50", (3, 32, 32), 3, width=0.125),
            "resnext50": lambda: torchvision.models.ResNet(
                torchvision.models.resnet.Bottleneck, [1, 1, 2, 1], num_classes=3, groups=8, width_per_group=2),
            "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=3, width_mult=0.35, dropout=0.0)}


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("part", ["", "linear1"])
@pytest.mark.parametrize("example", [False, True])
def test_torchs_encoder(activation, part, example):
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(12, 2, 20, dropout=0.0, activation=activation, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(3, 5, 12)
    weights = {name: w for name, w in model.named_parameters() if w.ndim == 2 and part in name}
    masks = constant_fan_in_masks(weights, 0.3, seed=1)
    condensed = condense(model, masks, x if example else None)
    assert not condensed.left and not condensed.masks
    assert sum(isinstance(module, FanInLayer) for module in condensed.model.modules()) == (2 if part else 12)
    masked = apply_masks(copy.deepcopy(model), masks)
    padded = torch.zeros(3, 5, dtype=torch.bool)
    padded[1, 3:] = True  # left-aligned, for which torch has a path of its own
    for training, grad, padding in ((False, False, None), (False, False, padded), (True, True, padded)):
        with torch.set_grad_enabled(grad):
            outputs = [one.train(training)(x, src_key_padding_mask=padding) for one in (condensed.model, masked)]
        there = slice(None) if padding is None else ~padding
        torch.testing.assert_close(*(one[there] for one in outputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_convolution_of_a_network_is_replaced_unless_it_is_depthwise(name):
    """Those of 7x7, 3x3 and 1x1, with strides and in groups. Statistics of BatchNorm have been moved."""
    torch.manual_seed(0)
    model, x = NETWORKS[name](), torch.randn(4, 3, 32, 32)
    model(x)
    masks = masks_of(model)
    convolutions = {f"{name}.weight": one for name, one in model.named_modules() if isinstance(one, nn.Conv2d)}
    left = [name for name, conv in convolutions.items() if 1 < conv.groups == conv.in_channels]
    kinds = {(conv.kernel_size, conv.stride, conv.groups > 1) for conv in convolutions.values()}
    assert len(masks) > 20 and len(kinds) >= 4 and len(left) == {"mobilenet_v2": 17}.get(name, 0)
    assert any(grouped for *_, grouped in kinds) == (name in ("mobilenet_v2", "resnext50"))
    condensed = assert_condensed(model, masks, x, left)
    assert all("depthwise" in reason for reason in condense(model, masks).left.values())
    replaced = masks.keys() - {*left}
    assert sum(isinstance(layer, FanInConv2d) for layer in condensed.modules()) == len(replaced) - 1  # one is linear
    assert_trains_and_loads(model, masks, condensed, x)
    exact, masked = copy.deepcopy(condensed).double().eval(), apply_masks(copy.deepcopy(model), masks).double().eval()
    with torch.no_grad():
        masked.load_state_dict({**masked.state_dict(), **{
            key: exact.get_submodule(key.removesuffix(".weight")).to_dense().weight if key in replaced
            else exact.state_dict()[key] for key in masked.state_dict()}})  # after the step that training took
        torch.testing.assert_close(exact(x.double()), masked(x.double()), rtol=1e-10, atol=1e-10)


def test_a_network_of_depthwise_convolutions_only_is_refused():
    """Also with several filters for each channel. With one input channel a convolution has no groups."""
    for channels, filters in ((4, 4), (4, 12)):
        conv = nn.Conv2d(channels, filters, 3, groups=channels)
        with pytest.raises(ValueError, match="no layer can be replaced: weight: it is a depthwise convolution"):
            condense(conv, masks_of(conv, "weight"))
    for conv in (nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=2)):
        assert isinstance(condense(conv, masks_of(conv, "weight")).model, FanInConv2d)


def test_a_model_that_is_one_layer():
    for layer, x in ((nn.Linear(5, 4), torch.randn(X)), (nn.Conv2d(4, 3, 1), torch.randn(WIDE))):
        masks = constant_fan_in_masks({"weight": layer.weight}, 0.4, seed=0)
        condensed, rest, left = condense(layer, masks, x)
        assert not left and not rest and isinstance(condensed, FanInLayer)
        torch.testing.assert_close(condensed(x), apply_masks(layer, masks)(x))


def test_every_reason_to_leave_a_layer():
    model = nn.ModuleDict({
        "good": nn.Linear(5, 4), "full": nn.Linear(5, 4), "jagged": nn.Linear(5, 4), "none": nn.Linear(5, 4),
        "line": nn.Conv1d(4, 4, 3), "volume": nn.Conv3d(4, 4, 3), "transposed": nn.ConvTranspose2d(4, 4, 1),
        "norm": nn.LayerNorm(5), "embedding": nn.Embedding(5, 4), "subclass": type("Mine", (nn.Linear,), {})(5, 4)})
    masks = {f"{name}.weight": torch.zeros_like(module.weight, dtype=torch.bool) for name, module in model.items()}
    for mask in masks.values():
        mask.view(len(mask), -1)[:, 0] = True
    masks["full.weight"][:] = True
    masks["none.weight"][:] = False
    masks["jagged.weight"][1, :3] = True
    masks["good.bias"] = torch.tensor([True, False, True, False])
    before = copy.deepcopy(model.state_dict())
    condensed, rest, left = condense(model, masks)
    assert rest.keys() == left.keys() and set(masks) - set(left) == {"good.weight"}
    for name, reason in {"full.weight": "keeps every weight", "jagged.weight": "row 1 of the mask has 3",
                         "none.weight": "keeps nothing", "line.weight": "Conv1d", "volume.weight": "Conv3d",
                         "transposed.weight": "ConvTranspose2d", "norm.weight": "LayerNorm",
                         "embedding.weight": "Embedding", "subclass.weight": "Mine", "good.bias": "bias"}.items():
        assert reason in left[name], name
    for name, mask in masks.items():  # the rest is masked
        if name in left and name != "good.bias":
            tensor = condensed.state_dict()[name]
            assert torch.equal(tensor, before[name].masked_fill(~mask, 0)), name
    assert torch.equal(condensed["good"].bias, before["good.bias"] * masks["good.bias"])
    x = torch.randn(X)
    with torch.no_grad():
        torch.testing.assert_close(condensed["good"](x), apply_masks(copy.deepcopy(model), masks)["good"](x))


def test_nothing_to_replace_is_an_error_with_the_reasons():
    model = nn.Sequential(nn.Linear(5, 4), nn.Conv2d(4, 4, 3))
    masks = {name: torch.ones_like(model.state_dict()[name], dtype=torch.bool) for name in ("0.weight", "1.weight")}
    masks["1.weight"][1, 0] = False
    with pytest.raises(ValueError, match="no layer can be replaced: 0.weight: .*every weight; 1.weight: row 1"):
        condense(model, masks)
    with pytest.raises(ValueError, match="masks are empty"):
        condense(model, {})
    with pytest.raises(ValueError, match="'2.weight'"):
        condense(model, {"2.weight": torch.ones(4, 5).bool()})
    with pytest.raises(ValueError, match=r"'0.weight' has shape \[5, 4\]"):
        condense(model, {"0.weight": torch.ones(5, 4).bool()})


def test_tied_weights_stay_tied():
    for tie in ("weight", "module"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        if tie == "weight":
            model[2].weight = model[0].weight
        else:
            model[2] = model[0]
        masks = masks_of(model, "0.weight", "1.weight")
        condensed = assert_condensed(model, masks, torch.randn(3, 4), ["0.weight"])
        assert condensed[0].weight is condensed[2].weight and "shared" in condense(model, masks).left["0.weight"]


def test_tied_biases_stay_tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].bias = model[0].bias
    condensed = condense(model, masks_of(model)).model
    assert condensed[0].bias is condensed[2].bias


def mixed():
    return nn.Sequential(nn.Conv2d(4, 4, 1), nn.Dropout(), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(24, 3))


@pytest.mark.parametrize("training", [True, False])
def test_modes_and_types_are_kept(training):
    model = mixed().double().train(training)
    model[1].train(not training)
    condensed, _, left = condense(model, masks_of(model))
    assert not left and condensed(torch.randn(2, 4, 3, 2, dtype=torch.float64)).dtype == torch.float64
    assert [module.training for module in condensed] == [module.training for module in model]
    assert {module.training for module in condensed[0].modules()} == {training}
    assert {parameter.dtype for parameter in condensed.parameters()} == {torch.float64}


def test_frozen_parameters_stay_frozen():
    model = mixed()
    model[0].requires_grad_(False)
    model[4].bias.requires_grad_(False)
    condensed = condense(model, masks_of(model)).model
    assert not any(parameter.requires_grad for parameter in condensed[0].parameters())
    assert all(parameter.requires_grad for parameter in condensed[2].parameters())
    assert condensed[4].values.requires_grad and not condensed[4].bias.requires_grad


def test_a_model_on_another_device_stays_there():
    model = nn.Sequential(nn.Linear(5, 4).to("meta"), nn.Linear(4, 3))
    condensed, _, left = condense(model, masks_of(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)), "1.weight"))
    assert condensed[0].weight.is_meta and condensed[1].values.device.type == "cpu" and not left


class Viewing(nn.Module):
    """A network that views what a convolution gives, which needs its order of memory."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(4, 6, 1), nn.Linear(6 * 30, 3)

    def forward(self, x):
        y = self.conv(x)
        return self.head(y.view(len(y), -1))


def test_outputs_of_convolutions_can_be_viewed_as_before():
    model = Viewing()
    assert_condensed(model, masks_of(model), torch.randn(WIDE))


class Fused(nn.Module):
    """Attention and a layer whose weights are read in evaluation mode alone, as a fused kernel would."""

    def __init__(self):
        super().__init__()
        self.attention, self.linear = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

    def forward(self, x):
        if self.training:
            return self.linear(self.attention(x, x, x, need_weights=False)[0])
        own, last = (self.attention.in_proj_weight, self.attention.in_proj_bias), self.attention.out_proj.bias
        mixed = nn.functional.multi_head_attention_forward(
            *3 * (x.transpose(0, 1),), 8, 2, *own, None, None, False, 0.0, self.attention.out_proj.weight, last,
            need_weights=False)[0]
        return nn.functional.linear(mixed.transpose(0, 1), self.linear.weight, self.linear.bias)


@pytest.mark.parametrize("training", [True, False])
def test_layers_whose_weight_the_module_around_them_reads_are_left(training):
    model = nn.Sequential(Fused(), nn.Linear(8, 3)).train(training)
    left = ["0.attention.in_proj_weight", "0.attention.out_proj.weight", "0.linear.weight"]
    masks = masks_of(model, *left, "1.weight")
    assert_condensed(model, masks, torch.randn(2, 4, 8), left)
    found = condense(model, masks).left
    assert "not only call it but reads its weight" in found["0.linear.weight"]
    assert "reads its in_proj_weight" in found["0.attention.in_proj_weight"]


@pytest.mark.parametrize("version", ["swin_t", "swin_v2_t"])
def test_swin_keeps_its_attention(version):
    """Its qkv and proj are plain linear layers, whose weights it hands to a function."""
    model = SWIN[version](patch_size=[2, 2], embed_dim=8, depths=[2, 1], num_heads=[2, 4], window_size=[2, 2],
                          num_classes=3, stochastic_depth_prob=0.0)
    masks = masks_of(model)
    left = [name for name in masks if name.endswith(("attn.qkv.weight", "attn.proj.weight"))]
    assert len(left) == 6 and len(masks) > len(left) + 6
    condensed = assert_condensed(model, masks, torch.randn(2, 3, 16, 16), left)
    assert_trains_and_loads(model, masks, condensed, torch.randn(2, 3, 16, 16))


class Reading(nn.Module):
    """It reads the first layer's weight from afar and the second one's number of channels, which any layer has."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)])

    def forward(self, x, *, scale):
        first, second, third = self.layers
        x = nn.functional.linear(x * scale, first.weight, first.bias)
        x = second(x.view(-1, second.out_channels, 1, 1)).flatten(1)
        return third(x)


def test_an_example_shows_what_is_read_elsewhere():
    model, inputs = Reading(), {"x": torch.randn(2, 4), "scale": torch.tensor(2.0)}
    masks, before = masks_of(model), copy.deepcopy(model.state_dict())
    condensed, rest, left = condense(model, masks, inputs)
    assert list(left) == list(rest) == ["layers.0.weight"] and "reads its weight, which" in left["layers.0.weight"]
    assert [type(layer) for layer in condensed.layers] == [nn.Linear, FanInConv2d, FanInLinear]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(condensed(**inputs), apply_masks(copy.deepcopy(model), masks)(**inputs))
    with pytest.raises(AttributeError, match="has no attribute 'weight'"):  # without an example nobody can know
        condense(model, masks).model(**inputs)


def test_the_masks_that_remain_train_what_remains():
    """Also those of biases."""
    model = mixed()
    masks = masks_of(model, "0.weight", "4.weight") | {"0.bias": torch.tensor([True, False, True, True]),
                                                       "2.weight": torch.rand(4, 4, 1, 1) < 0.5}
    masks["2.weight"][0], masks["2.weight"][1] = True, False
    masks["2.weight"][2, 1:] = False
    masks["2.weight"][2, 0] = True
    condensed, rest, left = condense(model, masks)
    assert set(left) == {"0.bias", "2.weight"} and set(rest) == {"0.bias", "2.weight"}
    check_fit(rest, condensed.state_dict())
    x, y = torch.randn(20, 4, 3, 2), torch.arange(20) % 3
    fit(condensed, (x, y), Recipe(2, batch_size=10), seed=0, masks=rest, description=None)
    assert all((tensor[~rest[name]] == 0).all() for name, tensor in condensed.state_dict().items() if name in rest)


def test_hooks_are_not_lost():
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    model[0].register_forward_hook(lambda module, args, y: y + 1)
    model[1].register_forward_pre_hook(lambda module, args: (2 * args[0],))
    masks, x = masks_of(model), torch.randn(X)
    try:
        condensed = condense(model, masks).model
    except ValueError:
        return  # nothing could be replaced
    with torch.no_grad():
        torch.testing.assert_close(condensed(x), apply_masks(copy.deepcopy(model), masks)(x))


def test_parametrised_layers_are_left():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)), nn.Linear(4, 3))
    name = next(name for name in model.state_dict() if name.endswith("original1"))
    masks = masks_of(model, name, "1.weight")
    condensed, _, left = condense(model, masks)
    assert list(left) == [name]
    with torch.no_grad():
        x = torch.randn(X)
        torch.testing.assert_close(condensed(x), apply_masks(copy.deepcopy(model), masks)(x))
