"""One self-contained page of a study: words first, then figures, tables and provenance; and the figures as files.

The page carries the code that draws its charts, so it opens offline and for ever. Everything it says is computed from
the study's tables.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import vl_convert
from markupsafe import Markup

from headcount.intervals import UNKNOWN, WITHIN
from headcount.view import charts, primitives, sentences, words
from headcount.view.analysis import Study, open_study
from headcount.view.curves import COMMON
from headcount.view.points import MEAN, groups
from headcount.view.sections import Section, sections
from headcount.view.selection import first_differences

# Tables that are written as CSV: names of files, and of the study's methods.
_CSV = ("curves", "free_fractions", "against_random", "importance", "aggregate_importance", "orders", "depth",
        "agreement", "grid", "correlations", "top_sets", "top_overlaps", "transfer", "induction", "retained",
        "induction_among_important", "degenerate")
_LISTED = 10


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Attributes:
        title: Its heading.
        caption: What its columns mean.
        frame: Its content.
    """

    title: str
    caption: str
    frame: pd.DataFrame

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return [str(c) for c in self.frame.columns]

    @property
    def rows(self) -> list[list[str]]:
        """Cells as text."""
        return [[_cell(value) for value in row] for row in self.frame.itertuples(index=False)]


def write_report(study: str | Path | Study, progress: Callable[[int, int], None] | None = None) -> Path:
    """Write `report.html`, `figures/` and `tables/` into a study folder; returns the page's path.

    An unfinished study gives the report of what is there.

    Args:
        study: The study folder, or what `open_study` made of it.
        progress: Called with how many of how many figures are drawn.

    Raises:
        StudyError: If there is no study in the folder.
    """
    study = study if isinstance(study, Study) else open_study(study)
    drawn: list[tuple[Section, dict[str, Any]]] = []
    found = sections(study)
    for done, section in enumerate(found):
        if progress is not None:
            progress(done, len(found))
        page, static = section.page(), section.static()
        if page is not None and static is not None:
            drawn.append((section, page.to_dict()))
            charts.save(static, study.folder / "figures" / section.name)
    tables = list(_tables(study))
    (study.folder / "tables").mkdir(exist_ok=True)
    for name in _CSV:
        frame: pd.DataFrame = getattr(study, name)()
        frame.to_csv(study.folder / "tables" / f"{name}.csv", index=False)
    path = study.folder / "report.html"
    path.write_text(_page(study, drawn, tables), encoding="utf-8")
    return path


def _page(study: Study, drawn: list[tuple[Section, dict[str, Any]]], tables: list[Table]) -> str:
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    captions = {section.name: section.caption for section, _ in drawn}

    def figure(name: str) -> Markup:
        if name not in captions:
            return Markup("<p class='what'>Not measured in this study.</p>")
        return Markup("<figure><div id='{0}' role='group' aria-label='{1}'></div><figcaption>{1}</figcaption></figure>"
                      ).format(name, captions[name])

    spec = study.spec
    heads, ffns, parameters = sentences.constants(study.description)
    name = Path(str(study.model.get("name", spec["model"]))).name
    return environment.get_template("page.html.j2").render(
        title=f"{name}: which heads and FFNs does in-context learning need?",
        what=f"{heads} attention heads, {ffns} FFNs, {words.millions(parameters)} parameters; " + (
            f"{words.number_of(len(study.tasks), 'task')} with {words.listed([words.shots(k) for k in spec['shots']])}"
            f"; a share is called free where {words.told(WITHIN, spec['margin'])}."
            if study.tasks else "no tasks."),
        headline=sentences.headline(study),
        cautions=list(sentences.cautions(study)),
        sections=[(section.name, section.heading) for section, _ in drawn if section.name != "headline"],
        tables=tables,
        provenance=list(_provenance(study)),
        figure=figure,
        bundle=Markup(_in_script(vl_convert.javascript_bundle())),  # type: ignore[call-arg]  # noqa: S704
        charts=Markup(_in_script(json.dumps({section.name: spec for section, spec in drawn}))),  # noqa: S704
    )


