"""Grounding: what is done where the public model does not know the classes' words.

:mod:`~sapf_ray.models.words` measures whether it knows them; public, so free.
:mod:`~sapf_ray.grounding.remedies` is the table of remedies, :mod:`~sapf_ray.grounding.choice`
chooses among them from public facts. :mod:`~sapf_ray.grounding.stage` runs the chosen ones between
the latents and the selection, and leaves ``grounding.json``.
"""
