"""The door to lm-evaluation-harness: names to tasks, whose documents come from the hub or from local files."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import yaml
from lm_eval.tasks import TaskManager

from headcount.errors import DataError, OptionError, TaskError, UnavailableError, first_line
from headcount.tasks import catalog, hub
from headcount.tasks.local import SPLIT_FILES, bare_splits, check_place, files_of, first_gap, has_split, line_in
from headcount.tasks.missing import MISFITS
from headcount.tasks.task import SAME, Protocol, Task


@dataclass(frozen=True)
class TaskDescription:
    """What a task offers, for people.

    Attributes:
        name: lm-eval's name.
        sizes: How many documents each split has.
        evaluated: The split that is evaluated.
        fewest: Options of the document that has the fewest; 0 where a continuation must be produced.
        most: Options of the document that has the most.
        chance: Accuracy of guessing.
        metric: The metric that decides orders.
        notes: What a reader of results must know.
        absent: Why the task's documents cannot be had, as the command line says it, and then nothing else is known;
            empty where they can.
    """

    name: str
    sizes: Mapping[str, int] = field(default_factory=dict)
    evaluated: str = ""
    fewest: int = 0
    most: int = 0
    chance: float = 0.0
    metric: str = ""
    notes: tuple[str, ...] = ()
    absent: str = ""


@dataclass(frozen=True)
class Source:
    """Where a task comes from.

    Attributes:
        name: lm-eval's name.
        definition: The YAML file that defines it.
        place: The folder, or the one file, of its documents; None where the definition says where they are.
        bare: Whether they are documents of `context`, `options` and `gold`.
    """

    name: str
    definition: Path
    place: Path | None
    bare: bool


def notes(inner: Any, place: Path | None, examples_split: str) -> list[str]:
    """What a reader of results must know of a task: its definition's note, and which documents stand in for others."""
    told = [note] if (note := (inner.config.metadata or {}).get("note")) else []
    evaluated = ["test"] if inner.has_test_docs() else ["validation"]
    if place is not None and place.is_dir() and inner.has_test_docs() and not has_split(place, "test"):
        told.append("test.jsonl is missing: validation.jsonl stands in for the test split")
        evaluated = ["test", "validation"]
    if examples_split in evaluated:
        told.append(SAME)
    return told


def get_tasks(
    task_names: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], *, data: str | Path | None = None,
    examples_split: str = "train", protocol: Protocol = "sound",
) -> dict[str, Task]:
    """Tasks by name.

    Args:
        task_names: One or several: lm-eval's task, group or tag names; `paper14`, `paper14-unseen`, `icl` or a task of
            that suite (`icl_antonym`, ...); paths of task YAML files; paths of jsonl files, or of folders of them,
            whose documents have `context`, `options` and `gold`. Of strings, those with a "/" are paths.
        data: A folder with `<task>/{train,validation,test}.jsonl` to read instead of the hub. A missing `test.jsonl`
            is stood in for by `validation.jsonl`.
        examples_split: The split that importance is measured on.
        protocol: "paper" for the order and shots of the paper's code, and its variants of MultiRC and WSC.

    Raises:
        TaskError: For an unknown name, or a task that is not multiple-choice or log-likelihood.
        DataError: For missing, empty or malformed data.
        OptionError: For an unknown split, or what is no name.
    """
    if examples_split not in SPLIT_FILES:
        raise OptionError(f"`examples_split` is one of {', '.join(SPLIT_FILES)}, not {examples_split!r}",
                          fields=("examples_split",))
    given = [task_names] if isinstance(task_names, str | os.PathLike) else task_names
    if not isinstance(given, Sequence):
        raise OptionError(f"tasks are named by strings or paths, such as 'piqa' or './my-task', not {given!r}")
    loaded: dict[str, Task] = {}
    for name in catalog.expand([_as_text(one) for one in given]):
        task = _get_task(name, Path(data) if data is not None else None, examples_split, protocol)
        if task.name in loaded:
            raise TaskError(f"two of the tasks are named {task.name!r}; rename one")
        loaded[task.name] = task
    return loaded


def _as_text(name: str | os.PathLike[str]) -> str:
    """A name as the catalog reads it: a path has a slash, or the ending of a file."""
    if isinstance(name, str):
        return name
    if not isinstance(name, os.PathLike):
        raise OptionError(f"tasks are named by strings or paths, such as 'piqa' or './my-task', not {name!r}")
    path = Path(name).as_posix()
    return path if "/" in path or path.endswith((".yaml", ".yml", ".jsonl")) else f"./{path}"


def describe(name: str, data: str | Path | None = None) -> TaskDescription:
    """What a task offers; where its documents cannot be had, the reason.

    Args:
        name: As in `get_tasks`.
        data: As in `get_tasks`.

    Raises:
        TaskError: For an unknown name.
    """
    # It brings scipy, which loading tasks for a measurement does not need.
    from headcount.stats.baselines import chance

    try:
        (task,) = get_tasks([name], data=data).values()
    except (UnavailableError, DataError) as error:
        return TaskDescription(name, absent=error.on_command_line())
    options = task.num_options
    return TaskDescription(task.name, task.split_sizes, "test" if task.inner.has_test_docs() else "validation",
                           int(options.min()), int(options.max()), chance(options), task.metric, task.notes)


