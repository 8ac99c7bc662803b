"""The door to lm-eval: prompts are lm-eval's, bad data is told with file and line."""

from __future__ import annotations

import functools
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from headcount.errors import DataError, HeadcountError, OptionError, TaskError
from headcount.tasks.baseline import constant_answer
from headcount.tasks.catalog import PAPER14, UNSEEN, embedded_tasks, expand
from headcount.tasks.fewshot import FewShot
from headcount.tasks.fingerprint import fingerprint
from headcount.tasks.load import describe, get_tasks
from headcount.tasks.task import Task
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
    ours = found.prompts("evaluation", FewShot(k, 5))
    assert [list(p.pairs) for p in ours] == lm_eval_pairs(found, k, 5)
    assert [p.doc_id for p in ours] == list(range(5))
    assert [p.gold for p in ours] == [p.doc["label"] for p in ours]


@pytest.mark.parametrize("name", ["copa", "piqa", "arc_easy"])
@pytest.mark.parametrize("k", [0, 5])
def test_evaluated_prompts_are_lm_evals_on_real_documents(shared: Path, name: str, k: int) -> None:
    found = get_tasks([name], data=shared)[name]
    ours = found.prompts("evaluation", FewShot(k, 20))
    assert [list(p.pairs) for p in ours] == lm_eval_pairs(found, k, 20)


def test_examples_are_training_documents_and_not_their_own_shots(tmp_path: Path) -> None:
    found = task(tmp_path)
    for prompt in found.prompts("examples", FewShot(11)):
        goal = prompt.doc["goal"]
        assert prompt.pairs[0][0].count(f"{goal}\n") == 1, "the document stands at the end and nowhere else"
    assert found.prompts("examples", FewShot(11))[3].pairs == found.prompts("examples", FewShot(11))[3].pairs


def test_shared_shots_are_one_draw_and_left_out_of_the_examples(tmp_path: Path) -> None:
    found = task(tmp_path)
    heads = set()
    for split in ("evaluation", "examples"):
        prompts = found.prompts(split, FewShot(3, shared=True))
        for prompt in prompts:
            context = prompt.pairs[0][0]
            heads.add(context[: context.rindex("Question:")])
            assert context.count(f"{prompt.doc['goal']}\n") == 1
    assert len(heads) == 1
    assert len(found.prompts("examples", FewShot(3, shared=True))) == 12 - 3
    assert found.size("examples", FewShot(3, shared=True)) == 9
    assert found.size("evaluation", FewShot(3, shared=True)) == 8
    other = found.prompts("evaluation", FewShot(3, seed=7, shared=True))[0].pairs[0][0]
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


def test_fingerprints_depend_on_documents(tmp_path: Path) -> None:
    one = task(tmp_path / "a").fingerprint
    assert task(tmp_path / "b").fingerprint == one
    path = write_task(tmp_path / "c") / "piqa" / "train.jsonl"
    path.write_text(path.read_text().replace("Say 2.", "Say two."))
    assert get_tasks(["piqa"], data=tmp_path / "c")["piqa"].fingerprint != one


ROOT = Path(__file__).resolve().parents[1]


def in_another_process(name: str, folder: Path) -> str:
    """The task's fingerprint as a process of its own has it."""
    code = ("import sys; from headcount.tasks.load import get_tasks; "
            "(task,) = get_tasks(sys.argv[1:2], data=sys.argv[2]).values(); print(task.fingerprint)")
    done = subprocess.run([sys.executable, "-c", code, name, str(folder)], capture_output=True, text=True, check=True)
    return done.stdout.split()[-1]


def test_fingerprints_of_definitions_with_functions_are_equal_in_every_process(tmp_path: Path) -> None:
    """Their reprs hold addresses; what counts is their text, and that of the helpers in their file."""
    write_task(tmp_path)
    utils = tmp_path / "utils.py"
    helper = "def ask(doc):\n    return 'Do: ' + doc['goal']\n\n\n"
    utils.write_text(helper + "def doc_to_text(doc):\n    return ask(doc)\n")
    definition = tmp_path / "mine.yaml"
    definition.write_text("task: piqa\noutput_type: multiple_choice\ntraining_split: train\n"
                          "validation_split: validation\ndoc_to_text: !function utils.doc_to_text\n"
                          "doc_to_target: label\ndoc_to_choice: '{{[sol1, sol2]}}'\nmetric_list: [{metric: acc}]\n")
    here = get_tasks([str(definition)], data=tmp_path)["piqa"].fingerprint
    assert in_another_process(str(definition), tmp_path) == here
    utils.write_text(utils.read_text().replace("Do: ", "Please: "))
    assert in_another_process(str(definition), tmp_path) != here


