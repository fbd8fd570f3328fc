"""Sound of a headless run: the soundtrack read from a file, and the audio VAE before and after sampling.

PyAV is imported on first use. The audio VAE runs in float32 on a CUDA device or on the CPU (Metal's long 1-D convolutions are limited).

Source: Lightricks ``ltx-pipelines`` (given soundtracks keep their own waveform in the result).
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from .audio.model import AudioError, audio_latent_shape
from .loading.audio import load_audio_vae
from .sampling import joint

VAE_BYTES = 3 << 30  # weights and activations of the audio VAE with a 20 second clip, in float32


@dataclass(frozen=True)
class Soundtrack:
    """waveform [2, N] float32 in [-1, 1], ``rate`` samples per second."""

    waveform: torch.Tensor
    rate: int

    def cut(self, seconds: float) -> "Soundtrack":
        """The first seconds of it."""
        return Soundtrack(self.waveform[:, : round(seconds * self.rate)], self.rate)


def read_soundtrack(path: str | Path) -> Soundtrack:
    """The first audio stream of any file that PyAV reads, as stereo. Raises AudioError."""
    import av

    path = Path(path)
    if not path.is_file():
        raise AudioError(f"The sound {path} does not exist.")
    try:
        with av.open(str(path)) as container:
            if not container.streams.audio:
                raise AudioError(f"{path.name} holds no sound.")
            stream = container.streams.audio[0]
            rate = stream.rate
            resampler = av.AudioResampler(format="fltp", layout="stereo", rate=rate)
            frames = [
                torch.from_numpy(part.to_ndarray())
                for frame in container.decode(stream)
                for part in resampler.resample(frame)
            ]
            frames += [torch.from_numpy(part.to_ndarray()) for part in resampler.resample(None)]
    except (av.error.FFmpegError, OSError) as error:
        raise AudioError(f"{path.name} cannot be read as sound ({error}).") from error
    if not frames:
        raise AudioError(f"{path.name} holds no sound.")
    return Soundtrack(torch.cat(frames, dim=1), rate)


def _device(device):
    return device if torch.device(device).type == "cuda" else torch.device("cpu")


def condition(sources, soundtrack: Soundtrack | None, frames: int, fps: float, device) -> joint.AudioConditioned:
    """The audio latent to sample from: empty, or the given soundtrack, which stays and which the picture follows."""
    shape = audio_latent_shape(frames, fps)
    if soundtrack is None:
        return joint.empty_audio(shape)
    vae = load_audio_vae(sources, _device(device), decode=False)
    seconds = frames / fps
    return joint.given_audio(
        vae.encode(soundtrack.cut(seconds).waveform[None].to(_device(device)), soundtrack.rate).cpu(), shape
    )


def decode(sources, latent: torch.Tensor, device) -> Soundtrack:
    """Audio latent [1, 8, L, 16] -> Soundtrack."""
    vae = load_audio_vae(sources, _device(device), encode=False)
    return Soundtrack(vae.decode(latent.to(_device(device)))[0].cpu(), vae.output_rate)
