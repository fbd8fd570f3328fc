"""What is this file, what can be run with it, what is missing, and where does it go? From the header alone.

The name of a file, its architecture key and its folder are not trusted: tensor names and shapes decide, and the ``config``
metadata says the few things they cannot.
"""

from collections import Counter
from dataclasses import dataclass, field

from ..audio.config import AudioVAEConfigError, audio_vae_config, audio_vae_names
from ..files.errors import CheckpointError
from ..files.names import AUDIO_CONNECTOR, CONNECTOR, PROJECTION, audio_part
from ..files.opened import ModelFile, Source, open_model
from ..files.text import MESSAGE_LENGTH, size_text, visible
from ..files.unsupported import is_ltx09, ltx25_part, name_foreign
from ..lora.file import LoraFile, nothing_fits
from ..lora.keys import KINDS, is_lora
from ..text.config import GemmaConfig, GemmaConfigError, size_for_inputs
from ..transformer.config import MODEL_NAMES, ConfigError, config_from_shapes

LOADER, ENCODER, VAE_LOADER = "LTX-2 GGUF Loader", "LTX-2 Gemma Text Encoder (GGUF)", "LTX-2 Video VAE Loader"
LORA_LOADER, AUDIO_LOADER = "LTX-2 GGUF LoRA Loader (Model)", "LTX-2 Audio VAE Loader"
INPUTS = {
    "dit": f"'model_file' of '{LOADER}'",
    "connector": f"'connector_file' of '{LOADER}'",
    "vae": f"'vae_file' of '{LOADER}', or '{VAE_LOADER}'",
    "projection": f"'projection_file' of '{ENCODER}'",
    "gemma": f"'gemma_file' of '{ENCODER}'",
    "lora": f"'lora_name' of '{LORA_LOADER}'",
    "audio": f"'audio_vae_file' of '{AUDIO_LOADER}'",
}
TITLES = {
    "dit": "video transformer",
    "connector": "embeddings connector",
    "projection": "text projection",
    "vae": "video VAE",
    "gemma": "Gemma-3 text encoder",
}
NEEDED = ("dit", "connector", "projection", "vae", "gemma")  # what a run needs between all files
# ``general.architecture`` of LTX-2 GGUF files in circulation; None: the key is absent.
DIT_ARCHITECTURES = ("ltxv", "ltx2", "ltxav", "pig", "cow", None)
RELEASED_GEMMA_WIDTH = 3840
RELEASED_LORA_WIDTH = 4096


@dataclass(frozen=True)
class FileReport:
    """What a weight file is.

    kind: "dit", "checkpoint" (a transformer and more), "connector", "projection", "vae", "audio" (nothing else), "gemma", "lora", "foreign" or
    "unknown".
    title: what it is, for people. version: "2.0", "2.3" or None where a part does not tell.
    parts: part -> tensors, of those this pack reads for video; part_bytes the same in bytes. audio_parts: part of the audio ("dit", "connector",
    "projection", "vae", "vocoder") -> tensors, read only when sound is on; audio_tensors and audio_bytes: their sums.
    missing: parts a run still needs from other files. inputs: node inputs the file belongs in.
    formats: storage format -> tensors, over the parts. lora: spelling, ranks and layers of a LoRA, else empty.
    refusal: a sentence when the file cannot be used here, else None. warnings: sentences about a file that can be used.
    projection_inputs: numbers per token that its text projection takes; gemma_size: the released Gemma 3 that gives them ("12B").
    """

    path: str
    container: str
    kind: str
    title: str
    version: str | None = None
    parts: dict = field(default_factory=dict)
    part_bytes: dict = field(default_factory=dict)
    audio_parts: dict = field(default_factory=dict)
    audio_tensors: int = 0
    audio_bytes: int = 0
    missing: tuple = ()
    inputs: tuple = ()
    formats: dict = field(default_factory=dict)
    architecture: str | None = None
    config: object = None
    notes: tuple = ()
    lora: dict = field(default_factory=dict)
    refusal: str | None = None
    warnings: tuple = ()
    projection_inputs: int | None = None
    gemma_size: str | None = None

    def __post_init__(self):
        """Text that may come from the file is made safe to show."""
        for name in ("title", "architecture", "refusal"):
            value = getattr(self, name)
            object.__setattr__(self, name, value if value is None else visible(value, MESSAGE_LENGTH))
        for name in ("notes", "warnings"):
            object.__setattr__(self, name, tuple(visible(text, MESSAGE_LENGTH) for text in getattr(self, name)))

    def __bool__(self):
        """Whether this pack can use the file."""
        return self.refusal is None

    def has(self, part):
        """Whether the file holds this part ("dit", "connector", "projection", "vae", "gemma")."""
        return self.parts.get(part, 0) > 0


