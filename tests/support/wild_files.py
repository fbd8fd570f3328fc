"""Tiny files in the forms that circulate: one builder per kind, named as its makers name it.

Every file has the real structure (names, prefixes, header entries, types per tensor) at a small geometry. Tensors in simple formats
are encoded; the others get random blocks scaled to sensible weights, so that any type can stand on any tensor.

``CATALOGUE`` lists all of them: how to build it, what it is, what it needs beside it, or the words it is refused with.
"""

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from ltx2_gguf.ltx2_core.convert import synthetic
from ltx2_gguf.ltx2_core.files import structure
from ltx2_gguf.ltx2_core.files.structure import DIT_PREFIX, PROJECTION_PREFIX, VAE_PREFIX, Geometry
from ltx2_gguf.ltx2_core.files.weights import ORIG_SHAPE
from ltx2_gguf.quant import decode
from ltx2_gguf.quant.formats import FORMATS
from ltx2_gguf.quant.gguf.metadata import GGUFValue
from ltx2_gguf.quant.gguf.writer import GGUFWriter


def geometry(version="2.3", **sizes) -> Geometry:
    """One layer, 256 wide (so that every format's blocks fit), heads of 128 (so that 2.0 without metadata is what readers assume)."""
    return Geometry.small(
        version,
        **{
            "num_layers": 1,
            "heads": 2,
            "head_dim": 128,
            "gemma_width": 256,
            "gemma_layers": 2,
            "connector_layers": 1,
            "latent_channels": 128,
            **sizes,
        },
    )


# -- tensors -----------------------------------------------------------------------------------------------------------------------------


def random_blocks(fmt, rows: int, columns: int, name: str) -> torch.Tensor:
    """Random packed rows whose decoded weights have a spread of about ``1/sqrt(columns)``."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    raw = torch.randint(
        0, 256, (rows * columns // fmt.block_size, fmt.type_size), dtype=torch.uint8, generator=generator
    )
    scales = [field for field in ("d", "dmin", "m") if field in dict(fmt.fields)]

    def set_scales(value):
        half = torch.tensor([value], dtype=torch.float16).view(torch.uint8)
        for name in scales:
            raw[:, fmt.offset(name) : fmt.offset(name) + 2] = half

    set_scales(1.0)
    spread = decode.dequantize(raw, fmt).std().item()
    set_scales(1.0 / columns**0.5 / spread)
    return raw.reshape(rows, -1)


# The K formats have encoders too, but choosing their scales takes long, and any blocks will do.
ENCODED = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")


def encoded(name: str, value: torch.Tensor, fmt: str) -> torch.Tensor:
    rows = value.reshape(-1, value.shape[-1])
    return decode.quantize(rows, fmt) if fmt in ENCODED else random_blocks(FORMATS[fmt], *rows.shape, name)


Types = Callable[[str, tuple], str]


def mix(
    main: str, second: str | None = None, *, rest="BF16", vectors="F32", tables="F32", connector: str | None = None
) -> Types:
    """Types of a usual quantisation: block matrices in ``main``, value projections and the second feed-forward matrix in ``second``,
    the connector in ``connector`` (default: like the blocks), other matrices in ``rest``."""

    def choose(name, shape):
        if "scale_shift_table" in name or name.endswith("learnable_registers"):
            return tables
        if len(shape) == 1:
            return vectors
        if len(shape) > 2:
            return "F16"
        if "connector" in name and connector is not None:
            return connector
        if "blocks." in name and shape[-1] % FORMATS[main].block_size == 0:
            return second if second and name.endswith(("to_v.weight", "net.2.weight")) else main
        return rest if shape[-1] % FORMATS[rest].block_size == 0 else "Q8_0"  # 128 inputs: too few for a K format

    return choose


def write_gguf(
    path: Path,
    shapes: dict,
    types: Types,
    *,
    architecture: str | None = "ltxv",
    config: Geometry | None = None,
    extra=None,
) -> Path:
    header = {"general.architecture": architecture} if architecture else {}
    if config is not None:
        header |= synthetic.metadata(config)
    header |= extra or {}
    kinds = {name: types(name, shape) for name, shape in shapes.items()}
    infos = []
    for name, shape in shapes.items():
        if len(shape) > 4:
            header[ORIG_SHAPE + name] = GGUFValue("array", list(shape), "int32")
            shape = (shape[0], shape[1], 27)
        infos.append((name, kinds[name], shape))
    with GGUFWriter(path, header, infos) as writer:
        for name, _, shape in infos:
            writer.write(name, encoded(name, synthetic.tensor(name, shapes[name]).reshape(shape), kinds[name]))
    return path


def write_safetensors(path: Path, shapes: dict, config: Geometry | None = None, dtype=torch.bfloat16) -> Path:
    synthetic.save_safetensors(
        path, synthetic.state_dict(shapes, dtype=dtype), synthetic.metadata(config) if config else None
    )
    return path


def prefixed(prefix: str, shapes: dict) -> dict:
    return {prefix + name: shape for name, shape in shapes.items()}


# -- transformers ------------------------------------------------------------------------------------------------------------------------


def av_shapes(g: Geometry, connector=True) -> dict:
    """Transformer with its sound stream, bare names, as in the community's GGUF files."""
    shapes = structure.dit_shapes(g) | structure.audio_dit_shapes(g)
    if connector:
        return shapes | structure.connector_shapes(g)
    return {name: shape for name, shape in shapes.items() if not name.startswith("audio_embeddings_connector.")}


