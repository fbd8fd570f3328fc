"""Waveform to latent and latent to waveform: autoencoder, mel front end and vocoder as one module, always float32.

A latent frame lasts 1/25 s; the first holds one mel frame, every later one four, so L latent frames decode to (4L - 3)/100 s.
"""

import torch
from torch import nn

from .autoencoder import STEREO, AudioAutoencoder
from .config import LATENT_BINS, LATENT_CHANNELS, LATENTS_PER_SECOND, SAMPLE_RATE
from .mel import log_mel, resample
from .vocoder import BandwidthVocoder, Vocoder


class AudioError(ValueError):
    """A waveform or an audio latent that cannot be used."""

    __module__ = "ltx2_gguf"  # shown before the name of the error


def audio_latent_frames(frames, frame_rate):
    """L: latent frames for a clip of ``frames`` pictures at ``frame_rate`` per second, rounded half to even."""
    return round(frames / frame_rate * LATENTS_PER_SECOND)


def audio_latent_shape(frames, frame_rate, batch=1):
    """(B, 8, L, 16)."""
    return batch, LATENT_CHANNELS, audio_latent_frames(frames, frame_rate), LATENT_BINS


class AudioVAE(nn.Module):
    """config: AudioVAEConfig; parts that it lacks are None."""

    def __init__(self, config, operations=nn):
        super().__init__()
        self.config = config
        has_autoencoder = config.has_encoder or config.has_decoder
        self.audio_vae = AudioAutoencoder(config, operations=operations) if has_autoencoder else None
        self.vocoder = None
        if config.vocoder is not None:
            self.vocoder = (
                BandwidthVocoder(config, operations) if config.bandwidth else Vocoder(config.vocoder, operations)
            )

    @property
    def output_rate(self):
        """Samples per second that :meth:`decode` gives."""
        return self.config.output_rate

    def encode(self, waveform, rate):
        """Waveform [B, 1 or 2, N] at ``rate`` samples per second, any real dtype -> normalised latent [B, 8, L, 16] float32.

        Mono is doubled. Raises AudioError for another number of channels, an empty or non-finite waveform, or a file without encoder.
        """
        if self.audio_vae is None or self.audio_vae.encoder is None:
            raise AudioError("The audio VAE at hand has no encoder; give a file that holds 'audio_vae.encoder'.")
        if waveform.ndim != 3 or waveform.shape[1] not in (1, STEREO) or waveform.shape[2] == 0:
            raise AudioError(
                f"The sound has the shape {tuple(waveform.shape)}; mono or stereo with at least one sample is needed."
            )
        if not bool(torch.isfinite(waveform).all()):
            raise AudioError("The sound holds samples that are not numbers; convert the file again.")
        # The front end is small, and Metal has no complex numbers: it runs on the CPU.
        mel = log_mel(resample(waveform.cpu().float().expand(-1, STEREO, -1), int(rate), SAMPLE_RATE))
        statistics = self.audio_vae.per_channel_statistics
        return statistics.normalise(self.audio_vae.encoder(mel.to(statistics.get_buffer("mean-of-means").device)))

    def decode(self, latent):
        """Normalised latent [B, 8, L, 16] -> waveform [B, 2, N] float32 in [-1, 1] at :attr:`output_rate`.

        Raises AudioError for a latent that holds anything but numbers, or without decoder or vocoder.
        """
        if self.audio_vae is None or self.audio_vae.decoder is None or self.vocoder is None:
            raise AudioError(
                "Decoding sound needs the audio VAE's decoder and the vocoder; give the file that holds what is missing."
            )
        if not bool(torch.isfinite(latent).all()):
            raise AudioError("The audio latent holds values that are not numbers, so there is no sound to decode.")
        mel = self.audio_vae.decoder(self.audio_vae.per_channel_statistics.denormalise(latent.float()))
        return self.vocoder(mel)
