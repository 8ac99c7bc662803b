"""What a person sees of a plan: the model, documents and tokens, what each part costs, devices, what would be saved."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from headcount.model.placement import filled
from headcount.study.devices import JOB_SECONDS
from headcount.terminal import table_of

if TYPE_CHECKING:
    from headcount.study.costs import OnDevice
    from headcount.study.forecast import Forecast
    from headcount.study.sharing import Layers

_out = Console()
# A plan of more jobs than this is told by task.
_MOST_JOBS = 100
# With more numbers of shots than this, a task has a line for each.
_MOST_SHOTS = 4
_PREFIXES = ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def print_forecast(known: Forecast) -> None:
    """A study as it is known without its model."""
    _print_model(known)
    if known.tasks:
        _print_tasks(known)
    if len(known.jobs) <= _MOST_JOBS:
        _print_jobs(known)
    _print_shares(known)
    if known.devices:
        _print_devices(known)
    total = known.total.flops
    if saved := [f"{change} {part / total:.0%}" for change, part in known.savings if total and part / total > 0.005]:
        _say(f"What would save how much of it, each by itself: {'; '.join(saved)}")
    for note in known.notes:
        _say(f"assumed: {note}")
    for note in known.told:
        _say(f"note: {note}")
    n, todo = len(known.jobs), sum(rest is not None for rest in known.left)
    _say(f"{n:,} job{'s' * (n != 1)}, {todo:,} to do. Nothing was measured, and no weights were read.")


def _print_model(known: Forecast) -> None:
    shape, memory = known.shape, known.memory
    heads = sorted({*shape.anatomy.heads_per_layer})
    of_heads = str(heads[0]) if len(heads) == 1 else f"{heads[0]} to {heads[-1]}"
    source = "a shape that comes along" if shape.bundled else "known by its config"
    _say(f"{shape.name} ({source}): {_many(shape.anatomy.num_parameters)} parameters, {shape.anatomy.num_layers} "
         f"layers of {of_heads} heads, {shape.dtype}, window {shape.max_length:,}")
    gradients = f", {_bytes(memory.gradients)} for an example's gradients" if memory.gradients else ""
    gradients += f", {_bytes(memory.induction)} for induction" if memory.induction else ""
    _say(f"Memory: weights {_bytes(memory.weights)}, largest block {_bytes(memory.block)}, output layer "
         f"{_bytes(memory.output)}; about {_bytes(memory.batch)} for a batch{gradients}. At the most "
         f"{_bytes(memory.resident)} resident, {_bytes(memory.streamed)} streamed, beside what waits between "
         "blocks and the process itself.")


def _print_tasks(known: Forecast) -> None:
    shots = [*dict.fromkeys(one.num_fewshot for one in known.tasks)]
    bundled = {one.name for one in known.tasks if one.bundled}
    names = [*dict.fromkeys(one.name for one in known.tasks)]
    by_key = {(one.name, one.num_fewshot): one for one in known.tasks}
    if len(shots) > _MOST_SHOTS:
        table = table_of("task", "shots|r", "documents|r", "examples|r", "tokens|r", "of examples|r")
        for one in known.tasks:
            table.add_row(one.name + "*" * one.bundled, str(one.num_fewshot), f"{one.documents:,}",
                          f"{one.examples:,}", _short(one.tokens), _short(one.gradient))
    else:
        table = table_of("task", "documents|r", "examples|r", *(f"{k}-shot|r" for k in shots))
        for name in names:
            own = [by_key[name, k] for k in shots]
            table.add_row(name + "*" * (name in bundled), f"{max(o.documents for o in own):,}",
                          f"{max(o.examples for o in own):,}", *(_short(o.tokens or o.gradient) for o in own))
        if len(names) > 1:
            table.add_row("all", "", "", *(_short(sum(by_key[name, k].tokens or by_key[name, k].gradient
                                                      for name in names)) for k in shots))
    _out.print(table)
    _say("Tokens of one pass over the evaluated documents, as they are packed; examples are those that importance is "
         "measured on." + (" * counts that come along" if bundled else ""))


def _print_jobs(known: Forecast) -> None:
    table = table_of("job", "docs|r", "layer-tokens|r")
    for planned, cost in zip(known.jobs, known.costs, strict=True):
        left = "done" if cost is None else _power(cost.layer_tokens.middle) if cost.layer_tokens.middle else ""
        table.add_row(planned.title, f"{planned.job.documents:,}", left)
    _out.print(table)


def _print_shares(known: Forecast) -> None:
    table = table_of("part", "jobs|r", "layer-tokens|r", "at least|r", "at most|r", "FLOPs|r", "share|r")
    total = known.total
    for share, cost in [*known.shares.items(), ("all", total)]:
        table.add_row(share, f"{cost.jobs:,}", _power(cost.layer_tokens.middle), *_bounds(cost.layer_tokens),
                      _power(cost.flops), f"{cost.flops / total.flops:.0%}" if total.flops else "")
    _out.print(table)
    _say("Layer-tokens: positions that blocks compute, layers added up; without bounds they are exact but for what "
         "is assumed. A gradient counts two passes.")


def _bounds(layers: Layers) -> tuple[str, str]:
    return ("", "") if layers.exact else (_power(layers.low), _power(layers.high))


def _print_devices(known: Forecast) -> None:
    priced = any(one.money is not None for one in known.devices)
    table = table_of("device", "model", "copies|r", "time|r", "computing|r", "reading|r", "read|r",
                   *(["money|r"] if priced else []))
    for one in known.devices:
        table.add_row(one.device.name, one.way, str(one.copies), *_times(one), _bytes(one.bytes_read) if one.bytes_read
                      else "", *([f"{one.money:,.0f}" if one.money is not None else ""] if priced else []))
    _out.print(table)
    for source in dict.fromkeys((one.device.source, one.device.flops(known.shape.dtype), one.device.efficiency)
                                for one in known.devices):
        text, rate, efficiency = source
        _say(f"assumed: {_short(rate)}FLOP/s, {efficiency:.0%} of {_short(rate / efficiency)}FLOP/s in "
             f"{known.shape.dtype} ({text})")
    _say(f"assumed: a job takes {JOB_SECONDS:g} s beside its operations")
    for waiting, passes, speed in dict.fromkeys(
            (one.device.waiting, one.passes, one.device.read_speed) for one in known.devices if one.bytes_read):
        _say(f"assumed: weights are read at {_bytes(speed)}/s, once for as many jobs as "
             f"{_bytes(waiting)} of hidden states allow: {passes.scoring:,} times to score, "
             f"{passes.gradients:,} times for gradients. A pass takes as long as the slower of reading and "
             "computing, and its first block is read before.")
    if any(one.way == "part streamed" for one in known.devices):
        _say("part streamed: the model fits, but not with the gradients of an example beside it")
    fits = " and ".join(dict.fromkeys(
        f"{filled(one.device.kind):.0%} of {'what is free here' if one.device.kind == 'cpu' else 'a GPU'}"
        for one in known.devices))
    _say(f"A model is resident where it fits into {fits}; loading it, proofs of it, and what induction "
         "asks of heads by probes are not counted.")


def _times(one: OnDevice) -> Sequence[str]:
    return tuple("" if not hours else _duration(hours) for hours in (
        0.0 if math.isnan(one.hours) else one.hours, one.computing, one.reading))


def _duration(hours: float) -> str:
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} s"
    if hours < 1.5:
        return f"{hours * 60:.0f} min"
    return f"{hours:,.1f} h" if hours < 100 else f"{hours:,.0f} h"


def _short(number: float | int) -> str:
    """`65.7 G`; below a thousand the number itself."""
    for size, prefix in _PREFIXES:
        if number >= size * 0.9995:
            return f"{number / size:.3g} {prefix}"
    return f"{number:.0f} " if number else "0 "


def _many(number: int) -> str:
    return f"{number / 1e9:.1f} billion" if number >= 1e9 else f"{number / 1e6:.1f} million"


def _power(number: float | int) -> str:
    """`8.71e11`; below a million the number itself."""
    return f"{number:,.0f}" if number < 1e6 else f"{number:.2e}".replace("e+", "e")


def _bytes(number: float | int) -> str:
    return f"{_short(number)}B"


def _say(text: str) -> None:
    for line in textwrap.wrap(text, _out.width, subsequent_indent="  ", break_on_hyphens=False):
        _out.print(line, highlight=False, markup=False, soft_wrap=True)
