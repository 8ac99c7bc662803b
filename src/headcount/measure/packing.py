"""Requests to rows: prompts are a tree, and every node of the tree is computed once.

The options of a document share its context, and with shared shots all documents share the shots. So the requests of
one or more documents form a trie of tokens. Laid out depth-first, with `end[j]` the index after the last token of
j's subtree, position i may attend to position j exactly where `j <= i < end[j]`; position ids are depths. A padding
position is a root of its own (`end[j] = j + 1`), so that no row of the mask is empty. (The idea is that of tree
attention in speculative decoding, e.g. SpecInfer, arXiv 2305.09781.)

Sorting the requests lexicographically visits the trie depth-first: what a request adds to the row is what follows
its longest common prefix with the one before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from headcount.measure.encoding import Request


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
        ids: Token ids, 0 where padded.
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
    documents: Sequence[Sequence[Request]], *, row_tokens: int, trees: bool = True, tree_tokens: int | None = None
) -> list[Row]:
    """Lay the requests of documents out in rows.

    Args:
        documents: The requests of each document; requests are numbered through, in this order.
        row_tokens: A row takes further documents up to this many nodes; it always takes one.
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
    width = row_tokens if tree_tokens is None else min(row_tokens, tree_tokens)
    return rows + [_row([r for d in group for r in d.requests], is_tree=True) for group in _level(grown, width)]


@dataclass(frozen=True, eq=False)
class _Document:
    """A document's numbered requests, its nodes alone, and the nodes it adds behind the document before it."""

    requests: Sequence[tuple[int, Request]]
    own: int
    added: int


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


def batches(rows: Iterable[Row], batch_tokens: int) -> list[Batch]:
    """Group rows of like length, so that rows x longest row stays under a number of tokens.

    Args:
        rows: The rows; the longest come first in the result.
        batch_tokens: Upper bound of padded tokens in a batch; a single row may exceed it.
    """
    grouped: list[list[Row]] = []
    for row in sorted(rows, key=lambda r: (r.is_tree, -len(r))):
        last = grouped[-1] if grouped else None
        if last and last[0].is_tree == row.is_tree and (len(last) + 1) * len(last[0]) <= batch_tokens:
            last.append(row)
        else:
            grouped.append([row])
    return [_batch(group) for group in grouped]


def _batch(rows: list[Row]) -> Batch:
    width = max(len(r) for r in rows)
    ids = np.zeros((len(rows), width), np.int64)
    depths = np.zeros_like(ids)
    ends = np.tile(np.arange(1, width + 1), (len(rows), 1))
    for i, row in enumerate(rows):
        ids[i, : len(row)], depths[i, : len(row)], ends[i, : len(row)] = row.ids, row.depths, row.ends
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
