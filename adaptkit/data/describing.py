"""Descriptions written by a language model: questions about each class, answers, and the sentences in them.

The model is any that transformers can load: a causal one, a sequence-to-sequence one, or one that also reads images and
is given text alone. No code from a repository is run, and only safetensors are read.

Every answer has a random stream of its own, from the seed, the class, the question and its number: what a class gets
doesn't depend on which others are asked about, nor on how many are asked at once (up to rounding).

Source: dclip sheet, "Descriptor generation"; cupl sheet, "Sentence generation". The questions are our own wording, and
"an" stands before every vowel (the published CuPL questions have it before capitals only).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from adaptkit.backbones.building import from_library
from adaptkit.data.descriptions import Descriptions
from adaptkit.errors import BackboneError, ConfigError, DataError, MissingPathError, StorageError
from adaptkit.storage import read_json, write_json
from adaptkit.types import ProgressCallback

_FEATURE_QUESTION = """\
Question: Which visible features tell {} apart in a photo?
Answer: In a photo, {} can be told by:
-"""

_FEATURE_EXAMPLES = """\
Question: Which visible features tell a kingfisher apart in a photo?
Answer: In a photo, a kingfisher can be told by:
- a bright blue back
- an orange belly
- a long, pointed bill
- a large head on a short neck

Question: Which visible features tell a bicycle apart in a photo?
Answer: In a photo, a bicycle can be told by:
- two large wheels with thin spokes
- a frame of straight tubes
- a narrow saddle
- handlebars
- pedals and a chain

"""


@dataclass(frozen=True)
class Style:
    """How a model is asked.

    Args:
        questions: With `{}` for the class and its article ("an oak"), or `{name}` for the bare name ("oak").
        keep: What of an answer counts: "lines" (each a feature), "sentence" (the first), "all" (as one sentence).
        samples: Answers per question.
        temperature: 0 for the likeliest answer; higher is more varied.
        max_tokens: Tokens of an answer.
    """

    questions: tuple[str, ...]
    keep: Literal["lines", "sentence", "all"]
    samples: int = 1
    temperature: float = 0.0
    max_tokens: int = 100


STYLES: Mapping[str, Style] = MappingProxyType(
    {
        "features": Style((_FEATURE_EXAMPLES + _FEATURE_QUESTION,), "lines"),
        "sentences": Style(
            (
                "In one sentence, say what {} looks like:",
                "In one sentence, say how to recognise {} by eye:",
                "What do you see when you look at {}?",
                "In one sentence, describe a picture of {} found on the internet:",
                "A caption for a photo of {}:",
            ),
            "sentence",
            10,
            0.99,
            50,
        ),
    }
)
"""features: short visible features, as DCLIP reads them. sentences: whole sentences, as CuPL averages them."""


@dataclass(frozen=True)
class Asking:
    """What is asked, and how.

    Args:
        questions: See `Style`.
        keep: See `Style`.
        samples: Answers per question; more than one needs a temperature.
        temperature: See `Style`.
        max_tokens: See `Style`.
        seed: Seeds every answer.
    """

    questions: tuple[str, ...]
    keep: Literal["lines", "sentence", "all"] = "sentence"
    samples: int = 1
    temperature: float = 0.0
    max_tokens: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = [one for one in self.questions if "{}" not in one and "{name}" not in one]
        if not self.questions or wrong:
            what = f"{wrong[0]!r:.80} has neither" if wrong else "there is no question"
            raise ConfigError(f'A question needs "{{}}" ("an oak") or "{{name}}" ("oak") for the class; {what}.')
        if self.keep not in ("lines", "sentence", "all"):
            raise ConfigError(f"keep is {self.keep!r}, but must be lines, sentence or all.")
        problems = [
            f"{name} is {getattr(self, name)}, but must be {wanted}"
            for name, wanted, ok in (
                ("samples", "between 1 and 1000", 1 <= self.samples <= 1000),
                ("temperature", "between 0 and 10", 0 <= self.temperature <= 10),
                ("max_tokens", "between 1 and 4096", 1 <= self.max_tokens <= 4096),
            )
            if not ok
        ]
        if self.samples > 1 and self.temperature == 0:
            problems.append(f"samples is {self.samples}, and at temperature 0 all answers are the same")
        if problems:
            raise ConfigError(f"The model can't be asked like this: {'; '.join(problems)}.")


def with_article(name: str) -> str:
    """A class name behind its article.

    Example:
        >>> with_article("oak"), with_article("tabby_cat")
        ('an oak', 'a tabby cat')
    """
    plain = name.replace("_", " ")
    return f"{'an' if plain[:1].lower() in tuple('aeiou') else 'a'} {plain}"


def prompts_of(name: str, asking: Asking) -> list[str]:
    """The prompts of a class, `samples` of each question."""
    filled = [
        one.replace("{}", with_article(name)).replace("{name}", name.replace("_", " ")) for one in asking.questions
    ]
    return [prompt for prompt in filled for _ in range(asking.samples)]


def sentences_in(answer: str, keep: str, *, finished: bool = True) -> list[str]:
    """The sentences of an answer.

    Args:
        answer: What the model wrote.
        keep: "lines", "sentence" or "all".
        finished: False where the answer ends because there was no more room: its last line is then left out, unless it
            is the only one.

    Example:
        >>> sentences_in(" a red cap\\n- white spots\\n\\nQuestion: more", "lines")
        ['a red cap', 'white spots']
        >>> sentences_in("It has a red cap. It is", "sentence")
        ['It has a red cap.']
    """
    text = answer.strip()
    if keep == "lines":
        block = re.split(r"\n\s*\n|\n\s*(?:Question|Q):", text)[0]
        cut_off = not finished and block == text
        lines = [re.sub(r"^\s*(?:[-*•–]+|\d+[.)])\s*", "", line).strip() for line in block.splitlines()]
        lines = [line for line in lines if line]
        return lines[:-1] if cut_off and len(lines) > 1 else lines
    text = " ".join(text.split())
    if keep == "sentence":
        end = re.search(r"[.!?](?=\s|$)", text)
        text = text[: end.end()] if end else text
        text = text + "." if text and text[-1] not in ".!?" else text
    return [text] if text.strip(" .!?") else []


# --- the model --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What a model wrote, and whether it came to an end by itself."""

    text: str
    finished: bool


