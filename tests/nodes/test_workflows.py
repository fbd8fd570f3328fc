"""The shipped workflows: they fit the schemas, and the real server runs them to playable videos.

The server part uses a tiny synthetic checkpoint, the real Gemma-3 270M and a photograph; ``workflow_api`` turns the saved file into the prompt the page
would send.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import comfy_server as server_tools
import workflow_api

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
MODEL, SIZE, FRAMES = "tiny-ltx-2.3-Q8_0.gguf", (96, 64), 17


def load(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_links_of_a_workflow_join_existing_sockets_of_one_type(path):
    workflow = load(path)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert workflow["version"] == 0.4 and len(nodes) == len(workflow["nodes"])
    for number, source, output, target, slot, kind in workflow["links"]:
        assert nodes[source]["outputs"][output]["type"] == kind and number in nodes[source]["outputs"][output]["links"]
        assert nodes[target]["inputs"][slot]["type"] == kind and nodes[target]["inputs"][slot]["link"] == number
    linked = {
        socket["link"] for node in nodes.values() for socket in node.get("inputs", []) if socket.get("link") is not None
    }
    assert linked == {link[0] for link in workflow["links"]}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_a_workflow_says_which_files_it_needs_and_where_they_go(path):
    workflow = load(path)
    notes = " ".join(
        node["widgets_values"][0] for node in workflow["nodes"] if node["type"] in ("Note", "MarkdownNote")
    )
    files = [
        value
        for node in workflow["nodes"]
        for value in node.get("widgets_values") or []
        if isinstance(value, str) and value.endswith((".gguf", ".safetensors"))
    ]
    assert files and all(name in notes for name in files)
    assert all(folder in notes for folder in ("models/diffusion_models", "models/text_encoders", "models/vae"))


def test_the_set_of_workflows_is_flat_and_complete():
    names = {path.stem for path in WORKFLOWS}
    assert {"ltx2.3_t2v", "ltx2.3_i2v", "ltx2.3_distilled_t2v", "ltx2.3_first_last_frame", "toy_t2v"} <= names
    assert not [path for path in (ROOT / "workflows").iterdir() if path.is_dir()]


def shrink(prompt, steps=2, **inputs):
    """The same graph with the test's files and a size for a test; ``inputs``: class type -> input values to replace."""
    for node in prompt.values():
        kind, values = node["class_type"], node["inputs"]
        if kind == "LTX2GGUFLoader":
            values["model_file"] = MODEL
        elif kind == "LTX2GGUFTextEncoder":
            values["gemma_file"] = Path(os.environ["GEMMA_GGUF"]).name
        elif kind == "EmptyLTXVLatentVideo":
            values.update(width=SIZE[0], height=SIZE[1], length=FRAMES)
        elif kind == "LTX2GGUFSampler" and values["schedule"] == "ltx2":
            values["steps"] = steps
        elif kind == "LoadImage":
            values["image"] = "coffee.jpg"
        elif kind == "LTX2GGUFLoraLoader":
            values["lora_name"] = "test_lora.safetensors"
        values.update(inputs.get(kind, {}))
    return prompt


@pytest.fixture(scope="module")
def running(host, gemma_gguf, tmp_path_factory):
    """The server with a tiny model, the small Gemma, a photograph and a LoRA in its folders."""
    from safetensors.torch import save_file

    from ltx2_gguf.ltx2_core.convert import synthetic
    from ltx2_gguf.ltx2_core.files import structure

    base = tmp_path_factory.mktemp("host")
    model = synthetic.make(base / MODEL, structure.Geometry.small("2.3"), type="q8_0")
    server_tools.prepare(base, [("diffusion_models", model), ("text_encoders", gemma_gguf)])
    server_tools.copy_input(base, ROOT / "assets" / "coffee.jpg")
    generator = torch.Generator().manual_seed(1)
    down, up = torch.randn(8, 256, generator=generator), torch.randn(256, 8, generator=generator)
    layers = [f"diffusion_model.transformer_blocks.{i}.attn1.to_out.0" for i in range(2)]
    lora = {
        f"{layer}.lora_{side}.weight": value.clone() for layer in layers for side, value in (("A", down), ("B", up))
    }
    save_file(lora, str(base / "models" / "loras" / "test_lora.safetensors"))
    theirs = {key.replace("diffusion_model.", "base_model.model.transformer."): value for key, value in lora.items()}
    save_file(theirs, str(base / "models" / "loras" / "test_lora_peft.safetensors"))
    save_file(
        {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(2, 2)},
        str(base / "models" / "loras" / "wan.safetensors"),
    )
    with server_tools.Server(base) as running_server:
        assert "IMPORT FAILED" not in running_server.log()
        yield running_server


