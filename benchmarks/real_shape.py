"""A small study of a model with OPT-66B's layers, by streaming: memory, reading and computing beside the plan's.

`python benchmarks/real_shape.py` writes a checkpoint of random bfloat16 weights of OPT-66B's shape with three layers
(2.04 GB each, and 0.93 GB of embeddings; into a temporary folder, or where --folder says, which keeps it). It runs a
study of two embedded tasks (curves, grid, transfer), a removal by that study, and induction, each in a process of its
own, and keeps what it saw in benchmarks/results/large/real_shape.json after each; `opt66b_page.py` puts it into
docs/opt-66b.md. Nothing of the product is changed for it: functions that read weights and that hand out blocks are
wrapped by others that time them.

- *Memory* is the anonymous memory of the process (RssAnon), looked at every 20 ms. Pages of files are left out, which
  the system drops when it needs the room. The base is what it was when the model was opened, before any weights.
- *Reading* is timed where weights are read. Behind every block the system is told to drop the file's pages, so that the
  next reading comes from the disk, as it does where a model does not fit into memory.
- *Computing* of a block is the time from when it is handed out to when the next one is asked for; *waiting* the time
  from then until that one is there.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import importlib.metadata
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from headcount.engine.waiting import wait_asleep

wait_asleep()

_ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(_ROOT / "tests"))

import psutil
import torch
from transformers import AutoConfig

import headcount.model.load
import random_checkpoint
import tiny
from headcount.cli import main as command
from headcount.engine import neighbours, proof, stream, stream_gradients
from headcount.engine.pack import Budget
from headcount.engine.stream import Stream, Wave
from headcount.measure import probes
from headcount.model.blockfiles import BlockFiles
from headcount.model.circuits import probes_of
from headcount.model.without_weights import bundled_shapes
from headcount.study.costs import memory_of
from headcount.study.devices import JOB_SECONDS
from headcount.study.forecast import forecast
from headcount.study.prepare import Silent
from headcount.study.runner import run_study
from headcount.study.spec import StudySpec

SHAPE = "facebook/opt-66b"
_RESULT = _ROOT / "benchmarks" / "results" / "large" / "real_shape.json"
# A reading of so many bytes is a block's, or that of the embeddings.
_LARGE = 5e8
# Bytes that are read to time the disk.
_TIMED = 4e9
_EVERY = 0.02
Row = dict[str, Any]


def study_of(model: Path, out: Path, documents: int) -> StudySpec:
    """The study: few documents, few steps."""
    return StudySpec(
        model=str(model), tasks=("icl_plural", "icl_past_tense"), shots=(1,), limit=documents,
        importance_limit=documents, measure=("curves", "grid", "transfer"), fractions=(0.34, 0.67), random_orders=1,
        grid_fractions=(0.34, 0.67), grid_order="mean", transfer_fractions=(0.67,), row_tokens=256, batch_tokens=256,
        stream=True, stream_memory="64MB", out=out)


class Watch(Silent):
    """What a process does: its memory, every reading of weights, every block that is computed.

    Attributes:
        phase: "proofs" until the jobs begin, then "jobs".
        base: Anonymous bytes when the model was opened.
        peaks: The most of them, by phase.
        readings: Of each: phase, seconds, bytes, and whether it was done ahead, by the reader's thread.
        blocks: Of each that was computed: phase, kind of pass, seconds of computing and of waiting, positions.
    """

    def __init__(self) -> None:
        self.phase, self.base = "proofs", 0
        self.peaks: dict[str, int] = {}
        self.readings: list[Row] = []
        self.blocks: list[Row] = []
        self._kind = ""
        self._waves: list[Wave[Any]] = []

    def begin(self, todo: int, done: int, tokens: float) -> None:
        """The jobs begin."""
        self.phase = "jobs"

    def stage(self, text: str, done: int = 0, total: int | None = None) -> None:
        """Told to who waits."""
        if not done:
            self.job(text)

    def job(self, title: str) -> None:
        """The same."""
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} {title}\n")

    @contextlib.contextmanager
    def memory(self) -> Iterator[None]:
        """Memory is looked at while something runs."""
        over = threading.Event()

        def look() -> None:
            while not over.wait(_EVERY):
                self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), anonymous())

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def wrap(self) -> None:
        """Wrap what opens the model, reads weights, and hands out blocks."""
        load, read = headcount.model.load.load, BlockFiles.read_named
        enter, through = Stream.enter, Stream.through

        @functools.wraps(load)
        def opened(*args: Any, **options: Any) -> Any:
            loaded = load(*args, **options)
            self.base = self.base or anonymous()
            return loaded

        def timed(files: BlockFiles, names: Sequence[str], memory: torch.Tensor | None = None) -> Any:
            started = time.perf_counter()
            got = read(files, names, memory)
            seconds, size = time.perf_counter() - started, files.bytes_of(names)
            self.readings.append({"phase": self.phase, "seconds": seconds, "bytes": size,
                                  "ahead": threading.current_thread().name.startswith("headcount-reader")})
            if size > _LARGE:
                _drop({held.path for held in files.tensors_of("").values()})
            return got

        def entered(self_: Stream, waiting: Any) -> Any:
            self._waves = enter(self_, waiting)
            return self._waves

        def passed(self_: Stream, waves: Any, around: Any = None) -> Iterator[int]:
            probe = type(waves[0].batch) is proof._Probe  # contract 3 is proved when the first job needs it
            rows = type(waves[0].batch) is probes._Rows
            self._kind = ("proof" if probe else "scoring" if around is None else "induction, probes" if rows else
                          "induction, texts")
            yield from through(self_, waves, around)

        headcount.model.load.load = opened
        BlockFiles.read_named = timed
        Stream.enter, Stream.through = entered, passed
        # Every pass of gradients goes through the blocks twice.
        turns = itertools.cycle(("gradients, forwards", "gradients, backwards"))
        stream.one_by_one = self._timed(
            stream.one_by_one, lambda: self._kind, lambda done: sum(wave.layer_tokens for wave in self._waves))
        stream_gradients.one_by_one = self._timed(
            stream_gradients.one_by_one, lambda: next(turns),
            lambda done: done * sum(wave.batch.tokens for wave in self._waves))

    def _timed(self, one_by_one: Any, kind_of: Callable[[], str], positions: Callable[[int], int]) -> Any:
        """Hands out blocks as before, and notes how long each took; `positions` is how many were computed so far."""
        def handed_out(blocks: Any) -> Iterator[int]:
            kind, asked, before = kind_of(), time.perf_counter(), positions(0)
            for done, i in enumerate(one_by_one(blocks), 1):
                out = time.perf_counter()
                yield i
                now, computed = time.perf_counter(), positions(done)
                self.blocks.append({"phase": self.phase, "kind": kind, "seconds": now - out, "waiting": out - asked,
                                    "positions": computed - before})
                asked, before = now, computed
        return handed_out


def anonymous() -> int:
    """Anonymous memory of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def _drop(files: set[Path]) -> None:
    """Tell the system that pages of files are not wanted any more."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def watched(work: Callable[[Watch], None]) -> Row:
    """What one piece of work does, in the process that this is."""
    watch = Watch()
    watch.wrap()
    started = time.perf_counter()
    with neighbours.watch(torch.get_num_threads()) as load, watch.memory():
        work(watch)
    return {"seconds": time.perf_counter() - started, "others": load.others, "base": watch.base,
            "peaks": watch.peaks, "readings": watch.readings, "blocks": watch.blocks}


def study(watch: Watch, model: Path, out: Path, documents: int) -> None:
    """Curves, grid and transfer, and what they rest on."""
    run_study(study_of(model, out, documents), reporter=watch)


def removal(watch: Watch, model: Path, out: Path, documents: int) -> None:
    """Heads and FFNs removed at a point that the study measured."""
    _command("remove", str(model), "--study", str(out), "--heads", "0.67", "--ffns", "0.34", "--stream",
             "--out", str(out.with_name("removed")))


def induction(watch: Watch, model: Path, out: Path, documents: int) -> None:
    """Prefix matching and copying of every head, on one text of each kind, into the study's folder."""
    _command("induction", str(model), "--stream", "--stream-memory", "1GB", "--skip-control",
             "--induction-lengths", "25", "--induction-seeds", "1", "--out", str(out))


