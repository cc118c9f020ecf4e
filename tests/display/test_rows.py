"""Numbers out of rows."""

import json

import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup

from permask_core.display import new_figure, plus_minus, publish, select, table
from permask_core.evaluation.statistics import mean_interval, paired_comparison

RUNS = [{"method": m, "temperature": t, "seed": s, "loss": 10.0 * s + (t or 0), "line": [s, 2 * s]}
        for s in (3, 1, 2) for m, t in (("student", None), ("distilled", 4))]


def test_values_are_in_the_order_of_the_seeds():
    for runs in (RUNS, pd.DataFrame(RUNS)):
        assert select(runs, "loss", method="distilled").tolist() == [14, 24, 34]
        assert select(runs, "loss", temperature=None).tolist() == [10, 20, 30]
        assert select(runs, "line", method="student", temperature=None).tolist() == [[1, 2], [2, 4], [3, 6]]


def test_what_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="no result with method 'distilled', temperature 5"):
        select(RUNS, "loss", method="distilled", temperature=5)


def test_a_mean_has_half_the_width_of_its_interval():
    values = [96.1, 97.3, 95.0, 96.6]
    found = mean_interval(values)
    expected = f"{found.mean:.2f} ± {(found.high - found.low) / 2:.2f}"
    assert plus_minus(values, 2) == plus_minus(found, 2) == plus_minus(pd.Series(values), 2) == expected
    assert plus_minus(np.array([3.14159]), 3) == "3.142"


def test_a_comparison_has_a_sign():
    found = paired_comparison([5, 7, 6], [1, 2, 3])
    assert plus_minus(found) == f"+4.0 ± {found.high - 4:.1f}"
    assert plus_minus(paired_comparison([1, 2, 3], [5, 7, 6])).startswith("-4.0 ± ")


def test_pandas_makes_a_table_of_means():
    frame = pd.DataFrame({"method": ["lth", "lth", "naive", "naive"], "sparsity": [0.5] * 4, "loss": [1.0, 3, 5, 5]})
    wide = frame.pivot_table(index="sparsity", columns="method", values="loss", aggfunc=plus_minus)
    soup = BeautifulSoup(table(wide).data, "html.parser")
    assert [head.text for head in soup.select("th")] == ["sparsity", "lth", "naive"]
    assert [cell.text for cell in soup.select("td")] == ["0.5", "2.0 ± 12.7", "5.0 ± 0.0"]


def test_a_table_of_a_frame_has_its_columns_alone_unless_the_index_has_a_name():
    soup = BeautifulSoup(table(pd.DataFrame({"a": [1, 2], "b": ["x", None]}, index=[7, 8])).data, "html.parser")
    assert [head.text for head in soup.select("th")] == ["a", "b"]
    assert [cell.text for cell in soup.select("td")] == ["1", "x", "2", ""]


def test_a_published_frame_is_what_its_rows_are(tmp_path):
    runs = [{"method": "lth", "seed": 0, "loss": 0.1 + 0.2, "note": None}, {"method": "lth", "seed": 1, "loss": 0.5,
                                                                          "note": "late"}]
    for name, own in (("rows", runs), ("frame", pd.DataFrame(runs))):
        publish(name, new_figure()[0], pd.DataFrame([{"n": "2"}]) if name == "frame" else [{"n": "2"}], "what",
                folder=tmp_path, runs=own)
    one, other = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("rows", "frame"))
    assert one == other and one["runs"] == runs
    assert (tmp_path / "rows.md").read_text() == (tmp_path / "frame.md").read_text()
