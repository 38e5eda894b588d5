"""The layers of a model that own trained parameters, or why one of them cannot be trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from sapf_ray.errors import ConfigError
from sapf_ray.grad_sample.layers import LAYERS, PARAMETERS, LayerType, NormQuery, layer_type
from sapf_ray.grad_sample.norms import Call


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainedLayer:
    """A layer that owns trained parameters.

    Attributes:
        name: Dotted name in the model.
        layer: The layer itself.
        type: Its row of :data:`LAYERS`.
        parameters: Local name (``weight``, ``bias``) to position in the caller's parameters.
    """

    name: str
    layer: nn.Module
    type: LayerType
    parameters: dict[str, int]

    def squared_norms(
        self,
        calls: Sequence[Call],
        *,
        rows_per_record: int,
        max_temporary_bytes: int,
    ) -> Tensor:
        """(n,) squared norm of each record's gradient of this layer's trained parameters."""
        query = NormQuery(
            trained=self.parameters,
            rows_per_record=rows_per_record,
            max_temporary_bytes=max_temporary_bytes,
        )
        return self.type.squared_norms(self.layer, calls, query=query)


def trained_layers(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> list[TrainedLayer]:
    """The layers of ``model`` that own ``parameters``.

    Args:
        model: The denoiser.
        parameters: Name (for messages) to parameter of the model.

    Raises:
        ConfigError: A parameter is not in the model, is shared between layers, or belongs to a
            layer without a row in :data:`LAYERS`; or the model has a layer that mixes the records
            of a batch.
    """
    position = {id(p): i for i, p in enumerate(parameters.values())}
    names = list(parameters)
    owner: dict[int, str] = {}  # position to module name
    layers = []
    for name, module in model.named_modules():
        _check_keeps_records_apart(name, module)
        local = {n: position[id(p)] for n, p in module._parameters.items() if id(p) in position}
        for i in local.values():
            if i in owner:
                raise _unsupported(
                    names[i], f"is shared by modules {owner[i]!r} and {name!r}; leave it frozen"
                )
            owner[i] = name
        if local:
            row = _row(
                module,
                name,
                local=local,
                names=names,
            )
            layers.append(
                TrainedLayer(
                    name=name,
                    layer=module,
                    type=row,
                    parameters=local,
                )
            )
    missing = [name for i, name in enumerate(names) if i not in owner]
    if missing:
        raise _unsupported(missing[0], f"must be a parameter of the {type(model).__name__}")
    return layers


def _check_keeps_records_apart(name: str, module: nn.Module) -> None:
    if not isinstance(module, nn.modules.batchnorm._BatchNorm):
        return
    if module.training or not module.track_running_stats:
        raise _unsupported(
            name,
            "is batch normalisation, which mixes the records of a batch; no record has its own "
            "gradient",
        )


def _row(
    module: nn.Module,
    name: str,
    *,
    local: dict[str, int],
    names: list[str],
) -> LayerType:
    row = layer_type(module)
    unknown = [n for n in local if row is None or n not in PARAMETERS]
    limits = row.limits(module) if row else ""
    if row is not None and not unknown and not limits:
        return row
    first = unknown[0] if unknown else next(iter(local))
    where = f"belongs to module {name or '(the model itself)'!r} of type {type(module).__name__}"
    kinds = ", ".join(kind.__name__ for kind in LAYERS)
    why = limits or f"per-sample gradient norms exist for weight and bias of {kinds}"
    raise _unsupported(names[local[first]], f"{where}; {why}; leave it frozen")


def _unsupported(name: str, why: str) -> ConfigError:
    return ConfigError("trained parameter", name, why)


def check_supported(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Checks, before any data is read, that every parameter's per-sample norm can be computed.

    Raises:
        ConfigError: As :func:`trained_layers`; it names the parameter, its module and what is
            supported.
    """
    trained_layers(model, parameters)
