"""Models at real geometry with random weights made on the device: our DiT (packed or dense) and the host's."""

import os
import sys

import torch

from common import ROOT, WEIGHT_STD, load_pack, random_raw
from eager import EagerLinear


def dit_config(layers=48, heads=32, head_dim=128, channels=128):
    """LTX-2.3's geometry, or a smaller one. No connector: it does not run in a denoise step."""
    load_pack()
    from ltx2_gguf.ltx2_core.transformer.config import LTX2Config

    width = heads * head_dim
    return LTX2Config(
        version="2.3", num_layers=layers, num_attention_heads=heads, attention_head_dim=head_dim, in_channels=channels, out_channels=channels,
        cross_attention_dim=width, caption_channels=3840, cross_attention_adaln=True, apply_gated_attention=True,
        caption_proj_before_connector=True, ff_dim=4 * width,
    )  # fmt: skip


def random_value(name, shape, device, dtype):
    """A random dense tensor of plausible size for a parameter of this name."""
    value = torch.empty(shape, device=device, dtype=dtype).normal_()
    if "norm" in name:
        return value.mul_(0.1).add_(1.0)
    return value.mul_(0.3 if "scale_shift_table" in name else WEIGHT_STD)


def _set(module, name, value):
    *path, leaf = name.split(".")
    for part in path:
        module = getattr(module, part)
    setattr(module, leaf, torch.nn.Parameter(value, requires_grad=False))


def our_dit(config, fmt_name, device, dtype=torch.bfloat16):
    """LTX2Model whose linear layers are packed as the converter would ("Q4_0", …), or all dense ("BF16"). Call in inference mode."""
    load_pack()
    from ltx2_gguf.ltx2_core.transformer.model import LTX2Model
    from ltx2_gguf.quant import tensor

    model = LTX2Model(config, dtype=dtype, device="meta")
    for name, parameter in list(model.named_parameters()):
        shape = tuple(parameter.shape)
        chosen = _format_of(name, shape, fmt_name)
        if chosen is not None:
            value = tensor.pack(random_raw(chosen, *shape, device), chosen, shape, dtype)
        else:
            value = random_value(name, shape, device, dtype)
        _set(model, name, value)
    return model.eval().requires_grad_(False)


def packed_formats(config, fmt_name):
    """name -> format of every weight that :func:`our_dit` packs."""
    load_pack()
    from ltx2_gguf.ltx2_core.transformer.model import LTX2Model

    shapes = ((name, tuple(p.shape)) for name, p in LTX2Model(config, device="meta").named_parameters())
    chosen = {name: _format_of(name, shape, fmt_name) for name, shape in shapes}
    return {name: fmt for name, fmt in chosen.items() if fmt is not None}


def _format_of(name, shape, fmt_name):
    """The format in which the converter would pack this weight, or None where it stays dense."""
    from ltx2_gguf.ltx2_core.convert.plan import TARGETS, format_for

    if fmt_name == "BF16" or fmt_name.lower() not in TARGETS or len(shape) != 2:
        return None
    chosen = format_for(name, shape, fmt_name.lower())[0]
    return chosen if chosen in (fmt_name, "Q8_0", "Q5_0", "Q5_1") else None


def host_available():
    return bool(os.environ.get("COMFYUI_PATH"))


def import_host():
    """Import the host's modules, on its GPU where there is one."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    import hostenv

    argv = sys.argv
    if torch.cuda.is_available() and "comfy.options" not in sys.modules:
        # hostenv parses ["x", "--cpu"]; here the host must see the GPU.
        sys.path.insert(0, str(hostenv.host_path()))
        sys.argv = ["x"]
        try:
            import comfy.options

            comfy.options.enable_args_parsing()
            import comfy.cli_args
        finally:
            sys.argv = argv
    hostenv.import_host()


def host_dit(config, device, dtype=torch.bfloat16):
    """The host's LTXAVModel; its sound layers stay without memory (a video-only run skips them). Call in inference mode."""
    import_host()
    import comfy.ldm.lightricks.av_model as av
    import comfy.ops

    c = config
    model = av.LTXAVModel(
        in_channels=c.in_channels, audio_in_channels=c.in_channels, cross_attention_dim=c.cross_attention_dim, audio_cross_attention_dim=2048,
        attention_head_dim=c.attention_head_dim, audio_attention_head_dim=64, num_attention_heads=c.num_attention_heads,
        audio_num_attention_heads=c.num_attention_heads, caption_channels=c.caption_channels, num_layers=c.num_layers, causal_temporal_positioning=True,
        use_middle_indices_grid=True, apply_gated_attention=True, cross_attention_adaln=True, caption_proj_before_connector=True,
        caption_projection_first_linear=False, rope_type="split", frequencies_precision="float64", connector_attention_head_dim=64,
        connector_num_attention_heads=2, connector_num_layers=1, connector_apply_gated_attention=True, audio_connector_attention_head_dim=64,
        audio_connector_num_attention_heads=2, dtype=dtype, device="meta", operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    for name, parameter in list(model.named_parameters()):
        sound = name.startswith("transformer_blocks.") and any(part in name for part in ("audio", "a2v"))
        if not sound:
            _set(model, name, random_value(name, tuple(parameter.shape), device, dtype))
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:
            *path, leaf = name.split(".")
            owner = model
            for part in path:
                owner = getattr(owner, part)
            setattr(owner, leaf, torch.zeros(buffer.shape, dtype=buffer.dtype, device=device))
    model.eval().requires_grad_(False)
    model.dtype = dtype
    model.num_audio_channels, model.audio_frequency_bins = 1, c.in_channels
    return model


def make_eager(model, packed, device, layer=EagerLinear):
    """Replace the layers named in ``packed`` (name of weight -> format) by ones that decode at each call: ``layer(raw, format, bias)``. In place."""
    from ltx2_gguf.quant.formats import FORMATS

    for name, fmt_name in packed.items():
        *path, child, _ = name.split(".")
        owner = model
        for part in path:
            owner = getattr(owner, part)
        old = getattr(owner, child)
        if hasattr(old, "raw"):
            shape, bias = (old.raw.shape[0], old.raw.shape[1] // old.fmt.type_size * old.fmt.block_size), old.bias
            raw = old.raw if old.fmt.name == fmt_name else None
        else:
            shape, bias, raw = tuple(old.weight.shape), old.bias, None
        setattr(owner, child, None)
        setattr(
            owner, child, layer(random_raw(fmt_name, *shape, device) if raw is None else raw, FORMATS[fmt_name], bias)
        )
    return model


def host_step(model, latent, sigma, context, frame_rate):
    """One forward of the host's model on video alone."""
    audio = torch.zeros(*context.shape[:2], model.audio_inner_dim, dtype=context.dtype, device=context.device)
    return model(
        [latent.clone()],
        (sigma, sigma),
        torch.cat((context, audio), dim=-1),
        frame_rate=frame_rate,
        transformer_options={},
    )
