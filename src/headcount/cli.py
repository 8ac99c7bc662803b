"""The command line: verbs, nothing else. Options are the fields of the dataclasses in `headcount.study.spec`."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import os
import re
import shlex
import signal
import sys
import tempfile
import threading
import tomllib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import cyclopts
from cyclopts import App, Parameter

import headcount
from headcount.engine.waiting import wait_asleep
from headcount.errors import DeviceWarning, HeadcountError, JobsFailedError, OptionError, StudyError, UnavailableError
from headcount.study.spec import PRESETS, ChoiceSpec, InductionSpec, ModelSpec, Part, RemovalSpec, StudySpec

if TYPE_CHECKING:
    from headcount.analysis.study import Study
    from headcount.mask_file import MaskFile
    from headcount.model.load import LoadedModel
    from headcount.removal.remove import Removed
    from headcount.terminal import Asked

app = App(
    name="headcount",
    version=headcount.__version__,
    help="Which attention heads and feed-forward blocks (FFNs) of a language model does in-context learning need?\n\n"
    "Score them, prune the least important step by step, and see what accuracy is left.",
    default_parameter=Parameter(consume_multiple=True, negative=()),
    suppress_keyboard_interrupt=False,
)
app.meta.suppress_keyboard_interrupt = False
app.meta.group_parameters = cyclopts.Group("Session")
# A number that is not whole, by itself or behind an option and "=".
_FRACTION = re.compile(r"(?:^|=)([+-]?\d*\.\d*[1-9]\d*)$")

Spec = Annotated[StudySpec, Parameter(name="*")]
# A disk that is full, or what one user may have of it.
_FULL = (errno.ENOSPC, errno.EDQUOT)
# What a verb calls an option for short.
_SHORT = {"induction": {"--seeds": "--induction-seeds", "--lengths": "--induction-lengths"},
          "heads": {"--sample": "--head-sample"}}
# Relations of the embedded suite that the demo measures: five of those that have 200 evaluated documents, so that a
# single one can tell of two points, and all of them together of one.
DEMO_TASKS = ("icl_adverb", "icl_comparative", "icl_first_letter", "icl_past_tense", "icl_plural")


@app.command
def study(spec: Spec, *, dry_run: bool = False) -> None:
    """Measure importance and the accuracy left by pruning, and write a report.

    `--measure curves grid transfer induction` measures more, `--preset opt66b-study` all that the paper has. A study
    that was stopped goes on where it stopped when the same command is run again.

    Args:
        dry_run: Print what `headcount plan` does, and measure nothing.
    """
    from headcount import terminal

    if dry_run:
        _plan(spec)
        return
    if spec.out is None:
        raise OptionError("a study needs a folder; name it with `out`", fields=("out",))
    with terminal.reporter() as reporter:
        from headcount.engine.neighbours import Speed
        from headcount.study.prepare import prepare
        from headcount.study.runner import run

        plan = prepare(spec, reporter=reporter)
        reporter.stage("timing the model")
        todo = plan.todo()
        speed = plan.speed() if todo else Speed()
    terminal.print_damaged(plan.damaged)
    if plan.other_orders and todo:
        terminal.print_note(plan.other_orders)
    terminal.print_cost(todo, plan.loaded.anatomy.num_layers, speed)
    with _keeping(spec.out):
        failed: JobsFailedError | None = None
        with terminal.reporter() as reporter:
            try:
                run(plan, reporter=reporter, command=_command())
            except JobsFailedError as error:  # the page shows all that was measured
                failed = error
        try:
            _report(spec.out)
        finally:
            if failed is not None:
                raise failed


@app.command
def plan(
    spec: Spec, *, on: tuple[str, ...] = ("cpu",), price: tuple[float, ...] = (), efficiency: float | None = None,
    read_speed: str | None = None,
) -> None:
    """What a study will cost, from the model's config alone: `headcount plan facebook/opt-66b --tasks piqa --on h100`.

    MODEL is a folder with nothing but config.json, a model that is cached, or the hub id of an OPT, Pythia, Llama-3,
    Qwen-3 or Gemma-3 model. No weights are read, and nothing is measured. The options are those of `headcount study`,
    and `headcount study --dry-run` prints the same.

    Args:
        on: Devices to say time for: h200, h100, a100, 4090, several as 8xh100; cpu is this machine.
        price: What an hour of one device costs; one number, or one for each of --on.
        efficiency: The share of a device's peak that is reached, in place of what is assumed.
        read_speed: Bytes a second that weights are read at where they are streamed, such as 1.5GB, in place of 3GB.
    """
    _plan(spec, on=on, price=price, efficiency=efficiency, read_speed=read_speed)


@app.command
def evaluate(spec: Spec) -> None:
    """Accuracy of the full model on each task."""
    from headcount import terminal

    with _measured(spec, "evaluate") as (measured, asked):
        terminal.print_accuracy(measured, asked)


@app.command
def heads(
    spec: Spec, *, method: Literal["gradient", "oracle"] = "gradient", sample: int | None = None,
) -> None:
    """Importance of every head: by gradient, or by oracle (what is lost without that head alone).

    Args:
        method: The oracle costs about half as many evaluations as there are heads, and is printed with how well the
            gradient's scores agree with it.
        sample: For the oracle: score so many heads, drawn at random.
    """
    from headcount import terminal

    spec = dataclasses.replace(spec, head_sample=sample if sample is not None else spec.head_sample)
    if method == "gradient" and spec.head_sample is not None:
        raise OptionError("--sample is for --method oracle; the gradient scores all heads at once")
    with _measured(spec, "head_oracle" if method == "oracle" else "heads") as (measured, asked):
        terminal.print_importance(measured, asked, "head", method)


@app.command
def ffns(spec: Spec) -> None:
    """Importance of every FFN: by oracle, or by gradient (--ffn-order gradient)."""
    from headcount import terminal

    with _measured(spec, "ffns") as (measured, asked):
        terminal.print_importance(measured, asked, "ffn")


@app.command
def curve(spec: Spec) -> None:
    """Accuracy as the least important heads, and the least important FFNs, are removed."""
    from headcount import terminal

    with _measured(spec, "curve") as (measured, asked):
        terminal.print_curves(measured, asked)


@app.command
def induction(spec: Annotated[InductionSpec, Parameter(name="*")]) -> None:
    """Prefix matching and copying of every head, on random tokens: which are induction heads?

    The same model with random weights is measured too, which shows what scores are reached where nothing was learnt.
    Without --out nothing is kept. --seeds and --lengths are short for --induction-seeds and --induction-lengths.
    """
    from headcount import terminal

    chosen = StudySpec(**dataclasses.asdict(spec), tasks=(), measure=("induction",))
    with _measured(chosen, "induction") as (opened, _):
        terminal.print_induction(opened)
        if spec.out is not None:
            _report(spec.out)


@app.command
def tasks(
    names: tuple[str, ...] = ("paper14", "paper14-unseen", "icl"), *, data: Path | None = None,
    yaml: Path | None = None,
) -> None:
    """List tasks with their documents per split, answer options, chance accuracy and metric.

    Args:
        names: Tasks, groups or files, as for a study; by default the paper's tasks and the embedded suite.
        data: Folder with TASK/{train,validation,test}.jsonl to read instead of the hub.
        yaml: Folder to write lm-eval's definition to of each task that lm-eval does not have, such as documents of your
            own: the same prompts with the same shots, for lm_eval --include_path.
    """
    from headcount import terminal

    with terminal.reporter() as reporter:
        reporter.stage("reading tasks")
        from headcount.tasks.catalog import expand
        from headcount.tasks.load import TaskDescription, describe

        expanded = expand(names)
        if yaml is not None:
            from headcount.tasks.lm_eval_yaml import write_tasks

            terminal.print_written_tasks(write_tasks(expanded, yaml, data), yaml)
            return
        rows: list[TaskDescription] = []
        for name in expanded:
            reporter.stage("reading tasks", len(rows), len(expanded))
            rows.append(describe(name, data))
    if all(row.absent for row in rows):
        raise UnavailableError(rows[0].absent)
    terminal.print_tasks(rows)


@app.command
def report(folder: Path, *, asked: int | None = None, skip_pictures: bool = False) -> None:
    """Write the report of a study folder anew.

    Args:
        folder: The study folder, as --out named it.
        asked: A folder may have been asked for different things, one after another: the number of one of them, 1 for
            the first. By default the report is of the last, and says which others there are.
        skip_pictures: Write the page and its tables alone, without the figures as PNG and PDF.
    """
    _report(folder, asked, pictures=not skip_pictures)


@app.command
def mask(
    folder: Path, *, choice: Annotated[ChoiceSpec | None, Parameter(name="*")] = None, asked: int | None = None,
) -> None:
    """Print which heads and FFNs go at one measured point of a study, as JSON: `headcount mask DIR --free > mask.json`.

    One of --free, --within, --parameters, or --heads and --ffns says which point. What goes, and what the study
    measured there, is said on stderr.

    Args:
        folder: The study folder, as --out named it.
        asked: Where the folder was asked for different things: the number of one of them, 1 for the first; by default
            the last.
    """
    from headcount.analysis.study import open_study

    chosen = open_study(folder, asked).choose(choice or ChoiceSpec())
    sys.stderr.write(f"{chosen.describe()}\n")
    sys.stdout.write(chosen.to_json())


@app.command
def remove(
    spec: Annotated[RemovalSpec, Parameter(name="*")], *,
    choice: Annotated[ChoiceSpec | None, Parameter(name="*")] = None,
) -> None:
    """Remove heads and FFNs from a model for good, and write what is left: `headcount remove MODEL --study DIR --free`.

    Which ones a study says, at one of its measured points (--free, --within, --parameters, or --heads and --ffns), or a
    file that `headcount mask` wrote, edited or not (--mask). The smaller model is proved equal to the masked one, block
    by block and after it was loaded again.
    """
    from headcount import terminal
    from headcount.analysis.study import open_study
    from headcount.model.offloaded import offloaded

    study = None if spec.study is None else open_study(spec.study, spec.asked)
    if spec.mask is not None:
        file, num_fewshot = _mask_of(spec.mask, choice), None
        said = file.source.get("sentence")
    elif study is not None:
        chosen = study.choose(choice or ChoiceSpec())
        file, num_fewshot = chosen.file, chosen.num_fewshot
        said = chosen.describe()
    removed = _removed(spec, file, study)
    if isinstance(said, str):
        terminal.print_sentence(said)
    timed_too = spec.speed and not offloaded(removed.loaded.model)
    if spec.speed and not timed_too:
        terminal.print_note("the weights stay on the disk, so nothing is timed")
    terminal.print_savings(removed, spec.format, told=spec.mask is None)
    if spec.dry_run or spec.out is None:
        return
    compared = timed = None
    if not spec.skip_confirm:
        compared = _compared(spec, removed, study, num_fewshot)
    with terminal.reporter() as reporter:
        if timed_too:
            from headcount.removal.speed import measured_speed, sides_of

            reporter.stage("timing full, masked and removed")
            timed = measured_speed(sides_of(removed)).to_dict()
        reporter.stage(f"writing {spec.out}")
        removed.save(spec.out, format=spec.format, chosen=file.source or None, confirmation=compared, speed=timed)
    terminal.print_removed(spec.out)
    if spec.study is not None:
        from headcount.removal.certificate import kept_with_study

        try:
            kept_with_study(spec.out, spec.study)
        except OSError as error:
            terminal.print_note(f"no copy of the certificate is kept in {spec.study} ({error.strerror}), so that its "
                                "page does not show this model")


@app.command
def check(
    folder: Path, *, backend: Literal["headcount", "transformers"] | None = None, device: str | None = None,
) -> None:
    """Prove a study folder's entries by their checksums, or a removed model's files and logits on this machine.

    Of a study: which entries are whole, which damaged, and what is measured again. The exit code is 1 where anything is
    damaged, or study.json or all entries are missing. Entries of earlier versions have no checksum and are unverified.

    Of a removed model: the largest difference of its logits to those that came along. The exit code is 1 beyond the
    tolerance, and where a file is not the one that was written.

    Args:
        folder: The study folder, as --out named it, or the removed model's.
        backend: Load the removed model by headcount, as without this option, or by transformers, which runs the code
            in its folder.
        device: Where the removed model runs; by default the first GPU, else the CPU.
    """
    from headcount import terminal
    from headcount.study.check import check as checked

    if (folder / "headcount.json").is_file():
        from headcount.removal.certificate import check as proved

        with terminal.reporter() as reporter:
            reporter.stage(f"loading {folder}")
            proof = proved(folder, backend or "headcount", device)
        terminal.print_proved(proof)
        if not proof.holds:
            raise SystemExit(1)
        return
    if backend or device:
        raise OptionError(f"{folder} is no removed model (it has no headcount.json), which alone is loaded: leave out "
                          "`backend` and `device`", fields=("backend", "device"))
    found = checked(folder)
    terminal.print_checked(found)
    if not found.holds:
        raise SystemExit(1)


@app.command
def anatomy(spec: Annotated[ModelSpec, Parameter(name="*")], *, verify: bool = False) -> None:
    """A model's heads, KV groups, FFNs and their parameters.

    Args:
        verify: Prove on this model that gates act where heads and FFNs are, and say how prompts are packed.
    """
    from headcount import terminal
    from headcount.model.load import load

    with terminal.reporter() as reporter:
        reporter.stage(f"loading {spec.model}")
        options = dataclasses.asdict(spec)
        loaded = load(options.pop("model"), **options, progress=reporter.stage)
    if not terminal.print_anatomy(loaded, verify=verify):
        raise SystemExit(1)


@app.command
def demo(*, out: Path = Path("headcount-demo"), dry_run: bool = False) -> None:
    """A whole study of SmolLM2-135M on embedded word tasks: 5 relations, 0 and 5 shots, about ten minutes on a CPU.

    Args:
        out: The study folder.
        dry_run: Print the jobs and what they cost, and measure nothing.
    """
    study(StudySpec(model="smollm2", tasks=DEMO_TASKS, shots=(0, 5), limit=200, importance_limit=50, shared_shots=True,
                    fractions=(0.1, 0.2, 0.3, 0.5), random_orders=3, out=out), dry_run=dry_run)


def _plan(spec: StudySpec, on: Sequence[str] = ("cpu",), **assumed: Any) -> None:
    """Print what a study will cost."""
    from headcount import terminal

    with terminal.reporter() as reporter:
        reporter.stage("planning")
        from headcount.study.forecast import forecast
        from headcount.terminal_plan import print_forecast

        known = forecast(spec, on=on, **assumed, reporter=reporter)
    terminal.print_damaged(known.damaged)
    if known.other_orders:
        terminal.print_note(known.other_orders)
    print_forecast(known)


def _removed(spec: RemovalSpec, file: MaskFile, study: Study | None) -> Removed:
    """The model with what goes; what cannot be written is refused."""
    from headcount import terminal
    from headcount.model.load import load
    from headcount.removal.remove import fits_twice
    from headcount.removal.remove import remove as removed_from

    options = spec.model_options
    with terminal.reporter() as reporter:
        reporter.stage(f"loading {spec.model}")
        placed = spec.device is not None or spec.device_map is not None or spec.stream
        if spec.format == "transformers" and not placed and not fits_twice(
                spec.model, spec.revision, spec.dtype, trust_remote_code=spec.trust_remote_code):
            options["stream"] = True
        loaded = load(options.pop("model"), **options, progress=reporter.stage)
        if study is not None:
            _check_study(study, loaded)
        reporter.stage("looking at what goes")
        # A study's model was compared with the study; a file's is compared with the file.
        removed = removed_from(loaded, file if spec.mask is not None else file.mask)
        removed.check(spec.format, spec.out)
    return removed


def _compared(
    spec: RemovalSpec, removed: Removed, study: Study | None, num_fewshot: int | None
) -> dict[str, Any] | None:
    """Full and removed model compared, which is told; None where the weights stay on the disk."""
    from headcount import terminal
    from headcount.model.offloaded import offloaded
    from headcount.removal.comparison import compare
    from headcount.removal.confirm import facts_of

    if offloaded(removed.loaded.model):
        terminal.print_note("the weights stay on the disk, so full and removed model are not compared on other "
                            "documents, a text and prompts")
        return None
    facts = None if study is None else facts_of(study.spec, num_fewshot, study.description.get("asked", ()))
    with terminal.reporter() as reporter:
        reporter.stage("comparing full and removed")
        compared = compare(removed.loaded, removed.mask, facts, spec.confirm, text=spec.text, prompts=spec.prompts)
    terminal.print_comparison(compared)
    return compared.to_dict()


def _mask_of(path: Path, choice: ChoiceSpec | None) -> MaskFile:
    """The mask of a file, which is no study's point."""
    from headcount.mask_file import read_mask

    if choice is not None and (choice.ways or choice.uniform or choice.order or choice.shots is not None):
        raise OptionError("a `mask` says itself what goes, and the other options choose a point of a `study`: leave "
                          "out one or the other", fields=("mask", "study"))
    return read_mask(path)


