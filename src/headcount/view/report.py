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

from headcount.view import charts, sentences
from headcount.view.analysis import MEAN, Study, constants, groups, open_study

_FIGURES = {
    "headline": "How much can go",
    "head_map": "Which heads matter",
    "ffn_bars": "Which FFNs matter",
    "head_curves": "Pruning heads, task by task",
    "ffn_curves": "Pruning FFNs, task by task",
}
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


def write_report(folder: str | Path, progress: Callable[[int, int], None] | None = None) -> Path:
    """Write `report.html`, `figures/` and `tables/` into a study folder; returns the page's path.

    An unfinished study gives the report of what is there.

    Args:
        folder: The study folder.
        progress: Called with how many of how many figures are drawn.

    Raises:
        StudyError: If there is no study in the folder.
    """
    study = open_study(folder)
    captions = _captions(study)
    specs = {}
    figures = _figures(study)
    for done, (name, (page, static)) in enumerate(figures.items()):
        if progress is not None:
            progress(done, len(figures))
        specs[name] = page().to_dict()
        charts.save(static(), study.folder / "figures" / name)
    tables = list(_tables(study))
    (study.folder / "tables").mkdir(exist_ok=True)
    for name, frame in (("curves", study.curves()), ("free_fractions", study.free_fractions()),
                        ("importance", study.importance()), ("agreement", study.agreement())):
        frame.to_csv(study.folder / "tables" / f"{name}.csv", index=False)
    path = study.folder / "report.html"
    path.write_text(_page(study, specs, captions, tables), encoding="utf-8")
    return path


def _page(study: Study, specs: dict[str, Any], captions: dict[str, str], tables: list[Table]) -> str:
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)

    def figure(name: str) -> Markup:
        if name not in specs:
            return Markup("<p class='what'>Not measured in this study.</p>")
        return Markup("<figure><div id='{0}' role='group' aria-label='{1}'></div><figcaption>{1}</figcaption></figure>"
                      ).format(name, captions.get(name, ""))

    spec = study.spec
    heads, ffns, parameters = constants(study.description)
    name = Path(str(study.model.get("name", spec["model"]))).name
    return environment.get_template("page.html.j2").render(
        title=f"{name}: which heads and FFNs does in-context learning need?",
        what=f"{heads} attention heads, {ffns} FFNs, {sentences.millions(parameters)} parameters; {len(study.tasks)} "
             f"tasks with {', '.join(sentences.shots(k) for k in spec['shots'])}; a loss of "
             f"{100 * spec['margin']:.3g} points of accuracy or more must be ruled out for a share to be called free.",
        headline=sentences.headline(study),
        cautions=list(sentences.cautions(study)),
        sections=[(n, heading) for n, heading in _FIGURES.items() if n != "headline"],
        tables=tables,
        provenance=list(_provenance(study)),
        figure=figure,
        bundle=Markup(_in_script(vl_convert.javascript_bundle())),  # type: ignore[call-arg]  # noqa: S704
        charts=Markup(_in_script(json.dumps(specs))),  # noqa: S704
    )


def _figures(study: Study) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """How each figure that the study has data for is drawn: for the page, and as a file."""
    curves, importance = study.curves(), study.importance()
    score = study.spec["head_score"]
    found: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {}
    pruned = curves[curves["component"] != "none"]
    if len(pruned):
        task = charts.summary_task(pruned)
        measured = pruned.loc[pruned["task"] == task, "num_fewshot"].unique()
        baselines = {int(k): study.baseline(task, int(k)) for k in measured}
        free = study.free_fractions()
        found["headline"] = (lambda: charts.headline(pruned, free, baselines),) * 2
    if (importance["component"] == "head").any():
        found["head_map"] = (lambda: charts.head_map(importance, score, choose=True),
                             lambda: charts.head_map(importance, score, choose=False))
    if (importance["component"] == "ffn").any():
        found["ffn_bars"] = (lambda: charts.ffn_bars(importance, choose=True),
                             lambda: charts.ffn_bars(importance, choose=False))
    if (pruned["component"] == "head").any():
        found["head_curves"] = (lambda: charts.task_curves(pruned, "head"),) * 2
    if (pruned["component"] == "ffn").any():
        found["ffn_curves"] = (lambda: charts.task_curves(pruned, "ffn"),) * 2
    return found


def _captions(study: Study) -> dict[str, str]:
    bands = "Bands are 95 % bootstrap intervals over documents; point at a mark for its numbers."
    return {
        "headline": f"Accuracy as the least important components go (solid) and as random ones go (dashed). {bands} "
                    "A diamond marks the free fraction. " + sentences.curve_sentence(study, "head"),
        "head_map": sentences.importance_sentence(study, "head") + " The colour is a head's gradient importance as a "
                    "share of the largest in its panel; point at a head for its value.",
        "ffn_bars": sentences.importance_sentence(study, "ffn") + " Above: accuracy lost on training documents when "
                    "one FFN is off; below: the gradient score. Lines are plus and minus one standard error; every "
                    "panel has its own scale.",
        "head_curves": f"{_by_task(study, 'head')} {bands}",
        "ffn_curves": f"{_by_task(study, 'ffn')} {sentences.curve_sentence(study, 'ffn')} {bands}",
    }


