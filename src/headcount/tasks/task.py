"""One task: its documents, prompts, gold answers and metrics, which are lm-eval's own.

What is added here: all documents can share their shots; prompts can be built for training documents too, and a document
is never among its own shots; and the variants of the paper's code (protocol "paper"): its order of documents and its
draws of shots; only WSC's positive training documents; and a question of MultiRC counts as right when all its answers
are judged right.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Int
from jinja2.exceptions import TemplateError

from headcount.errors import DataError, OptionError, TaskError
from headcount.tasks.chat import rendered
from headcount.tasks.fewshot import Document, FewShot, Shots, papers_draws, questions_together
from headcount.tasks.fingerprint import fingerprint as fingerprint_of
from headcount.tasks.passages import passages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAME = "importance is measured on the documents that are evaluated, so that pruned models come out too well"
Split = Literal["evaluation", "examples"]
Protocol = Literal["sound", "paper"]
SPLITS: tuple[Split, ...] = ("evaluation", "examples")
_FEWER = "ask for fewer shots with `num_fewshot`"
_SHOTS = {"num_fewshot": "--shots"}
_METRICS = ("acc", "em", "exact_match")
_NUMBERS = (int, float, np.number, np.bool_)
# What a definition raises on documents that it was not written for.
MISFITS = (KeyError, TypeError, ValueError, IndexError, AttributeError, AssertionError, TemplateError)
# The paper's variants: which training documents there are, and which documents are one question.
_TRAINING: dict[str, Callable[[Document], bool]] = {"wsc": lambda doc: doc["label"] == 1}
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
        file: The user's file that all documents come from, where it is a single one.
    """

    def __init__(
        self, name: str, inner: Any, notes: Sequence[str] = (), examples_split: str = "train",
        protocol: Protocol = "sound", file: Path | None = None,
    ) -> None:
        self.name = name
        self.inner = inner
        self.notes = tuple(notes)
        self.examples_split = examples_split
        self.protocol: Protocol = protocol
        self.file = file
        kind = inner.OUTPUT_TYPE
        if kind not in ("multiple_choice", "loglikelihood"):
            raise TaskError(f"task {name!r} is a {kind} task; headcount scores multiple_choice and loglikelihood tasks")
        metrics = list(inner.aggregation())
        self.metric = next((m for m in _METRICS if m in metrics), metrics[0])
        paper = protocol == "paper"
        self.question = _QUESTIONS.get(name) if paper else None
        self._is_training = _TRAINING.get(name) if paper else None
        self._texts: dict[tuple[Split, int], str] = {}
        if self._is_training is not None:
            inner.sampler.replace_df([doc for doc in inner.sampler.df if self._is_training(doc)])

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

    def documents(self, split: Split) -> Sequence[Document]:
        """The evaluated documents (lm-eval's choice of split), or the examples that importance is measured on.

        Raises:
            TaskError: If the task has no documents for this.
        """
        if split == "evaluation":
            return list(self.inner.eval_docs)
        docs = {"train": self.inner.training_docs, "validation": self.inner.validation_docs,
                "test": self.inner.test_docs}[self.examples_split]()
        if docs is None:
            has = [s for s, there in (("train", self.inner.has_training_docs()),
                                      ("validation", self.inner.has_validation_docs()),
                                      ("test", self.inner.has_test_docs())) if there]
            choices = [f"examples_split={split!r}" for split in has]
            raise TaskError(f"task {self.name!r} has no {self.examples_split} split to measure importance on; "
                            f"{self._remedy(choices)}", fields=choices)
        return [doc for doc in docs if self._is_training is None or self._is_training(doc)]

    def _remedy(self, choices: Sequence[str]) -> str:
        """What can be done where the split of examples is missing, and there are these."""
        split = (f"choose {' or '.join(f'`{choice}`' for choice in choices)}"
                 f"{f' (then {SAME})' if len(choices) == 1 else ''}")
        if self.file is None:
            return split
        return ("put training documents apart, in a folder with train.jsonl and validation.jsonl, and name that folder "
                f"instead of {self.file.name}; or {split}")

    def size(self, split: Split, few_shot: FewShot = FewShot()) -> int:
        """How many documents a split offers when those that serve as shared shots are left out; whatever the limit."""
        documents = self.documents(split)
        shots = self._shared_shots(few_shot)
        left = sum(doc not in shots for doc in documents)
        if left < 1:
            raise OptionError(f"all {len(documents)} documents of task {self.name!r} are shots; {_FEWER}",
                              fields=_SHOTS)
        return left

    def prompts(
        self, split: Split, few_shot: FewShot = FewShot(), *, chat: PreTrainedTokenizerBase | None = None
    ) -> list[Prompt]:
        """Prompts of the first documents of a split.

        Shots come from lm-eval's own few-shot split. For evaluated documents they are drawn exactly as lm-eval draws
        them with this seed; examples never are among their own shots; documents that serve as shared shots are left
        out. Under protocol "paper" evaluated documents are shuffled, and shots are drawn as `papers_draws` says.

        Args:
            split: Which documents.
            few_shot: How many documents, and which shots stand before each.
            chat: A tokenizer whose chat template is put around the prompts, each shot a turn, as lm-eval does.

        Raises:
            OptionError: If there are too few documents to draw the shots from.
        """
        num_fewshot, limit = few_shot.num_fewshot, few_shot.limit
        documents = self.documents(split)
        paper = self.protocol == "paper"
        own_pool = num_fewshot > 0 and not paper and self._drawn_from(documents)
        excludes = not self.inner.has_training_docs() if paper else own_pool or self._lm_eval_excludes
        self._check_pool(num_fewshot, excluding=not few_shot.shared and excludes)
        shots = self._shared_shots(few_shot)
        template = functools.partial(rendered, chat) if chat is not None else None
        prompts: list[Prompt] = []
        own = self._papers_draws(split, documents, few_shot) if paper else (
            (doc_id, ()) for doc_id in range(len(documents)))
        for doc_id, drawn in own:
            if limit is not None and len(prompts) >= limit:
                break
            if (doc := documents[doc_id]) not in shots:
                with self._sampling(drawn or shots, doc if own_pool else None, doc_id):
                    prompts.append(self._prompt(doc_id, doc, num_fewshot, template))
        return prompts

    def passages(self, split: Split, prompts: Sequence[Prompt]) -> Int[np.ndarray, " doc"]:
        """A number for every document, equal for those that share a passage; whatever the shots before them."""
        for prompt in prompts:
            if (split, prompt.doc_id) not in self._texts:
                plain = self._prompt(prompt.doc_id, prompt.doc, 0, None)
                self._texts[split, prompt.doc_id] = "".join(plain.pairs[plain.gold])
        return passages([self._texts[split, prompt.doc_id] for prompt in prompts])

    def metrics(self, prompt: Prompt, results: Sequence[tuple[float, bool]]) -> dict[str, float]:
        """lm-eval's own metrics of one document that are plain numbers.

        Args:
            prompt: The document.
            results: Log-likelihood in nats, and whether greedy decoding gives it, of every pair.
        """
        scores = self.inner.process_results(prompt.doc, list(results))
        return {name: float(value) for name, value in scores.items() if isinstance(value, _NUMBERS)}

    def _prompt(
        self, doc_id: int, doc: Document, num_fewshot: int, template: Callable[..., str] | None
    ) -> Prompt:
        chat = {"apply_chat_template": template is not None, "chat_template": template}
        try:
            context = self.inner.fewshot_context(doc, num_fewshot, gen_prefix=self.inner.doc_to_prefix(doc),
                                                 fewshot_as_multiturn=template is not None, **chat)
            built = self.inner.construct_requests(doc=doc, ctx=context, metadata=(self.name, doc_id, 1), **chat)
            pairs = tuple(tuple(i.args[:2]) for i in (built if isinstance(built, list) else [built]))
            options = len(pairs) // (2 if "acc_mutual_info" in self.inner.aggregation() else 1)
            return Prompt(doc_id, doc, pairs, self._gold(doc, options, len(pairs)), options)
        except MISFITS as error:
            raise DataError(f"document {doc_id} of task {self.name!r} does not fit the task's definition "
                            f"({type(error).__name__}: {error}); fix that document") from error

    def _gold(self, doc: Document, options: int, pairs: int) -> int:
        """The option which scores when it alone wins, asked of the task's own metric."""
        for i in range(options):
            results = [(0.0, True) if j == i else (-1e4, False) for j in range(pairs)]
            score = self.inner.process_results(doc, results).get(self.metric)
            if not isinstance(score, _NUMBERS):
                raise TaskError(f"task {self.name!r} measures {', '.join(self.inner.aggregation())}; headcount needs a "
                                f"metric that gives each document a number, such as {' or '.join(_METRICS)}")
            if score == 1:
                return i
        raise ValueError("no option is right")

    def _papers_draws(
        self, split: Split, documents: Sequence[Document], few_shot: FewShot
    ) -> Iterable[tuple[int, Sequence[Document]]]:
        """Documents in the order, and with the shots, of the paper's code."""
        pool = self.inner.sampler.fewshot_docs() if few_shot.num_fewshot else []
        draws = papers_draws(documents, pool, few_shot, evaluated=split == "evaluation",
                             excluding=not self.inner.has_training_docs())
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

    def _check_pool(self, num_fewshot: int, *, excluding: bool) -> None:
        if num_fewshot == 0:
            return
        size = len(self._pool)
        if num_fewshot + excluding > size:
            raise OptionError(f"{num_fewshot} shots cannot be drawn from the {size} few-shot documents of task "
                              f"{self.name!r}; {_FEWER}", fields=_SHOTS)

    def _drawn_from(self, documents: Sequence[Document]) -> bool:
        """Whether the shots are drawn from these documents (the first one tells: splits do not overlap in part)."""
        return bool(documents) and documents[0] in self._pool

    @property
    def _lm_eval_excludes(self) -> bool:
        """Whether lm-eval draws one shot more, to leave out the document itself, wherever the document comes from."""
        return bool(self.inner.fewshot_cfg.split == self.inner.config.test_split)

    @property
    def _pool(self) -> Sequence[Document]:
        """The documents that shots are drawn from."""
        sampler = getattr(self.inner, "sampler", None)
        return sampler.df if sampler is not None else []

    @contextlib.contextmanager
    def _sampling(self, shots: Sequence[Document], excluded: Document | None, doc_id: int) -> Iterator[None]:
        original = getattr(self.inner, "sampler", None)
        if shots or excluded is not None:
            self.inner.sampler = Shots(shots, excluded, doc_id, original)
        try:
            yield
        finally:
            if original is not None:
                self.inner.sampler = original
