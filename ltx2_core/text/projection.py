"""Text projection: all hidden states of Gemma -> one feature vector per token.

LTX-2.3 normalises every layer's state per token, 2.0 every layer over the whole prompt; then one linear layer maps the flattened
states (index ``d * layers + layer``) to the width of the connector. Its weight is by far the widest of the model (4096 x 188160),
so it is used in row tiles, decoded or cast one at a time: neither a float32 nor a decoded copy of it ever exists. For sound 2.3 has a
second layer of this kind, whose features stand behind the video's; 2.0's features serve both.

Letters: n tokens, D width of Gemma, L1 hidden states (layers + 1), Dv width of the features.

Sources: Lightricks ltx-core ``text_encoders/gemma/feature_extractor.py``; ComfyUI ``comfy/text_encoders/lt.py``.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import nn

from ...quant import matmul
from ...quant import tensor as packed
from ..files.errors import WeightFileError
from .config import size_for_inputs

EPS = 1e-6
RANGE_SCALE = 8.0  # 2.0: values are mapped to a range of 8
INPUT_BYTES = 256 << 20  # normalised states of one chunk of tokens (356 tokens at Gemma-12B's size)
TILE_BYTES = 64 << 20  # decoded rows of the weight

WeightAccess = Callable[[nn.Module, torch.device], contextlib.AbstractContextManager]


class ProjectionError(WeightFileError):
    """The projection does not fit the text encoder, or the file holds none."""

    __module__ = "ltx2_gguf"  # shown before the name of the error


class TextProjection(nn.Module):
    """``version`` "2.3" (``video_aggregate_embed``, bias) or "2.0" (``aggregate_embed``, no bias).

    audio_features: width of ``audio_aggregate_embed`` (2.3), 0 without audio; the result is then [n, Dv + audio_features].

    ``weight_access(linear, device)`` is a context manager that gives (weight, bias) on ``device`` in their stored form, for callers
    that keep weights elsewhere; by default they are the layer's own.
    """

    def __init__(
        self, version: str, width: int, num_states: int, features: int, operations=nn, dtype=None, device=None, weight_access: WeightAccess | None = None,
        audio_features: int = 0,
    ):  # fmt: skip
        super().__init__()
        self.version, self.width, self.num_states, self.features = version, width, num_states, features
        self.audio_features = audio_features
        self.weight_access = weight_access or own_weight
        name, bias = {"2.3": ("video_aggregate_embed", True), "2.0": ("aggregate_embed", False)}[version]
        self.add_module(name, operations.Linear(width * num_states, features, bias=bias, dtype=dtype, device=device))
        if audio_features:
            self.audio_aggregate_embed = operations.Linear(
                width * num_states, audio_features, bias=True, dtype=dtype, device=device
            )

    @property
    def linear(self) -> nn.Module:
        return self.video_aggregate_embed if self.version == "2.3" else self.aggregate_embed

    def forward(self, hidden: torch.Tensor, device=None) -> torch.Tensor:
        """hidden [L1, n, D], float32 on any device -> features [n, Dv (+ audio)], float32 on ``device`` (default: the weight's)."""
        if hidden.shape[0] != self.num_states or hidden.shape[2] != self.width:
            raise ProjectionError(
                f"the text projection takes {self.num_states} hidden states of width {self.width}, the text encoder gives "
                f"{hidden.shape[0]} of width {hidden.shape[2]}; use the projection and the Gemma size that belong together."
            )
        device = torch.device(device) if device is not None else self.linear.weight.device
        shift, scale = self.normalisation(hidden)
        video = self._project(self.linear, self.features, hidden, shift, scale, device)
        if not self.audio_features:
            return video
        scale = scale * math.sqrt(self.audio_features / self.features)  # the video's has its own width in it
        return torch.cat(
            (video, self._project(self.audio_aggregate_embed, self.audio_features, hidden, shift, scale, device)), dim=1
        )

    def _project(self, linear, features, hidden, shift, scale, device):
        """[n, features] float32 of the normalised states."""
        out = torch.empty(hidden.shape[1], features, dtype=torch.float32, device=device)  # (n, Dv)
        chunk = max(1, INPUT_BYTES // (4 * self.width * self.num_states))
        with self.weight_access(linear, device) as (weight, bias):
            for start in range(0, hidden.shape[1], chunk):
                tokens = slice(start, start + chunk)
                x = self._flatten(hidden[:, tokens], shift[:, tokens], scale[:, tokens], device)  # (chunk, D*L1)
                for rows, tile in weight_tiles(weight):
                    out[tokens, rows] = F.linear(x, tile)
            return out if bias is None else out.add_(bias.to(device=device, dtype=torch.float32))

    def normalisation(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(shift, scale), each [L1, n, 1], such that the normalised states are ``(hidden - shift) * scale``.

        2.3: RMS of each token in each layer, and the square root of output over input width. 2.0: mean and range of each layer.
        """
        n = hidden.shape[1]
        shift, scale = hidden.new_zeros(len(hidden), n, 1), hidden.new_empty(len(hidden), n, 1)
        for layer, x in enumerate(hidden):  # one layer at a time: no temporary as large as all of them
            if self.version == "2.3":
                gain = math.sqrt(self.features / self.width)
                scale[layer] = gain * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + EPS)
            else:
                low, high = x.aminmax()
                shift[layer] = x.mean()
                scale[layer] = RANGE_SCALE / (high - low + EPS)
        return shift, scale

    def _flatten(self, hidden: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, device) -> torch.Tensor:
        x = torch.empty(hidden.shape[1], self.width, self.num_states, dtype=torch.float32, device=device)  # (n, D, L1)
        for layer in range(self.num_states):
            x[:, :, layer] = ((hidden[layer] - shift[layer]) * scale[layer]).to(device)
        return x.flatten(1)  # (n, D, L1) -> (n, D*L1), index d * L1 + layer


@contextlib.contextmanager
def own_weight(linear: nn.Module, device: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """The layer's weight and bias as they are, moved to ``device`` if they lie elsewhere."""
    weight, bias = linear.weight, getattr(linear, "bias", None)  # an embedding table has none
    yield weight.to(device), None if bias is None else bias.to(device)


def weight_tiles(weight: torch.Tensor, tile_bytes: int | None = None) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield (rows, float32 tile) over a dense or packed weight [out, in]; a tile has at most ``tile_bytes`` (TILE_BYTES) bytes, and one row at least."""
    out_features, in_features = weight.shape
    step = max(1, (tile_bytes or TILE_BYTES) // (4 * in_features))
    for start in range(0, out_features, step):
        rows = slice(start, min(start + step, out_features))
        if packed.is_packed(weight):
            yield rows, matmul.dequantize(weight._qdata[rows], packed.format_of(weight), torch.float32)
        else:
            yield rows, packed.unpack(weight)[rows].float()


def projection_geometry(shapes: Mapping[str, tuple[int, ...]], width: int, num_states: int) -> tuple[str, int]:
    """(version, Dv) of a projection, checked against a Gemma of ``width`` with ``num_states`` hidden states.

    ``shapes``: name under ``text_embedding_projection.`` -> shape. Raises ProjectionError.
    """
    for version, name in (("2.3", "video_aggregate_embed.weight"), ("2.0", "aggregate_embed.weight")):
        if name in shapes:
            features, inputs = shapes[name]
            if inputs != width * num_states:
                made_for = size_for_inputs(inputs)
                whose = f" (Gemma-3 {made_for})" if made_for else ""
                raise ProjectionError(
                    f"the text projection takes {inputs} numbers per token{whose}, this Gemma gives {width * num_states} "
                    f"({num_states} hidden states of width {width}); choose the Gemma size that the projection was made for."
                )
            if version == "2.0" and features != width:
                raise ProjectionError(
                    f"an LTX-2.0 text projection is as wide as Gemma ({width}), this one gives {features}; the file is damaged or of another model."
                )
            return version, features
    raise ProjectionError(
        "the file holds no video text projection ('video_aggregate_embed' or 'aggregate_embed'); choose a file that does."
    )
