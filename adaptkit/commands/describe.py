"""`adaptkit describe`: descriptions of classes, written by a language model."""

from __future__ import annotations

from pathlib import Path

import click

from adaptkit.commands import _console as console
from adaptkit.commands import _options, _runs


@click.command("describe", short_help="let a language model describe classes")
@click.argument("dataset", required=False)
@click.option("--classes", help="Class names: a,b,c, a text file with one name per line, or a dataset.")
@click.option("--model", required=True, help="Text or multimodal model of transformers: a folder or a hub id.")
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The JSON to write.")
@click.option(
    "--style",
    type=click.Choice(["features", "sentences"]),
    default="features",
    show_default=True,
    help="features: short visible features (dclip); sentences: whole ones, in several samples (cupl).",
)
@click.option(
    "--question",
    "questions",
    multiple=True,
    help='A question of yours: {} is the class with its article ("an oak"), {name} its bare name. Repeat for more.',
)
@click.option("--keep", type=click.Choice(["lines", "sentence", "all"]), help="What of an answer is a description.")
@click.option("--samples", type=click.IntRange(min=1), help="Answers per question.")
@click.option("--temperature", type=click.FloatRange(min=0), help="0 for the likeliest answer.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Length of an answer.")
@click.option("--seed", default=0, show_default=True, help="Seeds the answers.")
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Questions at once.")
@click.option("--chat/--no-chat", default=None, help="Ask as a chat [default: where the model has a chat template].")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True, help="Weights'.")
@click.option("--data-root", type=click.Path(file_okay=False), help="Folder that holds the datasets' folders.")
@click.option("--overwrite", is_flag=True, help="Begin anew instead of going on with what is in --out.")
@_options.device_option
@_options.json_option
def command(
    dataset: str | None,
    classes: str | None,
    model: str,
    out: Path,
    style: str,
    questions: tuple[str, ...],
    keep: str | None,
    samples: int | None,
    temperature: float | None,
    max_tokens: int | None,
    seed: int,
    batch_size: int,
    chat: bool | None,
    precision: str,
    data_root: str | None,
    overwrite: bool,
    device: str,
    as_json: bool,
) -> None:
    """Ask a language model about every class, and write its sentences for --descriptions.

    The prompts are kept beside the answers in a second file (birds.answers.json for birds.json). A run that was
    interrupted goes on where it stopped.

    \b
    Examples:
      adaptkit describe my_photos --model Qwen/Qwen2.5-1.5B-Instruct --out birds.json
      adaptkit describe --classes oak,beech --model ./llm --style sentences --samples 5 --out trees.json
    """
    if (dataset is None) == (classes is None):
        raise click.UsageError("Say which classes: a dataset as the argument, or --classes oak,beech.")
    if out.suffix.lower() != ".json":
        raise click.UsageError(f"--out is {out}, and descriptions are written as JSON: call it {out.stem}.json.")
    _runs.check_writable(out.absolute().parent)

    from adaptkit.data.class_names import find_class_names
    from adaptkit.data.describing import STYLES, Asking, LanguageModel, answers_path, describe_classes

    usual = STYLES[style]
    asking = Asking(
        questions or usual.questions,
        keep or usual.keep,  # type: ignore[arg-type]  # click has checked it
        usual.samples if samples is None else samples,
        usual.temperature if temperature is None else temperature,
        usual.max_tokens if max_tokens is None else max_tokens,
        seed,
    )
    names = find_class_names(str(dataset if classes is None else classes), data_root=data_root)
    writer = LanguageModel(model, device=device, precision=precision, chat=chat)  # type: ignore[arg-type]
    with console.progress_bars(not as_json) as progress:
        found = describe_classes(
            names, writer, asking, out, batch_size=batch_size, overwrite=overwrite, progress=progress
        )
    empty = [name for name, sentences in found.items() if not sentences]
    counts = {name: len(sentences) for name, sentences in found.items()}
    if as_json:
        files = {"descriptions": str(out), "answers": str(answers_path(out))}
        console.print_json({"files": files, "classes": counts, "empty": empty})
        return
    console.print_table(
        f"{sum(counts.values()):,} descriptions of {len(names)} classes", ["class", "descriptions", "the first"],
        [[name, str(len(given)), (given or ("–",))[0][:80]] for name, given in list(found.items())[:20]],
        left=["class", "the first"],
    )  # fmt: skip
    if empty:
        console.say(f"note: {len(empty)} classes got no sentence ({', '.join(empty[:5])}): ask again another way.")
    console.say(f"Written to {out}, prompts and answers to {answers_path(out)}.")
