"""What a removal costs on documents that chose nothing; perplexity and continuations of the masked model."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import headcount as hc
import tiny
from headcount import terminal
from headcount.errors import DataError, OptionError
from headcount.masks import Mask
from headcount.model.load import wrap
from headcount.removal.comparison import Comparison
from headcount.removal.confirm import StudyFacts, confirm, facts_of, other_documents
from headcount.removal.perplexity import Perplexity, perplexity, read_text
from headcount.removal.remove import remove
from headcount.removal.writing import PROMPTS, continuations, repeated, write
from headcount.stats.intervals import Sample, difference_interval, verdict
from headcount.tasks.task import Prompt, Task

# Unlike questions, so that no two of them share a passage.
WORDS = ("apples", "bridges", "candles", "doors", "engines", "forests", "gardens", "houses", "islands", "jackets",
         "kettles", "ladders", "mirrors", "needles", "oceans", "pianos", "quilts", "rivers", "stones", "towers")


def question(number: int) -> dict[str, object]:
    word = WORDS[number % len(WORDS)]
    return {"goal": f"{word} {number}: how many {word} are there?", "sol1": f"There are {number} of them.",
            "sol2": f"There are {number + 3} of them.", "label": number % 2}


def write_documents(folder: Path, name: str, **splits: Sequence[dict[str, object]]) -> Path:
    for split, documents in splits.items():
        path = folder / name / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    return folder


def questions(*numbers: int) -> list[dict[str, object]]:
    return [question(number) for number in numbers]


def task_of(folder: Path, name: str = "piqa", protocol: str = "sound") -> Task:
    return hc.get_tasks(name, data=folder, protocol=protocol)[name]  # type: ignore[arg-type]


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """Forty training documents and sixty evaluated ones."""
    return write_documents(tmp_path, "piqa", train=questions(*range(100, 140)), validation=questions(*range(60)))


@pytest.fixture(scope="module")
def mask() -> Mask:
    return Mask.full(tiny.loaded().anatomy.heads_per_layer).without_heads([(0, 1), (2, 0), (2, 3)]).without_ffns([1])


def test_documents_behind_the_limit_chose_nothing(plain: Path) -> None:
    task = task_of(plain)
    assert other_documents(task, StudyFacts(("piqa",), limit=30)) == ("evaluation", [*range(30, 60)])
    assert other_documents(task, StudyFacts(("piqa",), limit=30), 4) == ("evaluation", [30, 31, 32, 33])


def test_training_documents_behind_importance_stand_in_where_all_were_evaluated(plain: Path) -> None:
    task = task_of(plain)
    assert other_documents(task, StudyFacts(("piqa",), importance_limit=15)) == ("examples", [*range(15, 40)])
    assert other_documents(task, StudyFacts(("piqa",), importance_limit=15), 3) == ("examples", [15, 16, 17])
    # Of five evaluated ones nothing can be told.
    assert other_documents(task, StudyFacts(("piqa",), limit=55, importance_limit=15))[0] == "examples"
    assert other_documents(task, StudyFacts(("piqa",), limit=55)) == ("evaluation", [*range(55, 60)])
    assert other_documents(task, StudyFacts(("piqa",)))[1] == []


def test_the_papers_shuffled_documents_are_followed(plain: Path) -> None:
    task = task_of(plain, protocol="paper")
    few_shot = hc.measure.evaluate.FewShot(0, 25)
    evaluated = {prompt.doc_id for prompt in task.prompts("evaluation", few_shot)}
    split, others = other_documents(task, StudyFacts(("piqa",), limit=25, protocol="paper"))
    assert split == "evaluation"
    assert len(others) == 35
    assert {*others} == {*range(60)} - evaluated != {*range(25, 60)}


def test_shared_shots_are_no_documents_of_a_confirmation(tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"context": doc["goal"], "options": [doc["sol1"], doc["sol2"]], "gold": 0}) + "\n"
                           for doc in questions(*range(60))))
    task = hc.get_tasks(own, examples_split="validation")["own"]
    facts = StudyFacts(("own",), 3, limit=20, importance_limit=20, examples_split="validation", shared_shots=True)
    few_shot = hc.measure.evaluate.FewShot(3, None, facts.seed, shared=True)
    order = [prompt.doc_id for prompt in task.prompts("evaluation", few_shot)]
    assert len(order) == 57
    assert task.doc_ids("evaluation", few_shot) == order
    assert other_documents(task, facts) == ("evaluation", order[20:])


def test_documents_that_equal_a_read_one_or_share_its_passage_are_left_out(tmp_path: Path) -> None:
    passage = "A long passage about a harbour where ships of many nations come and go every day of the year. "
    twins = [question(900 + i) | {"goal": f"{passage}Question {i}?"} for i in range(2)]
    short = {"goal": "Red?", "sol1": "No.", "sol2": "Yes.", "label": 0}
    documents = write_documents(
        tmp_path, "piqa", train=questions(*range(100, 110)),
        validation=[*questions(*range(29)), short, *twins, short, question(103), *questions(*range(40, 70))])
    facts = StudyFacts(("piqa",), limit=31)
    # 31 shares its passage with 30; 32 equals document 29, which is too short for a passage; and 33 equals a training
    # document that importance was measured on.
    assert other_documents(task_of(documents), facts) == ("evaluation", [*range(34, 64)])


def test_a_question_that_is_written_otherwise_is_no_other_document(tmp_path: Path) -> None:
    def shown(i: int, options: list[str], gold: int, ask: str = "Which of these is it, number {}?") -> dict[str, Any]:
        listed = "".join(f"\n{letter}. {option}" for letter, option in zip("ABC", options, strict=True))
        return {"context": f"{ask.format(i)}{listed}\nAnswer:", "options": ["A", "B", "C"], "gold": gold}

    words = ["red", "green", "blue"]
    read = [shown(i, words, 0) for i in range(20)]
    again = [shown(1, ["blue", "red", "green"], 1), shown(2, words, 0, "WHICH of  these is it, number {}?")]
    other = [shown(3, ["red", "green", "pink"], 0), *(shown(i, words, 0) for i in range(40, 60))]
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps(document) + "\n" for document in [*read, *again, *other]))
    task = hc.get_tasks(own, examples_split="validation")["own"]
    facts = StudyFacts(("own",), limit=20, importance_limit=20, examples_split="validation")
    assert other_documents(task, facts) == ("evaluation", [*range(22, 43)])


def test_fewer_documents_than_were_asked_for_are_said_and_all_are_named(plain: Path, mask: Mask) -> None:
    found = confirm(tiny.loaded(), mask, StudyFacts(("piqa",), data=plain, limit=8), n=100)
    assert found.sentence.endswith("; piqa has fewer than the 100 that were asked for")
    told = found.to_dict()
    assert told["asked"] == 100
    assert told["tasks"][0]["doc_ids"] == [*range(8, 60)]
    assert "asked for" not in confirm(tiny.loaded(), mask, StudyFacts(("piqa",), data=plain, limit=8), n=5).sentence


def test_no_document_is_among_its_own_shots(plain: Path, mask: Mask) -> None:
    """The paper's code may draw a training document for itself."""
    task = task_of(plain, protocol="paper")
    few_shot = hc.measure.evaluate.FewShot(5, None)
    itself = [own.doc_id for own in task.prompts("examples", few_shot) if its_own_shot(own)]
    kept = task.prompts("examples", few_shot, apart=True)
    assert itself
    assert not any(map(its_own_shot, kept))
    assert sorted([*itself, *(own.doc_id for own in kept)]) == [*range(40)]
    facts = StudyFacts(("piqa",), 5, importance_limit=10, protocol="paper")
    found = confirm(tiny.loaded(), mask, facts, tasks={"piqa": task})
    assert found.tasks[0].compared.documents == 30 - len([i for i in itself if i >= 10])


