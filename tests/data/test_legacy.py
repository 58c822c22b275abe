"""CoOp's few-shot pickles: converted, compared with drawing again; hostile ones refused without running anything."""

from __future__ import annotations

import json
import os
import pickle
import sys
import types

import pytest

from adaptkit.data.catalogue import CATALOGUE
from adaptkit.data.few_shot import sample_few_shot
from adaptkit.data.legacy import convert_legacy, read_legacy
from adaptkit.data.shot_lists import write_shot_list
from adaptkit.data.sources import load_dataset
from adaptkit.errors import DataError, MissingPathError
from tests.data.trees import grow

MODULE = "dassl.data.datasets.base_dataset"


@pytest.fixture
def datum(monkeypatch):
    """A stand-in for dassl's class, there while a pickle is written."""
    names = MODULE.split(".")
    for end in range(1, len(names) + 1):
        monkeypatch.setitem(sys.modules, ".".join(names[:end]), types.ModuleType(".".join(names[:end])))

    class Datum:
        def __init__(self, impath="", label=0, domain=0, classname=""):
            self._impath, self._label, self._domain, self._classname = impath, label, domain, classname

    Datum.__module__, Datum.__qualname__ = MODULE, "Datum"
    sys.modules[MODULE].Datum = Datum
    return Datum


def save(path, content, protocol=pickle.HIGHEST_PROTOCOL):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    for name in [name for name in sys.modules if name.split(".")[0] == "dassl"]:
        del sys.modules[name]  # as on a machine without dassl
    return path


@pytest.fixture
def dtd(tmp_path):
    return load_dataset("dtd", data_root=grow(tmp_path / "data", CATALOGUE["dtd"], per_class=30), own_split=True)


def as_data(datum, split, indices, prefix):
    return [datum(prefix + split.ids[i], int(split.labels[i]), 0, split.class_names[split.labels[i]]) for i in indices]


