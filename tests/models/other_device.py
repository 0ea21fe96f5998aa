"""A mask as if on another device, on machines that have only one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Elsewhere(Tensor):
    """Refuses, as a mask on a GPU does, to index a tensor of another device; `.to(...)` gives a plain tensor."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.__getitem__, Tensor.__setitem__) and not isinstance(args[0], cls):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor")
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
            if not isinstance(found, Tensor):
                return found
            return found.as_subclass(Tensor if func is Tensor.to else cls)


def elsewhere(mask: Tensor) -> Tensor:
    return mask.as_subclass(Elsewhere)
