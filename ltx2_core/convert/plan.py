"""What a conversion keeps, drops and stores how, decided from names, shapes and types alone. Standard library only.

``FORMAT_RULES`` is the table of the converter: for every kept tensor, which format it gets and why (docs/convert.md prints it).

Sources: headers of the released checkpoints; llama.cpp and city96's conversion scripts for what is customarily left unquantised.
"""

import gzip
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...quant.formats import FORMATS, QUANTIZED
from ..files import structure
from ..files.errors import WeightFileError
from ..files.names import audio_part, classify
from ..files.safetensors import MAX_HEADER_BYTES, read_header
from ..files.structure import VAE_PREFIX
from ..files.text import size_text, visible
from ..files.unsupported import is_ltx09, ltx25_part, name_foreign
from ..files.values import count_layers
from ..files.weights import WeightFile, open_weights

# Formats a conversion can be asked for, with the format used where a row does not divide into that format's blocks.
TARGETS: dict[str, tuple[str, ...]] = {
    "f32": ("F32",),
    "bf16": ("BF16",),
    "f16": ("F16",),
    "q8_0": ("Q8_0", "F16"),
    "q6_k": ("Q6_K", "Q8_0", "F16"),
    "q5_k": ("Q5_K", "Q5_1", "F16"),
    "q5_1": ("Q5_1", "F16"),
    "q5_0": ("Q5_0", "F16"),
    "q4_k": ("Q4_K", "Q5_0", "F16"),
    "q4_1": ("Q4_1", "F16"),
    "q4_0": ("Q4_0", "F16"),
    "q3_k": ("Q3_K", "Q4_0", "F16"),
    "q2_k": ("Q2_K", "Q4_0", "F16"),
}

# Mixed types: the target of most matrices, the one a step finer and the finest, which MIX_RULES give to some layers.
MIXES: dict[str, tuple[str, str, str]] = {
    "q5_k_m": ("q5_k", "q6_k", "q6_k"),
    "q4_k_m": ("q4_k", "q5_k", "q6_k"),
    "q3_k_m": ("q3_k", "q4_k", "q5_k"),
}
TARGETS |= {name: TARGETS[steps[0]] for name, steps in MIXES.items()}


class PlanError(WeightFileError):
    """The source cannot be read, or is not a checkpoint that can be converted."""

    __module__ = "ltx2_gguf"  # shown before the name of the error


@dataclass(frozen=True)
class Entry:
    """One tensor of a source file."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Inventory:
    """Header of a checkpoint: every tensor and the metadata."""

    name: str
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class FormatRule:
    """Tensors whose bare name matches ``pattern`` are stored as ``target``: a format, or 'asked' for the format asked for."""

    what: str
    pattern: str
    target: str
    why: str


# The first rule whose pattern matches the whole bare name decides.
FORMAT_RULES = (
    FormatRule(
        "VAE convolutions", r"vae\..*\.weight", "conv",
        "their kernels take dense weights; float16 keeps all of bfloat16's digits for magnitudes from 6e-5 to 65504, is off by at most 3e-8 "
        "below, and the converter stops if a weight lies above",
    ),
    FormatRule("VAE biases and latent statistics", r"vae\..*", "F32", "a few numbers that scale whole channels"),
    FormatRule(
        "text projection", r"text_embedding_projection\..*\.weight", "projection",
        "one product per prompt over 188160 inputs, computed in float32: 8 bits cost 0.8 GB and no time, fewer would blur every prompt",
    ),
    FormatRule("text projection bias", r"text_embedding_projection\..*", "F32", "a vector"),
    FormatRule(
        "scale and shift tables, registers", r".*(scale_shift_table(_a2v_ca_(audio|video))?|learnable_registers)", "F32",
        "plain parameters, added to activations: not the weight of a matrix product",
    ),
    FormatRule("biases and norms", r".*(\.bias|_norm\.weight)", "F32", "vectors"),
    FormatRule("first and last layer", r"(audio_)?(patchify_proj|proj_out)\.weight", "F32", "every latent value passes through them; 2 MB each"),
    FormatRule(
        "time step embedding", r".*timestep_embedder\.linear_[12]\.weight", "F32",
        "one row per step, drives every block; an error here shifts the noise level the network believes in",
    ),
    FormatRule("attention head gates", r".*to_gate_logits\.weight", "F32", "32 rows; each output scales a whole attention head"),
    FormatRule("time step modulation", r".*adaln_single\.linear\.weight", "asked", "one product per step, 150 million weights"),
    FormatRule("caption projection (2.0)", r"(audio_)?caption_projection\.linear_[12]\.weight", "asked", "one product per prompt"),
    FormatRule(
        "audio attention, and between the streams", r".*\.(audio_attn[12]|audio_to_video_attn|video_to_audio_attn)\.to_(q|k|v|out\.0)\.weight", "asked",
        "half as wide as the video's, so an error is less averaged out; mixed types store them a step finer",
    ),
    FormatRule("audio feed-forward", r".*\.audio_ff\.net\.(0\.proj|2)\.weight", "asked", "as the audio attention"),
    FormatRule("attention", r".*\.attn[12]\.to_(q|k|v|out\.0)\.weight", "asked", "with the feed-forward nearly all of the weights"),
    FormatRule("feed-forward", r".*\.ff\.net\.(0\.proj|2)\.weight", "asked", "two thirds of the weights"),
)  # fmt: skip

_COMPILED = [(rule, re.compile(rule.pattern)) for rule in FORMAT_RULES]


@dataclass(frozen=True)
class MixRule:
    """In a mixed type, matrices whose bare name matches ``pattern`` are ``steps`` finer, from this share of the model's depth on."""

    what: str
    pattern: str
    depth: float
    steps: int
    why: str


