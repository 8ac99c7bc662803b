"""Shots drawn as lm-eval draws them, but for the document itself; and prompts as turns of a chat template."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from headcount.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Shots:
    """Stands in for lm-eval's sampler: gives fixed shots, or lm-eval's own draw without one document.

    lm-eval leaves a document out of its own shots only where both come from the test split by name. Here another takes
    its place, drawn apart, so that all other documents keep the shots that lm-eval gives them.
    """

    shots: Sequence[Any]
    excluded: Mapping[str, Any] | None
    doc_id: int
    sampler: Any

    def sample(self, n: int, eval_doc: Any = None) -> Sequence[Any]:
        """So many shots for a document."""
        drawn = list(self.shots[:n] or self.sampler.sample(n, eval_doc=eval_doc))
        if self.excluded is None or self.excluded not in drawn:
            return drawn
        kept = [doc for doc in drawn if doc != self.excluded]
        others = [doc for doc in self.sampler.df if doc != self.excluded and doc not in kept]
        return [*kept, *random.Random(self.doc_id).sample(others, n - len(kept))]  # noqa: S311


def rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = True
) -> str:
    """Messages in the tokenizer's chat template; without the system's, where the template knows none."""
    def written(turns: list[dict[str, str]]) -> str:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt,
                                                 continue_final_message=not add_generation_prompt))

    try:
        return written(list(messages))
    except TemplateError:
        pass
    try:
        return written([m for m in messages if m["role"] != "system"])
    except TemplateError as error:
        raise ModelError(f"the model's chat template refuses a prompt ({str(error).strip()}); leave out "
                         "--apply-chat-template") from error
