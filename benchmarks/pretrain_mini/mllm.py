"""Train `mini-mllm`: a small Llama that learns to read mini's frozen picture tower.

    python -m benchmarks.pretrain_mini.mllm --out mini_mllm

Writes a LLaVA repository in fp16, `training.json` beside it, and every two minutes all of it with `state.pt`, from
which `--resume` goes on. Several questions about a picture go through the Llama behind one copy of the picture; none of
them sees another. Beside the answers' likelihood, linear readers that are thrown away afterwards say from inner layers
which words and which options of a lettered choice are true and what an option's letter is, so that the choice is learnt
early.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.storage import write_json
from benchmarks.pretrain_mini import mllm_layout as layout
from benchmarks.pretrain_mini.mllm_questions import Asked, Picture, draw_pictures, questions

CHECKPOINT_SECONDS = 120
IGNORED = -100
READERS = {"word": (2, 2), "option": (3, 2), "place": (3, 6)}  # after which layer, how many values
READER_WEIGHT = 0.5
LETTER_WEIGHT = 2.0
MUON_FACTOR = 2.0  # of its rate to AdamW's

Optimisers = list[tuple[torch.optim.Optimizer, float]]


class Words:
    """Texts to token ids, word by word and remembered; equal to the whole text's ids, as words never melt together."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.known = tokenizer, {}

    def __call__(self, text: str) -> list[int]:
        return [piece for word in text.split() for piece in self.word(word)]

    def word(self, word: str) -> list[int]:
        if word not in self.known:
            if len(self.known) > 100_000:
                self.known.clear()
            self.known[word] = self.tokenizer(word, add_special_tokens=False).input_ids
        return self.known[word]


@dataclass
class Row:
    """One picture with its questions as one sequence.

    Args:
        ids: Tokens.
        targets: Next tokens where answers are, else IGNORED.
        block: 0 for what comes before the picture, 1 for the picture, from 2 on one number per question.
        positions: Positions; each question's begin behind the picture.
        marks: What each of READERS is to say, at the last token of a word or option; else IGNORED.
        letters: Where a letter is to be said.
        text_blocks: Questions that don't see the picture.
    """

    ids: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    block: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    marks: dict[str, list[int]] = field(default_factory=lambda: {name: [] for name in READERS})
    letters: list[bool] = field(default_factory=list)
    text_blocks: list[int] = field(default_factory=list)

    def add(self, ids: list[int], block: int, start: int) -> None:
        """Tokens without targets, from position `start` on."""
        count = len(ids)
        self.ids += ids
        self.block += [block] * count
        self.positions += range(start, start + count)
        for marks in (self.targets, *self.marks.values()):
            marks += [IGNORED] * count
        self.letters += [False] * count


def make_row(picture: Picture, asked: list[Asked], words: Words, vectors: int) -> Row:
    """Tokens, targets and marks of one picture."""
    row = Row()
    row.add([layout.START, layout.USER], 0, 0)
    row.add([layout.IMAGE] * vectors, 1, 2)
    for number, item in enumerate(asked, start=2):
        start = 2 + (vectors if item.image else 0)
        if not item.image:
            row.text_blocks.append(number)
        at = len(row.ids)
        _add_question(row, picture, item, words, number, start)
        answer = [*words(item.answer), layout.END]
        row.add([layout.ASSISTANT, *answer[:-1]], number, start + len(row.ids) - at)
        row.targets[-len(answer) :] = answer
        row.letters[-len(answer)] = bool(item.options)
    return row


