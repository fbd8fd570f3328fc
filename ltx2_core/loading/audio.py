"""The audio VAE with its vocoder, from whichever files hold them."""

import torch

from ..audio.config import AudioVAEConfigError, audio_vae_config, audio_vae_names
from ..audio.model import AudioVAE
from ..files.errors import WeightFileError
from ..files.opened import open_models
from .assign import assign

_UNUSED = (".inverse_basis", "resampler.filter")  # stored beside what is used


def find_audio_vae(files, everything=False):
    """{canonical name: (file, name in it)} over several WeightFiles; the first file that holds a half of it counts for that half.

    everything: also what lies there without being used by the network.
    """
    found = {}
    for file in files:
        names = audio_vae_names(file.names(), file.shape)
        for half in ("audio_vae.", "vocoder."):
            if not any(name.startswith(half) for name in found):
                found |= {
                    name: (file, stored)
                    for name, stored in names.items()
                    if name.startswith(half) and (everything or not name.endswith(_UNUSED))
                }
    return found


def describe_audio_vae(sources, encode=True, decode=True, everything=False):
    """({canonical name: (WeightFile, name in it)}, AudioVAEConfig, names of the files) of the audio VAE in one or more files.

    sources: paths, WeightFiles or ModelFiles. encode, decode: what it is needed for; the rest is left out. Raises AudioVAEConfigError when
    nothing or another model's audio VAE is found, or a part that is needed is missing.
    """
    files = [file.weights for file in open_models(sources)]
    found = find_audio_vae(files, everything)
    unwanted = tuple(
        part
        for part, wanted in (("audio_vae.encoder.", encode), ("audio_vae.decoder.", decode), ("vocoder.", decode))
        if not wanted
    )
    found = {name: place for name, place in found.items() if not name.startswith(unwanted)}
    listed = ", ".join(file.path.name for file in files)
    try:
        config = audio_vae_config({name: tuple(file.shape(stored)) for name, (file, stored) in found.items()})
    except AudioVAEConfigError as error:
        raise AudioVAEConfigError(f"{listed}: {error}") from error
    lacking = [
        what
        for what, needed, present in (
            ("encoder (audio_vae.encoder)", encode, config.has_encoder), ("decoder (audio_vae.decoder)", decode, config.has_decoder),
            ("vocoder (vocoder)", decode, config.vocoder is not None),
        )
        if needed and not present
    ]  # fmt: skip
    if lacking:
        raise AudioVAEConfigError(
            f"{listed}: the audio VAE's {' and '.join(lacking)} is missing; give the file that holds it too."
        )
    return found, config, listed


def load_audio_vae(sources, device=None, encode=True, decode=True):
    """AudioVAE from one or more files, in float32.

    Autoencoder and vocoder may lie in one file (full checkpoint, split, GGUF) or in two. encode, decode: what it is needed for; what is not
    needed is not read. Raises AudioVAEConfigError as :func:`describe_audio_vae`, WeightFileError for damaged files.
    """
    found, config, listed = describe_audio_vae(sources, encode, decode)
    with torch.device("meta"):
        vae = AudioVAE(config)
    wanted = vae.state_dict()
    tensors = {}
    for name, (file, stored) in found.items():
        tensor = file.load(stored, torch.float32)
        if name in wanted and tensor.shape != wanted[name].shape and tensor.numel() == wanted[name].numel():
            tensor = tensor.reshape(wanted[name].shape)  # convolutions that lie flattened in a GGUF
        tensors[name] = tensor.to(device=device)
    try:
        assign(
            vae, tensors, lambda missing, _: "The file is incomplete." if missing else "The file is another model's."
        )
    except WeightFileError as error:
        raise WeightFileError(f"{listed}: {error}") from error
    return vae.eval()