def source_of(name: str, data: Path | None) -> Source:
    """Where a task comes from, by one of the names of `get_tasks`, groups replaced by their tasks.

    Raises:
        TaskError: For an unknown name.
    """
    place = _place(name, data)
    bare = place is not None and not name.endswith((".yaml", ".yml")) and not catalog.is_known(name)
    if bare and place is not None:
        return Source(place.stem if place.is_file() else place.name, catalog.bare_definition(), place, bare)
    definition = catalog.definition(name)
    task_name = catalog.name_in(definition) if name.endswith((".yaml", ".yml")) else name
    place = catalog.embedded_folder(name) or (data / task_name if data is not None else None)
    return Source(task_name, definition, place, bare)


def _get_task(name: str, data: Path | None, examples_split: str, protocol: Protocol) -> Task:
    source = source_of(name, data)
    task_name, definition, place, bare = source.name, source.definition, source.place, source.bare
    config: dict[str, Any] = {"include": str(definition), "task": task_name}
    if place is not None:
        check_place(place, task_name)
        kwargs = {"folder": str(place), **({"bare": True} if bare else {})}
        config |= {"dataset_path": "local", "dataset_name": None, "dataset_kwargs": kwargs}
        if bare:
            config |= bare_splits(place)
    text = yaml.safe_dump(config, sort_keys=False)
    if place is not None:
        text += "custom_dataset: !function headcount.tasks.local.local_dataset\n"
    inner = load_text(text, task_name, place)
    return Task(task_name, inner, notes(inner, place, examples_split), examples_split, protocol, place)


def _place(name: str, data: Path | None) -> Path | None:
    """Where a name's own documents lie, if it is a path, or a folder in --data."""
    if not name.endswith((".yaml", ".yml")) and ("/" in name or name.endswith(".jsonl")):
        if not Path(name).exists():
            raise TaskError(f"there is no {'file' if name.endswith('.jsonl') else 'folder'} {name}")
        return Path(name).resolve()
    return data / name if data is not None and (data / name).is_dir() else None


def load_text(text: str, name: str, place: Path | None, code: Mapping[str, str] | None = None) -> Any:
    """lm-eval's task by the text of its definition.

    Args:
        text: A YAML text.
        name: The task's.
        place: Where its documents are, for messages; None where the definition says it.
        code: Texts of Python files beside the definition, by their names.

    Raises:
        TaskError: If the definition cannot be read.
        DataError: If the documents do not fit.
    """
    loggers = [logging.getLogger(library) for library in ("lm_eval", "datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)  # what they warn of here is what was asked for
    if place is None:
        hub.answers()
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "task.yaml"
            path.write_text(text, encoding="utf-8")
            for file, lines in (code or {}).items():
                (Path(folder) / file).write_text(lines, encoding="utf-8")
            return TaskManager(include_defaults=False).load(str(path))["tasks"][name]
    except (ConnectionError, FileNotFoundError, datasets.exceptions.DatasetsError) as error:
        raise _not_to_be_had(name, error) from error
    except (yaml.YAMLError, SyntaxError, NameError) as error:
        raise TaskError(f"the definition of task {name!r} cannot be read ({type(error).__name__}: "
                        f"{first_line(error)})") from error
    except ImportError as error:
        raise TaskError(f"lm-eval's definition of task {name!r} needs a package that is not here "
                        f"({first_line(error)}): pip install it") from error
    except MISFITS as error:
        if str(error).startswith("Couldn't find cache for"):  # another part of the data set is there
            raise _not_to_be_had(name, error) from error
        if place is not None and (lost := [s for s in SPLIT_FILES if error.args == (s,) and not has_split(place, s)]):
            raise DataError(f"{place} has no {lost[0]}.jsonl, and the definition of task {name!r} reads that split; "
                            "put it there") from error
        where = "the hub's documents lack what" if place is None else "the local files lack what"
        compare = "compare the documents with it"
        if place is not None:
            split = "test" if has_split(place, "test") else "validation"
            path, line = line_in(files_of(place, split, None), 0) or (place, 1)
            compare = first_gap(place) or f"compare the documents with it, such as that of {path}, line {line}"
        raise DataError(f"{where} the definition of task {name!r} reads ({type(error).__name__}: "
                        f"{first_line(error)}); {compare}") from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _not_to_be_had(name: str, error: BaseException) -> UnavailableError:
    return UnavailableError(f"the documents of task {name!r} could not be loaded from the hub ({hub.reason(error)}); "
                            "pass `data=DIR` with local files, or restore the connection", fields=("data=DIR",))