def _add_question(row: Row, picture: Picture, item: Asked, words: Words, number: int, start: int) -> None:
    """The question's tokens; in lettered choices, what is true of the picture is marked."""
    if not item.options:
        row.add(words(item.question), number, start)
        return
    true_words, at = set(picture.name.split()), len(row.ids)
    grow = lambda ids: row.add(ids, number, start + len(row.ids) - at)  # noqa: E731
    first, *lines = item.question.split("\n")
    grow(words(first))
    for place, (option, line) in enumerate(zip(item.options, lines, strict=False)):
        grow(words(line.split()[0]))
        for word in option.split():
            grow(words.word(word))
            row.marks["word"][-1] = int(word in true_words)
        row.marks["option"][-1] = int(option == picture.name)
        row.marks["place"][-1] = place
    grow(words(lines[-1]))


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right; see `Row`. `mask` [rows, 1, length, length] is added to attention."""

    pictures: Tensor
    ids: Tensor
    targets: Tensor
    positions: Tensor
    marks: dict[str, Tensor]
    letters: Tensor
    mask: Tensor


def collate(pictures: np.ndarray, rows: list[Row]) -> Batch:
    """Rows as tensors, with the mask that keeps questions apart."""
    length = max(len(row.ids) for row in rows)

    def padded(lists: list[list[Any]], fill: int) -> Tensor:
        return torch.tensor([values + [fill] * (length - len(values)) for values in lists])

    block = padded([row.block for row in rows], -1)
    same = block[:, :, None] == block[:, None, :]
    blind = torch.zeros_like(block, dtype=torch.bool)
    for place, row in enumerate(rows):
        for number in row.text_blocks:
            blind[place] |= block[place] == number
    before = (block[:, None, :] == 0) | ((block[:, None, :] == 1) & ~blind[:, :, None])
    sees = (same | before) & torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)[:, None]
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    return Batch(
        pixels,
        padded([row.ids for row in rows], layout.PAD),
        padded([row.targets for row in rows], IGNORED),
        padded([row.positions for row in rows], 0),
        {name: padded([row.marks[name] for row in rows], IGNORED) for name in READERS},
        padded([row.letters for row in rows], False),
        mask,
    )


def draw_batch(seed: int, step: int, size: int, words: Words, vectors: int) -> Batch:
    """The batch of a step; it depends on (seed, step) alone."""
    rng = np.random.default_rng([seed, 3, step])
    pictures, known = draw_pictures(rng, size)
    return collate(pictures, [make_row(picture, questions(rng, picture), words, vectors) for picture in known])


class Trainee(nn.Module):
    """The model with its readers."""

    def __init__(self, seed: int, **sizes: int) -> None:
        super().__init__()
        self.llava = layout.new_model(seed, **sizes)
        self.llava.model.vision_tower.requires_grad_(False)
        width = self.llava.config.text_config.hidden_size
        self.readers = nn.ModuleDict({name: nn.Linear(width, values) for name, (_, values) in READERS.items()})

    def tower(self, pixels: Tensor) -> Tensor:
        """What the projector reads, [pictures, vectors, 2 · width]."""
        layers = self.llava.config.vision_feature_layer
        with torch.no_grad():
            states = self.llava.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        return torch.cat([states[layer] for layer in layers], dim=-1)

    @torch.no_grad()
    def whiten(self, pixels: Tensor) -> None:
        """Fold the mean and scale of the tower's vectors into the projector's first layer."""
        features, first = self.tower(pixels).flatten(0, 1), self.llava.model.multi_modal_projector.linear_1
        first.weight.copy_(torch.randn_like(first.weight) / first.in_features**0.5 / features.std(0))
        first.bias.copy_(-first.weight @ features.mean(0))
        second = self.llava.model.multi_modal_projector.linear_2
        second.weight.normal_(0, 0.05)

    def states(self, batch: Batch) -> list[Tensor]:
        """What each layer gives, [rows, length, width]; the last one still without its norm."""
        language = self.llava.model.language_model
        vectors = self.llava.model.multi_modal_projector(self.tower(batch.pictures))
        x = language.embed_tokens(batch.ids)
        x = x.masked_scatter((batch.ids == layout.IMAGE)[..., None], vectors.to(x.dtype))
        rotary = language.rotary_emb(x, position_ids=batch.positions)
        states = []
        for layer in language.layers:
            x = layer(x, attention_mask=batch.mask, position_ids=batch.positions, position_embeddings=rotary)
            x = x[0] if isinstance(x, tuple) else x
            states.append(x)
        return states

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """The loss, and what shows its course."""
        states = self.states(batch)
        wanted = batch.targets != IGNORED
        logits = self.llava.lm_head(self.llava.model.language_model.norm(states[-1][wanted]))
        targets, letters = batch.targets[wanted], batch.letters[wanted]
        weight = 1 + (LETTER_WEIGHT - 1) * letters.float()
        loss = (F.cross_entropy(logits, targets, reduction="none") * weight).sum() / weight.sum()
        right = (logits.argmax(1) == targets).float()
        shown = {"answers": loss.item(), "token": float(right[~letters].mean()), "letter": float(right[letters].mean())}
        for name, (layer, _) in READERS.items():
            truth = batch.marks[name]
            marked = truth != IGNORED
            said = self.readers[name](states[layer - 1][marked])
            loss = loss + READER_WEIGHT * F.cross_entropy(said, truth[marked])
            shown[name] = float((said.argmax(1) == truth[marked]).float().mean())
        return loss, shown


def make_optimisers(model: Trainee, lr: float) -> Optimisers:
    """Muon for the Llama's matrices, AdamW for all else, each with its peak rate."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = [p for name, p in trained.items() if ".layers." in name and p.dim() == 2]
    others = [p for name, p in trained.items() if ".layers." not in name or p.dim() != 2]
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    return [(muon, MUON_FACTOR * lr), (torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.01), lr)]


