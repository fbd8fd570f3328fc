"""The LTX-2 video transformer (2.0 and 2.3): noisy latent, sigma and text context in, velocity out.

One class runs in and outside the host. Its surface (attribute and parameter names, the call signatures of block, attention and
feed-forward, the ``transformer_options`` hooks) is that of the host's audio-and-video class with an empty audio stream, because
samplers, context windows and community nodes reach into it. ``forward`` is the host's entry, ``velocity`` the headless one; both
run the same code.

The model predicts v = noise - clean under x_sigma = (1 - sigma) clean + sigma noise, per token.

Sources: Lightricks/LTX-2 ``ltx_core/model/transformer/{model,transformer}.py`` (numbers),
Comfy-Org/ComfyUI ``comfy/ldm/lightricks/{model,av_model}.py`` (surface, guides).
"""

import functools
import logging

import torch
from torch import nn

from . import fused
from .config import MODEL_NAMES
from .connector import Embeddings1DConnector
from .guides import GuideAttentionMask, guide_mask
from .layers import (
    FF_CHUNK_TOKENS,
    VALUES_ONLY,
    AdaLayerNormSingle,
    Attention,
    CaptionProjection,
    FeedForward,
    quantizes,
    rms_norm,
    untouched,
)
from .modulation import Modulation, distinct_timesteps, spread
from .patchify import AudioPatchifier, SymmetricPatchifier, pixel_coords, token_positions
from .rope import rotary_table
from .surface import HostMethods, describe

STG_BLOCKS = (
    "stg_self_attn_blocks"  # the host's transformer_options key: block numbers whose self-attention returns its values
)
BASE_ROWS, CROSS_ATTENTION_ROWS = 6, 9  # rows of the modulation tables without and with cross-attention modulation
CACHED_ROTARY_TABLES = 2  # one per geometry; a two-stage run uses two

logger = logging.getLogger(__name__)


def _untraced(method):
    """``torch.compiler.disable`` for a method, applied when it is traced: applying it at import would import torch._dynamo and triton."""

    @functools.wraps(method)
    def call(self, *args):
        if torch.compiler.is_compiling():
            return torch.compiler.disable(method)(self, *args)
        return method(self, *args)

    return call


