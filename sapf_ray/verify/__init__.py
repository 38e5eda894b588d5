"""``sapf verify``: whether the files of a finished run hold together, from the files alone.

No image, no weight and no module of the run's own is loaded.
"""