_VALUES = r"transformer_blocks\.(\d+)\.attn1\.to_(v|out\.0)\.weight"
# The first rule that matches decides; other matrices get the type's own format.
MIX_RULES = (
    MixRule(
        "self-attention values and output, from a third of the depth on", _VALUES, 1 / 3, 2,
        "an eighth of a block's weights; per weight their errors reach the velocity four times as much as the feed-forward's, later blocks' most",
    ),
    MixRule("self-attention values and output before that", _VALUES, 0, 1, "as above"),
    MixRule(
        "feed-forward in the second half", r"transformer_blocks\.(\d+)\.ff\.net\.(0\.proj|2)\.weight", 1 / 2, 1,
        "ten times as much per weight as queries, keys and cross-attention; an error of an early block is averaged out by those behind it",
    ),
    MixRule(
        "audio attention, and between the streams",
        r"transformer_blocks\.(\d+)\.(audio_attn[12]|audio_to_video_attn|video_to_audio_attn)\.to_(q|k|v|out\.0)\.weight", 0, 1,
        "half as wide as the video's, so an error is less averaged out",
    ),
)  # fmt: skip
_COMPILED_MIX = [(rule, re.compile(rule.pattern)) for rule in MIX_RULES]

# Companions of a quantised safetensors weight: folded into it when it is read.
_SCALE_SUFFIXES = (".weight_scale", ".scale_weight", ".input_scale", ".scale_input", ".comfy_quant", ".weight_scale_2")


@dataclass(frozen=True)
class Row:
    """The plan for one tensor of a source. ``output`` and ``format`` are None when it is dropped; ``file`` counts the sources."""

    source: str
    entry: Entry
    part: str
    file: int = 0
    output: str | None = None
    format: str | None = None
    nbytes: int = 0
    rule: FormatRule | None = None


@dataclass(frozen=True)
class Plan:
    name: str
    version: str
    target: str
    rows: tuple[Row, ...]
    metadata: Mapping[str, str]
    warnings: tuple[str, ...] = ()

    @property
    def kept(self) -> list[Row]:
        return [row for row in self.rows if row.output is not None]

    @property
    def dropped(self) -> list[Row]:
        return [row for row in self.rows if row.output is None]

    @property
    def output_bytes(self) -> int:
        """Bytes of all tensors in the output (the header adds under one per cent)."""
        return sum(row.nbytes for row in self.kept)


def read_inventory(path: str | Path) -> Inventory:
    """The header of a weight file of any kind (one file, shards, an index, a folder), or a saved safetensors header (``.json[.gz]``).

    Raises PlanError or WeightFileError.
    """
    path = Path(path)
    if not path.name.endswith((".json.gz", ".json")) or path.name.endswith(".index.json"):
        weights = open_weights(path)
        try:
            return inventory_of(weights)
        finally:
            weights.close()
    try:
        with (gzip.open if path.name.endswith(".gz") else open)(path, "rb") as file:
            raw = file.read(MAX_HEADER_BYTES + 1)
    except FileNotFoundError:
        raise PlanError(f"{path} does not exist.") from None
    except (OSError, EOFError, zlib.error) as error:
        raise PlanError(f"{path.name} cannot be read ({visible(error)}).") from error
    if len(raw) > MAX_HEADER_BYTES:
        raise PlanError(f"{path.name} holds more than {MAX_HEADER_BYTES} bytes; no header is so large.")
    metadata, entries = read_header(path.name, raw)
    return Inventory(
        path.name, {name: Entry(entry.dtype, entry.shape, entry.nbytes) for name, entry in entries.items()}, metadata
    )


