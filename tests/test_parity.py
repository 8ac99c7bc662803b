"""Log-likelihoods and answers are those of lm-eval's own HF backend, live on both sides, on every task of the paper."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import tiny
from headcount.measure.evaluate import evaluate
from headcount.model.load import LoadedModel, wrap
from headcount.tasks.catalog import PAPER14, UNSEEN
from headcount.tasks.fewshot import FewShot
from headcount.tasks.load import get_tasks
from headcount.tasks.task import Task
from parity import TOLERANCE, Comparison, compare


def agrees(found: Comparison) -> None:
    assert found.worst < TOLERANCE
    assert set(found.different) <= set(found.close)
    assert found.ours == pytest.approx(found.theirs, abs=len(found.close) / found.documents + 1e-9)


@pytest.fixture
def own(tmp_path: Path) -> Task:
    return get_tasks(["piqa"], data=tiny.write_task(tmp_path))["piqa"]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("k", [0, 2])
def test_every_family(own: Task, family: str, k: int) -> None:
    found = compare(tiny.loaded(family), own, k, 5)
    assert found.documents == 5
    agrees(found)


@pytest.fixture(scope="module")
def longer() -> LoadedModel:
    """A tiny model whose window holds all prompts without shots; its tokens are shorter than a large vocabulary's."""
    model = tiny.model("llama")
    model.config.max_position_embeddings = 1024
    return wrap(model, tiny.tokenizer())


@pytest.mark.parametrize("name", [*PAPER14, *UNSEEN])
@pytest.mark.parametrize("k", [0, 5])
def test_every_task_on_a_tiny_model(longer: LoadedModel, shared: Path, name: str, k: int) -> None:
    task = get_tasks([name], data=shared)[name]
    found = compare(longer, task, k, 6)
    assert found.documents == 6
    agrees(found)
    # Five shots of long passages do not fit the tiny model's 1,024 tokens: they are cut, and still equal.
    assert found.truncated > 0 if k == 5 and name in ("boolq", "multirc", "record") else k == 5 or not found.truncated


@pytest.mark.parametrize(("name", "k"), [("copa", 0), ("piqa", 5), ("winogrande", 5)])
def test_tasks_on_smollm2(smollm2: LoadedModel, shared: Path, name: str, k: int) -> None:
    task = get_tasks([name], data=shared)[name]
    agrees(compare(smollm2, task, k, 2))
    packed, single = (evaluate(smollm2, task, num_fewshot=k, limit=2, trees=trees) for trees in (True, False))
    assert abs(packed.gold_loglikelihood - single.gold_loglikelihood).max() < TOLERANCE


@pytest.mark.parametrize("k", [0, 3])
@pytest.mark.parametrize("name", ["copa", "winogrande", "wsc"])
def test_chat_templates(shared: Path, name: str, k: int) -> None:
    """The tiny tokenizer has one; prompts in it differ from raw ones, and equal lm-eval's."""
    raw = tiny.loaded("llama")
    chat = dataclasses.replace(raw, apply_chat_template=True)
    task = get_tasks([name], data=shared)[name]
    agrees(compare(chat, task, k, 5))
    context, _ = task.prompts("evaluation", FewShot(k, 1), chat=chat.chat)[0].pairs[0]
    assert context.count("<|im_start|>user") == k + 1
    assert context.count("<|im_start|>assistant") == k + 1
    assert context.endswith("<|im_start|>assistant\n")
    assert abs(evaluate(chat, task, limit=5).gold_loglikelihood
               - evaluate(raw, task, limit=5).gold_loglikelihood).min() > 1e-3


DOCUMENTS = [
    {"context": "", "options": ["a", "b c"], "gold": 0},  # nothing before it
    {"context": "One option:", "options": ["only"], "gold": 0},
    {"context": "Prefixes:", "options": ["to", "to be", "to be or not", "to be or not to be"], "gold": 2},
    {"context": "A hundred:", "options": [f"number {i}" for i in range(100)], "gold": 63},
    {"context": "Unicode: 日本語 naïve 🙂", "options": ["東京", "père", "🙃🙃🙃", "Ünïcödé ‮x"], "gold": 1},
    {"context": "Spaces at the end:   ", "options": ["x", " y", "\tz"], "gold": 2},
    {"context": "Lengths:", "options": ["a", "a much longer option than the other, by far and more"], "gold": 1},
    {"context": "Twice the same:", "options": ["same", "same"], "gold": 0},
]


@pytest.mark.parametrize("family", ["opt", "gpt2", "llama"])
@pytest.mark.parametrize("k", [0, 2])
def test_odd_documents(tmp_path: Path, family: str, k: int) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps(doc) + "\n" for doc in DOCUMENTS))
    found = compare(tiny.loaded(family), get_tasks([str(path)])["odd"], k, len(DOCUMENTS))
    assert found.requests == 118
    agrees(found)


def test_unconditional_requests_stay_apart_from_the_options(tmp_path: Path) -> None:
    """`acc_mutual_info` asks for every option again, without context."""
    tiny.write_task(tmp_path)
    stock = get_tasks(["piqa"], data=tmp_path)["piqa"]
    definition = tmp_path / "mutual.yaml"
    definition.write_text("task: piqa\noutput_type: multiple_choice\ntraining_split: train\n"
                          "validation_split: validation\ndoc_to_text: \"Question: {{goal}}\\nAnswer:\"\n"
                          "doc_to_target: label\ndoc_to_choice: '{{[sol1, sol2]}}'\n"
                          "metric_list: [{metric: acc}, {metric: acc_mutual_info}]\n")
    task = get_tasks([str(definition)], data=tmp_path)["piqa"]
    loaded = tiny.loaded("llama")
    prompt = task.prompts("evaluation", FewShot(limit=1))[0]
    assert (len(prompt.pairs), prompt.num_options) == (4, 2)
    agrees(compare(loaded, task, 0, 5))
    measured, plain = evaluate(loaded, task, limit=5), evaluate(loaded, stock, limit=5)
    assert measured.extra_metrics.keys() == {"acc_mutual_info"}
    assert measured.num_options.tolist() == [2] * 5
    assert (measured.prediction == plain.prediction).all()
    assert measured.margin == pytest.approx(plain.margin, abs=1e-4)
