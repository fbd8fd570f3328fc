"""The pieces of the causal video VAE, each of which can take a clip in consecutive chunks.

Every operation is either point-wise in time or a convolution over three frames, so a clip can be fed a few frames at a time and give exactly what
it gives in one piece: a convolution remembers its last two input frames, a residual connection remembers the frames its main path has not
answered yet, a time upsampler drops its first frame once. What is remembered lives in a ``Rolling`` object, one per clip, never in the modules. A
whole clip is the case of one chunk, which is also how training runs (with gradients, nothing is written in place).

Each block is called as ``block(x, rolling, last)`` with x (B, C, F, H, W), the next F frames, and last=True on the clip's final frames. It
returns the frames that are now decided, or None when it needs more input first.

Sources: ltx-core ``model/video_vae`` (arithmetic); ComfyUI ``comfy/ldm/lightricks/vae/causal_video_autoencoder.py`` (rolling evaluation).
"""

import importlib.util
import logging
import math

import torch
from torch import nn
from torch.nn import functional as F

logger = logging.getLogger(__name__)

PIXEL_NORM_EPS = 1e-8
_TRITON_DEVICES = ("cuda", "xpu")
_HAS_TRITON = importlib.util.find_spec("triton") is not None


class Rolling:
    """What the modules hold back between the chunks of one clip, and how activations are laid out in memory.

    memory_format: of intermediate tensors (channels_last_3d is what cuDNN's tensor-core convolutions read without converting).
    origin: row and column of the output's first pixel in the frame, for tiles.
    """

    def __init__(self, memory_format=torch.contiguous_format, origin=(0, 0)):
        self.memory_format, self.origin = memory_format, origin
        self._kept = {}

    def take(self, key):
        """Remove and return what was kept under key (a module, or a tuple that begins with one); None at a clip's start."""
        return self._kept.pop(key, None)

    def keep(self, key, value):
        self._kept[key] = value

    def first(self, key) -> bool:
        """True once per key: for what happens only at a clip's start."""
        if ("started", key) in self._kept:
            return False
        self._kept["started", key] = True
        return True

    def to(self, device):
        """Move everything held to another device (parking a tile's state while other tiles run)."""
        for key, value in self._kept.items():
            if isinstance(value, torch.Tensor) and value.device != torch.device(device):
                self._kept[key] = value.to(device)
        return self

    def nbytes(self) -> int:
        return sum(
            value.numel() * value.element_size() for value in self._kept.values() if isinstance(value, torch.Tensor)
        )

    def empty(self, shape, like):
        return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=self.memory_format)

    def own(self, x):
        """A copy that does not keep x's whole storage alive."""
        return x if torch.is_grad_enabled() else x.clone(memory_format=torch.preserve_format)

    def join(self, a, b):
        """Frames a then b in the usual layout; a may be None."""
        if a is None:
            return b
        if torch.is_grad_enabled():
            return torch.cat([a, b], dim=2)
        joined = self.empty((*a.shape[:2], a.shape[2] + b.shape[2], *a.shape[3:]), like=b)
        joined[:, :, : a.shape[2]].copy_(a)
        joined[:, :, a.shape[2] :].copy_(b)
        return joined

    def add_skip(self, key, main, skip):
        """main + skip, where skip runs ahead of main: the part of skip without an answer yet is held back. main may be None, and is overwritten."""
        held = self.take((key, "skip"))
        if main is None:
            self.keep((key, "skip"), self.own(self.join(held, skip)))
            return None
        n = main.shape[2]
        if torch.is_grad_enabled():
            skip = self.join(held, skip)
            main, skip = main + skip[:, :, :n], skip[:, :, n:]
        else:
            answered = 0 if held is None else min(n, held.shape[2])
            if answered:
                main[:, :, :answered].add_(held[:, :, :answered])
                held = held[:, :, answered:]
            if n > answered:
                main[:, :, answered:].add_(skip[:, :, : n - answered])
                skip = skip[:, :, n - answered :]
            elif held.shape[2]:
                skip = self.join(held, skip)
        if skip.shape[2]:
            self.keep((key, "skip"), self.own(skip))
        return main