def av_gguf(
    path,
    version="2.3",
    types=None,
    *,
    prefix="",
    connector=True,
    config=True,
    architecture="ltxv",
    full=False,
    extra=None,
):
    g = geometry(version)
    shapes = prefixed(prefix, av_shapes(g, connector))
    if full:
        shapes |= (
            prefixed(PROJECTION_PREFIX, structure.projection_shapes(g, audio=True))
            | prefixed(VAE_PREFIX, structure.vae_shapes(g))
            | structure.sound_shapes(g)
        )
    return write_gguf(
        path, shapes, types or mix("Q8_0"), architecture=architecture, config=g if config else None, extra=extra
    )


def video_gguf(path, version="2.3", type="q4_0"):
    return synthetic.make(path, geometry(version), type=type)


def full_checkpoint(path, version="2.3"):
    return write_safetensors(path, structure.checkpoint_shapes(geometry(version), audio=True), geometry(version))


def fp8_checkpoint(path, marker="comfy_quant"):
    """Block matrices in FP8 with one scale each, in the host's present form or in the older one (``scaled_fp8``)."""
    g = geometry()
    tensors = synthetic.state_dict(structure.checkpoint_shapes(g, audio=True), dtype=torch.bfloat16)
    for name, value in list(tensors.items()):
        if "transformer_blocks." in name and name.endswith(".weight") and value.ndim == 2:
            layer, scale = name.removesuffix(".weight"), value.float().abs().max() / 448
            tensors[name] = (value.float() / scale).to(torch.float8_e4m3fn)
            if marker == "comfy_quant":
                tensors[layer + ".weight_scale"] = scale
                tensors[layer + ".comfy_quant"] = torch.tensor(
                    list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8
                )
            else:
                tensors[layer + ".scale_weight"] = scale
    if marker == "scaled_fp8":
        tensors["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    synthetic.save_safetensors(path, tensors, synthetic.metadata(g))
    return path


# -- companions --------------------------------------------------------------------------------------------------------------------------


def text_projection(path, version="2.3", dtype=torch.bfloat16):
    return write_safetensors(
        path, prefixed(PROJECTION_PREFIX, structure.projection_shapes(geometry(version), audio=True)), dtype=dtype
    )


def connectors_20(path):
    """The 19B's connectors and projection in one file, transformer prefix on the connectors."""
    g = geometry("2.0")
    connectors = structure.connector_shapes(g) | {
        n: s for n, s in structure.audio_dit_shapes(g).items() if n.startswith("audio_embeddings_connector.")
    }
    return write_safetensors(
        path, prefixed(DIT_PREFIX, connectors) | prefixed(PROJECTION_PREFIX, structure.projection_shapes(g))
    )


def connector_file(path, version="2.3", prefix="", spelling="video_embeddings_connector."):
    shapes = {
        name.replace("video_embeddings_connector.", spelling): shape
        for name, shape in structure.connector_shapes(geometry(version)).items()
    }
    tensors = {
        prefix + name: synthetic.tensor(name.replace(spelling, "video_embeddings_connector."), shape).bfloat16()
        for name, shape in shapes.items()
    }
    synthetic.save_safetensors(path, tensors)
    return path


def video_vae(path, version="2.3", prefix="", config=True):
    g = geometry(version)
    tensors = {
        prefix + name: synthetic.tensor(VAE_PREFIX + name, shape).bfloat16()
        for name, shape in structure.vae_shapes(g).items()
    }
    synthetic.save_safetensors(path, tensors, synthetic.metadata(g) if config else None)
    return path


def audio_vae(path):
    return write_safetensors(path, structure.sound_shapes(geometry()), geometry())


# -- other people's models ---------------------------------------------------------------------------------------------------------------


def llm_gguf(path, architecture, names, metadata=None):
    return write_gguf(
        path,
        {name: (32, 32) if name.endswith(("q.weight", "d.weight", "gate.weight")) else (32,) for name in names},
        mix("F32"),
        architecture=architecture,
        extra=metadata,
    )


def foreign_gguf(path, names, architecture=None):
    return write_gguf(path, dict.fromkeys(names, (32, 32)), lambda name, shape: "Q8_0", architecture=architecture)


def ltx_09(path):
    """LTX-Video 0.9: the same family of names, text from T5 (4096 wide), no connector."""
    g = geometry("2.0")
    shapes = {
        name: shape
        for name, shape in structure.dit_shapes(g).items()
        if not name.startswith("caption_projection.linear_1")
    }
    shapes |= {"caption_projection.linear_1.weight": (256, 4096), "caption_projection.linear_1.bias": (256,)}
    return write_gguf(path, shapes, mix("Q8_0"))


def ltx_25(path):
    """LTX-2.5: no biases in the video feed-forward, a key-frame embedding."""
    shapes = {
        name: shape
        for name, shape in av_shapes(geometry()).items()
        if not (".ff.net" in name and "audio" not in name and name.endswith(".bias"))
    }
    return write_gguf(
        path, shapes | {"keyframes_abs_pos_embedding": (1, 256)}, mix("Q4_K", "Q6_K"), extra={"model_version": "2.5.0"}
    )


BLOCK = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "attn_norm", "ffn_norm")


