"""Attacks on a run's own privacy claim: what (epsilon, delta) looks like from outside.

``bounds`` and ``families`` know statistics alone, ``auditor`` scores of canaries, ``scores`` and
``white_box`` the releases of a run, ``synthetic_run`` those of a plan without its model.
"""