def its_own_shot(prompt: Prompt) -> bool:
    return prompt.pairs[0][0].count(str(prompt.doc["goal"])) > 1


def test_a_confirmation_is_what_a_whole_evaluation_says_of_these_documents(plain: Path) -> None:
    mask = Mask.full(tiny.loaded().anatomy.heads_per_layer).without_heads([(0, 0)]).without_ffns([1, 2])
    write_documents(plain, "copa", train=copa(range(40)), validation=copa(range(100, 150)))
    facts = StudyFacts(("piqa", "copa"), 2, plain, limit=25)
    found = confirm(tiny.loaded(), mask, facts)
    tasks = hc.get_tasks(["piqa", "copa"], data=plain)
    full = Mask.full(mask.heads_per_layer)
    means, changes = [], []
    for one in found.tasks:
        whole = hc.evaluate(tiny.loaded(), tasks[one.task], [full, mask], num_fewshot=2)
        rest = np.isin(whole.doc_ids, other_documents(tasks[one.task], facts)[1])
        values = whole.correct[:, rest]
        means.append(values.mean(axis=1))
        assert whole.passages is not None
        changes.append(Sample(values[1:] - values[:1], whole.passages[rest]))
        assert (one.split, one.split_name, one.compared.documents) == ("evaluation", "validation", rest.sum())
        assert rest.sum() == {"piqa": 35, "copa": 24}[one.task]  # document 25 of COPA is on 24's passage
        assert (one.compared.full, one.compared.removed) == pytest.approx(values.mean(axis=1))
    mean = found.mean
    assert mean is not None
    assert (mean.full, mean.removed) == pytest.approx(np.mean(means, axis=0))
    low, high = (bound[0] for bound in difference_interval(changes))
    assert (mean.low, mean.high) == pytest.approx((low, high))
    alone = difference_interval([Sample(one.values) for one in changes])
    assert mean.high - mean.low > float(alone.high[0] - alone.low[0]) + 0.001
    assert mean.verdict == verdict(low, high, 0.02)
    assert mean.low <= mean.difference <= mean.high
    assert mean.removed != mean.full  # else nothing is shown


