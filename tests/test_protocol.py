"""Protocol "paper": what the paper's released code does, written out slowly, and what it does not touch."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

import tiny
from headcount.analysis.study import open_study
from headcount.engine.encode import Request, encode
from headcount.engine.engine import Engine
from headcount.engine.forward import columns_of, plain_loglikelihoods
from headcount.engine.pack import Budget, batches, pack
from headcount.errors import OptionError
from headcount.masks import Mask
from headcount.measure.evaluate import by_question, evaluate, prepare
from headcount.measure.importance import gradient_importance
from headcount.model.contracts import ContractResult
from headcount.model.hooks import ablated, captured
from headcount.model.load import LoadedModel, wrap
from headcount.report.cautions import cautions
from headcount.results import Evaluations
from headcount.study.codec import stored_order
from headcount.study.ledger import Ledger, job_id
from headcount.study.plan import PAPER_VERSION, TaskFacts, plan
from headcount.study.runner import run_study
from headcount.study.spec import StudySpec
from headcount.tasks.fewshot import FewShot
from headcount.tasks.load import get_tasks
from headcount.tasks.task import Split, Task


def both(data: Path, name: str) -> tuple[Task, Task]:
    return (get_tasks([name], data=data)[name], get_tasks([name], data=data, protocol="paper")[name])


def seeded() -> random.Random:
    """lm-eval's generator of 2022, of each task's documents."""
    rnd = random.Random()  # noqa: S311
    rnd.seed(42)
    return rnd


def test_wscs_training_documents_are_the_positive_ones(shared: Path) -> None:
    sound, paper = both(shared, "wsc")
    positive = [doc for doc in sound.documents("examples") if doc["label"] == 1]
    assert paper.documents("examples") == positive
    assert 0 < len(positive) < len(sound.documents("examples"))
    assert paper.documents("evaluation") == sound.documents("evaluation")
    for split in ("evaluation", "examples"):
        for prompt in paper.prompts(split, FewShot(5, 10)):
            assert prompt.pairs[0][0].count("Answer: yes") == 5
    assert any("Answer: no" in p.pairs[0][0] for p in sound.prompts("evaluation", FewShot(5, 10)))
    assert paper.fingerprint != sound.fingerprint


def test_a_question_of_multirc_is_right_when_all_its_answers_are(shared: Path) -> None:
    sound, paper = both(shared, "multirc")
    loaded = tiny.loaded("llama")
    full = Mask.full(loaded.anatomy.heads_per_layer)
    masks = [full, full.without_ffns([1])]
    plain = evaluate(loaded, sound, masks, limit=30)
    whole = evaluate(loaded, paper, masks, limit=30)
    docs = list(enumerate(sound.documents("evaluation")))
    seeded().shuffle(docs)
    together: dict[tuple[int, int], list[int]] = {}
    for i, doc in docs:
        together.setdefault((doc["idx"]["paragraph"], doc["idx"]["question"]), []).append(i)
    first = [(question, i) for question, members in together.items() for i in members][:30]
    questions = {question: [i for other, i in first if other == question] for question, _ in first}
    assert len(questions) < 30
    assert whole.doc_ids.tolist() == [members[0] for members in questions.values()]
    for mask in range(2):
        for i, members in enumerate(questions.values()):
            # Not the same log-likelihoods: the paper's code encodes context and answer apart.
            assert whole.correct[mask, i] in (0.0, 1.0)
            assert whole.correct[mask, i] == float(whole.prediction[mask, i] == whole.gold[i])
            assert whole.num_options[i] == 2 ** len(members)
    assert plain.correct.shape == (2, 30)


def written(doc: Mapping[str, Any], shots: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """A document of PIQA after its shots, as lm-eval of 2022 puts them together."""
    before = "".join(f"Question: {shot['goal']}\nAnswer: {shot[('sol1', 'sol2')[shot['label']]]}\n\n" for shot in shots)
    return [(f"{before}Question: {doc['goal']}\nAnswer:", f" {doc[option]}") for option in ("sol1", "sol2")]


@pytest.mark.parametrize("k", [0, 1, 3])
def test_evaluated_documents_and_their_shots_are_drawn_as_the_papers_code_does(tmp_path: Path, k: int) -> None:
    sound, paper = both(tiny.write_task(tmp_path, train=40, validation=30), "piqa")
    training, evaluated = sound.documents("examples"), list(sound.documents("evaluation"))
    # lm-eval of 2022: shuffled by a generator that then draws the shots of one document after another.
    rnd = seeded()
    rnd.shuffle(evaluated)
    expected = [(doc, written(doc, rnd.sample(training, k))) for doc in evaluated]
    found = paper.prompts("evaluation", FewShot(k))
    assert [p.doc for p in found] == [doc for doc, _ in expected] != sound.documents("evaluation")
    assert [list(p.pairs) for p in found] == [pairs for _, pairs in expected]
    assert [sound.documents("evaluation")[p.doc_id] for p in found] == evaluated
    assert [p.gold for p in found] == [doc["label"] for doc in evaluated]
    for limit in (1, 7):
        first = paper.prompts("evaluation", FewShot(k, limit))
        assert [(p.doc_id, p.pairs) for p in first] == [(p.doc_id, p.pairs) for p in found[:limit]]
    other = paper.prompts("evaluation", FewShot(k, seed=7))
    assert [p.doc_id for p in other] == [p.doc_id for p in found]
    assert (other[0].pairs == found[0].pairs) == (k == 0), "another seed draws other shots for the same documents"


def test_shots_of_scored_documents_come_from_one_seed_and_may_be_the_document_itself(tmp_path: Path) -> None:
    sound, paper = both(tiny.write_task(tmp_path), "piqa")
    training = sound.documents("examples")
    random.seed(1234)
    expected = [written(doc, random.sample(training, 5)) for doc in training]
    found = paper.prompts("examples", FewShot(5))
    assert [p.doc_id for p in found] == list(range(12))
    assert [list(p.pairs) for p in found] == expected
    among_own = [p.pairs[0][0].count(f"{p.doc['goal']}\n") > 1 for p in found]
    assert 0 < sum(among_own) < 12
    assert not any(p.pairs[0][0].count(f"{p.doc['goal']}\n") > 1 for p in sound.prompts("examples", FewShot(5)))
    assert len(paper.prompts("examples", FewShot(12, 1))) == 1
    with pytest.raises(OptionError, match="13 shots cannot be drawn from the 12"):
        paper.prompts("examples", FewShot(13))


def test_without_training_documents_one_shot_more_is_drawn_and_the_document_taken_out(tmp_path: Path) -> None:
    documents = [{"context": f"The number after {i} is", "options": [str(i + 1), str(i)], "gold": 0} for i in range(7)]
    # Two that are equal: whatever equals the document is taken out.
    file = tmp_path / "counting.jsonl"
    file.write_text("".join(json.dumps(doc) + "\n" for doc in [*documents, documents[2]]), encoding="utf-8")
    paper = get_tasks([str(file)], protocol="paper")["counting"]
    pool = paper.documents("evaluation")
    shuffled = list(pool)
    rnd = seeded()
    rnd.shuffle(shuffled)
    found = paper.prompts("evaluation", FewShot(4))
    assert [p.doc for p in found] == shuffled
    for prompt, doc in zip(found, shuffled, strict=True):
        shots = [shot for shot in rnd.sample(pool, 5) if shot != doc][:4]
        assert prompt.pairs[0][0] == "".join(f"{s['context']} {s['options'][0]}\n\n" for s in shots) + doc["context"]
    assert paper.prompts("evaluation", FewShot(7))
    with pytest.raises(OptionError, match="8 shots cannot be drawn"):
        paper.prompts("evaluation", FewShot(8))


@pytest.mark.parametrize("name", ["rte", "winogrande", "record", "wsc", "arc_easy"])
def test_shots_of_the_papers_tasks_are_drawn_as_its_code_does(
    shared: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    sound, paper = both(shared, name)
    training, evaluated = list(paper.documents("examples")), list(sound.documents("evaluation"))
    rnd = seeded()
    rnd.shuffle(evaluated)
    for prompt, doc in zip(paper.prompts("evaluation", FewShot(5, 8)), evaluated, strict=False):
        shots = rnd.sample(training, 5)
        monkeypatch.setattr(paper.inner, "sampler", SimpleNamespace(sample=lambda n, eval_doc=None, shots=shots: shots))
        context = paper.inner.fewshot_context(doc, 5)
        built = paper.inner.construct_requests(doc=doc, ctx=context, metadata=(name, 0, 1))
        assert list(prompt.pairs) == [instance.args for instance in built]


@pytest.mark.parametrize("split", ["evaluation", "examples"])
def test_shared_shots_are_one_draw_under_either_protocol(tmp_path: Path, split: Split) -> None:
    sound, paper = both(tiny.write_task(tmp_path), "piqa")
    of_sound, of_paper = ({p.doc_id: p.pairs for p in task.prompts(split, FewShot(3, shared=True))}
                          for task in (sound, paper))
    assert of_sound == of_paper
    assert len(of_paper) == paper.size(split, FewShot(3, shared=True)) == (8 if split == "evaluation" else 9)
    order = list(range(8))
    seeded().shuffle(order)
    assert list(of_paper) == (order if split == "evaluation" else sorted(of_paper))


def larger_opt() -> LoadedModel:
    """A random OPT whose output layer has rows of no token, and those often the largest logits."""
    tokenizer = tiny.tokenizer()
    torch.manual_seed(0)
    built = OPTForCausalLM(OPTConfig(vocab_size=len(tokenizer) + 7, hidden_size=32, num_hidden_layers=3, ffn_dim=48,
                                     num_attention_heads=4, max_position_embeddings=tiny.WINDOW, word_embed_proj_dim=32,
                                     dropout=0.0))
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(0, 0.15)
        built.get_output_embeddings().weight[len(tokenizer) :] *= 8
    return wrap(built.eval(), tokenizer, name="larger-opt")


@pytest.mark.parametrize("swept", [True, False])
def test_evaluation_is_over_the_tokenizers_tokens_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swept: bool
) -> None:
    loaded, size = larger_opt(), len(tiny.tokenizer())
    if not swept:
        no = ContractResult("", False, 1.0, "")
        monkeypatch.setitem(vars(Engine.of(loaded)), "sweep_contract", no)
    full = Mask.full(loaded.anatomy.heads_per_layer)
    masks = [full, full.without_ffns([1]), full.without_heads([(1, 2)])]
    for protocol, columns in (("paper", size), ("sound", size + 7)):
        task = get_tasks(["piqa"], data=tiny.write_task(tmp_path), protocol=protocol)["piqa"]
        prepared = prepare(loaded, task, FewShot(2))
        pairs = [pair for p in prepared.prompts for pair in p.pairs]
        requests = encode(loaded.tokenizer, pairs, loaded.max_length, apart=protocol == "paper")
        found = Engine.of(loaded).loglikelihoods(prepared.packed, masks, columns=prepared.columns)
        measured = evaluate(loaded, task, masks, num_fewshot=2)
        for i, mask in enumerate(masks):
            expected, hits = [], []
            for request in requests:
                with torch.no_grad(), ablated(loaded.anatomy, mask):
                    logits = loaded.model(torch.from_numpy(request.ids)[None]).logits[0]
                logprobs = logits[torch.from_numpy(request.scored), :columns].double().log_softmax(-1)
                targets = torch.from_numpy(request.targets)
                expected.append(float(logprobs.gather(1, targets[:, None]).sum()))
                hits.append(int((logprobs.argmax(-1) == targets).all()))
            np.testing.assert_allclose(found.loglikelihoods[i], expected, atol=2e-4)
            assert found.greedy[i].tolist() == hits
            gold = [expected[2 * n + p.gold] for n, p in enumerate(prepared.prompts)]
            np.testing.assert_allclose(measured.gold_loglikelihood[i], gold, atol=2e-4)


def test_greedy_decoding_is_among_the_tokenizers_tokens() -> None:
    loaded, size = larger_opt(), len(tiny.tokenizer())
    context = loaded.tokenizer("Count the cats from one", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = loaded.model(torch.tensor([context])).logits[0, -1]
    assert int(logits.argmax()) >= size, "a row of no token is the largest"
    best = int(logits[:size].argmax())
    packed = batches(pack([[Request(np.array(context), np.array([best]))]], Budget()), Budget())
    for columns, hit in ((None, 0), (size, 1)):
        assert plain_loglikelihoods(loaded, packed, 1, columns=columns)[1].tolist() == [hit]
    assert columns_of(loaded) == size


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
    found = gradient_importance(loaded, paper, FewShot(1))["head"]
    sums = [torch.zeros(n) for n in loaded.anatomy.heads_per_layer]
    positions = continuations = 0
    for prompt in paper.prompts("examples", FewShot(1)):
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
    monkeypatch.setattr("headcount.study.prepare._load", lambda spec, reporter: tiny.loaded("opt"))
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


def test_a_smaller_grid_is_of_the_first_of_the_shuffled_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = tiny.loaded("opt")
    monkeypatch.setattr("headcount.study.prepare._load", lambda spec, reporter: loaded)
    data = tiny.write_task(tmp_path / "data", validation=20)
    folder = run_study(StudySpec(model="tiny", tasks=("piqa",), shots=(1,), data=data, out=tmp_path / "study",
                                 fractions=(0.5,), measure=("curves", "grid"), grid_fractions=(0.5,), limit=12,
                                 grid_limit=5, random_orders=1, protocol="paper"))
    order = list(range(20))
    seeded().shuffle(order)
    _, paper = both(data, "piqa")
    masks: dict[tuple[float, float], Mask] = {(0.0, 0.0): Mask.full(loaded.anatomy.heads_per_layer)}
    for entry in Ledger(folder).entries("evaluation"):
        grid = entry.job["curve"]["order"] == "grid"
        assert entry.table["doc_id"].unique().tolist() == order[: 5 if grid else 12]
        for label in entry.info["masks"] if grid or entry.job["curve"]["order"] in ("gradient", "oracle") else ():
            ffns = label["ffn_fraction"] if grid else 0.5 * (label["component"] == "ffn")
            heads = label["fraction"] if grid else 0.5 * (label["component"] == "head")
            masks[heads, ffns] = Mask.from_json(label["mask"])
    cells = open_study(folder).grid().set_index(["heads_fraction", "ffns_fraction"])
    assert set(cells.index) == {(0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.5, 0.5)}
    measured = evaluate(loaded, paper, [masks[at] for at in cells.index], num_fewshot=1, limit=5)
    assert cells["documents"].tolist() == [5] * 4
    np.testing.assert_allclose(cells["accuracy"], measured.correct.mean(axis=1))
    np.testing.assert_allclose(cells["difference"], measured.correct.mean(axis=1) - cells["accuracy"].loc[0.0, 0.0])


def test_what_an_earlier_version_measured_is_not_mixed_with_the_new(study: Path) -> None:
    new = open_study(study)
    expected = new.evaluations()
    ledger = Ledger(study)
    old = [(({k: v for k, v in entry.job.items() if k != "paper_version"}), entry) for entry in ledger.entries()]
    for path in list(ledger.entries_folder.iterdir()):
        path.unlink()
    for job, entry in old:
        correct = {"correct": 1 - entry.table["correct"]} if "correct" in entry.table else {}
        ledger.write(job, entry.table.assign(**correct), entry.info)
    before = open_study(study)
    assert (before.evaluations()["correct"] + expected["correct"]).eq(1).all(), "a folder of before is still read"
    assert before.curves().shape == new.curves().shape
    assert any("an earlier version of protocol paper: the first documents" in text for text in cautions(before))
    run_study(StudySpec(**{**new.spec, "out": study, "data": Path(new.spec["data"]), **{
        name: tuple(value) for name, value in new.spec.items() if isinstance(value, list)}}))
    assert len(list(ledger.entries())) == 2 * len(old), "measured anew, beside what was there"
    after = open_study(study)
    pd.testing.assert_frame_equal(after.evaluations(), expected)
    assert any("an earlier version of protocol paper measured in this folder is left out" in t for t in cautions(after))
    assert not any("an earlier version" in text for text in cautions(new))


# Computed before protocol "paper" had versions: what "sound" measured keeps its names.
SOUND_JOBS = {
    "piqa, 0-shot: full model, evaluation": "f23ca900caa8ed41c5d75124",
    "piqa, 0-shot: gradient importance": "a1fbe7691326dc13ac646c3f",
    "piqa, 0-shot: heads by gradient, 50% to 50%": "b588167a05ec3026b0c978ee",
    "piqa, 0-shot: full model, examples": "47e3be77aec34bd5162a68b5",
    "piqa, 0-shot: one FFN off, layers 0 to 1": "96431ac32848d6614f15c65c",
    "piqa, 0-shot: FFN oracle": "5fb667ba73f049261e2e21d9",
    "piqa, 1-shot: full model, evaluation": "2b72c9c169dd3998c227f5a2",
    "piqa, 1-shot: gradient importance": "116f25f1db2c5c0e7c403c99",
    "piqa, 1-shot: heads by gradient, 50% to 50%": "7d8465827ade3bceb397549b",
    "piqa, 1-shot: full model, examples": "76dfe6e323b6e8c64b399c49",
    "piqa, 1-shot: one FFN off, layers 0 to 1": "d0bbd9596e1dcdcd80284aa2",
    "piqa, 1-shot: FFN oracle": "27e3ec7bfa11d29d18312cf1",
}


def test_only_jobs_of_protocol_paper_have_its_version() -> None:
    facts = TaskFacts("piqa", "f1", {0: 8, 1: 8}, {0: 12, 1: 12})
    jobs = {}
    for protocol in ("sound", "paper"):
        spec = StudySpec(model="m", tasks=("piqa",), shots=(0, 1), fractions=(0.5,), head_score="position",
                         masks_per_job=2, protocol=protocol)
        jobs[protocol] = {p.title: p.key for p in plan(spec, "model", (2, 2), [facts])}
    assert SOUND_JOBS.items() <= {title: job_id(job) for title, job in jobs["sound"].items()}.items()
    assert not any("paper_version" in job for job in jobs["sound"].values())
    assert {job["paper_version"] for job in jobs["paper"].values()} == {PAPER_VERSION}


def test_equal_accuracies_of_the_oracle_stay_in_the_order_of_layers(study: Path) -> None:
    oracle = next(e for e in Ledger(study).entries("importance") if e.job["method"] == "oracle")
    ordered = stored_order(oracle.table, "ffn", "accuracy")
    lost = oracle.table[oracle.table["score"] == "accuracy"].sort_values("layer")["importance"].to_numpy()
    assert ordered == sorted(range(len(lost)), key=lambda layer: (round(lost[layer], 9), layer))
    curve = next(e for e in Ledger(study).entries("evaluation") if e.job["curve"]["order"] == "oracle")
    assert curve.job["curve"]["score"] == "accuracy"
    removed = Mask.from_json(curve.info["masks"][0]["mask"]).ffns_removed
    assert list(removed) == sorted(ordered[: len(removed)])
