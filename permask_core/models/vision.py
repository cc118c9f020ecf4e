"""The only module that imports torchvision; all other modules import it from here.

With a CPU build of torch, the published wheel of torchvision fails at import, because torchvision describes the shapes
of its compiled operators ``nms`` and ``qnms``, which did not load. The import succeeds if the two schemas are declared
first. If the compiled operators do load, nothing is declared. Without them, ``torchvision.ops.nms`` and the decoders of
``torchvision.io`` are unavailable: images are decoded with PIL.
"""

import sys

import torch

from permask_core.models.extras import check_extra

check_extra("this network or data set", "torchvision", "vision")
try:
    import torchvision
except RuntimeError as error:
    if "torchvision::nms does not exist" not in str(error):
        raise
    for _name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[_name]
    # The fragment must remain referenced: its schemas are removed when it is garbage-collected.
    _schemas = torch.library.Library("torchvision", "FRAGMENT")
    _schemas.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _schemas.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

__all__ = ["torchvision"]
