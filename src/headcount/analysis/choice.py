"""Which measured point a model is reduced to, of one order and number of shots of table `removable`.

- `free`: the fewest parameters at which the study rules out a loss of its margin, at this point and at every smaller
  step, that is at every measured point that removes no more of the heads and no more of the FFNs.
- `within`: the fewest parameters whose interval of the difference to the full model lies above minus so many points.
- `parameters`: of the points that leave at most this share of the parameters the most accurate: that of the smallest
  loss beside the full model, since points may be measured on unlike documents; of equal ones that of fewest parameters.
- `heads` and `ffns`: this point.

Where the full model is not shown to be above its baseline nothing is free, nor within anything: there is nothing that
could be lost. A point that removes nothing is no choice of the first two.

A point that was picked from many by its own result looks better than it is, which `Choice.describe` says.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import pandas as pd

from headcount.analysis.rows import ALL_TASKS, MEAN, TASK, Labels, Scoped
from headcount.errors import OptionError, StudyError, few, listed
from headcount.mask_file import MaskFile
from headcount.masks import Mask
from headcount.stats.intervals import COSTS_MORE, WITHIN
from headcount.stats.words import points_of, signed
from headcount.study.spec import ChoiceSpec

_EQUAL = 1e-9
# A share is told with three digits, and may be given so.
_TOLD = 6e-4


@dataclass(frozen=True)
class Choice:
    """A measured point that was chosen, and what the study says of it.

    Attributes:
        file: Its mask, and the model that it is for.
        way: How it was chosen: "free", "within", "parameters" or "point".
        asked: The number that was asked for: points, or a share; 0 of the other ways.
        order: By what parts go: "mean", the order of all tasks together, or a task's name.
        of_all_tasks: Whether it is the order of all tasks together (a task may be called "mean").
        num_fewshot: Number of shots.
        most_shots: Whether no number of shots was asked for, so that it is the most that was measured by this order.
        row: The point's row of table `removable`.
        everywhere: By one task's order, the row of the same point over all tasks, where they were pruned by it.
        among: From how many points that remove something it was chosen.
        parameters: Of the full model.
        margin: The loss that the study wants ruled out.
    """

    file: MaskFile
    way: str
    asked: float
    order: str
    of_all_tasks: bool
    num_fewshot: int
    most_shots: bool
    row: dict[str, Any]
    everywhere: dict[str, Any] | None
    among: int
    parameters: int
    margin: float

    @property
    def mask(self) -> Mask:
        """Which heads and FFNs are kept."""
        return self.file.mask

    @property
    def parameters_left(self) -> int:
        """How many parameters are left."""
        return self.parameters - int(self.row["parameters_removed"])

    def to_json(self) -> str:
        """The mask file's text."""
        return self.file.to_json()

    def describe(self) -> str:
        """What goes, what the study measured there, and how the point was chosen, in three sentences."""
        heads, ffns = sum(self.mask.heads_per_layer), len(self.mask.ffns)
        row = self.row
        goes = (f"{row['heads_removed']} of {heads} heads and {row['ffns_removed']} of {ffns} FFNs go by "
                f"{_by(self.order, of_all=self.of_all_tasks)}: {row['parameters_removed']:,} of {self.parameters:,} "
                f"parameters ({100 * row['parameters_removed_share']:.1f} %).")
        shots = _with(self.num_fewshot) + (" (the most that it has)" if self.most_shots else "")
        said = f"The study measured there, {shots}, {_measured(row)}: {_told(row, self.margin)}."
        if self.everywhere is not None:
            said += f" On all its tasks together: {_measured(self.everywhere)}."
        return f"{goes} {said} {self._chosen()}"

    def _chosen(self) -> str:
        how = {"free": f"the fewest parameters at which a loss of {points_of(self.margin)} is ruled out, as at every "
                       "smaller step",
               "within": f"the fewest parameters at which a loss of {points_of(self.asked / 100)} is ruled out",
               "parameters": f"the most accurate with at most {100 * self.asked:.3g} % of the parameters left"}
        if self.way not in how:
            return "This point was asked for."
        among = "the only measured point" if self.among == 1 else f"from {self.among} measured points"
        return (f"It was chosen as {how[self.way]}, {among}, by what was measured there: on other documents it may "
                "lose more.")


