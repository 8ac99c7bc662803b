"""Which rows of an analysis' tables figures and sentences speak of, and the small tables made from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.cluster.hierarchy import leaves_list, linkage

from headcount.view.curves import OWN_ORDERS
from headcount.view.overlap import PRIMITIVES
from headcount.view.points import MEAN
from headcount.view.relations import MEAN_OF_RANKS, RANDOM
from headcount.view.scores import name_of

WITHOUT_OWN = "mean without own"
SUMMARIES = (MEAN, MEAN_OF_RANKS, WITHOUT_OWN, RANDOM)  # the order of their rows, below the tasks
AGGREGATES = (MEAN, MEAN_OF_RANKS)
RELIABLE = 0.5  # of an order that is less reliable, most of what tells components apart is noise


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the mean over tasks (or of the mean of their ranks), or of the only (else the first) task."""
    if table.empty:
        return table
    found = [name for name in AGGREGATES if (table["task"] == name).any()]
    return table[table["task"] == (found or [table["task"].iloc[0]])[0]]


def most_shots(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the most shots."""
    rows: pd.DataFrame = table[table["num_fewshot"] == table["num_fewshot"].max()]
    return rows


def of_score(table: pd.DataFrame, component: str, score: str | None = None) -> pd.DataFrame:
    """The rows of one kind of component and of one score, the first found unless told."""
    rows = table[table["component"] == component]
    if rows.empty:
        return rows
    return rows[rows["score"] == (rows["score"].iloc[0] if score is None else score)]


def of_fraction(table: pd.DataFrame, fraction: float | None, near: float = 0.5) -> pd.DataFrame:
    """The rows of one fraction: of the one nearest to `near`, the smaller of two, unless told."""
    if table.empty:
        return table
    if fraction is None:
        fraction = float(min(set(table["fraction"]), key=lambda f: (round(abs(f - near), 6), f)))
    return table[np.isclose(table["fraction"], fraction)]


def between_shots(correlations: pd.DataFrame) -> pd.DataFrame:
    """One row per task and pair of numbers of shots, the fewer first."""
    rows = correlations[(correlations["kind"] == "shots") & (correlations["task"] == correlations["other_task"])]
    both = rows[["num_fewshot", "other_shots"]]
    rows = rows.assign(num_fewshot=both.min(axis=1), other_shots=both.max(axis=1))
    return rows.drop_duplicates(["component", "score", "task", "num_fewshot", "other_shots"])


def noise(correlations: pd.DataFrame) -> str:
    """Why correlations of one kind of component and one score are not to be read: its scores are mostly noise.

    They are where most of the tasks' reliabilities are below one half; where no reliability is known, most correlations
    between two tasks (or two numbers of shots) lie within what random orders reach.

    Args:
        correlations: The rows that are drawn or spoken of, with the diagonal and those of a random order.

    Returns:
        The reason, in words; empty where there is none.
    """
    single = correlations[~correlations["task"].isin(SUMMARIES)]
    own = single.loc[single["kind"] == "reliability", "correlation"].dropna()
    weak = int((own < RELIABLE).sum())
    if len(own):
        return (f"scores are mostly noise: reliability is below {RELIABLE} for {weak} of {len(own)} orders"
                if 2 * weak > len(own) else "")
    band = single.loc[single["other_task"] == RANDOM, "high"].max()
    pairs = single[~single["other_task"].isin(SUMMARIES) & single["correlation"].notna()]
    within = int((pairs["correlation"].abs() <= band).sum())
    return ("scores may be noise: most correlations lie within what random orders reach" if 2 * within > len(pairs)
            else "")


def noise_by_shots(correlations: pd.DataFrame) -> dict[int, str]:
    """As `noise`, of correlations between tasks by number of shots, fewest first; those that can be read have none."""
    rows = correlations[correlations["kind"].isin(["tasks", "reliability"]) & (correlations["num_fewshot"] >= 0)]
    found = {int(k): noise(rows[rows["num_fewshot"] == k]) for k in sorted(set(rows["num_fewshot"]))}
    return {k: reason for k, reason in found.items() if reason}


def alike_together(pairs: pd.DataFrame) -> list[str]:
    """The tasks in such an order that those which rank alike are neighbours: leaves of a tree of average distances.

    The distance is one minus the rank correlation, mean over numbers of shots; of the orders that the tree allows the
    one with the nearest neighbours (Bar-Joseph et al. 2001, by scipy).

    Args:
        pairs: Correlations between tasks, each pair at least once.
    """
    rows = pairs[~pairs["task"].isin(SUMMARIES) & ~pairs["other_task"].isin(SUMMARIES) & pairs["correlation"].notna()]
    names = tasks_first([*rows["task"], *rows["other_task"]])
    square = rows.pivot_table(index="task", columns="other_task", values="correlation").reindex(
        index=names, columns=names).to_numpy(copy=True)
    square = np.where(np.isnan(square), square.T, square)
    distances = 1 - square[np.triu_indices(len(names), 1)]
    if len(names) < 3 or np.isnan(distances).any():
        return names
    # Rounding may leave a correlation a hair above 1.
    tree = linkage(distances.clip(min=0), "average", optimal_ordering=True)
    return [names[i] for i in leaves_list(tree)]


def tasks_first(names: Sequence[str] | pd.Series) -> list[str]:
    """Every name once, as they come; then the mean, the mean of ranks, the mean without own, and random."""
    found = list(dict.fromkeys(names))
    return [n for n in found if n not in SUMMARIES] + [n for n in SUMMARIES if n in found]


def reachable(cells: pd.DataFrame) -> pd.Series:
    """Which cells of one grid are within the margin, and so is every step of some way to them from the full model."""
    at = list(zip(cells["heads_fraction"], cells["ffns_fraction"], strict=True))
    within = dict(zip(at, cells["within_margin"].astype(bool), strict=True))
    heads, ffns = sorted({h for h, _ in at}), sorted({f for _, f in at})
    found: set[tuple[float, float]] = set()
    for i, h in enumerate(heads):
        for j, f in enumerate(ffns):
            before = {(heads[i - 1], f)} if i else set()
            before |= {(h, ffns[j - 1])} if j else set()
            if within.get((h, f)) and (not before or before & found):
                found.add((h, f))
    return pd.Series([cell in found for cell in at], index=cells.index, dtype=bool)


def induction_heads(induction: pd.DataFrame) -> pd.DataFrame:
    """The induction heads with their names, those highest on the lower of their two scores first."""
    found = induction[induction["induction"].fillna(False)]
    names = [name_of("head", layer, head) for layer, head in zip(found["layer"], found["head"], strict=True)]
    lower = found[list(PRIMITIVES)].min(axis=1)
    return found.assign(name=names).loc[lower.sort_values(ascending=False, kind="stable").index]


def borderline(induction: pd.DataFrame, thresholds: Mapping[str, float]) -> int:
    """How many heads a change of one standard error would make induction heads, or no longer such.

    The error of a mean over texts of several lengths, taken as if these were drawn too: it is rather too large.
    """
    scores = induction[list(PRIMITIVES)].to_numpy(float) - np.array([thresholds[p] for p in PRIMITIVES])
    variances = induction[[f"{p}_variance" for p in PRIMITIVES]].to_numpy(float)
    errors = np.sqrt(variances / induction[["sequences"]].to_numpy(float))
    up, down = (scores + errors >= 0).all(axis=1), (scores - errors >= 0).all(axis=1)
    return int((up != down).sum())


def transferred(transfer: pd.DataFrame, component: str, *, unseen: bool) -> pd.DataFrame:
    """The rows of heads, or FFNs, and of tasks that have an order of their own, or have none."""
    return transfer[(transfer["component"] == component) & (transfer["unseen"].astype(bool) == unseen)]


def over_recipients(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per donor: the given mean over recipients, the only recipient, or the mean taken here, without interval.

    Args:
        rows: Of one number of shots and one fraction.
    """
    names = [t for t in dict.fromkeys(rows["task"]) if t != MEAN]
    if len(names) == 1 or (rows["task"] == MEAN).any():
        return summary(rows)
    columns = ["num_fewshot", "fraction", "accuracy", "difference"]
    mean: pd.DataFrame = rows.groupby("donor", sort=False, as_index=False)[columns].mean()
    return mean.assign(task=MEAN, difference_low=np.nan, difference_high=np.nan)


def first_differences(curves: pd.DataFrame) -> pd.DataFrame:
    """The first step of every measured curve at which accuracy differs from the full model's: p < .05 as corrected.

    Columns: task; num_fewshot; component; order; fraction (NaN where no step does); difference (there).
    """
    keys = ["task", "num_fewshot", "component", "order"]
    steps = curves[(curves["fraction"] > 0) & ~curves["order"].isin([RANDOM, "none"])]
    differs = steps[steps["p"] < 0.05].drop_duplicates(keys)[[*keys, "fraction", "difference"]]
    found: pd.DataFrame = steps[keys].drop_duplicates().merge(differs, on=keys, how="left")
    return found


def own_orders(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of each task's own order: neither the common one nor random ones."""
    return table[table["order"].isin(OWN_ORDERS)]
