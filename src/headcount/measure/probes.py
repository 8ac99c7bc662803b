"""Probes of a model's heads and ends where its weights lie in files: as few readings of them as may be.

What `headcount.model.circuits` asks of a model are passes of a few rows, each with other rows. In a model in memory
each is a plain pass. From files every one of them would read all weights. So all rows go through a block while it is
there, as batches do (`headcount.engine.stream`), with one difference: every block is given the rows themselves. And
what lies before the first block and after the last is asked with blocks that hand their input on, which reads none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from jaxtyping import Float
from more_itertools import peekable
from torch import Tensor

from headcount.engine.blocks import handed_on, learned
from headcount.engine.stream import Stream, Waiting, Wave, fitting, stream_of
from headcount.model.attention import Visit, attention_seen, fed
from headcount.model.circuits import EndMaps, Probe, end_maps, heads_alone, one_token, probed
from headcount.model.contracts import probe_tokens
from headcount.model.held import fetched, held
from headcount.model.load import LoadedModel

# Hidden states of rows that wait: they themselves, and what the block before made of them.
ROW_STATES = 2


def ends_of(loaded: LoadedModel) -> EndMaps:
    """What lies before the first block of a model and after the last."""
    stream = stream_of(loaded)
    if stream is None:
        return end_maps(loaded.model, loaded.anatomy)
    ends = [loaded.model.get_input_embeddings(), loaded.model.get_output_embeddings()]  # type: ignore[no-untyped-call]
    with held(ends, fetched(*ends)), handed_on(stream.blocks):
        return end_maps(loaded.model, loaded.anatomy)


def stream_told(loaded: LoadedModel, told: Mapping[str, bool]) -> Stream | None:
    """The streamed schedule of a model that is told something, by which its blocks put out more; None in memory."""
    stream = stream_of(loaded)
    if stream is None or not told:
        return stream
    return dataclasses.replace(stream, blocks=learned(loaded.model, loaded.anatomy, probe_tokens(loaded.model), told))


def probe_of(loaded: LoadedModel, told: Mapping[str, bool], stream: Stream | None) -> Probe:
    """What gives the blocks of a model rows of their own.

    Args:
        loaded: The model, running eager attention.
        told: What it must be told, so that attentions hand out their probabilities.
        stream: From `stream_told`.
    """
    if stream is None:
        return functools.partial(probed, loaded.model, loaded.anatomy, told)
    return functools.partial(_from_files, loaded, stream, told)


@dataclass(frozen=True, eq=False)
class _Rows:
    """Rows of one token each.

    Attributes:
        part: Which they are.
        rows: What every block is given.
    """

    part: int
    rows: Float[Tensor, "row d_model"]

    @property
    def tokens(self) -> int:
        """How many there are."""
        return len(self.rows)


def _from_files(
    loaded: LoadedModel, stream: Stream, told: Mapping[str, bool], parts: Iterable[Float[Tensor, "row d_model"]],
    visit_of: Callable[[int], Visit],
) -> None:
    """Give every block some rows, all parts of them that may wait in one pass; arguments as of `probed`."""
    alone = [heads_alone(loaded.anatomy)]
    rows_of = (_Rows(i, rows) for i, rows in enumerate(parts))
    waiting = peekable(Waiting(one, lambda one: {**one_token(loaded.model, one.tokens), **told}, alone, ROW_STATES, "")
                       for one in rows_of)

    @contextlib.contextmanager
    def seen(layer: int, wave: Wave[_Rows]) -> Iterator[None]:
        with (fed(loaded.anatomy, wave.batch.rows[:, None], layer),
              attention_seen(loaded.anatomy, visit_of(wave.batch.part), layer)):
            yield

    while waiting:
        waves = stream.enter(waiting)
        with fitting(waves, ""):
            for _ in stream.through(waves, seen):
                pass
