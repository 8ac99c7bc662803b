"""What a person sees on the terminal: progress with time left, tables, a study's summary. Results go to stdout."""

from __future__ import annotations

import contextlib
import functools
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from headcount.errors import HeadcountError, listed
from headcount.stats.words import percent, signed

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

    from headcount.analysis.study import Study
    from headcount.engine.neighbours import Speed
    from headcount.masks import Component
    from headcount.model.load import LoadedModel
    from headcount.removal.certificate import CheckedModel
    from headcount.removal.comparison import Comparison
    from headcount.removal.confirm import Confirmation
    from headcount.removal.remove import Format, Removed
    from headcount.removal.writing import Writing
    from headcount.study.check import Checked
    from headcount.study.plan import PlannedJob
    from headcount.tasks.lm_eval_yaml import WrittenTasks
    from headcount.tasks.load import TaskDescription

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
        if total is not None and self._tells():
            self._progress.console.print(f"{done / total:4.0%}  {text}", highlight=False, markup=False)

    def begin(self, todo: int, done: int, tokens: float) -> None:
        """How many jobs are to do and were done before, and about how many tokens they take."""
        before = f", {done} were done before" if done else ""
        self._progress.console.print(f"{_jobs(todo)} to do{before}; about {tokens:,.0f} tokens through the model",
                                     highlight=False)
        self._tokens, self._done = max(tokens, 1.0), 0.0
        self._started = self._told = time.monotonic()
        self._progress.reset(self._task, total=self._tokens)

    def note(self, text: str) -> None:
        """One thing to know while jobs are done."""
        self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def job(self, title: str) -> None:
        """A job begins."""
        self._title = title
        self._progress.update(self._task, description=title)

    def advance(self, tokens: float) -> None:
        """So many more tokens are computed."""
        self._done += tokens
        self._progress.update(self._task, completed=min(self._done, self._tokens))
        if self._tells():
            left = (time.monotonic() - self._started) * (self._tokens / self._done - 1)
            self._progress.console.print(f"{self._done / self._tokens:4.0%}  about {max(left, 0) / 60:.0f} min left  "
                                         f"{self._title}", highlight=False)

    def _tells(self) -> bool:
        """Whether it is time for a line, where nobody watches."""
        now = time.monotonic()
        if self._progress.console.is_terminal or now - self._told <= _LINE_EVERY:
            return False
        self._told = now
        return True


@dataclass(frozen=True)
class Asked:
    """What one command asked for, of a folder that may hold more."""

    tasks: Sequence[str]
    shots: Sequence[int]

    def of(self, table: pd.DataFrame, study: Study) -> pd.DataFrame:
        """The table's rows of these; means over tasks only where they are over no others."""
        from headcount.analysis.rows import MEAN

        rows = table[table["num_fewshot"].isin(self.shots)]
        if "scope" not in rows:
            return rows[rows["task"].isin(list(self.tasks))]
        means = (rows["scope"] == MEAN) & (set(self.tasks) == set(study.tasks))
        return rows[rows["task"].isin(list(self.tasks)) | means]