def _check_study(study: Study, loaded: LoadedModel) -> None:
    """Refuse a study of another model."""
    from headcount.study.folder import check_model
    from headcount.study.ledger import Ledger

    try:
        check_model(loaded, study.description, Ledger(study.folder))
    except StudyError as error:
        known = study.model
        raise StudyError(f"{study.folder} is no study of {loaded.name} as it was loaded: it is of {known.get('name')} "
                         f"({known.get('dtype')}, {known.get('attn_implementation')}), or of other weights, code or "
                         "tokenizer; name its model, with the options that the study was given") from error


class _Stopped(KeyboardInterrupt):
    """Stopped while something is kept."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder


@contextlib.contextmanager
def _keeping(folder: Path | None) -> Iterator[None]:
    """Say where results are kept if the block is stopped; None: nowhere."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        if folder is None:
            raise
        raise _Stopped(folder) from stopped


@contextlib.contextmanager
def _measured(spec: StudySpec, part: Part) -> Iterator[tuple[Study, Asked]]:
    """Do one part of a study, in its folder, or in one that is thrown away where none is named; and open that."""
    from headcount import terminal

    with tempfile.TemporaryDirectory() as temporary:
        chosen = dataclasses.replace(spec, out=spec.out or Path(temporary) / "study")
        with terminal.reporter() as reporter, _keeping(spec.out):
            from headcount.analysis.study import open_study
            from headcount.study.prepare import prepare
            from headcount.study.runner import run

            plan = prepare(chosen, parts=(part,), reporter=reporter)
            terminal.print_damaged(plan.damaged)
            opened = open_study(run(plan, reporter=reporter, command=_command()))
        yield opened, terminal.Asked(list(plan.tasks), chosen.shots)


