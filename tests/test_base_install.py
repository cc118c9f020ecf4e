"""A base install, without any extra: what imports and runs there, and what says which extra it needs.

Nothing is installed for it. A fresh process finds only the standard library, this one, and what the base dependencies
of pyproject.toml bring along.
"""

import re
from functools import partial

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests import base_install
from tests.base_install import BASE, PROJECT
from tests.notebooks import ROOT

EXTRAS = PROJECT["optional-dependencies"]
README = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf8"), re.DOTALL)
# Modules that import an extra when they are imported themselves; the others wait until it is needed.
AT_ONCE = {"permask_core.models.vision": "vision", "permask_core.models.imagenet": "vision",
           "permask_core.models.tiny_vit": "vision", "permask_core.models.bert": "vision",
           "permask_core.display": "display"}
LOADED = {f"permask_core.sparse.kernels.{name}" for name in ("shifts", "simd", "triton")}  # where kernels are chosen


@pytest.fixture
def base(tmp_path):
    """Runs code in a process that has a base install, and gives what it printed."""
    return partial(base_install.run, folder=tmp_path)


def modules():
    names = (".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "permask_core").rglob("*.py"))
    return sorted({name.removesuffix(".__init__") for name in names} - LOADED)


def test_the_base_brings_no_extra():
    wanted = {canonicalize_name(Requirement(line).name) for extra in EXTRAS.values() for line in extra}
    assert not wanted & BASE


def test_every_module_imports_or_names_its_extra(base):
    found = dict(line.split(": ", 1) for line in base(f"""
import importlib
for name in {modules()}:
    try:
        importlib.import_module(name)
        print(f"{{name}}: imported")
    except ImportError as error:
        print(f"{{name}}: {{error}}")
""").splitlines())
    for name, outcome in found.items():
        extra = next((extra for room, extra in AT_ONCE.items() if f"{name}.".startswith(f"{room}.")), None)
        assert outcome == "imported" if extra is None else f'pip install "permask[{extra}]"' in outcome, (name, outcome)


def test_what_needs_an_extra_says_which(base):
    calls = {'load_dataset("digits")': "data", 'load_dataset("cifar10")': "vision", 'load_dataset("svhn")': "vision",
             'build_model("resnet50", (3, 32, 32), 10)': "vision", 'build_model("vit_b_16", (3, 32, 32), 10)': "vision",
             'build_model("densenet121", (3, 32, 32), 10)': "vision", 'build_model("bert", (8,), 2)': "text",
             'build_model("tiny_vit_5m", (3, 32, 32), 10)': "vision"}
    printed = base(f"""
from permask_core.data import load_dataset
from permask_core.models import build_model
for call in {list(calls)}:
    try:
        eval(call)
    except ImportError as error:
        print(error)
""")
    for (call, extra), line in zip(calls.items(), printed.splitlines(), strict=True):
        assert line.endswith(f'which is not installed: pip install "permask[{extra}]"') and extra in EXTRAS, call


def test_a_fan_in_layer_without_numba_warns_once_and_computes_the_same(base):
    base("""
import torch, warnings
from permask_core.sparse import FanInLinear
layer = FanInLinear(100, 20, fan_in=10)
x = torch.randn(64, 100)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        y = layer(x)
        y.sum().backward()
said = [str(one.message) for one in caught]
assert len(said) == 1 and 'numba, which is not installed: pip install "permask[cpu]"' in said[0], said
dense = torch.zeros(20, 100).scatter_(1, layer.indices.long(), layer.values.detach())
torch.testing.assert_close(y, x @ dense.T + layer.bias)
""")


def test_predictions_of_a_network_are_stored_found_and_measured(base):
    """Training, matching, masks, a store, connectivity and fairness, on tensors of one's own."""
    base("""
import torch
from permask_core import (Recipe, evaluate, fit, magnitude_masks, match_weights, permutation_groups, permute,
                          prunable_weights)
from permask_core.evaluation.connectivity import barrier, line
from permask_core.evaluation.diversity import diversity, probabilities
from permask_core.evaluation.fairness import chance_level, demographic_parity_difference, difference_interval
from permask_core.models import build_model
from permask_core.runs.store import Store
from permask_core.training import predict

x = torch.randn(200, 1, 4, 4, generator=torch.Generator().manual_seed(0))
data = x, (x.mean((1, 2, 3)) > 0).long()
nets = [build_model("mlp", (1, 4, 4), 2, width=0.1, seed=seed) for seed in range(2)]

def compute():
    for seed, net in enumerate(nets):
        fit(net, data, Recipe(epochs=2, batch_size=50), seed=seed)
    return {f"{i}.{name}": one for i, net in enumerate(nets) for name, one in net.state_dict().items()}, {}

store = Store("runs")
store.stage("train", compute)
store.stage("train", compute)
assert (store.computed, store.found) == (1, 1)
groups = permutation_groups(nets[0], x[:2])
found = match_weights(groups, *(net.state_dict() for net in nets))
masks = permute(groups, found, magnitude_masks(prunable_weights(nets[0]), 0.5))
fit(nets[1], data, Recipe(epochs=1, batch_size=50), seed=0, masks=masks, resume="run.safetensors")
drawn = line(nets[0], permute(groups, found, nets[0].state_dict()), nets[1].state_dict(), data, points=3)
assert barrier(drawn.alphas, drawn.losses) >= 0 and evaluate(nets[1], data).accuracy >= 0
logits = [predict(net, data) for net in nets]
assert 0 <= diversity(probabilities(logits), data[1]).disagreement <= 1
about = {"y_true": data[1], "y_pred": logits[0].argmax(1), "sensitive_features": torch.arange(200) % 2}
print(difference_interval(demographic_parity_difference, **about, draws=50))
print(chance_level(demographic_parity_difference, **about, draws=50))
""")


@pytest.mark.parametrize("example", [one for one in README if "data" not in one or '"trifeature"' in one],
                         ids=lambda one: one.splitlines()[0])
def test_the_examples_of_the_readme_that_need_no_extra_run(example, base):
    base(f"""
import torch
from permask_core import magnitude_masks, prunable_weights
from permask_core.models import build_model
x = torch.randn(8, 1, 8, 8)
net_a, net_b = (build_model("mlp", (1, 8, 8), 10, width=0.25, seed=seed) for seed in range(2))
model, batches = net_a, [(x, torch.arange(8))] * 10
masks = magnitude_masks(prunable_weights(model), 0.9)
optimizer = torch.optim.AdamW(model.parameters())
{example.replace("epochs=12", "epochs=1")}
""")


def test_the_book_is_every_extra_that_a_cpu_can_use():
    (line,) = EXTRAS["book"]
    assert Requirement(line).name == PROJECT["name"] and Requirement(line).extras == EXTRAS.keys() - {"book", "gpu"}


def test_requirements_install_what_pyproject_asks_for():
    """The book is installed from requirements.txt, the package itself without its dependencies."""
    pins = dict(line.split("#")[0].strip().split("==") for line in (ROOT / "requirements.txt").read_text().splitlines()
                if "==" in line)
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    for line in [*PROJECT["dependencies"], *(one for name, extra in EXTRAS.items() if name not in ("book", "gpu")
                                             for one in extra)]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), line
