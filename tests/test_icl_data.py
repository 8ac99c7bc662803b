"""The embedded word tasks: their form, their balance, and their agreement with the tables."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "src" / "headcount" / "tasks" / "data" / "icl"
TABLES = ROOT / "tools" / "icl"
TASKS = sorted(path.name for path in DATA.iterdir() if path.is_dir())
SPLITS = ("train", "validation")
REQUIRED = (
    "animal_young",
    "antonym",
    "capital",
    "category",
    "comparative",
    "english_french",
    "english_spanish",
    "past_tense",
    "pattern",
    "plural",
    "sentiment",
    "successor",
)
# 200 evaluated documents each, so that a relation can carry a claim of its own.
ENLARGED = tuple(f"icl_{relation}" for relation in (
    "adverb", "comparative", "first_letter", "gerund", "number_word", "past_tense", "pattern", "plural", "successor"))
# The first half of the SHA-256 of train and validation of the others as they were before any relation was enlarged:
# studies of them stay valid as long as these bytes do.
KEPT = {
    "icl_agent": "5d67097756b795ef",
    "icl_animal_young": "5db0f22d1b498302",
    "icl_antonym": "cdb0667ef8ba5166",
    "icl_capital": "55305952af7be037",
    "icl_category": "ed9d1bf5a9d2f962",
    "icl_continent": "0548c821010ad823",
    "icl_demonym": "739f2daad14770c1",
    "icl_english_french": "5400f1dbb7967233",
    "icl_english_german": "9721abd9a679d4b5",
    "icl_english_spanish": "254e9d08a51cb19e",
    "icl_nominal": "7cf7b58a4c87dd6e",
    "icl_sentiment": "1fd05479a4192753",
    "icl_sentiment_arbitrary": "52dbf0dd9ca65230",
}


def load_tool(name: str) -> ModuleType:
    """Imports a module of ``tools``, which belongs to no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


BUILDER = load_tool("build_icl")
ROWS = load_tool("icl_rows")


def read_documents(task: str, split: str) -> list[dict[str, Any]]:
    """Reads one shipped file."""
    text = (DATA / task / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def table(task: str) -> Path:
    """Returns the path of a task's table."""
    return TABLES / f"{task}.tsv"


def test_enough_tasks() -> None:
    assert len(TASKS) >= 16
    assert {f"icl_{relation}" for relation in REQUIRED} <= set(TASKS)
    assert sorted(path.stem for path in TABLES.glob("*.tsv")) == TASKS


@pytest.mark.parametrize("task", TASKS)
def test_schema(task: str) -> None:
    for split in SPLITS:
        for document in read_documents(task, split):
            assert set(document) == {"query", "choices", "gold"}
            assert type(document["gold"]) is int
            assert 0 <= document["gold"] < 4
            texts = [document["query"], *document["choices"]]
            assert len(texts) == 5
            assert all(isinstance(text, str) and text for text in texts)
            assert all(" ".join(text.split()) == text for text in texts)


@pytest.mark.parametrize("task", TASKS)
def test_counts_and_distinct_queries(task: str) -> None:
    queries = {split: [d["query"] for d in read_documents(task, split)] for split in SPLITS}
    assert len(queries["train"]) >= 60
    assert len(queries["validation"]) == (200 if task in ENLARGED else 60)
    every = queries["train"] + queries["validation"]
    assert len(every) >= 120
    assert len(set(every)) == len(every)


def test_relations_that_were_not_enlarged_keep_their_bytes() -> None:
    assert sorted([*KEPT, *ENLARGED]) == TASKS
    for task, digest in KEPT.items():
        files = [(DATA / task / f"{split}.jsonl").read_bytes() for split in SPLITS]
        assert hashlib.sha256(b"".join(files)).hexdigest()[:16] == digest, task


@pytest.mark.parametrize("items", [259, 260])
def test_a_relation_is_enlarged_when_shots_are_left_for_it(items: int) -> None:
    made = [BUILDER.Item(f"q{n}", f"a{n}") for n in range(items)]
    files = BUILDER.build_task("icl_made", made)
    evaluated = 200 if items == 260 else 60
    assert files["validation.jsonl"].count("\n") == evaluated
    assert files["train.jsonl"].count("\n") == items - evaluated


def test_tables_made_by_definition_are_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = ("first_letter", "number_word", "pattern", "successor")
    # Only the words are read of the table of first letters.
    (tmp_path / "icl_first_letter.tsv").write_bytes(table("icl_first_letter").read_bytes())
    monkeypatch.setattr(ROWS, "SOURCE", tmp_path)
    ROWS.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"icl_{relation}.tsv" for relation in made]
    for path in tmp_path.iterdir():
        assert path.read_bytes() == table(path.stem).read_bytes()


@pytest.mark.parametrize("task", TASKS)
def test_options_are_distinct_and_not_the_query(task: str) -> None:
    for split in SPLITS:
        for document in read_documents(task, split):
            texts = [document["query"], *document["choices"]]
            assert len({text.casefold() for text in texts}) == 5, document


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", SPLITS)
def test_gold_positions_are_balanced(task: str, split: str) -> None:
    golds = Counter(document["gold"] for document in read_documents(task, split))
    counts = [golds[place] for place in range(4)]
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_the_tables(task: str) -> None:
    items = {item.query: item for item in BUILDER.read_items(table(task))}
    documents = [d for split in SPLITS for d in read_documents(task, split)]
    assert {document["query"] for document in documents} == set(items)
    for document in documents:
        item = items[document["query"]]
        choices = list(document["choices"])
        assert choices.pop(document["gold"]) == item.answer
        accepted = {word.casefold() for word in item.also}
        assert not accepted & {word.casefold() for word in choices}, document


@pytest.mark.parametrize("task", TASKS)
def test_tables_are_clean(task: str) -> None:
    items = BUILDER.read_items(table(task))
    assert len({item.query for item in items}) == len(items)
    for item in items:
        right = {word.casefold() for word in (item.answer, *item.also)}
        assert not right & {word.casefold() for word in item.confusers}, item
        assert item.answer not in item.also, item


@pytest.mark.parametrize("task", TASKS)
def test_rebuilding_gives_the_same_bytes(task: str) -> None:
    files = BUILDER.build_task(task, BUILDER.read_items(table(task)))
    assert set(files) == {"train.jsonl", "validation.jsonl"}
    for name, text in files.items():
        assert (DATA / task / name).read_bytes() == text.encode("utf-8")


def test_main_writes_every_task(tmp_path: Path) -> None:
    BUILDER.main(["--out", str(tmp_path)])
    written = {path.relative_to(tmp_path) for path in tmp_path.rglob("*.jsonl")}
    assert written == {Path(task) / f"{split}.jsonl" for task in TASKS for split in SPLITS}
