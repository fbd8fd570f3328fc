"""The model files that the memory checks run on: LTX-2.3's real geometry with random bytes, written in seconds on a GPU."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import torch

from common import load_pack, random_raw
from models import random_value

SMALL_LAYERS = 6


def geometry(which, tiny=False):
    """``model``: the released 22B video transformer with its connector; ``a``, ``b``: six of its blocks."""
    load_pack()
    from ltx2_gguf.ltx2_core.files.structure import Geometry

    if tiny:
        return Geometry.small("2.3", num_layers=4 if which == "model" else 2, heads=4, head_dim=64, connector_layers=1)
    return (
        Geometry(version="2.3")
        if which == "model"
        else Geometry(version="2.3", num_layers=SMALL_LAYERS, connector_layers=2)
    )


def write_dit(path, shape_of, device, fmt="Q4_0"):
    """A GGUF as the converter would write it; matrices of one shape share their random bytes."""
    from ltx2_gguf.ltx2_core.convert import plan, synthetic
    from ltx2_gguf.ltx2_core.files import structure
    from ltx2_gguf.quant.formats import QUANTIZED
    from ltx2_gguf.quant.gguf.writer import GGUFWriter

    shapes = {
        synthetic.bare_name(name): shape
        for name, shape in structure.checkpoint_shapes(shape_of, vae=False, projection=False).items()
    }
    formats = {name: plan.format_for(name, shape, fmt.lower())[0] or "F32" for name, shape in shapes.items()}
    torch.manual_seed(0)
    made = {}
    metadata = {"general.architecture": "ltxv", **synthetic.metadata(shape_of)}
    with GGUFWriter(path, metadata, [(name, formats[name], shape) for name, shape in shapes.items()]) as writer:
        for name, shape in shapes.items():
            if formats[name] in QUANTIZED:
                key = (formats[name], shape)
                if key not in made:
                    made[key] = random_raw(formats[name], *shape, device).cpu()
                writer.write(name, made[key])
            else:
                writer.write(name, random_value(name, shape, "cpu", torch.float32))
    return Path(path).stat().st_size


def write_vae(path, shape_of, device):
    """The video VAE as safetensors in bfloat16, of values that keep activations at the size trained ones have."""
    from ltx2_gguf.ltx2_core.convert import synthetic
    from ltx2_gguf.ltx2_core.files import structure

    tensors = {}
    for name, shape in structure.vae_shapes(shape_of).items():
        mean, std = synthetic._mean_std(name, shape)
        tensors[name] = torch.randn(shape, device=device).mul_(std).add_(mean).to(torch.bfloat16).cpu()
    synthetic.save_safetensors(path, tensors, synthetic.metadata(shape_of))
    return Path(path).stat().st_size


FILES = ("model.gguf", "a.gguf", "b.gguf", "vae.safetensors")
NEEDED = {
    "modes": FILES[:2],
    "headless": FILES[:1],
    "prompts": FILES[1:],
    "vae": FILES[3:],
    "oom": FILES[1:2],
    "lora": (),
    "small": FILES[:1],
}  # by task


def write_all(folder, device, tiny=False, tasks=tuple(NEEDED)):
    """The files that these tasks need, beside each other. Returns {name: bytes}."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {name: geometry(name.split(".")[0] if name.endswith(".gguf") else "model", tiny) for name in FILES}

    def write(name):
        return (write_dit if name.endswith(".gguf") else write_vae)(folder / name, shapes[name], device)

    names = [name for name in FILES if any(name in NEEDED[task] for task in tasks)]
    # Not forced onto the disk: the files live as long as the run.
    with mock.patch.object(os, "fsync"), ThreadPoolExecutor(len(names) or 1) as threads:
        return dict(zip(names, threads.map(write, names)))
