"""Running a study: jobs in order, each measured once and saved in the ledger; what is there already is not done again.

What may be added to a study's folder, and what is refused there, is in `headcount.study.folder`.
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

from headcount.engine import neighbours
from headcount.errors import ModelError, OptionError
from headcount.masks import Component
from headcount.study.codec import evaluation_table, evaluations_from, importance_table, induction_table
from headcount.study.folder import check_data, check_options, merged, merged_spec, other_orders, previous
from headcount.study.jobs import masks_of
from headcount.study.ledger import Job, Ledger
from headcount.study.plan import GRADIENT_PASSES, Part, PlannedJob, TaskFacts, parts_of, plan, reads
from headcount.study.spec import StudySpec

if TYPE_CHECKING:
    from headcount.engine.pack import Budget
    from headcount.measure.evaluate import Prepared
    from headcount.model.load import LoadedModel
    from headcount.tasks.task import Split, Task

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
        parts: What of the study is wanted; None: what its options say.
        reporter: Told of progress.
        command: The command line, kept as provenance.
        loaded: The model, where it is in memory already.

    Raises:
        HeadcountError: For anything in the options, model, tasks, data or folder that cannot work, before anything is
            measured or written; of the documents, the first ones are tried.
    """

    def __init__(
        self, spec: StudySpec, *, parts: Sequence[Part] | None = None, reporter: Reporter | None = None,
        command: str = "", loaded: LoadedModel | None = None,
    ) -> None:
        if spec.out is None:
            raise OptionError("a study needs a folder; name it with --out DIR")
        self.spec = spec
        self.parts = parts_of(spec) if parts is None else tuple(parts)
        self.command = command
        self.reporter: Reporter = reporter or Silent()
        self.ledger = Ledger(spec.out)
        # Slips in the options are told before anything is loaded.
        check_options(spec, previous(self.ledger), self.ledger.folder)
        self.other_orders = other_orders(spec, previous(self.ledger)) if "curve" in self.parts else ""
        # Tasks first: they load faster than models, and most slips of the pen are in their options.
        self.reporter.stage("loading tasks")
        from headcount.tasks.load import get_tasks
        from headcount.tasks.task import SPLITS

        self.splits: list[Split] = [s for s in SPLITS if s in reads(spec, self.parts)]
        named = spec.tasks, spec.unseen if "transfer" in self.parts else ()
        seen, unseen = (get_tasks(names, data=spec.data, examples_split=spec.examples_split, protocol=spec.protocol)
                        for names in named)
        if both := seen.keys() & unseen.keys():
            raise OptionError(f"{', '.join(sorted(both))} cannot be among both --tasks and --unseen")
        self.tasks, self.unseen = seen | unseen, frozenset(unseen)
        if "transfer" in self.parts and len(seen) < 2 and not unseen:
            raise OptionError("--measure transfer takes one task's order to another: name two --tasks, or --unseen")
        self._check_prompts()
        self.reporter.stage(f"loading {spec.model}")
        self.loaded = loaded or _load(spec)
        if self.loaded.apply_chat_template != spec.apply_chat_template:
            raise OptionError("the model that was passed and the options differ in apply_chat_template; give the same")
        _verified(self.loaded)
        if "induction" in self.parts:
            from headcount.measure.induction import check

            check(self.loaded, lengths=spec.induction_lengths, protocol=spec.protocol, control=not spec.skip_control)
        self.reporter.stage("timing rows and batches")
        self.budget = _budget(self.loaded, spec, previous(self.ledger))
        self._prepared: dict[tuple[str, int, str, int], Prepared] = {}
        self.facts: list[TaskFacts] = []
        for task in self.tasks.values():
            self.reporter.stage("planning", len(self.facts), len(self.tasks))
            self.facts.append(self._facts(task))
        self.previous = self._begun()
        self.jobs = plan(spec, self.loaded.identity, self.loaded.anatomy.heads_per_layer, self.facts,
                         self.parts, through_norms=bool(self.loaded.norms))

    def run(self) -> Path:
        """Do all jobs that are not done; returns the study folder."""
        layout, masks = _layout_reason(self.loaded), _masks_reason(self.loaded)
        with self.ledger.locked():
            self.previous = self._begun()
            self.ledger.write_json("study.json", self._description(layout, masks))
        todo = self.todo()
        self.reporter.begin(len(todo), len(self.jobs) - len(todo), sum((p.tokens for p in todo), 0.0))
        for planned in todo:
            self.reporter.job(planned.title)
            self._do(planned)
        return self.ledger.folder

    def todo(self) -> list[PlannedJob]:
        """The jobs that are not done yet."""
        return [planned for planned in self.jobs if not self.ledger.has(planned.job)]

    def speed(self) -> neighbours.Speed:
        """How fast the last task's first documents go through the model, and how busy others kept the cores."""
        from headcount.engine.budget import threads_of
        from headcount.engine.engine import loglikelihood

        if not self.facts:
            return neighbours.Speed()
        task, k = self.tasks[self.facts[-1].name], self.spec.shots[-1]
        prepared = self._prepare(task, k, self._splits(task)[0], _SAMPLE)
        with neighbours.watch(threads_of(self.loaded)) as load:
            started = time.perf_counter()
            loglikelihood(self.loaded, prepared.batches, sum(prepared.counts), tree_mask=prepared.layout.tree_mask)
            seconds = time.perf_counter() - started
        return neighbours.Speed(prepared.tokens / seconds, load)

    def _begun(self) -> dict[str, Any] | None:
        """What stands in the folder by now: another process may have begun the same study, or another one."""
        found = previous(self.ledger)
        check_options(self.spec, found, self.ledger.folder)
        check_data(found, self.loaded.identity, {f.name: f.fingerprint for f in self.facts}, self.unseen,
                   self.ledger.folder)
        return found

    def _check_prompts(self) -> None:
        for done, task in enumerate(self.tasks.values()):
            self.reporter.stage("checking prompts", done, len(self.tasks))
            for num_fewshot in self.spec.shots:
                for split in self._splits(task):
                    task.prompts(split, num_fewshot=num_fewshot, limit=1, seed=self.spec.seed,
                                 shared_shots=self.spec.shared_shots)

    def _splits(self, task: Task) -> list[Split]:
        """Which documents of a task are read; of an unseen one none for importance."""
        return [s for s in self.splits if s == "evaluation" or task.name not in self.unseen]

    def _facts(self, task: Task) -> TaskFacts:
        counts: dict[Split, dict[int, int]] = {"evaluation": {}, "examples": {}}
        tokens: dict[tuple[int, str], float] = {}
        limits = {"evaluation": self.spec.limit, "examples": self.spec.importance_limit}
        for split in self._splits(task):
            for k in self.spec.shots:
                available = task.size(split, shared_shots=k if self.spec.shared_shots else 0, seed=self.spec.seed)
                limit = limits[split]
                counts[split][k] = available if limit is None else min(limit, available)
                sample = self._prepare(task, k, split, min(_SAMPLE, counts[split][k]))
                tokens[k, split] = sample.tokens / len(sample.prompts)
                if split == "examples":
                    longest = [int(b.depths.max(initial=0)) + 1 for b in sample.batches]
                    tokens[k, "gradient"] = sum(longest) / len(longest)
        return TaskFacts(task.name, task.fingerprint, counts["evaluation"], counts["examples"], tokens,
                         task.name in self.unseen)

    def _description(self, layout: str, masks: str) -> dict[str, Any]:
        old = self.previous or {}
        anatomy = self.loaded.anatomy
        layers = range(anatomy.num_layers)
        known = {
            facts.name: {"fingerprint": facts.fingerprint, "metric": self.tasks[facts.name].metric,
                         "documents": min(facts.documents.values(), default=None),
                         "examples": min(facts.examples.values(), default=None),
                         **self._constant_answer(facts),
                         "notes": list(self.tasks[facts.name].notes)}
            for facts in self.facts
        }
        kept = {"tasks": old.get("tasks", {}), "unseen": old.get("unseen", {})}
        for name, new in known.items():
            # A task that was unseen may be given an order of its own.
            known_before = kept["unseen"].pop(name, {}) if name not in self.unseen else {}
            of_kind = kept["unseen" if name in self.unseen else "tasks"]
            of_kind[name] = merged(of_kind.get(name, known_before), new)
        return {
            "spec": merged_spec(self.spec, self.previous, [t for t in self.tasks if t not in self.unseen],
                                [t for t in self.tasks if t in self.unseen]),
            "model": {**self.loaded.provenance, "fingerprint": self.loaded.identity},
            "anatomy": {"heads_per_layer": list(anatomy.heads_per_layer), "parameters": anatomy.num_parameters,
                        "parameters_per_head": [anatomy.parameters_per_head(i) for i in layers],
                        "parameters_per_ffn": [anatomy.parameters_per_ffn(i) for i in layers]},
            **kept,
            "layout": layout,
            "masks": masks,
            "budget": {"device": _device(self.loaded), **dataclasses.asdict(self.budget)},
            "commands": list(dict.fromkeys(filter(None, [*old.get("commands", [old.get("command")]), self.command]))),
            "created": old.get("created") or datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": versions(),
        }

    def _constant_answer(self, facts: TaskFacts) -> dict[str, Any]:
        from headcount.tasks.baseline import constant_answer

        documents = min(facts.documents.values(), default=None)
        found = (None, None) if documents is None else constant_answer(self.tasks[facts.name], documents)
        return dict(zip(("constant_answer", "constant_places"), found, strict=True))

    def _do(self, planned: PlannedJob) -> None:
        started = time.monotonic()
        job = planned.job
        if job["kind"] == "induction":
            table, info = self._induction(job)
        elif job["kind"] == "evaluation":
            table, info = self._evaluation(self.tasks[job["task"]], planned)
        elif job["method"] == "gradient":
            table, info = self._gradient(self.tasks[job["task"]], job)
        else:
            table, info = self._oracle(planned.needs, job.get("component", "ffn"))
        info |= {"seconds": round(time.monotonic() - started, 3), "versions": versions()}
        self.ledger.write(job, table, info)

    def _evaluation(self, task: Task, planned: PlannedJob) -> tuple[pd.DataFrame, dict[str, Any]]:
        from headcount.measure.evaluate import score

        job = planned.job
        labelled = masks_of(job["curve"], self.loaded.anatomy.heads_per_layer,
                            [self.ledger.read(need).table for need in planned.needs])
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

    def _induction(self, job: Job) -> tuple[pd.DataFrame, dict[str, Any]]:
        from headcount.measure.induction import induction_scores, randomised

        loaded = self.loaded if job["weights"] == "trained" else randomised(self.loaded, job["seed"])
        found = induction_scores(loaded, lengths=job.get("lengths"), seeds=job["seeds"], seed=job["seed"],
                                 protocol=job["protocol"],
                                 progress=lambda n: self.reporter.advance(float(n)))
        info = {"sequences": found.sequences, "lengths": list(found.lengths), "repeats": found.repeats,
                "reliability": dict(found.reliability), "notes": list(found.notes)}
        return induction_table(found), info

    def _prepare(self, task: Task, num_fewshot: int, split: Split, documents: int, *, keep: bool = False) -> Prepared:
        from headcount.measure.evaluate import prepare

        key = (task.name, num_fewshot, split, documents)
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
    spec: StudySpec, *, parts: Sequence[Part] | None = None, reporter: Reporter | None = None, command: str = "",
    loaded: LoadedModel | None = None,
) -> Path:
    """Measure everything a study asks for that is not in its folder yet; returns the folder.

    The arguments and errors are those of `Runner`.
    """
    return Runner(spec, parts=parts, reporter=reporter, command=command, loaded=loaded).run()


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def _load(spec: StudySpec) -> LoadedModel:
    from headcount.model.load import load

    return load(spec.model, dtype=spec.dtype, device=spec.device, device_map=spec.device_map,
                attn_implementation=spec.attn_implementation, trust_remote_code=spec.trust_remote_code,
                revision=spec.revision, apply_chat_template=spec.apply_chat_template)


