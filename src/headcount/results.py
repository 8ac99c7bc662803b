"""What was measured: typed tables of numpy arrays, without torch and without files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from headcount.masks import Component, Head, Mask, all_heads

Score = Literal["position", "example", "accuracy", "gold_loglikelihood"]


@dataclass(frozen=True, eq=False)
class Evaluations:
    """One task's result for every mask and document.

    Attributes:
        task: The task's name.
        num_fewshot: How many shots stood before each document.
        metric: The metric that `correct` holds ("acc", "em", ...).
        masks: The masks, in the order of the first axis.
        doc_ids: Position of each document in its split.
        correct: The task's metric per document, 0..1.
        gold_loglikelihood: Log-likelihood of the gold continuation, in nats.
        margin: Gold log-likelihood minus the best other option's, in nats; NaN where there is one option.
        prediction: Index of the option with the highest log-likelihood.
        gold: Index of the right option.
        num_options: How many options the document has.
        extra_metrics: Further metrics of the task that are plain numbers, such as "acc_norm".
        truncated: How many requests were longer than the model's window and lost their beginning.
        tokens: Token positions of all requests in all masks.
        layer_tokens: Positions that layers computed, layers added up; less than tokens x layers where masks share them.
    """

    task: str
    num_fewshot: int
    metric: str
    masks: tuple[Mask, ...]
    doc_ids: Int[np.ndarray, " doc"]
    correct: Float[np.ndarray, "mask doc"]
    gold_loglikelihood: Float[np.ndarray, "mask doc"]
    margin: Float[np.ndarray, "mask doc"]
    prediction: Int[np.ndarray, "mask doc"]
    gold: Int[np.ndarray, " doc"]
    num_options: Int[np.ndarray, " doc"]
    extra_metrics: Mapping[str, Float[np.ndarray, "mask doc"]] = field(default_factory=dict)
    truncated: int = 0
    tokens: int = 0
    layer_tokens: int = 0

    @property
    def accuracy(self) -> Float[np.ndarray, " mask"]:
        """Mean metric over documents, one number per mask."""
        return np.asarray(self.correct.mean(axis=1))


@dataclass(frozen=True, eq=False)
class Importance:
    """Importance of every head or FFN of a model for one task.

    Attributes:
        task: The task's name.
        num_fewshot: How many shots stood before each example.
        component: What was scored, heads or FFNs.
        method: "gradient" or "oracle".
        heads_per_layer: The model's number of heads per layer.
        scores: Per kind of score, the mean over examples; heads by layer, then index. The gradient method gives
            "position" and "example", the oracle "accuracy" and "gold_loglikelihood" (both as what is lost).
        stderrs: The standard errors of these means over examples.
        num_examples: Over how many training documents.
        truncated: How many of their prompts were longer than the model's window and lost their beginning.
    """

    task: str
    num_fewshot: int
    component: Component
    method: Literal["gradient", "oracle"]
    heads_per_layer: tuple[int, ...]
    scores: Mapping[Score, Float[np.ndarray, " component"]]
    stderrs: Mapping[Score, Float[np.ndarray, " component"]]
    num_examples: int
    truncated: int = 0

    @property
    def positions(self) -> list[Head]:
        """(layer, head) of every score; an FFN has head -1."""
        if self.component == "head":
            return all_heads(self.heads_per_layer)
        return [Head(layer, -1) for layer in range(len(self.heads_per_layer))]

    def by_layer(self, score: Score) -> list[Float[np.ndarray, " _"]]:
        """One array of head scores per layer."""
        return np.split(self.scores[score], np.cumsum(self.heads_per_layer)[:-1])
