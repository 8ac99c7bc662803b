"""Studies: stopped anywhere they go on, and end as if they had not been stopped."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import headcount as hc
import tiny
from headcount.errors import ModelError, OptionError, StudyError
from headcount.masks import Mask, prune, random_order
from headcount.measure.evaluate import evaluate
from headcount.measure.importance import gradient_importance, oracle_importance, order_of
from headcount.study import runner
from headcount.study.jobs import name_of
from headcount.study.ledger import Ledger, job_id
from headcount.study.plan import TaskFacts, plan
from headcount.study.prepare import prepare
from headcount.study.runner import run, run_study
from headcount.study.spec import StudySpec
from headcount.tasks.fewshot import FewShot
from headcount.tasks.load import get_tasks

FRACTIONS = (0.25, 0.5, 0.75)


def spec(tmp_path: Path, **changes: object) -> StudySpec:
    base = StudySpec("tiny", tasks=("piqa",), shots=(0, 2), out=tmp_path / "study",
                     data=tiny.write_task(tmp_path / "data"), limit=6, importance_limit=7,
                     fractions=FRACTIONS, masks_per_job=2)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def tables(folder: Path) -> dict[str, pd.DataFrame]:
    return {job_id(e.job): e.table for e in Ledger(folder).entries()}


def same(one: Path, other: Path) -> None:
    left, right = tables(one), tables(other)
    assert left.keys() == right.keys()
    for name, table in left.items():
        pd.testing.assert_frame_equal(table, right[name])


class Stopped(Exception):  # noqa: N818 - it is no error
    pass


class StopAt:
    """A reporter that stops the study when a job begins, or in the middle of one."""

    def __init__(self, job: int, middle: bool) -> None:
        self.left, self.middle, self.armed = job, middle, False

    def stage(self, text: str, done: int = 0, total: int | None = None) -> None: ...

    def begin(self, todo: int, done: int, tokens: float) -> None: ...

    def note(self, text: str) -> None: ...

    def job(self, title: str) -> None:
        self.left -= 1
        self.armed = self.left < 0
        if self.armed and not self.middle:
            raise Stopped

    def advance(self, tokens: float) -> None:
        if self.armed:
            raise Stopped


def test_a_study_measures_what_it_says(tmp_path: Path) -> None:
    loaded = tiny.loaded("llama")
    asked = spec(tmp_path)
    folder = run_study(asked, loaded=loaded, command="headcount study")
    task = get_tasks(["piqa"], data=asked.data)["piqa"]
    heads = loaded.anatomy.heads_per_layer
    found: dict[tuple[object, ...], pd.DataFrame] = {}
    for entry in Ledger(folder).entries("evaluation"):
        for i, label in enumerate(entry.info["masks"]):
            key = (entry.job["num_fewshot"], entry.job["split"], label["component"], label["order"],
                   label["fraction"], label["layer"], label["order_seed"])
            assert key not in found, "nothing is measured twice"
            found[key] = entry.table[entry.table["mask"] == i]
            mask = Mask.from_json(label["mask"])
            assert label["parameters_removed"] == loaded.anatomy.parameters_removed(mask)
            assert label["heads_removed"] == len(mask.heads_removed)
    for k in (0, 2):
        order = {"head": order_of(gradient_importance(loaded, task, FewShot(k, 7))["head"]),
                 "ffn": order_of(oracle_importance(loaded, task, FewShot(k, 7)))}
        expected = {(k, "evaluation", "none", "none", 0.0, -1, -1): Mask.full(heads)}
        for component, method in (("head", "gradient"), ("ffn", "oracle")):
            n = sum(heads) if component == "head" else len(heads)
            for f in FRACTIONS:
                expected[k, "evaluation", component, method, f, -1, -1] = prune(heads, component, order[component], f)
            for f in (0.25, 0.5):
                for seed in range(1234, 1239):
                    shuffled = prune(heads, component, random_order(n, seed), f)
                    expected[k, "evaluation", component, "random", f, -1, seed] = shuffled
        for key, mask in expected.items():
            one = evaluate(loaded, task, [mask], num_fewshot=k, limit=6)
            np.testing.assert_allclose(found[key]["gold_loglikelihood"], one.gold_loglikelihood[0], atol=1e-5)
            assert found[key]["correct"].tolist() == one.correct[0].tolist()
        singles = {key for key in found if key[0] == k and key[3] == "single"}
        assert {key[5] for key in singles} == {0, 1, 2}
        assert all(key[1] == "examples" for key in singles), "the oracle never sees the evaluated documents"
    assert len(found) == 2 * (1 + 2 * len(FRACTIONS) + 2 * 2 * 5 + 1 + 3)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of the tiny OPT that nothing stopped."""
    return run_study(spec(tmp_path_factory.mktemp("unbroken")), loaded=tiny.loaded("opt"))


