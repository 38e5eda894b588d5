"""One line per cell as it starts, breaks off and ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ray.tune import Callback
from ray.tune.progress_reporter import TrialProgressCallback

from sapf_ray.evaluation.metrics import headline
from sapf_ray.runs.directory import RunDirectory


class GridProgress(TrialProgressCallback):
    """Tune's events in the words of a grid; runs in the driver.

    It takes the place of Tune's own lines, hence the base class.

    Args:
        directories: Cell name to run directory.
        say: Called with one line.
        after: Called after each cell.
    """

    def __init__(
        self,
        directories: Mapping[str, Path],
        say: Callable[[str], None],
        *,
        after: Callable[[], object],
    ) -> None:
        super().__init__()
        self.directories = directories
        self.say = say
        self.after = after
        self.broken: set[str] = set()
        self.ended: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> GridProgress:
        return self

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Terminals do not pickle.

        Tune pickles its callbacks to restore a grid from its own state, which is never done here.
        """
        return Callback, ()

    def on_trial_result(
        self,
        iteration: int,
        trials: list[Any],
        trial: Any,
        result: dict[str, Any],
        **info: Any,
    ) -> None:
        """Stages are for Tune's own eyes; a grid has a line for each cell."""

    def on_trial_start(
        self,
        iteration: int,
        trials: list[Any],
        trial: Any,
        **info: Any,
    ) -> None:
        name = trial.config["cell"]
        if name not in self.broken:
            self.say(f"started   {name}")

    def on_trial_recover(
        self,
        iteration: int,
        trials: list[Any],
        trial: Any,
        **info: Any,
    ) -> None:
        name = trial.config["cell"]
        self.broken.add(name)
        self.say(f"broke off {name}; continued from its run directory")

    def on_trial_error(
        self,
        iteration: int,
        trials: list[Any],
        trial: Any,
        **info: Any,
    ) -> None:
        self._end(trial.config["cell"], "FAILED")

    def on_trial_complete(
        self,
        iteration: int,
        trials: list[Any],
        trial: Any,
        **info: Any,
    ) -> None:
        name = trial.config["cell"]
        result = trial.last_result or {}
        error = result.get("error")
        words = f"FAILED: {error}" if error else self._scores(name)
        self._end(name, words)

    def _scores(self, cell: str) -> str:
        run = RunDirectory(self.directories[cell])
        metrics = run.read_json(run.metrics)
        words = [f"{name} {metrics[name]:.4g}" for name in headline() if name in metrics]
        words.append(f"ε spent {float(metrics['epsilon_spent']):.4g}")
        words.append(f"{sum(metrics['seconds'].values()):.0f} s")
        return ", ".join(words)

    def _end(self, name: str, words: str) -> None:
        self.ended.add(name)
        done = f"{len(self.ended)}/{len(self.directories)} done"
        self.say(f"{done} {name}: {words}")
        self.after()
