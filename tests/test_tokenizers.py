"""Encoding is lm-eval's for tokenizers of every habit: with and without BOS or pad, fast and in Python."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

import tiny
from headcount.engine.encode import encode
from headcount.engine.pack import Budget
from headcount.errors import ModelError
from headcount.measure.evaluate import evaluate
from headcount.measure.importance import gradient_importance
from headcount.model.load import LoadedModel, wrap
from headcount.tasks.fewshot import FewShot
from headcount.tasks.load import get_tasks
from parity import TOLERANCE, compare

VOCAB = 384


def fast(*, template: str | None = None, **special: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges; `template` puts special tokens around every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {token: i for i, token in enumerate(["<s>", "</s>", "<pad>", *alphabet])}
    inner = Tokenizer(models.BPE(words, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if template is not None:
        inner.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", words["<s>"]), ("</s>", words["</s>"])])
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


TOKENIZERS = {
    "bos added": lambda: fast(template="<s> $A", bos_token="<s>", eos_token="</s>", pad_token="<pad>"),
    "bos there, not added": lambda: fast(bos_token="<s>", eos_token="</s>"),
    "eos alone": lambda: fast(eos_token="</s>"),
    "eos added": lambda: fast(template="$A </s>", eos_token="</s>"),
    "both added, no pad": lambda: fast(template="<s> $A </s>", bos_token="<s>", eos_token="</s>"),
    "in Python": ByT5Tokenizer,
}
PAIRS = [
    ("The capital of France is", " Paris"),
    ("The capital of France is ", "Paris"),  # the space moves
    ("Ends with a newline\n", "next"),
    ("<s>Begins with its own beginning", " twice"),
    ("</s>Begins with the end", " too"),
    ("été 日本語 🙂", " là-bas 東京"),
    ("x", " "),
    ("tabs\t", "\tand more"),
]


def model(tokenizer: PreTrainedTokenizerBase) -> LoadedModel:
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048))
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.normal_(0, 0.15)
    return wrap(llama, tokenizer)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_pairs_are_encoded_as_lm_eval_encodes_them(kind: str) -> None:
    from lm_eval.models.huggingface import HFLM

    tokenizer = TOKENIZERS[kind]()
    backend = HFLM(pretrained=model(tokenizer).model, tokenizer=tokenizer)
    for pair, request in zip(PAIRS, encode(tokenizer, PAIRS, 2048), strict=True):
        left, right = backend._encode_pair(*pair)
        assert request.ids.tolist() == (left + right)[:-1], pair
        assert request.targets.tolist() == right, pair


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("k", [0, 2])
def test_scores_are_lm_evals(tmp_path: Path, kind: str, k: int) -> None:
    tokenizer = TOKENIZERS[kind]()
    docs = [{"context": context, "options": [continuation, " no", " not at all"], "gold": 0}
            for context, continuation in PAIRS if continuation.strip()]
    docs.append({"context": "", "options": ["after nothing", "a"], "gold": 1})
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    loaded = model(tokenizer)
    task = get_tasks([str(path)], examples_split="validation")["pairs"]
    found = compare(loaded, task, k, len(docs))
    assert found.worst < TOLERANCE
    assert set(found.different) <= set(found.close)
    scores = gradient_importance(loaded, task, FewShot(k))["head"].scores["position"]
    assert np.isfinite(scores).all()
    assert (scores > 0).all()


def test_a_tokenizer_that_ends_texts_is_noted() -> None:
    """lm-eval's rule then takes the continuation's first token for the context's end: so do we, and say so."""
    notes = {kind: model(make()).notes for kind, make in TOKENIZERS.items()}
    noted = {kind for kind, found in notes.items() if any("ends every text" in note for note in found)}
    assert noted == {"eos added", "both added, no pad", "in Python"}


def test_an_empty_context_needs_a_beginning_or_an_end() -> None:
    with pytest.raises(ModelError, match="neither"):
        encode(fast(), [("", "word")], 100)
    assert encode(fast(eos_token="</s>"), [("", "a")], 100)[0].ids.tolist() == [1]
    assert encode(fast(bos_token="<s>"), [("", "a")], 100)[0].ids.tolist() == [0]
    # A continuation that brings the beginning along is not given a second one.
    begun = encode(fast(bos_token="<s>"), [("", "<s>a")], 100)[0]
    assert (begun.ids.tolist(), len(begun.targets)) == ([0], 1)


def test_a_beginning_added_by_the_caller_is_not_doubled() -> None:
    tokenizer = TOKENIZERS["bos added"]()
    once, by_hand = encode(tokenizer, [("hot ->", " cold"), ("<s>hot ->", " cold")], 100)
    assert once.ids.tolist() == by_hand.ids.tolist()
    assert once.ids.tolist().count(0) == 1


def test_results_do_not_depend_on_the_padding(tmp_path: Path) -> None:
    """Rows are padded with id 0 whatever the tokenizer pads with: nothing attends to it."""
    loaded = model(TOKENIZERS["bos there, not added"]())
    assert loaded.tokenizer.pad_token is None
    task = get_tasks(["piqa"], data=tiny.write_task(tmp_path))["piqa"]
    alone = evaluate(loaded, task, budget=Budget(None, 1, 1), trees=False)
    together = evaluate(loaded, task, budget=Budget(None, 100_000, 100_000), trees=False)
    np.testing.assert_allclose(together.gold_loglikelihood, alone.gold_loglikelihood, atol=2e-4)
