"""Reference checkpoints become adapted models, by shapes alone; what belongs to another method is refused."""

from __future__ import annotations

import pytest
import torch

from adaptkit.errors import AdapterError, ConfigError, MissingPathError, UnknownNameError
from adaptkit.methods.adapters.clip_adapter import CLIPAdapter
from adaptkit.methods.caches.tip_adapter import TipAdapter
from adaptkit.methods.importing import find_checkpoint, import_reference
from adaptkit.methods.prompts.maple import MaPLe
from tests.methods.test_reference import maple_state
from tests.methods.tiny import NAMES, NOVEL, make_task, tiny_clip

BACKBONE = tiny_clip()


def coop_state(*shape: int, classes: int = 4):
    context = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).half()
    return {"ctx": context, "token_prefix": torch.zeros(classes, 1, 16), "token_suffix": torch.zeros(classes, 72, 16)}


def test_coop_settings_come_from_the_shape():
    state = coop_state(5, 16)
    imported = import_reference("coop", state, BACKBONE, NAMES)
    method = imported.model.method
    assert (method.config.num_context, method.config.class_specific) == (5, False)
    assert torch.equal(method.context, state["ctx"].float())
    assert imported.taken == ("ctx",)
    assert imported.ignored == ("token_prefix", "token_suffix")
    assert imported.notes == ()
    whole = {f"prompt_learner.{key}": value for key, value in state.items()}
    again = import_reference("coop", whole, BACKBONE, NAMES, settings={"class_position": "middle"})
    assert again.taken == ("prompt_learner.ctx",)
    assert again.model.method.config.class_position == "middle"


def test_other_classes_than_the_checkpoints_are_told():
    imported = import_reference("coop", coop_state(4, 16, classes=9), BACKBONE, NAMES)
    assert imported.notes == ("the checkpoint was trained on 9 classes, and 4 class names were given",)


def test_a_class_specific_context_wants_its_classes():
    state = coop_state(4, 2, 16)
    imported = import_reference("coop", state, BACKBONE, NAMES)
    assert imported.model.method.config.class_specific
    assert torch.equal(imported.model.method.context, state["ctx"].float())
    with pytest.raises(AdapterError, match="each of 4 classes, but 3 class names were given: give the 4"):
        import_reference("coop", state, BACKBONE, NOVEL)


def test_settings_win_and_are_checked():
    with pytest.raises(AdapterError, match=r"has shape \(5, 16\), but coop .* has \(4, 16\)"):
        import_reference("coop", coop_state(5, 16), BACKBONE, NAMES, settings={"num_context": 4})
    with pytest.raises(ConfigError, match="did you mean 'num_context'"):
        import_reference("coop", coop_state(5, 16), BACKBONE, NAMES, settings={"num_contxt": 4})
    with pytest.raises(AdapterError, match=r"has shape \(5, 17\).* on 'tiny'"):
        import_reference("coop", coop_state(5, 17), BACKBONE, NAMES)
    with pytest.raises(UnknownNameError, match="Did you mean 'coop'"):
        import_reference("coopp", coop_state(5, 16), BACKBONE, NAMES)


@pytest.mark.parametrize(("count", "depth"), [(2, 3), (1, 1), (3, 2), (6, 2)])
def test_maple_settings_come_from_names_and_shapes(count, depth):
    state = maple_state(count=count, depth=depth)
    imported = import_reference("maple", state, BACKBONE, NAMES)
    method = imported.model.method
    assert isinstance(method, MaPLe)
    assert (method.config.num_context, method.config.depth) == (count, depth)
    assert len(imported.taken) == 1 + 2 + 3 * (depth - 1)
    assert set(imported.ignored) == {
        "prompt_learner.token_prefix",
        "prompt_learner.token_suffix",
        "image_encoder.class_embedding",
        "logit_scale",
    }
    assert torch.equal(method.contexts[depth - 1], state[method.reference_key(f"contexts.{depth - 1}")].float())


def test_clip_adapter_and_tip_adapter():
    state = {"adapter.fc.0.weight": torch.randn(2, 16), "adapter.fc.2.weight": torch.randn(16, 2)}
    imported = import_reference("clip-adapter", state, BACKBONE, NAMES, settings={"ratio": 0.4})
    assert isinstance(imported.model.method, CLIPAdapter)
    assert imported.inferred == {"reduction": 8}
    assert float(imported.model.method.ratio) == pytest.approx(0.4)
    assert imported.kept == ("ratio",)
    assert "not in the checkpoint" in imported.notes[0]
    fitted = TipAdapter(BACKBONE, NAMES)
    fitted.fit(make_task(BACKBONE, "image_features", val=False))
    cache = {"keys": fitted.keys.T, "values": torch.nn.functional.one_hot(fitted.key_labels).half()}
    imported = import_reference("tip-adapter", cache, BACKBONE, NAMES)
    assert torch.equal(imported.model.method.keys, fitted.keys)
    assert imported.kept == ("alpha", "beta")
    with pytest.raises(AdapterError, match="other classes or shots"):
        import_reference("tip-adapter", cache, BACKBONE, NOVEL)


def test_files_of_other_methods_are_refused_with_the_one_that_fits():
    with pytest.raises(AdapterError, match=r"coop would take 1 .* maple these and 8 more\. Say --method maple"):
        import_reference("coop", maple_state(), BACKBONE, NAMES)
    with pytest.raises(AdapterError, match=r"none of clip-adapter: its names fit maple\."):
        import_reference("clip-adapter", maple_state(), BACKBONE, NAMES)
    with pytest.raises(AdapterError, match=r"entries \(3: ctx, .* none of tip-adapter: its names fit coop"):
        import_reference("tip-adapter", coop_state(4, 16), BACKBONE, NAMES)
    with pytest.raises(AdapterError, match=r"no 'prompt_learner.proj.weight'.* Its names fit coop"):
        import_reference("maple", coop_state(2, 16), BACKBONE, NAMES)
    with pytest.raises(AdapterError, match="none of coop: no other method"):
        import_reference("coop", {"of_nobody": torch.zeros(3)}, BACKBONE, NAMES)


def test_training_folders(tmp_path):
    part = tmp_path / "output" / "prompt_learner"
    part.mkdir(parents=True)
    for name in ("model.pth.tar-9", "model.pth.tar-50", "model.pth.tar-100x", "model-best.pth.tar", "checkpoint"):
        (part / name).write_bytes(b"x")
    (tmp_path / "output" / "tensorboard").mkdir()
    for given in (part, part.parent):
        assert find_checkpoint(given) == part / "model.pth.tar-50"
    assert find_checkpoint(part / "model.pth.tar-9") == part / "model.pth.tar-9"
    for name in ("model.pth.tar-9", "model.pth.tar-50"):
        (part / name).unlink()
    assert find_checkpoint(part.parent) == part / "model-best.pth.tar"
    (part.parent / "other").mkdir()
    (part.parent / "other" / "model.pth.tar-5").write_bytes(b"x")
    with pytest.raises(AdapterError, match="in several places"):
        find_checkpoint(part.parent)
    with pytest.raises(MissingPathError, match=r"holds no model\.pth\.tar-EPOCH"):
        find_checkpoint(part.parent / "tensorboard")
    with pytest.raises(MissingPathError, match="There is no checkpoint"):
        find_checkpoint(tmp_path / "absent")
