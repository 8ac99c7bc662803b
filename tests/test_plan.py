"""A study planned without its model: what the plan counts is what a run computes."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

import families
import tiny
from headcount.engine import budget as budgets
from headcount.engine.engine import Engine
from headcount.engine.pack import Budget, Cost
from headcount.engine.stream import Stream, Wave
from headcount.errors import ModelError, OptionError
from headcount.measure import induction
from headcount.measure.texts import LENGTHS, SEEDS
from headcount.model import placement, speed
from headcount.model.load import LoadedModel, load
from headcount.model.without_weights import bundled_shapes, shape_of
from headcount.study import devices
from headcount.study import forecast as forecasts
from headcount.study.costs import Memory, Passes, Waits, hours_on, passes_of
from headcount.study.devices import READ_SPEED, Device, device_of
from headcount.study.forecast import Forecast, forecast
from headcount.study.jobs import Evaluation, GradientImportance, InductionScores
from headcount.study.ledger import Ledger
from headcount.study.prepare import prepare
from headcount.study.runner import run, run_study
from headcount.study.spec import PRESETS, StudySpec
from headcount.study.stand_in import StandIn
from headcount.study.tokens import AtHand, Bundled, Reading
from headcount.tasks.load import get_tasks

PAPER = {name: tuple(value) if isinstance(value, list) else value for name, value in PRESETS["opt66b-study"].items()}
# Parameters as the models' authors and the hub give them.
PARAMETERS = {
    "facebook/opt-350m": 331_196_416, "facebook/opt-66b": 65_719_701_504, "EleutherAI/pythia-12b": 11_846_072_320,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248, "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "google/gemma-3-1b-pt": 999_885_952,
}


def of_125m(**changes: object) -> StudySpec:
    return StudySpec("facebook/opt-125m", **{**PAPER, **changes})


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was timed of the device is known, so that plan and run have the same rows and batches."""
    for module in (budgets, forecasts):
        monkeypatch.setattr(module, "kept_cost", lambda of: Cost(100, 900))


@pytest.mark.parametrize("name", PARAMETERS)
def test_shapes_that_come_along_have_their_models_parameters(name: str) -> None:
    assert shape_of(name).anatomy.num_parameters == PARAMETERS[name]


def test_every_shape_that_comes_along_is_a_config_of_transformers() -> None:
    for name, told in bundled_shapes().items():
        config = AutoConfig.for_model(told["model_type"], **told["config"], dtype=told["dtype"])
        assert {key: getattr(config, key) for key in told["config"]} == told["config"], name
        assert getattr(torch, told["dtype"]).is_floating_point


def test_a_tokens_experts_are_the_chosen_ones() -> None:
    shape = shape_of("Qwen/Qwen3-30B-A3B")
    others = shape.anatomy.num_parameters - sum(shape.block_parameters)
    assert 3.2e9 < sum(shape.active_parameters) + others < 3.5e9, "A3B"
    assert shape_of("Qwen/Qwen3-8B").active_parameters == shape_of("Qwen/Qwen3-8B").block_parameters


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox"])
def test_a_config_alone_says_what_a_model_would(family: str, tmp_path: Path) -> None:
    real = load(tiny.saved(tmp_path / "real", family))
    tiny.model(family).config.save_pretrained(tmp_path / "config")
    shape = shape_of(str(tmp_path / "config"), dtype="float32", device="cpu")
    assert [p.name for p in (tmp_path / "config").iterdir()] == ["config.json"]
    assert shape.anatomy.table() == real.anatomy.table()
    assert (shape.anatomy.num_parameters, shape.max_length) == (real.anatomy.num_parameters, real.max_length)
    assert budgets.device_key(shape) == budgets.device_key(real)
    assert shape.tokenizer is None
    assert all(parameter.is_meta for parameter in shape.model.parameters())


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[StudySpec, Path]:
    """A whole study of a tiny model, and what was asked."""
    root = tmp_path_factory.mktemp("planned")
    data = tiny.write_task(tiny.write_task(root / "data"), "copa", 6, 5)
    for split in ("train", "validation"):  # in copa's field names
        rows = [f'{{"premise": "He ran {i}.", "choice1": "It rained.", "choice2": "He won {i} times.", "question": '
                f'"cause", "label": {i % 2}}}\n' for i in range(9 if split == "train" else 5)]
        (data / "copa" / f"{split}.jsonl").write_text("".join(rows), encoding="utf-8")
    tiny.model("llama", layers=6).save_pretrained(root / "model")
    tiny.tokenizer().save_pretrained(root / "model")
    spec = StudySpec(str(root / "model"), tasks=("piqa",), unseen=("copa",), shots=(2,), limit=5,
                     importance_limit=6, fractions=(0.25, 0.5, 0.75), random_orders=2, uniform=True, data=data,
                     measure=("curves", "grid", "transfer"), grid_fractions=(0.25, 0.75), grid_limit=3,
                     transfer_components=("head", "ffn"), masks_per_job=2, device="cpu", out=root / "study")
    return spec, root


