"""MLflow: the config, the plan, epsilon over releases, scores and pictures of one run.

Only what the mechanism releases, plus labelled non-private scores against real test images, is
logged (design rule 6).
"""

from __future__ import annotations

import functools
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

from sapf_ray.config import RunConfig, flatten, to_dict
from sapf_ray.errors import SapfError, TrackingError, reason
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.planner import PRIVATE_STAGES, PrivacyPlan
from sapf_ray.runs import runlog
from sapf_ray.runs.directory import RunDirectory
from sapf_ray.stages import Stage

CURVE_POINTS = 25
SPENT = "privacy/epsilon_spent"
_P = ParamSpec("_P")


def tracking_uri(config: RunConfig, directory: RunDirectory) -> str:
    """The configured URI, else MLFLOW_TRACKING_URI, else a sqlite file beside the run directory."""
    default = f"sqlite:///{(directory.root.parent / 'mlflow.db').resolve()}"
    return config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or default


def _while_reachable(
    method: Callable[Concatenate[Tracker, _P], None],
) -> Callable[Concatenate[Tracker, _P], None]:
    """A server that goes down in mid-run costs a warning, not the run.

    The same command logs what is missing.
    """

    @functools.wraps(method)
    def call(self: Tracker, *arguments: _P.args, **options: _P.kwargs) -> None:
        if self.client is None:
            return
        try:
            method(self, *arguments, **options)
        except Exception as error:  # mlflow, requests and sqlalchemy raise their own families
            if isinstance(error, SapfError) and not isinstance(error, TrackingError):
                raise
            runlog.event("tracking_lost", runlog.WARNING, error=type(error).__name__)
            if not self.lost:
                logging.getLogger(__name__).warning(
                    "sapf: warning: MLflow at %s cannot be reached any more (%s); the run goes on, "
                    "and the same command logs what is missing once it is back",
                    self.uri,
                    type(error).__name__,
                )
            self.lost = True

    return call


class Tracker:
    """One MLflow run; continued when the run directory is."""

    def __init__(self, uri: str | None, run_id: str | None) -> None:
        self.uri = uri
        self.run_id = run_id
        self.client: Any = None
        self.lost = False  # the server went down after the start

    @classmethod
    def open(
        cls,
        config: RunConfig,
        directory: RunDirectory,
        *,
        params: dict[str, Any] | None = None,
    ) -> Tracker:
        """Connects before any budget is spent.

        Args:
            config: The run's config.
            directory: The run directory; it keeps the id of the MLflow run.
            params: MLflow parameters; the flat config unless given.

        Raises:
            TrackingError: The store cannot be reached.
        """
        if not config.tracking.enabled:
            return cls(None, None)
        uri = tracking_uri(config, directory)
        _probe(uri)
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        from mlflow import MlflowClient  # slow import, only where tracking is on
        from mlflow.exceptions import MlflowException

        # importing mlflow sets its own levels
        for name in ("mlflow", "mlflow.store.db.utils", "alembic", "urllib3.connectionpool"):
            logging.getLogger(name).setLevel(logging.ERROR)
        if params is None:
            params = flatten(to_dict(config))
        tracker = cls(uri, None)
        try:
            tracker.client = MlflowClient(tracking_uri=uri)
            tracker._continue_or_create(config, directory, params=params)
        except MlflowException as error:
            raise TrackingError(f"tracking.uri = {uri}: {reason(error)}") from error
        except Exception as error:  # sqlalchemy and requests raise their own families
            raise TrackingError(
                f"tracking.uri = {uri}: cannot be used ({type(error).__name__}: {reason(error)})"
            ) from error
        return tracker

    def _continue_or_create(
        self,
        config: RunConfig,
        directory: RunDirectory,
        *,
        params: dict[str, Any],
    ) -> None:
        if directory.mlflow.exists():
            self.run_id = directory.read_json(directory.mlflow)["run_id"]
            self.client.update_run(self.run_id, status="RUNNING")
            return
        parent = config.tracking.parent_run_id
        tags = {"mlflow.parentRunId": parent} if parent is not None else {}
        run = self.client.create_run(
            self._experiment(config.tracking.experiment),
            run_name=directory.root.name,
            tags=tags,
        )
        self.run_id = run.info.run_id
        for key, value in params.items():
            self.client.log_param(self.run_id, key, value)
        directory.write_json(directory.mlflow, {"run_id": self.run_id, "uri": self.uri})

    def _experiment(self, name: str) -> str:
        """Id of the experiment, made where there is none."""
        found = self.client.get_experiment_by_name(name)
        if found is not None:
            return found.experiment_id
        location = None
        if self.uri is not None and self.uri.startswith("sqlite:///"):
            folder = Path(self.uri.removeprefix("sqlite:///")).parent
            location = (folder / "mlartifacts").resolve().as_uri()
        return self.client.create_experiment(name, artifact_location=location)

    @_while_reachable
    def log_plan(self, plan: PrivacyPlan) -> None:
        """What the run may spend, and on what."""
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
        *,
        metrics: Mapping[str, Any],
        grid: Path,
        not_private: Sequence[str] = (),
    ) -> None:
        """Logs the scores and the artifacts, and closes the run.

        Args:
            directory: Where the artifacts are.
            plan: The run's plan, for the tags.
            metrics: Content of ``metrics.json``; every number in it is logged, nested ones as
                ``stage/name``.
            grid: The picture.
            not_private: Names of scores that were computed from real images outside the privacy
                mechanism.
        """
        if self.uri is not None:
            _probe(self.uri)
        # missed while the server was down
        if SPENT not in self.client.get_run(self.run_id).data.metrics:
            self._log_spend(Ledger.open(directory.ledger))
        for key, value in flatten(dict(metrics)).items():
            if isinstance(value, int | float):
                self.client.log_metric(self.run_id, key.replace(".", "/"), float(value))
        self.client.set_tag(self.run_id, "privacy.adjacency", plan.adjacency)
        self.client.set_tag(self.run_id, "privacy.accountant", plan.accountant)
        if not_private:
            names = ", ".join(sorted(not_private))
            self.client.set_tag(self.run_id, "privacy.not_private", names)
        self.client.log_artifact(self.run_id, str(grid), "pictures")
        self._log_files(directory)
        self.client.set_terminated(self.run_id)

    def _log_files(self, directory: RunDirectory) -> None:
        for path in (
            directory.config,
            directory.plan,
            directory.ledger,
            directory.grounding,
            directory.selection,
            directory.metrics,
            directory.card,
        ):
            if path.exists():
                self.client.log_artifact(self.run_id, str(path))
        if directory.adapter.exists():
            self.client.log_artifacts(self.run_id, str(directory.adapter), "adapter")


def _probe(uri: str) -> None:
    """Reports a server that is down in seconds, not after MLflow's minutes of retries."""
    if not uri.startswith(("http://", "https://")):
        return
    try:
        urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=5).close()
    except urllib.error.HTTPError:
        return  # something answers there
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", error)
        raise TrackingError(
            f"tracking.uri = {uri}: the MLflow server does not answer ({why}); start it, give "
            "another --tracking.uri, or run with --tracking.enabled false"
        ) from error
