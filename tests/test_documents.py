"""Documents pass one door: all fields of all lines, each document itself alone, and what does not fit is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest

from headcount.errors import DataError, OptionError
from headcount.tasks.fewshot import FewShot
from headcount.tasks.load import get_tasks
from headcount.tasks.missing import lacking, nulls
from headcount.tasks.task import Task
from tiny import write_task

Rows = list[dict[str, Any]]
MINE = """task: mine
output_type: multiple_choice
training_split: train
validation_split: validation
doc_to_text: "Q: {{q}}\\nA:"
doc_to_target: gold
doc_to_choice: options
metric_list: [{metric: acc}]
"""


def rows(n: int = 6, start: int = 0) -> Rows:
    return [{"q": f"number {i}?", "options": [f"yes {i}", f"no {i}"], "gold": i % 2} for i in range(start, start + n)]


def write(path: Path, docs: Sequence[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{doc if isinstance(doc, str) else json.dumps(doc)}\n" for doc in docs), encoding="utf-8")
    return path


def mine(folder: Path, validation: Sequence[object] = (), train: Sequence[object] = (), *, more: str = "",
         change: Callable[[str], str] = lambda text: text, utils: str = "", protocol: str = "sound") -> Task:
    """A task of a YAML file of one's own, with local documents."""
    write(folder / "mine" / "train.jsonl", train or rows())
    write(folder / "mine" / "validation.jsonl", validation or rows(start=100))
    (folder / "utils.py").write_text(utils)
    (folder / "mine.yaml").write_text(change(MINE) + more)
    return get_tasks([str(folder / "mine.yaml")], data=folder, protocol=protocol)["mine"]  # type: ignore[arg-type]


def hinted(text: str) -> str:
    return text.replace('"Q: ', '"{% if hint %}Hint: {{hint}}\\n{% endif %}Q: ')


# How lines are read.

def test_fields_that_the_first_line_lacks_are_read(tmp_path: Path) -> None:
    docs = [doc | ({"hint": f"h{i}"} if i else {}) for i, doc in enumerate(rows(4))]
    found = mine(tmp_path, docs, change=hinted)
    assert [p.pairs[0][0] for p in found.prompts("evaluation")] == [
        ("" if i == 0 else f"Hint: h{i}\n") + f"Q: number {i}?\nA:" for i in range(4)]


@pytest.mark.parametrize("values", [
    [{"a": 1}, {"b": "x"}], [{"a": [1]}, {"a": []}, {}], [{"a": 1}, {"a": 2.5}], [{"a": None}, {}],
    [{"a": {"b": 1}}, {"a": None}, {}], [{"a": ["x", None]}, {"a": []}], [{"a": math.nan}, {"a": 1.0}],
    [{"a": [{"b": 1}]}, {"a": []}],
])
def test_lines_are_read_as_datasets_reads_them(tmp_path: Path, values: Rows) -> None:
    docs = [doc | {"more": i} | value for i, (doc, value) in enumerate(zip(rows(), values, strict=False))]
    found = mine(tmp_path, docs).inner.dataset["validation"]
    theirs = datasets.load_dataset("json", data_files=str(tmp_path / "mine" / "validation.jsonl"), split="train",
                                   cache_dir=str(tmp_path / "cache"))
    assert found.features == theirs.features
    assert json.dumps(list(found)) == json.dumps(list(theirs)), "NaN is equal to itself as text alone"


def test_structures_have_the_fields_of_all_lines(tmp_path: Path) -> None:
    docs = [doc | {"idx": {"a": 1} if i else {"b": "x"}} for i, doc in enumerate(rows(2))]
    assert [doc["idx"] for doc in mine(tmp_path, docs).documents("evaluation")] == [{"a": None, "b": "x"},
                                                                                   {"a": 1, "b": None}]


