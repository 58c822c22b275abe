"""Train `mini` from scratch: attributes first, then captions beside them.

    python -m benchmarks.pretrain_mini --out mini_weights

Writes `model.safetensors` (fp16; of the token embeddings only the rows of trained tokens) and `training.json`. Drawn
pictures only; see `stream`. Fonts: Debian's packages are listed in README.md beside this file.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.backbones.clip_bpe import ClipBpe
from adaptkit.backbones.mini import formula, mini_config
from adaptkit.storage import write_json, write_safetensors
from benchmarks.pretrain_mini import stream

MEAN_STD = 0.5  # of the preprocessing in mini's config, every channel


class Trainee(nn.Module):
    """open_clip's CLIP with attribute heads on its image feature."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        import open_clip

        config = mini_config()["model_cfg"]
        self.clip = open_clip.CLIP(**config)
        width = config["vision_cfg"]["width"]
        self.heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in stream.HEADS.items()})
        self.register_buffer("rows", rows)  # ids of the trained tokens, ascending
        self.embedding = nn.Parameter(formula.token_rows(rows.tolist()).clone())  # [rows, width]
        self.clip.token_embedding.weight.requires_grad_(False)

    def image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(features [n, embed], pooled token [n, width])."""
        visual = self.clip.visual
        x = visual.conv1(pixels).flatten(2).transpose(1, 2)  # [n, patches, width]
        x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], dim=1) + visual.positional_embedding
        pooled = visual.ln_post(visual.transformer(visual.ln_pre(x))[:, 0])
        return pooled @ visual.proj, pooled

    def text(self, ids: Tensor) -> Tensor:
        """Features [n, embed] of ids [n, length], cut after the longest text's end; rows of trained tokens only."""
        x = (
            F.embedding(torch.searchsorted(self.rows, ids), self.embedding)
            + self.clip.positional_embedding[: ids.shape[1]]
        )
        mask = torch.full((ids.shape[1],) * 2, -math.inf).triu(1)
        x = self.clip.ln_final(self.clip.transformer(x, attn_mask=mask))
        return x[torch.arange(len(x)), ids.argmax(dim=-1)] @ self.clip.text_projection


class Captions:
    """Texts to ids [n, length] (padded with 0), remembering what it has seen."""

    def __init__(self) -> None:
        self.bpe, self.known = ClipBpe(), {}

    def pieces(self, text: str) -> list[int]:
        if text not in self.known:
            if len(self.known) > 200_000:
                self.known.clear()
            self.known[text] = [self.bpe.start, *self.bpe.encode(text), self.bpe.end]
        return self.known[text]

    def __call__(self, texts: list[str]) -> Tensor:
        rows = [self.pieces(text) for text in texts]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        for row, pieces in enumerate(rows):
            ids[row, : len(pieces)] = torch.tensor(pieces)
        return ids


def trained_tokens(captions: Captions, seed: int) -> Tensor:
    """Ids of every token that the captions use, by drawing many of them."""
    numbers = np.random.default_rng([seed, 1])
    used = {0}
    for _ in range(120):
        for caption in stream.draw_batch(numbers, 512).captions:
            used.update(captions.pieces(caption))
    return torch.tensor(sorted(used))


def batches(seed: int, size: int, steps: int, start: int = 0) -> Iterator[stream.Batch]:
    """Batches drawn ahead in a thread; step i depends on (seed, i) alone."""
    draw = lambda step: stream.draw_batch(np.random.default_rng([seed, 2, step]), size)  # noqa: E731
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(draw, start)
        for step in range(start, steps):
            batch = ahead.result()
            if step + 1 < steps:
                ahead = pool.submit(draw, step + 1)
            yield batch


