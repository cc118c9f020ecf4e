"""Masks: what may be pruned in networks of many kinds, masks read from networks that others have pruned, counts by
hand, weights that are really gone and do not come back, and files that say where they came from."""

import json
import re
from dataclasses import asdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from safetensors import safe_open
from torch import nn
from torch.ao.pruning import WeightNormSparsifier
from torch.nn.utils import parametrizations, prune
from torch.optim import optimizer as optimizers

from permask_core.data import load_dataset
from permask_core.masks import (
    apply_masks,
    attach_masks,
    layer_sparsity,
    load_masks,
    masks_of,
    prunable_weights,
    read_provenance,
    save_masks,
    sparsity,
    unprunable,
    watch,
)
from permask_core.models import build_model
from permask_core.models.vision import torchvision
from permask_core.runs.files import digest, save_tensors
from permask_core.runs.store import commit, versions
from permask_core.training import Recipe
from tests.hypotheses import examples

masks = st.dictionaries(st.sampled_from(["fc1.weight", "fc2.weight", "head.weight"]),
                        arrays(bool, array_shapes(max_dims=4, max_side=4)).map(torch.from_numpy), min_size=1)
JAGGED = {"a": torch.tensor([True, False]), "b": torch.tensor([[True, True], [True, False]])}


def test_sparsity_is_the_fraction_of_zeros_of_all_masked_weights():
    assert sparsity(JAGGED) == pytest.approx(2 / 6)
    assert layer_sparsity(JAGGED) == {"a": 0.5, "b": 0.25}


@given(masks)
def test_sparsity_is_the_weighted_mean_of_the_layers(masks):
    sizes = {name: mask.numel() for name, mask in masks.items()}
    by_layer = layer_sparsity(masks)
    assert sparsity(masks) == pytest.approx(sum(by_layer[n] * sizes[n] for n in masks) / sum(sizes.values()))


@pytest.mark.parametrize("bad, message", [
    ({}, "masks are empty"),
    ({"a": torch.ones(2).byte()}, "'a' is torch.uint8 [2]"),
    ({"a": [True]}, "'a' is list"),
    ({"a": torch.ones(0, 3).bool()}, "'a' is torch.bool [0, 3]"),
])
def test_what_is_no_mask_is_refused(tmp_path, bad, message):
    for use in (sparsity, layer_sparsity, lambda m: save_masks(tmp_path / "m", m), lambda m: apply_masks({}, m)):
        with pytest.raises(ValueError, match=re.escape(message)):
            use(bad)
    assert not (tmp_path / "m").exists()


def network_and_masks():
    model = build_model("mlp", (1, 2, 2), 3, width=0.05)
    return model, {name: torch.rand_like(t) > 0.5 for name, t in model.state_dict().items() if t.ndim > 1}


def test_a_module_is_masked_in_place_whatever_its_weights_hold():
    model, masks = network_and_masks()
    parameters, before = dict(model.named_parameters()), {n: t.clone() for n, t in model.state_dict().items()}
    with torch.no_grad():
        for name, mask in masks.items():
            parameters[name][~mask] = torch.tensor(float("nan"))
            parameters[name].view(-1)[(~mask).flatten().nonzero()[0]] = float("inf")
    assert apply_masks(model, masks) is model
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name] and parameter.requires_grad
        assert torch.equal(parameter, torch.where(masks[name], before[name], 0) if name in masks else before[name])


def test_a_state_is_left_alone():
    model, masks = network_and_masks()
    state = model.state_dict()
    state["fc1.weight"] = torch.full_like(state["fc1.weight"], float("nan"))
    masked = apply_masks(state, masks)
    assert state["fc1.weight"].isnan().all()
    assert torch.equal(masked["fc1.weight"] == 0, ~masks["fc1.weight"])
    assert masked.keys() == state.keys() and masked["fc1.bias"] is state["fc1.bias"]


