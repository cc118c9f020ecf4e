"""A training run on disk, with its progress and its settings, so that it can continue after an interruption."""

import hashlib
import json
from dataclasses import is_dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from permask_core.runs.files import digest, load_tensors, save_tensors


class Run(NamedTuple):
    """A run after ``done`` steps: its ``state``, its ``checkpoints`` by name, the mean ``losses`` of finished epochs,
    the state of the ``optimizer`` with names "weight/quantity", and of the current epoch ``totals`` [processes], the
    sum of losses in each process, and the number of examples ``seen``. With moving connections also the current
    ``masks`` and the history ``fan_in``, or the states of the ``generators`` that draw connections."""

    state: dict[str, torch.Tensor]
    checkpoints: dict[str, dict[str, torch.Tensor]]
    losses: list[float]
    optimizer: dict[str, torch.Tensor]
    totals: torch.Tensor
    done: int
    masks: dict[str, torch.Tensor] = {}
    fan_in: dict[str, torch.Tensor] = {}
    generators: dict[str, torch.Tensor] = {}
    seen: int = 0


_MOVING = ("masks", "fan_in", "generators")


def save_run(path, run, identity):
    """Write a run and its ``identity``, the settings that determine it, a dict that JSON holds."""
    tensors = {f"state/{name}": tensor for name, tensor in run.state.items()}
    tensors |= {f"checkpoint/{name}/{key}": tensor for name, state in run.checkpoints.items()
                for key, tensor in state.items()}
    for kind in ("optimizer", *_MOVING):
        tensors |= {f"{kind}/{name}": tensor for name, tensor in getattr(run, kind).items()}
    save_tensors(path, {**tensors, "totals": run.totals},
                 {"kind": "run", "identity": identity, "losses": run.losses, "done": run.done, "seen": run.seen})


def load_run(path, identity):
    """Read a run that :func:`save_run` wrote.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is damaged, does not hold a run, or holds a run with a different identity; the message lists the
        differences.
    """
    tensors, record = load_tensors(path)
    if record.get("kind") != "run":
        raise ValueError(f"{path} holds {record.get('stage') or record.get('kind')!r}: expected a run to resume")
    differ = [f"{name} {record['identity'].get(name)!r} (here {value!r})" for name, value in identity.items()
              if record["identity"].get(name) != value]
    if differ:
        again = " (if the model was already trained, build it again)" * any(
            text.startswith("initial weights") for text in differ)
        raise ValueError(f"{path} belongs to a run with {', '.join(differ)}: give another file, or delete it{again}")
    parts, checkpoints = {kind: {} for kind in ("state", "optimizer", *_MOVING)}, {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        if kind in parts:
            parts[kind][rest] = tensor
        elif kind == "checkpoint":
            checkpoint, _, key = rest.partition("/")
            checkpoints.setdefault(checkpoint, {})[key] = tensor
    return Run(checkpoints=checkpoints, losses=record["losses"], totals=tensors["totals"], done=record["done"],
               seen=record.get("seen", 0), **parts)


def find_run(path, identity):
    """Return :func:`load_run`, or None if there is no path or no file."""
    return load_run(path, identity) if path and Path(path).exists() else None


def describe(value):
    """Return a summary of data in a form for JSON, without the folder of files, the number of reading processes, and
    attributes that training does not use."""
    if isinstance(value, torch.nn.Module):
        return digest(value.state_dict())
    if hasattr(value, "indptr"):  # a SciPy CSR array
        return digest({name: getattr(value, name) for name in ("data", "indices", "indptr")})
    if hasattr(value, "dtype"):
        return digest({"": value})
    if is_dataclass(value):
        parts = {**vars(value), **({"sizes": value.sizes} if hasattr(value, "sizes") else {})}
        return {name: describe(part) for name, part in parts.items() if name not in ("root", "readers", "attributes")}
    return value


def fingerprint(*values):
    """Return a short hash of data, from :func:`describe`."""
    return hashlib.sha256(json.dumps([describe(value) for value in values], sort_keys=True).encode()).hexdigest()[:16]


def optimizer_state(optimizer, parameters):
    """Return the state of an optimizer over named parameters as a flat dict of tensors by "weight/quantity"."""
    return {f"{name}/{key}": value for name, parameter in parameters.items()
            for key, value in optimizer.state[parameter].items() if value is not None}


def restore_optimizer(optimizer, parameters, state):
    """Load a state from :func:`optimizer_state`."""
    for name, value in state.items():
        name, key = name.rsplit("/", 1)
        # Fused AdamW counts its steps in float32 on the device of the weight.
        optimizer.state[parameters[name]][key] = value.to(parameters[name].device)
