"""What one pass over a task's documents computes, without a model: by packing them, or from statistics that come along.

Where documents are at hand they are encoded and packed by the code that a run packs them with, into the same rows and
batches if the budget is the run's; without the model's tokenizer a stand-in cuts the texts (`stand_in`). Of the paper's
16 tasks the number of documents and the tokens of a sample come along (`data/tasks.json`, made by
`tools/task_statistics.py`): they serve where the documents are not to be had.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, cast, runtime_checkable

import numpy as np

from headcount.engine.encode import encode
from headcount.engine.pack import Batch, Budget, batches, pack
from headcount.errors import OptionError, UnavailableError
from headcount.tasks.fewshot import FewShot

if TYPE_CHECKING:
    from headcount.tasks.task import Task

# How much longer than the mean row the longest of a task is taken to be, where the documents are not at hand.
_LONGEST = 2
# The most shots that statistics come along of, and the shares of documents whose prompts are no longer than is said.
_COUNTED = 5
_PERCENTILES = (0.1, 0.5, 0.9, 0.99)
_STATISTICS = Path(__file__).parent / "data" / "tasks.json"
# How requests are laid out: to be scored, or an example a row for gradients.
Layout: TypeAlias = Literal["scored", "gradient"]
Split: TypeAlias = Literal["evaluation", "examples"]


@dataclass(frozen=True)
class Work:
    """What one pass over documents computes.

    Attributes:
        tokens: Positions, padding included.
        pairs: Positions times the length of their row, which attention computes.
        places: Positions whose logits are wanted.
        largest: Positions of the largest batch; 0 where it is not known.
        width: Of its rows.
        cut: Requests that are longer than the window, and lose their beginning; 0 where it is not known.
        longest: Positions of the longest row, about; 0 where it is not known.
    """

    tokens: float | int
    pairs: float | int
    places: float | int
    largest: int = 0
    width: int = 0
    cut: int = 0
    longest: int = 0

    @classmethod
    def of(cls, packed: Sequence[Batch], cut: int = 0) -> Work:
        """What batches compute, of whose requests so many were cut."""
        largest, width = max(((b.tokens, b.ids.shape[1]) for b in packed), default=(0, 0))
        return cls(sum(b.tokens for b in packed), sum(b.tokens * b.ids.shape[1] for b in packed),
                   sum(np.unique(np.stack([b.rows, b.positions]), axis=1).shape[1] for b in packed),
                   largest, width, cut, max((b.ids.shape[1] for b in packed), default=0))


@runtime_checkable
class Documents(Protocol):
    """A task's documents, as far as a plan needs them."""

    @property
    def fingerprint(self) -> str:
        """The task's; empty where it is not known."""

    def size(self, split: Split, num_fewshot: int) -> int:
        """How many documents a split has."""

    def work(
        self, split: Split, num_fewshot: int, documents: int, layout: Layout = "scored", shared: bool | None = None
    ) -> Work:
        """What one pass over the first so many documents computes; `shared`: one draw of shots for all."""


@dataclass(frozen=True)
class Reading:
    """How texts are read and laid out: what packing depends on besides the documents.

    Attributes:
        tokenizer: The model's, or the stand-in.
        max_length: The window in tokens.
        budget: How long rows and how large batches are.
        trees: Whether prompts share their beginnings.
        tree_tokens: The longest row of a tree, if there is a limit.
        chat: Whether prompts are put into the tokenizer's chat template.
        seed: Of the draws of shots.
        shared: Whether one draw of shots serves all documents.
    """

    tokenizer: Any
    max_length: int
    budget: Budget
    trees: bool
    tree_tokens: int | None
    chat: bool
    seed: int
    shared: bool


class AtHand:
    """Documents that are at hand.

    Args:
        task: The task.
        reading: How its texts are read and laid out.
    """

    def __init__(self, task: Task, reading: Reading) -> None:
        self._task = task
        self._reading = reading
        self._known: dict[tuple[Any, ...], Work] = {}

    @property
    def fingerprint(self) -> str:
        """As in `Documents`."""
        return self._task.fingerprint

    def size(self, split: Split, num_fewshot: int) -> int:
        """As in `Documents`."""
        return self._task.size(split, self._few_shot(num_fewshot, None, self._reading.shared))

    def work(
        self, split: Split, num_fewshot: int, documents: int, layout: Layout = "scored", shared: bool | None = None
    ) -> Work:
        """As in `Documents`."""
        shared = (self._reading.shared if shared is None else shared) and num_fewshot > 0
        key = (split, num_fewshot, documents, layout, shared)
        if key not in self._known:
            self._known[key] = self._packed(split, self._few_shot(num_fewshot, documents, shared), layout)
        return self._known[key]

    def _few_shot(self, num_fewshot: int, limit: int | None, shared: bool) -> FewShot:
        return FewShot(num_fewshot, limit, self._reading.seed, shared)

    def _packed(self, split: Split, few_shot: FewShot, layout: Layout) -> Work:
        reading, task = self._reading, self._task
        prompts = task.prompts(split, few_shot, chat=reading.tokenizer if reading.chat else None)
        scored = layout == "scored"
        pairs = [list(p.pairs) if scored else [p.pairs[p.gold]] for p in prompts]
        requests = encode(cast(Any, reading.tokenizer), [pair for own in pairs for pair in own], reading.max_length,
                          apart=task.protocol == "paper")
        following = iter(requests)
        documents = [[next(following) for _ in own] for own in pairs]
        rows = pack(documents, reading.budget, trees=scored and reading.trees, tree_tokens=reading.tree_tokens)
        return Work.of(batches(rows, reading.budget, gradients=not scored), sum(r.truncated for r in requests))


