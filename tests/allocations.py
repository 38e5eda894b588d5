"""What torch allocates and asks of the device, seen at the dispatcher: exact, and the same on any
machine.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Records new storages while it is active.

    Attributes:
        largest: Bytes of the largest storage allocated.
        peak: Largest sum of bytes of storages allocated here and alive at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.peak = self._at_most = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {
            x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and (key := x.untyped_storage()._cdata) not in before:
                size = x.untyped_storage().nbytes()
                self._live[key] = StorageWeakRef(x.untyped_storage()), size
                self._at_most += size
                self.largest = max(self.largest, size)
        if self._at_most > self.peak:  # perhaps: some may have been freed
            self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
            self._at_most = sum(size for _, size in self._live.values())
            self.peak = max(self.peak, self._at_most)
        return result


class NoSync(TorchDispatchMode):
    """Fails on every operation that makes the host wait for the device."""

    waiting = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        waits = any(name == waiting or name.startswith(waiting + "_") for waiting in self.waiting)
        to_host = (
            name == "_to_copy"
            and (kwargs or {}).get("device") == torch.device("cpu")
            and args[0].device.type != "cpu"
        )
        if waits or to_host:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))