def tokenizer_entries(size: int) -> dict:
    """Tokenizer entries as llama.cpp writes them for Gemma: specials, bytes, then pieces."""
    tokens = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "▁",
        *"abcdefghijklmnopqrstuvwxyz .,",
    ]
    kinds = [3, 3, 3, 2] + [6] * 256 + [1] * (len(tokens) - 260)
    tokens += [f"<unused{i}>" for i in range(size - len(tokens))]
    kinds += [5] * (size - len(kinds))
    return {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(i) for i in range(size)], "tokenizer.ggml.token_type": GGUFValue("array", kinds, "int32"),
        "tokenizer.ggml.bos_token_id": 2, "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.unknown_token_id": 3, "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": False, "tokenizer.ggml.add_space_prefix": False,
    }  # fmt: skip


def gemma_gguf(path, types=None, embedding="Q6_K", layers=2, width=256, vocabulary=320):
    """A Gemma-3 text model under llama.cpp's names: 2 layers that fit the projection of ``geometry``."""
    head, shapes = 128, {"token_embd.weight": (vocabulary, width), "output_norm.weight": (width,)}
    for n in range(layers):
        b = f"blk.{n}."
        shapes |= {
            b + "attn_q.weight": (2 * head, width), b + "attn_k.weight": (head, width), b + "attn_v.weight": (head, width), b + "attn_output.weight": (width, 2 * head),
            b + "attn_q_norm.weight": (head,), b + "attn_k_norm.weight": (head,), b + "attn_norm.weight": (width,), b + "post_attention_norm.weight": (width,),
            b + "ffn_norm.weight": (width,), b + "post_ffw_norm.weight": (width,), b + "ffn_gate.weight": (2 * width, width), b + "ffn_up.weight": (2 * width, width),
            b + "ffn_down.weight": (width, 2 * width),
        }  # fmt: skip
    choose = types or mix("Q4_K", rest="Q4_K")
    header = {
        "gemma3.block_count": layers, "gemma3.embedding_length": width, "gemma3.feed_forward_length": 2 * width, "gemma3.attention.head_count": 2,
        "gemma3.attention.head_count_kv": 1, "gemma3.attention.key_length": head, "gemma3.attention.value_length": head,
        "gemma3.attention.sliding_window": 1024, "gemma3.attention.layer_norm_rms_epsilon": 1e-6, "gemma3.rope.freq_base": 1000000.0,
        "gemma3.context_length": 131072, **tokenizer_entries(vocabulary),
    }  # fmt: skip
    path_types = lambda name, shape: (
        embedding if name == "token_embd.weight" else "F32" if len(shape) == 1 else choose("blocks." + name, shape)
    )
    infos = [(name, path_types(name, shape), shape) for name, shape in shapes.items()]
    with GGUFWriter(path, {"general.architecture": "gemma3", **header}, infos) as writer:
        for name, fmt, shape in infos:
            value = synthetic.tensor(name, shape)
            value = 1 + 0.1 * value if len(shape) == 1 else value * (4.0 if name == "token_embd.weight" else 1.0)
            writer.write(name, encoded(name, value, fmt))
    return path


