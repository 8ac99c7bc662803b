"""What a reader must know before believing a figure; all of it computed from the study."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from headcount.analysis.rows import COMMON, MEAN, RANDOM, RELIABLE, TASK, groups, labelled
from headcount.analysis.study import Study
from headcount.report import words
from headcount.report.words import COMPONENT_NAMES, score_name, shots
from headcount.stats import intervals
from headcount.stats.baselines import NO_INTERVAL


def _listed(names: list[str], of: int, what: str, most: int = 6) -> str:
    """The names, or where they are many, how many."""
    return ", ".join(names) if len(names) <= most else f"{len(names)} of {of} {what}"


def truncations(study: Study, tasks: Sequence[str] | None = None, shots: Sequence[int] | None = None) -> Iterator[str]:
    """Where prompts did not fit the model's window; of all tasks and numbers of shots, or of some."""
    for (task, k), n in study.truncated.items():
        if (tasks is not None and task not in tasks) or (shots is not None and k not in shots):
            continue
        yield f"{task}, {k}-shot: {n} requests were longer than the model's window and lost their beginning."


def cautions(study: Study) -> Iterator[str]:
    """What a reader must know before believing a figure."""
    spec = study.spec
    yield from _of_entries(study)
    if apart := study.versions_apart:
        named = "; ".join(f"{package} {' and '.join(versions)}" for package, versions in sorted(apart.items()))
        yield f"Not all was measured with the same versions, which may give other numbers: {named}."
    yield from (f"Model: {note}." for note in study.model.get("notes", ()))
    if spec.get("protocol") == "paper":
        other = ["FFN oracles on the reported documents, the last layer's heads by another denominator, text encoded "
                 "differently, documents shuffled, other draws of shots"] if study.tasks else []
        if len(study.induction()):
            other.append("copying from embeddings fed to every layer and the value of the current position alone, "
                         "prefix matching with attention to the first token")
        yield f"Measured as the paper's code does (protocol paper): {'; '.join([*other, 'see docs/paper.md'])}."
        if study.paper_versions == {1}:
            yield ("Measured by an earlier version of protocol paper: the first documents instead of the first of the "
                   "shuffled ones, other draws of shots, all logits; a new run measures anew.")
        elif 1 in study.paper_versions:
            yield "What an earlier version of protocol paper measured in this folder is left out."
    if spec.get("apply_chat_template"):
        yield "Prompts are wrapped in the model's chat template."
    if spec["shared_shots"] and any(spec["shots"]):
        yield ("Shots are shared: one draw per task stands before all its documents, so results depend on that draw; "
               "intervals cover the choice of documents, not of shots.")
    yield from _of_orders(study)
    if study.depth()["low"].notna().any():
        yield ("Intervals of correlations, of what sets of heads or FFNs have in common, and of retained induction "
               "scores tell what another study with the same number of documents would find. In simulations 84 to 97 % "
               "of these 95 % intervals held, fewest where scores were noisy.")
    for task, known in study.known_tasks.items():
        yield from (f"{task}: {note}." for note in known["notes"])
    yield from _of_documents(study)
    yield from truncations(study)
    for what, n in study.unshown.items():
        points = "1 measured point" if n == 1 else f"{n} measured points"
        yield (f"Of the {what} {points} {'is' if n == 1 else 'are'} not shown: of fewer documents than others, or what "
               "it would be compared with is not measured.")


def _of_entries(study: Study) -> Iterator[str]:
    """What of the folder's entries cannot be believed, or not be checked."""
    if n := len(study.damaged):
        are = "entry is damaged and" if n == 1 else "entries are damaged and"
        yield (f"{n} {are} left out ({words.few(study.damaged)}), and so may be what rests on "
               f"{'it' if n == 1 else 'them'}: run the study's command again, which measures "
               "anew what was asked for (headcount check says what is wrong with them).")
    unverified, whole = study.unverified
    if unverified:
        of = ("The only entry is" if whole == 1 else f"All {whole} entries are" if unverified == whole else
              f"{unverified} of {whole} entries are")
        yield (f"{of} of an earlier version, which wrote no checksums: a bit that was damaged since cannot be found.")
    if n := len(study.foreign):
        yield (f"{words.number_of(n, 'file')} among the entries {'is none and is' if n == 1 else 'are none and are'} "
               f"ignored: {words.few(study.foreign)}.")


