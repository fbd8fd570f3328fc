"""From noise to a clean latent: the samplers, as generators that yield after every step.

A sampler asks ``denoise(latent, sigma) -> x0`` for the predicted clean latent, pulls the given tokens of x0 back to their content, and
moves the latent to the next sigma. It yields a ``Step`` each time, so progress, previews and cancelling belong to the caller: stop
iterating and nothing more is computed. The latent stays float32 between steps.

Tokens that are partly given (mask m between 0 and 1) live at noise level ``m * sigma`` all the way; ``x0_from_velocity`` uses that level,
which makes the loop exact for them.

Sources: Lightricks ``ltx-pipelines`` (``utils/samplers.py``, ``utils/res2s.py``) and ``ltx-core`` (``components/diffusion_steps.py``).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

Denoise = Callable[[torch.Tensor, float], torch.Tensor]


@dataclass(frozen=True)
class Step:
    """The state after step ``index`` (from 0) of ``total``: ``latent`` at noise level ``sigma``, and the x0 it was made with."""

    index: int
    total: int
    sigma: float
    latent: torch.Tensor
    x0: torch.Tensor


def x0_from_velocity(
    x: torch.Tensor, velocity: torch.Tensor, sigma: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """``x - tau * v`` with the token's own noise level ``tau = sigma * mask``; float32."""
    tau = sigma if mask is None else sigma * mask.float()
    return x.float() - tau * velocity.float()


def keep_given(x0: torch.Tensor, mask: torch.Tensor | None, clean: torch.Tensor | None) -> torch.Tensor:
    """``mask * x0 + (1 - mask) * clean``: what is given stays."""
    if mask is None or clean is None:
        return x0
    return torch.lerp(clean.to(x0), x0, mask.to(x0))


def _check(sigmas: torch.Tensor) -> list[float]:
    values = [float(s) for s in sigmas]
    if len(values) < 2 or any(b >= a for a, b in zip(values, values[1:])):
        raise ValueError(f"A sampler needs at least two falling sigmas; got {values}.")
    return values


def euler(
    denoise: Denoise,
    latent: torch.Tensor,
    sigmas: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    clean: torch.Tensor | None = None,
    seed: int = 0,
    parts: Sequence[int] = (),
) -> Iterator[Step]:
    """First order: ``x += (x - x0) / sigma * (sigma_next - sigma)``. Deterministic; ``seed`` and ``parts`` are there for a common signature.

    latent [B, C, F, H, W] at noise level ``sigmas[0]``; ``mask`` [B, 1, F, H, W] and ``clean`` [B, C, F, H, W] as in ``Conditioned``.
    """
    values = _check(sigmas)
    x = latent.float()
    for i, (sigma, sigma_next) in enumerate(zip(values, values[1:])):
        x0 = keep_given(denoise(x, sigma).float(), mask, clean)
        x = (
            x0 if sigma_next == 0.0 else torch.lerp(x0, x, sigma_next / sigma)
        )  # = x + (x - x0)/sigma * (sigma_next - sigma)
        yield Step(i, len(values) - 1, sigma_next, x, x0)


# res_2s never divides by a zero sigma: it stops here, and one more prediction removes the rest.
_RES_2S_LAST = 0.0011
# The sub-step always gets this much fresh noise, whatever ``eta`` the whole step has.
_RES_2S_SUBSTEP_ETA = 0.5