def inventory_of(weights: WeightFile) -> Inventory:
    """The header of an open weight file."""
    entries = {name: Entry(weights.format(name), weights.shape(name), weights.nbytes(name)) for name in weights.names()}
    metadata = {key: weights.metadata[key] for key in _METADATA if isinstance(weights.metadata.get(key), str)}
    return Inventory(weights.path.name, entries, metadata)


_METADATA = ("config", "model_version", "ltx_version", "general.architecture", "gemma_source_checkpoint")


def detect_version(inventory: Inventory) -> str:
    """'2.0' or '2.3', from the tables' rows. Raises PlanError when the file holds no LTX-2 transformer, or another generation's."""
    names = classify(inventory.entries)
    shapes = {canonical: inventory.entries[name].shape for canonical, name in names["dit"].items()}
    table = shapes.get("transformer_blocks.0.scale_shift_table")
    if not table or "adaln_single.linear.weight" not in shapes:
        stranger = name_foreign(list(inventory.entries), inventory.metadata.get("general.architecture"))
        what = f"is {stranger.what} and holds" if stranger else "holds"
        raise PlanError(f"{inventory.name} {what} no LTX-2 transformer; convert needs an LTX-2 or LTX-2.3 checkpoint.")
    if is_ltx09(shapes):
        raise PlanError(
            f"{inventory.name} is LTX-Video 0.9, which this pack does not run; convert an LTX-2 or LTX-2.3 checkpoint."
        )
    gated = "transformer_blocks.0.attn1.to_gate_logits.weight" in shapes
    if ltx25_part(names, inventory.metadata):
        raise PlanError(
            f"{inventory.name} is LTX-2.5, which this pack does not run; convert an LTX-2 or LTX-2.3 checkpoint."
        )
    if table[0] == 9 and gated:
        return "2.3"
    if table[0] == 6 and not gated and "caption_projection.linear_1.weight" in shapes:
        return "2.0"
    raise PlanError(
        f"{inventory.name} is not an LTX-2 or LTX-2.3 checkpoint: its tables have {table[0]} rows and it has "
        f"{'' if gated else 'no '}head gates (2.0: 6 rows and none, 2.3: 9 rows and gates). It may be LTX-Video 0.9."
    )


def _step_of(name: str, target: str, blocks: int) -> str:
    """The target of a tensor in a mixed type, by where it is in a model of so many blocks."""
    steps = MIXES.get(target)
    if steps is None:
        return target
    for rule, pattern in _COMPILED_MIX:
        match = pattern.fullmatch(name)
        if match and int(match[1]) >= rule.depth * blocks:
            return steps[rule.steps]
    return steps[0]


def format_for(name: str, shape: tuple[int, ...], target: str, blocks: int = 48) -> tuple[str, FormatRule | None]:
    """The format of a kept tensor (bare output name, logical shape) and the rule that says so. blocks: of the transformer, for mixed types."""
    choices = TARGETS[_step_of(name, target, blocks)]
    for rule, pattern in _COMPILED:
        if pattern.fullmatch(name):
            break
    else:
        return "F32", None
    kind = rule.target
    if kind in FORMATS or target == "f32":
        return (kind if kind in FORMATS else "F32"), rule
    if kind == "conv":
        return ("BF16" if target == "bf16" else "F16"), rule
    if kind == "projection" and FORMATS[choices[0]].is_quantized:
        choices = TARGETS["q8_0"]
    return next(fmt for fmt in choices if shape[-1] % FORMATS[fmt].block_size == 0), rule


