"""Which planted fault which audit sees: the table of docs/audit.md.

Each fault is a twin of one function of the product, put in its place. Under each, the releases of
the digits' plan are made again (:mod:`sapf_ray.audit.synthetic_run`: the run's own sampler,
clipping, ledger and noise, without the model), and every audit looks at them.

    OMP_NUM_THREADS=1 python -m jobs.audit_faults --runs 20
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np

from sapf_ray.audit.findings import Finding
from sapf_ray.audit.mechanisms import SHARD, audit_mechanism, audit_sums, clipped_sum
from sapf_ray.audit.scores import score
from sapf_ray.audit.synthetic_run import release_all
from sapf_ray.audit.white_box import Attacks, Claim, parts, plan_attacks
from sapf_ray.config import FinetuneConfig, PrivacyConfig, RunConfig
from sapf_ray.privacy import clipping, release
from sapf_ray.privacy import noise as product
from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.privacy.planner import PrivacyPlan, make_plan, plan_events

N_RECORDS, STEPS, BATCH = 1297, 60, 512  # of the digits' preset
POOL = 60  # matrices of its model
RANKS = 4

Twin = Callable[[], contextlib.AbstractContextManager[object]]
_noisy_sum = product.noisy_sum
_pay = release.Releaser._pay


def less_noise(factor: float) -> Twin:
    """Noise that is ``factor`` times too small."""

    def twin(total, multiplier, stream):
        return _noisy_sum(total, multiplier / factor, stream)

    return lambda: mock.patch.object(product, "noisy_sum", twin)


def no_noise() -> contextlib.AbstractContextManager[object]:
    """The sum as it is."""
    return mock.patch.object(product, "noisy_sum", lambda total, *rest: total.values())


def noise_per_rank() -> contextlib.AbstractContextManager[object]:
    """Each rank adds noise of sigma over the number of ranks, not over its root."""

    def twin(total, multiplier, stream):
        exact = total.values()
        drawn = [_noisy_sum(total, multiplier / RANKS, stream) for _ in range(RANKS)]
        noise = [sum(part) - RANKS * clean for *part, clean in zip(*drawn, exact, strict=True)]
        return [clean + part for clean, part in zip(exact, noise, strict=True)]

    return mock.patch.object(product, "noisy_sum", twin)


def clipping_off() -> contextlib.AbstractContextManager[object]:
    """Every record keeps its norm."""
    return mock.patch.object(
        clipping, "clip_factors", lambda norms, *rest, **mode: norms.new_ones(len(norms)).float()
    )


@contextlib.contextmanager
def shuffling() -> Iterator[None]:
    """Batches of one size that go through all records, epoch after epoch."""
    generator = np.random.default_rng()
    drawn: dict[tuple[int, bytes], np.ndarray] = {}
    waiting: dict[int, np.ndarray] = {}

    def twin(n: int, rate: float, *, stream) -> np.ndarray:
        if rate == 1:
            return np.arange(n)
        use = (n, stream._secret)
        if use not in drawn:
            size = round(rate * n)
            rest = waiting.get(n, np.empty(0, np.int64))
            if len(rest) < size:
                rest = np.concatenate([rest, generator.permutation(n)])
            drawn[use], waiting[n] = np.sort(rest[:size]), rest[size:]
        return drawn[use]

    with (
        mock.patch("sapf_ray.privacy.canaries.poisson_sample", twin),
        mock.patch("sapf_ray.privacy.release.poisson_sample", twin),
    ):
        yield


def unpaid_selection() -> contextlib.AbstractContextManager[object]:
    """The selection is released and never enters the ledger."""

    def twin(self, name, total, *, stage):
        if stage != "selection":
            return _pay(self, name, total, stage=stage)
        joined = self.joined(name, total, stage=stage)
        return joined, self.key.stream("noise", name, joined.digest())

    return mock.patch.object(release.Releaser, "_pay", twin)


def float32_sum(rows: np.ndarray) -> np.ndarray:
    """Micro-batches of 64 in shards of 512, in one float32 sum."""
    total = np.zeros(rows.shape[1], np.float32)
    for start in range(0, len(rows), SHARD):
        part = np.zeros_like(total)
        for first in range(start, min(start + SHARD, len(rows)), 64):
            part += rows[first : min(first + 64, start + SHARD)].sum(0, dtype=np.float32)
        total += part
    return total


FAULTS: dict[str, Twin] = {
    "honest": contextlib.nullcontext,
    "no noise": no_noise,
    "noise 10x too small": less_noise(10),
    "noise 3x too small": less_noise(3),
    f"noise of {RANKS} ranks, each 1/{RANKS}": noise_per_rank,
    "clipping off": clipping_off,
    "shuffled epochs for Poisson": shuffling,
    "selection not paid": unpaid_selection,
    "float32 sums": contextlib.nullcontext,
}


def digits_plan(epsilon: float) -> PrivacyPlan:
    """Of the digits' preset."""
    config = RunConfig(
        privacy=PrivacyConfig(epsilon=epsilon),
        finetune=FinetuneConfig(steps=STEPS, batch_size=BATCH),
    )
    return make_plan(config, N_RECORDS)


