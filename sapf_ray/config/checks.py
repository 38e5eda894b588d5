"""Checks of one field; each failure names the dotted key, the value and what is allowed."""

from __future__ import annotations

from sapf_ray.errors import ConfigError


def require(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise ConfigError(name, value, allowed)


def positive_int(prefix: str, obj: object, *names: str, minimum: int = 1) -> None:
    for name in names:
        value = getattr(obj, name)
        require(
            isinstance(value, int) and not isinstance(value, bool) and value >= minimum,
            f"{prefix}.{name}",
            value,
            f"must be an integer of at least {minimum}",
        )


def above_zero(prefix: str, obj: object, *names: str) -> None:
    for name in names:
        require(getattr(obj, name) > 0, f"{prefix}.{name}", getattr(obj, name), "must be above 0")


def not_negative(prefix: str, obj: object, *names: str) -> None:
    for name in names:
        require(
            getattr(obj, name) >= 0, f"{prefix}.{name}", getattr(obj, name), "must be at least 0"
        )


def one_of(name: str, value: object, *, allowed: tuple[str, ...]) -> None:
    require(value in allowed, name, value, "must be one of " + ", ".join(allowed))
