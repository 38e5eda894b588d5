"""What a ledger's header says of where its run comes from, beside the plan.

* ``config``: SHA-256 of ``config.yaml`` as it was when the ledger was begun.
* ``code``: version of sapf-ray; its git commit where it is a checkout, with ``+changed`` where
  files differ from it.
* ``versions``: of the libraries that may change what is summed or how it is paid.
* ``images``: a keyed fingerprint of the sensitive images, or null.

The images' fingerprint is HMAC-SHA256 of their digest (:mod:`sapf_ray.data.identity`) under a
random secret of 256 bits, kept in one file per user or cluster (mode 0600;
``cluster.images_secret`` says where). Why one secret and not a fresh salt in each header: with a
salt that stands beside it, whoever holds a ledger and guesses a data set, say the same one without
one person, can test the guess, which no (ε, δ) allows; and with a fresh secret per run no two
ledgers could be compared.
Under one secret, one ledger alone shows random bytes whatever the images are; two ledgers show
whether their images are equal, and nothing else, and that is what ``sapf ledger`` needs to add them
up. Where even that must stay hidden, give each run another ``cluster.images_secret``.

``secret`` beside the fingerprint is a digest of the secret: fingerprints under different secrets
cannot be compared, and ``sapf ledger`` says so rather than taking them for different images.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import os
import secrets
import subprocess
from pathlib import Path
from typing import Any

from sapf_ray import __version__
from sapf_ray.config import RunConfig
from sapf_ray.data.base import ImageSource
from sapf_ray.data.identity import images_digest
from sapf_ray.errors import ConfigError, reason
from sapf_ray.files import file_digest, write_atomic
from sapf_ray.runs.directory import RunDirectory
from sapf_ray.runs.fingerprint import library_versions

PLACE = "SAPF_IMAGES_SECRET"
"""Environment variable: the secret's file, where ``cluster.images_secret`` is not given."""
_BYTES = 32


def origin(
    config: RunConfig, directory: RunDirectory, *, source: ImageSource | None
) -> dict[str, Any]:
    """The header's fields beside schema and plan.

    Args:
        config: The whole experiment.
        directory: The run directory, with its ``config.yaml``.
        source: The sensitive images; None where the run reads none.

    Raises:
        ConfigError: ``cluster.images_secret`` holds no secret, or cannot be read or written.
        DataError: An image cannot be read.
    """
    return {
        "config": file_digest(directory.config),
        "code": code_version(),
        "versions": library_versions(),
        "images": None if source is None else _fingerprint(config, source),
    }


def code_version() -> str:
    """Version of sapf-ray, with the git commit where it runs from a checkout.

    Example: ``0.9.0 (git 1a2b3c… +changed)``.
    """
    home = Path(__file__).resolve().parent.parent
    top = _git(home, "rev-parse", "--show-toplevel")
    commit = _git(home, "rev-parse", "HEAD")
    # a package installed below somebody else's repository is no checkout of ours
    if not commit or not top or Path(top).resolve() != home.parent:
        return __version__
    changed = " +changed" if _git(home, "status", "--porcelain", "--", str(home)) else ""
    return f"{__version__} (git {commit}{changed})"


def _git(folder: Path, *words: str) -> str:
    """What git prints; empty where it fails or is not there."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _fingerprint(config: RunConfig, source: ImageSource) -> dict[str, str] | None:
    given = config.cluster.images_secret
    secret = _secret(given)
    if secret is None:
        return None
    digest = images_digest(source)
    keyed = hmac.new(secret, digest.encode(), hashlib.sha256).hexdigest()
    name = hashlib.sha256(b"sapf images secret " + secret).hexdigest()[:16]
    return {"fingerprint": keyed, "secret": name}


def _secret(given: str | None) -> bytes | None:
    """The secret, made where there is none; None where its default place cannot be used, with a
    warning: that must not keep a run from starting.
    """
    try:
        path = Path(given or os.environ.get(PLACE) or "~/.config/sapf-ray/images_secret")
        return _read_or_make(path.expanduser())
    except (OSError, RuntimeError, ValueError) as error:
        allowed = f"cannot be used ({reason(error)}); must be a file that sapf may make, or made"
        if given is not None:
            raise ConfigError("cluster.images_secret", given, allowed) from error
        logging.getLogger(__name__).warning(
            "sapf: warning: no secret for the fingerprint of the images (%s): `sapf ledger` will "
            "not know this run's images again; set cluster.images_secret",
            reason(error),
        )
        return None


def _read_or_make(path: Path) -> bytes:
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):  # another run was faster
            write_atomic(path, secrets.token_hex(_BYTES) + "\n", mode=0o600, replace=False)
    secret = bytes.fromhex(path.read_text(encoding="utf-8").strip())
    if len(secret) != _BYTES:
        raise ValueError(f"holds {len(secret)} bytes, needs {_BYTES}")
    return secret
