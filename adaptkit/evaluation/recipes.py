"""Recipes: YAML files with a method's settings for a protocol, and how settings from several places become one.

A recipe lies at `recipes/<method>/<protocol>[-variant].yaml`; its name is that path without the ending
("coop/few-shot-csc"). Names in it are registry names and values are plain data: a recipe never runs code.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, get_args

from adaptkit.config import from_mapping, load_yaml, parse_overrides
from adaptkit.errors import ConfigError, MissingPathError, UnknownNameError
from adaptkit.types import TrainingSettings

if TYPE_CHECKING:
    from adaptkit.methods.base import Method, MethodConfig

ProtocolName = Literal["few-shot", "base-to-novel", "cross-dataset", "domain-generalisation"]
PROTOCOLS: tuple[ProtocolName, ...] = get_args(ProtocolName)

STAND_INS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"cross-dataset": ("few-shot",), "domain-generalisation": ("cross-dataset", "few-shot")}
)
"""Protocols that train as another one does, and may take its recipes: the first that there is."""

TunedOn = Literal["none", "val", "test", "per-dataset-config"]
TemplateUse = Literal["dataset", "recipe", "learned", "none"]

SUITES_FOLDER = "suites"
"""Beside the recipes: the suites of `adaptkit sweep`, which are none."""

SECTIONS = ("method", "training")
VIEW_FIELDS = frozenset({"views", "fresh_views", "crop_scale", "flip", "colour_jitter"})
"""The training settings that a method without a gradient loop may still read (Tip-Adapter's cache of views)."""

_KNOWN_NAME = re.compile(r"[a-z0-9-]+/[a-z0-9-]+")
T = TypeVar("T")


@dataclass(frozen=True)
class Layer:
    """Settings of one origin.

    Args:
        settings: Fields of the method's config.
        training: Fields of `TrainingSettings`.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)

    def items(self) -> Iterator[tuple[str, Any]]:
        """("method.num_context", 16), ("training.lr", 0.002), …"""
        yield from ((f"method.{key}", value) for key, value in self.settings.items())
        yield from ((f"training.{key}", value) for key, value in self.training.items())


@dataclass(frozen=True)
class Recipe:
    """A method's settings for a protocol.

    Args:
        name: "coop/few-shot", or the path of a file of one's own.
        method: Registered name of the method.
        protocol: One of `PROTOCOLS`.
        summary: What it does, one sentence.
        source: Where the settings come from.
        shots: Images per class that the source reports on.
        seeds: Seeds that the source averages over.
        settings: Fields of the method's config.
        training: Fields of `TrainingSettings`.
        by_shots: What differs for a number of shots; counts between two entries take the lower one's.
        by_dataset: What differs for a dataset.
        by_target: What the method is set to while it answers for a target, after training (its `settable` settings).
        templates: Zero-shot templates that replace the dataset's own, where `template_use` is "recipe".
        template_use: What text the classes are described with: the dataset's own templates, those of the recipe, a
            learned context in place of any, or none.
        tuned_on: What the settings were chosen on. "val" means the method searches on validation shots.
    """

    name: str
    method: str
    protocol: ProtocolName
    summary: str
    source: str
    shots: tuple[int, ...]
    seeds: tuple[int, ...] = (1, 2, 3)
    settings: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    by_shots: Mapping[int, Layer] = field(default_factory=dict)
    by_dataset: Mapping[str, Layer] = field(default_factory=dict)
    by_target: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    templates: tuple[str, ...] = ()
    template_use: TemplateUse = "dataset"
    tuned_on: TunedOn = "none"

    @property
    def marked(self) -> bool:
        """Whether reports must mark its numbers: the settings know the dataset, or were chosen on its test split."""
        return self.tuned_on in ("test", "per-dataset-config")

    def layers(self, shots: int | None = None, dataset: str | None = None) -> Iterator[tuple[str, Layer]]:
        """Its settings with their origins, the later ones winning.

        Raises:
            ConfigError: The recipe has settings per dataset, and none for this one.
        """
        yield f"recipe {self.name}", Layer(self.settings, self.training)
        listed = [count for count in self.by_shots if shots is not None and count <= shots]
        if self.by_shots and shots is not None:
            count = max(listed, default=min(self.by_shots))
            yield f"recipe {self.name}, {count} shots", self.by_shots[count]
        own = {_plain(name): layer for name, layer in self.by_dataset.items()}
        if dataset is not None and _plain(dataset) in own:
            yield f"recipe {self.name}, dataset {dataset}", own[_plain(dataset)]
        elif self.tuned_on == "per-dataset-config" and self.by_dataset:
            raise ConfigError(
                f"Recipe {self.name!r} has settings for {', '.join(self.by_dataset)} only, none for {dataset!r}: choose"
                f" another recipe of {self.method}, or --set what you need."
            )

    def for_target(self, target: str) -> Mapping[str, Any]:
        """What the method is set to while it answers for a target.

        Raises:
            ConfigError: The recipe has settings per target, and none for this one.
        """
        own = {_plain(name): settings for name, settings in self.by_target.items()}
        if own and _plain(target) not in own:
            raise ConfigError(
                f"Recipe {self.name!r} has settings for the targets {', '.join(self.by_target)} only, none for"
                f" {target!r}: leave that target out, or choose another recipe of {self.method}."
            )
        return own.get(_plain(target), {})

    def check_fits(self, method: str, protocol: str) -> None:
        """Refuse the recipe for another method, or a protocol that trains otherwise.

        Raises:
            ConfigError: It was written for others.
        """
        if self.method != method or self.protocol not in (protocol, *STAND_INS.get(protocol, ())):
            raise ConfigError(
                f"Recipe {self.name!r} is for {self.method} with {self.protocol}, not for {method} with {protocol}."
                " 'adaptkit list recipes' shows which there are."
            )


def _plain(dataset: str) -> str:
    return dataset.lower().replace("_", "-")


# --- files ------------------------------------------------------------------------------------------------------------


def recipes_folder() -> Path:
    """Where the recipes lie: inside an installed package, or beside it in a checkout.

    Raises:
        MissingPathError: They are in neither place.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "_recipes", package.parent / "recipes"):
        if folder.is_dir():
            return folder
    raise MissingPathError(
        f"The recipes are missing: neither {package / '_recipes'} nor {package.parent / 'recipes'} is there. Install"
        " adaptkit again, or give a recipe by its path."
    )