def test_the_first_offending_key_is_named_with_both_shapes():
    model, masks = network_and_masks()
    for target in (model, model.state_dict()):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ValueError, match=r"'fc2.weight' has shape \[6, 5\]: expected \[6, 6\]"):
            apply_masks(target, {**masks, "fc2.weight": masks["fc2.weight"][:, 1:], "head.weight": masks["fc1.weight"]})
        with pytest.raises(ValueError, match=r"'fc9.weight' of shape .* not in the model: expected one of fc1.weight"):
            apply_masks(target, {"fc9.weight": masks["fc1.weight"]})
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@examples(1 / 2)
@given(masks, st.dictionaries(st.sampled_from(["seed", "command", "dataset"]), st.integers() | st.text()))
def test_round_trip_with_provenance(tmp_path_factory, masks, provenance):
    path = tmp_path_factory.mktemp("masks") / "ticket.safetensors"
    save_masks(path, masks, **provenance)
    loaded = load_masks(path)
    assert loaded.keys() == masks.keys() and all(torch.equal(loaded[name], masks[name]) for name in masks)
    with safe_open(path, "pt") as file:  # with safetensors alone
        record = json.loads(file.metadata()["record"])
    assert record == read_provenance(path) and record.items() >= {"kind": "masks", **provenance}.items()
    assert (record["sparsity"], record["layer_sparsity"]) == (sparsity(masks), layer_sparsity(masks))


@pytest.mark.parametrize("record, shown", [({"stage": "dense", "result": {}}, "dense"), ({}, "something else")])
def test_another_kind_of_file_is_refused(tmp_path, record, shown):
    save_tensors(tmp_path / "a", JAGGED, record)
    for read in (load_masks, read_provenance):
        with pytest.raises(ValueError, match=f"holds {shown}.*expected masks"):
            read(tmp_path / "a")
        with pytest.raises(FileNotFoundError, match="no such file"):
            read(tmp_path / "b")


def test_a_file_says_what_its_masks_are_for(tmp_path):
    path, (model, masks), recipe = tmp_path / "masks", network_and_masks(), Recipe(3, 0.1)
    save_masks(path, masks, model=model, data=load_dataset("digits"), recipe=recipe, initial=model.state_dict(), seed=4)
    record = read_provenance(path)
    assert (record["model"], record["data"]) == ("torch.nn.modules.container.Sequential", "digits")
    assert (record["recipe"], record["seed"]) == (asdict(recipe), 4)
    assert (record["commit"], record["versions"]) == (commit(), versions())
    assert record["initial"] == digest(model.state_dict())
    with torch.no_grad():
        model.fc1.weight[0, 0] += 1
    assert record["initial"] != digest(model.state_dict())


def test_masks_are_loaded_against_any_network(tmp_path):
    model, masks = network_and_masks()
    save_masks(tmp_path / "masks", masks)
    other = build_model("mlp", (1, 2, 2), 3, width=0.1)
    for network in (model, model.state_dict()):
        assert load_masks(tmp_path / "masks", network).keys() == masks.keys()
    for network in (other, other.state_dict()):
        with pytest.raises(ValueError, match=r"'fc1.weight' has shape \[6, 4\]: expected \[13, 4\]"):
            load_masks(tmp_path / "masks", network)
    with pytest.raises(ValueError, match=r"'fc1.weight' has shape"):
        save_masks(tmp_path / "others", masks, model=other)
    with pytest.raises(ValueError, match="provenance of the masks cannot be written as JSON.*set"):
        save_masks(tmp_path / "others", masks, command={1})
    assert not (tmp_path / "others").exists()


class Block(nn.Module):
    """A residual block whose names say nothing true."""

    def __init__(self, main=2, skip=("conv", "norm"), joined=torch.add):
        super().__init__()
        self.downsample = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(main)), nn.BatchNorm2d(4))
        layers = {
            "conv": lambda: nn.Conv2d(4, 4, 1), "norm": lambda: nn.BatchNorm2d(4), "pool": lambda: nn.AvgPool2d(1)}
        self.main = nn.Sequential(*(layers[name]() for name in skip))
        self.joined = joined

    def forward(self, x):
        return torch.relu(self.joined(self.main(x), self.downsample(x)))


@pytest.mark.parametrize("block, expected", [
    (Block(), {"main.0"}), (Block(skip=["conv"]), {"main.0"}), (Block(skip=["pool", "conv", "norm"]), {"main.1"}),
    (Block(joined=lambda skip, x: x.add_(skip)), {"main.0"}), (Block(joined=lambda skip, x: x + skip), {"main.0"}),
    (Block(main=1), set()),  # two branches of one convolution each: which is the shortcut?
    (Block(skip=["pool"]), set()), (Block(skip=["conv", "conv"]), set()),
    (Block(joined=lambda skip, x: torch.cat([skip, x], 1)), set()), (Block(joined=torch.mul), set()),
])
def test_a_shortcut_is_found_by_its_place_whatever_its_name(block, expected):
    for prefix, model in (("", block), ("1.", nn.Sequential(nn.Conv2d(3, 4, 1), block, Block(skip=["pool"])))):
        everything = prunable_weights(model, shortcuts=True)
        assert list(everything) == [name for name, tensor in model.state_dict().items() if tensor.ndim > 1]
        assert everything.keys() - prunable_weights(model) == {f"{prefix}{name}.weight" for name in expected}
        assert unprunable(model) == {f"{prefix}{name}.weight": "a projection on a shortcut" for name in expected}
        assert unprunable(model, shortcuts=True) == {}