def _command(*arguments: str) -> None:
    """A command line in this process, which a verb may end by itself."""
    try:
        code: Any = command(arguments)
    except SystemExit as ended:
        code = ended.code
    if code:
        sys.exit(code)


PARTS = {"study": study, "removal": removal, "induction": induction}


def write_checkpoint(folder: Path, layers: int) -> None:
    """Random weights of OPT-66B's shape, with fewer layers; what is there already is kept."""
    if not (folder / "config.json").is_file():
        known = bundled_shapes()[SHAPE]
        config = AutoConfig.for_model(known["model_type"], **known["config"] | {"num_hidden_layers": layers})
        random_checkpoint.write(folder, config, torch.bfloat16, tiny.tokenizer())


def read_speed(folder: Path) -> float:
    """Bytes a second that weights are read at from the disk: the first 4 GB of the files, one after another."""
    files = sorted(folder.glob("*.safetensors"))
    _drop({*files})
    read, started = 0, time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            memory = bytearray(64 * 2**20)
            while read < _TIMED and (got := file.readinto(memory)):
                read += got
    speed = read / (time.perf_counter() - started)
    _drop({*files})
    return speed


def planned(spec: StudySpec) -> Row:
    """What `headcount plan` says of the study on this machine, with its disk's speed."""
    speed = read_speed(Path(spec.model))
    known = forecast(spec, on=("cpu",), read_speed=int(speed))
    layers, passes, here = known.total.layer_tokens, known.passes, known.devices[0]
    d_model = known.shape.anatomy.layers[0].d_model
    return {"parameters": known.shape.anatomy.num_parameters, "weights": known.memory.weights,
            "block": known.memory.block, "output": known.memory.output, "batch": known.memory.batch,
            "streamed": known.memory.streamed, "maps": memory_of(known.shape, Budget(), 0, induction=True).induction,
            "rows": probes.ROW_STATES * probes_of(d_model)[0] * d_model * known.shape.model.dtype.itemsize,
            "waiting": known.waiting, "passes": list(passes),
            "bytes_read": known.memory.weights * sum(passes), "jobs": len(known.jobs),
            "layer_tokens": [layers.low, layers.middle, layers.high], "flops": known.total.flops,
            "active": known.shape.mean_active_parameters, "seconds": here.hours * 3600,
            "computing": here.computing * 3600, "reading": here.reading * 3600, "read_speed": speed,
            "rate": here.device.flops(known.shape.dtype), "job_seconds": JOB_SECONDS}


