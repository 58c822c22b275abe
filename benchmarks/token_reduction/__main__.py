"""`python -m benchmarks.token_reduction`: rules of leaving out image tokens beside all tokens, and one JSON.

Two models: `mini-mllm` on drawn pictures (17 tokens per image; accuracy, and how often the answer stays the same), and
a random model of LLaVA's shape (576 tokens per image, of 24 x 24 patches; time, and how far the last hidden state
moves). The random rule is the baseline that every other one has to beat. A random model's attention means nothing: its
cosines compare rules no further than that.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import Tensor

from adaptkit.backbones.load import load_backbone
from adaptkit.backbones.mini_mllm import model_folder
from adaptkit.backbones.mllm.model import MLLM
from adaptkit.commands import _console as console
from adaptkit.data.synthetic import load_embedded
from adaptkit.methods.mllm.mllm_zero_shot import MllmZeroShot, MllmZeroShotConfig
from adaptkit.storage import write_json
from benchmarks.speed.measure import machine_facts

RULES = ("random", "uniform", "norm", "attention", "merge", "vscan")
KEEPS = (0.5, 0.25)
RESULTS = Path(__file__).parent / "results.json"
COLUMNS = (
    "model",
    "rule",
    "keep",
    "tokens",
    "accuracy",
    "agreement",
    "cosine",
    "CPU ms per image",
    "against all tokens",
)


def shaped_like_llava(folder: Path, width: int = 384, layers: int = 6) -> MLLM:
    """A random LLaVA of 336 pixels and 576 tokens per image, with `mini-mllm`'s tokenizer and template.

    Args:
        folder: Where its files are written.
        width: Of the language model.
        layers: Of the language model; the tower has twelve.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText

    shutil.copytree(model_folder(), folder, dirs_exist_ok=True)
    config = AutoConfig.from_pretrained(folder)
    config.vision_config.update({"image_size": 336, "patch_size": 14, "num_hidden_layers": 12})
    config.text_config.update({"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers})
    config.update({"vision_feature_layer": -2, "vision_feature_select_strategy": "default", "image_seq_length": 576})
    config.dtype = "float32"
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    processor.size, processor.crop_size = {"shortest_edge": 336}, {"height": 336, "width": 336}
    processor.save_pretrained(folder)
    return load_backbone(f"transformers:{folder}")  # type: ignore[return-value]  # it is one


def pictures(dataset: str, count: int, side: int) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Test images of all classes as pixels [count, 3, side, side], their labels, and the class names."""
    data = load_embedded(dataset)
    labels = torch.tensor(data.labels["test"])
    places = torch.linspace(0, len(labels) - 1, count).round().long()
    pixels = torch.tensor(data.images["test"][places.numpy()]).permute(0, 3, 1, 2).float() / 255
    sized = F.interpolate(pixels, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
    return sized, labels[places], data.class_names


@torch.inference_mode()
def asked(method: MllmZeroShot, pixels: Tensor) -> tuple[Tensor, Tensor, float]:
    """Answers [images], last hidden states [images, width], and CPU seconds from the features to the scores.

    The encoder itself runs in full under every rule; attention rules also look at two of its layers.
    """
    found, states, seconds = [], [], 0.0
    for group in pixels.split(4):
        features = method.features(group)
        started = time.process_time()
        prefix = method.asked(features)
        scores = method.mllm.candidate_scores(prefix, method.trie())
        seconds += time.process_time() - started
        found.append((scores / method.trie().lengths).argmax(dim=1))
        states.append(prefix.hidden)
    return torch.cat(found), torch.cat(states), seconds


def measure(
    backbone: MLLM, dataset: str, images: int, rules: Sequence[str], keeps: Sequence[float]
) -> list[dict[str, Any]]:
    """One row for all tokens, and one for each rule and share."""
    pixels, labels, names = pictures(dataset, images, backbone.spec.preprocessing.image_size)
    plain = MllmZeroShot(backbone, names, config=MllmZeroShotConfig())
    asked(plain, pixels[:4])  # the first pass is slower
    answers, states, seconds = asked(plain, pixels)
    rows = [
        {
            **{"rule": "all tokens", "keep": 1.0, "tokens": plain.placeholders},
            **{"accuracy": float((answers == labels).float().mean()), "agreement": 1.0, "cosine": 1.0},
            **{"ms_per_image": 1e3 * seconds / images, "time_share": 1.0},
        }
    ]
    for keep in keeps:
        for rule in rules:
            config = replace(plain.config, token_reduction=rule, token_keep=keep)
            method = MllmZeroShot(backbone, names, config=config)
            own, moved, spent = asked(method, pixels)
            rows.append(
                {
                    **{"rule": rule, "keep": keep, "tokens": method.placeholders},
                    "accuracy": float((own == labels).float().mean()),
                    "agreement": float((own == answers).float().mean()),
                    "cosine": float(F.cosine_similarity(moved, states, dim=-1).mean()),
                    **{"ms_per_image": 1e3 * spent / images, "time_share": spent / seconds},
                }
            )
    return rows


def line(model: str, row: dict[str, Any]) -> list[str]:
    """A row for people."""
    shares = [f"{100 * row[key]:.1f} %" for key in ("accuracy", "agreement")]
    time_shown = [f"{row['ms_per_image']:.1f}", f"{100 * row['time_share']:.0f} %"]
    return [model, row["rule"], f"{row['keep']:.3g}", str(row["tokens"]), *shares, f"{row['cosine']:.3f}", *time_shown]


@click.command()
@click.option("--dataset", default="shapes", show_default=True, help="An embedded dataset.")
@click.option("--images", default=240, show_default=True, help="Test images that mini-mllm is asked about.")
@click.option("--large-images", default=8, show_default=True, help="Images for the random model; 0 leaves it out.")
@click.option("--threads", default=1, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON and write no file.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=RESULTS, show_default=False, help="Where they are kept."
)
def main(dataset: str, images: int, large_images: int, threads: int, as_json: bool, out: Path) -> None:
    """Measure every rule; prints a table and keeps a JSON."""
    torch.set_num_threads(threads)
    found: dict[str, Any] = {"dataset": dataset, "machine": machine_facts(), "models": {}}
    mini: MLLM = load_backbone("mini-mllm")  # type: ignore[assignment]  # it is one
    found["models"]["mini-mllm"] = measure(mini, dataset, images, RULES, KEEPS)
    found["backbone_digest"] = mini.spec.digest
    if large_images:
        with tempfile.TemporaryDirectory() as folder:
            large = shaped_like_llava(Path(folder) / "random-llava")
            found["models"]["random-llava"] = measure(large, dataset, large_images, RULES, (1 / 3, 1 / 9))
    if as_json:
        click.echo(json.dumps(found))
        return
    rows = [line(model, row) for model, own in found["models"].items() for row in own]
    console.print_table("Image tokens left out", COLUMNS, rows, left=("model", "rule"), wide=True)
    write_json(out, found)


if __name__ == "__main__":
    main()
