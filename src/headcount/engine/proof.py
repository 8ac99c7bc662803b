"""Proof, on the user's own model, that what the engine does with it gives the model's own numbers: contracts 3 to 5.

3. Run block by block, sharing between masks, logits are those of the plain pass. All masks go through one plain pass,
   a row each, by gates that act row by row. A model that fails it is measured all the same, one plain pass for each
   mask.
4. Requests are scored as the model scores them. Two random requests of unlike lengths, padded into one batch, go the
   way that every measurement goes (hooks, masks, gathered positions and all arguments), and their log-likelihoods must
   equal those of one request at a time through the unmodified model, whose logits are read at all positions: with
   everything kept, and with all heads and FFNs removed, which must change something. No position may see the tokens
   behind it.
5. Gradients reach heads and FFNs: a gradient pass of the same two requests gives them scores, and not 0 to all of them.
   It is proved where gradients are wanted.

The first two contracts are in `headcount.model.contracts`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from more_itertools import peekable
from torch import Tensor
from transformers import PreTrainedModel

from headcount.engine.blocks import learned
from headcount.engine.encode import Request
from headcount.engine.examples import Examples, example_scores
from headcount.engine.forward import plain_loglikelihoods
from headcount.engine.layout import TOLERANCE
from headcount.engine.pack import Budget, batches, pack
from headcount.engine.stream import Stream, Waiting
from headcount.engine.sweep import Sweep
from headcount.masks import Mask
from headcount.model.anatomy import Anatomy, LayerAnatomy
from headcount.model.contracts import (
    FAILURES,
    PROBE_TOKENS,
    ContractResult,
    probe_tokens,
    relative_error,
    verify,
)
from headcount.model.damage import damage_blank
from headcount.model.finite import first_no_number
from headcount.model.held import in_files
from headcount.model.hooks import ablated, first_output
from headcount.model.load import LoadedModel

_SCORED = "requests are scored as the model scores them"
# With so many tokens both requests begin.
_SAME = 3


def verify_sweep(model: PreTrainedModel, anatomy: Anatomy) -> ContractResult:
    """Test contract 3: masks that part from the full model in the first, last and some middle layers, and all at once.

    Args:
        model: In eval mode.
        anatomy: Its heads and FFNs.
    """
    name = "run layer by layer, the model computes the same"
    first = probe_tokens(model)
    ids = torch.cat([first, first.flip(1)])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    rows, positions = torch.tensor([0, 1]), torch.tensor([PROBE_TOKENS // 2, PROBE_TOKENS - 1])
    masks = _parting(anatomy)
    worst, where = 0.0, ""
    try:
        with torch.no_grad():
            expected = _plain(model, anatomy, inputs, masks, rows, positions)
            for owners, logits in _by_blocks(model, anatomy, inputs, masks, rows, positions):
                for i in owners:
                    error = relative_error(logits.cpu().double(), expected[i])
                    if not error <= worst:
                        worst, where = error, f"{masks[i]}"
    except torch.OutOfMemoryError:  # says nothing of the model
        raise
    except FAILURES as failure:
        return ContractResult(name, False, float("inf"), f"blocks cannot be called by themselves ({failure})")
    holds = worst <= max(1e-5, 16 * torch.finfo(model.dtype).eps)
    return ContractResult(name, holds, worst, "" if holds else f"it does not for {where}")


class _Probe(NamedTuple):
    """The texts of contract 3."""

    inputs: dict[str, Tensor]

    @property
    def tokens(self) -> int:
        """How many positions they have."""
        return self.inputs["input_ids"].numel()


def _by_blocks(
    model: PreTrainedModel, anatomy: Anatomy, inputs: dict[str, Tensor], masks: Sequence[Mask],
    rows: Int[Tensor, " kept"], positions: Int[Tensor, " kept"],
) -> Iterator[tuple[list[int], Float[Tensor, "kept vocabulary"]]]:
    """Logits under masks by the schedule that the model needs."""
    if not in_files(model):
        yield from Sweep(model, anatomy).logits(inputs, masks, rows, positions)
        return
    stream = Stream(model, learned(model, anatomy, probe_tokens(model)))
    waves = stream.enter(peekable([Waiting(_Probe(inputs), lambda probe: probe.inputs, masks, len(masks))]))
    for _ in stream.through(waves):
        pass
    for of_wave in stream.leave(waves, [(rows, positions)]):
        yield from of_wave


def _plain(
    model: PreTrainedModel, anatomy: Anatomy, inputs: dict[str, Tensor], masks: Sequence[Mask],
    rows: Int[Tensor, " kept"], positions: Int[Tensor, " kept"],
) -> Float[Tensor, "mask kept vocabulary"]:
    """Logits under all masks from one pass of the unmodified model, in which each mask has rows of its own."""
    number, texts = len(masks), len(inputs["input_ids"])
    repeated = {name: one.repeat(number, 1) for name, one in inputs.items()}
    with _gated_rows(anatomy, [mask for mask in masks for _ in range(texts)]):
        logits = model(**repeated, use_cache=False).logits
    found: Tensor = logits.unflatten(0, (number, texts))[:, rows, positions].cpu().double()
    return found


@contextlib.contextmanager
def _gated_rows(anatomy: Anatomy, masks: Sequence[Mask]) -> Iterator[None]:
    """Zeros for what each row's mask removes: heads before the output projection, FFNs behind all that they compute."""

    def zeroed(x: Tensor, removed: Bool[np.ndarray, "row features"]) -> Tensor:
        gate = torch.from_numpy(removed)[:, None].to(x.device)
        return x.reshape(len(masks), -1, x.shape[-1]).masked_fill(gate, 0).reshape(x.shape)

    def heads_of(layer: int, part: LayerAnatomy) -> Any:
        removed = np.stack([np.repeat(~mask.heads[layer], part.d_head) for mask in masks])
        return lambda _, args: (zeroed(args[0], removed), *args[1:])

    def ffn_of(layer: int) -> Any:
        removed = np.array([[not mask.ffns[layer]] for mask in masks])

        def gate(_: torch.nn.Module, args: Any, output: Any) -> Any:
            gated = zeroed(first_output(output), removed)
            return (gated, *output[1:]) if isinstance(output, tuple) else gated

        return gate

    with contextlib.ExitStack() as hooks:
        for i, part in enumerate(anatomy.layers):
            hooks.callback(part.out_proj.register_forward_pre_hook(heads_of(i, part)).remove)
            hooks.callback(part.ffn_output.register_forward_hook(ffn_of(i)).remove)
        yield


