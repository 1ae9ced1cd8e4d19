"""A GPU that is none: tensors that say they are on "cuda" and cannot be mixed with those on "cpu".

They are computed on the CPU, so results are equal bit for bit, and a tensor that a function left on
the other device is an error, as it is on a real GPU.
"""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

# An index, and what is assigned, may lie on the CPU.
MIXED = (torch.Tensor.__getitem__, torch.Tensor.__setitem__, torch.Tensor.copy_)


class OnGPU(torch.Tensor):
    """A tensor on the simulated GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl


class SimulatedGPU(TorchFunctionMode):
    """Within it `cuda` is a device; single numbers may be on any."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if getattr(function, "__self__", None) is torch.Tensor.device:
            return torch.device("cuda" if isinstance(args[0], OnGPU) else "cpu")
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        on_gpu = any(isinstance(t, OnGPU) for t in tensors)
        if function is torch.Tensor.cpu:
            function, args = torch.Tensor.to, (*args, "cpu")
        if function is torch.Tensor.to:
            on_gpu, args, kwargs = self._moved(args, kwargs)
        elif str(kwargs.get("device", "")).startswith("cuda"):
            on_gpu = bool(kwargs.pop("device"))
        elif on_gpu and function not in MIXED:
            strays = [t for t in tensors if t.ndim and not isinstance(t, OnGPU)]
            if strays or function is torch.Tensor.numpy:
                raise RuntimeError(f"{function} of tensors on two devices, or on the wrong one")
        kind = OnGPU if on_gpu else torch.Tensor

        def placed(leaf):
            return leaf.as_subclass(kind) if isinstance(leaf, torch.Tensor) else leaf

        return tree_map(placed, function(*args, **kwargs))

    def _moved(self, args, kwargs):
        """Whether `.to` ends on the GPU, and its arguments without the device."""
        tensor, *where = args
        device = kwargs.pop("device", None)
        for word in where:
            if isinstance(word, str | torch.device):
                device = word
            elif isinstance(word, torch.Tensor):
                device = "cuda" if isinstance(word, OnGPU) else "cpu"
                kwargs["dtype"] = word.dtype
            else:
                kwargs["dtype"] = word
        device = device or ("cuda" if isinstance(tensor, OnGPU) else "cpu")
        return str(device).startswith("cuda"), (tensor, "cpu"), kwargs
