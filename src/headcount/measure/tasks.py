"""The only door to lm-evaluation-harness: task names to documents, prompts, gold answers and metrics.

Tasks, prompts, few-shot sampling and metrics are lm-eval's own. What is added here: a task is found by its YAML file
without lm-eval building its index of all names (which takes seconds); documents can come from local files instead of
the hub; shots can be shared by all documents; prompts can be built for training documents too, without the document
itself among its shots.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import importlib.util
import json
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import yaml
from jinja2.exceptions import UndefinedError
from lm_eval.tasks import TaskManager

from headcount.errors import DataError, OptionError, TaskError

Split = Literal["evaluation", "examples"]
SPLITS: tuple[Split, ...] = ("evaluation", "examples")
SPLIT_FILES = ("train", "validation", "test")
# The seed lm-eval gives its few-shot sampler.
LM_EVAL_SEED = 1234
_METRICS = ("acc", "em", "exact_match")


@dataclass(frozen=True, eq=False)
class Prompt:
    """One document with its prompts.

    Attributes:
        doc_id: The document's position in its split.
        doc: The document as lm-eval gives it.
        pairs: (context, continuation) of every option.
        gold: Index of the right option.
    """

    doc_id: int
    doc: Mapping[str, Any]
    pairs: tuple[tuple[str, str], ...]
    gold: int


class Task:
    """A multiple-choice or log-likelihood task of lm-eval.

    Attributes:
        name: lm-eval's name.
        metric: The metric that decides orders: "acc", or "em" where there is no acc.
        notes: What a reader of the results must know, such as a split that stands in for another.
    """

    def __init__(self, name: str, inner: Any, notes: Sequence[str] = (), examples_split: str = "train") -> None:
        self.name = name
        self.inner = inner
        self.notes = tuple(notes)
        self.examples_split = examples_split
        kind = inner.OUTPUT_TYPE
        if kind not in ("multiple_choice", "loglikelihood"):
            raise TaskError(f"task {name!r} is a {kind} task; headcount scores multiple_choice and loglikelihood tasks")
        names = list(inner.aggregation())
        self.metric = next((m for m in _METRICS if m in names), names[0])

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the task's definition and of all its documents."""
        config = self.inner.dump_config()
        for volatile in ("metadata", "dataset_kwargs", "custom_dataset", "num_fewshot"):
            config.pop(volatile, None)
        digest = hashlib.sha256(json.dumps([config, self.examples_split], sort_keys=True, default=str).encode())
        for split in sorted(self.inner.dataset):
            digest.update(f"\n{split}\n".encode())
            for doc in self.inner.dataset[split]:
                digest.update(json.dumps(doc, sort_keys=True, default=str).encode())
        return digest.hexdigest()[:24]

    def documents(self, split: Split) -> Sequence[Mapping[str, Any]]:
        """The evaluated documents (lm-eval's choice of split), or the examples that importance is measured on.

        Raises:
            TaskError: If the task has no documents for this.
        """
        if split == "evaluation":
            return list(self.inner.eval_docs)
        docs = {"train": self.inner.training_docs, "validation": self.inner.validation_docs,
                "test": self.inner.test_docs}[self.examples_split]()
        if docs is None:
            raise TaskError(f"task {self.name!r} has no {self.examples_split} split to measure importance on; choose "
                            "one that it has with --examples-split validation (or test)")
        return list(docs)

    def size(self, split: Split, *, shared_shots: int = 0) -> int:
        """How many documents a split offers when so many shared shots, if they are drawn from it, are left out."""
        documents = self.documents(split)
        return len(documents) - (shared_shots if shared_shots and self._drawn_from(documents) else 0)

    def prompts(
        self, split: Split, *, num_fewshot: int = 0, limit: int | None = None, seed: int = LM_EVAL_SEED,
        shared_shots: bool = False,
    ) -> list[Prompt]:
        """Prompts of the first documents of a split.

        Shots come from lm-eval's own few-shot split. For evaluated documents they are drawn exactly as lm-eval draws
        them with this seed; examples never are among their own shots; documents that serve as shared shots are left
        out.

        Args:
            split: Which documents.
            num_fewshot: How many shots stand before each document.
            limit: Take the first so many documents; None takes all.
            seed: Of the sampler of shots.
            shared_shots: Whether one draw of shots serves all documents.

        Raises:
            OptionError: If there are too few documents to draw the shots from.
        """
        documents = self.documents(split)
        own_pool = num_fewshot > 0 and self._drawn_from(documents)
        self._check_pool(num_fewshot, excluding=not shared_shots and (own_pool or self._lm_eval_excludes))
        self.inner.set_fewshot_seed(seed)
        shots = self.inner.sampler.sample(num_fewshot) if shared_shots and num_fewshot else []
        prompts: list[Prompt] = []
        for doc_id, doc in enumerate(documents):
            if limit is not None and len(prompts) >= limit:
                break
            if doc not in shots:
                with self._sampling(shots, doc if own_pool else None):
                    prompts.append(self._prompt(doc_id, doc, num_fewshot))
        return prompts

    def metrics(self, prompt: Prompt, results: Sequence[tuple[float, bool]]) -> dict[str, float]:
        """lm-eval's own metrics of one document that are plain numbers.

        Args:
            prompt: The document.
            results: Log-likelihood in nats, and whether greedy decoding gives it, of every option.
        """
        scores = self.inner.process_results(prompt.doc, list(results))
        return {name: float(value) for name, value in scores.items() if isinstance(value, (int, float))}

    def _prompt(self, doc_id: int, doc: Mapping[str, Any], num_fewshot: int) -> Prompt:
        try:
            context = self.inner.fewshot_context(doc, num_fewshot, gen_prefix=self.inner.doc_to_prefix(doc))
            built = self.inner.construct_requests(doc=doc, ctx=context, metadata=(self.name, doc_id, 1))
            pairs = tuple(tuple(i.args[:2]) for i in (built if isinstance(built, list) else [built]))
            return Prompt(doc_id, doc, pairs, self._gold(doc, len(pairs)))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, UndefinedError) as error:
            raise DataError(f"document {doc_id} of task {self.name!r} does not fit the task's definition "
                            f"({type(error).__name__}: {error}); mend that document") from error

    def _gold(self, doc: Mapping[str, Any], options: int) -> int:
        """The option which scores when it alone wins, asked of the task's own metric."""
        for i in range(options):
            results = [(0.0, True) if j == i else (-1e4, False) for j in range(options)]
            if self.inner.process_results(doc, results).get(self.metric) == 1:
                return i
        raise ValueError("no option is right")

    def _check_pool(self, num_fewshot: int, *, excluding: bool) -> None:
        if num_fewshot == 0:
            return
        size = len(self._pool)
        if num_fewshot + excluding > size:
            raise OptionError(f"{num_fewshot} shots cannot be drawn from the {size} few-shot documents of task "
                              f"{self.name!r}; ask for fewer with --shots")

    def _drawn_from(self, documents: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the shots are drawn from these documents (the first one tells: splits do not overlap in part)."""
        return documents[0] in self._pool

    @property
    def _lm_eval_excludes(self) -> bool:
        """Whether lm-eval draws one shot more, to leave out the document itself, wherever the document comes from."""
        return bool(self.inner.fewshot_cfg.split == self.inner.config.test_split)

    @property
    def _pool(self) -> Sequence[Any]:
        """The documents that shots are drawn from."""
        sampler = getattr(self.inner, "sampler", None)
        return sampler.df if sampler is not None else []

    @contextlib.contextmanager
    def _sampling(self, shots: Sequence[Any], excluded: Mapping[str, Any] | None) -> Iterator[None]:
        original = getattr(self.inner, "sampler", None)
        if shots or excluded is not None:
            self.inner.sampler = _Shots(shots, excluded, original)
        try:
            yield
        finally:
            if original is not None:
                self.inner.sampler = original


@dataclass(frozen=True, eq=False)
class _Shots:
    """Stands in for lm-eval's sampler: gives fixed shots, or draws without one document."""

    shots: Sequence[Any]
    excluded: Mapping[str, Any] | None
    sampler: Any

    def sample(self, n: int, eval_doc: Any = None) -> Sequence[Any]:
        drawn = self.shots or self.sampler.sample(n, eval_doc=self.excluded)
        return drawn[:n]


def get_tasks(
    names: Sequence[str], *, data: str | Path | None = None, examples_split: str = "train"
) -> dict[str, Task]:
    """Load tasks by name.

    Args:
        names: lm-eval's task names, paths of task YAML files, names of the embedded suite (`icl_antonym`, ...), or
            `icl` for all of it.
        data: A folder with `<task>/{train,validation,test}.jsonl` to read instead of the hub. A missing `test.jsonl`
            is stood in for by `validation.jsonl`.
        examples_split: The split that importance is measured on.

    Raises:
        TaskError: For an unknown name, or a task that is not multiple-choice or log-likelihood.
        DataError: For missing, empty or malformed data.
    """
    if examples_split not in SPLIT_FILES:
        raise OptionError(f"--examples-split is one of {', '.join(SPLIT_FILES)}, not {examples_split!r}")
    expanded = [n for name in names for n in (embedded_tasks() if name == "icl" else [name])]
    if repeated := {n for n in expanded if expanded.count(n) > 1}:
        raise TaskError(f"task {min(repeated)!r} is named twice")
    loaded = [_get_task(name, Path(data) if data is not None else None, examples_split) for name in expanded]
    return {task.name: task for task in loaded}


def embedded_tasks() -> list[str]:
    """The names of the embedded suite's tasks."""
    return sorted(p.name for p in _icl_folder().iterdir() if p.is_dir())


def _get_task(name: str, data: Path | None, examples_split: str) -> Task:
    embedded = name in embedded_tasks()
    definition = _icl_folder() / "icl.yaml" if embedded else _definition(name)
    task_name = name if embedded else _name_in(definition)
    folder = _icl_folder() / name if embedded else data / task_name if data is not None else None
    config: dict[str, Any] = {"include": str(definition), "task": task_name}
    if folder is not None:
        _check_folder(folder, task_name)
        config |= {"dataset_path": "local", "dataset_name": None, "dataset_kwargs": {"folder": str(folder)}}
    text = yaml.safe_dump(config, sort_keys=False)
    if folder is not None:
        text += "custom_dataset: !function headcount.measure.tasks.local_dataset\n"
    inner = _load(text, task_name, local=folder is not None)
    return Task(task_name, inner, _notes(inner, folder), examples_split)


def _load(text: str, name: str, *, local: bool) -> Any:
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)  # what it warns of here is what was asked for
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "task.yaml"
            path.write_text(text, encoding="utf-8")
            return TaskManager(include_defaults=False).load(str(path))["tasks"][name]
    except (ConnectionError, FileNotFoundError, datasets.exceptions.DatasetsError) as error:
        raise TaskError(f"the documents of task {name!r} could not be had from the hub ({_first_line(error)}); "
                        "pass --data DIR with local files, or mend the connection") from error
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, UndefinedError) as error:
        where = "the local files lack what" if local else "the hub's documents lack what"
        raise DataError(f"{where} the definition of task {name!r} reads "
                        f"({type(error).__name__}: {_first_line(error)})") from error
    finally:
        logger.setLevel(level)


