"""Build the embedded word-task suite from its hand-written tables.

Each ``tools/icl/icl_<relation>.tsv`` becomes ``train.jsonl`` and ``validation.jsonl`` under
``src/headcount/tasks/data/icl/icl_<relation>/``. The result depends on the tables alone: the random
choices (split, wrong options, order of the options) are seeded with the task's name.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "tools" / "icl"
TARGET = ROOT / "src" / "headcount" / "tasks" / "data" / "icl"
COLUMNS = ("query", "answer", "confusers", "also", "group")
OPTIONS = 4
CONFUSERS = 2
# A relation with enough items carries a claim of its own: at least 189 documents that do not change are needed before a
# score interval rules out a loss of two points. The others keep 60, and the bytes that studies of them have read.
VALIDATION = 60
ENLARGED = 200
ENOUGH = 260
CLASS_LIMIT = 8


@dataclass(frozen=True)
class Item:
    """One row of a table; `also` holds answers that could pass for right, never used as wrong."""

    query: str
    answer: str
    confusers: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    group: str = ""


def read_items(path: Path) -> list[Item]:
    """Reads a table: a header line, then tab-separated rows with ``|`` inside a list."""
    header, *lines = path.read_text(encoding="utf-8").splitlines()
    if tuple(header.split("\t")) != COLUMNS:
        raise ValueError(f"{path}: the first line must hold {COLUMNS}, tab-separated")
    items = []
    for number, line in enumerate(lines, start=2):
        cells = line.split("\t")
        if len(cells) != len(COLUMNS):
            raise ValueError(f"{path}:{number}: {len(cells)} cells instead of {len(COLUMNS)}")
        confusers, also = (tuple(filter(None, cell.split("|"))) for cell in cells[2:4])
        items.append(Item(cells[0], cells[1], confusers, also, cells[4]))
    return items


def wrong_options(item: Item, items: Sequence[Item], rng: random.Random) -> list[str]:
    """Draws an item's wrong options: up to two of its confusers, then other items' answers."""
    pool = sorted({other.answer for other in items if other.group == item.group})
    taken = {word.casefold() for word in (item.query, item.answer, *item.also)}
    wrong: list[str] = []
    confusers = rng.sample(item.confusers, min(CONFUSERS, len(item.confusers)))
    for word in (*confusers, *rng.sample(pool, len(pool))):
        if word.casefold() not in taken and len(wrong) < OPTIONS - 1:
            taken.add(word.casefold())
            wrong.append(word)
    if len(wrong) < OPTIONS - 1:
        raise ValueError(f"{item.query}: too few wrong options")
    return wrong


def interleave(items: Sequence[Item]) -> list[Item]:
    """Orders items class after class, so that neighbouring ones have different answers."""
    answers = sorted({item.answer for item in items})
    columns = [[item for item in items if item.answer == answer] for answer in answers]
    return [item for row in zip_longest(*columns) for item in row if item is not None]


def build_task(task: str, items: Sequence[Item]) -> dict[str, str]:
    """Builds one task.

    Args:
        task: The task's name, which seeds its random choices.
        items: The rows of the task's table.

    Returns:
        The text of each file, by file name.
    """
    rng = random.Random(task)
    shuffled = rng.sample(list(items), len(items))
    evaluated = ENLARGED if len(items) >= ENOUGH else VALIDATION
    splits = {"validation.jsonl": shuffled[:evaluated], "train.jsonl": shuffled[evaluated:]}
    if len({item.answer for item in items}) <= CLASS_LIMIT:
        splits["train.jsonl"] = interleave(splits["train.jsonl"])
    files = {}
    for name, part in splits.items():
        golds = [place % OPTIONS for place in range(len(part))]
        rng.shuffle(golds)
        lines = []
        for item, gold in zip(part, golds, strict=True):
            choices = wrong_options(item, items, rng)
            choices.insert(gold, item.answer)
            document = {"query": item.query, "choices": choices, "gold": gold}
            lines.append(json.dumps(document, ensure_ascii=False) + "\n")
        files[name] = "".join(lines)
    return files


def main(argv: Sequence[str] | None = None) -> None:
    """Writes every task's files."""
    parser = argparse.ArgumentParser(description="Build the embedded word tasks.")
    parser.add_argument("--out", type=Path, default=TARGET, help="folder for the tasks")
    args = parser.parse_args(argv)
    for path in sorted(SOURCE.glob("icl_*.tsv")):
        folder = args.out / path.stem
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in build_task(path.stem, read_items(path)).items():
            (folder / name).write_text(text, encoding="utf-8", newline="\n")
            sys.stdout.write(f"{path.stem}/{name}: {text.count(chr(10))} documents\n")


if __name__ == "__main__":
    main()
