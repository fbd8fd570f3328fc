"""Guides as the host's LTXVAddGuide appends them to a small latent."""

import torch

SIGMA = torch.tensor([0.7])
FPS = 16.0  # a power of two: the host multiplies by 1/fps where the official code divides
FRAMES, HEIGHT, WIDTH, CHANNELS = 4, 4, 6, 128


class FakeVAE:
    """Encodes clips to noise of the right shape: what a guide shows does not matter here, where it stands does."""

    downscale_index_formula = (8, 32, 32)

    def encode(self, pixels):
        frames, height, width, _ = pixels.shape
        generator = torch.Generator().manual_seed(frames * 1000 + height + width)
        return torch.randn(1, CHANNELS, 1 + (frames - 1) // 8, height // 32, width // 32, generator=generator)


def spatial_mask(frames):
    mask = torch.rand(frames, HEIGHT * 32, WIDTH * 32, generator=torch.Generator().manual_seed(4))
    mask[:, : HEIGHT * 16, : WIDTH * 8] = 0  # some tokens are cut off completely
    return mask


# name -> guides, each (clip frames, pixel frame, strength, mask frames or None, reference downscale factor)
GUIDES = {
    "an image at the last frame": [(1, -1, 1.0, None, 1)],
    "an image in the middle": [(1, 16, 1.0, None, 1)],
    "an image at strength 0.6": [(1, 16, 0.6, None, 1)],
    "an amplified image": [(1, 16, 1.5, None, 1)],
    "a clip at the start": [(9, 0, 1.0, None, 1)],
    "a clip in the middle": [(9, 9, 1.0, None, 1)],
    "a clip at strength 0.4": [(17, 8, 0.4, None, 1)],
    "an image with a mask": [(1, 8, 1.0, 1, 1)],
    "a clip with a mask per frame": [(17, 0, 0.8, 17, 1)],
    "a clip with one mask": [(17, 0, 0.8, 1, 1)],
    "a clip with a short mask": [(17, 0, 0.8, 2, 1)],
    "three guides": [(1, 0, 1.0, None, 1), (9, 8, 0.5, None, 1), (1, -1, 0.7, 1, 1)],
    "a dilated reference": [(25, 0, 1.0, None, 2)],
    "a dilated reference at strength 0.5": [(25, 0, 0.5, None, 2)],
    "a dilated reference with a mask": [(25, 0, 0.9, 25, 2)],
    "an image and a dilated reference": [(1, 16, 0.5, None, 1), (9, 0, 0.7, None, 2)],
    "a dilated reference that vanishes": [(9, 0, 2.5, None, 2), (1, 8, 1.0, None, 1)],
}


def add_guides(guides, first_frame_strength=None):
    """(latent, mask, conditioning values) after LTXVAddGuide for each guide."""
    from comfy_extras.nodes_lt import LTXVAddGuide

    generator = torch.Generator().manual_seed(8)
    latent = {"samples": torch.randn(1, CHANNELS, FRAMES, HEIGHT, WIDTH, generator=generator)}
    if first_frame_strength is not None:
        mask = torch.ones(1, 1, FRAMES, 1, 1)
        mask[:, :, 0] = 1 - first_frame_strength
        latent["noise_mask"] = mask
    positive, negative = [[torch.zeros(1, 1, 1), {}]], [[torch.zeros(1, 1, 1), {}]]
    for frames, frame_idx, strength, mask_frames, factor in guides:
        images = torch.rand(frames, HEIGHT * 32, WIDTH * 32, 3, generator=generator)
        mask = None if mask_frames is None else spatial_mask(mask_frames)
        parameters = {"reference_downscale_factor": factor} if factor > 1 else None
        out = LTXVAddGuide.execute(positive, negative, FakeVAE(), latent, images, frame_idx, strength, mask, parameters)
        positive, negative, latent = out.args
    mask = latent["noise_mask"].expand(-1, -1, -1, HEIGHT, WIDTH).clone()
    return latent["samples"], mask, positive[0][1]