def identify(source: Source) -> FileReport:
    """What a file is. Reads names, shapes, formats and metadata, once per ModelFile; no weight is touched. Raises WeightFileError."""
    file = open_model(source)
    if file.report is None:
        file.report = _identify(file)
    return file.report


def require_version(file: ModelFile, part: str, version: str | None) -> None:
    """Raise CheckpointError when the file's ``part`` is for another version of LTX-2 than the model (None: whichever)."""
    found = identify(file).version
    if found is not None and version is not None and found != version and file.report.has(part):
        raise CheckpointError(
            f"{file.name} holds the {TITLES[part]} of {MODEL_NAMES[found]}, but the model is {MODEL_NAMES[version]}; choose the {TITLES[part]} of the same version."
        )


def _identify(file):
    weights, names = file.weights, file.names
    all_names = weights.names()
    common = {"path": str(file.path), "container": weights.kind, "architecture": file.architecture}
    if is_lora(all_names):
        return _lora(file, common)
    counts = {part: len(names[part]) for part in ("dit", "connector", "projection", "vae") if names.has(part)}
    common |= {
        "parts": counts,
        "part_bytes": {part: sum(weights.nbytes(name) for name in names[part].values()) for part in counts},
        "audio_parts": dict(Counter(map(audio_part, names["audio"]))),
        "audio_tensors": len(names["audio"]),
        "audio_bytes": sum(weights.nbytes(name) for name in names["audio"].values()),
        "formats": dict(
            Counter(weights.format(name) for part in counts for name in names[part].values()).most_common()
        ),
    }
    common |= _projection(file)
    newer = ltx25_part(names, file.metadata, bool(file.gemma))
    if newer:
        return _refused(common, f"an LTX-2.5 {newer}", "a newer ComfyUI that has LTX-2.5")
    if not counts.get("dit"):
        if not set(counts) - {"vae"} and (audio := _audio_alone(file, common)):
            return audio
        if file.gemma:
            return _gemma(file, common)
        if not counts or (set(counts) == {"vae"} and not _is_ltx_vae(names["vae"])):
            return _name_stranger(file, all_names, common)
    return _ltx(file, counts, common)


def _ltx(file, counts, common):
    """Report of a file that holds at least one part of LTX-2 or LTX-2.3."""
    names, config, version, title = file.names, None, None, None
    shapes = file.shapes(names["dit"] | names["connector"])
    try:
        if "dit" in counts:
            if is_ltx09(shapes):
                return _refused(
                    common,
                    "an LTX-Video 0.9 model",
                    "'Load Checkpoint' or 'Load Diffusion Model' of ComfyUI with a T5 text encoder",
                )
            config = config_from_shapes(shapes, file.metadata)
            version = config.version
            title = f"{MODEL_NAMES[version]} video transformer, {config.num_layers} layers of width {config.inner_dim}"
        elif "connector" in counts:
            # Its head count may be told by the transformer's file only, so no config is made of a connector alone.
            if CONNECTOR + "learnable_registers" not in shapes:
                raise ConfigError("The embeddings connector in this file is incomplete; download the file again.")
            version = "2.3" if CONNECTOR + "transformer_1d_blocks.0.attn1.to_gate_logits.weight" in shapes else "2.0"
    except ConfigError as error:
        return FileReport(
            kind="foreign", title="a damaged or unknown LTX model", refusal=f"{file.name}: {error}", **common
        )
    version = version or _projection_version(names["projection"]) or _vae_version(names["vae"])

    held = [part for part in ("dit", "connector", "projection", "vae") if part in counts]
    complete = [part for part in held if part != "dit"]
    if title is None:
        title = " and ".join(TITLES[part] for part in complete)
        title = f"{MODEL_NAMES[version]} {title}" if version else title
    elif complete:
        title += " with " + ", ".join(TITLES[part] for part in complete)
    if "dit" not in counts:
        kind = held[0]
    else:
        kind = "checkpoint" if {"projection", "vae"} & set(held) else "dit"
    notes, warnings = [], []
    if "dit" in counts and common["architecture"] not in DIT_ARCHITECTURES:
        warnings.append(_contradiction(file, title))
    if common["audio_bytes"]:
        notes.append(
            f"{common['audio_tensors']} tensors of the sound stream ({size_text(common['audio_bytes'])}) are read only with sound on"
        )
    if any(name.endswith("decoder.conv_in_x_t.weight") for name in names["vae"]):
        notes.append("its decoder is LTX-2.5's diffusion decoder, which takes the latents of LTX-2.3 as well")
        title = "LTX-2.5 diffusion VAE" if held == ["vae"] else title
    if held == ["vae"] and version == "2.3":
        notes.append("the encoder of LTX-2.5's convolutional VAE is the same; a VAE alone does not tell the two apart")
    return FileReport(
        kind=kind, title=title, version=version, config=config, missing=tuple(part for part in NEEDED if part not in held),
        inputs=tuple(INPUTS[part] for part in held), notes=tuple(notes), warnings=tuple(warnings), **common,
    )  # fmt: skip