def _by_task(study: Study, component: str) -> str:
    """How the free fraction differs between tasks, at the most shots at which it is defined."""
    free = study.free_fractions()
    free = free[(free["task"] != MEAN) & (free["component"] == component) & free["free_fraction"].notna()]
    free = free[free["num_fewshot"] == free["num_fewshot"].max()]
    if len(free) < 2:
        return ""
    shots = sentences.shots(int(free["num_fewshot"].iloc[0]))
    least, most = free["free_fraction"].min(), free["free_fraction"].max()
    none = int((free["free_fraction"] == 0).sum())
    return (f"With {shots} the free fraction of single tasks lies between {100 * least:.0f} and {100 * most:.0f} %; "
            f"for {none} of the {len(free)} tasks where it is defined no share is shown to be free.")


def _mean_first(table: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([table[table["task"] == MEAN], table[table["task"] != MEAN]])


def _thousandths(table: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """Accuracies with the same number of digits, so that they can be read down a column."""
    return table.assign(**{c: [f"{x:.3f}" if x == x else "" for x in table[c]] for c in columns})


def _tables(study: Study) -> Iterator[Table]:
    free = _mean_first(study.free_fractions())
    if len(free):
        interval = ["" if low != low or fraction == 0 else "unchanged" if not changed
                    else f"{100 * low:+.1f} to {100 * high:+.1f}"
                    for fraction, changed, low, high in zip(free["free_fraction"], free["changed"],
                                                            free["difference_low"], free["difference_high"],
                                                            strict=True)]
        share = [f"{100 * f:.0f} %" if f == f else "not defined" for f in free["free_fraction"]]
        frame = _thousandths(free, "accuracy", "full_accuracy", "baseline").assign(free=share, interval=interval)[
            ["task", "num_fewshot", "component", "free", "removed", "parameters_removed", "accuracy", "interval",
             "full_accuracy", "baseline"]]
        yield Table("Free fractions", "The largest share that can go while a loss of the margin or more is ruled out "
                    "at every step; accuracy there, and the 95 % interval of its difference to the full model in "
                    "points; 'unchanged' where no document changed, so that there is no interval and a change in "
                    "about 3 of n documents may go unseen. Baseline: chance, or the best constant answer; not defined "
                    "where the full model's "
                    "accuracy is not shown to be above it.", _plain_columns(frame))
    curves = study.curves()
    full = _mean_first(curves[curves["fraction"] == 0].drop_duplicates(["task", "num_fewshot"]))
    full = _thousandths(full, "accuracy", "low", "high")
    if len(full):
        yield Table("Accuracy of the full model", "With 95 % interval over documents.",
                    _plain_columns(full[["task", "num_fewshot", "accuracy", "low", "high", "documents"]]))
    pruned = curves[(curves["fraction"] > 0)]
    if len(pruned):
        wide = pruned.assign(percent=[f"{100 * f:.0f} %" for f in pruned["fraction"]]).pivot_table(
            index=["task", "num_fewshot", "component", "order"], columns="percent", values="accuracy", sort=False)
        yield Table("Accuracy along the curves", "Share removed across; the measured orders and the random one.",
                    _plain_columns(wide.reset_index()))
    yield from _agreement(study)
    for component, title in (("head", "heads"), ("ffn", "FFNs")):
        ranked = sentences.ranking(study, component)
        for k, of_k in groups(ranked, "num_fewshot"):
            most, least = of_k.head(_LISTED), of_k.tail(_LISTED)[::-1]
            frame = pd.DataFrame({"rank": range(1, len(most) + 1), "most important": most["name"].tolist(),
                                  "importance": most["importance"].tolist(), "least important": least["name"].tolist(),
                                  "importance ": least["importance"].tolist()})
            yield Table(f"Most and least important {title}, {sentences.shots(int(k))}", "Mean over tasks.", frame)


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
    yield "command", description.get("command") or "run from Python"
    yield "created", description["created"]
    for name, value in study.model.items():
        yield f"model: {name.replace('_', ' ')}", _plain(value)
    yield "prompts", description.get("layout", "")
    yield "masks", description.get("masks", "one forward pass each")
    if budget := description.get("budget"):
        yield "rows and batches", _plain(budget)
    for task, known in study.tasks.items():
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
        return f"{value:,.0f}" if value == int(value) and abs(value) >= 10 else f"{value:.4g}"
    return str(value)


def _in_script(text: str) -> str:
    """Text that cannot end the script element it stands in."""
    return re.sub(r"<(?=/script|!--)", r"\\x3c", text, flags=re.IGNORECASE)