def choose(
    table: pd.DataFrame, spec: ChoiceSpec, *, tasks: tuple[str, ...], masks: dict[str, Mask], model: str, identity: str,
    study: str, parameters: int, margin: float,
) -> Choice:
    """The point that was asked for.

    Args:
        table: `Study.removable()`.
        spec: What was asked for.
        tasks: Of the study.
        masks: By digest.
        model: The model's name.
        identity: `LoadedModel.identity`, empty where the study does not say it.
        study: What the study is called.
        parameters: Of the full model.
        margin: The loss that the study wants ruled out.

    Raises:
        OptionError: If nothing, or more than one thing, was asked for; the order, the number of shots or the point was
            not measured; or no point is as asked. The message names what there is.
        StudyError: If the study has no pruned model yet.
    """
    if not spec.ways:
        raise OptionError("say which measured point: `free`, `within` so many points, at most this share of "
                          "`parameters`, or `heads` and `ffns`",
                          fields=("free", "within", "parameters", "heads", "ffns"))
    if not (table["parameters_removed"] > 0).any():
        raise StudyError(f"study {study} has measured no pruned model yet, neither curves nor a grid, so there is none "
                         "to choose: run `headcount curve` or `headcount study` in its folder")
    donor, order = _order(table, spec.order, tasks)
    rows = table[(table["donor_scope"] == donor.scope) & (table["donor"] == donor.task)]
    k = _shots(rows, spec.shots, order, of_all=donor.scope == ALL_TASKS)
    rows = rows[rows["num_fewshot"] == k]
    everywhere = rows[rows["scope"] == MEAN] if donor.scope == TASK else rows.iloc[:0]
    if donor.scope == TASK:
        rows = rows[rows["scope"] == TASK]
    rows = _of_shape(rows, study, uniform=spec.uniform).reset_index(drop=True)
    place = f"by {_by(order, of_all=donor.scope == ALL_TASKS)}, {_with(k)}"
    way, asked = spec.ways[0], 0.0
    if way == "free":
        found = _free(rows, margin, place)
    elif way == "within":
        asked = float(spec.within or 0.0)
        found = _within(rows, asked, place)
    elif way == "parameters":
        asked = float(spec.parameters or 0.0)
        found = _parameters(rows, asked, place)
    else:
        found = _at(rows, float(spec.heads or 0.0), float(spec.ffns or 0.0), place)
    row = _as_dict(rows.iloc[found])
    if not row["parameters_removed"]:
        raise OptionError(f"at that point nothing goes: {_steps(rows)}", fields=("heads", "ffns", "parameters"))
    same = [_as_dict(one) for _, one in everywhere[everywhere["mask"] == row["mask"]].iterrows()]
    choice = Choice(
        MaskFile(masks[row["mask"]], model, identity), way, asked, order, donor.scope == ALL_TASKS, k,
        spec.shots is None, row, same[0] if same else None, int((rows["parameters_removed"] > 0).sum()), parameters,
        margin)
    source = {**_source(choice, study), "sentence": choice.describe()}
    return dataclasses.replace(choice, file=MaskFile(choice.mask, model, identity, source))


def _order(table: pd.DataFrame, asked: str | None, tasks: tuple[str, ...]) -> tuple[Scoped, str]:
    """Whose order, and what it is called."""
    together, mean = Scoped(ALL_TASKS), Labels(frozenset(tasks)).word(ALL_TASKS)
    measured = {Scoped(scope, task) for scope, task in zip(table["donor_scope"], table["donor"], strict=True)}
    of_tasks = [task for task in tasks if Scoped(TASK, task) in measured]
    there = [*([mean] if together in measured else []), *of_tasks]
    if together not in measured and len(tasks) == 1 and asked in (None, mean):
        # The order of all tasks of a study of one is its own.
        return Scoped(TASK, tasks[0]), tasks[0]
    if asked is None and together in measured:
        return together, mean
    if asked is None:
        raise OptionError("the order of all tasks together was not measured in this study, as a curve or grid by it "
                          f"(`grid_order` mean) would; name one task's `order`: {few(there, 'tasks', 12)}",
                          fields=("order", "grid_order"))
    if asked in of_tasks:
        return Scoped(TASK, asked), asked
    if asked == mean and together in measured:
        return together, mean
    raise OptionError(f"by `order` {asked!r} nothing was removed in this study; there is {few(there, 'tasks', 12)}",
                      fields=("order",))