@pytest.mark.parametrize(("third", "said"), [
    ('{"q": "a", "q": "b"}', "line 4: field 'q' stands there twice"),
    ('{"q": {"a": 1, "b": 2, "a": 1}}', "line 4: field 'a' stands there twice"),
    ('{"q": ' * 3000 + "1" + "}" * 3000, "line 4: nested too deeply"),
    ('{"n": "x"}', "line 4: field 'n' differs in its type"),
    ('{"n": 1.5, "options": [3]}', "line 4: field 'options' differs in its type"),
    (f'{{"n": {2**70}}}', "line 4: field 'n' differs in its type from the lines before, or is no value of a table"),
    ('{"n": true}', "line 4: field 'n'"),
])
def test_lines_that_make_no_table_are_told(tmp_path: Path, third: str, said: str) -> None:
    first = [doc | {"n": 1} for doc in rows(3)]
    with pytest.raises(DataError) as refused:
        mine(tmp_path, [first[0], "", first[1], third, first[2]])
    assert f"validation.jsonl, {said}" in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


# Which document is which.

def sees(context: str, doc: dict[str, Any]) -> int:
    return context.count(f"{doc['q']}\nA:")


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("protocol", ["sound", "paper"])
@pytest.mark.parametrize("value", [1.0, math.nan])
def test_a_document_with_nan_is_not_among_its_own_shots(
    tmp_path: Path, value: float, protocol: str, shared: bool
) -> None:
    docs = [doc | {"score": value} for doc in rows()]
    write(tmp_path / "mine" / "validation.jsonl", docs)
    # Of one file, whose documents are their own shots; and of training documents.
    alone = mine(tmp_path, docs, docs, change=lambda text: text.replace("training_split: train\n", ""),
                 protocol=protocol)
    few_shot = FewShot(3, shared=shared)
    prompts = alone.prompts("evaluation", few_shot)
    assert all(sees(p.pairs[0][0], p.doc) == 1 for p in prompts)  # type: ignore[arg-type]
    assert len(prompts) == alone.size("evaluation", few_shot) == (3 if shared else 6)
    if protocol == "sound" or shared:
        trained = mine(tmp_path / "b", docs, docs, protocol=protocol)
        prompts = trained.prompts("examples", few_shot)
        assert all(sees(p.pairs[0][0], p.doc) == 1 for p in prompts)  # type: ignore[arg-type]
        assert len(prompts) == trained.size("examples", few_shot) == (3 if shared else 6)


def test_nan_changes_no_draw(tmp_path: Path) -> None:
    plain, odd = ([p.pairs for p in mine(tmp_path / str(value), *[[d | {"score": value} for d in rows(8, start)]
                                                                 for start in (100, 0)]).prompts(split, FewShot(3))]
                  for value in (1.0, math.nan) for split in ("examples",))
    assert plain == odd


def test_duplicates_are_documents_like_others(tmp_path: Path) -> None:
    docs = [*[rows(1)[0]] * 4, *rows(2, 1)]
    found = mine(tmp_path, docs, docs)
    for split in ("evaluation", "examples"):
        prompts = found.prompts(split, FewShot(5))  # type: ignore[arg-type]
        assert [p.doc_id for p in prompts] == list(range(6))
        # All others: of four equal documents, the three others.
        assert [sees(p.pairs[0][0], docs[0]) for p in prompts] == [4, 4, 4, 4, 4, 4]
        assert len(found.prompts(split, FewShot(2, shared=True))) == 4  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="6 shots cannot be drawn from the 6"):
        found.prompts("evaluation", FewShot(6))


def test_a_document_of_another_split_is_left_out_by_its_fields_as_lm_eval_does(tmp_path: Path) -> None:
    train = rows(4)
    found = mine(tmp_path, [*rows(2, 100), train[2]], train)
    assert sees(found.prompts("evaluation", FewShot(3))[2].pairs[0][0], train[2]) == 1
    with pytest.raises(OptionError, match=r"fewer than 3 few-shot documents differ from document 2; ask for fewer"):
        mine(tmp_path / "b", [*rows(2, 100), train[2]], [train[2], *train[1:]]).prompts("evaluation", FewShot(3))