def claim_of(plan: PrivacyPlan, paid: list[str]) -> Claim:
    """What a run of the plan says."""
    return Claim(
        epsilon=plan.composed_epsilon,
        delta=plan.delta,
        charges=[(event, count) for _, event, count in plan_events(plan)],
        paid=paid,
    )


def audit_once(
    plan: PrivacyPlan, attacks: Attacks, *, canaries: int, runs: int, float32: bool
) -> list[Finding]:
    """One run with a key of its own, and all audits of it."""
    made = release_all(plan, canaries, key=NoiseKey.create(), sizes={"selection": POOL})
    claim = claim_of(plan, [line.release for line in made.lines])
    return [
        *attacks.findings(score(made.observed, made.coins), power=False),
        *parts(made.observed, made.coins, claim=claim),
        audit_mechanism("gaussian", runs=runs, confidence=attacks.confidence),
        audit_sums(float32_sum if float32 else clipped_sum),
    ]


def main() -> None:
    """Prints one line for each fault and audit, and a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20, help="Runs under each fault.")
    parser.add_argument("--canaries", type=int, default=8000)
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--mechanism_runs", type=int, default=10_000)
    parser.add_argument("--json", help="File for all findings.")
    parser.add_argument("--only", help="One fault.")
    given = parser.parse_args()
    plan = digits_plan(given.epsilon)
    honest = release_all(plan, given.canaries, key=NoiseKey.create(), sizes={"selection": POOL})
    attacks = plan_attacks(
        honest.observed,
        given.canaries,
        claim=claim_of(plan, []),
        confidence=given.confidence,
    )
    found: dict[str, list[list[Finding]]] = {}
    for fault, twin in FAULTS.items():
        if given.only not in (None, fault):
            continue
        began = time.time()
        with twin():
            found[fault] = [
                audit_once(
                    plan,
                    attacks,
                    canaries=given.canaries,
                    runs=given.mechanism_runs,
                    float32=fault == "float32 sums",
                )
                for _ in range(given.runs)
            ]
        print(f"{fault}: {time.time() - began:.0f} s", flush=True)
    print(f"\nclaim ε = {plan.composed_epsilon:.3f} at δ = {plan.delta:.3g}, ", end="")
    print(f"{given.canaries:,} canaries, {given.confidence:.0%}, {given.runs} runs each\n")
    print(table(found))
    if given.json:
        plain = {
            fault: [[finding.to_dict() for finding in run] for run in runs]
            for fault, runs in found.items()
        }
        with open(given.json, "w", encoding="utf-8") as file:
            json.dump(plain, file, indent=1)


def table(found: dict[str, list[list[Finding]]]) -> str:
    """Markdown: faults by audits, in how many runs the claim was falsified and what was shown."""
    audits = [finding.audit for finding in next(iter(found.values()))[0]]
    lines = ["| fault | " + " | ".join(audits) + " |", "|---" * (len(audits) + 1) + "|"]
    for fault, runs in found.items():
        cells = []
        for column in range(len(audits)):
            shown = np.array([run[column].shown for run in runs])
            caught = sum(run[column].falsified for run in runs)
            cells.append(f"{caught}/{len(runs)}; {shown.min():.3g} to {shown.max():.3g}")
        lines.append(f"| {fault} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
