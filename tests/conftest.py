"""What the tests share: the digits, one network trained on them, and a store of each test's own."""

import gc
import os
import shutil
from pathlib import Path

# Triton decides when it is imported whether it interprets its kernels, which is how they are tested without a GPU.
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

from permask_core.data import load_dataset
from permask_core.models import build_model
from permask_core.runs.store import Store
from permask_core.training import Recipe, fit

# How long an example takes says more about who else uses the machine. Continuous integration repeats the same examples
# after every push; new failing ones are searched for on a developer's machine and, longer, by PERMASK_HYPOTHESIS=long.
settings.register_profile("local", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=60)
settings.register_profile("ci", settings.get_profile("local"), derandomize=True)
settings.register_profile("long", settings.get_profile("local"), max_examples=300)
settings.load_profile(os.environ.get("PERMASK_HYPOTHESIS") or ("ci" if os.environ.get("CI") else "local"))

# The files that take longest, the longest first: begun last, one would keep a process waiting for the other.
LONGEST = ["slurm/test_slurm.py", "batch/test_every.py", "browser/test_pages.py", "browser/test_controls.py",
           "test_benchmarks.py", "sparse/test_kernels.py", "sparse/test_triton.py", "runs/test_processes.py",
           "test_image_notebooks.py", "test_fairness_notebooks.py", "training/test_loop.py", "book/test_own_code.py",
           "batch/test_snakefile.py", "runs/test_store.py", "evaluation/test_fairness.py", "sparse/test_convolution.py",
           "sparse/test_fan_in.py", "matching/tracer/test_trace.py"]


def pytest_collection_modifyitems(items):
    ranks = {Path(__file__).parent / name: rank for rank, name in enumerate(LONGEST)}
    assert all(path.exists() for path in ranks), f"LONGEST names a file that there is not: {LONGEST}"
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


def pytest_collection_finish():
    """What the tests have imported lives to the end: the garbage collector need not search it again and again."""
    gc.freeze()


torch.set_num_threads(1)  # for the fixtures of modules too, which come before those of tests


@pytest.fixture(autouse=True)
def one_thread():
    """The number of threads affects the last bits of sums: a test that changes it fails, not the next one."""
    torch.set_num_threads(1)
    yield
    assert torch.get_num_threads() == 1, f"the test leaves {torch.get_num_threads()} threads"


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "runs")


@pytest.fixture(scope="session")
def digits():
    return load_dataset("digits")


@pytest.fixture(scope="session")
def trained(digits):
    """A small network trained on the digits, in evaluation mode; not to be changed."""
    model = build_model("mlp", digits.input_shape, digits.classes, width=0.25)
    fit(model, digits.train, Recipe(3), seed=0)
    return model.eval()


@pytest.fixture(autouse=True)
def seeded():
    """Draws that a test does not seed itself are the same in whatever order the tests run."""
    torch.manual_seed(0)
