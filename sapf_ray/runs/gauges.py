"""How far a run is, on Ray's own Prometheus exporter.

The gauges are called ``ray_sapf_*`` and labelled with the run directory's name. They show public
quantities only: planned steps and images, and the epsilon of the ledger. How many selection tasks a
run has is left out, for under Poisson sampling it reveals the realised sample size. Ray exports
every ten seconds; single steps, whose time reveals the size of their batch, are not visible at that
pace.
"""

from __future__ import annotations

from ray.util.metrics import Gauge

from sapf_ray.stages import Stage

_PUBLISHED = {  # stage: name and description of its gauge
    Stage.LATENTS: ("sapf_latent_shards", "Shards of images encoded to latents"),
    Stage.FINETUNE: ("sapf_finetune_steps", "Optimizer steps that the ledger shows"),
    Stage.EVOLUTION: ("sapf_evolution_iterations", "Iterations of Private Evolution done"),
    Stage.SYNTHESIS: ("sapf_synthetic_images", "Synthetic images on disk"),
}


class Meter:
    """Gauges of one run; needs a Ray that is up.

    Args:
        run: Name of the run directory.
        epsilon_planned: What the run may spend.
    """

    def __init__(self, run: str, epsilon_planned: float) -> None:
        self._tags = {"run": run}
        self._gauges: dict[str, Gauge] = {}
        for stage, (name, text) in _PUBLISHED.items():
            self._gauges[stage] = Gauge(name, text, tag_keys=("run", "count"))
        self._epsilon = Gauge(
            "sapf_epsilon",
            "Privacy loss at the run's delta",
            tag_keys=("run", "kind"),
        )
        self._epsilon.set(epsilon_planned, self._tags | {"kind": "planned"})

    def progress(
        self,
        stage: str,
        done: int,
        *,
        total: int,
    ) -> None:
        """``done`` of ``total`` units of a stage.

        Stages that would reveal more than the plan are passed over.
        """
        gauge = self._gauges.get(stage)
        if gauge is not None:
            gauge.set(done, self._tags | {"count": "done"})
            gauge.set(total, self._tags | {"count": "planned"})

    def spent(self, epsilon: float) -> None:
        """Epsilon of everything charged so far."""
        self._epsilon.set(epsilon, self._tags | {"kind": "spent"})
