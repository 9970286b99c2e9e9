"""Stand-ins for a device that trains by a recorded step, where there is none."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Repeated:
    """Stands for a CUDA graph: what is recorded is kept, and called."""

    def __init__(self):
        self.replays = 0

    def capture(self, prepare, work):
        prepare()
        self._work = work

    def replay(self):
        self._work()
        self.replays += 1


class OnDeviceOnly(TorchDispatchMode):
    """Fails where a tensor of the CPU takes part: it would be copied, which a graph cannot hold.

    On meta tensors everything that asks for a value fails as well: they have none.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            assert not isinstance(leaf, torch.Tensor) or leaf.is_meta, f"{function} on the CPU"
        return result