@pytest.mark.parametrize("middle", [False, True])
@pytest.mark.parametrize("job", [0, 3, 9, 20])
def test_stopped_and_resumed_equals_unbroken(unbroken: Path, tmp_path: Path, job: int, middle: bool) -> None:
    loaded = tiny.loaded("opt")
    asked = spec(tmp_path, out=tmp_path / "broken")
    with pytest.raises(Stopped):
        run_study(asked, loaded=loaded, reporter=StopAt(job, middle))
    before = tables(asked.out or Path())
    run_study(asked, loaded=loaded)
    assert before.keys() < tables(asked.out or Path()).keys()
    same(unbroken, tmp_path / "broken")


def test_a_finished_study_measures_nothing_again(tmp_path: Path) -> None:
    loaded = tiny.loaded("llama")
    folder = run_study(spec(tmp_path), loaded=loaded)
    before = {p: p.stat().st_mtime_ns for p in (folder / "entries").iterdir()}
    run_study(spec(tmp_path), loaded=loaded, reporter=StopAt(0, middle=False))
    assert {p: p.stat().st_mtime_ns for p in (folder / "entries").iterdir()} == before


def test_a_damaged_entry_is_measured_again(tmp_path: Path) -> None:
    loaded = tiny.loaded("llama")
    asked = spec(tmp_path, shots=(0,))
    folder = run_study(asked, loaded=loaded)
    before = tables(folder)
    victim = sorted((folder / "entries").glob("evaluation-*"))[2]
    victim.write_bytes(victim.read_bytes()[:100])
    run_study(asked, loaded=loaded)
    after = tables(folder)
    assert before.keys() == after.keys()
    for name, table in before.items():
        pd.testing.assert_frame_equal(after[name], table)


def test_tasks_and_shots_may_be_added(tmp_path: Path) -> None:
    loaded = tiny.loaded("llama")
    run_study(spec(tmp_path, shots=(0,)), loaded=loaded)
    folder = run_study(spec(tmp_path, shots=(2,)), loaded=loaded)
    run_study(spec(tmp_path, out=tmp_path / "whole"), loaded=loaded)
    same(folder, tmp_path / "whole")
    assert (Ledger(folder).read_json("study.json") or {})["spec"]["shots"] == [0, 2]


@pytest.mark.parametrize(("changes", "message"), [
    ({"seed": 1}, "seed was 1234, is 1"),
    ({"protocol": "paper"}, "protocol was sound, is paper"),
    ({"apply_chat_template": True}, "apply_chat_template"),
])
def test_another_studys_folder_is_refused_and_left_alone(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    loaded = tiny.loaded("llama")
    folder = run_study(spec(tmp_path, shots=(0,)), loaded=loaded, parts=("evaluate",))
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    with pytest.raises(StudyError, match=message):
        run_study(spec(tmp_path, shots=(0,), **changes), loaded=loaded)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_another_model_or_other_documents_are_refused(tmp_path: Path) -> None:
    run_study(spec(tmp_path, shots=(0,)), loaded=tiny.loaded("llama"), parts=("evaluate",))
    with pytest.raises(StudyError, match="another model"):
        run_study(spec(tmp_path, shots=(0,)), loaded=tiny.loaded("opt"))
    path = tmp_path / "data" / "piqa" / "validation.jsonl"
    path.write_text(path.read_text().replace("Say", "Tell"))
    changed = dataclasses.replace(spec(tmp_path, shots=(0,)))
    path.write_text(path.read_text().replace("Say", "Tell"))
    with pytest.raises(StudyError, match="other documents"):
        run_study(changed, loaded=tiny.loaded("llama"))


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "thesis.txt").write_text("dear")
    with pytest.raises(StudyError, match="holds no study"):
        run_study(spec(tmp_path), loaded=tiny.loaded("llama"))
    with pytest.raises(StudyError, match="is a file"):
        run_study(spec(tmp_path, out=tmp_path / "study" / "thesis.txt"), loaded=tiny.loaded("llama"))
    with pytest.raises(StudyError, match=r"thesis\.txt is a file; out"):
        run_study(spec(tmp_path, out=tmp_path / "study" / "thesis.txt" / "a" / "b"), loaded=tiny.loaded("llama"))
    with pytest.raises(OptionError, match="name it with out"):
        run_study(spec(tmp_path, out=None), loaded=tiny.loaded("llama"))