def test_a_filtered_pool_knows_its_documents_again(tmp_path: Path) -> None:
    """`fewshot_config` may draw from a part of the split that is evaluated."""
    docs = [doc | {"score": math.nan} for doc in rows(10, 100)]
    utils = "def some(dataset):\n    return dataset.filter(lambda doc: doc['gold'] == 1)\n"
    found = mine(tmp_path, docs, more="fewshot_config: {split: validation, process_docs: !function utils.some}\n",
                 utils=utils)
    prompts = found.prompts("evaluation", FewShot(3))
    assert all(sees(p.pairs[0][0], p.doc) == 1 for p in prompts)  # type: ignore[arg-type]
    assert len(found.prompts("evaluation", FewShot(3, shared=True))) == 7


# Fields that a prompt needs.

@pytest.mark.parametrize("gone", ["absent", "null"])
@pytest.mark.parametrize(("task", "field"), [("boolq", "question"), ("piqa", "goal"), ("multirc", "answer"),
                                             ("rte", "sentence2"), ("copa", "premise"), ("openbookqa", "choices"),
                                             ("winogrande", "option2"), ("arc_easy", "answerKey"), ("wic", "end1"),
                                             ("wsc", "span2_index"), ("copa", "label")])
def test_a_missing_field_of_a_task_is_told_by_file_and_line(shared: Path, tmp_path: Path, task: str, field: str,
                                                            gone: str) -> None:
    for split in ("train", "validation"):
        lines = (shared / task / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[:8]
        docs = [json.loads(line) for line in lines]
        docs[4].pop(field)
        write(tmp_path / split / task / f"{split}.jsonl", [docs[0], "", *docs[1:4],
                                                           docs[4] | ({field: None} if gone == "null" else {})])
        other = "validation" if split == "train" else "train"
        write(tmp_path / split / task / f"{other}.jsonl", lines)
    said = rf"{task}/%s.jsonl, line 6: .*{field}"
    with pytest.raises(DataError, match=said % "validation"):
        get_tasks([task], data=tmp_path / "validation")[task].prompts("evaluation")
    trained = get_tasks([task], data=tmp_path / "train")[task]
    with pytest.raises(DataError, match=said % "train"):
        trained.prompts("evaluation", FewShot(5, 1, shared=True))
    with pytest.raises(DataError, match=said % "train"):
        trained.prompts("examples")


@pytest.mark.parametrize("text", [
    '"Q: {{q}}\\nA:"', '"{% if hint %}{{hint}} {% endif %}{{q}}"', '"{{ hint or \'\' }}{{q}} None"',
    '"{% if hint is none %}-{% else %}{{hint}}{% endif %}"', "!function utils.text",
    '"{% if score != score %}no financial data{% else %}{{score}} dollars{% endif %}"',
    '"{% if at is none %}{{q}}{% else %}{{q[at:]}}{% endif %}"', '"{% if at %}{{q[at:]}}{% else %}all{% endif %}"',
])
def test_a_missing_field_that_the_prompt_does_without_is_no_error(tmp_path: Path, text: str) -> None:
    docs = [doc | {"hint": "yes" if i == 1 else None, "never": None, "at": None if i else 3,
                   "score": math.nan if i == 4 else 1.5} for i, doc in enumerate(rows())]
    found = mine(tmp_path, docs, docs, utils="def text(doc):\n    return (doc['hint'] or '') + doc['q'] + ' nullify'\n",
                 change=lambda yaml: yaml.replace('"Q: {{q}}\\nA:"', text))
    assert len(found.prompts("evaluation", FewShot(2))) == len(found.prompts("examples")) == 6


@pytest.mark.parametrize(("value", "text", "field"), [
    (None, "{{hint}}", "hint"), (math.nan, "{{hint}}", "hint"), (None, "{{hint|upper}}", "hint"),
    (None, "{{hint[:3]}}", "hint"), (None, "{{'x' + hint}}", "hint"), (None, "{{hint|tojson}}", "hint"),
    (None, "{{hint ~ ' None'}}", "hint"), (None, "{{ '%.1f' % hint }}", "hint"),
    (math.nan, "{{ '%.1f' % hint }}", "hint"), (None, "{{q[hint:]}}", "hint"), (None, "{{q.split()[:hint]}}", "hint"),
    ([1.5, math.nan], "{{hint[1]}}", "hint[1]"), (["a", None], "{{hint|join}}", "hint[1]"),
    (["a", None], "{{hint}}", "hint[1]"), ({"a": {"b": None}}, "{{hint.a.b}}", "hint.a.b"),
    ({"a": None}, "{{hint.a.b}}", "hint"), ({"a": ["x", None]}, "{{hint}}", "hint.a[1]"),
    # Filled up to a width, and computed with.
    (None, "{{'%-9s'|format(hint)}}", "hint"), (None, "{{hint|string|center(12)}}", "hint"),
    (math.nan, "{{hint * 100}}%", "hint"), (math.nan, "{{'%.2f' % (hint / 3)}}", "hint"),
])
def test_a_field_that_the_prompt_needs_is_named(tmp_path: Path, value: object, text: str, field: str) -> None:
    docs: Rows = [doc | {"hint": value if i == 2 else None, "never": None} for i, doc in enumerate(rows())]
    found = mine(tmp_path, docs, docs, change=lambda yaml: yaml.replace("Q: {{q}}", f"{{% if q == 'number 2?' %}}{text}"
                                                                                     "{% endif %}{{q}}"))
    with pytest.raises(DataError, match=r"validation.jsonl, line 3: .*hint") as refused:
        found.prompts("evaluation")
    assert field in str(refused.value)
    assert found.prompts("evaluation", FewShot(0, 2))


@pytest.mark.parametrize(("part", "field"), [
    ("doc_to_choice: '{{[options[0], options[1], hint]}}'\n", "hint"), ("gen_prefix: '{{hint}}'\n", "hint"),
    ("description: '{{hint}}'\n", "hint"), ("doc_to_target: '{{hint}}'\n", "hint"),
    ("doc_to_choice: never\n", "never[1]"),
])
def test_every_part_of_a_prompt_is_looked_at(tmp_path: Path, part: str, field: str) -> None:
    docs = [doc | {"hint": None if i == 2 else str(i % 2), "never": ["x", None if i == 2 else "y"]}
            for i, doc in enumerate(rows())]
    named = part.partition(":")[0]
    found = mine(tmp_path, docs, more=part, change=lambda yaml: "".join(
        line for line in yaml.splitlines(keepends=True) if not line.startswith(named)))
    with pytest.raises(DataError) as refused:
        found.prompts("evaluation")
    assert f"validation.jsonl, line 3: field {field!r} is missing, null" in str(refused.value)


def test_a_wrong_option_that_is_missing_is_no_part_of_a_shot(tmp_path: Path) -> None:
    train = [{"q": f"{i}?", "options": ["yes", None], "gold": 0} for i in range(4)]
    assert mine(tmp_path, train=train).prompts("evaluation", FewShot(3))
    with pytest.raises(DataError, match=r"train.jsonl, line 1: field 'options\[1\]'"):
        mine(tmp_path, train=train).prompts("examples")


def test_what_a_definition_makes_of_a_missing_field_is_told(tmp_path: Path) -> None:
    utils = ("def made(dataset):\n    return dataset.map(lambda doc: {'query': f\"{doc['hint']}: {doc['q']}\"})\n\n\n"
             "def fewer(dataset):\n    return made(dataset.select(range(1, len(dataset))))\n")
    docs = [doc | {"hint": None if i == 2 else f"h{i}", "never": None} for i, doc in enumerate(rows())]
    for process, place in (("made", r"validation.jsonl, line 3: field 'hint'"), ("fewer", None)):
        found = mine(tmp_path / process, docs, docs, utils=utils, more=f"process_docs: !function utils.{process}\n",
                     change=lambda yaml: yaml.replace("{{q}}", "{{query}}"))
        if place:
            with pytest.raises(DataError, match=place):
                found.prompts("evaluation")
    # Where documents were left out, no line is told rather than a wrong one.
    docs[3]["gold"] = 7
    found = mine(tmp_path / "moved", docs, docs, utils=utils, more="process_docs: !function utils.fewer\n")
    with pytest.raises(DataError, match=r"^document 2 of the validation split of task 'mine': the answer is 7"):
        found.prompts("evaluation")


def test_a_folder_without_validation_documents_tells_its_lines(tmp_path: Path) -> None:
    docs = [doc | {"gold": -1} for doc in rows()]
    mine(tmp_path)
    write(tmp_path / "mine" / "test.jsonl", docs)
    (tmp_path / "mine" / "validation.jsonl").unlink()
    (tmp_path / "mine.yaml").write_text(MINE.replace("validation", "test"))
    with pytest.raises(DataError, match=r"test.jsonl, line 1: the answer is -1"):
        get_tasks([str(tmp_path / "mine.yaml")], data=tmp_path)["mine"].prompts("evaluation", FewShot(2))


def test_a_prompt_that_is_the_name_of_no_field_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"have no field 'question', which its definition names; they have q, o"):
        mine(tmp_path, change=lambda yaml: yaml.replace('"Q: {{q}}\\nA:"', "question"))


