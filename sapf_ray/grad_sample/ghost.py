"""Clipped gradient sums of whole matrices without per-sample gradients in memory.

Ghost clipping [1, 2]: one forward pass, then two backward passes over the same graph.

1. Every trained layer's output passes through a tap, an identity that sees the output gradient.
   Taps reduce activations and backprops to squared per-sample norms
   (:mod:`sapf_ray.grad_sample.layers`). No weight gradient is computed: the pass asks for the
   gradient of a probe that hangs on every tap, which also makes back-propagation stop at the first
   trained layer.
2. Norms become clip factors, and the gradient of ``sum_i factor_i * loss_i`` *is* the clipped sum.

Memory is that of a non-private step plus ``max_temporary_bytes``; nothing grows with batch x
parameters.

Two cases take another pass 2, which repeats the backprops of pass 1 unscaled and forms each layer's
sum from its activations and backprops in float32, factors included, at the price of one more
forward call per layer:

- Less than float32 in the forward pass (bf16 weights, autocast). Scaled backprops would round
  differently from those the norms were taken of, and a sum rounded to bf16 can change by more than
  the clipping norm when one record joins.
- A record with factor 0. A norm that is infinite (above 1.8e19) or not a number gets factor 0
  whatever the clip function says, and ``0 * inf`` is not a number: the record's activations and
  backprops are blanked instead, so nothing of it, not even an overflow in the forward pass, reaches
  the sum.

Sums over micro-batches are integers on a grid and exact, a float32 sum over one micro-batch is not.
When one record is taken away, those that follow it move to other micro-batches, so the rounding of
each may change, and the sum moves a little beyond the clipping norm C. The noise is larger by
``planner.GHOST_SLACK`` = 2^-9 for that. Half of it bounds each of:

- Rounding of m sums of P values to the grid, at most m·√P·grid/2: C·0.0005 for all 860 million
  weights of Stable Diffusion 1.5 in 512 micro-batches.
- Rounding of float32 inside micro-batches. It is *assumed*, not proven, that its norm stays below
  C·2^-10 over the whole batch; ``tests/grad_sample/test_ghost.py`` measures far less.

The host waits for the device twice per call: to see whether some factor is 0, and whether the sums
are finite.

1. Li, Tramer, Liang, Hashimoto, "Large language models can be strong differentially private
   learners", ICLR 2022, section 4.
2. Bu, Mao, Xu, "Scalable and efficient training of large convolutional neural networks with
   differential privacy", NeurIPS 2022.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from types import TracebackType

import torch
from torch import Tensor, nn

from sapf_ray.grad_sample.norms import FLOAT, MAX_TEMPORARY_BYTES, Call, chunks
from sapf_ray.grad_sample.taps import Receive, Tap, graph_nodes, weighted
from sapf_ray.grad_sample.trained import TrainedLayer, trained_layers
from sapf_ray.privacy.fixed_point import grid_step

LOW_PRECISION = (torch.bfloat16, torch.float16)

FINER_BITS = 14
"""How much finer the grid is than where single records are rounded (a power of two)."""


class GhostGradients:
    """Clipped sums of per-record gradients of any parameters of supported layers.

    Args:
        model: The denoiser; the parameters' layers get a forward hook until :meth:`remove`.
        parameters: Name to trainable parameter of ``model``: whole layers, or some parameters of a
            layer. Other parameters are best frozen, so that autograd keeps nothing for them; they
            are never paid for here.
        rows_per_record: K; the model's batch has n·K rows, the K rows of a record side by side.
        max_temporary_bytes: Cap on what the norms of one layer allocate at a time.

    Attributes:
        per_record: Whether a record's gradient stands alone. Here it does not: the sum over a
            micro-batch is all there is, and its rounding depends on who is in it.

    Raises:
        ConfigError: A parameter's per-sample norm is not supported
            (:func:`sapf_ray.grad_sample.trained.check_supported`).
        ValueError: A parameter does not require a gradient.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        >>> with GhostGradients(net, dict(net.named_parameters())) as ghost:
        ...     losses = net(torch.randn(5, 3)).square().sum(1)
        ...     sums = ghost.clipped_sums(losses, lambda norms: (1.0 / norms).clamp(max=1.0))
        >>> [tuple(s.shape) for s in sums]
        [(4, 3), (4,), (1, 4), (1,)]
    """

    per_record = False

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        *,
        rows_per_record: int = 1,
        max_temporary_bytes: int = MAX_TEMPORARY_BYTES,
    ) -> None:
        if not parameters:
            raise ValueError("no parameters to train")
        frozen = [name for name, p in parameters.items() if not p.requires_grad]
        if frozen:
            raise ValueError(f"{frozen[0]}: must require a gradient")
        self.parameters = dict(parameters)
        self.rows_per_record = rows_per_record
        self.max_temporary_bytes = max_temporary_bytes
        self.layers = trained_layers(model, self.parameters)
        self._probe = torch.zeros((), requires_grad=True)
        # of the weights; a forward pass under autocast shows it, too
        self._low_precision = any(p.dtype in LOW_PRECISION for p in model.parameters())
        self._receive: Receive | None = None  # what the taps of the running backward pass do
        self._inside = False
        self._handles = [
            layer.layer.register_forward_hook(self._forward_hook(i), with_kwargs=True)
            for i, layer in enumerate(self.layers)
        ]

    def __enter__(self) -> GhostGradients:
        return self

    def __exit__(self, *exception: type | BaseException | TracebackType | None) -> None:
        self.remove()

    def remove(self) -> None:
        """Takes the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _forward_hook(self, i: int) -> Callable[..., Tensor | None]:
        def hook(
            layer: nn.Module,
            inputs: tuple,
            kwinputs: dict,
            output: Tensor,
        ) -> Tensor | None:
            if self._inside or not output.requires_grad:  # no graph: sampling under no_grad
                return None
            autocast = torch.is_autocast_enabled(output.device.type)
            self._low_precision |= autocast or output.dtype in LOW_PRECISION
            activations = inputs[0] if inputs else next(iter(kwinputs.values()))
            if "weight" not in self.layers[i].parameters:
                # a bias needs no input; autograd does not keep it either
                activations = activations.new_zeros(()).expand(activations.shape)
            return Tap.apply(
                output,
                activations.detach(),
                self._probe,
                i,
                self._show,
            )

        return hook

    def _show(self, layer: int, call: Call) -> None:
        if self._receive is not None:
            self._receive(layer, call)

    def clipped_sums(self, losses: Tensor, clip: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """``sum_i factor_i * gradient_i`` over the records, ``factor = clip(norms)``. Frees the
        graph.

        Args:
            losses: (n,) one loss per record, graph attached; record i's loss depends on the batch
                rows i·K ... (i+1)·K - 1 alone.
            clip: (n,) float64 norms of the records' gradients over all parameters together to (n,)
                factors with ``factor * norm`` at most the clipping norm
                (``privacy.noise.clip_factors``).

        Returns:
            One float32 tensor per parameter, shaped like it, in the order of ``parameters``; zeros
            for a parameter that no loss depends on.

        Raises:
            RuntimeError: A parameter was used outside its layer's call, so its norm is not known.
            ValueError: A layer's batch axis does not have n·K rows (the model folds other axes into
                it).
            FloatingPointError: The sums are not finite: a clip factor or their addition overflowed.
        """
        if losses.dim() != 1 or not losses.requires_grad:
            raise ValueError(
                f"losses of shape {tuple(losses.shape)}: must be (n,) with the graph attached"
            )
        try:
            norms = self._norms(losses)
            factors = clip(norms).to(losses.dtype)
            if factors.shape != losses.shape:
                raise ValueError(
                    f"clip returned {tuple(factors.shape)} for {tuple(losses.shape)} norms"
                )
            factors = factors.detach().masked_fill(~torch.isfinite(norms), 0.0)
            if self._low_precision or bool((factors == 0).any()):
                sums = self._sums_layer_by_layer(losses, factors)
            else:
                sums = self._sums(losses, factors)
        finally:
            self._receive = None
        if not bool(torch.stack([torch.isfinite(s).all() for s in sums]).all()):
            raise FloatingPointError(
                "the clipped sum is not finite: a clip factor or the sum overflowed"
            )
        return sums

    def grid_step(self, clipping_norm: float) -> float:
        """Width of the grid on which sums of micro-batches are added."""
        return grid_step(clipping_norm) * 2.0**-FINER_BITS

    def probe(self, losses: Tensor) -> bytes:
        """The bits of the micro-batch's sum."""
        sums = self.clipped_sums(losses, torch.ones_like)
        return b"".join(part.cpu().numpy().tobytes() for part in sums)

    def clipped_units(
        self,
        losses: Tensor,
        clip: Callable[[Tensor], Tensor],
        *,
        grid: float,
    ) -> list[Tensor]:
        """:meth:`clipped_sums`, rounded to the nearest point of the grid.

        Sums over micro-batches are exact, a float32 sum over one is not: see the module.

        Args:
            losses: (n,) one loss per record, graph attached.
            clip: (n,) norms to (n,) factors.
            grid: The grid's step (:meth:`grid_step`), a power of two.

        Returns:
            One int64 tensor per parameter, shaped like it, in grid steps.
        """
        sums = self.clipped_sums(losses, clip)
        return [part.div_(grid).round_().to(torch.int64) for part in sums]

    def _norms(self, losses: Tensor) -> Tensor:
        """(n,) float64 norm of each record's gradient over all parameters; keeps the graph."""
        expected = self._calls(losses)
        rows = len(losses) * self.rows_per_record
        squared: list[Tensor] = []
        pending: dict[int, list[Call]] = {}

        def receive(layer: int, call: Call) -> None:
            if len(call.backprops) != rows:
                raise ValueError(
                    f"{self.layers[layer].name}: batch axis of {len(call.backprops)} rows, "
                    f"must be {rows} (records x rows of each)"
                )
            calls = pending.setdefault(layer, [])
            calls.append(call)
            if len(calls) == expected[layer]:  # most often the only one
                squared.append(self._squared_norms(self.layers[layer], pending.pop(layer)))

        self._receive = receive
        torch.autograd.grad(
            losses.sum(),
            [self._probe],
            retain_graph=True,
            allow_unused=True,
        )
        for layer, calls in pending.items():  # no gradient reached some call of the layer
            squared.append(self._squared_norms(self.layers[layer], calls))
        if not squared:
            return losses.detach().new_zeros(len(losses), dtype=torch.float64)
        return torch.stack(squared).sum(0).sqrt()

    def _squared_norms(self, layer: TrainedLayer, calls: list[Call]) -> Tensor:
        with torch.autocast(calls[0].backprops.device.type, enabled=False):
            return layer.squared_norms(
                calls,
                rows_per_record=self.rows_per_record,
                max_temporary_bytes=self.max_temporary_bytes,
            )

    def _calls(self, losses: Tensor) -> Counter[int]:
        """Calls of each layer in the graph; every use of a parameter must belong to one of them."""
        calls: Counter[int] = Counter()
        direct: Counter[int] = Counter()
        for node in graph_nodes(losses):
            if getattr(node, "receive", None) == self._show:
                calls[node.layer] += 1
            for parent, _ in node.next_functions:
                if hasattr(parent, "variable"):
                    direct[id(parent.variable)] += 1
        parameters = list(self.parameters.items())
        for i, layer in enumerate(self.layers):
            for position in layer.parameters.values():
                name, parameter = parameters[position]
                if direct[id(parameter)] > calls[i]:
                    raise RuntimeError(
                        f"{name}: used outside the call of its layer {layer.name!r}; "
                        "its norm would be too small"
                    )
        return calls

    def _sums(self, losses: Tensor, factors: Tensor) -> list[Tensor]:
        self._receive = None
        parameters = list(self.parameters.values())
        gradients = torch.autograd.grad(
            losses,
            parameters,
            factors,
            allow_unused=True,
            materialize_grads=True,
        )
        return [gradient.float() for gradient in gradients]

    def _sums_layer_by_layer(self, losses: Tensor, factors: Tensor) -> list[Tensor]:
        weights = factors.float().repeat_interleave(self.rows_per_record)
        sums = [torch.zeros(p.shape, device=p.device) for p in self.parameters.values()]

        def receive(layer: int, call: Call) -> None:
            self._add_weighted(
                self.layers[layer],
                call,
                weights=weights,
                sums=sums,
            )

        self._receive = receive
        torch.autograd.grad(losses.sum(), [self._probe], allow_unused=True)
        return sums

    def _add_weighted(
        self,
        layer: TrainedLayer,
        call: Call,
        *,
        weights: Tensor,
        sums: list[Tensor],
    ) -> None:
        """Adds the layer's weighted gradients, chunk by chunk.

        They come from a second call of the layer in float32.
        """
        values = {
            name: p.detach().float() for name, p in layer.layer.named_parameters(recurse=False)
        }
        trained = [values[name].requires_grad_() for name in layer.parameters]
        numbers = call.activations[0].numel() + call.backprops[0].numel()
        self._inside = True
        try:
            with torch.enable_grad(), torch.autocast(call.backprops.device.type, enabled=False):
                for rows in chunks(len(weights), 2 * FLOAT * numbers, self.max_temporary_bytes):
                    part = weighted(call, rows, weights=weights[rows])
                    output = torch.func.functional_call(layer.layer, values, (part.activations,))
                    gradients = torch.autograd.grad(output, trained, part.backprops)
                    for position, gradient in zip(
                        layer.parameters.values(), gradients, strict=True
                    ):
                        sums[position] += gradient
        finally:
            self._inside = False
