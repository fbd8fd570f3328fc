"""Official workflow templates keep every link but those of the loaders' file inputs when their loaders are swapped."""

import importlib.util
import json
from pathlib import Path

import pytest

from ltx2_gguf.ltx2_core.cli.__main__ import main
from ltx2_gguf.ltx2_core.files.workflows import SWAPS, WorkflowError, swap_loaders

found = importlib.util.find_spec("comfyui_workflow_templates_json")
TEMPLATES = (
    sorted(p for p in (Path(found.origin).parent / "templates").glob("*ltx2*.json") if "2_5" not in p.name)
    if found
    else []
)


def graphs(workflow):
    return [workflow, *workflow.get("definitions", {}).get("subgraphs", [])]


def links(graph):
    for link in graph.get("links", []):
        yield (
            tuple(link[:5])
            if isinstance(link, list)
            else tuple(link[f] for f in ("id", "origin_id", "origin_slot", "target_id", "target_slot"))
        )


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_only_the_loaders_change(path):
    before = json.loads(path.read_text("utf-8"))
    after, count = swap_loaders(before, "model.gguf", "gemma.gguf")
    assert count >= 3
    for old, new in zip(graphs(before), graphs(after)):
        loaders = {node["id"]: node["type"] for node in old["nodes"] if node["type"] in SWAPS}
        same = [
            [(n["id"], n["type"], n.get("widgets_values")) for n in graph["nodes"] if n["id"] not in loaders]
            for graph in (old, new)
        ]
        assert same[0] == same[1]
        kept = {link[0]: link for link in links(new)}
        for link in links(old):
            number, origin, slot, target, place = link
            if target in loaders:
                assert number not in kept
            elif origin in loaders:
                assert kept[number] == (number, origin, SWAPS[loaders[origin]][3][slot], target, place)
            else:
                assert kept[number] == link
        for node in new["nodes"]:
            if node["id"] in loaders:
                for slot, output in enumerate(node["outputs"]):
                    assert all(kept[n][1:3] == (node["id"], slot) for n in output["links"])
                assert not node["inputs"] and ("on" in node["widgets_values"]) == (node["type"] != "LTX2GGUFAudioVAE")


def test_the_command(tmp_path, capsys):
    graph = {"nodes": [{"id": 1, "type": "LTXVAudioVAELoader", "outputs": [{"name": "Audio VAE", "links": [7]}], "widgets_values": ["x"]}, {"id": 2, "type": "Y"}],
             "links": [[7, 1, 0, 2, 0, "VAE"]]}  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(graph))
    arguments = [
        "swap-loaders",
        str(tmp_path / "a.json"),
        str(tmp_path / "b.json"),
        "--model",
        "m.gguf",
        "--text-encoder",
        "g.gguf",
    ]
    assert main(arguments) == 0 and "1 loaders swapped" in capsys.readouterr().out
    written = json.loads((tmp_path / "b.json").read_text())
    assert written["nodes"][0]["type"] == "LTX2GGUFAudioVAE" and written["links"] == graph["links"]
    with pytest.raises(WorkflowError, match="none of the loaders"):
        swap_loaders({"nodes": []}, "m", "g")
    with pytest.raises(WorkflowError, match="no ComfyUI workflow"):
        swap_loaders({"1": {"class_type": "X"}}, "m", "g")
