"""The feature store: what is encoded, what is found again, and what happens to files that aren't as they should be."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from adaptkit.backbones.base import Preprocessing
from adaptkit.backbones.dual_encoder import DualEncoder
from adaptkit.data import features as module
from adaptkit.data.features import FeatureStore, LazyInputs, ViewSettings, feature_inputs_fresh, pixels_inputs
from adaptkit.data.splits import ArraySource, FileSource, TestSplit, TorchSource, TrainSplit
from adaptkit.data.transforms import to_pixels
from adaptkit.errors import AdaptKitWarning, BackboneError, ConfigError, DataError, StorageError
from adaptkit.types import TensorInputs
from tests.methods.tiny import DIM, SIZE, image_only, tiny_clip

COUNT = 12


class Counting(DualEncoder):
    """The tiny CLIP, counting the images that go through its image tower."""

    def __init__(self, **changes: Any) -> None:
        plain = tiny_clip()
        super().__init__(replace(plain.spec, **changes), plain.image, plain.text, logit_scale=20.0)
        self.seen = 0

    def encode_image(self, pixels: Tensor) -> Tensor:
        self.seen += len(pixels)
        return super().encode_image(pixels)


def arrays(count: int = COUNT, seed: int = 0, size: int = 20) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (count, size, size + 4, 3), dtype=np.uint8)


def split_of(source: ArraySource | FileSource | TorchSource, count: int = COUNT, kind: type = TrainSplit) -> Any:
    ids = source.names if isinstance(source, FileSource) else tuple(f"image-{i}" for i in range(count))
    return kind(ids, np.arange(count) % 3, ("a", "b", "c"), source, np.arange(count))


@pytest.fixture
def split() -> TrainSplit:
    return split_of(ArraySource(arrays()))


@pytest.fixture
def files(tmp_path: Path) -> TrainSplit:
    names = tuple(f"class/{i}.png" for i in range(COUNT))
    (tmp_path / "images/class").mkdir(parents=True)
    for name, array in zip(names, arrays(), strict=True):
        Image.fromarray(array).save(tmp_path / "images" / name)
    return split_of(FileSource(tmp_path / "images", names))


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return FeatureStore(tmp_path / "store")


@pytest.fixture(autouse=True)
def warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", AdaptKitWarning)
        yield


def directly(backbone: DualEncoder, split: Any) -> Tensor:
    with torch.no_grad():
        return backbone.encode_image(
            torch.stack([to_pixels(i, backbone.spec.preprocessing) for i in split.images(range(len(split)))])
        )


# --- what comes out -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 5, 64])
@pytest.mark.parametrize("workers", [1, 3])
def test_features_are_the_backbones_own_in_the_splits_order(
    store: FeatureStore, split: TrainSplit, batch_size: int, workers: int
) -> None:
    backbone = Counting()
    order = [7, 0, 11, 3, 3, 5]
    shuffled = split.subset(order)
    found = store.features(backbone, shuffled, batch_size=batch_size, workers=workers)
    torch.testing.assert_close(found, directly(tiny_clip(), shuffled), atol=1e-6, rtol=1e-6)
    assert found.dtype == torch.float32
    assert found.shape == (6, DIM)
    assert backbone.seen == store.encoded == 5  # image 3 is there twice
    assert torch.equal(store.features(backbone, split)[order], found)


def test_features_from_files_equal_those_from_the_same_arrays(
    store: FeatureStore, split: TrainSplit, files: TrainSplit
) -> None:
    assert torch.equal(store.features(Counting(), split), store.features(Counting(), files))
    assert store.encoded == 2 * COUNT  # different pools


def test_features_can_take_part_in_training(store: FeatureStore, split: TrainSplit) -> None:
    for _ in range(2):  # encoded, then read
        found = store.features(Counting(), split)
        assert not found.is_inference()
        weight = torch.zeros(DIM, requires_grad=True)
        (found @ weight).sum().backward()
        torch.testing.assert_close(weight.grad, found.sum(dim=0))
        found += 1  # the caller's own: what is stored doesn't change
    assert store.encoded == COUNT
    torch.testing.assert_close(store.features(Counting(), split), directly(tiny_clip(), split), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_encoded_batches_are_ordinary_tensors(precision: str) -> None:
    made = module._encode(Counting(), torch.zeros(2, 3, SIZE, SIZE), precision)
    assert not made.is_inference()
    assert made.device.type == "cpu"


def test_inputs_hold_the_plain_view_first_then_the_others(store: FeatureStore, split: TrainSplit) -> None:
    inputs = store.inputs(Counting(), split, views=2)
    assert isinstance(inputs, TensorInputs)
    assert inputs.values.shape == (3, COUNT, DIM)
    assert inputs.num_views == 3
    assert inputs.labels.tolist() == split.labels.tolist()
    for view in range(3):
        assert torch.equal(inputs.values[view], store.features(Counting(), split, view=view))
    assert store.encoded == 3 * COUNT
    gaps = [float((inputs.values[a] - inputs.values[b]).abs().amax(dim=1).min()) for a, b in ((0, 1), (0, 2), (1, 2))]
    assert min(gaps) > 1e-3


def test_an_empty_split_has_no_features(store: FeatureStore, split: TrainSplit) -> None:
    assert store.features(Counting(), split.subset([])).shape == (0, DIM)
    assert store.inputs(Counting(), split.subset([]), views=1).values.shape == (2, 0, DIM)
    assert not store.root.exists()


def test_backbones_without_text_are_served(store: FeatureStore, split: TrainSplit) -> None:
    assert store.features(image_only(), split).shape == (COUNT, DIM)


def test_progress_is_told_after_each_batch(store: FeatureStore, split: TrainSplit) -> None:
    told: list[tuple[str, int, int]] = []
    store.features(Counting(), split.subset(range(4)))
    store.features(Counting(), split, batch_size=3, progress=lambda *news: told.append(news))
    assert [(done, total) for _, done, total in told] == [(3, 8), (6, 8), (8, 8)]
    assert {what for what, _, _ in told} == {"encoding train images with tiny"}


def test_bf16_is_close_to_fp32_and_stored_apart(store: FeatureStore, split: TrainSplit) -> None:
    exact = store.features(Counting(), split)
    rough = store.features(Counting(), split, precision="bf16")
    assert rough.dtype == torch.float32
    assert store.encoded == 2 * COUNT
    assert not torch.equal(exact, rough)
    assert float(torch.cosine_similarity(exact, rough).min()) > 0.999
    assert torch.equal(store.features(Counting(), split, precision="bf16"), rough)
    assert torch.equal(store.features(Counting(), split), exact)
    assert store.encoded == 2 * COUNT


def test_a_callers_autocast_does_not_reach_what_is_stored_as_fp32(store: FeatureStore, split: TrainSplit) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = store.features(Counting(), split)
    torch.testing.assert_close(found, directly(tiny_clip(), split), atol=1e-6, rtol=1e-6)


# --- what is encoded ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["split", "files"])
def test_a_second_run_encodes_nothing(store: FeatureStore, kind: str, request: pytest.FixtureRequest) -> None:
    images = request.getfixturevalue(kind)
    first = store.inputs(Counting(), images, views=2)
    backbone, later = Counting(), FeatureStore(store.root)
    again = later.inputs(backbone, images, views=2)
    assert torch.equal(first.values, again.values)
    assert (store.encoded, later.encoded, backbone.seen) == (3 * COUNT, 0, 0)


@pytest.mark.parametrize("view", [0, 1])
def test_a_subset_needs_nothing_and_a_superset_only_what_is_missing(
    store: FeatureStore, split: TrainSplit, view: int
) -> None:
    backbone = Counting()
    some = store.features(backbone, split.subset([1, 4, 6]), view=view)
    assert backbone.seen == 3
    everything = store.features(backbone, split, view=view)
    assert backbone.seen == COUNT
    assert torch.equal(everything[[1, 4, 6]], some)
    assert torch.equal(store.features(backbone, split.subset([6, 0]), view=view), everything[[6, 0]])
    assert backbone.seen == store.encoded == COUNT


def test_splits_of_one_pool_share_their_features(store: FeatureStore) -> None:
    source = ArraySource(arrays())
    store.features(Counting(), split_of(source, kind=TrainSplit))
    store.features(Counting(), split_of(source, kind=TestSplit))
    assert store.encoded == COUNT
    assert len(store.entries()) == 1


@pytest.mark.parametrize(
    "settings",
    [ViewSettings(seed=1), ViewSettings(crop_scale=0.5), ViewSettings(flip=False), ViewSettings(colour_jitter=0.4)],
    ids=["seed", "crop_scale", "flip", "colour_jitter"],
)
def test_other_view_settings_encode_again_but_not_the_plain_view(
    store: FeatureStore, split: TrainSplit, settings: ViewSettings
) -> None:
    first = store.inputs(Counting(), split, views=1)
    second = store.inputs(Counting(), split, views=1, settings=settings)
    assert store.encoded == 3 * COUNT
    assert torch.equal(first.values[0], second.values[0])
    assert not torch.equal(first.values[1], second.values[1])


@pytest.mark.parametrize(
    "changes",
    [{"digest": "f" * 64}, {"preprocessing": Preprocessing(SIZE, resize="squash")}],
    ids=["digest", "preprocessing"],
)
def test_another_backbone_encodes_again(store: FeatureStore, split: TrainSplit, changes: dict[str, Any]) -> None:
    store.features(Counting(), split)
    other = Counting(**changes)
    torch.testing.assert_close(store.features(other, split), directly(other, split), atol=1e-6, rtol=1e-6)
    assert store.encoded == 2 * COUNT


def test_a_changed_file_is_encoded_again(store: FeatureStore, files: TrainSplit) -> None:
    before = store.features(Counting(), files)
    path = files.path(3)
    assert path is not None
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    os.utime(path, ns=(1, 1))
    after = store.features(Counting(), files)
    assert store.encoded == COUNT + 1
    same = (before == after).all(dim=1).tolist()
    assert same == [index != 3 for index in range(COUNT)]


def test_views_are_deterministic_and_depend_on_the_images_id_alone(
    tmp_path: Path, split: TrainSplit, files: TrainSplit
) -> None:
    one, two = FeatureStore(tmp_path / "one"), FeatureStore(tmp_path / "two")
    turned = split.subset(range(COUNT - 1, -1, -1))
    first = one.features(Counting(), split, view=2, batch_size=5)
    second = two.features(Counting(), turned, view=2, batch_size=5, workers=3)
    torch.testing.assert_close(first, second.flip(0), atol=1e-6, rtol=1e-6)
    named = replace(files, ids=split.ids)  # the same images on another machine
    torch.testing.assert_close(two.features(Counting(), named, view=2), first, atol=1e-6, rtol=1e-6)
    renamed = replace(split, ids=tuple(f"other-{name}" for name in split.ids))
    assert float((one.features(Counting(), renamed, view=2) - first).abs().max()) > 1e-3
    assert one.encoded == 2 * COUNT


def test_torch_datasets_are_served_by_one_thread(store: FeatureStore) -> None:
    threads: set[int] = set()

    class Items:
        def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
            if threading.current_thread() is not threading.main_thread():
                threads.add(threading.get_ident())
            return arrays()[index], 0

    images = split_of(TorchSource(Items(), "items"))
    found = store.features(Counting(), images, batch_size=2, workers=4)
    torch.testing.assert_close(found, directly(tiny_clip(), split_of(ArraySource(arrays()))), atol=1e-6, rtol=1e-6)
    assert len(threads) == 1


# --- several at once ----------------------------------------------------------------------------------------------


def test_threads_that_ask_at_once_encode_once(store: FeatureStore, split: TrainSplit) -> None:
    expected = directly(tiny_clip(), split)
    stores = [store, store, FeatureStore(store.root), FeatureStore(store.root)]
    answers: list[Tensor] = []
    start = threading.Barrier(len(stores))

    def ask(asked: FeatureStore) -> None:
        start.wait()
        answers.append(asked.features(Counting(), split, batch_size=4))

    threads = [threading.Thread(target=ask, args=(asked,)) for asked in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(answers) == 4
    for answer in answers:
        torch.testing.assert_close(answer, expected, atol=1e-6, rtol=1e-6)
    assert sum(asked.encoded for asked in stores[1:]) == COUNT


def _other_process(root: str, asking: Any, answers: Any) -> None:
    store = FeatureStore(root)
    asking.set()
    found = store.features(Counting(), split_of(ArraySource(arrays())), batch_size=2)
    answers.put((store.encoded, found.tolist()))


def test_a_second_process_waits_and_makes_only_what_is_missing(store: FeatureStore, split: TrainSplit) -> None:
    context = multiprocessing.get_context("spawn")
    asking, answers = context.Event(), context.Queue()
    process = context.Process(target=_other_process, args=(str(store.root), asking, answers))

    def hold(_what: str, done: int, _total: int) -> None:
        if done == 2:
            process.start()
            assert asking.wait(120)
            time.sleep(0.3)  # the other one meets the lock

    mine = store.features(Counting(), split.subset(range(5)), batch_size=2, progress=hold)
    process.join(120)
    assert process.exitcode == 0
    encoded, theirs = answers.get(timeout=10)
    assert (store.encoded, encoded) == (5, COUNT - 5)
    assert torch.equal(torch.tensor(theirs)[:5], mine)


# --- files that aren't as they should be --------------------------------------------------------------------------


def shards(store: FeatureStore) -> list[Path]:
    return sorted(store.root.glob("*/*.safetensors"))


def _flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-200] ^= 1
    path.write_bytes(content)


def _swap_tensors(path: Path) -> None:
    module.write_safetensors(path, {"weights": torch.zeros(2, 3)})


def _other_width(path: Path) -> None:
    module.write_safetensors(path, {"features": torch.zeros(2, 3), "keys": torch.zeros(2, 32, dtype=torch.uint8)})


@pytest.mark.parametrize(
    "damage",
    [
        _flip_a_byte,
        lambda path: path.write_bytes(path.read_bytes()[:-7]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"no tensors at all"),
        _swap_tensors,
        _other_width,
    ],
    ids=["flipped", "cut", "empty", "text", "others", "width"],
)
def test_a_damaged_shard_is_dropped_and_made_again(store: FeatureStore, split: TrainSplit, damage: Any) -> None:
    first = store.features(Counting(), split.subset(range(8)))
    (damaged,) = shards(store)
    store.features(Counting(), split)
    assert len(shards(store)) == 2
    damage(damaged)
    with pytest.warns(AdaptKitWarning, match="damaged"):
        again = store.features(Counting(), split)  # the same object: it has verified the shard before
    torch.testing.assert_close(again[:8], first, atol=1e-6, rtol=1e-6)
    assert store.encoded == COUNT + 8
    later = FeatureStore(store.root)
    assert torch.equal(later.features(Counting(), split), again)
    assert later.encoded == 0


def test_a_shard_that_disappears_is_made_again(store: FeatureStore, split: TrainSplit) -> None:
    first = store.features(Counting(), split)
    for path in shards(store):
        path.unlink()
    assert torch.equal(store.features(Counting(), split), first)
    assert store.encoded == 2 * COUNT


def test_a_shard_that_the_system_cannot_read_now_is_kept(
    store: FeatureStore, split: TrainSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(path: Path, **_: Any) -> Any:
        raise StorageError(f"{path} can't be read: too many open files.") from OSError(24, "Too many open files")

    first = store.features(Counting(), split)
    with monkeypatch.context() as broken:
        broken.setattr(module, "read_safetensors", exhausted)
        with pytest.warns(AdaptKitWarning, match="can't be read"):
            store.features(Counting(), split)
    later = FeatureStore(store.root)
    assert torch.equal(later.features(Counting(), split), first)
    assert later.encoded == 0


def test_a_shard_that_is_cleared_while_it_is_read_is_made_again_without_a_word(
    store: FeatureStore, split: TrainSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = module.read_safetensors

    def cleared(path: Path, **given: Any) -> Any:
        found = read(path, **given)
        path.unlink()
        return found

    first = store.features(Counting(), split)
    monkeypatch.setattr(module, "read_safetensors", cleared)
    assert torch.equal(store.features(Counting(), split), first)
    assert store.encoded == 2 * COUNT


def test_a_damaged_description_costs_nothing(store: FeatureStore, split: TrainSplit) -> None:
    store.features(Counting(), split)
    next(store.root.glob("*/meta.json")).write_text("{")
    store.features(Counting(), split)
    assert store.encoded == COUNT
    (entry,) = store.entries()
    assert (entry.backbone, entry.images) == ("", COUNT)
    assert store.clear() > 0
    assert store.entries() == []


def test_a_folder_that_cannot_be_written_costs_one_warning(tmp_path: Path, split: TrainSplit) -> None:
    (tmp_path / "file").write_text("")
    store = FeatureStore(tmp_path / "file/store")  # not even root may make folders in a file
    with pytest.warns(AdaptKitWarning, match="can't be stored") as told:
        found = store.inputs(Counting(), split, views=1).values
    assert len(told) == 1
    assert "ADAPTKIT_CACHE" in str(told[0].message)
    torch.testing.assert_close(found[0], directly(tiny_clip(), split), atol=1e-6, rtol=1e-6)
    assert store.encoded == 2 * COUNT
    assert store.entries() == []
    assert store.clear() == store.trim() == 0


def test_a_full_disk_costs_one_warning(store: FeatureStore, split: TrainSplit, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_safetensors", full)
    with pytest.warns(AdaptKitWarning, match="No space left") as told:
        found = store.features(Counting(), split)
    assert len(told) == 1
    assert torch.equal(store.features(Counting(), split), found)  # and no second warning
    torch.testing.assert_close(found, directly(tiny_clip(), split), atol=1e-6, rtol=1e-6)
    assert store.encoded == 2 * COUNT


def test_a_store_that_may_only_be_read_is_read(
    store: FeatureStore, split: TrainSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = store.features(Counting(), split.subset(range(8)))

    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module, "file_lock", refused)
    monkeypatch.setattr(module, "write_safetensors", refused)
    monkeypatch.setattr(os, "utime", refused)
    later = FeatureStore(store.root)
    assert torch.equal(later.features(Counting(), split.subset(range(8))), first)
    with pytest.warns(AdaptKitWarning, match="Permission denied"):
        assert torch.equal(later.features(Counting(), split)[:8], first)
    assert later.encoded == COUNT - 8


def test_an_unreadable_image_is_named_and_what_was_encoded_before_is_kept(
    store: FeatureStore, files: TrainSplit
) -> None:
    path = files.path(9)
    assert path is not None
    whole = path.read_bytes()
    path.write_bytes(whole[:40])
    with pytest.raises(DataError, match=r"class/9\.png"):
        store.features(Counting(), files, batch_size=2)
    assert store.encoded == 8
    path.write_bytes(whole)
    store.features(Counting(), files, batch_size=2)
    assert store.encoded == COUNT
    path.unlink()
    with pytest.raises(DataError, match=r"class/9\.png"):
        store.features(Counting(), files)


def test_an_interruption_keeps_what_was_encoded(store: FeatureStore, split: TrainSplit) -> None:
    def interrupt(_what: str, done: int, _total: int) -> None:
        if done >= 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.features(Counting(), split, batch_size=3, progress=interrupt)
    later = FeatureStore(store.root)
    later.features(Counting(), split)
    assert (store.encoded, later.encoded) == (6, COUNT - 6)


def test_long_extractions_are_stored_in_pieces(
    store: FeatureStore, split: TrainSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHARD_ROWS", 5)
    found = store.features(Counting(), split, batch_size=3)
    assert len(shards(store)) == 2
    assert torch.equal(FeatureStore(store.root).features(Counting(), split), found)


def test_features_that_are_not_finite_are_refused_and_not_stored(store: FeatureStore, split: TrainSplit) -> None:
    class Broken(Counting):
        def encode_image(self, pixels: Tensor) -> Tensor:
            return super().encode_image(pixels) / 0

    class Narrow(Counting):
        def encode_image(self, pixels: Tensor) -> Tensor:
            return super().encode_image(pixels)[:, :3]

    with pytest.raises(BackboneError, match="finite"):
        store.features(Broken(), split)
    with pytest.raises(BackboneError, match=r"\[12, 3\]"):
        store.features(Narrow(), split)
    assert shards(store) == []


# --- what is stored -----------------------------------------------------------------------------------------------


def test_entries_say_what_is_stored_and_clear_deletes_it(store: FeatureStore, split: TrainSplit) -> None:
    other = Counting(name="other", digest="e" * 64)
    store.inputs(Counting(), split, views=1, settings=ViewSettings(seed=5))
    store.features(other, split.subset(range(4)), precision="bf16")
    entries = store.entries()
    assert len(entries) == 3
    newest = entries[0]
    assert (newest.backbone, newest.digest, newest.precision, newest.images) == ("other", "e" * 64, "bf16", 4)
    assert newest.pool == split.source.pool
    assert sorted(entry.view["number"] for entry in entries) == [0, 0, 1]
    drawn = next(entry for entry in entries if entry.view["number"] == 1)
    assert drawn.view == {"number": 1, "crop_scale": 0.08, "flip": True, "seed": 5}
    assert all(entry.bytes >= entry.images * 32 for entry in entries)
    assert all(entry.folder == store.root / entry.key for entry in entries)

    assert store.clear("nothing of this name") == 0
    assert store.clear("other") == newest.bytes
    assert [entry.backbone for entry in store.entries()] == ["tiny", "tiny"]
    assert store.clear("0" * 64) == sum(entry.bytes for entry in entries[1:])
    assert store.entries() == []
    assert list(store.root.iterdir()) == []
    store.features(Counting(), split)
    assert store.encoded == 3 * COUNT + 4


def test_clear_leaves_what_is_not_the_stores(store: FeatureStore, split: TrainSplit) -> None:
    store.features(Counting(), split)
    (store.root / "thesis").mkdir()
    mine = [store.root / "thesis/meta.json", store.root / "notes.txt", store.entries()[0].folder / "mine.txt"]
    for path in mine:
        path.write_text("precious")
    store.clear()
    assert [path.read_text() for path in mine] == ["precious"] * 3
    assert shards(store) == []


def test_trim_deletes_the_least_recently_used(store: FeatureStore, split: TrainSplit) -> None:
    for view in range(3):
        store.features(Counting(), split, view=view)
    for view, entry in enumerate(sorted(store.entries(), key=lambda entry: entry.view["number"])):
        for path in entry.folder.iterdir():
            os.utime(path, (1000 + view, 1000 + view))
    store.features(Counting(), split, view=0)  # now the most recent
    assert [entry.view["number"] for entry in store.entries()] == [0, 2, 1]
    size = sum(entry.bytes for entry in store.entries())
    store.max_bytes = size
    assert store.trim() == 0
    store.max_bytes = size - 1
    assert 0 < store.trim() < size
    assert [entry.view["number"] for entry in store.entries()] == [0, 2]
    store.max_bytes = 0
    store.trim()
    assert store.entries() == []


def test_storing_more_trims_what_is_older_but_not_what_was_just_asked_for(tmp_path: Path, split: TrainSplit) -> None:
    store = FeatureStore(tmp_path, max_bytes=1)
    store.features(Counting(), split)
    store.features(Counting(), split)
    assert store.encoded == COUNT
    store.features(Counting(), split, view=1)
    assert [entry.view["number"] for entry in store.entries()] == [1]


def test_the_default_root_is_in_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTKIT_CACHE", str(tmp_path))
    assert FeatureStore().root == tmp_path / "features"


# --- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"view": -1}, "view"),
        ({"view": 1.5}, "view"),
        ({"batch_size": 0}, "batch_size"),
        ({"workers": 0}, "workers"),
        ({"precision": "fp16"}, "bf16"),
    ],
)
def test_settings_out_of_range_are_refused(
    store: FeatureStore, split: TrainSplit, given: dict[str, Any], word: str
) -> None:
    with pytest.raises(ConfigError, match=word):
        store.features(Counting(), split, **given)


@pytest.mark.parametrize(
    "given", [{"crop_scale": 0}, {"crop_scale": 1.5}, {"crop_scale": "a"}, {"seed": 0.5}, {"colour_jitter": 2}]
)
def test_view_settings_out_of_range_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ViewSettings(**given)


def test_a_store_of_negative_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_bytes"):
        FeatureStore(tmp_path, max_bytes=-1)


def test_numpy_numbers_are_numbers(store: FeatureStore, split: TrainSplit) -> None:
    given = ViewSettings(np.float64(0.5), np.bool_(True), np.int64(3))  # type: ignore[arg-type]
    store.features(Counting(), split, view=np.int64(1), settings=given)  # type: ignore[arg-type]
    store.features(Counting(), split, view=1, settings=ViewSettings(0.5, True, 3))
    assert store.encoded == COUNT


# --- inputs that aren't stored ------------------------------------------------------------------------------------


def test_pixels_are_the_transforms_own(split: TrainSplit) -> None:
    backbone = tiny_clip()
    inputs = pixels_inputs(backbone, split, views=2, batch_size=5)
    assert isinstance(inputs, TensorInputs)
    assert inputs.values.shape == (3, COUNT, 3, SIZE, SIZE)
    assert inputs.labels.tolist() == split.labels.tolist()
    plain = torch.stack([to_pixels(image, backbone.spec.preprocessing) for image in split.images(range(COUNT))])
    assert torch.equal(inputs.values[0], plain)
    assert all(not torch.equal(inputs.values[a], inputs.values[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("how", [{"max_bytes": 1}, {"fresh": True}])
def test_lazy_pixels_equal_those_in_memory(split: TrainSplit, how: dict[str, Any]) -> None:
    backbone = tiny_clip()
    held = pixels_inputs(backbone, split, views=2)
    lazy = pixels_inputs(backbone, split, views=2, **how)
    assert isinstance(lazy, LazyInputs)
    assert lazy.num_views == 3
    assert torch.equal(lazy.labels, held.labels)
    for indices in ([4, 0, 9, 4], [2], [], list(range(COUNT))):
        for view in range(3):
            chosen = torch.tensor(indices, dtype=torch.int64)
            assert torch.equal(lazy.select(chosen, view), held.select(chosen, view))
    assert torch.equal(lazy.select(held.labels == 1), held.select(held.labels == 1))


def test_pixels_progress_counts_image_views(split: TrainSplit) -> None:
    told: list[tuple[str, int, int]] = []
    pixels_inputs(tiny_clip(), split, views=1, batch_size=8, progress=lambda *news: told.append(news))
    assert told == [("reading train images", done, 24) for done in (8, 12, 20, 24)]


def test_stored_views_are_those_of_the_pixels(store: FeatureStore, split: TrainSplit) -> None:
    backbone, settings = tiny_clip(), ViewSettings(0.3, seed=4)
    pixels = pixels_inputs(backbone, split, views=2, settings=settings)
    with torch.no_grad():
        encoded = torch.stack([backbone.encode_image(pixels.select(torch.arange(COUNT), view)) for view in range(3)])
    stored = store.inputs(backbone, split, views=2, settings=settings)
    torch.testing.assert_close(stored.values, encoded, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("batch_size", [4, 64])
def test_fresh_features_are_new_in_every_epoch_and_the_same_in_every_run(
    store: FeatureStore, split: TrainSplit, batch_size: int
) -> None:
    backbone = Counting()
    fresh = feature_inputs_fresh(backbone, split, views=1, batch_size=batch_size)
    assert backbone.seen == 0
    assert fresh.num_views == 2
    chosen = torch.tensor([3, 8, 1, 0, 11])
    epochs = [fresh.select(chosen, epoch + 1) for epoch in range(3)]
    assert backbone.seen == 15
    for epoch, found in enumerate(epochs):
        stored = store.features(tiny_clip(), split, view=epoch + 1)[chosen]
        torch.testing.assert_close(found, stored, atol=1e-6, rtol=1e-6)
        assert not found.is_inference()
    assert float((epochs[0] - epochs[1]).abs().max()) > 1e-3
    torch.testing.assert_close(fresh.select(chosen), directly(tiny_clip(), split)[chosen], atol=1e-6, rtol=1e-6)
    assert fresh.select(torch.tensor([], dtype=torch.int64)).shape == (0, DIM)


def test_inputs_refuse_settings_out_of_range(split: TrainSplit) -> None:
    makers: Sequence[Any] = (pixels_inputs, feature_inputs_fresh)
    for make in makers:
        with pytest.raises(ConfigError, match="views"):
            make(tiny_clip(), split, views=-1)
        with pytest.raises(ConfigError, match="workers"):
            make(tiny_clip(), split, workers=0)
    assert len(makers) == 2
