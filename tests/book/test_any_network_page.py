"""What the page on any network says of weight matching next to other programs."""

import statistics

import pandas as pd

from permask_core.data.measured import measured_matching_peers

ROWS = pd.DataFrame(measured_matching_peers()["rows"])
ROWS["time"] = ROWS["seconds"].map(statistics.median)
NEW, COPIES = (ROWS[ROWS["pair"] == pair].pivot(index="network", columns="program")
               for pair in ("two new networks", "a permuted copy"))
OURS, REBASIN, PORT = "permask", "rebasin 0.0.47", "Git Re-Basin, port"
PLAIN, RESIDUAL = ["perceptron 784-512-512-10", "VGG11"], ["ResNet20", "ResNet20 x 4", "ResNet50"]


def test_every_program_keeps_the_function():
    assert {*ROWS["program"]} == {OURS, REBASIN, PORT} and ROWS["change"].max() < 1e-5


def test_copies_are_found_except_by_rebasin_in_residual_networks():
    found = COPIES["in_place"] == 1
    assert found[[OURS, PORT]].all(axis=None) and found.loc[PLAIN].all(axis=None)
    assert COPIES["in_place"].loc[RESIDUAL, REBASIN].max() < 0.8


def test_gains_for_new_networks():
    shares = NEW["gain"].div(NEW["gain"][OURS], axis=0)
    assert (shares.loc[PLAIN] - 1).abs().max(axis=None) < 0.05
    assert shares.loc[RESIDUAL, REBASIN].max() < 0.7


def test_who_takes_the_least_time():
    assert NEW["time"].loc["ResNet50"].idxmin() == OURS
    assert (NEW["time"].loc[["ResNet20", "ResNet20 x 4"]].idxmin(axis=1) == PORT).all()