class Writer(Protocol):
    """What answers prompts."""

    name: str

    def answer(self, prompts: Sequence[str], seeds: Sequence[int], asking: Asking) -> list[Answer]:
        """One answer for each prompt, each from its own seed."""


class LanguageModel:
    """A text or multimodal model that transformers can load.

    Args:
        identifier: A hub id, or a folder.
        device: Where it lives.
        precision: Of its weights, "fp32" or "bf16".
        chat: Ask through the tokenizer's chat template; None where it has one.

    Raises:
        MissingPathError: The identifier looks like a folder, and there is none.
        BackboneError: It can't be loaded, or doesn't write text.
    """

    def __init__(
        self,
        identifier: str,
        *,
        device: str = "cpu",
        precision: Literal["fp32", "bf16"] = "fp32",
        chat: bool | None = None,
    ) -> None:
        from transformers import AutoConfig, AutoTokenizer

        self.name, source = identifier, _source(identifier)
        config = _load(identifier, lambda: AutoConfig.from_pretrained(source, trust_remote_code=False), "config")
        self.encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
        self.tokenizer: Any = _load(
            identifier, lambda: AutoTokenizer.from_pretrained(source, trust_remote_code=False), "tokenizer"
        )
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        self.model: Any = _load_model(identifier, source, _auto_class(identifier, config), dtype).to(device).eval()
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.unk_token
        self.tokenizer.padding_side = "right" if self.encoder_decoder else "left"
        self.chat = bool(getattr(self.tokenizer, "chat_template", None)) if chat is None else chat
        if self.chat and not getattr(self.tokenizer, "chat_template", None):
            raise BackboneError(f"{identifier} has no chat template: ask it without one.")

    @torch.no_grad()
    def answer(self, prompts: Sequence[str], seeds: Sequence[int], asking: Asking) -> list[Answer]:
        """One answer for each prompt, drawn from its own seed.

        Raises:
            BackboneError: A prompt and its answer don't fit into the model.
        """
        asked = [self._through_chat(prompt) for prompt in prompts] if self.chat else list(prompts)
        tokens = self.tokenizer(
            asked, return_tensors="pt", padding=True, add_special_tokens=not self.chat, return_token_type_ids=False
        ).to(self.model.device)
        start = 1 if self.encoder_decoder else tokens["input_ids"].shape[1]
        self._check_room(tokens["input_ids"].shape[1], asking)
        written = self.model.generate(
            **tokens,
            max_new_tokens=asking.max_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=self.tokenizer.pad_token_id,
            logits_processor=[_SeededDraw(seeds, asking.temperature)] if asking.temperature else [],
        )
        ends = self._end_tokens()
        rows = [row[start:].tolist() for row in written]
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [Answer(text, bool(ends & set(row))) for text, row in zip(texts, rows, strict=True)]

    def _through_chat(self, prompt: str) -> str:
        said = [{"role": "user", "content": prompt}]
        text: str = self.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        return text

    def _end_tokens(self) -> set[int]:
        ends = self.model.generation_config.eos_token_id
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        return {*ends, *([] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id])}

    def _check_room(self, length: int, asking: Asking) -> None:
        config = self.model.config.get_text_config()
        room = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        needed = length if self.encoder_decoder else length + asking.max_tokens
        if room and needed > room:
            raise BackboneError(
                f"{self.name} has {room} positions, and the longest question with its answer takes {needed}: ask a"
                " shorter question, for fewer tokens, or another model."
            )


