"""Every part of the way from prompt to frames runs on the emulated Metal device and gives the CPU's numbers."""

import pytest
import torch

import mps_mode
from ltx2_gguf.ltx2_core.convert import synthetic
from ltx2_gguf.ltx2_core.files import structure
from ltx2_gguf.ltx2_core.loading.transformer import load_dit
from ltx2_gguf.ltx2_core.loading.vae import load_vae

WIDTH_OF_FEATURES = 256  # heads * head width of the small geometry


def rel(a, b):
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.fixture(scope="module", params=["2.0", "2.3"])
def checkpoint(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("mps") / f"small-{request.param}.gguf"
    geometry = structure.Geometry.small(request.param)
    return synthetic.make(path, geometry, type="q8_0", projection=False), geometry


def on(device, tensors):
    return [t.to(device) for t in tensors]


def test_connector_and_transformer_run_under_metals_rules(checkpoint):
    path, geometry = checkpoint
    torch.manual_seed(0)
    with torch.inference_mode():
        model = load_dit(path, dtype=torch.float32)
        width = model.config.connector.inner_dim
        features, latent = torch.randn(1, 7, width), torch.randn(1, model.config.in_channels, 3, 4, 5)
        mask = torch.ones(1, 1, 3, 1, 1)
        mask[:, :, 0] = 0.2

        def run(model, features, latent, mask):
            context = model.preprocess_text_embeds(features, unprocessed=True)
            return model.velocity(latent, 0.7, context, 24.0, denoise_mask=mask)

        expected = run(model, features, latent, mask)
        with mps_mode.emulated() as mps:
            moved = load_dit(path, dtype=torch.float32, device="mps")
            assert all(p.device.type == "mps" for p in moved.parameters())
            result = run(moved, *on(mps, (features, latent, mask)))
            assert result.device.type == "mps"
            assert rel(result.cpu(), expected) < 1e-5
            half = load_dit(path, dtype=torch.bfloat16, device="mps")
            assert rel(run(half, *on(mps, (features.bfloat16(), latent.bfloat16(), mask))).cpu(), expected) < 0.05


def test_the_vae_runs_under_metals_rules(checkpoint):
    path, _ = checkpoint
    torch.manual_seed(0)
    with torch.inference_mode():
        vae = load_vae(path, dtype=torch.float32)
        pixels = torch.rand(1, 3, 9, 64, 64) * 2 - 1
        latent = vae.encode(pixels)
        frames = vae.decode(latent)
        with mps_mode.emulated() as mps:
            moved = load_vae(path, dtype=torch.float32, device="mps")
            result = moved.encode(pixels.to(mps))
            assert result.device.type == "mps" and rel(result.cpu(), latent) < 1e-5
            assert rel(moved.decode(result).cpu(), frames) < 1e-4


@pytest.mark.slow
def test_the_whole_pipeline_runs_under_metals_rules(gemma_gguf, tmp_path, monkeypatch):
    """Text encoder, connector, sampler with an image, and decoder, from files."""
    import numpy as np

    from ltx2_gguf.ltx2_core.pipeline import ImageInput, LTX2Pipeline

    path = synthetic.make(tmp_path / "m.gguf", structure.Geometry.small("2.3"), type="q8_0")
    image = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    settings = {"width": 32, "height": 32, "frames": 9, "steps": 1, "seed": 1, "images": [ImageInput(image)]}
    expected = LTX2Pipeline.from_files(path, gemma_gguf, device="cpu").generate("a red kite", **settings)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    with mps_mode.emulated():
        pipeline = LTX2Pipeline.from_files(path, gemma_gguf, device="mps", dtype=torch.float32)
        frames = pipeline.generate("a red kite", **settings)
    assert type(frames) is torch.Tensor and rel(frames, expected) < 1e-3
