"""The joint transformer: the video stream of ``model.py`` with an audio stream beside it, and attention between the two.

Each stream has its own tokens, text context, timesteps and widths. In every block both go through self-attention and text
cross-attention, then look at each other (audio to video and video to audio, both at the state before either was added), then through their
feed-forwards. Names, call signatures and ``transformer_options`` are those of the host's class.

Sources: Lightricks/LTX-2 ``ltx_core/model/transformer/{model,transformer,transformer_args}.py`` (numbers),
Comfy-Org/ComfyUI ``comfy/ldm/lightricks/av_model.py`` (surface, reference audio).
"""

import torch
from torch import nn

from . import fused
from .config import MODEL_NAMES
from .connector import Embeddings1DConnector
from .layers import VALUES_ONLY, AdaLayerNormSingle, Attention, CaptionProjection, FeedForward, quantizes
from .model import (
    BASE_ROWS,
    CROSS_ATTENTION_ROWS,
    STG_BLOCKS,
    LTX2Model,
    TransformerBlock,
    _modulation,
    _step_sigma,
)  # fmt: skip
from .modulation import distinct_timesteps
from .rope import rotary_table

# transformer_options keys: blocks whose audio self-attention returns its values, and (inside a block) whether it does. Without them the
# host's keys count for both streams.
AUDIO_STG_BLOCKS, AUDIO_VALUES_ONLY = "ltx2_audio_stg_blocks", "ltx2_audio_values_only"
SCALE_SHIFT_ROWS = (
    4  # of the five-row tables between the streams: scale, shift (audio to video), scale, shift (video to audio), gate
)