class TransformerBlock(nn.Module):
    """Self-attention, text cross-attention, feed-forward, each on the RMS-normed stream and added back to it.

    Table rows: 0 shift, 1 scale, 2 gate of self-attention; 3 shift, 4 scale, 5 gate of the feed-forward; 6 shift, 7 scale,
    8 gate of cross-attention (2.3). Prompt table rows: 0 shift, 1 scale of the context (2.3).
    """

    def __init__(self, config, dtype=None, device=None, operations=nn, attention=None):
        super().__init__()
        dim, adaln = config.inner_dim, config.cross_attention_adaln
        kw = {"dtype": dtype, "device": device, "operations": operations}
        heads = {
            "heads": config.num_attention_heads, "dim_head": config.attention_head_dim, "eps": config.qk_norm_eps,
            "apply_gated_attention": config.apply_gated_attention, "attention": attention,
        }  # fmt: skip
        self.eps = config.norm_eps
        self.cross_attention_adaln = adaln
        self.attn1 = Attention(dim, **heads, **kw)
        self.attn2 = Attention(dim, config.cross_attention_dim, **heads, **kw)
        self.ff = FeedForward(dim, config.ff_dim, **kw)
        self.scale_shift_table = nn.Parameter(
            torch.empty(CROSS_ATTENTION_ROWS if adaln else BASE_ROWS, dim, dtype=dtype, device=device)
        )
        if adaln:
            self.prompt_scale_shift_table = nn.Parameter(torch.empty(2, dim, dtype=dtype, device=device))

    def get_ada_values(self, scale_shift_table, batch_size, timestep, indices=slice(None)):
        """Rows of the table plus the timestep's, each [B, T or 1, D] (the host's method, for code that replaces ``forward``)."""
        return _modulation(timestep).expand_for_computation(scale_shift_table, batch_size, indices)

    def forward(self, x, v_context=None, a_context=None, attention_mask=None, v_timestep=None, a_timestep=None, v_pe=None, a_pe=None,
                v_cross_pe=None, a_cross_pe=None, v_cross_scale_shift_timestep=None, a_cross_scale_shift_timestep=None,
                v_cross_gate_timestep=None, a_cross_gate_timestep=None, transformer_options=None, self_attention_mask=None,
                v_prompt_timestep=None, a_prompt_timestep=None):  # fmt: skip
        """(video [B, T, D], audio) -> the same pair; audio is handed through, arguments about it (``a_…``, ``…cross…``) are not read.

        v_context [B, S, Dc]; v_timestep: Modulation or [B, 1 or T, R*D]; v_prompt_timestep [B, 1, 2*D]; v_pe: RotaryTable;
        attention_mask: bias on text keys; self_attention_mask: GuideAttentionMask or None. Writes into the video tensor unless
        gradients are recorded.
        """
        vx, ax = x
        options = transformer_options or {}
        if not options.get("run_vx", True):
            return vx, ax
        modulation = _modulation(v_timestep)
        table = self.scale_shift_table
        if modulation.index is None:
            rows = modulation.rows(table, slice(None))
            select = lambda first: rows[first : first + 3]
        else:  # rows per token: three of them at a time
            select = lambda first: modulation.rows(table, slice(first, first + 3))
        shift, scale, gate = select(0)
        h = fused.rms_modulate(vx, scale, shift, self.eps)
        y = self.attn1(h, pe=v_pe, mask=self_attention_mask, transformer_options=transformer_options)

        shift_q = scale_q = gate_q = None  # 2.0: plain norm, no gate
        if self.cross_attention_adaln:
            shift_q, scale_q, gate_q = select(6)
            v_context = self._modulated_context(v_context, v_prompt_timestep)
        vx, h = fused.gate_residual_rms_modulate_(vx, y, gate, scale_q, shift_q, self.eps)
        y = self.attn2(h, context=v_context, mask=attention_mask, transformer_options=transformer_options)

        shift, scale, gate = select(3)
        vx, h = fused.gate_residual_rms_modulate_(vx, y, gate_q, scale, shift, self.eps, quantizes(self.ff, vx))
        return fused.gate_residual_(vx, self.ff(h), gate), ax

    def _apply_text_cross_attention(self, x, context, attn, scale_shift_table, prompt_scale_shift_table, timestep, prompt_timestep,
                                    attention_mask, transformer_options):  # fmt: skip
        """What text cross-attention adds to x [B, T, D] (the host's method, for code that replaces ``forward``)."""
        if not self.cross_attention_adaln:
            return attn(
                rms_norm(x, self.eps), context=context, mask=attention_mask, transformer_options=transformer_options
            )
        shift, scale, gate = _modulation(timestep).rows(scale_shift_table, slice(6, 9))
        h = fused.rms_modulate(x, scale, shift, self.eps)
        shift, scale = _modulation(prompt_timestep).rows(prompt_scale_shift_table, slice(0, 2))
        context = torch.addcmul(shift, context, scale + 1)
        return attn(h, context=context, mask=attention_mask, transformer_options=transformer_options) * spread(
            gate, x.shape[1]
        )

    def _modulated_context(self, context, prompt_timestep):
        shift, scale = _modulation(prompt_timestep).rows(self.prompt_scale_shift_table, slice(0, 2))
        return torch.addcmul(shift, context, scale + 1)  # (B, S, D); not normed again


def _modulation(timestep):
    return timestep if isinstance(timestep, Modulation) else Modulation(timestep, timestep.shape[1])