@contextlib.contextmanager
def reporter() -> Iterator[Bar]:
    """A progress bar on stderr, gone when the block ends."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.percentage:3.0f} %"),
               TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=_err, transient=True, speed_estimate_period=120,
                  disable=not _err.is_terminal) as progress:
        yield Bar(progress)


def print_note(text: str) -> None:
    """One thing to know before something begins."""
    _out.print(f"note: {text}", highlight=False, markup=False)


def print_damaged(names: Sequence[str]) -> None:
    """That entries of a folder are damaged, and measured again if they are asked for; nothing where there are none."""
    from headcount.report.words import few

    if names:
        one = len(names) == 1
        print_note(f"{len(names)} {'entry' if one else 'entries'} of this folder {'is' if one else 'are'} damaged and "
                   f"{'counts' if one else 'count'} as not done ({few(names)}); what "
                   "this command asks for is measured again, and headcount check says what is wrong")


def print_cost(todo: Sequence[PlannedJob], layers: int, speed: Speed) -> None:
    """What jobs take: layer-tokens, and time at the speed that the model ran at just now, and beside what it ran."""
    tokens, per_second = sum(p.tokens for p in todo), speed.tokens_per_second
    seconds = tokens / per_second
    time_left = "" if seconds != seconds else f", {_duration(seconds)} at {per_second:,.0f} tokens a second"
    _out.print(f"about {tokens:,.0f} tokens through {layers} layers, {tokens * layers:.3g} layer-tokens{time_left}",
               highlight=False)
    if time_left and speed.load.crowded:
        _out.print(f"timed while other processes kept {speed.load.others:.1f} of {speed.load.cores} cores busy: on an "
                   "idle machine it may be several times faster", highlight=False)


def _jobs(n: int) -> str:
    return f"{n} job{'s' * (n != 1)}"


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 1.5:
        return "about a minute" if minutes > 0.5 else "less than a minute"
    return f"{minutes:.0f} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"


def print_tasks(rows: Sequence[TaskDescription]) -> None:
    """Tasks with what they offer; below, notes and what could not be read."""
    table = table_of("task", "train|r", "validation|r", "test|r", "options|r", "chance|r", "metric")
    for row in rows:
        if row.absent:
            table.add_row(row.name, *[""] * 6)
            continue
        sizes = [f"{row.sizes[split]:,}{'*' * (split == row.evaluated)}" if split in row.sizes else ""
                 for split in ("train", "validation", "test")]
        options = "" if row.most == 0 else str(row.most) if row.fewest == row.most else f"{row.fewest} to {row.most}"
        table.add_row(row.name, *sizes, options, f"{row.chance:.3f}", row.metric)
    _out.print(table)
    _out.print("* these documents are evaluated; importance is measured on train", highlight=False)
    notes: dict[str, list[str]] = {}
    for row in rows:
        for note in row.notes:
            notes.setdefault(note, []).append(row.name)
    for note, tasks in notes.items():
        _out.print(f"{', '.join(tasks)}: {note}", highlight=False)
    if absent := [row for row in rows if row.absent]:
        _out.print(f"{len(absent)} of {len(rows)} tasks could not be read; the first: {absent[0].absent}",
                   highlight=False)


def print_written_tasks(written: WrittenTasks, folder: Path) -> None:
    """What was written for lm-eval, how it is used, and what lm-eval cannot repeat."""
    by_shots: dict[tuple[int, ...], list[str]] = {}
    for task, shots in written.tasks.items():
        by_shots.setdefault(shots, []).append(task)
    for shots, tasks in by_shots.items():
        compared = (f"with {listed([str(k) for k in shots])} shots lm-eval's prompts are headcount's" if shots else
                    "headcount's definition; its documents are not local, and prompts were not compared")
        _out.print(f"{folder}: {listed(tasks)} for lm-eval: {compared}", highlight=False, soft_wrap=True)
    _out.print("lm_eval --model hf --model_args pretrained=MODEL --include_path "
               f"{shlex.join([str(folder), '--tasks', ','.join(written.tasks)])} --num_fewshot K",
               highlight=False, markup=False, soft_wrap=True)
    _out.print("in one process and with the same seed; lm-eval draws shots for each document: --shared-shots and "
               "--protocol paper cannot be repeated with it", highlight=False, soft_wrap=True)
    if written.left:
        one = len(written.left) == 1
        _out.print(f"not written, since lm-eval has {'it' if one else 'them'}: {', '.join(written.left)}",
                   highlight=False, soft_wrap=True)


def print_anatomy(loaded: LoadedModel, *, verify: bool) -> bool:
    """A model's heads, FFNs and parameters; with `verify` also its contracts, and returns whether they hold."""
    anatomy = loaded.anatomy
    _out.print(f"[bold]{loaded.name}[/bold]: {loaded.provenance.get('class')}, {anatomy.num_layers} layers, "
               f"{anatomy.num_heads} heads, {anatomy.num_parameters:,} parameters", highlight=False, soft_wrap=True)
    for note in loaded.notes:
        _out.print(f"note: {note}", highlight=False)
    table = table_of("layer", "heads|r", "KV groups|r", "head width|r", "parameters a head|r",
                     "parameters of the FFN|r")
    rows = [(part.num_heads, part.num_kv_heads, part.d_head, anatomy.parameters_per_head(i),
             anatomy.parameters_per_ffn(i)) for i, part in enumerate(anatomy.layers)]
    start = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] != rows[start]:
            layers = f"L{start}" if i - start == 1 else f"L{start} to L{i - 1}"
            table.add_row(layers, *(f"{n:,}" for n in rows[start]))
            start = i
    _out.print(table)
    shared = any(part.num_kv_heads != part.num_heads for part in anatomy.layers)
    if shared:
        _out.print("parameters a head: its query and output weights; keys and values go with the last head of a KV "
                   "group", highlight=False)
    return _print_contracts(loaded) if verify else True


