"""Which axes of which tensors move together when hidden units are permuted: the groups, as plain data.

A network computes the same function after its hidden units are permuted, provided that every tensor that produces,
scales or reads a unit is permuted too. A *group* lists all these axes for one set of units. Groups are found by
:func:`permask_core.matching.permutation_groups` or written by hand; in both cases they are named tuples in a dict,
which can be printed, changed, saved as JSON and loaded.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch

from permask_core.runs.files import write_whole


class Entry(NamedTuple):
    """A part of a tensor of the ``state_dict``: unit i owns the indices ``positions[i]`` along ``axis``.

    ``positions`` is an int64 tensor [size, block]; a block is 1 for a plain channel, and height x width after a
    flatten. None means the whole axis with one index for each unit. ``rows`` = (start, stop) restricts the entry to a
    part of axis 0: in a grouped convolution, axis 1 belongs to different channels in different rows.
    """

    tensor: str
    axis: int
    positions: torch.Tensor | None = None
    rows: tuple[int, int] | None = None


class Tap(NamedTuple):
    """Where the activations of a group can be read: at the ``side`` ("input" or "output") of a ``module``.

    ``module`` may also be the name of a parameter: then they are read at its matrix product or convolution, which some
    modules compute by a function, such as attention. If rows of the parameter are used in separate products, those of
    the positions are read. ``axis`` and ``positions`` locate the units in that activation, as in :class:`Entry`; a
    negative ``axis`` counts from the end.
    """

    module: str
    side: str
    axis: int
    positions: torch.Tensor | None = None


class Group(NamedTuple):
    """A set of ``size`` units, the tensor ``entries`` that hold them and the ``taps`` where they can be read.

    ``within`` = (group, unit) means that these units are parts of one unit of another group, such as the dimensions of
    an attention head, and move with it. They are permuted before that unit moves.
    """

    size: int
    entries: tuple[Entry, ...]
    taps: tuple[Tap, ...] = ()
    within: tuple[str, int] | None = None


class Fixed(NamedTuple):
    """``count`` indices along an axis that are in no group, and why."""

    tensor: str
    axis: int
    count: int
    why: str


class Groups(dict):
    """A dict of str to :class:`Group`, with ``fixed``, a tuple of :class:`Fixed`: the indices in no group.

    Examples
    --------
    >>> groups = Groups({"fc1": Group(128, (Entry("fc1.weight", 0), Entry("fc1.bias", 0), Entry("fc2.weight", 1)))})
    >>> print(groups.describe())
    fc1: 128 units
        fc1.weight[0], fc1.bias[0], fc2.weight[1]
    """

    def __init__(self, groups=(), fixed=()):
        super().__init__(groups)
        self.fixed = tuple(fixed)

    def describe(self):
        """Return a text with the groups, their tensors[axes], and what is fixed and why.

        Groups that differ only in the unit to which they belong share a paragraph.
        """
        alike = {}
        for name, group in self.items():
            places = tuple(f"{entry.tensor}[{entry.axis}]" for entry in group.entries)
            alike.setdefault((group.within and group.within[0], group.size, places) if group.within else name,
                             []).append((name, group, places))
        lines = []
        for same in alike.values():
            name, group, places = same[0]
            inside = f", in each of {len(same)} units of {group.within[0]}" if group.within else ""
            lines += [f"{name}: {group.size} units{inside}", f"    {', '.join(dict.fromkeys(places))}"]
        reasons = {}
        for tensor, axis, count, why in self.fixed:
            reasons.setdefault(why, []).append(f"{tensor}[{axis}] ({count})")
        for why, places in reasons.items():
            lines += [f"fixed, {why}:", f"    {', '.join(places)}"]
        return "\n".join(lines)

    def save(self, path):
        """Write the groups as JSON, under a temporary name first."""
        groups = {name: {"size": group.size, "within": group.within,
                         "entries": [_plain(entry) for entry in group.entries],
                         "taps": [_plain(tap) for tap in group.taps]} for name, group in self.items()}
        with write_whole(path) as temporary:
            temporary.write_text(json.dumps({"format": FORMAT, "groups": groups, "fixed": self.fixed}) + "\n")

    @classmethod
    def load(cls, path):
        """Read groups that :meth:`save` wrote, or a file in the same format.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If the file does not hold groups.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {path}")
        try:
            record = json.loads(path.read_text())
            if record["format"] != FORMAT:
                raise ValueError(f"its format is {record['format']!r}: expected {FORMAT!r}")
            groups = {name: Group(_integer(group["size"]), tuple(_place(Entry, entry) for entry in group["entries"]),
                                  tuple(_place(Tap, tap) for tap in group.get("taps", ())),
                                  _within(*group["within"]) if group.get("within") else None)
                      for name, group in record["groups"].items()}
            return cls(groups, (Fixed(*fixed) for fixed in record.get("fixed", ())))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} does not hold permutation groups ({type(error).__name__}: {error})") from error


FORMAT = "permask groups 1"


def _plain(place):
    """Return an entry or a tap as JSON holds it, without values of None."""
    record = {name: value for name, value in place._asdict().items() if value is not None}
    return record if place.positions is None else record | {"positions": place.positions.tolist()}