def mmproj(path):
    return foreign_gguf(path, ["v.blk.0.attn_q.weight", "mm.input_projection.weight"], "clip")


# -- the catalogue -------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wild:
    """name: the file; build(path); kind, version: what it is; needs: catalogue names of companions a transformer needs to load;
    parts: what it holds; refused: words of the sentence that refuses it."""

    name: str
    build: Callable[[Path], Path]
    kind: str
    version: str | None = None
    needs: tuple[str, ...] = ()
    parts: tuple[str, ...] = field(default=())
    refused: str | None = None


DIT, DIT_ONLY, ALL = ("dit", "connector"), ("dit",), ("dit", "connector", "projection", "vae")
CONNECTOR_23, CONNECTOR_20 = "connector.safetensors", "ltx-2-19b-embeddings_connector_dev_bf16.safetensors"
quantstack = partial(mix, connector="BF16", rest="BF16", vectors="BF16")

TRANSFORMERS = (
    # unsloth: everything inside but projection and VAE; small types reach the connector too
    Wild("ltx-2.3-22b-dev-Q4_K_M.gguf", partial(av_gguf, types=mix("Q4_K", "Q6_K")), "dit", "2.3", parts=DIT),
    Wild("ltx-2.3-22b-distilled-Q2_K.gguf", partial(av_gguf, types=mix("Q2_K", "Q3_K")), "dit", "2.3", parts=DIT),
    Wild("ltx-2.3-22b-distilled-1.1-UD-Q5_K_M.gguf", partial(av_gguf, types=mix("Q5_K", "Q8_0", rest="Q6_K", tables="BF16")), "dit", "2.3", parts=DIT),
    Wild("ltx-2.3-22b-dev-Q4_1.gguf", partial(av_gguf, types=mix("Q4_1", "Q5_1")), "dit", "2.3", parts=DIT),
    Wild("ltx-2.3-22b-dev-Q5_0.gguf", partial(av_gguf, types=mix("Q5_0", "Q4_0")), "dit", "2.3", parts=DIT),
    Wild("ltx-2.3-22b-dev-BF16.gguf", partial(av_gguf, types=mix("BF16")), "dit", "2.3", parts=DIT),
    Wild("ltx-2.3-22b-dev-F16.gguf", partial(av_gguf, types=mix("F16", rest="F16")), "dit", "2.3", parts=DIT),
    # the first upload, withdrawn the same day: no config
    Wild("ltx-2.3-22b-dev-Q8_0-without-config.gguf", partial(av_gguf, config=False), "dit", "2.3", parts=DIT),
    Wild("LTX-2.3-dev-Q4_K_M.gguf", partial(av_gguf, types=quantstack("Q4_K", "Q6_K")), "dit", "2.3", parts=DIT),
    Wild("ltx-2-3-22b-dev-Q3_K_M.gguf", partial(av_gguf, types=mix("Q3_K", "Q4_K", tables="BF16")), "dit", "2.3", parts=DIT),
    Wild("ltx-2.3-22b-IQ4_XS.gguf", partial(av_gguf, types=mix("IQ4_XS", "IQ4_NL")), "dit", "2.3", parts=DIT),
    Wild("LTX-2.3-22B-distilled-1.1-Q8_0_light.gguf", partial(av_gguf, connector=False), "dit", "2.3", (CONNECTOR_23,), DIT_ONLY),
    # tables and registers in block formats, a quantised first layer (128 inputs)
    Wild("ltx-2.3-tables-quantised.gguf", partial(av_gguf, types=mix("Q4_0", rest="Q8_0", tables="Q8_0")), "dit", "2.3", parts=DIT),
    Wild("ltx-2-19b-dev-Q4_K_M.gguf", partial(av_gguf, version="2.0", types=mix("Q4_K", "Q6_K"), connector=False), "dit", "2.0", (CONNECTOR_20,), DIT_ONLY),
    Wild("ltx-2-19b-dev_Q6_K.gguf", partial(av_gguf, version="2.0", types=quantstack("Q6_K"), connector=False, config=False), "dit", "2.0", (CONNECTOR_20,), DIT_ONLY),
    Wild("ltx2-full-checkpoint-Q8_0.gguf", partial(av_gguf, prefix=DIT_PREFIX, full=True), "checkpoint", "2.3", parts=ALL),
    # stable-diffusion.cpp: no architecture key
    Wild("ltx-2.3-sdcpp-q5_1.gguf", partial(av_gguf, types=mix("Q5_1"), prefix=DIT_PREFIX, architecture=None, config=False), "dit", "2.3", parts=DIT),
    Wild("ltx2.3-pig-q4_0.gguf", partial(av_gguf, types=mix("Q4_0"), prefix="diffusion_model.", architecture="pig"), "dit", "2.3", parts=DIT),
    Wild("ltx23-transformer-distill-Q8_0.gguf", partial(av_gguf, architecture="ltxav", extra={"ltx_version": "2.3.0"}), "dit", "2.3", parts=DIT),
    Wild("ltx-2.3-video-q4_0.gguf", video_gguf, "checkpoint", "2.3", parts=ALL),
    Wild("ltx-2-video-q5_1.gguf", partial(video_gguf, version="2.0", type="q5_1"), "checkpoint", "2.0", parts=ALL),
    Wild("ltx-2.3-22b-dev.safetensors", full_checkpoint, "checkpoint", "2.3", parts=ALL),
    Wild("ltx-2-19b-dev.safetensors", partial(full_checkpoint, version="2.0"), "checkpoint", "2.0", parts=ALL),
    Wild("ltx-2.3-22b-dev-fp8.safetensors", fp8_checkpoint, "checkpoint", "2.3", parts=ALL),
    Wild("ltx-2.3-22b-dev_fp8_scaled.safetensors", partial(fp8_checkpoint, marker="scaled_fp8"), "checkpoint", "2.3", parts=ALL),
)  # fmt: skip

