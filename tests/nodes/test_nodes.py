"""The menu: schemas, help pages, folders, and what nodes answer to bad input."""

import asyncio
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

# Widget values are stored by position in saved workflows: what is listed here stays, in this order; new inputs come behind.
FROZEN = {
    "LTX2GGUFLoader": ["model_file", "compute", "connector_file", "vae_file", "sound"],
    "LTX2GGUFTextEncoder": ["gemma_file", "projection_file", "device", "sound"],
    "LTX2GGUFVideoVAE": ["vae_file"],
    "LTX2GGUFLoraLoader": ["model", "lora_name", "strength_model"],
    "LTX2GGUFImageCondition": [
        "vae",
        "latent",
        "image",
        "positive",
        "negative",
        "frame_index",
        "strength",
        "crf",
        "method",
    ],
    "LTX2GGUFSampler": [
        "model",
        "positive",
        "negative",
        "latent",
        "seed",
        "steps",
        "cfg",
        "schedule",
        "guidance",
        "sampler_name",
        "stg_scale",
        "stg_blocks",
        "rescale",
        "audio_cfg",
        "modality_scale",
        "audio_stg_scale",
        "audio_rescale",
    ],
    "LTX2GGUFDecode": ["samples", "vae", "tile_size"],
    "LTX2GGUFAudioVAE": ["audio_vae_file"],
}
OUTPUTS = {
    "LTX2GGUFLoader": ["MODEL", "VAE"],
    "LTX2GGUFTextEncoder": ["CLIP"],
    "LTX2GGUFVideoVAE": ["VAE"],
    "LTX2GGUFLoraLoader": ["MODEL"],
    "LTX2GGUFImageCondition": ["LATENT", "CONDITIONING", "CONDITIONING"],
    "LTX2GGUFSampler": ["LATENT"],
    "LTX2GGUFDecode": ["IMAGE"],
    "LTX2GGUFAudioVAE": ["VAE"],
}


@pytest.fixture(scope="module")
def schemas(host):
    import ltx2_gguf

    extension = asyncio.run(ltx2_gguf.comfy_entrypoint())
    return {node.GET_SCHEMA().node_id: node.GET_SCHEMA() for node in asyncio.run(extension.get_node_list())}


def test_every_node_has_a_prefixed_id_and_sits_in_one_menu_folder(schemas):
    assert set(schemas) == set(FROZEN)
    assert all(re.fullmatch(r"LTX2GGUF\w+", name) for name in schemas)
    assert {schema.category.split("/")[0] for schema in schemas.values()} == {"LTX-2 GGUF"}
    assert len({schema.category for schema in schemas.values()}) <= 3
    assert all(
        schema.display_name.startswith("LTX-2 ") and schema.description and schema.search_aliases
        for schema in schemas.values()
    )


@pytest.mark.parametrize("node_id", FROZEN)
def test_inputs_keep_their_names_and_places_and_outputs_their_types(schemas, node_id):
    schema = schemas[node_id]
    assert [item.id for item in schema.inputs][: len(FROZEN[node_id])] == FROZEN[node_id]
    assert [output.get_io_type() for output in schema.outputs] == OUTPUTS[node_id]


@pytest.mark.parametrize("node_id", FROZEN)
def test_every_input_and_output_has_a_tooltip(schemas, node_id):
    schema = schemas[node_id]
    for item in [*schema.inputs, *schema.outputs]:
        assert item.tooltip and item.tooltip.strip().endswith((".", ")")), f"{node_id}.{item.id}"


@pytest.mark.parametrize("node_id", FROZEN)
def test_every_node_has_a_help_page_that_explains_each_input_and_output(schemas, node_id):
    import ltx2_gguf

    page = (ROOT / ltx2_gguf.WEB_DIRECTORY / "docs" / f"{node_id}.md").read_text(encoding="utf-8")
    schema = schemas[node_id]
    assert page.startswith(f"# {schema.display_name}\n")
    for name in [*(item.id for item in schema.inputs), *(output.display_name for output in schema.outputs)]:
        assert f"**{name}**" in page, f"{node_id}: '{name}' is not explained"


