"""Weight matching next to two other programs, on networks that all of them support.

The programs are rebasin 0.0.47 (`pip install rebasin==0.0.47`, which traces the network by itself) and the PyTorch port
of Git Re-Basin at https://github.com/themrzmaster/git-re-basin-pytorch (`--port FOLDER`, a clone). The port has the
symmetries of a few networks in its source; here it gets the groups that permask found, and its time is the search
alone. Each program permutes network B to be close to network A: two new networks with drawn BatchNorm parameters, or A
and a permuted copy. All run in one process on one thread, in turn. Measured are seconds of processor time; the gain,
the inner product of all parameters of A and of the permuted B, minus that before the permutation; the change of B's
output, in standard deviations (0 up to rounding, if the permutation is a symmetry of the network); and for the copy,
the share of its parameters that are back in their place, averaged over tensors.

Results are written to permask_core/data/measured/matching_peers.json network by network. Run it with
`python benchmarks/matching_peers.py --port FOLDER`; it takes half an hour.
"""

import argparse
import contextlib
import copy
import importlib.util
import io
import statistics
import time
from pathlib import Path

import torch
from _machine import at_least, written

import permask_core
from permask_core.matching import match_weights, permutation_groups, permute, random_permutations
from permask_core.models import build_model
from permask_core.runs.store import commit, device_name, versions

RESULT = Path(permask_core.__file__).parent / "data" / "measured" / "matching_peers.json"
NETWORKS = {  # name of the model, width, shape of an image
    "perceptron 784-512-512-10": ("mlp", 4, (1, 28, 28)), "VGG11": ("vgg11", 1, (3, 32, 32)),
    "ResNet20": ("resnet20", 1, (3, 32, 32)), "ResNet20 x 4": ("resnet20", 4, (3, 32, 32)),
    "ResNet50": ("resnet50", 1, (3, 64, 64))}
SMALL = {"perceptron 64-32-32-10": ("mlp", 0.25, (1, 8, 8)), "ResNet20 x 0.25": ("resnet20", 0.25, (3, 32, 32))}


def drawn(name, width, shape, seed):
    """Return a new network in evaluation mode, whose BatchNorm parameters are drawn too. Its statistics are not,
    because some programs do not move them."""
    net = build_model(name, shape, 10, width=width, seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.1, generator=generator)
    return net


# ---- The programs: each returns the state of B after its permutation -------------------------------------------------

def ours(a, b, x):
    groups = permutation_groups(b, x)
    return permute(groups, match_weights(groups, b.state_dict(), a.state_dict()), b.state_dict())


def rebasin(a, b, x):
    from rebasin import PermutationCoordinateDescent

    moved = copy.deepcopy(b)
    PermutationCoordinateDescent(a, moved, x).rebasin()
    return moved.state_dict()


def port_of(folder):
    """Return the search of the port in ``folder`` as a function of (A, B, the groups of B)."""
    spec = importlib.util.spec_from_file_location("port", Path(folder) / "utils" / "weight_matching.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def port(a, b, groups):
        params = [dict(net.named_parameters()) for net in (a, b)]
        axes = {name: [None] * value.ndim for name, value in params[0].items()}
        for name, group in groups.items():
            for entry in group.entries:
                if entry.tensor in axes:
                    axes[entry.tensor][entry.axis] = name
        with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():  # it prints every step
            found = module.weight_matching(module.permutation_spec_from_axes_to_perm(axes), *params)
        return permute(groups, {name: order.long() for name, order in found.items()}, b.state_dict())

    return port


# ---- Measuring -------------------------------------------------------------------------------------------------------

def inner(a, state):
    """Return the inner product of all parameters of a network and those of a state, in float64."""
    return sum(float((weight.double() * state[name].double()).sum()) for name, weight in a.named_parameters())


@torch.no_grad()
def judged(a, b, state, x):
    """Return the gain of a permutation, and how much it changed the output of B."""
    right, moved = b(x).double(), copy.deepcopy(b)
    moved.load_state_dict(state)
    return {"gain": inner(a, state) - inner(a, b.state_dict()),
            "change": float((moved(x).double() - right).abs().max() / right.std()),
            "in_place": statistics.mean(float((weight == state[name]).double().mean())
                                        for name, weight in a.named_parameters())}


def measured(network, programs, repeats):
    """Return the results of all programs on one network, for a new network B and for a permuted copy of A."""
    a, fresh = (drawn(*network, seed) for seed in (0, 1))
    x = torch.randn(8, *network[2], generator=torch.Generator().manual_seed(0))
    groups = permutation_groups(a, x)
    assert all(entry.positions is None and entry.rows is None for group in groups.values() for entry in group.entries)
    planted = copy.deepcopy(a)
    planted.load_state_dict(permute(groups, random_permutations(groups, seed=2), a.state_dict()))
    rows = []
    for pair, b in (("two new networks", fresh), ("a permuted copy", planted)):
        seconds = {name: [] for name in programs}
        for _ in range(repeats):
            for name, program in programs.items():
                start = time.process_time()
                state = program(a, b, groups if name.endswith("port") else x)
                seconds[name].append(time.process_time() - start)
                if len(seconds[name]) == repeats:
                    rows.append({"pair": pair, "program": name, "seconds": seconds[name]} | judged(a, b, state, x))
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--port", help="a clone of git-re-basin-pytorch; default: without it")
    parser.add_argument("--repeats", type=at_least(1), default=3)
    parser.add_argument("--quick", action="store_true", help="small networks, to check that it runs")
    parser.add_argument("--result", type=Path, default=RESULT)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    programs = {"permask": ours}
    if importlib.util.find_spec("rebasin"):
        programs["rebasin 0.0.47"] = rebasin
    if given.port:
        programs["Git Re-Basin, port"] = port_of(given.port)
    shown = f"python benchmarks/matching_peers.py{' --port FOLDER' * bool(given.port)}{' --quick' * given.quick}"
    record = {"command": f"{shown} --repeats {given.repeats}", "commit": commit(), "versions": versions(),
              "device": f"{device_name('cpu')}, one thread", "rows": []}
    for label, network in (SMALL if given.quick else NETWORKS).items():
        for row in measured(network, programs, given.repeats):
            record["rows"].append({"network": label} | row)
            print(f"{label}, {row['pair']}, {row['program']}: {statistics.median(row['seconds']):.2f} s, gain "
                  f"{row['gain']:.4g}, change {row['change']:.1e}, {100 * row['in_place']:.0f} % in place", flush=True)
        written(given.result, record)


if __name__ == "__main__":
    main()