def test_parts_are_steps_of_the_same_study(tmp_path: Path) -> None:
    loaded = tiny.loaded("llama")
    for part in ("evaluate", "heads", "ffns", "curve"):
        folder = run_study(spec(tmp_path), loaded=loaded, parts=(part,))
    assert not [p for p in prepare(spec(tmp_path), loaded=loaded).jobs if not Ledger(folder).has(p.key)]


def test_the_plan_counts_its_passes(tmp_path: Path) -> None:
    facts = [TaskFacts(name, "f", {0: 100, 5: 100}, {0: 50, 5: 50}) for name in ("a", "b")]
    asked = StudySpec("m", tasks=("a", "b"), shots=(0, 5), out=tmp_path)
    jobs = plan(asked, "model", (9,) * 30, facts)
    passes = sum(p.passes for p in jobs)
    # Ten FFNs off in a job share the layers before them: 255 + 165 + 75 of 30 layers each.
    curves = 2 * 9 + 2 * 5 * 2 + 2 * 4
    assert passes == 2 * 2 * (2 + 1 + curves + 1 + 16.5), "gradient, full, curves, full on examples, oracle"
    # Own orders at nine steps and five random orders at two, and one order for all tasks at four: before there were
    # own orders and one random order at nine steps. A default study must not cost more than a third more.
    assert 1 + curves <= 4 / 3 * (1 + 4 * 9)
    seen: set[str] = set()
    for planned in jobs:
        assert {need.name for need in planned.job.needs} <= seen, "what a job needs comes before it"
        seen.add(name_of(planned.job))
    assert len(seen) == len(jobs)
    singles = [i for p in jobs for i in p.key.get("curve", {}).get("layers", [])]
    assert sorted(singles) == sorted(list(range(30)) * 4)
    without = plan(dataclasses.replace(asked, ffn_order="gradient", random_orders=0), "model", (9,) * 30, facts)
    assert sum(p.passes for p in without) == 2 * 2 * (2 + 1 + 2 * 9 + 2 * 4)


def test_zero_shot_jobs_do_not_depend_on_the_seed() -> None:
    facts = [TaskFacts("a", "f", {0: 100, 5: 100}, {0: 50, 5: 50})]
    first, other = (plan(StudySpec("m", tasks=("a",), shots=(0, 5), seed=s, random_orders=0), "model", (4,) * 3, facts)
                    for s in (1, 2))
    shared = {name_of(p.job) for p in first} & {name_of(p.job) for p in other}
    assert shared == {name_of(p.job) for p in first if p.key["num_fewshot"] == 0}


def test_the_public_names_work_as_the_readme_uses_them(tmp_path: Path) -> None:
    loaded = hc.wrap(tiny.model("gpt2"), tiny.tokenizer())
    task = hc.get_tasks(["piqa"], data=tiny.write_task(tmp_path))["piqa"]
    heads = hc.head_importance(loaded, task, num_fewshot=1, limit=5)
    ffns = hc.ffn_importance(loaded, task, num_fewshot=1, limit=5)
    assert len(heads.scores["position"]) == 12
    assert len(ffns.scores["accuracy"]) == 3
    mask = hc.Mask(heads=[np.ones(4, bool), np.zeros(4, bool), np.ones(4, bool)], ffns=[True, False, True])
    measured = hc.evaluate(loaded, task, [mask], num_fewshot=1, limit=3)
    assert measured.correct.shape == (1, 3)
    assert not math.isnan(measured.accuracy[0])
    assert set(dir(hc)) >= {"load", "evaluate", "run_study", "open_study"}


def test_a_name_in_place_of_a_task_is_told() -> None:
    """The function itself: in tests, types are checked before it is called."""
    with pytest.raises(OptionError, match="masks must be a list of masks, and task one of the tasks that get_tasks"):
        inspect.unwrap(hc.evaluate)(None, "piqa")


def test_a_model_passed_in_another_chat_setting_is_refused(tmp_path: Path) -> None:
    chat = dataclasses.replace(tiny.loaded("llama"), apply_chat_template=True)
    with pytest.raises(OptionError, match="apply_chat_template"):
        prepare(spec(tmp_path), loaded=chat)


def test_a_study_does_not_go_on_with_another_tokenizer(tmp_path: Path) -> None:
    loaded = tiny.loaded("llama")
    run_study(spec(tmp_path), loaded=loaded, parts=("evaluate",))
    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.add_tokens(["quite-another-token"])
    with pytest.raises(StudyError, match="tokenizer"):
        run_study(spec(tmp_path), loaded=dataclasses.replace(loaded, tokenizer=tokenizer), parts=("evaluate",))


