"""The door to lm-eval: prompts are lm-eval's, bad data is told with file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headcount.errors import DataError, HeadcountError, OptionError, TaskError
from headcount.measure.names import embedded_tasks
from headcount.measure.tasks import Task, get_tasks
from tiny import write_task


def task(folder: Path, name: str = "piqa", **options: object) -> Task:
    return get_tasks([name], data=write_task(folder), **options)[name]  # type: ignore[arg-type]


def lm_eval_pairs(found: Task, k: int, limit: int) -> list[list[tuple[str, str]]]:
    """The prompts that lm-eval's own loop builds."""
    found.inner.set_fewshot_seed(1234)
    found.inner.set_config("num_fewshot", k)
    found.inner.build_all_requests(limit=limit, rank=0, world_size=1)
    grouped: dict[int, list[tuple[str, str]]] = {}
    for instance in found.inner.instances:
        grouped.setdefault(instance.doc_id, []).append(instance.args)
    return list(grouped.values())


@pytest.mark.parametrize("k", [0, 1, 3])
def test_evaluated_prompts_are_lm_evals(tmp_path: Path, k: int) -> None:
    found = task(tmp_path)
    ours = found.prompts("evaluation", num_fewshot=k, limit=5)
    assert [list(p.pairs) for p in ours] == lm_eval_pairs(found, k, 5)
    assert [p.doc_id for p in ours] == list(range(5))
    assert [p.gold for p in ours] == [p.doc["label"] for p in ours]


@pytest.mark.parametrize("name", ["copa", "piqa", "arc_easy"])
@pytest.mark.parametrize("k", [0, 5])
def test_evaluated_prompts_are_lm_evals_on_real_documents(shared: Path, name: str, k: int) -> None:
    found = get_tasks([name], data=shared)[name]
    ours = found.prompts("evaluation", num_fewshot=k, limit=20)
    assert [list(p.pairs) for p in ours] == lm_eval_pairs(found, k, 20)


def test_examples_are_training_documents_and_not_their_own_shots(tmp_path: Path) -> None:
    found = task(tmp_path)
    for prompt in found.prompts("examples", num_fewshot=11):
        goal = prompt.doc["goal"]
        assert prompt.pairs[0][0].count(f"{goal}\n") == 1, "the document stands at the end and nowhere else"
    assert found.prompts("examples", num_fewshot=11)[3].pairs == found.prompts("examples", num_fewshot=11)[3].pairs


def test_shared_shots_are_one_draw_and_left_out_of_the_examples(tmp_path: Path) -> None:
    found = task(tmp_path)
    heads = set()
    for split in ("evaluation", "examples"):
        prompts = found.prompts(split, num_fewshot=3, shared_shots=True)
        for prompt in prompts:
            context = prompt.pairs[0][0]
            heads.add(context[: context.rindex("Question:")])
            assert context.count(f"{prompt.doc['goal']}\n") == 1
    assert len(heads) == 1
    assert len(found.prompts("examples", num_fewshot=3, shared_shots=True)) == 12 - 3
    assert found.size("examples", shared_shots=3) == 9
    assert found.size("evaluation", shared_shots=3) == 8
    other = found.prompts("evaluation", num_fewshot=3, shared_shots=True, seed=7)[0].pairs[0][0]
    assert not other.startswith(next(iter(heads)))


def test_validation_stands_in_for_test_and_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "arc_easy"
    folder.mkdir()
    doc = {"id": "1", "question": "Which is hot?", "choices": {"text": ["ice", "fire"], "label": ["A", "B"]},
           "answerKey": "B"}
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text(json.dumps(doc) + "\n")
    found = get_tasks(["arc_easy"], data=tmp_path)["arc_easy"]
    assert "validation.jsonl stands in" in found.notes[0]
    assert found.prompts("evaluation")[0].gold == 1


def test_fingerprints_hang_on_documents(tmp_path: Path) -> None:
    one = task(tmp_path / "a").fingerprint
    assert task(tmp_path / "b").fingerprint == one
    path = write_task(tmp_path / "c") / "piqa" / "train.jsonl"
    path.write_text(path.read_text().replace("Say 2.", "Say two."))
    assert get_tasks(["piqa"], data=tmp_path / "c")["piqa"].fingerprint != one


