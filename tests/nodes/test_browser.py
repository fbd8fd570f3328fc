"""The shipped workflows on the page itself: every node known, nothing red, the prompt the page sends, a video after Run."""

import json
import time
from pathlib import Path

import pytest

import browser
import comfy_server as server_tools
import workflow_api

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not browser.available(), reason="needs chromium, chromium-driver and selenium"),
]


@pytest.fixture(scope="module")
def running(host, gemma_gguf, tmp_path_factory):
    """The server with a tiny model and the small Gemma under the names that the workflows use."""
    from ltx2_gguf.ltx2_core.convert import synthetic
    from ltx2_gguf.ltx2_core.files import structure

    base = tmp_path_factory.mktemp("host")
    model = synthetic.make(base / "model.gguf", structure.Geometry.small("2.3"), type="q8_0")
    server_tools.prepare(base)
    for path in WORKFLOWS:
        for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]:
            folder, source = {
                "LTX2GGUFLoader": ("diffusion_models", model),
                "LTX2GGUFTextEncoder": ("text_encoders", gemma_gguf),
                "LTX2GGUFLoraLoader": ("loras", model),  # listed, not loaded
            }.get(node["type"], (None, None))
            link = folder and base / "models" / folder / node["widgets_values"][0]
            if link and not link.exists():
                link.symlink_to(Path(source).resolve())
    (base / "input" / "example.png").write_bytes((host / "input" / "example.png").read_bytes())
    with server_tools.Server(base) as running_server:
        yield running_server


@pytest.fixture(scope="module")
def page(running):
    with browser.Page(running.url) as opened:
        yield opened


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_a_workflow_opens_with_every_node_known_and_every_socket_filled(running, page, path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    page.open(workflow)
    nodes = page.nodes()
    assert len(nodes) == len(workflow["nodes"])
    assert [node["type"] for node in nodes if not node["known"]] == []
    optional = {"audio"}
    empty = [
        (node["type"], socket["name"])
        for node in nodes
        for socket in node["inputs"]
        if socket["link"] is None and not socket["widget"]
    ]
    assert [entry for entry in empty if entry[1] not in optional] == []
    expected = workflow_api.to_prompt(workflow, running.object_info())
    sent = page.prompt()
    assert set(sent) == set(expected)
    for number, node in expected.items():  # the page adds the defaults of inputs that are newer than the workflow
        assert {name: sent[number]["inputs"].get(name) for name in node["inputs"]} == node["inputs"]


def test_pressing_run_on_the_page_makes_a_video(running, page):
    workflow = json.loads((ROOT / "workflows" / "ltx2.3_distilled_t2v.json").read_text(encoding="utf-8"))
    for node in workflow["nodes"]:
        if node["type"] == "EmptyLTXVLatentVideo":
            node["widgets_values"] = [64, 64, 9, 1]
    page.open(workflow)
    page.run_workflow()
    page.until(
        "return app.graph._nodes.some(n => n.type === 'SaveVideo' && (n.images || n.previewMediaType || (n.widgets || []).length > 3))",
        240,
    )
    until = time.monotonic() + 240  # some pages show the node's player before the file is there
    while not list((running.base / "output" / "video").glob("ltx2*.mp4")):
        assert time.monotonic() < until, "no video was saved"
        time.sleep(0.5)
