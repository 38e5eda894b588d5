"""What is told without a run: a first config, checks, plans, ledgers, listings."""

from __future__ import annotations

import argparse
import json

from rich.console import Console

from sapf_ray.commands.say import note, say
from sapf_ray.errors import SapfError
from sapf_ray.options import config_of, given_keys


def init(namespace: argparse.Namespace, console: Console) -> None:
    from sapf_ray.first_config import write_first_config

    made = write_first_config(
        namespace.path,
        namespace.out,
        force=namespace.force,
        minutes=namespace.minutes,
        given=given_keys(namespace),
    )
    for line in made:
        say(console, line)


def doctor(namespace: argparse.Namespace, console: Console) -> int:
    import dataclasses
    from pathlib import Path

    from sapf_ray.doctor import Subject, examine

    given = given_keys(namespace)
    if namespace.path is not None:
        from sapf_ray.first_config import data_keys

        namespace = argparse.Namespace(**{**data_keys(namespace.path), **vars(namespace)})
    subject = Subject(
        config=config_of(namespace),
        out=Path(namespace.out),
        has_data=bool(namespace.path or namespace.config or "data.source" in given),
    )
    findings = []
    for finding in examine(subject):
        findings.append(finding)
        if not namespace.json:
            line = finding.line()
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    if namespace.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    return int(any(finding.state == "FAULT" for finding in findings))


def plan(namespace: argparse.Namespace, console: Console) -> None:
    config = config_of(namespace)
    from sapf_ray.data.base import open_source
    from sapf_ray.estimate.cluster import estimate_run, open_cluster
    from sapf_ray.models.facts import find_facts
    from sapf_ray.privacy.planner import make_plan
    from sapf_ray.report.tables import estimate_table, person_line, plan_table

    cluster = open_cluster(
        namespace.cluster_devices,
        config,
        costs_file=namespace.cluster_costs,
        price=namespace.cluster_price,
    )
    found = None
    n_records = config.data.n_records
    try:
        source = open_source(config.data)
        n_records = n_records or source.n_units
        found = find_facts(config, source)
    except SapfError:
        if n_records is None:
            raise
    plan = make_plan(config, n_records, facts=None if found is None else found.facts)
    times = None if cluster is None else estimate_run(config, plan, cluster=cluster)
    person = {}
    if namespace.images_per_person is not None:
        from sapf_ray.privacy.group_privacy import person_report

        person = person_report(plan, namespace.images_per_person)
    if namespace.json:
        found_times = {} if times is None else {"cluster": times.to_dict()}
        print(json.dumps(plan.to_dict() | found_times | person))
    else:
        warning = None if found is None else found.words.line(plan.remedies)
        if warning is not None:
            note(console, warning, secret=False)
        console.print(plan_table(plan))
        if person:
            console.print(person_line(person["person"]))
        if times is not None:
            console.print(estimate_table(times))


def ledger(namespace: argparse.Namespace, console: Console) -> None:
    from sapf_ray.privacy.ledger import Ledger
    from sapf_ray.report.tables import ledger_table, together_table
    from sapf_ray.runs.directory import RunDirectory
    from sapf_ray.runs.together import COVERED, find_runs, totals_of

    paths = namespace.paths
    alone = RunDirectory(paths[0]).ledger
    if len(paths) == 1 and (alone.exists() or not alone.parent.is_dir()):
        console.print(ledger_table(Ledger.open(alone)))
        say(console, "this run alone; sapf ledger FOLDER adds up all runs on the same images")
        return
    console.print(together_table(totals_of(find_runs(paths))))
    say(console, COVERED)


def verify(namespace: argparse.Namespace, console: Console) -> int:
    from sapf_ray.report.tables import findings_table
    from sapf_ray.verify.checks import holds, to_json, verify

    findings = verify(namespace.directory, namespace.manifest_digest)
    if namespace.json:
        print(json.dumps(to_json(findings), indent=2))
    else:
        console.print(findings_table(namespace.directory, findings))
    return 0 if holds(findings) else 1


def submit(namespace: argparse.Namespace, console: Console) -> None:
    from sapf_ray.submit import submit

    words = namespace.words
    submit(
        words[1:] if words[:1] == ["--"] else words,
        address=namespace.address,
        install=namespace.install,
        modules=namespace.modules,
    )


def listing(namespace: argparse.Namespace, console: Console) -> None:
    from sapf_ray.report.tables import LISTS

    rows, table = LISTS[namespace.command]
    if namespace.json:
        print(json.dumps(rows(), indent=2))
    else:
        console.print(table())