class _SeededDraw:
    """Draws the next token of each row from the row's own generator: the largest of logits plus Gumbel noise.

    It is a draw from the softmax, whatever the other rows of the batch are.
    """

    def __init__(self, seeds: Sequence[int], temperature: float) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = [torch.rand(scores.shape[1], generator=numbers, dtype=torch.float64) for numbers in self.generators]
        gumbel = -(-torch.stack(noise).clamp(1e-300, 1 - 1e-16).log()).log()  # [rows, vocabulary]
        return scores.float() / self.temperature + gumbel.to(scores.device, torch.float32)


def _source(identifier: str) -> str:
    path = Path(identifier).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_absolute() or identifier.startswith(("./", "../", "~")):
        raise MissingPathError(f"There is no folder {identifier!r}. A model is a folder of transformers or a hub id.")
    return identifier


def _load(identifier: str, make: Callable[[], Any], what: str) -> Any:
    """Call transformers' loader; whatever it raises becomes one sentence."""
    try:
        return from_library(identifier, make, what)
    except BackboneError as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300].rstrip(".")
        raise BackboneError(
            f"The {what} of the language model {identifier!r} couldn't be loaded: {reason}. Give a folder with a model"
            " of transformers and its tokenizer, or a hub id where there is a network."
        ) from error


def _load_model(identifier: str, source: str, kind: Any, dtype: torch.dtype) -> Any:
    """The model from safetensors, with every weight found."""
    given = {"trust_remote_code": False, "use_safetensors": True, "dtype": dtype, "output_loading_info": True}
    model, info = _load(identifier, lambda: kind.from_pretrained(source, **given), "model")
    missing = sorted(info["missing_keys"])
    if missing:
        raise BackboneError(
            f"The files of the language model {identifier!r} lack {len(missing)} weights ({', '.join(missing[:3])}, …):"
            " they were made for another architecture, or are incomplete."
        )
    return model


