"""Where a run is watched."""

from __future__ import annotations

from sapf_ray.config.section import section


@section("tracking")
class TrackingConfig:
    """MLflow.

    Args:
        enabled: Log the run to MLflow.
        uri: Tracking URI; by default MLFLOW_TRACKING_URI, else a sqlite file beside the run
            directory. One that cannot be used is an error before anything is spent, and a warning
            afterwards.
        experiment: MLflow experiment name.
        parent_run_id: MLflow run of the grid that this one belongs to; `sapf tune` sets it.
    """

    enabled: bool = True
    uri: str | None = None
    experiment: str = "sapf"
    parent_run_id: str | None = None
