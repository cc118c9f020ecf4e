"""Masks: counts by hand, weights that are really gone, and files that say where they came from."""

import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from safetensors import safe_open

from permask_core.masks import apply_masks, layer_sparsity, load_masks, save_masks, sparsity
from permask_core.models import build_model
from permask_core.runs.files import save_tensors
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
    ({"a": torch.ones(2)}, "'a' is torch.float32 [2]"),
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
        with pytest.raises(ValueError, match=r"'fc2.weight' has shape \[6, 5\], its tensor \[6, 6\]"):
            apply_masks(target, {**masks, "fc2.weight": masks["fc2.weight"][:, 1:], "head.weight": masks["fc1.weight"]})
        with pytest.raises(ValueError, match=r"'fc9.weight' of shape \[6, 4\] has no tensor .* one of fc1.weight"):
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
        assert json.loads(file.metadata()["record"]) == {"kind": "masks", **provenance}


@pytest.mark.parametrize("record, shown", [({"stage": "dense", "result": {}}, "dense"), ({}, "something else")])
def test_another_kind_of_file_is_refused(tmp_path, record, shown):
    save_tensors(tmp_path / "a", JAGGED, record)
    with pytest.raises(ValueError, match=f"holds {shown}.*expected masks"):
        load_masks(tmp_path / "a")
