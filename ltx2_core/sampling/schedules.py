"""Noise schedules: how the noise level sigma falls from 1 (pure noise) to 0 (clean) over the steps.

Every function returns a float32 tensor of ``steps + 1`` values on the CPU, falling, with 0 at the end.

Sources: Lightricks ``ltx-core`` (``LTX2Scheduler``, ``LinearQuadraticScheduler``) and ``ltx-pipelines`` (distilled sigma lists).
"""

import math
from collections.abc import Callable

import torch

# The official pipelines build the schedule without a latent, so it is the one for 4096 tokens at every size.
DEFAULT_TOKENS = 4096

BASE_SHIFT, BASE_TOKENS = 0.95, 1024
MAX_SHIFT, MAX_TOKENS = 2.05, 4096

# The last non-zero sigma of the stretched schedule.
TERMINAL = 0.1

# What the distilled weights were trained on: first stage, and second stage after the latent upsampler.
DISTILLED = (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0)
DISTILLED_STAGE_2 = (0.909375, 0.725, 0.421875, 0.0)


def shift_for_tokens(tokens: int, base_shift: float = BASE_SHIFT, max_shift: float = MAX_SHIFT) -> float:
    """The schedule's shift: linear in the number of latent tokens F*H*W, ``base_shift`` at 1024, ``max_shift`` at 4096."""
    return base_shift + (tokens - BASE_TOKENS) * (max_shift - base_shift) / (MAX_TOKENS - BASE_TOKENS)


def ltx2_sigmas(
    steps: int,
    tokens: int = DEFAULT_TOKENS,
    *,
    base_shift: float = BASE_SHIFT,
    max_shift: float = MAX_SHIFT,
    stretch: bool = True,
    terminal: float = TERMINAL,
) -> torch.Tensor:
    """The schedule of the dev weights: ``sigma = e^s / (e^s + 1/t - 1)`` for t falling evenly from 1 to 0.

    ``tokens``: latent tokens F*H*W (4096, the official choice, or the real number; more tokens keep sigma high for longer).
    ``stretch``: rescale ``1 - sigma`` so that the last non-zero sigma is ``terminal``.
    Raises ValueError for fewer than one step, fewer than one token, or a terminal outside [0, 1).
    """
    _check_steps(steps)
    if tokens < 1:
        raise ValueError(f"The schedule got {tokens} latent tokens; it needs at least one.")
    if not 0.0 <= terminal < 1.0:
        raise ValueError(f"The schedule got a terminal sigma of {terminal}; it must be at least 0 and below 1.")

    e = math.exp(shift_for_tokens(tokens, base_shift, max_shift))
    sigmas = [e / (e + steps / (steps - i) - 1.0) for i in range(steps)]
    if stretch:
        if steps == 1:
            sigmas = [terminal]  # 1 - sigma is 0 and cannot be scaled; the official schedule ends up here as well
        else:
            k = (1.0 - sigmas[-1]) / (1.0 - terminal)
            sigmas = [1.0 - (1.0 - s) / k for s in sigmas]
    return torch.tensor([*sigmas, 0.0], dtype=torch.float32)


def linear_quadratic_sigmas(steps: int, threshold: float = 0.025) -> torch.Tensor:
    """Half the steps go linearly from 1 to ``1 - threshold``, the other half quadratically down to 0.

    With 8 steps and the default threshold this is exactly the first-stage list of the distilled weights.
    """
    _check_steps(steps)
    if not 0.0 < threshold < 1.0:
        raise ValueError(f"The schedule got a threshold of {threshold}; it must be between 0 and 1.")
    if steps == 1:
        return torch.tensor([1.0, 0.0], dtype=torch.float32)

    n = steps // 2
    q = steps - n
    d = n - threshold * steps
    a = d / (n * q * q)
    b = threshold / n - 2.0 * d / (q * q)
    c = a * n * n
    done = [i * threshold / n for i in range(n)] + [a * i * i + b * i + c for i in range(n, steps)]
    return torch.tensor([*(1.0 - s for s in done), 0.0], dtype=torch.float32)


def distilled_sigmas(stage: int = 1) -> torch.Tensor:
    """The fixed list the distilled weights were trained on: 8 steps for stage 1, 3 for stage 2 (after the upsampler)."""
    if stage not in (1, 2):
        raise ValueError(f"The distilled schedule has stages 1 and 2; got {stage}.")
    return torch.tensor(DISTILLED if stage == 1 else DISTILLED_STAGE_2, dtype=torch.float32)


def parse_sigmas(text: str) -> torch.Tensor:
    """Sigmas from a comma list as users write it, e.g. ``"1.0, 0.725, 0.421875, 0.0"``. They must fall and lie in [0, 1]."""
    try:
        values = [float(part) for part in text.replace("\n", ",").split(",") if part.strip()]
    except ValueError as error:
        raise ValueError(f"Could not read the sigmas {text!r}: {error}. Write numbers separated by commas.") from None
    if len(values) < 2:
        raise ValueError(f"A schedule needs at least two sigmas, one start and one end; got {len(values)}.")
    if any(b >= a for a, b in zip(values, values[1:])) or values[0] > 1.0 or values[-1] < 0.0:
        raise ValueError(f"Sigmas must fall from at most 1 to at least 0; got {', '.join(f'{v:g}' for v in values)}.")
    return torch.tensor(values, dtype=torch.float32)


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"The schedule got {steps} steps; it needs at least one.")


# Schedules by name. Each takes (steps, tokens); the fixed lists ignore both and a caller asks ``fixed_steps`` first.
PRESETS: dict[str, Callable[[int, int], torch.Tensor]] = {
    "ltx2": lambda steps, tokens: ltx2_sigmas(steps),
    "ltx2 (tokens)": lambda steps, tokens: ltx2_sigmas(steps, tokens),
    "linear quadratic": lambda steps, tokens: linear_quadratic_sigmas(steps),
    "distilled": lambda steps, tokens: distilled_sigmas(1),
    "distilled stage 2": lambda steps, tokens: distilled_sigmas(2),
}


def fixed_steps(name: str) -> int | None:
    """The number of steps a preset always has, or None when the caller chooses it."""
    return {"distilled": len(DISTILLED) - 1, "distilled stage 2": len(DISTILLED_STAGE_2) - 1}.get(name)


def sigmas_by_name(name: str, steps: int, tokens: int = DEFAULT_TOKENS) -> torch.Tensor:
    """The preset schedule ``name``, or a comma list of sigmas given in its place."""
    if name in PRESETS:
        return PRESETS[name](steps, tokens)
    if "," in name:
        return parse_sigmas(name)
    raise ValueError(f"Unknown schedule {name!r}; choose one of {', '.join(PRESETS)}, or give a comma list of sigmas.")