def test_layer_tokens_are_those_of_the_run(measured: tuple[StudySpec, Path], timed: None) -> None:
    spec, root = measured
    before = forecast(dataclasses.replace(spec, out=None))
    plan = prepare(spec, loaded=load(spec.model, device="cpu"))
    run(plan)
    ledger, seen, ran, middle = Ledger(root / "study"), Counter[str](), Counter[str](), Counter[str]()
    assert [p.title for p in before.jobs] == [p.title for p in plan.jobs]
    for planned, cost in zip(plan.jobs, before.costs, strict=True):
        if isinstance(planned.job, Evaluation):
            info, layers = ledger.read(planned.key).info, cost.layer_tokens
            assert layers.low <= info["layer_tokens"] <= layers.high, planned.title
            assert layers.exact or planned.job.needs, planned.title
            seen[planned.job.masks.order] += 1
            hidden = info["tokens"] * plan.loaded.anatomy.layers[0].d_model * plan.loaded.model.dtype.itemsize
            assert hidden < cost.waiting, "hidden states of all masks, and masks of attention"
            ran[planned.job.masks.order] += info["layer_tokens"]
            middle[planned.job.masks.order] += cost.layer_tokens.middle
    assert middle.total() == pytest.approx(ran.total(), rel=0.1)
    assert seen.keys() >= {"none", "single", "gradient", "oracle", "random", "uniform", "grid", "transfer"}
    after = forecast(spec)
    assert (set(after.left), after.total.flops) == ({None}, 0), "what the folder holds is not planned again"
    assert "rows and batches" not in " ".join(after.notes), "those of the folder"


def positions(loaded: LoadedModel, work: object) -> int:
    """Positions that blocks compute while something is done."""
    counted: list[int] = []
    handles = [part.block.register_forward_hook(lambda m, args, out: counted.append(args[0].shape[:-1].numel()))
               for part in loaded.anatomy.layers]
    try:
        work()  # type: ignore[operator]
    finally:
        for handle in handles:
            handle.remove()
    return sum(counted)


def cost_of(known: Forecast, kind: type) -> list[float]:
    return [cost.layer_tokens.middle for planned, cost in zip(known.jobs, known.costs, strict=True)
            if cost is not None and isinstance(planned.job, kind)]


def test_gradients_are_counted_as_they_run(measured: tuple[StudySpec, Path], timed: None) -> None:
    spec = dataclasses.replace(measured[0], out=None, shots=(2,), measure=("curves",), unseen=())
    plan = prepare(spec, loaded=load(spec.model, device="cpu"))
    task = plan.tasks["piqa"]

    def gradients() -> None:
        from headcount.measure.importance import gradient_importance

        gradient_importance(plan.loaded, task, plan.few_shot(2, 6), budget=plan.budget)

    assert cost_of(forecast(spec), GradientImportance) == [2 * positions(plan.loaded, gradients)]