@pytest.mark.parametrize("name, left", [
    ("resnet18", 3), ("resnet50", 4), ("resnext50_32x4d", 4), ("regnet_y_400mf", 4), ("densenet121", 0),
    ("mobilenet_v2", 0), ("googlenet", 0), ("shufflenet_v2_x0_5", 0), ("vit_b_16", 0)])
def test_shortcuts_of_torchvisions_networks(name, left):
    """Counted in the papers: a projection opens each stage of a ResNet, ResNeXt or RegNet whose channels change."""
    model = torchvision.models.get_model(name, weights=None, **({"init_weights": False} if name == "googlenet" else {}))
    assert [why for why in unprunable(model).values()].count("a projection on a shortcut") == left
    found, reasons = prunable_weights(model), unprunable(model)
    assert found.keys() | reasons.keys() == {key for key, tensor in model.named_parameters() if tensor.ndim > 1}
    assert not found.keys() & reasons.keys() and found.keys() <= model.state_dict().keys()


def test_what_cannot_be_traced_as_a_whole_is_traced_in_parts_or_refused():
    """What a forward calls counts as one step then; only a forward that has branches of its own is refused."""
    class Counting(nn.Module):
        def __init__(self, *layers):
            super().__init__()
            self.stem, self.layers = nn.Conv2d(3, 4, 1), nn.Sequential(*layers)

        def forward(self, x, repeat=1):
            for _ in range(repeat):
                x = self.layers(x)
            return x

    class Outer(Block):
        """Traced without what it calls."""

        def __init__(self):
            super().__init__()
            self.downsample = Untraceable(skip=["pool"])

    class Stopped(Block):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    class Untraceable(Stopped):
        """It has no branch of a single convolution."""

    def names(model):
        return prunable_weights(model, shortcuts=True).keys() - prunable_weights(model).keys()

    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(Outer())
    assert names(Outer()) == {"main.0.weight"}
    assert names(Counting(Block(), Outer(), nn.ReLU())) == {"layers.0.main.0.weight", "layers.1.main.0.weight"}
    with pytest.raises(ValueError, match=r"layers.1 \(Stopped\) cannot be traced by torch.fx .*shortcuts=True"):
        prunable_weights(Counting(Block(), Stopped()))
    assert list(prunable_weights(Stopped(), shortcuts=True, exclude=["main"])) == ["downsample.0.weight",
                                                                                 "downsample.1.weight"]


def test_names_and_places_of_weights():
    linear = nn.Linear(3, 2)
    assert list(prunable_weights(linear)) == ["weight"] and list(linear.state_dict()) == ["weight", "bias"]
    weight = prunable_weights(linear)["weight"]
    assert weight.data_ptr() == linear.weight.data_ptr() and not weight.requires_grad

    attention = nn.MultiheadAttention(4, 2)
    assert list(prunable_weights(attention)) == ["in_proj_weight", "out_proj.weight"]
    apart = prunable_weights(nn.MultiheadAttention(4, 2, kdim=3, vdim=5))
    assert list(apart) == ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]

    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.ConvTranspose1d(3, 4, 2), nn.Embedding(5, 4),
                          nn.LSTM(4, 3), nn.Linear(4, 5))
    assert list(prunable_weights(model)) == ["0.weight", "1.weight", "4.weight"]
    assert unprunable(model) == {"2.weight": "a parameter of Embedding",
                                 **dict.fromkeys(["3.weight_ih_l0", "3.weight_hh_l0"], "a parameter of LSTM")}
    model[4].weight = model[2].weight
    assert "4.weight" in prunable_weights(model) and "2.weight" not in unprunable(model)  # one tensor, listed once
    model.append(nn.Linear(4, 5)).append(model[4])[5].weight = model[4].weight
    assert list(prunable_weights(model)) == ["0.weight", "1.weight", "4.weight"]


