"""Prompts as turns of a conversation, written by the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jinja2.exceptions import TemplateError

from headcount.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = True
) -> str:
    """Messages in the tokenizer's chat template; without the system's message where the template has no such role.

    Raises:
        ModelError: If the template refuses the messages.
    """
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
                         "`apply_chat_template`", fields=("apply_chat_template",)) from error
