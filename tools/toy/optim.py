"""Optimiser, weight average and clock that both trainings share.

The network runs in bfloat16 (float32 on a CPU) while float32 master copies take the updates. Matrices and convolution kernels are
updated by Muon (momentum, orthogonalised), everything else by Adam. Learning rates follow the wall clock, because a run ends by
the clock: up over the first 4%, flat, and down over the last 45%.

Source: Keller Jordan, "Muon: an optimizer for hidden layers" (Newton-Schulz coefficients); Moonshot AI, arXiv 2502.16982 (update
scale 0.2 sqrt(max(m, n)) that lets Muon share Adam's learning rate).
"""

import time

import torch


class Clock:
    """Progress in [0, 1] through ``minutes`` from now."""

    def __init__(self, minutes: float):
        self.start, self.length = time.monotonic(), minutes * 60

    def seconds(self) -> float:
        return time.monotonic() - self.start

    def progress(self) -> float:
        return min(1.0, self.seconds() / self.length)


def learning_rate(progress: float, peak: float, warm: float = 0.04, decay: float = 0.45) -> float:
    """Trapezium over progress in [0, 1]; ends at 1% of the peak."""
    up = min(1.0, (progress + 1e-3) / warm)
    down = min(1.0, max(0.01, (1 - progress) / decay))
    return peak * up * down


def orthogonalise(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """[N, m, n] -> nearly orthogonal matrices with the same singular vectors (Newton-Schulz of fifth order)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    tall = x.shape[1] > x.shape[2]
    x = x.transpose(1, 2) if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.transpose(1, 2) if tall else x).float()


class Trainer:
    """Master weights, updates and weight average of the given named parameters.

    muon: predicate on (name, parameter). ``ema`` holds the averaged weights in float32.
    """

    def __init__(
        self, named, muon, average: float = 0.999, weight_decay: float = 0.02, betas=(0.9, 0.97), momentum: float = 0.95
    ):
        named = [(name, p) for name, p in named if p.requires_grad]
        self.names = [name for name, _ in named]
        self.params = [p for _, p in named]
        self.master = [p.detach().clone().float() for p in self.params]
        self.ema = [m.clone() for m in self.master]
        is_muon = [muon(name, p) for name, p in named]
        self.adam = [i for i, flag in enumerate(is_muon) if not flag]
        groups: dict[tuple, list[int]] = {}
        for i, flag in enumerate(is_muon):
            if flag:
                groups.setdefault(
                    (self.params[i].shape[0], self.params[i].numel() // self.params[i].shape[0]), []
                ).append(i)
        self.groups = groups
        self.momenta = {
            shape: torch.zeros(len(rows), *shape, device=self.params[rows[0]].device) for shape, rows in groups.items()
        }
        self.first = [torch.zeros_like(self.master[i]) for i in self.adam]
        self.second = [torch.zeros_like(self.master[i]) for i in self.adam]
        self.average, self.weight_decay, self.betas, self.momentum = average, weight_decay, betas, momentum
        self.steps = 0

    @torch.no_grad()
    def step(self, rate: float, muon_rate: float, clip: float = 1.0, grads=None) -> torch.Tensor:
        """One update from ``grads`` (one per parameter or None) or the parameters' own. Returns the gradients' norm (a device tensor)."""
        grads = [p.grad for p in self.params] if grads is None else grads
        grads = [
            torch.zeros_like(m) if g is None else g.to(torch.float32, copy=True) for g, m in zip(grads, self.master)
        ]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        torch._foreach_mul_(grads, torch.nan_to_num(clip / (norm + 1e-6), nan=0.0).clamp(max=1.0))
        self.steps += 1
        self._adam([grads[i] for i in self.adam], rate)
        for shape, rows in self.groups.items():
            gradient = torch.stack([grads[i].reshape(shape) for i in rows])
            momentum = self.momenta[shape].lerp_(gradient, 1 - self.momentum)
            update = orthogonalise(gradient.lerp(momentum, self.momentum)) * (-muon_rate * 0.2 * max(shape) ** 0.5)
            masters = [self.master[i] for i in rows]
            torch._foreach_mul_(masters, 1 - muon_rate * self.weight_decay)
            torch._foreach_add_(masters, [u.reshape(m.shape) for u, m in zip(update, masters)])
        torch._foreach_copy_(self.params, self.master)
        decay = min(self.average, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.ema, self.master, 1 - decay)
        for p in self.params:
            p.grad = None
        return norm

    def _adam(self, grads, rate):
        b1, b2 = self.betas
        torch._foreach_lerp_(self.first, grads, 1 - b1)
        torch._foreach_mul_(self.second, b2)
        torch._foreach_addcmul_(self.second, grads, grads, 1 - b2)
        scale1, scale2 = 1 - b1**self.steps, 1 - b2**self.steps
        denominator = torch._foreach_sqrt(self.second)
        torch._foreach_div_(denominator, scale2**0.5)
        torch._foreach_add_(denominator, 1e-8)
        masters = [self.master[i] for i in self.adam]
        torch._foreach_addcdiv_(masters, self.first, denominator, -rate / scale1)

    def averaged(self) -> dict[str, torch.Tensor]:
        """Averaged weights by name, float32."""
        return dict(zip(self.names, self.ema))

    @torch.no_grad()
    def use_average(self, on: bool) -> None:
        """Put the averaged (or, off, the current) weights into the running network."""
        torch._foreach_copy_(self.params, self.ema if on else self.master)
