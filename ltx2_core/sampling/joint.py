"""Sampling video and audio together: one schedule, one sampler, two streams.

The samplers see one tensor [B, N], in which the two latents lie one after the other; everything they do is element by element, and noise of
their own they draw per stream. Guidance works on each stream apart. The video's noise is drawn first, so it is the same with and without
audio.

Source: Lightricks ``ltx-pipelines`` (denoising loop of the joint pipelines) and ``ltx-core`` (``MultiModalGuider``).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from . import samplers
from .conditioning import Conditioned
from .guidance import JointGuidance


@dataclass(frozen=True)
class AudioConditioned:
    """An audio latent with its mask. clean [B, 8, L, 16] float32: what is given; mask [B, 1, L, 1]: how much of each token is generated."""

    clean: torch.Tensor
    mask: torch.Tensor

    @property
    def is_plain(self) -> bool:
        """Whether every token is fully generated."""
        return bool((self.mask == 1).all())

    @property
    def is_given(self) -> bool:
        """Whether no token is generated: the picture follows this sound."""
        return bool((self.mask == 0).all())


def empty_audio(shape: Sequence[int]) -> AudioConditioned:
    """Nothing given. shape: (B, 8, L, 16)."""
    return AudioConditioned(torch.zeros(*shape), torch.ones(shape[0], 1, shape[2], 1))


def given_audio(latent: torch.Tensor, shape: Sequence[int]) -> AudioConditioned:
    """A soundtrack that the picture follows, cut or padded with zeros (of the normalised latent) to the clip's length."""
    length = shape[2]
    clean = torch.nn.functional.pad(latent[:, :, :length].float(), (0, 0, 0, max(0, length - latent.shape[2])))
    return AudioConditioned(clean.expand(shape[0], -1, -1, -1), torch.zeros(shape[0], 1, length, 1))


class Packing:
    """Video and audio latents as one tensor [B, N], and back."""

    def __init__(self, video_shape: Sequence[int], audio_shape: Sequence[int]):
        self.shapes = tuple(video_shape), tuple(audio_shape)
        self.parts = tuple(math.prod(shape[1:]) for shape in self.shapes)

    def pack(self, video: torch.Tensor, audio: torch.Tensor) -> torch.Tensor:
        """Tensors that broadcast to the latents' shapes -> [B, N]."""
        return torch.cat([tensor.expand(shape).flatten(1) for tensor, shape in zip((video, audio), self.shapes)], dim=1)

    def unpack(self, packed: torch.Tensor) -> list[torch.Tensor]:
        """[B, N] -> [video, audio]."""
        return [part.view(shape) for part, shape in zip(packed.split(self.parts, dim=1), self.shapes)]


def joint_noise(shapes: Sequence[Sequence[int]], seed: int) -> list[torch.Tensor]:
    """Standard normal float32 noise on the CPU, the video's first."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return [torch.randn(tuple(shape), generator=generator, dtype=torch.float32) for shape in shapes]


def sample(
    model,
    contexts: Sequence[torch.Tensor],
    video: Conditioned,
    audio: AudioConditioned,
    guidance: JointGuidance,
    *,
    sigmas: torch.Tensor,
    sampler: str,
    seed: int,
    frame_rate: float,
    device: torch.device,
    passes: Callable[[list], list] | None = None,
) -> Iterator[tuple[samplers.Step, list[torch.Tensor]]]:
    """Denoise both streams; yields (Step of the packed latent, [video, audio] latents) after every step.

    model: has ``velocities`` (``transformer.audio_video``); contexts: of the prompt and, where guidance needs it, the negative prompt.
    passes: runs a list of calls (default: one after the other). Audio that is given is not guided.
    """
    packing = Packing(video.clean.shape, audio.clean.shape)
    clean, mask = packing.pack(video.clean, audio.clean), packing.pack(video.mask, audio.mask)
    start = torch.lerp(
        clean, torch.lerp(clean, packing.pack(*joint_noise(packing.shapes, seed)), float(sigmas[0])), mask
    )
    start, clean, mask = (tensor.to(device) for tensor in (start, clean, mask))
    common = {
        "frame_rate": frame_rate, "video_mask": None if video.is_plain else video.mask.to(device),
        "audio_mask": None if audio.is_plain else audio.mask.to(device),
        "keyframe_idxs": None if video.keyframe_idxs is None else video.keyframe_idxs.to(device),
    }  # fmt: skip
    if video.is_plain and audio.is_plain:
        clean = mask = None
    if audio.is_given:
        guidance = JointGuidance(guidance.video)
    masks = common["video_mask"], common["audio_mask"]
    run = passes or (lambda calls: [call() for call in calls])

    def denoise(packed: torch.Tensor, sigma: float) -> torch.Tensor:
        x = packing.unpack(packed)

        def x0(context, **special):
            found = model.velocities(*x, sigma, context, **common, **special)
            return [samplers.x0_from_velocity(a, v, sigma, m) for a, v, m in zip(x, found, masks)]

        calls = {"positive": lambda: x0(contexts[0])}
        if guidance.needs_negative:
            calls["negative"] = lambda: x0(contexts[1])
        if guidance.needs_perturbed:
            blocks, audio_blocks = guidance.stg_blocks
            calls["perturbed"] = lambda: x0(contexts[0], stg_blocks=blocks, audio_stg_blocks=audio_blocks)
        if guidance.needs_isolated:
            calls["isolated"] = lambda: x0(contexts[0], isolated=True)
        return packing.pack(*guidance.combine(**dict(zip(calls, run(list(calls.values()))))))

    for step in samplers.SAMPLERS[sampler](
        denoise, start, sigmas, mask=mask, clean=clean, seed=seed, parts=packing.parts
    ):
        yield step, packing.unpack(step.latent)
