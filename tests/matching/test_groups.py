"""Groups as data: printed, saved, written by hand, and refused where they do not fit."""

import json
import re

import pytest
import torch
from torch import nn

from permask_core.matching import Entry, Fixed, Group, Groups, Tap, check_groups, permutation_groups, permute
from permask_core.matching.groups import depth, indices, listed, shortened


def positions(*units):
    return torch.tensor(units)


def alike(one, two):
    """Equal groups; positions are tensors, which == compares one by one."""
    def plain(places):
        return [place._replace(positions=place.positions is not None and place.positions.tolist()) for place in places]

    one, two = ([(name, group.size, group.within, plain(group.entries), plain(group.taps))
                 for name, group in groups.items()] + [groups.fixed] for groups in (one, two))
    return one == two


HEADS = Groups({
    "q": Group(2, (Entry("q.weight", 0, positions([0, 1, 2], [3, 4, 5])), Entry("p.weight", 1, positions(
        [0, 1, 2], [3, 4, 5]))), (Tap("p", "input", -1, positions([0, 1, 2], [3, 4, 5])),)),
    "q/0": Group(3, (Entry("q.weight", 0, positions([0], [1], [2])), Entry("p.weight", 1, positions([0], [1], [2]))),
                 (), ("q", 0)),
    "q/1": Group(3, (Entry("q.weight", 0, positions([3], [4], [5])), Entry("p.weight", 1, positions([3], [4], [5]))),
                 (), ("q", 1)),
    "inner": Group(2, (Entry("c.weight", 1, None, (0, 4)),), (Tap("c", "output", 1),)),
}, [Fixed("q.weight", 1, 8, "they meet the network's input"), Fixed("q.bias", 0, 1, "another reason")])


def test_groups_describe_themselves():
    assert HEADS.describe() == """\
q: 2 units
    q.weight[0], p.weight[1]
q/0: 3 units, in each of 2 units of q
    q.weight[0], p.weight[1]
inner: 2 units
    c.weight[1]
fixed, they meet the network's input:
    q.weight[1] (8)
fixed, another reason:
    q.bias[0] (1)"""
    assert Groups().describe() == ""


def test_a_place_named_twice_is_printed_once():
    """A convolution with groups has an entry for each group's rows."""
    groups = Groups({"g": Group(2, (Entry("w", 1, None, (0, 2)), Entry("w", 1, None, (2, 4))))})
    assert groups.describe() == "g: 2 units\n    w[1]"


@pytest.mark.parametrize("groups", [HEADS, Groups()], ids=["all kinds", "none"])
def test_groups_are_what_was_saved(tmp_path, groups):
    groups.save(tmp_path / "new" / "groups.json")
    loaded = Groups.load(tmp_path / "new" / "groups.json")
    assert isinstance(loaded, Groups) and alike(loaded, groups)
    assert loaded.describe() == groups.describe()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["groups.json"]
    places = [place for group in loaded.values() for place in group.entries + group.taps]
    assert {place.positions.dtype for place in places if place.positions is not None} <= {torch.int64}


def test_what_was_traced_permutes_the_same_after_it_was_saved(tmp_path):
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1, groups=2), nn.Flatten(), nn.Linear(36, 2))
    groups, state = permutation_groups(model, torch.zeros(1, 2, 3, 3)), model.state_dict()
    groups.save(tmp_path / "groups.json")
    loaded = Groups.load(tmp_path / "groups.json")
    assert alike(loaded, groups) and any(entry.rows for group in groups.values() for entry in group.entries)
    permutations = {name: torch.arange(group.size).roll(1) for name, group in groups.items()}
    one, two = (permute(g, permutations, state) for g in (groups, loaded))
    assert all(torch.equal(one[name], two[name]) for name in state)
    assert not torch.equal(one["0.weight"], state["0.weight"])


def test_a_file_written_by_hand_needs_little(tmp_path):
    (tmp_path / "hand.json").write_text("""{"format": "permask groups 1", "groups": {
        "fc1": {"size": 2, "entries": [{"tensor": "fc1.weight", "axis": 0},
                                       {"tensor": "fc2.weight", "axis": 1, "positions": [[0, 1], [2, 3]]}]}}}""")
    expected = {"fc1": Group(2, (Entry("fc1.weight", 0), Entry("fc2.weight", 1, positions([0, 1], [2, 3]))))}
    assert alike(Groups.load(tmp_path / "hand.json"), Groups(expected))


