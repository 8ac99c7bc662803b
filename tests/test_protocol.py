"""Protocol "paper": what the paper's released code does, written out slowly, and what it does not touch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from headcount.ledger import Ledger
from headcount.masks import Mask
from headcount.measure.encoding import encode
from headcount.measure.importance import gradient_importance
from headcount.measure.scoring import by_question, evaluate
from headcount.measure.tasks import Task, get_tasks
from headcount.model.gates import captured
from headcount.results import Evaluations
from headcount.specs import StudySpec
from headcount.study import run_study
from headcount.tables import stored_order


def both(data: Path, name: str) -> tuple[Task, Task]:
    return (get_tasks([name], data=data)[name], get_tasks([name], data=data, protocol="paper")[name])


def test_wscs_training_documents_are_the_positive_ones(shared: Path) -> None:
    sound, paper = both(shared, "wsc")
    positive = [doc for doc in sound.documents("examples") if doc["label"] == 1]
    assert paper.documents("examples") == positive
    assert 0 < len(positive) < len(sound.documents("examples"))
    assert paper.documents("evaluation") == sound.documents("evaluation")
    for split in ("evaluation", "examples"):
        for prompt in paper.prompts(split, num_fewshot=5, limit=10):
            assert prompt.pairs[0][0].count("Answer: yes") == 5
    assert any("Answer: no" in p.pairs[0][0] for p in sound.prompts("evaluation", num_fewshot=5, limit=10))
    assert paper.fingerprint != sound.fingerprint


def test_a_question_of_multirc_is_right_when_all_its_answers_are(shared: Path) -> None:
    sound, paper = both(shared, "multirc")
    loaded = tiny.loaded("llama")
    full = Mask.full(loaded.anatomy.heads_per_layer)
    masks = [full, full.without_ffns([1])]
    plain = evaluate(loaded, sound, masks, limit=30)
    whole = evaluate(loaded, paper, masks, limit=30)
    docs = sound.documents("evaluation")[:30]
    questions: dict[tuple[int, int], list[int]] = {}
    for i, doc in enumerate(docs):
        questions.setdefault((doc["idx"]["paragraph"], doc["idx"]["question"]), []).append(i)
    assert len(questions) < 30
    assert whole.doc_ids.tolist() == [members[0] for members in questions.values()]
    for mask in range(2):
        for i, members in enumerate(questions.values()):
            # Not the same log-likelihoods: the paper's code encodes context and answer apart.
            assert whole.correct[mask, i] in (0.0, 1.0)
            assert whole.correct[mask, i] == float(whole.prediction[mask, i] == whole.gold[i])
            assert whole.num_options[i] == 2 ** len(members)
    assert plain.correct.shape == (2, 30)


def test_by_question_is_a_loop_over_questions() -> None:
    rng = np.random.default_rng(0)
    owners = ["a", "b", "a", "c", "b", "a", "c"]
    gold, options = rng.integers(0, 2, 7), np.full(7, 2)
    prediction = rng.integers(0, 2, (3, 7))
    measured = Evaluations(
        task="t", num_fewshot=0, metric="acc", masks=(Mask.full((1,)),) * 3, doc_ids=np.arange(7),
        correct=(prediction == gold).astype(float), gold_loglikelihood=rng.normal(size=(3, 7)),
        margin=rng.normal(size=(3, 7)), prediction=prediction, gold=gold, num_options=options,
        extra_metrics={"acc_norm": rng.random((3, 7))})
    found = by_question(measured, owners)
    for i, owner in enumerate("abc"):
        members = [j for j in range(7) if owners[j] == owner]
        for mask in range(3):
            assert found.correct[mask, i] == float(all(measured.correct[mask, j] == 1 for j in members))
            assert found.gold_loglikelihood[mask, i] == pytest.approx(
                sum(measured.gold_loglikelihood[mask, j] for j in members) / len(members))
            assert found.margin[mask, i] == min(measured.margin[mask, j] for j in members)
            assert found.extra_metrics["acc_norm"][mask, i] == pytest.approx(
                np.mean([measured.extra_metrics["acc_norm"][mask, j] for j in members]))
            assert (found.prediction[mask, i] == found.gold[i]) == bool(found.correct[mask, i])
        assert found.num_options[i] == 2 ** len(members)


def test_context_and_continuation_are_encoded_apart() -> None:
    tokenizer = tiny.tokenizer()
    pairs = [("Answer: ", "yes"), ("Answer:", " yes"), ("a b", "c d")]
    for (context, continuation), request in zip(pairs, encode(tokenizer, pairs, 512, apart=True), strict=True):
        left = tokenizer(context, add_special_tokens=False)["input_ids"]
        right = tokenizer(continuation, add_special_tokens=False)["input_ids"]
        assert request.targets.tolist() == right
        assert request.ids.tolist() == (left + right)[:-1]
    # The space at the end of the context stays there, where lm-eval's rule moves it.
    together, apart = (encode(tokenizer, pairs[:1], 512, apart=apart)[0] for apart in (False, True))
    assert together.ids.tolist() != apart.ids.tolist()


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_head_importance_is_the_papers_sum(tmp_path: Path, family: str) -> None:
    """Sums of |z . dL/dz| over all examples, by their positions; the last layer by the continuations' tokens."""
    _, paper = both(tiny.write_task(tmp_path), "piqa")
    loaded = tiny.loaded(family)
    found = gradient_importance(loaded, paper, num_fewshot=1)["head"]
    sums = [torch.zeros(n) for n in loaded.anatomy.heads_per_layer]
    positions = continuations = 0
    for prompt in paper.prompts("examples", num_fewshot=1):
        (request,) = encode(loaded.tokenizer, [prompt.pairs[prompt.gold]], loaded.max_length, apart=True)
        with torch.enable_grad(), captured(loaded.anatomy, gradients=True) as caught:
            logits = loaded.model(torch.from_numpy(request.ids)[None]).logits[0]
            loss = torch.nn.functional.cross_entropy(logits[torch.from_numpy(request.scored)],
                                                     torch.from_numpy(request.targets))
            gradients = torch.autograd.grad(loss, caught.heads)
        for layer, (z, g) in enumerate(zip(caught.heads, gradients, strict=True)):
            for position in range(len(request.ids)):
                sums[layer] += (z.detach()[0, position] * g[0, position]).sum(-1).abs()
        positions += len(request.ids)
        continuations += len(request.targets)
    last = len(sums) - 1
    expected = torch.cat([s / (continuations if layer == last else positions) for layer, s in enumerate(sums)])
    np.testing.assert_allclose(found.scores["position"], expected.numpy(), rtol=2e-4)


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("headcount.study._load", lambda spec: tiny.loaded("opt"))
    data = tiny.write_task(tmp_path / "data")
    return run_study(StudySpec(model="tiny", tasks=("piqa",), shots=(0,), data=data, out=tmp_path / "study",
                               fractions=(0.5,), protocol="paper"))


