"""The structure of the code, checked in one pass: folders, directions of imports, no circles, and cheap imports."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOST_MODULES = {
    "comfy",
    "comfy_api",
    "comfy_extras",
    "comfy_execution",
    "comfy_aimdo",
    "folder_paths",
    "execution",
    "server",
    "nodes",
    "node_helpers",
    "latent_preview",
}

# From the bottom up: a module imports its own folder and folders in earlier rows. Folders in one row do not see each other.
ORDER = (
    ("quant",),
    ("ltx2_core/files",),
    ("ltx2_core/transformer", "ltx2_core/vae", "ltx2_core/audio"),
    ("ltx2_core/text",),
    ("ltx2_core/sampling",),
    ("ltx2_core/lora",),
    ("ltx2_core/offload",),
    ("ltx2_core/parallel",),
    ("ltx2_core/loading",),
    ("ltx2_core/convert",),
    ("ltx2_core",),
    ("ltx2_core/cli",),
    ("nodes/host",),
    ("nodes",),
    (".",),
)
RANK = {folder: rank for rank, row in enumerate(ORDER) for folder in row}

# Upward imports and circles that are still there; a row goes when its cause goes.
STILL_UPWARD = set()
STILL_CIRCULAR = set()

HEAVY = {
    "triton",
    "gguf",
    "transformers",
    "av",
    "diffusers",
    "sentencepiece",
    "comfy_kitchen",
    "comfy",
    "scipy",
    "matplotlib",
    "tokenizers",
    "PIL",
}


def modules():
    """{path relative to the root: syntax tree} of every module of the pack."""
    paths = [
        ROOT / "__init__.py",
        *(p for layer in ("quant", "ltx2_core", "nodes") for p in sorted((ROOT / layer).rglob("*.py"))),
    ]
    return {p.relative_to(ROOT).as_posix(): ast.parse(p.read_text(encoding="utf-8")) for p in paths}


def folder(path):
    """The row of ORDER that a module belongs to: quant with all that is below it, elsewhere its own folder."""
    parent = Path(path).parent.as_posix()
    return "quant" if parent.split("/")[0] == "quant" else parent


def targets(path, node):
    """Modules of the pack that one import statement names, as paths."""
    if not isinstance(node, ast.ImportFrom) or not node.level:
        return
    base = (ROOT / path).parent
    for _ in range(node.level - 1):
        base = base.parent
    base = base.joinpath(*(node.module or "").split(".")) if node.module else base
    if base.with_suffix(".py").is_file():
        yield base.with_suffix(".py").relative_to(ROOT).as_posix()
        return
    for alias in node.names:
        inner = base / alias.name
        found = inner.with_suffix(".py") if inner.with_suffix(".py").is_file() else inner / "__init__.py"
        yield (found if found.is_file() else base / "__init__.py").relative_to(ROOT).as_posix()


def imports():
    """{module: the modules of the pack that it imports anywhere, in functions too}."""
    return {
        path: {t for node in ast.walk(tree) for t in targets(path, node)} - {path} for path, tree in modules().items()
    }


def circles(graph):
    """Sets of modules that reach each other."""
    reach = {path: set(found) for path, found in graph.items()}
    changed = True
    while changed:
        changed = False
        for found in reach.values():
            more = set().union(*(reach[t] for t in found if t in reach)) - found
            if more:
                found |= more
                changed = True
    return {frozenset(b for b in graph if b in reach[a] and a in reach[b]) for a in graph if a in reach[a]}


def test_folders_directions_and_circles():
    graph, wrong = imports(), []
    for path, found in graph.items():
        own = folder(path)
        if own not in RANK:
            wrong.append(f"{path}: {own} is no folder of the layout")
            continue
        for target in found:
            other = folder(target)
            if other != own and RANK[other] >= RANK[own] and (own, other) not in STILL_UPWARD:
                wrong.append(f"{path} imports {target}")
    wrong += [f"circle: {sorted(circle)}" for circle in circles(graph) - STILL_CIRCULAR]
    for path, tree in modules().items():
        absolute = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        absolute |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level}
        tops = {name.split(".")[0] for name in absolute}
        if tops & {"quant", "ltx2_core", "ltx2_gguf"}:  # the host puts no folder of the pack on sys.path
            wrong.append(f"{path} imports the pack by an absolute name")
        if not path.startswith("nodes/") and path != "__init__.py" and tops & HOST_MODULES:
            wrong.append(f"{path} imports the host: {sorted(tops & HOST_MODULES)}")
        if path.startswith("quant/"):
            text = (
                (ROOT / path).read_text(encoding="utf-8").replace("ltx2_gguf::", "").replace("torch.ops.ltx2_gguf", "")
            )
            model_words = r"(?i)\b(?:ltx\w*|gemma\w*|dit|vae|adaln\w*|sigma|lightricks|unet|text[_ ]encoder|transformer_blocks?)\b"
            wrong += [f"{path} speaks of a model: {word}" for word in set(re.findall(model_words, text))]
        if path.endswith("__init__.py") and not ast.get_docstring(tree):
            wrong.append(f"{path} has no docstring that maps its folder")
    assert not wrong, "\n".join(wrong)


def loaded_by(*names):
    """Top-level names in ``sys.modules`` after a fresh interpreter imported these modules of the pack."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests" / "support")!r})
import packloader, importlib
for name in {names!r}:
    importlib.import_module("ltx2_gguf." + name if name else "ltx2_gguf")
print(" ".join(sorted({{name.split(".")[0] for name in sys.modules}})))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def imported_on_first_use(path):
    """Modules that bring something heavy; others import them inside functions."""
    return "triton" in Path(path).name or path == "quant/layouts.py" or path.endswith("__main__.py")


def test_importing_the_pack_loads_not_even_torch():
    assert not loaded_by("") & {"torch", "numpy", *HEAVY}


def test_importing_quant_and_the_core_loads_torch_and_nothing_heavy():
    paths = [p for p in modules() if p.startswith(("quant/", "ltx2_core/")) and not imported_on_first_use(p)]
    loaded = loaded_by(*(p.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for p in paths))
    assert "torch" in loaded
    assert not loaded & HEAVY


def test_the_format_table_needs_the_standard_library_alone():
    assert not loaded_by("quant.formats", "quant") & {"torch", "numpy"}


def test_the_architecture_page_names_files_that_exist():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:quant|ltx2_core|nodes|tests)/[\w/]+(?:\.py|/))`", page)
    assert len(named) > 20 and [name for name in named if not (ROOT / name).exists()] == []
