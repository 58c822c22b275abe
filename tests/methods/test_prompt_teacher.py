"""P-Former's teacher: stage 0, distances, what gets no gradient, every bridge with it, and its absence afterwards."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import adaptkit.methods.mllm._prompt_teacher as teaching
from adaptkit.errors import ConfigError
from adaptkit.methods import methods
from adaptkit.methods.adapter import AdaptedModel, save_adapter
from adaptkit.methods.mllm._prompt_teacher import PromptTeacher, train_teacher, vocabulary_distance
from adaptkit.methods.mllm._vision import as_image
from adaptkit.methods.mllm.frozen import Frozen, FrozenConfig
from adaptkit.methods.mllm.magma import MagmaConfig
from adaptkit.training.loop import fit_method
from tests.backbones import tiny_mllm as tiny
from tests.methods.tiny import DESCRIPTIONS, NAMES, make_task, query

BRIDGES = {
    "frozen": {},
    "magma": {"prefix": "pooled"},
    "magma-grid": {"prefix": "grid"},
    "fromage": {"tokens": 3},
    "qformer": {},
    "qformer-stages": {"stages": "1+2"},
}
TAUGHT = {"align_to": "p-former", "teacher_steps": 6, "align": 5.0}


@pytest.fixture(scope="module")
def llava():
    return tiny.load("llava")


def make(case, **settings):
    name = case.partition("-")[0]
    kind = methods.get(name)
    config = kind.config_class(**BRIDGES[case], **settings)
    return kind(tiny.load(tiny.kind_for(name)), NAMES, config=config, descriptions=DESCRIPTIONS)


def trained(method, epochs=2):
    settings = replace(method.default_training, epochs=epochs, lr=1e-2)
    return fit_method(method, make_task(method.backbone, "images", shots=1), settings)


def numbers(seed=0):
    return torch.Generator().manual_seed(seed)


def sentences(backbone):
    texts = [sentence for name in NAMES for sentence in DESCRIPTIONS[name]][:8]
    return [row[:-1] for row in Frozen(backbone, NAMES, config=FrozenConfig()).caption_rows(texts)]


def saying(method, rows):
    """Minus the mean log-probability of sentences behind prompts."""
    end = method.mllm.prompter.end_tokens()[-1]

    def said(picked, prompts):
        wanted = [[*rows[i], end] for i in picked]
        loss = method.answer_loss([""] * len(wanted), wanted, as_image(method.mllm, prompts))
        return loss / sum(map(len, wanted))

    return said


def test_stage_0_falls_on_eight_sentences(llava):
    rows, method = sentences(llava), Frozen(llava, NAMES, config=FrozenConfig())
    before = {key: value.clone() for key, value in llava.state_dict().items()}
    teacher, shown = PromptTeacher(llava, 2, max(map(len, rows)), seed=0), []
    said = saying(method, rows)
    with torch.no_grad():
        first = said(range(8), teacher(rows)[0])
    facts = train_teacher(teacher, rows, said, 25, numbers(), lambda *told: shown.append(told))
    with torch.no_grad():
        last = said(range(8), teacher(rows)[0])
    assert len(rows) == facts["sentences"] == 8
    assert facts["last_loss"] < facts["first_loss"]
    assert last < first - 0.5
    assert shown[-1] == ("p-former", 25, 25)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(before[key], value) for key, value in llava.state_dict().items())
    assert all(p.grad is None for p in (*llava.parameters(), *method.parameters()))


def test_the_number_of_vectors_is_the_configured_one(llava):
    """Whatever the sentences' length is."""
    teacher = PromptTeacher(llava, 5, 40, seed=0)
    for length in (1, 7, 40):
        prompts, first = teacher([[1] * length, [2]])
        assert prompts.shape == (2, 5, tiny.WIDTH)
        assert first.shape == (2, teaching.WIDTH)


def test_padding_does_not_count_and_masks_are_drawn_anew(llava):
    teacher, rows = PromptTeacher(llava, 2, 30, seed=0).eval(), [[5, 6, 7], [3] * 30]
    with torch.no_grad():
        together, alone = teacher(rows)[0], teacher(rows[:1])[0]
        torch.testing.assert_close(together[:1], alone, rtol=1e-5, atol=1e-6)
        masks = numbers()
        one, two = teacher(rows, masks)[0], teacher(rows, masks)[0]
        assert not torch.equal(one, two)
        assert torch.equal(one, teacher(rows, numbers())[0])


def test_nearest_vocabulary_is_brute_force(monkeypatch):
    prompts = torch.randn(3, 4, 8, generator=numbers(), requires_grad=True)
    table = torch.randn(50, 8, generator=numbers(1), requires_grad=True)
    wanted = sum(min(float((v - row).square().mean()) for row in table) for v in prompts.flatten(0, 1)) / 12
    loss = vocabulary_distance(prompts, table)
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    monkeypatch.setattr(teaching, "_DISTANCES", 120)  # two at a time
    assert vocabulary_distance(prompts, table).item() == pytest.approx(wanted, rel=1e-5)
    loss.backward()
    assert prompts.grad.abs().max() > 0
    assert table.grad is None


