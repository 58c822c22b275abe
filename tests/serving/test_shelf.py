"""Which adapters a server takes, and what it refuses before it starts."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from adaptkit.errors import ConfigError, UnknownNameError
from adaptkit.serving.limits import Limits
from adaptkit.serving.shelf import Shelf
from adaptkit.storage import read_safetensors, write_safetensors


def test_images_are_encoded_once_for_all_their_adapters(shelf, monkeypatch):
    seen = []
    encode = shelf.backbone.encode_image
    monkeypatch.setattr(shelf.backbone, "encode_image", lambda pixels: seen.append(len(pixels)) or encode(pixels))
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    asked = [("probe", "cache"), ("cache",), ("sure", "probe", "cache")]
    answers = shelf.answer(pixels, asked)
    assert seen == [3]
    assert [tuple(answer) for answer in answers] == asked
    for place, names in enumerate(asked):
        for name in names:
            alone = shelf.answer(pixels[place : place + 1], [(name,)])[0][name]
            np.testing.assert_allclose(answers[place][name], alone, rtol=1e-4, atol=1e-4)


def test_choosing(shelf, folders):
    assert shelf.choose(["cache", "probe", "cache"]) == ("cache", "probe")
    assert Shelf({"one": folders["probe"]}, shelf.backbone).choose([]) == ("one",)
    with pytest.raises(ConfigError, match=r"\?adapter=NAME"):
        shelf.choose([])
    for name in ("prob", "../probe", str(folders["probe"]), "", "x" * 10_000):
        with pytest.raises(UnknownNameError) as refused:
            shelf.choose([name])
        assert len(str(refused.value)) < 300


def test_all_problems_are_said_at_once(shelf, folders, tmp_path):
    shutil.copytree(folders["probe"], tmp_path / "newer")
    config = json.loads((tmp_path / "newer/adapter_config.json").read_text())
    (tmp_path / "newer/adapter_config.json").write_text(json.dumps({**config, "schema_version": 99}))
    (tmp_path / "empty").mkdir()
    given = {"newer": tmp_path / "newer", "empty": tmp_path / "empty", "a/b": folders["probe"]}
    with pytest.raises(ConfigError) as refused:
        Shelf(given, shelf.backbone)
    for part in ("update adaptkit", "is not an adapter folder", "'a/b' can't name an adapter"):
        assert part in str(refused.value)
    with pytest.raises(ConfigError, match="There is no adapter"):
        Shelf({})


def test_one_backbone(shelf, folders, tmp_path):
    shutil.copytree(folders["probe"], tmp_path / "other")
    config = json.loads((tmp_path / "other/adapter_config.json").read_text())
    config["backbone"]["digest"] = "0" * 64
    (tmp_path / "other/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="serve them apart"):
        Shelf({"probe": folders["probe"], "other": tmp_path / "other"}, shelf.backbone)
    with pytest.raises(ConfigError, match="load the backbone it was trained on"):
        Shelf({"other": tmp_path / "other"}, shelf.backbone)


def test_an_adapter_whose_answers_are_no_numbers(shelf, folders, tmp_path):
    shutil.copytree(folders["probe"], tmp_path / "nan")
    path = tmp_path / "nan/adapter_model.safetensors"
    state = read_safetensors(path)
    write_safetensors(path, {key: torch.full_like(value, float("nan")) for key, value in state.items()})
    with pytest.raises(ConfigError, match="nan: "):
        Shelf({"nan": tmp_path / "nan"}, shelf.backbone)


@pytest.mark.parametrize("change", [{"body_bytes": 0}, {"seconds": float("nan")}, {"batch": -1}, {"images": 300}])
def test_limits_are_checked(change):
    with pytest.raises(ConfigError):
        Limits(**change)
