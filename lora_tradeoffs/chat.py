"""Prompts as turns of a tokenizer's chat template: --apply-chat-template.

`load_tokenizer` puts a ChatForm into the tokenizer's attribute `chat_form`; data/encoding.py makes
the tokens of prompts and answers by it. Only the template writes special tokens: what looks like
one in a row is text.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from config import UserError
from lora_tradeoffs.command_line import reason_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MARK = "\ue000{}\ue001"  # stands for a turn's text while the template is rendered
# Some templates write today's date: what is measured tomorrow must be asked in the same words.
FIXED_DATE = """\
{%- macro strftime_now(format) -%}
{{ format | replace('%d', '26') | replace('%m', '07') | replace('%b', 'Jul') | replace('%B', 'July')
| replace('%Y', '2024') }}{%- endmacro -%}"""


@dataclass(frozen=True)
class ChatForm:
    """How a tokenizer's chat template asks.

    `tail` is the text after the last special token of a prompt, `lead` what the template puts
    before an answer, `end_id` the token after it: EOS, or the template's own. `digest` is of the
    template.
    """

    system: str
    tail: str
    lead: str
    end_id: int
    digest: str

    @property
    def request(self) -> dict[str, str]:
        """What makes two measurements the same."""
        return {"chat_template": self.digest, "system_instruction": self.system}


def form_of(tokenizer: Any) -> ChatForm | None:
    """The form in which the tokenizer's prompts are put; None: plain text."""
    return getattr(tokenizer, "chat_form", None)


def chat_form(tokenizer: PreTrainedTokenizerFast, name: str, system: str) -> ChatForm:
    """The form of the tokenizer's template, after a system message (""; the template's own).

    Raises UserError if there is no template, or it cannot be applied.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {name} has no chat template: leave --apply-chat-template out, or"
            " give an instruct model with --model"
        )
    turns = [*([("system", system)] if system else []), ("user", MARK.format(0))]
    try:
        template = tokenizer.get_chat_template()  # of several, the default
        if "strftime_now" in template:
            tokenizer.chat_template = FIXED_DATE + template
        prompt = rendered(tokenizer, turns)
        answered = rendered(tokenizer, [*turns, ("assistant", MARK.format(1))], False)
    except Exception as error:  # a template may raise anything
        advice = ": leave --system-instruction out" if system else ""
        failed = f"the chat template of {name} fails ({reason_of(error):.160}){advice}"
        raise UserError(failed) from None
    if system.strip() not in prompt:
        raise UserError(
            f"the chat template of {name} drops the system message: leave --system-instruction out"
        )
    special = _special(tokenizer)
    before, _, after = answered.partition(MARK.format(1))
    lead = before.removeprefix(prompt) if before.startswith(prompt) else ""
    ends = special.findall(after)
    end_id = tokenizer.convert_tokens_to_ids(ends[0]) if ends else tokenizer.eos_token_id
    digest = hashlib.sha256(template.encode()).hexdigest()[:16]
    return ChatForm(system, special.split(prompt)[-1], lead, end_id, digest)


def rendered(
    tokenizer: Any, turns: Sequence[tuple[str, str]], add_generation_prompt: bool = True
) -> str:
    """The template's text for turns of (role, text)."""
    messages = [{"role": role, "content": text} for role, text in turns]
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt
    )


def turn_ids(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[int]:
    """Tokens of a prompt whose turns are the user's, the assistant's, the user's ..."""
    form, special = form_of(tokenizer), _special(tokenizer)
    roles = ("user", "assistant")
    turns = [("system", form.system)] if form.system else []
    turns += [(roles[i % 2], MARK.format(i)) for i in range(len(texts))]
    ids: list[int] = []
    run = ""  # text since the last special token

    def plain_ids() -> list[int]:
        return tokenizer(run, add_special_tokens=False, split_special_tokens=True).input_ids

    for i, part in enumerate(re.split(MARK.format(r"(\d+)"), rendered(tokenizer, turns))):
        if i % 2:
            run += texts[int(part)].strip()
            continue
        for k, piece in enumerate(special.split(part)):
            if k % 2:
                ids += [*plain_ids(), tokenizer.convert_tokens_to_ids(piece)]
                run = ""
            else:
                run += piece
    return ids + plain_ids()


def _special(tokenizer: Any) -> re.Pattern:
    """Matches the tokenizer's special tokens in a text, the longest first."""
    tokens = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
    return re.compile(f"({'|'.join(map(re.escape, sorted(tokens, key=len, reverse=True)))})")