def _of_shape(rows: pd.DataFrame, study: str, *, uniform: bool) -> pd.DataFrame:
    """Points of free form, or those that leave every layer one shape; the full model is among both."""
    found = rows[(rows["uniform"] == uniform) | (rows["parameters_removed"] == 0)]
    if uniform and not rows["uniform"].any():
        raise OptionError(f"study {study} has no points that leave every layer one shape: measure them with `headcount "
                          "study ... --uniform`, or choose without `uniform`", fields=("uniform",))
    return found


def _shots(rows: pd.DataFrame, asked: int | None, order: str, *, of_all: bool) -> int:
    known = sorted({int(k) for k in rows["num_fewshot"]})
    if asked is None:
        return known[-1]
    if asked not in known:
        raise OptionError(f"by {_by(order, of_all=of_all)} nothing was removed with `num_fewshot` {asked}; there is "
                          f"{listed([str(k) for k in known])}", fields={"num_fewshot": "--shots"})
    return asked


def _free(rows: pd.DataFrame, margin: float, place: str) -> int:
    removing = rows[rows["parameters_removed"] > 0]
    within = removing["verdict"] == WITHIN

    def reached(row: pd.Series) -> bool:
        smaller = ((removing["heads_fraction"] <= row["heads_fraction"] + _EQUAL)
                   & (removing["ffns_fraction"] <= row["ffns_fraction"] + _EQUAL))
        return bool(within[smaller].all())

    found = removing[[reached(row) for _, row in removing.iterrows()]]
    if found.empty:
        raise _nothing(removing, f"no measured point is free {place}: at none is a loss of {points_of(margin)} ruled "
                       "out, at it and at every smaller step")
    return _fewest(found)


def _within(rows: pd.DataFrame, points: float, place: str) -> int:
    removing = rows[rows["parameters_removed"] > 0]
    found = removing[removing["above_baseline"] & (removing["difference_low"] > -points / 100 + _EQUAL)]
    if found.empty:
        raise _nothing(removing, f"at no measured point is a loss of {points_of(points / 100)} ruled out {place}")
    return _fewest(found)


def _parameters(rows: pd.DataFrame, share: float, place: str) -> int:
    left = 1 - rows["parameters_removed_share"]
    found = rows[left <= share + _EQUAL]
    if found.empty:
        least = rows.iloc[int(left.to_numpy().argmin())]
        raise OptionError(f"no measured point {place} leaves at most {share:.3g} of the parameters (`parameters`); the "
                          f"one that leaves least, {_named(least)}, leaves {left.min():.3f}: {_measured(least)}. "
                          "Measure larger `fractions`, or a grid", fields=("parameters", "fractions"))
    best = found[found["difference"] >= found["difference"].max() - _EQUAL]
    return _fewest(best)


def _at(rows: pd.DataFrame, heads: float, ffns: float, place: str) -> int:
    found = rows[((rows["heads_fraction"] - heads).abs() < _TOLD) & ((rows["ffns_fraction"] - ffns).abs() < _TOLD)]
    if len(found):
        return int(found.index.to_numpy()[0])
    joint = ((rows["heads_fraction"] > 0) & (rows["ffns_fraction"] > 0)).any()
    hint = ("" if joint or not (heads and ffns) else "; a grid by the order of all tasks is measured with `measure` "
            "curves grid and `grid_order` mean")
    raise OptionError(f"`heads` {heads:.3g} with `ffns` {ffns:.3g} was not measured {place}; {_steps(rows)}"
                      f"{hint}", fields=("heads", "ffns", "measure", "grid_order"))


def _steps(rows: pd.DataFrame) -> str:
    """Which points were measured."""
    alone = [(f"{name} alone at", [f"{f:.3g}" for f in rows.loc[(rows[other] == 0) & (rows[column] > 0), column]])
             for name, column, other in (("heads", "heads_fraction", "ffns_fraction"),
                                         ("FFNs", "ffns_fraction", "heads_fraction"))]
    both = rows[(rows["heads_fraction"] > 0) & (rows["ffns_fraction"] > 0)]
    joint = [f"{h:.3g} and {f:.3g}" for h, f in zip(both["heads_fraction"], both["ffns_fraction"], strict=True)]
    steps = (*alone, ("both at", [few(joint, "pairs", 8)] if joint else []))
    there = [f"{what} {' '.join(shares)}" for what, shares in steps if shares]
    return f"measured are {'; '.join(there)}"


