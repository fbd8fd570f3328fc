import pytest
import torch

from ltx2_gguf.ltx2_core.sampling import guidance
from ltx2_gguf.ltx2_core.sampling.guidance import Guidance, combine


@pytest.fixture
def predictions():
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(1, 8, 3, 4, 5, generator=generator) * s + m for s, m in ((1.0, 0.1), (1.3, -0.2), (0.8, 0.0))]


def test_cfg_moves_away_from_the_negative_prediction(predictions):
    c, u, _ = predictions
    assert torch.allclose(combine(c, u, cfg=3.0), u + 3.0 * (c - u), atol=1e-5)


def test_cfg_one_and_stg_zero_return_the_conditional_prediction_unchanged(predictions):
    c, u, p = predictions
    assert torch.equal(combine(c, u, p, cfg=1.0, stg=0.0, rescale=0.7), c)


def test_cfg_stg_and_rescale_follow_the_official_sum(predictions):
    c, u, p = (x.double() for x in predictions)
    expected = c + 2.0 * (c - u) + 1.0 * (c - p)
    expected = expected * (0.7 * c.std() / expected.std() + 0.3)
    result = combine(*predictions, cfg=3.0, stg=1.0, rescale=0.7)
    assert torch.allclose(result.double(), expected, rtol=1e-5, atol=1e-5)


def test_full_rescale_restores_the_spread_of_the_conditional_prediction(predictions):
    c, u, p = predictions
    assert combine(c, u, p, cfg=7.0, stg=1.0, rescale=1.0).std().item() == pytest.approx(c.std().item(), rel=1e-5)


def test_rescale_equals_what_diffusers_does_for_one_sample(predictions):
    from diffusers.pipelines.ltx2.pipeline_ltx2 import rescale_noise_cfg

    c, u, _ = predictions
    guided = u + 4.0 * (c - u)
    assert torch.allclose(combine(c, u, cfg=4.0, rescale=0.7), rescale_noise_cfg(guided, c, 0.7), rtol=1e-5, atol=1e-5)


def test_rescaling_velocities_instead_gives_another_result(predictions):
    """Rescaling depends on the space: this is why everything is computed on x0."""
    c, u, _ = predictions
    x = torch.randn(c.shape, generator=torch.Generator().manual_seed(4))
    in_x0 = combine(c, u, cfg=3.0, rescale=0.7)
    in_velocity = x - 0.9 * combine((x - c) / 0.9, (x - u) / 0.9, cfg=3.0, rescale=0.7)
    assert (in_x0 - in_velocity).norm() / in_x0.norm() > 0.05


def test_predictions_in_bfloat16_are_combined_in_float32(predictions):
    c, u, p = (x.bfloat16() for x in predictions)
    result = combine(c, u, p, cfg=3.0, stg=1.0, rescale=0.7)
    assert result.dtype == torch.float32
    assert torch.equal(result, combine(c.float(), u.float(), p.float(), cfg=3.0, stg=1.0, rescale=0.7))


@pytest.mark.parametrize(
    "missing, settings", [("negative prompt", {"cfg": 3.0}), ("skipped self-attention", {"stg": 1.0})]
)
def test_a_missing_pass_is_named(predictions, missing, settings):
    with pytest.raises(ValueError, match=missing):
        combine(predictions[0], **settings)


def test_passes_counts_what_a_step_costs():
    assert Guidance().passes == 1
    assert Guidance(cfg=3.0).passes == 2
    assert Guidance(cfg=3.0, stg=1.0, stg_blocks=(28,)).passes == 3
    assert Guidance(stg=1.0).passes == 1


def test_the_presets_are_the_official_defaults():
    rows = {
        name: (p.steps, p.cfg, p.stg, p.rescale, p.stg_block, p.sampler, p.image_crf)
        for name, p in guidance.PRESETS.items()
    }
    assert rows == {
        "2.0": (40, 3.0, 1.0, 0.7, 29, "euler", 33),
        "2.3": (30, 3.0, 1.0, 0.7, 28, "euler", 33),
        "2.3 HQ": (15, 3.0, 0.0, 0.45, None, "res_2s", 33),
        "distilled": (8, 1.0, 0.0, 0.0, None, "euler", 33),
    }


@pytest.mark.parametrize(
    "block, layers, expected",
    [(28, 48, (28,)), (29, 48, (29,)), (28, 2, (1,)), (28, 4, (2,)), (29, 1, (0,)), (None, 48, ())],
)
def test_the_stg_block_keeps_its_depth_in_a_shallower_network(block, layers, expected):
    assert guidance.stg_blocks_for(block, layers) == expected


def test_the_negative_prompts_stand_in_the_docs_word_for_word():
    from pathlib import Path

    page = (Path(__file__).resolve().parents[3] / "docs" / "comfyui.md").read_text("utf-8")
    old, new = guidance.NEGATIVE_PROMPTS["2.0"], guidance.NEGATIVE_PROMPTS["2.3"]
    assert f"> {old}\n" in page and new.endswith(old) and f"> {new.removesuffix(old).strip()}\n" in page
    assert set(guidance.NEGATIVE_PROMPTS) == {"2.0", "2.3"}
