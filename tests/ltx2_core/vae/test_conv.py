"""The VAE's convolution kernel (in Triton's interpreter when there is no GPU) against torch's convolution in float64, and where it is used."""

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")

from ltx2_gguf.ltx2_core.vae import blocks, conv as vae_conv, streaming, tiling  # noqa: E402
from ltx2_gguf.ltx2_core.vae.config import LTX2_0_VAE, LTX2_3_VAE, reduced  # noqa: E402
from ltx2_gguf.ltx2_core.vae.model import VideoVAE  # noqa: E402
from ltx2_gguf.quant.kernels import triton_launch  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter multiplies no bfloat16
CHANNELS_LAST = torch.channels_last_3d
ON_GPU = pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter's products are numpy's, which add in an order of their own")
TILES = ((64, 32, 2, 4), (32, 64, 2, 4), (128, 32, 2, 4))

try:
    from ltx2_gguf.ltx2_core.vae import triton_conv
except ImportError:  # Triton before 3.4 has no descriptors
    pytest.skip("needs tensor descriptors (Triton 3.4)", allow_module_level=True)
if DEVICE == "cuda" and torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("the kernel is for Hopper", allow_module_level=True)


def operands(channels, n_out, frames, height, width, batch=1, dtype=DTYPE):
    generator = torch.Generator().manual_seed(channels + n_out)
    x = torch.randn(batch, channels, frames, height, width, generator=generator)
    weight = torch.randn(n_out, channels, 3, 3, 3, generator=generator) * (27 * channels) ** -0.5
    bias = torch.randn(n_out, generator=generator)
    return [t.to(DEVICE, dtype).contiguous(memory_format=CHANNELS_LAST if t.ndim == 5 else torch.contiguous_format) for t in (x, weight, bias)]


def expected(x, weight, bias, pad):
    return F.conv3d(x.double(), weight.double(), bias.double(), padding=(0, pad, pad))


def error(a, b):
    return float((a.double() - b).norm() / b.norm())


@pytest.mark.parametrize("channels, n_out", [(8, 48), (64, 64), (80, 40), (128, 96)])
@pytest.mark.parametrize("size, pad", [((3, 4, 4), 1), ((5, 5, 7), 1), ((4, 6, 9), 0)])
def test_it_equals_torchs_convolution(channels, n_out, size, pad):
    x, weight, bias = operands(channels, n_out, *size, batch=2)
    y = triton_conv.conv3d(x, weight, bias, pad, TILES[0])
    reference = expected(x, weight, bias, pad)
    assert y.shape == reference.shape and y.is_contiguous(memory_format=CHANNELS_LAST)
    assert error(y, reference) < 2e-3  # one rounding to 16 bits


def pieces(x):
    for start, stop in ((0, 7), (0, 1), (2, 3), (1, 6)):
        yield start, stop, x[:, :, start : stop + 2].contiguous(memory_format=CHANNELS_LAST)


@ON_GPU
@pytest.mark.parametrize("channels, n_out, height, width", [(128, 128, 32, 48), (512, 512, 22, 40), (256, 48, 17, 23), (1024, 1024, 16, 24)])
def test_a_frame_has_the_same_bits_in_every_piece_and_by_every_tile(channels, n_out, height, width):
    x, weight, bias = operands(channels, n_out, 9, height, width)
    whole = triton_conv.conv3d(x, weight, bias, 1)
    for tile in (triton_conv.LARGE, triton_conv.SMALL, triton_conv.NARROW):
        for start, stop, piece in pieces(x):
            assert torch.equal(triton_conv.conv3d(piece, weight, bias, 1, tile), whole[:, :, start:stop])


@pytest.mark.parametrize("tile", TILES)
def test_pieces_of_a_clip_are_those_of_the_whole(tile):
    x, weight, bias = operands(24, 32, 9, 3, 17)
    reference = expected(x, weight, bias, 1)
    for start, stop, piece in pieces(x):
        assert error(triton_conv.conv3d(piece, weight, bias, 1, tile), reference[:, :, start:stop]) < 2e-3


