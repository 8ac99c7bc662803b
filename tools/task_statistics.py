"""How many documents and tokens the paper's 16 tasks have: `python tools/task_statistics.py BENCHMARKS` writes it.

The numbers of documents are the hub's, per split. Tokens are counted on the first documents of each split in the folder
named, with SmolLM2's tokenizer (byte-level BPE of 49,152 tokens, much like GPT-2's), by the code that packs prompts for
a run: one document's share of the positions, the mean length of the rows they lie in (weighted by positions), and the
positions whose logits are wanted. A document's `requests` are how many it has, and of how many different lengths: those
of one length still share their beginning where all are cut to a window. Kinds: `tree` (token trees, shots drawn for
each document), `shared` (token trees, one draw of shots for all), `single` (a request a row), `gradient` (the gold
answer alone, a row each). `prompt` are the tokens of a document's longest request: mean, and the 10th, 50th, 90th and
99th percentile.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from headcount.engine.encode import encode
from headcount.engine.pack import Budget
from headcount.model.without_weights import shape_of
from headcount.study.tokens import AtHand, Reading, Work
from headcount.tasks.catalog import PAPER14, UNSEEN
from headcount.tasks.fewshot import FewShot
from headcount.tasks.load import get_tasks
from headcount.tasks.task import Task

_OUT = Path(__file__).resolve().parents[1] / "src" / "headcount" / "study" / "data" / "tasks.json"
_SHOTS, _SAMPLE, _WINDOW = (0, 1, 5), 200, 2048
# Documents on the hub (train, validation, test), of the splits that lm-eval's definitions use; what it evaluates.
_DOCUMENTS: dict[str, tuple[dict[str, int], str]] = {
    "hellaswag": ({"train": 39_905, "validation": 10_042}, "validation"),
    "piqa": ({"train": 16_113, "validation": 1_838}, "validation"),
    "arc_easy": ({"train": 2_251, "validation": 570, "test": 2_376}, "test"),
    "arc_challenge": ({"train": 1_119, "validation": 299, "test": 1_172}, "test"),
    "openbookqa": ({"train": 4_957, "validation": 500, "test": 500}, "test"),
    "winogrande": ({"train": 40_398, "validation": 1_267}, "validation"),
    "boolq": ({"train": 9_427, "validation": 3_270}, "validation"),
    "cb": ({"train": 250, "validation": 56}, "validation"),
    "copa": ({"train": 400, "validation": 100}, "validation"),
    "multirc": ({"train": 27_243, "validation": 4_848}, "validation"),
    "record": ({"train": 100_730, "validation": 10_000}, "validation"),
    "rte": ({"train": 2_490, "validation": 277}, "validation"),
    "wic": ({"train": 5_428, "validation": 638}, "validation"),
    "wsc": ({"train": 554, "validation": 104}, "validation"),
    "mathqa": ({"train": 29_837, "validation": 4_475, "test": 2_985}, "test"),
    "lambada_openai": ({"test": 5_153}, "test"),
}


def main(benchmarks: str) -> None:
    """Write the file."""
    model = shape_of("smollm2")
    reading = Reading(model.tokenizer, _WINDOW, Budget(), trees=True, tree_tokens=None, chat=False, seed=1234,
                      shared=False)
    found: dict[str, Any] = {}
    for name in (*PAPER14, *UNSEEN):
        documents, evaluated = _DOCUMENTS[name]
        task = get_tasks([name], data=benchmarks)[name]
        splits = ("evaluation", "examples") if name in PAPER14 else ("evaluation",)
        found[name] = {"documents": documents, "evaluated": evaluated,
                       "tokens": {split: {str(k): _statistics(task, reading, split, k) for k in _SHOTS}
                                  for split in splits}}
        sys.stderr.write(f"{name}\n")
    said = {"tokenizer": "SmolLM2's (byte-level BPE, 49,152 tokens)", "window": _WINDOW, "sample": _SAMPLE}
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(of_task)}" for name, of_task in found.items())
    _OUT.write_text(f'{json.dumps(said)[:-1]}, "tasks": {{\n{lines}\n}}}}\n', encoding="utf-8")


def _statistics(task: Task, reading: Reading, split: Any, num_fewshot: int) -> dict[str, list[float]]:
    documents = min(_SAMPLE, AtHand(task, reading).size(split, num_fewshot))
    single = AtHand(task, dataclasses.replace(reading, trees=False))
    trees = AtHand(task, reading)
    kinds = {"tree": trees.work(split, num_fewshot, documents), "single": single.work(split, num_fewshot, documents)}
    if num_fewshot:
        kinds["shared"] = trees.work(split, num_fewshot, documents, shared=True)
    if split == "examples":
        kinds["gradient"] = single.work(split, num_fewshot, documents, "gradient")
    lengths = lengths_of(task, reading, split, num_fewshot, documents)
    longest = [max(of_document) for of_document in lengths]
    return {**{kind: _of_document(work, documents) for kind, work in kinds.items()},
            "prompt": [round(float(np.mean(longest)), 1), *map(int, np.percentile(longest, [10, 50, 90, 99]))],
            "requests": [round(float(np.mean([*map(len, of)])), 2) for of in (lengths, [*map(set, lengths)])]}


def lengths_of(task: Task, reading: Reading, split: Any, num_fewshot: int, documents: int) -> list[list[int]]:
    """Tokens of every request of each document."""
    return [[len(r.ids) for r in encode(reading.tokenizer, list(p.pairs), reading.max_length)]
            for p in task.prompts(split, FewShot(num_fewshot, documents))]


def _of_document(work: Work, documents: int) -> list[float]:
    return [round(work.tokens / documents, 1), round(work.pairs / work.tokens, 1), round(work.places / documents, 2)]


if __name__ == "__main__":
    main(sys.argv[1])
