"""`python -m benchmarks.rollouts`: answers drawn from one pass over image and question, against a pass for each answer.

Both ways draw by the same numbers, so they must write the same answers and give the same gradient.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from adaptkit.backbones.load import load_backbone
from adaptkit.backbones.mllm.batches import Prefix
from adaptkit.backbones.mllm.model import MLLM
from adaptkit.backbones.mllm.prompts import Turn
from adaptkit.backbones.mllm.sampling import Sampling
from adaptkit.errors import ConfigError
from adaptkit.methods.mllm._asking import QUESTION
from adaptkit.methods.mllm._grpo import numbers_for, roll
from adaptkit.methods.mllm._letters import options_text
from adaptkit.storage import write_json
from benchmarks.speed.measure import machine_facts

RESULT = Path(__file__).parent / "result.json"
OPTIONS = ("red circle", "blue square", "green star", "yellow cross", "purple triangle")
TOLERANCE = 1e-4
ENDLESS = Sampling(temperature=4.0)  # answers of a random length, as thoughts have


@dataclass(frozen=True)
class Case:
    """What is measured.

    Args:
        mllm: The model.
        pixels: [images, 3, size, size].
        count: Answers per image.
        tokens: Most tokens of an answer.
    """

    mllm: MLLM
    pixels: Tensor
    count: int
    tokens: int

    def prefix(self, pixels: Tensor) -> Prefix:
        """A multiple-choice question about each image, from pixels on."""
        with torch.no_grad():
            features = self.mllm.image_features(pixels.to(self.mllm.device), "")
        turn = Turn(options_text(QUESTION.format(noun="object"), OPTIONS))
        return self.mllm.prefix([self.mllm.prompter.ids([turn], [count]) for count in features.counts], features)

    def shared(self) -> Prefix:
        """One row per answer, made once per image."""
        own = self.prefix(self.pixels)
        return own.select(torch.arange(len(own)).repeat_interleave(self.count).tolist())

    def plain(self) -> Prefix:
        """One row per answer, each made from pixels on."""
        return self.prefix(self.pixels.repeat_interleave(self.count, dim=0))

    @torch.no_grad()
    def draw_shared(self) -> list[list[int]]:
        numbers = [numbers_for("rollouts", image) for image in range(len(self.pixels))]
        groups = roll(self.mllm, self.prefix(self.pixels), self.count, self.tokens, ENDLESS, numbers)
        return [answer for group in groups for answer in group]

    @torch.no_grad()
    def draw_plain(self) -> list[list[int]]:
        numbers = [numbers_for("rollouts", image) for image in range(len(self.pixels))]
        draws = [torch.rand(self.count, self.tokens, generator=own, dtype=torch.float64) for own in numbers]
        draw = torch.cat(draws).to(self.mllm.device)
        return self.mllm.generate(self.plain(), self.tokens, sampling=ENDLESS, draws=draw, keep_end=True)

    def gradient(self, make: Callable[[], Prefix], answers: list[list[int]]) -> Tensor:
        """Of the answers' mean log-probability, with respect to the first layer's query weights."""
        weight = next(p for name, p in self.mllm.language.named_parameters() if name.endswith("q_proj.weight"))
        weight.requires_grad_(True)
        try:
            return torch.autograd.grad(self.mllm.answer_scores(make(), answers).mean(), weight)[0]
        finally:
            weight.requires_grad_(False)


def seconds(ways: dict[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each way, measured in turns after a warm-up."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:
                taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in taken.items()}


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """Seconds of both ways of drawing and of the gradient, their ratios, and whether the numbers are the same."""
    answers, others = case.draw_shared(), case.draw_plain()
    ours, theirs = case.gradient(case.shared, answers), case.gradient(case.plain, answers)
    drawing = seconds({"shared": case.draw_shared, "plain": case.draw_plain}, repeats, case.mllm.device)
    ways = {
        "shared": lambda: case.gradient(case.shared, answers),
        "plain": lambda: case.gradient(case.plain, answers),
    }
    learning = seconds(ways, repeats, case.mllm.device)
    return {
        "prompt_tokens": case.prefix(case.pixels[:1]).mask.shape[1],
        "mean_answer_tokens": sum(map(len, answers)) / len(answers),
        "same_answers": sum(a == b for a, b in zip(answers, others, strict=True)) / len(answers),
        "gradient_difference": float((ours - theirs).abs().max() / theirs.abs().max()),
        "drawing": {**drawing, "ratio": drawing["plain"] / drawing["shared"]},
        "gradient": {**learning, "ratio": learning["plain"] / learning["shared"]},
    }


@click.command()
@click.option("--backbone", default="mini-mllm", show_default=True)
@click.option("--images", default=8, show_default=True)
@click.option("--answers", "count", default=8, show_default=True, help="Drawn per image.")
@click.option("--tokens", default=8, show_default=True, help="Most tokens of an answer.")
@click.option("--repeats", default=5, show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=RESULT, show_default=True)
def main(backbone: str, images: int, count: int, tokens: int, repeats: int, device: str, out: Path) -> None:
    """Exits 1 where the two ways don't give the same gradient."""
    loaded = load_backbone(backbone).to(device)
    if not isinstance(loaded, MLLM):
        raise ConfigError(f"{backbone!r} isn't a multimodal language model: choose mini-mllm, or transformers:….")
    side = loaded.spec.preprocessing.image_size
    pixels = torch.rand(images, 3, side, side, generator=torch.Generator().manual_seed(0))
    found = measure(Case(loaded, pixels, count, tokens), repeats)
    sizes = {"backbone": backbone, "images": images, "answers": count, "tokens": tokens}
    write_json(out, {"schema": 1, **sizes, "machine": machine_facts(), **found})
    for what in ("drawing", "gradient"):
        own = found[what]
        click.echo(f"{what}: {own['shared']:.3f} s shared, {own['plain']:.3f} s plain, ratio {own['ratio']:.2f}")
    click.echo(
        f"same answers: {100 * found['same_answers']:.0f} %, largest difference of gradients, relative:"
        f" {found['gradient_difference']:.1e}"
    )
    if found["gradient_difference"] > TOLERANCE:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