class Bundled:
    """Documents that are not at hand, by the statistics that come along.

    Args:
        name: The task's.
        limits: The model's window, and whether prompts share their beginnings, and shots.
        examples_split: The split that importance is measured on.

    Raises:
        UnavailableError: If nothing comes along of this task, or of this split.
    """

    fingerprint = ""

    def __init__(self, name: str, reading: Reading, examples_split: str = "train") -> None:
        known = statistics()["tasks"]
        if name not in known:
            raise UnavailableError(f"the documents of {name} are not here, and no counts of it come along: name a "
                                   "folder that holds them with `data`", fields=("data",))
        self._name, self._known, self._reading = name, known[name], reading
        self._examples_split = examples_split

    def size(self, split: Split, num_fewshot: int) -> int:
        """As in `Documents`."""
        of_split = self._known["evaluated"] if split == "evaluation" else self._examples_split
        if of_split not in self._known["documents"]:
            there = ", ".join(self._known["documents"])
            raise OptionError(f"task {self._name!r} has no {of_split} split to measure importance on: name one of "
                              f"{there} with `examples_split`", fields=("examples_split",))
        return int(self._known["documents"][of_split])

    def work(
        self, split: Split, num_fewshot: int, documents: int, layout: Layout = "scored", shared: bool | None = None
    ) -> Work:
        """As in `Documents`: so many times what a document of the sample takes."""
        shared = self._reading.shared if shared is None else shared
        kind = ("gradient" if layout == "gradient" else "single" if not self._reading.trees
                else "shared" if shared and num_fewshot else "tree")
        of_split = self._known["tokens"].get("evaluation" if split == "evaluation" else "examples",
                                             self._known["tokens"]["evaluation"])
        tokens, width, places = (_between(of_split, num_fewshot, kind, what) for what in range(3))
        pairs, window = tokens * width, self._reading.max_length
        cut = _cut(of_split, num_fewshot, window)
        requests, lengths = of_split["0"]["requests"] if kind != "gradient" else (1, 1)
        if num_fewshot > _COUNTED or window < statistics()["window"]:  # else what was counted was cut as well
            # What is cut at unlike places has no beginning in common.
            each = requests if kind == "single" else lengths
            whole, of_all = each * window, each * (1 if kind == "single" else each) * window**2
            tokens = (1 - cut) * min(tokens, whole) + cut * whole
            pairs = (1 - cut) * min(pairs, of_all) + cut * of_all
        # Of the sample's documents the mean is known.
        longest = min(window, round(_LONGEST * pairs / max(1, tokens)))
        return Work(round(documents * tokens), documents * pairs, documents * places,
                    cut=round(documents * cut * requests), longest=longest)


def _cut(by_shots: Mapping[str, Any], num_fewshot: int, window: int) -> float:
    """The share of documents whose longest request a window cuts, about: by percentiles, as much longer a shot."""
    (without, *at_none), (one, *at_one) = (by_shots[k]["prompt"] for k in ("0", "1"))
    longer = (num_fewshot - 1) * (one - without) if num_fewshot else 0
    ends = np.array(at_one if num_fewshot else at_none) + longer
    return float(1 - np.interp(window, [0, *ends, 1.1 * ends[-1]], [0, *_PERCENTILES, 1]))


def _between(by_shots: Mapping[str, Any], num_fewshot: int, kind: str, what: int) -> float:
    """A statistic at a number of shots: between 0, 1 and 5 on a straight line, and on beyond 5 (`_COUNTED`)."""
    # A task that was counted as an unseen one has no examples: its documents stand in for them.
    known = {int(k): float(values[kind if kind in values else "tree"][what]) for k, values in by_shots.items()}
    if num_fewshot in known:
        return known[num_fewshot]
    fewer, more = (1, _COUNTED) if num_fewshot > 1 else (0, 1)
    return known[fewer] + (known[more] - known[fewer]) * (num_fewshot - fewer) / (more - fewer)


@functools.cache
def statistics() -> dict[str, Any]:
    """Numbers of documents and tokens of the paper's tasks, and what they were counted with."""
    found: dict[str, Any] = json.loads(_STATISTICS.read_text(encoding="utf-8"))
    return found