@pytest.mark.parametrize("protocol", ["sound", "paper"])
def test_induction_is_counted_as_it_runs(protocol: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(tiny.saved(tmp_path / "model"))
    spec = StudySpec(folder, tasks=(), measure=("induction",), induction_seeds=2, induction_lengths=(5, 8, 300),
                     protocol=protocol, device="cpu")
    loaded, counted = load(folder, device="cpu"), []
    halved = induction._halved

    def counting(work: object, ids: torch.Tensor) -> torch.Tensor:
        found: list[torch.Tensor] = []
        counted.append(positions(loaded, lambda: found.append(halved(work, ids))))
        return found[0]

    monkeypatch.setattr(induction, "_halved", counting)
    induction.induction_scores(loaded, lengths=(5, 8, 300), seeds=2, protocol=protocol)
    # The model's and the control's; what does not fit into the window is left out.
    assert cost_of(forecast(spec), InductionScores) == [sum(counted)] * 2


def test_the_papers_study_of_opt_66b_is_planned_at_once() -> None:
    """In a process of its own, where types are not checked."""
    code = ("import time\nfrom headcount.study.forecast import forecast\nfrom headcount.study.spec import *\n"
            "options = {n: tuple(v) if isinstance(v, list) else v for n, v in PRESETS['opt66b-study'].items()}\n"
            "import transformers.models.opt.modeling_opt\nstarted = time.process_time()\n"
            "known = forecast(StudySpec('facebook/opt-66b', **options), on=('h100', '8xh100', '4090'), price=(2.0,))\n"
            "took = time.process_time() - started\n"
            "print(took, len(known.jobs), *(f'{one.way},{one.copies}' for one in known.devices), sep='|')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, jobs, *ways = done.stdout.strip().split("|")
    assert (float(seconds) < 2, int(jobs)) == (True, 2804), seconds
    assert ways == ["streamed,1", "part streamed,4", "streamed,1"]


def test_what_would_save_is_what_another_plan_says() -> None:
    options = {"tasks": ("wic", "rte"), "unseen": ("mathqa",), "shots": (5,)}
    known = forecast(of_125m(**options))
    assert {share for share, cost in known.shares.items() if cost.flops > 0} == {*forecasts.SHARES}
    assert sum("come along" in note for note in known.notes) == 1, "it says so"
    saved = dict(known.savings)
    assert saved.keys() == {"--shared-shots", "--limit 500 --importance-limit 500", "without transfer", "without grid",
                            "without induction"}
    for name, other in (("--shared-shots", {"shared_shots": True}),
                        ("--limit 500 --importance-limit 500", {"limit": 500, "importance_limit": 500})):
        assert saved[name] == pytest.approx(known.total.flops - forecast(of_125m(**options, **other)).total.flops)


def test_what_would_save_raises_no_limit() -> None:
    options = {"tasks": ("wic",), "unseen": (), "shots": (0,), "measure": ("curves",), "importance_limit": 20}
    known, fewer = (forecast(of_125m(**options, limit=limit)) for limit in (600, 500))
    assert dict(known.savings).keys() == {"--limit 500"}
    grid = {**options, "measure": ("curves", "grid"), "limit": 600, "grid_limit": 550}
    assert {name for name, _ in forecast(of_125m(**grid)).savings} == {"--limit 500 --grid-limit 500", "without grid"}
    assert dict(known.savings)["--limit 500"] == pytest.approx(known.total.flops - fewer.total.flops)


def test_flops_are_two_a_parameter_and_attention_and_output() -> None:
    known = forecast(of_125m(tasks=("wic",), unseen=(), shots=(0,), measure=("curves",), limit=10))
    (full,) = (cost for planned, cost in zip(known.jobs, known.costs, strict=True) if planned.title.endswith(
        "full model, evaluation"))
    block = 12 * 768**2 + 13 * 768  # q, k, v, o and two matrices of four widths; their biases; two norms
    tokens, width, places = 514, 103.4, 10
    by_hand = tokens * 12 * (2 * block + 4 * width * 768) + 2 * places * 50272 * 768
    assert full.flops == pytest.approx(by_hand, rel=2e-3)


def test_a_device_holds_a_model_streams_it_or_cannot() -> None:
    memory = Memory(weights=100, block=10, output=30, batch=20, gradients=80)
    device = Device("d", 150, {"float32": 10.0}, 0.5, "", 1)

    def on(size: float, number: int = 1) -> object:
        one = hours_on(dataclasses.replace(device, memory=size, number=number), "float32", 36_000.0, memory,
                       Passes(3, 4), 2.0)
        return one.way, one.copies, one.bytes_read, round(one.hours, 6), round(one.money or 0, 6)

    assert on(200) == ("resident", 1, 0, 2.0, 4.0)
    assert on(150) == ("part streamed", 1, 400, 2.0, 4.0)
    assert on(60) == ("streamed", 1, 700, 2.0, 4.0)
    assert on(70, 8) == ("resident", 2, 0, 1.0, 16.0), "three for a copy"
    assert on(40)[0] == "too large"
    asked = hours_on(device, "float32", 36_000.0, memory, Passes(3, 4), None, streamed=True)
    assert (asked.way, asked.bytes_read) == ("streamed", 700), "it would fit"
    assert math.isnan(on(40)[3])
    slow = dataclasses.replace(memory, weights=int(READ_SPEED * 3600))
    read = hours_on(device, "float32", 36_000.0, dataclasses.replace(slow, gradients=0), Passes(3, 0), None)
    assert (read.reading, read.computing) == (3.0, 2.0)
    assert read.hours == 3.0 + 3 * 10 / READ_SPEED / 3600, "the slower of both, and each pass's first block"


def test_a_pass_ends_where_the_next_batch_does_not_fit() -> None:
    """Half a batch before memory is full; what fits at once takes one pass, and a batch is never parted."""
    assert passes_of([Waits(300, 60), Waits(100, 60), Waits(300, 100)], [], 100) == Passes(5 + 1 + 3, 0)
    assert passes_of([], [Waits(300, 60)], 100) == Passes(0, 2 * 5)


def test_a_device_reaches_of_its_peak_what_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    usual, faster = (forecast(of_125m(), on=("h100",), efficiency=share).devices[0] for share in (None, 0.8))
    jobs = len(forecast(of_125m()).jobs) * devices.JOB_SECONDS / 3600
    assert usual.computing - jobs == pytest.approx(2 * (faster.computing - jobs))
    for wrong in ("0", "1.2", "nan"):
        assert tiny.run(["plan", "facebook/opt-125m", "--tasks", "piqa", "--efficiency", wrong]) == 2
        assert "--efficiency is a share of the peak, from 0.001 to 1, not" in capsys.readouterr().err


def test_a_disk_is_as_fast_as_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["facebook/opt-66b", "--tasks", "piqa", "--stream", "--on", "h100"]
    usual, slow = (forecast(of_125m(stream=True), on=("h100",), read_speed=speed).devices[0]
                   for speed in (None, "500MB"))
    assert slow.reading == pytest.approx(6 * usual.reading)
    assert tiny.run(["plan", *options, "--read-speed", "500MB"]) == 0
    assert "assumed: weights are read at 500 MB/s" in " ".join(capsys.readouterr().out.split())
    for wrong in ("fast", "1.5", "3"):
        assert tiny.run(["plan", *options, "--read-speed", wrong]) == 2
        assert f"--read-speed '{wrong}' is no number of bytes: write 8GB or 500MB" in capsys.readouterr().err


def test_tasks_that_are_missing_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("plan", "study"):
        assert tiny.run([verb, "facebook/opt-66b"]) == 2
        assert "--tasks is missing: name tasks such as piqa copa, paper14" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "num_fewshot", "window"), [
    ("record", 10, 2048), ("hellaswag", 60, 2048), ("multirc", 20, 2048), ("multirc", 5, 1024), ("boolq", 5, 1024)])
