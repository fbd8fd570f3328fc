"""Prompt (and images) in, frames out, without a host: the page to read first.

    pipeline = LTX2Pipeline.from_files("ltx-2.3-q4_0.gguf", "gemma-3-12b-it-Q4_K_M.gguf", memory_budget=6)
    frames = pipeline.generate("a red kite over the sea", width=768, height=512, frames=121)   # [F, H, W, 3] in [0, 1]
    pipeline.save(frames, "kite.mp4")

The parts take turns on the device: text encoder, then connector, then VAE encoder for images, then transformer, then VAE decoder. With
a ``memory_budget`` the text encoder's layers and the transformer's blocks pass through it one after the other (``offload/streamer.py``).
What the headers and the settings can tell is checked before any weight is loaded (``loading/parts.py``, ``sampling/settings.py``).

Sources: Lightricks ``ltx-pipelines`` (order of the stages, defaults).
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from . import __version__
from . import images as given_images
from . import sound as given_sound
from .devices import choose_device
from .images import ImageInput
from .loading.audio import describe_audio_vae
from .loading.lora import attach_loras
from .loading.parts import Parts, check_parts
from .loading.text_encoder import load_text_encoder
from .loading.transformer import load_dit
from .loading.vae import load_vae
from .lora import apply
from .offload.streamer import BlockStreamer, Bundle, DeviceMemory, Resident, activation_bytes
from .parallel.group import Ranks
from .sampling import conditioning, finite, guidance, joint, samplers
from .sampling.conditioning import Conditioned
from .sampling.settings import Settings, decide, joint_guidance
from .text import projection as text_projection
from .text.gemma import gathered_bytes
from .transformer.compute_mode import set_compute
from .vae import tiling
from .vae.model import VideoVAE

log = logging.getLogger(__name__)

CONTEXTS_KEPT = 16  # prompts whose contexts are kept for another run; one takes 8 MB in the released models

Progress = Callable[[str, int, int], None]  # (stage, steps done, steps in all); raise from it to stop


class LTX2Pipeline:
    """The parts of one model. Make it with ``from_files``.

    ``made`` says what the last video was made from (prompt, settings, names of the files), as ``save`` writes it into the file.
    """

    def __init__(self, dit, text_sources, vae_sources, device, dtype, memory_budget=None, preset=None, ranks=None):
        self.ranks = ranks  # parallel.group.Ranks, where several processes make one clip
        self.dit, self.text_sources, self.vae_sources = dit, list(text_sources), list(vae_sources)
        self.device, self.dtype = torch.device(device), dtype
        self.memory = DeviceMemory(self.device, None if memory_budget is None else int(memory_budget * 2**30))
        self.preset = preset or guidance.PRESETS[dit.config.version]
        self.loras: list[apply.Report] = []
        self.parts: Parts | None = None
        self.files: dict[str, str] = {}
        self.made: dict = {}
        self.audio_sources: list | None = None  # files with the audio VAE; None: video alone
        self.soundtrack: given_sound.Soundtrack | None = (
            None  # of the last run with sound, as soon as its first frames come
        )
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
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        memory_budget: float | None = None,
        preset: str | None = None,
        loras: Sequence[str | Path | tuple[str | Path, float]] = (),
        compute: str = "exact",
        ranks: Ranks | None = None,
        sound: bool = False,
        audio_vae: str | Path | Sequence[str | Path] | None = None,
    ) -> "LTX2Pipeline":
        """Open the files. ``projection``, ``connector`` and ``vae`` are needed where ``model`` does not hold them.

        device: default the first accelerator, else the CPU. dtype: of the products (default float32 on the CPU, bfloat16 elsewhere).
        memory_budget: GB (2^30 bytes) on the device, default no limit. preset: a name of ``guidance.PRESETS`` (default: that of the model's
        version). loras: see ``set_loras``. compute: "exact", or "fast" for 8-bit products where the device has them. ranks: the
        processes that make one clip together (``parallel.group``); the device is then theirs. Weights stay in the memory map until their turn. sound: the joint model of video and audio; audio_vae: file (or two) with audio VAE and vocoder, where
        ``model`` does not hold them. Raises WeightFileError and its kin, and ValueError, each with one sentence, before weights are loaded.
        """
        device = choose_device(device) if ranks is None else ranks.device
        dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        if memory_budget is not None and not (math.isfinite(memory_budget) and memory_budget > 0):
            raise ValueError(f"The memory budget is {memory_budget}; it must be a number of GB above 0.")
        if preset is not None and preset not in guidance.PRESETS:
            raise ValueError(f"Unknown preset {preset!r}; choose one of {', '.join(guidance.PRESETS)}.")
        parts = check_parts(model, text_encoder, projection, connector, vae)
        audio_sources = None
        if sound:
            if ranks is not None:
                raise ValueError(
                    "Video with sound is made on one device; leave --gpus out, or make the video without sound."
                )
            audio_sources = list(audio_vae) if isinstance(audio_vae, (list, tuple)) else [audio_vae or model]
            describe_audio_vae(audio_sources, encode=False)
        with torch.inference_mode():
            dit = load_dit(
                [file for file in (parts.model, parts.connector) if file is not None], dtype=dtype, audio=sound
            )
        set_compute(dit, compute)
        chosen = guidance.PRESETS[preset] if preset else None
        pipeline = cls(
            dit, [text_encoder, projection or model], [vae or model], device, dtype, memory_budget, chosen, ranks
        )
        named = {
            "model": model,
            "text_encoder": text_encoder,
            "projection": projection,
            "connector": connector,
            "vae": vae,
        }
        pipeline.files = {part: Path(path).name for part, path in named.items() if path is not None}
        pipeline.files |= {"compute": compute, "dtype": str(dtype).removeprefix("torch.")}
        pipeline.parts, pipeline.audio_sources = parts, audio_sources
        pipeline.set_loras(loras)
        return pipeline

    def set_loras(self, loras: Sequence[str | Path | tuple[str | Path, float]]) -> list[apply.Report]:
        """Use these LoRA files, each a path or (path, strength), from the next run on, in place of those before; an empty list takes all away.

        Returns what became of each. Their matrices count in the memory budget, block by block. Raises LoraError; then nothing has changed.
        """
        connector = self.dit.video_embeddings_connector
        before = connector is not None and apply.is_attached(connector)
        self.loras = attach_loras(
            self.dit, [(lora, 1.0) if isinstance(lora, (str, Path)) else tuple(lora) for lora in loras]
        )
        if before or (connector is not None and apply.is_attached(connector)):
            self._contexts.clear()  # they went through the connector as it was
        return self.loras

    # -- the whole way ---------------------------------------------------------------------------------------------------------------

    def generate(self, prompt: str, **settings) -> torch.Tensor:
        """All frames [F, H, W, 3], float32 in [0, 1], on the CPU. Arguments as for ``stream``."""
        return torch.cat(list(self.stream(prompt, **settings)))

    def stream(
        self,
        prompt: str,
        *,
        negative_prompt: str | None = None,
        images: Sequence = (),
        audio=None,
        progress: Progress | None = None,
        **settings,
    ) -> Iterator[torch.Tensor]:
        """Generate, and hand frames on as the decoder makes them: chunks [n, H, W, 3], float32 in [0, 1], on the CPU.

        images: each a path or array for the first frame, (image, frame), (image, frame, strength) or an ImageInput. audio: path
        or ``sound.Soundtrack`` that the picture follows (a pipeline with sound); it stays as it is. ``settings``: see
        ``settings``. Raises ValueError at once for sizes, settings or images that do not fit; MemoryBudgetError for a budget too small.
        """
        run, images = self.settings(**settings), [ImageInput.of(given) for given in images]
        prepared = self._prepared(run, images)
        if audio is not None and self.audio_sources is None:
            raise ValueError("A soundtrack needs a pipeline with sound; open the files with sound=True (--sound).")
        if audio is not None:
            describe_audio_vae(self.audio_sources, decode=False)
            audio = audio if isinstance(audio, given_sound.Soundtrack) else given_sound.read_soundtrack(audio)
        made = {"program": f"ltx2-gguf {__version__}", "prompt": prompt, **run.as_dict(), **self.files}
        if run.guidance.needs_negative:
            made["negative_prompt"] = self._negative(negative_prompt)
        made["images"] = [given.as_dict() for given in images]
        made["loras"] = [{"lora": report.path.name, "strength": report.strength} for report in self.loras]
        self.made = made
        return self._stream(prompt, run, negative_prompt, prepared, audio, progress)

    @torch.inference_mode()
    def _stream(self, prompt, run, negative_prompt, prepared, audio, progress):
        self.soundtrack = None
        if self.audio_sources is None:
            latent = self._sample(prompt, run, negative_prompt, prepared, progress)
        else:
            latent = self._sample_with_sound(prompt, run, negative_prompt, prepared, audio, progress)
        if self.ranks is not None and not self.ranks.is_first:
            return  # the first rank decodes
        yield from self.decode(latent, progress)

    def settings(self, **given) -> Settings:
        """One run with everything decided: arguments of ``sampling.settings.decide``, what is not given from the preset. Raises ValueError."""
        return decide(self.preset, self.dit.config.version, self.dit.config.num_layers, **given)

    def save(
        self,
        frames: torch.Tensor | Iterator[torch.Tensor],
        path: str | Path,
        *,
        fps: float | None = None,
        overwrite: bool = False,
    ) -> int:
        """Write frames, or the chunks of ``stream`` as they come, to an .mp4, .webm or .gif with what they were made from; returns how many.

        fps: default that of the last run. Raises MediaError, OutputError or OSError; then no file was changed.
        """
        from . import media

        fps = self.made.get("fps", self.preset.fps) if fps is None else fps
        frames = [frames] if isinstance(frames, torch.Tensor) else frames
        sound = lambda: None if self.soundtrack is None else (self.soundtrack.waveform, self.soundtrack.rate)
        return media.write_video(frames, fps, path, metadata=self.made or None, overwrite=overwrite, sound=sound)

    # -- the stages ------------------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def sample(
        self,
        prompt: str,
        run: Settings,
        *,
        negative_prompt: str | None = None,
        images: Sequence = (),
        progress: Progress | None = None,
    ) -> torch.Tensor:
        """The finished latent [1, C, F, H, W], normalised, float32, on the CPU. Raises NotFiniteError, naming the layer it comes from."""
        return self._sample(prompt, run, negative_prompt, self._prepared(run, images), progress)

    def _sample(self, prompt, run, negative_prompt, prepared, progress):
        if not prompt.strip():
            log.warning("The prompt is empty, so nothing says what the video should show; write one to steer it.")
        prompts = [prompt]
        if run.guidance.needs_negative:
            prompts.append(self._negative(negative_prompt))
        contexts = self.encode_prompts(prompts, progress)
        state = self._conditioned(run, prepared, progress)
        noise = conditioning.gaussian_noise(tuple(state.clean.shape), run.seed)
        latent = conditioning.noised(state, noise, float(run.sigmas[0]))
        with self._transformer(state.clean.shape[2:].numel()):
            for step in self._sampler(run, state, latent, contexts):
                _tell(progress, "sample", step.index + 1, step.total)
        return conditioning.crop_guides(state, step.latent).cpu()

    def _sample_with_sound(self, prompt, run, negative_prompt, prepared, soundtrack, progress):
        """The video's latent; ``soundtrack`` of the pipeline is then that of the clip, the given one or the one that was made."""
        guided = joint_guidance(self.preset, run, self.dit.config.num_layers)
        audio = given_sound.condition(self.audio_sources, soundtrack, run.frames, run.fps, self.device)
        guided = guidance.JointGuidance(guided.video) if audio.is_given else guided
        prompts = [prompt, *([self._negative(negative_prompt)] if guided.needs_negative else [])]
        contexts = self.encode_prompts(prompts, progress)
        state = self._conditioned(run, prepared, progress)
        with self._transformer(state.clean.shape[2:].numel() + audio.clean.shape[2]):
            for step, latents in joint.sample(
                self.dit,
                contexts,
                state,
                audio,
                guided,
                sigmas=run.sigmas,
                sampler=run.sampler,
                seed=run.seed,
                frame_rate=run.fps,
                device=self.device,
            ):
                finite.check(f"The latent after step {step.index + 1}", step.latent, self.dit)
                _tell(progress, "sample", step.index + 1, step.total)
        if soundtrack is None:
            with self.memory.reserved(0 if self._in_place else given_sound.VAE_BYTES, "the audio VAE"):
                self.soundtrack = given_sound.decode(self.audio_sources, latents[1], self.device)
        else:
            self.soundtrack = soundtrack.cut(run.frames / run.fps)
        return conditioning.crop_guides(state, latents[0]).cpu()

    def _negative(self, given: str | None) -> str:
        return guidance.NEGATIVE_PROMPTS[self.dit.config.version] if given is None else given

    def encode_prompts(self, prompts: Sequence[str], progress: Progress | None = None) -> list[torch.Tensor]:
        """One context [1, S, Dc] per prompt, on the device. The text encoder is loaded for prompts not seen before, and leaves again."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._contexts]
        if self.ranks is not None:  # each rank encodes its share
            self._contexts |= self.ranks.shared(new, lambda mine: self._encoded(mine, progress), self.dtype)
        else:
            self._contexts |= self._encoded(new, progress)
        for prompt in prompts:
            self._contexts[prompt] = self._contexts.pop(prompt)  # the last used stand last
        for prompt in list(self._contexts)[: -max(CONTEXTS_KEPT, len(set(prompts)))]:
            del self._contexts[prompt]
        return [self._contexts[prompt].to(self.device) for prompt in prompts]

    def _encoded(self, prompts: Sequence[str], progress: Progress | None) -> dict[str, torch.Tensor]:
        """{prompt: context [1, S, Dc] on the CPU}."""
        contexts = {}
        if prompts:
            features = self._features(prompts, progress)
            with contextlib.ExitStack() as stack:
                for connector in self._connectors():
                    stack.enter_context(self._resident(connector, "the embeddings connector"))
                for prompt, feature in zip(prompts, features, strict=True):

                    def context():
                        return self.dit.preprocess_text_embeds(feature.to(self.device, self.dtype), unprocessed=True)

                    made = context()
                    finite.check("The prompt's context", made, self.dit, context)
                    contexts[prompt] = made.cpu()
        return contexts

    def _features(self, prompts: Sequence[str], progress: Progress | None) -> list[torch.Tensor]:
        """Text features [1, n, Dv] of each prompt, on the CPU."""
        dtype = self.dtype if self.dtype != torch.float16 else torch.float32
        encoder = load_text_encoder(self.text_sources, dtype=dtype, audio=self.audio_sources is not None)
        layers = encoder.gemma.model.layers
        with contextlib.ExitStack() as stack:
            scope = None
            if not self._in_place:
                stack.enter_context(self._resident(encoder, "the text encoder's other weights", skip=[layers]))
                stack.enter_context(self.memory.reserved(self._text_bytes(encoder, prompts), "encoding a prompt"))
                scope = stack.enter_context(BlockStreamer([Bundle(layer) for layer in layers], self.memory)).scope
            result = []
            for done, prompt in enumerate(prompts, 1):
                for notice in filter(None, [encoder.tokenizer.what_is_cut(prompt)]):
                    log.warning("%s", notice)

                def features():
                    return encoder.encode(prompt, device=self.device, layer_scope=scope)

                result.append(features().cpu())
                finite.check("The text encoder's output", result[-1], encoder, features)
                _tell(progress, "text", done, len(prompts))
        return result

    @staticmethod
    def _text_bytes(encoder, prompts: Sequence[str]) -> int:
        """Room for the activations of the longest prompt: in Gemma's layers, and in the projection with its tile of decoded rows."""
        config = encoder.gemma.config
        tokens = max(len(encoder.tokenizer.encode(prompt)) for prompt in prompts)
        layers = activation_bytes(
            tokens, max(config.width, config.ffn_width // 4), torch.float32, config.width * config.ffn_width
        )
        layers += gathered_bytes(config, tokens)
        inputs = 4 * config.width * config.num_hidden_states
        tile = min(text_projection.TILE_BYTES, inputs * encoder.text_embedding_projection.features)
        return max(layers, min(2 * tokens * inputs, text_projection.INPUT_BYTES) + tile)

    def condition(self, run: Settings, images: Sequence = (), progress: Progress | None = None) -> Conditioned:
        """The latent with its mask: empty, or with the images encoded into it (frame 0 replaced, others as guides)."""
        return self._conditioned(run, self._prepared(run, images), progress)

    def _prepared(self, run: Settings, images: Sequence) -> list[tuple[torch.Tensor, int, float]]:
        if images and self.parts is not None and "encoder" not in self.parts.vae_sides:
            raise ValueError(
                f"{Path(self.parts.vae.path).name} holds no VAE encoder, which images need; give a whole video VAE as 'vae'."
            )
        return [given_images.prepare(given, run) for given in images]

    def _conditioned(self, run: Settings, prepared: Sequence, progress: Progress | None) -> Conditioned:
        state = conditioning.empty(run.latent_shape, channels=self.dit.config.in_channels)
        if not prepared:
            return state
        encoded = []
        with self._vae("encoder") as vae:
            for done, (pixels, frame, strength) in enumerate(prepared, 1):
                latent = vae.encode(pixels.to(self.device), free_memory=self._free_bytes())
                encoded.append((latent.float().cpu(), frame, strength))
                _tell(progress, "image", done, len(prepared))
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
            skip = [self.dit.transformer_blocks, *self._connectors()]
            stack.enter_context(self._resident(self.dit, "the transformer's first and last layers", skip))
            stack.enter_context(self.memory.reserved(need, "computing a step"))
            blocks = [Bundle(block) for block in self.dit.transformer_blocks]
            self.dit.streamer = stack.enter_context(BlockStreamer(blocks, self.memory))
            try:
                yield
            finally:
                self.dit.streamer = None

    def _sampler(
        self, run: Settings, state: Conditioned, latent: torch.Tensor, contexts: Sequence[torch.Tensor]
    ) -> Iterator[samplers.Step]:
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
        g, seen = run.guidance, []

        def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
            seen.append((x, sigma))

            def x0(context, **special):
                return samplers.x0_from_velocity(
                    x, self.dit.velocity(x, sigma, context, **common, **special), sigma, mask
                )

            calls = [lambda: x0(contexts[0])]
            if g.needs_negative:
                calls.append(lambda: x0(contexts[1]))
            if g.needs_perturbed:
                calls.append(lambda: x0(contexts[0], stg_blocks=g.stg_blocks))
            found = iter(self.ranks.passes(calls) if self.ranks is not None else [call() for call in calls])
            positive = next(found)
            negative = next(found) if g.needs_negative else None
            perturbed = next(found) if g.needs_perturbed else None
            return guidance.combine(
                positive, negative, perturbed, cfg=g.cfg, stg=g.stg if g.needs_perturbed else 0.0, rescale=g.rescale
            )

        for step in samplers.SAMPLERS[run.sampler](denoise, latent, run.sigmas, mask=mask, clean=clean, seed=run.seed):
            again = None if self.ranks is not None else lambda: [denoise(*call) for call in list(seen)]
            finite.check(f"The latent after step {step.index + 1}", step.latent, self.dit, again)
            seen.clear()
            yield step

    @torch.inference_mode()
    def decode(self, latent: torch.Tensor, progress: Progress | None = None) -> Iterator[torch.Tensor]:
        """Latent [1, C, F, H, W] -> chunks of frames [n, H, W, 3], float32 in [0, 1], on the CPU."""
        with self._vae("decoder") as vae:
            total, done = vae.decode_output_shape(latent.shape)[2], 0

            def chunks():
                return vae.decode_stream(latent.to(self.device), free_memory=self._free_bytes())

            for pixels in chunks():  # (1, 3, n, H, W)
                finite.check("The decoded picture", pixels, vae, lambda: list(chunks()))
                done += pixels.shape[2]
                _tell(progress, "decode", done, total)
                yield (
                    pixels[0].permute(1, 2, 3, 0).float().add(1).div(2).clamp(0, 1).cpu()
                )  # (3, n, H, W) -> (n, H, W, 3)

    # -- places ----------------------------------------------------------------------------------------------------------------------

    def _connectors(self):
        """Those that the model has: the video's, and with sound the audio's."""
        return [c for c in (self.dit.video_embeddings_connector, self.dit.audio_embeddings_connector) if c is not None]

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
