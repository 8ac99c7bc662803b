"""Jobs: the smallest units that are measured and saved, one frozen class for each kind.

A job says everything that its result depends on, and nothing else: `key()` is that as plain JSON, and its hash names
the entry (`headcount.study.ledger`). So equal work has equal names: the number of documents stands for `--limit`,
without shots their seed does not count, and what came later (a version, a chat template) is left out where it does not
apply, so that entries of earlier versions are found again.

Pydantic turns jobs into JSON and back: it takes frozen dataclasses of the standard library as they are, tells the kinds
of jobs and of mask sets apart, and refuses what is no job, in words.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Generic, Literal, NamedTuple, TypeAlias, TypeVar

import pandas as pd
from pydantic import ConfigDict, Discriminator, Field, Tag, TypeAdapter, ValidationError

from headcount.errors import StudyError
from headcount.study.ledger import job_id
from headcount.study.masksets import (
    STRICT,
    ByOneTask,
    BySeveral,
    CommonCurve,
    CommonUniformCurve,
    FullModel,
    Grid,
    GridOrder,
    MaskSet,
    OwnCurve,
    RandomCurve,
    SingleFFNs,
    SingleHeads,
    Transfer,
    UniformCurve,
)

Weights: TypeAlias = Literal["trained", "random"]


class Need(NamedTuple):
    """An entry that a job reads: its kind and its name."""

    kind: str
    name: str


def _kind_of_masks(value: Any) -> str:
    """Which mask set a description is, or an object."""
    if not isinstance(value, Mapping):
        return type(value).__name__
    order, component = value.get("order"), value.get("component")
    if order == "single":
        return "SingleHeads" if component == "head" else "SingleFFNs"
    return {"none": "FullModel", "gradient": "OwnCurve", "oracle": "OwnCurve", "random": "RandomCurve",
            "common": "CommonCurve", "transfer": "Transfer", "grid": "Grid", "uniform": "UniformCurve",
            "uniform common": "CommonUniformCurve"}.get(str(order), "")


Masks = Annotated[
    Annotated[FullModel, Tag("FullModel")] | Annotated[SingleFFNs, Tag("SingleFFNs")]
    | Annotated[SingleHeads, Tag("SingleHeads")] | Annotated[OwnCurve, Tag("OwnCurve")]
    | Annotated[RandomCurve, Tag("RandomCurve")] | Annotated[CommonCurve, Tag("CommonCurve")]
    | Annotated[Transfer, Tag("Transfer")] | Annotated[Grid, Tag("Grid")]
    | Annotated[UniformCurve, Tag("UniformCurve")] | Annotated[CommonUniformCurve, Tag("CommonUniformCurve")],
    Discriminator(_kind_of_masks)]


@dataclass(frozen=True, kw_only=True)
class _OfTask:
    """What all jobs of a task say.

    Attributes:
        protocol: "sound" or "paper".
        model: The model's identity.
        task: The task's name.
        task_fingerprint: Of its definition and documents.
        num_fewshot: Shots before each document.
        documents: How many are measured, the first ones.
        seed: Seed of the draws of shots; None without shots.
        shared_shots: Whether one draw serves all documents; None without shots.
        chat: True where prompts stand in the chat template; else None.
        paper_version: Of what protocol "paper" measures; None under "sound".
    """

    protocol: str
    model: str
    task: str
    task_fingerprint: str
    num_fewshot: int
    documents: int
    seed: int | None = None
    shared_shots: bool | None = None
    chat: bool | None = None
    paper_version: int | None = None

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    def key(self) -> dict[str, Any]:
        """What the entry answers for, as plain JSON."""
        return _as_json(self)

    @property
    def subject(self) -> str:
        """The task and the number of shots, for people."""
        return f"{self.task}, {self.num_fewshot}-shot"


@dataclass(frozen=True, kw_only=True)
class Evaluation(_OfTask):
    """A task's metric under a set of masks.

    Attributes:
        split: Evaluated documents, or the examples that importance is measured on.
        curve: The masks; the name that entries know them by.
    """

    split: Literal["evaluation", "examples"]
    curve: Masks
    kind: Literal["evaluation"] = "evaluation"

    @property
    def masks(self) -> MaskSet:
        """The set of masks."""
        return self.curve

    @property
    def title(self) -> str:
        """A few words for people."""
        what = f"full model, {self.split}" if isinstance(self.curve, FullModel) else self.curve.title
        return f"{self.subject}: {what}"

    @property
    def needs(self) -> tuple[Need, ...]:
        """Entries that it reads."""
        return tuple(Need("importance", name) for name in self.curve.needs)


@dataclass(frozen=True, kw_only=True)
class GradientImportance(_OfTask):
    """Gradient importance of all heads and FFNs.

    Attributes:
        through_norms: True where the model norms what its branches put out, and scores are taken through these norms;
            else None.
    """

    through_norms: bool | None = None
    method: Literal["gradient"] = "gradient"
    kind: Literal["importance"] = "importance"

    @property
    def title(self) -> str:
        """A few words for people."""
        return f"{self.subject}: gradient importance"

    @property
    def needs(self) -> tuple[Need, ...]:
        """Entries that it reads."""
        return ()


@dataclass(frozen=True, kw_only=True)
class OracleImportance(_OfTask):
    """What is lost without each FFN, from evaluations of the full model and of single FFNs off.

    Attributes:
        evaluations: Names of these, the full model's first; no part of what the entry answers for.
    """

    evaluations: Annotated[tuple[str, ...], Field(exclude=True)] = ()
    method: Literal["oracle"] = "oracle"
    kind: Literal["importance"] = "importance"

    @property
    def title(self) -> str:
        """A few words for people."""
        return f"{self.subject}: FFN oracle"

    @property
    def needs(self) -> tuple[Need, ...]:
        """Entries that it reads."""
        return tuple(Need("evaluation", name) for name in self.evaluations)


@dataclass(frozen=True, kw_only=True)
class HeadOracle(_OfTask):
    """What is lost without each head, or each of a sample.

    Attributes:
        sample: How many heads, drawn at random; None: all.
        evaluations: As in `OracleImportance`.
    """

    sample: int | None
    evaluations: Annotated[tuple[str, ...], Field(exclude=True)] = ()
    component: Literal["head"] = "head"
    method: Literal["oracle"] = "oracle"
    kind: Literal["importance"] = "importance"

    def key(self) -> dict[str, Any]:
        """As of all jobs; that there is no sample is said."""
        return {**_as_json(self), "sample": self.sample}

    @property
    def title(self) -> str:
        """A few words for people."""
        return f"{self.subject}: head oracle"

    @property
    def needs(self) -> tuple[Need, ...]:
        """Entries that it reads."""
        return tuple(Need("evaluation", name) for name in self.evaluations)


@dataclass(frozen=True, kw_only=True)
class InductionScores:
    """Induction scores of every head, of the model or of the same model with random weights.

    Attributes:
        protocol: "sound" or "paper".
        model: The model's identity.
        weights: Whose scores.
        seeds: How many texts of each length.
        seed: Seed of the random texts.
        documents: How many texts; entries of the first version do not say.
        version: Of what is measured; entries of the first version have none.
        lengths: Of the random sequences, where others than the default were asked for.
    """

    protocol: str
    model: str
    weights: Weights
    seeds: int | None
    seed: int
    documents: int | None = None
    version: int | None = None
    lengths: tuple[int, ...] | None = None
    kind: Literal["induction"] = "induction"

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    def key(self) -> dict[str, Any]:
        """What the entry answers for, as plain JSON."""
        return _as_json(self)

    @property
    def subject(self) -> str:
        """What it is of, for people."""
        return "induction scores"

    @property
    def title(self) -> str:
        """A few words for people."""
        return f"induction scores, {self.weights} weights"

    @property
    def needs(self) -> tuple[Need, ...]:
        """Entries that it reads."""
        return ()


ImportanceJob: TypeAlias = GradientImportance | OracleImportance | HeadOracle
Job: TypeAlias = Evaluation | ImportanceJob | InductionScores
J = TypeVar("J", bound=Job)


@dataclass(frozen=True, eq=False)
class Done(Generic[J]):
    """A job with what its entry holds.

    Attributes:
        job: What was asked.
        info: What else is known of the result: masks, counts, versions.
        table: The result's rows.
    """

    job: J
    info: Mapping[str, Any]
    table: pd.DataFrame


def _kind_of_job(value: Any) -> str:
    """Which job a description is, or an object."""
    if not isinstance(value, Mapping):
        return type(value).__name__
    if value.get("kind") == "importance":
        oracle = "HeadOracle" if value.get("component") == "head" else "OracleImportance"
        return {"gradient": "GradientImportance", "oracle": oracle}.get(str(value.get("method")), "")
    return {"evaluation": "Evaluation", "induction": "InductionScores"}.get(str(value.get("kind")), "")


@functools.cache
def _adapter() -> Any:
    """Pydantic's `TypeAdapter` of all jobs, made when it is first needed: it takes a tenth of a second."""
    return TypeAdapter(Annotated[
        Annotated[Evaluation, Tag("Evaluation")] | Annotated[GradientImportance, Tag("GradientImportance")]
        | Annotated[OracleImportance, Tag("OracleImportance")] | Annotated[HeadOracle, Tag("HeadOracle")]
        | Annotated[InductionScores, Tag("InductionScores")], Discriminator(_kind_of_job)])


def _as_json(job: Any) -> dict[str, Any]:
    plain: dict[str, Any] = _adapter().dump_python(job, mode="json", exclude_none=True)
    return plain


def job_from(key: Mapping[str, Any]) -> Job:
    """The job that a saved description is of.

    Raises:
        StudyError: If it is of none.
    """
    try:
        job: Job = _adapter().validate_python(dict(key))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "kind"
        raise StudyError(f"no job is described so ({where}: {first['msg']}): {str(dict(key))[:120]}") from error
    return job


def name_of(job: Job) -> str:
    """The name of a job's entry."""
    return job_id(job.key())


def scores_of_masks(masks: MaskSet) -> str:
    """By which score a set's masks are ordered: "example", "gold_loglikelihood", ...; of the grid both, heads first.

    Empty where no importance orders them. A set that names no score is of an oracle's accuracy, with gold
    log-likelihood between equal ones.
    """
    if isinstance(masks, Grid):
        return f"{_score(masks.heads)} {_score(masks.ffns)}"
    return _score(masks) if isinstance(masks, ByOneTask | BySeveral) else ""


def _score(order: ByOneTask | BySeveral | GridOrder) -> str:
    return order.score or "accuracy"
