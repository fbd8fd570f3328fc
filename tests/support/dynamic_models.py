"""Tiny models under dynamic VRAM with a stand-in for the GPU allocator (``fake_vram``)."""

import torch

import fake_vram
from host_models import tiny

NOTHING_FITS, EVERYTHING_FITS, HALF_FITS = (
    (lambda number: False),
    (lambda number: True),
    (lambda number: number % 2 == 0),
)


def dynamic(monkeypatch, fits, **options):
    import comfy.model_patcher

    fake_vram.install(monkeypatch, fits)
    patcher = tiny(**options)
    assert type(patcher) is comfy.model_patcher.ModelPatcherDynamic
    return patcher


def velocity(patcher, seed=2):
    """One pass on "the device", weights faulted in as the layers run."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 128, 2, 2, 3, generator=generator).to(fake_vram.DEVICE)
    features = torch.randn(1, 5, patcher.model.diffusion_model.config.connector.inner_dim, generator=generator).to(
        fake_vram.DEVICE
    )
    with torch.inference_mode():
        network = patcher.model.diffusion_model
        context = network.preprocess_text_embeds(features, unprocessed=True)
        return network([x], (torch.tensor([0.7], device=fake_vram.DEVICE),) * 2, context, frame_rate=24.0).to(
            fake_vram.MEMORY
        )


def load(patcher):
    with torch.inference_mode():
        patcher.partially_load(patcher.load_device)
