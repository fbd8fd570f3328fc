"""LoRA files: which layer and matrix each key means, under any spelling in circulation. Standard library only.

The standard spelling is the released files' own, ``diffusion_model.<layer>.<matrix>``: the layer as in a checkpoint
(``transformer_blocks.0.attn1.to_q``), the matrix as the host reads it (``lora_A.weight``, ``lora_up.weight``, ``alpha``, ``dora_scale``,
``lokr_w1``, …). Other spellings put other prefixes before the layer, use diffusers' names for it, write it with underscores, or name the
adapter between matrix and ``.weight``. A new spelling is a row in one of the tables below.

Sources: Lightricks/LTX-2 ``ltx-trainer`` and the released LoRAs; huggingface/diffusers ``loaders/lora_conversion_utils.py`` and
``loaders/lora_base.py``; huggingface/peft ``utils/save_and_load.py``; kohya-ss/sd-scripts and KohakuBlueleaf/LyCORIS (underscores, alpha);
ComfyUI 0.30.0 ``comfy/lora.py``, ``comfy/weight_adapter`` (what the host's own loader knows).
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from ..files import structure
from ..files.names import PROJECTION, diffusers_name, sort_name

STANDARD = "diffusion_model."
KINDS = ("video", "audio", "projection", "text", "unknown")

# Before the layer, followed by dots: stripped again and again, as files nest them. And followed by a layer with underscores: stripped once.
_DOTTED = (
    "base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "velocity_model.", "unet.", "module.", "model.",
)  # fmt: skip
_FLAT = ("lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_")
_TEXT = re.compile(r"^(?:text_encoders?\.|lora_te\d?_)|(?:^|[._])layers[._]\d+[._](?:self_attn|mlp)[._]")
_BLOCK = re.compile(r"(transformer_(?:1d_)?blocks[._])(\d+)(?=[._])")

# After the layer: (what files write, the standard for it, whether the host's loader reads it as written).
_ADAPTER = r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?"  # PEFT's name for the adapter
_MATRICES = tuple(
    (re.compile(pattern + "$"), standard, host)
    for pattern, standard, host in (
        (r"\.lora_(A|B)(?:\.default)?\.weight", r"lora_\1.weight", True),
        (r"\.lora_(A|B)", r"lora_\1.weight", True),
        (r"\.lora_(up|down|mid)\.weight", r"lora_\1.weight", True),
        (r"(?:[._]lora|\.lora_linear_layer)\.(up|down)\.weight", r"lora_\1.weight", True),
        (rf"\.lora_(A|B|up|down){_ADAPTER}(?:\.weight)?", r"lora_\1.weight", False),
        (rf"\.lora_magnitude_vector{_ADAPTER}(?:\.weight)?", "dora_scale", False),
        (
            r"\.(alpha|dora_scale|reshape_weight|lokr_\w+|hada_\w+|oft_blocks|rescale|diff|diff_b|set_weight|w_norm|b_norm)",
            r"\1",
            True,
        ),
        (r"\.([ab][12])\.weight", r"\1.weight", True),
    )
)
# Names that make a file a LoRA (``alpha`` or ``diff`` alone may be anything).
_LORA = re.compile(r"\.(?:lora_|lokr_|hada_|oft_blocks$)|[._]lora\.(?:up|down)\.")

UP, DOWN, ALPHA = ("lora_B.weight", "lora_up.weight"), ("lora_A.weight", "lora_down.weight"), "alpha"

# What else there is beside low-rank products, by a matrix that only it has.
_METHODS = {"dora_scale": "DoRA", "lokr_w1": "LoKr", "lokr_w1_a": "LoKr", "hada_w1_a": "LoHa", "oft_blocks": "OFT", "a1.weight": "GLoRA",
            "diff": "differences", "diff_b": "differences", "set_weight": "whole weights"}  # fmt: skip

# LoRAs of other models, by their raw keys.
_FOREIGN = tuple(
    (what, re.compile(pattern))
    for what, pattern in (
        ("a Wan video model", r"(?:^|[._])blocks[._]\d+[._](?:self|cross)_attn[._]"),
        ("Flux or HunyuanVideo", r"(?:double|single)_blocks[._]\d+|single_transformer_blocks[._]\d+"),
        ("Qwen-Image", r"transformer_blocks[._]\d+[._](?:img_mlp|txt_mlp|attn[._](?:add_[qkv]_proj|to_add_out))"),
        ("Stable Diffusion 3", r"joint_blocks[._]\d+"),
        ("Stable Diffusion or SDXL", r"(?:input|output|middle|down|up|mid)_blocks?[._]|lora_te\d?_text_model"),
    )
)

_SPELLINGS = {
    STANDARD: "diffusion_model.… (the released files')", "": "bare layer names", "transformer.": "transformer.… (diffusers)",
    "base_model.model.": "base_model.model.… (PEFT)", "model.diffusion_model.": "model.diffusion_model.… (full checkpoints)",
    "lora_unet_": "lora_unet_… (kohya)", "lycoris_": "lycoris_… (LyCORIS)", "lora_transformer_": "lora_transformer_… (OneTrainer)",
}  # fmt: skip


@dataclass(frozen=True)
class Key:
    """What one key of a LoRA file means.

    raw: the key. kind: "video", "audio", "projection" (of text features), "text" (the text encoder) or "unknown". layer: its name in a
    checkpoint (as in the file where that is unknown). matrix: see above, "" when unknown. prefix: what stands before the layer; spelled: the
    layer as written.
    adapter: PEFT's name for it, where it is not the default. host: whether the host's own loader reads this key of an LTX model.
    """

    raw: str
    kind: str
    layer: str
    matrix: str = ""
    prefix: str = ""
    spelled: str = ""
    adapter: str | None = None
    host: bool = False

    @property
    def standard(self) -> str:
        """The key in the standard spelling; text encoder layers and what cannot be read keep theirs."""
        if self.layer.startswith(PROJECTION):
            return f"{self.layer}.{self.matrix}"
        if self.kind in ("video", "audio") or (self.kind == "unknown" and self.matrix and self.prefix.endswith(".")):
            return f"{STANDARD}{self.layer}.{self.matrix}"
        return self.raw


@lru_cache(maxsize=1)
def _layers() -> dict[str, frozenset[str]]:
    """Layer -> versions that have it, of the whole model with its sound; block numbers are 0."""
    versions: dict[str, set[str]] = {}
    for version in structure.VAE_BLOCKS:
        g = replace(structure.Geometry.real(version), num_layers=1, connector_layers=1)
        shapes = structure.dit_shapes(g) | structure.connector_shapes(g) | structure.audio_dit_shapes(g)
        for name in (*shapes, *(PROJECTION + name for name in structure.projection_shapes(g, audio=True))):
            versions.setdefault(name.removesuffix(".weight").removesuffix(".bias"), set()).add(version)
    return {layer: frozenset(found) for layer, found in versions.items()}


@lru_cache(maxsize=1)
def _spellings() -> dict[str, str]:
    """Everything a layer is called, with dots or underscores, without prefix -> the layer; block numbers are 0."""
    found = {}
    for layer in _layers():
        names = {layer, diffusers_name(layer), layer.removeprefix(PROJECTION)}
        if layer.startswith(PROJECTION):
            names.add("connectors." + layer.removeprefix(PROJECTION).replace("aggregate_embed", "text_proj_in"))
        for name in names | {name.removeprefix("connectors.") for name in names}:
            found[name] = found[name.replace(".", "_")] = layer
    return found


def _find(spelled: str) -> str | None:
    """The layer that is spelled like this, None when LTX-2 has none."""
    block = _BLOCK.search(spelled)
    if block is None:
        return _spellings().get(spelled)
    layer = _spellings().get(spelled[: block.start(2)] + "0" + spelled[block.end(2) :])
    return None if layer is None else _BLOCK.sub(rf"\g<1>{block[2]}", layer, count=1)


def _template(layer: str) -> str:
    return _BLOCK.sub(r"\g<1>0", layer, count=1)


def is_lora(names: Iterable[str]) -> bool:
    """Whether any of these tensor names is one of a LoRA's."""
    return any(_LORA.search(name) for name in names)


