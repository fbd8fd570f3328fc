"""Tiny models under the host's classes, built in the test process from synthetic tensors, for the ``test_host_*`` files."""

import torch

from ltx2_gguf.ltx2_core.convert import synthetic
from ltx2_gguf.ltx2_core.files import structure
from ltx2_gguf.ltx2_core.transformer.config import config_from_shapes
from ltx2_gguf.quant import decode, tensor
from ltx2_gguf.quant.formats import FORMATS

FPS = 24.0
SMALL = {"heads": 2, "head_dim": 64, "connector_heads": 2, "connector_head_dim": 64, "registers": 128}


def dit_tensors(geometry, seed=0, audio=False):
    """Canonical name -> float32 tensor of the DiT and its connector (with audio: of both)."""
    shapes = structure.checkpoint_shapes(geometry, audio=audio, vae=False, projection=False)
    shapes = {synthetic.bare_name(n): s for n, s in shapes.items() if not n.startswith(("audio_vae.", "vocoder."))}
    return {name: synthetic.tensor(name, shape, seed) for name, shape in shapes.items()}


def packable(name, value, fmt):
    """Whether the converter would store this tensor in blocks: a 2-D linear weight whose rows are whole blocks."""
    return (
        value.ndim == 2
        and name.endswith(".weight")
        and "norm" not in name
        and value.shape[1] % FORMATS[fmt].block_size == 0
    )


def packed_tensors(tensors, fmt, dtype=torch.float32):
    """Linear weights in ``fmt``, everything else as it is. Call inside inference mode."""
    if fmt == "F32":
        return dict(tensors)
    return {
        name: tensor.pack(decode.quantize(value, FORMATS[fmt]), fmt, tuple(value.shape), dtype)
        if packable(name, value, fmt)
        else value
        for name, value in tensors.items()
    }


def dequantised(tensors):
    """The same weights, dense."""
    return {name: tensor.unpack(value) for name, value in tensors.items()}


def network(tensors, metadata):
    """An ``LTX2Host`` with these tensors, an ``LTX2AVHost`` when audio is among them."""
    from ltx2_gguf.nodes.host import model as host_model
    from ltx2_gguf.nodes.host.ops import GGUFOps

    audio = "audio_patchify_proj.weight" in tensors
    config = config_from_shapes({name: tuple(value.shape) for name, value in tensors.items()}, metadata, audio)
    net = (host_model.LTX2AVHost if audio else host_model.LTX2Host)(
        config, operations=GGUFOps, dtype=torch.float32, device="meta", attention=host_model.attention
    )
    missing, unexpected = net.load_state_dict(tensors, strict=False, assign=True)
    assert not missing and not unexpected, (missing[:3], unexpected[:3])
    return net.requires_grad_(False)


def model(fmt="Q8_0", version="2.3", seed=0, dense=False, audio=False, **sizes):
    """A model patcher of the static kind around a two-layer model. ``dense``: the same quantised values as dense weights; audio: a joint one."""
    from ltx2_gguf.nodes.host import model as host_model

    geometry = structure.Geometry.small(version, **sizes)
    with torch.inference_mode():
        tensors = packed_tensors(dit_tensors(geometry, seed, audio), fmt)
        if dense:
            tensors = dequantised(tensors)
        return host_model.wrap(network(tensors, synthetic.metadata(geometry)), torch.float32)


def conditioning(patcher, tokens=7, seed=5, **values):
    """A conditioning as CLIPTextEncode would make it: text features of the right width, and the flag that says so."""
    config = patcher.model.diffusion_model.config
    width = config.connector.inner_dim + (config.audio.inner_dim if config.audio and config.version == "2.3" else 0)
    features = torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(seed))
    return [[features, {"pooled_output": None, "unprocessed_ltxav_embeds": True, "frame_rate": FPS, **values}]]


