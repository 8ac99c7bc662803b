"""docs/models.md, from the tiny models that the tests go through: `python tools/models_page.py` writes it.

The page has two parts: the families of the tests' table, and every type of model that transformers loads as a causal
language model (`tests/every_class.py`), with what headcount made of it on this run.
"""

from __future__ import annotations

import logging
import re
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import transformers

_ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(_ROOT / "tests"))

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from every_class import TYPES, Found, find
from families import FAMILIES, HYBRIDS, UNFIT, hybrid, kernels, probed, third_contract, tiny
from headcount.engine.engine import Engine
from headcount.engine.layout import Layout
from headcount.errors import ModelError
from headcount.model.anatomy import Anatomy, find_anatomy
from headcount.model.contracts import verify

_CONTRACTS = ("identity", "head slice", "scoring", "sweep")
_HEAD = """\
# Models

`make models` writes this page from the table of tiny random models that the tests cover (`tests/families.py`), with
transformers {version}. No family has code of its own. Heads and FFNs are looked up under five short lists of names, and
contracts prove on the loaded model that the look-up is right.

* *Identity*: with all heads and FFNs off, every block hands its input on, plus the bias of the output projection.
* *Head slice*: what a head writes depends on its own attention alone.
* *Scoring*: requests in a padded batch, with hooks, get the log-likelihoods that the unmodified model gives each of
  them alone, with everything kept and with nothing kept; no position sees later tokens.

Where gradients are wanted, it is proved as well that they reach heads and FFNs.

A family that is not listed here works if the contracts hold on it (`headcount anatomy MODEL --verify`). A model that
fails one of them is refused before anything is measured, with the name of the block. Another contract, *sweep*, says
that the model can be run layer by layer, so that masks share the layers before their first difference. A model that
fails it runs one forward pass for each mask.

The columns *prompts* say how prompts are laid out: as token trees, which compute each shared beginning once, or one
request a row. This, too, is found out on the loaded model, by scoring one random tree both ways. *Windows* are
attention windows; in a tree they count depths, not columns.

| family | query heads | KV groups | FFN | contracts | prompts, sdpa | prompts, eager |
|---|---|---|---|---|---|---|
{rows}

## Refused

headcount refuses layers without attention heads, heads that depend on other heads, and blocks that hold more than
heads and one FFN.

| family | reason given |
|---|---|
{refused}

"""
_CLASSES = """\
## Every decoder class

These are all {types} types of model that transformers {version} loads as a causal language model. Each was built small
with random weights and the kinds of layers that its published checkpoints have, saved, and loaded from that folder
(`tests/every_class.py`; {counts}).

* *Measured*: the contracts hold, and these numbers equal the obvious computation on the model that was saved, one
  request a pass and one ablation at a time: log-likelihoods of the full model, without one head, without one FFN and
  without all heads of a layer; the oracle of all heads and FFNs; gradient scores by autograd through all parameters.
  The number bounds all differences: in nats, and of gradient scores as a share of the largest.
* *Refused*: headcount says so in one line, before anything is measured.
* *Not built small*: transformers itself does not build it here.

Of multimodal models the text alone is read and measured. Encoders that can run as decoders were asked to
(`is_decoder`). The whole table takes one to two minutes; the tests compare its types with the installed library's, and
measure some of them again.

| type | class | outcome | reason, or largest difference |
|---|---|---|---|
{rows}
"""
# What stands behind the reason in messages: where was looked, what else to do.
_REST = re.compile(r": looked for |; only decoder-only|; it has |\. You can install ")


def rows() -> list[str]:
    """One line per family."""
    found = []
    for family in FAMILIES:
        model = tiny(family)
        anatomy = find_anatomy(model)
        results = [*Engine.of(probed(family, kernels(family)[0])).contracts, third_contract(family)]
        contracts = ", ".join(name for name, result in zip(_CONTRACTS, results, strict=True) if result.holds)
        heads, groups = (" + ".join(map(str, counts)) for counts in (
            anatomy.heads_per_layer, [part.num_kv_heads for part in anatomy.layers]))
        found.append(f"| {family} | {heads} | {groups} | {_ffns(anatomy)} | {contracts} | "
                     f"{_prompts(family, 'sdpa')} | {_prompts(family, 'eager')} |")
    return found


def refused() -> list[str]:
    """One line per family that cannot be measured."""
    found = []
    for family in UNFIT:
        failed = next(result for result in verify(tiny(family)) if not result.holds)
        # Which head or block is the worst depends on the machine's last bits.
        said = re.sub(r"^(?:L\d+H\d+|block \d+)", lambda m: "a head" if m[0][0] == "L" else "a block", failed.detail)
        found.append(f"| {family} | {said} |")
    for family in HYBRIDS:
        try:
            find_anatomy(hybrid(family))
        except ModelError as error:
            found.append(f"| {family} | {str(error).split(':')[0]} |")
    return found


def families() -> str:
    """The first part of the page: the tests' table of families."""
    return _HEAD.format(version=transformers.__version__, rows="\n".join(rows()), refused="\n".join(refused()))


def classes() -> str:
    """The second part of the page: every type; it takes minutes."""
    found = []
    for kind in TYPES:
        with tempfile.TemporaryDirectory() as folder:
            found.append(find(kind, Path(folder)))
    outcomes = [one.outcome for one in found]
    counts = ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in dict.fromkeys(sorted(outcomes)))
    return _CLASSES.format(types=len(TYPES), version=transformers.__version__, counts=counts,
                           rows="\n".join(map(class_row, found)))


def class_row(found: Found) -> str:
    """A type's line of the table."""
    # Which head or block is the worst, and the last digits, depend on the machine.
    said = re.sub(r"\bL\d+H\d+\b|\bblock \d+\b", lambda m: "a head" if m[0][0] == "L" else "a block", found.detail)
    said = _REST.split(said.removeprefix(f"it ({found.kind}): "))[0]
    if found.outcome == "measured":
        said = next(f"{bound:.0e}" for bound in (1e-6, 1e-5, 1e-4) if float(found.detail) <= bound)
    outcome = f"**{found.outcome}**" if found.outcome == "wrong" else found.outcome
    return f"| {found.kind} | {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[found.kind]} | {outcome} | {said.replace('|', '/')} |"


def _ffns(anatomy: Anatomy) -> str:
    beside = any(part.ffn is None and part.ffn_output is getattr(part.block, "post_feedforward_layernorm", None)
                 for part in anatomy.layers)
    kinds = ["experts beside a dense one" if beside else "experts" if part.routed else "dense"
             for part in anatomy.layers]
    return " + ".join(dict.fromkeys(kinds))


def _prompts(family: str, kernel: str) -> str:
    return _told(Engine.of(probed(family, kernel)).layout) if kernel in kernels(family) else ""


def _told(found: Layout) -> str:
    if not found.trees:
        return "one request a row"
    return {"plain": "trees", "windowed": "trees, one window", "by type": "trees, windows by layer"}[found.tree_mask]


if __name__ == "__main__":
    torch.set_num_threads(2)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    (_ROOT / "docs" / "models.md").write_text(families() + classes(), encoding="utf-8")
