"""Tensors on disk, and locks between processes.

Tensors are stored as safetensors with a JSON record and a checksum. A file is written completely or not at all, and
nothing is ever unpickled.
"""

import hashlib
import json
import os
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

FORMAT = "permask 2"


@contextmanager
def write_whole(path):
    """Yield a temporary path next to ``path``; it is renamed to ``path`` if the block succeeds, else removed.

    Other processes, and a rerun after a crash, see either no file or a complete one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    try:
        yield Path(temporary)
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's 0600 would hide results from the group
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


@contextmanager
def locked(path, message=None, wait=True):
    """Let one process at a time run the block, on all machines that share the folder of ``path``.

    It is a lock of the operating system, which is released when the process that holds it ends, even by a crash.

    Parameters
    ----------
    path : path-like
        The lock is a file next to ``path`` that ends in ".lock" and exists while a process holds the lock.
    message : str, optional
        Printed if another process holds the lock for more than a second.
    wait : bool
        If False, raise :class:`filelock.Timeout` instead of waiting for the process that holds the lock.
    """
    path = Path(path)
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(path.name + ".lock"))
    try:
        lock.acquire(timeout=1 if wait else 0)
    except Timeout:
        if not wait:
            raise
        if message:
            print(message, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)  # before the release: a waiting process sees that it is gone
        lock.release()
        with suppress(OSError):  # a failed block leaves no empty folders
            for folder in made:
                folder.rmdir()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_tensors(path, tensors, record):
    """Write tensors and a record that describes them.

    Parameters
    ----------
    path : path-like
        Written under a temporary name, then renamed.
    tensors : dict of str to torch.Tensor
    record : dict
        Anything that JSON holds: parameters, versions, results.
    """
    from safetensors.torch import save_file  # here, because importing torch takes longer than most writes

    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps(record)
    with write_whole(path) as temporary:
        save_file(tensors, temporary, metadata={"format": FORMAT, "record": text, "checksum": _checksum(tensors, text)})


def read_record(path):
    """Return only the record of a file that :func:`save_tensors` wrote, without verifying the checksum.

    Raises
    ------
    ValueError
        If the file is damaged, or was not written by :func:`save_tensors`.
    """
    with _opened(path) as (_, metadata):
        return _record(path, metadata)


def load_tensors(path):
    """Read a file that :func:`save_tensors` wrote.

    Returns
    -------
    (dict of str to torch.Tensor, dict)
        The tensors, on the CPU, and the record.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is damaged (the checksum of its numbers and its record is verified), or was not written by
        :func:`save_tensors`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    with _opened(path) as (file, metadata):
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        if _checksum(tensors, metadata["record"]) != metadata["checksum"]:
            raise ValueError(f"{path} is damaged: its numbers do not have the checksum that was stored with them")
        return tensors, _record(path, metadata)


@contextmanager
def _opened(path):
    """Yield an open file of this format and its metadata; any error, also inside the block, becomes a ValueError."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") == FORMAT:
                yield file, metadata
                return
    except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error})") from error
    raise ValueError(f"{path} is a safetensors file, but its format is {metadata.get('format')!r}: expected {FORMAT!r}")


def _record(path, metadata):
    record = json.loads(metadata["record"])
    if not isinstance(record, dict):
        raise ValueError(f"{path} is damaged: its record is not a dict")
    return record


def _checksum(tensors, text):
    return digest(dict(sorted(tensors.items())), text)


def digest(arrays, text=""):
    """Return a short hash of tensors or NumPy arrays (names, types, shapes and values) and of a text."""
    summary = hashlib.sha256(text.encode())
    for name, array in arrays.items():
        summary.update(f"{name} {array.dtype} {list(array.shape)}".encode())
        if hasattr(array, "detach"):  # a tensor, as bytes: NumPy has no bfloat16
            import torch

            array = array.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        summary.update(array)
    return summary.hexdigest()[:16]