def test_importing_the_pack_loads_nothing_heavy():
    """The host prints seconds per pack; only ``comfy_entrypoint`` may cost some."""
    code = (
        "import sys; sys.path.insert(0, 'tests/support'); before = set(sys.modules); import packloader; "
        "heavy = {'torch', 'triton', 'gguf', 'transformers', 'av', 'numpy', 'safetensors', 'comfy', 'comfy_kitchen', 'sentencepiece'}; "
        "print(sorted(heavy & (set(sys.modules) - before)))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_only_the_nodes_folder_knows_the_host():
    for path in [*(ROOT / "ltx2_core").glob("*.py"), *(ROOT / "quant").glob("*.py")]:
        assert not re.search(
            r"^\s*(?:import|from) (?:comfy(?:_api|_extras|\.|\s)|folder_paths|nodes\b)",
            path.read_text(encoding="utf-8"),
            re.M,
        ), path.name
    for path in (ROOT / "nodes").glob("*.py"):
        if not path.name.startswith("host"):
            assert not re.search(r"^\s*(?:import|from) comfy[.\s]", path.read_text(encoding="utf-8"), re.M), (
                f"{path.name} reaches into comfy"
            )


def test_files_are_listed_from_the_hosts_folders_without_touching_its_extensions(host, tmp_path, monkeypatch):
    import folder_paths

    from ltx2_gguf.nodes import folders

    before = set(folder_paths.supported_pt_extensions)
    extra = tmp_path / "more models"
    extra.mkdir()
    (extra / "a.gguf").touch(), (extra / "b.safetensors").touch(), (extra / "c.txt").touch()
    paths, extensions = folder_paths.folder_names_and_paths["diffusion_models"]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([*paths, str(extra)], extensions))
    assert {"a.gguf", "b.safetensors"} <= set(folders.files("ltx2_gguf_models"))
    assert "c.txt" not in folders.files("ltx2_gguf_models")
    assert folders.path("ltx2_gguf_models", "a.gguf") == str(extra / "a.gguf")
    assert folder_paths.supported_pt_extensions == before and ".gguf" not in before
    assert ".gguf" not in folder_paths.folder_names_and_paths["diffusion_models"][1]
    with pytest.raises(FileNotFoundError, match="gone.gguf"):
        folders.path("ltx2_gguf_models", "gone.gguf")


@pytest.mark.parametrize(
    "shape, sentence",
    [
        ((1, 4, 64, 64), "image latent.*EmptyLTXVLatentVideo"),
        ((1, 16, 3, 8, 8), "16 channels.*needs 128"),
        ((1, 128, 0, 2, 2), "no frames"),
    ],
)
def test_a_latent_of_another_kind_is_refused_with_what_to_use(host, shape, sentence):
    from ltx2_gguf.nodes.sampling import check_latent

    with pytest.raises(ValueError, match=sentence):
        check_latent({"samples": torch.zeros(shape)})


@pytest.mark.parametrize(
    "text, message",
    [("x", "write block numbers from 0 to 47"), ("48", "has blocks 0 to 47"), ("-1", "has blocks 0 to 47")],
)
def test_stg_blocks_outside_the_model_are_refused_with_the_range(host, text, message):
    from ltx2_gguf.nodes.sampling import parse_blocks

    with pytest.raises(ValueError, match=message):
        parse_blocks(text, None)


def test_official_guidance_follows_version_and_schedule(host):
    from types import SimpleNamespace

    from ltx2_gguf.nodes.sampling import parse_blocks, preset_guidance

    new, old = SimpleNamespace(version="2.3", num_layers=48), SimpleNamespace(version="2.0", num_layers=48)
    assert preset_guidance("official", 3.0, "ltx2", new).stg_blocks == (28,)
    assert preset_guidance("official", 3.0, "ltx2", old).stg_blocks == (29,)
    assert (
        preset_guidance("official", 3.0, "ltx2", new).stg,
        preset_guidance("official", 3.0, "ltx2", new).rescale,
    ) == (1.0, 0.7)
    assert preset_guidance("official", 1.0, "distilled", new).passes == 1
    assert preset_guidance("cfg only", 3.0, "ltx2", new).passes == 2
    assert parse_blocks("3, 4", new) == (3, 4) and parse_blocks("", old) == (29,)


def test_errors_are_shown_without_the_path_of_the_folder():
    """The host puts the module of an error's class into its title, and names a pack's modules by their path."""
    import ast

    named = {"quant": "quant", "ltx2_core": "ltx2_gguf", "nodes": "ltx2_gguf"}
    for layer, name in named.items():
        for path in (ROOT / layer).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.ClassDef) and re.search(r"(Error|Exception|Mismatch|Twice)$", node.name):
                    set_to = {
                        ast.unparse(line.targets[0]): ast.unparse(line.value)
                        for line in node.body
                        if isinstance(line, ast.Assign)
                    }
                    assert set_to.get("__module__") == repr(name), f"{path.relative_to(ROOT)}: {node.name}"
