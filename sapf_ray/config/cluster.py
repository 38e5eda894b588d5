"""Where the work runs."""

from __future__ import annotations

from sapf_ray.config.kinds import Count
from sapf_ray.config.section import section


@section("cluster")
class ClusterConfig:
    """Where the work runs.

    Args:
        address: Ray address: auto (the Ray of this machine) or host:6379; by default RAY_ADDRESS,
            which is set in a submitted job, else a local Ray is started.
        num_cpus: Cores of the local Ray; by default all of the machine.
        keep_cache: Keep the sensitive latent cache after the run (mode 0600); by default it is
            deleted. The noise key is deleted always.
        latents_dir: Where latents are kept (mode 0700, as sensitive as the images) for other runs
            on the same images and model; by default in the run's own folder. `sapf tune` sets it,
            and deletes it at its end.
        selection_dir: Where selection releases are kept for other runs that may use the same ones
            (same data, model, seed and scoring; any epsilon, and any ratio where scores are
            released): each such run pays the release in its own epsilon, their total once. By
            default each run makes its own. `sapf tune` sets it.
        images_secret: File of the secret under which the ledger's fingerprint of the images is
            made (mode 0600; made where it is not there), by default $SAPF_IMAGES_SECRET, else
            ~/.config/sapf-ray/images_secret. `sapf ledger` adds up runs on the same images under
            one secret.
        storage: URI of a folder (s3://bucket/runs, gs://, hdfs://, file:///) for checkpoints and,
            at the end, what the run releases; by default both stay in the run directory.
        publish_not_private: Publish to ``storage`` also what is not for release: results of a run
            without noise, with a known seed, or with canaries (``--not_private`` is short for it).
    """

    address: str | None = None
    num_cpus: Count | None = None
    keep_cache: bool = False
    latents_dir: str | None = None
    selection_dir: str | None = None
    images_secret: str | None = None
    storage: str | None = None
    publish_not_private: bool = False