def attribute_loss(model: Trainee, pooled: Tensor, targets: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Sum of the heads' losses, each weighed by its share of the batch."""
    total, right = pooled.new_zeros(()), {}
    for name, target in targets.items():
        rows = (target != stream.IGNORED).nonzero()[:, 0]
        logits = model.heads[name](pooled[rows])
        total = total + F.cross_entropy(logits, target[rows], label_smoothing=0.05) * len(rows) / len(pooled)
        right[name] = float((logits.argmax(1) == target[rows]).float().mean())
    return total, right


def caption_loss(images: Tensor, texts: Tensor, captions: list[str], scale: Tensor) -> Tensor:
    """Contrastive loss both ways over the distinct captions; pictures with equal captions share the positive."""
    distinct = {caption: index for index, caption in enumerate(dict.fromkeys(captions))}
    own = torch.tensor([distinct[caption] for caption in captions])  # [n]
    logits = scale * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T  # [n, distinct]
    positive = F.one_hot(own, len(distinct)).float()
    back = -(F.log_softmax(logits, dim=0) * positive / positive.sum(0)).sum(0).mean()
    return (F.cross_entropy(logits, own) + back) / 2


def rate(step: int, steps: int, peak: float) -> float:
    """Warm-up over 200 steps, constant until 60 %, then down to nothing."""
    if step < 200:
        return peak * (step + 1) / 200
    left = (steps - step) / (0.4 * steps)
    return peak * min(1.0, left)


@click.command()
@click.option("--steps", default=1800, show_default=True)
@click.option("--text-from", default=0.3, show_default=True, help="Share of the steps on attributes alone.")
@click.option("--batch-size", default=256, show_default=True)
@click.option("--lr", default=2e-3, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write to.")
def main(steps: int, text_from: float, batch_size: int, lr: float, seed: int, threads: int, out: Path) -> None:
    """Train mini and write its weights."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    captions = Captions()
    model = Trainee(trained_tokens(captions, seed))
    known = set(model.rows.tolist())
    decayed = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    plain = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    began, history = time.time(), []
    for step, batch in enumerate(batches(seed, batch_size, steps)):
        for group in optimiser.param_groups:
            group["lr"] = rate(step, steps, lr)
        images, pooled = model.image((batch.pictures - MEAN_STD) / MEAN_STD)
        loss, right = attribute_loss(model, pooled, batch.targets)
        contrast = torch.zeros(())
        if step >= text_from * steps:
            rows = [i for i, text in enumerate(batch.captions) if known.issuperset(captions.pieces(text))]
            texts = [batch.captions[i] for i in rows]
            scale = model.clip.logit_scale.exp().clamp(max=100)
            contrast = caption_loss(images[rows], model.text(captions(list(dict.fromkeys(texts)))), texts, scale)
            loss = loss + 0.5 * contrast
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 100 == 99:
            shown = " ".join(f"{name} {value:.2f}" for name, value in right.items())
            line = f"step {step + 1}/{steps} {time.time() - began:.0f} s loss {loss.item():.3f}"
            line += f" captions {contrast.item():.3f}"
            history.append({"step": step + 1, "loss": loss.item(), "captions": contrast.item(), **right})
            click.echo(f"{line} {shown}")
        if step % 1000 == 999 or step == steps - 1:
            save(model, out, {"steps": step + 1, "of": steps, "seconds": time.time() - began, "seed": seed, "lr": lr,
                              "batch_size": batch_size, "text_from": text_from, "fonts": len(stream.font_files()),
                              "history": history})  # fmt: skip


def save(model: Trainee, out: Path, facts: dict[str, object]) -> None:
    """Weights in fp16 under open_clip's names; `token_rows` are the ids whose embeddings are stored."""
    out.mkdir(parents=True, exist_ok=True)
    state = {k: v for k, v in model.clip.state_dict().items() if k not in ("token_embedding.weight", "attn_mask")}
    tensors = {key: value.half().contiguous() if value.dim() else value.float() for key, value in state.items()}
    tensors["token_rows"] = model.rows.to(torch.int32)
    tensors["token_embedding.rows"] = model.embedding.detach().half()
    write_safetensors(out / "model.safetensors", tensors)
    write_json(out / "training.json", facts)


if __name__ == "__main__":
    main()