def copa(numbers: range) -> list[dict[str, object]]:
    """Two questions on each passage."""
    return [{"premise": f"The {WORDS[i // 2 % 20]} number {i // 2} fell off a high shelf early this morning.",
             "choice1": f"It broke {i} times.", "choice2": f"It broke {i + 3} times.", "question": "effect",
             "label": i % 2, "idx": i} for i in numbers]


def test_a_removed_model_confirms_alike(plain: Path, mask: Mask) -> None:
    facts, task = StudyFacts(("piqa",), limit=20), task_of(plain)
    full = tiny.loaded()
    small = hc.evaluate(remove(full, mask).model, task)
    rest = np.isin(small.doc_ids, other_documents(task, facts)[1])
    assert confirm(full, mask, facts, tasks={"piqa": task}).tasks[0].compared.removed == small.correct[0, rest].mean()


def test_a_task_without_other_documents_is_named(plain: Path, mask: Mask) -> None:
    write_documents(plain, "copa", train=copa(range(10)), validation=copa(range(100, 130)))
    found = confirm(tiny.loaded(), mask, StudyFacts(("piqa", "copa"), data=plain, limit=30, importance_limit=100))
    assert found.left_out == ("copa",)
    assert [one.task for one in found.tasks] == ["piqa"]
    assert found.sentence.endswith("; copa has no other documents")
    nothing = confirm(tiny.loaded(), mask, StudyFacts(("copa",), data=plain, importance_limit=100))
    assert nothing.mean is None
    assert nothing.sentence == "nothing could be confirmed: copa has no other documents"
    assert json.loads(json.dumps(nothing.to_dict()))["mean"] is None


def test_the_sentence_says_what_was_measured_and_json_holds_it(plain: Path) -> None:
    everything = Mask.full(tiny.loaded().anatomy.heads_per_layer)
    found = confirm(tiny.loaded(), everything, StudyFacts(("piqa",), data=plain, importance_limit=15))
    of = found.tasks[0].compared
    assert of.difference == 0
    assert of.verdict == "unknown"
    share = f"{of.full:.3f}"
    assert found.sentence == (
        f"on 25 other documents of piqa (training documents that importance did not read) accuracy is {share}, the "
        f"full model's {share}: 0.0 points (95 % interval \N{MINUS SIGN}{-100 * of.low:.1f} to {100 * of.high:+.1f}); "
        "a loss of 2 points is neither ruled out nor shown")
    told = json.loads(json.dumps(found.to_dict()))
    assert told["sentence"] == found.sentence
    assert told["tasks"][0]["split"] == "examples"
    assert told["mean"]["difference"] == 0
    assert told["tasks"][0]["split_name"] == "train"


def test_facts_are_read_off_what_a_study_was_asked_for() -> None:
    spec = {"tasks": ["piqa", "copa"], "shots": [0, 5, 1], "data": "docs", "limit": 40, "importance_limit": 7,
            "examples_split": "validation", "seed": 3, "shared_shots": True, "protocol": "paper", "margin": 0.01,
            "model": "m", "fractions": [0.1]}
    facts = StudyFacts(("piqa", "copa"), 5, Path("docs"), 40, 7, "validation", 3, True, "paper", 0.01)
    assert facts_of(spec) == facts
    assert facts_of(spec, 1).num_fewshot == 1
    written = hc.StudySpec(model="m", tasks=("piqa",)).to_json()
    assert facts_of(written) == StudyFacts(("piqa",), 5)


