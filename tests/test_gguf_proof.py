"""A model that was read from a GGUF file holds what the file says, or the file is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from headcount.errors import ModelError
from headcount.model import gguf as kept_files
from headcount.model import gguf_proof
from headcount.model.gguf import read_once
from headcount.model.gguf_proof import prove
from headcount.model.load import load

gguf = pytest.importorskip("gguf")
from gguf_files import FAMILIES, VOCAB, build, write  # noqa: E402

IDS = torch.randint(3, 99, (1, 300), generator=torch.Generator().manual_seed(0))
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64, "rope_theta": 10000.0}


def converted(path: Path) -> PreTrainedModel:
    """What transformers makes of a file, without any proof."""
    with read_once(path):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    return model.eval()


def away(one: PreTrainedModel, other: PreTrainedModel) -> float:
    """The largest difference of logits."""
    with torch.no_grad():
        return float((one(IDS).logits - other(IDS).logits).abs().max())


def refused(path: Path, model: PreTrainedModel, reader: Any = None) -> str:
    with pytest.raises(ModelError) as error:
        prove(path, model, reader)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("arch", FAMILIES)
def test_a_family_is_converted_to_the_model_it_was_written_from(arch: str, tmp_path: Path) -> None:
    model = build(arch)
    path = write(model, tmp_path / "model.gguf", arch)
    found = converted(path)
    assert away(model, found) == 0
    assert prove(path, found, None) == ""


def test_the_families_are_those_that_are_compared() -> None:
    assert set(FAMILIES) == gguf_proof.COMPARED


@pytest.mark.parametrize(("arch", "settings", "fields", "named"), [
    ("llama", {"attention_bias": True}, {}, "blk.0.attn_k.bias"),
    ("llama", {"mlp_bias": True}, {}, "blk.0.ffn_down.bias"),
    ("llama", {"num_key_value_heads": 4}, {"llama.attention.head_count_kv": None}, "llama.attention.head_count_kv"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
     {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, "llama.rope.scaling.factor = 4.0"),
    ("gemma3", {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
     {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}, "gemma3.rope.scaling.factor = 8.0"),
    ("falcon", {"bias": True}, {}, "blk.0.attn_output.bias"),
    ("stablelm", {"partial_rotary_factor": 0.5}, {}, "stablelm.rope.dimension_count = 4"),
    ("nemotron", {"partial_rotary_factor": 1.0}, {}, "nemotron.rope.dimension_count = 8"),
    ("nemotron", {"norm_eps": 0.01}, {}, "nemotron.attention.layer_norm_epsilon"),
    ("starcoder2", {"rope_theta": 1e5}, {}, "starcoder2.rope.freq_base = 100000.0"),
    ("phi3", {"sliding_window": 64}, {"phi3.attention.sliding_window": 64}, "phi3.attention.sliding_window = 64"),
    ("gemma2", {"final_logit_softcapping": 2.0}, {}, "gemma2.final_logit_softcapping = 2.0"),
    ("gemma3", {"query_pre_attn_scalar": 32}, {"gemma3.attention.scale": 32**-0.5}, "gemma3.attention.scale"),
    ("gemma3", {"layer_types": ["sliding_attention", "full_attention"] * 3},
     {"gemma3.attention.sliding_window_pattern": 2}, "gemma3.attention.sliding_window_pattern = 2"),
])
def test_what_a_conversion_loses_is_refused_by_name(
    arch: str, settings: dict[str, Any], fields: dict[str, Any], named: str, tmp_path: Path
) -> None:
    model = build(arch, **settings)
    path = write(model, tmp_path / "model.gguf", arch, fields=fields)
    found = converted(path)
    assert away(model, found) > 1e-3, "it is lost"
    assert named in refused(path, found)


def test_factors_of_rotary_frequencies_are_refused_unless_they_do_nothing(tmp_path: Path) -> None:
    model = build("llama", rope_parameters=LLAMA3)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, "cpu")
    factors = (10000.0 ** -(torch.arange(0, 8, 2) / 8) / scaled).numpy()
    path = write(model, tmp_path / "llama3.gguf", "llama", tensors={"rope_freqs.weight": factors})
    found = converted(path)
    assert away(model, found) > 1e-3
    assert "rope_freqs.weight" in refused(path, found)
    assert prove(path, model, None) == "", "the model that the file was written from"
    ones = write(found, tmp_path / "ones.gguf", "llama", tensors={"rope_freqs.weight": np.ones(4)})
    assert prove(ones, found, None) == ""


def test_a_tensor_that_no_table_knows_is_refused(tmp_path: Path) -> None:
    model = build("llama")
    path = write(model, tmp_path / "model.gguf", "llama", tensors={"blk.1.attn_sub_norm.weight": np.ones(32)})
    assert "1 tensor that" in refused(path, model)
    assert "blk.1.attn_sub_norm.weight" in refused(path, model)


def test_an_output_layer_of_its_own_that_the_model_shares_is_refused(tmp_path: Path) -> None:
    model = build("llama")
    path = write(model, tmp_path / "model.gguf", "llama")
    assert prove(path, model, None) == ""
    model.lm_head.weight = model.model.embed_tokens.weight
    assert "output.weight" in refused(path, model)
    assert prove(write(model, tmp_path / "same.gguf", "llama"), model, None) == ""


# A vocabulary of the other kind, with the mark of a blank space.
SENTENCEPIECE = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [-float(i) for i in range(VOCAB)],
                 "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "\u2581", "a", "b", "ab", "\u2581a",
                                           *(f"<x{i}>" for i in range(VOCAB - 8))],
                 "tokenizer.ggml.merges": None}


class Said:
    """One value, as gguf's reader gives it."""

    def __init__(self, value: object) -> None:
        self.value = value

    def contents(self) -> object:
        return self.value


