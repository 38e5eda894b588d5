"""Errors a user can cause. Each is one line; the CLI prints it and exits with code 2."""

from __future__ import annotations


class SapfError(Exception):
    """Base class: the message is one line that says what is wrong and what to do."""


class ConfigError(SapfError):
    """A configuration value that cannot be used."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        self.field, self.value, self.allowed = field, value, allowed
        super().__init__(f"{field} = {value!r}: {allowed}")

    def __reduce__(
        self,
    ):  # Ray pickles exceptions; the default calls __init__ with the message only
        return type(self), (self.field, self.value, self.allowed)


class DataError(SapfError):
    """A data set or model file that is missing, unreadable or not in the expected format."""


class BudgetError(SapfError):
    """Going on would spend more privacy than was planned."""


class RunDirectoryError(SapfError):
    """The output directory cannot serve this run (other config, in use, damaged)."""


class TrackingError(SapfError):
    """The MLflow store cannot be reached or written."""


class ClusterError(SapfError):
    """The Ray cluster lacks what the run asks for."""


def reason(error: Exception) -> str:
    """What another library's error says, on one line."""
    return " ".join(str(error).split())[:200]