def test_what_the_same_folder_read_for_another_request_chose_something(plain: Path) -> None:
    spec = {"tasks": ["piqa"], "shots": [0], "limit": 10, "importance_limit": 10}
    asked = [{"tasks": {"piqa": {"by_shots": {"0": {"documents": 25, "examples": None}}}}, "unseen": {}},
             {"tasks": {"copa": {"documents": 50}}, "unseen": {"piqa": {"by_shots": {"0": {"documents": 40}}}}}]
    assert other_documents(task_of(plain), facts_of(spec, asked=asked[:1])) == ("evaluation", [*range(25, 60)])
    assert other_documents(task_of(plain), facts_of(spec, asked=asked)) == ("evaluation", [*range(40, 60)])
    assert other_documents(task_of(plain), facts_of(spec)) == ("evaluation", [*range(10, 60)])
    assert facts_of(spec | {"limit": None}, asked=asked).limit_of("piqa", "evaluation") is None


def test_what_cannot_be_confirmed_is_refused(plain: Path, mask: Mask) -> None:
    facts = StudyFacts(("piqa",), data=plain, limit=30)
    with pytest.raises(OptionError, match="at least 1 document, not n 0"):
        confirm(tiny.loaded(), mask, facts, 0)
    with pytest.raises(OptionError, match="load it as the study did"):
        confirm(tiny.loaded(), mask, StudyFacts(("piqa",), apply_chat_template=True))


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("masked", [False, True])
def test_perplexity_is_what_a_loop_over_positions_gives(family: str, masked: bool, mask: Mask) -> None:
    """Each token by itself: the model reads what may stand before it, and nothing else."""
    loaded, text = tiny.loaded(family), read_text()[:400]
    ids = [loaded.tokenizer.bos_token_id, *loaded.tokenizer(text, add_special_tokens=False)["input_ids"]]
    longest, count = 40, len(ids) - 1
    assert count > 3 * longest
    assert count % longest
    alone = remove(loaded, mask).model.model if masked else loaded.model
    total = 0.0
    for token in range(count):
        end = min((token // longest + 1) * longest, count)
        start = max(end - longest, 0)
        with torch.no_grad():
            logits = alone(input_ids=torch.tensor([ids[start : token + 1]])).logits[0, -1]
        total -= float(torch.log_softmax(logits.double(), -1)[ids[token + 1]])
    found = perplexity(loaded, mask if masked else None, text, longest)
    assert (found.tokens, found.bytes) == (count, 400)
    assert found.nats_per_token == pytest.approx(total / count, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(total / math.log(2) / 400, rel=1e-5)


def test_windows_are_those_of_lm_evals_rolling_log_likelihood() -> None:
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    from headcount.removal.perplexity import windows

    for count, longest in ((5, 8), (8, 8), (9, 8), (30, 8), (32, 8)):
        ids = [-1, *range(count)]
        theirs = [make_disjoint_window(pair) for pair in get_rolling_token_windows([*range(count)], -1, longest, 1)]
        ours = [(ids[start : first + 1], ids[first + 1 : end + 1]) for start, first, end in windows(count, longest)]
        assert ours == [(list(context), list(scored)) for context, scored in theirs]


def test_a_text_is_read_or_refused(tmp_path: Path) -> None:
    assert read_text().startswith("Four score and seven years ago")
    assert 4000 < len(read_text()) < 8000
    assert read_text().isascii()
    own = tmp_path / "own.txt"
    with pytest.raises(DataError, match="cannot be read"):
        read_text(own)
    own.write_text(" \n")
    with pytest.raises(DataError, match="is empty"):
        read_text(own)
    own.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match="UTF-8"):
        read_text(own)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_continuations_are_the_removed_models(family: str, mask: Mask, capfd: pytest.CaptureFixture[str]) -> None:
    loaded = tiny.loaded(family)
    of_full, of_masked = continuations(loaded, None, new_tokens=6), continuations(loaded, mask, new_tokens=6)
    assert capfd.readouterr() == ("", "")
    assert of_full == greedy(loaded, 6)
    assert of_masked == greedy(remove(loaded, mask).model, 6)
    assert of_full != of_masked
    assert len(of_full) == len(PROMPTS)


def greedy(loaded: hc.model.load.LoadedModel, new_tokens: int) -> list[str]:
    """Token by token, without a cache."""
    texts = []
    for prompt in PROMPTS:
        ids = list(loaded.tokenizer(prompt)["input_ids"])
        before = len(ids)
        while len(ids) < before + new_tokens and (len(ids) == before or ids[-1] != loaded.model.config.eos_token_id):
            with torch.no_grad():
                ids.append(int(loaded.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        texts.append(loaded.tokenizer.decode(ids[before:], skip_special_tokens=True))
    return texts


@pytest.mark.parametrize("settings", [
    {"do_sample": True, "temperature": 0.7, "repetition_penalty": 5.0, "no_repeat_ngram_size": 2}, {"num_beams": 3},
    {"return_dict_in_generate": True}, {"stop_strings": ["a"]}, {"suppress_tokens": [*range(1500)]},
    {"guidance_scale": 3.0}, {"num_return_sequences": 2}, {"penalty_alpha": 0.6}, {"max_time": 1e-9}])
def test_a_models_own_settings_do_not_change_what_is_written(mask: Mask, settings: dict[str, object]) -> None:
    built = tiny.model("llama")
    for name, value in settings.items():
        setattr(built.generation_config, name, value)
    own = built.generation_config
    loaded = wrap(built, tiny.tokenizer())
    assert continuations(loaded, mask, new_tokens=12) == continuations(tiny.loaded(), mask, new_tokens=12)
    assert built.generation_config is own


def test_a_model_ends_where_its_own_settings_say(mask: Mask) -> None:
    text = continuations(tiny.loaded(), mask, PROMPTS[:1], 6)[0]
    third = int(tiny.loaded().tokenizer(text)["input_ids"][2])
    built = tiny.model("llama")
    built.generation_config.eos_token_id = [third]
    assert len(continuations(wrap(built, tiny.tokenizer()), mask, PROMPTS[:1], 6)[0]) < len(text)


def test_repeated_4_grams_show_a_model_that_can_no_longer_write(mask: Mask) -> None:
    assert repeated([[1, 2] * 20]) > 0.8
    assert repeated([[7] * 40]) > 0.9
    assert repeated([[*range(30)]]) == 0 == repeated([[], [1]])
    # A continuation of its own each: what two have in common repeats nothing.
    assert repeated([[*range(30)]] * 2) == 0
    written = write(tiny.loaded(), mask, new_tokens=6)
    assert json.loads(json.dumps(written.to_dict()))["removed"] == list(written.removed)


def test_repeated_tokens_that_no_text_shows_are_counted(mask: Mask, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny.loaded()
    monkeypatch.setattr(loaded.model, "generate", lambda input_ids, **_: torch.cat(
        [input_ids, torch.full((1, 24), loaded.tokenizer.bos_token_id)], dim=1))
    written = write(loaded, mask)
    assert written.removed[0] == ""
    assert written.removed_repeated == pytest.approx(20 / 21)


def test_a_prompt_longer_than_the_window_is_refused() -> None:
    with pytest.raises(OptionError, match="give another prompt"):
        continuations(tiny.loaded(), None, ["word " * tiny.WINDOW])


def test_the_terminal_shows_accuracies_perplexity_and_both_continuations(
    plain: Path, mask: Mask, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = tiny.loaded()
    found = confirm(loaded, mask, StudyFacts(("piqa",), data=plain, limit=30))
    texts = perplexity(loaded, None, read_text()[:200]), perplexity(loaded, mask, read_text()[:200])
    terminal.print_comparison(Comparison(found, *texts, write(loaded, mask, new_tokens=6)))
    shown = capsys.readouterr().out
    assert "piqa" in shown
    assert PROMPTS[0] in shown
    assert f"{texts[1].bits_per_byte:.3f}" in shown
    flat = " ".join(shown.split())
    assert found.sentence[1:] in flat
    terminal.print_comparison(Comparison(None, *texts, write(loaded, mask, new_tokens=6)))
    assert "piqa" not in capsys.readouterr().out


def test_perplexity_beyond_all_numbers_is_said_in_json() -> None:
    assert Perplexity(10, 40, 1e4).to_dict()["perplexity"] is None
    assert Perplexity(10, 40, math.nan).to_dict()["bits_per_byte"] is None
