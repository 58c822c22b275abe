"""The project on disk: every change is written, can be undone, and survives a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adaptkit.errors import ConfigError, StorageError, UnknownNameError
from adaptkit.studio import project as project_module
from adaptkit.studio.pictures import take_in, thumbnail_path
from adaptkit.studio.project import LONGEST_NAME, MOST_CHANGES, Project
from adaptkit.studio.state import Picture, Settings
from tests.studio.conftest import png


def picture(number: int, label: str | None = None) -> tuple[str, Picture]:
    key = f"{number:032x}"
    return key, Picture(f"{key}.png", f"{number}.png", 0, label)


@pytest.fixture
def project(tmp_path):
    opened = Project(tmp_path / "birds")
    yield opened
    opened.close()


def reopened(project: Project) -> Project:
    project.close()
    return Project(project.folder)


def test_everything_is_there_again_after_reopening(project):
    oak, beech = project.add_classes(["oak", "beech"])
    a, b = project.add_pictures(dict([picture(1), picture(2)]))
    project.label([a], beech)
    project.set_method("gda")
    before = project.state
    again = reopened(project)
    assert again.state == before
    assert again.version == project.version == 4
    assert list(again.state.images) == [a, b]
    assert again.state.classes == {oak: "oak", beech: "beech"}
    assert again.undo() == "chose gda"
    assert again.state.settings.method == "tip-adapter"
    again.close()


def test_each_change_can_be_undone_and_redone_in_turn(project):
    states = [project.state]
    oak = project.add_class("oak")
    states.append(project.state)
    a, b = project.add_pictures(dict([picture(1), picture(2)]))
    states.append(project.state)
    steps = [
        lambda: project.label([a, b], oak),
        lambda: project.rename_class(oak, "oak tree"),
        lambda: project.label([b], None),
        lambda: project.remove_images([b]),
        lambda: project.set_method("gda"),
        lambda: project.remove_class(oak),
    ]
    for step in steps:
        step()
        states.append(project.state)
    assert project.state.images[a].label is None
    assert project.state.classes == {}
    for earlier in reversed(states[:-1]):
        project.undo()
        assert project.state == earlier
        assert list(project.state.images) == list(earlier.images)
    with pytest.raises(ConfigError, match="nothing to undo"):
        project.undo()
    for later in states[1:]:
        project.redo()
        assert project.state == later
    with pytest.raises(ConfigError, match="nothing to redo"):
        project.redo()
    project.undo()
    project.add_class("new")
    assert project.redoable == ""  # a new change ends what could be done again
    assert reopened(project).undoable == "added 'new'"


def test_parts_of_one_import_are_undone_together(project):
    project.add_class("first")
    (oak,) = project.add_classes(["oak"], group="import-1")
    project.add_pictures(dict([picture(1, oak)]), group="import-1")
    project.add_pictures(dict([picture(2), picture(3)]), group="import-1")
    assert project.undoable == "added 3 images"
    project.undo()
    assert project.state.images == {}
    assert list(project.state.classes.values()) == ["first"]
    project.redo()
    assert [image.label for image in project.state.images.values()] == [oak, None, None]


def test_the_same_image_comes_in_once(project):
    assert len(project.add_pictures(dict([picture(1)]))) == 1
    version = project.version
    assert project.add_pictures(dict([picture(1)])) == []
    assert project.version == version


def test_a_class_id_is_never_given_twice_while_undo_knows_it(project):
    first = project.add_class("oak")
    project.remove_class(first)
    assert project.add_class("beech") != first


@pytest.mark.parametrize(
    "name", ["", "   ", "\t", "x" * (LONGEST_NAME + 1), "a\x00b", "a\x1bb", "OAK", " oak ", "O_ak", "\u202eoak"]
)
def test_names_that_cannot_be_told_apart_are_refused(project, name):
    project.add_class("oak")
    project.add_class("o ak")
    version = project.version
    with pytest.raises(ConfigError):
        project.add_class(name)
    assert project.version == version


def test_a_class_may_keep_its_name_or_change_its_case(project):
    oak = project.add_class("oak")
    project.rename_class(oak, "Oak")
    assert project.state.classes[oak] == "Oak"


def test_unknown_ids_are_refused_and_nothing_changes(project):
    oak = project.add_class("oak")
    (a,) = project.add_pictures(dict([picture(1)]))
    state = project.state
    for wrong in (
        lambda: project.label([a, "f" * 32], oak),
        lambda: project.label([a], "c99"),
        lambda: project.remove_class("c99"),
        lambda: project.rename_class("c99", "x"),
        lambda: project.remove_images(["f" * 32]),
        lambda: project.image_path("../../etc/passwd"),
        lambda: project.add_pictures(dict([picture(2, "c99")])),
    ):
        with pytest.raises(UnknownNameError):
            wrong()
    assert project.state is state


def test_too_many_classes_are_refused(project, monkeypatch):
    monkeypatch.setattr(project_module, "MOST_CLASSES", 3)
    with pytest.raises(ConfigError, match="3 classes already"):
        project.add_classes(["a", "b", "c", "d"])
    assert project.state.classes == {}


def test_only_the_last_changes_are_kept(project, monkeypatch):
    monkeypatch.setattr(project_module, "MOST_CHANGES", 5)
    assert MOST_CHANGES > 5
    for number in range(8):
        project.add_class(f"class {number}")
    for _ in range(5):
        project.undo()
    assert project.undoable == ""
    assert len(project.state.classes) == 3


def test_a_disk_that_refuses_leaves_everything_as_it_was(project, monkeypatch):
    project.add_class("oak")
    state, version = project.state, project.version

    def full(path):
        raise StorageError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(project_module, "atomic_path", full)
        with pytest.raises(StorageError, match="full"):
            project.add_class("beech")
    assert (project.state, project.version) == (state, version)
    again = reopened(project)
    assert again.state == state
    again.close()


def test_a_second_studio_is_refused(project):
    with pytest.raises(StorageError, match="open in another studio"):
        Project(project.folder)


def test_folders_that_hold_other_things_are_left_alone(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(StorageError, match="isn't empty and holds no studio project"):
        Project(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]
    with pytest.raises(StorageError, match="is a file"):
        Project(tmp_path / "holiday.jpg")


def damaged(content: dict, **changes: object) -> str:
    return json.dumps({**content, **changes})


def test_damaged_projects_are_said_so(tmp_path):
    good = Project(tmp_path / "good", Settings(backbone="mini"))
    oak = good.add_class("oak")
    good.add_pictures(dict([picture(1, oak)]))
    good.close()
    file = good.folder / "project.json"
    content = json.loads(file.read_text())
    image = content["images"][f"{1:032x}"]
    cases = [
        "",
        "{",
        "[]",
        "null",
        damaged(content, schema_version=99),
        damaged(content, schema_version="1"),
        damaged(content, images={"x": image}),
        damaged(content, images={f"{1:032x}": {**image, "file": "../../secret.png"}}),
        damaged(content, images={f"{1:032x}": {**image, "label": "c7"}}),
        damaged(content, classes={"../x": "oak"}),
        damaged(content, classes=[]),
        damaged(content, done=[{}]),
        damaged(content, settings={"nonsense": 1}),
        damaged(content, version=None),
    ]
    for text in cases:
        file.write_text(text)
        with pytest.raises(StorageError) as caught:
            Project(good.folder)
        assert str(file) in str(caught.value), text
        assert file.read_text() == text  # never written over
    assert len(cases) == 14


_LABELLER = """
import sys
from adaptkit.studio.project import Project
from adaptkit.studio.state import Picture
project = Project(sys.argv[1])
number = len(project.state.classes)
print("ready", flush=True)
while True:
    number += 1
    project.add_class(f"class {number}")
    print(number, flush=True)
