"""One file for each kind of thing that can be added to sapf-ray from outside the package.

Each is the recipe of CONTRIBUTING.md in full, at most 30 lines long, and touches no other file.
``tests/test_extending.py`` loads and uses them for real; a user loads them the same way::

    sapf run --plugins tests.plugins.metric ...
"""
