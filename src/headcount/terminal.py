"""What a person sees on the terminal: progress with time left, tables, a study's summary. Results go to stdout."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from headcount.ledger import Ledger
    from headcount.masks import Component
    from headcount.model.load import LoadedModel
    from headcount.plan import PlannedJob
    from headcount.view.analysis import Study

_out = Console()
_err = Console(stderr=True)
# Where nobody watches, a line this often (seconds) instead of a bar.
_LINE_EVERY = 20.0


class Bar:
    """Tells progress as a bar with time left; in a log file as a line now and then."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=None)
        self._tokens, self._done, self._title = 0.0, 0.0, ""
        self._started = self._told = time.monotonic()

    def stage(self, text: str, done: int = 0, total: int | None = None) -> None:
        """What is being done beside the jobs, and how many of how many steps of it are done."""
        if text != self._title:
            self._title = text
            self._progress.reset(self._task, description=text, total=total)
        self._progress.update(self._task, completed=done)

    def begin(self, todo: int, done: int, tokens: float) -> None:
        """How many jobs are to do and were done before, and about how many tokens they take."""
        before = f", {done} were done before" if done else ""
        self._progress.console.print(f"{todo} jobs to do{before}; about {tokens:,.0f} tokens through the model",
                                     highlight=False)
        self._tokens, self._done = max(tokens, 1.0), 0.0
        self._started = self._told = time.monotonic()
        self._progress.reset(self._task, total=self._tokens)

    def job(self, title: str) -> None:
        """A job begins."""
        self._title = title
        self._progress.update(self._task, description=title)

    def advance(self, tokens: float) -> None:
        """So many more tokens are computed."""
        self._done += tokens
        self._progress.update(self._task, completed=min(self._done, self._tokens))
        now = time.monotonic()
        if not self._progress.console.is_terminal and now - self._told > _LINE_EVERY:
            self._told = now
            left = (now - self._started) * (self._tokens / self._done - 1)
            self._progress.console.print(f"{self._done / self._tokens:4.0%}  about {max(left, 0) / 60:.0f} min left  "
                                         f"{self._title}", highlight=False)