def make_plan(
    inventory: Inventory, target: str, *, companions: Sequence[Inventory] = (), keep: Iterable[str] = ()
) -> Plan:
    """Decide for every tensor of a checkpoint and of companion files that hold what it lacks (connector, projection, VAE).

    keep: parts of the audio (of AUDIO_PARTS) that are kept too; asking for a part that no file holds is an error.
    A quantised source tensor that is already as small as its target keeps its bytes. Raises PlanError for an unknown target, a first
    file without an LTX-2 transformer, or a tensor that is there twice.
    """
    if target not in TARGETS:
        raise PlanError(f"Unknown format {target!r}; choose one of {', '.join(TARGETS)}.")
    version = detect_version(inventory)
    sources = (inventory, *companions)
    rows = [row for number, source in enumerate(sources) for row in _rows(number, source, target, frozenset(keep))]

    owner: dict[str, Row] = {}
    for row in rows:
        if row.output is None:
            continue
        if row.output in owner:
            where = sorted({sources[owner[row.output].file].name, sources[row.file].name})
            raise PlanError(f"{row.output!r} is there twice ({' and '.join(where)}); give only one file that holds it.")
        owner[row.output] = row
    _check_blocks(inventory.name, owner)
    parts = {row.part for row in owner.values()}
    absent = [
        part for part in keep if part not in parts and (part, version) != ("audio text projection", "2.0")
    ]  # 2.0 has one for both
    if absent:
        raise PlanError(
            f"{inventory.name} holds no {absent[0]}; convert without audio, or give the original checkpoint."
        )
    lacking = [part for part in ("connector", "text projection", "VAE") if part not in parts]
    warnings = [f"no {part} inside; running it needs another file that holds it" for part in lacking]
    if "config" not in inventory.metadata:
        warnings.append("no 'config' in the metadata; sizes are taken from the tensors")
    requantised = [row for row in owner.values() if row.entry.dtype in QUANTIZED and row.format != row.entry.dtype]
    if requantised:
        warnings.append(
            f"{len(requantised)} tensors are quantised already and lose again by it; convert from the original checkpoint if you can"
        )
    return Plan(inventory.name, version, target, tuple(rows), dict(inventory.metadata), tuple(warnings))


_BLOCK = re.compile(r"(transformer_blocks|(?:video|audio)_embeddings_connector\.transformer_1d_blocks)\.([0-9]+)\.(.+)")


def _check_blocks(source: str, names: Iterable[str]) -> None:
    """Every block must hold what the others hold, and none may be left out: a checkpoint with holes is not worth converting."""
    stacks: dict[str, dict[str, set[str]]] = {}
    for name in names:
        match = _BLOCK.fullmatch(name)
        if match:
            stacks.setdefault(match[1], {}).setdefault(match[2], set()).add(match[3])
    for stack, blocks in stacks.items():
        inner = set().union(*blocks.values())
        count = count_layers((f"{stack}.{n}.{name}" for n, held in blocks.items() for name in held), stack, PlanError)
        missing = [f"{stack}.{n}.{name}" for n in range(count) for name in sorted(inner - blocks.get(str(n), set()))]
        if missing:
            raise PlanError(
                f"{source} is incomplete: {len(missing)} tensors are missing, first {missing[0]!r}. Download it again."
            )


def _rows(file: int, inventory: Inventory, target: str, keep: frozenset[str]) -> Iterator[Row]:
    sorted_names = _sort(inventory)
    blocks = 1 + max(
        (
            int(m[2])
            for _, name in sorted_names.values()
            if (m := _BLOCK.fullmatch(name)) and m[1] == "transformer_blocks"
        ),
        default=0,
    )
    for name, entry in inventory.entries.items():
        if name.endswith(_SCALE_SUFFIXES) or name.endswith("scaled_fp8"):
            yield Row(name, entry, "scales (folded into their weights)", file)
            continue
        if name not in sorted_names:
            raise PlanError(f"{inventory.name} holds {name!r} twice, under different prefixes; remove one copy.")
        part, output = sorted_names[name]
        if part in DROPPED_PARTS and part not in keep:
            yield Row(name, entry, part, file)
            continue
        fmt, rule = format_for(output, entry.shape, target, blocks)
        if entry.dtype in QUANTIZED and FORMATS[entry.dtype].bits_per_weight <= FORMATS[fmt].bits_per_weight:
            fmt = entry.dtype
        yield Row(name, entry, part, file, output, fmt, FORMATS[fmt].nbytes(entry.shape), rule)


_AUDIO_TITLES = {
    "dit": "audio transformer", "connector": "audio connector", "projection": "audio text projection", "vae": "audio VAE", "vocoder": "vocoder"
}  # fmt: skip
AUDIO_PARTS = tuple(_AUDIO_TITLES.values())
AUDIO_MODEL = AUDIO_PARTS[:3]  # what makes sound beside the video model; VAE and vocoder are the other two
DROPPED_PARTS = (*AUDIO_PARTS, "not used")


_PART_TITLES = {"dit": "transformer", "connector": "connector", "projection": "text projection", "vae": "VAE"}
_VAE_USED = ("encoder.", "decoder.", "per_channel_statistics.mean-of-means", "per_channel_statistics.std-of-means")


