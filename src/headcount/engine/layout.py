"""Whether a model's prompts may be laid out as token trees: a probe tells, never the model's name.

One random tree is scored as a tree and request by request; the two must agree. Attention windows are too long to be
exceeded by a short probe (4,096 tokens and more), so during the probe the window in the model's config, from which
transformers makes its masks, is cut to 8 tokens. Three ways of handing the tree's mask over are tried: one mask per
type of layer, one mask with the window counted in depths, one mask without. A model that agrees with none of them
(ALiBi reads positions off the column, GPT-Neo keeps its window in a buffer) gets one request a row. What modules have
copied from the config is not cut (windows in buffers, the number of keys that sparse attention chooses): where the tree
agrees, rows of trees stay within that.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from transformers import PreTrainedConfig, PreTrainedModel

from headcount.engine.encode import Request
from headcount.engine.forward import plain_loglikelihoods
from headcount.engine.pack import Budget, batches, pack
from headcount.engine.treemask import TreeMask
from headcount.model.attention import embedded_tokens
from headcount.model.fingerprint import code_of
from headcount.model.load import LoadedModel

# Trees and single rows must agree in log-likelihood, in nats: relative to what the type can hold.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6, torch.bfloat16: 0.3, torch.float16: 0.05}
_LONGEST = 24
_PROBE = Budget(row_tokens=10_000, batch_tokens=10_000)
_WINDOW = 8
# Windows that transformers reads from the config whenever it makes a mask; one that GPT-Neo reads once, and numbers of
# keys up to which sparse attention chooses none (index_topk) or has one block (MiniMax-M3), read once too.
_WINDOWS = ("sliding_window", "attention_chunk_size")
_FIXED_WINDOWS = ("window_size", "index_topk", "index_block_size")
# Families whose positions a tree would change: ALiBi reads them off the column, GPT-Neo's windows lie in buffers.
_SINGLE_ROWS = ("bloom", "gpt_neo", "mpt", "openai-gpt")
_LIBRARIES = ("torch", "transformers")
# What models raise that know no such mask.
_REFUSALS = (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError, NotImplementedError)


@dataclass(frozen=True)
class Layout:
    """How requests are laid out for a model.

    Attributes:
        trees: Whether requests share prefixes in token trees; otherwise each is a row of its own.
        reason: Why.
        tree_mask: How the model takes the mask of a tree.
        tree_tokens: Rows of trees are not longer than this: the attention window, where the mask does not carry it.
    """

    trees: bool
    reason: str
    tree_mask: TreeMask = "plain"
    tree_tokens: int | None = None

    def __str__(self) -> str:
        return f"{'token trees' if self.trees else 'one request a row'}: {self.reason}"


def probe(loaded: LoadedModel, seed: int = 0) -> Layout:
    """How a model's requests are laid out: one random tree is scored as a tree and request by request, and compared.

    The tree has two documents, a context and options of several lengths in each; its longest branch exceeds the
    window, which is cut short meanwhile.
    """
    if "position_ids" not in inspect.signature(loaded.model.forward).parameters:
        return Layout(False, "the model takes no position_ids")
    classes = {type(module) for module in loaded.model.modules()}
    if own := code_of(cls for cls in classes if cls.__module__.partition(".")[0] not in _LIBRARIES):
        # Such as a window of its own, by columns, that is longer than the probe.
        return Layout(False, f"what code of its own ({own[0].partition(' ')[0]}) does in longer rows is not known")
    if str(loaded.model.config.get_text_config()._attn_implementation).startswith("flex"):
        # It takes masks of its own kind, and ends the process where it is given another.
        return Layout(False, "FlexAttention takes no tree's mask")
    text = loaded.model.config.get_text_config()
    windows = [int(getattr(text, name)) for name in _WINDOWS if _is_window(getattr(text, name, None))]
    fixed = [int(getattr(text, name)) for name in _FIXED_WINDOWS if _is_window(getattr(text, name, None))]
    kinds: tuple[TreeMask, ...] = ("by type", "windowed", "plain") if windows else ("plain",)
    differences: dict[TreeMask, float] = {}
    refusal = ""
    with _short_windows(loaded):
        documents, expected = _alone(loaded, seed)
        if not np.isfinite(expected).all():
            return Layout(False, "the model's log-likelihoods of random tokens are no numbers")
        tree = batches(pack(documents, _PROBE), _PROBE)
        for kind in kinds:
            try:
                in_a_tree, _ = plain_loglikelihoods(loaded, tree, len(expected), tree_mask=kind)
            except _REFUSALS as error:
                refusal = type(error).__name__
            else:
                differences[kind] = float(np.nan_to_num(np.abs(in_a_tree - expected).max(), nan=np.inf))
    if not differences:
        return Layout(False, f"the model does not take a tree's mask ({refusal})")
    best = min(differences, key=differences.__getitem__)
    if differences[best] > TOLERANCE.get(loaded.model.dtype, 1e-3):
        return Layout(False, f"a tree's log-likelihoods differ from single rows' by {differences[best]:.2g}")
    return _agreed(best, differences[best], windows, fixed)


def expected_layout(model: PreTrainedModel) -> Layout:
    """What the probe will find of a model without weights: what it found of the families that it was tried on."""
    config = model.config.get_text_config()
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return Layout(False, "the model takes no position_ids")
    if code_of(cls for cls in {*map(type, model.modules())} if cls.__module__.partition(".")[0] not in _LIBRARIES):
        return Layout(False, "code of its own is laid out so")
    if config.model_type in _SINGLE_ROWS or getattr(config, "alibi", False):
        return Layout(False, f"the probe finds so of {config.model_type}")
    if str(config._attn_implementation).startswith("flex"):
        return Layout(False, "FlexAttention takes no tree's mask")
    fixed = [int(getattr(config, name)) for name in _FIXED_WINDOWS if _is_window(getattr(config, name, None))]
    return Layout(True, "as the probe finds of nearly all families", tree_tokens=min(fixed, default=None))


def _agreed(kind: TreeMask, difference: float, windows: Sequence[int], fixed: Sequence[int]) -> Layout:
    reason = f"a tree's log-likelihoods equal single rows' to {max(difference, 1e-7):.0e}"
    # Without a window in its mask, either the model does not use its window or it was not cut short. Such a window may
    # count columns, not depths: rows stay shorter than it.
    unheeded = [*fixed, *(windows if kind == "plain" else [])]
    if kind != "plain":
        reason += f"; windows of {', '.join(map(str, windows))} tokens count in depths"
    if unheeded:
        reason += f"; rows of trees stay within the window of {min(unheeded)} tokens"
    return Layout(True, reason, kind, min(unheeded, default=None))


def _alone(loaded: LoadedModel, seed: int) -> tuple[list[list[Request]], Float[np.ndarray, " request"]]:
    """The probe's documents, and their log-likelihoods request by request.

    Single tokens may have no numbers (a padded vocabulary that is masked out with -inf, a damaged embedding), which
    tells nothing of layouts: where the first draw meets one, they are left out of a second.
    """
    tokens = np.arange(int(loaded.model.config.get_text_config().vocab_size))
    for _ in range(2):
        documents = _documents(loaded, np.random.default_rng(seed), tokens)
        rows = batches(pack(documents, _PROBE, trees=False), _PROBE)
        expected, _ = plain_loglikelihoods(loaded, rows, sum(map(len, documents)))
        if np.isfinite(expected).all():
            break
        tokens = _with_numbers(loaded, tokens)
        if not len(tokens):
            break
    return documents, expected


@torch.no_grad()
def _with_numbers(loaded: LoadedModel, tokens: Int[np.ndarray, " token"]) -> Int[np.ndarray, " kept"]:
    """Those of the tokens whose embeddings are numbers, and whose logits are."""
    known = np.intersect1d(tokens, embedded_tokens(loaded.model))
    logits = loaded.model(input_ids=torch.from_numpy(known[None, :_LONGEST]).to(loaded.device), use_cache=False).logits
    return np.intersect1d(known, torch.nonzero(torch.isfinite(logits[0]).all(0)).flatten().cpu().numpy())


def _documents(
    loaded: LoadedModel, rng: np.random.Generator, tokens: Int[np.ndarray, " token"]
) -> list[list[Request]]:
    longest = min(loaded.max_length, _LONGEST)

    def ids(n: int) -> Int[np.ndarray, " pos"]:
        return tokens[rng.integers(0, len(tokens), n)]

    documents = []
    for context in (ids(longest // 2), ids(longest // 3)):
        options = [ids(n) for n in (1, 2, longest - len(context) - 1)]
        documents.append([Request(np.concatenate([context, o])[:-1], o) for o in options])
    return documents


@contextlib.contextmanager
def _short_windows(loaded: LoadedModel) -> Iterator[None]:
    """Cut the windows in the model's configs to 8 tokens."""
    modules = (getattr(module, "config", None) for module in loaded.model.modules())
    configs = {id(c): c for c in (*modules, loaded.model.config.get_text_config()) if isinstance(c, PreTrainedConfig)}
    before = [(c, name, getattr(c, name)) for c in configs.values() for name in _WINDOWS
              if _is_window(getattr(c, name, None))]
    try:
        for config, name, _ in before:
            setattr(config, name, _WINDOW)
        yield
    finally:
        for config, name, value in before:
            setattr(config, name, value)


def _is_window(value: object) -> bool:
    return isinstance(value, int) and value > 0
