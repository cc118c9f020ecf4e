"""The README shows what was measured: its table is the kept one, and the kept one follows from the kept runs."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from book.tools.readme import NETWORKS, SECTIONS, WAYS
from permask_core.data.measured import measured_fan_in_speed, measured_whole_networks
from tests.notebooks import run

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "book" / "readme"
README = (ROOT / "README.md").read_text(encoding="utf8")
RECORD = json.loads((KEPT / "permuted_masks.json").read_text(encoding="utf8"))
COLUMNS = {"LTH": ("lth", ""), "permuted (weights)": ("permuted", "weights"),
           "permuted (activations)": ("permuted", "activations"), "naive": ("naive", ""), "random": ("random", "")}


def section(mark):
    """What stands between the two marks of a name."""
    return re.search(rf"<!-- {mark}:[^>]*-->\n(.*?)<!-- /{mark} -->", README, re.DOTALL)[1]


@pytest.mark.parametrize("mark, name", SECTIONS.items())
def test_tables_are_the_kept_ones(mark, name):
    assert section(mark).strip() == (KEPT / f"{name}.md").read_text(encoding="utf8").strip()


def test_the_findings_are_those_of_the_page(tmp_path, monkeypatch):
    """They follow from stored studies and published values: another text means that `make readme` is due."""
    monkeypatch.setenv("PERMASK_FIGURES", str(tmp_path))
    run("findings", {}, tmp_path)
    assert (tmp_path / "findings.md").read_text(encoding="utf8") == (KEPT / "findings.md").read_text(encoding="utf8")


@pytest.mark.parametrize("name", ["fashion_mnist", "permuted_masks"])
def test_the_pictures_are_kept(name):
    assert f"book/readme/{name}.svg" in README and (KEPT / f"{name}.svg").stat().st_size > 10_000


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


def test_every_ratio_is_one_of_medians():
    heads, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")]
                        for line in section("speed").splitlines() if line.startswith("|")]
    batches, records = [int(head.removeprefix("batch ")) for head in heads[4:]], measured_fan_in_speed()
    sizes = {(name, row["inputs"]) for name, one in records.items() for row in one["rows"]}
    assert len(lines) == 4 * len(sizes) >= 8 and {1, 64, 256} < set(batches)
    for processor, shape, way, peer, *ratios in lines:
        inputs, outputs = map(int, shape.split(" x "))
        for batch, ratio in zip(batches, ratios):
            medians, = (row["median_seconds"] for row in records[processor]["rows"] if row["sparsity"] == 0.9
                        and (row["inputs"], row["outputs"], row["way"], row["batch"]) == (inputs, outputs, way, batch))
            assert abs(float(ratio) - medians[peer] / medians["fan-in"]) < 0.051
    assert all("dirty" not in one["commit"] and one["commit"] in section("speed") for one in records.values())


def test_every_ratio_of_a_network_is_one_of_medians():
    heads, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")]
                        for line in section("networks").splitlines() if line.startswith("|")]
    names, records = {shown: place for place, shown in NETWORKS.items()}, measured_whole_networks()
    ways = dict(zip(heads[6:], WAYS))
    rows = {(processor, row["network"], row["replaced"], row["step"], row["batch"]): row
            for processor, record in records.items() for row in record["rows"] if row["threads"] == 1}
    assert len(lines) == len([key for key in rows if key[1:3] in NETWORKS]) >= 10
    for line in lines:
        processor, network, replaced, step, batch, bound, *ratios = line
        assert names[network][1] == replaced
        row = rows[processor, names[network][0], replaced, step, int(batch)]
        assert abs(float(bound) - row["bound"]) < 0.051
        medians = row["median_seconds"]
        assert {way for way, ratio in zip(ways.values(), ratios) if ratio} == medians.keys() - {"dense"}
        for way, ratio in zip(ways.values(), ratios):
            assert not ratio or abs(float(ratio) - medians["dense"] / medians[way]) < 0.051
