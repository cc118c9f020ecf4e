"""Attributes of inputs: to which groups each belongs, such as the colour of a shape or the gender that a text names."""

from typing import NamedTuple

import torch


class Attribute(NamedTuple):
    """To which of an attribute's ``groups`` each of n inputs belongs: their names, and ``member``, bool [n, groups].

    An input may be in one group, in several (a text that names women and men) or in none.
    """

    groups: tuple[str, ...]
    member: torch.Tensor


def attribute(groups, values):
    """An attribute of which every input has one value.

    Parameters
    ----------
    groups : sequence of str
        Names of the values 0, 1, ...
    values : torch.Tensor
        int64 [n].

    Returns
    -------
    Attribute

    Raises
    ------
    ValueError
        If a value has no name.
    """
    groups = tuple(groups)
    wrong = values[(values < 0) | (values >= len(groups))]
    if len(wrong):
        raise ValueError(f"got the value {int(wrong[0])}: expected 0 to {len(groups) - 1}, one for each of "
                         f"{', '.join(groups)}")
    return Attribute(groups, torch.nn.functional.one_hot(values, len(groups)).bool())


def check_attributes(names, known):
    """Raise ValueError unless ``names`` is a list of attributes of which ``known`` has every one."""
    if isinstance(names, str):
        raise ValueError(f"attributes is {names!r}: expected a list of names")
    for name in names:
        if name not in known:
            raise ValueError(f"unknown attribute {name!r}: expected some of {', '.join(known)}")
