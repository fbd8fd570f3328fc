"""Train the toy's video VAE: the pack's own modules at reduced width, on clips painted while it trains.

Reconstruction only (L1, squared error and edges, the first frame counting more); the latent means are kept near zero mean and unit
variance per channel and get noise before they are decoded, so that the decoder is forgiving and the DiT has a smooth target. At the
end the per-channel statistics are measured and written into the VAE's buffers.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    __package__ = "toy"

from ltx2_gguf.ltx2_core.vae.config import VAEBlock, VAEConfig, res
from ltx2_gguf.ltx2_core.vae.model import VideoVAE

from . import files, pack, resume, scenes, vision  # noqa: F401
from .codec import decode, decode_means, encode, encode_means
from .optim import Clock, Trainer, learning_rate


def vae_config(base: int = 32) -> VAEConfig:
    """LTX-2.3's order of blocks (space, time, all, all down; all, all, time, space up) with fewer layers and a flatter width."""
    down = (res(1), VAEBlock("space", multiplier=1), res(1), VAEBlock("time", multiplier=1), res(2), VAEBlock("all", multiplier=1), res(2),
            VAEBlock("all", multiplier=2), res(1))  # fmt: skip
    up = (res(1), VAEBlock("all", multiplier=2), res(3), VAEBlock("all", multiplier=1), res(2), VAEBlock("time", multiplier=1), res(2),
          VAEBlock("space", multiplier=1), res(2))  # fmt: skip
    return VAEConfig(encoder_blocks=down, decoder_blocks=up, encoder_base_channels=base, decoder_base_channels=base)


class FastConv3d(nn.Conv3d):
    """nn.Conv3d with a choice of ways to compute it; ``way`` is chosen once by measuring (``choose_convolution``).

    "frames" stacks the three frames under the kernel as channels of one 2-D convolution, which cuDNN does fast at any width.
    """

    way = "plain"

    def forward(self, x):
        if self.way == "plain":
            return super().forward(x)
        if self.way == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last_3d)
            weight = self.weight.contiguous(memory_format=torch.channels_last_3d)
            return self._conv_forward(x, weight, self.bias)
        B, C, T, H, W = x.shape
        x = x.permute(0, 2, 3, 4, 1)  # B T H W C
        x = (
            torch.cat((x[:, : T - 2], x[:, 1 : T - 1], x[:, 2:]), dim=-1).flatten(0, 1).permute(0, 3, 1, 2)
        )  # (B*t, 3C, H, W), channels last
        weight = self.weight.permute(0, 2, 1, 3, 4).flatten(1, 2)  # (O, 3C, 3, 3)
        y = F.conv2d(x, weight, self.bias, padding=self.padding[1:])
        return y.permute(0, 2, 3, 1).unflatten(0, (B, T - 2)).permute(0, 4, 1, 2, 3)  # (B, O, t, H, W)


class Operations:
    Conv3d = FastConv3d


def build_vae(device, config=None) -> VideoVAE:
    vae = VideoVAE(config or vae_config(), operations=Operations, device=device)
    for name, p in vae.named_parameters():
        if p.ndim > 1:
            gain = 0.3 if ".conv2." in name else 1.0  # residual branches start small
            nn.init.normal_(p, std=gain * (1.0 / (p.shape[1] * 27)) ** 0.5)
        else:
            nn.init.zeros_(p)
    return vae


def training_scenes(rng, n: int) -> scenes.Scenes:
    """Random scenes; a fifth have colours outside the eight named ones, so that the VAE does not only know a palette."""
    drawn = scenes.sample(rng, *scenes.random_things(rng, n, 0.35))
    odd = rng.random(n) < 0.2
    drawn.rgb[odd] = rng.uniform(0, 255, drawn.rgb[odd].shape)
    drawn.back[odd] = np.clip(rng.uniform(0, 255, (odd.sum(), 1, 3)) + rng.uniform(-14, 14, (odd.sum(), 2, 3)), 0, 255)
    return drawn


