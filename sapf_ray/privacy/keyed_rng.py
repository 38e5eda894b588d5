"""Secret randomness: one key, any number of independent streams.

The key is 256 bits from the operating system. Each use names its stream (purpose, step, record
...), so a step that is executed again after a crash draws the very same sample and the very same
noise, whatever the number of workers, and no two uses share a stream.

Noise and Poisson sampling come from :meth:`NoiseKey.stream`, a keyed cryptographic generator.
torch's own generators are no secret source: a CPU generator takes only the lower 32 bits of a seed,
which can be tried through, and the outputs of a Mersenne Twister tell its state.

Example::

    secret = NoiseKey.load_or_create("run/private/noise_key")
    key = secret.bind(run_fingerprint)                   # the run's own
    words = key.stream("sample", "finetune/step/17").words(n_records)

References:
    1. Garfinkel, Leclerc. Randomness concerns when deploying differential privacy. WPES 2020.
    2. Steele, Lea, Flood. Fast splittable pseudorandom number generators. OOPSLA 2014. (SplitMix64)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sapf_ray.errors import RunDirectoryError
from sapf_ray.files import write_atomic

_KEY_BYTES = 32


class NoiseStream:
    """Deterministic random numbers from SHAKE-256 over a secret; the same on CPU and GPU."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._blocks = 0

    def __repr__(self) -> str:
        return "NoiseStream(secret)"

    def words(self, n: int) -> np.ndarray:
        """``n`` uniform uint64."""
        block = hashlib.shake_256(self._secret + struct.pack("<Q", self._blocks)).digest(8 * n)
        self._blocks += 1
        return np.frombuffer(block, dtype="<u8")

    def uniform(self, n: int) -> Tensor:
        """``n`` uniform float64 between 0 and 1, never 0."""
        bits = torch.from_numpy((self.words(n) >> np.uint64(11)).view(np.int64))
        return bits.double().add_(0.5).mul_(2.0**-53)


class NoiseKey:
    """The secret of one run. Its text form never shows the key.

    Args:
        key: 32 secret bytes.
        reproducible: Derived from a seed that others know: the run is not for release.
    """

    def __init__(self, key: bytes, reproducible: bool = False) -> None:
        if len(key) != _KEY_BYTES:
            raise ValueError(f"a noise key has {_KEY_BYTES} bytes, got {len(key)}")
        self._key = key
        self.reproducible = reproducible

    def __repr__(self) -> str:
        return f"NoiseKey(secret, reproducible={self.reproducible})"

    @classmethod
    def create(cls, reproducible_seed: int | None = None) -> NoiseKey:
        """A key from the operating system, or, for tests and research, from a seed."""
        if reproducible_seed is None:
            return cls(secrets.token_bytes(_KEY_BYTES))
        digest = hashlib.blake2b(
            str(reproducible_seed).encode(), digest_size=_KEY_BYTES, person=b"sapf-repro-seed"
        )
        return cls(digest.digest(), reproducible=True)

    @classmethod
    def load_or_create(cls, path: str | Path, reproducible_seed: int | None = None) -> NoiseKey:
        """The key of a run: read where there is one, else created (mode 0600, whole or not at all).

        Raises:
            RunDirectoryError: Damaged, not writable, or not the key of ``reproducible_seed``.
        """
        path = Path(path)
        fresh = cls.create(reproducible_seed)
        try:
            if not path.exists():
                fresh._save(path)
            stored = json.loads(path.read_text(encoding="utf-8"))
            key = cls(bytes.fromhex(stored["key"]), bool(stored["reproducible"]))
        except OSError as error:
            raise RunDirectoryError(
                f"{path}: cannot be read or written ({error.strerror})"
            ) from error
        except (ValueError, KeyError, TypeError):
            # Without "from": the cause could quote the key.
            raise RunDirectoryError(f"{path}: damaged noise key") from None
        if fresh.reproducible != key.reproducible or (
            fresh.reproducible and fresh._key != key._key
        ):
            raise RunDirectoryError(
                f"{path}: this run's noise key does not belong to privacy.reproducible_seed"
            )
        return key

    def bind(self, *public_parts: object) -> NoiseKey:
        """The key of one run: derived from this secret and all that the run is.

        Noise, Poisson samples and diffusion draws of a run come from its bound key alone, so two
        runs from one secret (a reproducible seed, a copied run directory with an edited config)
        share no randomness.

        Args:
            public_parts: The run's fingerprint, anything JSON can hold.
        """
        return NoiseKey(self._derive("bind", *public_parts), self.reproducible)

    def stream(self, purpose: str, *indices: object) -> NoiseStream:
        """The cryptographic stream of one use, e.g. ``("finetune/sample", step)``."""
        return NoiseStream(self._derive("stream", purpose, *indices))

    def seeds(self, purpose: str, step: int, record_indices: np.ndarray) -> np.ndarray:
        """One uint64 seed per record, distinct within a step, whatever records are
        requested together.

        For randomness that is not noise of a mechanism (diffusion noise, time steps, augmentation).
        """
        offset, mask = np.frombuffer(self._derive("seeds", purpose, step)[:16], dtype="<u8")
        with np.errstate(over="ignore"):
            z = (
                np.asarray(record_indices).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
                + offset
            )
            for _ in range(2):
                z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
                z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
                z = (z ^ (z >> np.uint64(31))) ^ mask
        return z

    def stream_id(self, *public_parts: object) -> str:
        """Fingerprint of this key together with all else that determines a release; does not reveal
        the key.

        Args:
            public_parts: Anything JSON can hold, e.g. the plan's dict and a hash of the data.
        """
        return self._derive("stream_id", *public_parts)[:16].hex()

    def _derive(self, *parts: object) -> bytes:
        message = json.dumps(parts, sort_keys=True, default=_plain).encode()
        return hashlib.blake2b(
            message, key=self._key, digest_size=32, person=b"sapf-noise-key"
        ).digest()

    def _save(self, path: Path) -> None:
        text = json.dumps({"key": self._key.hex(), "reproducible": self.reproducible})
        # the first of two processes wins, the other reads its key
        with contextlib.suppress(FileExistsError):
            write_atomic(path, text, mode=0o600, replace=False)


def _plain(value: object) -> int:
    if isinstance(value, np.integer):
        return int(value)
    raise TypeError(f"{type(value).__name__} cannot be part of a stream's name")
