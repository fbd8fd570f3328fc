"""Prompt (and images) in, frames out, without a host: the page to read first.

    pipeline = LTX2Pipeline.from_files("ltx-2.3-q4_0.gguf", "gemma-3-12b-it-Q4_K_M.gguf", device="cuda", memory_budget=6)
    frames = pipeline.generate("a red kite over the sea", width=768, height=512, frames=121)   # [F, H, W, 3] in [0, 1]
    pipeline.set_loras([("camera-dolly-in.safetensors", 0.8)])                                 # and generate again

The parts take turns on the device: text encoder, then connector, then VAE encoder for images, then transformer, then VAE decoder. With
a ``memory_budget`` the text encoder's layers and the transformer's blocks pass through it one after the other (``offload/streamer.py``).

Sources: Lightricks ``ltx-pipelines`` (order of the stages, defaults).
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .lora import apply
from .sampling import conditioning, guidance, samplers, schedules
from .text import projection as text_projection
from .vae import tiling
from .loading.lora import attach_loras
from .loading.text_encoder import load_text_encoder
from .loading.transformer import load_dit
from .loading.vae import load_vae
from .sampling.conditioning import Conditioned
from .text.gemma import gathered_bytes
from .sampling.guidance import Guidance, Preset
from .parallel.group import Ranks
from .offload.streamer import BlockStreamer, DeviceMemory, Resident, activation_bytes
from .vae.model import VideoVAE

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]  # (stage, steps done, steps in all); raise from it to stop


@dataclass(frozen=True)
class ImageInput:
    """An image that the video must show: a path or a uint8 array [H, W, 3], at a pixel frame (negative counts from the end)."""

    image: object
    frame: int = 0
    strength: float = 1.0


@dataclass(frozen=True)
class Settings:
    """One run, with everything decided. Sizes in pixels, ``fps`` in frames per second."""

    width: int
    height: int
    frames: int
    fps: float
    sigmas: torch.Tensor
    sampler: str
    guidance: Guidance
    seed: int
    image_crf: int


class LTX2Pipeline:
    """The parts of one model. Make it with ``from_files``."""

    def __init__(self, dit, text_sources, vae_sources, device, dtype, memory_budget=None, preset=None, ranks=None):
        self.ranks = ranks  # parallel.group.Ranks, where several processes make one clip
        self.dit, self.text_sources, self.vae_sources = dit, list(text_sources), list(vae_sources)
        self.device, self.dtype = torch.device(device), dtype
        self.memory = DeviceMemory(self.device, None if memory_budget is None else int(memory_budget * 2**30))
        self.preset = preset or guidance.PRESETS[dit.config.version]
        self.loras: list[apply.Report] = []
        self._contexts: dict[str, torch.Tensor] = {}

    @classmethod
    def from_files(
        cls,
        model: str | Path,
        text_encoder: str | Path,
        projection: str | Path | None = None,
        connector: str | Path | None = None,
        vae: str | Path | None = None,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        memory_budget: float | None = None,
        preset: str | None = None,
        loras: Sequence[tuple[str | Path, float]] = (),
        ranks: Ranks | None = None,
    ) -> "LTX2Pipeline":
        """Open the files. ``projection``, ``connector`` and ``vae`` are needed where ``model`` does not hold them.

        dtype: of the products (default float32 on the CPU, bfloat16 elsewhere). memory_budget: GB (2^30 bytes) on the device, default no
        limit. preset: a name of ``guidance.PRESETS`` (default: that of the model's version). loras: see ``set_loras``. ranks: the
        processes that make one clip together (``parallel.group``); the device is then theirs. Weights stay in the memory map until their turn.
        Raises WeightFileError and its kin, each with one sentence.
        """
        device = torch.device(device) if ranks is None else ranks.device
        dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        with torch.inference_mode():
            dit = load_dit([file for file in (model, connector) if file is not None], dtype=dtype)
        if preset is not None and preset not in guidance.PRESETS:
            raise ValueError(f"Unknown preset {preset!r}; choose one of {', '.join(guidance.PRESETS)}.")
        text = [text_encoder, projection or model]
        pipeline = cls(dit, text, [vae or model], device, dtype, memory_budget, guidance.PRESETS[preset] if preset else None, ranks)
        pipeline.set_loras(loras)
        return pipeline

    def set_loras(self, loras: Sequence[tuple[str | Path, float]]) -> list[apply.Report]:
        """Use these LoRA files, (path, strength) each, from the next run on, in place of those before; an empty list takes all away.

        Returns what became of each. Their matrices count in the memory budget, block by block. Raises LoraError; then nothing has changed.
        """
        connector = self.dit.video_embeddings_connector
        before = connector is not None and apply.is_attached(connector)
        self.loras = attach_loras(self.dit, loras)
        if before or (connector is not None and apply.is_attached(connector)):
            self._contexts.clear()  # they went through the connector as it was
        return self.loras

    # -- the whole way ---------------------------------------------------------------------------------------------------------------

    def generate(self, prompt: str, **settings) -> torch.Tensor:
        """All frames [F, H, W, 3], float32 in [0, 1], on the CPU. Arguments as for ``stream``."""
        return torch.cat(list(self.stream(prompt, **settings)))

    @torch.inference_mode()
    def stream(
        self,
        prompt: str,
        *,
        negative_prompt: str | None = None,
        images: Sequence[ImageInput] = (),
        progress: Progress | None = None,
        **settings,
    ) -> Iterator[torch.Tensor]:
        """Generate, and hand frames on as the decoder makes them: chunks [n, H, W, 3], float32 in [0, 1], on the CPU.

        ``settings``: see ``settings``. Raises ValueError for sizes or settings that do not exist, MemoryBudgetError for a budget too small.
        """
        run = self.settings(**settings)
        latent = self.sample(prompt, run, negative_prompt=negative_prompt, images=images, progress=progress)
        if self.ranks is not None and not self.ranks.is_first:
            return  # the first rank decodes
        yield from self.decode(latent, progress)

    def settings(
        self,
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
    ) -> Settings:
        """Fill what is not given from the preset, and check all of it. ``schedule``: a name of ``sampling.schedules.PRESETS`` or a comma list of sigmas."""
        p: Preset = self.preset
        width, height, frames, fps, steps, seed, image_crf = (
            default if value is None else value
            for value, default in (
                (width, p.width), (height, p.height), (frames, p.frames), (fps, p.fps), (steps, p.steps), (seed, p.seed), (image_crf, p.image_crf),
            )
        )  # fmt: skip
        if fps <= 0:
            raise ValueError(f"The frame rate is {fps}; it must be above 0.")
        if not 0 <= image_crf <= 51:
            raise ValueError(f"The image compression (crf) is {image_crf}; it must be between 0 (none) and 51.")
        size = conditioning.latent_shape(width, height, frames)
        sigmas = schedules.sigmas_by_name(schedule or p.schedule, steps, size[0] * size[1] * size[2])
        sampler = sampler or p.sampler
        if sampler not in samplers.SAMPLERS:
            raise ValueError(f"Unknown sampler {sampler!r}; choose one of {', '.join(samplers.SAMPLERS)}.")
        layers = self.dit.config.num_layers
        chosen = p.guidance(layers)
        if stg_blocks is not None:
            wrong = [block for block in stg_blocks if not 0 <= block < layers]
            if wrong:
                raise ValueError(f"The model has blocks 0 to {layers - 1}; stg_blocks names {wrong[0]}.")
            chosen = replace(chosen, stg_blocks=tuple(stg_blocks))
        elif stg and not chosen.stg_blocks:
            chosen = replace(chosen, stg_blocks=guidance.PRESETS[self.dit.config.version].guidance(layers).stg_blocks)
        given = {name: value for name, value in (("cfg", cfg), ("stg", stg), ("rescale", rescale)) if value is not None}
        return Settings(width, height, frames, fps, sigmas, sampler, replace(chosen, **given), seed, image_crf)

    # -- the stages ------------------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def sample(
        self, prompt: str, run: Settings, *, negative_prompt: str | None = None, images: Sequence[ImageInput] = (), progress: Progress | None = None
    ) -> torch.Tensor:
        """The finished latent [1, C, F, H, W], normalised, float32, on the CPU."""
        if not prompt.strip():
            log.warning("The prompt is empty, so nothing says what the video should show; write one to steer it.")
        prompts = [prompt]
        if run.guidance.needs_negative:
            prompts.append(guidance.NEGATIVE_PROMPTS[self.dit.config.version] if negative_prompt is None else negative_prompt)
        contexts = self.encode_prompts(prompts, progress)
        state = self.condition(run, images, progress)
        noise = conditioning.gaussian_noise(tuple(state.clean.shape), run.seed)
        latent = conditioning.noised(state, noise, float(run.sigmas[0]))
        with self._transformer(state.clean.shape[2:].numel()):
            for step in self._sampler(run, state, latent, contexts):
                _tell(progress, "sample", step.index + 1, step.total)
        return conditioning.crop_guides(state, step.latent).cpu()

    def encode_prompts(self, prompts: Sequence[str], progress: Progress | None = None) -> list[torch.Tensor]:
        """One context [1, S, Dc] per prompt, on the device. The text encoder is loaded for prompts not seen before, and leaves again."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._contexts]
        if self.ranks is not None:  # each rank encodes its share
            self._contexts |= self.ranks.shared(new, lambda mine: self._encoded(mine, progress), self.dtype)
        else:
            self._contexts |= self._encoded(new, progress)
        return [self._contexts[prompt].to(self.device) for prompt in prompts]

    def _encoded(self, prompts: Sequence[str], progress: Progress | None) -> dict[str, torch.Tensor]:
        """{prompt: context [1, S, Dc] on the CPU}."""
        contexts = {}
        if prompts:
            features = self._features(prompts, progress)
            with self._resident(self.dit.video_embeddings_connector, "the embeddings connector"):
                for prompt, feature in zip(prompts, features, strict=True):
                    context = self.dit.preprocess_text_embeds(feature.to(self.device, self.dtype), unprocessed=True)
                    contexts[prompt] = context.cpu()
        return contexts

    def _features(self, prompts: Sequence[str], progress: Progress | None) -> list[torch.Tensor]:
        """Text features [1, n, Dv] of each prompt, on the CPU."""
        encoder = load_text_encoder(self.text_sources, dtype=self.dtype if self.dtype != torch.float16 else torch.float32)
        layers = encoder.gemma.model.layers
        with contextlib.ExitStack() as stack:
            scope = None
            if not self._in_place:
                stack.enter_context(self._resident(encoder, "the text encoder's other weights", skip=[layers]))
                stack.enter_context(self.memory.reserved(self._text_bytes(encoder, prompts), "encoding a prompt"))
                scope = stack.enter_context(BlockStreamer(layers, self.memory)).scope
            result = []
            for done, prompt in enumerate(prompts, 1):
                result.append(encoder.encode(prompt, device=self.device, layer_scope=scope).cpu())
                _tell(progress, "text", done, len(prompts))
        return result

    @staticmethod
    def _text_bytes(encoder, prompts: Sequence[str]) -> int:
        """Room for the activations of the longest prompt: in Gemma's layers, and in the projection with its tile of decoded rows."""
        config = encoder.gemma.config
        tokens = max(len(encoder.tokenizer.encode(prompt)) for prompt in prompts)
        layers = activation_bytes(tokens, max(config.width, config.ffn_width // 4), torch.float32, config.width * config.ffn_width)
        layers += gathered_bytes(config, tokens)
        inputs = 4 * config.width * config.num_hidden_states
        tile = min(text_projection.TILE_BYTES, inputs * encoder.text_embedding_projection.features)
        return max(layers, min(2 * tokens * inputs, text_projection.INPUT_BYTES) + tile)

    def condition(self, run: Settings, images: Sequence[ImageInput], progress: Progress | None = None) -> Conditioned:
        """The latent with its mask: empty, or with the images encoded into it (frame 0 replaced, others as guides)."""
        state = conditioning.empty(conditioning.latent_shape(run.width, run.height, run.frames), channels=self.dit.config.in_channels)
        if not images:
            return state
        from . import media

        encoded = []
        with self._vae("encoder") as vae:
            for done, given in enumerate(images, 1):
                pixels = media.prepare_image(given.image, run.width, run.height, crf=run.image_crf)  # (1, 3, 1, H, W) in [-1, 1]
                latent = vae.encode(pixels.to(self.device), free_memory=self._free_bytes())
                encoded.append((latent.float().cpu(), given.frame, given.strength))
                _tell(progress, "image", done, len(images))
        return conditioning.combined(state, encoded)

    @contextlib.contextmanager
    def _transformer(self, tokens: int) -> Iterator[None]:
        """The transformer on the device: whole, or its blocks passing through what the budget leaves."""
        if self._in_place:
            yield
            return
        config = self.dit.config
        need = activation_bytes(tokens, config.inner_dim, self.dtype, config.inner_dim * config.ff_dim)
        with contextlib.ExitStack() as stack:
            skip = [self.dit.transformer_blocks, *filter(None, [self.dit.video_embeddings_connector])]
            stack.enter_context(self._resident(self.dit, "the transformer's first and last layers", skip))
            stack.enter_context(self.memory.reserved(need, "computing a step"))
            streamer = stack.enter_context(BlockStreamer(self.dit.transformer_blocks, self.memory))
            self.dit.iterate_blocks = streamer.iterate
            stack.callback(self.dit.__dict__.pop, "iterate_blocks")
            yield

    def _sampler(self, run: Settings, state: Conditioned, latent: torch.Tensor, contexts: Sequence[torch.Tensor]) -> Iterator[samplers.Step]:
        """The sampling loop on the device, with guidance."""
        latent, clean, mask = (x.to(self.device) for x in (latent, state.clean, state.mask))
        if self.ranks is not None:  # the images may have been encoded with other rounding
            latent, clean = self.ranks.from_first(latent), self.ranks.from_first(clean)
            self.plan = self.ranks.share(self.dit, latent[0, 0].numel(), run.guidance.passes)
            log.info("%s", self.plan.text())
        if state.is_plain:
            clean = mask = None
        common = {
            "frame_rate": run.fps, "denoise_mask": mask,
            "keyframe_idxs": None if state.keyframe_idxs is None else state.keyframe_idxs.to(self.device),
        }  # fmt: skip
        g = run.guidance

        def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
            def x0(context, **special):
                return samplers.x0_from_velocity(x, self.dit.velocity(x, sigma, context, **common, **special), sigma, mask)

            calls = [lambda: x0(contexts[0])]
            if g.needs_negative:
                calls.append(lambda: x0(contexts[1]))
            if g.needs_perturbed:
                calls.append(lambda: x0(contexts[0], stg_blocks=g.stg_blocks))
            found = iter(self.ranks.passes(calls) if self.ranks is not None else [call() for call in calls])
            positive = next(found)
            negative = next(found) if g.needs_negative else None
            perturbed = next(found) if g.needs_perturbed else None
            return guidance.combine(positive, negative, perturbed, cfg=g.cfg, stg=g.stg if g.needs_perturbed else 0.0, rescale=g.rescale)

        return samplers.SAMPLERS[run.sampler](denoise, latent, run.sigmas, mask=mask, clean=clean, seed=run.seed)

    @torch.inference_mode()
    def decode(self, latent: torch.Tensor, progress: Progress | None = None) -> Iterator[torch.Tensor]:
        """Latent [1, C, F, H, W] -> chunks of frames [n, H, W, 3], float32 in [0, 1], on the CPU."""
        with self._vae("decoder") as vae:
            total, done = vae.decode_output_shape(latent.shape)[2], 0
            for pixels in vae.decode_stream(latent.to(self.device), free_memory=self._free_bytes()):  # (1, 3, n, H, W)
                done += pixels.shape[2]
                _tell(progress, "decode", done, total)
                yield pixels[0].permute(1, 2, 3, 0).float().add(1).div(2).clamp(0, 1).cpu()  # (3, n, H, W) -> (n, H, W, 3)

    # -- places ----------------------------------------------------------------------------------------------------------------------

    @property
    def _in_place(self) -> bool:
        """Whether weights are used where they are, in the memory map."""
        return self.device.type == "cpu" and self.memory.budget is None

    def _resident(self, module, what: str, skip: Sequence = ()):
        return contextlib.nullcontext() if self._in_place else Resident(module, self.memory, what, skip)

    @contextlib.contextmanager
    def _vae(self, side: str) -> Iterator[VideoVAE]:
        """One side of the VAE, on the device."""
        vae = load_vae(self.vae_sources, dtype=self.dtype)
        setattr(vae, {"encoder": "decoder", "decoder": "encoder"}[side], None)
        nbytes = sum(value.nbytes for value in vae.state_dict().values())
        with self.memory.reserved(0 if self._in_place else nbytes, f"the VAE {side}"):
            if self.device.type == "cuda":
                vae = vae.to(self.device, memory_format=torch.channels_last_3d)
            yield vae.to(self.device)

    def _free_bytes(self) -> int | None:
        """What the budget and the device leave for activations."""
        free = [value for value in (self.memory.available, tiling.free_bytes(self.device)) if value is not None]
        return min(free) if free else None


def _tell(progress: Progress | None, stage: str, done: int, total: int) -> None:
    if progress is not None:
        progress(stage, done, total)
