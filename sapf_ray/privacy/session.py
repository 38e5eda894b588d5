"""What a run needs before its first release: an open ledger, its secret key, and proof that the
sensitive data are still the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sapf_ray.errors import BudgetError, RunDirectoryError
from sapf_ray.files import write_atomic, write_json
from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.planner import PrivacyPlan


def open_ledger(
    path: Path,
    plan: PrivacyPlan,
    *,
    plan_file: Path,
    paid_for: Sequence[Path],
    origin: Callable[[], Mapping[str, Any]],
) -> Ledger:
    """The run's ledger: begun now, or the one that an earlier start of the same plan began.

    Args:
        path: Path of the ledger.
        plan: What this start plans.
        plan_file: Where the plan is written for readers, when the ledger is begun.
        paid_for: Results that exist only if a ledger paid for them.
        origin: What else the header says of the run; asked for when the ledger is begun.

    Raises:
        RunDirectoryError: The ledger is of another plan or an earlier version, or it is gone while
            results that it paid for are there.
    """
    if path.exists():
        ledger = Ledger.open(path)
        ledger.check_continuable()
        if ledger.plan != plan:
            raise RunDirectoryError(
                f"{path}: was begun under another plan (data size or version of sapf changed?); "
                "start a new run in another directory"
            )
        return ledger
    made = [result for result in paid_for if result.exists()]
    if made:
        raise RunDirectoryError(
            f"{path}: gone, but {made[0].name} was made from what it paid for; restore it, or "
            "start a new run in another directory"
        )
    facts = origin()
    write_json(plan_file, plan.to_dict())
    return Ledger.create(path, plan, origin=facts)


def open_key(path: Path, ledger: Ledger, *, reproducible_seed: int | None) -> NoiseKey:
    """The run's secret key, made at the first start.

    Args:
        path: Path of the key's file, mode 0600; its folder must exist.
        ledger: The run's ledger.
        reproducible_seed: Makes the key from a known number: for research, never for release.

    Raises:
        BudgetError: The key is gone after releases were paid for: they cannot be repeated.
        RunDirectoryError: The file is damaged or of another seed.
    """
    if ledger.events() and not path.exists():
        raise BudgetError(
            f"{path}: gone, but {ledger.path.name} shows releases already paid for; they cannot be "
            "replayed without it and the budget does not pay them twice; start a new run in "
            "another directory"
        )
    return NoiseKey.load_or_create(path, reproducible_seed)


def keep_fingerprint(path: Path, fingerprint: str, *, refusal: str) -> None:
    """Notes the sensitive data's fingerprint in a file of mode 0600, at the first start.

    Args:
        path: Path of the file; its folder must exist.
        fingerprint: Fingerprint of the data as they are now.
        refusal: The error's message where another fingerprint is noted there.

    Raises:
        RunDirectoryError: Old noise must not meet new sums.
    """
    if path.exists() and path.read_text(encoding="utf-8") != fingerprint:
        raise RunDirectoryError(refusal)
    write_atomic(path, fingerprint, mode=0o600)


def changed_parts(path: Path, fingerprint: Mapping[str, Any]) -> list[str]:
    """Notes what the run's noise is bound to, and compares it with an earlier start.

    Args:
        path: Path of the note; its folder must exist.
        fingerprint: From :func:`sapf_ray.runs.fingerprint.run_fingerprint`.

    Returns:
        Names of the parts that changed since then, e.g. ``weights``: releases from now on have
        other noise and are charged even where an earlier start paid them.
    """
    parts = json.loads(json.dumps(fingerprint))  # as it will be read back
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else parts
    write_json(path, parts, mode=0o600)
    return [name for name, value in parts.items() if earlier.get(name) != value]
