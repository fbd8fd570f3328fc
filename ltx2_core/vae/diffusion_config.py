"""Geometry of LTX-2.5's diffusion decoder, and what it takes of memory. Nothing here needs torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..files.errors import WeightFileError

TOKENS_AT_ONCE = 32768
"""Positions that go through a linear layer together: the hidden layer of the feed-forward is four times as wide as the rest."""


class DiffusionDecoderError(WeightFileError):
    """The tensors or the metadata describe no diffusion decoder that is known."""

    __module__ = "ltx2_gguf"  # shown before the name of the error


@dataclass(frozen=True)
class DiffusionDecoderConfig:
    """Geometry. ``upsamples``: (stride in time, height, width; channels are divided by) after each of the first four stages.

    The defaults are those of the released file, whose windows the shapes do not tell.
    """

    latent_channels: int = 128
    pixel_channels: int = 3
    patch_size: int = 4
    head_dim: int = 64
    stage_channels: tuple[int, ...] = (2048, 1024, 512, 512, 256)
    stage_depths: tuple[int, ...] = (4, 6, 4, 2, 8)
    stage_windows: tuple[tuple[int, int, int], ...] = ((3, 7, 7), (3, 7, 7), (3, 5, 5), (3, 5, 5), (11, 11, 11))
    upsamples: tuple[tuple[tuple[int, int, int], int], ...] = (
        ((1, 2, 2), 2),
        ((2, 1, 1), 2),
        ((2, 2, 2), 1),
        ((2, 2, 2), 2),
    )
    timestep_scale: float = 1000.0
    embedding_width: int = 384

    @property
    def temporal_scale(self) -> int:
        """Pixel frames per latent frame."""
        return math.prod(stride[0] for stride, _ in self.upsamples)

    @property
    def spatial_scale(self) -> int:
        """Pixels per latent along height and width."""
        return self.patch_size * math.prod(stride[1] for stride, _ in self.upsamples)

    @property
    def trailing_frames(self) -> int:
        """Copies of the last latent frame behind the clip, without which the last frames would look at one side only. They are dropped later."""
        return self.stage_windows[0][0] // 2 * 2

    def frame_elements(self, height: int, width: int) -> int:
        """Numbers in a frame of the last stage, the one with most positions, for a latent of height and width."""
        cells = self.spatial_scale // self.patch_size
        return self.stage_channels[-1] * height * cells * width * cells

    def state_elements(self, height: int, width: int) -> int:
        """Numbers that wait between two steps of a clip: the frames that windows still reach, and those made from copies of the last frame."""
        waiting, h, w = 0, height, width
        for channels, depth, window, (stride, _) in zip(
            self.stage_channels, self.stage_depths, self.stage_windows, self.upsamples
        ):
            waiting += depth * (window[0] - 1) * channels * h * w
            h, w = h * stride[1], w * stride[2]
        reach = self.stage_windows[-1][0] // 2
        frames = (
            self.trailing_frames * self.temporal_scale + self.stage_depths[-1] * 3 * reach
        )  # x, and the context of what is late
        return waiting + frames * self.frame_elements(height, width)

    def step_elements(self, frames: int, height: int, width: int) -> int:
        """Numbers that live at once while ``frames`` go through a block of the last stage."""
        halo = self.stage_windows[-1][0] - 1
        return (
            self.frame_elements(height, width) * (12 * frames + 6 * halo)
            + 12 * TOKENS_AT_ONCE * self.stage_channels[-1]
        )

    @property
    def spatial_reach(self) -> int:
        """Latents to each side that a pixel depends on, rounded up."""
        reach, scale = 0.0, 1
        for depth, window, stride in zip(
            self.stage_depths, self.stage_windows, [*(s for s, _ in self.upsamples), (1, 1, 1)]
        ):
            reach += depth * (max(window[1:]) // 2) / scale
            scale *= stride[1]
        return math.ceil(reach)

    @classmethod
    def from_metadata(cls, described: Mapping | None) -> "DiffusionDecoderConfig":
        """The ``vae`` part of a file's config metadata, or None for the released geometry. Raises DiffusionDecoderError."""
        described = described or {}
        decoder = described.get("decoder", {})
        steps, output = decoder.get("default_num_inference_steps", 1), described.get("model_output_type", "x0")
        if (steps, output) != (1, "x0"):
            raise DiffusionDecoderError(
                f"The diffusion decoder asks for {steps} steps of kind '{output}'; this pack runs the released one, with one step of kind 'x0'."
            )

        def nested(value):
            return tuple(map(nested, value)) if isinstance(value, (list, tuple)) else value

        names = {
            "in_channels": "latent_channels", "out_channels": "pixel_channels", "patch_size": "patch_size", "head_dim": "head_dim",
            "stage_channels": "stage_channels", "stage_depths": "stage_depths", "stage_kernels": "stage_windows", "upsamples": "upsamples",
            "timestep_scale_multiplier": "timestep_scale", "t_emb_dim": "embedding_width",
        }  # fmt: skip
        values = {ours: nested(decoder[theirs]) for theirs, ours in names.items() if theirs in decoder}
        if "stage5_kernel" in decoder:
            windows = values.get("stage_windows", cls.stage_windows)
            values["stage_windows"] = (*windows[:-1], nested(decoder["stage5_kernel"]))
        return cls(**values)