def certificate(folder: Path) -> Row:
    """What a removed model's certificate says of its size and its proofs."""
    told = json.loads((folder / "headcount.json").read_text(encoding="utf-8"))
    return {"proofs": told["proofs"], "saved": told["saved"]}


def in_a_process(what: str, model: Path, out: Path, options: argparse.Namespace) -> Row:
    """What one piece of work does in a process of its own."""
    result = out.with_name(f"{what}.json")
    subprocess.run([sys.executable, __file__, "--part", what, "--model", str(model), "--out", str(out),
                    "--documents", str(options.documents), "--result", str(result)], check=True,
                   env={**os.environ, "XDG_CACHE_HOME": str(out.with_name("cache"))})
    found: Row = json.loads(result.read_text(encoding="utf-8"))
    return found


def main() -> None:
    """Write the checkpoint, run the parts, keep what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is written, and kept")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--documents", type=int, default=3, help="of each of two tasks")
    parser.add_argument("--kept", type=Path, default=_RESULT)
    for name in ("part", "model", "out", "result"):
        parser.add_argument(f"--{name}", type=Path if name != "part" else str, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    if options.part is not None:
        work = functools.partial(PARTS[options.part], model=options.model,
                                 out=options.out, documents=options.documents)
        options.result.write_text(json.dumps(watched(work)), encoding="utf-8")
        return
    if options.folder is not None:
        options.folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="headcount-", dir=options.folder and options.folder.parent) as place:
        model, out = options.folder or Path(place) / "model", Path(place) / "study"
        write_checkpoint(model, options.layers)
        found = {"date": datetime.date.today().isoformat(), "machine": platform.processor() or platform.machine(),
                 "threads": torch.get_num_threads(), "memory": psutil.virtual_memory().total,
                 "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
                 "layers": options.layers, "documents": options.documents,
                 "plan": planned(study_of(model, out, options.documents))}
        options.kept.parent.mkdir(parents=True, exist_ok=True)
        for what in PARTS:
            found[what] = in_a_process(what, model, out, options)
            if what == "removal":
                found[what] |= certificate(out.with_name("removed"))
            options.kept.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
