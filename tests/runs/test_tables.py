"""Tables: what is written is read, and what is cut off is seen."""

import csv

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from permask_core.runs.tables import read_table, write_table

VALUES = st.one_of(st.integers(), st.floats(allow_nan=False), st.booleans(), st.text(min_size=1),
                   st.lists(st.integers(), max_size=3), st.sampled_from(["1e5", "007", "true", "[1]", '"', "a,b"]))


@example(rows=[{"a": "\r"}, {"a": "x\r\ny"}])
@given(rows=st.lists(st.dictionaries(st.sampled_from(["a", "b", "c d"]), VALUES), min_size=1, max_size=4))
def test_what_is_written_is_read_with_its_types(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "table.csv"
    write_table(path, rows)
    found = read_table(path)
    assert found == [row for row in rows] if any(rows) else not any(found)
    assert [[type(value) for value in row.values()] for row in found] == [
        [type(row[key]) for key in one] for row, one in zip(rows, found)]


def test_dicts_are_columns_and_nothing_is_left_out(tmp_path):
    write_table(tmp_path / "t.csv", [{"a": {"b": 1, "c": {"d": "x"}}, "e": None}, {"f": ""}])
    with (tmp_path / "t.csv").open() as file:
        assert list(csv.reader(file)) == [["a.b", "a.c.d", "e", "f"], ["1", "x", "", ""], ["", "", "", ""]]
    assert read_table(tmp_path / "t.csv") == [{"a.b": 1, "a.c.d": "x"}, {}]
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


def test_a_table_that_is_cut_off_or_missing_is_refused(tmp_path):
    path = tmp_path / "t.csv"
    write_table(path, [{"a": 1, "b": 2}, {"a": 3, "b": 4}])
    path.write_text(path.read_text()[:-3])
    with pytest.raises(ValueError, match="t.csv has 1 values in row 3: expected 2; is it cut off"):
        read_table(path)
    with pytest.raises(FileNotFoundError):
        read_table(tmp_path / "none.csv")
