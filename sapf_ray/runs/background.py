"""Work on a thread of its own, so that the main thread keeps ctrl-C."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


def in_background(call: Callable[[], Any], name: str) -> Future[Any]:
    """``call()`` on a thread of this name.

    On the main thread Ray Train and Tune take SIGINT for themselves and leave with exit code 0;
    where the main thread waits instead, ctrl-C reaches the caller as KeyboardInterrupt in every
    stage alike.
    """
    outcome: Future[Any] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True, name=name).start()
    return outcome
