"""Decoding blocks on Apple GPUs: one Metal function per format, compiled by torch when it is first needed.

Each thread decodes four neighbouring weights (they share a group in every format). The arithmetic is that of ``decode.py``, in the
same order and without fused multiply-add, so float32 results are the same bits.

No Mac was at hand when this was written. The tests compile this very source as C++ and compare it with the reference on random
bytes; what Metal itself makes of it is checked on the user's machine: ``usable`` decodes a few blocks of a format with the shader and
with torch before the shader is trusted, and a format that does not compile or differs stays with torch, with a warning in the log.

Sources: ggml ``src/ggml-quants.c`` (layouts); Metal Shading Language specification; ``torch.mps.compile_shader``.
"""

import logging
from functools import cache

import torch

from .. import decode
from ..formats import FORMATS, IQ4_LEVELS, BlockFormat

log = logging.getLogger(__name__)

METAL_TYPES = {torch.float32: "float", torch.float16: "half", torch.bfloat16: "bfloat"}
WEIGHTS_PER_THREAD = 4

_COMMON = """
#ifndef GGML_BLOCKS
#define GGML_BLOCKS
#include <metal_stdlib>
using namespace metal;
#pragma METAL fp contract(off)

// the float16 at p
inline float half_at(device const uchar* p) {
    return float(as_type<half>(ushort(p[0] | (p[1] << 8))));
}

// nibble i of a run of 2 * n: all low halves of n bytes, then all high halves
inline int nibble(device const uchar* qs, uint i, uint n) {
    return i < n ? qs[i] & 15 : qs[i - n] >> 4;
}

// bit i of a little-endian bit string
inline int bit_at(device const uchar* bits, uint i) {
    return (bits[i / 8] >> (i % 8)) & 1;
}

// six-bit scale g of the twelve bytes of Q4_K and Q5_K; at = 0 for scales, 4 for minima
inline int k_scale(device const uchar* s, uint g, uint at) {
    if (g < 4) return s[at + g] & 63;
    int low = at == 0 ? s[4 + g] & 15 : s[4 + g] >> 4;
    return low | ((s[at + g - 4] >> 2) & 48);
}

constant int iq4_levels[16] = {LEVELS};
#endif
""".replace("LEVELS", ", ".join(map(str, IQ4_LEVELS)))

# Body of: float decode(device const uchar* b, uint i), weight i of the block at b.
_BODIES = {
    "Q4_0": "return half_at(b) * float(nibble(b + 2, i, 16) - 8);",
    "Q4_1": "return half_at(b) * float(nibble(b + 4, i, 16)) + half_at(b + 2);",
    "Q5_0": "return half_at(b) * float((nibble(b + 6, i, 16) | (bit_at(b + 2, i) << 4)) - 16);",
    "Q5_1": "return half_at(b) * float(nibble(b + 8, i, 16) | (bit_at(b + 4, i) << 4)) + half_at(b + 2);",
    "Q8_0": "return float(int8_t(b[2 + i])) * half_at(b);",
    "Q2_K": """
        int s = b[i / 16];
        int q = (b[16 + i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2)) & 3;
        return (half_at(b + 80) * float(s & 15)) * float(q) - half_at(b + 82) * float(s >> 4);""",
    "Q3_K": """
        uint g = i / 16;
        int s = nibble(b + 96, g, 8) | (((b[104 + g % 4] >> (g / 4 * 2)) & 3) << 4);
        int q = (b[32 + i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2)) & 3;
        int unset = 1 - ((b[i % 32] >> (i / 32)) & 1);
        return (half_at(b + 108) * float(s - 32)) * float(q - 4 * unset);""",
    "Q4_K": """
        uint g = i / 32;
        int q = nibble(b + 16 + g / 2 * 32, i % 64, 32);
        return (half_at(b) * float(k_scale(b + 4, g, 0))) * float(q) - half_at(b + 2) * float(k_scale(b + 4, g, 4));""",
    "Q5_K": """
        uint g = i / 32;
        int q = nibble(b + 48 + g / 2 * 32, i % 64, 32) | (((b[16 + i % 32] >> g) & 1) << 4);
        return (half_at(b) * float(k_scale(b + 4, g, 0))) * float(q) - half_at(b + 2) * float(k_scale(b + 4, g, 4));""",
    "Q6_K": """
        int q = nibble(b + i / 128 * 64, i % 128, 64) | (((b[128 + i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2)) & 3) << 4);
        return (half_at(b + 208) * float(int8_t(b[192 + i / 16]))) * float(q - 32);""",
    "IQ4_NL": "return half_at(b) * float(iq4_levels[nibble(b + 2, i, 16)]);",
    "IQ4_XS": """
        uint g = i / 32;
        int s = ((b[4 + g / 2] >> (g % 2 * 4)) & 15) | (((b[2 + g / 4] >> (g % 4 * 2)) & 3) << 4);
        return (half_at(b) * float(s - 32)) * float(iq4_levels[nibble(b + 8 + g * 16, i % 32, 16)]);""",
}