def test_a_split_that_a_definition_reads_and_lacks_is_named(tmp_path: Path) -> None:
    folder = write_task(tmp_path) / "piqa"
    (folder / "train.jsonl").unlink()
    with pytest.raises(DataError, match=r"piqa has no train\.jsonl, and the definition of task 'piqa' reads"):
        get_tasks(["piqa"], data=tmp_path)


def test_the_first_gap_is_told_where_a_definition_cannot_be_loaded(tmp_path: Path) -> None:
    utils = "def made(dataset):\n    return dataset.map(lambda doc: {'q': doc['q'].strip()})\n"
    docs = rows()
    docs[3].pop("q")
    with pytest.raises(DataError, match=r"AttributeError.*validation.jsonl, line 4, has no value of 'q'$"):
        mine(tmp_path, docs, utils=utils, more="process_docs: !function utils.made\n")
    with pytest.raises(DataError, match=r"IndexError.*; compare the documents with it, such as .*, line 2$"):
        mine(tmp_path / "b", ["", *[doc | {"gold": 9} for doc in rows()]])


# Answers.

@pytest.mark.parametrize(("gold", "said"), [
    (-1, "the answer is -1, and its 2 options are 0 to 1"), (2, "the answer is 2, "), (9, "the answer is 9, "),
    ("1", "the answer '1' is none of its 2 options"), ("maybe", "the answer 'maybe' is none"),
    (1.0, "index or text, not 1.0"), ([0], r"index or text, not \[0\]"), ([], r"not \[\]"),
])
def test_an_answer_that_is_no_option_is_told_of_documents_examples_and_shots(
    tmp_path: Path, gold: object, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    one_type = {str: "no 0", float: 0.0, list: [1]}.get(type(gold), 0)
    docs = [doc | {"gold": gold if i == 3 else one_type, "options": ["yes", "no 0"]} for i, doc in enumerate(rows(5))]
    if isinstance(gold, int | str):  # the others are wrong from the first document on
        with pytest.raises(DataError, match=f"validation.jsonl, line 4: {said}"):
            mine(tmp_path / "a", docs).prompts("evaluation")
        for split, few_shot in (("examples", FewShot()), ("evaluation", FewShot(4))):
            with pytest.raises(DataError, match=f"train.jsonl, line 4: {said}"):
                mine(tmp_path / "b", train=docs).prompts(split, few_shot)  # type: ignore[arg-type]
    else:
        with pytest.raises(DataError, match=r"train.jsonl, line \d: .*"):
            mine(tmp_path / "c", train=docs).prompts("evaluation", FewShot(4))
    assert "Label index" not in capfd.readouterr().err


def test_answers_of_other_kinds_are_taken(tmp_path: Path) -> None:
    for name, kind in (("bool", lambda i: bool(i % 2)), ("text", lambda i: ["yes", "no"][i % 2])):
        docs = [doc | {"gold": kind(i), "options": ["yes", "no"]} for i, doc in enumerate(rows())]
        prompts = mine(tmp_path / name, docs, docs).prompts("evaluation", FewShot(2))
        assert [p.gold for p in prompts] == [0, 1] * 3
        assert prompts[0].pairs[0][0].count("A: yes") + prompts[0].pairs[0][0].count("A: no") == 2
    several = [doc | {"gold": [i % 2, 1]} for i, doc in enumerate(rows())]
    assert [p.gold for p in mine(tmp_path / "several", several).prompts("evaluation")] == [0, 1] * 3
    several[2]["gold"] = [0, -1]
    with pytest.raises(DataError, match=r"validation.jsonl, line 3: the answer is -1"):
        mine(tmp_path / "wrong", several).prompts("evaluation")


@pytest.mark.parametrize(("label", "said"), [(-1, "-1"), (2, "2"), ("0", "'0'"), (None, "null")])
def test_a_label_that_a_definition_takes_for_any_other_is_told(
    shared: Path, tmp_path: Path, label: object, said: str
) -> None:
    """COPA's answer is the second choice unless the label is 0."""
    docs = [json.loads(line) for line in (shared / "copa" / "train.jsonl").read_text().splitlines()[:6]]
    write(tmp_path / "copa" / "validation.jsonl", docs)
    wrong = [doc | {"label": label} if isinstance(label, str) or i == 3 else doc for i, doc in enumerate(docs)]
    write(tmp_path / "copa" / "train.jsonl", wrong)
    copa = get_tasks(["copa"], data=tmp_path)["copa"]
    for split, shots in (("examples", 0), ("evaluation", 5)):
        with pytest.raises(DataError, match=rf"train.jsonl, line \d: 'label' is {said}, and no option's index"):
            copa.prompts(split, FewShot(shots))  # type: ignore[arg-type]


@pytest.mark.parametrize("target", ["{{options[gold]}}", "{{options[gold - 1]}}", "!function utils.answer"])
def test_a_label_that_python_counts_from_the_end_is_told(tmp_path: Path, target: str) -> None:
    first = 1 if "- 1" in target else 0
    docs = [doc | {"gold": first - 1 if i == 3 else i % 2 + first, "year": 0} for i, doc in enumerate(rows())]
    found = mine(tmp_path, docs, docs, utils="def answer(doc):\n    return doc['options'][doc['gold']]\n",
                 change=lambda yaml: yaml.replace("doc_to_target: gold", f"doc_to_target: {target}" if "util" in target
                                                  else f'doc_to_target: "{target}"'))
    for split, shots, name in (("evaluation", 0, "validation"), ("examples", 0, "train"), ("evaluation", 5, "train")):
        with pytest.raises(DataError, match=rf"{name}.jsonl, line 4: 'gold' is {first - 1}, with which Python counts"):
            found.prompts(split, FewShot(shots, 1 if shots else None))  # type: ignore[arg-type]


@pytest.mark.parametrize("target", [
    "{{stars % 2}}", "{{options[stars % 2]}}", "{{options[(stars > 0)|int]}}", "{{[0, 1, 0, 1, 0, 1][stars]}}",
    "{{options[[0, 1, 0, 0, 1, 1][stars]]}}", "{{ {0: 0, 1: 1, 2: 0, 3: 1, 4: 0, 5: 0}[stars] }}"])
def test_numbers_that_wrap_around_on_purpose_are_labels(tmp_path: Path, target: str) -> None:
    docs = [doc | {"stars": i} for i, doc in enumerate(rows())]
    found = mine(tmp_path, docs, docs, change=lambda yaml: yaml.replace("doc_to_target: gold",
                                                                        f'doc_to_target: "{target}"'))
    assert len(found.prompts("evaluation", FewShot(5))) == 6


def test_an_answer_may_depend_on_a_number_that_is_no_label(tmp_path: Path) -> None:
    target = "doc_to_target: \"{{ options[0] if stars > 3 else options[1] }}\"\n"
    docs = [doc | {"stars": i, "year": -i} for i, doc in enumerate(rows())]
    found = mine(tmp_path, docs, docs, change=lambda yaml: yaml.replace("doc_to_target: gold\n", target))
    assert [p.gold for p in found.prompts("evaluation", FewShot(5))] == [1, 1, 1, 1, 0, 0]


def test_the_last_option_is_not_right_where_the_label_is_none(tmp_path: Path) -> None:
    """lm-eval's exact_match takes label -1 for the last option."""
    docs = [doc | {"gold": -1 if i == 1 else 0} for i, doc in enumerate(rows())]
    with pytest.raises(DataError, match="line 2: the answer is -1"):
        mine(tmp_path, docs, change=lambda yaml: yaml.replace("acc", "exact_match")).prompts("evaluation")


@pytest.mark.parametrize(("field", "value"), [("answer", "3"), ("answer", ""), ("answer", None), ("sentence", None)])
def test_tasks_with_several_contexts_are_checked_too(shared: Path, tmp_path: Path, field: str, value: object) -> None:
    docs = [json.loads(line) for line in (shared / "winogrande" / "train.jsonl").read_text().splitlines()[:6]]
    write(tmp_path / "winogrande" / "validation.jsonl", docs)
    docs[4] = docs[4] | {field: value}
    write(tmp_path / "winogrande" / "train.jsonl", docs)
    with pytest.raises(DataError, match=rf"train.jsonl, line 5: .*{field if value is None else ''}"):
        get_tasks(["winogrande"], data=tmp_path)["winogrande"].prompts("evaluation", FewShot(5))


def test_answers_that_are_produced_are_checked_too(tmp_path: Path) -> None:
    def produced(yaml: str) -> str:
        return yaml.replace("multiple_choice", "loglikelihood").replace("doc_to_choice: options\n", "")

    for value, said in ((None, "field 'gold' is missing"), (" text", "")):
        docs = [doc | {"gold": value if i == 2 else f" {i}"} for i, doc in enumerate(rows())]
        for found, split, shots, file in ((mine(tmp_path, docs, change=produced), "evaluation", 0, "validation"),
                                          (mine(tmp_path, train=docs, change=produced), "examples", 5, "train")):
            if said:
                with pytest.raises(DataError, match=rf"{file}.jsonl, line 3: {said}"):
                    found.prompts(split, FewShot(shots))  # type: ignore[arg-type]
            elif file == "validation":
                assert len(found.prompts(split, FewShot(shots))) == 6  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"validation.jsonl, line 1: the continuation is a text, not 0"):
        mine(tmp_path, change=produced).prompts("evaluation")