def list_recipes(method: str | None = None, protocol: str | None = None) -> tuple[str, ...]:
    """Names of all recipes, sorted; on request only those of a method or a protocol. No file is read.

    Example:
        >>> list_recipes("coop", "base-to-novel")
        ('coop/base-to-novel', 'coop/base-to-novel-quick')
    """
    folder = recipes_folder()
    names = sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
    names = [name for name in names if not name.startswith(f"{SUITES_FOLDER}/")]
    return tuple(
        name
        for name in names
        if (method is None or name.startswith(f"{method}/"))
        and (protocol is None or name.split("/")[-1].startswith(protocol))
    )


def find_recipe(method: str, protocol: str, variant: str = "") -> Recipe | None:
    """The recipe of a method for a protocol, None where there is none.

    Example:
        >>> find_recipe("coop", "few-shot", "quick").name
        'coop/few-shot-quick'
    """
    name = f"{method}/{protocol}" + (f"-{variant}" if variant else "")
    return load_recipe(name) if _is_known(name) else None


def _is_known(name: str) -> bool:
    plain = _KNOWN_NAME.fullmatch(name) and not name.startswith(f"{SUITES_FOLDER}/")
    return bool(plain) and (recipes_folder() / f"{name}.yaml").is_file()


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Read a recipe by name ("coop/few-shot") or, for one of your own, by the path of its YAML file.

    Raises:
        UnknownNameError: No recipe of that name; the message carries near matches.
        MissingPathError: No such file.
        ConfigError: The file isn't a recipe; all problems are listed.
    """
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or text.endswith((".yaml", ".yml")):
        path = Path(name_or_path)
        if not path.is_file():
            raise MissingPathError(f"There is no recipe file {path}: check the path, or run 'adaptkit list recipes'.")
        return read_recipe(path, text)
    if not _is_known(text):
        known = list_recipes()
        hint = f"Run 'adaptkit list recipes' to see all {len(known)}, or give the path of a .yaml file."
        raise UnknownNameError.for_name("recipe", text, known, hint)
    return read_recipe(recipes_folder() / f"{text}.yaml", text)


def read_recipe(path: Path, name: str) -> Recipe:
    """Read a recipe's file and check its form (`resolve` checks the settings against the method).

    Raises:
        ConfigError: A key is unknown, missing or of the wrong type; all problems of the file are listed.
    """
    try:
        stat = path.stat()
    except OSError:  # the reader says it in a sentence
        return _read_recipe(path, name, ())
    return _read_recipe(path, name, (stat.st_ino, stat.st_size, stat.st_mtime_ns))


@functools.lru_cache(maxsize=512)
def _read_recipe(path: Path, name: str, state: tuple[int, ...]) -> Recipe:
    """`state` changes with the file: a sweep asks for the same recipe for every run."""
    content = load_yaml(path)
    if "name" in content:
        raise ConfigError(f"Recipe {name}: its name is that of its file; remove the key 'name'.")
    recipe = from_mapping(Recipe, {**content, "name": name}, where=f"recipe {name}")
    problems = _Problems()
    problems.extend(f"Recipe {name}: {problem}" for problem in _form_problems(recipe))
    problems.raise_if_any()
    return recipe


def _form_problems(recipe: Recipe) -> Iterator[str]:
    if not recipe.shots or min((*recipe.shots, *recipe.by_shots)) < 1:
        yield "shots must list numbers of at least 1."
    if not recipe.seeds:
        yield "seeds must list at least one seed."
    if bool(recipe.templates) != (recipe.template_use == "recipe"):
        yield 'templates are given exactly where template_use is "recipe".'
    if not recipe.summary.strip() or not recipe.source.strip():
        yield "summary and source must say something."


# --- from several places to one ---------------------------------------------------------------------------------------


class Resolved(NamedTuple):
    """Settings as they will be used.

    Args:
        config: Of the method.
        training: Of the gradient loop and the views; `epochs` is 0 where nothing is trained by gradient.
        origins: Where each value comes from, such as {"method.num_context": "recipe coop/few-shot"}.
    """

    config: MethodConfig
    training: TrainingSettings
    origins: dict[str, str]


class _Problems:
    """Gathers everything wrong with some settings, so that one message shows it all."""

    def __init__(self) -> None:
        self._found: list[str] = []

    def add(self, problem: str) -> None:
        if problem not in self._found:
            self._found.append(problem)

    def extend(self, problems: Iterable[str]) -> None:
        for problem in problems:
            self.add(problem)

    def collect(self, attempt: Callable[[], T]) -> T | None:
        """The attempt's result, or None where it was refused; the refusal is kept."""
        try:
            return attempt()
        except ConfigError as error:
            self.add(str(error))
            return None

    def raise_if_any(self) -> None:
        if len(self._found) == 1:
            raise ConfigError(self._found[0])
        if self._found:
            raise ConfigError("\n".join([f"{len(self._found)} settings can't be used:", *self._found]))


