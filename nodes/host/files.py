"""Weights the host can read straight from the file (dynamic VRAM).

The host's dynamic VRAM stages weights from disk to pinned memory to the GPU when it knows where in which file a
tensor's bytes are. The tensors of a loaded model are views of this pack's own memory map; here they are replaced by
views of the host's map of the same file, with the file position noted on the storage, as the host's safetensors loader
does. Nothing is read or copied.

Source: ComfyUI 0.30.0 ``comfy/utils.py`` (``load_safetensors``), ``comfy/memory_management.py``
(``read_tensor_file_slice_into``).
"""

import ctypes
import dataclasses
import logging
import os
import threading
import warnings

import comfy.memory_management
import torch

from ...quant import tensor as packed
from ...quant.tensor import QuantizedTensor
from .internals import FILE_SLICES

logger = logging.getLogger(__name__)

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class FileMap:
    """A whole file in the host's map. The host may drop its pages under memory pressure and read them again later."""

    def __init__(self, path):
        import comfy_aimdo.model_mmap  # here: a host without dynamic VRAM may lack it

        self.map = comfy_aimdo.model_mmap.ModelMMAP(str(path))
        self.handle = self.map.get_file_handle()
        self.lock = threading.Lock()
        self.size = os.path.getsize(path)
        self.view = memoryview((ctypes.c_uint8 * self.size).from_address(self.map.get()))

    def tensor(self, offset, nbytes):
        """uint8 [nbytes] over the map, in a storage of its own that knows its place in the file and keeps the map
        alive."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            flat = torch.frombuffer(self.view[offset : offset + nbytes], dtype=torch.uint8)
        storage = flat.untyped_storage()
        storage._comfy_tensor_file_slice = comfy.memory_management.TensorFileSlice(
            self.handle, self.lock, offset, nbytes
        )
        storage._comfy_tensor_mmap_refs = (self.map, self.view)
        return flat


def place(weights, name):
    """(path, offset, bytes) of a tensor of an open WeightFile, None when its kind does not tell."""
    if hasattr(weights, "files"):  # sharded: the file that holds it
        weights = weights._of(name)
    if weights.kind == "gguf":
        info = weights.gguf.info(name)
        return weights.path, info.offset, info.nbytes
    entry = weights._file.entries[name]
    return weights.path, entry.offset, entry.nbytes


def read_as_needed(module, sources):
    """:func:`back_by_files` where the host is as it was tested."""
    if FILE_SLICES:
        with FILE_SLICES.guard():
            back_by_files(module, sources)


def back_by_files(module, sources):
    """Replace parameters of ``module`` that are the file's bytes unchanged by views of the host's map; returns how
    many.

    sources: parameter name -> (WeightFile, name there), as ``load_dit`` leaves it in ``weight_sources``. Converted
    tensors (another dtype, decoded tables) stay as they are. Call inside inference mode.
    """
    maps, replaced = {}, 0
    for name, parameter in list(module.named_parameters()):
        source = sources.get(name)
        if source is None:
            continue
        path, offset, nbytes = place(*source)
        raw = parameter._qdata if packed.is_packed(parameter) else parameter.data
        unchanged = packed.is_packed(parameter) or PLAIN.get(source[0].format(source[1])) == parameter.dtype
        if not unchanged or raw.nbytes != nbytes or offset % raw.element_size():
            continue
        if path not in maps:
            maps[path] = FileMap(path)
        mapped = maps[path].tensor(offset, nbytes).view(raw.dtype).view(raw.shape)
        if packed.is_packed(parameter):
            mapped = QuantizedTensor(mapped, parameter._layout_cls, dataclasses.replace(parameter._params))
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, torch.nn.Parameter(mapped, requires_grad=False))
        replaced += 1
    logger.debug("%d of %d weights are read from %d files as needed", replaced, len(sources), len(maps))
    return replaced
