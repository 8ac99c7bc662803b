"""Models whose weights lie in files are read block by block, and give what a model in memory gives, bit for bit."""

from __future__ import annotations

import copy
import dataclasses
import gc
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pytest
import torch
from more_itertools import peekable
from safetensors.torch import load_file, save_file
from torch.multiprocessing.reductions import StorageWeakRef

import headcount as hc
import tiny
from families import reader
from families import tiny as of_family
from headcount.engine import stream as streams
from headcount.engine import stream_gradients
from headcount.engine.blocks import learned
from headcount.engine.engine import Engine
from headcount.engine.gradients import batch_scores
from headcount.engine.pack import Batch, Budget, batches, pack
from headcount.engine.proof import _parting, _requests
from headcount.engine.stream import Stream, Waiting, Wave
from headcount.engine.stream_gradients import streamed_scores
from headcount.engine.sweep import Sweep
from headcount.engine.treemask import model_inputs
from headcount.errors import ModelError, OptionError
from headcount.masks import Mask
from headcount.measure import probes
from headcount.measure.control import randomised
from headcount.measure.induction import induction_scores
from headcount.model import circuits, held, placement, random_weights
from headcount.model.anatomy import find_anatomy
from headcount.model.blockfiles import BlockFiles
from headcount.model.contracts import probe_tokens
from headcount.model.hooks import frozen
from headcount.model.load import LoadedModel, load
from headcount.study.prepare import Silent, prepare
from headcount.study.runner import run
from headcount.tasks.task import Task

# Every kind: norms on branches, projections beside blocks, fused and transposed matrices, experts that are read by
# their parents (DBRX), keys and values that blocks hand on (Gemma-4).
FAMILIES = ("llama", "opt", "opt-350m", "gpt2", "falcon", "bloom", "gemma3", "olmo2", "mixtral", "dbrx", "granitemoe",
            "gemma4")


def both(family: str, folder: Path) -> tuple[LoadedModel, LoadedModel]:
    """The same checkpoint in memory, and left in its files."""
    of_family(family).save_pretrained(folder)
    reader().save_pretrained(folder)
    return load(folder), load(folder, device_map="disk")


def packed(loaded: LoadedModel) -> list[Batch]:
    """Batches of one and of two rows, of unlike lengths."""
    requests, budget = _requests(loaded), Budget(batch_tokens=10_000)
    return [batch for some in (requests, requests[:1]) for batch in
            batches(pack([[one] for one in some], budget, trees=False), budget, gradients=True)]


def waiting(loaded: LoadedModel, given: list[Batch], masks: list[Mask]) -> peekable[Waiting[Batch]]:
    """Batches before the first block, all under the same masks."""
    return peekable(Waiting(batch, lambda one: model_inputs(loaded, one), masks, 1) for batch in given)


