"""Running a study: jobs in order, each measured once and saved in the ledger; what is there already is not done again.

A study folder belongs to one model, one data set and one set of options. Tasks and numbers of shots may be added to
it; anything else that would change what a finished entry means is refused.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd

from headcount.errors import ModelError, OptionError, StudyError
from headcount.ledger import Job, Ledger
from headcount.masks import Component, Mask, prune, random_order
from headcount.plan import GRADIENT_PASSES, PARTS, Part, PlannedJob, TaskFacts, plan, reads
from headcount.specs import StudySpec
from headcount.tables import evaluation_table, evaluations_from, importance_table, stored_order

if TYPE_CHECKING:
    from headcount.measure.packing import Budget
    from headcount.measure.scoring import Prepared
    from headcount.measure.tasks import Split, Task
    from headcount.model.load import LoadedModel

# Options that do not change what an entry means; all others must be the same whenever a folder is used.
_FREE = ("tasks", "shots", "out", "data", "head_sample", "device", "device_map", "margin", "row_tokens", "batch_tokens",
         "model")
# Documents that the cost of a job is estimated from.
_SAMPLE = 8
_PACKAGES = ("headcount", "torch", "transformers", "lm_eval", "tokenizers", "numpy")


@runtime_checkable
class Reporter(Protocol):
    """What a study tells while it runs."""

    def stage(self, text: str, done: int = 0, total: int | None = None) -> None:
        """What is being done before the jobs start, and how many of how many steps of it are done."""

    def begin(self, todo: int, done: int, tokens: float) -> None:
        """How many jobs are to do and were done before, and about how many tokens they take."""

    def job(self, title: str) -> None:
        """A job begins."""

    def advance(self, tokens: float) -> None:
        """So many more tokens are computed."""


class Silent:
    """Tells nothing."""

    def stage(self, text: str, done: int = 0, total: int | None = None) -> None:
        """Nothing."""

    def begin(self, todo: int, done: int, tokens: float) -> None:
        """Nothing."""

    def job(self, title: str) -> None:
        """Nothing."""

    def advance(self, tokens: float) -> None:
        """Nothing."""


class Runner:
    """A study that is ready to run: folder checked, model and tasks loaded, jobs planned.

    Args:
        spec: What was asked; it must name a folder.
        parts: What of the study is wanted.
        reporter: Told of progress.
        command: The command line, kept as provenance.
        loaded: The model, where it is in memory already.

    Raises:
        HeadcountError: For anything in the options, model, tasks, data or folder that cannot work, before anything is
            measured or written; of the documents, the first ones are tried.
    """

    def __init__(
        self, spec: StudySpec, *, parts: Sequence[Part] = PARTS, reporter: Reporter | None = None, command: str = "",
        loaded: LoadedModel | None = None,
    ) -> None:
        if spec.out is None:
            raise OptionError("a study needs a folder; name it with --out DIR")
        self.spec = spec
        self.command = command
        self.reporter: Reporter = reporter or Silent()
        self.ledger = Ledger(spec.out)
        # Slips in the options are told before anything is loaded.
        _same_options(spec, _previous(self.ledger), self.ledger.folder)
        # Tasks first: they load faster than models, and most slips of the pen are in their options.
        self.reporter.stage("loading tasks")
        from headcount.measure.tasks import SPLITS, get_tasks

        self.splits: list[Split] = [s for s in SPLITS if s in reads(spec, parts)]
        self.tasks = get_tasks(spec.tasks, data=spec.data, examples_split=spec.examples_split, protocol=spec.protocol)
        self._check_prompts()
        self.reporter.stage(f"loading {spec.model}")
        self.loaded = loaded or _load(spec)
        if self.loaded.apply_chat_template != spec.apply_chat_template:
            raise OptionError("the model that was passed and the options differ in apply_chat_template; give the same")
        _verified(self.loaded)
        self.reporter.stage("timing rows and batches")
        self.budget = _budget(self.loaded, spec, _previous(self.ledger))
        self._prepared: dict[tuple[str, int, str], Prepared] = {}
        self.facts: list[TaskFacts] = []
        for task in self.tasks.values():
            self.reporter.stage("planning", len(self.facts), len(self.tasks))
            self.facts.append(self._facts(task))
        self.previous = self._begun()
        self.jobs = plan(spec, self.loaded.identity, self.loaded.anatomy.heads_per_layer, self.facts, parts)

    def run(self) -> Path:
        """Do all jobs that are not done; returns the study folder."""
        self.previous = self._begun()
        self.ledger.write_json("study.json", self._description())
        todo = [planned for planned in self.jobs if not self.ledger.has(planned.job)]
        self.reporter.begin(len(todo), len(self.jobs) - len(todo), sum(p.tokens for p in todo))
        for planned in todo:
            self.reporter.job(planned.title)
            self._do(planned)
        return self.ledger.folder

    def _begun(self) -> dict[str, Any] | None:
        """What stands in the folder by now: another process may have begun the same study, or another one."""
        previous = _previous(self.ledger)
        _same_options(self.spec, previous, self.ledger.folder)
        _same_data(previous, self.loaded.identity, {f.name: f.fingerprint for f in self.facts}, self.ledger.folder)
        return previous

    def _check_prompts(self) -> None:
        for done, task in enumerate(self.tasks.values()):
            self.reporter.stage("checking prompts", done, len(self.tasks))
            for num_fewshot in self.spec.shots:
                for split in self.splits:
                    task.prompts(split, num_fewshot=num_fewshot, limit=1, seed=self.spec.seed,
                                 shared_shots=self.spec.shared_shots)

    def _facts(self, task: Task) -> TaskFacts:
        counts: dict[Split, dict[int, int]] = {"evaluation": {}, "examples": {}}
        tokens: dict[tuple[int, str], float] = {}
        limits = {"evaluation": self.spec.limit, "examples": self.spec.importance_limit}
        for split in self.splits:
            for k in self.spec.shots:
                available = task.size(split, shared_shots=k if self.spec.shared_shots else 0)
                limit = limits[split]
                counts[split][k] = available if limit is None else min(limit, available)
                sample = self._prepare(task, k, split, min(_SAMPLE, counts[split][k]))
                tokens[k, split] = sample.tokens / len(sample.prompts)
                if split == "examples":
                    longest = [int(b.depths.max(initial=0)) + 1 for b in sample.batches]
                    tokens[k, "gradient"] = sum(longest) / len(longest)
        return TaskFacts(task.name, task.fingerprint, counts["evaluation"], counts["examples"], tokens)

    def _description(self) -> dict[str, Any]:
        old = self.previous or {}
        spec = self.spec.to_json()
        old_spec = old.get("spec", {})
        for key in ("tasks", "shots"):
            spec[key] = list(dict.fromkeys([*old_spec.get(key, []), *(self.tasks if key == "tasks" else spec[key])]))
        anatomy = self.loaded.anatomy
        layers = range(anatomy.num_layers)
        before = old.get("tasks", {})
        tasks = {
            facts.name: {"fingerprint": facts.fingerprint, "metric": self.tasks[facts.name].metric,
                         "documents": min(facts.documents.values(), default=None),
                         "examples": min(facts.examples.values(), default=None),
                         "notes": list(self.tasks[facts.name].notes)}
            for facts in self.facts
        }
        return {
            "spec": spec,
            "model": {**self.loaded.provenance, "fingerprint": self.loaded.identity},
            "anatomy": {"heads_per_layer": list(anatomy.heads_per_layer), "parameters": anatomy.num_parameters,
                        "parameters_per_head": [anatomy.parameters_per_head(i) for i in layers],
                        "parameters_per_ffn": [anatomy.parameters_per_ffn(i) for i in layers]},
            "tasks": {**before, **{name: _merged(before.get(name, {}), known) for name, known in tasks.items()}},
            "layout": _layout_reason(self.loaded),
            "masks": _masks_reason(self.loaded),
            "budget": {"device": _device(self.loaded), **dataclasses.asdict(self.budget)},
            "command": self.command,
            "created": old.get("created") or datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": versions(),
        }

    def _do(self, planned: PlannedJob) -> None:
        started = time.monotonic()
        job = planned.job
        task = self.tasks[job["task"]]
        if job["kind"] == "evaluation":
            table, info = self._evaluation(task, planned)
        elif job["method"] == "gradient":
            table, info = self._gradient(task, job)
        else:
            table, info = self._oracle(planned.needs, job.get("component", "ffn"))
        info |= {"seconds": round(time.monotonic() - started, 3), "versions": versions()}
        self.ledger.write(job, table, info)

    def _evaluation(self, task: Task, planned: PlannedJob) -> tuple[pd.DataFrame, dict[str, Any]]:
        from headcount.measure.scoring import score

        job = planned.job
        labelled = self._masks(job["curve"], planned.needs)
        prepared = self._prepare(task, job["num_fewshot"], job["split"], job["documents"], keep=True)
        planned_per_token = planned.tokens / max(1, prepared.tokens * len(labelled))
        measured = score(self.loaded, prepared, [mask for mask, _ in labelled],
                         progress=lambda n: self.reporter.advance(n * planned_per_token))
        removed = self.loaded.anatomy.parameters_removed
        info = {
            "metric": measured.metric,
            "truncated": measured.truncated,
            "tokens": measured.tokens,
            "layer_tokens": measured.layer_tokens,
            "masks": [{**label, "heads_removed": len(mask.heads_removed), "ffns_removed": len(mask.ffns_removed),
                       "parameters_removed": removed(mask), "mask": mask.to_json()} for mask, label in labelled],
        }
        return evaluation_table(measured), info

    def _gradient(self, task: Task, job: Job) -> tuple[pd.DataFrame, dict[str, Any]]:
        from headcount.measure.importance import gradient_importance

        found = gradient_importance(
            self.loaded, task, num_fewshot=job["num_fewshot"], limit=job["documents"], seed=self.spec.seed,
            shared_shots=self.spec.shared_shots, budget=self.budget,
            progress=lambda n: self.reporter.advance(float(GRADIENT_PASSES * n)),
        )
        table = pd.concat([importance_table(found["head"]), importance_table(found["ffn"])], ignore_index=True)
        return table, {"num_examples": found["head"].num_examples, "truncated": found["head"].truncated}

    def _oracle(self, needs: Sequence[Job], component: Component) -> tuple[pd.DataFrame, dict[str, Any]]:
        from headcount.measure.importance import oracle_from

        entries = [self.ledger.read(job) for job in needs]
        measured = evaluations_from([e.table for e in entries], [e.info for e in entries], needs[0])
        found = oracle_from(measured, component)
        distinct = len(np.unique(found.scores["accuracy"][np.isfinite(found.scores["accuracy"])]))
        return importance_table(found), {"num_examples": found.num_examples, "distinct_values": distinct}

    def _masks(self, curve: Mapping[str, Any], needs: Sequence[Job]) -> list[tuple[Mask, dict[str, Any]]]:
        heads = self.loaded.anatomy.heads_per_layer
        full = Mask.full(heads)
        label = {"component": "none", "order": curve["order"], "order_seed": -1, "fraction": 0.0, "layer": -1,
                 "head": -1}
        if curve["order"] == "none":
            return [(full, label)]
        label["component"] = curve["component"]
        if curve["order"] == "single":
            if curve["component"] == "head":
                return [(full.without_heads([(layer, head)]), {**label, "layer": layer, "head": head})
                        for layer, head in curve["heads"]]
            return [(full.without_ffns([i]), {**label, "layer": i}) for i in curve["layers"]]
        if curve["order"] == "random":
            label["order_seed"] = curve["order_seed"]
            order = random_order(sum(heads) if curve["component"] == "head" else len(heads), curve["order_seed"])
        else:
            order = stored_order(self.ledger.read(needs[0]).table, curve["component"], curve.get("score"))
        return [(prune(heads, curve["component"], order, f), {**label, "fraction": f}) for f in curve["fractions"]]

    def _prepare(self, task: Task, num_fewshot: int, split: Split, documents: int, *, keep: bool = False) -> Prepared:
        from headcount.measure.scoring import prepare

        key = (task.name, num_fewshot, split)
        if keep and key in self._prepared:
            return self._prepared[key]
        prepared = prepare(self.loaded, task, num_fewshot=num_fewshot, limit=documents, split=split,
                           seed=self.spec.seed, shared_shots=self.spec.shared_shots,
                           budget=self.budget)
        if keep:
            # Jobs of one task and number of shots follow one another: what went before is not needed again.
            self._prepared = {k: v for k, v in self._prepared.items() if k[:2] == key[:2]} | {key: prepared}
        return prepared


def run_study(
    spec: StudySpec, *, parts: Sequence[Part] = PARTS, reporter: Reporter | None = None, command: str = "",
    loaded: LoadedModel | None = None,
) -> Path:
    """Measure everything a study asks for that is not in its folder yet; returns the folder.

    The arguments and errors are those of `Runner`.
    """
    return Runner(spec, parts=parts, reporter=reporter, command=command, loaded=loaded).run()


def versions() -> dict[str, str]:
    """Versions of what a result hangs on."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """What is known now; where this run did not look, what was known."""
    return {key: old.get(key) if value is None else value for key, value in new.items()}


def _load(spec: StudySpec) -> LoadedModel:
    from headcount.model.load import load

    return load(spec.model, dtype=spec.dtype, device=spec.device, device_map=spec.device_map,
                attn_implementation=spec.attn_implementation, trust_remote_code=spec.trust_remote_code,
                revision=spec.revision, apply_chat_template=spec.apply_chat_template)


def _verified(loaded: LoadedModel) -> None:
    """Nothing is measured on a model whose heads and FFNs are not where they seem to be."""
    from headcount.model.contracts import verify

    for result in verify(loaded):
        if not result.holds:
            raise ModelError(f"{loaded.name} cannot be measured: it fails the check '{result.name}' ({result.detail}); "
                             "headcount anatomy MODEL --verify shows more")


def _budget(loaded: LoadedModel, spec: StudySpec, previous: Mapping[str, Any] | None) -> Budget:
    """As before in this folder, so that equal jobs are laid out alike; what the options say goes first."""
    from headcount.measure.budget import budget_of
    from headcount.measure.packing import Budget, Cost

    kept = (previous or {}).get("budget")
    if kept is None or kept["device"] != _device(loaded):
        return budget_of(loaded, spec.row_tokens, spec.batch_tokens)
    found = Budget(spec.row_tokens, kept["batch_tokens"], kept["gradient_tokens"], kept["longest_row"],
                   Cost(**kept["cost"]))
    if spec.batch_tokens is None:
        return found
    return dataclasses.replace(found, batch_tokens=spec.batch_tokens, gradient_tokens=spec.batch_tokens)


def _device(loaded: LoadedModel) -> str:
    from headcount.measure.budget import device_key

    return device_key(loaded)


def _layout_reason(loaded: LoadedModel) -> str:
    from headcount.measure.layout import layout

    return str(layout(loaded))


def _masks_reason(loaded: LoadedModel) -> str:
    from headcount.measure.forward import sweep_contract

    found = sweep_contract(loaded)
    return "layers before the first difference are shared" if found.holds else f"one forward pass each: {found.detail}"


def _previous(ledger: Ledger) -> dict[str, Any] | None:
    """What study.json of an earlier run says; None in a folder that is new or empty."""
    if ledger.folder.is_file():
        raise StudyError(f"{ledger.folder} is a file; --out names a folder")
    previous = ledger.read_json("study.json")
    if previous is None and ledger.folder.is_dir() and any(not f.name.startswith(".") for f in ledger.folder.iterdir()):
        raise StudyError(f"{ledger.folder} is not empty and holds no study; choose another --out")
    return previous


def _same_options(spec: StudySpec, previous: Mapping[str, Any] | None, folder: Path) -> None:
    if previous is None:
        return
    before = previous["spec"]
    defaults = {f.name: f.default for f in dataclasses.fields(spec)}
    for name, value in spec.to_json().items():
        # An option that a folder does not know came after it: it was measured as by default.
        was = before.get(name, defaults[name])
        if name not in _FREE and was != value:
            raise StudyError(f"{folder} holds another study (--{name.replace('_', '-')} was {was}, "
                             f"is {value}); choose another --out, or give the same options")


def _same_data(
    previous: Mapping[str, Any] | None, model: str, tasks: Mapping[str, str], folder: Path
) -> None:
    if previous is None:
        return
    if previous["model"]["fingerprint"] != model:
        raise StudyError(f"{folder} holds a study of another model ({previous['model'].get('name')}, other weights, "
                         "type or tokenizer); choose another --out")
    for name, fingerprint in tasks.items():
        known = previous["tasks"].get(name)
        if known is not None and known["fingerprint"] != fingerprint:
            raise StudyError(f"{folder} holds a study of other documents of task {name!r}; choose another --out")
