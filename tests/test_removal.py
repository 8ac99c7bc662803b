"""A removed model is the masked one: block by block, whole, generating, and loaded again from its folder."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    pipeline,
)

import headcount as hc
import tiny
from families import FAMILIES, reader, tokens
from families import tiny as of_family
from headcount.errors import ModelError, OptionError
from headcount.masks import Mask
from headcount.measure.induction import induction_scores
from headcount.model.anatomy import Anatomy, find_anatomy
from headcount.model.contracts import verify
from headcount.model.hooks import ablated
from headcount.model.load import LoadedModel, load, wrap
from headcount.removal import certificate, in_float32
from headcount.removal.remove import prompts, remove
from headcount.removal.shards import Shards
from headcount.removal.slicing import Walk, planned

# Nothing is removed from them by whoever has not read their attention: biases by column (ALiBi), rows in the order of
# four devices (CodeGen), keys and values of another layer (Gemma-4's small ones), attention that hands back a list.
REFUSED = ("bloom", "codegen", "falcon-alibi", "gemma4-e", "mpt", "openai-gpt")
# Heads are removed, FFNs are not: experts stand beside an FFN.
HEADS_ALONE = ("gemma4-experts",)
# Proved through folders, too; all others in memory.
ON_DISK = ("opt", "opt-350m", "gpt2", "gpt_neox", "falcon", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3",
           "phi3", "olmo2", "mixtral", "gpt_oss", "deepseek_v3", "apertus")


def without(anatomy: Anatomy, heads: list[tuple[int, int]], ffns: tuple[int, ...] = ()) -> Mask:
    """A mask by what it leaves out; a layer alone is all of its heads."""
    return Mask.full(anatomy.heads_per_layer).without_heads(heads).without_ffns(ffns)


def whole(anatomy: Anatomy, layer: int) -> list[tuple[int, int]]:
    return [(layer, head) for head in range(anatomy.heads_per_layer[layer])]


def masks(family: str, anatomy: Anatomy) -> list[Mask]:
    """Uneven groups and an FFN; a layer without heads and one with a single one; a layer without anything."""
    ffns = (1,) if family not in HEADS_ALONE else ()
    alone = whole(anatomy, 0)[1:]
    found = [without(anatomy, [(0, 0), (1, 2)], ffns), without(anatomy, [*alone, *whole(anatomy, 1)])]
    return found if family in HEADS_ALONE else [*found, without(anatomy, whole(anatomy, 0), (0,))]


def obvious(model: PreTrainedModel, anatomy: Anatomy, mask: Mask) -> PreTrainedModel:
    """The slow, obvious way: a copy with zeros in the columns of the output projection, and in the last FFN matrix."""
    twin = copy.deepcopy(model)
    for part, heads, ffn in zip(find_anatomy(twin).layers, mask.heads, mask.ffns, strict=True):
        out: Any = part.out_proj
        for head in np.flatnonzero(~heads):
            columns = slice(int(head) * part.d_head, (int(head) + 1) * part.d_head)
            (out.weight if hasattr(out, "nx") else out.weight.T).data[columns] = 0
        if not ffn:
            for parameter in part.ffn_output.parameters():
                parameter.data.zero_()
    return twin


@torch.no_grad()
def logits(model: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    found: Tensor = model(input_ids=ids, use_cache=False, **kwargs).logits
    return found


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference, in standard deviations of the logits: stricter than in their range."""
    return float((one - other).abs().max() / other.std())


def written(model: PreTrainedModel, ids: Tensor, **kwargs: Any) -> list[int]:
    told = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0, **kwargs}
    return list(model.generate(ids, **told)[0].tolist())  # type: ignore[operator]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in REFUSED])