def reconstruction_loss(y, x):
    """y, x [B, 3, T, H, W]. The first frame, alone in its latent frame and what image-to-video starts from, counts fourfold."""
    y, x = y.float(), x.float()
    weight = torch.ones(x.shape[2], device=x.device)
    weight[0] = 4.0
    weight = (weight / weight.mean()).view(1, 1, -1, 1, 1)
    gap = y - x
    value = (gap.abs() * weight).mean() + 3 * (gap.square() * weight).mean()
    edges = (gap[..., 1:, :] - gap[..., :-1, :]).abs().mean() + (gap[..., 1:] - gap[..., :-1]).abs().mean()
    return value + 0.5 * edges


def vae_loss(vae, x, noise_scale: float = 0.25):
    """(loss, reconstruction's mean squared error) for clips x [B, 3, T, H, W]."""
    means = encode_means(vae, x)
    flat = means.float().transpose(0, 1).flatten(1)  # (C, B*F*H*W)
    tidy = flat.mean(1).square().mean() + (flat.var(1) - 1).square().mean()
    amount = torch.rand(len(x), 1, 1, 1, 1, device=x.device) * noise_scale
    y = decode_means(vae, means + (amount * torch.randn_like(means, dtype=torch.float32)).to(means.dtype))
    return reconstruction_loss(y, x) + 0.02 * tidy, (y.detach().float() - x.float()).square().mean()


def _painter(pool, rng, batch, device, dtype):
    def paint():
        rows = rng.integers(0, len(pool), batch)
        return scenes.render_torch(pool[rows], device).to(dtype)

    return paint


def choose_convolution(vae, paint, log) -> None:
    """Time a few steps of each way to convolve on this device and keep the fastest."""
    if next(vae.parameters()).device.type != "cuda":
        FastConv3d.way = "plain"
        return
    times = {}
    for way in ("frames", "channels_last", "plain"):
        FastConv3d.way = way
        try:
            start = time.monotonic()
            for i in range(5):
                if i == 2:
                    torch.cuda.synchronize()
                    start = time.monotonic()
                vae_loss(vae, paint())[0].backward()
            torch.cuda.synchronize()
            times[way] = (time.monotonic() - start) / 3
        except RuntimeError as error:
            log(f"  {way}: {str(error)[:200]}")
        vae.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
    FastConv3d.way = min(times, key=times.get)
    log(f"convolution: {', '.join(f'{w} {t * 1e3:.0f} ms' for w, t in times.items())} per step -> {FastConv3d.way}")


def choose_encoding(vae, pixels, log) -> None:
    """Time the encoder on clips [B, 3, T, H, W] with each way to convolve and keep the fastest; "plain" where nothing else works."""
    times = {}
    for way in ("plain", "frames", "channels_last"):
        FastConv3d.way = way
        try:
            for _ in range(3):
                start = time.monotonic()
                encode(vae, pixels)
                torch.cuda.synchronize()
            times[way] = time.monotonic() - start
        except RuntimeError as error:
            log(f"  {way}: {str(error)[:200]}")
    FastConv3d.way = min(times, key=times.get) if times else "plain"
    log(
        f"encoding: {', '.join(f'{w} {t * 1e3:.0f} ms' for w, t in times.items())} for {len(pixels)} clips -> {FastConv3d.way}"
    )


def measure_statistics(vae, pool, device, dtype, batch=64, clips=2048) -> None:
    """Write mean and standard deviation of the latents into the buffers."""
    total = square = count = 0
    for start in range(0, min(clips, len(pool)), batch):
        latent = encode_means(vae, scenes.render_torch(pool[start : start + batch], device).to(dtype)).float()
        flat = latent.transpose(0, 1).flatten(1).double()
        total, square, count = total + flat.sum(1), square + flat.square().sum(1), count + flat.shape[1]
    mean = total / count
    std = (square / count - mean**2).clamp(min=1e-6).sqrt()
    vae.per_channel_statistics.get_buffer("mean-of-means").copy_(mean)
    vae.per_channel_statistics.get_buffer("std-of-means").copy_(std)


def quality(vae, pool, device, dtype, clips=256, batch=32) -> dict:
    """PSNR of round trips, in dB: over clips, over first frames (as part of a clip and as a still), and the worst clip."""
    errors, first = [], []
    for start in range(0, min(clips, len(pool)), batch):
        x = scenes.render_torch(pool[start : start + batch], device)
        y = decode(vae, encode(vae, x.to(dtype)), dtype).clamp(-1, 1)
        gap = ((y - x) / 2).square()
        errors.append(gap.mean((1, 3, 4)))
        first.append(gap[:, :, 0].mean((1, 2, 3)))
    errors, first = torch.cat(errors), torch.cat(first)
    decibel = lambda e: -10 * torch.log10(e)
    return {
        "psnr": float(decibel(errors.mean(1)).mean()), "psnr_worst_clip": float(decibel(errors.mean(1)).min()),
        "psnr_first_frame": float(decibel(first).mean()), "psnr_first_frame_worst": float(decibel(first).min()),
    }  # fmt: skip