def test_wscs_training_documents_without_a_label_are_not_passed_over(shared: Path, tmp_path: Path) -> None:
    docs = [json.loads(line) for line in (shared / "wsc" / "train.jsonl").read_text().splitlines()[:12]]
    write(tmp_path / "wsc" / "validation.jsonl", docs)
    bad = next(i for i, doc in enumerate(docs) if doc["label"] == 1)
    docs[bad]["label"] = -1
    write(tmp_path / "wsc" / "train.jsonl", docs)
    paper = get_tasks(["wsc"], data=tmp_path, protocol="paper")["wsc"]
    with pytest.raises(DataError, match=rf"train.jsonl, line {bad + 1}: the answer is -1"):
        paper.prompts("examples")


def test_a_metric_of_the_tasks_own_is_asked_of_shots(shared: Path, tmp_path: Path) -> None:
    docs = [json.loads(line) for line in (shared / "record" / "train.jsonl").read_text().splitlines()[:6]]
    write(tmp_path / "record" / "validation.jsonl", docs)
    docs[3]["answers"] = ["nobody of these"]
    write(tmp_path / "record" / "train.jsonl", docs)
    with pytest.raises(DataError, match=r"train.*: no option is right"):
        get_tasks(["record"], data=tmp_path)["record"].prompts("evaluation", FewShot(5))


