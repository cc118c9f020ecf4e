"""Source code of Python's standard library, character by character, for small language models.

The files are those of the Python that runs, so the text differs a little between versions: results carry a digest of
the data. Tests, IDLE and installed packages are left out.
"""

import sysconfig
from pathlib import Path

import numpy as np
import torch

from permask_core.data.splits import Split
from permask_core.runs.checks import check_integer

ALPHABET = "".join(map(chr, range(32, 127))) + "\n"  # any other character is one more class
LEFT_OUT = {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__"}
TEST = 10  # every tenth file is in the test split


def python_source(length=64, n_train=20_000, n_test=2_000):
    """Windows of characters, each with the next character at every position as its label.

    Parameters
    ----------
    length : int
        Characters in a window.
    n_train, n_test : int
        Windows, which do not overlap, at equal distances in the text. Whole files are in one of the two splits.

    Returns
    -------
    (Split, Split, tuple of int, int)
        Training and test split, with inputs and labels int64 [n, length]; the shape [length]; the number of classes,
        97: see :func:`decoded`.

    Raises
    ------
    FileNotFoundError
        If this Python has no source files of its library.
    ValueError
        If an option is out of range, or there are fewer windows.
    """
    for name, given in (("length", length), ("n_train", n_train), ("n_test", n_test)):
        check_integer(name, given, 1)
    folder = check_files()
    files = sorted(path for path in folder.rglob("*.py") if not LEFT_OUT & {*path.relative_to(folder).parts})
    test = files[TEST - 1::TEST]
    train = [path for i, path in enumerate(files, 1) if i % TEST]
    splits = _windows(train, length, n_train, "n_train"), _windows(test, length, n_test, "n_test")
    return *splits, (length,), len(ALPHABET) + 1


def check_files(root=None, name="python_source"):
    """See :func:`permask_core.data.check_files`; returns the folder of Python's library, whatever ``root`` is."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    if not (folder / "argparse.py").is_file():
        raise FileNotFoundError(f"there is no argparse.py in {folder}: expected the source files of Python's standard "
                                "library, which some distributions leave out")
    return folder


def _windows(files, length, n, name):
    table = np.full(256, len(ALPHABET), np.uint8)
    table[list(ALPHABET.encode())] = np.arange(len(ALPHABET))
    text = table[np.frombuffer(b"\n".join(path.read_bytes().replace(b"\r\n", b"\n") for path in files), np.uint8)]
    there = (len(text) - 1) // length
    if n > there:
        raise ValueError(f"{name} is {n}: expected at most {there}, the number of windows of {length} characters")
    starts = torch.arange(n) * there // n * length
    text = torch.from_numpy(text).long()
    at = starts[:, None] + torch.arange(length)
    return Split(text[at], text[at + 1])


def decoded(tokens):
    """Return the text of tokens [length]: classes 0 to 94 are the printable characters of ASCII in their order, 95 is a
    new line, and 96 any other byte, which is shown as a question mark in a diamond.

    Examples
    --------
    >>> decoded(torch.tensor([33, 66, 67, 95]))
    'Abc\\n'
    """
    return "".join((ALPHABET + "\N{REPLACEMENT CHARACTER}")[int(token)] for token in tokens)
