"""Requests to rows: prompts are a tree, and every node of the tree is computed once.

The options of a document share its context, and with shared shots all documents share the shots. So the requests of
one or more documents form a trie of tokens. Laid out depth-first, with `end[j]` the index after the last token of
j's subtree, position i may attend to position j exactly where `j <= i < end[j]`; position ids are depths. A padding
position is a root of its own (`end[j] = j + 1`), so that no row of the mask is empty. (The idea is that of tree
attention in speculative decoding, e.g. SpecInfer, arXiv 2305.09781.)

Sorting the requests lexicographically visits the trie depth-first: what a request adds to the row is what follows
its longest common prefix with the one before it.

How long rows should be is a matter of cost: a long row computes what its documents share once, but attention looks at
all of it. A device's own numbers (`Cost`, measured by `headcount.engine.budget`) decide, for each task anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from headcount.engine.encode import Request
from headcount.errors import OptionError

# Lengths of rows that are tried: from one step to the next about 1.4 times as long.
_SHORTEST, _STEP = 64, 2**0.5
# So many numbers of single precision are in the longest vector registers.
_VECTOR = 16


@dataclass(frozen=True)
class Cost:
    """What a batch costs on a device, counted in tokens of a short row.

    Attributes:
        batch: What a batch costs beside its tokens.
        doubled: The length of rows at which a token costs twice as much as in a short one.
    """

    batch: float | int = 32
    doubled: float | int = 2500

    def of(self, rows: Any, width: Any) -> Any:
        """The cost of a batch of so many rows of that length; numbers, or arrays of them."""
        return self.batch + rows * width * (1 + width / self.doubled)


@dataclass(frozen=True)
class Budget:
    """How much a model is given at once.

    Attributes:
        row_tokens: A row takes further documents up to this many tokens; None: as long as it costs least.
        batch_tokens: A batch takes further rows up to this many tokens, padding included.
        gradient_tokens: The same where gradients are wanted, which keep all activations.
        longest_row: No row is made longer than this to save tokens; it may be longer than batch_tokens.
        cost: What decides where row_tokens is None, and which rows make a batch.
    """

    row_tokens: int | None = None
    batch_tokens: int = 2048
    gradient_tokens: int = 2048
    longest_row: int = 4096
    cost: Cost = Cost()

    def __post_init__(self) -> None:
        for name in ("row_tokens", "batch_tokens", "gradient_tokens", "longest_row"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name} is at least 1, not {value}")

    def limited(self, row_tokens: int | None, batch_tokens: int | None) -> Budget:
        """The same with rows as long as asked for (None: as costs least), and batches (None: as large as here).

        Where both are asked for, nothing is left of what was timed, so that all who ask for them have equal batches.
        """
        if row_tokens is not None and batch_tokens is not None:
            return Budget(row_tokens, batch_tokens, batch_tokens)
        rows = dataclasses.replace(self, row_tokens=row_tokens)
        if batch_tokens is None:
            return rows
        return dataclasses.replace(rows, batch_tokens=batch_tokens, gradient_tokens=batch_tokens)


@dataclass(frozen=True, eq=False)
class Row:
    """One row of a batch: a trie of requests laid out depth-first, or a single request.

    Attributes:
        ids: Token ids of the nodes.
        depths: How many nodes stand above each: its position id.
        ends: The index after the last node of each node's subtree.
        requests: Index, in the caller's list, of the request that each scored target belongs to.
        positions: The node at which each target is predicted.
        targets: The target tokens.
        is_tree: Whether it needs the tree mask; a single request does with the ordinary causal mask.
    """

    ids: Int[np.ndarray, " node"]
    depths: Int[np.ndarray, " node"]
    ends: Int[np.ndarray, " node"]
    requests: Int[np.ndarray, " target"]
    positions: Int[np.ndarray, " target"]
    targets: Int[np.ndarray, " target"]
    is_tree: bool

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows padded on the right to one length.

    Attributes:
        ids: Token ids, a row's first where it is padded.
        depths: Position ids.
        ends: Ends of subtrees; `j + 1` where padded.
        lengths: The rows' lengths without padding.
        requests: As in `Row`, over all rows.
        rows: The row of each target.
        positions: The position of each target in its row.
        targets: The target tokens.
        is_tree: Whether the tree mask is needed.
    """

    ids: Int[np.ndarray, "batch pos"]
    depths: Int[np.ndarray, "batch pos"]
    ends: Int[np.ndarray, "batch pos"]
    lengths: Int[np.ndarray, " batch"]
    requests: Int[np.ndarray, " target"]
    rows: Int[np.ndarray, " target"]
    positions: Int[np.ndarray, " target"]
    targets: Int[np.ndarray, " target"]
    is_tree: bool

    @property
    def tokens(self) -> int:
        """Positions that the model computes, padding included."""
        return int(self.ids.size)


