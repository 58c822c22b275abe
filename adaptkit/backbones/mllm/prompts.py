"""From questions, images and answers to token ids, through the model's own chat template or its family's plain prompt.

We expand placeholders ourselves, so that features and placeholders agree by construction and no processor with optional
packages is needed.

Source: mllm sheets `backbones.md` (processors and chat templates) and `lora-sft.md` (prompt boundary).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adaptkit.backbones.mllm.families import Family
from adaptkit.errors import BackboneError, DataError


@dataclass(frozen=True)
class Turn:
    """One question, and its answer where that is given.

    Args:
        text: What is asked.
        images: Images shown in front of the question.
        answer: The answer; None for the question that is to be answered.
    """

    text: str
    images: int = 1
    answer: str | None = None


class Prompter:
    """Renders and tokenises conversations.

    Args:
        name: The backbone's name, for messages.
        family: Its family.
        tokenizer: Its tokenizer (transformers).
        template: Its chat template; "" for none.
        image_token: The placeholder, as text.
        context: Positions of the language model.

    Raises:
        BackboneError: There is no chat template and the family has no plain prompt.
    """

    def __init__(
        self, name: str, family: Family, tokenizer: Any, template: str, image_token: str, context: int
    ) -> None:
        if not template and not family.prompt:
            raise BackboneError(
                f"Backbone {name!r} has no chat template, and {family.name} models aren't asked without one: add its"
                " 'chat_template.jinja' to the folder (the hub's repository of the instruction-tuned model has it)."
            )
        self.name, self.family, self.tokenizer = name, family, tokenizer
        self.template, self.image_token, self.context = template, image_token, context
        self.marker = family.marker or image_token
        self._bos = tokenizer.bos_token or ""
        # added tokens that aren't special are ordinary text, such as Gemma's runs of spaces
        special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.control_tokens = tuple(sorted({*tokenizer.all_special_tokens, *special, self.marker, image_token}))

    @property
    def digest(self) -> str:
        """What identifies the way questions are put."""
        text = repr((self.template or self.family.prompt, self.marker, self.family.before, self.family.after))
        return hashlib.sha256(text.encode()).hexdigest()

    # --- checks -------------------------------------------------------------------------------------------------------

    def check_text(self, text: str, what: str) -> str:
        """Refuse a text that holds one of the model's control tokens; returns it.

        Args:
            text: A class name or a question.
            what: What it is, for the message ("class name").

        Raises:
            DataError: It holds one: the model would read it as an image, or as the end of a turn.
        """
        for token in self.control_tokens:
            if token in text:
                raise DataError(
                    f"The {what} {text!r} holds {token!r}, which {self.name!r} reads as a control token and not as"
                    " text: rename it."
                )
        return text

    def check_length(self, length: int, what: str) -> None:
        """Refuse a prompt that doesn't fit.

        Raises:
            BackboneError: It has more tokens than the language model has positions.
        """
        if length > self.context:
            raise BackboneError(
                f"{what} has {length} tokens, {length - self.context} more than the {self.context} that"
                f" {self.name!r} reads: shorten the question or the names, or show fewer images."
            )

    # --- rendering ----------------------------------------------------------------------------------------------------

    def render(self, turns: Sequence[Turn]) -> str:
        """The conversation as text, with one marker per image; it ends where the last answer begins, or behind it.

        Raises:
            BackboneError: The chat template can't be used.
        """
        if not self.template:
            return self._plain(turns)
        messages: list[dict[str, Any]] = []
        for turn in turns:
            content = [{"type": "image"}] * turn.images + [{"type": "text", "text": turn.text}]
            messages.append({"role": "user", "content": content})
            if turn.answer is not None:
                messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=turns[-1].answer is None,
            )
        except Exception as error:  # a template can raise whatever it likes
            raise BackboneError(f"The chat template of {self.name!r} can't be used: {error}.") from error
        wanted, found = sum(turn.images for turn in turns), text.count(self.marker)
        if wanted != found:
            raise BackboneError(
                f"{wanted} images were to be shown, and the chat template of {self.name!r} left room for {found}"
                f" ({self.marker!r}): it isn't a template for images."
            )
        return text

    def _plain(self, turns: Sequence[Turn]) -> str:
        parts = []
        for place, turn in enumerate(turns):
            bos = self._bos if place == 0 else ""
            parts.append(self.family.prompt.format(image=self.marker * turn.images, bos=bos, text=turn.text))
            if turn.answer is not None:
                parts.append(f" {turn.answer}" if parts[-1][-1:].strip() else turn.answer)
                parts.append(self.family.turn)
        if turns[-1].answer is not None:
            parts.pop()
        return "".join(parts)

    def _tokenise(self, text: str) -> list[int]:
        special = not (self._bos and self._bos in text)  # most templates write it themselves
        ids: list[int] = self.tokenizer(text, add_special_tokens=special, verbose=False).input_ids  # we check lengths
        return ids

    def ids(self, turns: Sequence[Turn], counts: Sequence[int] = (), *, check: bool = True) -> list[int]:
        """Token ids of a conversation.

        Args:
            turns: The conversation.
            counts: Placeholders of each image, in reading order.
            check: Refuse what doesn't fit into the context.

        Raises:
            DataError: More or fewer images than the turns show.
            BackboneError: It doesn't fit into the context.
        """
        shown = sum(turn.images for turn in turns)
        if shown != len(counts):
            raise DataError(f"The prompt shows {shown} images, and {len(counts)} were given: they must be as many.")
        parts = self.render(turns).split(self.marker)
        text = parts[0]
        for count, part in zip(counts, parts[1:], strict=True):
            text += self.family.before + self.image_token * count + self.family.after
            text += f" {part}" if self.family.spaced and part[:1].strip() not in ("", "<") else part
        if self.family.spaced:
            text = text.replace(self.family.after + self.family.before, self.family.after)
        ids = self._tokenise(text)
        if check:
            self.check_length(len(ids), "The prompt")
        return ids

    def answers(self, turns: Sequence[Turn], answers: Sequence[str], *, end: bool = True) -> list[list[int]]:
        """Token ids of each answer, as they stand behind the conversation; nothing of the conversation itself.

        Args:
            turns: The conversation; its last turn has no answer.
            answers: The answers.
            end: Whether the token that ends the turn belongs to each.
        """
        base = self.render(turns)
        start = self._tokenise(base)
        last = turns[-1]
        rows = []
        for answer in answers:
            full = self.render([*turns[:-1], Turn(last.text, last.images, answer)])
            tail = full[len(base) :] if full.startswith(base) else answer
            lead, name, rest = tail.partition(answer)
            ids = self._tokenise(base + lead + name)
            # where the prompt's last token would melt together with the answer's first, each is tokenised alone
            whole = ids[: len(start)] == start
            row = ids[len(start) :] if whole else self.tokenizer(lead + name, add_special_tokens=False).input_ids
            rows.append([*row, *([self._end(rest)] if end else [])])
        return rows

    def _end(self, rest: str) -> int:
        """The token that ends a turn: what the template writes behind an answer, else the end of the text."""
        behind = self.tokenizer(rest.lstrip(), add_special_tokens=False).input_ids if rest.strip() else []
        added = set(self.tokenizer.get_added_vocab().values())
        return int(behind[0] if behind and behind[0] in added else self.tokenizer.eos_token_id)

    def end_tokens(self) -> tuple[int, ...]:
        """Tokens at which a generated answer ends."""
        template_end = self.answers([Turn("?", 0)], ["a"])[0][-1]
        return tuple(sorted({template_end, int(self.tokenizer.eos_token_id)}))

    def text(self, ids: Sequence[int]) -> str:
        """Generated tokens as text, without control tokens."""
        decoded: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return decoded.strip()
