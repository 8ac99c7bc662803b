"""One engine per loaded model: requests and masks go in, log-likelihoods and gradient scores come out.

The engine owns what must be found out about a model before it can be run well, and finds each out when it is first
needed: how prompts are laid out (`probe`, when they are first packed), what rows and batches cost on the device (timed
when a budget is wanted and none is given), and whether the model can be run layer by layer (contract 3, proved when
more than one mask is first swept). Before all that it proves that heads and FFNs are where the anatomy says (contracts
1 and 2) and that requests are scored as the model scores them (contract 4), and before gradients that these reach heads
and FFNs (contract 5): nothing is measured on a model that fails one of these, whoever asks. On a device that is not the
CPU it compares the logits of a few tokens with the CPU's, once (`headcount.engine.device_check`), and warns.
"""

from __future__ import annotations

import dataclasses
import functools
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from headcount.engine import budget as budgets
from headcount.engine import neighbours
from headcount.engine.device_check import DeviceCheck, device_check
from headcount.engine.encode import Request
from headcount.engine.examples import Examples, ExampleScores, example_scores
from headcount.engine.forward import (
    Progress,
    Sums,
    Targets,
    Told,
    in_memory,
    logprobs_of,
    places_of,
    plain_loglikelihoods,
)
from headcount.engine.layout import Layout, probe
from headcount.engine.likelihoods import Likelihoods, Packed, Wanted, streamed_likelihoods
from headcount.engine.pack import Batch, Budget, Cost, batches, pack
from headcount.engine.proof import numbers_apart, verify_gradients, verify_scoring, verify_sweep
from headcount.engine.stream import stream_of
from headcount.engine.sweep import Sweep
from headcount.engine.treemask import model_inputs
from headcount.errors import DeviceWarning, ModelError, OptionError
from headcount.masks import Mask, layers_run
from headcount.model.contracts import ContractResult, probe_tokens, verify
from headcount.model.finite import first_no_number
from headcount.model.hooks import ablated, lifted
from headcount.model.load import LoadedModel


