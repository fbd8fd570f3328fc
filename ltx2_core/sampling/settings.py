"""One run with everything decided: presets, sizes, schedule and guidance, checked before any weight is touched.

Every check here needs the numbers alone, so a wrong one is told at once.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch

from . import conditioning, guidance, samplers, schedules
from .finite import check_frame_rate, check_numbers
from .guidance import Guidance, Preset

LARGEST_SEED = 2**64 - 1


@dataclass(frozen=True)
class Settings:
    """Sizes in pixels, ``fps`` in frames per second, ``sigmas`` float32 [steps + 1]."""

    width: int
    height: int
    frames: int
    fps: float
    sigmas: torch.Tensor
    sampler: str
    guidance: Guidance
    seed: int
    image_crf: int
    audio_cfg: float | None = None  # None: the preset's; for a joint model
    modality: float | None = None

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(F, H, W) of the latent."""
        return conditioning.latent_shape(self.width, self.height, self.frames)

    def as_dict(self) -> dict:
        """Plain data, for a file's metadata."""
        chosen = {name: value for name, value in vars(self).items() if name not in ("sigmas", "guidance")}
        chosen |= {"steps": len(self.sigmas) - 1, "sigmas": [round(float(sigma), 6) for sigma in self.sigmas]}
        chosen = {name: value for name, value in chosen.items() if value is not None}
        return chosen | {
            name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self.guidance).items()
        }


def joint_guidance(preset: Preset, run: Settings, layers: int) -> guidance.JointGuidance:
    """Guidance of a run with sound: the run's own for the video, the preset's for the audio. Where the video is not guided, as with distilled
    weights, neither is the audio, unless ``audio_cfg`` or ``modality`` ask for it."""
    official = preset.joint_guidance(layers)
    guided = run.guidance.needs_negative or run.guidance.needs_perturbed
    audio = official.audio if guided else Guidance()
    modality = (official.video.modality if guided else 1.0) if run.modality is None else run.modality
    audio = replace(audio, modality=modality, cfg=audio.cfg if run.audio_cfg is None else run.audio_cfg)
    return guidance.JointGuidance(replace(run.guidance, modality=modality), audio)


def decide(
    preset: Preset,
    version: str,
    layers: int,
    *,
    width: int | None = None,
    height: int | None = None,
    frames: int | None = None,
    fps: float | None = None,
    steps: int | None = None,
    schedule: str | None = None,
    sampler: str | None = None,
    cfg: float | None = None,
    stg: float | None = None,
    rescale: float | None = None,
    stg_blocks: Sequence[int] | None = None,
    seed: int | None = None,
    image_crf: int | None = None,
    audio_cfg: float | None = None,
    modality: float | None = None,
) -> Settings:
    """Fill what is not given from the preset, and check all of it. Raises ValueError.

    version, layers: of the model. schedule: a name of ``schedules.PRESETS`` or a comma list of sigmas.
    """
    p = preset
    given = {
        "width": width,
        "height": height,
        "frames": frames,
        "fps": fps,
        "steps": steps,
        "seed": seed,
        "image_crf": image_crf,
    }
    chosen = {name: getattr(p, name) if value is None else value for name, value in given.items()}
    check_numbers(
        cfg=cfg,
        stg=stg,
        rescale=rescale,
        audio_cfg=audio_cfg,
        modality=modality,
        **{name: value for name, value in chosen.items() if name != "fps"},
    )
    check_frame_rate(chosen["fps"])
    if not 0 <= chosen["image_crf"] <= 51:
        raise ValueError(f"The image compression (crf) is {chosen['image_crf']}; it must be between 0 (none) and 51.")
    if not 0 <= chosen["seed"] <= LARGEST_SEED:
        raise ValueError(f"The seed is {chosen['seed']}; it must be between 0 and {LARGEST_SEED}.")
    size = conditioning.latent_shape(chosen["width"], chosen["height"], chosen["frames"])
    sigmas = schedules.sigmas_by_name(schedule or p.schedule, chosen.pop("steps"), math.prod(size))
    sampler = sampler or p.sampler
    if sampler not in samplers.SAMPLERS:
        raise ValueError(f"Unknown sampler {sampler!r}; choose one of {', '.join(samplers.SAMPLERS)}.")
    guided = p.guidance(layers)
    if stg_blocks is not None:
        wrong = [block for block in stg_blocks if not 0 <= block < layers]
        if wrong:
            raise ValueError(f"The model has blocks 0 to {layers - 1}; stg_blocks names {wrong[0]}.")
        guided = replace(guided, stg_blocks=tuple(stg_blocks))
    elif stg and not guided.stg_blocks:
        guided = replace(guided, stg_blocks=guidance.PRESETS[version].guidance(layers).stg_blocks)
    strengths = {name: value for name, value in (("cfg", cfg), ("stg", stg), ("rescale", rescale)) if value is not None}
    return Settings(
        sigmas=sigmas,
        sampler=sampler,
        guidance=replace(guided, **strengths),
        audio_cfg=audio_cfg,
        modality=modality,
        **chosen,
    )
