"""Files of masks with their provenance."""

import json

from permask_core.masks.applying import check_bool, check_fit, layer_sparsity, sparsity
from permask_core.masks.reading import tensors_and_masks
from permask_core.runs.files import digest, load_tensors, save_tensors
from permask_core.runs.store import commit, plain, versions


def save_masks(path, masks, *, model=None, data=None, recipe=None, initial=None, **provenance):
    """Write masks and their provenance to a safetensors file, first under a temporary name.

    The header of the file holds, as JSON, the sparsity of all weights and of each layer, the versions of the libraries,
    the commit of permask, and the arguments below.

    Parameters
    ----------
    path : path-like
    masks : Masks
    model : torch.nn.Module, optional
        The network to which the masks belong; the header has the name of its class.
    data : str or object with a name, optional
        The data on which they were found, such as a :class:`permask_core.data.Dataset`.
    recipe : dataclass or anything that JSON holds, optional
        How the network was trained.
    initial : dict of str to torch.Tensor, optional
        The ``state_dict`` at the start of the training; the header has its hash.
    **provenance
        Anything else that JSON holds (seed, command, ...).

    Raises
    ------
    ValueError
        If the masks do not fit the model, or an argument cannot be written as JSON.
    """
    check_bool(masks)
    known = {"model": model, "data": data, "recipe": recipe, "initial": initial}
    if model is not None:
        check_fit(masks, tensors_and_masks(model)[0])
        known["model"] = f"{type(model).__module__}.{type(model).__qualname__}"
    if initial is not None:
        known["initial"] = digest(initial)
    known["data"] = getattr(data, "name", data)
    record = {"kind": "masks", "sparsity": sparsity(masks), "layer_sparsity": layer_sparsity(masks),
              "versions": versions(), "commit": commit(),
              **{name: value for name, value in known.items() if value is not None}, **provenance}
    try:
        record = json.loads(json.dumps(record, default=plain))
    except TypeError as error:
        raise ValueError(f"the provenance of the masks cannot be written as JSON: {error}") from error
    save_tensors(path, masks, record)


def load_masks(path, model=None):
    """Read masks that :func:`save_masks` wrote, as tensors on the CPU.

    Parameters
    ----------
    path : path-like
    model : torch.nn.Module or dict of str to torch.Tensor, optional
        The network for which the masks are meant, of any class, or its ``state_dict``.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is damaged, has another format or does not hold masks, or a mask does not fit the model.
    """
    masks, _ = _load(path)
    check_bool(masks)
    if model is not None:
        check_fit(masks, tensors_and_masks(model)[0])
    return masks


def read_provenance(path):
    """Return the header of a file that :func:`save_masks` wrote, as a dict; raises the errors of :func:`load_masks`."""
    return _load(path)[1]


def _load(path):
    masks, record = load_tensors(path)
    if record.get("kind") != "masks":
        raise ValueError(f"{path} holds {record.get('stage') or 'something else'}: expected masks")
    return masks, record