def read_key(raw: str) -> Key:
    """What a tensor name of a LoRA file means."""
    for pattern, standard, host in _MATRICES:
        match = pattern.search(raw)
        if match:
            adapter = match.groupdict().get("adapter")
            return _with_layer(
                raw, raw[: match.start()], match.expand(standard), None if adapter == "default" else adapter, host
            )
    return Key(raw, "text" if _TEXT.search(raw) else "unknown", raw)


def _with_layer(raw: str, written: str, matrix: str, adapter: str | None, host: bool) -> Key:
    spelled = _stripped(written)
    layer = _find(spelled)
    prefix = written[: len(written) - len(spelled)]
    if layer is None:
        return Key(raw, "text" if _TEXT.search(written) else "unknown", spelled, matrix, prefix, spelled, adapter)
    part = sort_name(layer + ".weight", "")[0]
    kind = "video" if part in ("dit", "connector") else part
    known = (prefix in ("", STANDARD) and spelled == layer) or (
        prefix == "lora_unet_" and spelled == layer.replace(".", "_")
    )
    return Key(raw, kind, layer, matrix, prefix, spelled, adapter, host and known)


def _stripped(written: str) -> str:
    for start in _FLAT:
        if written.startswith(start):
            return written[len(start) :]
    while True:
        start = next((start for start in _DOTTED if written.startswith(start)), None)
        if start is None:
            return written
        written = written[len(start) :]