def test_spreading_is_a_smoothed_cross_entropy(llava):
    teacher, first = PromptTeacher(llava, 2, 4, seed=0), torch.randn(5, teaching.WIDTH, generator=numbers())
    unit = F.normalize(teacher.contrast(first), dim=1)
    wanted = F.cross_entropy(unit @ unit.T / 0.07, torch.arange(5), label_smoothing=0.1)
    torch.testing.assert_close(teacher.spreading(first), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", BRIDGES)
def test_every_bridge_learns_from_it_and_forgets_it(case, tmp_path):
    plain, method = make(case), make(case, **TAUGHT)
    report = trained(method)
    facts = report["p_former"]
    assert facts["sentences"] == len(method.training_captions())
    assert facts["steps"] == 6
    assert facts["share_of_other_losses"] > 0
    assert method._teacher == ()
    state = method.adapter_state()
    assert state.keys() == plain.adapter_state().keys()
    save_adapter(tmp_path / "out", AdaptedModel(method))
    trained(plain)
    assert any(not torch.equal(value, state[key]) for key, value in plain.adapter_state().items())
    again = make(case, **TAUGHT)
    trained(again)
    assert all(torch.equal(value, state[key]) for key, value in again.adapter_state().items())


@pytest.mark.parametrize("case", BRIDGES)
def test_weight_0_is_plain_training(case):
    plain, method = make(case), make(case, **{**TAUGHT, "align": 0.0})
    assert "p_former" not in trained(method)
    trained(plain)
    state = method.adapter_state()
    assert all(torch.equal(value, state[key]) for key, value in plain.adapter_state().items())


def test_the_term_is_the_distance_to_the_captions_prompts(llava):
    method = Frozen(llava, NAMES, config=FrozenConfig(**TAUGHT))
    rows = [row[:-1] for row in method.caption_rows(method.training_captions())]
    teacher = PromptTeacher(llava, 2, max(map(len, rows)), seed=0)
    method._teacher = (teacher,)
    pixels, labels = query(llava, "images", 3), torch.tensor([2, 0, 3])
    terms = method.losses(pixels, labels)
    with torch.no_grad():
        prompts = teacher([rows[label] for label in labels])[0]
        vectors = torch.stack(method.features(pixels).tokens)
    torch.testing.assert_close(terms["align"].detach(), 5 * (prompts - vectors).square().mean(), rtol=1e-5, atol=1e-6)
    torch.autograd.backward(terms["align"])
    assert all(p.grad is None for p in teacher.parameters())
    assert method.prefix_map.linear.weight.grad.any()


def taught(method):
    """The method with a teacher, and what that was asked about."""
    rows = [row[:-1] for row in method.caption_rows(method.training_captions())]
    teacher, asked = PromptTeacher(method.mllm, method.placeholders, max(map(len, rows)), seed=0), []
    teacher.register_forward_pre_hook(lambda module, given: asked.append(given[0]))
    method._teacher = (teacher,)
    return method, asked


@pytest.mark.parametrize("case", ["frozen", "fromage", "qformer", "qformer-stages"])
def test_the_teacher_reads_the_captions_that_are_learned(case):
    method, asked = taught(make(case, **TAUGHT))
    pixels, drawn, draw = query(method.backbone, "images", 4), [], method.drawn_captions
    method.drawn_captions = lambda labels: drawn.append(draw(labels)) or drawn[-1]
    for seed in range(3):
        torch.manual_seed(seed)
        method.losses(pixels, torch.tensor([2, 0, 3, 2]))
    assert len(drawn) == len(asked) == 3
    for captions, rows in zip(drawn, asked, strict=True):
        assert rows == [row[:-1] for row in method.caption_rows(captions)]
    assert drawn[0] != drawn[1] or drawn[1] != drawn[2]


def test_stage_1_is_pulled_a_tenth_as_much():
    """The sheet has weights of 10 and 100."""
    method, _ = taught(make("qformer-stages", align_to="p-former"))
    pixels, labels, terms = query(method.backbone, "images", 2), torch.tensor([0, 3]), []
    for stage in "12":
        method._stage = stage
        torch.manual_seed(0)
        terms.append(method.losses(pixels, labels)["align"].detach())
        assert method.align_weight == {"1": 10.0, "2": 100.0}[stage]
    torch.testing.assert_close(10 * terms[0], terms[1])


@pytest.mark.parametrize(
    ("settings", "says"), [({"align": -1.0}, "align is -1.0"), ({"teacher_steps": 0}, "teacher_steps is 0")]
)
def test_settings_that_cannot_be_used(settings, says):
    with pytest.raises(ConfigError, match=says):
        FrozenConfig(**settings)


def test_the_models_own_bridge_cannot_be_aligned():
    with pytest.raises(ConfigError, match="choose prefix=pooled or grid"):
        MagmaConfig(align_to="p-former")
