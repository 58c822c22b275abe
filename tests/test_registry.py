"""The lazy registry: found without importing, imported once, and plain about what is wrong."""

from __future__ import annotations

import importlib
import sys
import threading

import pytest

from adaptkit import registry as registry_module
from adaptkit.errors import ConfigError, UnknownNameError
from adaptkit.registry import Entry, Registry

SOURCE = '''"""{summary}

More about it.
"""

from tests_zoo import animals

LOADED = []


@animals.register("{name}")
class Animal:
    """An animal."""
'''


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """A package `tests_zoo` with a registry `animals` and two families of files."""
    folder = tmp_path / "tests_zoo"
    files = {
        "__init__.py": "from adaptkit.registry import Registry\nanimals = Registry('animal')\n",
        "cats/__init__.py": "",
        "cats/big_cat.py": SOURCE.format(summary="A cat that is big.", name="big-cat"),
        "cats/_helper.py": "raise RuntimeError('never imported')\n",
        "dogs/__init__.py": "",
        "dogs/dog.py": SOURCE.format(summary="A dog", name="dog"),
        "dogs/silent.py": "raise RuntimeError('only imported when asked for')\n",
        "dogs/forgetful.py": '"""Registers nothing."""\n',
        "dogs/thief.py": SOURCE.format(summary="Takes a name.", name="dog"),
        "dogs/deep/too_deep.py": "",
        "loose.py": "",
        "notes/readme.txt": "",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    animals = importlib.import_module("tests_zoo").animals
    animals.discover("tests_zoo", folder)
    yield animals
    for name in [name for name in sys.modules if name.split(".")[0] == "tests_zoo"]:
        del sys.modules[name]


def test_discovery_reads_names_families_and_summaries_and_imports_nothing(zoo):
    assert list(zoo) == ["big-cat", "dog", "forgetful", "silent", "thief"]
    assert len(zoo) == 5
    assert zoo.entry("big-cat") == Entry("big-cat", "tests_zoo.cats.big_cat", "cats", "A cat that is big")
    assert zoo.entry("dog").summary == "A dog"
    assert zoo.entry("silent").summary == ""
    assert "dog" in zoo
    assert "too-deep" not in zoo
    assert None not in zoo
    assert not [name for name in sys.modules if name.startswith("tests_zoo.")]


def test_get_imports_the_one_module_once(zoo):
    dog = zoo.get("dog")
    assert dog.__module__ == "tests_zoo.dogs.dog"
    assert zoo.get("dog") is dog
    assert [name for name in sys.modules if name.startswith("tests_zoo.")] == ["tests_zoo.dogs", "tests_zoo.dogs.dog"]
    assert zoo.get("big-cat").__module__ == "tests_zoo.cats.big_cat"


def test_unknown_names_get_near_matches_and_the_command_that_lists_all(zoo):
    with pytest.raises(UnknownNameError, match="Unknown animal 'big_cat'") as caught:
        zoo.get("big_cat")
    assert "Did you mean 'big-cat'" in str(caught.value)
    assert "adaptkit list animals" in str(caught.value)
    assert "all 5" in str(caught.value)
    with pytest.raises(UnknownNameError, match="Unknown animal None"):
        zoo.get(None)


def test_a_module_that_registers_nothing_or_another_ones_name_is_refused(zoo):
    with pytest.raises(ConfigError, match=r"tests_zoo\.dogs\.forgetful doesn't register a animal named 'forgetful'"):
        zoo.get("forgetful")
    with pytest.raises(ConfigError, match=r"'dog', which belongs to tests_zoo\.dogs\.dog"):
        zoo.get("thief")
    assert zoo.get("dog").__module__ == "tests_zoo.dogs.dog"  # the thief took nothing


def test_an_error_in_a_module_comes_through_and_is_not_remembered_as_success(zoo):
    for _ in range(2):
        with pytest.raises(RuntimeError, match="only imported when asked for"):
            zoo.get("silent")


@pytest.mark.parametrize("name", ["", "Dog", "dog_cat", "-dog", "dog-", "dog--cat", "dog cat", "dög", "dog\n", "a/b"])
def test_bad_names_are_refused(name):
    animals: Registry[object] = Registry("animal")
    with pytest.raises(ConfigError, match="can't name a animal"):
        animals.add(Entry(name, "somewhere"))
    assert len(animals) == 0


def test_the_same_name_twice_is_refused_and_the_same_entry_again_is_not():
    animals: Registry[object] = Registry("animal")
    animals.add(Entry("dog", "one"))
    animals.add(Entry("dog", "one"))
    with pytest.raises(ConfigError, match="Two animals are named 'dog': one and two"):
        animals.add(Entry("dog", "two"))
    assert animals.entry("dog").module == "one"
    assert len(animals) == 1


def test_objects_register_without_a_file_too():
    animals: Registry[object] = Registry("animal")

    @animals.register("frog")
    class Frog:
        """A frog.

        It jumps.
        """

    assert animals.get("frog") is Frog
    assert animals.entry("frog") == Entry("frog", __name__, "", "A frog.")


class Point:
    """What `importlib.metadata` gives for an entry point."""

    def __init__(self, name, value):
        self.name, self.value = name, value


@pytest.fixture
def outside(monkeypatch):
    asked: list[str] = []
    points: list[Point] = []

    def entry_points(*, group):
        asked.append(group)
        return points

    monkeypatch.setattr(registry_module.importlib.metadata, "entry_points", entry_points)
    return points, asked


def test_other_packages_add_entries_which_are_read_once(outside):
    points, asked = outside
    points.append(Point("lion", "json:JSONDecoder"))
    animals: Registry[object] = Registry("animal", entry_points="zoo.animals")
    animals.add(Entry("dog", "one"))
    assert asked == []  # making the registry asks nobody
    assert list(animals) == ["dog", "lion"]
    assert "lion" in animals
    assert animals.entry("lion") == Entry("lion", "json", "plugin")
    assert asked == ["zoo.animals"]


@pytest.mark.parametrize("bad", [Point("dog", "two"), Point("Bad Name", "two")], ids=["taken name", "bad name"])
def test_a_bad_entry_from_outside_is_refused_every_time(outside, bad):
    points, _ = outside
    points += [Point("lion", "json"), bad, Point("tiger", "json")]
    animals: Registry[object] = Registry("animal", entry_points="zoo.animals")
    animals.add(Entry("dog", "one"))
    for _ in range(2):  # the first call used to fail and the second to pass, without the rest
        with pytest.raises(ConfigError, match="animal"):
            list(animals)
    points.remove(bad)
    assert list(animals) == ["dog", "lion", "tiger"]


def test_a_registry_without_a_group_asks_nobody(outside):
    _, asked = outside
    assert list(Registry("animal")) == []
    assert asked == []


def test_threads_that_ask_at_once_get_one_object(zoo):
    results: list[object] = []
    start = threading.Barrier(8)

    def ask():
        start.wait()
        results.append(zoo.get("big-cat"))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(results) == 8
    assert len(set(map(id, results))) == 1


def test_the_methods_registry_holds_what_the_read_me_names():
    from adaptkit.methods import methods

    expected = {
        "zero-shot": "adapters",
        "linear-probe": "adapters",
        "clip-adapter": "adapters",
        "tip-adapter": "caches",
        "tip-adapter-f": "caches",
        "coop": "prompts",
        "maple": "prompts",
    }
    assert {name: methods.entry(name).family for name in methods}.items() >= expected.items()
    looked_at = 0
    for name in methods:
        assert methods.entry(name).summary
        assert methods.get(name).name == name
        looked_at += 1
    assert looked_at == len(methods) >= 7