@contextlib.contextmanager
def reporter() -> Iterator[Bar]:
    """A progress bar on stderr, gone when the block ends."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.percentage:3.0f} %"),
               TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=_err, transient=True, speed_estimate_period=120,
                  disable=not _err.is_terminal) as progress:
        yield Bar(progress)


def print_plan(jobs: Sequence[PlannedJob], ledger: Ledger) -> None:
    """The jobs of a study, what they cost, and which are done."""
    table = _table("job", "passes|r", "documents|r", "tokens (about)|r", "done")
    for planned in jobs:
        done = "yes" if ledger.has(planned.job) else ""
        table.add_row(planned.title, f"{planned.passes:.3g}", f"{planned.job['documents']}", f"{planned.tokens:,.0f}",
                      done)
    _out.print(table)
    left = [p for p in jobs if not ledger.has(p.job)]
    _out.print(f"{len(jobs)} jobs, {len(left)} to do. Nothing was measured.", highlight=False)


def print_cost(todo: Sequence[PlannedJob], layers: int, tokens_per_second: float) -> None:
    """What jobs take: layer-tokens, and time at the speed that the model ran at just now."""
    tokens = sum(p.tokens for p in todo)
    seconds = tokens / tokens_per_second
    time_left = "" if seconds != seconds else f", {_duration(seconds)} at {tokens_per_second:,.0f} tokens a second"
    _out.print(f"about {tokens:,.0f} tokens through {layers} layers, {tokens * layers:.3g} layer-tokens{time_left}",
               highlight=False)


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes:.0f} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"


def print_tasks(rows: Sequence[Mapping[str, Any]]) -> None:
    """Tasks with what they offer; below, notes and what could not be read."""
    table = _table("task", "train|r", "validation|r", "test|r", "options|r", "chance|r", "metric")
    for row in rows:
        if "absent" in row:
            table.add_row(row["task"], *[""] * 6)
            continue
        sizes = [f"{row[split]:,}{'*' * (split == row['evaluated'])}" if split in row else ""
                 for split in ("train", "validation", "test")]
        fewest, most = row["fewest"], row["most"]
        options = "" if most == 1 else str(most) if fewest == most else f"{fewest} to {most}"
        table.add_row(row["task"], *sizes, options, f"{row['chance']:.3f}", row["metric"])
    _out.print(table)
    _out.print("* these documents are evaluated; importance is measured on train", highlight=False)
    notes: dict[str, list[str]] = {}
    for row in rows:
        for note in row.get("notes", []):
            notes.setdefault(note, []).append(row["task"])
    for note, tasks in notes.items():
        _out.print(f"{', '.join(tasks)}: {note}", highlight=False)
    if absent := [row for row in rows if "absent" in row]:
        _out.print(f"{len(absent)} of {len(rows)} tasks could not be read; the first: {absent[0]['absent']}",
                   highlight=False)


def print_anatomy(loaded: LoadedModel, *, verify: bool) -> bool:
    """What was found in a model; with `verify` also whether the contracts hold, which is returned."""
    found = loaded.anatomy
    _out.print(f"[bold]{loaded.name}[/bold]: {loaded.provenance.get('class')}, {found.num_layers} layers, "
               f"{found.num_heads} heads, {found.num_parameters:,} parameters", highlight=False, soft_wrap=True)
    for note in loaded.notes:
        _out.print(f"note: {note}", highlight=False)
    table = _table("layer", "heads|r", "KV groups|r", "head width|r", "parameters a head|r", "parameters of the FFN|r")
    rows = [(part.num_heads, part.num_kv_heads, part.d_head, found.parameters_per_head(i), found.parameters_per_ffn(i))
            for i, part in enumerate(found.layers)]
    start = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] != rows[start]:
            layers = f"L{start}" if i - start == 1 else f"L{start} to L{i - 1}"
            table.add_row(layers, *(f"{n:,}" for n in rows[start]))
            start = i
    _out.print(table)
    shared = any(part.num_kv_heads != part.num_heads for part in found.layers)
    if shared:
        _out.print("parameters a head: its query and output weights; keys and values go with the last head of a KV "
                   "group", highlight=False)
    return _print_contracts(loaded) if verify else True


def _print_contracts(loaded: LoadedModel) -> bool:
    from headcount.measure.forward import sweep_contract
    from headcount.measure.layout import layout
    from headcount.model.contracts import verify

    results = verify(loaded)
    for result in results:
        verdict = "[green]holds[/green]" if result.holds else "[red]FAILS[/red]"
        _out.print(f"{verdict}  {result.name} (largest error {result.worst_error:.1e}) {result.detail}",
                   highlight=False)
    _out.print(f"prompts: {layout(loaded)}", highlight=False)
    swept = sweep_contract(loaded)
    _out.print("masks: " + ("layers before the first difference are shared" if swept.holds else
                            f"one forward pass each: {swept.detail}"), highlight=False)
    return all(result.holds for result in results)


def print_accuracy(folder: Path) -> None:
    """The full model's accuracy per task and number of shots."""
    study = _study(folder)
    curves = study.curves()
    full = curves[curves["fraction"] == 0].drop_duplicates(["task", "num_fewshot"])
    table = _table("task", "shots|r", "accuracy|r", "95 % interval|r", "documents|r")
    for row in full.to_dict("records"):
        table.add_row(row["task"], str(row["num_fewshot"]), f"{row['accuracy']:.3f}",
                      f"{row['low']:.3f} to {row['high']:.3f}", str(row["documents"]))
    _out.print(table)
    _print_truncations(study)


def print_importance(folder: Path, component: Component, method: str = "gradient") -> None:
    """The most and the least important heads, or every FFN, per task and number of shots."""
    from headcount.view.analysis import name_of
    from headcount.view.points import groups

    study = _study(folder)
    importance = study.importance()
    score = study.spec["head_score"] if component == "head" and method == "gradient" else "accuracy"
    rows = importance[(importance["component"] == component) & (importance["score"] == score)]
    if rows.empty:
        rows = importance[(importance["component"] == component) & (importance["score"] == "position")]
    table = _table("task", "shots|r", component, "importance|r", "standard error|r")
    for (task, k), group in groups(rows, "task", "num_fewshot"):
        ranked: list[Any] = group.sort_values("importance", ascending=False, kind="stable").to_dict("records")
        for row in _ends(ranked):
            table.add_row(*((str(task), str(k), name_of(component, row["layer"], row["head"]),
                             f"{row['importance']:.4g}", f"{row['stderr']:.2g}") if row else ("", "", "...", "", "")))
    _out.print(table)
    if component == "head" and method == "oracle":
        _print_agreement(study)
    _print_truncations(study)


