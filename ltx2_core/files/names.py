"""Tensor names: which part of a model a name belongs to, and what it is called there.

Checkpoints in circulation put the same tensors under many prefixes. Everything is sorted here into parts with one canonical
spelling each:

``transformer.model``         ``transformer_blocks.0.attn1.to_q.weight``, ``patchify_proj.weight``, … (no prefix)
``connector``   ``video_embeddings_connector.learnable_registers``, …
``projection``  ``text_embedding_projection.video_aggregate_embed.weight``, …
``vae``         ``encoder.…``, ``decoder.…``, ``per_channel_statistics.…``
``audio``       everything of the audio stream, read only when it is asked for; :func:`audio_part` tells its parts apart
``other``       the rest, under its own name

A new spelling is a row in one of the tables below.

Source: names of Lightricks' released checkpoints; spellings of their community splits.
"""

import re
from dataclasses import dataclass, field

CONNECTOR = "video_embeddings_connector."
AUDIO_CONNECTOR = "audio_embeddings_connector."
PROJECTION = "text_embedding_projection."
PARTS = ("dit", "connector", "projection", "vae", "audio", "other")

# A name that ends like this tells the DiT's prefix by what stands before it. Any block will do: a damaged file may lack the first.
_BLOCK = re.compile(r"transformer_blocks\.\d+\.attn1\.to_q\.weight$")
_DIT_TOP = (
    "patchify_proj.", "proj_out.", "adaln_single.", "prompt_adaln_single.", "caption_projection.", "scale_shift_table", "transformer_blocks.",
    "keyframes_abs_pos_embedding", "duration_head.",
)  # fmt: skip

# Sound: first part of a name under the DiT's prefix, and third part inside a block.
_AUDIO_TOP = ("audio_", "av_ca_")
_AUDIO_IN_BLOCK = ("audio_", "video_to_audio_", "scale_shift_table_a2v_ca_")
_AUDIO_FILES = ("vocoder.", "audio_vae.")

_CONNECTOR = re.compile(r"(?:^|\.)(video_|audio_)?embeddings_connector\.(.+)$")
_PROJECTION = re.compile(r"(?:^|\.)((?:video_|audio_)?aggregate_embed\.(?:weight|bias))$")
_VAE = re.compile(
    r"^(?:(?:first_stage_model|vae|video_vae|model)\.)*((?:encoder\.(?:conv_in|conv_out|down_blocks)"
    r"|decoder\.(?:conv_in|conv_out|up_blocks|last_|timestep"
    r"|conv_in_x_t|det_stages|diff_blocks|upsamples|t_embedder|shared_adaln|norm_out|type_emb)"  # LTX-2.5's diffusion decoder
    r"|per_channel_statistics)\b.*)$"
)

# diffusers' spelling of the same modules: (in their name, in ours), applied to a DiT or connector name.
_DIFFUSERS_DIT = (
    ("audio_proj_in.", "audio_patchify_proj."), ("proj_in.", "patchify_proj."), ("audio_prompt_adaln.", "audio_prompt_adaln_single."),
    ("prompt_adaln.", "prompt_adaln_single."), ("audio_time_embed.", "audio_adaln_single."), ("time_embed.", "adaln_single."),
    ("av_cross_attn_video_scale_shift.", "av_ca_video_scale_shift_adaln_single."), ("av_cross_attn_video_a2v_gate.", "av_ca_a2v_gate_adaln_single."),
    ("av_cross_attn_audio_scale_shift.", "av_ca_audio_scale_shift_adaln_single."), ("av_cross_attn_audio_v2a_gate.", "av_ca_v2a_gate_adaln_single."),
    (".video_a2v_cross_attn_scale_shift_table", ".scale_shift_table_a2v_ca_video"),
    (".audio_a2v_cross_attn_scale_shift_table", ".scale_shift_table_a2v_ca_audio"), (".norm_q.", ".q_norm."), (".norm_k.", ".k_norm."),
)  # fmt: skip
_TO_DIFFUSERS = tuple((ours, theirs) for theirs, ours in _DIFFUSERS_DIT)
_DIFFUSERS_MARKER = re.compile(r"(?:^|\.)transformer_blocks\.0\.attn1\.norm_q\.weight$")
_DIFFUSERS_CONNECTOR = re.compile(r"^(?:connectors\.)?(video|audio)_connector\.(.+)$")
_DIFFUSERS_PROJECTION = re.compile(r"^(?:connectors\.)?(?:(video|audio)_)?text_proj_in\.(weight|bias)$")


