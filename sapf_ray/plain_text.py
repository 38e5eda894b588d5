"""Text for terminals and files that cannot show ours: ASCII, Latin-1 and the like.

>>> encode("ε = 10 ≥ 1 … └─ ü", "ascii")
'eps = 10 >= 1 ... +- ?'
"""

from __future__ import annotations

import codecs
import sys

_NAME = "sapf-plain"
_PLAIN = {
    "ε": "eps",
    "σ": "sigma",
    "δ": "delta",
    "±": "+-",
    "≥": ">=",
    "≤": "<=",
    "×": "x",
    "∞": "inf",
    "→": "->",
    "…": "...",
    "·": ".",
    "–": "-",
    "“": '"',
    "”": '"',
    "’": "'",
    "⁻": "^-",
    "₂": "2",
}


def _plain(character: str) -> str:
    if character in _PLAIN:
        return _PLAIN[character]
    code = ord(character)
    if 0x2500 <= code < 0x2580:  # lines of tables
        if character in "─━═╌╴╶╸╺╾╼":
            return "-"
        return "|" if character in "│┃║╎╵╷╹╻" else "+"
    return "#" if 0x2580 <= code < 0x25A0 else "?"


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    # what only stands for a byte of a file's name goes out as "?" too
    return "".join(_plain(character) for character in text), error.end


codecs.register_error(_NAME, _replace)


def encode(text: str, encoding: str) -> str:
    """How the text looks where only ``encoding`` can be shown."""
    return text.encode(encoding, _NAME).decode(encoding)


def use() -> None:
    """What standard output and standard error cannot show is written out, or is a ``?``."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors=_NAME)