class AVTransformerBlock(TransformerBlock):
    """A video block with its audio twin and the attention between them.

    Rows of the five-row tables: 0 scale, 1 shift for audio to video, 2 scale, 3 shift for video to audio, 4 gate of what the stream receives.
    """

    def __init__(self, config, dtype=None, device=None, operations=nn, attention=None):
        super().__init__(config, dtype=dtype, device=device, operations=operations, attention=attention)
        audio, dim, width = config.audio, config.inner_dim, config.audio.inner_dim
        kw = {"dtype": dtype, "device": device, "operations": operations}
        shared = {
            "heads": audio.num_attention_heads, "eps": config.qk_norm_eps, "apply_gated_attention": config.apply_gated_attention,
            "attention": attention,
        }  # fmt: skip
        own = {"dim_head": audio.attention_head_dim, **shared}
        cross = {"dim_head": audio.cross_attention_dim // audio.num_attention_heads, **shared}
        self.audio_attn1 = Attention(width, **own, **kw)
        self.audio_attn2 = Attention(width, width, **own, **kw)
        self.audio_to_video_attn = Attention(dim, width, **cross, **kw)
        self.video_to_audio_attn = Attention(width, dim, **cross, **kw)
        self.audio_ff = FeedForward(width, audio.ff_dim, **kw)

        def table(rows, columns):
            return nn.Parameter(torch.empty(rows, columns, dtype=dtype, device=device))

        self.audio_scale_shift_table = table(CROSS_ATTENTION_ROWS if self.cross_attention_adaln else BASE_ROWS, width)
        if self.cross_attention_adaln:
            self.audio_prompt_scale_shift_table = table(2, width)
        self.scale_shift_table_a2v_ca_audio = table(SCALE_SHIFT_ROWS + 1, width)
        self.scale_shift_table_a2v_ca_video = table(SCALE_SHIFT_ROWS + 1, dim)

    def get_av_ca_ada_values(
        self,
        scale_shift_table,
        batch_size,
        scale_shift_timestep,
        gate_timestep,
        num_scale_shift_values=SCALE_SHIFT_ROWS,
    ):
        """Scale and shift rows, then the gate, of a five-row table (the host's method, for code that replaces ``forward``)."""
        rows = self.get_ada_values(scale_shift_table[:num_scale_shift_values], batch_size, scale_shift_timestep)
        return *rows, *self.get_ada_values(scale_shift_table[num_scale_shift_values:], batch_size, gate_timestep)

    def forward(self, x, v_context=None, a_context=None, attention_mask=None, v_timestep=None, a_timestep=None, v_pe=None, a_pe=None,
                v_cross_pe=None, a_cross_pe=None, v_cross_scale_shift_timestep=None, a_cross_scale_shift_timestep=None,
                v_cross_gate_timestep=None, a_cross_gate_timestep=None, transformer_options=None, self_attention_mask=None,
                v_prompt_timestep=None, a_prompt_timestep=None):  # fmt: skip
        """(video [B, T, D], audio [B, L, A]) -> the same pair. Writes into both tensors unless gradients are recorded.

        ``v_…`` as in :class:`TransformerBlock`, ``a_…`` the same for audio. ``…_cross_scale_shift_timestep``: Modulation of the stream's
        own tokens, four rows; ``…_cross_gate_timestep``: one row per sample, from the other stream's noise level; ``…_cross_pe``: RotaryTable
        of the stream's times. transformer_options: ``run_vx``, ``run_ax``, ``a2v_cross_attn``, ``v2a_cross_attn`` (all true by default).
        """
        vx, ax = x
        options = transformer_options or {}
        run_vx, run_ax = options.get("run_vx", True), options.get("run_ax", True) and ax.numel() > 0
        a2v = run_vx and ax.numel() > 0 and options.get("a2v_cross_attn", True)
        v2a = run_ax and options.get("v2a_cross_attn", True)
        v_rest = a_rest = None  # what is still to be added to a stream: (output, gate)
        if run_vx:
            modulation = _modulation(v_timestep)
            vx, v_rest = self._attend(
                vx, self.attn1, self.attn2, self.scale_shift_table, getattr(self, "prompt_scale_shift_table", None), modulation, v_prompt_timestep,
                v_context, attention_mask, v_pe, self_attention_mask, options, options,
            )  # fmt: skip
        if run_ax:
            a_modulation = _modulation(a_timestep)
            ax, a_rest = self._attend(
                ax, self.audio_attn1, self.audio_attn2, self.audio_scale_shift_table, getattr(self, "audio_prompt_scale_shift_table", None),
                a_modulation, a_prompt_timestep, a_context, attention_mask, a_pe, None, _audio_options(options), options,
            )  # fmt: skip
        if a2v or v2a:
            vx, ax = (
                stream if rest is None else fused.gate_residual_(stream, *rest)
                for stream, rest in ((vx, v_rest), (ax, a_rest))
            )
            v_table, a_table = self.scale_shift_table_a2v_ca_video, self.scale_shift_table_a2v_ca_audio
            v_rest, a_rest = self._look_at_each_other(
                vx, ax, a2v, v2a, _modulation(v_cross_scale_shift_timestep).rows(v_table[:SCALE_SHIFT_ROWS], slice(None)),
                _modulation(a_cross_scale_shift_timestep).rows(a_table[:SCALE_SHIFT_ROWS], slice(None)), v_cross_pe, a_cross_pe, options,
            )  # fmt: skip
            v_rest = (
                v_rest
                if v_rest is None
                else (v_rest, _modulation(v_cross_gate_timestep).rows(v_table[SCALE_SHIFT_ROWS:], slice(None))[0])
            )
            a_rest = (
                a_rest
                if a_rest is None
                else (a_rest, _modulation(a_cross_gate_timestep).rows(a_table[SCALE_SHIFT_ROWS:], slice(None))[0])
            )
        if run_vx:
            vx = self._feed_forward(self.ff, vx, v_rest, modulation.rows(self.scale_shift_table, slice(3, 6)))
        if run_ax:
            ax = self._feed_forward(
                self.audio_ff, ax, a_rest, a_modulation.rows(self.audio_scale_shift_table, slice(3, 6))
            )
        return vx, ax

    def _attend(
        self,
        x,
        attn1,
        attn2,
        table,
        prompt_table,
        modulation,
        prompt_timestep,
        context,
        context_mask,
        pe,
        mask,
        self_options,
        options,
    ):
        """Self-attention, then text cross-attention of one stream: (x, (the latter's output, its gate), not yet added)."""
        shift, scale, gate = modulation.rows(table, slice(0, 3))
        y = attn1(fused.rms_modulate(x, scale, shift, self.eps), pe=pe, mask=mask, transformer_options=self_options)
        shift = scale = cross_gate = None  # 2.0: plain norm, no gate
        if self.cross_attention_adaln:
            prompt_shift, prompt_scale = _modulation(prompt_timestep).rows(prompt_table, slice(0, 2))
            context = torch.addcmul(prompt_shift, context, prompt_scale + 1)
            shift, scale, cross_gate = modulation.rows(table, slice(6, 9))
        x, h = fused.gate_residual_rms_modulate_(x, y, gate, scale, shift, self.eps)
        return x, (attn2(h, context=context, mask=context_mask, transformer_options=options), cross_gate)

    def _look_at_each_other(self, vx, ax, a2v, v2a, v_rows, a_rows, v_pe, a_pe, options):
        """What audio says to video and video to audio (None where switched off); neither is added yet, so both see the same state."""
        to_video = to_audio = None
        if a2v:
            h, context = (
                fused.rms_modulate(stream, rows[0], rows[1], self.eps) for stream, rows in ((vx, v_rows), (ax, a_rows))
            )
            to_video = self.audio_to_video_attn(h, context=context, pe=v_pe, k_pe=a_pe, transformer_options=options)
        if v2a:
            h, context = (
                fused.rms_modulate(stream, rows[2], rows[3], self.eps) for stream, rows in ((ax, a_rows), (vx, v_rows))
            )
            to_audio = self.video_to_audio_attn(h, context=context, pe=a_pe, k_pe=v_pe, transformer_options=options)
        return to_video, to_audio

    def _feed_forward(self, ff, x, rest, rows):
        """x, after what is still to be added to it, with its feed-forward added. rest: (output, gate) or None."""
        shift, scale, gate = rows
        if rest is None:
            h = fused.rms_modulate(x, scale, shift, self.eps)
        else:
            x, h = fused.gate_residual_rms_modulate_(x, *rest, scale, shift, self.eps, quantizes(ff, x))
        return fused.gate_residual_(x, ff(h), gate)


def _audio_options(options):
    """Options for the audio's self-attention, which may return its values where the video's does not."""
    values_only = options.get(AUDIO_VALUES_ONLY)
    return options if values_only is None else {**options, VALUES_ONLY: values_only}


class LTX2AVModel(LTX2Model):
    """Video and audio transformer with both embeddings connectors. ``config.audio`` describes the audio stream.

    Called with a video latent alone it is the video model: nothing of the audio stream runs.
    """

    block_class = AVTransformerBlock

    def __init__(self, config, operations=nn, dtype=None, device=None, attention=None):
        super().__init__(config, operations=operations, dtype=dtype, device=device, attention=attention)
        audio, dim, width = config.audio, config.inner_dim, config.audio.inner_dim
        kw = {"dtype": dtype, "device": device, "operations": operations}

        self._audio_rotary_tables = (None, None)  # (tokens, reference tokens, device) and what the blocks get

        rows = CROSS_ATTENTION_ROWS if config.cross_attention_adaln else BASE_ROWS
        self.audio_patchify_proj = operations.Linear(audio.in_channels, width, bias=True, dtype=dtype, device=device)
        self.audio_adaln_single = AdaLayerNormSingle(width, rows, **kw)
        self.audio_prompt_adaln_single = AdaLayerNormSingle(width, 2, **kw) if config.cross_attention_adaln else None
        before = config.caption_proj_before_connector
        self.audio_caption_projection = (
            nn.Identity() if before else CaptionProjection(config.caption_channels, width, **kw)
        )
        self.av_ca_video_scale_shift_adaln_single = AdaLayerNormSingle(dim, SCALE_SHIFT_ROWS, **kw)
        self.av_ca_audio_scale_shift_adaln_single = AdaLayerNormSingle(width, SCALE_SHIFT_ROWS, **kw)
        self.av_ca_a2v_gate_adaln_single = AdaLayerNormSingle(dim, 1, **kw)
        self.av_ca_v2a_gate_adaln_single = AdaLayerNormSingle(width, 1, **kw)
        self.audio_embeddings_connector = (
            Embeddings1DConnector(audio.connector, attention=attention, **kw) if audio.connector else None
        )
        self.audio_scale_shift_table = nn.Parameter(torch.empty(2, width, dtype=dtype, device=device))
        self.audio_norm_out = operations.LayerNorm(
            width, elementwise_affine=False, eps=config.norm_eps, dtype=dtype, device=device
        )
        self.audio_proj_out = operations.Linear(width, audio.out_channels, bias=True, dtype=dtype, device=device)

    def velocities(self, video, audio, sigma, context, frame_rate, video_mask=None, audio_mask=None, keyframe_idxs=None, guide_attention_entries=None,
                   stg_blocks=(), audio_stg_blocks=(), isolated=False):  # fmt: skip
        """(video velocity, audio velocity), the headless entry; see :meth:`LTX2Model.velocity` for what the video's arguments are.

        audio [B, 8, L, 16], normalised; context [B, S, Dc + Ac] from :meth:`preprocess_text_embeds`; audio_mask [B, 1, L, 1]: a token's
        own noise level is sigma times its mask; isolated: neither stream looks at the other (the pass for modality guidance).
        """
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=video.device).expand(video.shape[0])
        timesteps = [sigma, sigma]
        if video_mask is not None:
            video_mask = video_mask[:, :1].expand(-1, -1, *video.shape[2:])
            timesteps[0] = self.patchifier.patchify(video_mask.float())[0] * sigma.view(-1, 1, 1)  # (B, T, 1)
        if audio_mask is not None:
            timesteps[1] = audio_mask[:, 0, :, :1].float() * sigma.view(-1, 1, 1)  # (B, L, 1)
        options = {
            STG_BLOCKS: tuple(stg_blocks), AUDIO_STG_BLOCKS: tuple(audio_stg_blocks), "sigmas": sigma, "a2v_cross_attn": not isolated,
            "v2a_cross_attn": not isolated,
        }  # fmt: skip
        latents = [video.to(self.dtype), audio.to(self.dtype)]
        v, a = self._velocities(
            latents,
            timesteps,
            context.to(self.dtype),
            None,
            frame_rate,
            options,
            keyframe_idxs,
            video_mask,
            guide_attention_entries,
        )
        return v.to(video.dtype), a.to(audio.dtype)

    def forward(self, x, timestep, context, attention_mask=None, frame_rate=25, transformer_options=None, keyframe_idxs=None, denoise_mask=None,
                guide_attention_entries=None, audio_denoise_mask=None, ref_audio=None, **other):  # fmt: skip
        """The host's entry. x: [video [B, C, F, H, W], audio [B, 8, L, 16]] -> their velocities as a list; with the video alone as in the base.

        timestep: the pair (video [B] or [B, T, 1], audio [B] or [B, L, 1]), or one for both; ref_audio: {"tokens": [1, R, 128]}, given
        audio that lies before the clip. Velocities are multiplied by their masks as in the base.
        """
        if not isinstance(x, (list, tuple)) or len(x) < 2 or not x[1].numel():
            return super().forward(
                x,
                timestep,
                context,
                attention_mask,
                frame_rate,
                transformer_options,
                keyframe_idxs,
                denoise_mask,
                guide_attention_entries,
                **other,
            )
        timesteps = timestep if isinstance(timestep, (list, tuple)) else (timestep, timestep)
        velocities = self._velocities(
            x,
            timesteps,
            context,
            attention_mask,
            frame_rate,
            transformer_options or {},
            keyframe_idxs,
            denoise_mask,
            guide_attention_entries,
            ref_audio,
        )
        if self.scale_velocity_by_mask:
            masks = (
                None if denoise_mask is None else denoise_mask[:, :1],
                None if audio_denoise_mask is None else audio_denoise_mask[:, :1, :, :1],
            )
            velocities = [v if mask is None else v * mask.clamp(0, 1).to(v.dtype) for v, mask in zip(velocities, masks)]
        return velocities

    def _velocities(self, latents, timesteps, context, attention_mask, frame_rate, options, keyframe_idxs, denoise_mask, guide_attention_entries,
                    ref_audio=None):  # fmt: skip
        """[video velocity, audio velocity] of [video, audio]."""
        if self.sequence_parallel is not None:
            raise ValueError(
                "Sequence parallelism computes video alone; load the model without sound, or run it on one device."
            )
        widths = [self.config.context_dim, self.config.audio_context_dim]
        if context.shape[-1] != sum(widths):
            raise ValueError(
                f"The conditioning is {context.shape[-1]} wide, video and audio of this {MODEL_NAMES[self.config.version]} model take {sum(widths)}; "
                "encode the prompt with a text encoder that was loaded for sound."
            )
        video_context, audio_context = context.split(widths, dim=-1)
        x, arguments, finish = self._video_stream(
            latents[0],
            timesteps[0],
            video_context,
            attention_mask,
            frame_rate,
            options,
            keyframe_idxs,
            denoise_mask,
            guide_attention_entries,
        )
        audio, audio_arguments, finish_audio = self._audio_stream(
            latents[1], timesteps[1], audio_context, options, ref_audio
        )
        x, audio = self._run_blocks((x, audio), options, **arguments, **audio_arguments)
        return [finish(x), finish_audio(audio)]

    def _audio_stream(self, latent, timestep, context, options, ref_audio):
        """(x [B, R + L, A], what the blocks are told about the audio, function from the last x to the velocity [B, 8, L, 16])."""
        batch, _, length, bins = latent.shape
        tokens = self.a_patchifier.patchify(latent)[0]
        timestep = timestep.to(torch.float32).reshape(batch, -1)  # (B, 1) or (B, L)
        reference = 0
        if ref_audio is not None:
            given = ref_audio["tokens"].to(tokens).expand(batch, -1, -1)
            reference = given.shape[1]
            tokens = torch.cat((given, tokens), dim=1)
            timestep = torch.cat((timestep.new_zeros(batch, reference), timestep.expand(batch, length)), dim=1)

        values, layout = distinct_timesteps(timestep, timestep.shape[1])
        values, sigma = values * self.timestep_scale_multiplier, _step_sigma(options, timestep)
        rows, embedded = self.audio_adaln_single(values, latent.dtype)
        embedded = layout(embedded)
        arguments = {
            "a_context": self.audio_caption_projection(context),
            "a_timestep": layout(rows),
            "a_cross_scale_shift_timestep": layout(self.av_ca_audio_scale_shift_adaln_single(values, latent.dtype)[0]),
            "v_cross_gate_timestep": self.av_ca_a2v_gate_adaln_single(
                sigma * self.av_ca_timestep_scale_multiplier, latent.dtype
            )[0].unsqueeze(1),
            **self._audio_tables(length, reference, latent.device),
        }
        if self.audio_prompt_adaln_single is not None:
            prompt = self.audio_prompt_adaln_single(sigma * self.timestep_scale_multiplier, latent.dtype)[0]
            arguments["a_prompt_timestep"] = prompt.unsqueeze(1)  # (B, 2A) -> (B, 1, 2A)
        for modulation in (arguments["a_timestep"], arguments["a_cross_scale_shift_timestep"], embedded):
            modulation.tokens = tokens.shape[1]

        def finish(x):
            x = self._output(x, embedded, self.audio_scale_shift_table, self.audio_norm_out, self.audio_proj_out)[
                :, reference:
            ]
            return x.unflatten(-1, (-1, bins)).transpose(1, 2)  # (B, L, 8*16) -> (B, 8, L, 16)

        return self.audio_patchify_proj(tokens), arguments, finish

    def _modulations(self, values, layout, sigma, dtype):
        arguments, embedded = super()._modulations(values, layout, sigma, dtype)
        arguments["v_cross_scale_shift_timestep"] = layout(self.av_ca_video_scale_shift_adaln_single(values, dtype)[0])
        gate = self.av_ca_v2a_gate_adaln_single(sigma * self.av_ca_timestep_scale_multiplier, dtype)[0]
        arguments["a_cross_gate_timestep"] = gate.unsqueeze(1)  # the audio's gate goes by the video's noise
        return arguments, embedded

    def _tables_at(self, positions, device):
        tables = super()._tables_at(positions, device)
        return tables | {
            "v_cross_pe": self._time_table(
                positions[:, :1], self.audio_cross_attention_dim, self._cross_max_pos, device
            )
        }

    def _audio_tables(self, length, reference, device):
        """``a_pe`` and ``a_cross_pe`` of ``reference`` given tokens before the clip and ``length`` tokens of it."""
        key = (length, reference, device)
        if self._audio_rotary_tables[0] != key:
            patchifier = self.a_patchifier
            times = patchifier.token_times(length)
            if reference:  # the given audio ends one token before the clip begins
                given = patchifier.token_times(reference)
                times = torch.cat((given - given[..., -1, 1] - patchifier.seconds_per_token, times), dim=2)
            positions = times.mean(dim=-1)  # (1, 1, L, 2) -> (1, 1, L)
            kinds = (
                (self.audio_inner_dim, self.config.audio.rope_max_pos),
                (self.audio_cross_attention_dim, self._cross_max_pos),
            )
            made = {
                kind: self._time_table(positions, *kind, device) for kind in dict.fromkeys(kinds)
            }  # one table in the released models
            self._audio_rotary_tables = key, dict(zip(("a_pe", "a_cross_pe"), (made[kind] for kind in kinds)))
        return self._audio_rotary_tables[1]

    def forget_tables(self):
        super().forget_tables()
        self._audio_rotary_tables = (None, None)

    @property
    def _cross_max_pos(self):
        return max(self.config.rope_max_pos[0], self.config.audio.rope_max_pos)

    def _time_table(self, positions, width, max_pos, device):
        """RotaryTable of times [B, 1, T] in seconds, in the audio's heads."""
        return rotary_table(
            positions, (max_pos,), width, self.audio_num_attention_heads, self.config.rope_theta, device
        )

    def _block_options(self, number, options):
        options = super()._block_options(number, options)
        return (
            {**options, AUDIO_VALUES_ONLY: number in options[AUDIO_STG_BLOCKS]}
            if AUDIO_STG_BLOCKS in options
            else options
        )

    def preprocess_text_embeds(self, context, unprocessed=False):
        """Conditioning as the host hands it over -> context of video and audio side by side, [B, S, Dc + Ac].

        Text features (``unprocessed``) go through both connectors: 2.3's are video's and audio's columns side by side, 2.0's serve both.
        Raises ValueError for a width that fits neither.
        """
        config = self.config
        finished = config.context_dim + config.audio_context_dim
        features = (
            (config.context_dim, config.audio_context_dim)
            if config.caption_proj_before_connector
            else (config.caption_channels,)
        )
        name = MODEL_NAMES[config.version]
        if not unprocessed and context.shape[-1] == finished:
            return context
        if context.shape[-1] != sum(features):
            raise ValueError(
                f"The conditioning is {context.shape[-1]} wide, this {name} model with sound takes {sum(features)}; "
                f"encode the prompt with a text encoder of {name} whose projection has the audio part (audio_aggregate_embed)."
            )
        if self.video_embeddings_connector is None or self.audio_embeddings_connector is None:
            raise ValueError(
                "The conditioning holds text features, but an embeddings connector is missing; give the loader the file that holds both."
            )
        video, audio = context.split(features, dim=-1) if len(features) == 2 else (context, context)
        return torch.cat((self.video_embeddings_connector(video)[0], self.audio_embeddings_connector(audio)[0]), dim=-1)