def _auto_class(identifier: str, config: Any) -> Any:
    """transformers' class that writes text with a model of this kind."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

    kinds = (AutoModelForImageTextToText, AutoModelForSeq2SeqLM, AutoModelForCausalLM)
    for kind in kinds if hasattr(config, "text_config") else kinds[1:]:
        if type(config) in kind._model_mapping:
            return kind
    raise BackboneError(
        f"{identifier} is of the type {config.model_type!r}, which doesn't write text: give a causal, sequence-to-"
        "sequence or image-and-text model of transformers."
    )


# --- asking about all classes -----------------------------------------------------------------------------------------


@dataclass
class Record:
    """What was asked about a class, and what came of it, in the order of the prompts."""

    prompt: str
    answer: str
    descriptions: list[str] = field(default_factory=list)


def answers_path(out: str | Path) -> Path:
    """Where the prompts and answers behind a file of descriptions are kept: birds.json, birds.answers.json."""
    path = Path(out)
    return path.with_name(f"{path.stem}.answers.json")


def describe_classes(
    names: Sequence[str],
    writer: Writer,
    asking: Asking,
    out: str | Path,
    *,
    batch_size: int = 8,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
) -> Descriptions:
    """Ask about every class and write two files: the sentences by class, and the prompts beside their answers.

    Both are written whenever a class is finished, so that asking again after an interruption goes on where it stopped.
    Classes whose answers hold no sentence are left out of the first file.

    Args:
        names: The classes.
        writer: The model.
        asking: Questions and how to ask them.
        out: The file of sentences, which `read_descriptions` takes; its neighbour is called `answers_path(out)`.
        batch_size: Prompts answered at once.
        overwrite: Begin anew, whatever is in the files.
        progress: Called as (what, prompts answered, prompts in all).

    Returns:
        The sentences by class, in the order of `names`.

    Raises:
        StorageError: The files are there and were made by another model or with other questions.
        DataError: No class names.
    """
    if not names:
        raise DataError("No class names were given: at least one is needed.")
    out, made_by = Path(out), {"model": writer.name, **asdict(asking), "questions": list(asking.questions)}
    records = {} if overwrite else _finished(out, made_by)
    jobs = [
        (name, number, prompt)
        for name in names
        if name not in records
        for number, prompt in enumerate(prompts_of(name, asking))
    ]
    total = len(names) * len(asking.questions) * asking.samples
    partial: dict[str, list[Record]] = {}
    for start in range(0, len(jobs), batch_size):
        if progress is not None:
            progress("asking the model", total - len(jobs) + start, total)
        batch = jobs[start : start + batch_size]
        answers = writer.answer([job[2] for job in batch], [_seed(asking.seed, *job[:2]) for job in batch], asking)
        for (name, _, prompt), answer in zip(batch, answers, strict=True):
            found = sentences_in(answer.text, asking.keep, finished=answer.finished)
            partial.setdefault(name, []).append(Record(prompt, answer.text, found))
        upcoming = {job[0] for job in jobs[start + batch_size :]}
        done = [name for name in partial if name not in upcoming]
        records |= {name: partial.pop(name) for name in done}
        if done:
            _write(out, records, made_by)
    if progress is not None:
        progress("asking the model", total, total)
    _write(out, records, made_by)
    return {name: tuple(_sentences_of(records[name])) for name in names}


def _seed(seed: int, name: str, number: int) -> int:
    """A seed of one answer's own, below 2⁶³."""
    text = "\x1f".join((str(seed), name, str(number)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _sentences_of(records: Sequence[Record]) -> list[str]:
    return [sentence for record in records for sentence in record.descriptions]


def _write(out: Path, records: Mapping[str, list[Record]], made_by: Mapping[str, Any]) -> None:
    answers = {name: [asdict(record) for record in found] for name, found in records.items()}
    write_json(answers_path(out), {"made_by": dict(made_by), "answers": answers})
    plain = {name: _sentences_of(found) for name, found in records.items()}
    write_json(out, {name: sentences for name, sentences in plain.items() if sentences})


def _finished(out: Path, made_by: Mapping[str, Any]) -> dict[str, list[Record]]:
    """The classes that are done already."""
    path = answers_path(out)
    if not path.is_file():
        if out.exists():
            raise StorageError(f"{out} is already there and wasn't written here: choose another --out, or --overwrite.")
        return {}
    content = read_json(path)
    try:
        before, answers = content["made_by"], content["answers"]
        records = {name: [Record(**record) for record in found] for name, found in answers.items()}
    except (TypeError, KeyError, AttributeError) as error:
        raise StorageError(f"{path} is damaged: choose another --out, or say --overwrite.") from error
    different = [key for key in made_by if not isinstance(before, dict) or before.get(key) != made_by[key]]
    if different:
        raise StorageError(
            f"{path} was written with another {different[0]}: choose another --out, say --overwrite, or ask as before."
        )
    return records