@pytest.mark.parametrize("pixels", [128, 256])
@pytest.mark.parametrize("height, width", [(16, 24), (22, 40), (17, 11), (1, 1), (176, 320)])
def test_a_box_has_its_pixels_and_wastes_as_few_as_any_other(pixels, height, width):
    frames, rows, columns = triton_conv.box_of(pixels, height, width)
    assert frames * rows * columns == pixels
    area = -(-height // rows) * rows * -(-width // columns) * columns
    for other in (4, 8, 16, 32):
        if pixels // other <= 64:
            assert area <= -(-height // other) * other * -(-width // (pixels // other)) * (pixels // other)


def test_programs_are_large_where_there_are_enough_of_them():
    assert triton_conv.tile_of(128, 192, 128) == triton_conv.LARGE
    assert triton_conv.tile_of(16, 24, 1024) == triton_conv.SMALL
    assert triton_conv.tile_of(128, 192, 48) == triton_conv.NARROW


@pytest.mark.parametrize(
    "device, capability, version, hip, expected",
    [("cuda", (9, 0), (3, 6), None, True), ("cuda", (9, 0), (3, 5), None, False), ("cuda", (8, 9), (3, 6), None, False), ("cuda", (12, 0), (3, 8), None, False),
     ("cuda", (9, 4), (3, 6), "6.4", False), ("cpu", (9, 0), (3, 6), None, False)],
)  # fmt: skip
def test_it_is_for_hopper_and_a_triton_that_was_checked(monkeypatch, device, capability, version, hip, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(triton_launch, "version", lambda: version)
    assert vae_conv._is_for.__wrapped__(torch.device(device)) is expected


def as_torch(x, weight, bias, pad):
    assert x.is_contiguous(memory_format=CHANNELS_LAST) and weight.is_contiguous(memory_format=CHANNELS_LAST)
    return F.conv3d(x, weight, bias, padding=(0, pad, pad)).contiguous(memory_format=CHANNELS_LAST)


@pytest.fixture
def everywhere(monkeypatch):
    """The kernel in use on this device; returns the inputs' shapes of its calls. On a CPU it is torch's convolution: interpreting takes minutes."""
    taken, kernel = [], triton_conv.conv3d if DEVICE == "cuda" else as_torch
    monkeypatch.setattr(vae_conv, "_is_for", lambda device: True)
    monkeypatch.setattr(vae_conv, "_usable", True)
    monkeypatch.setattr(streaming, "memory_format", lambda device: CHANNELS_LAST)
    monkeypatch.setattr(triton_conv, "conv3d", lambda x, *rest: taken.append(tuple(x.shape)) or kernel(x, *rest))
    return taken


def layer(channels=16, n_out=16, **options):
    torch.manual_seed(0)
    return vae_conv.Conv3d(channels, n_out, **{"kernel_size": 3, "padding": (0, 1, 1)} | options).to(DEVICE, DTYPE)


def test_a_layer_uses_it_whatever_layout_its_weight_has(everywhere):
    conv, (x, _, _) = layer(), operands(16, 16, 4, 5, 6)
    with torch.no_grad():
        y = conv(x)
    assert everywhere == [tuple(x.shape)]
    assert error(y, expected(x, conv.weight.detach(), conv.bias.detach(), 1)) < 2e-3


@pytest.mark.parametrize(
    "options, shape",
    [({"kernel_size": 1}, {}), ({"padding": 1}, {}), ({"stride": (1, 2, 2)}, {}), ({"groups": 2}, {}), ({"padding_mode": "reflect"}, {}), ({"bias": False}, {}),
     ({"dilation": (1, 2, 2)}, {}), ({}, {"channels": 12}), ({}, {"n_out": 12})],
    ids=str,
)  # fmt: skip
def test_other_convolutions_are_torchs(everywhere, options, shape):
    conv = layer(**shape, **options)
    with torch.no_grad():
        conv(operands(conv.in_channels, 16, 4, 8, 8)[0])
    assert everywhere == []


def test_float32_and_recorded_calls_are_torchs(everywhere):
    conv, (x, _, _) = layer(), operands(16, 16, 4, 5, 6)
    conv(x).float().sum().backward()
    assert conv.weight.grad is not None
    with torch.no_grad():
        conv.float()(x.float())
    assert everywhere == []


@pytest.mark.parametrize("config", [LTX2_3_VAE, LTX2_0_VAE], ids=["2.3", "2.0"])
def test_a_decode_in_steps_has_the_bits_of_one_in_a_piece(everywhere, config):
    """In 16 bits: a difference in one bit of one layer would be carried on by the others."""
    config = reduced(config, 64 if DEVICE == "cuda" else 16)
    torch.manual_seed(0)
    vae = VideoVAE(config, dtype=DTYPE).to(DEVICE).requires_grad_(False)
    latent = torch.randn(1, config.latent_channels, 3, 2, 3).to(DEVICE, DTYPE)
    spans = ((0, 2),), ((0, 3),)
    whole = vae.decode(latent, plan=tiling.VAEPlan(1 << 60, *spans))
    calls = len(everywhere)
    assert torch.equal(vae.decode(latent, 1, plan=tiling.VAEPlan(1, *spans)), whole)
    assert len(everywhere) > 2 * calls > 0


def test_encoding_uses_it_too(everywhere):
    config = reduced(LTX2_3_VAE, 16)
    torch.manual_seed(0)
    vae = VideoVAE(config, dtype=DTYPE).to(DEVICE).requires_grad_(False)
    pixels = torch.rand(1, 3, 9, 64, 64).to(DEVICE, DTYPE) * 2 - 1
    latent = vae.encode(pixels)
    assert everywhere
    vae_conv._usable = False
    assert error(latent, vae.encode(pixels).double()) < 0.03


def test_where_it_cannot_be_compiled_torchs_takes_over_for_good(everywhere, monkeypatch):
    calls = []

    def broken(*arguments):
        calls.append(1)
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(triton_conv, "conv3d", broken)
    conv, (x, _, _) = layer(), operands(16, 16, 4, 5, 6)
    with torch.no_grad():
        for _ in range(2):
            assert error(conv(x), expected(x, conv.weight.detach(), conv.bias.detach(), 1)) < 4e-3
    assert calls == [1]


def test_running_out_of_memory_is_not_taken_for_a_broken_compiler(everywhere, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("stand-in")

    monkeypatch.setattr(triton_conv, "conv3d", full)
    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError):
        layer()(operands(16, 16, 4, 5, 6)[0])
    assert vae_conv._usable


@pytest.mark.parametrize("stride", [(2, 1, 1), (1, 2, 2), (2, 2, 2)])
def test_rearranging_a_single_frame_keeps_channels_last(stride):
    """Else the pass behind it takes torch's steps, which round differently from the fused one."""
    x = torch.randn(1, 32, 1, 4, 4).contiguous(memory_format=CHANNELS_LAST)
    wide = blocks.depth_to_space(x, stride)
    assert wide.stride(1) == 1 and wide[:, :, -1:].stride(1) == 1
    back = blocks.space_to_depth(wide, stride)
    assert back.stride(1) == 1 and torch.equal(back, x)
