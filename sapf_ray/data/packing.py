"""Names of many files, which are most of a source and repeat themselves."""

from __future__ import annotations

import os
import zlib
from typing import Any


class Names(list[str]):
    """A list of names that pickles compressed: 160,000 of them to about 0.4 MB.

    >>> import pickle
    >>> names = Names(f"cat/{i:06d}.jpg" for i in range(1000))
    >>> pickle.loads(pickle.dumps(names)) == names, len(pickle.dumps(names)) < 4000
    (True, True)
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpacked, (zlib.compress(os.fsencode("\0".join(self))), len(self))


def _unpacked(packed: bytes, n: int) -> Names:
    text = os.fsdecode(zlib.decompress(packed))
    return Names(text.split("\0") if n else ())
