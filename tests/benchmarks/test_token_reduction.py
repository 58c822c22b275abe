"""`python -m benchmarks.token_reduction`, on few images."""

from __future__ import annotations

import json

from click.testing import CliRunner

from benchmarks.token_reduction.__main__ import COLUMNS, KEEPS, RESULTS, RULES, line, main, shaped_like_llava


def test_every_rule_stands_beside_all_tokens_and_the_random_baseline():
    outcome = CliRunner().invoke(main, ["--images", "8", "--large-images", "0", "--json"])
    assert outcome.exit_code == 0, outcome.output
    rows = json.loads(outcome.stdout)["models"]["mini-mllm"]
    assert [row["rule"] for row in rows] == ["all tokens", *RULES * len(KEEPS)]
    assert RULES[0] == "random"
    assert [row["tokens"] for row in rows] == [17] + [9] * 6 + [4] * 6
    assert all(0 <= row[key] <= 1 for row in rows for key in ("accuracy", "agreement"))
    assert rows[0]["cosine"] == 1 > max(row["cosine"] for row in rows[1:])
    assert len(line("mini-mllm", rows[1])) == len(COLUMNS)


def test_the_random_model_has_llavas_shape(tmp_path):
    import torch

    backbone = shaped_like_llava(tmp_path / "model", width=24, layers=1)
    with torch.no_grad():
        assert backbone.image_features(torch.rand(1, 3, 336, 336)).counts == (576,)


def test_kept_results_have_both_models():
    kept = json.loads(RESULTS.read_text())
    assert set(kept["models"]) == {"mini-mllm", "random-llava"}
    assert {row["rule"] for row in kept["models"]["random-llava"]} == {"all tokens", *RULES}
