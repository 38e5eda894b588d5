"""YAML, flags and Python take the same values and refuse the same, with the same line.

One good and one bad value of every field are made from its type.
"""

from __future__ import annotations

import json

import pytest

from sapf_ray.config import from_dict, nest
from sapf_ray.config.fields import Field, fields
from sapf_ray.config.kinds import Kind
from sapf_ray.config.run import RunConfig
from sapf_ray.config.section import field_types
from sapf_ray.errors import ConfigError
from sapf_ray.options import config_of, parse

KEYS = list(fields())
# What a field wants of another one, so that its good value can be shown alone.
BESIDE = {
    "data.max_images_per_group": {"data.groups": "published"},
    "finetune.adapter": {"saliency.ratio": 1.0},
    "evolution.enabled": {"finetune.steps": 0},
    "evolution.embedding": {"evolution.inception_weights": "w.pth"},
    "evaluation.fid_features": {"evaluation.inception_weights": "w.pth"},
    "saliency.mechanism": {"saliency.score": "snip"},
}


def good(field: Field) -> object:
    """An allowed value that is not the default."""
    kind = field.kind
    if field.name == "prompt_template":
        return "a picture of {name}"
    if field.name == "remedies":
        return "vote,tokens"
    if field.name == "groups":
        return "folder:2"
    if field.name == "delta":
        return 1e-5
    if field.name == "plugins":
        return ["math"]
    if field.name == "class_names":
        return ["cat", "dog"]
    if field.name == "pixel_range":
        return [-1000.0, 400.0]
    if kind.choices is not None:
        value: object = next(name for name in reversed(kind.choices()) if name != field.default)
    elif kind.base is bool:
        value = not field.default
    elif kind.base is int:
        value = (kind.interval.ge or 0) + 16
    elif kind.base is float:
        value = 0.75 if kind.interval.le or kind.interval.lt else 3.5
    else:
        value = "word"
    return [value] if kind.many else value


def bad(kind: Kind) -> object:
    """A value outside the type, of a form that YAML can hold."""
    if kind.choices is not None:
        return ["no such name"] if kind.many else "no such name"
    if kind.base is bool:
        return "perhaps"
    if kind.base is int:
        outside = (kind.interval.ge or 0) - 1 if kind.interval.ge is not None else 1.5
        return [outside] if kind.many else outside
    if kind.base is float:
        outside = kind.interval.gt if kind.interval.gt is not None else kind.interval.ge - 1
        return [outside] if kind.many else outside
    return [3] if kind.many else 3


def from_python(key: str, value: object) -> RunConfig:
    """The section built by its own class, as a program does it."""
    changes: dict[str, dict[str, object]] = {}
    for name, item in {**BESIDE.get(key, {}), key: value}.items():
        section, _, field = name.rpartition(".")
        changes.setdefault(section, {})[field] = item
    own = changes.pop("", {})
    types = field_types(RunConfig)
    return RunConfig(**{name: types[name](**fields) for name, fields in changes.items()}, **own)


def from_yaml(key: str, value: object, path) -> RunConfig:
    path.write_text(json.dumps(nest({**BESIDE.get(key, {}), key: value})))
    return config_of(parse(["plan", "--config", str(path)]))


def from_flags(key: str, value: object) -> RunConfig:
    words = [
        f"--{name}={item if isinstance(item, str) else json.dumps(item)}"
        for name, item in {**BESIDE.get(key, {}), key: value}.items()
    ]
    return config_of(parse(["plan", *words]))


def error_of(make, *arguments: object) -> str:
    with pytest.raises(ConfigError) as raised:
        make(*arguments)
    return str(raised.value)


def test_every_field_is_documented_and_typed():
    assert len(KEYS) > 80 and all(field.help for field in fields().values())


@pytest.mark.parametrize("key", KEYS)
def test_a_good_value_is_taken_alike(key, tmp_path):
    value = good(fields()[key])
    expected = from_dict(nest({**BESIDE.get(key, {}), key: value}))
    section, _, name = key.rpartition(".")
    held = getattr(getattr(expected, section) if section else expected, name)
    assert held == (tuple(value) if isinstance(value, list) else value)
    assert held != fields()[key].default
    assert from_python(key, value) == expected
    assert from_yaml(key, value, tmp_path / "c.yaml") == expected
    assert from_flags(key, value) == expected


@pytest.mark.parametrize("key", [key for key in KEYS if fields()[key].kind.base is not str])
def test_a_bad_value_is_refused_with_the_same_line(key, tmp_path):
    kind = fields()[key].kind
    value = bad(kind)
    line = error_of(from_dict, nest({key: value}))
    assert line.startswith(f"{key} = ") and "\n" not in line
    assert line.endswith(kind.must_be(value[0] if isinstance(value, list) else value))
    assert error_of(from_python, key, value) == line
    assert error_of(from_yaml, key, value, tmp_path / "c.yaml") == line
    assert error_of(from_flags, key, value) == line


@pytest.mark.parametrize("key", [key for key in KEYS if fields()[key].kind.base is str])
def test_a_word_must_be_a_word_and_a_known_one(key, tmp_path):
    kind = fields()[key].kind
    number: object = [3] if kind.many else 3
    line = error_of(from_python, key, number)
    assert line == error_of(from_yaml, key, number, tmp_path / "c.yaml")
    assert line == f"{key} = 3: {kind.must_be(3)}"
    if kind.choices is not None:
        unknown = bad(kind)
        line = error_of(from_flags, key, unknown)
        assert line == f"{key} = 'no such name': {kind.must_be()}"
        assert line == error_of(from_python, key, unknown)
        assert line == error_of(from_yaml, key, unknown, tmp_path / "c.yaml")
