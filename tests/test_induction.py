"""Prefix matching, copying and the OV score against loops written out, planted circuits and a real model."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from torch.nn.functional import relu, softmax
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

import tiny as tiny_smollm2
from families import FAMILIES, VOCAB, reader, tiny
from headcount.engine.engine import Engine
from headcount.errors import ModelError, OptionError
from headcount.measure import induction, texts
from headcount.measure.control import randomised
from headcount.measure.induction import induction_scores, split_half
from headcount.measure.texts import usable_tokens
from headcount.model.anatomy import LayerAnatomy, find_anatomy
from headcount.model.circuits import output_map
from headcount.model.load import LoadedModel, wrap
from headcount.results import InductionScores
from headcount.study.spec import INDUCTION_TEXTS

LENGTHS, REPEATS, SEEDS = (5, 8), 3, 2
# Values that pass a norm or a gate before heads put them out.
NO_OV = ("deepseek_v2", "deepseek_v3", "gemma4", "gemma4-e", "gemma4-experts", "granite_swa", "laguna")


@pytest.fixture(autouse=True)
def unproved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the passes of the scores are watched; that they begin with a proof is tested in test_door."""
    monkeypatch.setattr(Engine, "prove", lambda self: None)


def words(size: int, *, bos: bool = True) -> PreTrainedTokenizerBase:
    model = Tokenizer(WordLevel({"<s>": 0, **{f"w{i}": i for i in range(1, size)}}, unk_token="<s>"))
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>" if bos else None)


