"""The door for models: what a checkpoint, an adapter or a wrapper would change without a word is refused by name."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.tokenization_python import PythonBackend

import families
import tiny
from headcount.engine.encode import Request
from headcount.engine.engine import Engine
from headcount.engine.pack import Budget
from headcount.engine.proof import verify_scoring
from headcount.errors import ModelError
from headcount.masks import Mask
from headcount.measure.evaluate import evaluate
from headcount.measure.importance import ffn_importance, head_importance
from headcount.measure.induction import induction_scores
from headcount.model import fingerprint as fingerprints
from headcount.model.anatomy import find_anatomy
from headcount.model.checkpoint import check
from headcount.model.earlier_fingerprint import fingerprint as earlier_fingerprint
from headcount.model.fingerprint import fingerprint, tokenizer_fingerprint, weights_digest
from headcount.model.load import LoadedModel, load, wrap
from headcount.model.source import Source
from headcount.model.without_weights import shape_of
from headcount.model.wrappers import hooked
from headcount.tasks.load import get_tasks
from headcount.tasks.task import Task

Change = Callable[[dict[str, Tensor]], None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that is what it says."""
    return tiny.saved(tmp_path_factory.mktemp("models") / "whole")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return get_tasks(["piqa"], data=tiny.write_task(tmp_path_factory.mktemp("data")))["piqa"]