def resolve(
    method_class: type[Method],
    recipe: Recipe | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    file: str | Path | None = None,
    shots: int | None = None,
    dataset: str | None = None,
    origin: str = "--set",
) -> Resolved:
    """Settings from default < recipe < file < overrides, with the origin of every value.

    Args:
        method_class: The method.
        recipe: Its recipe; None for the method's defaults.
        overrides: "key=value" texts as after --set, or a mapping. A key is "method.num_context", "training.lr", or the
            field alone where only one of the two has it.
        file: YAML file with `method:` and `training:` sections (or bare fields).
        shots: Images per class, for recipes that depend on it.
        dataset: Name of the dataset, for recipes that depend on it.
        origin: What to call the overrides.

    Raises:
        ConfigError: Unknown keys (with near matches), values of a wrong type or range, settings that the method doesn't
            read; all of them in one message.
    """
    if recipe is not None and recipe.method != method_class.name:
        raise ConfigError(f"Recipe {recipe.name!r} is for {recipe.method}, not for {method_class.name}.")
    problems, places = _Problems(), _Places(method_class)
    layers = _all_layers(recipe, overrides, file, shots, dataset, origin, problems)
    values, origins = _gather(layers, places, problems)
    config = problems.collect(lambda: from_mapping(method_class.config_class, values["method"], where="method"))
    plain = {**asdict(places.base_training), **values["training"]}
    training = problems.collect(lambda: from_mapping(TrainingSettings, plain, where="training"))
    if training is not None and places.trains:
        problems.collect(lambda: _check_training(training))
    problems.raise_if_any()
    if config is None or training is None:  # a refusal has left a problem, which was raised
        raise ConfigError("These settings can't be used.")
    return Resolved(config, training, origins)


def share_overrides(method_classes: Sequence[type[Method]], overrides: Sequence[str]) -> list[list[str]]:
    """For each of several methods, those "key=value" texts whose setting it reads.

    Args:
        method_classes: The methods.
        overrides: Texts as after --set, meant for all methods that read them.

    Raises:
        ConfigError: A text isn't an override, or none of the methods reads its setting (with near matches).
    """
    places = [_Places(method_class) for method_class in method_classes]
    shares: list[list[str]] = [[] for _ in places]
    problems = _Problems()
    for text in overrides:
        keys = [key for key, _ in flatten(parse_overrides([text]))]
        readers = [share for share, place in zip(shares, places, strict=True) if any(map(place.has, keys))]
        for share in readers:
            share.append(text)
        if keys and not readers:
            known = {full.split(".")[1]: full for place in places for full in place.shown()}
            near = difflib.get_close_matches(keys[0].split(".")[-1], known, n=2, cutoff=0.6)
            hint = f" Did you mean {' or '.join(repr(known[match]) for match in near)}?" if near else ""
            problems.add(f"--set: none of {', '.join(place.method for place in places)} reads {keys[0]!r}.{hint}")
    problems.raise_if_any()
    return shares


