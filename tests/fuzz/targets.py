"""Seed files of every kind, and what is done with a damaged one: everything up to the loaded module."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path

import torch

import lora_spellings
import tiny_gemma
from ltx2_gguf.ltx2_core.cli import inspect_file
from ltx2_gguf.ltx2_core.convert import plan, synthetic
from ltx2_gguf.ltx2_core.files import structure
from ltx2_gguf.ltx2_core.files.opened import open_model
from ltx2_gguf.ltx2_core.loading.identify import identify
from ltx2_gguf.ltx2_core.loading.lora import open_lora
from ltx2_gguf.ltx2_core.loading.text_encoder import load_text_encoder
from ltx2_gguf.ltx2_core.loading.transformer import load_dit
from ltx2_gguf.ltx2_core.loading.vae import load_vae
from ltx2_gguf.ltx2_core.lora import apply
from ltx2_gguf.ltx2_core.text.tokenizer import sentencepiece_model

SIZES = {
    "num_layers": 2,
    "heads": 2,
    "head_dim": 32,
    "gemma_width": tiny_gemma.WIDTH,
    "gemma_layers": tiny_gemma.LAYERS,
    "connector_layers": 1,
}


@dataclass(frozen=True)
class Seed:
    """A well-formed file. container: see mutate.MUTATORS; header: bytes of its header; loader: name of the part that is loaded from it."""

    name: str
    data: bytes
    container: str
    header: int
    loader: str


class Corpus:
    """All seeds, in a folder with the good files that the loaders need beside a bad one."""

    def __init__(self, folder: Path):
        from safetensors.torch import save_file

        self.folder = folder
        g23, g20 = structure.Geometry.small("2.3", **SIZES), structure.Geometry.small("2.0", **SIZES)
        self.gemma = tiny_gemma.write(folder / "good-gemma.gguf")
        self.projection = synthetic.make(folder / "good-projection.safetensors", g23, type="f32", vae=False)
        model = synthetic.make(folder / "model.gguf", g23, type="q8_0", vae=False, projection=False)
        old = synthetic.make(folder / "old.gguf", g20, type="q4_0", vae=False, projection=False)
        whole = synthetic.make(folder / "whole.safetensors", g23, type="bf16")
        vae = self._part(
            folder / "vae.safetensors", structure.vae_shapes(g23), {"config": json.dumps(structure.config(g23))}
        )
        vae_gguf = synthetic.make(folder / "vae.gguf", g20, type="q8_0", projection=False, connector=False)
        lora_path, patterns = folder / "lora.safetensors", {"transformer_blocks.0.attn1.to_q": 2}
        header = lora_spellings.peft_header(r=4, lora_alpha=8, alpha_pattern=patterns)
        save_file(lora_spellings.lora("diffusers", alpha=None), lora_path, header)
        fp8 = self._quantised(folder / "fp8.safetensors", g23)
        spiece = sentencepiece_model(
            tiny_gemma.PIECES, [-float(i) for i in range(len(tiny_gemma.PIECES))], tiny_gemma.TYPES
        )
        index = synthetic.save_sharded(
            folder / "shards", {"patchify_proj.weight": torch.zeros(4, 4), "proj_out.weight": torch.zeros(4, 4)}, {}
        )
        self.dense_gemma = self._dense_gemma()
        self.seeds = [
            _gguf("model.gguf", model, "dit"), _gguf("old.gguf", old, "dit"), _gguf("vae.gguf", vae_gguf, "vae"), _gguf("gemma.gguf", self.gemma, "text"),
            _safetensors("whole.safetensors", whole, "dit"), _safetensors("vae.safetensors", vae, "vae"), _safetensors("lora.safetensors", lora_path, "lora"),
            _safetensors("fp8.safetensors", fp8, "dit"), _safetensors("projection.safetensors", self.projection, "projection"),
            Seed("spiece", spiece, "bytes", len(spiece), "tokenizer"),
            Seed("model.safetensors.index.json", index.read_bytes(), "json", index.stat().st_size, "index"),
        ]  # fmt: skip

    @staticmethod
    def _part(path, shapes, metadata):
        synthetic.save_safetensors(path, synthetic.state_dict(shapes), metadata)
        return path

    @staticmethod
    def _quantised(path, g):
        tensors = synthetic.state_dict(structure.dit_shapes(g) | structure.connector_shapes(g), dtype=torch.bfloat16)
        layers = {}
        for name in [name for name in tensors if name.endswith(("attn1.to_q.weight", "net.2.weight"))]:
            layer = name.removesuffix(".weight")
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            tensors[layer + ".weight_scale"] = torch.tensor(0.5)
            marker = json.dumps({"format": "float8_e4m3fn"}).encode()
            if len(layers) % 2:
                tensors[layer + ".comfy_quant"] = torch.tensor(list(marker), dtype=torch.uint8)
            layers[layer] = {"format": "float8_e4m3fn"}
        metadata = synthetic.metadata(g) | {"_quantization_metadata": json.dumps({"layers": layers})}
        synthetic.save_safetensors(path, tensors, metadata)
        return path

    def _dense_gemma(self):
        """A safetensors Gemma without tokenizer, to which a damaged one is added."""
        file = open_model(self.gemma)
        tensors = {name: file.weights.load(stored, torch.float32) for name, stored in file.gemma.items()}
        return {name: value.clone() for name, value in tensors.items()}

    def run(self, seed: Seed, path: Path) -> str:
        """Do with the file at ``path`` what the pack does with a user's file; returns what became of it."""
        if seed.loader == "tokenizer":
            return self._tokenizer(path)
        with open_model(path) as file:
            report = identify(file)
            inspect_file.render(report)
            json.dumps(inspect_file.as_dict(report)).encode()
            if seed.loader == "index":
                return report.kind
            plan.make_plan(plan.inventory_of(file.weights), "q8_0") if seed.loader == "dit" and report.has(
                "dit"
            ) else None
            with torch.inference_mode():
                if seed.loader == "dit":
                    load_dit(file, dtype=torch.float32, require_connector=False)
                elif seed.loader == "vae":
                    load_vae(file)
                elif seed.loader == "text":
                    load_text_encoder(file, self.projection).tokenizer.encode("a b")
                elif seed.loader == "projection":
                    load_text_encoder(self.gemma, file)
                else:
                    lora = open_lora(file)
                    lora.standard({key.raw: lora.file.load(key.raw) for key in lora.names.keys.values()})
                    apply.warnings(lora, apply.fit(lora, lambda layer: ()), "2.3")
            return report.kind

    def _tokenizer(self, path):
        """The bytes as the tokenizer of a safetensors Gemma."""
        from safetensors.torch import save_file

        data = path.read_bytes()
        tensors = self.dense_gemma | {"spiece_model": torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)}
        target = path.with_name("gemma-with-tokenizer.safetensors")
        save_file(tensors, target)
        load_text_encoder(target, self.projection).tokenizer.encode("a b")
        return "tokenizer"


def _gguf(name, path, loader):
    from ltx2_gguf.quant.gguf.reader import GGUFFile

    data = Path(path).read_bytes()
    return Seed(name, data, "gguf", GGUFFile(path).data_offset, loader)


def _safetensors(name, path, loader):
    data = Path(path).read_bytes()
    return Seed(name, data, "safetensors", 8 + struct.unpack("<Q", data[:8])[0], loader)