def _contradiction(file, title):
    return f"{file.name} calls itself '{file.architecture}' ('general.architecture'), but its tensors are those of the {title}; the tensors are believed."


def _refused(common, what, runs, name=None):
    path = name or common["path"].replace("\\", "/").rsplit("/", 1)[-1]
    return FileReport(
        kind="foreign",
        title=what,
        refusal=f"{path} is {what}; this pack runs LTX-2 and LTX-2.3 video. What runs it: {runs}.",
        **common,
    )


def _name_stranger(file, names, common):
    row = name_foreign(names, common["architecture"])
    if row is not None:
        return _refused(common, row.what, row.runs)
    first = ", ".join(names[:3]) or "none"
    refusal = f"{file.name} holds no part of LTX-2 or LTX-2.3 that this pack knows (first tensors: {first}); check which file this is."
    return FileReport(kind="unknown", title="an unknown model", refusal=refusal, **common)


def _audio_alone(file, common):
    """Report of a file with the audio VAE, the vocoder, the audio connector or its projection and no part for video, else None."""
    found = audio_vae_names(file.weights.names(), file.weights.shape)
    if found:
        try:
            config = audio_vae_config(file.shapes(found))
        except AudioVAEConfigError as error:
            return FileReport(kind="foreign", title="a damaged audio VAE", refusal=f"{file.name}: {error}", **common)
        parts = {audio_part(name): 0 for name in found}
        for name in found:
            parts[audio_part(name)] += 1
        common |= {"parts": {}, "part_bytes": {}, "audio_parts": parts, "audio_tensors": len(found)}
        common |= {"audio_bytes": sum(map(file.weights.nbytes, found.values()))}
        title = " and ".join(what for part, what in (("vae", "audio VAE"), ("vocoder", "vocoder")) if part in parts)
        title = f"{MODEL_NAMES[config.version]} {title}" if config.version else f"LTX-2 {title}"
        return FileReport(
            kind="audio", title=title, version=config.version, inputs=(INPUTS["audio"],), missing=NEEDED, **common
        )
    only = set(common["audio_parts"]) - {"dit"}
    if not only or "dit" in common["audio_parts"]:
        return None
    gated = AUDIO_CONNECTOR + "transformer_1d_blocks.0.attn1.to_gate_logits.weight" in file.names["audio"]
    version = "2.3" if gated or "projection" in only else "2.0"
    titles = {"connector": "audio connector", "projection": "audio text projection"}
    title = f"{MODEL_NAMES[version]} " + " and ".join(titles[part] for part in titles if part in only)
    inputs = tuple(INPUTS[part] for part in titles if part in only)
    return FileReport(kind="audio", title=title, version=version, inputs=inputs, missing=NEEDED, **common)


def _is_ltx_vae(vae):
    return any(
        name.endswith(("res_blocks.0.conv1.conv.weight", "conv_in.conv.weight", "decoder.conv_in_x_t.weight"))
        for name in vae
    )


def _projection(file):
    """What the text projection says about the Gemma it was made for."""
    stored = next((name for key, name in file.projection.items() if key.endswith(".weight")), None)
    shape = file.weights.shape(stored) if stored is not None else ()
    return {"projection_inputs": shape[1], "gemma_size": size_for_inputs(shape[1])} if len(shape) == 2 else {}


def _projection_version(projection):
    if not projection:
        return None
    return "2.0" if PROJECTION + "aggregate_embed.weight" in projection else "2.3"


def _vae_version(vae):
    """By the number of decoder blocks: 7 in 2.0, 9 in 2.3."""
    blocks = {name.split(".")[2] for name in vae if name.startswith("decoder.up_blocks.")}
    return {7: "2.0", 9: "2.3"}.get(len(blocks))


