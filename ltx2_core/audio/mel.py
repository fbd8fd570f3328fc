"""Waveform to log-mel spectrogram, and resampling by a windowed sinc.

Tables are made once on the CPU in double precision and rounded, so the numbers are the same on every device.

Source: torchaudio ``functional.resample`` and ``transforms.MelSpectrogram`` (formulas), with the settings of ltx-core
``model/audio_vae/ops.py``; the mel scale is Slaney's (Auditory Toolbox, 1998).
"""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F

from .config import HOP_LENGTH, MEL_BINS, SAMPLE_RATE

FFT_LENGTH = 1024
LOG_FLOOR = 1e-5
SINC_ZEROS, ROLLOFF = (
    6,
    0.99,
)  # zero crossings of the resampling filter on each side; its cut-off as a share of the lower Nyquist rate


@functools.lru_cache(maxsize=4)
def _mel_filters():
    """[64, 513] float32: triangles of equal area over 0 … 8000 Hz."""
    linear_top = 15.0  # 1000 Hz on Slaney's scale: linear below, logarithmic above
    step = math.log(6.4) / 27.0

    def to_hz(mel):
        return np.where(mel < linear_top, mel * 200.0 / 3.0, 1000.0 * np.exp(step * (mel - linear_top)))

    top = linear_top + math.log(SAMPLE_RATE / 2 / 1000.0) / step
    edges = to_hz(np.linspace(0.0, top, MEL_BINS + 2))  # (66,)
    frequencies = np.linspace(0.0, SAMPLE_RATE / 2, FFT_LENGTH // 2 + 1)
    slopes = edges[:, None] - frequencies  # (66, 513)
    widths = np.diff(edges)[:, None]
    triangles = np.maximum(0.0, np.minimum(-slopes[:-2] / widths[:-1], slopes[2:] / widths[1:]))
    area = 2.0 / (edges[2:] - edges[:-2])
    return torch.from_numpy((triangles * area[:, None]).astype(np.float32))


def log_mel(waveform):
    """Waveform [B, C, N] at 16 kHz, float32 -> log-mel magnitudes [B, C, 1 + N//160, 64]."""
    batch, channels, samples = waveform.shape
    window = torch.hann_window(FFT_LENGTH, device=waveform.device)
    pad = FFT_LENGTH // 2
    flat = F.pad(waveform.flatten(0, 1), (pad, pad), mode="reflect" if samples > pad else "constant")
    spectrum = torch.stft(
        flat, FFT_LENGTH, HOP_LENGTH, FFT_LENGTH, window, center=False, return_complex=True
    ).abs()  # (B*C, 513, m)
    mel = _mel_filters().to(waveform.device) @ spectrum
    return mel.clamp(min=LOG_FLOOR).log().transpose(1, 2).unflatten(0, (batch, channels))


@functools.lru_cache(maxsize=8)
def _sinc_filters(old, new):
    """(filters [new, 1, taps] float32, samples of context on each side) for a rate of new/old in lowest terms."""
    cutoff = min(old, new) * ROLLOFF
    width = math.ceil(SINC_ZEROS * old / cutoff)
    taps = np.arange(-width, width + old) / old
    time = np.clip((taps - np.arange(new)[:, None] / new) * cutoff, -SINC_ZEROS, SINC_ZEROS)
    filters = np.sinc(time) * np.cos(time * math.pi / SINC_ZEROS / 2) ** 2 * (cutoff / old)
    return torch.from_numpy(filters.astype(np.float32)).unsqueeze(1), width


def resample(waveform, old_rate, new_rate):
    """Waveform [..., N] at old_rate samples per second -> [..., ceil(N * new_rate / old_rate)]."""
    if old_rate == new_rate:
        return waveform
    divisor = math.gcd(old_rate, new_rate)
    old, new = old_rate // divisor, new_rate // divisor
    filters, width = _sinc_filters(old, new)
    samples = waveform.shape[-1]
    flat = F.pad(waveform.reshape(-1, 1, samples), (width, width + old))
    out = F.conv1d(flat, filters.to(waveform), stride=old)  # (rows, new, N/old)
    return out.transpose(1, 2).flatten(1)[:, : -(-samples * new // old)].reshape(*waveform.shape[:-1], -1)