def test_a_removed_model_is_the_masked_one(family: str) -> None:
    loaded, ids = wrap(of_family(family), reader(), name=family), tokens()
    for mask in masks(family, loaded.anatomy):
        small = remove(loaded, mask).model
        assert apart(logits(small.model, ids), logits(obvious(loaded.model, loaded.anatomy, mask), ids)) < 1e-4
        # What a study says is saved is what is saved.
        assert small.anatomy.heads_per_layer == tuple(int(kept.sum()) for kept in mask.heads)
        removed = loaded.anatomy.num_parameters - small.anatomy.num_parameters
        assert removed == loaded.anatomy.parameters_removed(mask)
    with ablated(loaded.anatomy, mask):
        expected = written(loaded.model, ids[:, :5])
    assert written(small.model, ids[:, :5]) == expected == written(small.model, ids[:, :5], use_cache=False)
    assert [result.detail for result in verify(small.model, small.anatomy) if not result.holds] == []


@pytest.mark.parametrize("family", REFUSED)
def test_what_is_not_known_is_refused_by_name_and_set_to_zero_instead(family: str, tmp_path: Path) -> None:
    loaded = wrap(of_family(family), reader(), name=family)
    mask = without(loaded.anatomy, whole(loaded.anatomy, 0))
    with pytest.raises(ModelError, match=f"(?i){family.partition('-')[0]}.*format='masked'"):
        _ = remove(loaded, without(loaded.anatomy, [(0, 0), (1, 1), *whole(loaded.anatomy, 0)])).model
    zeroed = remove(loaded, mask).save(tmp_path / "zeroed", format="masked")
    same = AutoModelForCausalLM.from_pretrained(zeroed)
    assert apart(logits(same, tokens()), logits(obvious(loaded.model, loaded.anatomy, mask), tokens())) < 1e-4


@pytest.mark.parametrize("family", ON_DISK)
def test_a_folder_loads_in_transformers_and_here_and_is_saved_again(family: str, tmp_path: Path) -> None:
    loaded, ids = wrap(of_family(family), reader(), name=family), tokens()
    mask = masks(family, loaded.anatomy)[0]
    expected = logits(obvious(loaded.model, loaded.anatomy, mask), ids)
    folder = remove(loaded, mask).save(tmp_path / "small")
    with pytest.raises((ValueError, OSError)):  # without its code: never a wrong model
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    theirs = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    theirs.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    for model in (load(folder).model, theirs, again):
        assert apart(logits(model, ids), expected) < 1e-4
    assert certificate.check(folder).holds


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "dbrx", "gpt_oss", "deepseek_v3", "granitemoe"])
def test_a_familys_own_class_does_not_load_what_was_removed(family: str, tmp_path: Path) -> None:
    """It would fill random weights in where experts are gone."""
    loaded = wrap(of_family(family), reader(), name=family)
    folder = remove(loaded, without(loaded.anatomy, [], (1,))).save(tmp_path / "small")
    with pytest.raises((RuntimeError, ValueError)):
        type(loaded.model).from_pretrained(folder)
    twice = remove(load(folder), without(loaded.anatomy, [(0, 0)])).save(tmp_path / "smaller")
    assert certificate.check(twice, "transformers").holds


def test_something_may_be_removed_from_a_removed_model() -> None:
    """In steps or at once, it is the same model; also where norms read all heads, or a projection was taken apart."""
    for family in ("llama", "qwen3", "olmo2", "falcon", "gpt_neox", "gpt2", "mixtral"):
        loaded, ids = wrap(of_family(family), reader(), name=family), tokens()
        first = without(loaded.anatomy, [(0, 0), (1, 3)], (0,))
        once = remove(loaded, first).model
        # L0H1, L0H2, L0H3 are left in layer 0, L1H0, L1H1, L1H2 in layer 1.
        for second, both in (([(0, 0)], [(0, 0), (0, 1), (1, 3)]), ([(0, 1), (1, 0)], [(0, 0), (0, 2), (1, 0), (1, 3)]),
                             (whole(once.anatomy, 0), [*whole(loaded.anatomy, 0), (1, 3)])):
            twice = remove(once, without(once.anatomy, second)).model
            expected = obvious(loaded.model, loaded.anatomy, without(loaded.anatomy, both, (0,)))
            assert apart(logits(twice.model, ids), logits(expected, ids)) < 1e-4, (family, second)