def _parting(anatomy: Anatomy) -> list[Mask]:
    full = Mask.full(anatomy.heads_per_layer)
    last = anatomy.num_layers - 1
    masks = [full]
    for layer in sorted({0, last // 3, last // 2, max(last - 1, 0), last}):
        heads = [(layer, h) for h in range(anatomy.heads_per_layer[layer])]
        masks += [full.without_ffns([layer]), full.without_heads(heads[: (len(heads) + 1) // 2]),
                  full.without_heads(heads), full.without_heads(heads).without_ffns([layer])]
    everywhere = [(layer, 0) for layer, n in enumerate(anatomy.heads_per_layer) if n]
    return [*masks, full.without_heads(everywhere), full.without_ffns(range(0, last + 1, 2))]


def verify_scoring(loaded: LoadedModel) -> ContractResult:
    """Test contract 4: two requests scored by the engine and by the unmodified model, under two masks.

    Args:
        loaded: The model.
    """
    tried, worst, detail = "", 0.0, ""
    try:
        requests, measured = _requests(loaded), list[float]()
        for mask, how in _masks(loaded.anatomy):
            # The unmodified model: no padding, no mask, logits of all positions. Without anything, one text will do.
            alone = requests if mask.is_full else requests[:1]
            with ablated(loaded.anatomy, mask):
                tried = "reading logits of all positions, with input_ids and use_cache=False,"
                logits = [_logits(loaded, request.ids) for request in alone]
                tried = how
                scored = _scored(loaded, requests)[: len(alone)]
            expected = np.array([_of_targets(*one) for one in zip(alone, logits, strict=True)])
            if mask.is_full and (wrong := _foresight(logits[0], logits[1], loaded.model.dtype)):
                return ContractResult(_SCORED, False, float("inf"), wrong)
            with np.errstate(invalid="ignore"):  # -inf less -inf: tokens that a model masks out
                error = float(np.abs(scored - expected).max())
            # What is no number is told where it is measured, with its document.
            numbers = np.isfinite(expected).all() and np.isfinite(scored).all()
            if numbers and not error <= TOLERANCE.get(loaded.model.dtype, 1e-3):
                return ContractResult(_SCORED, False, error, f"{tried}, log-likelihoods differ by {error:.2g} from "
                                      "those of one request at a time")
            if not numbers:
                detail = f"{how} it gives no numbers, which are not compared"
            worst = max(worst, error if np.isfinite(error) else 0.0)
            measured.append(float(scored[0]))
        if np.isfinite(measured[0]) and measured[0] == measured[-1] and _branches_write(loaded):
            return ContractResult(_SCORED, False, float("inf"), "without all heads and FFNs the model gives the same "
                                  "numbers as with them: gates do not act on it")
    except torch.OutOfMemoryError:  # says nothing of the model
        raise
    except FAILURES as failure:
        return ContractResult(_SCORED, False, float("inf"), f"{tried} failed ({type(failure).__name__}: {failure})")
    return ContractResult(_SCORED, True, worst, detail)


def verify_gradients(loaded: LoadedModel) -> ContractResult:
    """Test contract 5: one gradient pass.

    Args:
        loaded: The model.
    """
    name = "gradients reach heads and FFNs"
    try:
        wrong = _gradients(loaded, _requests(loaded))
    except torch.OutOfMemoryError:  # says nothing of the model
        raise
    except FAILURES as failure:
        wrong = f"taking them failed ({type(failure).__name__}: {failure})"
    return ContractResult(name, not wrong, None, wrong)


def numbers_apart(
    model: PreTrainedModel, anatomy: Anatomy, found: Sequence[ContractResult]
) -> list[ContractResult]:
    """Contracts 1 and 2 as they were found; where one fails because the model gives no numbers, they are proved apart.

    Where heads and FFNs are does not depend on values. So NaN and infinite weights are zeros meanwhile, and FFNs, which
    may overflow, are off for contract 2 too, which is about attention. What a damaged part does to a result is told
    where it is measured; a mask that removes the part is not stopped.

    Args:
        model: The model.
        anatomy: Its heads and FFNs.
        found: What `headcount.model.contracts.verify` gave.
    """
    if all(result.holds for result in found):
        return list(found)
    try:
        finding = first_no_number(model, anatomy, probe_tokens(model)[0].cpu().numpy())
    except FAILURES:  # such a model cannot be traced
        finding = None
    if finding is None:
        return list(found)
    without_ffns = Mask([[True] * n for n in anatomy.heads_per_layer], [False] * anatomy.num_layers)
    with damage_blank(model):
        again = verify(model, anatomy)[:1]  # which takes FFNs away itself
        with ablated(anatomy, without_ffns):
            again += verify(model, anatomy)[1:]
    told = f"for random tokens it gives no numbers: it goes wrong first in {finding.text}"
    return [result if result.holds else dataclasses.replace(result, detail=told) for result in again]


def _requests(loaded: LoadedModel) -> list[Request]:
    """A longer and a shorter request of random tokens, which begin with the same ones."""
    ids = probe_tokens(loaded.model)[0].cpu().numpy()
    other = ids[_SAME + 1 :][ids[_SAME + 1 :] != ids[_SAME]][:1]
    return [Request(ids[:-1], ids[-3:]), Request(np.concatenate([ids[:_SAME], other]), ids[:1])]


def _masks(anatomy: Anatomy) -> list[tuple[Mask, str]]:
    """Masks to be tried, the full model first and nothing at all last, with what is done in words."""
    nothing = Mask([[False] * n for n in anatomy.heads_per_layer], [False] * anatomy.num_layers)
    return [(Mask.full(anatomy.heads_per_layer), "scored in a batch"), (nothing, "scored without all heads and FFNs")]


@torch.no_grad()
def _logits(loaded: LoadedModel, ids: Int[np.ndarray, " pos"]) -> Float[Tensor, "pos vocabulary"]:
    """Logits of all positions of one text."""
    logits = loaded.model(input_ids=torch.from_numpy(ids)[None].to(loaded.device), use_cache=False).logits
    if logits.dim() != 3 or tuple(logits.shape[:2]) != (1, len(ids)):
        raise ValueError(f"its logits have the shape {tuple(logits.shape)}, where each of {len(ids)} positions has to "
                         "have its own")
    found: Tensor = logits[0].double().cpu()
    return found


def _of_targets(request: Request, logits: Float[Tensor, "pos vocabulary"]) -> float:
    """A request's log-likelihood, from logits of all its positions."""
    logprobs = logits.log_softmax(-1)
    return float(sum(logprobs[position, target] for position, target in zip(request.scored, request.targets,
                                                                            strict=True)))


def _foresight(one: Float[Tensor, "_ vocabulary"], other: Float[Tensor, "_ vocabulary"], dtype: torch.dtype) -> str:
    """Says that positions see later tokens, from logits of two texts that begin alike; empty if they do not."""
    before, after = one[:_SAME], other[:_SAME]
    known = torch.isfinite(before).all(0) & torch.isfinite(after).all(0)  # a model may mask tokens out with -inf
    error = relative_error(before[:, known], after[:, known]) if known.any() else 0.0
    if error <= max(1e-4, 8 * torch.finfo(dtype).eps):
        return ""
    return (f"what follows a text changes its logits (by {error:.1e} of the largest): attention that sees later tokens "
            "reads the answers that it is to give")


def _scored(loaded: LoadedModel, requests: list[Request]) -> Float[np.ndarray, " request"]:
    """Log-likelihoods as the engine takes them, both requests in one batch."""
    budget = Budget(batch_tokens=10_000)
    return plain_loglikelihoods(loaded, batches(pack([[r] for r in requests], budget, trees=False), budget),
                                len(requests))[0]


@torch.no_grad()
def _branches_write(loaded: LoadedModel) -> bool:
    """Whether blocks change what they are given at all: where all their weights are 0, nothing can be removed."""
    seen: list[Tensor] = []

    def enter(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).detach().clone())

    def leave(module: torch.nn.Module, args: Any, output: Any) -> None:
        seen.append(first_output(output).detach().clone())

    blocks = [part.block for part in loaded.anatomy.layers]
    handles = [blocks[0].register_forward_pre_hook(enter, with_kwargs=True), blocks[-1].register_forward_hook(leave)]
    try:
        loaded.model(input_ids=probe_tokens(loaded.model), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return len(seen) != 2 or not torch.equal(seen[0].cpu(), seen[1].reshape(seen[0].shape).cpu())


def _gradients(loaded: LoadedModel, requests: list[Request]) -> str:
    """What is wrong with the scores of one gradient pass; empty if nothing is."""
    budget = Budget(batch_tokens=10_000)
    packed = batches(pack([[r] for r in requests], budget, trees=False), budget, gradients=True)
    heads, ffns = next(example_scores(loaded, [Examples(packed, len(requests))]))
    without = "heads" if not heads.any() else "FFNs" if not ffns.any() else ""
    return f"all {without} have the score 0: no gradient reaches them" if without and _branches_write(loaded) else ""