def save(out: Path, vae, trainer, curves) -> None:
    tensors = trainer.averaged()
    tensors |= {f"per_channel_statistics.{n}": b for n, b in vae.per_channel_statistics.named_buffers()}
    files.save_weights(out, "vae", tensors)
    files.save_json(out / "vae_curves.json", curves)


def save_loaded(out: Path, vae) -> None:
    """Write a VAE that was not trained further."""
    files.save_weights(out, "vae", vae.state_dict())


def load(folder: Path, device, dtype=torch.float32, config=None) -> VideoVAE | None:
    """The VAE a run left in ``folder``, or of an exported file; None when there is none."""
    tensors = resume.vae_weights(folder)
    if tensors is None:
        return None
    vae = build_vae(device, config)
    vae.load_state_dict(tensors)
    return cast(vae, dtype)


def cast(vae, dtype) -> VideoVAE:
    """Weights to ``dtype``; the statistics stay float32."""
    for p in vae.parameters():
        p.data = p.data.to(dtype)
    return vae


def train(
    out: Path,
    minutes: float,
    device,
    batch=64,
    source: Path | None = None,
    pool_size=40000,
    seed=0,
    log=print,
    rate=2.5e-3,
    config=None,
) -> VideoVAE:
    """Train for ``minutes``; returns the averaged VAE, in the device's training dtype, with its statistics set."""
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    pool, held = (
        training_scenes(rng, pool_size),
        scenes.sample(np.random.default_rng(99), *scenes.random_things(np.random.default_rng(99), min(256, pool_size))),
    )
    vae = (load(source, device, config=config) if source else None) or build_vae(device, config)
    vae.per_channel_statistics.get_buffer("mean-of-means").zero_()
    vae.per_channel_statistics.get_buffer("std-of-means").fill_(1.0)
    trainer = Trainer(vae.named_parameters(), muon=lambda name, p: p.ndim > 1, average=0.998, weight_decay=0.0)
    cast(vae, dtype)
    paint = _painter(pool, rng, batch, device, dtype)
    choose_convolution(vae, paint, log)

    clock, curves, step = Clock(minutes), [], 0
    window = []
    while clock.progress() < 1:
        now = learning_rate(clock.progress(), rate)
        loss, error = vae_loss(vae, paint())
        loss.backward()
        trainer.step(now, now)
        step += 1
        window.append((loss.detach(), error))
        if step % 50 == 0 or clock.progress() >= 1:
            loss, error = (float(torch.stack(column).mean()) for column in zip(*window))
            window = []
            curves.append(
                {
                    "step": step,
                    "seconds": round(clock.seconds(), 1),
                    "loss": loss,
                    "psnr": float(-10 * np.log10(max(error, 1e-12) / 4)),
                    "rate": now,
                }
            )
            if step % 250 == 0 or clock.progress() >= 1:
                log(f"vae {clock.seconds():6.1f} s  step {step}  loss {loss:.4f}  psnr {curves[-1]['psnr']:.2f} dB")
    trainer.use_average(True)
    vae.requires_grad_(False)
    measure_statistics(vae, pool, device, dtype, batch)
    report = quality(vae, held, device, dtype)
    log(f"vae held-out: {report}")
    save(
        out,
        vae,
        trainer,
        {"curve": curves, "quality": report, "steps": step, "batch": batch, "convolution": FastConv3d.way},
    )
    x = scenes.render_torch(held[:8], device)
    a, b = files.to_uint8(x), files.to_uint8(decode(vae, encode(vae, x.to(dtype)), dtype))
    files.contact_sheet(out / "vae_sheet.png", [[*clip[i, [0, 8, 12, 24]]] for i in range(len(a)) for clip in (a, b)])
    return vae


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--pool", type=int, default=40000)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.backends.cudnn.benchmark = True
    train(args.out, args.minutes, args.device, args.batch, args.resume, args.pool)