def small_llama(tmp_path: Path) -> tuple[LoadedModel, Mask, Path]:
    loaded = tiny.loaded("llama")
    mask = without(loaded.anatomy, [(0, 0), *whole(loaded.anatomy, 1)], (2,))
    return loaded, mask, remove(loaded, mask).save(tmp_path / "small")


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_padding_on_the_left_kernels_and_types_of_numbers_change_nothing(kernel: str, tmp_path: Path) -> None:
    loaded, mask, folder = small_llama(tmp_path)
    small = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, attn_implementation=kernel)
    loaded.model.set_attn_implementation(kernel)
    ids = torch.tensor([[5, 6, 7, 8, 9], [3, 3, 5, 6, 7]])
    padding = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    with ablated(loaded.anatomy, mask):
        expected = logits(loaded.model, ids, attention_mask=padding)
        text = written(loaded.model, ids, attention_mask=padding)
    assert apart(logits(small, ids, attention_mask=padding)[padding.bool()], expected[padding.bool()]) < 1e-4
    assert written(small, ids, attention_mask=padding) == text
    coarse = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16,
                                                  device_map="cpu", attn_implementation=kernel)
    assert coarse.dtype == torch.bfloat16
    assert apart(logits(coarse, ids[:1]).float(), expected[:1]) < 0.05


def test_a_pipeline_writes_and_lora_is_put_on_top(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    loaded, mask, folder = small_llama(tmp_path)
    write = pipeline("text-generation", model=str(folder), trust_remote_code=True)
    with ablated(loaded.anatomy, mask):
        told = loaded.tokenizer("the cat", return_tensors="pt").input_ids
        expected = loaded.tokenizer.decode(written(loaded.model, told), skip_special_tokens=True)
    assert write("the cat", max_new_tokens=6, min_new_tokens=6, do_sample=False)[0]["generated_text"] == expected
    small = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tuned = peft.get_peft_model(small, peft.LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"],
                                                       init_lora_weights=False))
    merged = tuned.merge_and_unload()
    assert apart(logits(merged, tokens()), logits(load(folder).model, tokens())) > 1e-3
    merged.save_pretrained(tmp_path / "tuned")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", trust_remote_code=True)
    assert torch.equal(logits(again, tokens()), logits(merged, tokens()))


def test_a_removed_folder_is_measured_like_any_other_model(tmp_path: Path) -> None:
    """Without the code in it: the importance of what is left is that of the masked model's heads."""
    loaded, mask, folder = small_llama(tmp_path)
    (folder / "modeling_headcount.py").unlink()
    small = hc.load(folder)
    tiny.write_task(tmp_path / "data")
    one = hc.get_tasks(["piqa"], data=tmp_path / "data")["piqa"]
    here = hc.evaluate(small, one, [Mask.full(small.anatomy.heads_per_layer)])
    there = hc.evaluate(loaded, one, [mask])
    np.testing.assert_allclose(here.gold_loglikelihood, there.gold_loglikelihood, atol=1e-4)
    heads = hc.head_importance(small, one)
    assert len(heads.scores["example"]) == sum(small.anatomy.heads_per_layer) == 3 + 0 + 4
    scores = induction_scores(small, seeds=1, lengths=(5,))
    assert len(scores.prefix_matching) == 7