@pytest.fixture(scope="module")
def prompts(running):
    info = running.object_info()
    return lambda name, **options: shrink(
        workflow_api.to_prompt(load(ROOT / "workflows" / f"{name}.json"), info), **options
    )


def frames_of(running, prompt):
    (path,) = running.output_files(running.run(prompt))
    frames, fps = server_tools.read_video(path)
    assert frames.shape == (FRAMES, SIZE[1], SIZE[0], 3) and fps == 24.0
    assert frames.std() > 5, "the video is flat"
    return frames.astype(np.float32)


def pictures_of(running, prompt):
    """The decoded frames as PNGs, for comparisons to the bit: two encodings of the same frames as mp4 need not be equal."""
    (decode,) = nodes_of(prompt, "LTX2GGUFDecode")
    (video,) = nodes_of(prompt, "SaveVideo")
    prompt = {
        **prompt,
        video: {"class_type": "SaveImage", "inputs": {"images": [decode, 0], "filename_prefix": "frames"}},
    }
    pictures = [np.asarray(Image.open(path)) for path in sorted(running.output_files(running.run(prompt)))]
    assert len(pictures) == FRAMES and pictures[0].shape == (SIZE[1], SIZE[0], 3)
    return np.stack(pictures).astype(np.float32)


def nodes_of(prompt, kind):
    return [number for number, node in prompt.items() if node["class_type"] == kind]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ltx2.3_first_last_frame", "ltx2.3_lora_t2v", "ltx2_19b_t2v", "toy_t2v"])
def test_the_further_workflows_run_in_the_server(running, prompts, name):
    frames_of(running, prompts(name))


@pytest.fixture(scope="module")
def t2v(running, prompts):
    return frames_of(running, prompts("ltx2.3_t2v"))


@pytest.mark.slow
def test_the_server_lists_the_nodes_and_serves_their_help_pages(running):
    info = running.object_info()
    assert [name for name in info if name.startswith("LTX2GGUF")]
    import urllib.request

    with urllib.request.urlopen(
        f"{running.url}/extensions/ComfyUI-LTX2-GGUF/docs/LTX2GGUFSampler.md", timeout=10
    ) as reply:
        assert reply.read().decode().startswith("# LTX-2 Sampler")


@pytest.mark.slow
def test_text_to_video_gives_a_playable_video_of_the_size_asked_for(t2v):
    assert t2v.shape[0] == FRAMES


@pytest.mark.slow
def test_the_same_seed_gives_the_same_frames_after_everything_was_unloaded(running, prompts):
    pictures = []
    for _ in range(2):
        pictures.append(pictures_of(running, prompts("ltx2.3_t2v")))
        running.post("/free", {"unload_models": True, "free_memory": True})
    assert np.array_equal(*pictures)


@pytest.mark.slow
def test_another_seed_and_another_prompt_give_other_frames(running, prompts, t2v):
    assert np.abs(frames_of(running, prompts("ltx2.3_t2v", LTX2GGUFSampler={"seed": 7})) - t2v).mean() > 2
    prompt = prompts("ltx2.3_t2v")
    positive = prompt[prompt[nodes_of(prompt, "LTXVConditioning")[0]]["inputs"]["positive"][0]]
    positive["inputs"]["text"] = "snow"
    assert np.abs(frames_of(running, prompt) - t2v).mean() > 1


@pytest.mark.slow
def test_image_to_video_uses_the_photograph(running, prompts, t2v):
    frames = frames_of(running, prompts("ltx2.3_i2v"))
    assert np.abs(frames - t2v).mean() > 2
    ignored = frames_of(
        running, prompts("ltx2.3_i2v", LTX2GGUFImageCondition={"strength": 0.0}, CLIPTextEncode={"text": "x"})
    )
    used = frames_of(running, prompts("ltx2.3_i2v", CLIPTextEncode={"text": "x"}))
    assert np.abs(used - ignored).mean() > 2