def test_shots_that_a_definition_writes_out_are_checked(tmp_path: Path) -> None:
    more = ("fewshot_config:\n  sampler: first_n\n  samples:\n    - {q: 'one?', options: ['yes', 'no'], gold: 0}\n"
            "    - {q: 'two?', options: ['yes', 'no'], gold: %s}\n")
    context = mine(tmp_path, more=more % 1).prompts("evaluation", FewShot(1))[0].pairs[0][0]
    assert context.startswith("Q: one?\nA: yes\n\n")
    with pytest.raises(DataError, match=r"^shot 1 of the definition of task 'mine': the answer is -1"):
        mine(tmp_path / "b", more=more % -1).prompts("evaluation", FewShot(2, shared=True))


@pytest.mark.parametrize(("form", "said"), [
    ("array", r"^document 4 of the validation split of task 'mine': field 'q' is missing"),
    ("lines", r"^/.*v\.jsonl, line 6: field 'q' is missing"),
])
def test_documents_of_a_definitions_own_files_are_told_by_line_where_they_have_one(
    tmp_path: Path, form: str, said: str
) -> None:
    docs = [doc | {"q": None if i == 4 else doc["q"]} for i, doc in enumerate(rows())]
    write(tmp_path / "v.jsonl", docs)
    text = (tmp_path / "v.jsonl").read_text()
    (tmp_path / "v.jsonl").write_text(json.dumps(docs, indent=1) if form == "array" else text.replace("\n", "\n\n", 1))
    (tmp_path / "mine.yaml").write_text(
        f"{MINE.replace('training_split: train', 'fewshot_split: validation')}dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{validation: {tmp_path}/v.jsonl}}, cache_dir: {tmp_path}/cache}}\n")
    with pytest.raises(DataError, match=said):
        get_tasks([str(tmp_path / "mine.yaml")])["mine"].prompts("evaluation")


