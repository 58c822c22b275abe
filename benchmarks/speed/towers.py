"""How fast the towers are, against the plain way, in one run on a ViT-B/16 with random weights.

    python benchmarks/speed/towers.py --json towers.json

Text: forward and backward of CoOp-like prompts (16 learned contexts) for 10, 100 and 1000 classes: ours against the
plain way (every class at 77 tokens through open_clip's own transformer; not for 1000 classes, which it has no memory
for). Image: our tower's forward against open_clip's `encode_image`. Every case runs in a process of its own, so that
its peak memory is its own. Ratios are what counts: seconds depend on the machine and on who else uses it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

THREADS = 2
NUM_CONTEXT = 16
ARCHITECTURE = "ViT-B-16"
REPEATS = {"text-ours-10": 5, "text-plain-10": 3, "text-ours-100": 4, "text-plain-100": 1, "text-ours-1000": 2}
NAMES = """
accordion, airplane, anchor, ant, barrel, bass, beaver, binocular, bonsai, brain, brontosaurus, buddha, butterfly, camera,
cannon, car side, ceiling fan, cellphone, chair, chandelier, cougar body, cougar face, crab, crayfish, crocodile, crocodile
head, cup, dalmatian, dollar bill, dolphin, dragonfly, electric guitar, elephant, emu, euphonium, ewer, face, ferry,
flamingo, flamingo head, garfield, gerenuk, gramophone, grand piano, hawksbill, headphone, hedgehog, helicopter, ibis,
inline skate, joshua tree, kangaroo, ketch, lamp, laptop, leopard, llama, lobster, lotus, mandolin, mayfly, menorah,
metronome, minaret, motorbike, nautilus, octopus, okapi, pagoda, panda, pigeon, pizza, platypus, pyramid, revolver, rhino,
rooster, saxophone, schooner, scissors, scorpion, sea horse, snoopy, soccer ball, stapler, starfish, stegosaurus, stop
sign, strawberry, sunflower, tick, trilobite, umbrella, watch, water lilly, wheelchair, wild cat, windsor chair, wrench,
yin yang"""
"""Caltech-101's hundred classes (1.5 word pieces on average). Longer names gain less: the cost is names plus prefix."""


def class_names(count: int) -> list[str]:
    """That many names, from the start again where the list ends (rows with equal names aren't merged)."""
    names = " ".join(NAMES.split()).split(", ")
    return [names[i % len(names)] for i in range(count)]


def peak_gigabytes() -> float:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def time_text_ours(count: int) -> dict[str, float]:
    import torch

    from adaptkit.backbones import load_backbone

    backbone = load_backbone(f"{ARCHITECTURE}/random")
    placeholder = " ".join(["X"] * NUM_CONTEXT)
    tokens = backbone.tokenize([f"{placeholder} {name}." for name in class_names(count)])
    symbols = tokens.ids.clone()
    symbols[:, 1 : 1 + NUM_CONTEXT] = -1 - torch.arange(NUM_CONTEXT)
    rows = backbone.text_rows(tokens, symbols)
    contexts = (0.02 * torch.randn(NUM_CONTEXT, backbone.text_tower.width)).requires_grad_()
    return _measure(lambda: backbone.text_tower(rows, contexts), contexts, REPEATS[f"text-ours-{count}"])


def time_text_plain(count: int) -> dict[str, float]:
    """As reference implementations do it: embeddings of all 77 tokens, open_clip's transformer, then the end token."""
    import open_clip
    import torch

    model = open_clip.create_model(ARCHITECTURE).requires_grad_(False).eval()
    placeholder = " ".join(["X"] * NUM_CONTEXT)
    ids = open_clip.get_tokenizer(ARCHITECTURE)([f"{placeholder} {name}." for name in class_names(count)])
    embedded = model.token_embedding(ids)
    before, after = embedded[:, :1], embedded[:, 1 + NUM_CONTEXT :]
    contexts = (0.02 * torch.randn(NUM_CONTEXT, embedded.shape[-1])).requires_grad_()

    def forward() -> torch.Tensor:
        x = torch.cat([before, contexts.expand(count, -1, -1), after], dim=1) + model.positional_embedding
        x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask))
        return x[torch.arange(count), ids.argmax(dim=-1)] @ model.text_projection

    return _measure(forward, contexts, REPEATS[f"text-plain-{count}"])


def _measure(forward: Any, contexts: Any, repeats: int) -> dict[str, float]:
    """Best of `repeats` after one warm-up (the long cases warm up on themselves, and are then timed once more)."""
    loaded, seconds = peak_gigabytes(), []
    for _ in range(repeats + 1):
        contexts.grad = None
        start = time.perf_counter()
        forward().square().sum().backward()
        seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds[1:]), "peak_gb": peak_gigabytes(), "loaded_gb": loaded}


def time_images() -> dict[str, float]:
    """Ours and open_clip's in turn, so that both see the same neighbours on the machine."""
    import open_clip
    import torch

    from adaptkit.backbones import load_backbone

    backbone = load_backbone(f"{ARCHITECTURE}/random")
    model = open_clip.create_model(ARCHITECTURE).eval()
    pixels = torch.randn(16, 3, 224, 224)
    ours, theirs = [], []
    with torch.inference_mode():
        for _ in range(6):
            for encode, seconds in ((backbone.encode_image, ours), (model.encode_image, theirs)):
                start = time.perf_counter()
                encode(pixels)
                seconds.append(time.perf_counter() - start)
    return {"ours_seconds": min(ours[1:]), "open_clip_seconds": min(theirs[1:]), "images": len(pixels)}


def run_case(case: str) -> dict[str, float]:
    """One case, in this process."""
    import torch

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    kind, _, count = case.rpartition("-")
    if case == "images":
        return time_images()
    return {"text-ours": time_text_ours, "text-plain": time_text_plain}[kind](int(count))


def in_own_process(case: str) -> dict[str, float]:
    """One case in a fresh process."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS)}
    command = [sys.executable, str(Path(__file__)), "--case", case]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{case} failed:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    """Run all cases and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where the result goes; printed otherwise")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="*", help="some of the cases: " + ", ".join([*REPEATS, "images"]))
    args = parser.parse_args()
    if args.case:
        print(json.dumps(run_case(args.case)))
        return
    cases = {case: in_own_process(case) for case in args.only or [*REPEATS, "images"]}
    for case, found in cases.items():  # once more, so that neighbours on the machine hit both sides alike
        if case in REPEATS:
            found["seconds"] = min(found["seconds"], in_own_process(case)["seconds"])
    ratios = {
        f"text_{count}_classes": cases[f"text-plain-{count}"]["seconds"] / cases[f"text-ours-{count}"]["seconds"]
        for count in (10, 100)
        if f"text-plain-{count}" in cases and f"text-ours-{count}" in cases
    }
    if "images" in cases:
        ratios["images"] = cases["images"]["open_clip_seconds"] / cases["images"]["ours_seconds"]
    import torch

    facts = {"threads": THREADS, "machine": platform.machine(), "torch": torch.__version__, "model": ARCHITECTURE}
    result = json.dumps({"ratios": ratios, "cases": cases, **facts}, indent=1)
    if args.json:
        args.json.write_text(result + "\n")
    print(result)


if __name__ == "__main__":
    main()
