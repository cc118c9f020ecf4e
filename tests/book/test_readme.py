"""The README shows what was measured: its table is the kept one, and the kept one follows from the kept runs."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "book" / "readme"
RECORD = json.loads((KEPT / "permuted_masks.json").read_text(encoding="utf8"))
COLUMNS = {"LTH": ("lth", ""), "permuted (weights)": ("permuted", "weights"),
           "permuted (activations)": ("permuted", "activations"), "naive": ("naive", ""), "random": ("random", "")}


def test_the_table_is_the_kept_one():
    readme = (ROOT / "README.md").read_text(encoding="utf8")
    section = re.search(r"<!-- results:[^>]*-->\n(.*?)<!-- /results -->", readme, re.DOTALL)[1]
    assert section.strip() == (KEPT / "permuted_masks.md").read_text(encoding="utf8").strip()
    assert "book/readme/permuted_masks.svg" in readme and (KEPT / "permuted_masks.svg").stat().st_size > 10_000


@pytest.mark.parametrize("row", RECORD["table"], ids=lambda row: row["sparsity (%)"])
def test_every_entry_follows_from_the_runs(row):
    text = (KEPT / "permuted_masks.md").read_text(encoding="utf8")
    assert "| " + " | ".join(row.values()) + " |" in text
    for column, (method, matching) in COLUMNS.items():
        values = [100 * run["accuracy"] for run in RECORD["runs"] if run["method"] == method
                  and run["matching"] == matching and run["sparsity"] == float(row["sparsity (%)"]) / 100]
        assert len(values) == RECORD["seeds"] >= 5
        half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
        mean, interval = map(float, row[column].split(" ± "))
        assert abs(mean - np.mean(values)) <= 0.051 and abs(interval - half) <= 0.051


def test_the_record_says_how_it_was_made():
    assert RECORD["command"] == "make readme"
    assert RECORD["commit"] and RECORD["versions"]["torch"] and RECORD["settings"]