def cache(datum, dataset, few, prefix="/home/someone/DATA/dtd/images/"):
    """What CoOp writes."""
    return {
        "train": as_data(datum, dataset.train, few.train_indices, prefix),
        "val": as_data(datum, dataset.val, few.val_indices, prefix),
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("prefix", ["/home/someone/DATA/dtd/images/", "D:\\data\\dtd\\images\\", ""])
def test_a_cache_becomes_a_list(datum, dtd, tmp_path, protocol, prefix):
    few = sample_few_shot(dtd.train, dtd.val, 4, 2)
    held = cache(datum, dtd, few, prefix)
    if "\\" in prefix:
        for item in held["train"] + held["val"]:
            item._impath = item._impath.replace("/", "\\")
    path = save(tmp_path / "dtd/split_fewshot/shot_4-seed_2.pkl", held, protocol)
    content, same = convert_legacy(path, dtd, "dtd")
    assert same is True
    assert (content["shots"], content["seed"], content["origin"]) == (4, 2, "shot_4-seed_2.pkl")
    assert [path for path, _ in content["train"]] == [dtd.train.ids[i] for i in few.train_indices]
    write_shot_list(tmp_path / "list.json", content)
    again = load_dataset(tmp_path / "list.json", data_root=tmp_path / "data")
    assert (again.train.paths_digest, again.val.paths_digest) == (few.train_digest, few.val_digest)
    assert again.notes[-1] == "few-shot list list.json: shot_4-seed_2.pkl"


def test_another_draw_is_said(datum, dtd, tmp_path):
    few = sample_few_shot(dtd.train, dtd.val, 4, 2)
    path = save(tmp_path / "shot_4-seed_1.pkl", cache(datum, dtd, few))
    assert convert_legacy(path, dtd, "dtd").same_as_drawn is False
    assert convert_legacy(path, dtd, "dtd", seed=2).same_as_drawn is True


def test_imagenets_list_of_everything(datum, tmp_path):
    """preprocessed.pkl keeps the order in which one machine listed its files; the draws follow it."""
    root = grow(tmp_path / "data", CATALOGUE["imagenet"], per_class=8)
    dataset = load_dataset("imagenet", data_root=root)
    order = list(range(len(dataset.train)))[::-1]
    held = {
        "train": as_data(datum, dataset.train, order, "/mnt/imagenet/images/"),
        "test": as_data(datum, dataset.test, range(len(dataset.test)), "/mnt/imagenet/images/"),
    }
    content, same = convert_legacy(save(tmp_path / "preprocessed.pkl", held), dataset, "imagenet")
    assert same is None
    assert content["shots"] == 0
    write_shot_list(tmp_path / "all.json", content)
    again = load_dataset(tmp_path / "all.json", data_root=root)
    assert again.train.ids == dataset.train.ids[::-1]
    assert sample_few_shot(again.train, None, 2, 1).digest != sample_few_shot(dataset.train, None, 2, 1).digest


def test_images_of_another_dataset(datum, dtd, tmp_path):
    test_image = f"/x/{dtd.test.ids[0]}"  # no image of the split it is listed in
    path = save(tmp_path / "shot_1-seed_1.pkl", {"train": [datum("/x/other/1.jpg", 0), datum(test_image, 0)]})
    with pytest.raises(DataError, match=rf"lacks 2 listed images \(/x/other/1\.jpg, {test_image}\)"):
        convert_legacy(path, dtd, "dtd")


def test_labels_of_another_split(datum, dtd, tmp_path):
    path = save(tmp_path / "shot_1-seed_1.pkl", {"train": [datum(f"/x/{dtd.train.ids[0]}", 1)]})
    with pytest.raises(DataError, match="another class than dtd does"):
        convert_legacy(path, dtd, "dtd")


# --- hostile and damaged -------------------------------------------------------------------------------------------


class Runs:
    """Runs a command when it is unpickled."""

    def __init__(self, function, *words):
        self.call = (function, words)

    def __reduce__(self):
        return self.call


def opcodes(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


HOSTILE = {
    "runs a command": pickle.dumps({"train": [Runs(os.system, "touch /tmp/adaptkit-ran")]}),
    "evaluates": pickle.dumps(Runs(eval, "open('/tmp/adaptkit-ran', 'w')")),
    "old opcodes": b"cos\nsystem\n(S'touch /tmp/adaptkit-ran'\ntR.",
    "makes an instance": b"(S'touch /tmp/adaptkit-ran'\nios\nsystem\n.",
    "new object of another class": opcodes(b"csubprocess\nPopen\n", b")", b"\x81"),
    "names another class alone": opcodes(b"cbuiltins\neval\n"),
    "dotted name": opcodes(b"cdassl.data.datasets.base_dataset\nDatum.__init__.__globals__\n"),
    "same class elsewhere": opcodes(b"cevil\nDatum\n"),
    "persistent id": b"Pevil\n.",
    "extension": opcodes(b"\x82\x01"),
    "calls the class": opcodes(b"cdassl.data.datasets.base_dataset\nDatum\n", b"(tR"),
    "huge memo": opcodes(b"}", b"r\xff\xff\xff\x7f"),
    "huge bytes": opcodes(b"\x96\xff\xff\xff\xff\xff\xff\xff\x7f"),
    "huge text": opcodes(b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f"),
    "huge frame": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f}.",
    "numpy array": opcodes(b"cnumpy.core.multiarray\n_reconstruct\n"),
    "empty": b"",
    "text": b"hello",
    "cut off": pickle.dumps({"train": ["x"] * 100})[:50],
    "nothing on the stack": b"\x80\x04.",
    "no dict": pickle.dumps([1, 2]),
    "no train": pickle.dumps({"test": []}),
    "other keys": pickle.dumps({"train": [], "extra": []}),
    "texts for images": pickle.dumps({"train": ["a", "b"]}),
    "a dict for a list": pickle.dumps({"train": {}}),
    "loop": pickle.dumps({"train": (lambda x: (x.append(x), x)[1])([])}),
    "class for an image": opcodes(b"}", b"X\x05\x00\x00\x00train]cdassl.data.datasets.base_dataset\nDatum\nas"),
    "state that is no dict": opcodes(b"cdassl.data.datasets.base_dataset\nDatum\n)\x81K\x01b"),
    "state of the class itself": opcodes(b"cdassl.data.datasets.base_dataset\nDatum\n}X\x01\x00\x00\x00aK\x01sb"),
}


@pytest.mark.parametrize("kind", sorted(HOSTILE))
def test_hostile_pickles(kind, tmp_path):
    path = tmp_path / "shot_1-seed_1.pkl"
    path.write_bytes(HOSTILE[kind])
    with pytest.raises(DataError):
        read_legacy(path)
    assert not os.path.exists("/tmp/adaptkit-ran")


def test_one_hostile_class_spoils_a_good_file(datum, dtd, tmp_path):
    held = cache(datum, dtd, sample_few_shot(dtd.train, dtd.val, 1, 1))
    held["train"].append(Runs(os.system, "touch /tmp/adaptkit-ran"))
    path = save(tmp_path / "shot_1-seed_1.pkl", held)
    with pytest.raises(DataError, match="pickle opcode REDUCE, which is refused"):
        convert_legacy(path, dtd, "dtd")
    assert not os.path.exists("/tmp/adaptkit-ran")


def test_damaged_entries_are_all_counted(datum, tmp_path):
    held = {"train": [datum(3, 0), datum("a", "b"), datum("", 1), datum("a", True), datum("a", 1)], "val": 3}
    with pytest.raises(DataError, match=r"5 problems: train\[0\] isn't an image"):
        read_legacy(save(tmp_path / "x.pkl", held))


def test_a_missing_and_a_large_file(tmp_path, monkeypatch):
    with pytest.raises(MissingPathError):
        read_legacy(tmp_path / "none.pkl")
    monkeypatch.setattr("adaptkit.data.legacy._MAX_BYTES", 3)
    (tmp_path / "x.pkl").write_bytes(b"four")
    with pytest.raises(DataError, match="too large"):
        read_legacy(tmp_path / "x.pkl")


def test_list_is_plain_json(datum, dtd, tmp_path):
    path = save(tmp_path / "shot_1-seed_1.pkl", cache(datum, dtd, sample_few_shot(dtd.train, dtd.val, 1, 1)))
    content = convert_legacy(path, dtd, "dtd").content
    assert json.loads(json.dumps(content)) == content
