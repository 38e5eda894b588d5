"""Words that a public model does not know are found before anything is spent."""

from __future__ import annotations

import pytest

from sapf_ray.config import ModelConfig
from sapf_ray.errors import ConfigError
from sapf_ray.glyphs import CHARACTERS, prompt_for
from sapf_ray.models.public_model import PublicModel
from sapf_ray.models.vocabulary import known_prompts, read_candidates
from sapf_ray.models.words import Words, check_words

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture(scope="module")
def model() -> PublicModel:
    return PublicModel.open(ModelConfig(path="glyphs-tiny"))


def measured(model: PublicModel, names: list[str], template: str = "An image of {name}") -> Words:
    return check_words(model, names, [template.replace("{name}", name) for name in names])


def test_the_shipped_vocabulary_is_what_the_bundled_models_were_trained_on():
    assert known_prompts("glyphs-tiny") == tuple(prompt_for(c) for c in CHARACTERS)


def test_nouns_are_prompts_by_the_template():
    found = known_prompts("owner/model", template="a photo of a {name}")
    assert "a photo of a dog" in found and len(set(found)) == len(found) > 200


@pytest.mark.parametrize(
    "names",
    [
        [str(i) for i in range(10)],
        [f"grade_{c}" for c in "abcdefghij"],
        list("αβγδεζηθικ"),
        [f"retinal disease {i}" for i in range(1, 5)],
        ["airplane", "automobile", "bird", "cat"],
    ],
)
def test_unknown_words_are_told(model, names):
    words = measured(model, names)
    assert not words.known and words.near
    line = words.line(())
    assert "\n" not in line and any(name in line for name in names)
    assert "grounding.remedies" in line
    assert words.line(("vote", "tokens")).endswith("remedy: vote, tokens")


def test_words_that_differ_without_a_meaning_are_told(model):
    words = measured(model, ["foo", "bar", "baz", "qux"])
    assert not words.known and not words.near and words.spread > 0.5
    assert "was never shown the words of foo, bar, baz and 1 more" in words.line(())
    assert measured(model, ["digit three", "foo"]).strange == ("foo",)


@pytest.mark.parametrize("names", [DIGITS, list("abcdefghij")])
def test_known_words_are_not(model, names):
    words = measured(model, names)
    assert words.known and words.line(()) is None


def test_equal_and_cut_off_prompts_are_told(model):
    words = measured(model, ["A", "a", "three"])
    assert words.equal == (("A", "a"),) and "A and a as one and the same prompt" in words.line(())
    long = "An image of a word that stands behind a great many of other words, {name}"
    words = measured(model, DIGITS, long)
    assert not words.known and len(words.equal) == 45 and words.cut == tuple(DIGITS)
    assert "10 prompts are cut off" in words.line(())


def test_labels_are_known_by_their_ids():
    model = PublicModel.open(ModelConfig(path="glyphs-dit-tiny"))
    assert measured(model, DIGITS).known


def test_candidates_are_read_line_by_line(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("# mine\na cat\n\na dog\na cat\n")
    assert read_candidates(str(path)) == ("a cat", "a dog")
    path.write_text("a cat\n")
    with pytest.raises(ConfigError, match="two or more different prompts"):
        read_candidates(str(path))
    with pytest.raises(ConfigError, match=r"grounding\.candidates"):
        read_candidates(str(tmp_path / "none.txt"))
