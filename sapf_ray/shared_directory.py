"""Whether all nodes of a cluster share the run directory: its files, and its locks."""

from __future__ import annotations

import secrets
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sapf_ray import cluster, locks
from sapf_ray.errors import ClusterError

PROBE_SECONDS = 60.0


def look(path: str) -> tuple[str | None, bool]:
    """The file's text, None where it cannot be read, and whether its lock could be taken."""
    try:
        with open(path, "r+", encoding="utf-8") as file:
            text = file.read()
            try:
                locks.take(file, wait=False)()
            except locks.Held:
                return text, False
            return text, True
    except OSError:
        return None, False


_look = ray.remote(num_cpus=0, max_retries=0)(look)


def check_shared(directory: Path) -> None:
    """Looks into the run directory from every node.

    Each must see what the driver writes there, and be kept out by a lock that the driver holds:
    with locks that count on one node alone, two could write the ledger at the same time, and lose
    a charge.

    Raises:
        ClusterError: A node does not see it, or is not kept out; names it.
    """
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]
    if len(nodes) < 2:
        return
    token, path = secrets.token_hex(16), directory.resolve() / f".shared-{secrets.token_hex(4)}"
    path.write_text(token, encoding="utf-8")
    try:
        with open(path, "r+", encoding="utf-8") as file, locks.locked(file):
            looking = {
                _look.options(
                    name="check_shared",
                    scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
                ).remote(str(path)): node
                for node in nodes
            }
            ready, _ = ray.wait(list(looking), num_returns=len(looking), timeout=PROBE_SECONDS)
            for reference, node in looking.items():
                name = f"node {node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
                if reference not in ready:
                    raise ClusterError(
                        f"--out {directory}: {name} did not look there within "
                        f"{PROBE_SECONDS:g} s; is it overloaded?"
                    )
                check_seen(*cluster.result(reference), token=token, where=f"{directory}: {name}")
    finally:
        path.unlink(missing_ok=True)


def check_seen(text: str | None, could_lock: bool, *, token: str, where: str) -> None:
    """Judges what a node found.

    Args:
        text: What the node read; None where it could not.
        could_lock: Whether it could take the lock.
        token: What the driver wrote.
        where: Directory and node, for the error.

    Raises:
        ClusterError: The directory, or its lock, is not shared.
    """
    if text != token:
        raise ClusterError(
            f"--out {where} of the cluster does not see it; put the run directory on storage that "
            "all nodes mount at the same path (NFS, a ReadWriteMany volume)"
        )
    if could_lock:
        raise ClusterError(
            f"--out {where} of the cluster is not kept out by the driver's lock; mount that "
            "storage with locks that all nodes share (NFS: without local_lock or nolock)"
        )