def test_stock_fits_one_shape_and_says_what_does_not(tmp_path: Path) -> None:
    ids = tokens()
    for family, kind in (("qwen3", "qwen3"), ("mistral", "mistral"), ("llama", "llama"), ("phi3", "phi3")):
        loaded = wrap(of_family(family), reader(), name=family)
        for heads in ((0, 2), (0, 1)):  # one head of each group; a whole group
            mask = without(loaded.anatomy, [(layer, head) for layer in (0, 1) for head in heads])
            folder = remove(loaded, mask).save(tmp_path / f"{family}{heads}", format="stock")
            model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
            assert model.config.model_type == kind
            assert not (folder / "modeling_headcount.py").exists()
            assert apart(logits(model, ids), logits(obvious(loaded.model, loaded.anatomy, mask), ids)) < 1e-4
    # Three heads do not fill Llama's hidden size, on which its class insists.
    settings = of_family("llama").config.to_dict() | {"num_key_value_heads": 4}
    loaded = wrap(LlamaForCausalLM(LlamaConfig(**settings)), reader(), name="llama")
    mask = without(loaded.anatomy, [(0, 1), (1, 2)])
    model = AutoModelForCausalLM.from_pretrained(remove(loaded, mask).save(tmp_path / "other", format="stock"))
    assert model.config.model_type == "mistral"
    assert apart(logits(model, ids), logits(obvious(loaded.model, loaded.anatomy, mask), ids)) < 1e-4
    loaded = wrap(of_family("llama"), reader(), name="llama")
    for mask, said in ((without(loaded.anatomy, [(0, 0), (1, 0)]), "unlike numbers"),
                       (without(loaded.anatomy, [(0, 0), (0, 1)]), "layers 0 and 1 differ"),
                       (without(loaded.anatomy, [], (1,)), "an FFN in every layer")):
        with pytest.raises(OptionError, match=said):
            remove(loaded, mask).save(tmp_path / "none", format="stock")
    for family in ("opt", "gpt2", "gpt_neox"):
        loaded = wrap(of_family(family), reader(), name=family)
        with pytest.raises(OptionError, match="no class of transformers has the shape"):
            remove(loaded, without(loaded.anatomy, [(0, 0), (1, 0)])).save(tmp_path / "none", format="stock")
    assert not (tmp_path / "none").exists()


def test_nothing_is_left_of_a_folder_that_was_not_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny.loaded("llama")
    removed = remove(loaded, without(loaded.anatomy, [(0, 0)]))
    out = tmp_path / "deep" / "small"

    def full(self: Shards, name: str, value: Tensor) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Shards, "write", full)
        with pytest.raises(OptionError, match="the disk was full"):
            removed.save(out)
    assert list(out.parent.iterdir()) == []
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))  # type: ignore[attr-defined]
        with pytest.raises(OptionError, match="not enough space"):
            removed.save(out)
    removed.save(out)
    with pytest.raises(OptionError, match="exists already"):
        removed.save(out)
    assert [path.name for path in out.parent.iterdir()] == ["small"]


def test_a_smaller_block_that_is_not_the_masked_one_is_refused() -> None:
    """The proof can fail: a column in another's place is found."""
    loaded = tiny.loaded("llama")
    plan = planned(loaded, without(loaded.anatomy, [(1, 1)]))
    kept = plan.cuts[1].kept["self_attn.o_proj.weight"]
    kept[1] = kept[1][::-1].copy()
    with pytest.raises(ModelError, match="block 1, made smaller, puts out something else"):
        list(Walk(plan, tokens()).blocks())


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt-350m", "gemma3", "mixtral", "olmo2", "falcon"])
def test_proofs_of_bfloat16_are_made_in_float32(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures are those of float32, and a head in another's place is no rounding."""
    monkeypatch.setattr(in_float32, "_LARGE", 1000)  # so that the output layer goes some rows at a time
    monkeypatch.setattr(in_float32, "_ROWS", 7)
    loaded = wrap(of_family(family).bfloat16(), reader(), name=family)
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    mask = masks(family, loaded.anatomy)[0]
    folder = remove(loaded, mask).save(tmp_path / "small")
    told = json.loads((folder / "headcount.json").read_text())
    assert max(proof["largest"] for proof in told["proofs"]) < 1e-4
    assert certificate.check(folder, "transformers").holds
    assert AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).dtype == torch.bfloat16
    assert all(torch.equal(before[name], value) for name, value in loaded.model.state_dict().items())
    plan = planned(loaded, mask)
    wrong = planned(loaded, without(loaded.anatomy, [(0, 3), (1, 0)], mask.ffns_removed)).cuts  # type: ignore[arg-type]
    monkeypatch.setattr(plan.cuts[0], "kept", wrong[0].kept)
    with pytest.raises(ModelError, match="block 0, made smaller, puts out something else"):
        list(Walk(plan, tokens()).blocks())


