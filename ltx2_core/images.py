"""How images that a video must show are given, and what they are for the model."""

from dataclasses import dataclass
from pathlib import Path

import torch

from . import media
from .sampling import conditioning
from .sampling.settings import Settings


@dataclass(frozen=True)
class ImageInput:
    """An image that the video must show: a path or a uint8 array [H, W, 3], at a pixel frame (negative counts from the end)."""

    image: object
    frame: int = 0
    strength: float = 1.0

    @classmethod
    def of(cls, given) -> "ImageInput":
        """An ImageInput from one, from an image alone, or from (image, frame) or (image, frame, strength)."""
        if isinstance(given, cls):
            return given
        return cls(*given) if isinstance(given, (tuple, list)) else cls(given)

    def as_dict(self) -> dict:
        """Plain data, for a file's metadata."""
        name = Path(self.image).name if isinstance(self.image, (str, Path)) else "array"
        return {"image": name, "frame": self.frame, "strength": self.strength}


def prepare(given, run: Settings) -> tuple[torch.Tensor, int, float]:
    """(pixels [1, 3, 1, H, W] in [-1, 1], frame from the start, strength) of an image.

    Needs no weights, so that a wrong image is told before any is loaded. Raises ValueError for a frame or strength that does not exist,
    MediaError for what is no picture.
    """
    given = ImageInput.of(given)
    frame = conditioning.resolve_frame(given.frame, run.latent_shape[0])
    conditioning.check_strength(given.strength)
    return media.prepare_image(given.image, run.width, run.height, crf=run.image_crf), frame, given.strength