"""


def test_a_kill_at_any_moment_loses_nothing(tmp_path):
    """What was answered (printed) is on disk; what wasn't is there whole or not at all."""
    kills = 0
    for delay in (0.0, 0.03, 0.11):
        running = subprocess.Popen(
            [sys.executable, "-c", _LABELLER, str(tmp_path / "p")], stdout=subprocess.PIPE, text=True, env=os.environ
        )
        assert running.stdout is not None
        assert running.stdout.readline() == "ready\n"
        running.stdout.readline()
        time.sleep(delay)
        running.send_signal(signal.SIGKILL)
        said = [int(line) for line in running.stdout.read().split()]
        running.wait()
        opened = Project(tmp_path / "p")  # the lock went with its holder
        count = len(opened.state.classes)
        assert list(opened.state.classes.values()) == [f"class {n}" for n in range(1, count + 1)]
        assert count >= max(said, default=1)
        opened.close()
        kills += 1
    assert kills == 3


# --- files ------------------------------------------------------------------------------------------------------------


def put(project: Project, number: int) -> str:
    """An image with its two files; returns its id."""
    key, one = picture(number)
    for path in (project.folder / "images" / one.file, thumbnail_path(project.folder, key)):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    project.add_pictures({key: one})
    return key


def files_of(project: Project) -> set[str]:
    found = [path.stem for place in ("images", "thumbnails") for path in (project.folder / place).iterdir()]
    assert all(found.count(name) == 2 for name in found)
    return set(found)