def _verified(loaded: LoadedModel) -> None:
    """Nothing is measured on a model whose heads and FFNs are not where they seem to be."""
    import torch

    from headcount.model.contracts import verify

    try:
        found = verify(loaded)
    except torch.OutOfMemoryError as error:
        raise ModelError(f"memory is too small to check {loaded.name}: gradients of one short pass need all its "
                         "weights on their devices; use more or larger ones, or a smaller dtype") from error
    for result in found:
        if not result.holds:
            raise ModelError(f"{loaded.name} cannot be measured: it fails the check '{result.name}' ({result.detail}); "
                             "headcount anatomy MODEL --verify shows more")


def _budget(loaded: LoadedModel, spec: StudySpec, previous: Mapping[str, Any] | None) -> Budget:
    """As before in this folder, so that equal jobs are laid out alike; what the options say goes first."""
    from headcount.engine.budget import budget_of
    from headcount.engine.pack import Budget, Cost

    kept = (previous or {}).get("budget")
    if kept is None or kept["device"] != _device(loaded):
        return budget_of(loaded, spec.row_tokens, spec.batch_tokens)
    found = Budget(spec.row_tokens, kept["batch_tokens"], kept["gradient_tokens"], kept["longest_row"],
                   Cost(**kept["cost"]))
    if spec.batch_tokens is None:
        return found
    return dataclasses.replace(found, batch_tokens=spec.batch_tokens, gradient_tokens=spec.batch_tokens)


def _device(loaded: LoadedModel) -> str:
    from headcount.engine.budget import device_key

    return device_key(loaded)


def _layout_reason(loaded: LoadedModel) -> str:
    from headcount.engine.layout import layout

    return str(layout(loaded))


def _masks_reason(loaded: LoadedModel) -> str:
    from headcount.engine.engine import sweep_contract

    found = sweep_contract(loaded)
    return "layers before the first difference are shared" if found.holds else f"one forward pass each: {found.detail}"
