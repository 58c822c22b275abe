"""Options that several verbs share, and their parsing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from adaptkit.data.features import Precision
    from adaptkit.evaluation.tasks import TaskSpec

F = TypeVar("F", bound=Callable[..., Any])


def apply(options: Sequence[Callable[[F], F]]) -> Callable[[F], F]:
    """One decorator out of several, in reading order."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


class NameList(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # as above
    """Names separated by commas."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = tuple(part.strip() for part in str(value).split(",") if part.strip())
        if not names:
            self.fail("no name was given: write a,b,c.", param, ctx)
        return names


def one_dataset(argument: str | None, option: str | None) -> str:
    """The dataset, given as the argument or as --dataset.

    Raises:
        click.UsageError: Neither or both were given.
    """
    if (argument is None) == (option is None):
        raise click.UsageError("Name one dataset, as the argument or with --dataset, such as: --dataset digits.")
    return str(argument if option is None else option)


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines instead of tables.")
device_option = click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, mps.")
_BACKBONES = "mini, mini-mllm, an open_clip name (ViT-B-16/openai), hf-hub:…, local-dir:…, transformers:… or timm:…."
backbone_option = click.option("--backbone", default="mini", show_default=True, help=_BACKBONES)
engine_options = apply(
    [
        device_option,
        click.option(
            "--batch-size", type=click.IntRange(min=1), default=64, show_default=True, help="Images encoded at once."
        ),
        click.option(
            "--precision",
            type=click.Choice(["fp32", "bf16"]),
            default="fp32",
            show_default=True,
            help="Of the frozen image encoder; bf16 is faster where the machine has it, and less exact.",
        ),
        click.option(
            "--cache", type=click.Path(file_okay=False), help="Folder of stored features [default: adaptkit's]."
        ),
    ]
)
log_options = apply(
    [
        click.option(
            "--log",
            multiple=True,
            type=click.Choice(["tensorboard", "wandb", "mlflow"]),
            help="Follow runs there (pip install 'adaptkit[tensorboard]', …); repeat for several. What goes wrong"
            " with it is a note, and the run goes on. WANDB_MODE, MLFLOW_TRACKING_URI and the like are heeded.",
        ),
        click.option(
            "--log-dir",
            type=click.Path(path_type=Path, file_okay=False),
            help="Folder of what is logged [default: logs in the folder that holds the runs].",
        ),
    ]
)
checkpoint_option = click.option(
    "--checkpoint-minutes",
    type=click.FloatRange(min=0),
    default=5.0,
    show_default=True,
    help="Minutes of training after which a checkpoint is written, from which the same command goes on after a crash"
    " (beside --out, until the result is there); 0 writes none.",
)
data_root_option = click.option(
    "--data-root",
    type=click.Path(file_okay=False),
    help="Folder that holds the datasets' folders [default: $ADAPTKIT_DATA_ROOT].",
)
own_split_option = click.option(
    "--own-split",
    is_flag=True,
    help="Give a known dataset a split of ours (noted in results: never comparable with published figures).",
)
data_options = apply(
    [
        data_root_option,
        own_split_option,
        click.option(
            "--template",
            "templates",
            multiple=True,
            help="Prompt with one {}; repeat for an ensemble, or @FILE with one a line.",
        ),
        click.option(
            "--sampler",
            default="coop",
            show_default=True,
            help="How shots are drawn; which papers draw how is listed in the documentation of adaptkit.data.few_shot.",
        ),
        click.option("--allow-fewer", is_flag=True, help="Accept classes with fewer images than shots (reported)."),
        click.option(
            "--display-names",
            type=click.Path(dir_okay=False),
            help='JSON file of class names as the text tower shall read them: {"cls_07": "red fox"}.',
        ),
        click.option(
            "--skip-unreadable",
            is_flag=True,
            help="Leave out training and validation images that can't be read (counted in the result; never in test).",
        ),
    ]
)
protocol_options = apply(
    [
        click.option(
            "--protocol",
            type=click.Choice(["few-shot", "base-to-novel", "cross-dataset", "domain-generalisation"]),
            default="few-shot",
            show_default=True,
            help="few-shot: all classes; base-to-novel: train on half of them, test on both halves; cross-dataset:"
            " train once, test on other datasets; domain-generalisation: train once, test on shifted versions.",
        ),
        click.option("--shots", type=click.IntRange(min=1), default=16, show_default=True, help="Images per class."),
        click.option(
            "--targets",
            type=NameList(),
            default=(),
            help="Datasets to test on without further training, a,b,c [default: the usual ones of imagenet, shapes].",
        ),
        click.option(
            "--masking",
            type=click.Choice(["logits", "names"]),
            default="logits",
            show_default=True,
            help="How a shifted dataset's candidates are kept to its classes: all logits, the others dropped; or its"
            " names alone.",
        ),
        click.option(
            "--joint", is_flag=True, help="base-to-novel: all classes are candidates for every image (marked)."
        ),
        click.option("--class-split", type=int, metavar="SEED", help="base-to-novel: halves drawn at random (marked)."),
        click.option(
            "--class-order",
            type=click.Path(dir_okay=False),
            help="base-to-novel: text file of all class names, whose first half is base (marked).",
        ),
        click.option(
            "--base-classes",
            type=click.Path(dir_okay=False),
            help="base-to-novel: text file of the base classes' names (marked).",
        ),
        click.option(
            "--novel-classes",
            type=click.Path(dir_okay=False),
            help="The same for the novel ones [default: all others].",
        ),
    ]
)
descriptions_options = apply(
    [
        click.option(
            "--descriptions",
            type=click.Path(),
            help="Sentences about the classes: a JSON, CSV or text file, or a folder with a text file per class.",
        ),
        click.option(
            "--allow-undescribed", is_flag=True, help="Accept classes that the descriptions leave out (reported)."
        ),
    ]
)
_task_options = apply(
    [
        click.argument("dataset_argument", metavar="[DATASET]", required=False),
        click.option("--dataset", help="Name, folder, CSV, split JSON or features:FILE (or as the argument)."),
        click.option("--backbone", help=f"{_BACKBONES} [default: mini, or what a file of features holds]"),
        protocol_options,
        click.option("--seed", default=1, show_default=True, help="Seeds the shots, the training, the views."),
        data_options,
        descriptions_options,
        engine_options,
    ]
)


@dataclass(frozen=True)
class TaskOptions:
    """What `run` and `compare` are told about the task and the machine.

    Args:
        task: What to run on.
        backbone: What to adapt; None for `mini`, or what a file of features holds.
        device: Where.
        batch_size: Images encoded at once.
        precision: Of the frozen image encoder.
        cache: Folder of stored features; None for the default one.
    """

    task: TaskSpec
    backbone: str | None
    device: str
    batch_size: int
    precision: Precision
    cache: str | None


def task_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options of a task to a command, which gets them as one `options`."""

    @_task_options
    @functools.wraps(function)
    def gathered(dataset_argument: str | None, dataset: str | None, **given: Any) -> None:
        from adaptkit.evaluation.tasks import TaskSpec

        named = one_dataset(dataset_argument, dataset)
        of_task = {item.name: given.pop(item.name) for item in fields(TaskSpec) if item.name in given}
        of_machine = {item.name: given.pop(item.name) for item in fields(TaskOptions) if item.name != "task"}
        function(options=TaskOptions(TaskSpec(named, **of_task), **of_machine), **given)

    return gathered