def local_dataset(folder: str, **_: object) -> dict[str, Any]:
    """Read `folder/{train,validation,test}.jsonl` for lm-eval; validation stands in for a missing test split."""
    splits = {s: _read_jsonl(Path(folder) / f"{s}.jsonl") for s in SPLIT_FILES if _has(Path(folder), s)}
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits["validation"]
    found: dict[str, Any] = datasets.DatasetDict(splits)
    return found


def _read_jsonl(path: Path) -> datasets.Dataset:
    docs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            doc = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error.msg}); mend that line") from error
        if not isinstance(doc, dict):
            raise DataError(f"{path}, line {number}: a document is a JSON object, not {type(doc).__name__}")
        docs.append(doc)
    if not docs:
        raise DataError(f"{path} is empty; it needs one JSON object a line")
    try:
        return datasets.Dataset.from_list(docs)
    except (TypeError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise DataError(f"{path}: documents differ in the type of a field ({_first_line(error)})") from error


def _check_folder(folder: Path, name: str) -> None:
    if not folder.is_dir():
        known = ", ".join(sorted(p.name for p in folder.parent.glob("*") if p.is_dir())) or "none"
        raise DataError(f"no folder {folder} with the documents of task {name!r}; --data holds: {known}")
    if not _has(folder, "validation") and not _has(folder, "test"):
        raise DataError(f"{folder} has neither validation.jsonl nor test.jsonl to evaluate on")


def _has(folder: Path, split: str) -> bool:
    return (folder / f"{split}.jsonl").is_file()


def _notes(inner: Any, folder: Path | None) -> list[str]:
    if folder is not None and inner.has_test_docs() and not _has(folder, "test"):
        return ["test.jsonl is missing: validation.jsonl stands in for the test split"]
    return []


def _definition(name: str) -> Path:
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise TaskError(f"there is no task file {name}")
        return Path(name).resolve()
    known = _lm_eval_definitions()
    if name not in known:
        close = difflib.get_close_matches(name, [*known, *embedded_tasks(), "icl"], n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "see lm-eval's list of tasks"
        raise TaskError(f"no task is named {name!r}; {hint}")
    return known[name]


@functools.cache
def _lm_eval_definitions() -> dict[str, Path]:
    """Where lm-eval keeps the YAML file of each task; the files are searched as text, which takes under a second."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise TaskError("lm_eval is not installed; run pip install lm-eval")
    pattern = re.compile(rb"^task:[ \t]*[\"']?([\w.\-+]+)[\"']?[ \t\r]*$", re.MULTILINE)
    found: dict[str, Path] = {}
    for path in sorted(Path(spec.submodule_search_locations[0], "tasks").rglob("*.yaml")):
        if match := pattern.search(path.read_bytes()):
            found.setdefault(match.group(1).decode(), path)
    return found


def _name_in(definition: Path) -> str:
    match = re.search(r"^task:[ \t]*[\"']?([\w.\-+]+)", definition.read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        raise TaskError(f"{definition} names no task; it needs a line `task: NAME`")
    return match.group(1)


def _icl_folder() -> Path:
    return Path(__file__).parents[1] / "data" / "icl"


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