@pytest.mark.parametrize(("family", "dtype"), [
    ("dots1", torch.bfloat16), ("afmoe", torch.float16), ("gpt_oss", torch.float16), ("ernie4_5_moe", torch.bfloat16),
    ("hunyuan_v1_moe", torch.float16), ("dbrx", torch.bfloat16), ("xglm", torch.bfloat16)])
def test_tensors_that_a_family_keeps_in_float32_stay_so(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """And all the others in the model's type, so that it runs: with an FFN gone, and a head."""
    of_family(family).to(dtype).save_pretrained(tmp_path / "full")
    reader().save_pretrained(tmp_path / "full")
    loaded = load(tmp_path / "full")
    for name, mask in (("head", without(loaded.anatomy, [(0, 0)])), ("ffn", without(loaded.anatomy, [], (1,)))):
        folder = remove(loaded, mask).save(tmp_path / name)
        types = {name: value.dtype for name, value in loaded.model.state_dict().items()}
        found = {name: value.dtype for name, value in load(folder).model.state_dict().items() if value.numel()}
        assert {name: types.get(name, dtype) for name in found} == found
        assert certificate.check(folder, "transformers").holds
        small = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        assert logits(small, tokens()).dtype == dtype
        zeros = remove(loaded, mask).save(tmp_path / f"{name}-zeros", format="masked")
        assert certificate.check(zeros, "transformers").holds


def test_bad_masks_and_models_are_refused(tmp_path: Path) -> None:
    loaded = tiny.loaded("llama")
    with pytest.raises(OptionError, match="the mask is for a model with 2 x 4 heads"):
        remove(loaded, Mask.full((4, 4)))
    with pytest.raises(OptionError, match="leaves everything as it is"):
        remove(loaded, Mask.full(loaded.anatomy.heads_per_layer))
    loaded = wrap(tiny.model("llama"), tiny.tokenizer())
    loaded.model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ModelError, match="is quantised"):
        remove(loaded, without(loaded.anatomy, [(0, 0)]))


def test_what_was_made_before_changes_nothing_of_what_is_made_next(tmp_path: Path) -> None:
    """A model in memory, and folders of every format, in any order; savings are the same before and after."""
    loaded = tiny.loaded("llama")
    mask = without(loaded.anatomy, [(layer, head) for layer in range(3) for head in (0, 2)])
    first, last = remove(loaded, mask).savings, remove(loaded, mask)
    small = last.model
    expected = logits(small.model, tokens())
    for format in ("stock", "transformers", "masked"):
        folder = last.save(tmp_path / format, format=format)  # type: ignore[arg-type]
        assert apart(logits(load(folder).model, tokens()), expected) < 1e-4
        assert torch.equal(logits(small.model, tokens()), expected)
    assert last.savings == first
    small.model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None for p in small.model.parameters())
    assert first.flops_left is not None


def test_a_copy_is_proved_on_another_machine(tmp_path: Path) -> None:
    _, _, folder = small_llama(tmp_path)
    for backend in ("headcount", "transformers"):
        found = certificate.check(folder, backend)  # type: ignore[arg-type]
        assert found.holds
        assert found.largest <= 1e-6
    told = json.loads((folder / "headcount.json").read_text())
    assert told["removed"]["ffns"] == ["L2F"]
    assert [proof["largest"] <= proof["tolerance"] for proof in told["proofs"]] == [True, True]
    # A changed bit in the weights, and weights of another mask with a certificate that fits them, are found.
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    weights.write_bytes(data[:-100])
    for backend in ("headcount", "transformers"):
        with pytest.raises(ModelError, match=r"cannot (be )?load"):
            certificate.check(folder, backend)  # type: ignore[arg-type]
    data[-2] ^= 0x40
    weights.write_bytes(data)
    assert certificate.check(folder).changed == ("model.safetensors",)
    config = json.loads((folder / "config.json").read_text())
    unlisted = {**told, "files": {}}
    (folder / "headcount.json").write_text(json.dumps(unlisted))
    assert {"config.json", "model.safetensors", "modeling_headcount.py"} <= {*certificate.check(folder).changed}
    with pytest.raises(ModelError, match="would run code"):
        certificate.check(folder, "transformers")
    others = [config | {"headcount": config["headcount"] | {"num_heads": wrong}} for wrong in (
        [1, 2, 3], ["a", 2, 4], None, [4.0, 2, 4])]
    for name, damaged in (*(("config.json", one) for one in ({**config, "headcount": {}}, *others)),
                          ("headcount.json", {**told, "removed": {"heads": None, "ffns": []}}), ("headcount.json", {}),
                          ("headcount.json", None)):
        (folder / name).write_text("[" * 100_000 if damaged is None else json.dumps(damaged))
        for backend in ("headcount", "transformers"):
            with pytest.raises(ModelError):
                certificate.check(folder, backend)  # type: ignore[arg-type]
    full = tiny.loaded("llama")
    one = load(remove(full, without(full.anatomy, [(0, 0)])).save(tmp_path / "one"))
    again = remove(one, without(one.anatomy, [(1, 0)]))
    with pytest.raises(OptionError, match="zeros would not load anywhere"):
        again.save(tmp_path / "two", format="masked")