def readings_of_blocks(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each block's weights are read from now on, by its number."""
    numbers = {id(part.block): i for i, part in enumerate(loaded.anatomy.layers)}
    reads, fetched = Counter[int](), held.fetched

    def counted(*modules: torch.nn.Module, **options: Any) -> Any:
        reads.update(numbers[id(module)] for module in modules if id(module) in numbers)
        return fetched(*modules, **options)

    monkeypatch.setattr(held, "fetched", counted)
    return reads


@torch.no_grad()
def most_of(stream: Stream, loaded: LoadedModel, given: list[Batch]) -> int:
    """What the largest of some batches takes while it waits with the states of all blocks."""
    needed = []
    for batch in given:
        (wave,) = stream.enter(waiting(loaded, [batch], [Mask.full(loaded.anatomy.heads_per_layer)]))
        hidden = wave.nodes[0][1].hidden.untyped_storage().nbytes()
        needed.append(streams.bytes_of(wave.calls) + (len(stream.blocks) + 1) * hidden)
    return max(needed)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_streamed_schedule_gives_the_resident_ones_logits(family: str, tmp_path: Path) -> None:
    resident, in_files = both(family, tmp_path)
    masks, given = _parting(resident.anatomy), packed(resident)
    kept = torch.tensor([0]), torch.tensor([1])
    sweep = Sweep(resident.model, resident.anatomy)
    expected = [[(owners, logits.clone()) for owners, logits in
                 sweep.logits(model_inputs(resident, batch), masks, *kept)] for batch in given]
    stream = Stream(in_files.model, learned(in_files.model, in_files.anatomy, probe_tokens(in_files.model)))
    waves = stream.enter(waiting(in_files, given, masks))
    assert list(stream.through(waves)) == list(range(resident.anatomy.num_layers))
    for of_batch, logits in zip(expected, stream.leave(waves, [kept] * len(waves)), strict=True):
        found = list(logits)
        assert [owners for owners, _ in found] == [owners for owners, _ in of_batch]
        assert all(torch.equal(one, other) for (_, one), (_, other) in zip(found, of_batch, strict=True))
    assert sum(wave.layer_tokens for wave in waves) == sweep.layer_tokens
    assert all(p.is_meta for p in in_files.model.parameters()), "nothing stays in memory"


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_and_output_are_read_once_for_all_batches(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = both(family, tmp_path)[1]
    inside = {id(p) for layer in loaded.anatomy.layers for p in layer.block.parameters()}
    names = {name for name, p in loaded.model.named_parameters(remove_duplicate=False) if id(p) not in inside}
    ends: list[Any] = [loaded.model.get_input_embeddings(), loaded.model.get_output_embeddings()]
    once = {f"{name}.weight" for name, module in loaded.model.named_modules() if module in ends}
    stream = Stream(loaded.model, learned(loaded.model, loaded.anatomy, probe_tokens(loaded.model)))
    masks, given, read, count = _parting(loaded.anatomy), 4 * packed(loaded), BlockFiles.read_named, Counter[str]()

    def counted(files: BlockFiles, wanted: Sequence[str], memory: torch.Tensor | None = None) -> Any:
        count.update(names & {*wanted})
        return read(files, wanted, memory)

    monkeypatch.setattr(BlockFiles, "read_named", counted)
    waves = stream.enter(waiting(loaded, given, masks))
    assert len(waves) == len(given) > 4
    for _ in stream.through(waves):
        pass
    for logits in stream.leave(waves, [(torch.tensor([0]), torch.tensor([1]))] * len(waves)):
        assert list(logits)
    assert {count[name] for name in once} == {1}
    # Norms, positions and projections are small, and read at both ends of a pass.
    assert {count[name] for name in names - once} <= {1, 2}


@pytest.mark.parametrize("kept", ["once", "twice, equal", "twice, unlike"])
@pytest.mark.parametrize("family", ["opt", "gpt2", "falcon", "bloom", "gemma3", "gemma4"])
def test_tied_weights_count_once(family: str, kept: str, tmp_path: Path) -> None:
    """Many checkpoints hold what their config ties under both names, as `.bin` files of OPT do."""
    model = of_family(family)
    model.save_pretrained(tmp_path)
    reader().save_pretrained(tmp_path)
    ((one, other),) = model.all_tied_weights_keys.items()
    if kept != "once":
        held_there = load_file(tmp_path / "model.safetensors")
        held_there[one] = held_there[other] + (kept == "twice, unlike")
        save_file(held_there, tmp_path / "model.safetensors", metadata={"format": "pt"})
    resident, streamed = (load(tmp_path, device="cpu", stream=stream) for stream in (False, True))
    output = model.get_output_embeddings().weight.numel()  # type: ignore[no-untyped-call, union-attr]
    assert resident.anatomy.num_parameters == model.num_parameters() + output * (kept == "twice, unlike")
    assert streamed.anatomy.num_parameters == resident.anatomy.num_parameters
    assert streamed.identity == resident.identity


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("opt-350m", "gemma4")])
def test_gradients_block_by_block_are_those_of_the_whole_model(family: str, tmp_path: Path) -> None:
    resident, in_files = both(family, tmp_path)
    given = packed(resident)
    with frozen(resident.model):
        expected = [batch_scores(resident, batch) for batch in given]
    stream = streams.stream_of(in_files)
    assert stream is not None
    with pytest.raises(OptionError, match=r"while it waits, and stream_memory is 1 bytes: give more, or smaller"):
        list(streamed_scores(in_files, dataclasses.replace(stream, memory=1), given))
    for memory in (None, most_of(stream, in_files, given)):  # all batches in one pass, and each in one of its own
        with frozen(in_files.model):
            found = list(streamed_scores(in_files, dataclasses.replace(stream, memory=memory), given))
        assert [batch for batch, _ in found] == given
        for (_, scores), wanted in zip(found, expected, strict=True):
            assert all(torch.equal(one, other) for one, other in zip(scores, wanted, strict=True))


