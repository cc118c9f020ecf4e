"""The one place that imports torchvision; everything else takes it from here.

A CPU build of torch beside torchvision's published wheel fails at import, because torchvision describes the shapes of
its compiled operators ``nms`` and ``qnms`` and those did not load. Declaring the two schemas first lets the import
pass. Where the compiled operators do load, nothing is declared. Without them, ``torchvision.ops.nms`` and the decoders
of ``torchvision.io`` are unavailable: images are decoded with PIL.
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
    # The fragment has to stay referenced: when it is collected, its schemas go with it.
    _schemas = torch.library.Library("torchvision", "FRAGMENT")
    _schemas.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _schemas.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

__all__ = ["torchvision"]