def test_transformers_layers_and_packed_experts():
    transformers = pytest.importorskip("transformers")
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9,
                                                                bos_token_id=0, eos_token_id=0))
    assert list(prunable_weights(gpt2)) == [
        *(f"transformer.h.0.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
        "lm_head.weight"]  # which is the token embedding too
    assert list(unprunable(gpt2)) == ["transformer.wpe.weight"]
    mixtral = transformers.MixtralForCausalLM(transformers.MixtralConfig(
        num_hidden_layers=1, hidden_size=8, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=4, vocab_size=9))
    left = unprunable(mixtral)
    assert {name: why for name, why in left.items() if "experts" in name} == {
        f"model.layers.0.mlp.experts.{name}": "a parameter of MixtralExperts" for name in ("gate_up_proj", "down_proj")}


def test_what_is_excluded_remains_dense():
    model = nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), nn.Linear(3, 2))
    assert list(prunable_weights(model, exclude=["0.weight", "1"])) == ["2.weight"]
    assert unprunable(model, exclude=["1.1"]) == {"1.1.weight": "it is excluded"}
    for exclude, message in ((["3"], "'3' has no prunable weight: expected some of 0.weight, 1.0.weight"),
                             (["0.bias"], "'0.bias' has no prunable"), ("0.weight", "exclude is '0.weight': expected")):
        with pytest.raises(ValueError, match=re.escape(message)):
            prunable_weights(model, exclude=exclude)


def test_a_module_declares_what_remains_dense_wherever_it_stands():
    model = build_model("vit_b_16", (3, 16, 16), 10, width=0.05)
    for network in (model, nn.Sequential(nn.Identity(), model)):
        kept = {name for name, why in unprunable(network).items() if why == "its module keeps it dense"}
        assert len(kept) == 12 and all(name.endswith("self_attention.in_proj_weight") for name in kept)


def pruned_as(how, model, masks):
    if how == "zeros":
        return apply_masks(model, masks)
    attach_masks(model, masks)
    return model


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("how", ["zeros", "torch"])
@pytest.mark.parametrize("name", ["mlp", "resnet8"])
def test_masks_that_were_applied_are_read_again(name, how, seed):
    torch.manual_seed(seed)
    model, x = build_model(name, (3, 8, 8), 10, width=0.25, seed=seed), torch.randn(2, 3, 8, 8)
    masks = {name: torch.rand(weight.shape) > 0.6 for name, weight in prunable_weights(model).items()}
    plain = build_model(name, (3, 8, 8), 10, width=0.25, seed=seed)
    expected = apply_masks(plain, masks)(x)
    model = pruned_as(how, model, masks)
    assert torch.equal(model(x), expected)
    assert list(prunable_weights(model)) == list(masks)  # the names of the unpruned network
    for network, weights in ((model, None), (model.state_dict(), masks)):
        found = masks_of(network, weights)
        assert found.keys() == masks.keys() and all(torch.equal(found[key], masks[key]) for key in masks)
        assert sparsity(network, masks) == sparsity(masks) and layer_sparsity(network, masks) == layer_sparsity(masks)
    assert sparsity(model) == sparsity(masks)


def test_a_stored_mask_keeps_a_weight_that_is_zero_and_zeros_alone_do_not():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight[0, 0] = model[1].weight[0, 0] = 0
        model[1].weight[1, 1] = -0.0
    prune.custom_from_mask(model[0], "weight", torch.tensor([[1, 1, 0], [0, 1, 1]]))
    prune.custom_from_mask(model[1], "bias", torch.tensor([0, 1]))
    for network in (model, model.state_dict()):
        assert {name: mask.int().tolist() for name, mask in masks_of(network).items()} == {
            "0.weight": [[1, 1, 0], [0, 1, 1]], "1.weight": [[0, 1], [1, 0]], "1.bias": [0, 1]}
    assert layer_sparsity(model)["0.weight"] == 0.5  # zeros are counted, three of six


