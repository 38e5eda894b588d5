"""MLflow: the config, the plan, epsilon over releases, scores and pictures of one run.

Only what the mechanism releases, plus labelled non-private scores against real test images, is
logged (design rule 6).
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

from sapf_ray.config import RunConfig, flatten, to_dict
from sapf_ray.errors import RunDirectoryError, SapfError, TrackingError
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.planner import PRIVATE_STAGES, PrivacyPlan
from sapf_ray.privacy.verdict import Verdict
from sapf_ray.runs import mlflow_page, runlog, stores
from sapf_ray.runs.directory import ResultDirectory, RunDirectory
from sapf_ray.stages import Stage

CURVE_POINTS = 25
SPENT = "privacy/epsilon_spent"
# MLflow's limits
PARAMS_AT_ONCE = 100
PARAM_LETTERS = 6000
_P = ParamSpec("_P")


def tracking_uri(config: RunConfig, directory: RunDirectory) -> str:
    """The configured URI, else MLFLOW_TRACKING_URI, else a sqlite file beside the run directory.

    Raises:
        TrackingError: The run directory's path cannot be part of an address.
    """
    given = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    return given or stores.sqlite_uri(directory.root.resolve().parent / "mlflow.db")


def warn(line: str) -> None:
    """One line for people, on stderr; the run goes on."""
    logging.getLogger(__name__).warning("sapf: warning: %s", line)


def _raise_ours(error: Exception) -> None:
    """What is no trouble of the store's is the run's own error."""
    if isinstance(error, SapfError) and not isinstance(error, TrackingError):
        raise error


def _while_reachable(
    method: Callable[Concatenate[Tracker, _P], None],
) -> Callable[Concatenate[Tracker, _P], None]:
    """Trouble with the store in mid-run costs a warning, not the run.

    Where the MLflow run was deleted, a new one is opened; a store that is gone is tried again at
    the next call, and by the same command.
    """

    @functools.wraps(method)
    def call(self: Tracker, *arguments: _P.args, **options: _P.kwargs) -> None:
        if self.uri is None:
            return
        try:
            if self.lost:
                self._connect()
            try:
                method(self, *arguments, **options)
            except Exception as error:
                _raise_ours(error)
                if not self._renewed():
                    raise
                method(self, *arguments, **options)
        except Exception as error:  # mlflow, requests and sqlalchemy raise their own families
            _raise_ours(error)
            self._lose(error)

    return call


class Tracker:
    """One MLflow run; continued when the run directory is.

    Attributes:
        uri: Address of the store; None where nothing is tracked.
        run_id: The MLflow run; None until there is one.
        client: MLflow's; None until it is connected.
        lost: Whether the store failed after the run began.
    """

    def __init__(self, uri: str | None, run_id: str | None) -> None:
        self.uri = uri
        self.run_id = run_id
        self.client: Any = None
        self.lost = False
        self._warned = False
        self._plan: PrivacyPlan | None = None
        self._begin: Callable[[Tracker], None] | None = None

    @classmethod
    def open(
        cls,
        config: RunConfig,
        directory: RunDirectory,
        *,
        params: dict[str, Any] | None = None,
        begun: bool | None = None,
    ) -> Tracker:
        """Connects before any budget is spent.

        A store that cannot be used is an error as long as nothing is begun: its address may be
        mistyped. Once a budget is being spent, by this run or by the grid it belongs to, it is a
        warning.

        Args:
            config: The run's config.
            directory: The run directory; it keeps the id of the MLflow run.
            params: MLflow parameters; the flat config unless given.
            begun: Whether a budget is being spent already; by default whether the directory has a
                ledger, or the run is a cell of a grid.

        Raises:
            TrackingError: The store cannot be used, and nothing is begun.
        """
        if not config.tracking.enabled:
            return cls(None, None)
        uri = tracking_uri(config, directory)
        if begun is None:
            begun = directory.ledger.exists() or config.tracking.parent_run_id is not None
        tags = {}
        if params is None:
            params = flatten(to_dict(config))
            tags = mlflow_page.tags(params, grid=config.tracking.parent_run_id)
        values = params | {"tracking.uri": stores.shown(uri)}
        tracker = cls(uri, None)
        # no closure over the tracker: the cycle would keep a dropped run directory, and its lock
        tracker._begin = functools.partial(
            cls._continue_or_create, config=config, directory=directory, params=values, tags=tags
        )
        try:
            tracker._connect()
        except Exception as error:  # mlflow, sqlalchemy and requests raise their own families
            _raise_ours(error)
            if begun:
                tracker._lose(error)
            elif isinstance(error, TrackingError):
                raise
            else:
                raise stores.unusable(uri, error) from error
        return tracker

    def _connect(self) -> None:
        """A client, and an MLflow run that can be written.

        Raises:
            Exception: Of mlflow's, sqlalchemy's, requests' or our own family.
        """
        if self.uri is None or self._begin is None:
            return
        stores.probe(self.uri)
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        from mlflow import MlflowClient  # slow import, only where tracking is on

        # importing mlflow sets its own levels
        for name in ("mlflow", "mlflow.store.db.utils", "alembic", "urllib3.connectionpool"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self.client = MlflowClient(tracking_uri=self.uri)
        self._begin(self)
        self.lost = False
        if self._plan is not None:
            self._log_plan(self._plan)

    def _renewed(self) -> bool:
        """Whether the MLflow run was gone and another could be opened in its place."""
        before = self.run_id
        try:
            self._connect()
        except Exception as error:
            _raise_ours(error)
            return False
        return self.run_id != before

    def _lose(self, error: Exception) -> None:
        runlog.event("tracking_lost", runlog.WARNING, error=type(error).__name__)
        self.lost = True
        if self._warned or self.uri is None:
            return
        self._warned = True
        text = str(error) if isinstance(error, TrackingError) else stores.why(error, self.uri)
        warn(
            f"MLflow at {stores.shown(self.uri)} cannot be reached or written ({text}); the run "
            "goes on, and the same command logs what is missing once it can"
        )

    def _continue_or_create(
        self,
        config: RunConfig,
        directory: RunDirectory,
        *,
        params: dict[str, Any],
        tags: dict[str, str],
    ) -> None:
        if directory.mlflow.exists() and self._continued(directory):
            return
        run = self.client.create_run(
            mlflow_page.experiment(self.client, config.tracking.experiment, uri=self.uri or ""),
            run_name=directory.name,
            tags=tags,
        )
        self.run_id = run.info.run_id
        self._log_params(params)
        saved = {"run_id": self.run_id, "uri": stores.shown(self.uri or "")}
        directory.write_json(directory.mlflow, saved)

    def _log_params(self, values: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(key, str(value)[:PARAM_LETTERS]) for key, value in values.items()]
        for start in range(0, len(params), PARAMS_AT_ONCE):
            self.client.log_batch(self.run_id, params=params[start : start + PARAMS_AT_ONCE])

    def _continued(self, directory: RunDirectory) -> bool:
        """Whether the MLflow run of an earlier start can be written; if so, it is taken up."""
        from mlflow.exceptions import MlflowException

        try:
            run_id = directory.read_json(directory.mlflow)["run_id"]
            run = self.client.get_run(run_id)
            experiment = self.client.get_experiment(run.info.experiment_id)
            stages = {run.info.lifecycle_stage, experiment.lifecycle_stage}
            if stages == {"active"}:
                self.client.update_run(run_id, status="RUNNING")
                self.run_id = run_id
                return True
            what = "was deleted"
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            what = "is not there"
        except (RunDirectoryError, KeyError, TypeError):
            what = f"is not known ({directory.mlflow} is damaged)"
        warn(
            f"the MLflow run of {directory.root} {what} at {stores.shown(self.uri or '')}; a new "
            "one is opened"
        )
        return False

    @_while_reachable
    def log_plan(self, plan: PrivacyPlan) -> None:
        """What the run may spend, and on what."""
        self._plan = plan
        self._log_plan(plan)

    def _log_plan(self, plan: PrivacyPlan) -> None:
        values: dict[str, float | None] = {
            "privacy/epsilon_planned": plan.epsilon,
            "privacy/delta": plan.delta,
            "privacy/composed_epsilon": plan.composed_epsilon,
            "privacy/n_records": plan.n_records,
            "privacy/sample_rate": plan.sample_rate,
        }
        for stage in PRIVATE_STAGES:
            part = getattr(plan, stage)
            if part is not None:
                values[f"privacy/{stage}_noise_multiplier"] = part.noise_multiplier
                values[f"privacy/{stage}_share"] = part.share
        for key, value in values.items():
            if value is not None and value < float("inf"):
                self.client.log_metric(self.run_id, key, float(value))

    def fail(self, status: str) -> None:
        """Marks the MLflow run as failed or killed, if the server can be reached."""
        if self.client is None or self.lost:
            return
        try:
            self.client.set_terminated(self.run_id, status=status)
        except Exception:  # the run's own error is the one to show
            log = logging.getLogger(__name__)
            log.debug("could not mark the MLflow run %s", status, exc_info=True)

    @_while_reachable
    def log_spend(self, ledger: Ledger) -> None:
        """Epsilon spent over the steps of fine-tuning, or over the histograms of an evolution."""
        self._log_spend(ledger)

    def _log_spend(self, ledger: Ledger) -> None:
        stage = Stage.FINETUNE if ledger.plan.evolution is None else Stage.EVOLUTION
        for step, epsilon in ledger.epsilon_curve(CURVE_POINTS, stage):
            if epsilon < float("inf"):
                self.client.log_metric(self.run_id, SPENT, epsilon, step=step)

    @_while_reachable
    def finish(
        self,
        directory: RunDirectory,
        plan: PrivacyPlan,
        verdict: Verdict,
        *,
        metrics: Mapping[str, Any],
        grid: Path,
        not_private: Sequence[str] = (),
    ) -> None:
        """Logs the scores and the artifacts, and closes the run.

        Args:
            directory: Where the artifacts are.
            plan: The run's plan, for the tags.
            verdict: What the results may be called.
            metrics: Content of ``metrics.json``; every number in it is logged, nested ones as
                ``stage/name``.
            grid: The picture.
            not_private: Names of scores that were computed from real images outside the privacy
                mechanism.
        """
        if self.uri is not None:
            stores.probe(self.uri)
        # missed while the server was down
        if SPENT not in self.client.get_run(self.run_id).data.metrics:
            self._log_spend(Ledger.open(directory.ledger))
        self._log_metrics(metrics, not_private)
        self.client.set_tag(self.run_id, mlflow_page.RELEASE, verdict.answer)
        self.client.set_tag(self.run_id, "privacy.adjacency", plan.adjacency)
        self.client.set_tag(self.run_id, "privacy.accountant", plan.accountant)
        self.client.log_artifact(self.run_id, str(grid), "pictures")
        self._log_files(directory)
        self.client.set_terminated(self.run_id)

    @_while_reachable
    def finish_result(
        self,
        directory: ResultDirectory,
        verdict: Verdict,
        *,
        metrics: Mapping[str, Any],
        not_private: Sequence[str] = (),
    ) -> None:
        """Logs what was made from a finished run later, and closes the entry.

        Args:
            directory: Where it is.
            verdict: What the run's results may be called.
            metrics: As :meth:`finish`.
            not_private: As :meth:`finish`.
        """
        self._log_metrics(metrics, not_private)
        self.client.set_tag(self.run_id, mlflow_page.RELEASE, verdict.answer)
        self.client.set_tag(self.run_id, "sapf.result_of", directory.root.resolve().name)
        for path in (directory.config, directory.metrics, directory.card):
            self.client.log_artifact(self.run_id, str(path))
        if directory.sample_grid.exists():
            self.client.log_artifact(self.run_id, str(directory.sample_grid), "pictures")
        self.client.set_terminated(self.run_id)

    @_while_reachable
    def seal(self, manifest: str) -> None:
        """Tags the finished run with the digest of its manifest, which covers all its files.

        Args:
            manifest: SHA-256, hex.
        """
        self.client.set_tag(self.run_id, mlflow_page.MANIFEST, manifest)
        self.client.set_terminated(self.run_id)

    def _log_metrics(self, metrics: Mapping[str, Any], not_private: Sequence[str]) -> None:
        for key, value in flatten(dict(metrics)).items():
            if isinstance(value, int | float):
                name = mlflow_page.NOT_PRIVATE + key if key in not_private else key
                self.client.log_metric(self.run_id, name.replace(".", "/"), float(value))
        if not_private:
            names = ", ".join(sorted(not_private))
            self.client.set_tag(self.run_id, "privacy.not_private", names)

    def _log_files(self, directory: RunDirectory) -> None:
        for path in (
            directory.config,
            directory.plan,
            directory.ledger,
            directory.grounding,
            directory.head,
            directory.selection,
            directory.metrics,
            directory.card,
            directory.card_json,
        ):
            if path.exists():
                self.client.log_artifact(self.run_id, str(path))
        if directory.adapter.exists():
            self.client.log_artifacts(self.run_id, str(directory.adapter), "adapter")
