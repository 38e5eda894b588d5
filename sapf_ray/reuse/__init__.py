"""What a finished run has paid for, used again: more synthetic images, other scores.

All of it is post-processing of what the run released: the ledger is read and never written, no
budget is spent, ε stays. Each result has a folder of its own in the run's directory, with a
``README.md`` that says which run it is of and what it may be called::

    RUN/synthesis/NAME/     synthetic/ (Parquet), plots/, config.yaml, README.md
    RUN/evaluation/NAME/    metrics.json, config.yaml, README.md

The steps are those of a run (:data:`sapf_ray.afterwards.RELEASE`), over its context opened again
(:mod:`sapf_ray.reuse.commands`).
"""
