"""benchmarks/gpu.py on its tiny shape: every measurement is a row, and operations are those that torch counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import gpu
import performance_page
from headcount.engine.engine import Engine
from headcount.engine.pack import Budget
from headcount.model.load import load
from headcount.study.costs import flops_of

WHAT = ["plain", "lm-eval", "scoring", "gradients", "oracle", "sweep"]
SMALL = ["--device", "cpu", "--dtype", "float32", "--documents", "4", "--shots", "24", "--repetitions", "1"]


def run(kept: Path, *more: str) -> tuple[list[dict[str, Any]], str]:
    gpu.main(["tiny", *SMALL, "--kept", str(kept), "--page", str(kept / "page.md"), *more])
    return json.loads((kept / "gpu_cpu.json").read_text())["rows"], (kept / "page.md").read_text()


def test_every_measurement_is_a_row_of_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, page = run(tmp_path, "--peak-tflops", "0.5")
    assert [(r["way"], r["what"]) for r in rows] == [(way, what) for way in gpu.WAYS for what in WHAT]
    of = {(r["way"], r["what"]): r for r in rows}
    for r in rows:
        assert r["utilisation"] == pytest.approx(r["flops"] / r["seconds"] / 0.5e12)
    for what in WHAT:  # both ways compute the same
        assert len({of[way, what]["layer_tokens"] for way in gpu.WAYS}) == 1
        assert len({of[way, what]["flops"] for way in gpu.WAYS}) == 1
    sweep, plain = of["resident", "sweep"], of["resident", "plain"]
    assert sweep["over_plain"] == pytest.approx(sweep["seconds"] / (plain["seconds"] * sweep["flops"] / plain["flops"]))
    assert "Not run: no GPU was at hand" in page
    table = capsys.readouterr().out.strip().splitlines()
    assert len(table) == 2 + len(rows)
    assert all(line in page for line in table)


def test_what_fails_is_a_row_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Engine, *args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmuch")

    monkeypatch.setattr(Engine, "gradients", full)
    rows, page = run(tmp_path, "--ways", "resident")
    assert [r["what"] for r in rows] == WHAT
    assert [r["what"] for r in rows if "failed" in r] == ["gradients"]
    assert "| tiny | resident | gradients | failed: CUDA out of memory. Tried to allocate |" in page


def test_what_does_not_fit_is_skipped_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "free_memory", lambda device: 1e6)
    rows, page = run(tmp_path)
    assert [(r["way"], "GB are free" in r["skipped"]) for r in rows] == [(way, True) for way in gpu.WAYS]
    assert "skipped: needs" in page


def test_where_a_disk_is_too_small_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.shutil, "disk_usage", lambda place: gpu.shutil._ntuple_diskusage(10, 10, 0))
    rows, _ = run(tmp_path)
    assert [r["skipped"].split(":")[0] for r in rows] == ["needs 0.0 GB of disk, 0.0 GB are free"]


def test_documents_longer_than_the_window_are_said(tmp_path: Path) -> None:
    rows, _ = run(tmp_path, "--shots", "2100", "--ways", "resident")
    assert [r["skipped"] for r in rows] == ["a document has 2167 tokens, the model's window 2048: give fewer --shots"]


@pytest.mark.parametrize(("slip", "said"), [
    (["opt-9b"], "there is no shape 'opt-9b'"),
    (["tiny", "--device", "gpu"], "unknown device 'gpu'"),
    (["tiny", "--documents", "0"], "are at least 1"),
])
def test_a_slip_is_one_line(slip: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main(slip)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_operations_are_those_that_torch_counts(tmp_path: Path) -> None:
    config = gpu.config_of("tiny")
    # Where masks part, here in the first layer, its attention is computed once, and counted for each.
    config.num_hidden_layers = 8
    shape = gpu.shape_without_weights(config, "float32", "cpu")
    with gpu.checkpoint("tiny", config, shape, tmp_path) as folder:
        loaded = load(folder, device="cpu", attn_implementation="eager")  # torch counts no fused attention on CPUs
    documents = gpu.documents(config.vocab_size, 4, 24)
    for one in gpu.measurements(loaded, documents, Budget(row_tokens=1)):  # rows of one document
        if one.what == "lm-eval":  # computes the logits of all positions
            continue
        one.run()  # what the engine finds out about a model is no part of it
        with FlopCounterMode(display=False) as counted:
            layer_tokens = one.run()
        needed = flops_of(shape, one.work, layer_tokens / one.work.tokens, one.masks)
        ratio = counted.get_total_flops() / needed
        assert ratio == pytest.approx(1, rel=0.1 if one.what == "sweep" else 0.05), one.what


def test_the_page_tells_what_a_gpu_did() -> None:
    row = {"model": "opt-6.7b", "way": "resident", "device": "cuda", "tokens": 10, "layer_tokens": 320, "seconds": 2.0,
           "flops": 1e15, "utilisation": 0.505, "over_plain": 1.2, "peak_memory": 14e9}
    streamed = row | {"way": "streamed", "device": "cpu", "utilisation": None, "what": "scoring"}
    result = {"when": "today", "device": "a GPU", "kind": "cuda", "dtype": "bfloat16", "peak": 989e12,
              "peak_source": "x", "documents": 64, "shots": 400, "repetitions": 3,
              "rows": [row | {"what": "scoring"}, row | {"what": "sweep"}, streamed]}
    page = performance_page.page({"gpu_cuda": result})
    assert "Not run" not in page
    assert "| opt-6.7b | resident | scoring | 10 | 320 | 2 | 1e+03 | 50.5% | 1.20 | 14.0 |" in page
    assert "| opt-6.7b | streamed, on the cpu | scoring |" in page
    assert "| share of a GPU's peak, scoring by OPT-6.7B's shape | at least 0.5 | 0.51 |  |" in page
    assert "at most 1.1 | 1.20 | not reached |" in page