def _print_contracts(loaded: LoadedModel) -> bool:
    from headcount.engine.engine import Engine

    engine = Engine.of(loaded)
    results = list(engine.contracts)
    if all(result.holds for result in results):
        results.append(engine.gradient_contract)
    for result in results:
        verdict = "[green]holds[/green]" if result.holds else "[red]FAILS[/red]"
        error = "" if result.worst_error is None else f" (largest error {result.worst_error:.1e})"
        _out.print(f"{verdict}  {result.name}{error} {result.detail}".rstrip(), highlight=False)
    holds = all(result.holds for result in results)
    if wrong := engine.no_numbers() if holds else "":
        told = HeadcountError(wrong, fields=("dtype",)).on_command_line()
        _out.print(f"[red]FAILS[/red]  random tokens give numbers: it goes wrong first in {told}", highlight=False)
        return False
    if holds:
        if engine.device_check is not None:
            _out.print(f"device: {engine.device_check}", highlight=False)
        _out.print(f"prompts: {engine.layout}", highlight=False)
        _out.print(f"masks: {engine.prove_sweep()}", highlight=False)
    return holds


def print_checked(checked: Checked) -> None:
    """Which entries of a folder are whole, which are damaged and why, and what to do."""
    from headcount.report.words import few

    out = functools.partial(_out.print, highlight=False, markup=False, soft_wrap=True)
    out(f"{checked.folder}: {checked.whole} whole, {checked.unverified} unverified, {len(checked.damaged)} damaged")
    if checked.description:
        out(checked.description)
    for one in checked.damaged:
        out(f"damaged: {one.name}{f' ({one.title})' if one.title else ''}: {one.reason}")
    if checked.unmeasured:
        jobs = "jobs are" if len(checked.unmeasured) > 1 else "job is"
        out(f"{len(checked.unmeasured)} {jobs} not measured yet: {few(checked.unmeasured)}")
    if checked.unverified:
        out("unverified: of an earlier version, which wrote no checksums; nothing speaks against them")
    if checked.of_other_models:
        out(f"of another model than study.json says, and shown nowhere: {checked.of_other_models}")
    if checked.other_versions:
        out(f"not read: {checked.other_versions} of another version's format")
    if checked.foreign:
        out(f"no entries, and ignored: {', '.join(checked.foreign)}")
    if checked.left_over:
        out(f"left by processes that were killed while they wrote, and ignored: {few(checked.left_over)}")
    if checked.damaged or checked.unmeasured:
        out(("what is damaged is measured again" if checked.damaged else "that is measured")
            + " when the same command is run again"
            + ("; this folder's commands:" if checked.commands else ""))
        for command in checked.commands:
            out(f"  {command}")


def print_sentence(text: str) -> None:
    """Some sentences, as they are."""
    _out.print(text, highlight=False, markup=False)


