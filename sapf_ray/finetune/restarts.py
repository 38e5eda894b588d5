"""Lost workers in the run's log. Ray Train's controller, which calls this, is on the driver's
machine; light to import.
"""

from __future__ import annotations

from typing import Any

from ray.train import UserCallback

from sapf_ray.runs import runlog


class RestartEvents(UserCallback):
    """One event for each time that the worker group fails.

    Args:
        place: Of the log.
        most: Restarts that Ray Train makes.
    """

    def __init__(self, place: runlog.Place, most: int) -> None:
        self.place, self.most, self.count = place, most, 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        self.count += 1
        errors = sorted({type(error).__name__ for error in worker_exceptions.values()})
        with runlog.recording(self.place):
            runlog.event(
                "workers_lost",
                runlog.WARNING,
                ranks=sorted(worker_exceptions),
                error=", ".join(errors),
                restart=self.count,
                of=self.most,
            )
