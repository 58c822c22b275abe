"""DCLIP: its sentences, its scores written out, and classes that nobody described."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from adaptkit.backbones.load import load_backbone
from adaptkit.data.sources import load_dataset
from adaptkit.errors import BackboneError, ConfigError, DataError, UnsupportedError
from adaptkit.evaluation.protocols import plan_run, run_method
from adaptkit.evaluation.tasks import make_task
from adaptkit.methods.adapters.zero_shot import ZeroShot
from adaptkit.methods.descriptions._sentences import is_whole, linked, sentence_features, shortened
from adaptkit.methods.descriptions.dclip import DCLIP, DCLIPConfig
from tests.methods.tiny import DESCRIPTIONS, NAMES, NOVEL, query, tiny_clip

BACKBONE = tiny_clip()
FEATURES = query(BACKBONE, "image_features")


def dclip(descriptions=DESCRIPTIONS, names=NAMES, **settings):
    return DCLIP(BACKBONE, names, config=DCLIPConfig(**settings), descriptions=descriptions)


def scores(sentences):
    """Similarities [images, sentences], the plain way."""
    return F.normalize(FEATURES, dim=-1) @ F.normalize(BACKBONE.text_features(sentences), dim=-1).T


@pytest.mark.parametrize(
    ("descriptor", "clean", "compat"),
    [
        ("a small beak", "which is a small beak", "which is a small beak"),
        ("an upright stem", "which is an upright stem", "which is an upright stem"),
        ("A crest", "which is A crest", "which has A crest"),
        ("amber eyes", "which has amber eyes", "which is amber eyes"),
        ("arrow-shaped", "which has arrow-shaped", "which is arrow-shaped"),
        ("has stripes", "which has stripes", "which has stripes"),
        ("often seen in pairs", "which often seen in pairs", "which often seen in pairs"),
        ("may be red", "which may be red", "which may be red"),
        ("canine teeth", "which has canine teeth", "which canine teeth"),
        ("used for cutting", "which is used for cutting", "which is used for cutting"),
        ("whiskers", "which has whiskers", "which has whiskers"),
        ("", "which has ", "which has "),
    ],
)
def test_linking_words(descriptor, clean, compat):
    assert (linked(descriptor), linked(descriptor, compat=True)) == (clean, compat)


@pytest.mark.parametrize("aggregation", ["mean", "max", "sum"])
def test_scores_are_the_sheets(aggregation):
    method = dclip(aggregation=aggregation)
    wanted = []
    for name in NAMES:
        similar = scores(method.sentences(name))
        wanted.append(similar.amax(1) if aggregation == "max" else getattr(similar, aggregation)(1))
    with torch.no_grad():
        torch.testing.assert_close(method(FEATURES), 20 * torch.stack(wanted, 1), rtol=1e-5, atol=1e-5)


def test_the_maximum_in_parts(monkeypatch):
    method = dclip(aggregation="max")
    whole = method(FEATURES)
    monkeypatch.setattr("adaptkit.methods.descriptions.dclip._FORWARD_BYTES", 1)
    torch.testing.assert_close(method(FEATURES), whole)
    with pytest.raises(UnsupportedError, match="no single vector per class"):
        method.class_weights()


def test_one_empty_descriptor_and_no_words_is_the_bare_name():
    bare = dclip(dict.fromkeys(NAMES, ()) | {"x": ("y",)}, fallback=True)
    names = ZeroShot(BACKBONE, NAMES, templates=("{}",))
    torch.testing.assert_close(bare(FEATURES), names(FEATURES))
    dangling = dclip(dict.fromkeys(NAMES, ()) | {"x": ("y",)}, fallback=True, compat=True)
    assert dangling.sentences("river") == ["river, which has "]


def test_the_order_of_descriptors_means_nothing():
    turned = dclip({name: given[::-1] for name, given in DESCRIPTIONS.items()})
    torch.testing.assert_close(turned(FEATURES), dclip()(FEATURES))


def test_the_mean_keeps_its_length():
    lengths = dclip().class_weights().norm(dim=1)
    assert bool((lengths < 0.999).all())
    alone = dclip({name: given[:1] for name, given in DESCRIPTIONS.items()}).class_weights().norm(dim=1)
    torch.testing.assert_close(alone, torch.ones(len(NAMES)))


def test_whole_sentences_stand_as_they_are():
    assert is_whole("Tabby cat, which has stripes", "tabby_cat")
    assert not is_whole("river banks", "river")
    given = {**DESCRIPTIONS, "river": ("river, which has banks.", "a bend")}
    assert dclip(given).sentences("river") == ["river, which has banks.", "river, which is a bend"]
    assert dclip(given, compat=True).sentences("river")[0] == "river, which has river, which has banks."


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, "golden retriever, which has fur"),
        ({"class_name": "append"}, "which has fur, golden retriever"),
        ({"class_name": "none"}, "which has fur"),
        ({"link": False, "between": " with "}, "golden retriever with fur"),
        ({"before": "A photo of a ", "after": "."}, "A photo of a golden retriever, which has fur."),
    ],
)
def test_how_sentences_are_made(settings, sentence):
    assert dclip(**settings).sentence("golden_retriever", "fur") == sentence


def test_classes_that_nobody_described():
    with pytest.raises(
        DataError, match=r"dclip reads descriptions of the classes, and 'river' \(and 1 more\) has none"
    ):
        dclip({name: given for name, given in DESCRIPTIONS.items() if name in NAMES[:2]})
    some = {name: DESCRIPTIONS[name] for name in NAMES}
    method = dclip(some)
    with pytest.raises(DataError, match="'snow leopard'"):
        method.set_classes(NOVEL)
    assert method.class_names == NAMES
    lenient = dclip(some, fallback=True)
    assert lenient.set_classes(NOVEL).sentences("acorn") == ["a photo of a acorn."]
    with pytest.raises(DataError, match="has none"):  # nothing at all to fall back from
        dclip({}, fallback=True)


def test_bad_settings():
    with pytest.raises(ConfigError, match="aggregation is 'median', but must be one of mean, max, sum"):
        DCLIPConfig(aggregation="median")
    with pytest.raises(ConfigError, match="class_name is 'x'"):
        DCLIPConfig(class_name="x")


def test_a_sentence_that_is_too_long_is_named():
    with pytest.raises(BackboneError, match="is too long"):
        dclip({**DESCRIPTIONS, "river": ("wide " * 90,)})(FEATURES)


def test_sentences_are_encoded_once_and_in_parts(monkeypatch):
    asked = []
    monkeypatch.setattr(
        BACKBONE,
        "encode_text",
        lambda tokens, inner=BACKBONE.encode_text: asked.append(len(tokens.ids)) or inner(tokens),
    )
    monkeypatch.setattr("adaptkit.methods.descriptions._sentences.CHUNK", 2)
    found = sentence_features(BACKBONE, ["a", "b", "a", "c", "b"])
    assert asked == [2, 1]
    torch.testing.assert_close(found, BACKBONE.text_features(["a", "b", "a", "c", "b"]))


def test_shortening_leaves_out_whole_words():
    long = " ".join(["word"] * 90)
    assert shortened(BACKBONE, long) == " ".join(["word"] * 75)  # 77 with start and end
    short = sentence_features(BACKBONE, [long, "word"], shorten=True)
    torch.testing.assert_close(short, BACKBONE.text_features([" ".join(["word"] * 75), "word"]))
    with pytest.raises(BackboneError, match="too long"):
        shortened(BACKBONE, "x1" * 200)


def test_descriptions_beat_names_clearly_on_species(tmp_path):
    """Names that say nothing are near chance (4 %), descriptions are nearly always right."""
    from adaptkit.data.features import FeatureStore

    backbone, store = load_backbone("mini"), FeatureStore(tmp_path)
    task = make_task(load_dataset("species"), shots=1)

    def accuracy(name, *settings):
        plan = plan_run(name, backbone, task, recipe="none", overrides=settings)
        return run_method(plan, backbone, store=store).result.parts[0].accuracy

    names = accuracy("zero-shot")
    described = {name: accuracy(name) for name in ("dclip", "cupl")}
    described["vdt"] = accuracy("vdt-adapter", "method.adapter=none")
    described["waffle"] = accuracy("waffleclip", "method.mode=waffle-and-descriptions")
    assert names < 0.15
    assert min(described.values()) > 0.95, described
