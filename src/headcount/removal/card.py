"""The model card of a removed model: what went, what it cost and how to load it, with a hub's front matter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from headcount.stats.words import percent

_IS = {
    "transformers": "Their weights are gone: the folder is standard safetensors, and one file of Python that makes the "
    "layers of the family's class smaller before they get weights.",
    "stock": "Their weights are gone: every layer kept the same shape, so that a class of transformers holds the model "
    "as it is.",
    "masked": "Their weights are zeros: the model has the shapes that it had, loads everywhere, and saves nothing."}


def card(told: Mapping[str, Any]) -> str:
    """The card as Markdown.

    Args:
        told: The certificate, as `headcount.removal.certificate` writes it.
    """
    model, saved, removed = told["model"], told["saved"], told["removed"]
    lines = ["---", *_front(told), "---", "", f"# {model['name']} without {gone(told)}", "",
             f"headcount {told['headcount']} removed {len(removed['heads'])} of {saved['heads']} attention heads and "
             f"{len(removed['ffns'])} of {saved['ffns']} feed-forward blocks. {_IS[told['written_as']]}", ""]
    if told["written_as"] != "masked":
        less = 1 - saved["share_left"]
        lines += [f"{saved['parameters']:,} parameters became {saved['parameters_left']:,} "
                  f"({percent(less, 1)} less)." + (
            f" A prefill of 512 tokens takes {percent(1 - saved['prefill_flops_left'], 1)} less arithmetic."
            if saved["prefill_flops_left"] is not None else ""), ""]
    lines += ["## What it cost", "", *_cost(told), "", "## How to load it", "", "```python",
              "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
              f"model = AutoModelForCausalLM.from_pretrained(FOLDER{trust(told)})",
              f"tokenizer = AutoTokenizer.from_pretrained(FOLDER{trust(told)})", "```", "",
              "or with headcount, which runs no code from the folder: `headcount.load(FOLDER)`.", "",
              "`headcount check FOLDER` compares its logits with those that `expected.safetensors` holds.", "",
              "## What was proved", ""]
    lines += [f"- {proof['what']}: differs from the masked model by at most {proof['largest']:.1e} {proof['in']} "
              f"({proof['tolerance']:.0e} is allowed)" for proof in told["proofs"]]
    lines += ["", "## What was removed", "", f"Heads: {', '.join(removed['heads']) or 'none'}.", "",
              f"FFNs: {', '.join(removed['ffns']) or 'none'}.", ""]
    lines += [f"Note: {note}." for note in model["notes"]]
    return "\n".join(lines).rstrip() + "\n"


def trust(told: Mapping[str, Any]) -> str:
    """What from_pretrained must be told besides the folder, of the model and of its tokenizer."""
    return ", trust_remote_code=True" if told["written_as"] == "transformers" else ""


def gone(told: Mapping[str, Any]) -> str:
    """`12 heads and 3 FFNs`."""
    removed = told["removed"]
    counts = ((len(removed["heads"]), "head"), (len(removed["ffns"]), "FFN"))
    return " and ".join(_count(n, what) for n, what in counts if n)


def _front(told: Mapping[str, Any]) -> list[str]:
    hub = told["model"]["hub"]
    base = [f"base_model: {json.dumps(hub)}"] if hub else []
    licence = [f"{key}: {json.dumps(value)}" for key, value in told["model"]["licence"].items()]
    return ["library_name: transformers", "pipeline_tag: text-generation", *base, *licence, "tags:", "- headcount",
            "- pruned"]


def _cost(told: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    chosen, confirmation = told["chosen"], told["confirmation"]
    if not chosen:
        lines += ["Nothing says how the mask was chosen.", ""]
    if chosen:
        said = chosen.get("sentence") or f"the mask comes from {chosen.get('study') or 'a file'}."
        lines += [f"By what chose it: {said}", ""]
    if confirmation and confirmation.get("sentence"):
        said = confirmation["sentence"]
        lines += [f"{said[:1].upper()}{said[1:]}. No choice was made on these documents.", ""]
    if confirmation and not confirmation.get("sentence"):
        lines += ["It was not compared with the full model on documents: no study said which chose nothing.", ""]
    if confirmation:
        full, removed = (confirmation["perplexity"][side] for side in ("full", "removed"))
        writing = confirmation["writing"]
        lines += [f"Bits per byte of a plain text: {full['bits_per_byte']:.3f} full, {removed['bits_per_byte']:.3f} "
                  f"removed. 4-grams that repeat in greedy continuations: {percent(writing['full_repeated'])} "
                  f"full, {percent(writing['removed_repeated'])} removed.", "",
                  "| prompt | full | removed |", "|---|---|---|"]
        lines += [f"| {' | '.join(map(_cell, texts))} |" for texts in
                  zip(writing["prompts"], writing["full"], writing["removed"], strict=True)]
    if not confirmation:
        lines.append("It was not compared with the full model on documents, a text or prompts.")
    return lines


def _cell(text: str) -> str:
    """A text in a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