_KERNEL = """
inline float decode_FORMAT(device const uchar* b, uint i) {
    BODY
}

kernel void dequantize_FORMAT_TYPE(device TYPE* out, device const uchar* raw, uint id [[thread_position_in_grid]]) {
    uint first = id % (BLOCK_SIZE / 4) * 4;
    size_t block = id / (BLOCK_SIZE / 4);
    device const uchar* b = raw + block * TYPE_SIZE;
    device TYPE* to = out + block * BLOCK_SIZE + first;
    for (uint j = 0; j < 4; ++j) to[j] = TYPE(decode_FORMAT(b, first + j));
}
"""


def kernel_name(fmt: BlockFormat, dtype: torch.dtype) -> str:
    return f"dequantize_{fmt.name}_{METAL_TYPES[dtype]}"


def source(fmt: BlockFormat, dtype: torch.dtype) -> str:
    """Metal source of the kernel for one format and output type; sources of several kernels may be joined."""
    text = (
        _KERNEL.replace("BODY", _BODIES[fmt.name].strip())
        .replace("BLOCK_SIZE", str(fmt.block_size))
        .replace("TYPE_SIZE", str(fmt.type_size))
    )
    return _COMMON + text.replace("FORMAT", fmt.name).replace("TYPE", METAL_TYPES[dtype])


@cache
def _kernel(fmt: BlockFormat, dtype: torch.dtype):
    return getattr(torch.mps.compile_shader(source(fmt, dtype)), kernel_name(fmt, dtype))


def unavailable() -> str:
    """Why no shader can run here; empty when one can."""
    if not torch.backends.mps.is_available():
        return "needs a Mac with Metal"
    if not hasattr(torch.mps, "compile_shader"):
        return f"needs torch.mps.compile_shader, which torch {torch.__version__} lacks"
    return ""


@cache
def usable(fmt_name: str) -> bool:
    """Whether the shader of a format compiles on this machine and decodes sample blocks as torch does."""
    fmt = FORMATS[fmt_name]
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (4, 8 * fmt.type_size), dtype=torch.uint8, generator=generator)
    for dtype in METAL_TYPES:
        expected = decode.dequantize(raw, fmt, dtype)
        try:
            ours = dequantize(raw.to("mps"), fmt, torch.empty(expected.shape, dtype=dtype, device="mps")).cpu()
        except (RuntimeError, SyntaxError) as error:
            log.warning("the Metal shader for %s does not run here, so torch decodes instead (%s)", fmt_name, error)
            return False
        if not torch.allclose(ours.float(), expected.float(), rtol=0, atol=0, equal_nan=True):
            log.warning("the Metal shader for %s gives other numbers than torch, so torch decodes instead", fmt_name)
            return False
    return True


def dequantize(raw: torch.Tensor, fmt: BlockFormat, out: torch.Tensor) -> torch.Tensor:
    """Packed rows ``uint8 [rows, row_bytes]`` -> ``out [rows, cols]`` (float32, float16 or bfloat16), both on "mps". Returns ``out``."""
    if not out.is_contiguous():
        return out.copy_(dequantize(raw, fmt, torch.empty(out.shape, dtype=out.dtype, device=out.device)))
    _kernel(fmt, out.dtype)(out, raw.contiguous(), threads=out.numel() // WEIGHTS_PER_THREAD)
    return out