COMPANIONS = (
    Wild("ltx-2.3_text_projection_bf16.safetensors", text_projection, "projection", "2.3", parts=("projection",)),
    Wild("ltx-2.3-22b-dev_embeddings_connectors.safetensors", text_projection, "projection", "2.3", parts=("projection",)),
    Wild(CONNECTOR_20, connectors_20, "connector", "2.0", parts=("connector", "projection")),
    Wild(CONNECTOR_23, connector_file, "connector", "2.3", parts=("connector",)),
    Wild("connector-official-spelling.safetensors", partial(connector_file, prefix=DIT_PREFIX, spelling="embeddings_connector."), "connector", "2.3", parts=("connector",)),
    Wild("LTX23_video_vae_bf16.safetensors", video_vae, "vae", "2.3", parts=("vae",)),
    Wild("LTX2_video_vae_bf16.safetensors", partial(video_vae, version="2.0"), "vae", "2.0", parts=("vae",)),
    Wild("ltx-2-3-22b-VAE.safetensors", partial(video_vae, prefix=VAE_PREFIX, config=False), "vae", "2.3", parts=("vae",)),
    Wild("LTX23_audio_vae_bf16.safetensors", audio_vae, "audio", "2.3"),
    Wild("gemma-3-12b-it-Q4_K_M.gguf", gemma_gguf, "gemma", parts=("gemma",)),
    Wild("gemma-3-12b-it-q4_0.gguf", partial(gemma_gguf, types=mix("Q4_0", rest="Q4_0"), embedding="F16"), "gemma", parts=("gemma",)),
    Wild("gemma-3-12b-it-UD-IQ4_XS.gguf", partial(gemma_gguf, types=mix("IQ4_XS", rest="IQ4_NL"), embedding="Q5_K"), "gemma", parts=("gemma",)),
)  # fmt: skip