def _sort(inventory: Inventory) -> dict[str, tuple[str, str]]:
    """Source name -> (part as the plan calls it, name in our GGUF files)."""
    result = {}
    for part, names in classify(inventory.entries).parts.items():
        for canonical, source in names.items():
            if part == "audio":
                result[source] = _AUDIO_TITLES[audio_part(canonical)], canonical
            elif part == "vae":
                result[source] = ("VAE" if canonical.startswith(_VAE_USED) else "not used"), VAE_PREFIX + canonical
            else:
                result[source] = _PART_TITLES.get(part, "not used"), canonical
    return result


def summary(plan: Plan) -> dict:
    """The plan as plain data, for ``--json``."""
    groups: dict[tuple[bool, str, str], list[Row]] = {}
    for row in plan.rows:
        groups.setdefault((row.output is not None, row.part, row.format or "-"), []).append(row)
    table = [
        {
            "keep": keep, "part": part, "format": None if fmt == "-" else fmt, "tensors": len(rows),
            "source_bytes": sum(r.entry.nbytes for r in rows), "output_bytes": sum(r.nbytes for r in rows),
        }
        for (keep, part, fmt), rows in groups.items()
    ]  # fmt: skip
    return {
        "source": plan.name, "version": plan.version, "target": plan.target,
        "total_tensors": len(plan.rows), "kept_tensors": len(plan.kept), "dropped_tensors": len(plan.dropped),
        "source_bytes": sum(r.entry.nbytes for r in plan.rows), "output_bytes": plan.output_bytes,
        "groups": sorted(table, key=lambda g: (not g["keep"], g["part"], g["format"] or "")), "warnings": list(plan.warnings),
    }  # fmt: skip


def render(plan: Plan) -> str:
    """The plan as a table for people."""
    data = summary(plan)
    model = "LTX-2" if plan.version == "2.0" else f"LTX-{plan.version}"
    lines = [f"{plan.name}: {model} checkpoint, {data['total_tensors']} tensors, {size_text(data['source_bytes'])}", ""]
    for keep, title in (
        (True, f"Keep {data['kept_tensors']} tensors"),
        (False, f"Drop {data['dropped_tensors']} tensors"),
    ):
        lines.append(title)
        for g in data["groups"]:
            if g["keep"] == keep:
                after = f" -> {g['format']:5} {size_text(g['output_bytes']):>10}" if keep else ""
                lines.append(f"  {g['part']:36} {g['tensors']:6}  {size_text(g['source_bytes']):>10}{after}")
        lines.append("")
    lines.append(
        f"Output: {data['kept_tensors']} of {data['total_tensors']} tensors, about {size_text(data['output_bytes'])} as {plan.target}"
    )
    lines.extend(f"Note: {warning}" for warning in plan.warnings)
    return "\n".join(lines)


# What the released files hold for video, counted in their headers.
EXPECTED_KEPT = {"2.0": 1429, "2.3": 1758}
EXPECTED_WITH_AUDIO = {"2.0": 1429 + 2324, "2.3": 1758 + 2860}


def self_test() -> list[str]:
    """Check the keep/drop rule on complete checkpoints of both versions, without any file. Returns one line per finding; raises
    PlanError at the first failure."""
    findings = []
    for version, expected in EXPECTED_KEPT.items():
        geometry = structure.Geometry.real(version)
        shapes = structure.checkpoint_shapes(geometry, audio=True)
        video = structure.checkpoint_shapes(geometry)
        entries = {name: Entry("BF16", shape, FORMATS["BF16"].nbytes(shape)) for name, shape in shapes.items()}
        plan = make_plan(Inventory(f"LTX-{version} structure", entries, {"config": "{}"}), "q8_0")
        kept = {row.source for row in plan.kept}
        leaked, lost = sorted(kept - set(video)), sorted(set(video) - kept)
        if leaked or lost or len(kept) != expected:
            raise PlanError(
                f"Self-test failed for {version}: kept {len(kept)} tensors, expected {expected}; "
                f"{len(leaked)} leaked (first {leaked[:1]}), {len(lost)} lost (first {lost[:1]})."
            )
        joint = len(
            make_plan(Inventory(f"LTX-{version} structure", entries, {"config": "{}"}), "q8_0", keep=AUDIO_MODEL).kept
        )
        if joint != EXPECTED_WITH_AUDIO[version]:
            raise PlanError(
                f"Self-test failed for {version}: kept {joint} tensors with audio, expected {EXPECTED_WITH_AUDIO[version]}."
            )
        findings.append(f"LTX-{version}: keeps {len(kept)} of {len(shapes)} tensors, no audio tensor among them")
    return findings