def print_savings(removed: Removed, format: Format, *, told: bool) -> None:
    """What goes, unless that was told already, and what that saves, before it is done."""
    saved = removed.savings_as(format)
    print_sentence(f"{saved.what_is_left if told else saved}.")
    for note in removed.loaded.notes:
        print_note(note)


def print_removed(folder: Path) -> None:
    """What was written, what was proved of it, and how it is loaded."""
    from headcount.removal.card import trust
    from headcount.removal.certificate import certificate_of

    told = certificate_of(folder)
    if told["speed"] is not None:
        for what, key in (("prefill", "prefill"), ("decoding", "decode")):
            print_sentence(f"{what}, tokens a second: " + ", ".join(
                f"{side} {one[key]:,.1f}" for side, one in told["speed"]["sides"].items()))
    for proof in told["proofs"]:
        print_sentence(f"proved: {proof['what']}, differs from the masked model by at most "
                       f"{proof['largest']:.1e} {proof['in']} ({proof['tolerance']:.0e} is allowed)")
    print_sentence(f"{folder} is written: AutoModelForCausalLM.from_pretrained({str(folder)!r}{trust(told)}), or "
                   f"headcount.load({str(folder)!r})")


def print_proved(checked: CheckedModel) -> None:
    """What a copy of a removed model was found to be."""
    from headcount.removal.card import gone

    print_sentence(f"{checked.folder}: {checked.told['model']['name']} without {gone(checked.told)}, loaded by "
                   f"{checked.backend}: the largest difference of logits is "
                   f"{checked.largest:.1e} of their range ({checked.allowed:.0e} is allowed)")
    for name in checked.changed:
        print_sentence(f"changed: {name} is not the file that was written: copy the folder again")
    print_sentence("it is what was written" if checked.holds else "it is not what was written")


def print_accuracy(study: Study, asked: Asked) -> None:
    """The full model's accuracy per task and number of shots."""
    from headcount.analysis.rows import labelled

    curves = labelled(asked.of(study.curves(), study))
    full = curves[curves["fraction"] == 0].drop_duplicates(["task", "num_fewshot"])
    table = table_of("task", "shots|r", "accuracy|r", "95 % interval|r", "documents|r")
    for row in full.to_dict("records"):
        table.add_row(row["task"], str(row["num_fewshot"]), f"{row['accuracy']:.3f}",
                      f"{row['low']:.3f} to {row['high']:.3f}" if row["low"] == row["low"] else "none",
                      str(row["documents"]))
    _out.print(table)
    for row in asked.of(study.weak_results(), study).to_dict("records"):
        _out.print(f"{row['task']}, {row['num_fewshot']}-shot: {row['reason']}.", highlight=False)
    _print_truncations(study, asked)


def print_importance(study: Study, asked: Asked, component: Component, method: str = "gradient") -> None:
    """The most and the least important heads, or every FFN, per task and number of shots."""
    from headcount.analysis.importance import most_important_first
    from headcount.analysis.rows import groups
    from headcount.analysis.scores import name_of
    from headcount.report.words import score_name

    importance = asked.of(study.importance(), study)
    score = "accuracy" if (component, method) == ("head", "oracle") else study.ordering_scores[component]
    rows, ties = (importance[(importance["component"] == component) & (importance["score"] == name)]
                  for name in (score, study.tie_scores.get(component, score)))
    _out.print(f"by {score_name(score)}", highlight=False)
    table = table_of("task", "shots|r", component, "importance|r", "standard error|r")
    for (task, k), group in groups(rows, "task", "num_fewshot"):
        ranked: list[Any] = most_important_first(group, ties).to_dict("records")
        for row in _ends(ranked):
            table.add_row(*((str(task), str(k), name_of(component, row["layer"], row["head"]),
                             f"{row['importance']:.4g}", f"{row['stderr']:.2g}") if row else ("", "", "...", "", "")))
    _out.print(table)
    if component == "head" and method == "oracle":
        _print_agreement(study, asked)
    _print_truncations(study, asked)


