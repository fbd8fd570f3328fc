"""The diffusion decoder of LTX-2.5's video VAE: latents to pixels in one denoising step, rolling through time.

Four stages of attention blocks and pixel shuffles make a context of a quarter of the clip's resolution. A fifth stage turns noise into the
pixels, guided by it. Everything is a linear layer or attention to neighbours in time and space (``neighborhood.py``).

Rolling is exact: a block computes a frame once its window in time is complete, and keeps the frames that later windows still reach. What it
keeps is its input; keys and values are made again, which costs a tenth more products and saves two thirds of the memory.

The noise of a pixel depends on its frame and place alone, so that pieces, tiles and devices do not change the picture.

Activations lie channels last. Between the stages they are viewed as (B, C, F, H, W), like those of the other decoder.

Letters: F frames, H and W height and width of a stage, C its channels, h heads of d, K window.

Sources: ltx-core ``model/video_vae/transformer``; ComfyUI 0.33.0 ``comfy/ldm/lightricks/vae/na_diffusion_decoder.py``.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from .blocks import flow
from .diffusion_config import TOKENS_AT_ONCE, DiffusionDecoderConfig
from .neighborhood import neighborhood_attention

EPS = 1e-6
ROPE_THETA = 10_000.0
TIME_EMBEDDING = 256


def rope_angles(positions: torch.Tensor, head_dim: int, axis: int) -> torch.Tensor:
    """Angles [n, pairs] of one axis (0: time, 1: height, 2: width). A quarter of a head's pairs belongs to time, the rest to the other two."""
    width = rope_split(head_dim)[axis]
    frequencies = [ROPE_THETA ** (-2 * i / width) for i in range(width // 2)]
    return positions.float()[:, None] * torch.tensor(frequencies, dtype=torch.float32, device=positions.device)


def rope_split(head_dim: int) -> tuple[int, int, int]:
    """Widths of a head that time, height and width rotate; all even."""
    time = head_dim // 4 // 2 * 2
    space = (head_dim - time) // 2
    if space % 2:
        time, space = time - 2, (head_dim - time + 2) // 2
    return time, space, space


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (x_2i, x_2i+1) of x [B, F, H, W, h, d] by angles [F, H, W, 1, d/2], in float32; x's dtype."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)


def pieces(x: torch.Tensor):
    """(start, stop) along the frames of x [B, F, H, W, C], ``TOKENS_AT_ONCE`` positions or one frame each."""
    step = max(1, TOKENS_AT_ONCE // (x.shape[0] * x.shape[2] * x.shape[3]))
    return [(start, min(start + step, x.shape[1])) for start in range(0, x.shape[1], step)]


def hashed_noise(frames: range, top: int, left: int, height: int, width: int, channels: int, device) -> torch.Tensor:
    """N(0, 1) for pixels, float32 [channels, frames, height, width]; a pixel's value depends on its frame, channel, row and column alone.

    Source of the mixing function: "lowbias32", Chris Wellons, hash-prospector.
    """

    def mix(x):
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
        return x ^ (x >> 16)

    def along(values, start, stop):
        positions = torch.arange(start, stop, dtype=torch.int64, device=device)
        return mix((values[..., None] + positions) & 0xFFFFFFFF)

    seed = torch.full((), 0x5EED, dtype=torch.int64, device=device)
    x = along(along(along(along(seed, 0, channels), frames.start, frames.stop), top, top + height), left, left + width)
    radius = (((x >> 8).float() + 1) / 2**24).log_().mul_(-2).sqrt_()
    return radius * ((mix(x + 0x9E37) >> 8).float() * (2 * math.pi / 2**24)).cos_()


class Attention(nn.Module):
    """Self-attention to neighbours: queries and keys normed per head and rotated by place."""

    def __init__(self, dim: int, window: tuple[int, int, int], head_dim: int, operations, **build):
        super().__init__()
        self.window, self.head_dim = window, head_dim
        self.qkv = operations.Linear(dim, 3 * dim, bias=True, **build)
        self.proj = operations.Linear(dim, dim, bias=True, **build)
        self.q_norm = operations.RMSNorm(head_dim, eps=EPS, **build)
        self.k_norm = operations.RMSNorm(head_dim, eps=EPS, **build)

    def forward(self, x: torch.Tensor, prepare, start: int, frames: slice) -> torch.Tensor:
        """x [B, F, H, W, C], whose first frame is number ``start`` of the clip; ``prepare`` norms a part of it. Returns the part ``frames``, projected."""
        B, n, H, W, C = x.shape
        q, k, v = (x.new_empty(B, n, H, W, C // self.head_dim, self.head_dim) for _ in range(3))
        rows, columns = (torch.arange(m, device=x.device) for m in (H, W))
        space = (
            rope_angles(rows, self.head_dim, 1)[:, None].expand(H, W, -1),
            rope_angles(columns, self.head_dim, 2).expand(H, W, -1),
        )
        for a, b in pieces(x):
            parts = (
                self.qkv(prepare(x[:, a:b])).unflatten(-1, (3, -1, self.head_dim)).unbind(-3)
            )  # (B, f, H, W, h, d) each
            time = rope_angles(torch.arange(start + a, start + b, device=x.device), self.head_dim, 0)
            angles = torch.cat(
                (time[:, None, None].expand(-1, H, W, -1), *(s.expand(b - a, -1, -1, -1) for s in space)), dim=-1
            )[..., None, :]
            cos, sin = angles.cos(), angles.sin()
            q[:, a:b] = rotate(self.q_norm(parts[0]) * self.head_dim**-0.5, cos, sin)
            k[:, a:b] = rotate(self.k_norm(parts[1]), cos, sin)
            v[:, a:b] = parts[2]
        out = neighborhood_attention(q, k, v, self.window, frames).flatten(-2)
        del q, k, v
        for a, b in pieces(out):
            out[:, a:b] = self.proj(out[:, a:b])
        return out


class SwiGLU(nn.Module):
    """w_down(silu(w_gate(x)) * w_up(x)); the inner width is four times the outer, rounded up to 16."""

    def __init__(self, dim: int, operations, **build):
        super().__init__()
        hidden = (4 * dim + 15) // 16 * 16
        self.w_gate = operations.Linear(dim, hidden, bias=False, **build)
        self.w_up = operations.Linear(dim, hidden, bias=False, **build)
        self.w_down = operations.Linear(hidden, dim, bias=False, **build)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w_down(F.silu(self.w_gate(x)).mul_(self.w_up(x)))


class Block(nn.Module):
    """x += attention(norm1(x)); x += mlp(norm2(x)). A stage that waits for the frames a window reaches."""

    def __init__(self, dim: int, window: tuple[int, int, int], head_dim: int, operations, **build):
        super().__init__()
        self.norm1 = operations.RMSNorm(dim, eps=EPS, **build)
        self.attn = Attention(dim, window, head_dim, operations, **build)
        self.norm2 = operations.RMSNorm(dim, eps=EPS, **build)
        self.mlp = SwiGLU(dim, operations, **build)
        self.dim = dim

    def frame_elements(self, height: int, width: int) -> int:
        return self.dim * height * width

    def forward(self, x: torch.Tensor, rolling, last: bool) -> torch.Tensor | None:
        y = self.step(x.permute(0, 2, 3, 4, 1), rolling, last, self.norm1, self.norm2)
        return None if y is None else y.permute(0, 4, 1, 2, 3)

    def step(self, x: torch.Tensor, rolling, last: bool, first_norm, second_norm) -> torch.Tensor | None:
        """The clip's next frames x [B, n, H, W, C] -> the frames that are now decided, or None."""
        reach = self.attn.window[0] // 2
        start, done = rolling.take((self, "at")) or (
            0,
            0,
        )  # of the frames that were kept: the first one's number, and how many are done
        kept = rolling.take(self)
        if kept is not None:
            x = torch.cat((kept, x), dim=1)
        count = x.shape[1]
        ready = count if last else count - reach if count >= self.attn.window[0] else done
        if ready <= done:
            rolling.keep(self, x)
            rolling.keep((self, "at"), (start, done))
            return None
        y = self.attn(x, first_norm, start, slice(done, ready)).add_(x[:, done:ready])
        if not last:
            behind = max(0, ready - reach)
            rolling.keep(self, x[:, behind:].clone())
            rolling.keep((self, "at"), (start + behind, ready - behind))
        del x, kept
        for a, b in pieces(y):
            y[:, a:b] += self.mlp(second_norm(y[:, a:b]))
        return y


class DiffusionBlock(Block):
    """A block that is told the context and, by scale and shift, the noise level. Channels: those of x, then those of the context."""

    def __init__(self, dim: int, window: tuple[int, int, int], head_dim: int, operations, **build):
        super().__init__(dim, window, head_dim, operations, **build)
        self.context_proj = operations.Linear(dim, dim, bias=True, **build)
        self.scale_shift_table = nn.Parameter(torch.empty(7, dim, **build), requires_grad=False)

    def forward(self, x: torch.Tensor, rolling, last: bool, modulation: torch.Tensor) -> torch.Tensor | None:
        """modulation: [7, C] of the noise level."""
        x, context = x.permute(0, 2, 3, 4, 1).split(self.dim, dim=-1)
        x = x + self.context_proj(context)
        waiting = rolling.take((self, "context"))
        if waiting is not None:
            context = torch.cat((waiting, context), dim=1)
        scale1, shift1, _, scale2, shift2, _, _ = modulation + self.scale_shift_table.to(x)

        def first_norm(part):
            return torch.addcmul(shift1, self.norm1(part), 1 + scale1)

        def second_norm(part):
            return torch.addcmul(shift2, self.norm2(part), 1 + scale2)

        y = self.step(x, rolling, last, first_norm, second_norm)
        n = 0 if y is None else y.shape[1]
        if n < context.shape[1]:
            rolling.keep((self, "context"), context[:, n:].clone())
        return None if y is None else torch.cat((y, context[:, :n]), dim=-1).permute(0, 4, 1, 2, 3)


class Upsample(nn.Module):
    """A linear layer whose channels become pixels; in time the first frame's copy is dropped, once."""

    def __init__(self, dim: int, stride: tuple[int, int, int], divisor: int, operations, **build):
        super().__init__()
        self.dim, self.stride = dim, stride
        self.proj = operations.Linear(dim, math.prod(stride) * dim // divisor, bias=True, **build)

    def frame_elements(self, height: int, width: int) -> int:
        return max(self.dim, self.proj.out_features) * height * width

    def forward(self, x: torch.Tensor, rolling, last: bool) -> torch.Tensor:
        x = x.permute(0, 2, 3, 4, 1)
        (B, n, H, W, _), (t, h, w) = x.shape, self.stride
        out = x.new_empty(B, n, t, H, h, W, w, self.proj.out_features // math.prod(self.stride))
        for a, b in pieces(x):
            out[:, a:b] = self.proj(x[:, a:b]).unflatten(-1, (-1, t, h, w)).permute(0, 1, 5, 2, 6, 3, 7, 4)
        out = out.flatten(5, 6).flatten(3, 4).flatten(1, 2)
        return (out[:, 1:] if t == 2 and rolling.first(self) else out).permute(0, 4, 1, 2, 3)


class _DropEnd:
    """Holds back the frames made from the copies behind the clip, and drops them at its end."""

    def __init__(self, frames: int, channels: int):
        self.frames, self.channels = frames, channels

    def frame_elements(self, height: int, width: int) -> int:
        return self.channels * height * width

    def __call__(self, x: torch.Tensor, rolling, last: bool) -> torch.Tensor | None:
        x = rolling.join(rolling.take("end"), x)
        n = x.shape[2] - self.frames
        if not last:
            rolling.keep("end", rolling.own(x[:, :, max(0, n) :]))
        return x[:, :, :n] if n > 0 else None


class DiffusionDecoder(nn.Module):
    """Un-normalised latents to pixels. ``noise``: as ``hashed_noise``, from which a test departs to compare with other code."""

    def __init__(self, config: DiffusionDecoderConfig, operations=nn, dtype=None, device=None):
        super().__init__()
        self.config, self.noise = config, hashed_noise
        build = {"dtype": dtype, "device": device}
        channels, windows, depths, head_dim = (
            config.stage_channels,
            config.stage_windows,
            config.stage_depths,
            config.head_dim,
        )
        self.conv_in = operations.Linear(config.latent_channels, channels[0], bias=True, **build)
        self.det_stages = nn.ModuleList(
            nn.ModuleList(Block(c, window, head_dim, operations, **build) for _ in range(depth))
            for c, window, depth in zip(channels[:-1], windows, depths)
        )
        self.upsamples = nn.ModuleList(
            Upsample(c, stride, divisor, operations, **build)
            for c, (stride, divisor) in zip(channels, config.upsamples)
        )
        patch, width = config.pixel_channels * config.patch_size**2, channels[-1]
        self.conv_in_x_t = operations.Linear(patch, width, bias=True, **build)
        self.t_embedder = nn.Module()
        embedding = config.embedding_width
        self.t_embedder.mlp = nn.Sequential(
            operations.Linear(TIME_EMBEDDING, embedding, **build),
            nn.SiLU(),
            operations.Linear(embedding, embedding, **build),
        )
        self.shared_adaln = nn.Module()
        self.shared_adaln.proj = operations.Linear(embedding, 7 * width, bias=True, **build)
        self.diff_blocks = nn.ModuleList(
            DiffusionBlock(width, windows[-1], head_dim, operations, **build) for _ in range(depths[-1])
        )
        self.norm_out = operations.RMSNorm(width, eps=EPS, **build)
        self.conv_out = operations.Linear(width, patch, bias=True, **build)

    def _modulation(self, like: torch.Tensor) -> torch.Tensor:
        """[7, C] for pure noise, the only noise level of the single step."""
        exponent = torch.arange(TIME_EMBEDDING // 2, dtype=torch.float32, device=like.device) * (
            -math.log(10_000.0) / (TIME_EMBEDDING // 2)
        )
        angles = self.config.timestep_scale * exponent.exp()
        embedded = self.t_embedder.mlp(torch.cat((angles.cos(), angles.sin()))[None].to(like.dtype))
        return self.shared_adaln.proj(F.silu(embedded)).view(7, -1)

    def _enter(self, x: torch.Tensor, rolling, last: bool) -> torch.Tensor:
        """Latents (B, C, n, H, W) into the first stage's channels."""
        return self.conv_in(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)

    def _begin(self, context: torch.Tensor, rolling, last: bool) -> torch.Tensor:
        """The context and the noise of its frames, in channels: the noise first."""
        c, first = self.config, rolling.take((self, "frame")) or 0
        B, _, n, H, W = context.shape
        rolling.keep((self, "frame"), first + n)
        (top, left), p = rolling.origin, c.patch_size
        noise = self.noise(range(first, first + n), top, left, H * p, W * p, c.pixel_channels, context.device)
        patches = (
            noise.unflatten(3, (W, p)).unflatten(2, (H, p)).permute(1, 2, 4, 0, 5, 3).flatten(3)
        )  # (n, H, W, c*w*h)
        x = self.conv_in_x_t(patches.to(context.dtype))[None].expand(B, -1, -1, -1, -1)
        return torch.cat((x, context.permute(0, 2, 3, 4, 1)), dim=-1).permute(0, 4, 1, 2, 3)

    def _finish(self, x: torch.Tensor, rolling, last: bool) -> torch.Tensor:
        """Pixels (B, 3, n, H, W)."""
        p = self.config.patch_size
        x = x.permute(0, 2, 3, 4, 1)[..., : self.config.stage_channels[-1]]
        x = self.conv_out(self.norm_out(x)).unflatten(-1, (-1, p, p))  # (B, n, H, W, c, w, h)
        return x.permute(0, 4, 1, 2, 6, 3, 5).flatten(5, 6).flatten(3, 4)

    def _stages(self, modulation: torch.Tensor) -> list:
        c = self.config
        stages = [_Step(self._enter, c.stage_channels[0])]
        for blocks, upsample in zip(self.det_stages, self.upsamples):
            stages += [*blocks, upsample]
        stages += [
            _DropEnd(c.trailing_frames * c.temporal_scale, c.stage_channels[-1]),
            _Step(self._begin, 2 * c.stage_channels[-1]),
        ]
        stages += [_Step(partial(block, modulation=modulation), block.dim) for block in self.diff_blocks]
        return [*stages, _Step(self._finish, c.stage_channels[-1])]

    def roll(self, latent: torch.Tensor, rolling, last: bool, split_bytes: int):
        """The clip's next latent frames (B, C, n, H, W); yields the pixels (B, 3, m, 32H, 32W) that are now decided."""
        if last:
            copies = latent[:, :, -1:].expand(-1, -1, self.config.trailing_frames, -1, -1)
            latent = torch.cat((latent, copies), dim=2)
        yield from flow(self._stages(self._modulation(latent)), latent, rolling, last, split_bytes)


class _Step:
    """A function of the decoder as a stage."""

    def __init__(self, function, channels: int):
        self.function, self.channels = function, channels

    def __call__(self, x: torch.Tensor, rolling, last: bool) -> torch.Tensor:
        return self.function(x, rolling, last)

    def frame_elements(self, height: int, width: int) -> int:
        return self.channels * height * width