def print_curves(folder: Path) -> None:
    """Accuracy along every curve."""
    from headcount.view.points import groups

    study = _study(folder)
    curves = study.curves()
    fractions = sorted(curves["fraction"].unique())
    table = _table("task", "shots|r", "removed", "order", *(f"{100 * f:.0f} %|r" for f in fractions))
    for (task, k, component, order), curve in groups(curves, "task", "num_fewshot", "component", "order"):
        at = dict(zip(curve["fraction"], curve["accuracy"], strict=True))
        table.add_row(task, str(k), f"{component}s", order,
                      *(f"{at[f]:.3f}" if f in at else "" for f in fractions))
    _out.print(table)
    _print_truncations(study)


def print_induction(folder: Path, shown: int = 12) -> None:
    """The heads highest on prefix matching, with all scores, and what they say together."""
    from headcount.view import findings
    from headcount.view.analysis import name_of

    study = _study(folder)
    found = study.induction()
    table = _table("head", "prefix matching|r", "copying|r", "previous token|r", "OV copying|r", "induction head")
    trained = found[found["weights"] == "trained"].sort_values("prefix_matching", ascending=False, kind="stable")
    for row in trained.head(shown).to_dict("records"):
        scores = (row[name] for name in ("prefix_matching", "copying", "previous_token", "ov_copying"))
        table.add_row(name_of("head", row["layer"], row["head"]), *("" if x != x else f"{x:.3f}" for x in scores),
                      "yes" if row["induction"] else "")
    _out.print(table)
    notes = study.induction_notes
    told = [findings.induction_sentence(found, study.induction_thresholds),
            findings.reliability_caution(notes.get("reliability", {})), *notes.get("notes", ())]
    for sentence in filter(None, told):
        _out.print(f"- {sentence}", highlight=False)


def print_summary(study: Study, report: Path) -> None:
    """What a study found, in words, with what a reader must know, and where the report is."""
    from headcount.view import sentences

    _out.print()
    for sentence in sentences.headline(study):
        _out.print(f"- {sentence}", highlight=False, soft_wrap=False)
    cautions = list(sentences.cautions(study))
    if cautions:
        _out.print("\nBefore you rely on this:", highlight=False)
        for sentence in cautions:
            _out.print(f"- {sentence}", highlight=False)
    _out.print(f"\nreport: {report}", highlight=False, soft_wrap=True)


def _print_agreement(study: Study) -> None:
    names = {"accuracy": "accuracy", "gold_loglikelihood": "log-lik."}  # short, for 80 columns
    table = _table("score", "lost", "task", "shots|r", "Spearman|r", "95 % interval|r", "heads|r")
    for row in study.agreement().query("component == 'head'").to_dict("records"):
        known = row["correlation"] == row["correlation"]
        table.add_row(row["score"], names[row["oracle"]], row["task"], str(row["num_fewshot"]),
                      f"{row['correlation']:.2f}" if known else "none",
                      f"{row['low']:.2f} to {row['high']:.2f}" if known else "all equal", str(row["components"]))
    _out.print(table)


def _print_truncations(study: Study) -> None:
    from headcount.view import sentences

    for sentence in sentences.truncations(study):
        _out.print(sentence, highlight=False)


def _study(folder: Path) -> Study:
    from headcount.view.analysis import open_study

    return open_study(folder)


def _ends(rows: list[dict[str, Any]], shown: int = 10) -> list[dict[str, Any] | None]:
    """The first and last rows, with a gap where some are left out."""
    return [*rows] if len(rows) <= 3 * shown else [*rows[:shown], None, *rows[-shown:]]


def _table(*columns: str) -> Table:
    """A table; a column whose name ends in `|r` is right-aligned."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        name, _, side = column.partition("|")
        table.add_column(name, justify="right" if side else "left")
    return table
