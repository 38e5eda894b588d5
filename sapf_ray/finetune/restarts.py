"""Lost workers in the run's log. Ray Train's controller, which calls this, is on the driver's
machine; light to import.
"""

from __future__ import annotations

from typing import Any

from ray.train import ControllerError, UserCallback

from sapf_ray.errors import BudgetError, SapfError, reason
from sapf_ray.runs import runlog


class RestartEvents(UserCallback):
    """One event for each time that the worker group fails. No restart helps where the budget is
    spent: that ends the training at once.

    Args:
        place: Of the log; None where there is none.
        most: Restarts that Ray Train makes.
    """

    def __init__(self, place: runlog.Place | None, most: int) -> None:
        self.place, self.most, self.count = place, most, 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for failure in worker_exceptions.values():
            error = users_error(failure)
            if isinstance(error, BudgetError):
                raise ControllerError(error)  # the one kind that Ray Train does not try again
        self.count += 1
        if self.place is None:
            return
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


def users_error(failure: BaseException) -> SapfError | None:
    """The user's error out of Ray's wrapping; None where it is another."""
    cause: BaseException | None = failure
    while cause is not None:
        if isinstance(cause, SapfError):
            return cause
        cause = getattr(cause, "cause", None) or cause.__cause__
    if BudgetError.__name__ in str(failure):
        return BudgetError(reason(failure, line=-1))
    return None
