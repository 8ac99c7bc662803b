"""docs/removal.md, with its tables measured on the tests' tiny models: `python tools/removal_page.py` writes it."""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

_ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(_ROOT / "tests"))

from families import FAMILIES, kernels, tokens, with_kernel
from headcount.errors import HeadcountError, ModelError
from headcount.masks import Mask
from headcount.model.anatomy import Anatomy
from headcount.model.hooks import ablated
from headcount.model.load import LoadedModel, load
from headcount.model.read import quiet
from headcount.removal.remove import remove

_PAGE = _ROOT / "docs" / "removal.md"
_MARK = "<!-- Written by tools/removal_page.py from here on. -->\n"
_TABLE = """\
## Families

Every family of the tests' table (tiny, random throughout, transformers {version}), {kinds}. *Differs* is the largest
difference of logits between the removed model in memory and the masked one, in standard deviations of the logits, over
{masks} masks: a layer without heads, a layer without its FFN, a layer without both, one head left of a KV group, and
groups with unlike numbers of heads. *Masks* says of how many of them it was removed; the others are refused, see
below. The columns behind are formats and who loads them: ✓ ran, and gave the masked
model's logits within 1e-4; - does not fit. *transformers* is `AutoModelForCausalLM` with `trust_remote_code=True` (both
kernels where the family has them, `generate` with its cache, and `save_pretrained` and loading again), *headcount* is
`headcount.load`. *stock* and *masked* are loaded by `AutoModelForCausalLM` without remote code.

| family | differs | masks | transformers | headcount | stock | masked |
|---|---|---|---|---|---|---|
{rows}

What is refused, and why (of `stock`: above):

| family | what | reason given |
|---|---|---|
{refused}
"""


def main() -> None:
    """Write the page's second half anew."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    rows, refused = [], []
    for family in FAMILIES:
        cells, reasons = _family(family)
        rows.append(f"| {family} | {' | '.join(cells)} |")
        refused += [f"| {family} | {what} | {why} |" for what, why in reasons]
    text = _PAGE.read_text(encoding="utf-8")
    head = text[: text.index(_MARK) + len(_MARK)]
    table = _TABLE.format(version=transformers.__version__, kinds=f"{len(rows)} of them", masks="five",
                          rows="\n".join(rows), refused="\n".join(refused))
    _PAGE.write_text(f"{head}\n{table}", encoding="utf-8")


def _family(family: str) -> tuple[list[str], list[tuple[str, str]]]:
    """A family's cells, and what was refused with which reason."""
    loaded, ids = with_kernel(family, kernels(family)[0]), tokens()
    reasons: list[tuple[str, str]] = []
    worst, gone = 0.0, 0
    for what, mask in _masks(loaded.anatomy):
        try:
            small = remove(loaded, mask).model
        except HeadcountError as error:
            reasons.append((what, _short(error)))
            continue
        gone += 1
        worst = max(worst, _apart(_logits(small.model, ids), _masked(loaded, mask, ids)))
    cells = [f"{worst:.0e}" if gone else "", f"{gone} of 5"]
    mask = next((mask for _, mask in reversed(list(_masks(loaded.anatomy))) if _fits(loaded, mask)), None)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        if mask is None:
            cells += ["-", "-"]
        else:
            cells += _loaded(loaded, mask, place)
        for format, chosen in (("stock", _uniform(loaded.anatomy)), ("masked", _masks_both(loaded.anatomy))):
            try:
                out = remove(loaded, chosen).save(place / format, format=format)  # type: ignore[arg-type]
                with quiet():
                    model = AutoModelForCausalLM.from_pretrained(out)
                apart = _apart(_logits(model, ids), _masked(loaded, chosen, ids))
                cells.append("✓" if apart < 1e-4 else f"differs by {apart:.0e}")
            except HeadcountError as error:
                cells.append("-")
                if format == "masked":
                    reasons.append((format, _short(error)))
    return cells, list(dict.fromkeys(reasons))


def _loaded(loaded: LoadedModel, mask: Mask, place: Path) -> list[str]:
    """How the default format fares in transformers, and here."""
    ids = tokens()
    out = remove(loaded, mask).save(place / "small")
    expected = _masked(loaded, mask, ids)
    told = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0}
    with ablated(loaded.anatomy, mask), torch.no_grad():
        text = loaded.model.generate(ids[:, :4], **told)  # type: ignore[operator]
    ran = True
    with quiet():
        for kernel in kernels(loaded.name):
            model: Any = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, attn_implementation=kernel)
            ran &= _apart(_logits(model, ids), expected) < 1e-4
        ran &= torch.equal(model.generate(ids[:, :4], **told), text)
        model.save_pretrained(place / "again")
        again = AutoModelForCausalLM.from_pretrained(place / "again", trust_remote_code=True)
    ran &= _apart(_logits(again, ids), expected) < 1e-4
    here = _apart(_logits(load(out).model, ids), expected) < 1e-4
    return ["✓" if ran else "differs", "✓" if here else "differs"]


def _fits(loaded: LoadedModel, mask: Mask) -> bool:
    try:
        _ = remove(loaded, mask).model
    except ModelError:
        return False
    return True


def _masks(anatomy: Anatomy) -> Iterator[tuple[str, Mask]]:
    """Masks by what they do, the one that does most at once last."""
    full, n = Mask.full(anatomy.heads_per_layer), anatomy.heads_per_layer[0]
    layer = [(0, head) for head in range(n)]
    yield "a layer's FFN", full.without_ffns([1])
    yield "a layer's heads", full.without_heads(layer)
    yield "a layer's heads and FFN", full.without_heads(layer).without_ffns([0])
    yield "all but one head of a group", full.without_heads([(1, head) for head in range(1, n // 2)])
    yield "uneven groups", full.without_heads([(0, 0), (1, n - 1)])


def _masks_both(anatomy: Anatomy) -> Mask:
    return Mask.full(anatomy.heads_per_layer).without_heads([(0, 0), (1, 2)]).without_ffns([1])


def _uniform(anatomy: Anatomy) -> Mask:
    """The first half of every group's heads goes; of groups of one head, the first half of the groups."""
    gone = []
    for layer, part in enumerate(anatomy.layers):
        share = part.num_heads // part.num_kv_heads
        gone += [(layer, head) for head in range(part.num_heads)
                 if (head % share < share // 2 if share > 1 else head < part.num_heads // 2)]
    return Mask.full(anatomy.heads_per_layer).without_heads(gone)


@torch.no_grad()
def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def _masked(loaded: LoadedModel, mask: Mask, ids: torch.Tensor) -> torch.Tensor:
    with ablated(loaded.anatomy, mask):
        return _logits(loaded.model, ids)


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.std())


def _short(error: BaseException) -> str:
    text = str(error).replace("|", "/").partition("; use format=")[0].partition(": use format=")[0]
    return text.removeprefix("what the mask leaves out cannot be removed from ")


if __name__ == "__main__":
    main()
