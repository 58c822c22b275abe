"""Preparing datasets from a server on this machine, a hub and a torchvision that are stood in for, and by hand."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from adaptkit.data import catalogue
from adaptkit.data import prepare as module
from adaptkit.data.catalogue import CATALOGUE, File, HubFile, Origin
from adaptkit.data.prepare import prepare
from adaptkit.data.sources import load_dataset
from adaptkit.errors import StorageError, UnknownNameError
from tests.data.test_download import Server, server, zipped  # noqa: F401  # a fixture
from tests.data.trees import grow, no_checksums


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    monkeypatch.delenv("ADAPTKIT_DATA_ROOT", raising=False)


def packed(folder: Path, below: Path) -> bytes:
    return zipped(
        {path.relative_to(below).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    )


def use(monkeypatch, name: str, **changes) -> None:
    """Change one entry of the table."""
    table = {**CATALOGUE, name: replace(CATALOGUE[name], **changes)}
    for place in (catalogue, module, "adaptkit.data.known", "adaptkit.data.sources", "adaptkit.data.templates"):
        target = f"{place}.CATALOGUE" if isinstance(place, str) else f"{place.__name__}.CATALOGUE"
        monkeypatch.setattr(target, table)


@pytest.fixture
def eurosat(server: Server, tmp_path, monkeypatch):  # noqa: F811
    """EuroSAT on a server: a zip of images, and the split file on a mirror."""
    grown = grow(tmp_path / "grown", CATALOGUE["eurosat"]) / "eurosat"
    split = (grown / "split_zhou_EuroSAT.json").read_bytes()
    images = packed(grown / "2750", grown)
    server.files = {"/EuroSAT.zip": images, "/split_zhou_EuroSAT.json": split}
    good = File(f"{server.url}/EuroSAT.zip", "eurosat", md5=hashlib.md5(images).hexdigest())
    digest = hashlib.sha256(split).hexdigest()
    use(monkeypatch, "eurosat", json_sha256=digest, origins=(Origin("our server", (good,)),))
    monkeypatch.setattr(
        module,
        "mirrored",
        lambda file, folder, sha256: File(f"{server.url}/{file}", folder, sha256=sha256, unpack=False),
    )
    return server


def test_all_of_it(eurosat, tmp_path):
    steps = []
    state = prepare("eurosat", tmp_path / "root", progress=lambda *step: steps.append(step))
    assert state.ready
    assert (state.fetched, state.tried, state.missing) == ("our server", [], "")
    assert state.licence == "MIT"
    dataset = load_dataset("eurosat", data_root=tmp_path / "root")
    assert dataset.source["split"] == "published"
    assert dataset.train.image(0).size == (8, 6)
    assert sorted(path.name for path in (tmp_path / "root").iterdir()) == ["eurosat"]
    assert {what.split(" ")[0] for what, _, _ in steps} == {"downloading", "unpacking"}
    asked = len(eurosat.asked)
    assert prepare("eurosat", tmp_path / "root").fetched == ""
    assert len(eurosat.asked) == asked  # ready: nothing is asked for


def test_only_the_split_file_is_missing(eurosat, tmp_path):
    prepare("eurosat", tmp_path / "root")
    (tmp_path / "root/eurosat").rename(tmp_path / "root/EuroSAT")  # another layout
    (tmp_path / "root/EuroSAT/split_zhou_EuroSAT.json").unlink()
    eurosat.asked.clear()
    state = prepare("eurosat", tmp_path / "root")
    assert (state.ready, state.fetched) == (True, "the mirror of the split files")
    assert [path for path, _ in eurosat.asked] == ["/split_zhou_EuroSAT.json"]
    assert (tmp_path / "root/EuroSAT/split_zhou_EuroSAT.json").is_file()


def test_an_own_split_needs_no_split_file(eurosat, tmp_path):
    del eurosat.files["/split_zhou_EuroSAT.json"]
    assert prepare("eurosat", tmp_path / "root", own_split=True).ready
    state = prepare("eurosat", tmp_path / "root")
    assert not state.ready
    assert state.missing == f"There is no {tmp_path}/root/eurosat/split_zhou_EuroSAT.json."
    assert "answers 404" in state.tried[0][1]


def test_a_damaged_archive_is_refused_and_the_next_origin_is_tried(eurosat, tmp_path, monkeypatch):
    first = Origin("a broken server", (File(f"{eurosat.url}/EuroSAT.zip", "eurosat", md5="0" * 32),))
    use(monkeypatch, "eurosat", json_sha256="", origins=(first, *module.CATALOGUE["eurosat"].origins))
    state = prepare("eurosat", tmp_path / "root")
    assert state.ready
    assert state.fetched == "our server"
    assert [where for where, _ in state.tried] == ["a broken server"]
    assert "0000 was expected" in state.tried[0][1]


def test_a_split_file_with_another_digest_is_refused(eurosat, tmp_path, monkeypatch):
    eurosat.files["/split_zhou_EuroSAT.json"] += b" "
    state = prepare("eurosat", tmp_path / "root")
    assert not state.ready
    assert "has the sha256" in state.tried[0][1]
    assert not (tmp_path / "root/eurosat/split_zhou_EuroSAT.json").exists()


def test_an_interrupted_download_goes_on(eurosat, tmp_path):
    eurosat.cut = 10
    state = prepare("eurosat", tmp_path / "root")
    assert not state.ready
    assert list((tmp_path / "root").rglob("*.part"))
    eurosat.cut = 0
    eurosat.asked.clear()
    assert prepare("eurosat", tmp_path / "root").ready
    assert all(span for _, span in eurosat.asked)  # every request went on from somewhere
    assert not (tmp_path / "root/.adaptkit-downloads").exists()


def test_from_the_hub(tmp_path, monkeypatch):
    grown = grow(tmp_path / "grown", CATALOGUE["eurosat"])
    asked = []

    def download(repo, file, *, repo_type, local_dir):
        asked.append((repo, file, repo_type))
        path = Path(local_dir) / file
        path.write_bytes(packed(grown, grown))
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(module, "fetch", lambda url, *_, **__: (_ for _ in ()).throw(StorageError(f"{url} is gone.")))
    state = prepare("eurosat", tmp_path / "root")
    assert state.ready
    assert state.fetched == "Hugging Face zhengli97/prompt_learning_dataset"
    assert asked == [("zhengli97/prompt_learning_dataset", "eurosat.zip", "model")]
    assert [where for where, _ in state.tried] == ["the mirror of the split files", "Hugging Face torchgeo/eurosat"]
    assert not (tmp_path / "root/.adaptkit-downloads").exists()


def test_a_hub_that_refuses(tmp_path, monkeypatch):
    def refuse(*words, **more):
        raise OSError("no such repository\nwith more lines")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    use(monkeypatch, "eurosat", origins=(Origin("the hub", (HubFile("a/b", "c.zip"),)),), json="")
    state = prepare("eurosat", tmp_path / "root")
    assert state.tried == [("the hub", "a/b/c.zip can't be fetched from the Hugging Face Hub: no such repository")]


def test_through_torchvision(tmp_path, monkeypatch):
    no_checksums(monkeypatch)
    calls = []

    def download(self):
        calls.append(self.train)
        if not (Path(self.root) / "cifar-10-batches-py").exists():
            grow(Path(self.root).parent, CATALOGUE["cifar10"])

    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", download)
    state = prepare("cifar10", tmp_path)
    assert (state.ready, state.fetched) == (True, "torchvision")
    assert calls == [True, False]
    shutil.rmtree(tmp_path / "cifar10")
    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", lambda self: 1 / 0)
    state = prepare("cifar10", tmp_path)
    assert state.tried == [("torchvision", "torchvision can't fetch CIFAR-10: division by zero")]


@pytest.mark.parametrize("name", [name for name, known in CATALOGUE.items() if not known.origins])
def test_by_hand(name, tmp_path):
    state = prepare(name, tmp_path)
    assert not state.ready
    assert state.steps
    assert state.tree.startswith("DATA_ROOT/")
    assert state.missing.startswith("There is no ")
    assert list(tmp_path.iterdir()) == []
    grow(tmp_path, CATALOGUE[name])
    assert prepare(name, tmp_path).ready


def test_half_extracted_images_are_not_ready(tmp_path):
    grow(tmp_path, CATALOGUE["nabirds"])
    next((tmp_path / "nabirds/images").rglob("*.jpg")).unlink()
    state = prepare("nabirds", tmp_path)
    assert not state.ready
    assert state.missing.endswith(".jpg.")


def test_unknown_and_embedded_names(tmp_path):
    with pytest.raises(UnknownNameError, match="'eurosat'"):
        prepare("eurosta", tmp_path)
    with pytest.raises(UnknownNameError, match="Embedded datasets, folders and CSVs need no preparation"):
        prepare("digits", tmp_path)


def test_a_root_that_cannot_be_written(eurosat, tmp_path):
    (tmp_path / "file").write_text("x")
    state = prepare("eurosat", tmp_path / "file")
    assert not state.ready
    assert all("can't be written" in reason for _, reason in state.tried)


def test_plain_values(tmp_path):
    assert json.loads(json.dumps(prepare("nabirds", tmp_path).to_dict()))["ready"] is False
