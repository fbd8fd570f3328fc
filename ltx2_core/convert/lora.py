"""Copy a LoRA file under the standard spelling, so that any loader of LTX-2 LoRAs finds its layers."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

from ...quant.output import Output, check_output
from ..files.safetensors import SafetensorsFile
from ..loading.lora import open_lora
from ..lora.file import ADAPTER_METADATA, LoraError, alpha_key, column_shape, nothing_fits
from ..lora.keys import LoraNames

PIECE = 2**24  # bytes copied at once

Progress = Callable[[int, str], None]  # (bytes done, key)


def rewrite(
    source: str | Path,
    output: str | Path,
    *,
    keep_audio: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict:
    """Copy a LoRA file under standard keys: the tensors' bytes and the header's metadata as they are. Returns counts and sizes.

    keep_audio: whether layers of the sound stream stay (the host's full model uses them). What cannot be read keeps its key. PEFT's alphas
    become tensors, and its settings leave the header, since they would count twice.
    Raises LoraError, OutputError, WeightFileError or OSError; then nothing was written.
    """
    source, output = Path(source), Path(output)
    lora = open_lora(source)
    lora.file.close()
    lora.check()
    if not lora.names.layers("video") and not (keep_audio and lora.names.layers("audio")):
        raise LoraError(nothing_fits(lora))
    check_output(
        output, suffixes=(".safetensors",), overwrite=overwrite, sources=[source], nbytes=source.stat().st_size
    )
    stored = SafetensorsFile(source)
    names = LoraNames(stored.entries)
    kept = [key for key in names.keys.values() if keep_audio or key.kind != "audio"]
    by_layer = {key.layer: key for key in kept}
    alphas = {
        alpha_key(by_layer[layer]): struct.pack("<f", alpha)
        for layer, alpha in lora.alphas().items()
        if layer in by_layer
    }
    metadata = {name: value for name, value in stored.metadata.items() if not (alphas and name == ADAPTER_METADATA)}

    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for key in kept:
        entry = stored.entries[key.raw]
        shape = list(column_shape(key, entry.shape))
        header[key.standard] = {"dtype": entry.dtype, "shape": shape, "data_offsets": [end, end + entry.nbytes]}
        end += entry.nbytes
    for name in alphas:
        header[name] = {"dtype": "F32", "shape": [], "data_offsets": [end, end + 4]}
        end += 4
    data = json.dumps(header, separators=(",", ":")).encode()
    data += b" " * (-len(data) % 8)

    with Output(output, overwrite) as written, open(source, "rb") as reading:
        written.file.write(struct.pack("<Q", len(data)) + data)
        done = 0
        for key in kept:
            entry = stored.entries[key.raw]
            reading.seek(entry.offset)
            for start in range(0, entry.nbytes, PIECE):
                piece = reading.read(min(PIECE, entry.nbytes - start))
                written.file.write(piece)
                done += len(piece)
                if progress:
                    progress(done, key.raw)
        written.file.write(b"".join(alphas.values()))
    renamed = sum(key.standard != key.raw for key in kept)
    return {
        "source": source.name, "output": output.name, "spelling": lora.names.spelling,
        "tensors": len(kept), "renamed": renamed, "alphas_added": len(alphas),
        "layers": {kind: len(lora.names.layers(kind)) for kind in ("video", "audio", "projection", "text", "unknown")},
        "unknown": lora.names.layers("unknown"), "audio_kept": keep_audio, "output_bytes": end,
    }  # fmt: skip