def changed(whole: Path, folder: Path, config: dict[str, Any] | None = None, weights: Change | None = None) -> Path:
    """A copy of a checkpoint with another config or other tensors."""
    shutil.copytree(whole, folder)
    if config is not None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
    if weights is not None:
        tensors = load_file(folder / "model.safetensors")
        weights(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def biases(tensors: dict[str, Tensor]) -> None:
    tensors.update({f"model.layers.{i}.self_attn.q_proj.bias": torch.ones(32) for i in range(3)})


def lora(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.self_attn.q_proj.lora_A.default.weight"] = torch.ones(4, 32)


def scales(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.2.mlp.up_proj.weight_scale"] = torch.ones(1)


def no_mask(tensors: dict[str, Tensor]) -> None:
    """Named as the causal masks of earlier versions, and none."""
    tensors["model.layers.0.attn.bias"] = torch.ones(32)


def band(width: int) -> Change:
    """As GPT-Neo's local layers had it."""
    def add(tensors: dict[str, Tensor]) -> None:
        whole = torch.ones(1, 1, 8, 8).tril()
        tensors["model.layers.0.attn.attention.bias"] = (whole - whole.tril(-width)).bool()

    return add


def frequencies(factor: float) -> Change:
    own = tiny.model("llama").model.rotary_emb.inv_freq

    def add(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = own * factor

    return add


@pytest.mark.parametrize(("config", "weights", "said"), [
    ({"num_hidden_layers": 2}, None, "holds 9 tensors that LlamaForCausalLM has no place for .* model.layers.2"),
    ({"num_hidden_layers": 4}, None, "lacks 9 of the model's weights .* model.layers.3"),
    ({"intermediate_size": 64}, None, "of other sizes .*down_proj.weight: 32 x 48 in the checkpoint, 32 x 64 by"),
    ({"vocab_size": 300}, None, "of other sizes .*lm_head.weight"),
    (None, biases, "holds 3 tensors .* model.layers.0.self_attn.q_proj.bias"),
    (None, lora, "holds 1 tensor .*lora_A.default.weight"),
    (None, scales, "holds 1 tensor .*up_proj.weight_scale"),
    (None, no_mask, "holds 1 tensor .*attn.bias"), ({"window_size": 4}, band(3), "holds 1 tensor .*attention.bias"),
    (None, frequencies(2.0), "holds other rotary frequencies .*inv_freq"),
    ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, frequencies(1.0), "other rotary frequencies"),
])
def test_a_checkpoint_that_differs_from_its_model_is_refused_by_name(
    whole: Path, tmp_path: Path, config: dict[str, Any] | None, weights: Change | None, said: str
) -> None:
    with pytest.raises(ModelError, match=said):
        load(changed(whole, tmp_path / "m", config, weights), device="cpu")


def mask_buffer(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.attn.bias"] = torch.ones(1, 1, 8, 8).tril()
    tensors["model.layers.0.attn.masked_bias"] = torch.tensor(-1e4)
    tensors["model.layers.1.attn.causal_mask"] = torch.ones(1, 1, 8, 8).tril().bool()
    tensors["v_head.summary.weight"] = torch.ones(1, 32)


@pytest.mark.parametrize(("config", "weights"), [
    (None, mask_buffer), (None, frequencies(1.0)), ({"window_size": 3}, band(3)),
    # Earlier versions saved frequencies without the scaling.
    ({"rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0}}, frequencies(1.0)),
])
def test_what_no_logit_depends_on_may_be_left_over(
    whole: Path, tmp_path: Path, config: dict[str, Any] | None, weights: Change
) -> None:
    left = load(changed(whole, tmp_path / "left", config, weights), device="cpu")
    assert left.fingerprint == load(changed(whole, tmp_path / "plain", config), device="cpu").fingerprint


def test_nothing_is_harmless_where_the_files_are_not_known() -> None:
    told = {"missing_keys": set(), "mismatched_keys": set(), "unexpected_keys": {"h.0.attn.bias"}}
    with pytest.raises(ModelError, match=r"h\.0\.attn\.bias"):
        check("m", tiny.model("llama"), told, None)


def test_odd_configs_end_in_one_line(whole: Path, tmp_path: Path) -> None:
    for i, (config, said) in enumerate([
        ({"pad_token_id": 10**6}, "Padding_idx"), ({"num_attention_heads": 3}, "not a multiple"),
        ({"num_key_value_heads": 0}, "zero"), ({"use_cache": 1}, "expected bool"), ({"dtype": "float7"}, "float7"),
    ]):
        with pytest.raises(ModelError, match=said) as told:
            load(changed(whole, tmp_path / str(i), config), device="cpu")
        assert "\n" not in str(told.value)


def test_a_kernel_that_is_asked_for_wins_over_the_configs(whole: Path, tmp_path: Path) -> None:
    folder = changed(whole, tmp_path / "m", {"attn_implementation": "flash_attention_2"})
    assert load(folder, device="cpu", attn_implementation="sdpa").provenance["attn_implementation"] == "sdpa"


@pytest.mark.parametrize("name", ["flash_attention_2", "no_such_kernel"])
def test_a_kernel_that_cannot_be_had_is_no_broken_config(name: str, whole: Path) -> None:
    for act in (lambda: load(whole, device="cpu", attn_implementation=name),
                lambda: shape_of(str(whole), attn_implementation=name),
                lambda: shape_of("facebook/opt-66b", attn_implementation=name)):
        why = rf"cannot have attn_implementation '{name}' here \([^\n]+\): install what it needs, name another, or "
        with pytest.raises(ModelError, match=why):
            act()


# Adapters


@pytest.fixture(scope="module")
def adapted(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model with an adapter that is not merged, and the folder of the adapter alone."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"],
                             task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(whole), config)
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    model.save_pretrained(folder)
    return model.eval(), folder


def test_an_adapter_is_merged_into_its_base(whole: Path, adapted: tuple[Any, Path]) -> None:
    model, folder = adapted
    base, loaded = load(whole, device="cpu"), load(folder, device="cpu")
    ids = torch.arange(5, 20)[None]
    with torch.no_grad():
        own, expected, without = (m(ids).logits for m in (loaded.model, model, base.model))
    torch.testing.assert_close(own, expected, atol=1e-4, rtol=0)
    assert (own - without).abs().max() > 0.1
    assert loaded.anatomy.table() == base.anatomy.table(), "a head's parameters count once"
    assert loaded.fingerprint == wrap(copy.deepcopy(model).merge_and_unload(), tiny.tokenizer()).fingerprint
    assert loaded.fingerprint != base.fingerprint
    assert loaded.provenance["adapter"] == {"place": str(folder), "base": str(whole), "base_revision": None,
                                            "kind": "LORA", "base_commit": None}
    assert any("LORA adapter" in note for note in loaded.notes)


def test_the_digest_of_a_merged_model_is_not_taken_for_its_bases(
    whole: Path, adapted: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter's files may not be known where they lie on the hub; the base's are, and are the base's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    files = Source.files.fget
    monkeypatch.setattr(Source, "files", property(lambda self: files(self) if self.place == str(whole) else []))
    merged = load(adapted[1], device="cpu").fingerprint
    assert load(whole, device="cpu").fingerprint == fingerprint(tiny.model("llama")) != merged


def test_an_adapter_is_not_merged_into_weights_that_stay_on_the_disk(adapted: tuple[Any, Path]) -> None:
    with pytest.raises(ModelError, match="merged in memory, and stream leaves weights in their files"):
        load(adapted[1], device_map="disk")


def test_an_adapter_without_peft_is_refused(adapted: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headcount.model.adapters.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install peft"):
        load(adapted[1], device="cpu")


def test_an_adapter_without_its_weights_is_refused(adapted: tuple[Any, Path], tmp_path: Path) -> None:
    shutil.copytree(adapted[1], tmp_path / "a", ignore=shutil.ignore_patterns("adapter_model.*"))
    with pytest.raises(ModelError, match=r"without its weights \(adapter_model\.safetensors or"):
        load(tmp_path / "a", device="cpu")


def test_an_adapter_beside_a_whole_model_is_refused(whole: Path, adapted: tuple[Any, Path], tmp_path: Path) -> None:
    both = changed(whole, tmp_path / "both")
    for file in adapted[1].iterdir():
        shutil.copy(file, both)
    with pytest.raises(ModelError, match="nothing says whether the one contains the other"):
        load(both, device="cpu")


@pytest.mark.parametrize(("config", "said"), [
    ({"target_modules": ["q_proj"]}, "does not fit .* 18 of its tensors have no counterpart"),
    ({"target_modules": ["q_proj", "v_proj", "o_proj", "down_proj", "k_proj"]}, "does not fit .* 6 of its tensors"),
    ({"base_model_name_or_path": None}, "does not say which model it belongs to"),
    ({"base_model_name_or_path": "/nowhere/at/all"}, "there is no folder"),
    ({"peft_type": "NOTHING"}, "cannot be merged"),
])
def test_an_adapter_that_does_not_fit_is_refused(
    adapted: tuple[Any, Path], tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(adapted[1], folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    with pytest.raises(ModelError, match=said):
        load(folder, device="cpu")


def test_adapters_in_memory_that_are_not_merged_are_refused(adapted: tuple[Any, Path]) -> None:
    for model in (adapted[0], adapted[0].base_model.model):
        with pytest.raises(ModelError, match=r"adapter that is not merged .* merge_and_unload\(\)"):
            wrap(model, tiny.tokenizer())


# Gates that do not act


def values(loaded: LoadedModel, task: Task) -> list[np.ndarray]:
    """What a task's measurements are of the model, under masks together and one alone, and importance."""
    full = Mask.full(loaded.anatomy.heads_per_layer)
    nothing = Mask([[False] * 4] * 3, [False] * 3)
    masks = [full, full.without_heads([(0, 0), (1, 2)]), nothing]
    return [evaluate(loaded, task, masks, limit=3).gold_loglikelihood,
            evaluate(loaded, task, [nothing], limit=3).gold_loglikelihood,
            head_importance(loaded, task, limit=3).scores["example"]]


def outside(model: PreTrainedModel) -> Any:
    return torch.compile(model, backend="eager")


def in_place(model: PreTrainedModel) -> Any:
    model.compile(backend="eager")
    return model


def by_forward(model: PreTrainedModel) -> Any:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def in_parallel(model: PreTrainedModel) -> Any:
    return nn.DataParallel(outside(model))


@pytest.mark.parametrize("how", [outside, in_place, by_forward, in_parallel])
def test_compiled_models_are_measured_as_they_were_before(task: Task, how: Callable[[PreTrainedModel], Any]) -> None:
    torch._dynamo.reset()
    model = how(tiny.model("llama"))
    with torch.no_grad():
        model(torch.arange(8)[None])  # compiled without any gate
    loaded = wrap(model, tiny.tokenizer())
    assert any("torch.compile" in note and "taken off" in note for note in loaded.notes)
    assert loaded.fingerprint == wrap(tiny.model("llama"), tiny.tokenizer()).fingerprint
    for own, expected in zip(values(loaded, task), values(tiny.loaded("llama"), task), strict=True):
        np.testing.assert_allclose(own, expected, atol=1e-5)


def part_compiled(model: PreTrainedModel) -> PreTrainedModel:
    model.model.layers[1].compile(backend="eager")
    return model


def part_traced(model: PreTrainedModel) -> PreTrainedModel:
    model.model.layers[1].mlp = torch.jit.trace(model.model.layers[1].mlp, torch.randn(1, 3, 32))
    return model


def integers(model: PreTrainedModel) -> PreTrainedModel:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


def on_meta(model: PreTrainedModel) -> PreTrainedModel:
    return model.to("meta")


@pytest.mark.parametrize(("how", "said"), [
    (part_compiled, r"model\.layers\.1 of model is compiled by itself"),
    (part_traced, r"model\.layers\.1\.mlp of model is scripted or traced"),
    (integers, r"q_proj of model is quantised to integers"),
    (on_meta, "has no weights"),
])
@pytest.mark.filterwarnings("ignore")
def test_parts_that_gates_do_not_reach_through_are_refused(
    how: Callable[[PreTrainedModel], PreTrainedModel], said: str
) -> None:
    with pytest.raises(ModelError, match=said):
        wrap(how(tiny.model("llama")), tiny.tokenizer())


def test_a_mask_that_changes_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that was recorded once gives its numbers again, whatever hooks are there."""
    loaded = wrap(tiny.model("llama"), tiny.tokenizer())
    plain, known = type(loaded.model).forward, {}

    def recorded(self: PreTrainedModel, input_ids: Tensor, **keywords: Any) -> Any:
        key = tuple(input_ids.reshape(-1).tolist())
        if key not in known:
            known[key] = plain(self, input_ids=input_ids, **keywords)
        return known[key]

    monkeypatch.setattr(type(loaded.model), "forward", recorded)
    result = verify_scoring(loaded)
    assert not result.holds, result


def test_layers_of_zeros_need_not_change_anything() -> None:
    model = tiny.model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    assert verify_scoring(wrap(model, tiny.tokenizer())).holds


# Shared and pruned modules


def test_layers_that_share_a_module_are_refused() -> None:
    model = tiny.model("llama")
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(ModelError, match=r"layers\.0 and layers\.1 share a module \(block\)"):
        wrap(model, tiny.tokenizer())
    model = tiny.model("llama")
    model.model.layers[2].mlp = model.model.layers[0].mlp
    with pytest.raises(ModelError, match=r"layers\.0 and layers\.2 share a module \(ffn_output\)"):
        find_anatomy(model)


def cut(model: PreTrainedModel, layer: int, heads: int) -> None:
    """Keep the first heads of a layer of four, with their two KV groups' first ones."""
    attention = model.model.layers[layer].self_attn
    d, groups = attention.head_dim, heads // 2
    for name, width in (("q_proj", heads * d), ("k_proj", groups * d), ("v_proj", groups * d)):
        old = getattr(attention, name)
        new = nn.Linear(old.in_features, width, bias=False)
        new.weight.data = old.weight.data[:width].clone()
        setattr(attention, name, new)
    new = nn.Linear(heads * d, attention.o_proj.out_features, bias=False)
    new.weight.data = attention.o_proj.weight.data[:, : heads * d].clone()
    attention.o_proj = new


@pytest.mark.parametrize("layers", [(0, 1, 2), (1,)])
def test_models_whose_heads_were_removed_already_are_refused_everywhere(task: Task, layers: tuple[int, ...]) -> None:
    def pruned() -> LoadedModel:
        model = tiny.model("llama")
        for layer in layers:
            cut(model, layer, 2)
        return wrap(model, tiny.tokenizer())

    for measure in (lambda m: evaluate(m, task, limit=2), lambda m: head_importance(m, task, limit=2),
                    lambda m: ffn_importance(m, task, limit=2)):
        with pytest.raises(ModelError, match=f"layer {layers[0]} holds 2 heads of 8, the config says 4"):
            measure(pruned())


# What verify holds runs


class Odd(LlamaForCausalLM):
    """A Llama that does one thing otherwise, as a model with code of its own may."""

    what = ""

    def forward(self, input_ids: Tensor | None = None, **keywords: Any) -> Any:
        if self.what == "refuses a mask" and keywords.get("attention_mask") is not None:
            raise TypeError("no attention_mask, please")
        if self.what == "detached":
            with torch.no_grad():
                return super().forward(input_ids=input_ids, **keywords)
        out = super().forward(input_ids=input_ids, **keywords)
        if self.what == "last":
            out.logits = out.logits[:, -1:]
        elif self.what == "cut when long" and input_ids is not None and input_ids.shape[-1] > 9:
            out.logits = out.logits.detach()
        elif self.what == "tuple":
            return (out.logits,)
        elif self.what == "flat":
            out.logits = out.logits.reshape(-1, out.logits.shape[-1])
        elif self.what == "mixed":
            out.logits = out.logits - out.logits.mean(0, keepdim=True).mean(1, keepdim=True)
        elif self.what == "rounded":
            out.logits = out.logits.round(decimals=3)
        elif self.what == "twice":
            self.model(input_ids=input_ids)
        return out


def odd(what: str) -> LoadedModel:
    plain = families.tiny("llama")
    model = Odd(plain.config)
    model.load_state_dict(plain.state_dict())
    model.what = what
    return wrap(model.eval(), families.reader())


@pytest.mark.parametrize(("what", "said"), [
    ("last", r"reading logits of all positions, .* failed \(ValueError: its logits have the shape"),
    ("flat", "its logits have the shape"),
    ("tuple", "'tuple' object"),
    ("refuses a mask", "no attention_mask, please"),
    ("detached", "taking gradients|without gradients"),
    ("mixed", "differ by|later tokens"),
    ("twice", "block 0 runs 2 times in one pass"),
])
def test_what_fails_only_when_it_is_measured_fails_the_proof(task: Task, what: str, said: str) -> None:
    loaded = odd(what)
    assert not all(result.holds for result in Engine.of(loaded).contracts)
    asked = [functools.partial(measure, loaded, task, limit=2)
             for measure in (evaluate, head_importance, ffn_importance)]
    for measure in (*asked, functools.partial(induction_scores, loaded, lengths=[20], seeds=1)):
        with pytest.raises(ModelError, match=said) as told:
            measure()
        assert "\n" not in str(told.value)


def test_gradients_are_proved_where_they_are_wanted(task: Task) -> None:
    loaded = odd("rounded")
    assert np.isfinite(evaluate(loaded, task, limit=2).gold_loglikelihood).all()
    assert np.isfinite(ffn_importance(loaded, task, limit=2).scores["gold_loglikelihood"]).all()
    with pytest.raises(ModelError, match=r"'gradients reach heads and FFNs' .all heads have the score 0"):
        head_importance(loaded, task, limit=2)


def test_texts_that_switch_rotary_frequencies_for_others_are_refused() -> None:
    model = families.tiny("llama")
    loaded = wrap(model, families.reader())
    model.config.rope_parameters = {"rope_type": "longrope", "original_max_position_embeddings": 6, "rope_theta": 1e4}
    ids = np.arange(10, 20)
    short, long = Request(ids[:4], ids[4:5]), Request(ids[:9], ids[9:10])
    engine = Engine.of(loaded)
    for alike in ([short], [long]):
        assert engine.pack([alike], Budget(), trees=False).num_requests == 1
    for work in (lambda: engine.pack([[short, long]], Budget()), lambda: engine.gradients([short, long])):
        with pytest.raises(ModelError, match="texts of 4 to 9 tokens"):
            work()


def test_an_output_layer_that_is_no_module_is_refused() -> None:
    model = odd("").model
    model.get_output_embeddings = lambda: None
    with pytest.raises(ModelError, match="without an output layer that is a module"):
        wrap(model, families.reader())


def test_attention_that_sees_later_tokens_is_refused() -> None:
    model = families.tiny("gemma3")
    assert verify_scoring(wrap(model, families.reader())).holds
    model.config.use_bidirectional_attention = True
    result = verify_scoring(wrap(model, families.reader()))
    assert "later tokens" in result.detail, result


def test_tokens_without_an_embedding_are_named(task: Task) -> None:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                         num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2))
    loaded = wrap(model, tiny.tokenizer())
    for measure in (evaluate, head_importance, ffn_importance):
        with pytest.raises(ModelError, match=r"as token .* embeddings of 300 tokens"):
            measure(loaded, task, limit=2)


def test_a_model_is_proved_once(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, asked = tiny.loaded("llama", seed=3), []
    monkeypatch.setattr("headcount.engine.engine.verify", lambda model: asked.append(1) or [])
    for measure in (evaluate, head_importance, ffn_importance):
        measure(loaded, task, limit=2)
    assert asked == [1]


# Identity


def negated_rows(model: PreTrainedModel) -> None:
    model.model.embed_tokens.weight[10:110] *= -1


def one_bit(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.down_proj.weight.view(torch.int32)[7, 11] ^= 1


def swapped_rows(model: PreTrainedModel) -> None:
    weight = model.model.layers[1].mlp.up_proj.weight
    weight[[5, 9]] = weight[[9, 5]].clone()


@pytest.mark.parametrize("change", [negated_rows, one_bit, swapped_rows])
def test_no_change_of_weights_cancels(change: Callable[[PreTrainedModel], None]) -> None:
    model = tiny.model("llama")
    before = fingerprint(model)
    assert before == fingerprint(tiny.model("llama"))
    with torch.no_grad():
        change(model)
    assert fingerprint(model) != before


def test_earlier_fingerprints_are_what_they_were() -> None:
    """Folders of earlier versions go on by them: this one was taken by the version before."""
    model = families.tiny("gpt2")
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_((torch.arange(parameter.numel()) % (7 + number) - 3).reshape(parameter.shape) / 8)
    assert earlier_fingerprint(model)[:16] == "e985810c109ee59a"


def test_the_digest_of_files_is_kept_until_they_change(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    counted: list[int] = []

    def counting(model: PreTrainedModel) -> str:
        counted.append(1)
        return weights_digest(model)

    monkeypatch.setattr("headcount.model.load.weights_digest", counting)
    folder = changed(whole, tmp_path / "m")
    first, again = (load(folder, device="cpu").fingerprint for _ in range(2))
    assert (first, counted) == (again, [1])
    assert first == fingerprint(tiny.model("llama")), "the same in memory"
    assert load(folder, device="cpu", dtype="bfloat16").fingerprint != first
    tensors = load_file(folder / "model.safetensors")
    negated = {name: -x if "down_proj" in name else x for name, x in tensors.items()}
    save_file(negated, folder / "model.safetensors", metadata={"format": "pt"})
    assert load(folder, device="cpu").fingerprint != first
    assert len(counted) == 3
    for kept in (tmp_path / "cache" / "headcount" / "weights").iterdir():
        kept.write_text("0" * 64 + " " + "0" * 64)
    assert load(folder, device="cpu").fingerprint not in (first, "0" * 64), "damaged"
    assert len(counted) == 4


def test_special_tokens_that_are_read_otherwise_are_another_tokenizer() -> None:
    one, other = tiny.tokenizer(), copy.deepcopy(tiny.tokenizer())
    other.split_special_tokens = True
    name = one.all_special_tokens[0]
    assert one(name)["input_ids"] != other(name)["input_ids"]
    assert tokenizer_fingerprint(one, 10, chat=False) != tokenizer_fingerprint(other, 10, chat=False)


class Letters(PythonBackend):
    """A tokenizer in Python that leaves some letters out."""

    def __init__(self, without: str = "", **keywords: Any) -> None:
        self.without = without
        super().__init__(**keywords)

    @property
    def vocab_size(self) -> int:
        return 26

    def get_vocab(self) -> dict[str, int]:
        return {chr(97 + i): i for i in range(26)}

    def _tokenize(self, text: str, **keywords: Any) -> list[str]:
        return [letter for letter in text.lower() if "a" <= letter <= "z" and letter not in self.without]

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token) - 97

    def _convert_id_to_token(self, index: int) -> str:
        return chr(97 + index)


def test_options_of_a_tokenizers_python_code_count() -> None:
    prints = [tokenizer_fingerprint(Letters(without), 10, chat=False) for without in ("", "", "z", "q")]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


class Whole:
    """A part of a tokenizer in Python, which leaves texts in one piece."""

    def pre_tokenize(self, text: Any) -> None:
        pass


def test_a_tokenizer_that_cannot_be_written_down_is_refused_in_one_line() -> None:
    odd = copy.deepcopy(tiny.tokenizer())
    odd.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.PreTokenizer.custom(Whole())
    with pytest.raises(ModelError, match=r"rules cannot be written down .*use one without custom parts"):
        tokenizer_fingerprint(odd, 10, chat=False)


def test_a_forward_that_somebody_gave_a_librarys_class_identifies_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(tiny.model("llama"))
    plain = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: plain(self, x) * 2)
    assert fingerprint(tiny.model("llama")) != before


def test_numbers_in_a_module_that_was_put_in_by_hand_count() -> None:
    prints = []
    for slope in (0.1, 0.5, 0.5):
        model = families.tiny("llama")
        model.model.layers[1].mlp.act_fn = nn.LeakyReLU(slope)
        prints.append(fingerprint(model))
    assert prints[0] != prints[1] == prints[2]


def test_a_forward_that_wraps_a_librarys_own_identifies_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    before, plain = fingerprint(tiny.model("llama")), LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", functools.wraps(plain)(lambda self, x: plain(self, x) * 2))
    assert fingerprint(tiny.model("llama")) != before


def test_constants_of_a_forward_that_is_in_no_file_count(monkeypatch: pytest.MonkeyPatch) -> None:
    prints = []
    for factor in ("0.5", "0.7"):
        scope: dict[str, Any] = {"plain": LlamaMLP.forward}
        exec(f"def forward(self, x): return plain(self, x) * {factor}", scope)  # noqa: S102  # as in a notebook
        with monkeypatch.context() as cell:
            cell.setattr(LlamaMLP, "forward", scope["forward"])
            prints.append(fingerprint(tiny.model("llama")))
    assert prints[0] != prints[1]


def test_heads_that_were_set_to_zero_are_measured(task: Task) -> None:
    model = tiny.model("gpt2", 3)
    attention = model.transformer.h[1].attn
    with torch.no_grad():
        attention.c_attn.weight[:, -8:] = 0
        attention.c_attn.bias[-8:] = 0
    loaded = wrap(model, tiny.tokenizer())
    assert all(result.holds for result in Engine.of(loaded).contracts)
    whole = Mask.full(loaded.anatomy.heads_per_layer)
    values = [evaluate(loaded, task, [mask], limit=2).gold_loglikelihood
              for mask in (whole, whole.without_heads([(1, 3)]))]
    np.testing.assert_array_equal(*values)


def test_inference_mode_is_refused(task: Task) -> None:
    with torch.inference_mode(), pytest.raises(ModelError, match=r"torch\.inference_mode is on"):
        evaluate(wrap(tiny.model("llama", 5), tiny.tokenizer()), task, limit=2)


def test_hooks_on_all_modules_are_no_part_of_a_study() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        assert hooked(tiny.model("llama"))[0].startswith("all modules")
    finally:
        handle.remove()
    assert hooked(tiny.model("llama")) == []


def test_autocast_is_refused(task: Task) -> None:
    with torch.autocast("cpu"), pytest.raises(ModelError, match=r"torch\.autocast is on"):
        evaluate(tiny.loaded("llama"), task, limit=2)


def test_gradients_that_long_texts_alone_do_not_pass_are_told(task: Task) -> None:
    loaded = odd("cut when long")
    assert all(result.holds for result in Engine.of(loaded).contracts)
    with pytest.raises(ModelError, match=r"no gradient reaches the heads of layer 0.*where texts have \d+ tokens"):
        head_importance(loaded, task, limit=2)


def lower(rules: dict[str, Any]) -> None:
    rules["normalizer"] = {"type": "Lowercase"}


def fewer_merges(rules: dict[str, Any]) -> None:
    whole_words = ("Ġcapital", "Ġcats", "Ġred")
    rules["model"]["merges"] = [m for m in rules["model"]["merges"]
                                if "".join(m if isinstance(m, list) else m.split(" ")) not in whole_words]


def replaced(rules: dict[str, Any]) -> None:
    rules["normalizer"] = {"type": "Replace", "pattern": {"String": "stop"}, "content": "go"}


@pytest.mark.parametrize("change", [lower, fewer_merges, replaced])
def test_a_tokenizer_is_known_by_all_its_rules(
    whole: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    folder = changed(whole, tmp_path / "m")
    file = folder / "tokenizer.json"
    rules = json.loads(file.read_text(encoding="utf-8"))
    change(rules)
    file.write_text(json.dumps(rules), encoding="utf-8")
    one, other = load(whole, device="cpu"), load(folder, device="cpu")
    assert one.fingerprint == other.fingerprint
    assert one.identity != other.identity


def test_calls_of_a_tokenizer_do_not_change_its_fingerprint() -> None:
    tokenizer = copy.deepcopy(tiny.tokenizer())
    before = tokenizer_fingerprint(tokenizer, 10, chat=False)
    tokenizer(["a", "b c d e"], truncation=True, max_length=2, padding="max_length")
    assert tokenizer_fingerprint(tokenizer, 10, chat=False) == before


def test_code_that_comes_with_a_model_is_part_of_it(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    folder = changed(whole, tmp_path / "m", {"model_type": "own", "architectures": ["Own"], "auto_map": auto})

    def with_code(factor: float) -> LoadedModel:
        (folder / "scale.py").write_text(f"FACTOR = {factor}\n")
        (folder / "own.py").write_text(
            "from transformers import LlamaConfig, LlamaForCausalLM\nfrom .scale import FACTOR\n"
            "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
            "class Own(LlamaForCausalLM):\n    config_class = OwnConfig\n"
            "    def forward(self, *args, **keywords):\n        out = super().forward(*args, **keywords)\n"
            "        out.logits = out.logits * FACTOR\n        return out\n")
        for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
            del sys.modules[name]
        return load(folder, device="cpu", trust_remote_code=True)

    one, again, other = with_code(1.0), with_code(1.0), with_code(0.5)
    assert one.fingerprint == again.fingerprint
    assert one.fingerprint != other.fingerprint
    assert [line.partition(" ")[0] for line in one.provenance["code"]] == ["own.py", "scale.py"]


def test_provenance_says_the_same_things_whichever_way_a_model_came(whole: Path, adapted: tuple[Any, Path]) -> None:
    ways = [load(whole, device="cpu"), load(adapted[1], device="cpu"), wrap(tiny.model("llama"), tiny.tokenizer())]
    assert len({tuple(way.provenance) for way in ways}) == 1
    assert ways[0].fingerprint == ways[2].fingerprint
    assert fingerprints.KIND in ways[0].identity
    assert dataclasses.replace(ways[0]).identity == ways[0].identity


def test_code_of_headcount_itself_is_no_part_of_a_users_class() -> None:
    names = [line.partition(" ")[0] for line in fingerprints.code_of([Odd])]
    assert "test_door.py" in names
    assert "tiny.py" in names
    assert "fingerprint.py" not in names


@pytest.mark.parametrize("part", ["headcount.model.contracts._slices", "headcount.engine.proof.plain_loglikelihoods"])
def test_memory_that_is_too_small_for_the_proof_is_told_as_that(
    task: Task, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    def too_large(*arguments: object, **keywords: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(part, too_large)
    with pytest.raises(ModelError, match="memory is too small to check"):
        evaluate(wrap(families.tiny("llama"), families.reader()), task, limit=2)


def test_layers_that_a_class_ignores_by_their_number_are_refused(whole: Path, tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.2.*"])
    folder = changed(whole, tmp_path / "m", {"num_hidden_layers": 2})
    with pytest.raises(ModelError, match=r"holds a layer beyond the 2 of its config .*model\.layers\.2"):
        load(folder, device="cpu")

    def predicts(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.2.eh_proj.weight"] = torch.ones(2)

    assert load(changed(folder, tmp_path / "mtp", weights=predicts), device="cpu").anatomy.num_layers == 2


def test_layers_of_other_stacks_are_not_counted_with_the_models(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tower for pictures may have more layers than the text has."""
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"^vision\."])

    def tower(tensors: dict[str, Tensor]) -> None:
        tensors["vision.encoder.layers.7.weight"] = torch.ones(2)

    assert load(changed(whole, tmp_path / "m", weights=tower), device="cpu").anatomy.num_layers == 3


def twice(tensors: dict[str, Tensor]) -> None:
    tensors["layers.0.mlp.down_proj.weight"] = 5 * tensors["model.layers.0.mlp.down_proj.weight"]


def whole_numbers(tensors: dict[str, Tensor]) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = (tensors[name] * 100).round().to(torch.int8)


@pytest.mark.parametrize(("config", "weights", "said"), [
    (None, twice, "two tensors for one parameter, layers.0.mlp.down_proj.weight and model.layers.0"),
    (None, whole_numbers, "holds whole or 8-bit numbers for model.layers.0.mlp.down_proj.weight"),
    ({"quantization_config": {"quant_method": "foo", "bits": 4}}, None, "names a quantisation .foo. that"),
])
def test_weights_that_are_not_what_they_seem_are_refused(
    whole: Path, tmp_path: Path, config: dict[str, Any] | None, weights: Change | None, said: str
) -> None:
    with pytest.raises(ModelError, match=said):
        load(changed(whole, tmp_path / "m", config, weights), device="cpu")


def test_an_adapter_that_merging_changes_is_refused(tmp_path: Path) -> None:
    """The matrix of embeddings is the output layer's, too: merged, an adapter of one adapts both."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    tied = LlamaForCausalLM(LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                        num_attention_heads=4, tie_word_embeddings=True, bos_token_id=1,
                                        eos_token_id=2))
    tied.save_pretrained(tmp_path / "base")
    families.reader().save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM",
                             init_lora_weights=False)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match="the merged model computes something else"):
        load(tmp_path / "adapter", device="cpu")


def scaled_attention(model: PreTrainedModel) -> None:
    model.model.layers[1].self_attn.scaling = 2.0


def other_epsilon(model: PreTrainedModel) -> None:
    model.model.norm.variance_epsilon = 1.0


def other_frequencies(model: PreTrainedModel) -> None:
    model.model.rotary_emb.inv_freq *= 0.1


def other_activation(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.act_fn = nn.ReLU()


def no_softcap(model: PreTrainedModel) -> None:
    model.model.layers[1].self_attn.attn_logit_softcapping = None


def other_frequencies_of_a_kind(model: PreTrainedModel) -> None:
    model.model.rotary_emb.sliding_attention_inv_freq.mul_(3)


def other_norm(model: PreTrainedModel) -> None:
    norm = nn.LayerNorm(32, bias=False)
    norm.weight = model.model.norm.weight
    model.model.norm = norm


def other_scale(model: PreTrainedModel) -> None:
    model.model.embed_tokens.embed_scale.fill_(1.0)


def other_window(model: PreTrainedModel) -> None:
    model.transformer.h[1].attn.attention.bias[..., 5:, 3] = False


@pytest.mark.parametrize(("family", "change"), [
    ("llama", scaled_attention), ("llama", other_epsilon), ("llama", other_frequencies), ("llama", other_activation),
    ("llama", other_norm), ("gemma3", other_scale), ("gpt_neo", other_window),
    ("gemma2", no_softcap), ("gemma3", other_frequencies_of_a_kind),
])
def test_what_is_no_weight_identifies_a_model_too(family: str, change: Callable[[PreTrainedModel], None]) -> None:
    model = families.tiny(family)
    before = fingerprint(model)
    state = torch.random.get_rng_state()
    assert family != "llama" or fingerprints.altered(model) == []
    assert fingerprint(model) == before
    assert torch.equal(torch.random.get_rng_state(), state), "nobody's random numbers change"
    change(model)
    assert fingerprint(model) != before
