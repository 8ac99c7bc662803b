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
        num_options: How many options the document has; 0 where the answer must be produced.
        extra_metrics: Further metrics of the task that are plain numbers, such as "acc_norm".
        passages: Equal numbers for documents that share a passage; None where it was not looked at.
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
    passages: Int[np.ndarray, " doc"] | None = None
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
        stderrs: The standard errors of these means over examples, those of a passage together.
        num_examples: Over how many training documents.
        truncated: How many of their prompts were longer than the model's window and lost their beginning.
        halves: Per kind of score, the means over two halves of the documents, none of which share a passage.
        resampled: Per kind of score, means over documents drawn with replacement, those of a passage together; the
            draws are the same for a task at any number of shots.
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
    halves: Mapping[Score, Float[np.ndarray, "half=2 component"]] = field(default_factory=dict)
    resampled: Mapping[Score, Float[np.ndarray, "resample component"]] = field(default_factory=dict)

    @property
    def positions(self) -> list[Head]:
        """(layer, head) of every score; an FFN has head -1."""
        if self.component == "head":
            return all_heads(self.heads_per_layer)
        return [Head(layer, -1) for layer in range(len(self.heads_per_layer))]


@dataclass(frozen=True, eq=False)
class InductionScores:
    """What every head does on random sequences of tokens; heads by layer, then index.

    Attributes:
        protocol: "sound" or "paper".
        heads_per_layer: The model's number of heads per layer.
        lengths: The lengths of the random sequences, in unique tokens, before they are repeated.
        repeats: How often each stands in the text of prefix matching; in the text of copying there are so many times
            as many unique tokens.
        seed: Seed of the random texts.
        sequences: How many texts each of the scores below is the mean of, all lengths together.
        prefix_matching: Attention to the tokens that followed earlier occurrences of a position's token, 0..1.
        copying: The share of the raised logits of tokens in view that goes to the token attended to most, 0..1.
        previous_token: Attention to the position before, 0..1, in the text of prefix matching.
        ov_copying: Sum of the real parts of the OV circuit's eigenvalues over the sum of their sizes, -1..1; NaN where
            a head's values are no linear map.
        variances: Of prefix_matching, copying and previous_token, over texts; NaN for a single one.
        halves: The means of the same three over two halves of the texts, alike in lengths.
        reliability: Spearman's correlation of the two halves over heads, stepped up to all texts (Spearman-Brown).
        notes: Plain sentences on what was done otherwise, to be shown beside the scores.
    """

    protocol: Literal["sound", "paper"]
    heads_per_layer: tuple[int, ...]
    lengths: tuple[int, ...]
    repeats: int
    seed: int
    sequences: int
    prefix_matching: Float[np.ndarray, " head"]
    copying: Float[np.ndarray, " head"]
    previous_token: Float[np.ndarray, " head"]
    ov_copying: Float[np.ndarray, " head"]
    variances: Mapping[str, Float[np.ndarray, " head"]]
    halves: Mapping[str, Float[np.ndarray, "2 head"]]
    reliability: Mapping[str, float]
    notes: tuple[str, ...] = ()

    @property
    def positions(self) -> list[Head]:
        """(layer, head) of every score."""
        return all_heads(self.heads_per_layer)