def test_the_oracle_is_measured_on_what_is_reported(study: Path) -> None:
    oracle = next(e for e in Ledger(study).entries("importance") if e.job["method"] == "oracle")
    assert oracle.info["num_examples"] == 8, "the evaluated documents, not the 12 of training"
    splits = {e.job["split"] for e in Ledger(study).entries("evaluation")}
    assert splits == {"evaluation"}
    assert {e.job["protocol"] for e in Ledger(study).entries()} == {"paper"}
    assert json.loads((study / "study.json").read_text())["spec"]["protocol"] == "paper"


def test_equal_accuracies_of_the_oracle_stay_in_the_order_of_layers(study: Path) -> None:
    oracle = next(e for e in Ledger(study).entries("importance") if e.job["method"] == "oracle")
    ordered = stored_order(oracle.table, "ffn", "accuracy")
    lost = oracle.table[oracle.table["score"] == "accuracy"].sort_values("layer")["importance"].to_numpy()
    assert ordered == sorted(range(len(lost)), key=lambda layer: (round(lost[layer], 9), layer))
    curve = next(e for e in Ledger(study).entries("evaluation") if e.job["curve"]["order"] == "oracle")
    assert curve.job["curve"]["score"] == "accuracy"
    removed = Mask.from_json(curve.info["masks"][0]["mask"]).ffns_removed
    assert list(removed) == sorted(ordered[: len(removed)])
