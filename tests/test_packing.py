"""Token trees against a trie built node by node."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from headcount.engine.encode import Request
from headcount.engine.pack import Budget, Cost, batches, halves, pack

ids = st.lists(st.integers(0, 2), min_size=2, max_size=7)
documents = st.lists(st.lists(ids.flatmap(lambda x: st.tuples(st.just(x), st.integers(1, len(x) - 1))), min_size=1,
                              max_size=4), min_size=1, max_size=5)


def requests(drawn: list[list[tuple[list[int], int]]]) -> list[list[Request]]:
    return [[Request(np.array(x[:-1]), np.array(x[len(x) - n :])) for x, n in doc] for doc in drawn]


@given(documents, st.integers(1, 20))
def test_every_node_sees_its_ancestors_and_nothing_else(drawn: list[list[tuple[list[int], int]]], width: int) -> None:
    docs = requests(drawn)
    flat = [r for doc in docs for r in doc]
    seen: dict[int, list[tuple[int, int]]] = {}
    for row in pack(docs, Budget(row_tokens=width)):
        n = len(row)
        for i in range(n):
            ancestors = [j for j in range(n) if j <= i < row.ends[j]]
            assert len(ancestors) == row.depths[i] + 1
            assert [row.depths[j] for j in ancestors] == list(range(len(ancestors)))
        for number, position, target in zip(row.requests, row.positions, row.targets, strict=True):
            path = [int(row.ids[j]) for j in range(n) if j <= position < row.ends[j]]
            request = flat[number]
            assert path == request.ids[: len(path)].tolist(), "the path to a target is the request's beginning"
            seen.setdefault(int(number), []).append((len(path), int(target)))
    for number, request in enumerate(flat):
        start = len(request.ids) - len(request.targets) + 1
        expected = [(start + i, int(t)) for i, t in enumerate(request.targets)]
        assert sorted(seen[number]) == expected, "every target once, at its place"


@given(documents)
def test_one_wide_row_holds_every_prefix_once(drawn: list[list[tuple[list[int], int]]]) -> None:
    docs = requests(drawn)
    (row,) = pack(docs, Budget(row_tokens=10_000))
    prefixes = {tuple(r.ids[:n].tolist()) for doc in docs for r in doc for n in range(1, len(r.ids) + 1)}
    assert len(row) == len(prefixes)


@given(documents, st.integers(1, 12))
def test_without_trees_every_request_is_a_plain_row(drawn: list[list[tuple[list[int], int]]], depth: int) -> None:
    docs = requests(drawn)
    flat = [r for doc in docs for r in doc]
    rows = pack(docs, Budget(row_tokens=100), trees=False)
    assert [r.ids.tolist() for r in rows] == [r.ids.tolist() for r in flat]
    assert not any(r.is_tree for r in rows)
    for row in pack(docs, Budget(row_tokens=100), tree_tokens=depth):
        assert not row.is_tree or len(row) <= depth


@given(documents, st.integers(1, 40))
def test_batches_hold_the_rows_and_their_budget(drawn: list[list[tuple[list[int], int]]], budget: int) -> None:
    rows = pack(requests(drawn), Budget(row_tokens=8))
    made = batches(rows, Budget(batch_tokens=budget))
    assert sum(len(b.lengths) for b in made) == len(rows)
    for batch in made:
        assert batch.tokens <= budget or len(batch.lengths) == 1
        for i, length in enumerate(batch.lengths):
            padding = np.arange(length, batch.ids.shape[1])
            assert (batch.ends[i, length:] == padding + 1).all(), "padding sees itself"
            assert (batch.ends[i, :length] <= length).all(), "nothing real is seen from padding"


def test_shared_shots_are_computed_once_a_row() -> None:
    shots = np.arange(100, 150)
    docs = [[Request(np.concatenate([shots, [i, i + 1]]), np.array([7])),
             Request(np.concatenate([shots, [i, i + 1]]), np.array([8]))] for i in range(1, 31)]
    assert [len(r) for r in pack(docs, Budget(row_tokens=80))] == [80, 80]
    assert sum(len(r) for r in pack(docs, Budget(row_tokens=80), trees=False)) == 60 * 52


def test_rows_are_as_few_and_of_like_length() -> None:
    docs = [[Request(np.array([i, 1, 2, 3]), np.array([4]))] for i in range(5, 75)]
    rows = pack(docs, Budget(row_tokens=200))
    assert [len(r) for r in rows] == [140, 140], "280 nodes in two rows, neither 200 and 80"


@given(documents, st.integers(5, 60), st.integers(0, 20), st.integers(1, 50))
def test_rows_make_the_batches_that_cost_least(
    drawn: list[list[tuple[list[int], int]]], limit: int, overhead: int, doubled: int
) -> None:
    budget = Budget(row_tokens=8, batch_tokens=limit, cost=Cost(overhead, doubled))
    rows = sorted(pack(requests(drawn), budget), key=len, reverse=True)

    def least(start: int) -> float:
        """The slow way: every number of rows for the first batch, and the rest after it."""
        if start == len(rows):
            return 0.0
        width = len(rows[start])
        most = max(1, limit // width)
        return min(budget.cost.of(n, width) + least(start + n) for n in range(1, min(most, len(rows) - start) + 1))

    made = batches(rows, budget)
    assert np.isclose(sum(budget.cost.of(*b.ids.shape) for b in made), least(0))


def test_rows_grow_with_what_documents_share() -> None:
    """Shots that all documents share make rows long; where attention costs more, they stay short."""
    rng = np.random.default_rng(0)
    shots = rng.integers(0, 1000, 400)
    alone = [[Request(rng.integers(0, 1000, 50), np.array([7]))] for _ in range(60)]
    shared = [[Request(np.concatenate([shots, r.ids]), r.targets)] for (r,) in alone]

    def longest(docs: list[list[Request]], doubled: float) -> int:
        return max(map(len, pack(docs, Budget(batch_tokens=4096, cost=Cost(32, doubled)))))

    assert longest(alone, 2500) < 200
    assert longest(shared, 2500) > 1000
    assert longest(shared, 500) < longest(shared, 2500) < longest(shared, 50_000)


@given(documents, st.integers(4, 40))
def test_halves_hold_what_the_batch_held(drawn: list[list[tuple[list[int], int]]], limit: int) -> None:
    for batch in batches(pack(requests(drawn), Budget(row_tokens=8)), Budget(batch_tokens=limit)):
        if len(batch.lengths) < 2:
            continue
        parts = halves(batch)
        assert sum(len(p.lengths) for p in parts) == len(batch.lengths)
        offset, seen = 0, []
        for part in parts:
            width = part.ids.shape[1]
            assert width == part.lengths.max()
            own = batch.ids[offset : offset + len(part.lengths)]
            assert (part.ids == own[:, :width]).all()
            assert (own[:, width:] == own[:, :1]).all(), "padded with the row's own first token"
            seen += [(part.requests[i], part.rows[i] + offset, part.positions[i], part.targets[i])
                     for i in range(len(part.targets))]
            offset += len(part.lengths)
        assert seen == list(zip(batch.requests, batch.rows, batch.positions, batch.targets, strict=True))


@given(documents)
def test_halves_of_a_single_row_hold_half_its_requests(drawn: list[list[tuple[list[int], int]]]) -> None:
    docs = requests(drawn)
    (batch,) = batches(pack(docs, Budget(row_tokens=10_000)), Budget())
    flat = [r for doc in docs for r in doc]
    waiting, seen = [batch], []
    while waiting:
        part = waiting.pop()
        both = halves(part)
        if len(both) > 1:
            waiting += both
            assert {*both[0].requests} | {*both[1].requests} == {*part.requests}
            assert not {*both[0].requests} & {*both[1].requests}
            assert max(p.tokens for p in both) <= part.tokens
            continue
        (number,) = {*part.requests}
        assert part.ids[0].tolist() == flat[number].ids.tolist()
        assert part.depths[0].tolist() == list(range(part.tokens))
        assert (part.ends[0] == part.tokens).all()
        assert part.lengths.tolist() == [part.tokens]
        assert part.positions.tolist() == np.arange(part.tokens)[flat[number].scored].tolist()
        assert part.targets.tolist() == flat[number].targets.tolist()
        seen.append(number)
    assert sorted(seen) == list(range(len(flat)))