def res_2s(
    denoise: Denoise,
    latent: torch.Tensor,
    sigmas: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    clean: torch.Tensor | None = None,
    seed: int = 0,
    parts: Sequence[int] = (),
    eta: float = 0.5,
) -> Iterator[Step]:
    """Second order in log-sigma (exponential Runge-Kutta, midpoint), with fresh noise of strength ``eta`` after every half step.

    Two predictions per step and one at the end. Noise comes from ``seed`` (steps) and ``seed + 10000`` (half steps), drawn on the
    CPU. In short steps (``h < 0.5``) the start point is moved so that the noisy half step lies exactly on its own tangent; the
    official loop iterates to that fixed point, here it is solved for. ``parts``: lengths along the last axis that have noise of their own
    (streams packed into one latent, see ``joint``).
    """
    values = _check(sigmas)
    ends_clean = values[-1] == 0.0
    if ends_clean:
        values[-1] = _RES_2S_LAST
    steps = len(values) - 1
    step_noise = torch.Generator("cpu").manual_seed(seed)
    half_noise = torch.Generator("cpu").manual_seed((seed + 10000) % 2**64)

    x = latent.float()
    for i, (sigma, sigma_next) in enumerate(zip(values, values[1:])):
        h = math.log(sigma / sigma_next)
        a21, b1, b2 = _res_2s_coefficients(h)
        start = x
        x0 = keep_given(denoise(x, sigma).float(), mask, clean)

        middle = start + h * a21 * (x0 - start)
        sigma_middle = math.sqrt(sigma * sigma_next)
        middle = _renoise(start, middle, sigma, sigma_middle, _RES_2S_SUBSTEP_ETA, half_noise, parts)
        middle = keep_given(middle, mask, clean)
        if h < 0.5 and sigma > 0.03:
            start = (middle - h * a21 * x0) / (1.0 - h * a21)

        x0_middle = keep_given(denoise(middle, sigma_middle).float(), mask, clean)
        end = start + h * (b1 * (x0 - start) + b2 * (x0_middle - start))
        x = keep_given(_renoise(start, end, sigma, sigma_next, eta, step_noise, parts), mask, clean)
        if i + 1 == steps and ends_clean:
            x0_middle = keep_given(denoise(x, sigma_next).float(), mask, clean)
            x = x0_middle
        yield Step(i, steps, 0.0 if i + 1 == steps and ends_clean else sigma_next, x, x0_middle)


def _res_2s_coefficients(h: float) -> tuple[float, float, float]:
    """(a21, b1, b2) of the two-stage scheme with its half step at c = 1/2; phi_j are the exponential integrator functions at -h."""
    c = 0.5
    phi_2 = _phi(2, -h)
    return c * _phi(1, -h * c), _phi(1, -h) - phi_2 / c, phi_2 / c


def _phi(j: int, z: float) -> float:
    """phi_1 = (e^z - 1)/z, phi_2 = (e^z - 1 - z)/z^2; by its series near zero, where the difference cancels."""
    if abs(z) < 1e-3:
        return sum(z**k / math.factorial(k + j) for k in range(6))
    return (math.expm1(z) - (z if j == 2 else 0.0)) / z**j


def _renoise(
    start: torch.Tensor,
    end: torch.Tensor,
    sigma: float,
    sigma_next: float,
    eta: float,
    generator: torch.Generator,
    parts=(),
) -> torch.Tensor:
    """Replace part of the noise of ``end`` (the step's result at ``sigma_next``) by fresh noise, keeping its level and variance."""
    up = min(sigma_next * eta, sigma_next * 0.9999)
    shapes = [(*end.shape[:-1], length) for length in parts] or [end.shape]
    noise = torch.cat([_unit_noise(shape, generator) for shape in shapes], dim=-1).to(end)
    if up == 0.0:
        return end
    rest = math.sqrt(sigma_next**2 - up**2)
    alpha = 1.0 - sigma_next + rest
    down = rest / alpha
    eps = (start - end) / (sigma - sigma_next)
    x0 = start - sigma * eps
    return alpha * (x0 + down * eps) + up * noise


def _unit_noise(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Normal noise with mean exactly 0 and std exactly 1 in every sample of the batch."""
    noise = torch.randn(shape, generator=generator, dtype=torch.float32)
    flat = noise.flatten(1)
    flat = (flat - flat.mean(dim=1, keepdim=True)) / flat.std(dim=1, keepdim=True)
    return flat.view(shape)


SAMPLERS: dict[str, Callable[..., Iterator[Step]]] = {"euler": euler, "res_2s": res_2s}