def _fewest(rows: pd.DataFrame) -> int:
    """Of some points that of the fewest parameters; of equal ones the most accurate, then the fewest heads."""
    ordered = rows.sort_values(["parameters_removed", "difference", "heads_fraction"],
                               ascending=[False, False, True], kind="stable")
    return int(ordered.index.to_numpy()[0])


def _nothing(removing: pd.DataFrame, what: str) -> OptionError:
    """No point is as asked: the nearest one, and what to do."""
    nearest = removing.iloc[int(removing["difference_low"].fillna(-math.inf).to_numpy().argmax())]
    told = f"{what}; nearest is {_named(nearest)}: {_measured(nearest)}"
    shape = ["uniform"] if nearest["uniform"] else []
    fields = [f"heads={nearest['heads_fraction']:.3g}", f"ffns={nearest['ffns_fraction']:.3g}", *shape]
    point = f"take that point by {' '.join(f'`{one}`' for one in fields)}"
    if not nearest["above_baseline"]:
        return OptionError(f"{told}. The full model is not shown to be above guessing or a constant answer there, so "
                           "that no loss could be seen: choose other shots or another order, or measure more documents "
                           f"(`limit`), or {point}", fields=("limit", *fields))
    if nearest["difference_low"] != nearest["difference_low"]:
        return OptionError(f"{told}. The metric is beyond 0 and 1, so that differences have no interval: {point}",
                           fields=fields)
    enough = math.floor(-1000 * nearest["difference_low"]) / 10 + 0.1
    return OptionError(f"{told}. Measure more documents (`limit`), or {point}, or the smallest model that may lose so "
                       f"much by `within={enough:.1f}`{' `uniform`' * len(shape)}",
                       fields=("limit", *fields, f"within={enough:.1f}"))


def _source(choice: Choice, study: str) -> dict[str, Any]:
    """What a mask file says of where it comes from."""
    def facts(row: dict[str, Any]) -> dict[str, Any]:
        names = ("accuracy", "difference", "difference_low", "difference_high", "verdict", "tasks", "documents")
        return {name: None if row[name] != row[name] else row[name] for name in names}

    shares = ("heads_fraction", "ffns_fraction", "heads_removed", "ffns_removed", "parameters_removed",
              "parameters_removed_share")
    how = {"way": choice.way, **({choice.way: choice.asked} if choice.asked else {}), "points": choice.among}
    return {"study": study, "mask_digest": choice.mask.digest(), "order": choice.order,
            "order_of": ALL_TASKS if choice.of_all_tasks else TASK, "num_fewshot": choice.num_fewshot, "chosen": how,
            **{name: choice.row[name] for name in shares},
            "parameters": choice.parameters, "margin": choice.margin,
            "measured": {"on": choice.row["task"] if choice.row["scope"] == TASK else "mean over tasks",
                         **facts(choice.row)},
            **({} if choice.everywhere is None else {"measured_on_all_tasks": facts(choice.everywhere)})}


def _as_dict(row: pd.Series) -> dict[str, Any]:
    return {str(name): _plain(value) for name, value in row.items()}


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _by(order: str, *, of_all: bool) -> str:
    return "the order of all tasks together" if of_all else f"the order of {order}"


def _with(k: int) -> str:
    return {0: "with no shots", 1: "with 1 shot"}.get(k, f"with {k} shots")


def _named(row: pd.Series) -> str:
    return f"{row['heads_fraction']:.3g} of the heads and {row['ffns_fraction']:.3g} of the FFNs"


def _measured(row: pd.Series | dict[str, Any]) -> str:
    """An accuracy and its difference to the full model, with interval and what it is of."""
    of = f"the mean over {row['tasks']} tasks" if row["scope"] == MEAN else row["task"]
    known = row["difference_low"] == row["difference_low"]
    bounds = f", 95 % interval {signed(row['difference_low'])} to {signed(row['difference_high'])}" if known else ""
    return (f"accuracy {row['accuracy']:.3f} on {of} ({row['documents']:,} documents), "
            f"{signed(row['difference'])} points to the full model{bounds}")


def _told(row: dict[str, Any], margin: float) -> str:
    if not row["above_baseline"]:
        return "the full model is not shown to be above guessing or a constant answer, so that no loss could be seen"
    loss = points_of(margin)
    if row["verdict"] == WITHIN:
        return f"a loss of {loss} is ruled out"
    return (f"a loss of more than {loss} is shown" if row["verdict"] == COSTS_MORE else
            f"whether {loss} are lost cannot be told")
