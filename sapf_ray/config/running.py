"""Where the work runs and where it is watched."""

from __future__ import annotations

from dataclasses import dataclass

from sapf_ray.config.checks import positive_int


@dataclass(frozen=True)
class TrackingConfig:
    """MLflow.

    Args:
        enabled: Log the run to MLflow.
        uri: Tracking URI; by default MLFLOW_TRACKING_URI, else a sqlite file beside the run directory.
        experiment: MLflow experiment name.
    """

    enabled: bool = True
    uri: str | None = None
    experiment: str = "sapf"


@dataclass(frozen=True)
class ClusterConfig:
    """Where the work runs.

    Args:
        address: Ray address (auto, ray://host:10001, host:6379); by default a local Ray is started.
        num_cpus: Cores of the local Ray; by default all of the machine.
        keep_cache: Keep the sensitive latent cache after the run (mode 0600); by default it is deleted.
    """

    address: str | None = None
    num_cpus: int | None = None
    keep_cache: bool = False

    def __post_init__(self) -> None:
        if self.num_cpus is not None:
            positive_int("cluster", self, "num_cpus")