def test_counts_that_come_along_are_cut_to_the_window(
    name: str, num_fewshot: int, window: int, shared: Path
) -> None:
    """Beyond what was counted, beside documents that are at hand."""
    reading = Reading(shape_of("smollm2").tokenizer, window, Budget(), True, None, False, 1234, False)
    here, along = AtHand(get_tasks([name], data=str(shared))[name], reading), Bundled(name, reading)
    for split, documents, layout in (("evaluation", 20, "scored"), ("examples", 10, "gradient")):
        real, counted = (of.work(split, num_fewshot, documents, layout) for of in (here, along))
        assert counted.tokens == pytest.approx(real.tokens, rel=0.12)
        assert counted.pairs == pytest.approx(real.pairs, rel=0.25)
        assert counted.cut == pytest.approx(real.cut, rel=0.15, abs=4)


def test_no_row_of_documents_that_are_not_here_waits_in_too_little_memory(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["plan", "facebook/opt-66b", "--tasks", "piqa", "--stream", "--on", "h100", "--stream-memory"]
    assert tiny.run([*options, "10KB"]) == 2
    assert "while it waits, and --stream-memory is 10KB: give more" in capsys.readouterr().err
    assert tiny.run([*options, "1GB"]) == 0


def test_numbers_of_shots_between_those_counted_lie_on_a_line() -> None:
    reading = Reading(None, 2048, Budget(), True, None, False, 1234, False)
    task = Bundled("wic", reading)
    one, three, five, nine = (task.work("evaluation", k, 100).tokens for k in (1, 3, 5, 9))
    assert three == pytest.approx((one + five) / 2, abs=1)
    assert nine == pytest.approx(five + (five - one), abs=1)
    with pytest.raises(OptionError, match="no test split"):
        Bundled("wic", reading, "test").size("examples", 0)


def test_a_stand_in_cuts_words_and_shares_beginnings() -> None:
    one, other = StandIn(has_bos=True)(["The cat sat on 12 unbelievably large mats.", "The cat sat!"])["input_ids"]
    assert (len(one), len(other), one[:4] == other[:4]) == (11, 5, True)


@pytest.mark.parametrize(("command", "told"), [
    (["facebook/opt-67b"], "did you mean facebook/opt-6.7b or facebook/opt-66b?"),
    (["./nothing"], "there is no folder ./nothing"),
    (["facebook/opt-66b", "--on", "h1000"], "did you mean h100?"),
    (["facebook/opt-66b", "--on", "h100", "--price", "1", "2"], "there are 2 prices and 1 devices"),
    (["facebook/opt-66b", "--on", "2xcpu"], "`cpu` is this machine, of which there is one"),
    (["facebook/opt-66b", "--apply-chat-template"], "--apply-chat-template needs the chat template"),
    (["facebook/opt-66b", "--examples-split", "test"], "has no test split"),
])
def test_a_slip_is_one_line(command: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.run(["plan", *command, "--tasks", "piqa"]) == 2
    said = capsys.readouterr().err
    assert (said.count("\n"), told in said) == (1, True), said


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        forecast(StudySpec(str(tmp_path), tasks=("piqa",)))
    with pytest.raises(ModelError, match="cannot be loaded"):
        (tmp_path / "config.json").write_text("{", encoding="utf-8")
        forecast(StudySpec(str(tmp_path), tasks=("piqa",)))
    for other in ("[1]", "null", "3", '"x"', "\xff"):
        with pytest.raises(ModelError, match=r"its config\.json holds no JSON object"):
            (tmp_path / "config.json").write_text(other, encoding="utf-8")
            forecast(StudySpec(str(tmp_path), tasks=("piqa",)))
    with pytest.raises(ModelError, match="encoder-decoder"):
        (tmp_path / "config.json").write_text('{"model_type": "t5"}', encoding="utf-8")
        forecast(StudySpec(str(tmp_path), tasks=("piqa",)))


def test_a_plan_fits_a_terminal_and_a_dry_run_is_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headcount.study.devices.matrix_products", lambda *_: 1e11)
    options = ["facebook/opt-125m", "--tasks", "arc_easy", "mathqa", "--shots", "0", "1", "5", "--examples-split",
               "test", "--measure", "curves", "transfer", "--unseen", "lambada_openai"]
    assert tiny.run(["plan", *options]) == 0
    planned = capsys.readouterr().out
    assert max(map(len, planned.splitlines())) <= 80
    assert "Nothing was measured" in planned
    assert "assumed: 80 GFLOP/s, 80% of 100 GFLOP/s" in planned
    assert tiny.run(["study", *options, "--dry-run"]) == 0
    assert capsys.readouterr().out == planned


def test_a_plan_refuses_what_a_run_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And says beforehand what a run notes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tiny.saved(tmp_path / "llama")
    spec = StudySpec(str(folder), tasks=("icl_plural",), shots=(0,), limit=4, importance_limit=4, random_orders=0,
                     batch_tokens=200, out=tmp_path / "study")
    small = dataclasses.replace(spec, stream=True, stream_memory="20KB")
    for refuses in (forecast, run_study):
        with pytest.raises(OptionError, match=r"takes .*KB while it waits, and stream_memory is 20KB: give more"):
            refuses(small)
    # Before the first job, though some could be done, and of the largest batch.
    some = dataclasses.replace(small, stream_memory="300KB", limit=60, batch_tokens=900)
    told = []
    for refuses in (forecast, run_study):
        with pytest.raises(OptionError, match=r"takes .*KB while it waits, and stream_memory is 300KB") as no:
            refuses(some)
        told.append(str(no.value))
    assert told[0] == told[1]
    assert not (tmp_path / "study").exists()
    assert forecast(dataclasses.replace(small, stream=False)).jobs, "nothing waits in a model in memory"
    assert forecast(dataclasses.replace(small, stream_memory="2MB")).jobs
    run_study(dataclasses.replace(small, stream_memory="2MB"))
    (cut,) = (note for note in forecast(dataclasses.replace(spec, shots=(110,), out=None)).told)
    assert cut == ("icl_plural, 110-shot: 16 requests are longer than the window of 512 tokens, and lose the beginning")


def test_a_plan_of_induction_refuses_what_a_run_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tiny.saved(tmp_path / "llama")
    spec = StudySpec(str(folder), tasks=(), measure=("induction",), stream=True, stream_memory="15KB",
                     skip_control=True, induction_lengths=(9,), induction_seeds=2, out=tmp_path / "study")
    for lengths in ((9,), (2,)):  # texts are too large, or probes
        for refuses in (forecast, run_study):
            with pytest.raises(OptionError, match=r"takes .*KB while it waits, and stream_memory is 15KB: give more$"):
                refuses(dataclasses.replace(spec, induction_lengths=lengths))
    # Masks of attention that is read are of numbers: beside hidden states they are most of what waits.
    wide = dataclasses.replace(spec, induction_lengths=(100,), induction_seeds=1, stream_memory="300KB")
    for refuses in (forecast, run_study):
        with pytest.raises(OptionError, match="while it waits"):
            refuses(wide)
    enough = dataclasses.replace(spec, stream_memory="300KB")
    assert forecast(enough).jobs
    run_study(enough)
    for refuses in (forecast, run_study):
        with pytest.raises(OptionError, match="no random sequence fits, standing 4 times"):
            refuses(dataclasses.replace(enough, induction_lengths=(400,), out=tmp_path / "other"))
    longer = dataclasses.replace(enough, induction_lengths=(9, 400), stream_memory="900KB", out=tmp_path / "longer")
    (told,) = forecast(longer).told
    assert "random sequences of more than 127 tokens are left out" in told
    assert told in induction.induction_scores(load(folder, stream=True), lengths=(9, 400), seeds=1).notes


@pytest.mark.parametrize(("family", "kinds"), [("llama", 1), ("cohere2", 2)])
def test_masks_that_wait_are_counted(
    family: str, kinds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timed: None
) -> None:
    """One of each kind of attention, such as sliding and full, over trees in numbers."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    families.tiny(family).save_pretrained(tmp_path / "model")
    families.reader().save_pretrained(tmp_path / "model")
    spec = StudySpec(str(tmp_path / "model"), tasks=("piqa",), shots=(2,), limit=5, stream=True,
                     data=tiny.write_task(tmp_path / "data"), device="cpu", out=tmp_path / "study")
    known, seen = forecast(spec), list[int]()
    enter = Stream.enter

    def entered(stream: Stream, waiting: object) -> list[Wave[object]]:
        waves = enter(stream, waiting)  # type: ignore[arg-type]
        for wave in waves:
            masks = {value.untyped_storage().data_ptr(): value.nbytes for call in wave.calls
                     for value in call.kwargs.values() if isinstance(value, torch.Tensor) and value.ndim == 4}
            seen.append(wave.batch.tokens * (32 * 4 + 8) + sum(masks.values()))
        return waves

    plan = prepare(spec, parts=("evaluate",))
    Engine.of(plan.loaded).prove_sweep()  # which reads prompts of its own
    monkeypatch.setattr(Stream, "enter", entered)
    run(plan)
    assert known.shape.attention_kinds == kinds
    assert plan.jobs[0].title == known.jobs[0].title
    assert len(plan.jobs) == 1
    assert known.costs[0] is not None
    assert sum(seen) == known.costs[0].waiting


def test_eager_attention_keeps_masks_of_numbers() -> None:
    """Also where gradients are wanted, whose prompts are no trees."""
    spec = of_125m(tasks=("piqa",), unseen=(), shots=(0,), measure=("curves",))
    plain, eager = (forecast(dataclasses.replace(spec, attn_implementation=kernel)) for kernel in (None, "eager"))
    kept = [sum(cost.kept for cost in one.costs if cost is not None) for one in (plain, eager)]
    pairs = Bundled("piqa", Reading(None, 2048, Budget(), True, None, False, 1234, False)).work(
        "examples", 0, 2500, "gradient").pairs
    assert kept[1] - kept[0] == pytest.approx(pairs * (plain.shape.model.dtype.itemsize - 1), rel=1e-6)


def test_induction_reads_weights_for_texts_and_probes() -> None:
    """Of the model and of its control, whose texts and probes wait by themselves."""
    spec = StudySpec("facebook/opt-125m", tasks=(), measure=("induction",), stream=True, stream_memory="64GB")
    assert forecast(spec).passes == Passes(4, 0)
    assert forecast(dataclasses.replace(spec, skip_control=True)).passes == Passes(2, 0)
    known = forecast(dataclasses.replace(spec, skip_control=True, stream_memory="100MB"))
    states = 1 + 4 // 2  # a hidden state in float16, a direction in float32
    texts = [1 + 4 * length for length in LENGTHS for _ in range(SEEDS)]
    waits = 2 * sum(n * (states * 2 * 768 + 8) + 2 * n * n for n in texts)
    assert math.ceil(waits / 100e6) < known.passes.scoring <= math.ceil(1.4 * waits / 100e6) + 1


def test_a_type_that_a_cpu_computes_slowly_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {torch.float32: 4e10, torch.bfloat16: 9e10, torch.float16: 1e9}
    monkeypatch.setattr(speed, "matrix_products", lambda width, inner, dtype, seconds: rates[dtype])
    folder = tiny.saved(tmp_path / "llama")
    told = "this machine's CPU computes float16 much more slowly than bfloat16: as bfloat16 the model runs faster"
    spec = StudySpec(str(folder), tasks=("icl_plural",), shots=(0,), limit=2, importance_limit=2, dtype="float16")
    assert forecast(spec, on=("cpu",)).told == (told,)
    assert forecast(spec, on=("h100",)).told == ()
    for stream in (False, True):
        assert told in load(folder, dtype="float16", device="cpu", stream=stream).notes
        assert told not in load(folder, device="cpu", stream=stream).notes
    rates[torch.float16] = 8e10
    assert told not in load(folder, dtype="float16", device="cpu").notes


def test_a_model_fits_where_a_run_would_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "free_memory", lambda device: 1000)
    device = Device("cpu", 1000, {"float32": 1.0}, 1.0, "", kind="cpu")
    for kind, most in (("cpu", 900), ("cuda", 950)):
        assert placement.fits(most, kind)
        assert not placement.fits(most + 1, kind)
        for weights in (most, most + 1):
            way = hours_on(dataclasses.replace(device, kind=kind), "float32", 1.0, Memory(weights, 1, 1, 0, 0),
                           Passes(1, 1), None).way
            assert (way == "resident") == placement.fits(weights, kind)
    monkeypatch.setattr(devices, "free_memory", lambda device: 1000)
    here = device_of("cpu", 8, 8, "float32")
    assert (here.memory, here.waiting) == (1000, 250) == (1000, placement.may_wait())


def test_prices_are_numbers_and_models_have_layers(tmp_path: Path) -> None:
    folder = tiny.saved(tmp_path / "opt", "opt")
    spec = StudySpec(str(folder), tasks=("icl_plural",), shots=(0,), limit=2, importance_limit=2)
    for wrong in (-3.0, math.nan, math.inf):
        with pytest.raises(OptionError, match="price is what an hour costs, not"):
            forecast(spec, on=("h100",), price=(wrong,))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": -2}))
    with pytest.raises(ModelError, match="describes a model without layers"):
        forecast(spec)
