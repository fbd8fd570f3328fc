"""The Metal source, compiled as C++ and compared with the reference. (No Mac is needed, and none was used.)"""

import ctypes
import os
import shutil
import subprocess

import numpy as np
import pytest
import torch

from block_bytes import assert_same_bits, finite_blocks, random_bytes
from ltx2_gguf.quant import backends, decode, formats
from ltx2_gguf.quant.kernels import metal

QUANTIZED = list(formats.QUANTIZED)

# What C++ lacks of Metal's language.
SHIM = r"""
#include <cstdint>
#include <cstring>
#include <cstddef>
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
#define device
#define constant static const
#define kernel static
struct half {
    ushort bits;
    explicit operator float() const {
        uint sign = uint(bits & 0x8000) << 16, exponent = (bits >> 10) & 31, mantissa = bits & 1023, word;
        if (exponent == 31) word = sign | 0x7f800000u | (mantissa << 13);
        else if (exponent) word = sign | ((exponent + 112) << 23) | (mantissa << 13);
        else { float f = float(mantissa) / 16777216.0f; std::memcpy(&word, &f, 4); word |= sign; }
        float f; std::memcpy(&f, &word, 4); return f;
    }
};
template <class T> T as_type(ushort bits) { return T{bits}; }
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        if os.environ.get("CI"):
            pytest.fail("the Metal source is checked with a C++ compiler, and there is none")
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("metal")
    (folder / "metal_stdlib").write_text("namespace metal {}\n")
    code = SHIM
    for fmt in formats.QUANTIZED.values():
        code += metal.source(fmt, torch.float32)
        name = metal.kernel_name(fmt, torch.float32)
        code += f'extern "C" void run_{fmt.name}(float* out, const uchar* raw, uint n) {{ for (uint id = 0; id < n; ++id) {name}(out, raw, id); }}\n'
    (folder / "blocks.cpp").write_text(code)
    library = folder / "blocks.so"
    options = ["-std=c++17", "-O1", "-ffp-contract=off", "-w", "-shared", "-fPIC", f"-I{folder}"]
    command = [compiler, *options, str(folder / "blocks.cpp"), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


def run(compiled, name, raw):
    fmt = formats.FORMATS[name]
    n_weights = raw.size // fmt.type_size * fmt.block_size
    out = np.full(n_weights + 1, 12345, dtype=np.float32)
    function = getattr(compiled, f"run_{name}")
    function(
        out.ctypes.data_as(ctypes.c_void_p),
        raw.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_uint(n_weights // metal.WEIGHTS_PER_THREAD),
    )
    assert out[-1] == 12345
    return out[:-1].reshape(raw.shape[0], -1)


@pytest.mark.parametrize("name", QUANTIZED)
def test_the_shader_source_decodes_random_bytes_exactly_like_the_reference(compiled, name):
    raw = random_bytes(formats.FORMATS[name], rows=64, blocks=8, seed=9)
    assert_same_bits(run(compiled, name, raw), decode.dequantize(torch.from_numpy(raw), name).numpy())


@pytest.mark.parametrize("name", QUANTIZED)
def test_the_shader_source_decodes_ordinary_weights_exactly_like_the_reference(compiled, name):
    raw = finite_blocks(name)
    assert_same_bits(run(compiled, name, raw), decode.dequantize(torch.from_numpy(raw), name).numpy())


def test_there_is_a_shader_for_every_format_and_output_type():
    assert set(metal._BODIES) == set(formats.QUANTIZED)
    for fmt in formats.QUANTIZED.values():
        for dtype, name in metal.METAL_TYPES.items():
            text = metal.source(fmt, dtype)
            assert f"kernel void dequantize_{fmt.name}_{name}(device {name}* out" in text
            assert not {"BODY", "FORMAT", "BLOCK_SIZE", "TYPE_SIZE", "LEVELS"} & set(
                text.replace("(", " ").replace(")", " ").split()
            )


class FakeKernel:
    """Stands in for a compiled shader: decodes with torch, or does what a broken one might."""

    def __init__(self, fmt, dtype, behaviour):
        self.fmt, self.dtype, self.behaviour = fmt, dtype, behaviour

    def __call__(self, out, raw, threads):
        assert threads * metal.WEIGHTS_PER_THREAD == out.numel()
        if self.behaviour == "raises":
            raise RuntimeError("no such type: bfloat")
        out.copy_(decode.dequantize(raw, self.fmt, self.dtype))
        if self.behaviour == "differs":
            out[0, 0] += 1


@pytest.mark.parametrize("behaviour, trusted", [("agrees", True), ("raises", False), ("differs", False)])
def test_a_shader_is_trusted_only_after_it_agreed_with_torch(monkeypatch, caplog, behaviour, trusted):
    import mps_mode

    monkeypatch.setattr(metal, "_kernel", lambda fmt, dtype: FakeKernel(fmt, dtype, behaviour))
    monkeypatch.setattr(metal, "unavailable", lambda: "")
    metal.usable.cache_clear()
    backends.forget_choices()
    try:
        with torch.inference_mode(), mps_mode.emulated():
            assert metal.usable("Q4_0") is trusted
            assert backends.pick("dequantize", "mps", formats.FORMATS["Q4_0"]).name == ("metal" if trusted else "torch")
            assert bool(caplog.records) is not trusted
    finally:
        metal.usable.cache_clear()
        backends.forget_choices()


def test_without_a_mac_the_table_says_so():
    if not torch.backends.mps.is_available():
        assert "metal: needs a Mac with Metal" in backends.explain("dequantize", "mps", formats.FORMATS["Q4_0"])
