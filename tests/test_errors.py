"""The errors' kinds, their messages, and that they survive the way between processes."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest

from adaptkit import errors
from adaptkit.errors import AdaptKitError, AdaptKitWarning, MissingPathError, StorageError, UnknownNameError

BUILT_IN = {
    "UnknownNameError": LookupError,
    "ConfigError": ValueError,
    "DataError": ValueError,
    "MissingPathError": FileNotFoundError,
    "BackboneError": ValueError,
    "AdapterError": ValueError,
    "StorageError": OSError,
    "TrainingError": RuntimeError,
    "UnsupportedError": TypeError,
}
KINDS = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, AdaptKitError) and kind.__name__ != "AdaptKitError"
]


def test_every_error_is_ours_and_a_familiar_built_in():
    assert {kind.__name__ for kind in KINDS} == set(BUILT_IN)
    for kind in KINDS:
        assert issubclass(kind, BUILT_IN[kind.__name__]), kind
        with pytest.raises(AdaptKitError, match="one sentence"):
            raise kind("This is one sentence.")
    assert len(KINDS) == 9
    assert issubclass(AdaptKitWarning, UserWarning)
    assert not issubclass(AdaptKitWarning, AdaptKitError)


def test_messages_are_printed_as_they_are_and_survive_pickling():
    for kind in KINDS:
        error = kind("No 'quotes' added: naïve text.")
        for again in (error, pickle.loads(pickle.dumps(error)), copy.copy(error)):  # joblib pickles what a run raises
            assert type(again) is kind
            assert str(again) == "No 'quotes' added: naïve text."
    assert len(KINDS) == 9


def test_a_missing_path_is_a_data_error_and_a_file_not_found():
    with pytest.raises(errors.DataError):
        raise MissingPathError("There is no file x.")
    assert str(MissingPathError()) == ""
    assert str(StorageError()) == ""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tip-adaptr", "Did you mean 'tip-adapter'"),
        ("COOP", "Did you mean 'coop'"),
        ("zzz", "Known: coop, maple, tip-adapter."),
        ("", "Known: coop, maple, tip-adapter."),
        (None, "Unknown method None."),  # what a caller's forgotten argument gives
        (7, "Unknown method 7."),
    ],
)
def test_unknown_names_are_answered_with_near_ones_or_with_all(name, expected):
    error = UnknownNameError.for_name("method", name, ["maple", "coop", "tip-adapter"], "See the list.")
    assert str(error).startswith(f"Unknown method {name!r}.")
    assert expected in str(error)
    assert str(error).endswith(" See the list.")


def test_a_long_list_is_not_spelled_out():
    known = [f"dataset-number-{index}" for index in range(13)]
    assert str(UnknownNameError.for_name("dataset", "zzz", known)) == "Unknown dataset 'zzz'."
    assert str(UnknownNameError.for_name("dataset", "zzz", iter(known[:12]))).count("dataset-number") == 12
    assert str(UnknownNameError.for_name("dataset", "zzz", [])) == "Unknown dataset 'zzz'."