def test_masks_of_torchs_parametrizations():
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
    sparsifier = WeightNormSparsifier(sparsity_level=0.5, sparse_block_shape=(1, 1))
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    found = masks_of(model)
    assert torch.equal(found["0.weight"], model[0].weight != 0) and layer_sparsity(found) == {"0.weight": 0.5,
                                                                                             "1.weight": 0}
    # In a state_dict, of whole rows.
    state = {"fc.parametrizations.weight.original": torch.ones(2, 3), "fc.parametrizations.weight.0.mask":
             torch.tensor([True, False])}
    assert masks_of(state)["fc.weight"].tolist() == [[True] * 3, [False] * 3]


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_a_weight_that_is_computed_is_no_tensor_to_prune(norm):
    model = nn.Sequential(norm(nn.Linear(3, 2)), nn.Linear(2, 2))
    assert list(prunable_weights(model)) == list(masks_of(model)) == ["1.weight"] and unprunable(model)


def test_what_else_a_state_holds_has_no_mask():
    state = {"fc.weight": torch.eye(2), "fc.bias": torch.zeros(2), "index": torch.eye(2).long(),
             "causal_mask": torch.eye(2).bool(), "_extra_state": b"", "conv_orig": torch.ones(2, 2)}
    assert {name: mask.sum().item() for name, mask in masks_of(state).items()} == {"fc.weight": 2, "conv_orig": 4}
    assert masks_of(state, iter(["fc.bias"]))["fc.bias"].tolist() == [False, False]


def test_a_shortcut_has_a_mask_if_it_was_pruned():
    model = Block()
    dense = masks_of(model)
    assert dense.keys() == prunable_weights(model).keys() and sparsity(dense) == 0
    with torch.no_grad():
        model.main[0].weight[0] = 0
    assert masks_of(model).keys() - dense.keys() == {"main.0.weight"}
    assert layer_sparsity(model)["main.0.weight"] == 0.25


def test_a_tensor_of_zeros_may_be_untrained_and_is_read_only_by_name():
    model = build_model("vit_b_16", (3, 16, 16), 10, width=0.05)  # its classifier begins at zero
    for network in (model, model.state_dict()):
        with pytest.raises(ValueError, match="is zero everywhere"):
            masks_of(network)
    assert not masks_of(model, ["heads.head.weight"])["heads.head.weight"].any()
    with pytest.raises(ValueError, match="weights has 'head': expected some of class_token"):
        masks_of(model, ["head"])


def test_what_a_network_is_said_to_be_is_compared_with_its_weights():
    model, masks = network_and_masks()
    for network in (model, model.state_dict()):
        dropped = int((~masks["fc1.weight"]).sum())
        with pytest.raises(ValueError, match=f"{dropped} of the {dropped} weights of 'fc1.weight' .* not zero"):
            sparsity(network, masks)
    apply_masks(model, masks)
    with torch.no_grad():
        model.fc1.weight[0] = 0  # more zeros than the masks say are counted
    assert sparsity(model, masks) >= sparsity(masks) and layer_sparsity(model, masks)["fc1.weight"] >= 1 / 6
    with pytest.raises(ValueError, match="two sets of masks"):
        sparsity(masks, masks)
    with pytest.raises(ValueError, match="masks are empty"):
        sparsity({"bias": torch.ones(2)})


OPTIMIZERS = {"sgd": lambda weights: torch.optim.SGD(weights, 0.1, momentum=0.9, weight_decay=1e-2),
              "adamw": lambda weights: torch.optim.AdamW(weights, 1e-2)}


def data_and_network(seed=0):
    generator = torch.Generator().manual_seed(seed)
    model = build_model("mlp", (1, 2, 2), 3, width=0.1, seed=seed)
    masks = {name: torch.rand(weight.shape, generator=generator) > 0.5
             for name, weight in prunable_weights(model).items()}
    return model, masks, torch.randn(20, 1, 2, 2, generator=generator), torch.arange(20) % 3


def step(model, optimizer, x, y, masks=None):
    """A step of somebody's loop, who masks gradients at most."""
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    for name, mask in (masks or {}).items():
        model.get_parameter(name).grad.mul_(mask)
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_that_momentum_revives_are_reported_within_one_step(name):
    model, masks, x, y = data_and_network()
    optimizer = OPTIMIZERS[name](model.parameters())
    step(model, optimizer, x, y)
    apply_masks(model, masks)
    step(model, optimizer, x, y, masks)
    with pytest.raises(ValueError, match="are not zero"):  # although their gradients were masked
        sparsity(model, masks)
    apply_masks(model, masks)
    with pytest.raises(RuntimeError, match=r"after step 1, \d+ of \d+ pruned weights of 'fc1.weight' are not zero, and "
                                           "weights of 2 other tensors"):
        with watch(model, masks):
            for _ in range(5):
                step(model, optimizer, x, y, masks)
    assert_no_hooks(model)


