"""What is publicly known of one data set: a row of the catalog."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class KnownSet:
    """One row; every field is public.

    Attributes:
        name: Value of ``data.source``.
        title: Name in prose.
        url: Official page where the set is obtained; empty where nothing has to be obtained.
        path: What ``data.path`` must point to; empty where it is not used.
        licence: Terms of use as the publisher states them; they bind the user, not this program.
        class_names: One per label; empty where the user's own files decide.
        prompts: One per label, in the same order.
        n_train: Number of published training images, None where the user's own files decide;
            likewise the next three.
        n_val: Number of validation images, which stay unused.
        n_test: Number of test images.
        resolution: Side in pixels at which the paper uses the set.
        notes: How the records are split, and what else is worth knowing.
        options: Keys of ``data`` that the source heeds beyond its path; those among
            ``OPTIONAL`` that it does not are refused.
    """

    name: str
    title: str
    url: str = ""
    path: str = ""
    licence: str = ""
    class_names: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    n_train: int | None = None
    n_val: int | None = None
    n_test: int | None = None
    resolution: int | None = None
    notes: str = ""
    options: tuple[str, ...] = ()

    @property
    def obtain(self) -> str:
        """Half a sentence for error messages."""
        return f"{self.title} is obtained from {self.url}"

    @property
    def obtain_hint(self) -> str:
        """The end of an error message; empty where nothing has to be obtained."""
        return f"; {self.obtain}" if self.url else ""


OPTIONAL = {"groups": None, "on_error": "stop", "pixel_range": None, "resolution": None}
"""Keys of ``data`` that only some sources heed → the value that requests nothing."""

OWN = (
    "class_names",
    "on_error",
    "pixel_range",
    "prompt_template",
    "resolution",
    "test_fraction",
)
"""What sources of one's own images heed."""


def article(name: str) -> str:
    """The name with its article.

    >>> article("airplane"), article("bird")
    ('an airplane', 'a bird')
    """
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"
