r"""``sapf submit``: a command of ``sapf`` as a job of a Ray cluster that runs elsewhere.

Example::

    sapf submit --address http://head:8265 -- run --preset digits --out /shared/runs/digits

What is sent stands on an allow list: Python files of the ``sapf_ray`` package and of the packages
behind ``--modules``, the data files that sapf-ray's wheel holds, and the YAML files that the
command names by a relative path. A folder of photographs, a data set or a file of secrets stays
where it is, beside the code or in the midst of it. The job's work goes to the cluster that it was
submitted to, and the same submission again continues what an earlier one left.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sapf_ray.errors import ClusterError, ConfigError, reason

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

PACKAGE = Path(__file__).resolve().parent
INSTALLS = ("pip", "image")
PACKAGE_DATA = (
    "py.typed",
    "presets/*.yaml",
    "tune_spaces/**/*.yaml",
    "models/bundled/**/*.json",
    "models/bundled/**/*.md",
    "models/bundled/**/*.npz",
    "models/bundled/**/*.npy",
    "models/bundled/**/*.safetensors",
    "estimate/*.yaml",
    "paper/published/*.csv",
    "models/vocabularies/*.txt",
)
"""The files that sapf_ray needs beside its Python files: those of its wheel, kind by kind."""
_TOKEN = (
    "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the cluster's token"
)


def relative_out(arguments: Sequence[str]) -> str | None:
    """The ``--out`` of a command line where it is not an absolute path.

    >>> relative_out(["run", "--out", "runs/x"])
    'runs/x'
    >>> relative_out(["run", "--out=/shared/x"]) is None
    True
    """
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name != "--out":
            continue
        path = value if equals else following
        return None if _is_absolute(path) else path
    return None


def _is_absolute(path: str) -> bool:
    return "://" in path or Path(path).expanduser().is_absolute()


def check_out(arguments: Sequence[str]) -> None:
    """Refuses an output directory that would be deleted with the job.

    Raises:
        ConfigError: ``--out`` is a relative path.
    """
    relative = relative_out(arguments)
    if relative is not None:
        raise ConfigError(
            "--out",
            relative,
            "must be an absolute path, on storage that all nodes mount; a job's own folder is "
            "deleted after it",
        )


def requirements(extra: Iterable[str] = ()) -> list[str]:
    """``name[extras]==version`` of each dependency but Ray, as installed here.

    Ray itself is left out: its version is the cluster's.

    Args:
        extra: Requirements in addition to those of sapf-ray.
    """
    pinned = []
    for line in [*(metadata.requires("sapf-ray") or []), *extra]:
        if "extra ==" in line:
            continue
        match = re.match(r"([A-Za-z0-9._-]+)(\[[^\]]*\])?", line)
        assert match is not None
        name = match.group(1)
        if name != "ray":
            # a local label (torch 2.14.1+cu126) names an index that the node may not know
            version = metadata.version(name).split("+")[0]
            pinned.append(f"{name}{match.group(2) or ''}=={version}")
    return pinned


def code_files(module: Path) -> list[Path]:
    """What is sent of a package or module: its Python files, and of ``sapf_ray`` those of
    :data:`PACKAGE_DATA`; nothing hidden, no other environment's packages.

    Args:
        module: A folder or a ``.py`` file.

    Raises:
        ConfigError: There is no Python file.
    """
    if module.is_file() and module.suffix == ".py":
        return [module]
    found = []
    for folder, folders, names in os.walk(module) if module.is_dir() else ():
        inside = Path(folder)
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and not (inside / name / "pyvenv.cfg").exists()
        )
        found += [inside / name for name in sorted(names) if name.endswith(".py")]
    if module.resolve() == PACKAGE:
        for pattern in PACKAGE_DATA:
            found += sorted(module.glob(pattern))
    if not found:
        raise ConfigError(
            "--modules", str(module), "must be a .py file, or a folder with Python files"
        )
    return found


def stage(modules: Iterable[str | Path], folder: Path) -> list[str]:
    """Lays out in ``folder`` what is sent of the modules, as links.

    Args:
        modules: Folders and ``.py`` files.
        folder: An empty folder; one that an earlier call filled with the same stays as it is.

    Returns:
        What Ray packs: a path for each module.

    Raises:
        ConfigError: See :func:`code_files`.
    """
    staged = []
    for module in modules:
        source = Path(module).resolve()
        target = folder / source.name
        for file in code_files(source):
            link = target if file == source else target / file.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(file)
        staged.append(str(target))
    return staged


def runtime_env(
    install: str = "pip",
    *,
    folder: Path,
    modules: Iterable[str | Path] = (),
    extra: Iterable[str] = (),
) -> dict[str, Any]:
    """What Ray needs to run this very code on a node.

    Args:
        install: ``pip``: every node installs the dependencies, in the versions installed here;
            minutes at the first job, cached on the node afterwards. ``image``: the nodes' container
            image has them (``jobs/cluster/Dockerfile``), only the code is sent.
        folder: Where what is sent is laid out; must last until Ray has packed it.
        modules: Packages (folders) and modules (``.py`` files) to send beside ``sapf_ray``.
        extra: Requirements in addition to those of sapf-ray, for ``pip``.

    Raises:
        ConfigError: A module without a Python file.
    """
    env: dict[str, Any] = {
        "py_modules": stage([PACKAGE, *modules], folder),
        "env_vars": {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1"},
    }
    if install == "pip":
        env["pip"] = {"packages": requirements(extra), "pip_check": False}
    return env


def named_files(arguments: Sequence[str], directory: Path) -> list[Path]:
    """The YAML files below ``directory`` that a command names, relative to it."""
    named = []
    for word in arguments:
        path = Path(word.partition("=")[2] if word.startswith("--") else word)
        inside = not path.is_absolute() and ".." not in path.parts
        if inside and path.suffix in (".yaml", ".yml") and (directory / path).is_file():
            named.append(path)
    return named


def submit(
    arguments: Sequence[str], *, address: str, install: str = "pip", modules: Sequence[str] = ()
) -> None:
    """Sends a command to a cluster, prints the job's output as it comes, and waits for its end.

    Args:
        arguments: The command, as behind ``sapf``.
        address: The cluster's job server, ``http://head:8265``.
        install: ``pip`` or ``image``, see :func:`runtime_env`.
        modules: Packages and modules to send beside ``sapf_ray``: those of ``--plugins``.

    Raises:
        ConfigError: No command, or an ``--out`` that is not absolute.
        ClusterError: The cluster cannot be reached, refuses the job, or the job failed; one line.
    """
    if not arguments:
        raise ConfigError("submit", "", "must name a command: sapf submit --address URL -- run ...")
    check_out(arguments)
    for module in modules:
        if not Path(module).exists():
            raise ConfigError("--modules", module, "no such file or folder")
    with tempfile.TemporaryDirectory() as temporary:
        code = Path(temporary) / "code"
        named = Path(temporary) / "named"
        env = runtime_env(install, folder=code, modules=modules)
        client = _client(address)
        files = named_files(arguments, Path.cwd())
        for path in files:
            (named / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, named / path)
        if files:
            env["working_dir"] = str(named)
        words = ["python", "-m", "sapf_ray.cli", *arguments]
        try:
            job = client.submit_job(entrypoint=shlex.join(words), runtime_env=env)
        except Exception as error:  # requests', aiohttp's and Ray's own, by what went wrong
            raise ClusterError(f"{address}: the job was not taken: {reason(error)}") from error
    print(f"job {job} on {address}; it goes on if you leave: ray job stop {job}", flush=True)
    _follow(client, job)


def _client(address: str) -> JobSubmissionClient:
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        try:
            return JobSubmissionClient(address)
        except AuthenticationError:
            if not _use_token():
                raise
            return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise ClusterError(f"{address}: the cluster requires a token; {_TOKEN}") from error
    except Exception as error:  # an address that is none, no server, a server of another kind
        raise ClusterError(f"{address}: {reason(error)}") from error


def _use_token() -> bool:
    """Whether there is a token that was not shown yet; it is shown from now on.

    ``ray start --head`` requires the token of ``~/.ray/auth_token`` where that file is, but Ray's
    clients show one only under RAY_AUTH_MODE=token.
    """
    from ray._private.authentication import authentication_token_setup as setup

    if os.environ.get(setup.AUTH_MODE_ENV_VAR) is not None:
        return False
    return setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def _follow(client: JobSubmissionClient, job: str) -> None:
    import asyncio  # slow to import, and every command imports this module for its options

    async def tail() -> None:
        async for lines in client.tail_job_logs(job):
            print(lines, end="", flush=True)

    try:
        asyncio.run(tail())
        info = client.get_job_info(job)
    except Exception as error:
        raise ClusterError(f"job {job}: lost sight of it: {reason(error)}") from error
    if info.status != "SUCCEEDED":
        code = "" if info.driver_exit_code is None else f" with exit code {info.driver_exit_code}"
        raise ClusterError(f"job {job}: {str(info.status).lower()}{code}; its output is above")
