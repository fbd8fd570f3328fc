"""Eight denoising steps end to end: our network, sampler and guidance against diffusers' network in a loop written from the formulas."""

import pytest
import torch

import reference_dit as ref
from denoising_loops import our_loop, reference_loop
from ltx2_gguf.ltx2_core.sampling import schedules
from reference_dit import one_thread  # noqa: F401  (applies to every test here)

versions = pytest.mark.parametrize("version", ["2.0", "2.3"])


@versions
@pytest.mark.parametrize(
    "given", [None, 1.0, 0.7], ids=["text to video", "first frame given", "first frame at strength 0.7"]
)
@pytest.mark.parametrize("settings", ["distilled", "guided"])
def test_eight_steps_end_where_the_reference_ends(version, given, settings):
    config, model = ref.ours(version)
    noise, context = ref.inputs(config, 1, 3, 3, 4, text=16)
    _, negative = ref.inputs(config, 1, 3, 3, 4, text=16, seed=9)
    x, mask, clean = noise, None, None
    if given is not None:
        mask = torch.ones(1, 1, *noise.shape[2:])
        mask[:, :, 0] = 1 - given
        clean = torch.randn(noise.shape, generator=torch.Generator().manual_seed(7))
        x = torch.lerp(clean, noise, mask)
    if settings == "distilled":
        sigmas, guide = schedules.distilled_sigmas(), (1.0, 0.0, 0.0, ())
    else:
        sigmas, guide = schedules.ltx2_sigmas(8), (3.0, 1.0, 0.7, (1,))
    with torch.inference_mode():
        ours = our_loop(model, sigmas, x, context, negative, mask, clean, *guide)
    theirs = reference_loop(version, sigmas, x, context, negative, mask, clean, *guide)
    assert ref.relative_error(ours, theirs) < 2e-5
    if given == 1.0:
        assert torch.equal(ours[:, :, 0], clean[:, :, 0])
