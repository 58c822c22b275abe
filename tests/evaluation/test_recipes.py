"""Every recipe against its method; order of precedence; what is refused, all at once."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from adaptkit.errors import ConfigError, MissingPathError, UnknownNameError
from adaptkit.evaluation import recipes
from adaptkit.evaluation.recipes import Recipe, find_recipe, list_recipes, load_recipe, resolve
from adaptkit.methods import methods
from adaptkit.methods.base import GradientMethod
from adaptkit.types import TrainingSettings

FOLDER = Path(__file__).parents[2] / "recipes"
METHODS = tuple(methods)  # every registered method has recipes
FILES = sorted(path for path in FOLDER.rglob("*.yaml") if path.parent.name != "suites")
COOP = methods.get("coop")

# tip_adapter sheet, "Search grid": dataset, B, A, initial beta, initial alpha, epochs of F
TIP_TABLE = [
    ("imagenet", 7, 3, 1, 1.17, 20),
    ("caltech101", 12, 5, 1, 3, 20),
    ("dtd", 13, 13, 1, 2, 20),
    ("eurosat", 12, 10, 1, 2, 100),
    ("fgvc_aircraft", 30, 30, 1, 5, 20),
    ("food101", 10, 10, 1, 1.17, 20),
    ("oxford_flowers", 50, 50, 1, 10, 20),
    ("oxford_pets", 7, 3, 1, 1.17, 20),
    ("stanford_cars", 20, 10, 1, 3, 20),
    ("sun397", 12, 10, 1, 1.17, 20),
    ("ucf101", 7, 3, 1, 3, 20),
]


def header(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines[: lines.index(next(li for li in lines if not li.startswith("#")))])


# --- the recipes themselves -------------------------------------------------------------------------------------------


def test_every_recipe_resolves_against_its_method():
    checked = 0
    for name in list_recipes():
        recipe = load_recipe(name)
        method = methods.get(recipe.method)
        for shots in recipe.shots:
            for dataset in recipe.by_dataset or [None]:
                resolved = resolve(method, recipe, shots=shots, dataset=dataset)
                assert isinstance(resolved.config, method.config_class), name
                assert isinstance(resolved.training, TrainingSettings), name
        assert name == f"{recipe.method}/{name.split('/')[1]}"
        assert name.split("/")[1].startswith(recipe.protocol), name
        checked += 1
    assert checked == len(FILES) >= 85  # a recipe that the loop doesn't reach would go unchecked


def test_every_method_and_protocol_has_a_recipe_and_a_quick_one():
    found = 0
    for method in METHODS:
        for protocol in ("few-shot", "base-to-novel"):  # the others may train by the first one's
            for variant in ("", "quick"):
                recipe = find_recipe(method, protocol, variant)
                assert recipe is not None, (method, protocol, variant)
                recipe.check_fits(method, protocol)
                found += 1
    assert found == 4 * len(METHODS) >= 60


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_headers_say_what_and_how(path: Path):
    text, recipe = header(path), load_recipe(f"{path.parent.name}/{path.stem}")
    command = re.search(r"# Run: +(.*?)\n# Override", text, re.DOTALL)
    assert command is not None, "no run command"
    words = shlex.split(command.group(1).replace("\\\n#", " "))
    assert words[:2] == ["adaptkit", "run"]
    options = dict(zip(words[2::2], words[3::2], strict=True))
    assert (options["--method"], options["--protocol"]) == (recipe.method, recipe.protocol)
    assert options["--recipe"] == recipe.name
    assert re.search(r"# Override: --(set|template) ", text)
    if not recipe.name.endswith("quick"):
        assert "# Published: " in text
    assert max(map(len, path.read_text(encoding="utf-8").splitlines())) <= 120


def test_example_overrides_of_headers_are_accepted():
    tried = 0
    for path in FILES:
        recipe = load_recipe(f"{path.parent.name}/{path.stem}")
        overrides = re.findall(r"--set (\S+=\S+)", header(path))
        dataset = next(iter(recipe.by_dataset), None)
        resolve(methods.get(recipe.method), recipe, overrides, shots=16, dataset=dataset)
        tried += len(overrides)
    assert tried >= 30


def test_digits_are_never_mirrored_by_quick_recipes():
    quick = [name for name in list_recipes() if name.endswith("-quick")]
    assert sum("/cross-dataset" not in name for name in quick) == 2 * len(METHODS)
    for name in quick:
        recipe = load_recipe(name)
        training = resolve(methods.get(recipe.method), recipe).training
        assert training.views == 0 or not training.flip, name


@pytest.mark.parametrize(("shots", "epochs"), [(1, 50), (2, 100), (4, 100), (8, 200), (16, 200)])
def test_coop_trains_as_long_as_its_paper(shots: int, epochs: int):
    recipe = load_recipe("coop/few-shot")
    assert resolve(COOP, recipe, shots=shots).training.epochs == epochs
    assert resolve(COOP, recipe, shots=shots, dataset="imagenet").training.epochs == 50


def test_shots_between_two_entries_take_the_lower_one():
    recipe = load_recipe("coop/few-shot")
    assert [resolve(COOP, recipe, shots=k).training.epochs for k in (3, 5, 7, 12, 64)] == [100, 100, 100, 200, 200]


def test_paper_settings_that_are_easy_to_get_wrong():
    words = resolve(COOP, load_recipe("coop/base-to-novel")).config
    assert words.context_init == "a photo of a"
    maple = resolve(methods.get("maple"), load_recipe("maple/base-to-novel"))
    assert (maple.config.depth, maple.config.num_context) == (9, 2)
    assert (maple.training.lr, maple.training.batch_size, maple.training.epochs) == (3.5e-3, 4, 5)
    tip_f = resolve(methods.get("tip-adapter-f"), load_recipe("tip-adapter-f/few-shot")).training
    assert (tip_f.optimiser, tip_f.eps, tip_f.weight_decay, tip_f.schedule) == ("adamw", 1e-4, 0.01, "cosine-step")
    assert tip_f.warmup_epochs == 0
    assert resolve(COOP, load_recipe("coop/few-shot-csc")).config.class_specific
    assert resolve(COOP, load_recipe("coop/few-shot-middle")).config.class_position == "middle"


@pytest.mark.parametrize("method", ["tip-adapter", "tip-adapter-f"])
def test_search_ranges_per_dataset_are_the_sheets_and_marked(method: str):
    recipe = load_recipe(f"{method}/few-shot-per-dataset")
    assert recipe.marked
    assert list(recipe.by_dataset) == [row[0] for row in TIP_TABLE]
    for dataset, max_beta, max_alpha, beta, alpha, epochs in TIP_TABLE:
        config, training, origins = resolve(methods.get(method), recipe, dataset=dataset, shots=16)
        assert (config.max_beta, config.max_alpha, config.beta, config.alpha) == (max_beta, max_alpha, beta, alpha)
        if method == "tip-adapter-f":
            assert training.epochs == epochs
        assert origins["method.max_beta"] == f"recipe {recipe.name}, dataset {dataset}"


def test_only_recipes_that_know_the_dataset_are_marked():
    marked = [name for name in list_recipes() if load_recipe(name).marked]
    assert marked == [
        "ape-t/few-shot-per-dataset",
        "ape/few-shot-per-dataset",
        "mmrl/base-to-novel-per-dataset",
        "mmrl/few-shot-per-dataset",
        "mmrlpp/base-to-novel-per-dataset",
        "mmrlpp/cross-dataset-per-target",
        "mmrlpp/few-shot-per-dataset",
        "prograd/few-shot-per-dataset",
        "promptsrc/few-shot-per-dataset",
        "taskres/few-shot-per-dataset",
        "tip-adapter-f/few-shot-per-dataset",
        "tip-adapter/few-shot-per-dataset",
    ]


@pytest.mark.parametrize("dataset", [None, "my_photos"])
def test_settings_per_dataset_are_not_guessed_for_others(dataset):
    with pytest.raises(ConfigError, match="none for"):
        resolve(methods.get("tip-adapter"), load_recipe("tip-adapter/few-shot-per-dataset"), dataset=dataset)


# --- finding and reading ----------------------------------------------------------------------------------------------


def test_listing_narrows_by_method_and_protocol():
    assert list_recipes("maple") == (
        "maple/base-to-novel",
        "maple/base-to-novel-quick",
        "maple/cross-dataset",
        "maple/cross-dataset-quick",
        "maple/few-shot",
        "maple/few-shot-quick",
    )
    assert all("base-to-novel" in name for name in list_recipes(protocol="base-to-novel"))
    assert find_recipe("coop", "few-shot", "absent") is None


def test_listing_imports_no_torch():
    code = "import sys; from adaptkit.evaluation.recipes import *; list_recipes(); load_recipe('coop/few-shot');"
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_installed_recipes_come_first(tmp_path, monkeypatch):
    package = tmp_path / "adaptkit"
    (package / "evaluation").mkdir(parents=True)
    monkeypatch.setattr(recipes, "__file__", str(package / "evaluation" / "recipes.py"))
    with pytest.raises(MissingPathError, match="Install adaptkit again"):
        list_recipes()
    (tmp_path / "recipes" / "coop").mkdir(parents=True)
    assert list_recipes() == ()
    (package / "_recipes" / "coop").mkdir(parents=True)
    (package / "_recipes" / "coop" / "few-shot.yaml").write_text((FOLDER / "coop" / "few-shot.yaml").read_text())
    assert list_recipes() == ("coop/few-shot",)


@pytest.mark.parametrize("name", ["coop/few-shto", "../recipes/coop/few-shot", "coop"])
def test_unknown_names_get_near_matches(name: str):
    with pytest.raises(UnknownNameError, match=r"coop/few-shot|adaptkit list recipes"):
        load_recipe(name)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


PLAIN = "method: coop\nprotocol: few-shot\nsummary: Mine.\nsource: me\nshots: [4]\ntemplate_use: learned\n"


def test_a_recipe_of_ones_own_is_given_by_path(tmp_path):
    path = write(tmp_path, PLAIN + "settings: {num_context: 4}\n")
    for given in (path, str(path)):
        recipe = load_recipe(given)
        assert resolve(COOP, recipe).config.num_context == 4
    with pytest.raises(MissingPathError, match=r"other\.yaml"):
        load_recipe(tmp_path / "other.yaml")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("protocl: few-shot\n", "did you mean 'protocol'"),
        ("tuned_on: tests\n", "did you mean 'test'"),
        ("name: x\n", "remove the key 'name'"),
        ("by_shots: {one: {training: {epochs: 1}}}\n", "whole number"),
        ("by_shots: {1: {trainng: {epochs: 1}}}\n", "did you mean 'training'"),
        ("by_shots: {0: {training: {epochs: 1}}}\n", "at least 1"),
        ("templates: ['a {}.']\n", "template_use"),
        ("seeds: []\n", "at least one seed"),
    ],
)
def test_malformed_recipes_are_refused(tmp_path, more, says):
    with pytest.raises(ConfigError, match=says):
        load_recipe(write(tmp_path, PLAIN + more))


def test_all_problems_of_a_file_are_shown_at_once(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_recipe(write(tmp_path, "method: coop\nprotocol: few\nshots: [0]\n"))
    for part in ("protocol", "summary", "source"):
        assert part in str(caught.value)


def test_a_recipe_of_another_method_or_protocol_is_refused():
    recipe = load_recipe("coop/few-shot")
    with pytest.raises(ConfigError, match="for coop, not for maple"):
        resolve(methods.get("maple"), recipe)
    with pytest.raises(ConfigError, match="not for coop with base-to-novel"):
        recipe.check_fits("coop", "base-to-novel")


# --- precedence and origins -------------------------------------------------------------------------------------------


def mine(**values) -> Recipe:
    return Recipe("mine", "coop", "few-shot", "Mine.", "me", (4,), template_use="learned", **values)


def test_default_then_recipe_then_file_then_flag(tmp_path):
    file = write(tmp_path, "method: {num_context: 3}\ntraining: {lr: 3.0e-3, batch_size: 3}\n")
    recipe = mine(settings={"num_context": 2}, training={"lr": 2e-3, "batch_size": 2, "epochs": 2})
    config, training, origins = resolve(COOP, recipe, ["training.lr=4e-3"], file=file)
    assert (config.num_context, training.lr, training.batch_size, training.epochs) == (3, 4e-3, 3, 2)
    assert (config.class_position, training.momentum) == ("end", 0.9)
    assert origins["training.lr"] == "--set"
    assert origins["method.num_context"] == origins["training.batch_size"] == f"file {file}"
    assert origins["training.epochs"] == "recipe mine"
    assert origins["method.class_position"] == origins["training.momentum"] == "default"
    assert len(origins) == 4 + 19  # CoOp's fields and the loop's


def test_without_a_recipe_the_methods_own_defaults_count():
    training = resolve(methods.get("tip-adapter-f")).training
    assert training == methods.get("tip-adapter-f").default_training


def test_bare_names_nested_mappings_and_texts_mean_the_same():
    wanted = resolve(COOP, None, ["method.num_context=4", "training.lr=1e-2"])
    assert resolve(COOP, None, ["num_context=4", "lr=0.01"]) == wanted
    assert resolve(COOP, None, {"method": {"num_context": 4}, "lr": 0.01}) == wanted
    assert resolve(COOP, None, {"method.num_context": 4, "training.lr": 0.01}) == wanted


def test_overrides_can_be_called_by_another_name():
    assert resolve(COOP, None, {"lr": 0.01}, origin="settings=").origins["training.lr"] == "settings="


def test_all_problems_are_shown_at_once():
    with pytest.raises(ConfigError) as caught:
        resolve(COOP, None, ["num_contxt=4", "train.lr=1", "epochs=many", "class_position=back", "momentum=2"])
    text = str(caught.value)
    for part in ("'num_contxt'", "'method.num_context'", "'train.lr'", "'training.lr'", "epochs is 'many'", "'back'"):
        assert part in text
    assert "--set" in text


def test_values_out_of_range_are_refused_before_training():
    with pytest.raises(ConfigError, match=r"lr is -1\.0"):
        resolve(COOP, None, ["lr=-1"])
    with pytest.raises(ConfigError, match="num_context is 0"):
        resolve(COOP, None, ["num_context=0"])


def test_settings_without_effect_are_refused():
    for method, key in (("zero-shot", "lr"), ("linear-probe", "training.epochs"), ("tip-adapter", "lr")):
        assert not issubclass(methods.get(method), GradientMethod)
        with pytest.raises(ConfigError, match=f"has no effect on {method}"):
            resolve(methods.get(method), None, [f"{key}=1"])
    assert resolve(methods.get("tip-adapter"), None, ["views=3"]).training.views == 3
    assert resolve(methods.get("zero-shot")).training.epochs == 0


def test_ambiguous_bare_names_ask_for_the_section(monkeypatch):
    places = recipes._Places(COOP)
    places.fields["method"].append("lr")
    with pytest.raises(ConfigError, match=r"method\.lr or training\.lr"):
        places.find("lr", "--set")


def test_a_method_without_settings_says_so():
    with pytest.raises(ConfigError, match="zero-shot has no settings"):
        resolve(methods.get("zero-shot"), None, ["anything=1"])
