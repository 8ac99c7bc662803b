"""What a model gets without reading the documents, and why a result says little."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from jaxtyping import Float, Int

from headcount.stats.resampling import Clusters

# Fewer documents than this say little by themselves.
FEW_DOCUMENTS = 50
# A model that gives one answer to so large a share of the documents does not look at them.
CONSTANT_SHARE = 0.95
# Why nothing is claimed of a task whose metric is no share.
NO_INTERVAL = "the metric goes beyond 0 and 1, so that it has no interval and nothing can be ruled out"


def chance(num_options: Int[np.ndarray, " doc"]) -> float:
    """Expected accuracy of guessing; 0 where there are no options, since then the answer must be produced."""
    return float(np.where(num_options > 0, 1 / np.maximum(num_options, 1), 0.0).mean())


def baseline(num_options: Int[np.ndarray, " doc"], constant: float | int = 0.0) -> float:
    """What a model gets without reading the documents: the better of guessing and the best constant answer.

    Args:
        num_options: How many options each document has.
        constant: What the best answer gets that can be given to all documents, 0 where there is none: an option is
            scored by its text, and its place is seen by nobody.
    """
    return max(chance(num_options), float(constant))


def degenerate(
    correct: Float[np.ndarray, " doc"], prediction: Int[np.ndarray, " doc"], num_options: Int[np.ndarray, " doc"], *,
    low: float, above: bool, clusters: Clusters | None = None, constant: float | int = 0.0,
    places: Collection[int] | None = None,
) -> list[str]:
    """Why one model's result on one task says little: plain reasons, none if it is in order.

    Args:
        correct: The task's metric.
        prediction: Index of the option that the model took.
        num_options: How many options each document has.
        low: Lower 95 % bound of the mean metric.
        above: Whether it is shown to be above the baseline (`headcount.stats.intervals.above_baseline`).
        clusters: The passage of each document: passages are then what must not be few.
        constant: As in `baseline`.
        places: The options that say the same in all documents, by index: one of them can be a constant answer, while
            others, taken always, are different answers. None where nobody looked: then all, if there is such an answer.
    """
    reasons: list[str] = []
    n = len(correct) if clusters is None else len(np.unique(clusters))
    what = "documents" if n == len(correct) else "passages"
    if n < FEW_DOCUMENTS:
        reasons.append(f"{n} {what}, fewer than {FEW_DOCUMENTS}: intervals are wide and rough")
    option, share = most_predicted(prediction, num_options)
    same = option in places if places is not None else constant > 0
    if same and share >= CONSTANT_SHARE:
        reasons.append(f"option {option + 1} is the answer to {100 * share:.0f} % of the documents, whatever they say")
    to_beat = baseline(num_options, constant)
    if np.isnan(low):
        reasons.append(NO_INTERVAL)
    elif not above:
        reasons.append(f"accuracy {correct.mean():.2f} is not shown to be above {to_beat:.2f}, which guessing"
                     f"{' or a constant answer' if constant > 0 else ''} gets (corrected for the number of tasks)")
    return reasons


def most_predicted(prediction: Int[np.ndarray, " doc"], num_options: Int[np.ndarray, " doc"]) -> tuple[int, float]:
    """The option index taken most often, and for which share of the documents that have a choice; (-1, 0) if none."""
    chosen = prediction[num_options > 1]
    if len(chosen) == 0:
        return -1, 0.0
    counts = np.bincount(chosen)
    return int(counts.argmax()), float(counts.max() / len(chosen))


def few_distinct(distinct: int, components: int) -> list[str]:
    """Whether an oracle tells components apart: the reason why not, if fewer than half as many values as components."""
    if 2 * distinct >= components:
        return []
    return [f"the oracle found {distinct} distinct values for {components} components, so that ties decide the order"]
