"""``ltx2-gguf inspect``: what is this file? From the header alone; the verdict itself is ``loading/identify.py``'s.

Of a video that this pack wrote, it shows what the video was made from.
"""

import json
import sys
from pathlib import Path

from ..files.text import size_text, visible
from .printing import PROG, print_out, sentence

NAME, HELP = "inspect", "say what a file is, what it needs and where it goes"

EXAMPLES = f"""examples:
  {PROG} inspect model.gguf
  {PROG} inspect *.safetensors --json
  {PROG} inspect video.mp4              (the prompt, seed, settings and files it was made from)
"""

VIDEOS = (".mp4", ".webm", ".gif")

# Where a missing part usually comes from.
WHERE = {
    "dit": "an LTX-2 or LTX-2.3 GGUF",
    "connector": "an 'embeddings_connector' file, or the full checkpoint",
    "projection": "a 'text_projection' or 'embeddings_connectors' file, or the full checkpoint",
    "vae": "a 'video_vae' file, or the full checkpoint",
    "gemma": "a Gemma-3 12B GGUF, for example gemma-3-12b-it-Q4_K_M.gguf",
}


def options(command) -> None:
    command.add_argument("files", nargs="+", type=Path, metavar="FILE", help="GGUF or safetensors files, or videos")
    command.add_argument("--json", action="store_true", help="print JSON: one object, or a list for several files")


def run(args) -> int:
    shown, failed = [], False
    for path in args.files:
        try:
            shown.append(_video(path, args.json) if path.suffix.lower() in VIDEOS else _weights(path, args.json))
        except (ValueError, OSError) as error:
            if len(args.files) == 1:
                raise
            failed = True
            print(f"{PROG}: {sentence(error)}", file=sys.stderr)
    if args.json:
        print_out(json.dumps(shown[0] if len(args.files) == 1 else shown, indent=2))
    else:
        print_out("\n\n".join(shown))
    return 1 if failed else 0


def _weights(path: Path, as_data: bool):
    report = inspect(path)
    return as_dict(report) if as_data else render(report)


def _video(path: Path, as_data: bool):
    from ..media import read_metadata

    made_from = read_metadata(path)
    if as_data:
        return {"path": str(path), "kind": "video", "made_from": made_from}
    if made_from is None:
        return f"{path.name}: a video that says nothing about how it was made"
    lines = [
        f"  {str(name).replace('_', ' ') + ':':18} {_plain(value)}"
        for name, value in made_from.items()
        if value not in (None, [], {})
    ]
    return "\n".join([f"{path.name}: a video made by this pack", *lines])


def _plain(value) -> str:
    """Text of a file, with nothing in it that a terminal would act on."""
    return visible(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), 4000)


def inspect(path: str | Path):
    """The FileReport of one file. Raises WeightFileError when it cannot be read at all."""
    from ..files.weights import open_weights
    from ..loading.identify import identify

    file = open_weights(path)
    try:
        return identify(file)
    finally:
        file.close()


def _where(part: str, report) -> str:
    """Where a missing part comes from; the size of Gemma is what the file's projection was made for."""
    if part != "gemma" or report.projection_inputs is None or report.gemma_size == "12B":
        return WHERE[part]
    return (
        f"a Gemma-3 {report.gemma_size} GGUF"
        if report.gemma_size
        else f"a Gemma-3 that gives {report.projection_inputs} numbers per token"
    )


def as_dict(report) -> dict:
    """The report as plain data, for ``--json``. Sizes in bytes."""
    return {
        "path": report.path,
        "container": report.container,
        "kind": report.kind,
        "title": report.title,
        "usable": report.refusal is None,
        "refusal": report.refusal,
        "version": report.version,
        "architecture": report.architecture,
        "geometry": geometry(report.config),
        "parts": {
            part: {"tensors": count, "bytes": report.part_bytes.get(part, 0)} for part, count in report.parts.items()
        },
        "audio": {"tensors": report.audio_tensors, "bytes": report.audio_bytes},
        "formats": dict(report.formats),
        "missing": list(report.missing),
        "inputs": list(report.inputs),
        "notes": list(report.notes),
        "warnings": list(report.warnings),
        "lora": dict(report.lora) or None,
    }


def geometry(config) -> dict:
    """The sizes that a config of a transformer, connector or Gemma states; empty when there is none."""
    from ..transformer.config import LTX2Config

    if isinstance(config, LTX2Config):
        sizes = {
            "layers": config.num_layers,
            "heads": config.num_attention_heads,
            "head_dim": config.attention_head_dim,
            "width": config.inner_dim,
        }
        if config.connector is not None:
            sizes |= {"connector_layers": config.connector.num_layers, "connector_width": config.connector.inner_dim}
        return sizes
    names = {"num_layers": "layers", "num_attention_heads": "heads", "num_heads": "heads", "attention_head_dim": "head_dim", "head_dim": "head_dim",
             "inner_dim": "width", "width": "width", "vocab_size": "vocabulary"}  # fmt: skip
    return {label: getattr(config, name) for name, label in names.items() if hasattr(config, name)}


def render(report) -> str:
    """The report for people."""
    from ..loading.identify import TITLES

    data = as_dict(report)
    lines = [f"{Path(report.path).name}: {report.title}"]
    if report.refusal is not None:
        return "\n".join([*lines, f"  {report.refusal}"])

    def add(label: str, value: str) -> None:
        if value:
            lines.append(f"  {label + ':':22} {value}")

    add("container", report.container + (f", architecture '{report.architecture}'" if report.architecture else ""))
    add("version", f"LTX-{report.version}" if report.version else "not told by the file" if report.lora else "")
    add("geometry", ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in data["geometry"].items()))
    for part, held in data["parts"].items():
        add(TITLES.get(part, part), f"{held['tensors']} tensors, {size_text(held['bytes'])}")
    if report.lora:
        layers, rank = report.lora["layers"], report.lora["rank"]
        add("layers", ", ".join(f"{name} {count}" for name, count in layers.items() if count))
        add(
            "method",
            ", ".join(report.lora["methods"])
            + ("" if not rank else f", rank {rank[0]}" if rank[0] == rank[1] else f", ranks {rank[0]} to {rank[1]}"),
        )
        add("spelling", report.lora["spelling"])
    add("types", ", ".join(f"{name} x {count}" for name, count in report.formats.items()))
    for text in report.warnings:
        add("warning", text)
    for note in report.notes:
        add("note", note)
    for where in report.inputs:
        add("goes into", where)
    if report.inputs and report.kind != "lora":
        for part in report.missing:
            add("still needs", f"{TITLES[part]}: {_where(part, report)}")
    return "\n".join(lines)