def test_every_key_of_the_format_is_compared_or_neutral_or_harmless() -> None:
    model = build("llama")
    usual = {"llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.embedding_length": 32,
             "llama.attention.layer_norm_rms_epsilon": 1e-6, "llama.block_count": 2}
    keys = [key.format(arch="llama", dense="dense_2") for group in (gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope)
            for name, key in vars(group).items() if name.isupper()]
    assert len(keys) > 90

    def tried(more: dict[str, object]) -> str:
        file = gguf_proof._File("x.gguf", "llama", {k: Said(v) for k, v in {**usual, **more}.items()}, {})
        try:
            gguf_proof._prove_values(file, model)
            gguf_proof._prove_rope(file, model)
        except ModelError as error:
            return str(error)
        return ""

    assert tried({}) == ""
    assert tried({"llama.attention.sliding_window_pattern": 3}) == "", "of no window"
    keys.remove("llama.attention.sliding_window_pattern")
    for key in keys:
        name = key.removeprefix("llama.")
        assert (key in tried({key: 3})) != (name in gguf_proof._HARMLESS), key
    for name, values in gguf_proof._NEUTRAL.items():
        assert not any(tried({f"llama.{name}": value}) for value in values), name
    assert "llama.some.later.key" in tried({"llama.some.later.key": 0.5})
    for kind in ("yarn", "longrope", "later"):
        assert "llama.rope.scaling.type" in tried({"llama.rope.scaling.type": kind, "llama.rope.scaling.factor": 4.0})
    for harmless in ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {"rope.scaling.factor": 1.0},
                     {"attention.sliding_window": 4096}, {"attention.head_count_kv": [2, 2]},
                     {"attention.scale": 8**-0.5}, {"rope.freq_base": 10000.0}):
        assert tried({f"llama.{k}": v for k, v in harmless.items()}) == "", harmless
    assert "head_count_kv" in tried({"llama.attention.head_count_kv": [2, 4]})
    for eps in ("llama.attention.layer_norm_rms_epsilon", "llama.attention.layer_norm_epsilon"):
        assert eps in tried({eps: 1e-2})


