import pytest
import torch

from ltx2_gguf.ltx2_core.sampling import conditioning, samplers, schedules

SHAPE = (1, 4, 3, 2, 2)


def rel(a, b):
    return ((a - b).norm() / b.norm()).item()


def random(seed, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def exact_denoiser(target):
    """A model that knows the answer."""
    return lambda x, sigma: target.clone()


def curved_denoiser(target):
    return lambda x, sigma: torch.tanh(0.7 * x + (1.2 - sigma) * target)


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_an_exact_model_is_reached_exactly(name):
    target = random(1)
    *_, last = samplers.SAMPLERS[name](exact_denoiser(target), random(2), schedules.ltx2_sigmas(6))
    assert rel(last.latent, target) < 1e-6 and last.sigma == 0.0 and last.index == 5 and last.total == 6


def test_euler_equals_the_host_s_sampler(host):
    import comfy.k_diffusion.sampling as k

    target, noise, sigmas = random(1), random(2), schedules.ltx2_sigmas(12)
    denoise = curved_denoiser(target)

    def model(x, sigma, **_):
        return denoise(x, float(sigma[0]))

    theirs = k.sample_euler(model, noise.clone(), sigmas, disable=True)
    *_, last = samplers.euler(denoise, noise, sigmas)
    assert rel(last.latent, theirs) < 1e-6


def test_euler_keeps_given_tokens_and_gives_partly_given_ones_their_own_noise_level():
    """With a linear velocity field the result must be exact for every mask value: x stays at noise level m * sigma."""
    clean, truth, noise = random(1), random(1), random(3)
    mask = torch.tensor([1.0, 0.3, 0.0]).view(1, 1, 3, 1, 1).expand(1, 1, 3, 2, 2)
    state = conditioning.Conditioned(clean, mask)
    x = conditioning.noised(state, noise, 1.0)

    def denoise(x, sigma):
        velocity = torch.where(
            mask > 0, (x - truth) / (sigma * mask).clamp(min=1e-9), torch.zeros_like(x)
        )  # noise - clean, from where x is
        return samplers.x0_from_velocity(x, velocity, sigma, mask)

    for step in samplers.euler(denoise, x, schedules.ltx2_sigmas(5), mask=mask, clean=clean):
        level = (step.latent - truth).norm(dim=1) / (noise - truth).norm(dim=1)
        assert torch.allclose(level, (mask[:, 0] * step.sigma).expand_as(level), atol=1e-5)
    assert rel(step.latent, truth) < 1e-6


def test_a_scalar_noise_level_would_be_biased_for_partly_given_tokens():
    """What the per-token level is for: with sigma alone the same field ends m(1 - m)|noise - clean| away."""
    clean, noise, m = random(1), random(3), 0.3
    mask = torch.full((1, 1, 3, 2, 2), m)
    sigmas = schedules.linear_quadratic_sigmas(20)
    velocity = noise - clean
    state = conditioning.Conditioned(clean, mask)

    def scalar(x, sigma):
        return x - sigma * velocity

    *_, last = samplers.euler(scalar, conditioning.noised(state, noise, 1.0), sigmas, mask=mask, clean=clean)
    assert rel(last.latent, clean) > 0.05

    *_, last = samplers.euler(
        lambda x, sigma: samplers.x0_from_velocity(x, velocity, sigma, mask),
        conditioning.noised(state, noise, 1.0),
        sigmas,
        mask=mask,
        clean=clean,
    )
    assert rel(last.latent, clean) < 1e-6


# Results of the official loops (``res2s_audio_video_denoising_loop``, ``euler_denoising_loop``) for the problem below.
OFFICIAL = {
    ("res_2s", 4): [-0.1320129, -0.6000308, 0.999519, 0.5305685, -0.4924824, 1.910572, -0.2238886, 0.4627428, -0.3772181, -0.6004996],
    ("euler", 4): [-0.1320129, -0.5985185, 0.9991103, 0.5305685, -0.7215366, 1.910572, -0.2192947, -0.09349585, -0.3717646, -0.5900606],
    ("res_2s", 15): [-0.1320129, -0.6000293, 0.9995201, 0.5305685, -0.4671325, 1.910572, -0.223888, 0.409569, -0.3765891, -0.6414986],
    ("euler", 15): [-0.1320129, -0.5989127, 0.9991286, 0.5305685, -0.7028391, 1.910572, -0.222992, -0.02804063, -0.3551403, -0.5989336],
    ("res_2s", 30): [-0.1320129, -0.6000279, 0.9995184, 0.5305685, -0.5053045, 1.910572, -0.2239043, 0.3645094, -0.3766798, -0.6391093],
    ("euler", 30): [-0.1320129, -0.5989884, 0.9991306, 0.5305685, -0.6939542, 1.910572, -0.2237153, 0.0005164593, -0.3497403, -0.6022024],
}  # fmt: skip


def problem():
    """A curved model, one given and one partly given frame, 15 steps."""
    target, clean, noise = random(11), random(12), random(13)
    mask = torch.tensor([0.0, 0.4, 1.0]).view(1, 1, 3, 1, 1).expand(1, 1, 3, 2, 2)
    state = conditioning.Conditioned(clean, mask)
    return curved_denoiser(target), conditioning.noised(state, noise, 1.0), {"mask": mask, "clean": clean, "seed": 7}


@pytest.mark.parametrize("name, steps", OFFICIAL)
def test_the_samplers_equal_the_official_loops(name, steps):
    denoise, latent, given = problem()
    *_, last = samplers.SAMPLERS[name](denoise, latent, schedules.ltx2_sigmas(steps), **given)
    official = torch.tensor(OFFICIAL[name, steps])
    assert rel(last.latent.flatten()[::5], official) < 2e-6


def test_res_2s_without_fresh_noise_is_second_order():
    """Halving the step divides the error by about four (Euler's by two)."""
    target, noise = random(1), random(2)
    denoise = curved_denoiser(target)

    def end(sampler, steps, **settings):
        *_, last = sampler(denoise, noise, torch.linspace(0.9, 0.3, steps + 1), **settings)
        return last.latent

    truth = end(samplers.euler, 4000)
    first = rel(end(samplers.euler, 8), truth) / rel(end(samplers.euler, 16), truth)
    assert 1.7 < first < 2.3

    def plain_res_2s(steps):
        x = noise
        sigmas = torch.linspace(0.9, 0.3, steps + 1).tolist()
        for s, n in zip(sigmas, sigmas[1:]):
            import math

            h = math.log(s / n)
            a21, b1, b2 = samplers._res_2s_coefficients(h)
            x0 = denoise(x, s)
            middle = x + h * a21 * (x0 - x)
            x = x + h * (b1 * (x0 - x) + b2 * (denoise(middle, math.sqrt(s * n)) - x))
        return x

    second = rel(plain_res_2s(4), truth) / rel(plain_res_2s(8), truth)
    assert 3.0 < second < 5.5


def test_res_2s_depends_on_its_seed_and_euler_does_not():
    denoise, latent, given = problem()
    results = {}
    for name, sampler in samplers.SAMPLERS.items():
        for seed in (7, 7, 8):
            *_, last = sampler(denoise, latent, schedules.ltx2_sigmas(6), **given | {"seed": seed})
            results.setdefault(name, []).append(last.latent)
    assert torch.equal(results["res_2s"][0], results["res_2s"][1]) and not torch.equal(
        results["res_2s"][0], results["res_2s"][2]
    )
    assert torch.equal(results["euler"][0], results["euler"][2])


def test_given_frames_stay_bit_identical_under_both_samplers():
    denoise, latent, given = problem()
    for sampler in samplers.SAMPLERS.values():
        *_, last = sampler(denoise, latent, schedules.ltx2_sigmas(6), **given)
        assert torch.equal(last.latent[:, :, 0], given["clean"][:, :, 0])


def test_stopping_the_iteration_stops_the_model():
    calls = []

    def denoise(x, sigma):
        calls.append(sigma)
        return x * 0

    steps = samplers.euler(denoise, random(1), schedules.ltx2_sigmas(10))
    next(steps)
    steps.close()
    assert len(calls) == 1


def test_sigmas_that_do_not_fall_are_refused():
    with pytest.raises(ValueError, match="falling"):
        next(samplers.euler(exact_denoiser(random(1)), random(2), torch.tensor([1.0, 0.5, 0.5, 0.0])))
