"""Load the video VAE from whatever file holds it.

The convolutions that a GGUF stores flattened ([O, I, 27]) get their shape back, quantised ones are made dense.
"""

import torch
from torch import nn

from ..files.errors import WeightFileError
from ..files.opened import ModelFile, open_models
from ..vae import streaming
from ..vae.config import VAEConfigError, vae_config_from_shapes, vae_names
from ..vae.model import VideoVAE
from .assign import Tensors, assign
from .identify import identify

STATISTICS = "per_channel_statistics."
UNUSED = ("decoder.type_emb",)  # in the diffusion decoder's file, read by nobody


def load_vae(sources, operations=nn, dtype=None, device=None, model_class=VideoVAE) -> VideoVAE:
    """The video VAE from one or more files (path, WeightFile or ModelFile), in whichever of them its tensors are, in eval mode.

    Names may have a ``vae.`` prefix. dtype None: float32 if stored so, else bfloat16. device None: weights stay views of the memory map where
    nothing had to be cast; on CUDA they are laid out channels last. ``vae.weight_sources`` maps each parameter's name to (WeightFile, name there).
    Raises VAEConfigError for other models' VAEs, WeightFileError for damaged or incomplete files.
    """
    files = open_models(sources)
    file, names = _vae_source(files)
    weights = file.weights
    shapes = {name: _conv_shape(shape) for name, shape in file.shapes(names).items()}
    try:
        config = vae_config_from_shapes(shapes, file.metadata)
    except VAEConfigError as error:
        raise VAEConfigError(f"{file.name}: {error}") from error
    if dtype is None:  # one for all: files mix them (biases in float32 beside smaller weights)
        dtype = torch.float32 if all(weights.format(stored) == "F32" for stored in names.values()) else torch.bfloat16

    with torch.device("meta"):
        vae = model_class(config, operations=operations, dtype=dtype)
    wanted = vae.state_dict()
    # Older files carry statistics that nothing uses.
    where = {
        name: (weights, stored)
        for name, stored in names.items()
        if name in wanted or not name.startswith((STATISTICS, *UNUSED))
    }
    layout = torch.preserve_format if device is None else streaming.memory_format(device)
    layout = torch.preserve_format if layout is torch.contiguous_format else layout

    def load(weights, name, stored):
        tensor = weights.load(stored, torch.float32 if name.startswith(STATISTICS) else dtype).reshape(shapes[name])
        return tensor.to(device=device, memory_format=layout if tensor.ndim == 5 else torch.preserve_format)

    try:
        assign(vae, Tensors(where, load, shapes=shapes), _reason)
    except WeightFileError as error:
        raise WeightFileError(f"{file.name}: {error}") from error
    vae.weight_sources = where
    if operations is nn:
        vae.compute_dtype = dtype
    return vae.eval()


def _vae_source(files: list[ModelFile]) -> tuple[ModelFile, dict[str, str]]:
    """The first file with a video VAE, and {name: name in the file}. Raises VAEConfigError with the right name of what was given instead."""
    for file in files:
        names = vae_names(file.weights.names())
        if names:
            return file, names
    listed = ", ".join(f"{file.name} ({identify(file).title})" for file in files)
    raise VAEConfigError(
        f"{listed}: no video VAE in here; choose a file that has one, for example LTX23_video_vae_bf16.safetensors."
    )


def _reason(missing, unexpected):
    return "The file is incomplete or another model's." if missing else "The file is another model's."


def _conv_shape(shape):
    """[O, I, 27] -> [O, I, 3, 3, 3]; other shapes unchanged."""
    return (*shape[:2], 3, 3, 3) if len(shape) == 3 and shape[2] == 27 else tuple(shape)