REFUSED = (
    Wild("ltx-video-2b-v0.9.5-Q8_0.gguf", ltx_09, "foreign", refused="LTX-Video 0.9"),
    Wild("LTX-2.5-Distilled-Q4_K_M.gguf", ltx_25, "foreign", refused="LTX-2.5"),
    Wild("mmproj-BF16.gguf", mmproj, "foreign", refused="vision part"),
    Wild("wan2.2_t2v_14B-Q4_K_M.gguf", partial(foreign_gguf, names=["blocks.0.self_attn.q.weight", "blocks.0.cross_attn.k.weight", "head.head.weight"], architecture="wan"), "foreign", refused="Wan"),
    Wild("flux1-dev-Q8_0.gguf", partial(foreign_gguf, names=["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight", "img_in.weight"], architecture="flux"), "foreign", refused="Flux"),
    Wild("hunyuan-video-Q4_0.gguf", partial(foreign_gguf, names=["txt_in.individual_token_refiner.blocks.0.self_attn_qkv.weight", "double_blocks.0.img_attn_qkv.weight"], architecture="hyvid"), "foreign", refused="Hunyuan"),
    Wild("Llama-3.2-3B-Q8_0.gguf", partial(llm_gguf, architecture="llama", names=["token_embd.weight", *(f"blk.0.{n}.weight" for n in BLOCK)]), "foreign", refused="Llama"),
    Wild("gemma-2-9b-it-Q8_0.gguf", partial(llm_gguf, architecture="gemma2", names=["token_embd.weight", *(f"blk.0.{n}.weight" for n in BLOCK), "blk.0.post_ffw_norm.weight"]), "foreign", refused="Gemma 2"),
    Wild("gemma-4-12b-it-Q4_0.gguf", partial(llm_gguf, architecture="gemma4", names=["token_embd.weight", *(f"blk.0.{n}.weight" for n in BLOCK), "blk.0.attn_q_norm.weight"]), "foreign", refused="Gemma 4"),
    Wild("t5-v1_1-xxl-encoder-Q8_0.gguf", partial(foreign_gguf, names=["enc.blk.0.attn_q.weight", "token_embd.weight"], architecture="t5encoder"), "foreign", refused="T5"),
    Wild("taeltx2_3.safetensors", lambda path: write_safetensors(path, {"decoder.1.weight": (64, 128, 3, 3), "decoder.22.bias": (48,), "encoder.0.weight": (64, 48, 3, 3)}), "foreign", refused="preview"),
    Wild("ltx-2.3-spatial-upscaler-x2-1.1.safetensors", lambda path: write_safetensors(path, {"initial_conv.weight": (8, 128, 3, 3, 3), "post_upsample_res_blocks.0.conv1.weight": (8, 8, 3, 3, 3), "upsampler.0.weight": (32, 8, 3, 3)}), "foreign", refused="latent upscaler"),
)  # fmt: skip

CATALOGUE = {wild.name: wild for wild in (*TRANSFORMERS, *COMPANIONS, *REFUSED)}


class Shelf:
    """Builds files of the catalogue in a folder, each once."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __getitem__(self, name: str) -> Path:
        path = self.folder / name
        if not path.exists():
            CATALOGUE[name].build(path)
        return path
