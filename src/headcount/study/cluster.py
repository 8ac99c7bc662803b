"""Ray, which starts workers on one machine or a cluster: found, reached, and asked what it has room for.

Only this file and `headcount.study.executors` know Ray. It schedules, watches and restarts; nothing of that is done
here. Ray waits without end for an address where nothing answers, so an address is tried before Ray is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from types import FrameType
from typing import Any

import torch

from headcount.errors import OptionError, first_line
from headcount.study.spec import InductionSpec

# How long a head node may take to answer, in seconds.
_PATIENCE = 10.0
# What a client of HTTP/2 says first, with settings that are empty; the kind of frame that they are.
_SETTINGS = b"\x04"
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + _SETTINGS + b"\0\0\0\0\0"
_INSTALL = "pip install 'headcount[ray]'"


@dataclass(frozen=True)
class Size:
    """How many workers there are, and what each has.

    Attributes:
        workers: How many are started.
        room: How many of them there is room for now; the others begin when there is more.
        threads: Threads, and cores, of each.
        gpus: GPUs of each.
    """

    workers: int
    room: int
    threads: int
    gpus: int

    def together(self, node: Mapping[str, float]) -> int:
        """How many of them a node may have at once, at least one.

        Args:
            node: What it has, as Ray knows it: "CPU", "GPU".
        """
        return max(1, min(self.workers, room_of(node, self.threads, self.gpus)))


def check_cluster(spec: InductionSpec) -> None:
    """Refuse what surely cannot work, before anything is loaded: no Ray, no cluster, or no room for a worker in it.

    A cluster that was asked for is connected to, and left again: that takes seconds, and loading a model minutes.

    Args:
        spec: What was asked.

    Raises:
        OptionError: Which says what to do.
    """
    ray = sys.modules.get("ray")
    if (ray is not None and ray.is_initialized()) or _address(spec.address) != "local":
        with connected(spec, cores=1) as cluster:
            size_of(spec, 0, nodes_of(cluster))
        return
    _check_address(spec.address)
    if (spec.gpus_per_worker or 0) > (gpus := torch.accelerator.device_count()):
        raise OptionError(f"`gpus_per_worker` is {spec.gpus_per_worker}, and this machine has {gpus} GPUs: leave "
                          "it out, or name the `address` of a cluster with them", fields=("gpus_per_worker", "address"))


def _check_address(address: str | None) -> None:
    """Refuse what can be told without Ray: it is not installed, or its head node does not answer.

    Args:
        address: As asked for; None: a cluster of this machine is started.
    """
    if not _installed():
        raise OptionError(f"`executor='ray'` needs Ray, which is not installed: {_INSTALL}, on every node",
                          fields=("executor='ray'",))
    asked, address = address, _address(address)
    if address in ("local", "auto"):
        return
    said = "`address`" if address == asked else "RAY_ADDRESS"
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise OptionError(f"{said} is HOST:PORT of a Ray cluster's head node (as `ray start --head` says it), or "
                          f"auto, not {address!r}", fields=("address",))
    try:
        _answers(host.strip("[]"), int(port))
    except (OSError, OverflowError) as error:
        raise OptionError(f"no Ray cluster answers at {said} {address} ({first_line(error)}): start its head node "
                          "there (ray start --head), or correct it", fields=("address",)) from error


def _answers(host: str, port: int) -> None:
    """Ask a head node for its settings, as gRPC begins a connection: with HTTP/2's preface (RFC 9113, 3.4).

    Raises:
        OSError: If nothing is there, nothing answers in time, or something else does, such as a dashboard.
    """
    with socket.create_connection((host, port), timeout=_PATIENCE) as connection:
        if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
            return  # which begins otherwise
        connection.sendall(_PREFACE)
        answer = connection.recv(9)
        if answer[3:4] != _SETTINGS:
            raise OSError("what answers there is not Ray's head node")


def _installed() -> bool:
    """Whether Ray can be imported; also where something stands in its place, or keeps it out."""
    try:
        return find_spec("ray") is not None
    except (ImportError, ValueError):
        return False


@contextlib.contextmanager
def connected(spec: InductionSpec, cores: int) -> Iterator[Any]:
    """Ray, connected to a cluster: the one that was asked for, or one of this machine, which ends with the block.

    Args:
        spec: What was asked.
        cores: Of this machine, for a cluster that is started here.

    Raises:
        OptionError: If there is no such cluster.
    """
    _check_address(spec.address)
    # Ray reports on its use to its makers where nobody forbids it.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A worker without a GPU sees none of them: as Ray has always done, and announces that it will not any more.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
    import ray

    if ray.is_initialized():  # by a program that uses Ray itself
        yield ray
        return
    address, quiet = _address(spec.address), {"log_to_driver": False, "logging_level": "ERROR"}
    here = {"num_cpus": max(cores, (spec.workers or 1) * (spec.threads_per_worker or 1)), "include_dashboard": False}
    try:
        with contextlib.redirect_stdout(sys.stderr):  # where Ray writes that a process of its own has died
            _start(ray, address, {**quiet, **(here if address == "local" else {})})
            yield ray
    finally:
        ray.shutdown()


def _start(ray: Any, address: str, options: Mapping[str, Any]) -> None:
    """Connect to a cluster, or start one; ends of this process are asked for as before, which Ray would hear itself.

    Raises:
        OptionError: If there is no such cluster.
    """
    told = signal.getsignal(signal.SIGTERM)
    try:
        with _put_off() if address == "local" else contextlib.nullcontext():
            ray.init(address=address, **options)
    except SystemExit as error:  # what Ray makes of a request to end that it hears meanwhile
        raise KeyboardInterrupt from error
    except (ConnectionError, OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        if address == "local":
            raise OptionError(f"Ray could not be started on this machine ({first_line(error)}): `executor='ray'` needs "
                              "it; leave that out, or fix Ray", fields=("executor='ray'",)) from error
        asks = "RAY_AUTH_MODE" not in os.environ and address != "auto"  # of which Ray tells nobody who names an address
        token = "; if it has a token (`ray start` tells), set RAY_AUTH_MODE=token here and on all nodes" if asks else ""
        raise OptionError(f"the Ray cluster at `address` {address} cannot be used ({first_line(error)}): start one "
                          "(ray start --head) with the same versions of Ray and Python, or leave the address out for "
                          f"one of this machine{token}", fields=("address",)) from error
    finally:
        if told is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, told)


@contextlib.contextmanager
def _put_off() -> Iterator[None]:
    """Put off Ctrl-C to the end of the block; a second one counts at once.

    Ray that is interrupted while it starts leaves processes behind, and may crash this one at its end.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone is told of signals
        yield
        return
    asked: list[int] = []

    def later(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = signal.signal(signal.SIGINT, later)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if asked:
        raise KeyboardInterrupt


def _address(asked: str | None) -> str:
    """What was asked for; else, and before `auto`, what Ray's own variable says, as to Ray; else this machine."""
    if asked and asked != "auto":
        return asked
    return os.environ.get("RAY_ADDRESS") or asked or "local"


def nodes_of(ray: Any) -> list[dict[str, float]]:
    """What each node of a cluster has, as Ray knows it: "CPU", "GPU"."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def size_of(spec: InductionSpec, gpus: int, nodes: Sequence[Mapping[str, float]]) -> Size:
    """How many workers of how many threads.

    Args:
        spec: What was asked.
        gpus: GPUs of a worker, where that was not asked.
        nodes: What each node of the cluster has, as Ray knows it: "CPU", "GPU".

    Raises:
        OptionError: If there is no room for a single worker.
    """
    gpus = gpus if spec.gpus_per_worker is None else spec.gpus_per_worker

    def room(threads: int) -> int:
        """Workers that have a place at once."""
        return sum(room_of(node, threads, gpus) for node in nodes)

    nodes_with = sum(node.get("CPU", 0) >= 1 for node in nodes)
    workers = spec.workers or max(1, room(1) if gpus else min(nodes_with, room(1)))
    most = int(max((node.get("CPU", 0) for node in nodes), default=0))
    wanted = max(1, min(workers, room(1)))
    threads = spec.threads_per_worker or max((n for n in range(1, most + 1) if room(n) >= wanted), default=1)
    if room(threads) == 0:
        cores, cards = (int(sum(node.get(kind, 0) for node in nodes)) for kind in ("CPU", "GPU"))
        raise OptionError(f"no node of the cluster has room for a worker of {threads} cores and {gpus} GPUs (they have "
                          f"{cores} and {cards} in all): correct `threads_per_worker` or `gpus_per_worker`, or add "
                          "nodes", fields=("threads_per_worker", "gpus_per_worker"))
    return Size(workers, min(workers, room(threads)), threads, gpus)


def room_of(node: Mapping[str, float], threads: int, gpus: int) -> int:
    """How many workers have a place on a node.

    Args:
        node: What it has.
        threads: Cores of a worker.
        gpus: GPUs of a worker.
    """
    return int(min([node.get("CPU", 0) // threads, *([node.get("GPU", 0) // gpus] if gpus else [])]))
