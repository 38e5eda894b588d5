"""The options of each command of ``sapf``."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from sapf_ray.config.kinds import Count, Kind, kind_of
from sapf_ray.config.later import later_keys
from sapf_ray.option_parts import (
    INTEGER,
    NUMBER,
    SWITCH,
    Parser,
    add,
    add_config_keys,
    add_config_sources,
)

FORMATS = ("text", "markdown", "csv", "latex")
FORMAT = Kind(base=str, choices=lambda: FORMATS)


def _run_options(parser: Parser) -> None:
    parser.usage = "sapf run --out DIRECTORY [OPTIONS]"
    parser.add_argument(
        "--out", required=True, help="Run directory; the same command again continues it."
    )
    add(
        parser,
        "--verbose",
        kind=SWITCH,
        default=False,
        help="Show the lines of run.log.jsonl on stderr as well.",
    )
    add_config_sources(parser)
    add_config_keys(parser)


def _synthesize_options(parser: Parser) -> None:
    parser.usage = "sapf synthesize RUN [OPTIONS]"
    parser.add_argument(
        "directory", metavar="RUN", help="Finished run, or RUN/synthesis/NAME of an earlier call."
    )
    _later_options(parser, "synthesize")


def _evaluate_options(parser: Parser) -> None:
    parser.usage = "sapf evaluate RUN|PARQUET [OPTIONS]"
    parser.add_argument(
        "directory",
        metavar="RUN|PARQUET",
        help="Finished run, RUN/synthesis/NAME, or any Parquet file or folder of images and labels "
        "(with --data.source).",
    )
    _json_option(parser, "Print the scores as one JSON object.")
    _later_options(parser, "evaluate")


def _later_options(parser: Parser, command: str) -> None:
    parser.add_argument(
        "--name", help="Name of the result's folder; by default made from what is changed."
    )
    add(
        parser,
        "--verbose",
        kind=SWITCH,
        default=False,
        help="Show the lines of run.log.jsonl on stderr as well.",
    )
    add_config_keys(parser, later_keys(command), of_run=True)


def _init_options(parser: Parser) -> None:
    parser.usage = "sapf init PHOTOS [--out run.yaml] [OPTIONS]"
    parser.add_argument("path", metavar="PHOTOS", help="Folder or file of the images.")
    parser.add_argument("--out", default="run.yaml", help="File to write (default: run.yaml).")
    add(parser, "--force", kind=SWITCH, default=False, help="Replace the file.")
    add(
        parser,
        "--minutes",
        kind=NUMBER,
        help="Time that the run may take (default: 10; 120 with a model for GPUs).",
    )
    add_config_keys(parser)


def _doctor_options(parser: Parser) -> None:
    parser.usage = "sapf doctor [PHOTOS] [OPTIONS]"
    parser.add_argument(
        "path", metavar="PHOTOS", nargs="?", help="Folder or file of the images, to check as well."
    )
    parser.add_argument(
        "--out", default="runs", help="Where run directories will be (default: runs)."
    )
    _json_option(parser, "Print one JSON list.")
    add_config_sources(parser)
    add_config_keys(parser)


def _plan_options(parser: Parser) -> None:
    parser.usage = "sapf plan [OPTIONS]"
    _json_option(parser, "Print one JSON object.")
    parser.add_argument(
        "--cluster_devices",
        "--cluster",
        metavar="KxDEVICE",
        help="Also estimate time and memory of each stage on K devices, from measured costs: "
        "4xa6000 (the paper's), 2xcpu2; `--cluster` for short.",
    )
    parser.add_argument(
        "--cluster_costs",
        help="Own measurement for it: results.json of `make bench`, or metrics.json of a finished "
        "run.",
    )
    add(
        parser,
        "--cluster_price",
        kind=NUMBER,
        help="Price of a device for an hour: adds costs to it.",
    )
    add(
        parser,
        "--images_per_person",
        kind=kind_of(Count),
        help="Also say what the plan, made for images, promises a person with so many "
        "(docs/person-level.md); takes seconds.",
    )
    add_config_sources(parser)
    add_config_keys(parser)


def _ledger_options(parser: Parser) -> None:
    parser.usage = "sapf ledger PATH..."
    parser.add_argument(
        "paths",
        metavar="PATH",
        nargs="+",
        help="Run directory; several, or folders of them: what all runs below on the same images "
        "cost together.",
    )


def _audit_options(parser: Parser) -> None:
    parser.usage = "sapf audit [RUN] [--out DIRECTORY] [OPTIONS]"
    parser.add_argument(
        "directory",
        metavar="RUN",
        nargs="?",
        help="Finished run with canaries (audit.canaries); without it one is made in --out.",
    )
    parser.add_argument("--out", help="Run directory to make; the same command continues it.")
    _json_option(parser, "Print one JSON object.")
    add_config_sources(parser)
    add_config_keys(parser)


def _verify_options(parser: Parser) -> None:
    parser.usage = "sapf verify RUN [OPTIONS]"
    parser.add_argument("directory", metavar="RUN", help="Directory of a finished run.")
    parser.add_argument(
        "--manifest_digest",
        "--manifest-digest",
        metavar="HEX",
        help="SHA-256 of its manifest.json as the run printed it: finds an edit that renewed the "
        "manifest, too.",
    )
    _json_option(parser, "Print one JSON object.")


def _grid_options(parser: Parser) -> None:
    parser.add_argument(
        "--out",
        help="Directory of the runs, runs/NAME unless given; the same command again continues it, "
        "and keeps what is finished.",
    )
    add(parser, "--smoke", kind=SWITCH, default=False, help="The small twin on embedded data.")
    add(
        parser,
        "--dry_run",
        "--dry-run",
        kind=SWITCH,
        default=False,
        help="List cells, budgets and times; start nothing.",
    )
    add(
        parser,
        "--max_concurrent",
        "--max-concurrent",
        kind=INTEGER,
        default=0,
        help="Cells at the same time; 0: as many as the cluster holds.",
    )
    add(parser, "--retries", kind=INTEGER, default=2, help="Retries of a cell that broke off.")
    parser.add_argument("--only", help="Cells with these labels, e.g. method=DP-SAPF,seed=0.")
    add_config_keys(parser)


def _tune_options(parser: Parser) -> None:
    parser.usage = "sapf tune SPACE [OPTIONS]"
    parser.add_argument("space", help="YAML file, or the name of one in tune_spaces/.")
    add(
        parser,
        "--public_twin",
        "--public-twin",
        kind=SWITCH,
        default=False,
        help="Run the cells on images that the public model draws, as many as the sensitive ones, "
        "of the same classes: choosing settings by their scores costs no privacy.",
    )
    add(
        parser,
        "--private",
        kind=SWITCH,
        default=False,
        help="Choose one cell privately, on the sensitive images: a random number of secret "
        "trials, scored by a noisy count, of which the best one is released (docs/tuning.md).",
    )
    _grid_options(parser)


def _reproduce_options(parser: Parser) -> None:
    parser.usage = "sapf reproduce TABLE [OPTIONS]"
    parser.add_argument(
        "table",
        help="table9, table10, table13: computed, reads no image, up to a minute; "
        "table2, 5, 6, 7, 8, 11, 12, 15, figure4, 5, 6, 7: runs or continues the grid.",
    )
    add(
        parser,
        "--format",
        kind=FORMAT,
        default="text",
        help="How to print it: " + ", ".join(FORMATS),
    )
    _grid_options(parser)


def _submit_options(parser: Parser) -> None:
    parser.usage = "sapf submit --address URL [OPTIONS] -- COMMAND ..."
    parser.add_argument("--address", required=True, help="Job server, e.g. http://head:8265.")
    add(
        parser,
        "--install",
        kind=Kind(base=str, choices=lambda: ("pip", "image")),
        default="pip",
        help="Where nodes have the dependencies from: pip, or the container image.",
    )
    parser.add_argument(
        "--modules",
        action="append",
        default=[],
        help="Package or module to send beside sapf_ray, as for --plugins; may be repeated.",
    )
    parser.add_argument(
        "words",
        nargs=argparse.REMAINDER,
        metavar="COMMAND",
        help="The command: run, tune, plan ...",
    )


def _list_options(parser: Parser) -> None:
    _json_option(parser, "Print one JSON list.")


def _json_option(parser: Parser, help: str) -> None:
    add(parser, "--json", kind=SWITCH, default=False, help=help)


COMMANDS: dict[str, tuple[str, Callable[[Parser], None]]] = {
    "init": ("Write a config that suits your images and this machine.", _init_options),
    "doctor": ("Check this machine, and print what mends each fault.", _doctor_options),
    "run": ("Run or continue one experiment.", _run_options),
    "plan": ("Plan the privacy spend; reads no image.", _plan_options),
    "synthesize": (
        "More synthetic images of a finished run; costs no privacy.",
        _synthesize_options,
    ),
    "evaluate": (
        "Other scores of a finished run, or of any Parquet data set.",
        _evaluate_options,
    ),
    "ledger": (
        "What a run spent, or several together, replayed from their ledgers.",
        _ledger_options,
    ),
    "audit": ("Attack a run's own claim with canaries: bounds on epsilon.", _audit_options),
    "verify": ("Whether a run's files hold together; reads no image.", _verify_options),
    "tune": ("Run or continue a grid of experiments, and print its table.", _tune_options),
    "reproduce": (
        "A table or figure of the paper, ours beside its printed values.",
        _reproduce_options,
    ),
    "submit": ("Run a command as a job of a Ray cluster, and wait for it.", _submit_options),
    "datasets": (
        "The data sets that data.source takes, and where to obtain them.",
        _list_options,
    ),
    "methods": ("The methods that --method takes.", _list_options),
    "models": (
        "The public models that --model.path takes by name, and where to obtain them.",
        _list_options,
    ),
}
"""Command → what it does, and the function that adds its options."""
