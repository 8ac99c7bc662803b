"""All that is measured of a removal beside its proof: accuracy on other documents, a text's perplexity, continuations.

Multiple choice hides a model that can no longer write, so a plain text and a few prompts stand beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headcount.errors import DataError
from headcount.masks import Mask
from headcount.model.load import LoadedModel
from headcount.removal.confirm import Confirmation, StudyFacts, confirm
from headcount.removal.perplexity import Perplexity, perplexity, read_text
from headcount.removal.writing import PROMPTS, Writing, write


@dataclass(frozen=True)
class Comparison:
    """Full against removed.

    Attributes:
        accuracy: On documents that chose nothing; None where no study says which these are.
        full: How well the full model predicts the text.
        removed: How well the removed model does.
        writing: What both write after the same prompts.
    """

    accuracy: Confirmation | None
    full: Perplexity
    removed: Perplexity
    writing: Writing

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        told = {} if self.accuracy is None else self.accuracy.to_dict()
        return {"sentence": "", **told, "perplexity": {"full": self.full.to_dict(), "removed": self.removed.to_dict()},
                "writing": self.writing.to_dict()}


def compare(
    full: LoadedModel, mask: Mask, study: StudyFacts | None, n: int | None = None, *, text: Path | None = None,
    prompts: Path | None = None,
) -> Comparison:
    """Measure the full model against the masked one, which the removed one is proved equal to.

    Args:
        full: The full model.
        mask: What stays.
        study: Which documents the study read that chose the mask; None where none did.
        n: As in `headcount.removal.confirm.confirm`.
        text: A plain text file; by default the text that comes along.
        prompts: A file with a prompt a line; by default those that come along.

    Raises:
        DataError: If a file cannot be read, or is empty.
    """
    read, lines = read_text(text), _lines(prompts)
    accuracy = None if study is None else confirm(full, mask, study, n)
    return Comparison(accuracy, perplexity(full, None, read), perplexity(full, mask, read), write(full, mask, lines))


def _lines(path: Path | None) -> Sequence[str]:
    if path is None:
        return PROMPTS
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the `prompts` {path} cannot be read ({error}): name a text file with a prompt a line",
                        fields=("prompts",)) from error
    if not lines:
        raise DataError(f"the `prompts` {path} hold none: write one a line", fields=("prompts",))
    return lines
