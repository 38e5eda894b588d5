"""What makes MLflow's page open on the comparison of runs.

MLflow 3 takes an experiment without runs for one of GenAI traces until a tag tells otherwise, and
folds the children of a run away; so the kind is set, the cells of a grid stand beside its summary,
and a saved view has the columns that compare them. Whether a browser shows the pages of GenAI or of
training is a switch of its own, GenAI at first (3.17); an address that ends in
``runs?workflowType=machine_learning&viewStateShareKey=sapf`` opens on the view at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sapf_ray.methods import method_of
from sapf_ray.runs import stores

GRID = "sapf.grid"
"""Tag of a cell's MLflow run: the id of its grid's."""

NOTE = "mlflow.note.content"
"""Tag of an experiment: its description, Markdown."""

KIND = "mlflow.experimentKind"
TRAINING = "custom_model_development"

VIEW = "mlflow.sharedViewState.sapf"
VIEW_NAME = "method × ε × scores"
NOT_PRIVATE = "non_private/"
"""What names of scores begin with: measurements on real images, outside the mechanism."""

RELEASE = "privacy.release"
"""Tag: whether a run's results may be given away, and why not."""

_COLUMNS = (
    "tags.`method`",
    "params.`privacy.epsilon`",
    "metrics.`privacy/epsilon_spent`",
    f"tags.`{RELEASE}`",
    f"metrics.`{NOT_PRIVATE}accuracy`",
    f"metrics.`{NOT_PRIVATE}conditional_fidelity`",
    f"metrics.`{NOT_PRIVATE}fid_glyph`",
    f"metrics.`{NOT_PRIVATE}fid`",
    "params.`model.path`",
    "params.`data.source`",
    "params.`seed`",
)


def view() -> str:
    """The value of :data:`VIEW`: a view as MLflow's page saves it (3.17), under a name."""
    state = {
        "selectedColumns": list(_COLUMNS),
        "columnOrder": list(_COLUMNS),
        "orderByKey": f"metrics.`{NOT_PRIVATE}accuracy`",
        "orderByAsc": False,
    }
    made = {"name": VIEW_NAME, "createdAt": 0, "updatedAt": 0, "state": json.dumps(state)}
    return json.dumps(made)


MANIFEST = "sapf.manifest_sha256"
"""Tag: digest of a run's ``manifest.json``, for ``sapf verify --manifest-digest``."""


def tags(flat: Mapping[str, Any], *, grid: str | None) -> dict[str, str]:
    """Tags of a run: its method, and the grid that it belongs to.

    Args:
        flat: Its config, dotted keys.
        grid: ``tracking.parent_run_id``.
    """
    found = {"method": method_of(flat), RELEASE: "no: not finished"}
    # not mlflow.parentRunId: MLflow's page folds children away
    return found if grid is None else {**found, GRID: grid}


_NAMES = 100


def _tags() -> dict[str, str]:
    primary = f"{NOT_PRIVATE}accuracy"
    return {KIND: TRAINING, "mlflow.experiment.primaryMetric.name": primary, VIEW: view()}


def experiment(client: Any, name: str, *, uri: str) -> str:
    """Id of the experiment, made where there is none; its page shows runs.

    The name of a deleted experiment cannot be used again, so ``name-2`` follows, and so on.

    Args:
        client: MLflow's.
        name: ``tracking.experiment``.
        uri: Address of the store; a sqlite file's artifacts lie beside it.
    """
    for number in range(1, _NAMES):
        candidate = name if number == 1 else f"{name}-{number}"
        found = client.get_experiment_by_name(candidate) or _made(client, candidate, uri)
        if found.lifecycle_stage != "active":
            continue
        for key, value in _tags().items():
            if key not in found.tags:
                client.set_experiment_tag(found.experiment_id, key, value)
        return found.experiment_id
    raise ValueError(f"the experiments {name} to {name}-{_NAMES - 1} are all deleted")


def _made(client: Any, name: str, uri: str) -> Any:
    from mlflow.exceptions import MlflowException

    path = stores.sqlite_path(uri)
    location = None if path is None else (path.parent / "mlartifacts").resolve().as_uri()
    try:
        client.create_experiment(name, artifact_location=location, tags=_tags())
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another run was faster
            raise
    return client.get_experiment_by_name(name)
