"""torchvision comes untouched where its operators load, helped where only they are missing; other errors come out."""

import os
import subprocess
import sys
from pathlib import Path

import torch

import permask_core
from permask_core.models.vision import torchvision

FAKES = {
    "broken": 'raise RuntimeError("built for another torch")',
    "whole": "import torch\nfake = True",
    "without operators": ('import torch\nif not hasattr(torch.ops.torchvision, "nms"):\n'
                          '    raise RuntimeError("operator torchvision::nms does not exist")\nfake = True'),
}
IMPORT_EACH = """
import sys, torch
for folder in sys.argv[1:]:
    sys.path.insert(0, folder)
    for name in ("torchvision", "permask_core.models.vision"):
        sys.modules.pop(name, None)
    try:
        from permask_core.models.vision import torchvision
        print(torchvision.fake, hasattr(torch.ops.torchvision, "nms"))
    except RuntimeError as error:
        print(error)
"""


def test_torchvision_as_it_may_be_found(tmp_path):
    for name, source in FAKES.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "torchvision.py").write_text(source)
    done = subprocess.run([sys.executable, "-c", IMPORT_EACH, *(tmp_path / name for name in FAKES)], text=True,
                          env={**os.environ, "PYTHONPATH": str(Path(permask_core.__file__).parent.parent)},
                          capture_output=True)
    assert done.stdout.splitlines() == ["built for another torch", "True False", "True True"], done.stderr


def test_the_real_one_works_here():
    model = torchvision.models.resnet18(num_classes=10)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    flip = torchvision.transforms.functional.hflip
    assert flip(torch.tensor([[[1, 2]]])).tolist() == [[[2, 1]]]
