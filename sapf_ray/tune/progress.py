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
    """Tune's events in the words of a grid; runs in the driver. In place of Tune's own lines, hence
    the base class.

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
        self.directories, self.say, self.after = directories, say, after
        self.broken: set[str] = set()
        self.ended: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> GridProgress:
        return self

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Tune pickles its callbacks to restore a grid from its own state, which ours never does:
        terminals do not pickle.
        """
        return Callback, ()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial has one result, its end."""

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if trial.config["cell"] not in self.broken:
            self.say(f"started   {trial.config['cell']}")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        name = trial.config["cell"]
        self.broken.add(name)
        self.say(f"broke off {name}; continued from its run directory")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(trial.config["cell"], "FAILED")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        name = trial.config["cell"]
        error = (trial.last_result or {}).get("error")
        self._end(name, f"FAILED: {error}" if error else self._scores(name))

    def _scores(self, name: str) -> str:
        run = RunDirectory(self.directories[name])
        metrics = run.read_json(run.metrics)
        words = [f"{name} {metrics[name]:.4g}" for name in headline() if name in metrics]
        seconds = sum(metrics["seconds"].values())
        return ", ".join(
            [*words, f"ε spent {float(metrics['epsilon_spent']):.4g}", f"{seconds:.0f} s"]
        )

    def _end(self, name: str, words: str) -> None:
        self.ended.add(name)
        self.say(f"{len(self.ended)}/{len(self.directories)} done {name}: {words}")
        self.after()