def seen_texts(loaded: LoadedModel, **options: Any) -> tuple[InductionScores, list[torch.Tensor], list[torch.Tensor]]:
    """What is found, and the texts that the model was given: repeated ones, and those without a repetition."""
    repeated, single = [], []

    def look(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        for row in kwargs["input_ids"]:
            if len(row) > 3:
                (single if len(set(row.tolist())) == len(row) else repeated).append(row.clone())

    handle = loaded.model.register_forward_pre_hook(look, with_kwargs=True)
    found = induction_scores(loaded, **options)
    handle.remove()
    return found, repeated, single


def attentions(model: PreTrainedModel, ids: torch.Tensor) -> list[torch.Tensor]:
    """Attention of every layer, as the unmodified model hands it out: head, from, to."""
    with torch.no_grad():
        model.set_attn_implementation("eager")
        return [a[0] for a in model(ids[None], output_attentions=True, use_cache=False).attentions]


def slow_prefix_matching(attention: torch.Tensor, ids: torch.Tensor, bos: int) -> list[tuple[float, float]]:
    tokens = ids.tolist()
    length = len(set(tokens[bos:]))
    found = []
    for head in attention.tolist():
        total, before = 0.0, 0.0
        for t in range(bos + length, len(tokens)):
            for s in range(bos, t):
                if tokens[s] == tokens[t]:
                    total += head[t][s + 1]
        for t in range(bos + 1, len(tokens)):
            before += head[t][t - 1]
        found.append((total / (len(tokens) - bos - length), before / (len(tokens) - bos - 1)))
    return found


def slow_scores(model: PreTrainedModel, texts: list[torch.Tensor], bos: int) -> np.ndarray:
    """text x head x (prefix matching, previous token)"""
    return np.array([[h for a in attentions(model, ids) for h in slow_prefix_matching(a, ids, bos)] for ids in texts])


@pytest.mark.parametrize("family", FAMILIES)
def test_prefix_matching_is_a_loop_over_positions(family: str) -> None:
    loaded = wrap(tiny(family), reader(), family)
    before = loaded.model.config.to_dict(), loaded.model.config._attn_implementation
    found, repeated, _ = seen_texts(loaded, lengths=LENGTHS, repeats=REPEATS, seeds=SEEDS)
    assert (loaded.model.config.to_dict(), loaded.model.config._attn_implementation) == before
    assert len(repeated) == found.sequences == 4
    scores = slow_scores(tiny(family), repeated, 1)
    np.testing.assert_allclose(found.prefix_matching, scores.mean(0)[:, 0], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found.previous_token, scores.mean(0)[:, 1], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found.variances["prefix_matching"], scores.var(0, ddof=1)[:, 0], rtol=1e-3, atol=1e-9)
    assert np.isfinite(found.copying).all()
    assert ((found.copying >= 0) & (found.copying <= 1)).all()
    assert np.isnan(found.ov_copying).all() == (family in NO_OV)
    assert np.isnan(found.ov_copying).any() == any("OV score" in note for note in found.notes) == (family in NO_OV)


def plain_weights(projection: torch.nn.Module) -> torch.Tensor:
    """Inputs x outputs."""
    weight = projection.weight.detach()
    return weight if hasattr(projection, "nx") else weight.T


def unembedded(family: str, model: Any, written: torch.Tensor, part: LayerAnatomy) -> torch.Tensor:
    """Logits of vectors that an attention wrote, scales of norms left out; the modules by their names."""
    centred = lambda x: x - x.mean(-1, keepdim=True)  # noqa: E731
    gain: Any = {"gemma2": lambda n: 1 + n.weight}.get(family, lambda n: n.weight)
    if family in ("gemma2", "olmo2"):
        written = written * gain(part.block.post_attention_layernorm)
    if family in ("llama", "gemma2", "olmo2"):
        return written * gain(model.model.norm) @ model.lm_head.weight.T
    if family == "gpt2":
        return centred(written) * model.transformer.ln_f.weight @ model.lm_head.weight.T
    if family == "opt":
        return centred(written) * model.model.decoder.final_layer_norm.weight @ model.lm_head.weight.T
    return model.model.decoder.project_out(written) @ model.lm_head.weight.T  # OPT-350M has no final norm


def slow_copying(family: str, model: PreTrainedModel, ids: torch.Tensor) -> list[float]:
    anatomy = find_anatomy(model)
    inputs: list[torch.Tensor] = []
    handles = [p.out_proj.register_forward_pre_hook(lambda m, args: inputs.append(args[0])) for p in anatomy.layers]
    seen = attentions(model, ids)
    for handle in handles:
        handle.remove()
    found = []
    for part, attention, z in zip(anatomy.layers, seen, inputs, strict=True):
        z = z.reshape(len(ids), part.num_heads, part.d_head)
        weights = plain_weights(part.out_proj).reshape(part.num_heads, part.d_head, -1)
        for h in range(part.num_heads):
            logits = unembedded(family, model, z[:, h] @ weights[h], part)
            scores = []
            for t in range(2, len(ids)):
                view = ids[1 : t + 1]
                most = int(attention[h, t, 1 : t + 1].argmax())
                raised = relu(logits[t, view] - logits[t, view].mean())
                scores.append(float(raised[most] / raised.sum()))
            found.append(sum(scores) / len(scores))
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "opt-350m", "gemma2", "olmo2"])
def test_copying_is_a_loop_over_positions(family: str) -> None:
    loaded = wrap(tiny(family), reader(), family)
    found, _, single = seen_texts(loaded, lengths=LENGTHS, repeats=REPEATS, seeds=SEEDS)
    assert [len(ids) for ids in single] == [16, 16, 25, 25]
    model = tiny(family)
    with torch.no_grad():
        scores = np.array([slow_copying(family, model, ids) for ids in single])
    np.testing.assert_allclose(found.copying, scores.mean(0), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.halves["copying"], [scores[[0, 3]].mean(0), scores[[1, 2]].mean(0)], rtol=1e-3,
                               atol=1e-4)


def test_without_bos_copying_leaves_the_first_token_out_of_view() -> None:
    found, _, single = seen_texts(wrap(tiny("llama"), words(VOCAB, bos=False)), lengths=LENGTHS, repeats=REPEATS,
                                  seeds=SEEDS)
    assert [len(ids) for ids in single] == [15, 15, 24, 24]
    scores = np.array([slow_copying("llama", tiny("llama"), ids) for ids in single])
    np.testing.assert_allclose(found.copying, scores.mean(0), rtol=1e-3, atol=1e-4)
    assert any("no BOS token" in note for note in found.notes)


