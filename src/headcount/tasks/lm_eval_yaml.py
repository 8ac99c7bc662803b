"""lm-eval's task of plain documents: the same prompts and the same shots, for lm-eval's own command line.

A task is written as one YAML file that names the user's files where they lie, and a copy of `data/tasks/documents.py`,
which reads them. Shots are lm-eval's own draw from the splits that headcount gives it. By what they are drawn from:

- other documents than those that are evaluated: nothing is changed;
- the evaluated documents: each gets its number, so that lm-eval leaves out the document and none that equals it;
- the evaluated documents, where lm-eval leaves nothing out (it does so only if both splits are named as the test split
  is): a sampler puts another document in the place of the document itself, as `headcount.tasks.pool` does.

Before anything is written, lm-eval makes the prompts from it, and they are compared with headcount's.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import headcount
from headcount.errors import OptionError, TaskError, few
from headcount.tasks import catalog
from headcount.tasks.fewshot import LM_EVAL_SEED, FewShot
from headcount.tasks.load import Source, get_tasks, load_text, source_of
from headcount.tasks.local import BARE, files_of
from headcount.tasks.task import Task
from headcount.tasks.templates import compiled_once

_COMPARED_SHOTS = (0, 1, 5)
_COMPARED_DOCUMENTS = 1000
_DATA = Path(__file__).parent / "data" / "tasks"
# Files of code by their names here, and as they are written.
_CODE = {"documents": "headcount_documents", "functions": "headcount_functions"}
_MARK = "# Written by headcount"


@dataclass(frozen=True)
class WrittenTasks:
    """What was written.

    Attributes:
        tasks: The tasks whose YAML files were written; for each, with how many shots lm-eval's prompts were found to be
            headcount's: with none where the documents are not local.
        left: Names of tasks that lm-eval has already.
    """

    tasks: Mapping[str, tuple[int, ...]]
    left: tuple[str, ...]


def write_tasks(names: Sequence[str], folder: Path, data: Path | None = None) -> WrittenTasks:
    """Write the YAML file of each task that lm-eval does not have.

    Args:
        names: As in `get_tasks`, groups replaced by their tasks.
        folder: Where to; what headcount wrote there before is replaced.
        data: As in `get_tasks`.

    Raises:
        TaskError: If lm-eval has all of them, cannot find one by its name, or makes other prompts of one.
        DataError: If a document does not fit.
        OptionError: If the folder has a file of such a name that headcount did not write.
    """
    sources = {name: source_of(name, data) for name in names}
    ours = {name: source for name, source in sources.items()
            if source.place is not None or catalog.is_ours(source.definition)}
    left = tuple(source.name for name, source in sources.items() if name not in ours)
    if not ours:
        names_them = "its name" if len(left) == 1 else "their names"
        raise TaskError(f"lm-eval has {few(left)} already: give {names_them} to lm_eval --tasks (a file's folder to "
                        "--include_path); what is written are tasks of local documents, of the embedded suite (icl), "
                        "multirc and record")
    texts, compared = dict[str, str](), dict[str, tuple[int, ...]]()
    for name, source in ours.items():
        _check_name(source.name)
        if source.name in compared:
            raise TaskError(f"two of the tasks are named {source.name!r}; rename one")
        if source.place is None:
            text, compared[source.name] = _text(_definition(source.definition)), ()
        else:
            (task,) = get_tasks([name], data=data).values()
            text = _text(_with_documents(source, source.place, task))
            compared[source.name] = _compare(task, text, source.place)
        texts[f"{source.name}.yaml"] = text
    _write(folder, texts | _code("".join(texts.values())))
    return WrittenTasks(compared, left)


class _Function(str):
    """A function's name in a definition."""


class _Loader(yaml.SafeLoader):
    """Reads functions as their names."""


class _Dumper(yaml.SafeDumper):
    """Writes such names."""


_Loader.add_constructor("!function", lambda _, node: _Function(node.value))
_Dumper.add_representer(_Function, lambda dumper, name: dumper.represent_scalar("!function", str(name)))


def _check_name(name: str) -> None:
    """Refuse a name that `lm_eval --tasks` takes for something else: a list, a pattern, a file."""
    if re.search(r"[,*?\[\]\\/]", name) or name.endswith(".yaml") or name.startswith("-") or name != name.strip():
        raise TaskError(f"lm-eval's command line does not find a task named {name!r}; rename its folder or file, "
                        "without any of , * ? [ ]")