@pytest.mark.parametrize(("arch", "fields"), [
    ("llama", {"llama.attention.head_count_kv": [2, 4]}), ("phi3", {"tokenizer.ggml.padding_token_id": None}),
])
def test_a_file_that_transformers_stumbles_over_is_refused_in_a_line(
    arch: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    path = write(build(arch), tmp_path / "model.gguf", arch, fields=fields)
    said = r"^[^\n]*model\.gguf (cannot be loaded|does not describe a whole model): [^\n]*$"
    with pytest.raises(ModelError, match=said):
        load(path, device="cpu")


def test_a_tokenizer_that_is_not_read_back_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write(build("gemma3"), tmp_path / "model.gguf", "gemma3", fields={"tokenizer.ggml.unknown_token_id": None})
    assert load(path, device="cpu").anatomy.heads_per_layer == (4,) * 6
    assert kept_files.Kept.of(path, torch.float32).facts() is None


def test_an_architecture_that_was_never_compared_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "model.gguf"), "granite")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert "'granite'" in refused(tmp_path / "model.gguf", build("llama"))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_text_begins_and_ends_as_the_file_says(kind: str, tmp_path: Path) -> None:
    model = build("llama")
    space = {"tokenizer.ggml.model": kind, **(SENTENCEPIECE if kind == "llama" else {})}
    for bos in (True, False, None):
        for eos in (True, None):
            path = write(model, tmp_path / f"{bos}-{eos}.gguf", "llama", fields={
                **space, "tokenizer.ggml.add_bos_token": bos, "tokenizer.ggml.add_eos_token": eos})
            reader = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            assert prove(path, model, reader) == ""
            ids = reader("a")["input_ids"]
            assert (ids[0] == 1, ids[-1] == 2) == (kind == "llama" if bos is None else bos, bool(eos))
            reader.add_bos_token = not reader.add_bos_token
            assert "tokenizer.ggml.add_bos_token" in refused(path, model, reader)
            reader.add_bos_token, reader.add_eos_token = not reader.add_bos_token, not reader.add_eos_token
            assert "tokenizer.ggml.add_eos_token" in refused(path, model, reader)


def test_a_space_before_a_text_that_the_file_denies_is_refused(tmp_path: Path) -> None:
    model = build("llama")
    for said, does in ((True, True), (None, True), (False, False)):
        path = write(model, tmp_path / f"{said}.gguf", "llama", fields={
            **SENTENCEPIECE, "tokenizer.ggml.add_space_prefix": said})
        reader = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        assert reader.tokenize("a") == ["\u2581a"]
        if does:
            assert prove(path, model, reader) == ""
        else:
            assert "tokenizer.ggml.add_space_prefix = False" in refused(path, model, reader)


def test_a_file_that_llama_cpp_would_begin_and_transformers_would_not_is_refused(tmp_path: Path) -> None:
    path = write(build("llama"), tmp_path / "model.gguf", "llama", fields={"tokenizer.ggml.pre": "llama-bpe"})
    with pytest.raises(ModelError, match=r"is silent on tokenizer.ggml.add_bos_token.*tokenizer=FOLDER_OR_HUB_ID"):
        load(path, device="cpu")
    path = write(build("llama"), tmp_path / "said.gguf", "llama", fields={
        "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": True})
    assert load(path, device="cpu").tokenizer("a")["input_ids"][0] == 1


def test_a_rule_of_splitting_that_transformers_does_not_know_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write(build("llama"), tmp_path / "model.gguf", "llama", fields={"tokenizer.ggml.pre": "falcon"})
    first = load(path, device="cpu")
    assert "'falcon'" in first.notes[1]
    assert load(path, device="cpu").notes == first.notes, "out of the cache"
    first.tokenizer.save_pretrained(tmp_path / "reader")
    assert load(path, device="cpu", tokenizer=str(tmp_path / "reader")).notes == first.notes[:1]


def test_what_was_kept_before_the_proof_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write(build("llama"), tmp_path / "model.gguf", "llama")
    load(path, device="cpu")
    place = kept_files.Kept.of(path, torch.float32).folder
    assert place.is_dir()
    monkeypatch.setattr(kept_files, "PROOF", gguf_proof.PROOF + 1)
    proved = []
    monkeypatch.setattr(gguf_proof, "prove", lambda *a: proved.append(a) or "")
    load(path, device="cpu")
    assert proved, "it is proved anew"
    assert [p.name for p in place.parent.iterdir()] == [f"{place.name[:-1]}{gguf_proof.PROOF + 1}"]
    load(path, device="cpu")
    assert len(proved) == 1, "and costs nothing afterwards"