def test_layers_that_cannot_see_a_whole_text_are_told() -> None:
    options: dict[str, Any] = {"lengths": LENGTHS, "repeats": REPEATS, "seeds": 1}
    notes = induction_scores(wrap(tiny("mistral"), reader()), **options).notes
    assert any("in 2 of 2 layers sees 4 tokens at most: in the longest texts heads there reach no" in n for n in notes)
    notes = induction_scores(wrap(tiny("gemma2"), reader()), **options).notes
    assert any("attention in 1 of 2 layers" in note for note in notes)
    assert not any("layers sees" in note for note in induction_scores(wrap(tiny("llama"), reader()), **options).notes)
    assert any("layers sees" in note for note in induction_scores(wrap(tiny("gpt_neo"), reader()), **options).notes)


def slow_ov(family: str, model: Any, part: LayerAnatomy) -> list[float]:
    """All eigenvalues of the vocabulary's matrix, one row of it for every token."""
    attention, heads, width = part.attention, part.num_heads, part.d_head
    embeddings = model.get_input_embeddings().weight
    if family == "llama":
        values = attention.v_proj.weight.reshape(-1, width, part.d_model).repeat_interleave(2, 0)
        read = embeddings * part.block.input_layernorm.weight
    elif family == "gpt2":
        values = plain_weights(attention.c_attn).T[-heads * width :].reshape(heads, width, -1)
        read = (embeddings - embeddings.mean(-1, keepdim=True)) * part.block.ln_1.weight
    elif family == "gpt_neox":
        values = attention.query_key_value.weight.reshape(heads, 3, width, -1)[:, 2]
        read = (embeddings - embeddings.mean(-1, keepdim=True)) * part.block.input_layernorm.weight
    elif family == "gemma2":
        values = attention.v_proj.weight.reshape(-1, width, part.d_model).repeat_interleave(2, 0)
        read = embeddings * (1 + part.block.input_layernorm.weight)
    else:
        values = attention.v_proj.weight.reshape(heads, width, -1)
        read = model.model.decoder.project_in(embeddings)  # OPT-350M norms after the residual add
    weights = plain_weights(part.out_proj).reshape(heads, width, -1)
    found = []
    for h in range(heads):
        circuit = (unembedded(family, model, read @ values[h].T @ weights[h], part) if family != "gpt_neox" else
                   centred_neox(model, read @ values[h].T @ weights[h]))
        eigenvalues = torch.linalg.eigvals(circuit.double())
        found.append(float(eigenvalues.real.sum() / eigenvalues.abs().sum()))
    return found


def centred_neox(model: Any, written: torch.Tensor) -> torch.Tensor:
    norm = model.gpt_neox.final_layer_norm
    return (written - written.mean(-1, keepdim=True)) * norm.weight @ model.get_output_embeddings().weight.T


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2", "opt-350m"])
def test_the_ov_score_is_that_of_the_whole_vocabularys_eigenvalues(family: str) -> None:
    loaded = wrap(tiny(family), reader(), family)
    found = induction_scores(loaded, lengths=(3,), repeats=2, seeds=1)
    with torch.no_grad():
        expected = [score for part in loaded.anatomy.layers for score in slow_ov(family, loaded.model, part)]
    np.testing.assert_allclose(found.ov_copying, expected, atol=2e-3)


def test_an_output_projection_that_is_a_plain_matrix_is_read_and_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked(torch.nn.Linear):
        pass

    part = find_anatomy(tiny("opt").to(torch.bfloat16)).layers[0]
    part.out_proj.bias.data.zero_()  # in bfloat16 a bias rounds what is asked
    like = torch.zeros(1, dtype=torch.bfloat16)
    with monkeypatch.context() as asked:
        asked.setattr(part.out_proj, "__class__", Asked)
        expected = output_map(part, like)
    monkeypatch.setattr(part.out_proj, "forward", lambda *_: pytest.fail("asked"))
    assert torch.equal(output_map(part, like), expected)


