"""The part of docs/performance.md on devices, from what `gpu.py` has kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_COMMAND = "`python benchmarks/gpu.py`"
_COUNTED = (
    "*Plain* is a causal forward pass of the same rows through the unmodified model, with logits of each row's last "
    "position; *lm-eval* its HF backend on the same requests; *gradients* the importance of all heads and FFNs on one "
    "option of each document; *oracle* single FFNs off, one after another; *sweep* ten masks with 0 to 90 % of heads "
    "off. "
    "*TFLOP* are the needed operations: 2 a parameter of a block and position that is computed, 4 a channel of "
    "attention and pair of positions in a row, 2 a parameter of the output layer and position whose logits are wanted; "
    "a backward pass counts as a forward one, what is recomputed counts once, and a block counts in full for every way "
    "in which masks treat it, though its attention is shared. *Of the peak* (model FLOP "
    "utilisation) is that over the seconds and the device's peak. *Time / plain* is the time beside that of plain "
    "forward passes of the resident model of as many needed operations. *Peak memory* is what torch had allocated on "
    "the device at most, weights included.")


def gpu_section(kept: Mapping[str, Mapping[str, Any]]) -> str:
    """What was measured on a GPU, or how to; and what shows that the script runs."""
    lines = ["## On a GPU", ""]
    if (found := kept.get("gpu_cuda")) is not None:
        lines += [*_told(found), *table(found), "", f"Measured {found['when']}.", ""]
    else:
        lines += [f"Not run: no GPU was at hand. {_COMMAND}, with a torch that sees the GPU, measures OPT-125m, 1.3B "
                  "and 6.7B and Llama-3-8B with random weights and writes this section.", ""]
    if (found := kept.get("gpu_cpu")) is not None:
        others = [row["others"] for row in found["rows"] if "others" in row]
        busy = (f"; other processes kept {sum(others) / len(others):.1f} cores busy meanwhile, so that ratios are rough"
                if sum(others) > 0.25 * len(others) else "")
        lines += ["### The same script on a CPU", "", "That it runs, and what it gives; it says nothing of GPUs.", "",
                  *_told(found), *table(found), "", f"Measured {found['when']}{busy}.", ""]
    return "\n".join(lines)


def _told(result: Mapping[str, Any]) -> list[str]:
    peak = "not known" if result["peak"] is None else f"{result['peak'] / 1e12:,.4g} TFLOP/s ({result['peak_source']})"
    return [f"{result['device']}, {result['dtype']}. {result['documents']} documents of random tokens, four options "
            f"each, behind {result['shots']} tokens of shots that all share; medians of {result['repetitions']}. The "
            f"peak is {peak}. {_COUNTED}", ""]


def table(result: Mapping[str, Any]) -> list[str]:
    """A line for every measurement, as Markdown."""
    lines = ["| model | weights | measurement | tokens | layer-tokens | s | TFLOP | of the peak | time / plain | "
             "peak memory, GB |", "|---|---|---|" + "--:|" * 7]
    for row in result["rows"]:
        # A streamed model may be computed elsewhere than asked for.
        place = f", on the {row['device']}" if row.get("device", result["kind"]) != result["kind"] else ""
        head = f"| {row['model']} | {row['way']}{place} | {row.get('what', '')} |"
        if (why := row.get("skipped") or row.get("failed")) is not None:
            lines.append(f"{head} {'skipped' if 'skipped' in row else 'failed'}: {why.replace('|', '/')} " + "|" * 7)
            continue
        used, beside, memory = row["utilisation"], row["over_plain"], row["peak_memory"]
        lines.append(f"{head} {row['tokens']:,} | {row['layer_tokens']:,} | {row['seconds']:.3g} | "
                     f"{row['flops'] / 1e12:.3g} | {'-' if used is None else f'{used:.1%}'} | "
                     f"{'-' if beside is None else f'{beside:.2f}'} | "
                     f"{'-' if memory is None else f'{memory / 1e9:.1f}'} |")
    return lines