def _of_orders(study: Study) -> Iterator[str]:
    """What a reader must know of the orders by which components go."""
    if study.hidden_scores:
        yield ("This folder also has curves by other scores, which are not shown (nor are grids and transfers by "
               f"them): {', '.join(study.hidden_scores)}; --head-score, --ffn-score and --ffn-order ask for them.")
    random = study.curves()
    if (random["order"] == RANDOM).any() and study.against_random()["draws"].max() < 2:
        yield "There is only one random order, so how much random orders differ is not known."
    common = random[(random["order"] == COMMON) & (random["fraction"] > 0)]
    if len(common) and len(study.tasks) > 1 and not (common["scope"] == MEAN).any():
        yield (f"One order for all tasks is measured on {common['task'].nunique()} of {len(study.tasks)} tasks, so "
               "that there is no mean of it: run the study with all its tasks together.")
    by = study.ordering_scores
    orders = labelled(study.orders())
    if len(orders):
        weak = orders[(orders["score"] == orders["component"].map(by)) & (orders["reliability"] < RELIABLE)]
        for component, of_component in groups(weak, "component"):
            named = [f"{task} ({k}-shot, {r:.2f})" for task, k, r in zip(
                of_component["task"], of_component["num_fewshot"], of_component["reliability"], strict=True)]
            total = int(((orders["component"] == component) & (orders["score"] == by[component])).sum())
            yield (f"The order of {COMPONENT_NAMES[component][1]} by {score_name(by[component])} is mostly noise "
                   f"(reliability, 1 - stderr\N{SUPERSCRIPT TWO}/variance, below {RELIABLE:.1g}), so that its curves "
                   f"say little of what is needed: {_listed(named, total, 'orders')}.")
    layers = len(study.description["anatomy"]["heads_per_layer"])
    coarse = [f"{task} ({k}-shot, {n})" for (task, k), n in study.distinct_values.items()
              if n < layers / 2 and by["ffn"] == "accuracy"]
    if coarse:
        names = _listed(coarse, len(study.distinct_values), "FFN oracles")
        decides = "the order of layers" if study.spec.get("protocol") == "paper" else "gold log-likelihood"
        yield (f"Many FFNs cost the same accuracy, and {decides} decides between them: fewer than {layers / 2:.0f} "
               f"distinct accuracies in {names}.")


def _of_documents(study: Study) -> Iterator[str]:
    """Where documents are too few, or say nothing."""
    margin = study.spec["margin"]
    least = intervals.unchanged_needed(margin)
    few = {t: how_many for t, (n, how_many) in study.evaluated.items() if n < least}
    if few:
        named = _listed([f"{t} ({how_many})" for t, how_many in few.items()], len(study.evaluated), "tasks")
        yield (f"On a single task a loss of {words.points_of(margin)} can only be ruled out with {least} documents or "
               f"more, even if the answer to none of them changes. Fewer (or fewer passages that documents share) are "
               f"evaluated on {named}.")
    curves = study.curves()
    without = list(dict.fromkeys(curves.loc[curves["low"].isna() & (curves["scope"] == TASK), "task"]))
    if without:
        yield (f"The metric of {_listed(without, len(study.tasks), 'tasks')} goes beyond 0 and 1, so that it has no "
               "interval: nothing can be ruled out there, nor on a mean over tasks.")
    free = study.free_fractions()
    weak = free[free["free_fraction"].isna() & (free["scope"] == TASK) & (free["reason"] != NO_INTERVAL)]
    for k, of_k in groups(weak, "num_fewshot"):
        names = _listed(list(dict.fromkeys(of_k["task"])), len(study.tasks), "tasks")
        yield (f"With {shots(int(k))} the full model is not shown to be above chance, or above a constant answer, on "
               f"{names} (an exact test, corrected for the number of tasks); their curves say nothing.")