SAVED = {"format": "permask groups 1",
         "groups": {"g": {"size": 2, "entries": [{"tensor": "w", "axis": 0, "positions": [[0], [1]], "rows": [0, 2]}],
                          "within": ["h", 0]}}}


def changed(path, value):
    """The saved text with another value at a path."""
    record = json.loads(json.dumps(SAVED))
    place = record
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return json.dumps(record)


ENTRY = ["groups", "g", "entries", 0]


@pytest.mark.parametrize("text, message", [
    ("", "JSONDecodeError"), (json.dumps(SAVED)[:-9], "JSONDecodeError"), ("[]", "TypeError"), ("3", "TypeError"),
    ("{}", "KeyError: 'format'"), (changed(["format"], "permask groups 9"), "its format is 'permask groups 9'"),
    (changed(["groups"], None), "KeyError: 'groups'"), (changed(["groups"], [1]), "AttributeError"),
    (changed(["groups", "g"], 3), "TypeError"), (changed(["groups", "g", "entries"], None), "KeyError: 'entries'"),
    (changed(["groups", "g", "entries"], ["w"]), "TypeError"),
    (changed(["groups", "g", "size"], 2.5), "2.5 is not an integer"),
    (changed(["groups", "g", "size"], "2"), "'2' is not an integer"),
    (changed([*ENTRY, "axis"], "0"), "'0' is not an integer"),
    (changed([*ENTRY, "axis"], True), "True is not an integer"), (changed([*ENTRY, "axis"], None), "KeyError: 'axis'"),
    (changed([*ENTRY, "tensor"], None), "missing 1 required positional argument: 'tensor'"),
    (changed([*ENTRY, "colour"], 1), "unexpected keyword argument 'colour'"),
    (changed([*ENTRY, "positions"], [[0], [0.5]]), "0.5 is not an integer"),
    (changed([*ENTRY, "positions"], [0, 1]), "iterable"),
    (changed([*ENTRY, "positions"], [[0, 1], [2]]), "length"), (changed([*ENTRY, "rows"], [1]), "not enough values"),
    (changed([*ENTRY, "rows"], [0, "2"]), "'2' is not an integer"),
    (changed(["groups", "g", "within"], "h"), "missing"),
    (changed(["groups", "g", "within"], ["h", "0"]), "'0' is not an integer"),
    (changed(["fixed"], [["w", 0]]), "missing"),
])
def test_a_damaged_file_is_refused_by_name(tmp_path, text, message):
    assert text != json.dumps(SAVED)
    (tmp_path / "groups.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        Groups.load(tmp_path / "groups.json")
    assert str(tmp_path / "groups.json") in str(error.value) and "does not hold permutation groups" in str(error.value)


def test_other_files_are_refused(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
            Groups.load(path)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="does not hold permutation groups"):
        Groups.load(tmp_path / "bytes.json")


def one(size, *entries, within=None):
    return {"g": Group(size, entries, (), within)}


@pytest.mark.parametrize("groups, message", [
    (one(3, Entry("x", 0)), "have none of the tensors w, c: expected some of x"),
    (one(3, Entry("w", 2)), "use axis 2 of 'w', whose shape is [3, 4]"),
    (one(3, Entry("w", -1)), "use axis -1 of 'w', whose shape is [3, 4]"),
    (one(3, Entry("w", 1)), "group 'g' has 3 units, its entry for 'w' along axis 1 takes the whole axis, which has 4"),
    (one(5, Entry("w", 0), Entry("w", 1)), "5 units, its entry for 'w' along axis 0 takes the whole axis, which has 3"),
    (one(2, Entry("w", 1, positions([0], [4]))), "positions from 0 to 4: expected indices below 4 (shape [3, 4])"),
    (one(2, Entry("w", 1, positions([0], [-1]))), "positions from -1 to 0: expected indices below 4"),
    (one(4, Entry("w", 1, torch.arange(4))), "positions of shape [4]: expected [4, block]"),
    (one(2, Entry("w", 1, torch.arange(4)[:, None])), "group 'g' has 2 units"),
    (one(2, Entry("w", 1, positions([0], [0]))), "takes index [0] along axis 1 of 'w' (shape [3, 4])"),
    ({**one(3, Entry("w", 0)), "h": Group(3, (Entry("w", 0),))}, "'h' takes index [0, 1, 2] along axis 0 of 'w'"),
    ({**one(2, Entry("w", 1, positions([0], [1]))), "h": Group(2, (Entry("w", 1, positions([2], [1])),))},
     "'h' takes index [1] along axis 1 of 'w'"),
    (one(2, Entry("c", 1, None, (0, 5))), "restricted to rows (0, 5) of shape [4, 2]: expected rows of axis 0"),
    (one(2, Entry("c", 1, None, (2, 2))), "restricted to rows (2, 2)"),
    (one(4, Entry("c", 0, None, (0, 4))), "expected rows of axis 0, and an axis above 0"),
    ({**one(2, Entry("c", 1, None, (0, 3))), "h": Group(2, (Entry("c", 1, None, (2, 4)),))}, "'h' takes index [0, 1]"),
    ({**one(2, Entry("c", 1)), "h": Group(2, (Entry("c", 1, None, (2, 4)),))}, "'h' takes index [0, 1] along axis 1"),
    (one(3, Entry("w", 0), within=("h", 0)), "group 'g' is within unit 0 of 'h': expected a unit of another group"),
    (one(3, Entry("w", 0), within=("g", 0)), "within unit 0 of 'g': expected a unit of another"),
    ({"g": Group(3, (Entry("w", 0),), (), ("h", 0)), "h": Group(3, (), (), ("g", 0))}, "expected a unit of another"),
    ({**one(3, Entry("w", 0), within=("h", 2)), "h": Group(2, (Entry("c", 1),))}, "within unit 2 of 'h'"),
])
def test_groups_that_do_not_fit_are_named(groups, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_groups(groups, {"w": torch.ones(3, 4), "c": torch.ones(4, 2)})


def test_the_first_of_several_faults_is_named():
    groups = {**one(3, Entry("w", 0), Entry("w", 1)), "h": Group(7, (Entry("v", 0),))}
    with pytest.raises(ValueError, match=r"group 'g' has 3 units, .*'w' along axis 1"):
        check_groups(groups, {"w": torch.ones(3, 4), "v": torch.ones(2)})


@pytest.mark.parametrize("groups", [
    one(3, Entry("w", 0), Entry("elsewhere", 0)),
    {"a": Group(2, (Entry("w", 1, positions([0], [2])),)), "b": Group(1, (Entry("w", 1, positions([1, 3])),))},
    {"a": Group(2, (Entry("c", 1, None, (0, 2)),)), "b": Group(2, (Entry("c", 1, None, (2, 4)),))},
    {"a": Group(2, (Entry("w", 1, positions([0, 1], [2, 3])),)),
     "a/1": Group(2, (Entry("w", 1, positions([2], [3])),), (), ("a", 1))},
    {},
], ids=["elsewhere", "halves", "rows", "within", "none"])
def test_groups_that_fit_pass(groups):
    assert check_groups(groups, {"w": torch.ones(3, 4), "c": torch.ones(4, 2)}) is None


def test_all_of_the_tensors_can_be_asked_for():
    with pytest.raises(ValueError, match="group 'g' has 'elsewhere': expected one of w"):
        check_groups(one(3, Entry("w", 0), Entry("elsewhere", 0)), {"w": torch.ones(3, 4)}, whole=True)


def test_long_lists_and_texts_are_shortened():
    state = {f"layer{i}.weight": torch.ones(3) for i in range(1000)}
    with pytest.raises(ValueError, match=r"expected one of layer0.weight, .*, layer7.weight \.\.\. and 992 more$"):
        check_groups(one(3, Entry("elsewhere", 0)), state, whole=True)
    assert listed("abc") == "a, b, c" and listed("abc", 2) == "a, b ... and 1 more"
    assert shortened("\n one line \nanother") == "one line" and shortened("") == ""
    assert shortened("".join(map(str, range(1000))), 30) == "01234567891011121314 ... 6997998999"


def test_depth_counts_what_a_group_is_within():
    groups = {"a": Group(1, ()), "b": Group(2, (), (), ("a", 0)), "c": Group(2, (), (), ("b", 1))}
    assert [depth(groups, name) for name in groups] == [0, 1, 2]


def test_no_positions_are_one_index_a_unit():
    assert indices(Entry("w", 0), 3).tolist() == [[0], [1], [2]]
    assert indices(Tap("m", "input", 1, positions([4, 5])), 1).tolist() == [[4, 5]]
