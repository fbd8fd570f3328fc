"""The host's own audio VAE, fed from any file that holds it.

The host recognises the audio VAE with its vocoder by names and builds it from the ``config`` metadata, which GGUF and split files often lack. Here the
parts are found by content, in one file or two, and the metadata is made from their shapes. Everything else is the host's.

Source: ComfyUI 0.30.0 ``comfy/sd.py`` (``VAE``), ``comfy/ldm/lightricks/vae/audio_vae.py``.
"""

import json

import comfy.sd

from ...ltx2_core.audio.config import AudioVAEConfigError
from ...ltx2_core.loading.audio import describe_audio_vae


def load_audio_vae(sources):
    """The host's VAE object for the audio VAE in these files (paths or open files). Raises AudioVAEConfigError or WeightFileError."""
    found, config, listed = describe_audio_vae(sources, everything=True)
    tensors = {name: file.load(stored).reshape(file.shape(stored)) for name, (file, stored) in found.items()}
    vae = comfy.sd.VAE(sd=tensors, metadata={"config": json.dumps(config.to_metadata())})
    if getattr(vae.first_stage_model, "vocoder", None) is None:
        raise AudioVAEConfigError(f"This ComfyUI does not know the audio VAE in {listed}; update ComfyUI.")
    return vae
