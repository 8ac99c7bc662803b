"""Documents that share a passage are found, and drawn together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from headcount.measure.resampling import halves, resampled
from headcount.tasks.fewshot import FewShot
from headcount.tasks.load import get_tasks
from headcount.tasks.passages import passages

STORY = "Once upon a time a miller had three sons, a mill, a donkey and a cat. "


def test_questions_about_one_text_belong_together() -> None:
    texts = [f"{STORY}Question: {q}?" for q in ("Who had a cat", "How many sons", "What was there")]
    other = "The moon is a rock that goes around the earth. Question: what is it made of?"
    assert passages([texts[0], other, texts[1], texts[2]]).tolist() == [0, 1, 0, 0]


def test_what_all_texts_begin_with_is_the_tasks_template() -> None:
    template = "The following are questions on history that have been answered by experts in the field.\n\n"
    assert passages([template + word for word in ("Rome", "Athens", "Sparta")]).tolist() == [0, 1, 2]


def test_short_beginnings_are_shared_by_chance() -> None:
    assert passages(["happy ->", "happily ->", "happiness ->"]).tolist() == [0, 1, 2]
    assert passages(["the same", "the same"]).tolist() == [0, 1], "nothing is known of texts that are all equal"


def test_real_tasks(shared: Path) -> None:
    expected = {"multirc": (5, 30), "winogrande": (60, 95), "piqa": (99, 100), "copa": (99, 100)}
    for name, task in get_tasks(list(expected), data=shared).items():
        prompts = task.prompts("evaluation", FewShot(limit=100))
        least, most = expected[name]
        assert least <= len(set(task.passages("evaluation", prompts).tolist())) <= most, name
        # Shots before the documents change nothing.
        with_shots = task.prompts("evaluation", FewShot(2, 20, shared=True))
        assert task.passages("evaluation", with_shots).tolist() == task.passages("evaluation", prompts[:20]).tolist()


def test_draws_depend_on_the_document_and_not_on_its_place() -> None:
    rng = np.random.default_rng(0)
    values, ids = rng.normal(size=(30, 4)), np.arange(30)
    alone = np.arange(30)
    kept = np.delete(ids, [3, 7])  # as if two were shots
    # Of the unit vectors the means are the documents' weights.
    whole = resampled(np.eye(30), alone, ids, name="task", resamples=50)
    part = resampled(np.eye(30)[kept], np.arange(28), kept, name="task", resamples=50)
    for row, without in zip(whole, part, strict=True):
        np.testing.assert_allclose(without[kept] / without[kept].sum(), row[kept] / row[kept].sum())
    assert not np.allclose(resampled(values, alone, ids, name="other"), resampled(values, alone, ids, name="task"))


def test_documents_of_a_passage_are_drawn_together() -> None:
    owners = np.repeat(np.arange(10), 5)
    weights = resampled(np.eye(50), owners, np.arange(50), name="task", resamples=100)
    by_passage = weights.reshape(100, 10, 5)
    assert (by_passage == by_passage[..., :1]).all()
    one, two = halves(np.eye(50), owners, np.arange(50), name="task")
    assert not ((one > 0) & (two > 0)).any()
    assert ((one > 0).reshape(10, 5) == (one > 0).reshape(10, 5)[:, :1]).all()


def test_the_spread_of_resampled_means_is_the_standard_error() -> None:
    values = np.random.default_rng(1).normal(size=(200, 3))
    found = resampled(values, np.arange(200), np.arange(200), name="task", resamples=2000)
    np.testing.assert_allclose(found.std(0), values.std(0) / np.sqrt(200), rtol=0.1)
    np.testing.assert_allclose(found.mean(0), values.mean(0), atol=0.01)


@pytest.mark.parametrize("n", [1, 2])
def test_few_documents_are_no_error(n: int) -> None:
    values, owners = np.ones((n, 2)), np.arange(n)
    assert np.isfinite(resampled(values, owners, owners, name="task")).all()
    assert halves(values, owners, owners, name="task").shape == (2, 2)