def _place(kind, record):
    record = {**record, "axis": _integer(record["axis"])}
    if "positions" in record:
        positions = [[_integer(index) for index in unit] for unit in record["positions"]]
        record["positions"] = torch.tensor(positions, dtype=torch.int64)
    if "rows" in record:
        start, stop = record["rows"]
        record["rows"] = (_integer(start), _integer(stop))
    return kind(**record)


def _within(name, unit):
    return name, _integer(unit)


def _integer(value):
    if type(value) is not int:  # neither 1.5 nor true nor "1"
        raise ValueError(f"{value!r} is not an integer")
    return value


def indices(place, size):
    """Return the positions of an :class:`Entry` or :class:`Tap` in a group of ``size`` units, int64 [size, block]."""
    return torch.arange(size)[:, None] if place.positions is None else place.positions


def depth(groups, name):
    """Return in how many groups a group is nested; raise ValueError if the nesting is circular or has an unknown
    group."""
    chain = [name]
    while groups[chain[-1]].within is not None:
        outer, unit = groups[chain[-1]].within
        if outer not in groups or outer in chain or not 0 <= unit < groups[outer].size:
            raise ValueError(f"group {chain[-1]!r} is within unit {unit} of {outer!r}: expected a unit of another "
                             "group")
        chain.append(outer)
    return len(chain) - 1


def check_groups(groups, tensors, *, whole=False):
    """Raise ValueError, which has the first wrong key and axis with both sizes, unless the groups fit.

    Parameters
    ----------
    groups : dict of str to Group
    tensors : dict of str to torch.Tensor
        A ``state_dict`` or masks. Tensors of the groups that are missing in it are ignored, but it must have at least
        one of them.
    whole : bool
        If True, it must have all of them.
    """
    owners = {}
    for name, group in groups.items():
        depth(groups, name)
        for entry in group.entries:
            if whole and entry.tensor not in tensors:
                raise ValueError(f"group {name!r} has {entry.tensor!r}: expected one of {listed(tensors)}")
            if entry.tensor in tensors:
                _check_entry(name, group.size, entry, list(tensors[entry.tensor].shape))
                owners.setdefault((entry.tensor, entry.axis), []).append((name, entry))
    if groups and not owners:
        named = dict.fromkeys(entry.tensor for group in groups.values() for entry in group.entries)
        raise ValueError(f"the groups have none of the tensors {listed(tensors) or '(an empty dict)'}: expected some "
                         f"of {listed(named)}")
    for (tensor, axis), owning in owners.items():
        _check_overlaps(groups, tensor, axis, owning, tensors[tensor].shape)


def _check_entry(name, size, entry, shape):
    place = f"group {name!r} has {size} units, its entry for {entry.tensor!r} along axis {entry.axis}"
    if not 0 <= entry.axis < len(shape):
        raise ValueError(f"the groups use axis {entry.axis} of {entry.tensor!r}, whose shape is {shape}")
    if entry.rows is not None and not (entry.axis > 0 and 0 <= entry.rows[0] < entry.rows[1] <= shape[0]):
        raise ValueError(f"{place} is restricted to rows {entry.rows} of shape {shape}: expected rows of axis 0, and "
                         "an axis above 0")
    if entry.positions is None:
        if size != shape[entry.axis]:
            raise ValueError(f"{place} takes the whole axis, which has {shape[entry.axis]} indices (shape {shape})")
        return
    if entry.positions.ndim != 2 or len(entry.positions) != size:
        raise ValueError(f"{place} has positions of shape {list(entry.positions.shape)}: expected [{size}, block]")
    flat = entry.positions.flatten()
    if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < shape[entry.axis]:
        raise ValueError(f"{place} has positions from {int(flat.min())} to {int(flat.max())}: expected indices below "
                         f"{shape[entry.axis]} (shape {shape})")


def _check_overlaps(groups, tensor, axis, owning, shape):
    """Raise ValueError if two groups own the same index and neither can be nested in the other."""
    parted = any(entry.rows for _, entry in owning)
    levels = {}
    for name, entry in owning:
        level = depth(groups, name)
        taken = levels.setdefault(level, torch.full((shape[0] if parted else 1, shape[axis]), -1))
        part = taken[slice(*entry.rows)] if entry.rows else taken
        positions = indices(entry, groups[name].size).flatten()
        twice = positions[(part[:, positions] >= 0).any(0)].tolist()
        if twice or len(positions.unique()) < len(positions):
            raise ValueError(f"group {name!r} takes index {(twice or [int(positions.mode().values)])} along axis "
                             f"{axis} of {tensor!r} (shape {list(shape)}), which another entry already has")
        part[:, positions] = 1


def listed(names, most=8):
    """Return names as a text, the first ones if there are many."""
    names = list(names)
    return ", ".join(names[:most]) + (f" ... and {len(names) - most} more" if len(names) > most else "")


def shortened(text, length=300):
    """Return the first line of a text, without its middle if it is long."""
    line = str(text).strip().partition("\n")[0].rstrip()
    return line if len(line) <= length else f"{line[:length * 2 // 3]} ... {line[-length // 3:]}"