@pytest.mark.slow
def test_the_distilled_workflow_runs_eight_steps_at_cfg_1(running, prompts):
    prompt = prompts("ltx2.3_distilled_t2v")
    sampler = prompt[nodes_of(prompt, "LTX2GGUFSampler")[0]]["inputs"]
    assert (sampler["steps"], sampler["cfg"], sampler["schedule"]) == (8, 1.0, "distilled")
    frames_of(running, prompt)


@pytest.mark.slow
def test_a_last_frame_is_added_as_a_guide_and_left_out_of_the_video(running, prompts):
    prompt = prompts("ltx2.3_i2v")
    first = nodes_of(prompt, "LTX2GGUFImageCondition")[0]
    sampler = prompt[nodes_of(prompt, "LTX2GGUFSampler")[0]]["inputs"]
    inputs = dict(prompt[first]["inputs"])
    prompt["100"] = {
        "class_type": "LTX2GGUFImageCondition",
        "inputs": {**inputs, "latent": [first, 0], "positive": [first, 1], "negative": [first, 2], "frame_index": -1},
    }
    sampler.update(latent=["100", 0], positive=["100", 1], negative=["100", 2])
    frames_of(running, prompt)


@pytest.mark.slow
def test_the_hosts_own_sampler_decoder_and_lora_loader_take_our_objects(running, prompts):
    prompt = prompts("ltx2.3_t2v")
    sampler, decode, loader = (
        nodes_of(prompt, kind)[0] for kind in ("LTX2GGUFSampler", "LTX2GGUFDecode", "LTX2GGUFLoader")
    )
    old = prompt[sampler]["inputs"]
    common = {"seed": 1, "steps": 2, "cfg": 2.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    prompt["100"] = {
        "class_type": "LoraLoaderModelOnly",
        "inputs": {"model": [loader, 0], "lora_name": "test_lora.safetensors", "strength_model": 0.0},
    }
    prompt[sampler] = {
        "class_type": "KSampler",
        "inputs": {
            **common,
            "model": ["100", 0],
            "positive": old["positive"],
            "negative": old["negative"],
            "latent_image": old["latent"],
        },
    }
    prompt[decode] = {"class_type": "VAEDecode", "inputs": prompt[decode]["inputs"] | {}}
    prompt[decode]["inputs"].pop("tile_size")
    plain = frames_of(running, prompt)
    prompt["100"]["inputs"]["strength_model"] = 0.05
    assert np.abs(frames_of(running, prompt) - plain).mean() > 0.5
    prompt["100"]["inputs"]["strength_model"] = 0.0
    prompt[decode] = {
        "class_type": "VAEDecodeTiled",
        "inputs": {
            **prompt[decode]["inputs"],
            "tile_size": 64,
            "overlap": 32,
            "temporal_size": 16,
            "temporal_overlap": 8,
        },
    }
    frames_of(running, prompt)


@pytest.mark.slow
def test_the_lora_node_gives_the_frames_of_the_hosts_loader_from_a_file_that_one_cannot_read(running, prompts):
    prompt = prompts("ltx2.3_t2v")
    sampler, loader = (nodes_of(prompt, kind)[0] for kind in ("LTX2GGUFSampler", "LTX2GGUFLoader"))
    plain = pictures_of(running, prompt)
    prompt[sampler]["inputs"]["model"] = ["100", 0]
    pictures = {}
    for kind, name in (
        ("LoraLoaderModelOnly", "test_lora"),
        ("LTX2GGUFLoraLoader", "test_lora"),
        ("LTX2GGUFLoraLoader", "test_lora_peft"),
        ("LoraLoaderModelOnly", "test_lora_peft"),
    ):
        prompt["100"] = {
            "class_type": kind,
            "inputs": {"model": [loader, 0], "lora_name": f"{name}.safetensors", "strength_model": 0.05},
        }
        pictures[kind, name] = pictures_of(running, prompt)
    expected = pictures["LoraLoaderModelOnly", "test_lora"]
    assert np.abs(expected - plain).mean() > 0.5
    assert np.array_equal(pictures["LTX2GGUFLoraLoader", "test_lora"], expected) and np.array_equal(
        pictures["LTX2GGUFLoraLoader", "test_lora_peft"], expected
    )
    assert np.array_equal(pictures["LoraLoaderModelOnly", "test_lora_peft"], plain), (
        "the host's loader reads this spelling now; say so in the docs"
    )
    assert "test_lora_peft.safetensors: 2 of 2 layers applied" in running.log()
    prompt["100"] = {
        "class_type": "LTX2GGUFLoraLoader",
        "inputs": {"model": [loader, 0], "lora_name": "wan.safetensors", "strength_model": 1.0},
    }
    with pytest.raises(server_tools.PromptFailed, match="wan.safetensors is a LoRA for a Wan video model"):
        running.run(prompt)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, inputs, sentence",
    [
        (
            "LTX2GGUFTextEncoder",
            {"projection_file": Path(os.environ.get("GEMMA_GGUF", "gemma.gguf")).name},
            "projection",
        ),
        ("LTX2GGUFImageCondition", {"frame_index": 40}, "17 frames: use 0 to 16"),
    ],
    ids=["no projection in that file", "frame outside the video"],
)
def test_a_wrong_choice_is_answered_with_one_sentence(running, prompts, kind, inputs, sentence):
    with pytest.raises(server_tools.PromptFailed) as failed:
        running.run(prompts("ltx2.3_i2v", **{kind: inputs}))
    message = failed.value.details["exception_message"].strip()
    assert sentence in message and "\n" not in message