def flow(stages, x, rolling, last, split_bytes):
    """Send x (B, C, F, H, W) through the stages depth first; yields the last stage's outputs in order.

    A stage gets no more frames at once than keep its widest tensor within split_bytes (at least one), so late stages never see a whole chunk.
    """
    waiting = [(0, x, last)]
    del x
    while waiting:
        depth, x, last = waiting.pop()
        stage = stages[depth]
        B, _, n, H, W = x.shape
        fitting = max(1, split_bytes // (B * stage.frame_elements(H, W) * x.element_size()))
        if n > fitting:
            take = -(-n // -(-n // fitting))  # even pieces
            waiting.append((depth, x[:, :, take:], last))
            x, last = x[:, :, :take], False
        y = stage(x, rolling, last)
        del x
        if y is None:
            continue
        if depth + 1 == len(stages):
            yield y
        else:
            waiting.append((depth + 1, y, last))
        del y


def _norm_factor(x):
    """1 / sqrt(mean over channels of x^2 + eps), (B, 1, F, H, W) in x's dtype; statistics in float32."""
    if torch.is_grad_enabled():
        power = x.float().square().mean(dim=1, keepdim=True)
    else:  # reads x once and makes no squared copy; the norm's gradient at zero would be undefined
        power = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32).square_().div_(x.shape[1])
    return torch.rsqrt(power + PIXEL_NORM_EPS).to(x.dtype)


def _norm_silu(x, out):
    """silu(pixel_norm(x)) into ``out``; in one pass where Triton and the layout allow it."""
    if _can_fuse(x, out):
        try:
            from . import triton_norm

            return triton_norm.norm_silu(x, out, PIXEL_NORM_EPS)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # Triton is there but cannot compile (no C compiler, an unknown GPU)
            global _HAS_TRITON
            _HAS_TRITON = False
            logger.warning(
                "The VAE runs without its Triton kernel, a little slower: %s: %s", type(error).__name__, error
            )
    return F.silu(torch.mul(x, _norm_factor(x), out=out), inplace=True)


def _can_fuse(x, out):
    """Whether the Triton kernel can take these tensors: unit stride along the channels."""
    if not _HAS_TRITON or x.device.type not in _TRITON_DEVICES or torch.compiler.is_compiling() or not x.numel():
        return False
    return (
        x.stride(1) == 1 == out.stride(1)
        and x.shape[1] <= 4096
        and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
    )


def pixel_norm(x):
    """x / sqrt(mean over channels of x^2 + eps); x (B, C, F, H, W)."""
    return x * _norm_factor(x)


class CausalConv3d(nn.Module):
    """3x3x3 convolution; the parameters are ``conv``'s.

    Time is padded by repeating edge frames: causal, twice in front; else once in front and once behind. Height and width are padded by one, with
    zeros or by reflection.
    """

    def __init__(self, in_channels, out_channels, *, causal, padding, operations, dtype=None, device=None):
        super().__init__()
        self.causal = causal
        self.reflect = padding == "reflect"
        space = (
            0 if self.reflect else 1
        )  # reflection is written into the window below, so the convolution itself pads nothing
        self.conv = operations.Conv3d(
            in_channels, out_channels, 3, padding=(0, space, space), dtype=dtype, device=device
        )

    @property
    def out_channels(self):
        return self.conv.out_channels

    def forward(self, x, rolling, last, activate=False):
        """activate: convolve silu(pixel_norm(x)) instead of x. Returns (B, C_out, F', H, W), or None while fewer than three frames are known."""
        return self.convolve(self.window(x, rolling, last, activate))

    def convolve(self, window):
        return self.conv(window) if window.shape[2] >= 3 else None

    def window(self, x, rolling, last, activate):
        """The padded frames that this call convolves; what the next call needs of them is kept."""
        if self.reflect and min(x.shape[3:]) < 2:
            raise ValueError(
                f"This VAE pads by reflection and needs at least 2x2 latents; {x.shape[3]}x{x.shape[4]} were given. "
                "Use a width and height of 64 pixels or more."
            )
        window = (
            self._window_with_gradient(x, rolling, last, activate)
            if torch.is_grad_enabled()
            else self._window(x, rolling, last, activate)
        )
        if not last:
            rolling.keep(self, rolling.own(window[:, :, -2:]))
        return window

    def _window_with_gradient(self, x, rolling, last, activate):
        if activate:
            x = F.silu(pixel_norm(x))
        if self.reflect:
            x = F.pad(x, (1, 1, 1, 1, 0, 0), mode="reflect")
        front = rolling.take(self)
        if front is None:
            front = x[:, :, :1].expand(-1, -1, 2 if self.causal else 1, -1, -1)
        behind = [x[:, :, -1:]] if last and not self.causal else []
        return torch.cat([front, x, *behind], dim=2)

    def _window(self, x, rolling, last, activate):
        """The frames this call convolves, built in one buffer: held frames, x (activated straight into place), edge copies."""
        B, C, n, H, W = x.shape
        front = rolling.take(self)
        lead = front.shape[2] if front is not None else (2 if self.causal else 1)
        trail = 1 if last and not self.causal else 0
        edge = 1 if self.reflect else 0
        window = rolling.empty((B, C, lead + n + trail, H + 2 * edge, W + 2 * edge), like=x)
        frames = window[:, :, lead : lead + n]
        inside = frames[..., edge : edge + H, edge : edge + W]
        if activate:
            _norm_silu(x, inside)
        else:
            inside.copy_(x)
        if edge:
            frames[..., 0, :].copy_(frames[..., 2, :])
            frames[..., -1, :].copy_(frames[..., -3, :])
            frames[..., 0].copy_(frames[..., 2])
            frames[..., -1].copy_(frames[..., -3])
        window[:, :, :lead].copy_(frames[:, :, :1] if front is None else front)
        if trail:
            window[:, :, -1:].copy_(frames[:, :, -1:])
        return window


class ResBlock(nn.Module):
    """x + conv2(silu(pn(conv1(silu(pn(x))))))"""

    def __init__(self, channels, **conv):
        super().__init__()
        self.conv1 = CausalConv3d(channels, channels, **conv)
        self.conv2 = CausalConv3d(channels, channels, **conv)

    def forward(self, x, rolling, last):
        h = self.conv1(x, rolling, last, activate=True)
        if h is not None:
            window = self.conv2.window(h, rolling, last, activate=True)
            del h  # so that no more than x, one window and one result are alive
            h = self.conv2.convolve(window)
            del window
        return rolling.add_skip(self, h, x)


class ResStack(nn.Module):
    """A block list's ``res`` entry."""

    def __init__(self, channels, layers, **conv):
        super().__init__()
        self.res_blocks = nn.ModuleList(ResBlock(channels, **conv) for _ in range(layers))

    def forward(self, x, rolling, last):
        for block in self.res_blocks:
            x = block(x, rolling, last)
            if x is None:
                return None
        return x

    def frame_elements(self, height, width):
        """Elements of the widest tensor per input frame of height x width."""
        return self.res_blocks[0].conv1.out_channels * height * width


def depth_to_space(x, stride):
    """(B, C*pt*ph*pw, F, H, W) -> (B, C, F*pt, H*ph, W*pw), channel slowest; the result is channels-last when x is."""
    B, C, f, H, W = x.shape
    pt, ph, pw = stride
    if x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous():
        x = (
            x.permute(0, 2, 3, 4, 1).reshape(B, f, H, W, -1, pt, ph, pw).permute(0, 1, 5, 2, 6, 3, 7, 4)
        )  # B F pt H ph W pw C
        return (
            x.reshape(B, f * pt, H * ph, W * pw, -1).contiguous().permute(0, 4, 1, 2, 3)
        )  # of a single frame the reshape may be a view
    x = x.reshape(B, -1, pt, ph, pw, f, H, W).permute(0, 1, 5, 2, 6, 3, 7, 4)  # B C F pt H ph W pw
    return x.reshape(B, -1, f * pt, H * ph, W * pw)


def space_to_depth(x, stride):
    """(B, C, F*pt, H*ph, W*pw) -> (B, C*pt*ph*pw, F, H, W), channel slowest; the result is channels-last when x is."""
    B, C, f, H, W = x.shape
    pt, ph, pw = stride
    f, H, W = f // pt, H // ph, W // pw
    if x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous():
        x = (
            x.permute(0, 2, 3, 4, 1).reshape(B, f, pt, H, ph, W, pw, C).permute(0, 1, 3, 5, 7, 2, 4, 6)
        )  # B F H W C pt ph pw
        return x.reshape(B, f, H, W, -1).contiguous().permute(0, 4, 1, 2, 3)
    x = x.reshape(B, C, f, pt, H, ph, W, pw).permute(0, 1, 3, 5, 7, 2, 4, 6)  # B C pt ph pw F H W
    return x.reshape(B, -1, f, H, W)


class Downsample(nn.Module):
    """s2d(conv(x)) + s2d(x) averaged over groups of consecutive channels.

    With time stride 2 the clip's first frame is doubled, so that 1 + 8k frames pair up.
    """

    def __init__(self, in_channels, out_channels, stride, **conv):
        super().__init__()
        self.stride = tuple(stride)
        self.group = in_channels * math.prod(stride) // out_channels
        self.conv = CausalConv3d(in_channels, out_channels // math.prod(stride), **conv)

    def forward(self, x, rolling, last):
        if self.stride[0] == 2:
            held = rolling.take((self, "odd"))
            if rolling.first(self):
                held = x[:, :, :1]
            x = rolling.join(held, x)
            if x.shape[2] % 2:  # a frame without a partner waits for the next chunk
                rolling.keep((self, "odd"), rolling.own(x[:, :, -1:]))
                x = x[:, :, :-1]
                if x.shape[2] == 0:
                    return None
        skip = space_to_depth(x, self.stride)
        if self.group > 1:
            skip = skip.unflatten(1, (-1, self.group)).mean(dim=2)  # (B, C_out, F', H', W')
        h = space_to_depth(self.conv(x, rolling, last), self.stride)  # causal: as many frames out as in
        return h + skip if torch.is_grad_enabled() else h.add_(skip)

    def frame_elements(self, height, width):
        return 2 * self.conv.conv.in_channels * height * width  # the rearranged input beside the joined one


class Upsample(nn.Module):
    """d2s(conv(x)), plus d2s(x) with its channels repeated when residual (2.0). With time stride 2 the clip's first output frame is dropped."""

    def __init__(self, in_channels, out_channels, stride, residual, **conv):
        super().__init__()
        self.stride = tuple(stride)
        self.residual = residual
        self.repeats = math.prod(stride) * out_channels // in_channels
        self.conv = CausalConv3d(in_channels, out_channels * math.prod(stride), **conv)

    def _expand(self, x, key, rolling):
        x = depth_to_space(x, self.stride)
        return x[:, :, 1:] if self.stride[0] == 2 and rolling.first((self, key)) else x

    def forward(self, x, rolling, last):
        y = self.conv(x, rolling, last)
        if y is not None:
            y = self._expand(y, "main", rolling)
        if not self.residual:
            return y
        skip = self._expand(x, "skip", rolling).repeat(1, self.repeats, 1, 1, 1)
        return rolling.add_skip(self, y, skip)

    def frame_elements(self, height, width):
        return self.conv.out_channels * height * width


def patchify(pixels, size):
    """(B, C, F, H*q, W*r) -> (B, C*r*q, F, H, W) with q = r = size; inside a channel the width offset is slower than the height offset."""
    B, C, f, H, W = pixels.shape
    x = pixels.reshape(B, C, f, H // size, size, W // size, size).permute(0, 1, 6, 4, 2, 3, 5)  # B C r q F H W
    return x.reshape(B, C * size * size, f, H // size, W // size)


def unpatchify(x, size):
    """The inverse of ``transformer.patchify``."""
    B, C, f, H, W = x.shape
    x = x.reshape(B, -1, size, size, f, H, W).permute(0, 1, 4, 5, 3, 6, 2)  # B C F H q W r
    return x.reshape(B, -1, f, H * size, W * size)