class Engine:
    """Runs a loaded model on requests, under masks or for gradients.

    `Engine.of(loaded)` is the one engine of a loaded model; making another finds everything out again.

    Args:
        loaded: The model.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        # A copy of the record, not of the model: the record keeps the engine, and a circle of the two would keep a
        # model in memory that nobody uses any more, until Python looks for circles.
        self._loaded = dataclasses.replace(loaded)

    @classmethod
    def of(cls, loaded: LoadedModel) -> Engine:
        """The engine of a loaded model, made when it is first asked for, and gone with the model."""
        engine = loaded.kept.get(cls)
        if not isinstance(engine, Engine):
            engine = loaded.kept[cls] = cls(loaded)
        return engine

    @functools.cached_property
    def layout(self) -> Layout:
        """How this model's requests are laid out, found out by `probe`."""
        self.prove()
        return probe(self._loaded)

    @functools.cached_property
    def contracts(self) -> list[ContractResult]:
        """Contracts 1, 2 and 4, proved when first asked for; the last only where the others hold."""
        with lifted(self._loaded.model):
            found = numbers_apart(self._loaded.model, self._loaded.anatomy, verify(self._loaded))
            return [*found, verify_scoring(self._loaded)] if all(result.holds for result in found) else found

    @functools.cached_property
    def gradient_contract(self) -> ContractResult:
        """Contract 5, proved when first asked for: whether gradients reach heads and FFNs."""
        with lifted(self._loaded.model):
            return verify_gradients(self._loaded)

    @functools.cached_property
    def device_check(self) -> DeviceCheck | None:
        """How far the device's logits are from the CPU's, found when first asked for; None on the CPU."""
        with lifted(self._loaded.model):
            return device_check(self._loaded)

    @property
    def notes(self) -> tuple[str, ...]:
        """To be shown beside every result, with the model's own: what its device computes otherwise than the CPU."""
        return tuple(filter(None, [self.device_check.note if self.device_check is not None else ""]))

    def prove(self, *, gradients: bool = False) -> None:
        """Prove, once, that this model is measured right; warn, once, where its device computes other logits.

        Args:
            gradients: Whether gradients are wanted, too.

        Raises:
            ModelError: If a contract fails, memory is too small for the proof, or torch is in a mode in which the model
                computes something else.
        """
        self._check_mode()
        if torch.is_inference_mode_enabled():
            raise ModelError("torch.inference_mode is on, and nothing can be proved without gradients: measure outside "
                             "of it")
        try:
            failed = next((result for result in self.contracts if not result.holds), None)
            if failed is None and gradients and not self.gradient_contract.holds:
                failed = self.gradient_contract
        except torch.OutOfMemoryError as error:
            raise ModelError(f"memory is too small to check {self._loaded.name}: gradients of one short pass need all "
                             "its weights on their devices; use more or larger ones, or a smaller dtype") from error
        if failed is not None:
            name, in_memory = self._loaded.name, self._loaded.provenance["source"] == "memory"
            more = "" if in_memory else f"; headcount anatomy {name} --verify shows all checks"
            raise ModelError(f"{name} cannot be measured: it fails the check '{failed.name}' ({failed.detail}){more}",
                             fields=("dtype",))
        if "device_check" not in vars(self):
            for note in self.notes:
                warnings.warn(f"{self._loaded.name}: {note}", DeviceWarning, stacklevel=2)

    @functools.cached_property
    def sweep_contract(self) -> ContractResult:
        """Contract 3, proved when first asked for: whether the model can be run layer by layer."""
        return verify_sweep(self._loaded.model, self._loaded.anatomy)

    def no_numbers(self) -> str:
        """Where the model goes wrong with random tokens, and why; empty where it gives numbers."""
        finding = first_no_number(self._loaded.model, self._loaded.anatomy,
                                  probe_tokens(self._loaded.model)[0].cpu().numpy())
        return "" if finding is None else finding.text

    @property
    def masks_reason(self) -> str | None:
        """How several masks are run, and why; None while no sweep was needed and contract 3 is not proved."""
        return self.prove_sweep() if "sweep_contract" in vars(self) else None

    def prove_sweep(self) -> str:
        """How several masks are run, and why; proves contract 3 where that is not done yet."""
        if self.sweep_contract.holds:
            return "layers before the first difference are shared"
        return f"one forward pass each: {self.sweep_contract.detail}"

    @property
    def device_key(self) -> str:
        """What timings depend on: device, threads, version, shape, type and attention kernel."""
        return budgets.device_key(self._loaded)

    def budget(self, row_tokens: int | None = None, batch_tokens: int | None = None) -> Budget:
        """What this model is given at once on its device.

        Args:
            row_tokens: Rows take documents up to this many tokens; None: as long as it costs least.
            batch_tokens: Batches take rows up to this many tokens, for gradients too; None: what was found.
        """
        found = self._budget if row_tokens is None or batch_tokens is None else Budget()  # which need not be timed
        return found.limited(row_tokens, batch_tokens)

    def pack(
        self, requests_by_document: Sequence[Sequence[Request]], budget: Budget | None = None,
        trees: bool | None = None,
    ) -> Packed:
        """Requests laid out in rows and batches; they are numbered through, document by document.

        Args:
            requests_by_document: The requests of each document.
            budget: How long rows and how large batches may be; None takes `Engine.budget`.
            trees: Whether requests share their prefixes in token trees; None takes `Engine.layout`.

        Raises:
            OptionError: If trees are asked for that this model does not take.
        """
        self._check_mode()
        layout = self.layout
        requests = [request for requests in requests_by_document for request in requests]
        self._check_ids(requests)
        self._check_lengths(requests)
        if trees and not layout.trees:
            raise OptionError(f"this model's prompts cannot be laid out as trees: {layout.reason}")
        if trees is not None:
            layout = dataclasses.replace(layout, trees=trees, reason="asked for")
        budget = budget or self.budget()
        rows = pack(requests_by_document, budget, trees=layout.trees, tree_tokens=layout.tree_tokens)
        return Packed(tuple(batches(rows, budget)), layout, sum(map(len, requests_by_document)))

    def loglikelihoods(
        self, requests: Packed | Sequence[Sequence[Request]], masks: Sequence[Mask] | None = None, *,
        columns: int | None = None, progress: Progress | None = None,
    ) -> Likelihoods:
        """Log-likelihoods of every request under every mask: by layer sweep where the model allows it.

        Args:
            requests: The requests of each document, or what `pack` made of them.
            masks: What is kept, one row of results each; None runs the full model.
            columns: The first so many logits are normalised over, and searched for the most probable; None takes all.
            progress: Called with so many more tokens, of all masks together; the sum is that of the packed tokens,
                times the number of masks, also where batches are halved for want of memory.

        Raises:
            ModelError: If memory is too small for one request.
        """
        packed = requests if isinstance(requests, Packed) else self.pack(requests)
        masks = masks or [Mask.full(self._loaded.anatomy.heads_per_layer)]
        return next(self.loglikelihoods_of([Wanted(packed, masks, columns, progress)]))

    def loglikelihoods_of(self, wanted: Iterable[Wanted]) -> Iterator[Likelihoods]:
        """Log-likelihoods of each, in the order given, as soon as they are known.

        Where weights are read block by block, what is wanted shares readings of them: it is asked for as there is room.

        Raises:
            ModelError: If memory is too small for one request.
        """
        self._check_mode()
        stream = stream_of(self._loaded)
        if stream is not None and self.sweep_contract.holds:
            yield from streamed_likelihoods(self._loaded, stream, wanted)
            return
        for one in wanted:
            swept = len(one.masks) > 1 and self.sweep_contract.holds
            yield (self._swept if swept else self._one_by_one)(one.packed, one.masks, one.columns, one.progress)

    def gradients(
        self, requests: Sequence[Request], *, budget: Budget | None = None, progress: Progress | None = None
    ) -> ExampleScores:
        """Gradient scores of every head and FFN for every request, which is scored in a row of its own.

        Args:
            requests: The examples.
            budget: How large batches may be; None takes `Engine.budget`.
            progress: Called with the number of tokens after each batch.

        Raises:
            ModelError: If memory is too small for one request.
        """
        return next(self.gradients_of([self.examples(requests, budget, progress)]))

    def examples(
        self, requests: Sequence[Request], budget: Budget | None = None, progress: Progress | None = None
    ) -> Examples:
        """Requests laid out for gradients; the arguments are those of `gradients`."""
        self._check_ids(requests)
        self._check_lengths(requests)
        budget = budget or self.budget()
        packed = batches(pack([[r] for r in requests], budget, trees=False), budget, gradients=True)
        return Examples(packed, len(requests), progress)

    def gradients_of(self, wanted: Iterable[Examples]) -> Iterator[ExampleScores]:
        """Gradient scores of each, in the order given, as soon as they are known; readings are shared as above.

        Raises:
            ModelError: If memory is too small for one request.
        """
        self.prove(gradients=True)
        return example_scores(self._loaded, wanted)

    def _check_mode(self) -> None:
        """Refuse a mode in which the model computes something else."""
        if torch.is_autocast_enabled(self._loaded.device.type):
            raise ModelError("torch.autocast is on, and the model would compute in other types than its own: measure "
                             "outside of it, or load the model in the type that is wanted")

    def _check_ids(self, requests: Sequence[Request]) -> None:
        """Refuse tokens that the model has no embedding for."""
        embeddings: Any = self._loaded.model.get_input_embeddings()
        rows = int(embeddings.weight.shape[0])
        for request in requests:
            beyond = [int(i) for i in (*request.ids, *request.targets) if i >= rows] if max(
                request.ids.max(), request.targets.max()) >= rows else []
            if beyond:
                token = self._loaded.tokenizer.decode([beyond[0]])
                raise ModelError(f"the tokenizer writes {token[:40]!r} as token {beyond[0]}, and {self._loaded.name} "
                                 f"has embeddings of {rows} tokens: the tokenizer is not this model's")

    def _check_lengths(self, requests: Sequence[Request]) -> None:
        """Refuse texts of which some switch the rotary frequencies: they do so for the whole batch (longrope)."""
        config = self._loaded.model.config.get_text_config()
        said = getattr(config, "rope_parameters", None) or {}
        kinds = [one for one in (said, *said.values()) if isinstance(one, dict) and one.get("rope_type") == "longrope"]
        lengths = [len(request.ids) for request in requests]
        for kind in kinds:
            switch = kind.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None)
            if switch and lengths and min(lengths) <= switch < max(lengths):
                raise ModelError(f"{self._loaded.name} reads texts of more than {switch} tokens with other rotary "
                                 "frequencies (longrope), and shorter ones in the same batch, too; here are texts of "
                                 f"{min(lengths)} to {max(lengths)} tokens: take fewer shots, or tasks whose texts are "
                                 "all on one side")

    def speed(self, packed: Packed) -> neighbours.Speed:
        """How fast packed requests go through the full model, and how busy others kept the cores meanwhile."""
        with neighbours.watch(budgets.threads_of(self._loaded)) as load:
            started = time.perf_counter()
            self.loglikelihoods(packed)
            seconds = time.perf_counter() - started
        return neighbours.Speed(packed.tokens / seconds, load)

    @functools.cached_property
    def _budget(self) -> Budget:
        cost: Cost | None = budgets.kept_cost(self._loaded)
        return budgets.budget_for(self._loaded, budgets.timed_cost(self._loaded, self.layout) if cost is None else cost)

    @functools.cached_property
    def _sweep(self) -> Sweep:
        """Kept with what it learns of the model's outputs in a pass of its own."""
        return Sweep(self._loaded.model, self._loaded.anatomy)

    @torch.no_grad()
    def _one_by_one(
        self, packed: Packed, masks: Sequence[Mask], columns: int | None, progress: Progress | None
    ) -> Likelihoods:
        results = []
        for mask in masks:
            with ablated(self._loaded.anatomy, mask):
                results.append(plain_loglikelihoods(
                    self._loaded, packed.batches, packed.num_requests, tree_mask=packed.layout.tree_mask,
                    columns=columns, progress=progress))
        layer_tokens = layers_run(masks, shared=False) * packed.tokens
        return Likelihoods(np.stack([x for x, _ in results]), np.stack([g for _, g in results]), layer_tokens)

    @torch.no_grad()
    def _swept(
        self, packed: Packed, masks: Sequence[Mask], columns: int | None, progress: Progress | None
    ) -> Likelihoods:
        sweep, layer_tokens = self._sweep, 0
        sums, told = Sums(len(masks), packed.num_requests), Told(progress, len(masks))

        def swept(batch: Batch) -> tuple[list[tuple[list[int], Targets]], int]:
            """Targets and the masks that they belong to, and the positions that layers computed for them."""
            before, parts, done = sweep.layer_tokens, [], 0
            rows, positions, which = places_of(batch, self._loaded.device)
            inputs = model_inputs(self._loaded, batch, packed.layout.tree_mask)
            for members, logits in sweep.logits(inputs, masks, rows, positions):
                parts.append((members, logprobs_of(logits, batch, which, columns)))
                done += len(members)
                told.done_for(done)
            return parts, sweep.layer_tokens - before

        for batch, (parts, computed) in in_memory(packed.batches, swept, told):
            layer_tokens += computed  # of a batch that memory was too small for, its halves' alone
            for members, targets in parts:
                sums.add(members, batch, targets)
        return Likelihoods(*sums.totals(), layer_tokens)