def test_a_users_own_yaml(tmp_path: Path) -> None:
    write_task(tmp_path)
    definition = tmp_path / "mine.yaml"
    definition.write_text("task: piqa\noutput_type: multiple_choice\ntraining_split: train\n"
                          "validation_split: validation\ndoc_to_text: 'Do: {{goal}}'\ndoc_to_target: label\n"
                          "doc_to_choice: '{{[sol1, sol2]}}'\nmetric_list: [{metric: acc}]\n")
    found = get_tasks([str(definition)], data=tmp_path)["piqa"]
    assert found.prompts("evaluation")[0].pairs[0][0] == "Do: Count the cats from 1000"


def test_the_embedded_suite_is_tasks_like_any_other() -> None:
    found = get_tasks(["icl"])
    assert list(found) == embedded_tasks()
    assert len(found) >= 14
    for one in found.values():
        assert one.metric == "acc"
        for split in ("evaluation", "examples"):
            prompts = one.prompts(split, num_fewshot=5, limit=3)
            for prompt in prompts:
                context, continuation = prompt.pairs[prompt.gold]
                assert len(prompt.pairs) == 4
                assert context.count("\n") == 5
                assert context.endswith(f"{prompt.doc['query']} ->")
                assert continuation == " " + prompt.doc["choices"][prompt.doc["gold"]]


def test_metrics_are_lm_evals(tmp_path: Path) -> None:
    found = task(tmp_path)
    prompt = found.prompts("evaluation", limit=1)[0]
    # Per character of " Say 1001." (9) and of the longer option (22) the order turns round.
    assert found.metrics(prompt, [(-5.0, False), (-6.0, False)]) == {"acc": 1.0, "acc_norm": 0.0}


def _rewrite(folder: Path, split: str, text: str) -> Path:
    (write_task(folder) / "piqa" / f"{split}.jsonl").write_text(text)
    return folder


@pytest.mark.parametrize(("break_it", "kind", "message"), [
    (lambda f: (f, ["pika"]), TaskError, "did you mean piqa"),
    (lambda f: (f, ["qqqqzzzz"]), TaskError, "no task is named 'qqqqzzzz'"),
    (lambda f: (f, ["./nowhere.yaml"]), TaskError, "no task file"),
    (lambda f: (write_task(f), ["copa"]), DataError, "--data holds: piqa"),
    (lambda f: (_rewrite(f, "train", ""), ["piqa"]), DataError, "train.jsonl is empty"),
    (lambda f: (_rewrite(f, "validation", '{"goal": "a"\n'), ["piqa"]), DataError, "validation.jsonl, line 1"),
    (lambda f: (_rewrite(f, "train", '{"goal": "a"}\n[]\n'), ["piqa"]), DataError, "train.jsonl, line 2"),
    (lambda f: (_rewrite(f, "validation", '{"question": "a"}\n'), ["piqa"]), DataError, "piqa"),
    (lambda f: (write_task(f), ["piqa", "piqa"]), TaskError, "named twice"),
    (lambda f: (write_task(f, "gsm8k"), ["gsm8k"]), HeadcountError, "gsm8k"),
])
def test_bad_input_is_told(tmp_path: Path, break_it: object, kind: type[Exception], message: str) -> None:
    data, names = break_it(tmp_path)  # type: ignore[operator]
    with pytest.raises(kind, match=message):
        for one in get_tasks(names, data=data).values():
            one.prompts("evaluation", limit=1)


def test_missing_files_and_splits_are_told(tmp_path: Path) -> None:
    write_task(tmp_path)
    (tmp_path / "piqa" / "train.jsonl").unlink()
    with pytest.raises(HeadcountError, match=r"train"):
        get_tasks(["piqa"], data=tmp_path)["piqa"].prompts("examples")
    with pytest.raises(OptionError, match="--examples-split"):
        get_tasks(["piqa"], data=tmp_path, examples_split="dev")
    (tmp_path / "piqa" / "validation.jsonl").unlink()
    with pytest.raises(DataError, match="neither"):
        get_tasks(["piqa"], data=tmp_path)


def test_a_task_without_the_split_names_the_option(tmp_path: Path) -> None:
    found = task(tmp_path)
    found.inner.config.training_split = None
    with pytest.raises(TaskError, match="--examples-split"):
        found.prompts("examples")


def test_more_shots_than_documents_are_refused(tmp_path: Path) -> None:
    found = task(tmp_path)
    for split in ("evaluation", "examples"):
        assert found.prompts(split, num_fewshot=11, limit=1)
        with pytest.raises(OptionError, match="12 few-shot documents"):
            found.prompts(split, num_fewshot=12)
    assert found.prompts("evaluation", num_fewshot=12, shared_shots=True)
    with pytest.raises(OptionError, match="ask for fewer"):
        found.prompts("evaluation", num_fewshot=13, shared_shots=True)