def _definition(file: Path) -> dict[str, Any]:
    """One of headcount's definitions, in which functions stand in the file that is written."""
    config: dict[str, Any] = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506  # a SafeLoader
    return {key: _Function(value.replace("functions.", f"{_CODE['functions']}.")) if isinstance(value, _Function)
            else value for key, value in config.items()}


def _with_documents(source: Source, place: Path, task: Task) -> dict[str, Any]:
    """The definition of a task with its local documents."""
    ours, inner = catalog.is_ours(source.definition), task.inner.config
    config: dict[str, Any] = _definition(source.definition) if ours else {"include": str(source.definition)}
    config |= {"task": source.name, "dataset_path": "local", "dataset_name": None}
    if source.bare:
        config |= {split: getattr(inner, split) for split in ("training_split", "validation_split", "test_split")}
    numbered = task.draws_from_evaluated
    if numbered and not task.lm_eval_excludes:
        evaluated = inner.test_split if task.inner.has_test_docs() else inner.validation_split
        config |= {"test_split": evaluated, "fewshot_split": evaluated,
                   "fewshot_config": {"sampler": _Function(f"{_CODE['documents']}.Others")}}
    used = [inner.training_split, inner.validation_split, inner.test_split, task.inner.fewshot_cfg.split]
    files = {split: str(files_of(place, split, inner)[0].resolve()) for split in dict.fromkeys(used) if split}
    kwargs = {"files": files, "fields": list(BARE) if source.bare else None, "numbered": numbered or None}
    config |= {"custom_dataset": _Function(f"{_CODE['documents']}.documents"),
               "dataset_kwargs": {key: value for key, value in kwargs.items() if value is not None}}
    return {key: value for key, value in config.items() if value is not None or not ours}


def _text(config: Mapping[str, Any]) -> str:
    dumped = yaml.dump(dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return (f"{_MARK} {headcount.__version__}: lm_eval --include_path FOLDER --tasks {config['task']} ...\n"
            "# For the documents as they were then: write it anew when their files change.\n" + dumped)


def _code(texts: str) -> dict[str, str]:
    """Files of the code that definitions name."""
    return {f"{name}.py": f"{_MARK} {headcount.__version__}.\n" + (_DATA / f"{own}.py").read_text(encoding="utf-8")
            for own, name in _CODE.items() if f"!function '{name}." in texts or f"!function {name}." in texts}


def _compare(task: Task, text: str, place: Path) -> tuple[int, ...]:
    """With how many shots lm-eval's prompts were compared, and are headcount's; refuse them where they are not.

    Numbers of shots for which there are too few documents are left out.
    """
    theirs = load_text(text, task.name, place, _code(text))
    compared: list[int] = []
    for num_fewshot in _COMPARED_SHOTS:
        try:
            prompts = task.prompts("evaluation", FewShot(num_fewshot, _COMPARED_DOCUMENTS))
        except OptionError:
            continue
        theirs.set_fewshot_seed(LM_EVAL_SEED)
        with compiled_once():
            for prompt, doc in zip(prompts, itertools.islice(theirs.eval_docs, len(prompts)), strict=True):
                gold = theirs.doc_to_target(doc) == task.inner.doc_to_target(prompt.doc)
                if not gold or _pairs(theirs, doc, num_fewshot) != prompt.pairs:
                    raise TaskError(f"lm-eval cannot repeat headcount's prompts of task {task.name!r} (the first: "
                                    f"document {prompt.doc_id}, {num_fewshot} shots), so nothing is written")
        compared.append(num_fewshot)
    return tuple(compared)


def _pairs(inner: Any, doc: Mapping[str, Any], num_fewshot: int) -> tuple[tuple[str, str], ...]:
    """A document's (context, continuation) pairs, made as lm-eval's own loop makes them."""
    context = inner.fewshot_context(doc, num_fewshot, gen_prefix=inner.doc_to_prefix(doc))
    built = inner.construct_requests(doc=doc, ctx=context, metadata=(inner.config.task, 0, 1))
    return tuple(tuple(request.args[:2]) for request in (built if isinstance(built, list) else [built]))


def _write(folder: Path, texts: Mapping[str, str]) -> None:
    """Write files by their names, unless one is there that is not ours.

    Raises:
        OptionError: If a file of such a name was not written by headcount.
    """
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"`yaml` is a folder to write to, and {folder} is none", fields=("yaml",))
    for name in texts:
        if (folder / name).exists() and not (folder / name).read_bytes().startswith(_MARK.encode()):
            raise OptionError(f"{folder / name} is there, and headcount did not write it: name another folder with "
                              "`yaml`", fields=("yaml",))
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