def test_files_go_when_no_undo_can_bring_them_back(project, monkeypatch):
    monkeypatch.setattr(project_module, "MOST_CHANGES", 4)
    stays, goes, returns = (put(project, number) for number in (1, 2, 3))
    project.remove_images([goes, returns])
    again = reopened(project)
    assert files_of(again) == {stays, goes, returns}  # the last change can still be undone
    again.undo()
    assert set(again.state.images) == {stays, goes, returns}
    again.redo()
    for number in range(4):
        again.add_class(f"class {number}")
    assert files_of(again) == {stays, goes, returns}
    again.add_pictures({returns: picture(3)[1]})  # it came in again
    again.close()
    assert files_of(again) == {stays, returns}
    assert (again.folder / "images" / f"{returns}.png").is_file()
    again = Project(again.folder)
    assert set(again.state.images) == {stays, returns}
    again.close()


def test_files_of_what_was_undone_for_good_go_after_a_kill_too(project):
    stays = put(project, 1)
    goes = put(project, 2)
    project.undo()
    project.add_class("oak")  # nothing to redo any more
    project._release()  # as a kill does it
    assert files_of(project) == {stays, goes}
    again = Project(project.folder)
    assert files_of(again) == {stays}
    again.close()


def test_nothing_outside_is_ever_deleted(project, tmp_path):
    put(project, 1)
    project.close()
    file = project.folder / "project.json"
    content = json.loads(file.read_text())
    for name in ("../project.json", f"{1:032x}.png\n", "/etc/passwd", "x.png"):
        file.write_text(damaged(content, gone=[name]))
        with pytest.raises(StorageError, match="damaged"):
            Project(project.folder)
    file.write_text(damaged(content, gone=[f"{1:032x}.png", f"{9:032x}.png"]))  # one is in use, one isn't there
    opened = Project(project.folder)
    assert files_of(opened) == {f"{1:032x}"}
    opened.close()


def test_a_closed_project_takes_no_changes(project):
    project.add_class("oak")
    written = (project.folder / "project.json").read_bytes()
    project.close()
    with pytest.raises(StorageError, match="was closed"):
        project.add_class("beech")
    assert (project.folder / "project.json").read_bytes() == written


# --- kills ------------------------------------------------------------------------------------------------------------


def steps(project: Project):
    """Some work; gives the state after each step."""
    yield project.state
    oak, beech = project.add_classes(["oak", "beech"])
    yield project.state
    taken = dict(take_in(project.folder, png(colour, 0), f"{colour}.png", oak) for colour in ("red", "blue"))
    first, second = project.add_pictures(taken)
    yield project.state
    project.label([first], beech)
    yield project.state
    project.remove_images([second])
    yield project.state
    project.undo()
    yield project.state
    project.undo()
    yield project.state
    project.add_class("pine")  # nothing can be redone any more
    yield project.state
    project.undo()
    project.undo()
    yield project.state
    project.set_method("gda")  # the images can't be had back
    yield project.state
    project.close()


def killed_at(number: int, folder: Path) -> bool:
    """Do the work in a process that dies before the given touch of the disk; False where it came to the end."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    touched = 0

    def die(event: str, words: tuple) -> None:
        nonlocal touched
        if event in ("open", "os.rename", "os.remove", "os.mkdir") and str(folder) in str(words[0]):
            touched += 1
            if touched == number:
                os._exit(9)

    try:
        sys.addaudithook(die)
        for _ in steps(Project(folder)):
            pass
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes can't be copied here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded")
@pytest.mark.parametrize("stride", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_between_any_two_writes_leaves_a_whole_project(tmp_path, stride):
    """The state is one of those before and after a step, all its images are there, and undo works back to nothing."""
    allowed, number, seen = list(steps(Project(tmp_path / "whole"))), 1, set()
    while killed_at(number, tmp_path / str(number)):
        if (tmp_path / str(number)).exists():
            again = Project(tmp_path / str(number))
            assert again.state in allowed, number
            seen.add(allowed.index(again.state))
            while again.undoable:
                assert all(again.image_path(image).is_file() for image in again.state.images), number
                again.undo()
            again.close()
            assert not list(again.folder.rglob(".*.tmp"))
        number += stride
    assert number > 70
    assert len(seen) >= 3
    assert stride > 1 or seen == {allowed.index(state) for state in allowed}
    assert list((tmp_path / "whole" / "images").iterdir()) == []  # deleted when it was closed