def pack(
    documents: Sequence[Sequence[Request]], budget: Budget, *, trees: bool = True, tree_tokens: int | None = None
) -> list[Row]:
    """Lay the requests of documents out in rows.

    Args:
        documents: The requests of each document; requests are numbered through, in this order.
        budget: How long rows may be; a row always takes one document.
        trees: Whether prefixes are shared; otherwise every request is a row of its own.
        tree_tokens: Rows of trees have at most so many nodes (attention windows that count columns); a document of more
            is laid out request by request.
    """
    rows: list[Row] = []
    grown: list[_Document] = []
    number, before = 0, np.zeros(0, np.int64)
    for requests in documents:
        numbered = list(enumerate(requests, number))
        number += len(requests)
        own = _trie_size(requests)
        if not trees or (tree_tokens is not None and own > tree_tokens):
            rows.extend(_row([one], is_tree=False) for one in numbered)
            continue
        grown.append(_Document(numbered, own, own - _common(before, requests[0].ids)))
        before = requests[0].ids
    return rows + [_row([r for d in group for r in d.requests], is_tree=True)
                   for group in _grouped(grown, budget, tree_tokens)]


@dataclass(frozen=True, eq=False)
class _Document:
    """A document's numbered requests, its nodes alone, and the nodes it adds behind the document before it."""

    requests: Sequence[tuple[int, Request]]
    own: int
    added: int


def _grouped(
    documents: Sequence[_Document], budget: Budget, tree_tokens: int | None
) -> list[list[_Document]]:
    """Documents that make up a row: up to the length asked for, or the one of all lengths tried that costs least."""
    longest = min(tree_tokens or budget.longest_row, budget.longest_row)
    if budget.row_tokens is not None:
        return _level(documents, min(budget.row_tokens, tree_tokens or budget.row_tokens))
    if not documents:
        return []
    steps = int(np.log(max(1, longest / _SHORTEST)) / np.log(_STEP))
    tried = [_level(documents, min(longest, round(_SHORTEST * _STEP**i))) for i in range(steps + 2)]
    return min(tried, key=lambda groups: _cost_of(groups, budget))


def _cost_of(groups: Sequence[Sequence[_Document]], budget: Budget) -> float:
    lengths = sorted((_nodes(group) for group in groups), reverse=True)
    spans = _filled(lengths, budget.batch_tokens)
    return float(sum(budget.cost.of(stop - start, lengths[start]) for start, stop in spans))


def _nodes(group: Sequence[_Document]) -> int:
    return group[0].own + sum(d.added for d in group[1:])


def _level(documents: Sequence[_Document], row_tokens: int) -> list[list[_Document]]:
    """As few rows as the limit allows, and these of like length, since the shorter ones are padded."""
    groups = _fill(documents, row_tokens)
    low, high = 1, row_tokens
    while low < high:
        middle = (low + high) // 2
        fewer = _fill(documents, middle)
        if len(fewer) <= len(groups):
            groups, high = fewer, middle
        else:
            low = middle + 1
    return groups