def _report(folder: Path, asked: int | None = None, *, pictures: bool = True) -> None:
    from headcount import terminal
    from headcount.analysis.study import open_study
    from headcount.report.page import write_page, write_pictures

    study = open_study(folder, asked)  # once: what it works out serves the report and the summary
    with terminal.reporter() as reporter:
        reporter.stage("writing the report")
        path, figures = write_page(study)
    # The page is there, and stays there if drawing its pictures is stopped.
    terminal.print_summary(study, path)
    if pictures:
        with terminal.reporter() as reporter:
            write_pictures(study, figures, lambda done, total: reporter.stage("drawing the figures", done, total))


def _short(tokens: Sequence[str]) -> dict[str, str]:
    """The short names of the verb that a command line names, and the options that they stand for."""
    verb = next((token for token in tokens if token in {*app}), "")
    return _SHORT.get(verb, {})


def _command() -> str:
    return shlex.join(["headcount", *sys.argv[1:]])


@app.meta.default
def _with_config(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Annotated[Path | None, Parameter(help="TOML file with options by name; the command line wins.")] = None,
    preset: Annotated[str | None, Parameter(help="A named set of options: `opt66b-study` is the paper's whole "
                                            "analysis; --config and the command line win.")] = None,
) -> None:
    app.config = ()
    short = _short(tokens)
    tokens = tuple(short.get(name, name) + sign + value for name, sign, value in (t.partition("=") for t in tokens))
    if config is not None:
        try:
            options = tomllib.loads(config.read_text(encoding="utf-8"))
        except OSError as error:
            raise OptionError(f"--config {config} cannot be read ({error.strerror})") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise OptionError(f"--config {config} is not TOML: {error}") from error
        options = {short.get(f"--{name}", f"--{name}")[2:]: value for name, value in options.items()}
        for name, value in options.items():
            _check_whole([*tokens[:1], f"--{name}", *map(str, value if isinstance(value, list) else [value])])
        # Under the verb's name: read as the program's own, an option that is called as a verb is (tasks) would be lost.
        app.config = (cyclopts.config.Dict({tokens[0]: options} if tokens else {}, source=str(config)),)
    if preset is not None:
        if preset not in PRESETS:
            raise OptionError(f"--preset is one of {', '.join(PRESETS)}, not {preset!r}")
        known = cyclopts.config.Dict({tokens[0]: PRESETS[preset]} if tokens else {}, source=f"--preset {preset}")
        app.config = (*app.config, known)
    _check_whole(tokens)
    app(tokens, exit_on_error=False, print_error=False)


