"""Lets torchvision import beside a CPU build of torch; import this before it.

The registry's torchvision brings a library for CUDA, which does not load there, and then fails at import because two of
its operators are not declared. No encoder calls them: declaring them is enough.
"""

from __future__ import annotations

import torch


def _declare() -> torch.library.Library | None:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


DECLARED = _declare()  # kept: the declarations end with the object
