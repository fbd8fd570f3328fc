"""A Gemma-3 of three narrow layers with a letters-and-bytes vocabulary, as a GGUF: fast enough for tests under the host."""

import torch

from ltx2_gguf.quant import decode
from ltx2_gguf.quant.formats import FORMATS
from ltx2_gguf.quant.gguf.metadata import GGUFValue
from ltx2_gguf.quant.gguf.writer import GGUFWriter

WIDTH, FFN, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 64, 96, 2, 1, 32, 3
PIECES = ["<pad>", "<eos>", "<bos>", "<unk>", *[f"<0x{i:02X}>" for i in range(256)], *"abcdefghijklmnopqrstuvwxyz▁"]
TYPES = [3, 3, 3, 2, *[6] * 256, *[1] * 27]


def shapes():
    """llama.cpp's tensor names -> shapes."""
    result = {"token_embd.weight": (len(PIECES), WIDTH), "output_norm.weight": (WIDTH,)}
    for i in range(LAYERS):
        layer = {
            "attn_q": (HEADS * HEAD_DIM, WIDTH), "attn_k": (KV_HEADS * HEAD_DIM, WIDTH), "attn_v": (KV_HEADS * HEAD_DIM, WIDTH),
            "attn_output": (WIDTH, HEADS * HEAD_DIM), "attn_q_norm": (HEAD_DIM,), "attn_k_norm": (HEAD_DIM,), "attn_norm": (WIDTH,),
            "post_attention_norm": (WIDTH,), "ffn_norm": (WIDTH,), "post_ffw_norm": (WIDTH,), "ffn_gate": (FFN, WIDTH), "ffn_up": (FFN, WIDTH),
            "ffn_down": (WIDTH, FFN),
        }  # fmt: skip
        result |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
    return result


def write(path, fmt="Q8_0"):
    """Write the file; matrices in ``fmt``. Returns ``path``."""
    metadata = {
        "general.architecture": "gemma3",
        "gemma3.block_count": GGUFValue("uint32", LAYERS),
        "gemma3.embedding_length": GGUFValue("uint32", WIDTH),
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": PIECES,
        "tokenizer.ggml.scores": [-float(i) for i in range(len(PIECES))],
        "tokenizer.ggml.token_type": GGUFValue("array", TYPES, "int32"),
    }
    tensors = {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(i))
        for i, (name, shape) in enumerate(shapes().items())
    }
    kind = {name: fmt if value.ndim == 2 else "F32" for name, value in tensors.items()}
    with GGUFWriter(
        path, metadata, [(name, kind[name], tuple(value.shape)) for name, value in tensors.items()]
    ) as writer:
        for name, value in tensors.items():
            value = value * WIDTH**-0.5 if value.ndim == 2 else 1.0 + 0.3 * value
            writer.write(name, value if kind[name] == "F32" else decode.quantize(value, FORMATS[fmt]))
    return path


def write_vision(path, names="llama.cpp"):
    """Write a vision part for this Gemma as a GGUF in float32: 16 x 16 patches of 2 pixels, one layer, width 72; llama.cpp's names or the host's."""
    wide, inner = 72, 40
    tensors = {
        "v.patch_embd.weight": (wide, 3, 2, 2), "v.patch_embd.bias": (wide,), "v.position_embd.weight": (256, wide),
        "v.post_ln.weight": (wide,), "v.post_ln.bias": (wide,), "mm.input_projection.weight": (wide, WIDTH), "mm.soft_emb_norm.weight": (wide,),
        **{f"v.blk.0.{name}.{part}": (wide, wide) if part == "weight" and name.startswith("attn") else (wide,)
           for name in ("ln1", "ln2", "attn_q", "attn_k", "attn_v", "attn_out") for part in ("weight", "bias")},
        "v.blk.0.ffn_up.weight": (inner, wide), "v.blk.0.ffn_up.bias": (inner,), "v.blk.0.ffn_down.weight": (wide, inner), "v.blk.0.ffn_down.bias": (wide,),
    }  # fmt: skip
    if names == "host":
        from ltx2_gguf.ltx2_core.files.gemma import vision_names

        theirs = {stored: name.removeprefix("vision_tower.") for name, stored in vision_names(tensors).items()}
        tensors = {theirs[name]: shape for name, shape in tensors.items()}
    with GGUFWriter(
        path, {"general.architecture": "clip"}, [(name, "F32", shape) for name, shape in tensors.items()]
    ) as writer:
        for number, (name, shape) in enumerate(tensors.items()):
            value = torch.randn(shape, generator=torch.Generator().manual_seed(number))
            writer.write(name, 1 + 0.1 * value if "norm" in name or ".ln" in name or "post_ln" in name else value * 0.3)
    return path
