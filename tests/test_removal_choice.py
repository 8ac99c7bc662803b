"""Mask files, the points that a study measured by one order, and which of them is chosen."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest

import headcount as hc
import synthetic_study as synthetic
import tiny
from headcount.analysis.choice import Choice
from headcount.analysis.study import Study
from headcount.errors import DataError, HeadcountError, OptionError, StudyError
from headcount.mask_file import MaskFile, check_mask, read_mask
from headcount.masks import Head, Mask, prune
from headcount.stats.intervals import Sample, difference_interval
from headcount.study.ledger import Ledger, job_id
from headcount.study.runner import run_study
from headcount.study.spec import ChoiceSpec, StudySpec
from test_cli import headcount

HEADS = synthetic.HEADS_PER_LAYER
DOCUMENTS = 400
# By the order of all tasks: shares of heads and FFNs, and how many of 100 documents are right; the full model's 80.
STEADY = {(0.25, 0.0): 80, (0.5, 0.0): 80, (0.75, 0.0): 70, (0.0, 0.25): 80, (0.0, 0.5): 60, (0.25, 0.25): 80,
          (0.5, 0.25): 77, (0.25, 0.5): 80, (0.5, 0.5): 55}
JOINT = [(h, f) for h, f in STEADY if h and f]


def both(heads: float, ffns: float) -> Mask:
    """What an order by position removes."""
    n = sum(HEADS)
    return Mask(prune(HEADS, "head", range(n), heads).heads, prune(HEADS, "ffn", range(len(HEADS)), ffns).ffns)


def label(mask: Mask, **told: object) -> dict[str, object]:
    heads, ffns = len(mask.heads_removed), len(mask.ffns_removed)
    gone = heads * synthetic.PARAMETERS_PER_HEAD + ffns * synthetic.PARAMETERS_PER_FFN
    return {"order_seed": -1, "layer": -1, **told, "heads_removed": heads, "ffns_removed": ffns,
            "parameters_removed": gone, "mask": mask.to_json()}


def importance_name(task: str, k: int, method: str) -> str:
    return job_id({**synthetic.of_task("importance", task, k, 50), "method": method})


def add(ledger: Ledger, task: str, k: int, curve: dict[str, object], points: Mapping[tuple[float, float], int],
        component: str, documents: int = DOCUMENTS, mask: Callable[[float, float], Mask] = both) -> None:
    """One entry of these points, each with so many of 100 right."""
    order = curve["order"]
    told = [label(mask(h, f), order=order, component=component, fraction=f if component == "ffn" else h,
                  **({"ffn_fraction": f} if component == "both" else {})) for h, f in points]
    table = pd.concat([synthetic._rows(right, documents, i) for i, right in enumerate(points.values())])
    ledger.write({**synthetic.of_task("evaluation", task, k, documents), "split": "evaluation", "curve": curve}, table,
                 {"metric": "acc", "truncated": 0, "tokens": 1, "seconds": 0.1, "masks": told})


def shared(tasks: tuple[str, ...], k: int, component: str) -> dict[str, object]:
    method, score = ("gradient", {"score": "position"}) if component == "head" else ("oracle", {})
    return {"component": component, "importance": [importance_name(task, k, method) for task in tasks],
            "aggregate": "mean", **score}


def common(ledger: Ledger, task: str, k: int, points: Mapping[tuple[float, float], int],
           tasks: tuple[str, ...] = synthetic.TASKS, **options: Any) -> None:
    """The points by the order of all tasks: curves of heads and of FFNs, and the grid."""
    for component, side in (("head", 1), ("ffn", 0)):
        steps = {point: right for point, right in points.items() if point[side] == 0}
        if steps:
            add(ledger, task, k, {**shared(tasks, k, component), "order": "common",
                                  "fractions": [point[1 - side] for point in steps]}, steps, component, **options)
    joint = {point: right for point, right in points.items() if all(point)}
    if joint:
        orders = {name: {**shared(tasks, k, component), "order": "gradient" if component == "head" else "oracle"}
                  for name, component in (("heads", "head"), ("ffns", "ffn"))}
        add(ledger, task, k, {"order": "grid", "donor": "mean", "points": [list(point) for point in joint], **orders},
            joint, "both", **options)


def described(folder: Path, **changes: object) -> None:
    ledger = Ledger(folder)
    known = ledger.read_json("study.json") or {}
    known["spec"] = {**known["spec"], "measure": ["curves", "grid"], "grid_order": "mean",
                     "common_fractions": [0.25, 0.5, 0.75], **changes}
    known["model"] = {**known["model"], "identity": "2-abc-def"}
    ledger.write_json("study.json", known)


def study_of(folder: Path, *planted: Mapping[tuple[float, float], int], shots: tuple[int, ...] = (0, 5)) -> Study:
    """Of two tasks, with the order of all tasks measured with 5 shots; one set of points for each task, or for both."""
    synthetic.write(folder, documents=DOCUMENTS, shots=shots)
    described(folder)
    for task, points in zip(synthetic.TASKS, planted if len(planted) > 1 else planted * 2, strict=True):
        common(Ledger(folder), task, 5, points)
    return hc.open_study(folder)


@pytest.fixture(scope="module")
def steady(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return study_of(tmp_path_factory.mktemp("steady"), STEADY)


class Found(NamedTuple):
    left: float
    difference: float
    low: float
    mask: Mask


def by_hand(folder: Path, k: int) -> dict[tuple[float, float], Found]:
    """Every point by the order of all tasks, from the entries, document by document."""
    full: dict[str, np.ndarray] = {}
    changes: dict[tuple[float, float], dict[str, np.ndarray]] = {}
    known: dict[tuple[float, float], tuple[float, Mask]] = {}
    entries = [e for e in Ledger(folder).entries("evaluation") if e.job["num_fewshot"] == k]
    for entry in entries:
        if entry.job["curve"]["order"] == "none":
            full[entry.job["task"]] = entry.table.sort_values("doc_id")["correct"].to_numpy()
    for entry in entries:
        if entry.job["curve"]["order"] == "common" or entry.job["curve"].get("donor") == "mean":
            for i, told in enumerate(entry.info["masks"]):
                point = (told["fraction"], 0.0) if told["component"] == "head" else (0.0, told["fraction"])
                point = (told["fraction"], told["ffn_fraction"]) if told["component"] == "both" else point
                values = entry.table[entry.table["mask"] == i].sort_values("doc_id")["correct"].to_numpy()
                changes.setdefault(point, {})[entry.job["task"]] = values - full[entry.job["task"]]
                known[point] = (1 - told["parameters_removed"] / synthetic.PARAMETERS, Mask.from_json(told["mask"]))
    found = {}
    for point, of_tasks in changes.items():
        low = difference_interval([Sample(values[None]) for values in of_tasks.values()]).low[0]
        found[point] = Found(known[point][0], float(np.mean([v.mean() for v in of_tasks.values()])), float(low),
                             known[point][1])
    return found


def fewest(points: Mapping[tuple[float, float], Found], wanted: Callable[[tuple[float, float]], bool]) -> Any:
    able = [point for point in points if wanted(point)]
    return min(able, key=lambda point: (points[point].left, -points[point].difference, point[0]), default=None)


def chosen(study: Study, **way: Any) -> tuple[float, float] | None:
    try:
        row = study.mask(**way).row
    except OptionError:
        return None
    return row["heads_fraction"], row["ffns_fraction"]


@pytest.mark.parametrize("seed", range(3))
def test_the_choice_is_the_obvious_one(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    planted = [{point: int(80 - rng.integers(0, 2) - (rng.random() < 0.4) * rng.integers(0, 20))
                for point in itertools.islice(itertools.product((0.0, 0.25, 0.5, 0.75), repeat=2), 1, None)}
               for _ in synthetic.TASKS]
    study = study_of(tmp_path, *planted, shots=(5,))
    points = by_hand(tmp_path, 5)
    assert len(points) == 15

    def smaller(point: tuple[float, float]) -> list[tuple[float, float]]:
        return [other for other in points if other[0] <= point[0] and other[1] <= point[1]]

    table = study.removable()
    rows = table[table["donor_scope"] == "all tasks"].set_index(["heads_fraction", "ffns_fraction"])
    assert len(rows) == 16
    for point, found in points.items():
        assert rows.loc[point, "difference"] == pytest.approx(found.difference)
        assert rows.loc[point, "difference_low"] == pytest.approx(found.low)
        assert rows.loc[point, "mask"] == found.mask.digest()
        assert rows.loc[point, ["tasks", "documents"]].tolist() == [2, 2 * DOCUMENTS]
    free = fewest(points, lambda p: all(points[other].low > -0.02 for other in smaller(p)))
    assert chosen(study, free=True) == free
    for loss in (0.5, 2.5, 10.0):
        assert chosen(study, within=loss) == fewest(points, lambda p, x=loss: points[p].low > -x / 100)
    for share in (0.4, 0.8, 0.95):
        able = [p for p in points if points[p].left <= share + 1e-9]
        best = max((points[p].difference for p in able), default=0.0)
        assert chosen(study, parameters=share) == fewest(points, lambda p, a=able, b=best: p in a and
                                                         points[p].difference >= b - 1e-9)


def test_what_is_free_is_free_at_every_smaller_step(steady: Study) -> None:
    """At a quarter of heads and half of FFNs nothing is lost, but at half of the FFNs alone much is."""
    found = steady.mask(free=True)
    assert (found.row["heads_fraction"], found.row["ffns_fraction"]) == (0.25, 0.25)
    assert found.mask == both(0.25, 0.25)
    assert (found.order, found.num_fewshot, found.among) == ("mean", 5, len(STEADY))
    assert found.parameters_left == synthetic.PARAMETERS - 6 * 100 - 1000
    within = steady.mask(within=2.0)
    assert (within.row["heads_fraction"], within.row["ffns_fraction"]) == (0.25, 0.5)
    assert steady.mask(parameters=1.0).row["parameters_removed"] == 3600, "as accurate as the full model, and smaller"
    said = found.describe()
    assert "6 of 24 heads and 1 of 6 FFNs go by the order of all tasks together: 1,600 of 20,000 parameters" in said
    assert "with 5 shots (the most that it has), accuracy 0.800 on the mean over 2 tasks (800 documents), 0.0 " in said
    assert "(the most" not in steady.mask(free=True, num_fewshot=5).describe()
    assert "a loss of 2 points is ruled out" in said
    assert "from 9 measured points" in said


def test_a_tasks_own_order_is_judged_on_that_task(steady: Study) -> None:
    table = steady.removable()
    own = table[(table["donor"] == "red") & (table["num_fewshot"] == 5)]
    assert set(zip(own["heads_fraction"], own["ffns_fraction"], strict=True)) == {
        (0, 0), *((f, 0) for f in synthetic.FRACTIONS), *((0, f) for f in synthetic.FRACTIONS)}
    assert own[["scope", "task"]].drop_duplicates().to_numpy().tolist() == [["task", "red"]]
    found = steady.mask(free=True, order="red")
    assert (found.row["heads_fraction"], found.row["tasks"]) == (0.5, 1)
    with pytest.raises(OptionError, match=r"no measured point is free by the order of red, with no shots.*nearest is "
                                          r".*not shown to be above guessing.*\(limit\)"):
        steady.mask(free=True, order="red", num_fewshot=0)
    with pytest.raises(OptionError, match=r"no measured point .*leaves at most 0\.1 of the parameters.*leaves 0\.79"):
        steady.mask(parameters=0.1)


def test_a_study_of_one_task_has_its_own_order_as_that_of_all(tmp_path: Path) -> None:
    study = hc.open_study(synthetic.write(tmp_path, tasks=("red",), documents=DOCUMENTS))
    choices = [study.mask(free=True, order=order) for order in (None, "mean", "red")]
    assert len({choice.to_json() for choice in choices}) == 1
    assert choices[0].order == "red"


@pytest.mark.parametrize(("way", "said"), [
    ({}, "say which measured point: `free`, `within`"),
    ({"free": True, "within": 2.0}, "choose a measured point in one way, not by `free` and `within`"),
    ({"parameters": 0.5, "heads": 0.5}, "not by `parameters` and `heads`"),
    ({"parameters": 60.0}, "`parameters` lies between 0 and 1, not 60.0"),
    ({"within": -1.0}, "`within` lies between 0 and"), ({"within": float("nan")}, "`within` lies between"),
    ({"free": True, "order": "blue"}, "by `order` 'blue' nothing was removed in this study; there is mean, red and "
                                      "green"),
    ({"free": True, "num_fewshot": 1}, "with `num_fewshot` 1; there is 5"),
    ({"free": True, "num_fewshot": 1, "order": "red"}, "with `num_fewshot` 1; there is 0 and 5"),
    ({"heads": 0.3}, "`heads` 0.3 with `ffns` 0 was not measured by the order of all tasks together, with 5 shots; "
                     "measured are heads alone at 0.25 0.5 0.75; FFNs alone at 0.25 0.5; both at 0.25 and 0.25, 0.25 "
                     "and 0.5, 0.5 and 0.25 and 0.5 and 0.5")])
def test_what_cannot_be_chosen_is_told_in_one_line(steady: Study, way: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError) as error:
        steady.mask(**way)
    assert said.replace("`", "") in str(error.value)
    assert "\n" not in str(error.value)


def test_where_nothing_is_free_the_nearest_point_is_named(tmp_path: Path) -> None:
    study = study_of(tmp_path, {(0.25, 0.0): 77, (0.5, 0.0): 70, (0.0, 0.25): 60}, shots=(5,))
    nearest = study.removable().query("donor_scope == 'all tasks' and heads_fraction == 0.25").iloc[0]
    with pytest.raises(OptionError) as error:
        study.mask(free=True)
    said = "loss of 2 points ruled out, at it and at every smaller step; nearest is 0.25 of the heads and 0 of the FFNs"
    assert f"{said}: accuracy 0.770 on the mean over 2 tasks (800 documents), \N{MINUS SIGN}3.0 po" in str(error.value)
    assert "--heads 0.25 --ffns 0" in error.value.on_command_line()
    enough = float(str(error.value).rpartition("within=")[2])
    assert 0 < enough + 100 * nearest["difference_low"] <= 0.1 + 1e-9
    assert study.mask(within=enough).row["heads_fraction"] == 0.25


def test_a_step_at_which_nothing_goes_is_neither_free_nor_in_the_way(tmp_path: Path) -> None:
    """A tenth of six FFNs is none of them, and few documents rule nothing out."""
    synthetic.write(tmp_path, documents=DOCUMENTS, shots=(5,))
    described(tmp_path)
    for task in synthetic.TASKS:
        common(Ledger(tmp_path), task, 5, {(0.0, 0.1): 80}, documents=20)
        common(Ledger(tmp_path), task, 5, {(0.25, 0.0): 80, (0.25, 0.1): 80})
    found = hc.open_study(tmp_path).mask(free=True)
    assert found.row["heads_fraction"] == 0.25


def test_no_mean_is_over_tasks_that_lost_different_parts(tmp_path: Path) -> None:
    def otherwise(heads: float, ffns: float) -> Mask:
        return Mask(prune(HEADS, "head", range(sum(HEADS))[::-1], heads).heads, both(0.0, ffns).ffns)

    synthetic.write(tmp_path, documents=DOCUMENTS, shots=(5,))
    described(tmp_path)
    common(Ledger(tmp_path), "red", 5, STEADY)
    common(Ledger(tmp_path), "green", 5, STEADY, mask=otherwise)
    table = hc.open_study(tmp_path).removable()
    rows = table[table["donor_scope"] == "all tasks"]
    assert set(rows["heads_fraction"]) == {0}, "FFNs go alike"
    assert (rows["tasks"] == 2).all()


def test_a_task_that_is_under_way_does_not_cost_the_others_their_points(tmp_path: Path) -> None:
    tasks = ("red", "green", "blue")
    synthetic.write(tmp_path, tasks=tasks, documents=DOCUMENTS, shots=(5,))
    described(tmp_path)
    for task in tasks[:2]:
        common(Ledger(tmp_path), task, 5, STEADY, tasks)
    common(Ledger(tmp_path), "blue", 5, {(0.25, 0.0): 10}, tasks)
    table = hc.open_study(tmp_path).removable()
    rows = table[table["donor_scope"] == "all tasks"]
    assert len(rows) == len(STEADY) + 1
    assert set(rows["tasks"]) == {2}


def test_of_two_entries_of_a_point_that_of_more_documents_counts(tmp_path: Path) -> None:
    before = len(study_of(tmp_path, STEADY, shots=(5,)).removable())
    for task in synthetic.TASKS:
        curve = {"order": "transfer", "donor": "mean", **shared(synthetic.TASKS, 5, "head"), "fractions": [0.5, 0.9]}
        add(Ledger(tmp_path), task, 5, curve, {(0.5, 0.0): 10, (0.9, 0.0): 50}, "head", documents=40)
    table = hc.open_study(tmp_path).removable()
    rows = table[(table["donor_scope"] == "all tasks") & (table["ffns_fraction"] == 0)].set_index("heads_fraction")
    assert rows.loc[0.5, ["documents", "accuracy"]].tolist() == [800, 0.8]
    assert rows.loc[0.9, ["documents", "accuracy"]].tolist() == [80, 0.5], "a step of transfer by the order of all"
    assert len(table) == before + 1


def test_what_is_gone_stands_in_a_table_by_position(steady: Study) -> None:
    removed, points = steady.removed(), steady.removable()
    for _, row in points.iterrows():
        of_order = removed[(removed["donor_scope"] == row["donor_scope"]) & (removed["donor"] == row["donor"])
                           & (removed["num_fewshot"] == row["num_fewshot"])]
        heads = of_order[(of_order["component"] == "head") & (of_order["fraction"] <= row["heads_fraction"])]
        ffns = of_order[(of_order["component"] == "ffn") & (of_order["fraction"] <= row["ffns_fraction"])]
        mask = both(row["heads_fraction"], row["ffns_fraction"])
        assert sorted(heads["name"]) == sorted(map(str, mask.heads_removed))
        assert ffns["layer"].tolist() == mask.ffns_removed
        assert ffns["name"].tolist() == [f"L{layer}F" for layer in mask.ffns_removed]
    together = removed[removed["donor_scope"] == "all tasks"]
    assert together.loc[together["component"] == "head", "position"].tolist() == list(range(1, 19))
    assert removed.loc[removed["donor_scope"] == "task", "position"].isna().all(), "their importance is not there"


def test_the_verb_prints_json_alone_and_says_what_was_chosen(steady: Study, tmp_path: Path) -> None:
    done = headcount("mask", steady.folder, "--free")
    assert done.returncode == 0
    raw = json.loads(done.stdout)
    assert raw["removed_heads"] == [str(Head(*divmod(i, 4))) for i in range(6)]
    assert raw["removed_ffns"] == ["L0F"]
    assert raw["heads_per_layer"] == HEADS
    assert raw["from"]["order"] == "mean"
    assert raw["from"]["chosen"] == {"way": "free", "points": 9}
    assert raw["from"]["measured"]["verdict"] == "within"
    assert done.stderr == steady.mask(free=True).describe() + "\n"
    path = tmp_path / "mask.json"
    path.write_text(done.stdout, encoding="utf-8")
    file = read_mask(path)
    assert file == steady.mask(free=True).file
    assert (file.model, file.identity, file.mask) == ("planted <model>", "2-abc-def", both(0.25, 0.25))
    for arguments, said in (
            ([], "say which measured point: --free, --within"), (["--free", "--within", "2"], "--free and --within"),
            (["--heads", "0.3"], "--heads 0.3 with --ffns 0 was not measured"),
            (["--free", "--shots", "3"], "with --shots 3; there is 5"),
            (["--parameters", "2"], "--parameters lies between 0 and 1")):
        done = headcount("mask", steady.folder, *arguments)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert said in done.stderr
    assert "Traceback" not in headcount("mask", tmp_path, "--free").stderr


def test_a_study_without_pruning_says_so(tmp_path: Path) -> None:
    synthetic.write(tmp_path, evaluations=False)
    with pytest.raises(StudyError, match="has measured no pruned model yet"):
        hc.open_study(tmp_path).mask(free=True)
    assert hc.open_study(tmp_path).removed().empty


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Study:
    spec = StudySpec("tiny", tasks=("icl_plural", "icl_gerund"), shots=(0,), limit=8, importance_limit=6,
                     fractions=(0.25, 0.5), grid_fractions=(0.25, 0.5), grid_order="mean", random_orders=0,
                     transfer_fractions=(0.5,), measure=("curves", "grid", "transfer"),
                     out=tmp_path_factory.mktemp("choice") / "study")
    return hc.open_study(run_study(spec, loaded=tiny.loaded("llama")))


def test_the_mask_of_a_measured_point_is_the_one_that_was_measured(measured: Study) -> None:
    loaded = tiny.loaded("llama")
    found = measured.mask(heads=0.5, ffns=0.5)
    check_mask(found.file, "tiny-llama", loaded.identity, loaded.anatomy.heads_per_layer)
    entries = [e for e in Ledger(measured.folder).entries("evaluation") if e.job["curve"].get("donor") == "mean"
               and e.job["curve"]["order"] == "grid"]
    held = {told["mask"] for e in entries for told in e.info["masks"]
            if (told["fraction"], told["ffn_fraction"]) == (0.5, 0.5)}
    assert held == {found.mask.to_json()}
    for task in measured.tasks:
        again = hc.evaluate(loaded, hc.get_tasks([task])[task], [found.mask], num_fewshot=0, limit=8)
        rows = [e.table for e in entries if e.job["task"] == task]
        point = [told["mask"] for told in entries[0].info["masks"]].index(found.mask.to_json())
        assert any(t.loc[t["mask"] == point, "correct"].mean() == pytest.approx(float(again.accuracy[0])) for t in rows)
    assert found.row["parameters_removed"] == loaded.anatomy.parameters_removed(found.mask)
    assert measured.removed()["position"].notna().all()


def test_where_others_were_pruned_by_a_tasks_order_all_tasks_stand_beside_it(measured: Study) -> None:
    found = measured.mask(heads=0.5, order="icl_plural")
    assert (found.row["tasks"], found.row["task"]) == (1, "icl_plural")
    assert found.everywhere is not None
    loaded = tiny.loaded("llama")
    by_hand = [float(hc.evaluate(loaded, hc.get_tasks([task])[task], [found.mask], num_fewshot=0, limit=8).accuracy[0])
               for task in measured.tasks]
    assert found.everywhere["accuracy"] == pytest.approx(np.mean(by_hand))
    assert "On all its tasks together" in found.describe()
    assert measured.mask(heads=0.25, order="icl_plural").everywhere is None


PLAIN = {"headcount_mask": 1, "model": "tiny", "heads_per_layer": [4, 4, 2], "removed_heads": ["L0H1", "L2H0"],
         "removed_ffns": ["L1F"]}


def test_a_mask_file_comes_back_as_it_was(tmp_path: Path) -> None:
    mask = Mask.full([4, 4, 2]).without_heads([(0, 1), (0, 3), (2, 0)]).without_ffns([1])
    for file in (MaskFile(mask, "tiny \N{SNOWMAN} \"x\"", "2-a-b", {"study": "s", "deep": {"list": [1, None]}}),
                 MaskFile(Mask.full([2]), "tiny")):
        file.write(tmp_path / "mask.json")
        assert read_mask(tmp_path / "mask.json") == file
        assert (tmp_path / "mask.json").read_text(encoding="utf-8").isascii(), "whatever a shell takes text for"
    (tmp_path / "short.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(PLAIN).encode())
    assert read_mask(tmp_path / "short.json").mask.heads_removed == [Head(0, 1), Head(2, 0)]


def without(key: str) -> dict[str, object]:
    return {name: value for name, value in PLAIN.items() if name != key}


@pytest.mark.parametrize(("content", "said"), [
    ({**PLAIN, "removed_head": []}, 'key "removed_head" is not known; there are headcount_mask, model'),
    ({**PLAIN, "removed_heads": ["L99H0"]}, "no head L99H0: the model has 3 layers, 0 to 2"),
    ({**PLAIN, "removed_heads": ["L2H2"]}, "no head L2H2: layer 2 has 2 heads, counted from 0"),
    ({**PLAIN, "removed_ffns": ["L3F"]}, "no FFN L3F: the model has 3 layers"),
    ({**PLAIN, "removed_heads": ["L0H1", "L0H1"]}, '"removed_heads" names L0H1 twice'),
    ({**PLAIN, "removed_heads": ["l0h1"]}, '"removed_heads" names heads as "L5H1", not "l0h1"'),
    ({**PLAIN, "removed_heads": ["L00H1"]}, 'not "L00H1"'), ({**PLAIN, "removed_heads": ["L0H1\n"]}, r'"L0H1\n"'),
    ({**PLAIN, "removed_heads": ["L\u0661H1"]}, "\\u0661"), ({**PLAIN, "removed_heads": [[0, 1]]}, "not [0, 1]"),
    ({**PLAIN, "removed_heads": ["L1F"]}, 'as "L5H1", not "L1F"'), ({**PLAIN, "removed_ffns": [1]}, "not 1"),
    ({**PLAIN, "removed_heads": {"L0": 1}}, '"removed_heads" is a list of heads such as ["L5H1"], not {"L0": 1}'),
    ({**PLAIN, "headcount_mask": 2}, '"headcount_mask" is 2; this version of headcount reads format 1'),
    ({**PLAIN, "headcount_mask": True}, '"headcount_mask" is true'), (without("headcount_mask"), "says no \"headcount"),
    (without("heads_per_layer"), '"heads_per_layer" is missing'), (without("model"), '"model" is missing'),
    ({**PLAIN, "heads_per_layer": 4}, "of every layer, not 4"), ({**PLAIN, "heads_per_layer": []}, "not []"),
    ({**PLAIN, "heads_per_layer": [4, True, 2]}, "says true of layer 1"),
    ({**PLAIN, "heads_per_layer": [4, 4.0, 2]}, "says 4.0 of layer 1"),
    ({**PLAIN, "heads_per_layer": [10**12]}, "says 1000000000000 of layer 0"),
    ({**PLAIN, "heads_per_layer": [100_000] * 100_000}, "more than any model has"),
    ({**PLAIN, "model": None}, '"model" is a text, not null'), ({**PLAIN, "identity": 5}, "is a text, not 5"),
    ({**PLAIN, "from": "me"}, '"from" is an object {...}, not "me"'), ([1], "a mask is a JSON object {...}, not [1]"),
    (b"", "it is not JSON: Expecting value in line 1"), (b"{'a': 1}", "it is not JSON: "),
    (b'{"model": "a", "model": "b"}', 'key "model" stands there twice'), (b'{"model": NaN}', "NaN is no number"),
    (b"[" * 100_000, "nested too deeply"), (b'{"a": ' + b"9" * 5000 + b"}", "it is not JSON"),
    (json.dumps(PLAIN).encode("utf-16"), "no UTF-8 text but UTF-16"), (b"\x80\x81", "it is no UTF-8 text"),
    (b" " * (16 * 2**20 + 1), "longer than any mask")])
def test_what_is_wrong_in_a_mask_file_is_told_in_one_line(tmp_path: Path, content: object, said: str) -> None:
    path = tmp_path / "mask.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(DataError) as error:
        read_mask(path)
    assert str(path) in str(error.value)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < len(str(path)) + 250


def test_a_mask_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    for path, said in ((tmp_path / "none.json", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(DataError, match=f"cannot be read \\({said}"):
            read_mask(path)


@pytest.mark.parametrize(("identity", "heads", "said"), [
    ("2-a", [4, 4], "of 3 layers, and mine has 2"), ("2-a", [4, 4, 4], "of 2 heads in layer 2, and mine has 4 there"),
    ("2-b", [4, 4, 2], "mine has the same numbers of heads, but other weights"), ("2-a", [4, 4, 2], "")])
def test_a_mask_of_another_model_is_refused(identity: str, heads: list[int], said: str) -> None:
    file = MaskFile(Mask.full([4, 4, 2]), "theirs", "2-a")
    if not said:
        check_mask(file, "mine", identity, heads)
        check_mask(MaskFile(file.mask, "theirs"), "mine", "2-other", heads)
        return
    with pytest.raises(HeadcountError) as error:
        check_mask(file, "mine", identity, heads)
    assert said in str(error.value)
    assert "(theirs)" in str(error.value)


def test_a_choice_is_one_way_or_none() -> None:
    assert ChoiceSpec().ways == ()
    assert ChoiceSpec(ffns=0.5).ways == ("point",)
    assert Choice.__dataclass_params__.frozen  # type: ignore[attr-defined]
