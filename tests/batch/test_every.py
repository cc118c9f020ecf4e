"""Every notebook as a job, as small as it runs, with the widgets of a live notebook, which the book never draws.

A kernel would import everything again for each of them, and drawing takes half of the time:
tests/batch/test_snakefile.py runs a few jobs in kernels, `make test-long` the grid of all notebooks, and the book draws
every figure.
"""

import json

import pytest

from batch.grids import ROOT, _parsed
from tests.notebooks import run

JOBS, FAULTS = _parsed(ROOT / "tests" / "batch" / "every.yaml")  # its parameters are checked in test_grids.py


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """The folder of stages, which the jobs of a grid share."""
    return tmp_path_factory.mktemp("store")


@pytest.mark.parametrize("job", JOBS.values(), ids=lambda job: job.notebook)
def test_a_job_leaves_its_results(job, store, tmp_path):
    folder = tmp_path / "output"
    parameters = {**job.parameters, "runs": str(store), "output": str(folder)}
    run(job.notebook, parameters, tmp_path, display="live", draw=False)
    found = json.loads((folder / "results.json").read_text())
    assert found.keys() >= {"commit", "device", "versions", "settings", "runs"}  # what batch/job.py reads
    assert found["runs"] and (folder / "results.svg").is_file()