def _fill(documents: Sequence[_Document], row_tokens: int) -> list[list[_Document]]:
    groups: list[list[_Document]] = []
    size = 0
    for document in documents:
        if groups and size + document.added <= row_tokens:
            groups[-1].append(document)
            size += document.added
        else:
            groups.append([document])
            size = document.own
    return groups


def batches(rows: Sequence[Row], budget: Budget, *, gradients: bool = False) -> list[Batch]:
    """Group rows of like length, so that rows x longest row stays under a number of tokens, and the cost is least.

    Args:
        rows: The rows; the longest come first in the result.
        budget: How many padded tokens a batch may have; a single row may exceed it.
        gradients: Whether gradients will be wanted.
    """
    limit = budget.gradient_tokens if gradients else budget.batch_tokens
    made: list[Batch] = []
    for is_tree in (False, True):
        alike = sorted((r for r in rows if r.is_tree == is_tree), key=len, reverse=True)
        spans = _cheapest(np.array([len(r) for r in alike], np.int64), limit, budget.cost)
        made += [_batch(alike[start:stop]) for start, stop in spans]
    return made


def halves(batch: Batch) -> tuple[Batch, ...]:
    """A batch as two, for memory that is too small for it: half its rows each, or half its only row's requests.

    What the requests of a row share is computed in both then. A batch of one request is returned as it is.
    """
    rows = len(batch.lengths)
    if rows > 1:
        return _part(batch, 0, rows // 2), _part(batch, rows // 2, rows)
    requests = np.unique(batch.requests)
    if len(requests) == 1 or not batch.is_tree:
        return (batch,)
    # In the order in which they stand in the row, so that neighbours stay together.
    last = [batch.positions[batch.requests == r].max() for r in requests]
    first, second = np.array_split(requests[np.argsort(last)], 2)
    return _of_requests(batch, first), _of_requests(batch, second)


def _of_requests(batch: Batch, requests: Int[np.ndarray, " some"]) -> Batch:
    """A single row's nodes that stand above some of its requests' targets."""
    own = np.isin(batch.requests, requests)
    node, ends, positions = np.arange(batch.ids.shape[1])[:, None], batch.ends[0], batch.positions[own]
    kept = ((node <= positions) & (positions < ends[:, None])).any(1)
    before = np.concatenate([[0], np.cumsum(kept)])  # kept nodes before each node
    return Batch(
        ids=batch.ids[:, kept], depths=batch.depths[:, kept], ends=before[ends][kept][None],
        lengths=np.array([kept.sum()]), requests=batch.requests[own], rows=batch.rows[own],
        positions=before[positions], targets=batch.targets[own], is_tree=True)


def _part(batch: Batch, start: int, stop: int) -> Batch:
    width = int(batch.lengths[start:stop].max())
    own = (batch.rows >= start) & (batch.rows < stop)
    return Batch(
        ids=batch.ids[start:stop, :width], depths=batch.depths[start:stop, :width],
        ends=batch.ends[start:stop, :width], lengths=batch.lengths[start:stop], requests=batch.requests[own],
        rows=batch.rows[own] - start, positions=batch.positions[own], targets=batch.targets[own],
        is_tree=batch.is_tree)


def _filled(lengths: Sequence[int], limit: int) -> list[tuple[int, int]]:
    """Spans of rows, the longest first, each as many as the limit allows."""
    spans, start = [], 0
    while start < len(lengths):
        stop = min(len(lengths), start + max(1, limit // lengths[start]))
        spans.append((start, stop))
        start = stop
    return spans


def _cheapest(lengths: Int[np.ndarray, " row"], limit: int, cost: Cost) -> list[tuple[int, int]]:
    """Spans of rows, the longest first, that cost least in sum: best[i] is the least cost of the first i rows."""
    best = np.zeros(len(lengths) + 1)
    start = np.zeros(len(lengths) + 1, np.int64)
    for stop in range(1, len(lengths) + 1):
        first = np.arange(max(0, stop - max(1, limit // lengths[stop - 1])), stop)
        first = first[((stop - first) * lengths[first] <= limit) | (first == stop - 1)]
        total = best[first] + cost.of(stop - first, lengths[first])
        chosen = int(total.argmin())
        best[stop], start[stop] = total[chosen], first[chosen]
    spans, stop = [], len(lengths)
    while stop:
        spans.append((int(start[stop]), stop))
        stop = int(start[stop])
    return spans[::-1]


def _batch(rows: list[Row]) -> Batch:
    width = max(len(r) for r in rows)
    # Without any padding rows pass no mask, and torch's kernel for that case makes zeros of a head whose queries or
    # keys are NaN, on a CPU and in rows that do not fill a vector register. NaN must stay NaN.
    if not rows[0].is_tree and width < _VECTOR and all(len(r) == width for r in rows):
        width += 1
    ids = np.zeros((len(rows), width), np.int64)
    depths = np.zeros_like(ids)
    ends = np.tile(np.arange(1, width + 1), (len(rows), 1))
    for i, row in enumerate(rows):
        ids[i, : len(row)], depths[i, : len(row)], ends[i, : len(row)] = row.ids, row.depths, row.ends
        # A token of the row's own: another one's embedding may be no number, and 0 times NaN is NaN.
        ids[i, len(row) :] = row.ids[0]
    return Batch(
        ids=ids,
        depths=depths,
        ends=ends,
        lengths=np.array([len(r) for r in rows]),
        requests=np.concatenate([r.requests for r in rows]),
        rows=np.repeat(np.arange(len(rows)), [len(r.targets) for r in rows]),
        positions=np.concatenate([r.positions for r in rows]),
        targets=np.concatenate([r.targets for r in rows]),
        is_tree=rows[0].is_tree,
    )


def _row(numbered: Sequence[tuple[int, Request]], *, is_tree: bool) -> Row:
    ids: list[int] = []
    depths: list[int] = []
    path = np.zeros(0, np.int64)  # the node at every depth of the request visited last
    before = np.zeros(0, np.int64)
    requests, positions, targets = [], [], []
    for number, request in sorted(numbered, key=lambda pair: pair[1].ids.tolist()):
        shared = _common(before, request.ids)
        path = np.concatenate([path[:shared], len(ids) + np.arange(len(request.ids) - shared)])
        ids.extend(request.ids[shared:].tolist())
        depths.extend(range(shared, len(request.ids)))
        requests.append(np.full(len(request.targets), number))
        positions.append(path[request.scored])
        targets.append(request.targets)
        before = request.ids
    return Row(
        ids=np.array(ids, np.int64),
        depths=np.array(depths, np.int64),
        ends=_ends(depths),
        requests=np.concatenate(requests),
        positions=np.concatenate(positions),
        targets=np.concatenate(targets),
        is_tree=is_tree,
    )


def _ends(depths: Sequence[int]) -> Int[np.ndarray, " node"]:
    """A node's subtree ends at the next node that is no deeper than itself."""
    ends = np.full(len(depths), len(depths), np.int64)
    open_nodes: list[int] = []
    for i, depth in enumerate(depths):
        while open_nodes and depths[open_nodes[-1]] >= depth:
            ends[open_nodes.pop()] = i
        open_nodes.append(i)
    return ends


def _trie_size(requests: Sequence[Request]) -> int:
    size, before = 0, np.zeros(0, np.int64)
    for ids in sorted((r.ids for r in requests), key=lambda x: x.tolist()):
        size += len(ids) - _common(before, ids)
        before = ids
    return size


def _common(a: Int[np.ndarray, " a"], b: Int[np.ndarray, " b"]) -> int:
    """Length of the longest common prefix."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n