def test_shots_that_use_up_all_documents_are_refused(tmp_path: Path) -> None:
    asked = dataclasses.replace(spec(tmp_path), shots=(12,), shared_shots=True)
    with pytest.raises(OptionError, match="all 12 documents of task 'piqa' are shots"):
        prepare(asked, loaded=tiny.loaded("llama"))


def test_what_a_kill_leaves_does_not_lock_the_folder(tmp_path: Path) -> None:
    asked = spec(tmp_path)
    asked.out.mkdir(parents=True)
    (asked.out / ".study.json.1-abc.tmp").write_text("{")
    assert prepare(asked, loaded=tiny.loaded("llama")).jobs


def test_two_runs_that_begin_together_keep_each_others_tasks(tmp_path: Path) -> None:
    data = tiny.write_task(tmp_path / "data")
    tiny.write_task(tmp_path / "data", "copa")  # piqa's fields; its own definition is given
    definition = tmp_path / "other.yaml"
    definition.write_text("task: copa\noutput_type: multiple_choice\ntraining_split: train\n"
                          "validation_split: validation\ndoc_to_text: '{{goal}}'\ndoc_to_target: label\n"
                          "doc_to_choice: '{{[sol1, sol2]}}'\nmetric_list: [{metric: acc}]\n")
    asked = [dataclasses.replace(spec(tmp_path), data=data, tasks=(name,)) for name in ("piqa", str(definition))]
    first, second = (prepare(one, loaded=tiny.loaded("llama"), parts=("evaluate",)) for one in asked)
    run(first)
    run(second)
    assert list(hc.open_study(tmp_path / "study").tasks) == ["piqa", "copa"]
    other = prepare(dataclasses.replace(asked[0], out=tmp_path / "new"), loaded=tiny.loaded("llama"))
    late = prepare(dataclasses.replace(asked[0], out=tmp_path / "new", seed=7), loaded=tiny.loaded("llama"))
    run(other)
    with pytest.raises(StudyError, match="seed was 1234, is 7"):
        run(late)


def test_a_run_that_begins_while_another_gets_ready_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another process wrote between the first look and the last is merged, or refused, never overwritten."""
    asked = spec(tmp_path, shots=(0,))
    slow = prepare(dataclasses.replace(asked, shots=(2,)), loaded=tiny.loaded("llama"), parts=("evaluate",))
    late = prepare(asked, loaded=tiny.loaded("opt"), parts=("evaluate",))
    describe, others = runner._describe, [prepare(asked, loaded=tiny.loaded("llama"), parts=("evaluate",))]

    def interrupted(*arguments: object) -> None:
        while others:
            run(others.pop())
        describe(*arguments)

    monkeypatch.setattr(runner, "_describe", interrupted)
    run(slow)
    assert hc.open_study(tmp_path / "study").spec["shots"] == [0, 2]
    with pytest.raises(StudyError, match="another model"):
        run(late)


def test_entries_of_another_model_are_not_shown(tmp_path: Path) -> None:
    folder = run_study(spec(tmp_path, shots=(0,)), loaded=tiny.loaded("llama"), parts=("evaluate",))
    shown = hc.open_study(folder).evaluations()
    stray = run_study(spec(tmp_path, shots=(0,), out=tmp_path / "stray"), loaded=tiny.loaded("opt"),
                      parts=("evaluate",))
    for entry in Ledger(stray).entries():
        Ledger(folder).write(entry.job, entry.table, entry.info)
    pd.testing.assert_frame_equal(hc.open_study(folder).evaluations(), shown)


def test_a_check_that_memory_is_too_small_for_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr("headcount.engine.engine.verify", full)
    with pytest.raises(ModelError, match="memory is too small to check tiny-llama"):
        prepare(spec(tmp_path), loaded=dataclasses.replace(tiny.loaded("llama")))


def test_documents_that_serve_as_shared_shots_are_counted_out(tmp_path: Path) -> None:
    """The plan counts what is measured, where documents stand in the data more than once: each is itself alone."""
    asked = spec(tmp_path, shots=(1,), shared_shots=True, limit=None, importance_limit=100)
    path = tmp_path / "data" / "piqa" / "train.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2] * 4))
    folder = run_study(asked, loaded=tiny.loaded("llama"), parts=("heads",))
    (found,) = (e for e in Ledger(folder).entries("importance"))
    assert found.job["documents"] == found.info["num_examples"] == 7
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    with pytest.raises(OptionError, match="all 1 documents of task 'piqa' are shots"):
        prepare(dataclasses.replace(asked, out=tmp_path / "other"), loaded=tiny.loaded("llama"), parts=("heads",))