def rate(progress: float, step: int) -> float:
    """Share of the peak rate: warm-up over 50 steps, constant until half of the way, then down to nothing."""
    return min(1.0, (step + 1) / 50, max(0.0, (1 - progress) / 0.5))


@click.command()
@click.option("--steps", default=3000, show_default=True, help="At most so many.")
@click.option("--minutes", default=20.0, show_default=True, help="At most so long; the rate falls towards the first.")
@click.option("--batch-size", default=32, show_default=True, help="Pictures; each has three questions.")
@click.option("--lr", default=2e-3, show_default=True)
@click.option("--width", default=192, show_default=True)
@click.option("--layers", default=4, show_default=True)
@click.option("--inner", default=384, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--bf16/--fp32", default=True, show_default=True, help="Matrix products of the training in bf16.")
@click.option("--resume", is_flag=True, help="Go on from OUT/state.pt.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write to.")
def main(
    steps: int,
    minutes: float,
    batch_size: int,
    lr: float,
    width: int,
    layers: int,
    inner: int,
    seed: int,
    threads: int,
    bf16: bool,
    resume: bool,
    out: Path,
) -> None:
    """Train mini-mllm and write it."""
    torch.set_num_threads(threads)
    tokenizer = layout.make_tokenizer()
    sizes = {"width": width, "layers": layers, "inner": inner}
    model = Trainee(seed, **sizes)
    draw = partial(draw_batch, seed, words=Words(tokenizer), vectors=model.llava.config.image_seq_length)
    model.whiten(draw(10**6, 256).pictures)
    optimisers = make_optimisers(model, lr)
    step, spent, history = _restore(out, model, optimisers) if resume else (0, 0.0, [])
    settings = {
        "seed": seed,
        "lr": lr,
        "batch_size": batch_size,
        "of_steps": steps,
        "minutes": minutes,
        "bf16": bf16,
        **sizes,
    }
    began = saved = time.time()
    seconds = lambda: spent + time.time() - began  # noqa: E731
    sums: dict[str, float] = {}
    while step < steps and seconds() < 60 * minutes:
        share = rate(max(step / steps, seconds() / 60 / minutes), step)
        for optimiser, peak in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = share * peak
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss, shown = model(draw(step, batch_size))
        model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser, _ in optimisers:
            optimiser.step()
        step += 1
        sums = {key: sums.get(key, 0.0) + value for key, value in shown.items()}
        if step % 25 == 0:
            history.append(
                {"step": step, "seconds": round(seconds()), **{k: round(v / 25, 4) for k, v in sums.items()}}
            )
            click.echo(" ".join(f"{key} {value}" for key, value in history[-1].items()))
            sums = {}
        if time.time() - saved > CHECKPOINT_SECONDS:
            _save(out, model, optimisers, tokenizer, settings, step, seconds(), history)
            saved = time.time()
    _save(out, model, optimisers, tokenizer, settings, step, seconds(), history)


def _save(
    out: Path, model: Trainee, optimisers: Optimisers, tokenizer: Any, settings: dict[str, Any], *course: Any
) -> None:
    """The repository, what `--resume` needs, and the record."""
    step, seconds, history = course
    layout.write_folder(out / "model", model.llava, tokenizer)
    states = [optimiser.state_dict() for optimiser, _ in optimisers]
    torch.save({"model": model.state_dict(), "optimisers": states, "course": course}, out / "state.pt")
    write_json(out / "training.json", {"steps": step, "seconds": round(seconds), **settings, "history": history})


def _restore(out: Path, model: Trainee, optimisers: Optimisers) -> tuple[int, float, list[dict[str, Any]]]:
    state = torch.load(out / "state.pt", weights_only=True)
    model.load_state_dict(state["model"])
    for (optimiser, _), own in zip(optimisers, state["optimisers"], strict=True):
        optimiser.load_state_dict(own)
    return state["course"]


if __name__ == "__main__":
    main()
