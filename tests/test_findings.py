"""Sentences of the whole analysis: what they say is what was planted, hedged, and nothing where there is nothing."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import synthetic_frames as frames
from headcount.analysis.correlations import noise_by_shots
from headcount.analysis.induction import borderline, induction_heads
from headcount.report import words
from headcount.report.correlations import shots_sentence, tasks_sentence
from headcount.report.grid import grid_sentence
from headcount.report.importance import depth_sentence
from headcount.report.induction import (
    among_important_rows,
    among_important_sentence,
    induction_heads_table,
    reliability_caution,
    retained_sentence,
    scatter_sentence,
    texts_sentence,
)
from headcount.report.induction_heads import NAMED, induction_sentence
from headcount.report.sets import overlap_sentence, top_sets_sentence
from headcount.report.top_sets import overlap_rows
from headcount.report.transfer import transfer_sentence, unseen_sentence

ONE, TWO = frames.TASKS[:1], frames.TASKS[:2]
MINUS = "\N{MINUS SIGN}"


def grid(*within: tuple[float, float], tasks: tuple[str, ...] = TWO) -> pd.DataFrame:
    """A grid in which these cells, by heads and FFNs removed, are within the margin."""
    table = frames.grid(tasks, (0, 5))
    cells = zip(table["heads_fraction"], table["ffns_fraction"], strict=True)
    return table.assign(within_margin=[cell in {(0.0, 0.0), *within} for cell in cells])


def test_the_grid_counts_only_what_is_reached_step_by_step() -> None:
    text = grid_sentence(grid((0.2, 0.0), (0.2, 0.2), (0.8, 0.8), (0.0, 0.6)), 0.02)
    assert "With 5 shots, 20 % of the heads and 20 % of the FFNs can go jointly, 16 % of all parameters" in text
    assert "alone, at the grid's steps, 20 % of the heads or 0 % of the FFNs can go" in text
    assert "95 % interval of the difference" in text
    assert "a loss of 2 points or more is ruled out at every step" in text


def test_the_grid_prefers_most_parameters() -> None:
    cells = [(h, f) for h in frames.STEPS[:4] for f in (0.0, 0.2)] + [(0.0, 0.4), (0.2, 0.4)]
    text = grid_sentence(grid(*cells), 0.02)
    assert "20 % of the heads and 40 % of the FFNs can go jointly, 27 % of all" in text, "not 60 and 20 %: 26 %"


def test_the_grid_where_nothing_or_everything_can_go() -> None:
    assert "not shown to be free jointly" in (text := grid_sentence(grid(), 0.02))
    assert "without 20 % of the heads and 20 % of the FFNs, accuracy on the mean over tasks changes by" in text
    assert "20 % of the heads or 0 % of the FFNs can go" in grid_sentence(grid((0.2, 0.0)), 0.02)
    everything = [(h, f) for h in frames.STEPS for f in frames.STEPS]
    text = grid_sentence(grid(*everything, tasks=ONE), 0.02)
    assert "80 % of the heads and 80 % of the FFNs can go jointly, 64 % of all parameters, and the grid goes no" in text
    assert "on arc_easy" in text
    assert "nothing can be said" in grid_sentence(grid(*everything).assign(baseline=0.99), 0.02)
    few = grid(*everything)
    few.loc[few["ffns_fraction"] == 0.2, "ffns_removed"] = 0
    only = few[few["ffns_fraction"].isin((0.0, 0.2))]
    assert "no cell removes both" in grid_sentence(only, 0.02), "a fifth of four FFNs is none of them"
    text = grid_sentence(few.assign(within_margin=few["ffns_fraction"] < 0.4), 0.02)
    assert "80 % of the heads or 0 % of the FFNs can go" in text


def test_induction_heads_are_counted_named_and_beside_random_weights() -> None:
    induction = frames.induction(6, 4, circuits=3)
    trained = induction[induction["weights"] == "trained"]
    best = trained[trained["induction"]].assign(lower=lambda t: t[["prefix_matching", "copying"]].min(axis=1))
    top = best.loc[best["lower"].idxmax()]
    text = induction_sentence(induction, frames.THRESHOLDS)
    assert text.startswith(f"{len(best)} of 24 heads are induction heads (prefix matching of at least 0.4 and copying")
    assert f": L{top['layer']}H{top['head']}, " in text, "the strongest is named first"
    control = induction[induction["weights"] == "random"]
    assert text.endswith(f"With random weights prefix matching is at most {control['prefix_matching'].max():.2g} and "
                         f"copying {control['copying'].max():.2g}."), "none is found by construction"
    lax = induction.assign(induction=(induction["weights"] == "random") | induction["induction"])
    limits = {"prefix_matching": 0.0, "copying": 0.05}
    assert "With random weights 24 of 24 are: prefix" in induction_sentence(lax, limits)
    unknown = induction.assign(induction=pd.Series(pd.NA, index=induction.index, dtype="boolean"))
    assert "was not measured" in induction_sentence(unknown, frames.THRESHOLDS)
    assert induction_sentence(induction.assign(induction=False), frames.THRESHOLDS).startswith("None of 24")
    assert "random" not in induction_sentence(trained, frames.THRESHOLDS)
    many = induction_sentence(frames.induction(20, 20, circuits=40), frames.THRESHOLDS)
    assert many.count("H") == NAMED
    assert " more." in many


def test_heads_near_the_line_are_told() -> None:
    sure = pd.DataFrame({"prefix_matching": [0.9, 0.1, 0.42, 0.9], "copying": [0.9, 0.1, 0.9, 0.34],
                         "prefix_matching_variance": 9 * 0.03**2, "copying_variance": 9 * 0.02**2, "sequences": 9})
    assert borderline(sure, frames.THRESHOLDS) == 2


def test_noisy_scores_are_named() -> None:
    assert reliability_caution({"prefix_matching": 0.99, "copying": 0.8}) == ""
    text = reliability_caution({"prefix_matching": 0.99, "copying": 0.62})
    assert "The reliability of copying is below 0.8: this score is noisy" in text
    assert "too few texts" in reliability_caution({"prefix_matching": np.nan, "copying": np.nan})
    assert reliability_caution({"prefix_matching": 0.9, "copying": 0.9, "previous_token": 0.2}) == ""


def test_texts_are_told_with_their_lengths_and_reliability() -> None:
    notes = {"sequences": 28, "lengths": [25, 58], "repeats": 4,
             "reliability": {"prefix_matching": 0.991, "copying": 0.75, "previous_token": 0.9}}
    assert texts_sentence(notes) == (
        "Means over 28 texts: for prefix matching 25, 58 random tokens, repeated 4 times; for copying 4 times as many "
        "random tokens, all different. Reliability (split halves of the texts, corrected to all of them by "
        "Spearman-Brown): 0.99 for prefix matching and 0.75 for copying.")
    assert texts_sentence({}) == ""


def test_tasks_are_compared_from_the_most_unlike_to_the_most_alike_pair() -> None:
    table = frames.correlations(frames.TASKS[:3], (0, 5))
    mine = (table["component"] == "head") & (table["kind"] == "tasks") & (table["num_fewshot"] == 5)
    planted = {("arc_easy", "boolq"): (0.2, -0.1, 0.3), ("boolq", "cb"): (0.5, 0.2, 0.6),
               ("arc_easy", "cb"): (0.9, 0.8, 1.0)}
    for (a, b), numbers in planted.items():
        of_pair = table["task"].isin([a, b]) & table["other_task"].isin([a, b])
        table.loc[mine & of_pair, ["correlation", "low", "high"]] = numbers
    text = tasks_sentence(table, "head")
    assert "correlates (Spearman) at 0.50 (median of 3 pairs)" in text, "each pair once, though the table has both ways"
    assert f"from 0.20 ({MINUS}0.10 to 0.30) for arc_easy and boolq" in text
    assert "to 0.90 (0.80 to 1.00) for arc_easy and cb" in text
    assert "2 of 3 intervals lie above 0" in text
    assert "The paper's argsort variant of the correlation is 0.02 (median)." in text
    assert ("Knowing a head's layer alone gives a correlation of 0.63; within layers two tasks agree at 0.55 (median; "
            "3 of 3 intervals lie above 0).") in text
    assert "layer" not in tasks_sentence(table, "ffn"), "there is one in each"
    pair = tasks_sentence(frames.correlations(TWO, (0,)), "head")
    assert "alone gives a correlation of 0.63; within layers two tasks agree at 0.55 (0.50 to 0.60)." in pair


def noisy(table: pd.DataFrame, k: int, value: float) -> pd.DataFrame:
    of_k = (table["kind"] == "reliability") & (table["scope"] != "random") & (table["num_fewshot"] == k)
    return table.assign(correlation=table["correlation"].where(~of_k, value))


def test_that_scores_are_mostly_noise_comes_first() -> None:
    table = frames.correlations(frames.TASKS[:3], (0, 5))
    text = tasks_sentence(noisy(table, 0, 0.3), "head")
    assert text.startswith("With no shots scores are mostly noise: reliability is below 0.5 for 3 of 3 orders. With 5 "
                           "shots, two tasks'"), "the figure shows them too"
    text = tasks_sentence(noisy(noisy(table, 0, 0.3), 5, -0.1), "ffn")
    assert text.startswith("With no shots scores are mostly noise: reliability is below 0.5 for 3 of 3 orders; with 5 "
                           "shots scores are mostly noise:")
    text = shots_sentence(noisy(noisy(table, 0, 0.3), 5, 0.4), "head")
    assert text.startswith("Scores are mostly noise: reliability is below 0.5 for 6 of 6 orders. Importance of heads")
    few = noisy(table, 0, 0.3)
    few.loc[(few["kind"] == "reliability") & (few["task"] != frames.TASKS[0]), "correlation"] = 0.9
    assert tasks_sentence(few, "head").startswith("With 5 shots, two tasks'"), "one of three is not most"
    unknown = noisy(table, 5, np.nan)
    assert noise_by_shots(unknown[unknown["component"] == "head"]) == {}
    random = (unknown["other_scope"] == "random") & (unknown["kind"] == "tasks")
    unknown.loc[random, "high"] = 0.95
    assert tasks_sentence(unknown, "head").startswith(
        "With 5 shots scores may be noise: most correlations lie within what random orders reach. With 5 shots, two")


def test_shots_are_called_different_only_below_what_noise_allows() -> None:
    table = frames.correlations(ONE, (0, 5))
    between = (table["kind"] == "shots") & (table["task"] == table["other_task"])
    table.loc[between, ["correlation", "low", "high", "ceiling"]] = [0.7, 0.6, 0.8, 0.81]
    text = shots_sentence(table, "head")
    assert "with no shots and with 5 shots correlates (Spearman) at 0.70 on arc_easy (0.60 to 0.80)" in text
    assert text.endswith("the order seems to change, though noise alone puts about one interval in ten there.")
    assert ("0.80). Knowing a head's layer alone gives a correlation of 0.63; within layers they agree at 0.55 (0.50 "
            "to 0.60). The paper's argsort variant of the correlation is 0.02. The interval lies") in text
    table.loc[between, "high"] = 0.82
    assert "noise alone could account" in shots_sentence(table, "head")
    several = frames.correlations(TWO, (0, 1, 5))
    text = shots_sentence(several, "ffn")
    assert "1 shot" not in text, "the fewest and the most shots"
    assert "for the mean over tasks, from" in text
    assert "noise" not in text, "without reliabilities nothing is claimed"
    assert "The paper's argsort variant of the correlation is 0.02 (median)." in text
    both = (several["kind"] == "shots") & (several["task"] == several["other_task"])
    several.loc[both, "ceiling"] = 0.99
    several.loc[both, "high"] = 0.9
    assert ("On 2 of 2 tasks the interval lies below what scores so noisy could reach; noise alone puts about one "
            "interval in ten there.") in shots_sentence(several, "ffn")
    several.loc[both, "high"] = 1.0
    assert "On none of 2 tasks does the interval lie below" in shots_sentence(several, "ffn")


def test_the_best_and_the_worst_donor_are_found() -> None:
    transfer = frames.transfer(frames.TASKS[:4], (0, 5))
    text = transfer_sentence(transfer, "head")
    assert "With 5 shots and 50 % of the heads removed" in text
    assert f"by 0.0 ({MINUS}1.5 to +1.5) with the order of arc_easy, the best donor of 4" in text
    assert f"by {MINUS}3.0 ({MINUS}4.5 to {MINUS}1.5) with that of copa, the worst" in text
    assert "Of the 4 single donors, 2 are shown to be worse than a task's own order and 0 to be better" in text
    assert text.endswith("the other tasks' mean order is shown to be neither better nor worse.")
    without = (transfer["donor_scope"] == "other tasks") & (transfer["scope"] == "mean")
    transfer.loc[without, ["difference", "difference_low", "difference_high"]] = [-0.05, -0.08, -0.02]
    assert transfer_sentence(transfer, "head").endswith("mean order is shown to be worse.")


def test_without_a_mean_over_recipients_it_is_taken_but_not_hedged() -> None:
    transfer = frames.transfer(frames.TASKS[:4], (5,)).query("scope != 'mean'")
    text = transfer_sentence(transfer, "head")
    means = transfer[(transfer["fraction"] == 0.5)].groupby("donor")["difference"].mean()[list(frames.TASKS[:4])]
    assert f"by {MINUS}{-100 * means.min():.1f} with that of {means.idxmin()}, the worst" in text
    assert "shown to be" not in text


def test_unseen_tasks_stand_beside_the_full_model_and_a_random_order() -> None:
    text = unseen_sentence(frames.transfer(TWO, (5,)), "head")
    assert ("mathqa 0.35 (0.30 to 0.40), full model 0.50 (0.45 to 0.55), random order 0.20 (0.15 to 0.25); lambada"
            in text)


def test_retained_is_more_than_random_only_outside_the_band() -> None:
    text = retained_sentence(frames.retained(TWO, (0, 5)))
    assert ("88 % of all prefix matching (95 % interval 85 to 89 %), more than random orders leave (50 %; 95 % of them "
            "44 to 56 %)") in text
    assert "53 % of all copying (95 % interval 52 to 54 %), within what random orders leave" in text
    unknown = retained_sentence(frames.retained(TWO, (0, 5)).assign(low=np.nan, high=np.nan))
    assert "88 % of all prefix matching, more than" in unknown
    less = retained_sentence(frames.retained(ONE, (0,)).assign(retained=0.1))
    assert "by importance on arc_easy" in less
    assert less.count("less than") == 2


def test_sets_of_heads() -> None:
    text = among_important_sentence(frames.among_important(frames.TASKS[:4]))
    assert ("6 (95 % interval 5 to 7) of the 8 induction heads are among the 54 heads (20 %) most important on the "
            "mean over tasks" in text)
    assert ("; chance gives 1.6 (p < 0.001), random sets with as many heads in each layer give 3.2 (p = 0.04); p: "
            "two-sided, hypergeometric; on single tasks 2 to 5" in text)
    none = frames.among_important(frames.TASKS[:4]).assign(common=0, p=1.0, p_fewer=0.19, expected_in_layers=np.nan)
    assert "0 (95 % interval 5 to 7) of the 8 induction heads" in (text := among_important_sentence(none))
    assert "chance gives 1.6 (p = 0.38); p: two-sided, hypergeometric" in text
    text = top_sets_sentence(frames.top_sets(frames.TASKS[:4]))
    assert ("16 (95 % interval 14 to 18) of each task's 54 most important heads (20 % of all) are common to all 4 "
            "tasks; random sets have 0.4 in common on average, random sets with as many heads in each layer 5.1; two "
            "tasks share 61 % of theirs on average (random sets with as many heads in each layer 44 %)." in text)
    both = frames.top_sets(TWO)
    assert ("common to both tasks; random sets have 10.8 in common on average, random sets with as many heads in each "
            "layer 5.1.") in (
        top_sets_sentence(both))
    ffns = both.assign(expected_in_layers=np.nan, pair_share_in_layers=np.nan)
    assert "common to both tasks; random sets have 10.8 in common." in top_sets_sentence(ffns)
    table = among_important_rows(frames.among_important(TWO))
    assert table["task"].tolist() == ["mean"] * 9 + [TWO[0]] * 3 + [TWO[1]] * 3, "of tasks one size, the mean first"
    assert table["95 % interval"].iloc[0] == "5 to 7"
    ranked = frames.among_important(TWO).replace({"scope": {"mean": "mean of ranks"}})
    assert "most important on the mean of ranks over tasks" in among_important_sentence(ranked)


def test_pairs_of_top_sets_are_told_with_what_chance_gives() -> None:
    overlaps = frames.top_overlaps(TWO, (0, 5))
    assert overlap_sentence(overlaps) == (
        "With 5 shots, of the 54 heads (20 %) most important on the mean over tasks 10 (95 % interval 8 to 12) are "
        "among the 54 highest on prefix matching, where chance gives 10.8 (p = 1), random sets with as many "
        "heads in each layer give 6.3 (p = 0.2); 0 (95 % interval 0 to 2) are among the 54 highest on copying, where "
        "chance gives 10.8 (p < 0.001), random sets with as many heads in each layer give 6.3 (p = 0.2); p: "
        "two-sided, hypergeometric.")
    table = overlap_rows(overlaps)
    assert table[["task", "and", "in both", "p", "in the same layers", "p there"]].to_numpy().tolist()[:3] == [
        ["mean", "prefix matching", 10, "1", "6.3", "0.2"], ["mean", "copying", 0, "< 0.001", "6.3", "0.2"],
        [TWO[0], TWO[1], 27, "0.002", "6.3", "0.2"]]
    assert set(table["shots"]) == {5}
    assert overlap_sentence(overlaps[overlaps["other_task"] == TWO[1]]) == ""
    of_ffns = {name: np.nan for name in overlaps if "in_layers" in name}
    ffns = overlaps.query("num_fewshot == 0 and other_task == @TWO[1]").assign(component="ffn", **of_ffns)
    both = overlap_rows(pd.concat([overlaps, ffns]))
    assert both[["of", "shots"]].drop_duplicates().to_numpy().tolist() == [["heads", 5], ["FFNs", 0]]
    assert both.loc[both["of"] == "FFNs", ["in the same layers", "p there"]].to_numpy().tolist() == [["", ""]]


def test_intervals_of_counts_are_rounded_outwards() -> None:
    row = pd.Series({"low": 2.61, "high": 3.39})
    assert words.counts(row) == "2 to 4"
    assert words.counts(pd.Series({"low": 0.5, "high": 53.999999999 / 54}), 54) == "27 to 54"
    assert words.counts(pd.Series({"low": np.nan, "high": np.nan})) == ""
    assert words.bracketed("", "a", "b") == " (a; b)"
    assert words.bracketed("") == ""


def test_all_induction_heads_are_listed_with_their_errors() -> None:
    induction = frames.induction(20, 20, circuits=40)
    found = int((induction["induction"] & (induction["weights"] == "trained")).sum())
    table = induction_heads_table(induction.assign(previous_token_variance=np.nan))
    assert len(table) == found >= 40
    best = induction_heads(induction).iloc[0]
    assert table.loc[0, ["head", "prefix matching"]].tolist() == [
        best["name"], f"{best['prefix_matching']:.3f} \N{PLUS-MINUS SIGN} {np.sqrt(0.001 / 98):.3f}"]
    assert table.loc[0, "previous token"] == f"{best['previous_token']:.3f}"


def test_the_scatter_is_told_as_it_is_drawn() -> None:
    induction = frames.induction(6, 4, circuits=3)
    trained = induction[induction["weights"] == "trained"]
    high = [(trained[name] >= limit) for name, limit in frames.THRESHOLDS.items()]
    text = scatter_sentence(induction, frames.THRESHOLDS)
    assert text == (f"{high[0].sum()} of 24 heads reach the threshold of prefix matching, {high[1].sum()} that "
                    f"of copying and {(high[0] & high[1]).sum()} both. Lines are the thresholds; the second "
                    "panel is the same model with random weights, which has learnt nothing.")
    alone = scatter_sentence(trained, frames.THRESHOLDS | {"copying": np.nan})
    assert alone.endswith("The line is its threshold; random weights were not measured.")


def test_depth_is_told_in_thirds() -> None:
    text = depth_sentence(frames.depth(TWO, (0, 5)))
    assert ("With 5 shots, of the 54 heads (20 %) that matter most on the mean over tasks 10 % lie in the early third "
            "of the layers (5 to 15 %; single tasks 10 %), 75 % in the middle third (70 to 80 %; "
            "single tasks 75 %)") in text
    assert text.endswith("; each third holds 33 % of all heads. 76 % of the variance of log importance lies between "
                         "layers (single tasks 76 %; 11 % would without any trend over depth).")
    text = depth_sentence(frames.depth(ONE, (5,), known=False))
    assert "10 % lie in the early third of the layers, 75 % in the middle third and " in text
    assert text.endswith("76 % of the variance of log importance lies between layers (11 % would without any "
                         "trend over depth).")
    uneven = frames.depth(ONE, (5,)).assign(expected=[0.4, 0.2, 0.4], between_layers=np.nan)
    assert depth_sentence(uneven).endswith("; these thirds hold 40 %, 20 % and 40 % of all heads.")


@pytest.mark.parametrize("text", [
    grid_sentence(frames.grid()[:0], 0.02),
    induction_sentence(frames.induction()[:0], frames.THRESHOLDS),
    tasks_sentence(frames.correlations(ONE), "head"),
    tasks_sentence(frames.correlations(known=False), "head"),
    tasks_sentence(frames.correlations()[:0], "head"),
    shots_sentence(frames.correlations(shots=(5,)), "head"),
    shots_sentence(frames.correlations(known=False), "head"),
    transfer_sentence(frames.transfer(), "ffn"),
    transfer_sentence(frames.transfer().assign(difference=np.nan), "head"),
    unseen_sentence(frames.transfer(unseen=()), "head"),
    retained_sentence(frames.retained().assign(retained=np.nan)),
    among_important_sentence(frames.among_important()[:0]),
    among_important_sentence(frames.among_important(circuits=0)),
    top_sets_sentence(frames.top_sets(ONE)),
    depth_sentence(frames.depth()[:0]),
    overlap_sentence(frames.top_overlaps()[:0]),
    scatter_sentence(frames.induction()[:0], frames.THRESHOLDS),
])
def test_where_there_is_nothing_to_say_nothing_is_said(text: str) -> None:
    assert text == ""
