"""Tables of named rows: how scores, mechanisms, accountants, data sources, … are found and added.

A table is a :class:`Registry`, which reads like a dict: ``SCORES["snip"]``, ``list(SCORES)``,
``name in SCORES``. It stands in the module that its rows belong to, and :data:`TABLES` says which
config key takes its names, so that ``sapf run --help`` and the validation of a config follow the
table. A module outside the package adds a row by assignment, and is loaded by a flag, a key of a
config file, or an import::

    # my_scores.py
    from sapf_ray.saliency.scores import SCORES, Score
    SCORES["mine"] = Score(...)

    sapf run --plugins my_scores --saliency.score mine ...

Listing names must not load torch. Three ways to have a row keep it so; all may be mixed:

1. The row itself, where its module is light: heavy libraries are imported inside its functions.
2. ``"module:attribute"``, a string: imported when the row is first requested.
3. A folder of files, ``Registry("data.source", folder="sapf_ray.data.sources")``: each file is
   one row of the file's name. It is imported when the row is first requested, and enters itself.

>>> table = Registry("saliency.score", {"half": "math:sqrt"})
>>> table["double"] = abs
>>> list(table), table["half"](16.0)
(['half', 'double'], 4.0)
>>> table["none"]
Traceback (most recent call last):
sapf_ray.errors.ConfigError: saliency.score = 'none': must be one of half, double
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from sapf_ray.errors import ConfigError, SapfError, reason

Row = TypeVar("Row")

PLUGINS = "SAPF_PLUGINS"  # environment variable: modules that worker processes load too


class Registry(Mapping[str, Row], Generic[Row]):
    """Rows by name, in the order in which they were entered.

    Args:
        key: Config key that takes a name of the table, for error messages.
        rows: Built-in rows, or strings "module:attribute" of where they are.
        folder: Dotted name of a package inside ``sapf_ray`` whose every file is a row.
        refused: Names that users look for and that cannot be rows → why, for error messages.
    """

    def __init__(
        self,
        key: str,
        rows: Mapping[str, Row | str] | None = None,
        *,
        folder: str | None = None,
        refused: Mapping[str, str] | None = None,
    ) -> None:
        self.key = key
        self.refused = dict(refused or {})
        self._rows: dict[str, Row | str] = dict(rows or {})
        for name in _files(folder) if folder else ():
            self._rows[name] = f"{folder}.{name}:"

    def __getitem__(self, name: str) -> Row:
        load_plugins()
        if name not in self._rows:
            raise ConfigError(self.key, name, "must be one of " + ", ".join(self))
        return self._resolved(name)

    def entered(self) -> dict[str, Row]:
        """The rows that are there by now; loads no plugin, for use while a module is imported.

        A plugin that was loaded there would import a half-made module.
        """
        return {name: self._resolved(name) for name in self._rows}

    def _resolved(self, name: str) -> Row:
        row = self._rows[name]
        if isinstance(row, str):
            module, _, attribute = row.partition(":")
            found = importlib.import_module(module)
            if attribute:
                self._rows[name] = getattr(found, attribute)
            row = self._rows[name]
            assert not isinstance(row, str), f"{module} does not enter {name!r} in {self.key}"
        return row

    def get(self, name: str, default: Any = None) -> Any:  # type: ignore[override]
        """The row, or the default where there is none of this name."""
        if name not in self:
            return default
        return self[name]

    def __setitem__(self, name: str, row: Row) -> None:
        """Enters a row.

        Raises:
            ValueError: There is another row of this name; delete it first if you mean to replace
                it.
        """
        if not isinstance(self._rows.get(name, ""), str):
            raise ValueError(f"{self.key}: {name!r} is there already")
        self._rows[name] = row

    def __delitem__(self, name: str) -> None:
        del self._rows[name]

    def __iter__(self) -> Iterator[str]:
        load_plugins()
        return iter(list(self._rows))

    def __contains__(self, name: object) -> bool:
        load_plugins()
        return name in self._rows

    def __len__(self) -> int:
        return len(self._rows)


def _files(folder: str) -> list[str]:
    place = Path(__file__).parent.joinpath(*folder.split(".")[1:])
    return sorted(path.stem for path in place.glob("*.py") if not path.stem.startswith("_"))


# Where the names come from that a config key takes: the table, as "module:attribute" of a module
# that is light to import.
TABLES: dict[str, str] = {
    "data.source": "sapf_ray.data.base:SOURCES",
    "privacy.accountant": "sapf_ray.privacy.accountant_table:ACCOUNTANTS",
    "grounding.remedies": "sapf_ray.grounding.remedies:REMEDIES",
    "saliency.score": "sapf_ray.saliency.scores:SCORES",
    "saliency.mechanism": "sapf_ray.saliency.mechanisms:MECHANISMS",
    "evolution.embedding": "sapf_ray.evolution.embedding_table:EMBEDDINGS",
    "evaluation.protocol": "sapf_ray.evaluation.protocols:PROTOCOLS",
    "evaluation.scores": "sapf_ray.evaluation.set_scores:SCORES",
    "evaluation.fid_features": "sapf_ray.evaluation.features:FEATURES",
    "evaluation.classifiers": "sapf_ray.evaluation.classifiers:CLASSIFIERS",
}


def names(key: str) -> tuple[str, ...]:
    """Names that a config key takes, those of loaded plugins included."""
    return tuple(_table(key))


def refusal(key: str, name: str) -> str:
    """Why a config key does not take a name that users look for; empty where nothing is known."""
    return getattr(_table(key), "refused", {}).get(name, "")


def row(key: str, name: str) -> Any:
    """The row of a config key's table; for who stands below the table's module.

    Raises:
        ConfigError: No such row.
    """
    return _table(key)[name]


def _table(key: str) -> Mapping[str, Any]:
    module, _, attribute = TABLES[key].partition(":")
    return getattr(importlib.import_module(module), attribute)


_loaded: set[str] = set()


def load_plugins(modules: Iterable[str] = ()) -> None:
    """Imports modules that add rows, each once: the named ones and those of the environment.

    Their names stay in the environment variable ``SAPF_PLUGINS``, so that worker processes which
    this one starts load them too, before they look up a row.

    Raises:
        SapfError: A module that cannot be imported; one line with its reason.
    """
    inherited = os.environ.get(PLUGINS, "")
    requested = dict.fromkeys([*filter(None, inherited.split(",")), *modules])
    for module in requested:
        if module in _loaded:
            continue
        _loaded.add(module)  # first, for a plugin reads tables itself
        try:
            importlib.import_module(module)
        except Exception as error:
            _loaded.discard(module)
            raise SapfError(
                f"plugins = {module!r}: cannot be imported: {type(error).__name__}: {reason(error)}"
            ) from error
    if ",".join(requested) != inherited:
        os.environ[PLUGINS] = ",".join(requested)