def _gather(
    layers: Iterable[tuple[str, Iterable[tuple[str, Any]]]], places: _Places, problems: _Problems
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Values by section and field, and origins by "section.field"; a later layer wins."""
    values: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    origins = dict.fromkeys(places.shown(), "default")
    for label, items in layers:
        for key, value in items:
            try:
                section, name = places.find(key, label)
            except ConfigError as error:
                problems.add(str(error))
                continue
            values[section][name] = value
            origins[f"{section}.{name}"] = label
    return values, origins


def _check_training(training: TrainingSettings) -> None:
    from adaptkit.training.loop import check_settings

    check_settings(training)


def _all_layers(
    recipe: Recipe | None,
    overrides: Sequence[str] | Mapping[str, Any],
    file: str | Path | None,
    shots: int | None,
    dataset: str | None,
    origin: str,
    problems: _Problems,
) -> Iterator[tuple[str, Iterable[tuple[str, Any]]]]:
    """(origin, settings) in rising order of precedence."""
    if recipe is not None:
        layers = problems.collect(lambda: list(recipe.layers(shots, dataset)))
        yield from ((label, layer.items()) for label, layer in layers or ())
    if file is not None:
        content = problems.collect(lambda: load_yaml(Path(file)))
        if content:
            yield f"file {file}", flatten(content)
    given = overrides if isinstance(overrides, Mapping) else problems.collect(lambda: parse_overrides(list(overrides)))
    yield origin, flatten(given or {})


def flatten(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Sections as dotted keys.

    Example:
        >>> list(flatten({"training": {"lr": 1.0}, "depth": 3}))
        [('training.lr', 1.0), ('depth', 3)]
    """
    for key, value in content.items():
        if isinstance(value, Mapping):  # also a misspelt section, so that the message can name its field
            yield from ((f"{key}.{name}", item) for name, item in value.items())
        else:
            yield str(key), value


class _Places:
    """Which settings a method has, and where a key belongs."""

    def __init__(self, method_class: type[Method]) -> None:
        from adaptkit.methods.base import GradientMethod

        self.method = method_class.name
        self.trains = issubclass(method_class, GradientMethod)
        self.base_training = method_class.default_training or TrainingSettings(epochs=0, warmup_epochs=0)
        every = [item.name for item in fields(TrainingSettings)]
        self.reads_views = method_class.default_training is not None
        self.fields = {"method": [item.name for item in fields(method_class.config_class)], "training": every}

    def shown(self) -> list[str]:
        """Keys of the settings that the method reads."""
        return [
            f"{section}.{name}" for section in SECTIONS for name in self.fields[section] if self.read(section, name)
        ]

    def read(self, section: str, name: str) -> bool:
        """Whether the method reads this setting at all."""
        return section == "method" or self.trains or (self.reads_views and name in VIEW_FIELDS)

    def has(self, key: str) -> bool:
        """Whether `find` takes the key."""
        try:
            self.find(key, "")
        except ConfigError:
            return False
        return True

    def find(self, key: str, label: str) -> tuple[str, str]:
        """(section, field) of a key.

        Raises:
            ConfigError: It is unknown, ambiguous, or has no effect on this method.
        """
        section, dot, name = key.partition(".")
        if dot:
            found = [section] if name in self.fields.get(section, ()) else []
        else:
            name = key
            found = [section for section in SECTIONS if key in self.fields[section]]
        if not found:
            raise ConfigError(f"{label}: unknown setting {key!r} of {self.method}. {self._hint(key)}")
        if len(found) > 1:
            raise ConfigError(f"{label}: {key!r} is ambiguous: write method.{key} or training.{key}.")
        if not self.read(found[0], name):
            reason = "reads only views" if self.reads_views else "trains nothing by gradient"
            raise ConfigError(
                f"{label}: {found[0]}.{name} has no effect on {self.method}, which {reason}: leave it out."
            )
        return found[0], name

    def _hint(self, key: str) -> str:
        known = self.shown()
        bare = key.split(".")[-1]
        by_field = {full.split(".")[1]: full for full in known}
        near = [by_field[match] for match in difflib.get_close_matches(bare, by_field, n=2, cutoff=0.6)]
        if near:
            return f"Did you mean {' or '.join(repr(match) for match in near)}?"
        return f"Known: {', '.join(known)}." if known else f"{self.method} has no settings."
