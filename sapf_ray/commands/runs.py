"""``sapf run``, and what is made of a finished run."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.console import Console

from sapf_ray.commands.say import note, say
from sapf_ray.options import all_given_keys, config_of, given_keys

if TYPE_CHECKING:
    from sapf_ray.data.base import ImageSource
    from sapf_ray.models.public_model import PublicModel
    from sapf_ray.pipeline import Result
    from sapf_ray.privacy.planner import PrivacyPlan


def run(namespace: argparse.Namespace, console: Console) -> None:
    config = config_of(namespace)
    from sapf_ray.pipeline import run
    from sapf_ray.report.sizing import opening_lines
    from sapf_ray.report.terminal import manifest_line, result_table, show_progress
    from sapf_ray.reuse.commands import asks_for_more, make_more
    from sapf_ray.runs import runlog, worktime

    def on_plan(plan: PrivacyPlan, source: ImageSource, model: PublicModel) -> None:
        for line in opening_lines(config, namespace.out, plan=plan, source=source, model=model):
            say(console, line)

    make: Callable[..., Result] = functools.partial(run, on_plan=on_plan)
    if asks_for_more(config, namespace.out):
        make = make_more
    with (
        runlog.shown() if namespace.verbose else contextlib.nullcontext(),
        show_progress(console) as on_progress,
    ):
        result = make(
            config,
            namespace.out,
            on_progress=on_progress,
            on_note=lambda line, secret: note(console, line, secret=secret),
            since=worktime.process_start(),
        )
    console.print(result_table(result))
    say(console, manifest_line(result))


def synthesize(namespace: argparse.Namespace, console: Console) -> None:
    from sapf_ray.reuse.commands import synthesize

    _later(synthesize, namespace, console)


def evaluate(namespace: argparse.Namespace, console: Console) -> None:
    from sapf_ray.reuse.commands import evaluate
    from sapf_ray.reuse.images import UNKNOWN, evaluate_images, is_plain

    if not is_plain(namespace.directory):
        _later(evaluate, namespace, console)
        return
    scores = evaluate_images(namespace.directory, given_keys(namespace))
    if namespace.json:
        print(json.dumps(scores))
        return
    from sapf_ray.report.terminal import score_table

    note(console, UNKNOWN, secret=False)
    console.print(score_table(f"sapf evaluate {namespace.directory}", scores))


def _later(command: Callable[..., Result], namespace: argparse.Namespace, console: Console) -> None:
    """A command on a finished run."""
    from sapf_ray.report.terminal import manifest_line, result_table, show_progress
    from sapf_ray.runs import runlog, worktime

    as_json = vars(namespace).get("json", False)
    notes = Console(stderr=True) if as_json else console
    with (
        runlog.shown() if namespace.verbose else contextlib.nullcontext(),
        show_progress(notes) as on_progress,
    ):
        result = command(
            namespace.directory,
            given_keys(namespace),
            name=namespace.name,
            on_progress=on_progress,
            on_note=lambda line, secret: note(notes, line, secret=secret),
            since=worktime.process_start(),
        )
    if as_json:
        print(json.dumps(result.metrics))
    else:
        console.print(result_table(result))
        say(console, manifest_line(result))


def audit(namespace: argparse.Namespace, console: Console) -> int:
    from sapf_ray.audit.command import Request, Show, audit
    from sapf_ray.report.terminal import show_progress

    request = Request(
        run=namespace.directory,
        out=namespace.out,
        config=None if namespace.directory else config_of(namespace),
        given=given_keys(namespace),
        wanted=all_given_keys(namespace),
        as_json=namespace.json,
    )
    return audit(request, console, show=Show(progress=show_progress, note=note))
