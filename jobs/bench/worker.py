"""One contender in a process of its own: reads JSON lines from stdin, answers on stdout.

Requests: ``{"setup": name, "case": {...}}``, ``{"step": true}``, ``{"flops": true}``,
``{"save": path}``. Every answer is one object; ``{"error": text}`` where the contender cannot do
what was requested.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from jobs.bench.contenders import CONTENDERS
from jobs.bench.models import Case
from sapf_ray.errors import reason

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


def resident_bytes(field: str) -> int:
    """``VmRSS`` or its peak ``VmHWM`` of this process."""
    if not STATUS.exists():  # macOS: the peak since the process began, in bytes there
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith(field)]
    return 1024 * int(line.split()[1])


class Worker:
    def __init__(self) -> None:
        self.run: Callable[[], Any] = lambda: None
        self.result: Any = None
        self.cuda = False

    def setup(self, request: dict[str, Any]) -> dict[str, Any]:
        case = Case(**request["case"])
        torch.set_num_threads(case.threads)
        torch.set_num_interop_threads(1)
        self.cuda = case.device.startswith("cuda")
        self.run = CONTENDERS[request["setup"]](case)
        gc.collect()
        device = torch.cuda.get_device_name() if self.cuda else "cpu"
        return {"device": device, **self._memory("VmRSS")}

    def step(self, request: dict[str, Any]) -> dict[str, Any]:
        """Seconds of one step, and the highest memory during it."""
        with suppress(OSError):  # where a container forbids it, the peak is that of the whole life
            CLEAR_REFS.write_text("5")
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        self.result = self.run()
        self._wait()
        return {"seconds": time.perf_counter() - start} | self._memory("VmHWM")

    def flops(self, request: dict[str, Any]) -> dict[str, Any]:
        """Floating-point operations of a step's matrix products and convolutions."""
        with FlopCounterMode(display=False) as counter:
            self.run()
        return {"flops": counter.get_total_flops()}

    def save(self, request: dict[str, Any]) -> dict[str, Any]:
        """The last step's result as an array file."""
        np.save(request["save"], np.asarray(self.result))
        return {}

    def _memory(self, field: str) -> dict[str, int]:
        memory = {"rss": resident_bytes(field)}
        if self.cuda:
            memory["cuda"] = (
                torch.cuda.max_memory_allocated()
                if field == "VmHWM"
                else torch.cuda.memory_allocated()
            )
        return memory

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not end up among the answers
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, next(iter(request)))(request)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {reason(error)}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