def test_documents_without_nulls_are_not_rendered_again() -> None:
    def part(doc: object) -> object:
        raise NotImplementedError(doc)

    assert lacking([part], {"a": 1, "b": [{"c": "None"}]}) == ""
    assert list(nulls({"a": None, "b": [1, {"c": math.nan, "d": "nan"}], "e": []})) == [("a",), ("b", 1, "c")]


def test_tasks_of_before_keep_their_fingerprints(tmp_path: Path) -> None:
    """Studies of documents that were read rightly go on."""
    assert get_tasks(["piqa"], data=write_task(tmp_path))["piqa"].fingerprint == "30e717b369c463ead9ccd9f9"


MOVED = {
    "some": "def some(ds):\n    return ds.filter(lambda d: d['h'] != 'drop').map(\n"
            "        lambda d: {'q': 'H: ' + str(d['h']) + d['q']})\n",
    "nested": "def nested(ds):\n    return ds.filter(lambda d: d['h'] != 'drop').map(\n"
              "        lambda d: {'q': f\"{d['more']['h']} {d['q']}\"})\n",
    "twice": "def twice(ds):\n    return ds.map(lambda b: {\n"
             "        'q': [f'{x} {h} {q}' for h, q in zip(b['h'], b['q']) for x in 'AB'],\n"
             "        **{k: [v for v in b[k] for x in 'AB'] for k in ('options', 'gold')}}, batched=True,\n"
             "        remove_columns=['h', 'more'])\n"}


