"""Imports point one way (nodes -> ltx2_core -> quant), only nodes/ knows the host, quant/ knows no model, and importing is cheap."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = {name: sorted((ROOT / name).rglob("*.py")) for name in ("quant", "ltx2_core", "nodes")}
HOST_MODULES = {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "comfy_aimdo", "folder_paths", "execution", "server", "nodes", "node_helpers", "latent_preview"}

# Modules whose import brings something heavy; they are imported by others on first use only.
ON_FIRST_USE = {
    "quant.layouts": "comfy_kitchen, which imports triton where there is one",
    "quant.decode_triton": "triton",
    "quant.kernels_triton": "triton",
    "quant.fragments_triton": "triton",
    "quant.warp_triton": "triton",
    "quant.split_triton": "triton",
    "quant.skinny_triton": "triton",
    "quant.words_triton": "triton",
    "quant.launch": "triton",
    "quant.fast_triton": "triton",
    "quant.int8_triton": "triton",
    "ltx2_core.fused_triton": "triton",
    "ltx2_core.vae_triton": "triton",
    "ltx2_core.conv_triton": "triton",
    "ltx2_core.gemma_triton": "triton",
}
HEAVY = ("triton", "gguf", "transformers", "av", "diffusers", "sentencepiece", "comfy_kitchen", "comfy", "scipy", "matplotlib", "tokenizers", "PIL")


def relative_name(path):
    return path.relative_to(ROOT).as_posix()


def imports(path):
    """(absolute module names, relative module names with their dots) imported anywhere in a file, in functions too."""
    absolute, relative = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            absolute.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            (relative if node.level else absolute).add(module)
            if node.level and not node.module:
                relative.update("." * node.level + alias.name for alias in node.names)
    return absolute, relative


@pytest.mark.parametrize("path", LAYERS["quant"] + LAYERS["ltx2_core"], ids=relative_name)
def test_only_nodes_import_the_host(path):
    absolute, _ = imports(path)
    assert not {name for name in absolute if name.split(".")[0] in HOST_MODULES}


@pytest.mark.parametrize("path", LAYERS["quant"], ids=relative_name)
def test_quant_imports_nothing_above_it(path):
    _, relative = imports(path)
    assert not [name for name in relative if name.startswith("..")]


@pytest.mark.parametrize("path", LAYERS["ltx2_core"], ids=relative_name)
def test_the_core_imports_quant_and_itself(path):
    _, relative = imports(path)
    outside = [name for name in relative if name.startswith("..")]
    assert all(name.startswith("..quant") for name in outside), outside


@pytest.mark.parametrize("layer", LAYERS)
def test_the_pack_imports_itself_relatively(layer):
    """The host puts no folder of the pack on sys.path, and 'import nodes' would find the host's own module."""
    for path in LAYERS[layer]:
        absolute, _ = imports(path)
        ours = {name for name in absolute if name.split(".")[0] in ("quant", "ltx2_core", "ltx2_gguf")}
        assert not ours, f"{relative_name(path)}: {ours}"


@pytest.mark.parametrize("path", LAYERS["quant"], ids=relative_name)
def test_quant_speaks_of_no_model(path):
    """No model's or its parts' names in code, comments and docstrings (operators are registered under the pack's own name)."""
    text = path.read_text(encoding="utf-8").replace("ltx2_gguf::", "").replace("torch.ops.ltx2_gguf", "")
    found = re.findall(r"(?i)\b(?:ltx\w*|gemma\w*|dit|vae|adaln\w*|sigma|lightricks|unet|text[_ ]encoder|transformer_blocks?)\b", text)
    assert not found


def loaded_by(*modules):
    """Names in ``sys.modules`` after a fresh interpreter imported these modules of the pack."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import packloader, importlib
for name in {modules!r}:
    importlib.import_module("ltx2_gguf." + name if name else "ltx2_gguf")
print(" ".join(sorted({{name.split(".")[0] for name in sys.modules}})))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def module_names(layer):
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in LAYERS[layer]]
    return [name for name in names if name not in ON_FIRST_USE]


def test_importing_the_pack_loads_not_even_torch():
    assert not loaded_by("") & {"torch", "numpy", *HEAVY}


def test_importing_quant_and_the_core_loads_torch_and_nothing_heavy():
    loaded = loaded_by(*module_names("quant"), *module_names("ltx2_core"))
    assert "torch" in loaded
    assert not loaded & set(HEAVY)


def test_the_format_table_needs_the_standard_library_alone():
    assert not loaded_by("quant.formats", "quant") & {"torch", "numpy"}


@pytest.mark.parametrize("name", ON_FIRST_USE)
def test_modules_listed_as_heavy_exist(name):
    assert (ROOT / (name.replace(".", "/") + ".py")).is_file()