def _mean_first(table: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([table[table["task"] == MEAN], table[table["task"] != MEAN]])


def _thousandths(table: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """Accuracies with the same number of digits, so that they can be read down a column."""
    return table.assign(**{c: [f"{x:.3f}" if x == x else "" for x in table[c]] for c in columns})


def _tables(study: Study) -> Iterator[Table]:
    free = _mean_first(study.free_fractions())
    if len(free):
        yield _free(study, free)
    curves = study.curves()
    full = _mean_first(curves[curves["fraction"] == 0].drop_duplicates(["task", "num_fewshot"]))
    full = _thousandths(full, "accuracy", "low", "high")
    if len(full):
        yield Table("Accuracy of the full model", "With 95 % interval over documents.",
                    _plain_columns(full[["task", "num_fewshot", "accuracy", "low", "high", "documents"]]))
    beside = _mean_first(study.against_random())
    if len(beside):
        rows = _thousandths(beside, "accuracy", "random", "draw_low", "draw_high", "difference", "difference_low",
                            "difference_high")
        yield Table("Importance beside random orders", "Accuracy by the measured order and by random ones (their "
                    "mean, the least and the most accurate draw); the difference of the two, paired over documents "
                    "and draws, with its 95 % interval.", _plain_columns(rows))
    pruned = curves[(curves["fraction"] > 0)]
    if len(pruned):
        wide = pruned.assign(percent=[f"{100 * f:.3g} %" for f in pruned["fraction"]]).pivot_table(
            index=["task", "num_fewshot", "component", "order"], columns="percent", values="accuracy", sort=False)
        yield Table("Accuracy along the curves", "Share removed across; the measured orders and the random one.",
                    _plain_columns(wide.reset_index()))
    yield from _orders(study)
    yield from _agreement(study)
    yield from _compared(study)
    for component, title in (("head", "heads"), ("ffn", "FFNs")):
        ranked = sentences.ranking(study, component)
        for k, of_k in groups(ranked, "num_fewshot"):
            most, least = of_k.head(_LISTED), of_k.tail(_LISTED)[::-1]
            frame = pd.DataFrame({"rank": range(1, len(most) + 1), "most important": most["name"].tolist(),
                                  "importance": most["importance"].tolist(), "least important": least["name"].tolist(),
                                  "importance ": least["importance"].tolist()})
            what = sentences.ranked_on(of_k)
            yield Table(f"Most and least important {title}, {words.shots(int(k))}",
                        f"{what[0].upper()}{what[1:]}.", frame)


def _free(study: Study, free: pd.DataFrame) -> Table:
    """How much can go, each task by its own order and all by one, and what is known of the next step."""
    margin = study.spec["margin"]
    keys = ["task", "num_fewshot", "component", "order"]
    first = free[keys].merge(first_differences(study.curves()), on=keys, how="left")
    frame = _thousandths(free, "accuracy").assign(
        component=free["component"].replace({"head": "heads", "ffn": "FFNs"}),
        removed_by=["one order" if order == COMMON else "own order" for order in free["order"]],
        free=[words.share(f) if f == f else "not defined" for f in free["free_fraction"]],
        at_most=[words.share(f) if f == f else "" for f in free["free_high"]],
        interval=[words.bounds(low, high, margin) if fraction > 0 else "" for fraction, low, high in zip(
            free["free_fraction"], free["difference_low"], free["difference_high"], strict=True)],
        next_step=[f"{words.share(f)}: {words.bounds(low, high, margin)}" if f == f else "" for f, low, high
                   in zip(free["next_fraction"], free["next_low"], free["next_high"], strict=True)],
        there=[_next(row) for _, row in free.iterrows()],
        differs_at=[f"{words.share(f)} ({words.better_or_worse(d)})" if f == f else "no step" for f, d in zip(
            first["fraction"], first["difference"], strict=True)])
    columns = ["task", "num_fewshot", "component", "removed_by", "free", "at_most", "accuracy", "interval", "next_step",
               "there", "differs_at"]
    return Table(
        "Free fractions", f"Free: the largest share at which {words.told(WITHIN, margin)}, as at every step up to it; "
        "unlimited documents might show more, up to 'at most' (both are the ends of a 95 % interval); not defined "
        "where the full model is not shown to be above guessing or a constant answer. Removed by each task's own "
        "order, or by one order for all tasks. Accuracy at the free share, and the 95 % interval of its difference to "
        "the full model in points. Next step: the same of the first step that is not free. There: whether it is shown "
        "to cost more than the margin, or these documents cannot tell, and how many in all would, if as large a share "
        "of them changed. 'Differs at': the first step at which accuracy is shown to be better or worse than the full "
        "model's (McNemar's exact test, p < 0.05, corrected for the curve's steps by Holm's method).",
        _plain_columns(frame[columns]))


def _next(row: pd.Series) -> str:
    """`costs more`; `cannot tell (about 1,900 documents would)`."""
    if row["next_verdict"] != row["next_verdict"]:
        return ""
    if row["next_verdict"] != UNKNOWN:
        return str(row["next_verdict"])
    needed = words.about(row["next_documents"])
    return f"cannot tell ({needed} would)" if needed else "cannot tell"


def _compared(study: Study) -> Iterator[Table]:
    """What the grid, transfer, top sets and induction say in numbers."""
    grid = study.grid()
    if len(grid):
        rows = _thousandths(_mean_first(grid), "accuracy", "difference_low", "difference_high",
                            "parameters_removed_share")
        yield Table("Heads and FFNs together", "Accuracy on the grid's documents; the difference to the full model's.",
                    _plain_columns(rows[["task", "num_fewshot", "heads_fraction", "ffns_fraction",
                                         "parameters_removed_share", "accuracy", "difference_low", "difference_high",
                                         "verdict", "documents"]]))
    transfer = study.transfer()
    if len(transfer):
        rows = _thousandths(_mean_first(transfer), "accuracy", "difference", "difference_low", "difference_high")
        yield Table("Pruned by other tasks' orders", "The difference is to the task's own order, of an unseen task to "
                    "the full model. On the mean, a donor serves all tasks but itself.",
                    _plain_columns(rows[["task", "num_fewshot", "component", "donor", "fraction", "accuracy",
                                         "difference", "difference_low", "difference_high", "documents"]]))
    if len(top := study.top_sets()):
        yield Table("What top sets have in common", "Of the most important components of every task: the share that is "
                    "common to all with its 95 % interval over documents, and that of two tasks on average.",
                    _plain_columns(top.round(3)))
    if len(overlaps := study.top_overlaps()):
        yield Table("Top sets in pairs", "The most important fifth of a task's heads or FFNs (and of those of all "
                    "tasks together) beside that of another task, or beside as many heads that are highest on an "
                    "induction score. 'By chance': what random sets have in common; 'in the same layers' (and 'p "
                    "there'): random sets with as many heads in each layer. p: two-sided, hypergeometric, not "
                    "corrected for how many pairs there are. Other sizes and numbers of shots: "
                    "tables/top_overlaps.csv, where p and p_fewer are one-sided.",
                    primitives.overlap_table(overlaps))
    if (induction := study.induction())["induction"].fillna(False).any():
        yield Table("Induction heads", "Means over texts with standard errors; those highest on the lower of the two "
                    "scores first.", primitives.induction_heads_table(induction))
    if len(among := study.induction_among_important()):
        yield Table("Induction heads among the important ones", "'By chance': what random sets of these sizes have "
                    "in common; 'in the same layers' (and 'p there'): random sets with as many heads in each layer. p: "
                    "two-sided, hypergeometric, not corrected for how many rows there are.",
                    _plain_columns(primitives.among_important_table(among)))
    if len(degenerate := study.degenerate()):
        yield Table("Results that say little", "And why.", _plain_columns(degenerate))


def _orders(study: Study) -> Iterator[Table]:
    found = study.orders()
    if found.empty:
        return
    keys = ["task", "num_fewshot", "component"]
    known = found.assign(
        score=found["score"].replace("gold_loglikelihood", "gold log-likelihood") + " (" + found["method"] + ")",
        reliability=[f"{x:.2f}" if x == x else "not known" for x in found["reliability"]])
    others = known[~known["orders"]].assign(others=lambda t: t["score"] + " " + t["reliability"]).groupby(
        keys, as_index=False)["others"].agg("; ".join)
    frame = _mean_first(known[known["orders"]]).merge(others, on=keys, how="left").fillna({"others": ""})
    yield Table("How reliable the orders are", "Reliability: which share of a score's variance over heads, or FFNs, is "
                "not noise of its documents (1 less the mean squared standard error over the variance); where it is "
                "below 0.5, most of what tells them apart is noise, and so is their order.", _plain_columns(
                    frame[[*keys, "score", "reliability", "distinct", "components", "documents", "others"]].rename(
                        columns={"distinct": "distinct values", "others": "reliability of other scores"})))


def _agreement(study: Study) -> Iterator[Table]:
    found = study.agreement()
    if found.empty:
        return
    known = found["correlation"].notna()
    frame = found.copy()
    frame["what is lost"] = found["oracle"].map({"accuracy": "accuracy", "gold_loglikelihood": "gold log-likelihood"})
    frame["Spearman"] = [f"{x:.2f}" if k else "all equal" for x, k in zip(found["correlation"], known, strict=True)]
    frame["95 % interval"] = [f"{a:.2f} to {b:.2f}" if k else ""
                              for a, b, k in zip(found["low"], found["high"], known, strict=True)]
    columns = ["task", "num_fewshot", "component", "score", "what is lost", "Spearman", "95 % interval", "components"]
    yield Table("Gradient and oracle", "How alike the gradient's scores and what is lost without each component alone "
                "rank them; interval over components. Few documents, and few distinct values of what is lost, lower "
                "it.",
                _plain_columns(frame[columns]))


def _plain_columns(frame: pd.DataFrame) -> pd.DataFrame:
    names = {"num_fewshot": "shots", "parameters_removed": "parameters", "full_accuracy": "full model"}
    return frame.rename(columns=lambda c: names.get(str(c), str(c).replace("_", " ")))


def _provenance(study: Study) -> Iterator[tuple[str, str]]:
    description, spec = study.description, study.spec
    yield "commands", "; ".join(description.get("commands", [description.get("command", "")])) or "run from Python"
    yield "created", description["created"]
    for name, value in study.model.items():
        yield f"model: {name.replace('_', ' ')}", _plain(value)
    yield "prompts", description.get("layout", "")
    yield "masks", description.get("masks", "one forward pass each")
    if budget := description.get("budget"):
        yield "rows and batches", _plain(budget)
    for task, known in study.known_tasks.items():
        yield f"task: {task}", (f"documents {known['fingerprint']}; {known['documents'] or 'none'} evaluated, "
                                f"{known['examples'] or 'none'} for importance; metric {known['metric']}")
    yield "options", ", ".join(f"{k} = {_plain(v)}" for k, v in spec.items() if v is not None)
    yield "versions", ", ".join(f"{k} {v}" for k, v in description["versions"].items())


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _cell(value: object) -> str:
    if isinstance(value, float):
        if value != value:
            return ""
        # Large numbers are means of parameters, whose decimals say nothing.
        whole = (value == int(value) and abs(value) >= 10) or abs(value) >= 10_000
        return f"{value:,.0f}" if whole else f"{value:.4g}"
    return str(value)


def _in_script(text: str) -> str:
    """Text that cannot end the script element it stands in."""
    return re.sub(r"<(?=/script|!--)", r"\\x3c", text, flags=re.IGNORECASE)