def print_curves(study: Study, asked: Asked) -> None:
    """Accuracy along every curve, a table per task: ten fractions fit in 80 columns.

    Curves that leave every layer the same shape have fractions of their own: a table more, and what the shape costs.
    """
    from headcount.analysis.rows import FREE_FORM, groups, labelled
    from headcount.report.uniform import uniform_sentence

    cost = asked.of(study.uniform_cost(), study)
    added = {*cost["fraction"]} - {*study.spec["fractions"], *study.spec.get("common_fractions", ())}
    for task, of_task in groups(labelled(asked.of(study.curves(), study)), "task"):
        shaped = of_task["order"].isin([*FREE_FORM])
        _out.print(f"[bold]{task}[/bold]: accuracy", highlight=False)
        _print_curves(of_task[~shaped & ~of_task["fraction"].isin(added)])
        if shaped.any():
            beside = of_task["order"].isin([order for orders in FREE_FORM.values() for order in orders])
            _print_curves(of_task[(shaped | beside) & (of_task["component"] == "head") & of_task["fraction"].isin(
                of_task.loc[shaped, "fraction"])])
    if sentence := uniform_sentence(cost):
        _out.print(sentence, highlight=False)
    _print_truncations(study, asked)


def _print_curves(rows: pd.DataFrame) -> None:
    from headcount.analysis.rows import groups

    names = {"head": "heads", "ffn": "FFNs", "gradient": "by gradient", "oracle": "by oracle", "random": "at random",
             "common": "by one order", "uniform": "in one shape", "uniform common": "by one order, in one shape"}
    fractions = sorted(rows["fraction"].unique())
    table = table_of("shots|r", "% removed of", *(f"{100 * f:.3g}|r" for f in fractions))
    table.padding = (0, 1, 0, 0)
    for (k, component, order), curve in groups(rows, "num_fewshot", "component", "order"):
        at = dict(zip(curve["fraction"], curve["accuracy"], strict=True))
        table.add_row(str(k), f"{names[component]} {names.get(order, order)}",
                      *(f"{at[f]:.2f}".removeprefix("0") if f in at else "" for f in fractions))
    _out.print(table)


def print_induction(study: Study, shown: int = 12) -> None:
    """The heads highest on prefix matching, with all scores, and what they say together."""
    from headcount.analysis.scores import name_of
    from headcount.report import induction as primitives
    from headcount.report.induction_heads import induction_sentence

    scores_of_heads = study.induction()
    table = table_of("head", "prefix matching|r", "copying|r", "previous token|r", "OV copying|r", "induction head")
    trained = scores_of_heads[scores_of_heads["weights"] == "trained"].sort_values(
        "prefix_matching", ascending=False, kind="stable")
    for row in trained.head(shown).to_dict("records"):
        scores = (row[name] for name in ("prefix_matching", "copying", "previous_token", "ov_copying"))
        table.add_row(name_of("head", row["layer"], row["head"]), *("" if x != x else f"{x:.3f}" for x in scores),
                      "yes" if row["induction"] is True else "")
    _out.print(table)
    notes = study.induction_notes
    told = [primitives.texts_sentence(notes), induction_sentence(scores_of_heads, study.induction_thresholds),
            primitives.reliability_caution(notes.get("reliability", {})), *notes.get("notes", ())]
    for sentence in filter(None, told):
        _out.print(f"- {sentence}", highlight=False)


def print_summary(study: Study, report: Path) -> None:
    """A study's results in words, with what a reader must know, and where the report is."""
    from headcount.report.cautions import cautions
    from headcount.report.headline import headline

    _out.print()
    for sentence in headline(study):
        _out.print(f"- {sentence}", highlight=False, soft_wrap=False)
    told = list(cautions(study))
    if told:
        _out.print("\nBefore you rely on this:", highlight=False)
        for sentence in told:
            _out.print(f"- {sentence}", highlight=False, markup=False)  # names of files may look like markup
    if others := study.other_requests:
        _out.print(f"\nThis folder was also asked for other things; headcount report {study.folder} --asked NUMBER "
                   "shows one of them:", highlight=False)
        for line in others:
            _out.print(line, highlight=False)
    _out.print(f"\nreport: {report}", highlight=False, soft_wrap=True)


