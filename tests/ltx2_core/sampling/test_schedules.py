import math

import pytest
import torch

from ltx2_gguf.ltx2_core.sampling import schedules

# Printed by the official scheduler (float32, rounded to six digits).
OFFICIAL = {
    (8, 4096): [1, 0.965712, 0.921875, 0.863856, 0.783445, 0.664579, 0.471003, 0.1, 0],
    (30, 4096): [
        1, 0.994957, 0.989603, 0.983908, 0.97784, 0.971358, 0.964421, 0.956978, 0.948972, 0.940336, 0.930994, 0.920854, 0.90981, 0.897735, 0.884479,
        0.869858, 0.853651, 0.835584, 0.815319, 0.792427, 0.766363, 0.736418, 0.701656, 0.660813, 0.612141, 0.553148, 0.480164, 0.387541, 0.26612, 0.1, 0,
    ],
    (8, 6144): [1, 0.973913, 0.939833, 0.893422, 0.826507, 0.721651, 0.533815, 0.1, 0],
}  # fmt: skip


@pytest.mark.parametrize("steps, tokens", OFFICIAL)
def test_the_ltx2_schedule_equals_the_official_values(steps, tokens):
    sigmas = schedules.ltx2_sigmas(steps, tokens)
    assert sigmas.dtype == torch.float32
    assert torch.allclose(sigmas, torch.tensor(OFFICIAL[steps, tokens]), atol=6e-7, rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 15, 20, 30, 40])
@pytest.mark.parametrize("grid", [(1, 8, 8), (16, 16, 24), (16, 22, 40)])
@pytest.mark.parametrize("stretch", [True, False])
def test_the_ltx2_schedule_equals_the_hosts_scheduler_node(host, steps, grid, stretch):
    from comfy_extras.nodes_lt import LTXVScheduler

    latent = {"samples": torch.zeros(1, 128, *grid)}
    if steps == 1 and stretch:
        pytest.skip("the host divides zero by zero here")
    theirs = LTXVScheduler.execute(steps, 2.05, 0.95, stretch, 0.1, latent).args[0]
    ours = schedules.ltx2_sigmas(steps, math.prod(grid), stretch=stretch)
    assert torch.allclose(ours, theirs, atol=4e-6, rtol=0)


def test_with_very_many_tokens_the_stretch_is_computed_in_double_precision():
    """1 - sigma is about e^-12 at first; in float32 (the host) its rounding shows as 4e-4 in the stretched schedule."""
    from fractions import Fraction

    shift, steps = schedules.shift_for_tokens(32640), 20
    e = Fraction(math.exp(shift))
    exact = [e / (e + Fraction(steps, steps - i) - 1) for i in range(steps)]
    k = (1 - exact[-1]) / (1 - Fraction(0.1))
    exact = [float(1 - (1 - s) / k) for s in exact] + [0.0]
    assert torch.allclose(
        schedules.ltx2_sigmas(steps, 32640).double(), torch.tensor(exact, dtype=torch.float64), atol=1e-7, rtol=0
    )


def test_without_a_latent_the_host_uses_the_same_4096_tokens(host):
    from comfy_extras.nodes_lt import LTXVScheduler

    assert torch.allclose(
        schedules.ltx2_sigmas(20), LTXVScheduler.execute(20, 2.05, 0.95, True, 0.1).args[0], atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("tokens", [1024, 4096, 6144, 14080])
def test_the_ltx2_schedule_equals_the_one_diffusers_builds(tokens):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=1024,
        max_image_seq_len=4096,
        shift_terminal=0.1,
    )
    steps = 12
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)], mu=schedules.shift_for_tokens(tokens))
    assert torch.allclose(schedules.ltx2_sigmas(steps, tokens), scheduler.sigmas.float(), atol=2e-6, rtol=0)


def test_one_step_starts_at_the_terminal_sigma_as_the_official_scheduler_does():
    assert schedules.ltx2_sigmas(1).tolist() == pytest.approx([0.1, 0.0])


def test_the_last_sigma_before_the_end_is_the_terminal_one_and_all_of_them_fall():
    for steps in range(2, 60):
        sigmas = schedules.ltx2_sigmas(steps, terminal=0.2)
        assert sigmas[0] == 1 and sigmas[-1] == 0 and sigmas[-2].item() == pytest.approx(0.2)
        assert (sigmas.diff() < 0).all()


def test_the_distilled_list_is_linear_quadratic_with_eight_steps():
    assert torch.allclose(schedules.linear_quadratic_sigmas(8), schedules.distilled_sigmas(), atol=1e-7, rtol=0)


@pytest.mark.parametrize("steps", [2, 3, 5, 20, 40])
def test_linear_quadratic_equals_the_hosts_version(host, steps):
    from comfy.samplers import linear_quadratic_schedule

    class Sampling:
        sigma_max = torch.tensor(1.0)

    theirs = torch.as_tensor(linear_quadratic_schedule(Sampling, steps, threshold_noise=0.025))
    assert torch.allclose(schedules.linear_quadratic_sigmas(steps), theirs.float(), atol=1e-6, rtol=0)


def test_the_distilled_stages_have_eight_and_three_steps():
    assert schedules.distilled_sigmas(1).tolist() == pytest.approx(
        [1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0]
    )
    assert schedules.distilled_sigmas(2).tolist() == pytest.approx([0.909375, 0.725, 0.421875, 0.0])
    assert (
        schedules.fixed_steps("distilled") == 8
        and schedules.fixed_steps("distilled stage 2") == 3
        and schedules.fixed_steps("ltx2") is None
    )


@pytest.mark.parametrize("name", schedules.PRESETS)
def test_every_preset_falls_from_at_most_one_to_zero(name):
    sigmas = schedules.sigmas_by_name(name, schedules.fixed_steps(name) or 7, 2000)
    assert 0.9 < sigmas[0] <= 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()
    assert len(sigmas) == (schedules.fixed_steps(name) or 7) + 1


def test_a_comma_list_is_a_schedule():
    assert schedules.sigmas_by_name("0.85, 0.725,0.4219, 0", 99).tolist() == pytest.approx([0.85, 0.725, 0.4219, 0.0])


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: schedules.ltx2_sigmas(0), "0 steps"),
        (lambda: schedules.ltx2_sigmas(4, 0), "0 latent tokens"),
        (lambda: schedules.ltx2_sigmas(4, terminal=1.0), "terminal"),
        (lambda: schedules.sigmas_by_name("karras", 4), "karras"),
        (lambda: schedules.parse_sigmas("1, 0.5, 0.7, 0"), "must fall"),
        (lambda: schedules.parse_sigmas("1, half, 0"), "half"),
        (lambda: schedules.parse_sigmas("1,"), "two sigmas"),
        (lambda: schedules.distilled_sigmas(3), "stages 1 and 2"),
    ],
)
def test_wrong_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
