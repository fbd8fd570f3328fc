"""One training step of the DiT: what is drawn for it, its loss, and its forward and backward replayed as a CUDA graph.

The network is small, so a step is thousands of short kernels, and launching them would take longer than running them. A step's
draws therefore go into fixed tensors, nothing in it waits for the device, and forward plus backward are captured once. Where that is
not possible (a CPU, a failed capture) the same function runs as it is.
"""

from dataclasses import dataclass

import torch

from ltx2_gguf.ltx2_core.transformer.modulation import Modulation

from . import pack  # noqa: F401
from .context import draw_registers, short_context
from .model import GRID

FRAME_RATES = (24.0, 12.0)


@dataclass
class Kind:
    """How a step sees captions: ``groups`` captions with ``repeats`` clips each, all 1024 positions of the context or the short one."""

    groups: int
    repeats: int
    short: bool
    fps: float = 24.0


def draw_sigma(n: int, device) -> torch.Tensor:
    """Noise levels [n]: logit-normal around 0.73, a sixth uniform."""
    sigma = torch.sigmoid(1.0 + 1.25 * torch.randn(n, device=device))
    return torch.where(torch.rand(n, device=device) < 1 / 6, torch.rand(n, device=device), sigma).clamp(0.002, 1.0)


def draw_mask(n: int, device) -> torch.Tensor:
    """Denoise masks [n, F]: 0 on a clean first frame (a third), on a clean last one (a twentieth), fractions at times."""
    frames = torch.ones(n, GRID[0], device=device)
    first = torch.rand(n, device=device) < 0.36
    partly = torch.rand(n, device=device) < 0.12
    frames[:, 0] = torch.where(
        first, torch.where(partly, 0.5 * torch.rand(n, device=device), torch.zeros((), device=device)), 1.0
    )
    frames[:, -1] = torch.where(torch.rand(n, device=device) < 0.05, 0.0, 1.0)
    return frames


class Draws:
    """Captions, clips and noise of a step. ``single`` and ``pair`` hold caption numbers; ``empty`` is the empty caption's."""

    def __init__(
        self, bank, z, real, single, pair, empty: int, pair_share: float, dropout: float = 0.1, registers: int = 128
    ):
        self.bank, self.z, self.real, self.single, self.pair, self.empty = bank, z, real, single, pair, empty
        self.registers = registers
        self.pair_share, self.dropout = pair_share if len(pair) else 0.0, dropout

    def __call__(self, kind: Kind) -> dict[str, torch.Tensor]:
        device, n = self.z.device, kind.groups * kind.repeats
        pick = lambda rows: rows[torch.randint(0, len(rows), (kind.groups,), device=device)]
        chosen = pick(self.single)
        if self.pair_share:
            chosen = torch.where(torch.rand(kind.groups, device=device) < self.pair_share, pick(self.pair), chosen)
        chosen = torch.where(torch.rand(kind.groups, device=device) < self.dropout, self.empty, chosen)
        clips = self.bank.table[
            chosen[:, None], torch.randint(0, self.bank.table.shape[1], (kind.groups, kind.repeats), device=device)
        ]
        # The empty caption describes every clip, not the few of its row: guidance subtracts what it says about any of them.
        anything = torch.randint(0, len(self.bank.latents), clips.shape, device=device)
        clips = torch.where(chosen[:, None] == self.empty, anything, clips)
        z, real = self.z[chosen], self.real[chosen]
        latent = self.bank.latents[clips.flatten()]
        return {
            "z": z + 0.1 * torch.randn_like(z) * real[..., None], "real": real, "latent": latent, "noise": torch.randn(latent.shape, device=device),
            "sigma": draw_sigma(n, device), "mask": draw_mask(n, device), "places": draw_registers(self.registers, device),
        }  # fmt: skip


def _rows_per_frame(dit, frames: torch.Tensor, sigma: torch.Tensor, dtype):
    """``LTX2Model._timestep_rows`` for timesteps known to be constant in every frame (the model would ask the device)."""
    tokens = GRID[0] * GRID[1] * GRID[2]
    return dit._modulations(
        frames.flatten() * dit.timestep_scale_multiplier,
        lambda rows: Modulation(rows.unflatten(0, frames.shape), tokens),
        sigma,
        dtype,
    )


def flow_loss(toy, kind: Kind, z, real, latent, noise, sigma, mask, places):
    """(loss, squared error per clip [n]) of the velocity on the tokens that are noisy."""
    dit, n = toy.dit, len(latent)
    context, bias = short_context(toy, z, real, places) if kind.short else (toy.context(z, real), None)
    spread = lambda t: t.unsqueeze(1).expand(-1, kind.repeats, *t.shape[1:]).flatten(0, 1)
    context, bias = spread(context), None if bias is None else spread(bias)
    level = (sigma[:, None] * mask)[:, None, :, None, None]
    clean = latent.float()
    dit._timestep_rows = lambda *_: _rows_per_frame(dit, sigma[:, None] * mask, sigma, dit.dtype)
    try:
        x = ((1 - level) * clean + level * noise).to(dit.dtype)
        v = dit._velocity(x, sigma, context, bias, kind.fps)
    finally:
        del dit._timestep_rows
    noisy = (mask > 0).float()[:, None, :, None, None].expand(n, 1, *GRID)
    error = ((v.float() - (noise - clean)).square() * noisy).mean((1, 2, 3, 4)) / noisy.mean((1, 2, 3, 4))
    return error.mean(), error.detach()


class Step:
    """Call it: draws, forward, backward; returns (gradients in the parameters' order, error [n], sigma [n]).

    A failed capture is logged and the step runs eagerly, or with ``must_capture`` raises.
    """

    def __init__(self, toy, params, draws: Draws, kind: Kind, log=print, must_capture: bool = False):
        self.toy, self.params, self.draws, self.kind = toy, params, draws, kind
        self.fixed = draws(kind)
        self.graph = None
        if self.fixed["latent"].is_cuda:
            try:
                self._capture()
            except RuntimeError as error:
                self.graph = None
                torch.cuda.synchronize()
                if must_capture:
                    raise
                log(f"no graph for {kind}: {error}")

    def _compute(self):
        loss, error = flow_loss(self.toy, self.kind, **self.fixed)
        loss.backward()
        return error

    def _forget(self):
        for p in self.params:
            p.grad = None

    def _capture(self):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._forget()
                self._compute()
        torch.cuda.current_stream().wait_stream(stream)
        self._forget()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.error = self._compute()
        self.grads = [p.grad for p in self.params]
        self._forget()
        self.graph = graph

    def __call__(self):
        drawn = self.draws(self.kind)
        for name, tensor in self.fixed.items():
            tensor.copy_(drawn[name])
        if self.graph is None:
            self._forget()
            error = self._compute()
            grads = [p.grad for p in self.params]
            self._forget()
            return grads, error, drawn["sigma"]
        self.graph.replay()
        return self.grads, self.error, drawn["sigma"]