def latent(frames=2, height=2, width=3, batch=1, **entries):
    return {"samples": torch.zeros(batch, 128, frames, height, width), **entries}


def joint_latent(frames=2, height=2, width=3, length=5, video_mask=None, audio_mask=None, audio=None):
    """The host's pair of latents; masks [1, 1, F, H, W] and [1, 8, L, 16] or None."""
    from comfy.nested_tensor import NestedTensor

    video = torch.zeros(1, 128, frames, height, width)
    audio = torch.zeros(1, 8, length, 16) if audio is None else audio
    entries = {"samples": NestedTensor((video, audio))}
    if video_mask is not None or audio_mask is not None:
        masks = [
            torch.ones(1, 1, frames, height, width) if video_mask is None else video_mask,
            torch.ones_like(audio) if audio_mask is None else audio_mask,
        ]
        entries["noise_mask"] = NestedTensor(masks)
    return entries


def ksample(patcher, latent_dict, positive=None, negative=None, steps=2, cfg=2.0, seed=3):
    """The host's KSampler node; returns the samples."""
    import nodes

    with torch.inference_mode():
        out = nodes.common_ksampler(
            patcher,
            seed,
            steps,
            cfg,
            "euler",
            "simple",
            positive or conditioning(patcher),
            negative or conditioning(patcher, seed=6),
            latent_dict,
        )
    return out[0]["samples"]


def error(a, b):
    """Relative error ||a - b|| / ||b||."""
    return float((a.float() - b.float()).norm() / b.float().norm())


def tiny(fmt="Q8_0", **options):
    return model(fmt, **{**({} if options.get("version") == "2.0" else SMALL), **options})


def lora(
    style="diffusion_model",
    rank=4,
    seed=11,
    layers=("transformer_blocks.0.attn1.to_q", "transformer_blocks.1.ff.net.2", "transformer_blocks.1.attn2.to_out.0"),
    width=128,
):
    """A LoRA file's tensors in one of the spellings found in the wild."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in layers:
        rows, columns = width, 4 * width if name.endswith("ff.net.2") else width
        up, down = (
            torch.randn(rows, rank, generator=generator) * 0.3,
            torch.randn(rank, columns, generator=generator) * 0.3,
        )
        if style == "diffusion_model":
            tensors |= {f"diffusion_model.{name}.lora_A.weight": down, f"diffusion_model.{name}.lora_B.weight": up}
        elif style == "bare":
            tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        elif style == "kohya":
            key = "lora_unet_" + name.replace(".", "_")
            tensors |= {
                f"{key}.lora_down.weight": down,
                f"{key}.lora_up.weight": up,
                f"{key}.alpha": torch.tensor(float(rank)),
            }
    return tensors


def with_lora(patcher, tensors, strength=1.0):
    import comfy.sd

    with torch.inference_mode():
        return comfy.sd.load_lora_for_models(patcher, None, tensors, strength, 0.0)[0]


def stored_bytes(patcher):
    return {
        name: value._qdata.clone() if hasattr(value, "_qdata") else value.clone()
        for name, value in patcher.model.state_dict().items()
    }


def load(patcher, megabytes=None):
    """Load onto "the device": all of it, or as much as ``megabytes`` hold (0: nothing stays)."""
    with torch.inference_mode():
        patcher.patch_model(
            patcher.load_device, lowvram_model_memory=0 if megabytes is None else max(1, int(megabytes * 2**20))
        )


def velocity(patcher, seed=2):
    """One forward pass of the network through the host's model, x [1, 128, 2, 2, 3]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 128, 2, 2, 3, generator=generator)
    features = torch.randn(1, 5, patcher.model.diffusion_model.config.connector.inner_dim, generator=generator)
    with torch.inference_mode():
        context = patcher.model.diffusion_model.preprocess_text_embeds(features, unprocessed=True)
        return patcher.model.diffusion_model([x], (torch.tensor([0.7]),) * 2, context, frame_rate=24.0)