def assert_no_hooks(model):
    assert not model._forward_pre_hooks and not optimizers._global_optimizer_post_hooks


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_repairing_is_applying_the_masks_after_every_step(name, seed):
    model, masks, x, y = data_and_network(seed)
    other = data_and_network(seed)[0]
    optimizer, others = (OPTIMIZERS[name](one.parameters()) for one in (model, other))
    with watch(model, masks, repair=True):
        for _ in range(5):
            step(model, optimizer, x, y)
            assert sparsity(model, masks) == sparsity(masks)
    apply_masks(other, masks)
    for _ in range(5):
        step(other, others, x, y)
        apply_masks(other, masks)
    assert all(torch.equal(tensor, other.state_dict()[key]) for key, tensor in model.state_dict().items())
    assert_no_hooks(model)
    step(model, optimizer, x, y)  # regrows, and nobody watches


def test_a_loop_that_keeps_its_masks_is_left_alone():
    model, masks, x, y = data_and_network()
    free = data_and_network()[0]
    for one, watched in ((model, True), (free, False)):
        optimizer = OPTIMIZERS["sgd"](apply_masks(one, masks).parameters())
        with watch(one, masks) if watched else torch.enable_grad():
            for _ in range(3):
                step(one, optimizer, x, y, masks)
    assert all(torch.equal(tensor, free.state_dict()[key]) for key, tensor in model.state_dict().items())


def test_weights_are_watched_without_an_optimizer_too():
    model, masks, x, _ = data_and_network()
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="after step 0, .*'fc1.weight'"), watch(model, masks):
        pytest.fail("it was dense from the start")
    apply_masks(model, masks)
    with pytest.raises(RuntimeError, match="after step 0"), watch(model, masks):
        model.load_state_dict(dense)
        model(x)
        pytest.fail("seen before the forward pass")
    apply_masks(model, masks)
    with pytest.raises(RuntimeError, match="pruned weights of 'head.weight' are not zero: "), watch(model, masks):
        model.head.weight.data.add_(1)  # neither a step nor a forward pass follows
    apply_masks(model, masks)
    with pytest.raises(RuntimeError, match="after step 0, .* 'head.weight'"), watch(model, masks):
        for _ in range(2):  # as a loop without an optimizer would
            model(x)
            model.head.weight.data.add_(1)
        pytest.fail("seen before the second forward pass")
    assert_no_hooks(model)
    with watch(model, masks, repair=True):
        model.load_state_dict(dense, assign=True)
        for parameter in model.parameters():
            parameter.requires_grad_()
        (model(x).sum() + model(2 * x).sum()).backward()  # two passes before one backward
    assert sparsity(model, masks) == sparsity(masks)


def test_a_state_that_is_loaded_after_a_step_is_seen_before_the_next_one():
    model, masks, x, y = data_and_network()
    dense, optimizer = model.state_dict(), OPTIMIZERS["sgd"](model.parameters())
    dense = {name: tensor.clone() for name, tensor in dense.items()}
    apply_masks(model, masks)
    with pytest.raises(RuntimeError, match="after step 2, "), watch(model, masks):
        for _ in range(2):
            step(model, optimizer, x, y, masks)
        model.load_state_dict(dense)
        step(model, optimizer, x, y, masks)
        pytest.fail("seen before the forward pass")


def test_steps_are_those_of_the_networks_own_optimizer():
    model, masks, x, y = data_and_network()
    other = data_and_network()[0]
    optimizer, others = (OPTIMIZERS["sgd"](one.parameters()) for one in (apply_masks(model, masks), other))
    with pytest.raises(RuntimeError, match="after step 1, "), watch(model, masks):
        for _ in range(3):
            step(other, others, x, y)
        step(model, optimizer, x, y)


def test_masks_that_do_not_fit_are_refused_before_the_block():
    model, masks, _, _ = data_and_network()
    for use in (watch, attach_masks):
        with pytest.raises(ValueError, match="'fc9.weight' of shape .*, which is not in the model"):
            with use(model, {"fc9.weight": masks["fc1.weight"]}):
                pytest.fail("entered")
    assert_no_hooks(model)
    assert list(model.state_dict()) == list(data_and_network()[0].state_dict())
