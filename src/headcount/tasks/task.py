"""One task: its documents, prompts, gold answers and metrics, which are lm-eval's own.

What is added here: all documents can share their shots; prompts can be built for training documents too, and a document
is never among its own shots; documents that do not fit are refused (`headcount.tasks.checks`); and the variants of the
paper's code (protocol "paper"): its order of documents and its draws of shots; only WSC's positive training documents;
and a question of MultiRC counts as right when all its answers are judged right.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Int

from headcount.errors import DataError, OptionError, TaskError, first_line
from headcount.tasks.chat import rendered
from headcount.tasks.checks import METRICS, NUMBERS, Checks, check_definition
from headcount.tasks.fewshot import Document, FewShot, papers_draws, questions_together
from headcount.tasks.fingerprint import fingerprint as fingerprint_of
from headcount.tasks.missing import MISFITS
from headcount.tasks.origin import Origin, origin_of, origin_of_shots
from headcount.tasks.passages import likeness, passages
from headcount.tasks.pool import FEWER, SHOTS, Own, Pool, Shots
from headcount.tasks.templates import compiled_once

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAME = "importance is measured on the documents that are evaluated, so that pruned models come out too well"
Split = Literal["evaluation", "examples"]
Protocol = Literal["sound", "paper"]
SPLITS: tuple[Split, ...] = ("evaluation", "examples")
# The paper's variants: which training documents there are, and which documents are one question. WSC's are those with
# label 1; one of neither label stays, to be refused where it is used.
_TRAINING: dict[str, Callable[[Document], bool]] = {"wsc": lambda doc: doc["label"] != 0}
_QUESTIONS: dict[str, Callable[[Document], Hashable]] = {
    "multirc": lambda doc: (doc["idx"]["paragraph"], doc["idx"]["question"])}


@dataclass(frozen=True, eq=False)
class Prompt:
    """One document with its prompts.

    Attributes:
        doc_id: The document's position in its split.
        doc: The document as lm-eval gives it.
        pairs: (context, continuation) of every option, and behind them of the same continuations without context,
            where a metric of the task compares the two.
        gold: Index of the right option, the first of several.
        num_options: How many options there are.
    """

    doc_id: int
    doc: Document
    pairs: tuple[tuple[str, str], ...]
    gold: int
    num_options: int


class Task:
    """A multiple-choice or log-likelihood task of lm-eval.

    Attributes:
        name: lm-eval's name.
        inner: lm-eval's own task, a ConfigurableTask.
        examples_split: The split that importance is measured on.
        metric: The metric that decides orders: "acc", or "em" where there is no acc.
        notes: What a reader of the results must know, such as a split that stands in for another.
        protocol: "sound", or "paper" for what the paper's code does otherwise.
        question: Under protocol "paper", the question that a document belongs to, where all answers must be right.
        place: The user's folder or file that all documents come from, where they are local.
    """

    def __init__(
        self, name: str, inner: Any, notes: Sequence[str] = (), examples_split: str = "train",
        protocol: Protocol = "sound", place: Path | None = None,
    ) -> None:
        self.name = name
        self.inner = inner
        self.notes = tuple(notes)
        self.examples_split = examples_split
        self.protocol: Protocol = protocol
        self.place = place
        kind = inner.OUTPUT_TYPE
        if kind not in ("multiple_choice", "loglikelihood"):
            raise TaskError(f"task {name!r} is a {kind} task; headcount scores multiple_choice and loglikelihood tasks")
        metrics = list(inner.aggregation())
        self.metric = next((m for m in METRICS if m in metrics), metrics[0])
        paper = protocol == "paper"
        self.question = _QUESTIONS.get(name) if paper else None
        self._is_training = _TRAINING.get(name) if paper else None
        self._texts: dict[tuple[Split, int], tuple[str, str]] = {}
        self._places: dict[Split, list[frozenset[int]]] = {}
        self._origins: dict[Split, Origin] = {}
        self._checks = Checks(name, inner, self.metric)
        self._checked_shots: set[int] = set()
        check_definition(name, inner)
        self._pool = self._pool_of_shots()

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the task's definition and of all its documents; equal in every process."""
        variant = ["paper"] if self.question or self._is_training else []
        config = self.inner.config.to_dict(keep_callable=True)
        return fingerprint_of(config, [self.examples_split, *variant], self.inner.dataset)

    @property
    def split_sizes(self) -> dict[str, int]:
        """How many documents each split has, by lm-eval's names; only those that the task uses."""
        config = self.inner.config
        used = dict.fromkeys(s for s in (config.training_split, config.validation_split, config.test_split) if s)
        return {split: len(self.inner.dataset[split]) for split in used if split in self.inner.dataset}

    def split_name(self, split: Split) -> str:
        """What lm-eval calls a split of this task."""
        return self._split_named(split)

    @property
    def is_produced(self) -> bool:
        """Whether the answer is no choice: greedy decoding must give the continuation."""
        return bool(self.inner.OUTPUT_TYPE == "loglikelihood")

    @property
    def num_options(self) -> Int[np.ndarray, " doc"]:
        """How many options each evaluated document has; 0 where a continuation must be produced."""
        if self.is_produced:
            return np.zeros(len(self.documents("evaluation")), np.int64)
        return np.array([len(self.inner.doc_to_choice(doc)) for doc in self.documents("evaluation")], np.int64)

    @property
    def draws_from_evaluated(self) -> bool:
        """Whether shots are drawn from the documents that are evaluated, each known by its number."""
        return any(self._in_pool("evaluation", self.documents("evaluation")))

    def documents(self, split: Split) -> Sequence[Document]:
        """The evaluated documents (lm-eval's choice of split), or the examples that importance is measured on.

        Raises:
            TaskError: If the task has no documents for this.
        """
        return [doc for _, doc in self._numbered(split)]

    def _numbered(self, split: Split) -> list[tuple[int, Document]]:
        """A split's documents, each with its number in lm-eval's split."""
        if split == "evaluation":
            return list(enumerate(self.inner.eval_docs))
        try:
            docs = {"train": self.inner.training_docs, "validation": self.inner.validation_docs,
                    "test": self.inner.test_docs}[self.examples_split]()
        except MISFITS as error:
            raise DataError(f"the {self.examples_split} documents of task {self.name!r} do not fit its definition "
                            f"({type(error).__name__}: {first_line(error)}); compare their fields with it") from error
        if docs is None:
            has = [s for s, there in (("train", self.inner.has_training_docs()),
                                      ("validation", self.inner.has_validation_docs()),
                                      ("test", self.inner.has_test_docs())) if there]
            choices = [f"examples_split={split!r}" for split in has]
            raise TaskError(f"task {self.name!r} has no {self.examples_split} split to measure importance on; "
                            f"{self._remedy(choices)}", fields=choices)
        return [(i, doc) for i, doc in enumerate(docs) if self._is_training is None or self._is_training(doc)]

    def _remedy(self, choices: Sequence[str]) -> str:
        """What can be done where the split of examples is missing, and there are these."""
        split = (f"choose {' or '.join(f'`{choice}`' for choice in choices)}"
                 f"{f' (then {SAME})' if len(choices) == 1 else ''}")
        if self.place is None or not self.place.is_file():
            return split
        return ("put training documents apart, in a folder with train.jsonl and validation.jsonl, and name that folder "
                f"instead of {self.place.name}; or {split}")

    def size(self, split: Split, few_shot: FewShot = FewShot()) -> int:
        """How many documents a split offers when those that serve as shared shots are left out; whatever the limit."""
        documents = self.documents(split)
        left = len(documents) - len(self._used(split, documents, self._shared_shots(few_shot)))
        if left < 1:
            raise OptionError(f"all {len(documents)} documents of task {self.name!r} are shots; {FEWER}", fields=SHOTS)
        return left

    def doc_ids(self, split: Split, few_shot: FewShot = FewShot()) -> list[int]:
        """The numbers of the documents that `prompts` prompts, in its order; no prompt is built."""
        documents = self.documents(split)
        used = self._used(split, documents, self._shared_shots(few_shot))
        order: Iterable[int] = range(len(documents))
        if self.protocol == "paper":
            order = (doc_id for doc_id, _ in self._papers_draws(split, documents, few_shot))
        return [doc_id for doc_id in order if doc_id not in used][: few_shot.limit]

    def prompts(
        self, split: Split, few_shot: FewShot = FewShot(), *, chat: PreTrainedTokenizerBase | None = None,
        apart: bool = False,
    ) -> list[Prompt]:
        """Prompts of the first documents of a split.

        Shots come from lm-eval's own few-shot split. For evaluated documents they are drawn exactly as lm-eval draws
        them with this seed; examples never are among their own shots; documents that serve as shared shots are left
        out. Under protocol "paper" evaluated documents are shuffled, and shots are drawn as `papers_draws` says.

        Args:
            split: Which documents.
            few_shot: How many documents, and which shots stand before each.
            chat: A tokenizer whose chat template is put around the prompts, each shot a turn, as lm-eval does.
            apart: Leave out documents that are among their own shots, as the paper's code draws training documents.

        Raises:
            OptionError: If there are too few documents to draw the shots from.
            DataError: If a document or a shot does not fit the definition: a field is missing that its prompt needs, or
                its answer is none of its options.
        """
        num_fewshot, limit = few_shot.num_fewshot, few_shot.limit
        documents = self._numbered(split)
        plain = [doc for _, doc in documents]
        places = self._in_pool(split, plain) if num_fewshot > 0 else []
        paper = self.protocol == "paper"
        excludes = not self.inner.has_training_docs() if paper else any(places) or self.lm_eval_excludes
        self._check_pool(num_fewshot, excluding=not few_shot.shared and excludes)
        shots = self._shared_shots(few_shot)
        used = self._used(split, plain, shots)
        template = functools.partial(rendered, chat) if chat is not None else None
        prompts: list[Prompt] = []
        own = self._papers_draws(split, plain, few_shot) if paper else ((i, shots) for i in range(len(plain)))
        with compiled_once():
            for doc_id, drawn in own:
                if limit is not None and len(prompts) >= limit:
                    break
                if doc_id in used:
                    continue
                if apart and places and any(self._pool.position(shot) in places[doc_id] for shot in drawn):
                    continue
                fixed = shots if few_shot.shared else drawn if paper else None
                with self._sampling(doc_id, () if fixed is not None or not places else places[doc_id], fixed):
                    prompts.append(self._prompt(split, doc_id, *documents[doc_id], num_fewshot, template))
        return prompts

    def passages(self, split: Split, prompts: Sequence[Prompt]) -> Int[np.ndarray, " doc"]:
        """A number for every document, equal for those that share a passage; whatever the shots before them."""
        return passages(self.texts(split, {prompt.doc_id: prompt.doc for prompt in prompts}))

    def texts(self, split: Split, documents: Mapping[int, Document]) -> list[str]:
        """Documents, by their numbers in the split, with their right answers, without shots."""
        return [text for text, _ in self._read(split, documents)]

    def likenesses(self, split: Split, documents: Mapping[int, Document]) -> list[str]:
        """Of documents, by their numbers in the split, what is equal where two are one question written twice."""
        return [like for _, like in self._read(split, documents)]

    def _read(self, split: Split, documents: Mapping[int, Document]) -> list[tuple[str, str]]:
        """The text and the likeness of documents, without shots."""
        with compiled_once():
            for doc_id, doc in documents.items():
                if (split, doc_id) not in self._texts:
                    plain = self._prompt(split, doc_id, doc_id, doc, 0, None)
                    context, answer = plain.pairs[plain.gold]
                    answers = [one for _, one in plain.pairs[: plain.num_options]]
                    self._texts[split, doc_id] = context + answer, likeness(context, answers)
        return [self._texts[split, doc_id] for doc_id in documents]

    def metrics(self, prompt: Prompt, results: Sequence[tuple[float, bool]]) -> dict[str, float]:
        """lm-eval's own metrics of one document that are plain numbers.

        Args:
            prompt: The document.
            results: Log-likelihood in nats, and whether greedy decoding gives it, of every pair.
        """
        scores = self.inner.process_results(prompt.doc, list(results))
        return {name: float(value) for name, value in scores.items() if isinstance(value, NUMBERS)}

    def _prompt(
        self, split: Split, doc_id: int, number: int, doc: Document, num_fewshot: int,
        template: Callable[..., str] | None,
    ) -> Prompt:
        chat = {"apply_chat_template": template is not None, "chat_template": template}
        origin = self._origin(split)
        self._checks.evaluated(origin, number, doc)
        with self._checks.fitting(origin, number, doc):
            context = self.inner.fewshot_context(doc, num_fewshot, gen_prefix=self.inner.doc_to_prefix(doc),
                                                 fewshot_as_multiturn=template is not None, **chat)
            built = self.inner.construct_requests(doc=doc, ctx=context, metadata=(self.name, doc_id, 1), **chat)
            pairs = tuple(tuple(i.args[:2]) for i in (built if isinstance(built, list) else [built]))
            options = len(pairs) // (2 if "acc_mutual_info" in self.inner.aggregation() else 1)
            return Prompt(doc_id, doc, pairs, self._checks.gold(doc, options, len(pairs)), options)

    def _papers_draws(
        self, split: Split, documents: Sequence[Document], few_shot: FewShot
    ) -> Iterable[tuple[int, Sequence[Document]]]:
        """Documents in the order, and with the shots, of the paper's code."""
        pool = self._pool.documents if few_shot.num_fewshot else []
        draws = papers_draws(documents, pool, few_shot, self._in_pool(split, documents),
                             evaluated=split == "evaluation", excluding=not self.inner.has_training_docs())
        question = self.question if split == "evaluation" else None
        return draws if question is None else questions_together(draws, lambda i: question(documents[i]))

    def _shared_shots(self, few_shot: FewShot) -> Sequence[Document]:
        """One draw of shots for all documents, empty where each has its own; starts the sampler from its seed."""
        self.inner.set_fewshot_seed(few_shot.seed)
        if few_shot.num_shared == 0:
            return []
        self._check_pool(few_shot.num_shared, excluding=False)
        shots: Sequence[Document] = self.inner.sampler.sample(few_shot.num_shared)
        return shots

    def _used(self, split: Split, documents: Sequence[Document], shots: Sequence[Document]) -> Collection[int]:
        """Which documents of a split serve as shared shots."""
        if not shots:
            return ()
        positions = {self._pool.position(shot) for shot in shots}
        return {i for i, places in enumerate(self._in_pool(split, documents)) if positions & places}

    def _check_pool(self, num_fewshot: int, *, excluding: bool) -> None:
        if num_fewshot == 0:
            return
        size = len(self._pool.documents)
        if num_fewshot + excluding > size:
            raise OptionError(f"{num_fewshot} shots cannot be drawn from the {size} few-shot documents of task "
                              f"{self.name!r}; {FEWER}", fields=SHOTS)

    @property
    def lm_eval_excludes(self) -> bool:
        """Whether lm-eval draws one shot more, to leave out the document itself, wherever the document comes from."""
        return bool(self.inner.fewshot_cfg.split == self.inner.config.test_split)

    def _pool_of_shots(self) -> Pool:
        """The documents that lm-eval's sampler draws from, each made one that equals itself alone."""
        sampler = getattr(self.inner, "sampler", None)
        if sampler is None:
            return Pool([], [])
        kept = [(i, Own(doc)) for i, doc in enumerate(sampler.df)
                if self._is_training is None or self._is_training(doc)]
        pool = Pool([doc for _, doc in kept], [i for i, _ in kept])
        sampler.replace_df(list(pool.documents))
        return pool

    def _in_pool(self, split: Split, documents: Sequence[Document]) -> list[frozenset[int]]:
        """Where each document of a split stands among those that shots are drawn from."""
        if split not in self._places:
            one, other = self._origin(split), self._origin_of_shots
            of_its_split = one.rows is not None and one.rows is other.rows
            self._places[split] = self._pool.places(documents, of_its_split=of_its_split)
        return self._places[split]

    @functools.cached_property
    def _origin_of_shots(self) -> Origin:
        return origin_of_shots(self.name, self.inner, self.place)

    def _origin(self, split: Split) -> Origin:
        """Where a split's documents come from; kept, with what it finds out about them."""
        if split not in self._origins:
            self._origins[split] = self._origin_of(split)
        return self._origins[split]

    def _origin_of(self, split: Split) -> Origin:
        return origin_of(self.name, self.inner, self._split_named(split), self.inner.config.process_docs, self.place)

    def _split_named(self, split: Split) -> str:
        config = self.inner.config
        if split == "evaluation":
            return str(config.test_split if self.inner.has_test_docs() else config.validation_split)
        return str({"train": config.training_split, "validation": config.validation_split,
                    "test": config.test_split}[self.examples_split])

    def _check_shot(self, shot: Document) -> None:
        position = self._pool.position(shot)
        if position is not None and position not in self._checked_shots:
            origin = self._origin_of_shots
            self._checks.shot(origin, self._pool.numbers[position], shot)
            self._checked_shots.add(position)

    @contextlib.contextmanager
    def _sampling(self, doc_id: int, own: Collection[int], fixed: Sequence[Document] | None) -> Iterator[None]:
        """Let lm-eval draw a document's shots from here."""
        original = getattr(self.inner, "sampler", None)
        if original is None:
            yield
            return
        self.inner.sampler = Shots(self._pool, original, self._check_shot, doc_id, own, fixed)
        try:
            yield
        finally:
            self.inner.sampler = original
