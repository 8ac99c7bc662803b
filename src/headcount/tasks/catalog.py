"""Names of tasks to the YAML files that define them; nothing of lm-eval is imported for a task's name.

A name is, in this order: a YAML file or jsonl data of the user's; a group of ours; a task of the embedded suite; a
task that lm-eval defines wrongly and we define ourselves; a task of lm-eval, found by searching the text of its YAML
files (which takes a second, where lm-eval's own index takes ten); a group or tag of lm-eval, for which its index is
asked.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from headcount.errors import TaskError

# The tasks of Bansal et al. (2023), and the two that none of their importance scores were measured on.
PAPER14 = ("hellaswag", "piqa", "arc_easy", "arc_challenge", "openbookqa", "winogrande", "boolq", "cb", "copa",
           "multirc", "record", "rte", "wic", "wsc")
UNSEEN = ("mathqa", "lambada_openai")
_DATA = Path(__file__).parent / "data"
# Where lm-eval's own definition does not work (record) or has the labels the wrong way round (multirc).
_OWN = ("record", "multirc")
_TASK = re.compile(rb"^[\"']?task[\"']?:[ \t]*[\"']?([\w.\-+()]+)[\"']?[ \t\r]*$", re.MULTILINE)
_GROUP = re.compile(rb"^[\"']?(?:group|tag)[\"']?:[ \t]*(.*(?:\r?\n[ \t]*-[ \t].*)*)", re.MULTILINE)


def groups() -> dict[str, tuple[str, ...]]:
    """Our own groups of tasks."""
    return {"paper14": PAPER14, "paper14-unseen": UNSEEN, "icl": tuple(embedded_tasks())}


def embedded_tasks() -> list[str]:
    """The names of the embedded suite's tasks."""
    return sorted(p.name for p in (_DATA / "icl").iterdir() if p.is_dir())


def embedded_folder(name: str) -> Path | None:
    """Where an embedded task's documents lie; None for any other name."""
    return _DATA / "icl" / name if name in embedded_tasks() else None


def expand(names: Sequence[str]) -> list[str]:
    """Names with each group replaced by its tasks; a task of several groups counts once.

    Raises:
        TaskError: If a name is given twice.
    """
    if repeated := {n for n in names if list(names).count(n) > 1}:
        raise TaskError(f"task {min(repeated)!r} is named twice")
    return list(dict.fromkeys(task for name in names for task in _members(name)))


def definition(name: str) -> Path:
    """The YAML file that defines a task.

    Raises:
        TaskError: If no task has this name.
    """
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise TaskError(f"there is no task file {name}")
        return Path(name).resolve()
    if embedded_folder(name):
        return _DATA / "icl" / "icl.yaml"
    if name in _OWN:
        return _DATA / "tasks" / f"{name}.yaml"
    known = _lm_eval()[0]
    if name not in known:
        ours = [task for group, tasks in groups().items() for task in (group, *tasks)]
        close = (difflib.get_close_matches(name, ours, n=3)
                 or difflib.get_close_matches(name, [*known, *_lm_eval()[1]], n=3))
        hint = f"did you mean {' or '.join(close)}?" if close else "headcount tasks lists the paper's and the suite's"
        raise TaskError(f"no task is named {name!r}; {hint}")
    return known[name]


def bare_definition() -> Path:
    """The definition of documents with `context`, `options` and `gold`."""
    return _DATA / "tasks" / "bare.yaml"


def is_known(name: str) -> bool:
    """Whether a name is a task of ours or of lm-eval."""
    return name in _OWN or embedded_folder(name) is not None or name in _lm_eval()[0]


def is_ours(definition: Path) -> bool:
    """Whether headcount comes with a definition: of plain documents, the embedded suite, or in place of lm-eval's."""
    return definition.is_relative_to(_DATA)


def name_in(file: Path) -> str:
    """The task that a YAML file defines."""
    match = re.search(r"^task:[ \t]*[\"']?([\w.\-+]+)", file.read_text(encoding="utf-8-sig"), re.MULTILINE)
    if match is None:
        raise TaskError(f"{file} names no task; it needs a line `task: NAME`")
    return match.group(1)


def _members(name: str) -> list[str]:
    ours = groups()
    if name in ours:
        return list(ours[name])
    if "/" in name or "." in name or is_known(name) or name not in _lm_eval()[1]:
        return [name]
    index = _groups_of_lm_eval()
    members = list(dict.fromkeys(_leaves(index, name))) if name in index else []
    if not members:
        raise TaskError(f"lm-eval's group {name!r} names no tasks; name the tasks that are wanted")
    return members


def _leaves(index: Mapping[str, Any], name: str) -> Iterator[str]:
    """The tasks of one of lm-eval's groups or tags, those of its groups of groups among them."""
    entry = index[name]
    kind = entry.kind.name
    members = sorted(entry.tags) if kind == "TAG" else (entry.cfg or {}).get("task", []) if kind == "GROUP" else None
    if members is None:
        yield name
        return
    for member in members:
        inner = member if isinstance(member, str) else member.get("task", member.get("group"))
        if not isinstance(inner, str) or inner not in index:
            raise TaskError(f"lm-eval's group {name!r} defines tasks in itself ({str(member)[:60]}); name the tasks "
                            "that are wanted")
        yield from _leaves(index, inner)


# Both are pure readings of installed files, which take seconds and do not change while a process runs.
@functools.cache
def _groups_of_lm_eval() -> Mapping[str, Any]:
    """lm-eval's own index: its entries by name."""
    from lm_eval.tasks import TaskManager

    return dict(TaskManager().task_index)


@functools.cache
def _lm_eval() -> tuple[dict[str, Path], frozenset[str]]:
    """Where lm-eval keeps the YAML file of each task, and the names of its groups and tags."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise TaskError("lm_eval is not installed; run pip install lm-eval")
    tasks: dict[str, Path] = {}
    grouped: set[str] = set()
    # Files that others include may have no suffix.
    for path in sorted(Path(spec.submodule_search_locations[0], "tasks").rglob("*")):
        if path.suffix not in ("", ".yaml") or not path.is_file():
            continue
        text = path.read_bytes()
        for names in _GROUP.findall(text):
            grouped.update(re.findall(r"[\w.\-+()]+", names.decode()))
        if path.suffix and (match := _TASK.search(text)):
            tasks.setdefault(match.group(1).decode(), path)
    return tasks, frozenset(grouped - tasks.keys())