@pytest.mark.slow
def test_a_text_encoder_given_as_the_model_is_named_and_sent_to_its_node(running, prompts):
    gemma = Path(os.environ["GEMMA_GGUF"])
    link = running.base / "models" / "diffusion_models" / gemma.name
    link.symlink_to(gemma.resolve())
    try:
        with pytest.raises(server_tools.PromptFailed, match="Gemma-3.*text encoder.*LTX-2 Gemma Text Encoder"):
            running.run(prompts("ltx2.3_t2v", LTX2GGUFLoader={"model_file": gemma.name}))
    finally:
        link.unlink()


@pytest.mark.slow
def test_a_vae_that_is_missing_stops_the_loader_and_is_found_once_it_is_there(running):
    from ltx2_gguf.ltx2_core.convert import synthetic
    from ltx2_gguf.ltx2_core.files import structure

    models = running.base / "models"
    old = structure.Geometry.small("2.0")  # the other models there are 2.3, so that no VAE of theirs fits
    lone, vae = models / "diffusion_models" / "lone.gguf", models / "vae" / "old-vae.safetensors"
    synthetic.make(lone, old, type="q8_0", vae=False, projection=False)
    prompt = {
        "1": {
            "class_type": "LTX2GGUFLoader",
            "inputs": {"model_file": lone.name, "compute": "exact", "connector_file": "auto", "vae_file": "auto"},
        },
        "2": {
            "class_type": "EmptyLTXVLatentVideo",
            "inputs": {"width": 64, "height": 64, "length": 1, "batch_size": 1},
        },
        "3": {"class_type": "LTX2GGUFDecode", "inputs": {"samples": ["2", 0], "vae": ["1", 1], "tile_size": 0}},
        "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "lone"}},
    }
    try:
        with pytest.raises(server_tools.PromptFailed, match="lone.gguf contains no video VAE") as failed:
            running.run(prompt)
        assert failed.value.details["node_type"] == "LTX2GGUFLoader"
        synthetic.make(vae, old, type="bf16", projection=False)
        assert len(running.output_files(running.run(prompt))) == 1
    finally:
        lone.unlink(), vae.unlink(missing_ok=True)


@pytest.mark.parametrize(
    "path", [p for p in WORKFLOWS if p.stem != "toy_t2v"], ids=lambda p: p.stem
)  # the toy was trained without one
def test_the_negative_prompt_of_a_workflow_is_the_default_of_its_version(path):
    from ltx2_gguf.ltx2_core.sampling.guidance import NEGATIVE_PROMPTS

    texts = [node["widgets_values"][0] for node in load(path)["nodes"] if node["type"] == "CLIPTextEncode"]
    assert NEGATIVE_PROMPTS["2.3" if "2.3" in path.stem else "2.0"] in texts
