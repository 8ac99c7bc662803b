"""Running a study: jobs in order, each done once and saved in the ledger; what is there already is not done again."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headcount.errors import JobsFailedError, OptionError, few
from headcount.study.described import parts_asked
from headcount.study.folder import asked_before, merged, request
from headcount.study.ledger import Ledger
from headcount.study.plan import TaskFacts
from headcount.study.prepare import Plan, Reporter, Silent, prepare
from headcount.study.spec import Part, StudySpec
from headcount.study.worker import versions

if TYPE_CHECKING:
    from headcount.model.load import LoadedModel


def run_study(
    spec: StudySpec, *, parts: Sequence[Part] | None = None, reporter: Reporter | None = None, command: str = "",
    loaded: LoadedModel | None = None,
) -> Path:
    """Measure everything a study asks for that is not in its folder yet; returns the folder.

    Args:
        spec: What was asked; it must name a folder.
        parts: What of the study is wanted; None: what its options say.
        reporter: Told of progress.
        command: The command line, kept as provenance.
        loaded: The model, where it is in memory already.

    Raises:
        HeadcountError: As `headcount.study.prepare.prepare`, before anything is measured or written.
    """
    if spec.out is None:
        raise OptionError("a study needs a folder; name it with `out`", fields=("out",))
    return run(prepare(spec, parts=parts, reporter=reporter, loaded=loaded), reporter=reporter, command=command)


def run(plan: Plan, *, reporter: Reporter | None = None, command: str = "") -> Path:
    """Do all jobs of a plan that are not done; returns the study folder.

    Args:
        plan: From `prepare`, with a folder. Where workers do its jobs, its model's weights are given up.
        reporter: Told of progress.
        command: The command line, kept as provenance.

    Raises:
        StudyError: If another process has begun another study in the folder meanwhile.
        JobsFailedError: If some jobs failed that were handed out to several workers, when all others are done.
    """
    from headcount.study.executors import by_ray, in_this_process

    reporter, ledger, shared = reporter or Silent(), plan.folder, plan.spec.executor == "ray"
    if plan.loaded.stream_memory is not None:
        from headcount.study.forecast import check_waiting

        reporter.stage("counting what waits")
        check_waiting(plan, plan.loaded.stream_memory)
    measured = _measured_with(plan)
    with ledger.driven() if shared else contextlib.nullcontext():
        _describe(plan, ledger, command, measured)
        todo = plan.todo()
        reporter.begin(len(todo), len(plan.jobs) - len(todo), sum((p.tokens for p in todo), 0.0))
        done = (by_ray if shared else in_this_process)(plan, todo, reporter)
        # Contract 3 is proved by the first job that swept several masks; a description that was lost is written anew.
        if done.masks is not None or not (ledger.folder / "study.json").exists():
            _describe(plan, ledger, command, measured | {"masks": done.masks or measured["masks"]})
    if done.failed:
        first, more = done.failed[0], len(done.failed) - 1
        raise JobsFailedError(
            f"{first.title} failed ({first.reason.rstrip('.')})" + (f", and {more} more job{'s' * (more > 1)}: " + few(
                [failed.title for failed in done.failed[1:]]) if more else "")
            + "; all others are measured, and the same command tries these again")
    return ledger.folder


def _measured_with(plan: Plan) -> dict[str, Any]:
    """What study.json says of how things are measured; taken before the model may be given up."""
    from headcount.engine.engine import Engine

    engine = Engine.of(plan.loaded)
    return {"layout": str(engine.layout), "masks": engine.masks_reason, "notes": [*plan.loaded.notes, *engine.notes],
            "budget": {"device": engine.device_key, **dataclasses.asdict(plan.budget)}}


def _describe(plan: Plan, ledger: Ledger, command: str, measured: Mapping[str, Any]) -> None:
    """Write study.json: what was asked, of which model and documents, and how it was measured."""
    with ledger.locked():
        before = plan.check_folder() or {}
        if before and "parts" not in before:  # an earlier version's: whether it has a head oracle is not said there
            oracle = any(key.get("component") == "head" for key in ledger.keys("importance"))
            before = {**before, "parts": [p for p in parts_asked(before) if p != "head_oracle" or oracle]}
        ledger.write_json("study.json", _description(plan, before, command, measured))


def _description(
    plan: Plan, before: Mapping[str, Any], command: str, measured: Mapping[str, Any]
) -> dict[str, Any]:
    anatomy, how = plan.loaded.anatomy, {name: said for name, said in measured.items() if name != "notes"}
    layers = range(anatomy.num_layers)
    tasks, unseen = dict(before.get("tasks", {})), dict(before.get("unseen", {}))
    for facts in plan.facts:
        is_unseen = facts.name in plan.unseen
        # A task that was unseen may be given an order of its own.
        known_before: dict[str, Any] = {} if is_unseen else unseen.pop(facts.name, {})
        of_kind = unseen if is_unseen else tasks
        of_kind[facts.name] = merged(of_kind.get(facts.name, known_before), _known_of(plan, facts))
    asked = request(plan.spec, plan.parts, before or None, [t for t in plan.tasks if t not in plan.unseen],
                    [t for t in plan.tasks if t in plan.unseen])
    named = {"tasks": {name: tasks[name] for name in asked["spec"]["tasks"]},
             "unseen": {name: unseen[name] for name in asked["spec"]["unseen"]}}
    return {
        **asked,
        "tasks": tasks,
        "unseen": unseen,
        "asked": asked_before(before or None, {**asked, **named}),
        "model": {**plan.loaded.provenance, "notes": measured["notes"], "fingerprint": plan.identity,
                  "identity": plan.loaded.identity},
        "anatomy": {"heads_per_layer": list(anatomy.heads_per_layer),
                    "kv_groups_per_layer": [part.num_kv_heads for part in anatomy.layers],
                    "parameters": anatomy.num_parameters,
                    "parameters_per_head": [anatomy.parameters_per_head(i) for i in layers],
                    "parameters_per_ffn": [anatomy.parameters_per_ffn(i) for i in layers]},
        **how,
        "masks": measured["masks"] or before.get("masks"),
        "commands": list(dict.fromkeys(filter(None, [*before.get("commands", [before.get("command")]), command]))),
        "created": before.get("created") or datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
    }


def _known_of(plan: Plan, facts: TaskFacts) -> dict[str, Any]:
    """What is known of a task: its documents, metric and notes, and what a constant answer gets."""
    from headcount.tasks.baseline import constant_answer

    task, documents = plan.tasks[facts.name], min(facts.documents.values(), default=None)
    accuracy, places = (None, None) if documents is None else constant_answer(task, documents)
    return {
        "fingerprint": facts.fingerprint, "metric": task.metric, "documents": documents,
        "examples": min(facts.examples.values(), default=None),
        "by_shots": {str(k): {"documents": facts.documents.get(k), "examples": facts.examples.get(k),
                              "shared_shots": plan.spec.shared_shots if k else False} for k in plan.spec.shots},
        "constant_answer": accuracy, "constant_places": places, "notes": list(task.notes),
    }