def test_shards_are_written_as_safetensors_reads_them(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(i, 3).to(dtype) for i, dtype in
               enumerate((torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.float32))}
    tensors["scalar"] = torch.tensor(3.5)
    shards = Shards(tmp_path, tensors, shard_bytes=40)
    with pytest.raises(ValueError, match="not what was announced next"):
        shards.write("t1", tensors["t1"])
    for name, value in tensors.items():
        shards.write(name, value)
    shards.close()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len({*index.values()}) > 2
    for name, file in index.items():
        with safe_open(tmp_path / file, "pt") as opened:
            assert torch.equal(opened.get_tensor(name), tensors[name])


def test_weights_on_the_disk_are_read_a_module_at_a_time(tmp_path: Path) -> None:
    folder = tiny.saved(tmp_path / "full")
    model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "disk"}, offload_folder=tmp_path / "offload")
    loaded = wrap(model, AutoTokenizer.from_pretrained(folder), name="full")
    mask = without(loaded.anatomy, [(0, 0), *whole(loaded.anatomy, 1)], (2,))
    small = remove(loaded, mask).save(tmp_path / "small")
    told = json.loads((small / "headcount.json").read_text())
    assert [proof["what"] for proof in told["proofs"]] == [
        "each block, while it was written", "logits of the whole model, loaded again from the files"]
    resident = LlamaForCausalLM.from_pretrained(folder)
    expected = logits(obvious(resident, find_anatomy(resident), mask), tokens())
    assert apart(logits(load(small).model, tokens()), expected) < 1e-4
    assert certificate.check(small, "transformers").holds
    # What no file holds is not written: a block that loses nothing is proved, too.
    changed = load(folder, device_map="disk")
    changed.model.get_decoder().layers[2].self_attn.scaling *= 2  # type: ignore[no-untyped-call]
    with pytest.raises(ModelError, match="loaded again, the smaller model's logits differ"):
        remove(changed, without(changed.anatomy, [(0, 0)])).save(tmp_path / "changed")
    again = load(small, device_map="disk")
    smaller = remove(again, without(again.anatomy, [(0, 0)])).save(tmp_path / "smaller")
    assert load(smaller).anatomy.heads_per_layer == (2, 0, 4)


def test_a_model_that_does_not_run_from_the_disk_is_one_line(tmp_path: Path) -> None:
    of_family("llama4").save_pretrained(tmp_path / "full")
    reader().save_pretrained(tmp_path / "full")
    loaded = load(tmp_path / "full", device_map="disk")
    with pytest.raises(ModelError, match=r"does not run as it is loaded .*device='cpu'"):
        remove(loaded, without(loaded.anatomy, [(0, 0)])).save(tmp_path / "small")


def test_prompts_are_of_one_length_whatever_the_tokenizer_makes_of_them() -> None:
    assert prompts(tiny.loaded("llama")).shape == (3, 8)
    assert prompts(wrap(of_family("opt"), reader(), name="opt")).shape == (3, 8)