def _check_whole(tokens: Sequence[str]) -> None:
    """Refuse fractions where whole numbers are meant, which cyclopts would round.

    Raises:
        OptionError: Which names the option.
    """
    verb = next((token for token in tokens if token in {*app}), None)
    if verb is None or not any(_FRACTION.search(token) for token in tokens):
        return
    whole = {name for argument in app[verb].assemble_argument_collection() for name in argument.names
             if {*re.findall(r"\b(?:int|float)\b", str(argument.hint))} == {"int"}}
    option = ""
    for token in tokens:
        if token.startswith("--"):
            option = token.partition("=")[0]
        if option in whole and (found := _FRACTION.search(token)):
            raise OptionError(f"{option} is a whole number, not {found[1]}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code: 0, 1 where a check or job failed, 2 bad input, 130 when stopped."""
    wait_asleep()
    # By default young objects are looked through every 700: a tenth of a short command's time, most of it at imports.
    gc.set_threshold(10_000)
    # Their progress bars and advice would drown ours.
    for name, value in {"TRANSFORMERS_VERBOSITY": "error", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
                        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "true"}.items():
        os.environ.setdefault(name, value)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        with _device_notes(), _ended_as_stopped():
            app.meta(sys.argv[1:] if arguments is None else arguments, exit_on_error=False, print_error=False)
    except (HeadcountError, cyclopts.CycloptsError) as error:
        called = {option: short for short, option in _short(arguments or sys.argv[1:]).items()}
        message = error.on_command_line(called) if isinstance(error, HeadcountError) else _parsing(error)
        return _fail(" ".join(message.split()), 1 if isinstance(error, JobsFailedError) else 2)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        full = (f"{'' if where else ', where --out or a cache is'}: make space there and run the same command again; "
                "what is measured is kept") if error.errno in _FULL else ""
        return _fail(f"{error.strerror or error}{where}{full}")
    except KeyboardInterrupt as stopped:
        kept = (f"what is measured is kept in {stopped.folder}, and the same command goes on from there"
                if isinstance(stopped, _Stopped) else "nothing is kept")
        sys.stderr.write(f"\nheadcount: stopped; {kept}\n")
        return 130
    return 0


@contextlib.contextmanager
def _ended_as_stopped() -> Iterator[None]:
    """Take a request to end (SIGTERM, which schedulers send when time is over) as Ctrl-C is taken."""
    if threading.current_thread() is not threading.main_thread():  # which alone is told of signals
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parsing(error: cyclopts.CycloptsError) -> str:
    """What is wrong with a command line, with what to do where no tasks are named."""
    if isinstance(error, cyclopts.MissingArgumentError) and error.argument is not None and (
            error.argument.name == "--tasks" and error.keyword is None):
        return ("--tasks is missing: name tasks such as piqa copa, paper14 (the paper's 14) or icl (word tasks that "
                "come along); `headcount tasks` lists them")
    return str(error)


@contextlib.contextmanager
def _device_notes() -> Iterator[None]:
    """Print what is warned of a device as other notes are."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", DeviceWarning)
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if not issubclass(category, DeviceWarning):
                others(message, category, *where, **more)
                return
            from headcount import terminal

            terminal.print_note(str(message))

        warnings.showwarning = show
        yield


def _fail(message: str, code: int = 2) -> int:
    sys.stderr.write(f"headcount: {message}\n")
    return code


