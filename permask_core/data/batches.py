"""Batches in any form: find the inputs and the targets, and the logits in the output of a model.

Data are a split, a tensor of inputs, a tuple of tensors (inputs, targets), or any iterable of batches, such as a
DataLoader. A batch is a tensor of inputs, a tuple or list of inputs and targets, or a dict of named inputs, in which
the targets are called ``labels``, ``label``, ``targets``, ``target`` or ``y``. Inputs are a tensor, a tuple (several
arguments) or a dict (arguments by name).
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial

import torch

EXPECTED = ("expected a split such as data.train, a tuple of tensors (inputs, targets), or an iterable of batches such "
            "as a DataLoader")
TARGETS = ("labels", "label", "targets", "target", "y")  # the names of the targets in a batch that is a dict


def batches_of(data, device=None, *, batch_size=1000):
    """Yield the batches of some data in order, without augmentation.

    Parameters
    ----------
    data : Split, torch.Tensor, tuple of torch.Tensor, or iterable of batches
    device : torch.device or str, optional
        The device of the batches; by default they are not moved.
    batch_size : int
        Batch size for a split or tensors; an iterable already has batches.

    Yields
    ------
    (inputs, targets)
        ``targets`` is None in a batch that has none.

    Raises
    ------
    ValueError
        If the data have a different form or are empty, or the tensors of a tuple differ in length.

    Examples
    --------
    >>> [(len(x), y) for x, y in batches_of(torch.zeros(5, 3), batch_size=2)]
    [(2, None), (2, None), (1, None)]
    """
    check_data(data)
    with suppress(TypeError):  # generators, and progress bars around them, have no length
        if not len(data[0] if isinstance(data, tuple) else data):
            raise ValueError(f"got a {type(data).__name__} without batches: expected at least one input")
    if hasattr(data, "batches"):
        yield from data.batches(torch.arange(len(data)).split(batch_size), device or "cpu")
        return
    if isinstance(data, torch.Tensor):
        found = data.split(batch_size)
    elif isinstance(data, tuple):
        found = zip(*(tensor.split(batch_size) for tensor in data))
    else:
        found = data
    batch = None
    for batch in found:
        inputs, targets = take_apart(batch)
        yield to_device(inputs, device), to_device(targets, device)
    if batch is None:
        raise ValueError(f"got a {type(data).__name__} without batches: expected at least one input")


def check_data(data):
    """Raise ValueError unless :func:`batches_of` accepts the data; the batches themselves are not checked."""
    if isinstance(data, tuple):
        if len(data) < 2 or not all(isinstance(part, torch.Tensor) for part in data):
            parts = ", ".join(type(part).__name__ for part in data) or "nothing"
            raise ValueError(f"got a {type(data).__name__} of {parts}: {EXPECTED}")
        inputs, targets = data[:2]
        if len(data) > 2 or inputs.ndim > 2 and targets.is_floating_point() and targets.shape[1:] == inputs.shape[1:]:
            raise ValueError(f"got a tuple of {len(data)} tensors, {list(inputs.shape)} and {list(targets.shape)}: "
                             "expected (inputs, targets); pass batches, such as those of tensor.split, as a list")
        if len({len(part) for part in data}) > 1:
            raise ValueError(f"got {len(data[0])} inputs and {len(data[1])} labels: expected equally many")
    elif not isinstance(data, Iterable) and not hasattr(data, "batches") or isinstance(data, (str, bytes, Mapping)):
        raise ValueError(f"got {type(data).__name__}: {EXPECTED}")


def take_apart(batch):
    """Return the inputs and the targets of a batch; the targets are None if the batch has none."""
    if isinstance(batch, torch.Tensor):
        return batch, None
    if isinstance(batch, Mapping):
        named = [name for name in TARGETS if name in batch]
        if len(named) > 1:
            raise ValueError(f"a batch has {' and '.join(named)}: expected one of {', '.join(TARGETS)}")
        return ({name: value for name, value in batch.items() if name not in named},
                batch[named[0]] if named else None)
    if isinstance(batch, (tuple, list)) and batch:
        inputs, *targets = batch
        return inputs, targets[0] if len(targets) == 1 else tuple(targets) or None
    raise ValueError(f"a batch is {type(batch).__name__}: expected a tensor, a tuple of inputs and targets, or a dict")


def arguments(inputs):
    """Return the positional and the named arguments of a model: a tensor is one argument, a tuple several, a dict
    named."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {}


def call(model, inputs):
    """Call a model with inputs: a tensor, a tuple of arguments or a dict of named arguments."""
    positional, named = arguments(inputs)
    return model(*positional, **named)


def logits_of(output):
    """Return the logits in a model's output: the tensor itself, the entry ``logits``, or the first tensor.

    Raises
    ------
    ValueError
        If there is no tensor.
    """
    if isinstance(output, torch.Tensor):
        return output
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    found = named if named is not None else next((one for one in values if isinstance(one, torch.Tensor)), None)
    if not isinstance(found, torch.Tensor):
        raise ValueError(f"the model's output is {type(output).__name__}: expected a tensor, an object with .logits, "
                         "or a tuple or dict of tensors; forward=lambda model, inputs: ... chooses one")
    return found


def count(inputs):
    """Return the number of examples in a batch: the length of its first tensor."""
    if isinstance(inputs, torch.Tensor):
        return len(inputs)
    values = inputs.values() if isinstance(inputs, Mapping) else inputs
    return next(count(one) for one in values if isinstance(one, (torch.Tensor, Mapping, tuple, list)))


def to_device(values, device):
    """Move tensors, also those in tuples, lists and dicts, to a device; other values do not change."""
    return _each(values, lambda tensor: tensor.to(device, non_blocking=True)) if device is not None else values


def parts_of(values, n):
    """Split the rows of a batch into n parts that are as equal as possible, as in :meth:`torch.Tensor.tensor_split`."""
    def part(tensor, i):
        size, longer = divmod(len(tensor), n)
        start = i * size + min(i, longer)
        return tensor[start:start + size + (i < longer)]

    return [_each(values, partial(part, i=i)) for i in range(n)]


def _each(values, change):
    if isinstance(values, torch.Tensor):
        return change(values)
    if isinstance(values, Mapping):
        return {name: _each(value, change) for name, value in values.items()}
    if isinstance(values, (tuple, list)):
        return tuple(_each(value, change) for value in values)
    return values