def papers_prefix_matching(model: PreTrainedModel, ids: torch.Tensor, length: int) -> torch.Tensor:
    """The paper's loop, its indices as they are there."""
    seen = attentions(model, ids)
    matrix = torch.zeros(len(seen), len(seen[0]))
    for layer, attention in enumerate(seen):
        for head in range(len(attention)):
            count = 0
            for j in range(length + 1, REPEATS * length + 1):
                for repeat in range(j // length):
                    matrix[layer, head] += attention[head, j, repeat * length + j % length + 1]
                count += 1
            matrix[layer, head] /= count
    return matrix


def papers_copying(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The paper's loop for OPT: hidden states are never updated, and values are those of the current position."""
    decoder = model.model.decoder
    n = len(ids)
    positions = decoder.embed_positions(torch.ones(1, n, dtype=torch.long), 0, position_ids=torch.arange(n)[None])
    hidden = decoder.embed_tokens(ids[None]) + positions
    causal = torch.full((n, n), torch.finfo(torch.float32).min).triu(1)[None, None]
    rows = []
    for layer in decoder.layers:
        attention = layer.self_attn
        normed = layer.self_attn_layer_norm(hidden)
        probabilities = attention(normed, attention_mask=causal, output_attentions=True)[1][0]
        heads, width = attention.num_heads, attention.head_dim
        values = attention.v_proj(normed)[0].reshape(n, heads, width)
        scores = []
        for head in range(heads):
            alone = torch.zeros(n, heads, width)
            alone[:, head] = values[:, head]
            logits = softmax(model.lm_head(attention.out_proj(alone.reshape(n, -1))), -1)
            attended = torch.sort(probabilities[head], dim=1)[1][:, -1]
            total = 0.0
            for j in range(1, n):
                view = logits[j][ids[: j + 1]]
                raised = relu(view - view.mean())
                if float(raised.sum()) != 0:
                    total += float(raised[attended[j]] / raised.sum())
            scores.append(total / (n - 1))
        rows.append(torch.tensor(scores))
    return torch.stack(rows)


def test_protocol_paper_is_the_papers_loops() -> None:
    loaded = wrap(tiny("opt"), reader(), "opt")
    options = {"lengths": LENGTHS, "repeats": REPEATS, "seeds": SEEDS}
    found, repeated, single = seen_texts(loaded, protocol="paper", **options)
    model = tiny("opt")
    with torch.no_grad():
        prefix = torch.stack([papers_prefix_matching(model, ids, (len(ids) - 1) // REPEATS) for ids in repeated])
        copying = torch.stack([papers_copying(model, ids) for ids in single])
    np.testing.assert_allclose(found.prefix_matching, prefix.mean(0).reshape(-1), rtol=1e-5)
    np.testing.assert_allclose(found.variances["prefix_matching"], prefix.var(0).reshape(-1), rtol=1e-3)
    np.testing.assert_allclose(found.copying, copying.mean(0).reshape(-1), rtol=1e-3)
    np.testing.assert_allclose(found.variances["copying"], copying.var(0).reshape(-1), rtol=1e-2)
    sound = induction_scores(loaded, **options)
    assert found.protocol == "paper"
    assert (found.prefix_matching > sound.prefix_matching).all(), "attention to the first token is counted besides"
    assert np.abs(found.copying - sound.copying).max() > 0.01
    np.testing.assert_array_equal(found.ov_copying, sound.ov_copying)


def planted() -> LoadedModel:
    """Two layers without FFNs: L0H0 notes the token before, L1H0 goes where the token before is the present one.

    The residual stream has a part for the token, one for the position and one for the token before. L1H0 attends to
    its own position where nothing matches, and writes the token that it attends to.
    """
    size, places, width = 64, 56, 240
    model = GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=width, n_layer=2, n_head=2, n_positions=places,
                                       bos_token_id=0, eos_token_id=0))
    token, place, previous = 0, size, size + places
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "ln_" in name and name.endswith("weight") else 0.0)
        model.transformer.wte.weight[:, token : token + size] = torch.eye(size)
        model.transformer.wpe.weight[:, place : place + places] = torch.eye(places)
        first, second = (block.attn for block in model.transformer.h)
        queries, keys, values = (slice(i * width, (i + 1) * width) for i in range(3))
        for i in range(places - 1):
            first.c_attn.weight[:, queries][place + i + 1, i] = 3.0
            first.c_attn.weight[:, keys][place + i, i] = 3.0
        for i in range(size):
            first.c_attn.weight[:, values][token + i, i] = 1.0
            first.c_proj.weight[i, previous + i] = 0.1
            second.c_attn.weight[:, queries][token + i, i] = 4.0
            second.c_attn.weight[:, keys][previous + i, i] = 4.0
            second.c_attn.weight[:, values][token + i, i] = 1.0
            second.c_proj.weight[i, token + i] = 1.0
        for i in range(places):
            second.c_attn.weight[:, queries][place + i, size + i] = 2.5
            second.c_attn.weight[:, keys][place + i, size + i] = 2.5
    return wrap(model, words(size), "planted")


def test_a_planted_induction_head_scores_1_and_the_others_0() -> None:
    lengths, repeats = (9, 13), 4
    model = planted()
    assert all(result.holds for result in Engine.of(model).contracts), "also with heads that have no weights"
    found = induction_scores(model, lengths=lengths, repeats=repeats, seeds=3)
    prefix, copying, previous, ov = (x.reshape(2, 2) for x in (found.prefix_matching, found.copying,
                                                               found.previous_token, found.ov_copying))
    assert prefix[1, 0] > 0.95
    assert copying[1, 0] > 0.95
    assert ov[1, 0] > 0.95
    assert previous[0, 0] > 0.95
    assert max(prefix[0, 0], previous[1, 0]) < 0.1
    # A head without weights attends to all alike: to one or more of the positions 0 to t.
    alike = [np.mean([(t - 1) // n / (t + 1) for t in range(n + 1, repeats * n + 1)]) for n in lengths]
    assert max(alike) < 0.1, "near 0"
    np.testing.assert_allclose([prefix[0, 1], prefix[1, 1]], np.mean(alike), atol=1e-5)
    assert max(copying[0, 0], copying[0, 1], copying[1, 1]) < 1e-3
    assert np.isnan(ov[0, 1])
    assert found.positions[2] == (1, 0)


def trained(size: int = 48, places: int = 44) -> LoadedModel:
    """Two layers, trained to go on with random sequences that stand there again and again, each of its own length."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=size, hidden_size=64, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, bos_token_id=0))
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    position = torch.arange(places)[None]
    for _ in range(600):
        drawn = torch.rand(32, size - 1, generator=generator).argsort(1) + 1
        # Of one length, "so many back" would do.
        lengths = torch.randint(4, 20, (32, 1), generator=generator)
        ids = torch.cat([torch.zeros(32, 1, dtype=torch.long), drawn.gather(1, position % lengths)], 1)
        labels = ids.masked_fill(torch.cat([torch.ones(32, 1, dtype=torch.bool), position < lengths], 1), -100)
        loss = model(ids, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if loss.item() < 0.1:
            break
    return wrap(model, words(size), "trained")


def test_a_trained_model_grows_induction_heads() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model is slower on more
    loaded = trained()
    torch.set_num_threads(threads)
    found, control = (induction_scores(x, lengths=(8, 11), repeats=4, seeds=4) for x in (loaded, randomised(loaded, 1)))
    best = int(found.prefix_matching.argmax())
    assert found.positions[best].layer == 1
    assert found.prefix_matching[best] > 0.7
    assert found.prefix_matching[:4].max() < 0.2
    assert found.previous_token[:4].max() > 0.5
    assert found.copying[best] > 0.25
    assert found.ov_copying[best] > 0.8
    assert control.prefix_matching.max() < 0.15
    assert control.copying.max() < 0.2
    assert found.reliability["prefix_matching"] > 0.8


def test_scores_cost_one_pass_per_text_and_one_row_of_logits() -> None:
    loaded = wrap(tiny("llama"), reader(), "llama")
    assert not loaded.norms, "found once, by a pass that is no matter here"
    counts = []
    for seeds in (1, 3):
        tokens, rows, passes = list[int](), list[int](), list[int]()
        hooks = [loaded.anatomy.layers[-1].block.register_forward_pre_hook(
                     lambda module, args, seen=tokens: seen.append(args[0].shape[:2].numel())),
                 loaded.model.get_output_embeddings().register_forward_hook(
                     lambda module, args, out, seen=rows: seen.append(out.shape[:2].numel())),
                 loaded.model.register_forward_pre_hook(lambda module, args, seen=passes: seen.append(1))]
        induction_scores(loaded, lengths=LENGTHS, repeats=REPEATS, seeds=seeds)
        for hook in hooks:
            hook.remove()
        counts.append((sum(tokens), sum(rows), len(passes)))
    tokens, rows, passes = (more - few for few, more in zip(*counts, strict=True))
    assert tokens == 2 * 2 * sum(1 + REPEATS * n for n in LENGTHS), "two more texts of either kind, each seen once"
    assert rows == passes, "a single row of logits per pass, for the model's own sake"
    assert counts[0][1] < VOCAB, "what norms do, and where the residual stream ends, is found without the vocabulary"


def test_defaults_are_those_that_are_promised() -> None:
    assert (texts.LENGTHS[0], texts.LENGTHS[-1], texts.REPEATS) == (25, 223, 4)
    assert tuple(25 + 2 * i for i in range(100)) == texts.PAPER_LENGTHS
    assert {"sound": (len(texts.LENGTHS), texts.SEEDS), "paper": (100, 1)} == INDUCTION_TEXTS


def test_the_strongest_heads_of_a_real_model(smollm2: LoadedModel) -> None:
    """At lengths 25, 75 and 125; at the default's, up to 223 tokens, longer texts bring some of these lower."""
    found = induction_scores(smollm2, lengths=(25, 75, 125), seeds=1)
    best = np.argsort(found.prefix_matching)[::-1][:3]
    assert [str(found.positions[i]) for i in best] == ["L18H6", "L17H3", "L17H4"]
    np.testing.assert_allclose(found.prefix_matching[best], [0.93, 0.84, 0.81], atol=0.05)
    assert np.median(found.prefix_matching) < 0.05
    assert found.notes == ()
    assert np.isfinite(found.ov_copying).all()


@pytest.mark.parametrize("protocol", ["sound", "paper"])
def test_nothing_hangs_on_batches(protocol: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = wrap(tiny("gpt2"), reader(), "gpt2")
    options = {"lengths": LENGTHS, "repeats": REPEATS, "seeds": 5, "protocol": protocol}
    seen: list[int] = []
    together = induction_scores(loaded, progress=seen.append, **options)
    assert sum(seen) == 2 * 5 * (16 + 25)
    monkeypatch.setattr(induction, "_ENTRIES", {"cpu": 1})
    apart = induction_scores(loaded, **options)
    half = induction_scores(loaded, **{**options, "seeds": 3})
    assert half.sequences == 6
    for name in ("prefix_matching", "copying", "previous_token"):
        np.testing.assert_allclose(getattr(together, name), getattr(apart, name), atol=1e-5)
    with monkeypatch.context() as patched:
        patched.setattr(induction, "prefix_matching", failing_above(1))
        patched.setattr(induction, "_ENTRIES", {"cpu": 10**9})
        halved = induction_scores(loaded, **options)
    np.testing.assert_allclose(together.prefix_matching, halved.prefix_matching, atol=1e-6)
    other = induction_scores(loaded, seed=1, **options)
    assert np.abs(other.prefix_matching - together.prefix_matching).max() > 1e-4


def failing_above(rows: int) -> Any:
    plain = induction.prefix_matching

    def work(attention: torch.Tensor, *args: Any) -> torch.Tensor:
        if len(attention) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(attention, *args)

    return work


def test_too_little_memory_for_one_text_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(induction, "prefix_matching", failing_above(0))
    with pytest.raises(ModelError, match="one text of 16 tokens"):
        induction_scores(wrap(tiny("llama"), reader()), lengths=(5,), repeats=3)


@pytest.mark.parametrize("protocol", ["sound", "paper"])
def test_the_model_is_left_as_it_was(protocol: Any) -> None:
    loaded = wrap(tiny("llama"), reader(), "llama")
    model = loaded.model
    ids = torch.arange(4, 16)[None]
    with torch.no_grad():
        before = model(ids).logits
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    assert model.config._attn_implementation == "sdpa"
    generator = torch.random.get_rng_state()
    induction_scores(loaded, lengths=(4,), repeats=3, seeds=1, protocol=protocol)
    randomised(loaded)
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert model.config._attn_implementation == "sdpa"
    assert not model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all("forward" not in vars(m) for m in model.modules())
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 0
    assert all(torch.equal(p, weights[name]) for name, p in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


def test_the_model_is_left_as_it_was_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = wrap(tiny("falcon"), reader(), "falcon")
    monkeypatch.setattr(induction, "prefix_matching", failing_above(0))
    before = loaded.model.config._attn_implementation
    with pytest.raises(ModelError):
        induction_scores(loaded, lengths=(4,), repeats=3)
    assert loaded.model.config._attn_implementation == before
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in loaded.model.modules()) == 0


def test_one_layers_attention_is_kept_at_a_time() -> None:
    loaded = wrap(tiny_smollm2.model("llama", layers=6), tiny_smollm2.tokenizer(), "deep")
    alive, most = weakref.WeakSet(), [0]
    plain = torch.nn.functional.softmax

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        found = plain(*args, **kwargs)
        alive.add(found)
        most[0] = max(most[0], len(alive))
        return found

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.nn.functional, "softmax", watched)
        induction_scores(loaded, lengths=(20,), repeats=2, seeds=1)
    assert most[0] == 1


def test_a_model_without_attentions_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = wrap(tiny("gpt2"), reader(), "mute")
    for part in loaded.anatomy.layers:
        plain = part.attention.forward
        mute = lambda *args, plain=plain, **kwargs: (plain(*args, **kwargs)[0],)  # noqa: E731
        monkeypatch.setattr(part.attention, "forward", mute)
    with pytest.raises(ModelError, match=r"mute \(gpt2\): layer 0 hands out no attention probabilities"):
        induction_scores(loaded, lengths=(4,), repeats=3)
    assert loaded.model.config._attn_implementation == "sdpa"


def bpe(size: int = 100) -> PreTrainedTokenizerBase:
    """Merges make ab0 from a and b0, and so on; the last is made twice."""
    tokens = {"<s>": 0, "a": 1, **{f"b{i}": 2 + i for i in range(size)}}
    tokens |= {f"ab{i}": len(tokens) + i for i in range(size)}
    merges = [("a", f"b{i}") for i in range(size)]
    model = Tokenizer(BPE(tokens, merges))
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>")


def test_the_most_and_least_frequent_merges_are_left_out() -> None:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=202, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                         num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64))
    loaded = wrap(model, bpe())
    tokens, notes = usable_tokens(loaded.tokenizer, loaded.model)
    assert tokens.tolist() == list(range(106, 198))
    assert notes == []
    found, repeated, single = seen_texts(loaded, lengths=(6,), repeats=2, seeds=8)
    assert found.notes == ()
    assert all(ids[0] == 0 and ids[1:].min() >= 106 and ids[1:].max() < 198 for ids in repeated + single)
    # A model may have fewer rows than its tokenizer has tokens.
    model.resize_token_embeddings(150)
    assert usable_tokens(bpe(), model)[0].tolist() == list(range(106, 150))


def test_merges_are_read_off_a_real_tokenizer(smollm2: LoadedModel) -> None:
    tokens, notes = usable_tokens(smollm2.tokenizer, smollm2.model)
    assert notes == []
    assert 40_000 < len(tokens) < 49_152
    assert len(set(tokens.tolist())) == len(tokens)
    assert not set(tokens.tolist()) & set(smollm2.tokenizer.all_special_ids)
    known = smollm2.tokenizer.get_vocab()
    assert known["Ġthe"] not in tokens.tolist()


def test_a_tokenizer_without_bos_and_without_merges_is_noted() -> None:
    model = tiny("gpt2")
    loaded = wrap(model, words(VOCAB, bos=False), "plain")
    found, repeated, single = seen_texts(loaded, lengths=LENGTHS, repeats=REPEATS, seeds=SEEDS)
    assert len(found.notes) == 2
    assert "no BOS" in found.notes[1]
    assert "no merges" in found.notes[0]
    assert {len(ids) for ids in repeated} == {len(ids) for ids in single} == {15, 24}
    scores = slow_scores(model, repeated, 0)
    np.testing.assert_allclose(found.prefix_matching, scores.mean(0)[:, 0], rtol=1e-5)
    np.testing.assert_allclose(found.previous_token, scores.mean(0)[:, 1], rtol=1e-5)
    paper = induction_scores(loaded, lengths=LENGTHS, repeats=REPEATS, seeds=SEEDS, protocol="paper")
    assert np.isfinite(paper.copying).all()


def test_lengths_that_do_not_fit_are_left_out() -> None:
    loaded = wrap(tiny("llama"), reader())  # a window of 64, 92 tokens to draw from
    found = induction_scores(loaded, lengths=(5, 15, 16), seeds=1)
    assert found.lengths == (5, 15)
    assert "random sequences of more than 15 tokens are left out" in found.notes[-1]
    with pytest.raises(OptionError, match="no random sequence fits"):
        induction_scores(loaded)
    for options in ({"lengths": ()}, {"lengths": (1,)}, {"seeds": 0}, {"repeats": 1}):
        with pytest.raises(OptionError):
            induction_scores(loaded, **options)


def test_split_halves_are_stepped_up() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=2000)
    halves = truth + rng.normal(size=(2, 2000))
    assert split_half(halves) == pytest.approx(2 / 3, abs=0.04)  # variance 1 of 1 + 1/2
    assert split_half(np.stack([truth, truth])) == pytest.approx(1)
    assert np.isnan(split_half(np.stack([truth, np.zeros(2000)])))
    found = induction_scores(wrap(tiny("llama"), reader()), lengths=(5,), repeats=3, seeds=1)
    assert found.sequences == 1
    assert np.isnan(found.reliability["copying"])
    assert np.isnan(found.variances["copying"]).all()


def test_the_control_has_other_weights_and_the_same_shape() -> None:
    loaded = wrap(tiny("llama"), reader(), "model")
    first, again, other = randomised(loaded, 1), randomised(loaded, 1), randomised(loaded, 2)
    assert first.fingerprint == again.fingerprint
    assert len({first.fingerprint, other.fingerprint, loaded.fingerprint}) == 3
    assert first.anatomy.heads_per_layer == loaded.anatomy.heads_per_layer
    assert first.tokenizer is loaded.tokenizer
    assert any("random" in note for note in first.notes)
    assert first.model is not loaded.model
    half = wrap(tiny("llama").to(torch.bfloat16), reader())
    control = randomised(half)
    assert control.model.dtype == torch.bfloat16
    assert np.isfinite(induction_scores(control, lengths=(5,), repeats=3, seeds=1).copying).all()


def test_memory_too_small_for_the_control_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no")

    loaded = tiny_smollm2.loaded("llama")
    monkeypatch.setattr(type(loaded.model), "_from_config", full)
    with pytest.raises(ModelError, match=r"leave it out \(skip_control\)"):
        randomised(loaded)