@dataclass(frozen=True)
class Names:
    """Names of a file (or several), sorted: ``parts[part]`` maps canonical name -> name in the file."""

    parts: dict = field(default_factory=dict)
    dit_prefix: str | None = None  # None: no DiT

    def __getitem__(self, part):
        return self.parts[part]

    def has(self, part):
        """Whether any tensor of this part is there."""
        return bool(self.parts[part])


def find_dit_prefix(names):
    """What stands before ``transformer_blocks.0.…`` in these names; None when they hold no DiT."""
    for name in names:
        match = _BLOCK.search(name)
        if match:
            prefix = name[: match.start()]
            if (
                (not prefix or prefix.endswith("."))
                and not _CONNECTOR.search(name)
                and not prefix.endswith(("video_connector.", "audio_connector."))
            ):
                return prefix
    return None


def is_audio(name):
    """Whether a canonical DiT name (no prefix) belongs to the sound stream or couples sound and picture."""
    parts = name.split(".")
    if parts[0].startswith(_AUDIO_TOP):
        return True
    return parts[0] == "transformer_blocks" and len(parts) > 2 and parts[2].startswith(_AUDIO_IN_BLOCK)


def audio_part(canonical):
    """Which part of the audio stream a name of the part ``audio`` is: "connector", "projection", "vae", "vocoder" or "dit"."""
    starts = (
        (AUDIO_CONNECTOR, "connector"),
        (PROJECTION, "projection"),
        ("audio_vae.", "vae"),
        ("vocoder.", "vocoder"),
    )
    return next((part for start, part in starts if canonical.startswith(start)), "dit")


def _rename(name, table):
    for theirs, ours in table:
        if theirs.startswith("."):
            name = name.replace(theirs, ours)
        elif name.startswith(theirs):
            name = ours + name[len(theirs) :]
    return name


def diffusers_name(layer):
    """What diffusers calls a layer (canonical name, without ``.weight``) of the DiT or of a connector."""
    for ours, theirs in (
        ("video_embeddings_connector.", "connectors.video_connector."),
        ("audio_embeddings_connector.", "connectors.audio_connector."),
    ):
        if layer.startswith(ours):
            inner = layer[len(ours) :].replace("transformer_1d_blocks.", "transformer_blocks.")
            return theirs + _rename(inner + ".", _TO_DIFFUSERS)[:-1]
    return _rename(layer + ".", _TO_DIFFUSERS)[:-1]


def sort_name(name, dit_prefix, diffusers=False):
    """(part, canonical name) of one tensor name.

    dit_prefix as found by :func:`find_dit_prefix`; diffusers: whether the DiT's names are in diffusers' spelling.
    """
    if name.startswith(_AUDIO_FILES):
        return "audio", name
    match = _CONNECTOR.search(name)
    if match:
        return ("audio", AUDIO_CONNECTOR + match[2]) if match[1] == "audio_" else ("connector", CONNECTOR + match[2])
    match = _PROJECTION.search(name)
    if match:
        return ("audio" if match[1].startswith("audio_") else "projection"), PROJECTION + match[1]
    match = _DIFFUSERS_CONNECTOR.match(name)
    if match:
        rest = _rename(match[2].replace("transformer_blocks.", "transformer_1d_blocks."), _DIFFUSERS_DIT)
        return ("audio", AUDIO_CONNECTOR + rest) if match[1] == "audio" else ("connector", CONNECTOR + rest)
    match = _DIFFUSERS_PROJECTION.match(name)
    if match:
        ours = f"{match[1]}_aggregate_embed" if match[1] else "aggregate_embed"
        return ("audio" if match[1] == "audio" else "projection"), f"{PROJECTION}{ours}.{match[2]}"
    if dit_prefix is not None and name.startswith(dit_prefix):
        bare = name[len(dit_prefix) :]
        if diffusers:
            bare = _rename(bare, _DIFFUSERS_DIT)
        if is_audio(bare):
            return "audio", bare
        if bare.startswith(_DIT_TOP):
            return "dit", bare
    match = _VAE.match(name)
    if match:
        return "vae", match[1]
    return "other", name


def classify(names):
    """Sort tensor names into parts. names: iterable of str -> Names."""
    names = list(names)
    prefix = find_dit_prefix(names)
    diffusers = prefix is not None and any(_DIFFUSERS_MARKER.search(name) for name in names)
    parts = {part: {} for part in PARTS}
    for name in names:
        part, canonical = sort_name(name, prefix, diffusers)
        parts[part][canonical] = name
    return Names(parts, prefix)