class LTX2Model(HostMethods, nn.Module):
    """Video transformer with its embeddings connector.

    config: LTX2Config; operations: namespace of layer classes (``torch.nn`` or the host's); attention: see ``layers.sdpa``.
    """

    block_class, guide_mask_class = TransformerBlock, GuideAttentionMask

    def __init__(self, config, operations=nn, dtype=None, device=None, attention=None):
        super().__init__()
        dim = config.inner_dim
        kw = {"dtype": dtype, "device": device, "operations": operations}
        self.config = config
        self.dtype = dtype or torch.get_default_dtype()
        self.scale_velocity_by_mask = False
        self.sequence_parallel = None  # set by parallel.sequence: the group of ranks that share every pass
        self._rotary_tables = {}
        self.low_memory = False
        self.streamer = None  # an ``offload.streamer.BlockStreamer`` while the blocks' weights pass through the device

        describe(self, config, operations)
        self.patchifier, self.a_patchifier = SymmetricPatchifier(), AudioPatchifier()

        self.patchify_proj = operations.Linear(config.in_channels, dim, bias=True, dtype=dtype, device=device)
        self.adaln_single = AdaLayerNormSingle(
            dim, CROSS_ATTENTION_ROWS if config.cross_attention_adaln else BASE_ROWS, **kw
        )
        self.prompt_adaln_single = AdaLayerNormSingle(dim, 2, **kw) if config.cross_attention_adaln else None
        self.caption_projection = (
            nn.Identity()
            if config.caption_proj_before_connector
            else CaptionProjection(config.caption_channels, dim, **kw)
        )
        self.video_embeddings_connector = (
            Embeddings1DConnector(config.connector, attention=attention, **kw) if config.connector else None
        )
        self.transformer_blocks = nn.ModuleList(
            self.block_class(config, attention=attention, **kw) for _ in range(config.num_layers)
        )
        self.scale_shift_table = nn.Parameter(torch.empty(2, dim, dtype=dtype, device=device))
        self.norm_out = operations.LayerNorm(
            dim, elementwise_affine=False, eps=config.norm_eps, dtype=dtype, device=device
        )
        self.proj_out = operations.Linear(dim, config.out_channels, bias=True, dtype=dtype, device=device)

    def velocity(
        self,
        latent,
        sigma,
        context,
        frame_rate,
        denoise_mask=None,
        keyframe_idxs=None,
        guide_attention_entries=None,
        stg_blocks=(),
    ):
        """Per-token velocity, the headless entry. Returns a tensor of latent's shape and dtype.

        latent [B, C, F, H, W] (normalised, any float dtype); sigma: float or [B], the step's noise level in [0, 1];
        context [B, S, Dc] from the connector; frame_rate in frames per second; denoise_mask [B, 1, F, H or 1, W or 1]: a token's
        own noise level is sigma times its mask; keyframe_idxs [B, 3, K, 2] integer pixel intervals of the last K tokens (time in
        frames); guide_attention_entries: see ``guides``; stg_blocks: block numbers whose self-attention returns its values.
        """
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=latent.device).expand(latent.shape[0])
        timestep = sigma
        if denoise_mask is not None:
            denoise_mask = denoise_mask[:, :1].expand(-1, -1, *latent.shape[2:])
            timestep = self.patchifier.patchify(denoise_mask.float())[0] * sigma.view(-1, 1, 1)  # (B, T, 1)
        options = {STG_BLOCKS: tuple(stg_blocks), "sigmas": sigma}
        out = self._velocity(
            latent.to(self.dtype), timestep, context.to(self.dtype), frame_rate=frame_rate, transformer_options=options, keyframe_idxs=keyframe_idxs,
            denoise_mask=denoise_mask, guide_attention_entries=guide_attention_entries,
        )  # fmt: skip
        return out.to(latent.dtype)

    def forward(self, x, timestep, context, attention_mask=None, frame_rate=25, transformer_options=None, keyframe_idxs=None, denoise_mask=None,
                guide_attention_entries=None, **other):  # fmt: skip
        """The host's entry. x: video latent [B, C, F, H, W], or a list [video] or [video, audio]; returns a tensor or [video, audio].

        timestep: [B] or [B, T, 1] (sigma, times the mask where there is one), or the pair (video, audio). The audio velocity is
        zero: sound passes through unchanged. ``other`` takes what the host hands every model (latent shapes, reference audio, …).

        With ``scale_velocity_by_mask`` the velocity is multiplied by the mask: the host computes x0 = x - sigma v with one
        sigma for the clip, and m v makes that exact for tokens whose noise level is m sigma.
        """
        latents = list(x) if isinstance(x, (list, tuple)) else [x]
        if isinstance(timestep, (list, tuple)):
            timestep = timestep[0]
        v = self._velocity(
            latents[0],
            timestep,
            context,
            attention_mask,
            frame_rate,
            transformer_options,
            keyframe_idxs,
            denoise_mask,
            guide_attention_entries,
        )
        if self.scale_velocity_by_mask and denoise_mask is not None:
            v = v * denoise_mask[:, :1].clamp(0, 1).to(v.dtype)
        if len(latents) > 1:
            return [v, *(torch.zeros_like(audio) for audio in latents[1:])]
        return v

    def preprocess_text_embeds(self, context, unprocessed=False):
        """Conditioning as the host hands it over -> context for the DiT, [B, S, Dc].

        Stock conditionings carry the sound's columns behind the video's. Text features (``unprocessed``) go through the
        connector. For 2.3 features and finished context have the same width, so only the flag tells them apart; a tensor
        without the flag that is as wide as video and sound together is finished. Raises ValueError for a width that fits neither.
        """
        width = self.config.connector.inner_dim if self.config.connector else self.config.context_dim
        # 2.3: the sound's columns are half as many. 2.0: features are shared, finished contexts come one after the other.
        beside = (width // 2,) if self.config.caption_proj_before_connector else () if unprocessed else (width,)
        if context.shape[-1] not in (width, *(width + more for more in beside)):
            name = MODEL_NAMES[self.config.version]
            raise ValueError(
                f"The conditioning is {context.shape[-1]} wide, this {name} model takes {width}; "
                f"encode the prompt with the text encoder and projection of {name}."
            )
        video = context[..., :width]
        if not unprocessed and context.shape[-1] > width:
            return video
        if self.video_embeddings_connector is None:
            raise ValueError(
                "The conditioning holds text features, but no embeddings connector was loaded with this model; give the loader the file that holds it."
            )
        return self.video_embeddings_connector(video)[0]

    def block_runner(self, device, transformer_options):
        """For one pass: run(number, call) -> call() with what block ``number`` needs on ``device``; None where all of it is there.

        Under the host weights are prefetched here. Called with (None, None) behind the last block.
        """
        return None if self.streamer is None else self.streamer.run

    def _velocity(self, latent, timestep, context, attention_mask=None, frame_rate=25, transformer_options=None, keyframe_idxs=None, denoise_mask=None,
                  guide_attention_entries=None):  # fmt: skip
        """latent [B, C, F, H, W] -> velocity [B, C_out, F, H, W]."""
        options = transformer_options or {}
        x, arguments, finish = self._video_stream(
            latent,
            timestep,
            context,
            attention_mask,
            frame_rate,
            options,
            keyframe_idxs,
            denoise_mask,
            guide_attention_entries,
        )
        return finish(self._run_blocks((x, x.new_zeros(x.shape[0], 0, 0)), options, **arguments)[0])

    def _video_stream(
        self,
        latent,
        timestep,
        context,
        attention_mask,
        frame_rate,
        options,
        keyframe_idxs,
        denoise_mask,
        guide_attention_entries,
    ):
        """(x [B, T, D], what the blocks are told about the video, function from the last x to the velocity [B, C_out, F, H, W])."""
        batch, _, frames, height, width = latent.shape
        tokens = self.patchifier.patchify(latent)[0]  # (B, C, F, H, W) -> (B, T, C)
        if keyframe_idxs is not None and keyframe_idxs.shape[2] == 0:
            keyframe_idxs = None
        keep = _kept_tokens(denoise_mask) if keyframe_idxs is not None else None  # bool [T] on the CPU, None: all
        kept = keep.nonzero()[:, 0].to(latent.device) if keep is not None else None
        if kept is not None:
            tokens = tokens[:, kept]

        arguments = dict(
            self._rotary_tables_for((frames, height, width), frame_rate, keyframe_idxs, keep, latent.device)
        )
        timestep_arguments, embedded = self._timestep_rows(timestep, batch, frames, kept, options, latent.dtype)
        arguments |= timestep_arguments
        for modulation in (*timestep_arguments.values(), embedded):
            if isinstance(modulation, Modulation):
                modulation.tokens = tokens.shape[1]
        context, attention_mask = self._context(context, attention_mask)
        guide_tokens = keyframe_idxs.shape[2] if keyframe_idxs is not None else 0
        guide_keep = keep[-guide_tokens:] if keep is not None else None
        guide_bias = (
            guide_mask(
                guide_attention_entries,
                guide_tokens,
                guide_keep,
                tokens.shape[1],
                latent.device,
                latent.dtype,
                self.guide_mask_class,
            )
            if guide_tokens
            else None
        )
        arguments |= {"v_context": context, "attention_mask": attention_mask, "self_attention_mask": guide_bias}

        parallel = self.sequence_parallel
        if parallel is not None:  # from here on T is this rank's share
            parallel.begin(tokens.shape[1])
            tokens, embedded = parallel.shard(tokens), parallel.shard_modulation(embedded)
            arguments["v_pe"], arguments["v_timestep"] = (
                parallel.shard_rotary(arguments["v_pe"]),
                parallel.shard_modulation(arguments["v_timestep"]),
            )

        def finish(x):
            x = self._output(
                x, embedded, self.scale_shift_table, self.norm_out, self.proj_out
            )  # (B, T, D) -> (B, T, C_out)
            if parallel is not None:
                x = parallel.gather(x)
            if kept is not None:
                x = torch.zeros(batch, keep.shape[0], x.shape[-1], dtype=x.dtype, device=x.device).index_copy(
                    1, kept, x
                )
            return self.patchifier.unpatchify(x, height, width, frames, x.shape[-1])

        return self.patchify_proj(tokens), arguments, finish  # (B, T, C) -> (B, T, D)

    def _timestep_rows(self, timestep, batch, frames, kept, options, dtype):
        """(what the blocks are told about the timestep, Modulation of the output layer)."""
        timestep = timestep.to(torch.float32).reshape(batch, -1)  # (B, 1) or (B, T)
        if kept is not None and timestep.shape[1] > 1:
            timestep = timestep[:, kept]
        values, layout = distinct_timesteps(timestep, None if kept is not None else frames)
        return self._modulations(values * self.timestep_scale_multiplier, layout, _step_sigma(options, timestep), dtype)

    def _modulations(self, values, layout, sigma, dtype):
        """``_timestep_rows`` from the distinct timesteps [N] (times 1000), their layout over the tokens and the step's sigma [B]."""
        rows, embedded = self.adaln_single(values, dtype)
        prompt = None
        if self.prompt_adaln_single is not None:
            prompt = self.prompt_adaln_single(sigma * self.timestep_scale_multiplier, dtype)[0].unsqueeze(
                1
            )  # (B, 2D) -> (B, 1, 2D)
        return {"v_timestep": layout(rows), "v_prompt_timestep": prompt}, layout(embedded)

    def _context(self, context, attention_mask):
        """(context [B, S, D] in DiT width, mask or None). The mask is dropped when it speaks of other tokens than the context's."""
        context = self.caption_projection(context[..., : self.config.context_dim])
        if attention_mask is None or attention_mask.shape[-1] != context.shape[1]:
            return context, None
        if not attention_mask.is_floating_point():
            mask = (
                (attention_mask - 1).to(context.dtype).reshape(attention_mask.shape[0], 1, -1, attention_mask.shape[-1])
            )
            attention_mask = mask * torch.finfo(context.dtype).max
        return context, attention_mask

    @_untraced
    def _rotary_tables_for(self, grid, frame_rate, keyframe_idxs, keep, device):
        """{argument of the block: RotaryTable} for the kept tokens; the last ones lie where keyframe_idxs says."""
        guides = None if keyframe_idxs is None else keyframe_idxs.to("cpu", torch.float32)
        key = (grid, float(frame_rate), device) + tuple(
            None if t is None else t.numpy().tobytes() for t in (guides, keep)
        )
        tables = self._rotary_tables.pop(key, None)
        if tables is None:
            coords = pixel_coords(*grid, self.vae_scale_factors)  # (1, 3, T, 2)
            if guides is not None:
                guides = guides[:1] if bool((guides == guides[:1]).all()) else guides
                coords = coords.to(torch.float32).repeat(guides.shape[0], 1, 1, 1)
                coords[:, :, -guides.shape[2] :] = guides
            if keep is not None:
                coords = coords[:, :, keep]
            tables = self._tables_at(token_positions(coords, frame_rate), device)
            while len(self._rotary_tables) >= CACHED_ROTARY_TABLES:
                self._rotary_tables.pop(next(iter(self._rotary_tables)))
        self._rotary_tables[key] = tables
        return tables

    def _tables_at(self, positions, device):
        """``_rotary_tables_for`` tokens at positions [B, 3, T] (seconds, pixels, pixels)."""
        c = self.config
        return {
            "v_pe": rotary_table(
                positions, c.rope_max_pos, self.inner_dim, self.num_attention_heads, c.rope_theta, device
            )
        }

    def forget_tables(self):
        """Give the rotary tables' device memory back (they are made again when needed)."""
        self._rotary_tables.clear()

    def set_low_memory(self, on):
        """After running out of memory: the feed-forwards work on a quarter of the tokens at once."""
        self.low_memory = on
        for module in self.transformer_blocks.modules():
            if isinstance(module, FeedForward):
                module.chunk_tokens = FF_CHUNK_TOKENS // 4 if on else FF_CHUNK_TOKENS

    def _run_blocks(self, pair, options, **shared):
        """All blocks in order, through the host's replacement hooks. pair: (video [B, T, D], audio [B, L, A]) -> the same."""
        replacements = options.get("patches_replace", {}).get("dit", {})
        run = self.block_runner(pair[0].device, options)
        for number, block in enumerate(self.transformer_blocks):
            arguments = {**_NO_AUDIO, **shared, "transformer_options": self._block_options(number, options)}
            replace = replacements.get(("double_block", number))
            if replace is None:
                call = functools.partial(block, pair, **arguments)
            else:
                call = functools.partial(_replaced, replace, block, pair, arguments)
            pair = call() if run is None else run(number, call)
        if run is not None:
            run(None, None)
        return pair

    def _block_options(self, number, options):
        """``transformer_options`` as block ``number`` gets them."""
        return {**options, VALUES_ONLY: True} if number in options.get(STG_BLOCKS, ()) else options

    def _output(self, x, embedded, table, norm_out, proj_out):
        """Norm, shift and scale of an output layer (table rows 0 shift, 1 scale), projection. [B, T, D] -> [B, T, C_out]."""
        shift, scale = (
            value + embedded.data for value in table.to(device=x.device, dtype=x.dtype)[:, None, None].unbind()
        )
        if embedded.index is not None:
            shift, scale = shift[0][embedded.index], scale[0][embedded.index]
        if untouched(norm_out):
            return proj_out(fused.layer_norm_modulate(x, scale, shift, self.config.norm_eps))
        tokens = x.shape[1]
        return proj_out(torch.addcmul(spread(shift, tokens), norm_out(x), spread(scale, tokens) + 1))


# Arguments of the host's block that concern sound.
_NO_AUDIO = dict.fromkeys((
    "a_context", "a_timestep", "a_pe", "v_cross_pe", "a_cross_pe", "v_cross_scale_shift_timestep", "a_cross_scale_shift_timestep",
    "v_cross_gate_timestep", "a_cross_gate_timestep", "a_prompt_timestep",
))  # fmt: skip


def _replaced(replace, block, pair, arguments):
    """What a node put in the block's place makes of it."""

    def original(args):
        return {"img": block(args["img"], **_block_arguments(args))}

    return replace({"img": pair, **arguments}, {"original_block": original})["img"]


def _block_arguments(args):
    """The block's keyword arguments out of what a replacement passes on (it may have added entries of its own)."""
    names = (
        *_NO_AUDIO,
        "v_context",
        "attention_mask",
        "v_timestep",
        "v_pe",
        "transformer_options",
        "self_attention_mask",
        "v_prompt_timestep",
    )
    return {name: args.get(name) for name in names}


def _kept_tokens(denoise_mask):
    """Bool [T] on the CPU: False where the mask is negative (holes of a dilated reference). None when there are none."""
    if denoise_mask is None:
        return None
    keep = ~(denoise_mask[0] < 0).any(dim=0).flatten().cpu()  # (C, F, H, W) -> (T,)
    return None if bool(keep.all()) else keep


def _step_sigma(options, timestep):
    """The step's sigma [B], not multiplied by any mask.

    The sampler's own value where the host passes it; else the largest timestep of each sample, which is the same as soon as
    one token is unmasked. 0 where every token of a stream is given (an input that is only looked at).
    """
    batch = timestep.shape[0]
    sigmas, largest = options.get("sigmas"), timestep.amax(dim=1)
    if sigmas is None:
        return largest
    sigmas = sigmas.to(device=timestep.device, dtype=torch.float32).flatten()
    sigmas = sigmas.repeat(batch // sigmas.shape[0]) if batch % sigmas.shape[0] == 0 else sigmas[:1].expand(batch)
    return torch.where(largest > 0, sigmas, 0.0)
