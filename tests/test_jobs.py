"""Jobs: their names are those of earlier versions, they are read back, and steps that are measured are not planned."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import headcount as hc
import tiny
from headcount.errors import OptionError, StudyError
from headcount.masks import Mask
from headcount.study.jobs import Evaluation, HeadOracle, OracleImportance, job_from, name_of
from headcount.study.ledger import Ledger
from headcount.study.masksets import FullModel, Grid, RandomCurve, SingleFFNs, Transfer, steps_of
from headcount.study.plan import PlannedJob, TaskFacts, missing, plan
from headcount.study.prepare import prepare
from headcount.study.runner import run, run_study
from headcount.study.spec import InductionSpec, ModelSpec, Part, StudySpec, fields_that, parts_of

FACTS = [TaskFacts("a", "fa", {0: 9, 1: 9, 2: 8, 5: 9}, {0: 12, 1: 12, 2: 11, 5: 12}),
         TaskFacts("b", "fb", {0: 7, 1: 7, 2: 7, 5: 7}, {0: 12, 1: 12, 2: 12, 5: 12}),
         TaskFacts("c", "fc", {0: 7, 1: 7, 2: 7, 5: 7}, {0: 5, 1: 5, 2: 5, 5: 5}, unseen=True)]
EVERYTHING = ("curves", "grid", "transfer", "induction")
SPECS: dict[str, dict[str, Any]] = {
    "curves": {},
    "one shot number": {"shots": (0,)},
    "chat, shared shots": {"apply_chat_template": True, "shared_shots": True, "shots": (0, 2)},
    "paper": {"protocol": "paper"},
    "everything": {"measure": EVERYTHING, "transfer_components": ("head", "ffn")},
    "everything by ranks": {"measure": EVERYTHING[:3], "aggregate": "ranks", "grid_order": "mean"},
    "transfer alone": {"measure": ("transfer",), "transfer_limit": 4, "transfer_components": ("head", "ffn")},
    "grid alone": {"measure": ("grid",), "grid_limit": 3, "masks_per_job": 3},
    "gradient orders": {"ffn_order": "gradient", "random_orders": 0, "head_score": "position"},
    "accuracy": {"ffn_score": "accuracy", "measure": EVERYTHING[:3], "transfer_components": ("ffn",)},
    "induction chosen": {"measure": ("induction",), "induction_lengths": (50, 20), "induction_seeds": 3,
                         "skip_control": True, "seed": 7},
}
PARTS: dict[str, tuple[Part, dict[str, Any]]] = {
    "head oracle": ("head_oracle", {}),
    "head oracle of a sample": ("head_oracle", {"head_sample": 4}),
    "evaluate": ("evaluate", {}),
    "ffns, paper": ("ffns", {"protocol": "paper"}),
}
# How many jobs the version before typed jobs planned, and a hash of their names, one after another.
NAMES = {
    "curves": (114, "d7cc4874b6a385be"),
    "curves, norms": (114, "2c6b15c2554b8c87"),
    "one shot number": (38, "d6a29b7d28ffe1e7"),
    "one shot number, norms": (38, "4c0b8f75b39e1b11"),
    "chat, shared shots": (76, "0ad6061b2766bdba"),
    "chat, shared shots, norms": (76, "dd1463ac07f79401"),
    "paper": (108, "b93ae7acbca19967"),
    "paper, norms": (108, "6df481c820dacfe7"),
    "everything": (179, "c065966367853b53"),
    "everything, norms": (179, "d7b45258e518071a"),
    "everything by ranks": (159, "adca053d3cb466c7"),
    "everything by ranks, norms": (159, "1d4543ba3e1c0bb5"),
    "transfer alone": (93, "49f111f28118d607"),
    "transfer alone, norms": (93, "4f43bd184e521170"),
    "grid alone": (78, "09936bf9fcea464b"),
    "grid alone, norms": (78, "59c8f44b88d4455b"),
    "gradient orders": (36, "ecdf0b96e20b9185"),
    "gradient orders, norms": (36, "98d8310fa353da71"),
    "accuracy": (153, "3d0e803534095590"),
    "accuracy, norms": (153, "59966dac72193032"),
    "induction chosen": (7, "ba8fc96c952f8d50"),
    "induction chosen, norms": (7, "ba8fc96c952f8d50"),
    "head oracle": (24, "d8e23d9ef9023940"),
    "head oracle of a sample": (24, "30b21e8efffd899a"),
    "evaluate": (6, "2e20da2e5d700a22"),
    "ffns, paper": (18, "2b232f3f1c23f676"),
}


def planned(name: str) -> list[PlannedJob]:
    if name in PARTS:
        part, options = PARTS[name]
        return plan(StudySpec("m", tasks=("a", "b"), **options), "model", (3, 2, 4), FACTS[:2], (part,))
    spec = StudySpec("m", tasks=("a", "b"), **SPECS[name.removesuffix(", norms")])
    facts = FACTS if "transfer" in spec.measure else FACTS[:2]
    return plan(spec, "model", (3, 2, 4), facts, parts_of(spec), through_norms=name.endswith(", norms"))


@pytest.mark.parametrize("name", NAMES)
def test_entries_of_earlier_versions_are_found_again(name: str) -> None:
    names = [name_of(one.job) for one in planned(name)]
    assert (len(names), hashlib.sha256(" ".join(names).encode()).hexdigest()[:16]) == NAMES[name]


@pytest.mark.parametrize("name", NAMES)
def test_a_job_is_read_back_from_its_key(name: str) -> None:
    for one in planned(name):
        job = one.job
        if isinstance(job, OracleImportance | HeadOracle):
            job = dataclasses.replace(job, evaluations=())  # no part of what the entry answers for
        assert job_from(one.key) == job
        assert name_of(job_from(one.key)) == name_of(one.job)


@pytest.mark.parametrize(("key", "said"), [
    ({"kind": "evaluation"}, "Field required"),
    ({"kind": "letter"}, "no job is described so"),
    ({**planned("evaluate")[0].key, "curve": {"order": "by heart"}}, "curve"),
    ({**planned("evaluate")[0].key, "colour": "red"}, "colour"),
])
def test_what_is_no_job_is_refused_in_a_line(key: dict[str, Any], said: str) -> None:
    with pytest.raises(StudyError, match=said) as refused:
        job_from(key)
    assert "\n" not in str(refused.value)


def test_a_set_of_masks_knows_its_masks_and_their_labels() -> None:
    (full, label), = FullModel().masks((3, 2), ())
    assert full.is_full
    assert (label.order, label.component) == ("none", "none")
    labelled = SingleFFNs((1, 0)).masks((3, 2), ())
    assert [(mask.ffns_removed, label.layer) for mask, label in labelled] == [([1], 1), ([0], 0)]
    random = RandomCurve(component="head", order_seed=3, fractions=(0.2, 0.6)).masks((3, 2), ())
    assert [mask for mask, _ in random] == [
        hc.prune((3, 2), "head", hc.random_order(5, 3), fraction) for fraction in (0.2, 0.6)]
    assert [label.fraction for _, label in random] == [0.2, 0.6]
    assert isinstance(random[0][0], Mask)


def test_a_task_that_is_called_like_an_aggregate_has_a_name_of_its_own() -> None:
    facts = [TaskFacts(name, name, {1: 9}, {1: 9}) for name in ("mean", "own", "c")]
    spec = StudySpec("m", tasks=("mean", "own", "c"), shots=(1,), measure=("transfer",))
    jobs = plan(spec, "model", (4, 4), facts, ("transfer",))
    donors = [(job.masks.donor, job.masks.donor_is) for one in jobs
              if isinstance(job := one.job, Evaluation) and isinstance(job.masks, Transfer) and job.task == "c"]
    assert donors == [("mean", None), ("mean", "task"), ("own", "task"), ("mean without own", None), ("own", None)]
    assert len({name_of(one.job) for one in jobs}) == len(jobs)
    usual = plan(spec, "model", (4, 4), [dataclasses.replace(f, name=n) for f, n in zip(facts, "abc", strict=True)],
                 ("transfer",))
    assert not [one for one in usual if "donor_is" in str(one.key)], "the names of usual tasks' entries stay"


def evaluations(jobs: list[PlannedJob]) -> list[Evaluation]:
    return [one.job for one in jobs if isinstance(one.job, Evaluation)]


def test_only_steps_that_no_entry_holds_are_left() -> None:
    spec = StudySpec("m", tasks=("a", "b"), shots=(1,), fractions=(0.2, 0.5), measure=EVERYTHING[:3],
                     grid_fractions=(0.4,))
    more = dataclasses.replace(spec, fractions=(0.2, 0.3, 0.5), grid_fractions=(0.4, 0.8), masks_per_job=2)
    before, after = (plan(s, "model", (3, 2, 4), FACTS[:2], parts_of(s)) for s in (spec, more))
    left = missing(after, evaluations(before))
    assert len(left) == len(after)
    measured = {(job.task, job.split, dataclasses.replace(job, curve=FullModel()), type(job.masks), step, str(
        getattr(job.masks, "order", "")), getattr(job.masks, "component", ""), getattr(job.masks, "donor", ""),
        getattr(job.masks, "order_seed", 0)) for job in evaluations(before) for step in steps_of(job.masks)}
    for one, rest in zip(after, left, strict=True):
        if isinstance(one.job, Evaluation) and steps_of(one.job.masks):
            job = one.job
            expected = [step for step in steps_of(job.masks) if (
                job.task, job.split, dataclasses.replace(job, curve=FullModel()), type(job.masks), step, str(
                    getattr(job.masks, "order", "")), getattr(job.masks, "component", ""),
                getattr(job.masks, "donor", ""), getattr(job.masks, "order_seed", 0)) not in measured]
            rests = list(steps_of(rest.job.masks)) if rest is not None and isinstance(rest.job, Evaluation) else []
            assert rests == expected
    grids = [steps_of(rest.job.masks) for rest in left if rest is not None and isinstance(rest.job, Evaluation)
             and isinstance(rest.job.masks, Grid)]
    assert {point for points in grids for point in points} == {(0.4, 0.8), (0.8, 0.4), (0.8, 0.8), (0.8, 0.0),
                                                               (0.0, 0.8)}


def spec_of(tmp_path: Path, **options: Any) -> StudySpec:
    return StudySpec("tiny", tasks=("piqa",), **{
        "shots": (0,), "limit": 6, "importance_limit": 5, "fractions": (0.25, 0.5), "random_orders": 1,
        "data": tiny.write_task(tmp_path / "data"), "out": tmp_path / "study", **options})


def entries(folder: Path) -> set[str]:
    return {path.name for path in (folder / "entries").iterdir()}


def test_more_of_everything_keeps_what_is_there_and_shows_what_was_asked_last(tmp_path: Path) -> None:
    loaded = tiny.loaded("llama")
    first = spec_of(tmp_path)
    folder = run_study(first, loaded=loaded)
    before = {name: table.copy() for name, table in (("curves", hc.open_study(folder).curves()),
                                                     ("importance", hc.open_study(folder).importance()))}
    there = entries(folder)
    finer = dataclasses.replace(first, fractions=(0.25, 0.5, 0.75), masks_per_job=1)
    steps = [steps_of(one.job.masks) for one in prepare(finer, loaded=loaded).todo()
             if isinstance(one.job, Evaluation)]
    assert steps == [(0.75,), (0.75,)], "heads and FFNs, the new step alone; no oracle and no gradient"
    run_study(finer, loaded=loaded)
    assert there < entries(folder)
    assert set(hc.open_study(folder).curves()["fraction"]) == {0, 0.25, 0.5, 0.75}
    pd.testing.assert_frame_equal(hc.open_study(folder, asked=1).curves(), before["curves"])
    more = dataclasses.replace(finer, limit=8)
    assert not [one for one in prepare(more, loaded=loaded).todo() if not isinstance(one.job, Evaluation)]
    run_study(more, loaded=loaded)
    whole = run_study(dataclasses.replace(more, out=tmp_path / "whole"), loaded=loaded)
    for name in ("curves", "free_fractions", "against_random", "importance", "orders"):
        grown, fresh = (getattr(hc.open_study(one), name)() for one in (folder, whole))
        pd.testing.assert_frame_equal(grown, fresh, check_exact=True)
    assert (hc.open_study(folder).curves()["documents"] == 8).all()
    trained = dataclasses.replace(more, importance_limit=7, random_orders=0)
    run_study(trained, loaded=loaded)
    assert set(hc.open_study(folder).importance()["num_examples"]) == {7}
    pd.testing.assert_frame_equal(hc.open_study(folder, asked=1).importance(), before["importance"])
    assert len(hc.open_study(folder).description["asked"]) == 4
    assert hc.open_study(folder).other_requests == [
        "1: limit 6; importance limit 5; fractions 0.25 0.5; random orders 1; common fractions 0.25 0.5",
        "2: limit 6; importance limit 5; random orders 1",
        "3: importance limit 5; random orders 1"], "what is otherwise, but for places and how work is cut up"
    with pytest.raises(StudyError, match="was asked for 4 different things"):
        hc.open_study(folder, asked=5)
    assert not prepare(trained, loaded=loaded).todo()
    run_study(first, loaded=loaded)
    pd.testing.assert_frame_equal(hc.open_study(folder).curves(), before["curves"])


def test_a_plan_without_a_folder_is_looked_at_and_not_run(tmp_path: Path) -> None:
    ready = prepare(spec_of(tmp_path, out=None), loaded=tiny.loaded("llama"))
    assert len(ready.todo()) == len(ready.jobs) > 0
    with pytest.raises(OptionError, match="name it with out"):
        run(ready)
    assert not (tmp_path / "study").exists()


def test_preparing_writes_nothing(tmp_path: Path) -> None:
    ready = prepare(spec_of(tmp_path), loaded=tiny.loaded("llama"))
    assert ready.jobs
    assert not (tmp_path / "study").exists()


def test_a_job_is_done_by_one_function_that_writes_nothing(tmp_path: Path) -> None:
    from headcount.study.worker import Worker

    ready = prepare(spec_of(tmp_path), loaded=tiny.loaded("llama"), parts=("evaluate",))
    result = next(Worker(ready, lambda tokens: None).entries(ready.jobs[:1], Ledger(tmp_path / "nowhere").read_need))
    assert len(result.table) == 6
    assert result.info["masks"][0]["order"] == "none"
    assert not (tmp_path / "study").exists()


def test_what_binds_a_folder_is_said_where_the_option_is() -> None:
    assert set(fields_that(StudySpec, "binds")) == {
        "apply_chat_template", "protocol", "seed"}
    assert fields_that(StudySpec, "grows") == ("tasks", "shots", "measure", "unseen")
    induction = {f.name for f in dataclasses.fields(InductionSpec)} - {f.name for f in dataclasses.fields(ModelSpec)}
    assert set(fields_that(StudySpec, "induction")) < induction


@pytest.mark.parametrize(("options", "said"), [
    ({"shots": 2}, "shots is a list of values, not 2"),
    ({"measure": "grid"}, "measure is a list of values, not 'grid'"),
    ({"measure": ("grids",)}, "measure is one of 'curves', 'grid', 'transfer', 'induction', not 'grids'"),
    ({"limit": 0}, "limit is at least 1, not 0"),
    ({"limit": "many"}, "limit is a whole number, not 'many'"),
    ({"margin": 2}, "margin lies between 0 and 1, not 2"),
    ({"protocol": "sounds"}, "protocol is one of 'sound', 'paper', not 'sounds'"),
    ({"seed": -1}, "seed is at least 0, not -1"),
    ({"grid_limit": 9, "limit": 5}, r"grid_limit is at most limit \(5\), not 9"),
    ({"fractions": (0.5, 0.2)}, "fractions rise from one to the next: 0.5 0.2 do not"),
])
def test_slips_of_python_are_one_line_that_names_the_argument(options: dict[str, Any], said: str) -> None:
    """In a process of its own: here types are checked before."""
    code = ("import headcount as hc\ntry:\n"
            f"    hc.StudySpec('m', tasks=('a',), **{options!r})\n"
            "except hc.HeadcountError as error:\n    print(str(error)); print(error.on_command_line())")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    in_python, on_command_line = done.stdout.splitlines()
    assert re.search(said, in_python)
    assert "--" not in in_python
    assert f"--{next(iter(options)).replace('_', '-')}" in on_command_line


def test_lists_and_texts_of_python_become_what_an_option_is() -> None:
    code = ("from headcount import StudySpec\nspec = StudySpec('m', tasks=['a'], shots=[0, 5], out='study', limit=3)\n"
            "print(repr((spec.tasks, spec.shots, str(spec.out), spec.limit)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == repr((("a",), (0, 5), "study", 3))


def test_a_path_that_reads_like_an_option_stays_a_path(tmp_path: Path) -> None:
    taken = tmp_path / "out"
    taken.mkdir()
    (taken / "seed").write_text("")
    with pytest.raises(StudyError) as refused:
        prepare(spec_of(tmp_path, out=taken), loaded=tiny.loaded("llama"))
    assert str(refused.value) == f"{taken} is not empty and holds no study; choose another out"
    assert refused.value.on_command_line() == f"{taken} is not empty and holds no study; choose another --out"


def test_arguments_are_told_as_options() -> None:
    error = OptionError("use `device_map='auto'`, or fewer `num_fewshot`, not num_fewshot of old",
                        fields={"device_map='auto'": "--device-map auto", "num_fewshot": "--shots"})
    assert str(error) == "use device_map='auto', or fewer num_fewshot, not num_fewshot of old"
    assert error.on_command_line() == "use --device-map auto, or fewer --shots, not num_fewshot of old"
    assert OptionError("`a_b=True`, `c='d'`", fields=("a_b=True", "c='d'")).on_command_line() == "--a-b, --c d"