def print_comparison(compared: Comparison) -> None:
    """Full against removed: accuracy on documents that chose nothing, a text's perplexity, continuations."""
    out = functools.partial(_out.print, highlight=False, markup=False)
    if compared.accuracy is not None:
        _print_confirmation(compared.accuracy)
        sentence = compared.accuracy.sentence
        out(f"{sentence[:1].upper()}{sentence[1:]}.")
    else:
        out("Accuracy was not compared: only a study says which documents chose nothing (--study beside --mask).")
    full, removed = compared.full, compared.removed
    out(f"Perplexity of a text of {full.tokens:,} tokens: full {full.perplexity:.4g}, removed "
        f"{removed.perplexity:.4g}; bits per byte: full {full.bits_per_byte:.3f}, removed {removed.bits_per_byte:.3f}.")
    _print_writing(compared.writing)


def _print_confirmation(confirmation: Confirmation) -> None:
    table = table_of("task", "documents", "full|r", "removed|r", "points|r", "95 % interval|r", "verdict")  # 80 columns
    rows = [(one.task, f"{one.compared.documents} {one.split_name if one.split == 'examples' else ''}".rstrip(),
             one.compared) for one in confirmation.tasks]
    if confirmation.mean is not None and len(rows) > 1:
        rows.append(("mean over tasks", str(confirmation.mean.documents), confirmation.mean))
    for task, documents, of in rows:
        table.add_row(task, documents, f"{of.full:.3f}", f"{of.removed:.3f}", signed(of.difference),
                      f"{signed(of.low)} to {signed(of.high)}" if of.low == of.low else "none", of.verdict)
    if rows:
        _out.print(table)


def _print_writing(writing: Writing) -> None:
    from rich.text import Text  # plain: a model may write what looks like markup

    table = table_of("prompt", "full model", "removed")
    for texts in zip(writing.prompts, writing.full, writing.removed, strict=True):
        table.add_row(*(Text(" ".join(text.split()), overflow="fold") for text in texts))
    table.padding = (0, 1, 1, 0)
    _out.print(table)
    _out.print(f"4-grams that repeat what was written before: full {percent(writing.full_repeated)}, "
               f"removed {percent(writing.removed_repeated)}", highlight=False)


def _print_agreement(study: Study, asked: Asked) -> None:
    names = {"accuracy": "accuracy", "gold_loglikelihood": "log-lik."}  # short, for 80 columns
    table = table_of("score", "lost", "task", "shots|r", "Spearman|r", "95 % interval|r", "heads|r")
    for row in asked.of(study.agreement(), study).query("component == 'head'").to_dict("records"):
        known = row["correlation"] == row["correlation"]
        table.add_row(row["score"], names[row["oracle"]], row["task"], str(row["num_fewshot"]),
                      f"{row['correlation']:.2f}" if known else "none",
                      f"{row['low']:.2f} to {row['high']:.2f}" if known else "all equal", str(row["components"]))
    _out.print(table)


def _print_truncations(study: Study, asked: Asked) -> None:
    from headcount.report.cautions import truncations

    for sentence in truncations(study, asked.tasks, asked.shots):
        _out.print(sentence, highlight=False)


def _ends(rows: list[dict[str, Any]], shown: int = 10) -> list[dict[str, Any] | None]:
    """The first and last rows, with a gap where some are left out."""
    return [*rows] if len(rows) <= 3 * shown else [*rows[:shown], None, *rows[-shown:]]


def table_of(*columns: str) -> Table:
    """A table; a column whose name ends in `|r` is right-aligned."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        name, _, side = column.partition("|")
        table.add_column(name, justify="right" if side else "left")
    return table
