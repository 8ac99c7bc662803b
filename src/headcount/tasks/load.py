"""The door to lm-evaluation-harness: names to tasks, whose documents come from the hub or from local files."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import yaml
from lm_eval.tasks import TaskManager

from headcount.errors import DataError, OptionError, TaskError, UnavailableError, first_line
from headcount.stats.baselines import chance
from headcount.tasks import catalog as names
from headcount.tasks import hub
from headcount.tasks.local import SPLIT_FILES, bare_splits, check_place, has_split
from headcount.tasks.task import MISFITS, SAME, Protocol, Task


def notes(inner: Any, place: Path | None, examples_split: str) -> list[str]:
    """What a reader of results must know of a task: its definition's note, and which documents stand for which."""
    told = [note] if (note := (inner.config.metadata or {}).get("note")) else []
    evaluated = ["test"] if inner.has_test_docs() else ["validation"]
    if place is not None and place.is_dir() and inner.has_test_docs() and not has_split(place, "test"):
        told.append("test.jsonl is missing: validation.jsonl stands in for the test split")
        evaluated = ["test", "validation"]
    if examples_split in evaluated:
        told.append(SAME)
    return told


def get_tasks(
    task_names: str | Sequence[str], *, data: str | Path | None = None, examples_split: str = "train",
    protocol: Protocol = "sound",
) -> dict[str, Task]:
    """Load tasks by name.

    Args:
        task_names: One or several: lm-eval's task, group or tag names; `paper14`, `paper14-unseen`, `icl` or a task of
            that suite (`icl_antonym`, ...); paths of task YAML files; paths of jsonl files, or of folders of them,
            whose documents have `context`, `options` and `gold`.
        data: A folder with `<task>/{train,validation,test}.jsonl` to read instead of the hub. A missing `test.jsonl`
            is stood in for by `validation.jsonl`.
        examples_split: The split that importance is measured on.
        protocol: "paper" for the order and shots of the paper's code, and its variants of MultiRC and WSC.

    Raises:
        TaskError: For an unknown name, or a task that is not multiple-choice or log-likelihood.
        DataError: For missing, empty or malformed data.
    """
    if examples_split not in SPLIT_FILES:
        raise OptionError(f"--examples-split is one of {', '.join(SPLIT_FILES)}, not {examples_split!r}")
    loaded: dict[str, Task] = {}
    for name in names.expand([task_names] if isinstance(task_names, str) else task_names):
        task = _get_task(name, Path(data) if data is not None else None, examples_split, protocol)
        if task.name in loaded:
            raise TaskError(f"two of the tasks are named {task.name!r}; rename one")
        loaded[task.name] = task
    return loaded


def describe(name: str, data: str | Path | None = None) -> dict[str, Any]:
    """What a task offers, for people: documents per split, which of them are evaluated, options, chance, metric, notes.

    Where its documents cannot be had, the name and the reason under "absent".
    """
    try:
        (task,) = get_tasks([name], data=data).values()
    except (UnavailableError, DataError) as error:
        return {"task": name, "absent": str(error)}
    options = task.num_options
    return {"task": task.name, **task.split_sizes, "evaluated": "test" if task.inner.has_test_docs() else "validation",
            "fewest": int(options.min()), "most": int(options.max()), "chance": chance(options),
            "metric": task.metric, "notes": list(task.notes)}


def _get_task(name: str, data: Path | None, examples_split: str, protocol: Protocol) -> Task:
    place = _place(name, data)
    bare = place is not None and not name.endswith((".yaml", ".yml")) and not names.is_known(name)
    if bare and place is not None:
        definition, task_name = names.bare_definition(), place.stem if place.is_file() else place.name
    else:
        definition = names.definition(name)
        task_name = names.name_in(definition) if name.endswith((".yaml", ".yml")) else name
        place = names.embedded_folder(name) or (data / task_name if data is not None else None)
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
    inner = _load(text, task_name, local=place is not None)
    return Task(task_name, inner, notes(inner, place, examples_split), examples_split, protocol)


def _place(name: str, data: Path | None) -> Path | None:
    """Where a name's own documents lie, if it is a path, or a folder in --data."""
    if not name.endswith((".yaml", ".yml")) and ("/" in name or name.endswith(".jsonl")):
        if not Path(name).exists():
            raise TaskError(f"there is no {'file' if name.endswith('.jsonl') else 'folder'} {name}")
        return Path(name).resolve()
    return data / name if data is not None and (data / name).is_dir() else None


def _load(text: str, name: str, *, local: bool) -> Any:
    loggers = [logging.getLogger(library) for library in ("lm_eval", "datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)  # what they warn of here is what was asked for
    if not local:
        hub.answers()
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "task.yaml"
            path.write_text(text, encoding="utf-8")
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
        where = "the local files lack what" if local else "the hub's documents lack what"
        raise DataError(f"{where} the definition of task {name!r} reads "
                        f"({type(error).__name__}: {first_line(error)})") from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _not_to_be_had(name: str, error: BaseException) -> UnavailableError:
    return UnavailableError(f"the documents of task {name!r} could not be had from the hub ({hub.reason(error)}); "
                            "pass --data DIR with local files, or restore the connection")
