"""Files of features: what is accepted, what is refused, and which split is used for what."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from adaptkit.data.checks import check_dataset, drop_unreadable
from adaptkit.data.feature_export import export_features
from adaptkit.data.feature_files import StoredSource, open_features
from adaptkit.data.feature_reader import read_feature_file
from adaptkit.data.features import FeatureStore
from adaptkit.data.sources import load_dataset
from adaptkit.errors import BackboneError, ConfigError, DataError, MissingPathError, StorageError
from tests.data.feature_file import DIM, NAMES, small_tensors, write_small

REAL = os.environ.get("ADAPTKIT_FEATURES_DIR")


@pytest.fixture
def file(tmp_path) -> Path:
    return write_small(tmp_path / "birds.safetensors")


def test_a_file_is_a_dataset(file):
    data = load_dataset(f"features:{file}")
    assert (data.name, data.class_names) == ("birds", NAMES)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 48, "val": 48, "test": 48}
    assert data.descriptions["oak"] == ("oak, description 1", "oak, description 2")
    assert data.source["kind"] == "features"
    assert any("no image was read" in note for note in data.notes)
    assert load_dataset(f"features:{file}").digest == data.digest


def test_features_come_as_they_lie_and_nothing_is_stored(file, tmp_path):
    data = load_dataset(f"features:{file}")
    backbone = data.train.source.file.stored_backbone(data.class_names)
    store = FeatureStore(tmp_path / "store")
    chosen = data.train.subset([5, 0])
    inputs = store.inputs(backbone, chosen)
    assert torch.equal(inputs.values[0], small_tensors()["train_features"][[5, 0]])
    assert inputs.labels.tolist() == [5, 0]
    assert torch.equal(store.features(backbone, chosen), inputs.values[0])
    assert store.encoded == 0
    assert not (tmp_path / "store").exists()


def test_other_content_is_another_dataset(file, tmp_path):
    tensors = small_tensors()
    tensors["test_features"][0, 0] += 1
    other = write_small(tmp_path / "other.safetensors", tensors)
    one, two = load_dataset(f"features:{file}"), load_dataset(f"features:{other}")
    assert one.train.digest == two.train.digest
    assert one.test.digest != two.test.digest
    assert one.digest != two.digest
    before = one.train.source.file.stored_backbone(one.class_names)
    tensors["text_features"][0] *= 2
    changed = read_feature_file(write_small(tmp_path / "texts.safetensors", tensors))
    assert changed.stored_backbone(NAMES).digest_of_texts != before.digest_of_texts
    assert changed.stored_backbone(NAMES).spec.digest == before.spec.digest


def test_views_are_read_and_missing_ones_said(tmp_path):
    tensors = small_tensors()
    tensors["train_views"] = torch.stack([tensors["train_features"] + 1, tensors["train_features"] + 2])
    data = load_dataset(f"features:{write_small(tmp_path / 'a.safetensors', tensors)}")
    backbone = data.train.source.file.stored_backbone(data.class_names)
    inputs = FeatureStore(tmp_path / "store").inputs(backbone, data.train, views=2)
    assert torch.equal(inputs.values[2], tensors["train_views"][1])
    with pytest.warns(UserWarning, match="5 augmented views per image are asked for, and only 2 are stored"):
        assert FeatureStore(tmp_path / "store").inputs(backbone, data.train, views=5).num_views == 3
    with pytest.warns(UserWarning, match="none is stored"):
        assert FeatureStore(tmp_path / "store").inputs(backbone, data.val, views=1).num_views == 1


def test_half_precision_is_read_as_single(tmp_path):
    tensors = {key: t.half() if t.is_floating_point() else t.to(torch.uint8) for key, t in small_tensors().items()}
    tensors["val_features"] = tensors["val_features"].bfloat16()
    data = load_dataset(f"features:{write_small(tmp_path / 'a.safetensors', tensors)}")
    assert data.val.source.select(np.arange(3), 0).dtype == torch.float32
    assert data.train.source.content_digest(0) != data.train.source.content_digest(1)


# --- which split is used for what -------------------------------------------------------------------------------------


def published(path: Path, *sizes: int, splits: tuple[str, ...] = ("val",)) -> Path:
    """A file with ready draws and no pool, laid out as the published ones are."""
    tensors = small_tensors(sizes=splits)
    for size in sizes:
        rows = torch.arange(len(NAMES)).repeat_interleave(size)
        tensors[f"train{size}_features"] = small_tensors()["text_features"][rows].half()
        tensors[f"train{size}_labels"] = rows
    return write_small(path, tensors)


@pytest.mark.parametrize(
    ("shots", "taken"),
    [(1, "train1"), (4, "train4"), (2, "train4"), (5, "train16"), (40, "train16"), (None, "train16")],
)
def test_the_ready_draw_of_the_shots_is_taken(tmp_path, shots, taken):
    path = published(tmp_path / "a.safetensors", 1, 4, 16)
    opened = open_features(f"features:{path}@test=val", shots)
    assert opened.train == taken
    assert any(f"ready draw {taken!r}" in note for note in opened.dataset(NAMES).notes)


def test_a_pool_is_preferred_to_a_larger_draw(tmp_path):
    path = published(tmp_path / "a.safetensors", 1, 16, splits=("train", "val", "test"))
    assert open_features(f"features:{path}", 4).train == "train"
    assert open_features(f"features:{path}", 16).train == "train16"


def test_testing_on_val_must_be_asked_for_and_leaves_none_to_validate(tmp_path):
    path = published(tmp_path / "a.safetensors", 1)
    with pytest.raises(DataError, match=r"has no test features \(it has train1, val\): write features:.*@test=val"):
        load_dataset(f"features:{path}")
    data = load_dataset(f"features:{path}@test=val")
    assert data.val is None
    assert len(data.test) == 48
    assert any("no validation images" in note for note in data.notes)


def test_shots_from_val_leave_none_to_validate(tmp_path):
    path = published(tmp_path / "a.safetensors", 1, splits=("val", "test"))
    data = load_dataset(f"features:{path}@train=val", shots=8)
    assert data.val is None
    assert len(data.train) == 48
    assert data.train.kind == "train"
    no_train = published(tmp_path / "b.safetensors", splits=("val", "test"))
    with pytest.raises(DataError, match=r"has no train features.*@train=val to draw shots from its val images"):
        load_dataset(f"features:{no_train}")


@pytest.mark.parametrize(
    "choice", ["tset=val", "test=train", "test=val,train=val", "val=test", "test=", "text_length=0", "text_length=x"]
)
def test_other_choices_are_refused(file, choice):
    with pytest.raises(DataError, match="can't be used; one of test=val"):
        load_dataset(f"features:{file}@{choice}")


def test_val_that_is_missing_cant_take_a_place(tmp_path):
    path = published(tmp_path / "a.safetensors", 1, splits=("test",))
    with pytest.raises(DataError, match="has no val features"):
        load_dataset(f"features:{path}@train=val")


def test_a_path_may_hold_an_at_sign(tmp_path):
    folder = tmp_path / "me@home=here"
    folder.mkdir()
    assert len(load_dataset(f"features:{write_small(folder / 'a@b.safetensors')}").train) == 48


# --- texts ------------------------------------------------------------------------------------------------------------


def test_prompts_of_named_templates_are_known(tmp_path):
    tensors = small_tensors()
    tensors["text_features"] = torch.stack([tensors["text_features"], 1 + tensors["text_features"]], dim=1)
    templates = ["a photo of a {}.", "art of the {}."]
    path = write_small(tmp_path / "a.safetensors", tensors, templates=json.dumps(templates))
    data = load_dataset(f"features:{path}")
    backbone = data.train.source.file.stored_backbone(data.class_names)
    assert data.templates == tuple(templates) == backbone.own_templates
    found = backbone.text_features(["art of the oak.", "a photo of a yew."])
    assert torch.equal(found, torch.stack([tensors["text_features"][2, 1], tensors["text_features"][3, 0]]))
    with pytest.raises(BackboneError, match="none of the text 'a drawing of an oak"):
        backbone.text_features(["a drawing of an oak."])
    with pytest.raises(BackboneError, match="stored features alone"):
        backbone.encode_image(torch.zeros(1, 3, 4, 4))


def test_descriptions_alone_make_texts(tmp_path):
    tensors = small_tensors()
    del tensors["text_features"]
    file = read_feature_file(write_small(tmp_path / "a.safetensors", tensors))
    rows = torch.nn.functional.normalize(tensors["description_features"], dim=-1)
    expected = torch.nn.functional.normalize(rows.view(6, 2, DIM).mean(dim=1), dim=-1)
    assert torch.allclose(file.texts[:, 0], expected, atol=1e-6)
    assert any("mean of its descriptions" in note for note in file.notes)


def test_described_sentences_are_kept(tmp_path):
    sentences = [f"{name} {index}" for name in NAMES for index in (1, 2)]
    data = load_dataset(f"features:{write_small(tmp_path / 'a.safetensors', descriptions=json.dumps(sentences))}")
    assert data.descriptions["oak"] == ("oak 1", "oak 2")
    backbone = data.train.source.file.stored_backbone(data.class_names)
    assert torch.equal(backbone.text_features(["oak 2"])[0], small_tensors()["description_features"][5])


def test_display_names_are_the_names_in_prompts(file):
    data = load_dataset(f"features:{file}", display_names={"oak": "oak tree"})
    backbone = data.train.source.file.stored_backbone(data.class_names)
    assert "oak tree" in data.class_names
    assert backbone.knows("oak tree")


def test_lengths_undo_a_scaling_to_one(tmp_path):
    tensors = {
        key: torch.nn.functional.normalize(t, dim=-1).half() if t.is_floating_point() else t
        for key, t in small_tensors().items()
    }
    path = write_small(tmp_path / "a.safetensors", tensors, text_length="4")
    data = load_dataset(f"features:{path}@image_length=10")
    backbone = data.train.source.file.stored_backbone(data.class_names)
    assert backbone.text_features(["oak"]).norm().item() == pytest.approx(4, rel=1e-3)
    assert backbone.texts_length == 4
    assert data.test.source.select(np.arange(48), 0).norm(dim=-1).mean().item() == pytest.approx(10, rel=1e-3)
    with pytest.raises(DataError, match="lengths of their own"):
        load_dataset(f"features:{write_small(tmp_path / 'b.safetensors')}@text_length=8")


# --- what is refused --------------------------------------------------------------------------------------------------

WRONG_TENSORS = {
    "no features": (lambda t: t.clear() or t.update(x=torch.ones(2)), "no train_features"),
    "labels missing": (lambda t: t.pop("val_labels"), r"val_labels \[48\] is missing"),
    "labels misspelt": (lambda t: t.update(val_label=t.pop("val_labels")), "there is 'val_label'"),
    "fewer labels": (lambda t: t.update(test_labels=t["test_labels"][:5]), r"the shape \[5\], and \[48\]"),
    "float labels": (lambda t: t.update(test_labels=t["test_labels"].float()), "test_labels is F32"),
    "whole features": (lambda t: t.update(test_features=torch.ones(48, DIM, dtype=torch.int32)), "is I32"),
    "mixed sizes": (lambda t: t.update(val_features=torch.ones(48, DIM + 1)), r"val_features has the shape \[48, 17\]"),
    "one dimension": (lambda t: t.update(val_features=torch.ones(48)), r"\[48\], and \[images, 16\] is expected"),
    "empty split": (
        lambda t: t.update(val_features=torch.ones(0, DIM), val_labels=torch.ones(0, dtype=torch.int64)),
        r"val_features has the shape \[0, 16\]",
    ),
    "not finite": (lambda t: t["train_features"][7].fill_(torch.nan), "row 7 of train_features holds values"),
    "infinite": (lambda t: t["text_features"][2].fill_(torch.inf), "row 2 of text_features holds values"),
    "all zeros": (lambda t: t["test_features"][3].zero_(), "row 3 of test_features is all zeros"),
    "label too large": (lambda t: t["train_labels"][0].fill_(6), "run from 0 to 6, and there are 6 class names"),
    "label below 0": (lambda t: t["val_labels"][0].fill_(-1), "val_labels run from -1 to 5"),
    "fewer texts": (lambda t: t.update(text_features=t["text_features"][:4]), r"text_features has the shape \[4"),
    "no templates": (lambda t: t.update(text_features=torch.ones(6, 0, DIM)), r"\[6, 0, 16\], and \[6, templates"),
    "unlabelled": (lambda t: t.pop("description_labels"), r"description_labels \[12\] is missing"),
    "views of others": (lambda t: t.update(train_views=torch.ones(2, 7, DIM)), r"and \[views, 48, 16\] is expected"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_TENSORS)
def test_wrong_tensors_are_refused(tmp_path, wrong):
    spoil, said = WRONG_TENSORS[wrong]
    tensors = small_tensors()
    spoil(tensors)
    with pytest.raises(DataError, match=said):
        read_feature_file(write_small(tmp_path / "a.safetensors", tensors))


WRONG_TEXTS = [
    ({"class_names": None}, "no class_names"),
    ({"class_names": "[1, 2]"}, "no class_names"),
    ({"class_names": "[" * 100_000}, "class_names that aren't JSON"),
    ({"class_names": json.dumps([*NAMES, "more"])}, "text_features has the shape"),
    ({"class_names": json.dumps([*NAMES[:5], "red_fox"])}, "1 class name twice"),
    ({"backbone": None}, "doesn't name the backbone"),
    ({"backbone": " "}, "doesn't name the backbone"),
    ({"logit_scale": "warm"}, "logit_scale 'warm'"),
    ({"logit_scale": "-3"}, "logit_scale '-3'"),
    ({"logit_bias": "nan"}, "logit_bias 'nan'"),
    ({"templates": '["a {}", "b {}"]'}, "2 templates, and 1 are expected"),
    ({"templates": '["no place"]'}, "templates that can't be used"),
    ({"descriptions": '["one"]'}, "1 descriptions, and 12 are expected"),
    ({"descriptions": "{}"}, "aren't a list of texts"),
    ({"preprocessing": '{"image_size": "large"}'}, "preprocessing that can't be used"),
    ({"preprocessing": "[]"}, "preprocessing that can't be used"),
]


@pytest.mark.parametrize(("metadata", "said"), WRONG_TEXTS)
def test_wrong_metadata_is_refused(tmp_path, metadata, said):
    with pytest.raises(DataError, match=said):
        read_feature_file(write_small(tmp_path / "a.safetensors", **metadata))


def test_everything_wrong_is_said_at_once(tmp_path):
    tensors = small_tensors()
    tensors["train_features"][0, 0] = torch.nan
    tensors["val_labels"][0] = 99
    with pytest.raises(DataError, match=r"row 0 of train_features.*val_labels run.*the backbone.*logit_scale"):
        read_feature_file(write_small(tmp_path / "a.safetensors", tensors, backbone=None, logit_scale="x"))


def test_damaged_and_missing_files_are_refused(tmp_path, file):
    with pytest.raises(MissingPathError, match="no file of features"):
        load_dataset(f"features:{tmp_path / 'none.safetensors'}")
    with pytest.raises(DataError, match="is a folder"):
        load_dataset(f"features:{tmp_path}")
    with pytest.raises(DataError, match="names no file"):
        load_dataset("features:")
    huge = tmp_path / "huge.safetensors"
    huge.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:-10])
    text = tmp_path / "text.safetensors"
    text.write_text("not a file of tensors, but long enough to have a header")
    for path in (huge, cut, text):
        with pytest.raises(StorageError):
            load_dataset(f"features:{path}")


def test_what_isnt_read_is_said(tmp_path):
    tensors = small_tensors() | {"val_views": torch.ones(1, 48, DIM), "notes": torch.ones(1)}
    file = read_feature_file(write_small(tmp_path / "a.safetensors", tensors, logit_scal="3", unrelated="x"))
    said = " ".join(file.notes)
    assert "val_views" in said
    assert "logit_scal" in said
    assert "unrelated" not in said


def test_checks_know_that_there_are_no_pictures(file):
    data = load_dataset(f"features:{file}")
    assert check_dataset(data).problems == []
    kept, dropped = drop_unreadable(data.train)
    assert len(kept) == 48
    assert dropped == []
    with pytest.raises(DataError, match="holds features of images, not the images"):
        data.train.image(0)


def test_features_arent_exported_again(file, tmp_path):
    data = load_dataset(f"features:{file}")
    backbone = data.train.source.file.stored_backbone(data.class_names)
    with pytest.raises(DataError, match="consists of features already"):
        export_features(data, backbone, tmp_path / "again.safetensors")


def test_a_draw_is_exported_once(tmp_path):
    with pytest.raises(ConfigError, match="name one twice"):
        export_features(load_dataset("digits"), None, tmp_path / "again.safetensors", shots=(1, 1))


@pytest.mark.skipif(REAL is None, reason="ADAPTKIT_FEATURES_DIR isn't set")
def test_the_published_files_are_accepted_as_they_are():
    data = load_dataset(f"features:{REAL}/stanford_cars.safetensors@test=val", shots=4)
    assert isinstance(data.train.source, StoredSource)
    assert (len(data.class_names), len(data.train), len(data.test), data.val) == (196, 784, 1635, None)
    data = load_dataset(f"features:{REAL}/dtd.safetensors", shots=1)
    assert (len(data.class_names), len(data.train), len(data.val), len(data.test)) == (47, 47, 1128, 1692)
