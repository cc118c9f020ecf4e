"""The scripts of the page "In your own code", run as a user would run them, with a base install."""

import ast
import re

import numpy as np
import pytest
import torch
from torch import nn

from tests import base_install
from tests.notebooks import ROOT

SCRIPTS = sorted((ROOT / "book" / "own_code").glob("*.py"))
NETWORK = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        return (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), Block(12), Block(12), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(12, 2))


def load_net(path):
    net = Net()
    net.load_state_dict(torch.load(path, weights_only=True))
    return net


def load_loader(path):
    data = torch.utils.data.TensorDataset(*torch.load(path, weights_only=True))
    return torch.utils.data.DataLoader(data, batch_size=32)
"""
BATCHES = """
import torch

scaler = torch.amp.GradScaler("cpu")
start = torch.Generator().manual_seed(0)
batches = [(x, (x[:, :10]).argmax(1)) for x in torch.randn(100, 32, 64, generator=start)]
"""


def run(script, folder, more=""):
    return base_install.run((ROOT / f"book/own_code/{script}.py").read_text() + more, folder)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_has_ten_lines_at_most(path):
    body = [node for node in ast.parse(path.read_text()).body if not isinstance(node, (ast.Import, ast.ImportFrom))]
    assert sum(node.end_lineno - node.lineno + 1 for node in body) <= 10
    assert max(map(len, path.read_text().splitlines())) <= 80  # what the page shows
    assert f"own_code/{path.name}" in (ROOT / "book" / "own_code.md").read_text()


@pytest.fixture
def networks(tmp_path):
    """Two networks that were trained a little, and the units of b are those of a moved by a planted permutation."""
    (tmp_path / "network.py").write_text(NETWORK)
    space = {}
    exec(NETWORK, space)
    torch.manual_seed(0)
    net = space["Net"]()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5), nn.init.normal_(module.bias)
            module.momentum = None  # one pass gives the statistics
    with torch.no_grad():
        net[-1].weight.mul_(30)  # so that it is sure of its classes
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(128, 1, 8, 8, generator=generator)
    net.train()(x)  # statistics
    with torch.no_grad():  # as many of each class
        logits = net.eval()(x)
        net[-1].bias[1] -= (logits[:, 1] - logits[:, 0]).median()
    order = torch.randperm(12, generator=generator)
    moved = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for block in ("2", "3"):
        for name in ("conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var"):
            moved[f"{block}.{name}"] = moved[f"{block}.{name}"][order]
        moved[f"{block}.conv2.weight"] = moved[f"{block}.conv2.weight"][:, order]
    torch.save(net.state_dict(), tmp_path / "a.pt")
    torch.save(moved, tmp_path / "b.pt")
    labels = net(x).argmax(1)
    for name in ("train", "test"):
        torch.save((x, labels), tmp_path / f"{name}.pt")
    torch.save(x, tmp_path / "inputs.pt")
    return net.state_dict(), moved, order


def test_a_mask_moves_with_the_units(tmp_path, networks):
    state, moved, order = networks
    pruned = {name: tensor * (tensor.abs() > tensor.abs().median()) if name.endswith("conv1.weight") else tensor
              for name, tensor in state.items()}
    torch.save(pruned, tmp_path / "pruned_a.pt")
    run("move_a_mask", tmp_path)
    masked = torch.load(tmp_path / "masked_b.pt", weights_only=True)
    for name in ("2.conv1.weight", "3.conv1.weight"):
        assert torch.equal(masked[name] != 0, (pruned[name] != 0)[order])  # the planted permutation is found
        assert torch.equal(masked[name], moved[name] * (masked[name] != 0))


def test_an_aligned_network_meets_no_barrier(tmp_path, networks):
    printed = run("interpolate", tmp_path)
    apart, aligned = (float(value) for value in re.findall(r"a barrier of (-?[\d.]+)", printed))
    assert aligned < apart / 4 and apart > 0.1


def test_a_merge_is_diagnosed(tmp_path, networks):
    moved = networks[1]
    torch.save(moved | {"2.bn1.running_var": 100 + moved["2.bn1.running_var"]}, tmp_path / "wrong_b.pt")
    again = 'print("---")\nnet_b = load_net("wrong_b.pt")\nprint(diagnose(net_a, net_b, load_loader("test.pt")))\n'
    right, wrong = run("diagnose", tmp_path, again).split("---\n")
    assert right.startswith("A and B merge")
    healthy, first, *_ = wrong.splitlines()
    assert healthy.startswith("A and B do not merge") and " statistics: With a reset" in first


@pytest.mark.parametrize("script", ["srigl", "srigl_scaled"])
def test_connections_move_in_a_loop_of_ones_own(tmp_path, script):
    (tmp_path / "batches.py").write_text(BATCHES)
    printed = run(script, tmp_path, """
fan_in = topology.fan_in["0.weight"]
print(topology.done, [len(one) for one in topology.fan_in.values()])
for one in (fan_in[0], fan_in[-1]):
    print(int(one.max()), int((one > 0).sum()), int(one.sum()))
""")
    steps, before, after = printed.splitlines()
    assert steps == "100 [8, 8]"  # the start and seven rewirings, until three quarters of the steps
    assert before == "6 256 1536"
    fan_in, neurons, connections = map(int, after.split())
    assert connections == fan_in * neurons  # every neuron that was not ablated has the same number
    assert neurons <= 256 and 6 <= fan_in <= 1536 // neurons  # and gets those of the others, rounded down


def test_a_table_of_predictions_is_all_that_fairness_needs(tmp_path):
    generator = np.random.default_rng(0)
    columns = generator.integers(2, size=(4, 400))
    rows = "\n".join(f"{y},{p},{'old' if a else 'young'},{'f' if s else 'm'}" for y, p, a, s in columns.T)
    (tmp_path / "predictions.csv").write_text(f"label,prediction,age,sex\n{rows}\n")
    interval, chance = run("fairness", tmp_path).strip().split("; by chance ")
    value, low, high = (float(one) for one in re.findall(r"-?[\d.]+", interval)[:3])
    mean, most = (float(one) for one in re.findall(r"[\d.]+", chance))
    assert 0 <= low <= value <= high <= 100 and mean < most