def test_fingerprints_depend_on_what_functions_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_task(tmp_path)
    for name, text in (("wording", "from asking import ASK\n"), ("asking", "ASK = 'Do: '\n"), ("other", "A = 1\n"),
                       ("utils", "import json\nfrom wording import ASK\n\n\ndef doc_to_text(doc):\n"
                                 "    return ASK + doc['goal']\n")):
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "mine.yaml").write_text(
        "task: piqa\noutput_type: multiple_choice\ntraining_split: train\nvalidation_split: validation\n"
        "doc_to_text: !function utils.doc_to_text\ndoc_to_target: label\ndoc_to_choice: '{{[sol1, sol2]}}'\n"
        "metric_list: [{metric: acc}]\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT / 'src'}")
    first = in_another_process(str(tmp_path / "mine.yaml"), tmp_path)
    (tmp_path / "other.py").write_text("A = 2\n")
    assert in_another_process(str(tmp_path / "mine.yaml"), tmp_path) == first
    (tmp_path / "asking.py").write_text("ASK = 'Please: '\n")
    assert in_another_process(str(tmp_path / "mine.yaml"), tmp_path) != first


def test_fingerprints_depend_on_what_a_partial_function_is_given() -> None:
    def hashed(*arguments: object) -> str:
        return fingerprint({"process_docs": functools.partial(max, *arguments)}, [], {"test": [{"a": 1}]})

    assert hashed(1) == hashed(1)
    assert hashed(1) != hashed(2)