class LoraNames:
    """The keys of one LoRA file, read. ``keys``: raw key -> Key, in file order."""

    def __init__(self, names: Iterable[str]):
        self.keys = {name: read_key(name) for name in names}

    @cached_property
    def by_layer(self) -> dict[str, list[Key]]:
        """Layer -> its keys; layers of the text encoder and unknown ones under the name they have in the file."""
        layers: dict[str, list[Key]] = {}
        for key in self.keys.values():
            layers.setdefault(key.layer, []).append(key)
        return layers

    def layers(self, kind: str) -> list[str]:
        """The layers of one of ``KINDS``, in file order."""
        return [layer for layer, keys in self.by_layer.items() if keys[0].kind == kind]

    @cached_property
    def clashes(self) -> dict[str, list[str]]:
        """Standard key -> the keys that all mean it, where there are several (a file of several adapters)."""
        meant: dict[str, list[str]] = {}
        for key in self.keys.values():
            meant.setdefault(key.standard, []).append(key.raw)
        return {standard: raws for standard, raws in meant.items() if len(raws) > 1}

    @property
    def host_layers(self) -> int:
        """Video layers that the host's own loader reads as they are."""
        return sum(all(key.host for key in self.by_layer[layer]) for layer in self.layers("video"))

    @property
    def spelling(self) -> str:
        """The file's spelling in words."""
        keys = [key for key in self.keys.values() if key.kind in ("video", "audio", "projection")]
        if not keys:
            return ""
        prefix = Counter(key.prefix for key in keys).most_common(1)[0][0]
        words = _SPELLINGS.get(prefix, prefix + "…")
        if any(
            key.spelled.replace(".", "_") != key.layer.replace(".", "_") and key.kind != "projection" for key in keys
        ):
            words += ", diffusers' module names"
        names = sorted({key.adapter for key in keys if key.adapter})
        return words + (f", adapter {', '.join(names)}" if names else "")

    @property
    def methods(self) -> list[str]:
        """What the video layers hold: "LoRA", "DoRA", "LoKr", …"""
        matrices = {key.matrix for key in self.keys.values() if key.kind == "video"}
        named = dict.fromkeys(name for matrix, name in _METHODS.items() if matrix in matrices)
        return [*(["LoRA"] if matrices & {*UP, *DOWN} and "DoRA" not in named else []), *named]

    @property
    def foreign(self) -> str | None:
        """The model a LoRA is for that has no layer of LTX-2, None when its keys tell nothing."""
        return next((what for what, pattern in _FOREIGN if any(pattern.search(name) for name in self.keys)), None)

    def versions(self) -> frozenset[str]:
        """The versions that have all of the file's known layers. Attention and feed-forward layers are in both."""
        found = [
            _layers()[_template(layer)] for kind in ("video", "audio", "projection") for layer in self.layers(kind)
        ]
        return frozenset(structure.VAE_BLOCKS).intersection(*found)

    def counted(self, applied: int | None = None) -> str:
        """ "480 of 1344 layers applied, 864 audio layers skipped": for logs. applied: None for all video layers."""
        count = {kind: len(self.layers(kind)) for kind in KINDS}
        applied = count["video"] if applied is None else applied
        text = f"{applied} of {sum(count.values())} layers applied"
        for kind, words in (("audio", "audio"), ("projection", "text projection"), ("text", "text encoder")):
            if count[kind]:
                text += f", {count[kind]} {words} {'layer' if count[kind] == 1 else 'layers'} skipped"
        return text
