"""Runs on stored features: every feature-level method, the refusals, and what their results say."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from adaptkit.backbones.load import load_backbone
from adaptkit.data.feature_export import export_features
from adaptkit.data.feature_files import StoredSource
from adaptkit.data.features import FeatureStore
from adaptkit.data.sources import load_dataset
from adaptkit.errors import AdapterError, BackboneError, DataError, UnsupportedError
from adaptkit.evaluation.protocols import plan_run, run_method
from adaptkit.evaluation.stored import backbone_for
from adaptkit.evaluation.tasks import make_task
from adaptkit.methods import methods
from adaptkit.methods.adapter import load_adapter, save_adapter
from adaptkit.methods.base import GradientMethod
from tests.data.feature_file import NAMES, small_tensors, write_small

REAL = os.environ.get("ADAPTKIT_FEATURES_DIR")
needs_real = pytest.mark.skipif(REAL is None, reason="ADAPTKIT_FEATURES_DIR isn't set")

ON_FEATURES = [name for name in methods if methods.get(name).reads == "image_features"]
RUN = [name for name in ON_FEATURES if not methods.get(name).writes_texts]
QUICK = {  # settings that keep long fits short
    "dclip": ["method.compat=false"],
    "unem": ["method.epochs=1", "method.tasks=2", "method.tasks_per_step=2"],
    "fed-mp": ["method.num_clients=2"],
    "cross-modal": ["method.iterations=20", "method.eval_every=10"],
}


@pytest.fixture
def store(tmp_path) -> FeatureStore:
    return FeatureStore(tmp_path / "store")


@pytest.fixture
def file(tmp_path) -> str:
    return f"features:{write_small(tmp_path / 'birds.safetensors')}"


def run(dataset, method, store, *, protocol="few-shot", shots=4, overrides=(), **options):
    backbone = backbone_for(dataset)
    plan = plan_run(method, backbone, make_task(dataset, protocol, shots), overrides=overrides, **options)
    return run_method(plan, backbone, store=store)


def short(method: str) -> list[str]:
    """Settings for a quick fit."""
    trained = ["training.epochs=3"] if issubclass(methods.get(method), GradientMethod) else []
    return [*trained, *QUICK.get(method, [])]


def test_all_methods_are_either_run_or_refused():
    assert len(RUN) == 20
    assert len(ON_FEATURES) == 27
    assert set(ON_FEATURES) - set(RUN) == {"coop", "cocoop", "kgcoop", "prograd", "waffleclip", "proapo", "gist"}


@pytest.mark.parametrize("method", RUN)
def test_every_method_on_features_runs(method, file, store):
    result = run(load_dataset(file), method, store, overrides=short(method)).result
    assert result.parts[0].total == 48
    assert result.parts[0].accuracy > 0.3  # of six classes
    assert result.images_encoded == 0
    assert not store.root.exists()
    assert result.key.backbone == "some CLIP"
    assert result.key.settings["text_features"]


@pytest.mark.parametrize("method", [name for name in methods if name not in RUN])
def test_the_others_are_refused_before_any_work(method, file):
    dataset = load_dataset(file)
    what = "trains on images" if methods.get(method).reads == "images" else "needs a text encoder"
    with pytest.raises(UnsupportedError, match=f"{method} {what}"):
        plan_run(method, backbone_for(dataset), make_task(dataset, shots=2))


@pytest.mark.parametrize("method", ["zero-shot", "tip-adapter", "clap", "cupl", "gda"])
def test_base_to_novel_works_on_a_file(method, file, store):
    result = run(load_dataset(file), method, store, protocol="base-to-novel", overrides=short(method)).result
    assert [(part.name, part.num_classes, part.total) for part in result.parts] == [("base", 3, 24), ("novel", 3, 24)]
    assert result.harmonic_mean > 0.4


def test_base_to_novel_chooses_recipes_of_the_paper(file):
    dataset = load_dataset(file)
    plan = plan_run("tip-adapter", backbone_for(dataset), make_task(dataset, shots=2))
    assert plan.recipe.name == "tip-adapter/few-shot"


def test_without_texts_only_the_probe_works(tmp_path, store):
    tensors = {key: t for key, t in small_tensors().items() if not key.startswith(("text", "desc"))}
    dataset = load_dataset(f"features:{write_small(tmp_path / 'a.safetensors', tensors)}")
    assert run(dataset, "linear-probe", store).result.parts[0].accuracy > 0.5
    with pytest.raises(UnsupportedError, match="no text encoder"):
        run(dataset, "zero-shot", store)


def test_descriptions_are_needed_or_refused(tmp_path, file):
    tensors = {key: t for key, t in small_tensors().items() if not key.startswith("desc")}
    bare = load_dataset(f"features:{write_small(tmp_path / 'a.safetensors', tensors)}")
    with pytest.raises(DataError, match=r"cupl reads descriptions of the classes, and .* holds none"):
        plan_run("cupl", backbone_for(bare), make_task(bare, shots=2))
    dataset = load_dataset(file)
    with pytest.raises(UnsupportedError, match="dclip makes sentences of its own out of the descriptions"):
        plan_run("dclip", backbone_for(dataset), make_task(dataset, shots=2))
    other = replace(dataset, descriptions={name: (f"{name} in the sun",) for name in NAMES})
    with pytest.raises(DataError, match="no feature of the description 'red fox in the sun'"):
        plan_run("cupl", backbone_for(dataset), make_task(other, shots=2))


def test_other_templates_and_fresh_views_are_refused(file):
    dataset = load_dataset(file, templates=["a drawing of a {}."])
    with pytest.raises(DataError, match="other templates were asked for"):
        plan_run("zero-shot", backbone_for(dataset), make_task(dataset, shots=2))
    dataset = load_dataset(file)
    with pytest.raises(UnsupportedError, match="fresh_views draws new looks at images"):
        plan_run("clap", backbone_for(dataset), make_task(dataset, shots=2), overrides=["training.fresh_views=true"])


def test_views_that_are_missing_are_said(file, store):
    said = run(load_dataset(file), "tip-adapter", store).result.warnings
    assert any("10 augmented views per image are asked for, and none is stored" in warning for warning in said)


def test_an_adapter_of_an_unidentified_model_answers_no_images(file, store, tmp_path):
    dataset = load_dataset(file)
    outcome = run(dataset, "tip-adapter", store)
    folder = save_adapter(tmp_path / "adapter", outcome.model)
    for backbone in (None, load_backbone("mini")):
        with pytest.raises(AdapterError, match="made from a file of features, which names 'some CLIP'"):
            load_adapter(folder, backbone)
    again = load_adapter(folder, backbone_for(dataset))
    features = small_tensors()["test_features"]
    assert (again.method(features) == outcome.model.method(features)).all()


# --- a file of our own ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """`species` (cut down), its features by `mini`, and a file of them."""
    folder = tmp_path_factory.mktemp("exported")
    dataset, backbone, store = load_dataset("species"), load_backbone("mini"), FeatureStore(folder / "store")
    counts = export_features(dataset, backbone, folder / "species.safetensors", store=store)
    assert counts == {"train": 960, "val": 240, "test": 960}
    return dataset, backbone, store, load_dataset(f"features:{folder / 'species.safetensors'}")


@pytest.mark.parametrize("method", ["zero-shot", "linear-probe", "tip-adapter", "taskres", "cupl", "dclip", "ape"])
@pytest.mark.parametrize("protocol", ["few-shot", "base-to-novel"])
def test_an_exported_file_gives_the_datasets_own_results(method, protocol, exported):
    dataset, backbone, store, stored = exported
    overrides = [*short(method), *(["training.views=0"] if methods.get(method).default_training else [])]
    plan = plan_run(method, backbone, make_task(dataset, protocol, 2), overrides=overrides)
    expected = run_method(plan, backbone, store=store)
    found = run(stored, method, store, protocol=protocol, shots=2, overrides=overrides)
    assert found.result.recipe == expected.result.recipe  # mini's, in both
    for mine, own in zip(found.predictions, expected.predictions, strict=True):
        assert (mine.labels == own.labels).all()
        assert abs(mine.confidence - own.confidence).max() < 1e-5  # logits to 1e-6 of their size: see below
    features = store.features(backbone, dataset.test)
    difference = found.model.method(features) - expected.model.method(features)
    assert difference.abs().max() <= 1e-6 * max(1.0, expected.model.method(features).abs().max())


def test_an_exported_file_knows_its_model(exported):
    dataset, backbone, _, stored = exported
    own = backbone_for(stored)
    assert (own.spec.digest, own.spec.family) == (backbone.spec.digest, "mini")
    assert own.spec.preprocessing == backbone.spec.preprocessing
    assert stored.notes[0] == dataset.notes[0]  # embedded data stay embedded
    assert backbone_for(stored, "mini").image_tower is not None
    with pytest.raises(BackboneError, match="is another model"):
        backbone_for(replace(stored, train=_of_another_model(stored)), "mini")


def _of_another_model(dataset):
    """The training split, as if its file named another model."""
    source = StoredSource(replace(dataset.train.source.file, digest="0" * 64), "train")
    return replace(dataset.train, source=source)


def test_the_model_itself_serves_prompts_that_are_learned(exported):
    _, _, store, stored = exported
    backbone = backbone_for(stored, "mini")
    plan = plan_run("coop", backbone, make_task(stored, shots=2), overrides=["training.epochs=1", "training.views=0"])
    assert run_method(plan, backbone, store=store).result.parts[0].total == 960


# --- real features ----------------------------------------------------------------------------------------------------


@needs_real
@pytest.mark.parametrize(
    ("name", "correct", "percent"), [("stanford_cars.safetensors@test=val", 964, 59.0), ("dtd.safetensors", 758, 44.8)]
)
def test_zero_shot_on_the_published_features(name, correct, percent, store):
    result = run(load_dataset(f"features:{REAL}/{name}", shots=1), "zero-shot", store, shots=1).result
    assert result.parts[0].correct == correct
    assert round(100 * result.parts[0].accuracy, 1) == percent


@needs_real
def test_tip_adapter_beats_zero_shot_on_cars(store):
    dataset = load_dataset(f"features:{REAL}/stanford_cars.safetensors@test=val", shots=16)
    result = run(dataset, "tip-adapter", store, shots=16, overrides=["method.search=false"]).result
    assert result.parts[0].accuracy > 0.64
    assert result.tuned_on == "none"