@pytest.mark.parametrize("name", [*PAPER14, *UNSEEN])
def test_fingerprints_depend_on_no_address(shared: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[bytes] = []
    sha256 = hashlib.sha256

    def noting(data: bytes) -> object:
        hashed.append(data)
        return sha256(data)

    monkeypatch.setattr(hashlib, "sha256", noting)
    assert len(get_tasks([name], data=shared)[name].fingerprint) == 24
    assert b"task" in hashed[-1]
    assert b" at 0x" not in b"".join(hashed)


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
            prompts = one.prompts(split, FewShot(5, 3))
            for prompt in prompts:
                context, continuation = prompt.pairs[prompt.gold]
                assert len(prompt.pairs) == 4
                assert context.count("\n") == 5
                assert context.endswith(f"{prompt.doc['query']} ->")
                assert continuation == " " + prompt.doc["choices"][prompt.doc["gold"]]


def test_metrics_are_lm_evals(tmp_path: Path) -> None:
    found = task(tmp_path)
    prompt = found.prompts("evaluation", FewShot(limit=1))[0]
    # Per character of " Say 1001." (9) and of the longer option (22) the order turns round.
    assert found.metrics(prompt, [(-5.0, False), (-6.0, False)]) == {"acc": 1.0, "acc_norm": 0.0}


def _rewrite(folder: Path, split: str, text: str) -> Path:
    (write_task(folder) / "piqa" / f"{split}.jsonl").write_text(text)
    return folder


@pytest.mark.parametrize(("break_it", "kind", "message"), [
    (lambda f: (f, ["pika"]), TaskError, "did you mean piqa"),
    (lambda f: (f, ["qqqqzzzz"]), TaskError, "no task is named 'qqqqzzzz'"),
    (lambda f: (f, ["./nowhere.yaml"]), TaskError, "no task file"),
    (lambda f: (write_task(f), ["copa"]), DataError, "folder .*copa with .* task 'copa'; .* holds piqa"),
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
            one.prompts("evaluation", FewShot(limit=1))


def test_missing_files_and_splits_are_told(tmp_path: Path) -> None:
    write_task(tmp_path)
    (tmp_path / "piqa" / "train.jsonl").unlink()
    with pytest.raises(HeadcountError, match=r"train"):
        get_tasks(["piqa"], data=tmp_path)["piqa"].prompts("examples")
    with pytest.raises(OptionError, match=r"examples_split is one of train, .* not 'dev'"):
        get_tasks(["piqa"], data=tmp_path, examples_split="dev")
    (tmp_path / "piqa" / "validation.jsonl").unlink()
    with pytest.raises(DataError, match="neither"):
        get_tasks(["piqa"], data=tmp_path)


def test_a_task_without_the_split_names_the_option(tmp_path: Path) -> None:
    found = task(tmp_path)
    found.inner.config.training_split = None
    with pytest.raises(TaskError, match=r"no train split .* choose examples_split='validation' ") as refused:
        found.prompts("examples")
    assert "choose --examples-split validation (" in refused.value.on_command_line()


def test_more_shots_than_documents_are_refused(tmp_path: Path) -> None:
    found = task(tmp_path)
    for split in ("evaluation", "examples"):
        assert found.prompts(split, FewShot(11, 1))
        with pytest.raises(OptionError, match="12 few-shot documents"):
            found.prompts(split, FewShot(12))
    assert found.prompts("evaluation", FewShot(12, shared=True))
    with pytest.raises(OptionError, match=r"ask for fewer shots with num_fewshot"):
        found.prompts("evaluation", FewShot(13, shared=True))


@pytest.mark.parametrize("name", [*PAPER14, *UNSEEN])
def test_every_task_of_the_paper_gives_lm_evals_prompts(shared: Path, name: str) -> None:
    found = get_tasks([name], data=shared)[name]
    assert found.metric == ("em" if name == "record" else "acc")
    for k in (0, 5):
        ours = found.prompts("evaluation", FewShot(k, 12))
        assert [list(p.pairs) for p in ours] == lm_eval_pairs(found, k, 12)
    if name != "lambada_openai":
        assert found.prompts("examples", FewShot(5, 12))


# What a reader of the passage answers, by document.
MULTIRC = {0: "no", 176: "no", 194: "no", 605: "no", 813: "no", 882: "yes", 883: "no", 887: "yes", 889: "yes",
           930: "yes"}
RECORD = {0: ("Tracy Morgan", "Morgan"), 1: ("China",), 2: ("Manchester United", "United"), 4: ("Mar",), 5: ("Lago",),
          6: ("Trump", "Donald Trump"), 7: ("Lago",), 8: ("Lago",), 10: ("Lago",), 11: ("Stephan Siegrist",)}


def test_multircs_gold_is_what_a_reader_answers(shared: Path) -> None:
    prompts = get_tasks(["multirc"], data=shared)["multirc"].prompts("evaluation", FewShot(limit=931))
    for doc_id, verdict in MULTIRC.items():
        prompt = prompts[doc_id]
        _, gold = prompt.pairs[prompt.gold]
        assert gold == f" {prompt.doc['answer']}\nIs the answer correct? {verdict}"
        assert prompt.num_options == 2


def test_records_gold_is_what_a_reader_answers(shared: Path) -> None:
    task = get_tasks(["record"], data=shared)["record"]
    for doc_id, entities in RECORD.items():
        prompt = task.prompts("evaluation", FewShot(limit=12))[doc_id]
        assert prompt.doc["entities"][prompt.gold] in entities
        filled = prompt.doc["query"].replace("@placeholder", prompt.doc["entities"][prompt.gold])
        assert prompt.pairs[prompt.gold][1] == f"   - {filled}"
        right = [i for i in range(prompt.num_options)
                 if task.metrics(prompt, [(float(i == j), False) for j in range(prompt.num_options)])["em"] == 1]
        assert prompt.gold in right
        assert len(right) < prompt.num_options


def test_lm_evals_multirc_has_the_labels_the_wrong_way_round(shared: Path) -> None:
    """When this fails, lm-eval has fixed it and our own definition can go."""
    from headcount.tasks.catalog import _lm_eval

    mistaken, right = (get_tasks([definition], data=shared)["multirc"].prompts("evaluation", FewShot(limit=40))
                       for definition in (str(_lm_eval()[0]["multirc"]), "multirc"))
    assert all(a.pairs[a.gold] != b.pairs[b.gold] for a, b in zip(mistaken, right, strict=True))
    assert all(set(a.pairs) == set(b.pairs) for a, b in zip(mistaken, right, strict=True))


def test_groups_are_expanded() -> None:
    assert expand(["paper14"]) == list(PAPER14)
    assert len(set(PAPER14)) == 14
    assert expand(["paper14-unseen"]) == ["mathqa", "lambada_openai"]
    assert expand(["icl"]) == embedded_tasks()
    assert expand(["copa", "paper14"])[0] == "copa"
    assert len(expand(["copa", "paper14"])) == 14
    # lm-eval's own: a tag, and a group of groups.
    assert expand(["ai2_arc"]) == ["arc_challenge", "arc_easy"]
    assert len(expand(["mmlu"])) == 57


def test_every_name_of_lm_evals_index_is_found() -> None:
    from lm_eval.tasks import TaskManager

    from headcount.tasks.catalog import _lm_eval

    ours, grouped = _lm_eval()
    index = TaskManager().task_index
    assert {name for name, entry in index.items() if entry.kind.name in ("TASK", "PY_TASK")} <= ours.keys()
    assert {name for name, entry in index.items() if entry.kind.name in ("GROUP", "TAG")} <= grouped | ours.keys()


BARE = [{"context": f"The number after {i} is", "options": [str(i + 1), str(i)], "gold": 0, "source": "counting"}
        for i in range(6)]


def bare(path: Path, docs: list[dict[str, object]] = BARE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf-8")
    return path


def test_bare_documents_by_folder_by_data_and_by_file(tmp_path: Path) -> None:
    bare(tmp_path / "after" / "train.jsonl")
    bare(tmp_path / "after" / "validation.jsonl", BARE[:4])
    by_folder = get_tasks([str(tmp_path / "after")])["after"]
    by_data = get_tasks(["after"], data=tmp_path)["after"]
    for found in (by_folder, by_data):
        prompts = found.prompts("evaluation", FewShot(2))
        assert [p.gold for p in prompts] == [0] * 4
        assert [c for _, c in prompts[3].pairs] == [" 4", " 3"]
        assert prompts[3].pairs[0][0].endswith("\n\nThe number after 3 is")
        assert len(found.documents("examples")) == 6
        assert found.notes == ()
    assert by_folder.fingerprint == by_data.fingerprint
    alone = get_tasks([str(bare(tmp_path / "counting.jsonl"))])["counting"]
    assert len(alone.documents("evaluation")) == 6
    with pytest.raises(TaskError, match=r"folder with train.jsonl and validation.jsonl, .* instead of counting.jsonl; "
                                        r"or choose examples_split='validation' "):
        alone.documents("examples")
    for prompt in alone.prompts("evaluation", FewShot(5)):
        assert prompt.pairs[0][0].count(f"after {prompt.doc_id} is") == 1, "not among its own shots"


@pytest.mark.parametrize(("doc", "said"), [
    ({"context": "a", "options": ["b"]}, "no gold"),
    ({"context": 3, "options": ["b"], "gold": 0}, "context is a text"),
    ({"context": "a", "options": [], "gold": 0}, "options is a list"),
    ({"context": "a", "options": "b", "gold": 0}, "options is a list"),
    ({"context": "a", "options": ["b", " "], "gold": 0}, "options is a list"),
    ({"context": "a", "options": ["b"], "gold": 1}, "0 to 0, not 1"),
    ({"context": "a", "options": ["b", "c"], "gold": "c"}, "0 to 1, not \"c\""),
    ({"context": "a", "options": ["b", "c"], "gold": True}, "0 to 1, not true"),
])
def test_malformed_bare_documents_are_told_by_line(tmp_path: Path, doc: dict[str, object], said: str) -> None:
    path = bare(tmp_path / "mine.jsonl", [BARE[0], doc])
    with pytest.raises(DataError, match=r"mine\.jsonl, line 2: .*") as error:
        get_tasks([str(path)])
    assert said in str(error.value)


def test_whether_one_answer_can_be_given_to_all_documents(tmp_path: Path) -> None:
    own: list[dict[str, object]] = [{"context": str(i), "options": [f"a{i}", "b"], "gold": 0} for i in range(3)]
    assert constant_answer(get_tasks([str(bare(tmp_path / "own.jsonl", own))])["own"], 3) == (0, [1])
    same = [{**doc, "options": ["yes", "no"]} for doc in own]
    assert constant_answer(get_tasks([str(bare(tmp_path / "same.jsonl", same))])["same"], 3) == (1, [0, 1])
    # By the answer's text, wherever it stands, and without what is the document's own.
    mixed = [{"context": "a", "options": ["so yes", "so no"], "gold": 0},
             {"context": "b", "options": ["but no", "but yes"], "gold": 1},
             {"context": "c", "options": ["yes", "no", "maybe"], "gold": 1}]
    task = get_tasks([str(bare(tmp_path / "mixed.jsonl", mixed))])["mixed"]
    assert constant_answer(task, 3) == (pytest.approx(2 / 3), [])
    assert constant_answer(get_tasks(["icl_plural"])["icl_plural"], 60) == (0, [])


def test_a_constant_answer_to_a_question_is_right_when_it_is_to_all_its_answers(shared: Path) -> None:
    task = get_tasks(["multirc"], data=shared, protocol="paper")["multirc"]
    wholes: dict[object, list[int]] = {}
    for prompt in task.prompts("evaluation", FewShot(limit=100)):
        wholes.setdefault((prompt.doc["idx"]["paragraph"], prompt.doc["idx"]["question"]), []).append(prompt.gold)
    best = max(sum(set(gold) == {answer} for gold in wholes.values()) for answer in (0, 1))
    assert constant_answer(task, 100) == (pytest.approx(best / len(wholes)), [0, 1])


@pytest.mark.parametrize("name", ["multirc", "boolq", "winogrande", "lambada_openai", "copa"])
def test_constant_answers_to_the_papers_tasks(shared: Path, name: str) -> None:
    task = get_tasks([name], data=shared)[name]
    found, places = constant_answer(task, 100)
    assert places == ([0, 1] if name in ("multirc", "boolq") else [])
    if name in ("multirc", "boolq"):
        gold = [prompt.gold for prompt in task.prompts("evaluation", FewShot(limit=100))]
        assert found == pytest.approx(np.bincount(gold).max() / 100)
    else:
        assert found == 0


def test_a_task_whose_metric_is_no_number_per_document_is_refused(tmp_path: Path) -> None:
    write_task(tmp_path)
    definition = tmp_path / "f1.yaml"
    definition.write_text("task: piqa\noutput_type: multiple_choice\nvalidation_split: validation\ndoc_to_text: goal\n"
                          "doc_to_target: label\ndoc_to_choice: '{{[sol1, sol2]}}'\nmetric_list: [{metric: f1}]\n")
    with pytest.raises(TaskError, match="measures f1; headcount needs"):
        get_tasks([str(definition)], data=tmp_path)["piqa"].prompts("evaluation", FewShot(limit=1))


def test_what_a_task_offers_is_told(shared: Path) -> None:
    record = describe("record", shared)
    assert (record.name, record.sizes, record.evaluated) == ("record", {"train": 82, "validation": 133}, "validation")
    assert (record.fewest, record.most, record.metric, record.absent) == (4, 23, "em", "")
    assert record.chance == pytest.approx(0.105, abs=1e-3)
    assert len(record.notes) == 1
    produced = describe("lambada_openai", shared)
    assert (produced.evaluated, produced.most, produced.chance) == ("test", 0, 0.0)
    assert "--data" in describe("copa").absent


def test_tasks_are_named_by_paths_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bare(tmp_path / "mytask" / "validation.jsonl")
    bare(tmp_path / "one.jsonl")
    assert list(get_tasks(Path("mytask"))) == ["mytask"]
    assert list(get_tasks([Path("mytask"), Path("one.jsonl"), tmp_path / "mytask" / "validation.jsonl"])) == [
        "mytask", "one", "validation"]
    with pytest.raises(TaskError, match=r"there is no folder \./absent"):
        get_tasks(Path("absent"))


def test_a_definitions_metadata_may_hold_anything(tmp_path: Path) -> None:
    """lm-eval gives it to the function that reads local files."""
    write_task(tmp_path)
    definition = tmp_path / "mine.yaml"
    definition.write_text("task: piqa\noutput_type: multiple_choice\nvalidation_split: validation\ndoc_to_text: goal\n"
                          "doc_to_target: label\ndoc_to_choice: '{{[sol1, sol2]}}'\nmetric_list: [{metric: acc}]\n"
                          "metadata: {version: 2, author: me, note: mine alone}\n")
    assert "mine alone" in get_tasks([str(definition)], data=tmp_path)["piqa"].notes


def test_what_is_no_name_is_told() -> None:
    """In a process of its own: here types are checked before the package sees them."""
    code = """
import headcount as hc
for given in (None, 3, ["icl_plural", None]):
    try:
        hc.get_tasks(given)
    except hc.HeadcountError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    told = "tasks are named by strings or paths, such as 'piqa' or './my-task', not "
    assert done.stdout.splitlines() == [told + "None", told + "3", told + "None"]


def test_importance_of_evaluated_documents_is_told(tmp_path: Path) -> None:
    """On request it is measured there; whoever reads the results must know."""
    for folder in (tmp_path / "bare", write_task(tmp_path / "lm")):
        if folder.name == "bare":
            found = [get_tasks([str(bare(folder / "counting.jsonl"))], examples_split=s)["counting"]
                     for s in ("train", "validation")]
            with pytest.raises(TaskError, match=r"examples_split='validation' .then importance is measured on the"):
                found[0].documents("examples")
        else:
            found = [get_tasks(["piqa"], data=folder, examples_split=s)["piqa"] for s in ("train", "validation")]
        assert [any("documents that are evaluated" in note for note in one.notes) for one in found] == [False, True]


@pytest.mark.parametrize(("text", "utils", "message"), [
    ("task: [mine\n", "", "cannot be read .ParserError"),
    ("process_docs: !function utils.process\n", "def process(docs:\n", "cannot be read .SyntaxError"),
    ("doc_to_text: 'Do: {{ goal '\n", "", "TemplateSyntaxError"),
])
def test_a_definition_that_cannot_be_read(tmp_path: Path, text: str, utils: str, message: str) -> None:
    (tmp_path / "utils.py").write_text(utils)
    definition = tmp_path / "mine.yaml"
    whole = ("task: piqa\noutput_type: multiple_choice\nvalidation_split: validation\ndoc_to_target: label\n"
             "doc_to_choice: '{{[sol1, sol2]}}'\nmetric_list: [{metric: acc}]\n")
    definition.write_text(whole + ("" if "doc_to_text" in text else "doc_to_text: '{{goal}}'\n") + text)
    with pytest.raises(HeadcountError, match=message):
        get_tasks([str(definition)], data=write_task(tmp_path / "data"))["piqa"].prompts("evaluation")


def test_files_in_another_encoding_are_named(tmp_path: Path) -> None:
    path = bare(tmp_path / "counting.jsonl")
    path.write_bytes(path.read_bytes() + '{"context": "caf\u00e9"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match=r"counting.jsonl is not UTF-8"):
        get_tasks([str(path)])



@pytest.mark.parametrize(("text", "message"), [
    ('{"context": "1 2", "options": ["3"]}\n', "line 1: no gold; a document has context, options and gold"),
    ("", "is empty"),
    ('{"context": "1", "options": ["2"], "gold": 0}\n{"context": "\\uD83D", "options": ["2"], "gold": 0}\n',
     "line 2: half of a surrogate pair"),
])
def test_slips_in_ones_own_documents_are_told(tmp_path: Path, text: str, message: str) -> None:
    """In the first line too, which says nothing else of what they are."""
    for place in (tmp_path / "counting.jsonl", tmp_path / "counting" / "validation.jsonl"):
        place.parent.mkdir(exist_ok=True)
        place.write_text(text)
        with pytest.raises(DataError, match=message):
            get_tasks(str(place if place.parent == tmp_path else place.parent))


def test_documents_of_a_windows_editor_are_read(tmp_path: Path) -> None:
    path = bare(tmp_path / "counting.jsonl")
    path.write_bytes("\ufeff".encode() + path.read_bytes())
    assert len(get_tasks(str(path))["counting"].documents("evaluation")) == 6


@pytest.mark.parametrize(("num_fewshot", "limit"), [(0, 0), (2, -3), (-1, None)])
def test_what_is_asked_is_checked_where_it_is_made(num_fewshot: int, limit: int | None) -> None:
    with pytest.raises(OptionError, match=f"limit at least 1, not {num_fewshot} and {limit}$"):
        FewShot(num_fewshot, limit)
    assert FewShot(2, 5) == FewShot(num_fewshot=2, limit=5, seed=1234, shared=False)


def test_answers_that_are_produced_have_no_options(shared: Path, tmp_path: Path) -> None:
    assert get_tasks("lambada_openai", data=shared)["lambada_openai"].num_options.max() == 0
    one = get_tasks(str(bare(tmp_path / "one.jsonl", [{"context": "1 2", "options": ["3"], "gold": 0}] * 2)))["one"]
    assert one.num_options.tolist() == [1, 1]
