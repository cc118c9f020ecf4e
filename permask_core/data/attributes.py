"""Attributes of inputs: the groups to which each belongs, such as the colour of a shape or the gender in a text."""

from typing import NamedTuple

import torch


class Attribute(NamedTuple):
    """The names of the ``groups`` of an attribute, and which of n inputs belong to each: ``member``, bool [n, groups].

    An input may be in one group, in several (a text about women and men) or in none.
    """

    groups: tuple[str, ...]
    member: torch.Tensor


def attribute(groups, values):
    """Make an attribute of which every input has one value.

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
        raise ValueError(f"values has {int(wrong[0])}: expected 0 to {len(groups) - 1}, one for each of "
                         f"{', '.join(groups)}")
    return Attribute(groups, torch.nn.functional.one_hot(values, len(groups)).bool())


def check_attributes(names, known):
    """Raise ValueError unless ``names`` is a list of names that are all in ``known``."""
    if isinstance(names, str):
        raise ValueError(f"attributes is {names!r}: expected a list of names")
    for name in names:
        if name not in known:
            raise ValueError(f"unknown attribute {name!r}: expected some of {', '.join(known)}")