@pytest.mark.parametrize("process", list(MOVED))
def test_a_null_is_found_where_rows_are_left_out_or_moved(tmp_path: Path, process: str) -> None:
    docs = [doc | {"h": h, "more": {"h": h}} for doc, h in zip(rows(4), ["drop", "x", "y", None], strict=True)]
    found = mine(tmp_path, docs, docs, utils=MOVED[process], more=f"process_docs: !function utils.{process}\n")
    field = "more" if process == "nested" else "h"
    with pytest.raises(DataError, match=f"field '{field}' is missing, null or NaN"):
        found.prompts("evaluation")
    with pytest.raises(DataError, match=f"field '{field}' is missing, null or NaN"):
        found.prompts("examples", FewShot(2, shared=True))
    docs[3] |= {"h": "z", "more": {"h": "z"}}
    whole = mine(tmp_path / "whole", docs, docs, utils=MOVED[process],
                 more=f"process_docs: !function utils.{process}\n")
    assert len(whole.prompts("evaluation")) == {"some": 3, "nested": 3, "twice": 8}[process]


def test_options_that_are_one_text_are_refused(tmp_path: Path) -> None:
    docs = [doc | {"options": "['yes', 'no']"} for doc in rows(3)]
    with pytest.raises(DataError, match="options are a list of texts, not the text"):
        mine(tmp_path, docs, docs).prompts("evaluation")