def _gemma(file, common):
    """Report of a Gemma text model, with the text projection if the file has that too."""
    try:
        config = GemmaConfig.from_shapes(file.shapes(file.gemma), file.metadata)
    except GemmaConfigError as error:
        return FileReport(kind="foreign", title="a damaged Gemma text model", refusal=f"{file.name}: {error}", **common)
    notes = ()
    if config.generation == 4:
        notes = (
            "LTX-2.5 needs its own fine-tuned Gemma 4 (gemma4-12b-with-proj-ltx-2.5); tensors do not tell it from the original",
        )
    elif config.width != RELEASED_GEMMA_WIDTH:
        notes = (
            f"the released LTX-2 and LTX-2.3 need Gemma-3 12B (width {RELEASED_GEMMA_WIDTH}, 48 layers); this one is {config.size_name}",
        )
    weights, projection = file.weights, file.names["projection"]
    others = set(projection.values())
    held = {"gemma": [name for name in weights.names() if name not in others]} | (
        {"projection": list(others)} if others else {}
    )
    common |= {
        "parts": {part: len(of_part) for part, of_part in held.items()},
        "part_bytes": {part: sum(weights.nbytes(name) for name in of_part) for part, of_part in held.items()},
        "formats": dict(Counter(weights.format(name) for of_part in held.values() for name in of_part).most_common()),
    }
    version = "2.5" if config.generation == 4 else _projection_version(projection)
    title = f"Gemma-{config.generation} {config.size_name} text encoder"
    title += f" with {MODEL_NAMES.get(version, f'LTX-{version}')} {TITLES['projection']}" if others else ""
    warnings = () if common["architecture"] in (None, "gemma3") else (_contradiction(file, title),)
    return FileReport(
        kind="gemma", title=title, version=version, config=config, warnings=warnings, missing=tuple(part for part in NEEDED if part not in held),
        inputs=tuple(INPUTS[part] for part in held), notes=notes, **common,
    )  # fmt: skip


def _lora(file, common):
    weights = file.weights
    lora = LoraFile(weights)
    names, version, ranks = lora.names, lora.version(), lora.ranks()
    count = {kind: len(names.layers(kind)) for kind in KINDS}
    total, formats = sum(count.values()), dict(Counter(weights.format(name) for name in weights.names()).most_common())
    common |= {"kind": "lora", "version": version, "formats": formats}
    common["lora"] = {
        "spelling": names.spelling, "layers": count, "host_layers": names.host_layers, "rank": [ranks[0], ranks[-1]] if ranks else None,
        "methods": names.methods, "width": lora.width(),
    }  # fmt: skip
    if not count["video"]:
        if count["text"] and not count["unknown"] and names.foreign is None:
            place = "'lora_name' of 'Load LoRA' of ComfyUI, between text encoder and prompt"
            return FileReport(title=f"LoRA for a text encoder, {total} layers", inputs=(place,), **common)
        return FileReport(title=f"LoRA for another model, {total} layers", refusal=nothing_fits(lora), **common)
    made_for = f"an {MODEL_NAMES[version]}" if version else "an LTX-2 or LTX-2.3"
    sound = f", {count['audio']} of them of the sound stream (used with sound on)" if count["audio"] else ""
    title = f"LoRA for {made_for} transformer, {total} layers{sound}"
    inputs, notes = [INPUTS["lora"]], []
    if names.host_layers == count["video"]:
        inputs.append("'lora_name' of 'Load LoRA (Model)' of ComfyUI")
    else:
        read = (
            f"{names.host_layers} of the {count['video']} video layers" if names.host_layers else "none of its layers"
        )
        notes.append(
            f"ComfyUI's own LoRA loader reads {read} in this spelling; 'ltx2-gguf lora' rewrites the file for it"
        )
    width = common["lora"]["width"]
    if width not in (None, RELEASED_LORA_WIDTH):
        notes.append(
            f"made for a transformer of width {width}; the released LTX-2 and LTX-2.3 are {RELEASED_LORA_WIDTH} wide"
        )
    if version is None:
        notes.append(
            "nothing in the file tells LTX-2 from LTX-2.3; it was trained on one of them and has little use on the other"
        )
    if count["unknown"]:
        notes.append(f"{count['unknown']} layers are not LTX-2's (first: {names.layers('unknown')[0]})")
    return FileReport(title=title, inputs=tuple(inputs), notes=tuple(notes), **common)