def test_gradients_behind_a_projection_agree_but_for_rounding(tmp_path: Path) -> None:
    """OPT-350M's projection behind the last block is computed at scored positions alone."""
    resident, in_files = both("opt-350m", tmp_path)
    stream, given = streams.stream_of(in_files), packed(resident)
    assert stream is not None
    with frozen(resident.model), frozen(in_files.model):
        for (batch, scores), own in zip(streamed_scores(in_files, stream, given), given, strict=True):
            assert batch is own
            for one, other in zip(scores, batch_scores(resident, own), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_blocks_that_hand_keys_on_have_no_gradients_of_their_own(tmp_path: Path) -> None:
    _, in_files = both("gemma4", tmp_path)
    stream = streams.stream_of(in_files)
    assert stream is not None
    with pytest.raises(ModelError, match="hand keys and values to later ones"):
        list(streamed_scores(in_files, stream, packed(in_files)))


@pytest.fixture(scope="module")
def task() -> Task:
    return hc.get_tasks(["icl_plural"])["icl_plural"]


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox"])
def test_whole_measurements_are_the_same_whatever_waits(family: str, task: Task, tmp_path: Path) -> None:
    folder = tiny.saved(tmp_path / family, family)
    resident, in_files = load(folder), load(folder, device_map="disk")
    full = Mask.full(resident.anatomy.heads_per_layer)
    masks = [full, full.without_heads([(0, 1)]), full.without_ffns([1]), full.without_heads([(1, 0), (2, 1)])]
    budget = Budget(batch_tokens=600, gradient_tokens=300)
    told: list[int] = []
    expected = hc.evaluate(resident, task, masks, num_fewshot=2, limit=20, budget=budget)
    alone = hc.evaluate(resident, task, None, num_fewshot=2, limit=20, budget=budget)
    heads = hc.head_importance(resident, task, num_fewshot=2, limit=10, budget=budget)
    for memory in (None, 700_000):
        streamed = dataclasses.replace(in_files, stream_memory=memory)
        found = hc.evaluate(streamed, task, masks, num_fewshot=2, limit=20, budget=budget, progress=told.append)
        assert np.array_equal(found.gold_loglikelihood, expected.gold_loglikelihood)
        assert np.array_equal(found.correct, expected.correct)
        assert found.layer_tokens == expected.layer_tokens
        assert sum(told) == found.tokens
        told.clear()
        found = hc.evaluate(streamed, task, None, num_fewshot=2, limit=20, budget=budget)
        assert np.array_equal(found.gold_loglikelihood, alone.gold_loglikelihood)
    scores = hc.head_importance(in_files, task, num_fewshot=2, limit=10, budget=budget).scores
    assert all(np.array_equal(scores[name], heads.scores[name]) for name in scores)


def test_a_pass_reads_each_block_once_and_holds_two(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.saved(tmp_path / "llama")
    in_files = load(folder, device_map="disk")
    budget, masks = Budget(batch_tokens=200, row_tokens=100), [Mask.full(in_files.anatomy.heads_per_layer)]
    hc.evaluate(in_files, task, masks, num_fewshot=2, limit=4, budget=budget)  # what is proved once is proved
    reads, most = readings_of_blocks(in_files, monkeypatch), [0]

    def watched(blocks: Any) -> Iterator[int]:
        for i in one_by_one(blocks):
            here = [not any(p.is_meta for p in part.block.parameters()) for part in in_files.anatomy.layers]
            most[0] = max(most[0], sum(here))
            yield i

    one_by_one = streams.one_by_one
    monkeypatch.setattr(streams, "one_by_one", watched)
    found = hc.evaluate(in_files, task, masks, num_fewshot=2, limit=20, budget=budget)
    assert reads == {0: 1, 1: 1, 2: 1}
    assert most == [1], "the next one is read, and not in its place yet"
    reads.clear()
    small = dataclasses.replace(in_files, stream_memory=100_000)
    prepared = hc.measure.evaluate.prepare(small, task, hc.measure.evaluate.FewShot(2, 20), budget=budget)
    hc.measure.evaluate.score(small, prepared, masks)  # what is proved once is proved
    reads.clear()
    again = hc.measure.evaluate.score(small, prepared, masks)
    assert len(prepared.batches) >= (alone := min(reads.values())) > 1
    assert np.array_equal(found.gold_loglikelihood, again.gold_loglikelihood)
    monkeypatch.setattr(streams, "may_wait", lambda: 400_000)
    one_of_four = dataclasses.replace(in_files, together=4)
    hc.measure.evaluate.score(one_of_four, prepared, masks)
    reads.clear()
    hc.measure.evaluate.score(one_of_four, prepared, masks)
    assert min(reads.values()) == alone, "four processes share what may wait"


def test_a_block_that_fails_lets_go_of_its_weights(tmp_path: Path) -> None:
    in_files = both("llama", tmp_path)[1]
    part = in_files.anatomy.layers[1]
    ids = torch.tensor([[5, 6, 7]])
    expected = in_files.model(ids).logits

    def failing(module: torch.nn.Module, args: Any) -> None:
        raise ZeroDivisionError

    for module in (part.out_proj, part.block, part.ffn_output):
        handle = module.register_forward_pre_hook(failing)
        with pytest.raises(ZeroDivisionError):
            in_files.model(ids)
        handle.remove()
        assert all(p.is_meta for p in in_files.model.parameters())
    assert torch.equal(in_files.model(ids).logits, expected)
    assert held.in_files(in_files.model)
    twin, seen = copy.deepcopy(in_files.model), list[str]()
    for name, model in (("own", in_files.model), ("twin", twin)):
        find_anatomy(model).layers[0].block.register_forward_hook(lambda *_, name=name: seen.append(name))
    assert torch.equal(twin(ids).logits, expected)
    assert seen == ["twin"]


def test_what_does_not_fit_into_memory_is_left_in_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.saved(tmp_path / "llama")
    assert not held.in_files(load(folder).model)
    asked = load(folder, stream=True, stream_memory="2MB")
    assert held.in_files(asked.model)
    assert asked.stream_memory == 2_000_000
    monkeypatch.setattr(placement, "free_memory", lambda device: 1000)
    found = load(folder)
    assert held.in_files(found.model)
    assert "stay in their files and are read block by block" in found.notes[0]
    assert not held.in_files(load(folder, device="cpu").model), "who names a device has it there"
    for said in ("much", "0", "-1GB", "B", "8XB"):
        with pytest.raises(OptionError, match="is no number of bytes: write 8GB"):
            load(folder, stream=True, stream_memory=said)
    with pytest.raises(OptionError, match="device_map auto puts them elsewhere: give one of them"):
        load(folder, stream=True, device_map="auto")
    assert held.in_files(load(folder, stream=True, device="cpu").model)


def test_a_whole_study_streamed_has_the_resident_ones_tables(tmp_path: Path) -> None:
    folder, data = tiny.saved(tmp_path / "model"), tmp_path / "data"
    for name in ("piqa", "copa_like"):
        tiny.write_task(data, name)
    found = [hc.open_study(hc.run_study(hc.StudySpec(
        model=str(folder), tasks=("piqa", "icl_plural"), data=data, shots=(0, 1), limit=8, importance_limit=6,
        fractions=(0.25, 0.5), random_orders=1, measure=("curves", "grid", "transfer", "induction"),
        grid_fractions=(0.5,), transfer_fractions=(0.5,), induction_lengths=(5, 9), induction_seeds=2, batch_tokens=500,
        row_tokens=200, stream=stream, out=tmp_path / f"study-{stream}")))
        for stream in (False, True)]
    assert {*found[0].induction()["weights"]} == {"trained", "random"}
    for table in ("curves", "importance", "grid", "transfer", "induction"):
        one, other = (getattr(study, table)() for study in found)
        assert len(one) > 0
        pd.testing.assert_frame_equal(one, other, check_exact=True)


# Falcon and the first GPT hand their probabilities out when they are told to, and put out more then.
@pytest.mark.parametrize(("family", "protocol"), [
    *((family, "sound") for family in ("llama", "opt-350m", "gpt2", "bloom", "gemma3", "olmo2", "falcon")),
    *((family, "paper") for family in ("llama", "opt-350m", "openai-gpt"))])
def test_induction_scores_are_the_same_read_block_by_block(
    family: str, protocol: Literal["sound", "paper"], tmp_path: Path
) -> None:
    resident, in_files = both(family, tmp_path)
    expected = induction_scores(resident, lengths=(5, 9), seeds=3, protocol=protocol)
    told = list[int]()
    for memory in (None, 60_000):
        streamed = dataclasses.replace(in_files, stream_memory=memory)
        found = induction_scores(streamed, lengths=(5, 9), seeds=3, protocol=protocol, progress=told.append)
        for name in ("prefix_matching", "copying", "previous_token", "ov_copying"):
            assert np.array_equal(getattr(found, name), getattr(expected, name), equal_nan=True), name
    assert len(told) == 2 * 2 * 2, "two lengths, of two kinds each, twice"


@pytest.mark.parametrize("part", ["texts", "probes"])
def test_memory_that_is_too_small_for_induction_beside_a_block_is_told(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_files, through = both("llama", tmp_path)[1], Stream.through

    def failing(stream: Stream, waves: Any, around: Any = None) -> Iterator[int]:
        yield from through(stream, waves, around)
        if isinstance(waves[0].batch, probes._Rows) == (part == "probes") and around is not None:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1000 bytes.")

    monkeypatch.setattr(Stream, "through", failing)
    with pytest.raises(ModelError, match=r"too small for a batch of \d+ tokens beside a block.*less that waits"):
        induction_scores(in_files, lengths=(5,), seeds=1)


@pytest.mark.parametrize(("family", "protocol"), [
    ("llama", "sound"), ("llama", "paper"), ("falcon", "sound"), ("openai-gpt", "paper")])
def test_induction_reads_the_weights_three_times(
    family: str, protocol: Literal["sound", "paper"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a model must be told to hand its probabilities out, what its blocks put out then takes a fourth."""
    monkeypatch.setattr(circuits, "_PROBES", 8)
    resident, in_files = both(family, tmp_path)
    induction_scores(in_files, lengths=(5,), seeds=1, protocol=protocol)  # what is proved once is proved
    reads = readings_of_blocks(in_files, monkeypatch)
    found = induction_scores(in_files, lengths=(5, 9), seeds=2, protocol=protocol)
    more = dict.fromkeys(range(in_files.anatomy.num_layers), int(family != "llama"))
    more[0] *= 2  # the first try ends in the first block
    assert reads == {block: 3 + also for block, also in more.items()}, (
        "what attentions hand out is asked, texts pass, probes pass")
    assert all(p.is_meta for p in in_files.model.parameters()), "nothing stays in memory"
    expected = induction_scores(resident, lengths=(5, 9), seeds=2, protocol=protocol)
    assert np.array_equal(found.ov_copying, expected.ov_copying)


# Tied weights, weights that are drawn otherwise (GPT-2's outputs of branches), experts, buffers that are saved.
@pytest.mark.parametrize("family", ["llama", "opt-350m", "gpt2", "gemma3", "mixtral", "dbrx", "gemma4"])
def test_the_control_in_files_has_the_weights_of_the_one_in_memory(family: str, tmp_path: Path) -> None:
    resident, in_files = both(family, tmp_path)
    control, generator = randomised(resident, 3), torch.random.get_rng_state()
    streamed = randomised(dataclasses.replace(in_files, stream_memory=10**6), 3)
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert held.in_files(streamed.model)
    assert streamed.stream_memory == 10**6
    assert streamed.fingerprint == control.fingerprint != randomised(resident, 4).fingerprint
    own = dict(zip(streamed.model.modules(), control.model.modules(), strict=True))
    read = held.fetched(streamed.model)
    assert len(read) == len(list(control.model.named_parameters(remove_duplicate=False)))
    assert all(torch.equal(one.value, getattr(own[one.owner], one.name)) for one in read)
    folders = [*(Path(os.environ["XDG_CACHE_HOME"]) / "headcount" / "control").iterdir()]
    assert folders
    del streamed, own, read
    gc.collect()
    assert not any(path.exists() for path in folders)


def test_the_control_takes_memory_for_one_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_files, most = load(tiny.saved(tmp_path / "llama"), stream=True), [0]

    def counted(self: random_weights._Slot) -> None:
        write(self)
        most[0] = max(most[0], sum(slot.storage.nbytes() for slot in slots if slot is not self))
        slots.add(self)

    slots, write = set[random_weights._Slot](), random_weights._Slot.write
    monkeypatch.setattr(random_weights._Slot, "write", counted)
    randomised(in_files)
    assert len(slots) > 20
    assert most[0] <= tiny.VOCAB * 32 * 4, "the embedding matrix"


def test_what_a_killed_process_left_of_a_control_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_files, root = load(tiny.saved(tmp_path / "llama"), stream=True), tmp_path / "cache" / "headcount" / "control"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (root / "left").mkdir(parents=True)
    (root / "left" / "parameter-00000").write_bytes(b"weights")
    (root / "left.lock").touch()
    used = randomised(in_files, 1)
    (folder,) = (path for path in root.iterdir() if path.is_dir())
    again = randomised(in_files, 1)
    assert folder.is_dir(), "another one's, which is in use"
    assert again.fingerprint == used.fingerprint


def test_no_step_keeps_the_weights_of_more_than_two_blocks(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proofs, scoring, gradients, oracles and induction: a graph of all layers would keep all that was read."""
    tiny.model("llama", layers=6).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    loaded = load(tmp_path, stream=True)
    numbers = {id(module): i for i, part in enumerate(loaded.anatomy.layers) for module in part.block.modules()}
    read: list[tuple[int, StorageWeakRef]] = []
    most, now = Counter[str](), [""]

    def fetched(*modules: torch.nn.Module, **options: Any) -> list[held.Weight]:
        found = whole(*modules, **options)
        read.extend((numbers[id(one.owner)], StorageWeakRef(one.value.untyped_storage())) for one in found
                    if id(one.owner) in numbers)
        most[now[0]] = max(most[now[0]], len({storage.cdata for _, storage in read if not storage.expired()}))
        return found

    whole = held.fetched
    monkeypatch.setattr(held, "fetched", fetched)
    budget = Budget(batch_tokens=400, gradient_tokens=200)
    steps: dict[str, Callable[[], object]] = {
        "proofs": lambda: Engine.of(loaded).prove(gradients=True),
        "scoring": lambda: hc.evaluate(loaded, task, None, num_fewshot=1, limit=6, budget=budget),
        "gradients": lambda: hc.head_importance(loaded, task, num_fewshot=1, limit=6, budget=budget),
        "oracle": lambda: hc.ffn_importance(loaded, task, num_fewshot=1, limit=6, budget=budget),
        "induction": lambda: induction_scores(loaded, lengths=(5,), seeds=2)}
    for now[0], do in steps.items():
        do()
    assert {*most} == {*steps}
    assert max(most.values()) <= 2, most

class Titles(Silent):
    """Which jobs began."""

    def __init__(self) -> None:
        self.titles: list[str] = []

    def job(self, title: str) -> None:
        """Kept."""
        self.titles.append(title)


def test_jobs_that_are_ready_together_share_readings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass for all gradients, one for what then is ready, one for the rest; with less memory some more."""
    folder, data = tiny.saved(tmp_path / "model"), tmp_path / "data"
    for name in ("piqa", "copa_like"):
        tiny.write_task(data, name)
    passes: list[Sequence[Wave[Any]]] = []

    def counted(self: Stream, waiting: peekable[Waiting[Any]]) -> list[Wave[Any]]:
        passes.append(waves := enter(self, waiting))
        return waves

    enter = Stream.enter
    monkeypatch.setattr(Stream, "enter", counted)
    tables = []
    for memory in (None, "1MB"):
        told, spec = Titles(), hc.StudySpec(
            model=str(folder), tasks=("piqa", "icl_plural", "icl_past_tense"), data=data, shots=(0, 1), limit=8,
            importance_limit=6, fractions=(0.25, 0.5), random_orders=1, measure=("curves",), batch_tokens=500,
            row_tokens=200, stream=True, stream_memory=memory, out=tmp_path / f"study-{memory}")
        planned = hc.forecast(spec).passes
        plan = prepare(spec)
        Engine.of(plan.loaded).prove_sweep()
        Engine.of(plan.loaded).prove(gradients=True)
        passes.clear()
        tables.append(hc.open_study(run(plan, reporter=told)).curves())
        expected = planned.scoring + planned.gradients // 2
        # A pass is full where the next batch does not fit, which the plan takes half a batch for.
        assert len(passes) == expected == 3 if memory is None else 0.8 * expected < len(passes) < 1.25 * expected
        assert len(told.titles) == len({*told.titles}) == 66
        jobs = [{id(wave.batch.begun) for wave in waves if hasattr(wave.batch, "begun")} for waves in passes]
        assert max(map(len, jobs)) > 1
    pd.testing.assert_frame_equal(*tables, check_exact=True)


def test_memory_that_is_too_small_for_a_batch_beside_a_block_is_told(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(tiny.saved(tmp_path / "llama"), stream=True)
    measures: tuple[Callable[[], object], ...] = (
        lambda: hc.evaluate(loaded, task, None, limit=4), lambda: hc.head_importance(loaded, task, limit=4))
    for measure in measures:
        measure()  # what is proved once is proved

    def full(*_: object) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes")

    monkeypatch.setattr(streams, "step", full)
    monkeypatch.setattr(stream_gradients, "gradients_of", full)
    for measure in measures:
        with pytest.raises(ModelError, match=r"too small for a batch of \d+ tokens beside a block .* smaller batches"):
            measure()
    assert all(p.is_meta for p in loaded.model.parameters()), "nothing stays in memory"
