"""Log-likelihoods against the unmodified model, one request at a time, and against lm-eval's own backend."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from headcount.engine.encode import encode
from headcount.engine.engine import Engine
from headcount.engine.layout import probe
from headcount.engine.pack import Budget
from headcount.errors import OptionError, TaskError
from headcount.masks import Mask
from headcount.measure.evaluate import evaluate, prepare
from headcount.model.load import LoadedModel
from headcount.tasks.fewshot import FewShot
from headcount.tasks.load import get_tasks
from headcount.tasks.task import Task

TOLERANCE = 1e-4  # nats, between two ways of computing the same in float32


def slow_loglikelihood(loaded: LoadedModel, context: str, continuation: str) -> tuple[float, bool]:
    """One request, one forward pass of the model as it is."""
    (request,) = encode(loaded.tokenizer, [(context, continuation)], loaded.max_length)
    with torch.no_grad():
        logits = loaded.model(torch.from_numpy(request.ids)[None]).logits[0].float()
    logprobs = logits.log_softmax(-1)[torch.from_numpy(request.scored)]
    targets = torch.from_numpy(request.targets)
    return float(logprobs.gather(1, targets[:, None]).sum()), bool((logprobs.argmax(-1) == targets).all())


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return get_tasks(["piqa"], data=tiny.write_task(tmp_path))["piqa"]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("row_tokens", [1, 300])
def test_packed_equals_one_request_at_a_time(task: Task, family: str, k: int, row_tokens: int) -> None:
    loaded = tiny.loaded(family)
    assert Engine.of(loaded).layout.trees, Engine.of(loaded).layout.reason
    prepared = prepare(loaded, task, FewShot(k, shared=k > 0), budget=Budget(row_tokens))
    scored = Engine.of(loaded).loglikelihoods(prepared.packed)
    slow = [slow_loglikelihood(loaded, *pair) for p in prepared.prompts for pair in p.pairs]
    np.testing.assert_allclose(scored.loglikelihoods[0], [x for x, _ in slow], atol=TOLERANCE)
    assert scored.greedy[0].astype(bool).tolist() == [g for _, g in slow]
    if row_tokens > 1:
        requests = encode(loaded.tokenizer, [pair for p in prepared.prompts for pair in p.pairs], 512)
        assert prepared.tokens < sum(len(r.ids) for r in requests), "prefixes are shared"


def test_trees_in_eager_attention(task: Task) -> None:
    loaded = tiny.loaded("llama", seed=1)
    expected = evaluate(loaded, task).gold_loglikelihood
    loaded.model.set_attn_implementation("eager")
    try:
        assert probe(loaded).trees
        np.testing.assert_allclose(evaluate(loaded, task, trees=True).gold_loglikelihood, expected, atol=TOLERANCE)
    finally:
        loaded.model.set_attn_implementation("sdpa")


def test_evaluations_say_what_the_loglikelihoods_say(task: Task) -> None:
    loaded = tiny.loaded("opt")
    full = Mask.full(loaded.anatomy.heads_per_layer)
    masks = [full, full.without_heads([(0, 1), (2, 3)]), full.without_ffns([1])]
    measured = evaluate(loaded, task, masks, num_fewshot=1, limit=6)
    assert measured.correct.shape == (3, 6)
    assert measured.extra_metrics.keys() == {"acc_norm"}
    prompts = task.prompts("evaluation", FewShot(1, 6))
    slow = np.array([[slow_loglikelihood(loaded, *pair)[0] for pair in p.pairs] for p in prompts])
    gold = np.array([p.gold for p in prompts])
    np.testing.assert_allclose(measured.gold_loglikelihood[0], slow[np.arange(6), gold], atol=TOLERANCE)
    np.testing.assert_allclose(measured.margin[0], slow[np.arange(6), gold] - slow[np.arange(6), 1 - gold], atol=2e-4)
    assert measured.prediction[0].tolist() == slow.argmax(1).tolist()
    assert measured.correct[0].tolist() == (slow.argmax(1) == gold).astype(float).tolist()
    assert measured.accuracy[0] == measured.correct[0].mean()
    for i in (1, 2):
        one = evaluate(loaded, task, [masks[i]], num_fewshot=1, limit=6)
        np.testing.assert_allclose(measured.gold_loglikelihood[i], one.gold_loglikelihood[0], atol=1e-6)
        assert np.abs(measured.gold_loglikelihood[i] - measured.gold_loglikelihood[0]).max() > 1e-3


def test_results_do_not_depend_on_rows_and_batches(task: Task) -> None:
    loaded = tiny.loaded("gpt2")
    expected = evaluate(loaded, task, num_fewshot=2, trees=False, budget=Budget(None, 1, 1))
    for row_tokens, batch_tokens, trees in ((1, 1, True), (200, 64, True), (1000, 4000, True), (1, 4000, False)):
        found = evaluate(loaded, task, num_fewshot=2, trees=trees, budget=Budget(row_tokens, batch_tokens))
        np.testing.assert_allclose(found.gold_loglikelihood, expected.gold_loglikelihood, atol=TOLERANCE)
        assert (found.correct == expected.correct).all()


def test_long_prompts_are_cut_as_lm_eval_cuts_them(task: Task) -> None:
    loaded = tiny.loaded("llama")
    # Eleven shots of about 30 tokens do not fit 64.
    requests = encode(loaded.tokenizer, [p.pairs[0] for p in task.prompts("evaluation", FewShot(11))], 64)
    assert all(r.truncated and len(r.ids) == 64 for r in requests)
    whole = encode(loaded.tokenizer, [p.pairs[0] for p in task.prompts("evaluation", FewShot(11))], 512)
    for cut, full in zip(requests, whole, strict=True):
        assert cut.targets.tolist() == full.targets.tolist()
        assert cut.ids.tolist() == full.ids[-64:].tolist()


def test_encoding_follows_lm_evals_rules() -> None:
    from lm_eval.models.huggingface import HFLM

    loaded = tiny.loaded("llama")
    backend = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer)
    bos = loaded.tokenizer.decode([loaded.tokenizer.bos_token_id])
    pairs = [("hot ->", " cold"), ("hot ->  ", "cold"), ("a\n", "b c"), (f"{bos}x", " y"), ("été 🙂", " là-bas")]
    for (context, continuation), request in zip(pairs, encode(loaded.tokenizer, pairs, 512), strict=True):
        left, right = backend._encode_pair(context, continuation)
        assert request.ids.tolist() == (left + right)[:-1]
        assert request.targets.tolist() == right
    (empty,) = encode(loaded.tokenizer, [("", "x")], 512)
    assert empty.ids.tolist() == [loaded.tokenizer.bos_token_id]


def test_continuations_that_cannot_be_scored_are_refused() -> None:
    with pytest.raises(TaskError, match="no tokens"):
        encode(tiny.tokenizer(), [("context", "")], 512)
    with pytest.raises(TaskError, match="the model reads 3"):
        encode(tiny.tokenizer(), [("context", " one two three four five")], 3)


def test_a_model_that_reads_positions_off_the_column_gets_single_rows(task: Task) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    from headcount.model.load import wrap

    torch.manual_seed(0)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=len(tiny.tokenizer()), hidden_size=32, n_layer=2, n_head=4))
    loaded = wrap(bloom.eval(), tiny.tokenizer())
    assert not Engine.of(loaded).layout.trees
    slow = [slow_loglikelihood(loaded, *p.pairs[p.gold])[0] for p in task.prompts("evaluation")]
    np.testing.assert_allclose(evaluate(loaded, task).gold_loglikelihood[0], slow, atol=TOLERANCE)


def test_the_probe_refuses_a_model_whose_mask_it_cannot_steer() -> None:
    loaded = tiny.loaded("llama", seed=2)
    original = loaded.model.forward

    def deaf(*args: object, attention_mask: torch.Tensor | None = None, position_ids: object = None,
             **kwargs: object) -> object:
        """Sees everything before, whatever the mask says."""
        return original(*args, **kwargs)

    loaded.model.forward = deaf
    try:
        found = probe(loaded)
    finally:
        del loaded.model.forward
    assert not found.trees
    assert "differ" in found.reason


def test_windows_count_in_depths(task: Task) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    from headcount.model.load import wrap

    torch.manual_seed(0)
    mistral = MistralForCausalLM(MistralConfig(
        vocab_size=len(tiny.tokenizer()), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=40, max_position_embeddings=512))
    loaded = wrap(mistral.eval(), tiny.tokenizer())
    assert (Engine.of(loaded).layout.tree_mask, Engine.of(loaded).layout.tree_tokens) == ("windowed", None)
    assert mistral.config.sliding_window == 40
    for k in (0, 5):  # 5 shots exceed the window
        slow = [slow_loglikelihood(loaded, *p.pairs[p.gold])[0] for p in task.prompts("evaluation", FewShot(k))]
        np.testing.assert_allclose(evaluate(loaded, task, num_fewshot=k).gold_loglikelihood[0], slow, atol=TOLERANCE)


def test_a_fixed_window_keeps_long_requests_out_of_trees(task: Task) -> None:
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    from headcount.model.load import wrap

    torch.manual_seed(0)
    neo = GPTNeoForCausalLM(GPTNeoConfig(
        vocab_size=len(tiny.tokenizer()), hidden_size=32, num_layers=2, num_heads=4, window_size=40,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=512))
    loaded = wrap(neo.eval(), tiny.tokenizer())
    assert (Engine.of(loaded).layout.trees, Engine.of(loaded).layout.tree_tokens) == (True, 40)
    for k in (0, 5):  # 5 shots exceed the window
        prepared = prepare(loaded, task, FewShot(k))
        assert any(b.is_tree for b in prepared.batches) == (k == 0)
        slow = [slow_loglikelihood(loaded, *p.pairs[p.gold])[0] for p in task.prompts("evaluation", FewShot(k))]
        np.testing.assert_allclose(evaluate(loaded, task, num_fewshot=k).gold_loglikelihood[0], slow, atol=TOLERANCE)


def test_trees_cannot_be_asked_of_a_model_that_does_not_take_them(task: Task) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    from headcount.model.load import wrap

    bloom = BloomForCausalLM(BloomConfig(vocab_size=len(tiny.tokenizer()), hidden_size=32, n_layer=2, n_head=4))
    with pytest.raises(OptionError, match="cannot be laid out as trees"):
        evaluate(wrap(bloom, tiny.tokenizer()), task, trees=True)


def test_a_context_without_tokens_is_refused() -> None:
    class Deaf:
        """Reads nothing in blanks."""

        bos_token_id = eos_token_id = None

        def __call__(self, texts: list[str], **_: object) -> dict[str, list[list[int]]]:
            return {"input_ids": [[] if "x" not in t else [1, 2] for t in texts]}

    with pytest.raises(TaskError, match="has no tokens"):
        encode(Deaf(), [("\u200b", "x")], 10)
