"""Official ComfyUI workflows of LTX-2 with only their loaders swapped for this pack's. Standard library only.

A workflow file holds one graph and, under ``definitions``, those of its subgraphs. Links are lists in the one and tables in the others.
"""

import copy


class WorkflowError(ValueError):
    """The file is no workflow, or holds no loader that can be swapped."""

    __module__ = "ltx2_gguf"  # shown before the name of the error


MODEL, TEXT, AUDIO = "LTX2GGUFLoader", "LTX2GGUFTextEncoder", "LTX2GGUFAudioVAE"
# stock loader -> (this pack's, title, outputs (name, type), stock output slot -> slot here)
SWAPS = {
    "CheckpointLoaderSimple": (MODEL, "LTX-2 GGUF Loader", (("model", "MODEL"), ("vae", "VAE")), {0: 0, 2: 1}),
    "LTXAVTextEncoderLoader": (TEXT, "LTX-2 Gemma Text Encoder (GGUF)", (("clip", "CLIP"),), {0: 0}),
    "LTXVAudioVAELoader": (AUDIO, "LTX-2 Audio VAE Loader", (("audio vae", "VAE"),), {0: 0}),
}
_FIELDS = (
    "id",
    "origin_id",
    "origin_slot",
    "target_id",
    "target_slot",
    "type",
)  # of a link, in the order of its list form


def swap_loaders(workflow: dict, model_file: str, gemma_file: str, audio_vae_file: str = "auto") -> tuple[dict, int]:
    """(a copy of the workflow with its loaders swapped, how many). The names are what the new loaders' file inputs say. Raises WorkflowError."""
    if not isinstance(workflow, dict) or not isinstance(workflow.get("nodes"), list):
        raise WorkflowError("This is no ComfyUI workflow in the form that the page saves ('Save', not 'Export (API)').")
    widgets = {
        MODEL: [model_file, "exact", "auto", "auto", "on"], TEXT: [gemma_file, "auto", "default", "on"], AUDIO: [audio_vae_file],
    }  # fmt: skip
    workflow = copy.deepcopy(workflow)
    graphs = [workflow, *workflow.get("definitions", {}).get("subgraphs", [])]
    count = sum(_swap_in(graph, widgets) for graph in graphs)
    if not count:
        raise WorkflowError(f"The workflow holds none of the loaders that can be swapped ({', '.join(SWAPS)}).")
    return workflow, count


def _swap_in(graph, widgets):
    """Swap the loaders of one graph; returns how many."""
    swapped = {}
    for node in graph["nodes"]:
        if node.get("type") in SWAPS:
            swapped[node["id"]] = SWAPS[node["type"]][3]
            _replace(node, widgets)
    links, gone = [], set()
    for link in graph.get("links", []):
        table = dict(zip(_FIELDS, link)) if isinstance(link, list) else link
        slots = swapped.get(table["origin_id"])
        if table["target_id"] in swapped or (slots is not None and table["origin_slot"] not in slots):
            gone.add(
                table["id"]
            )  # into a file input that is no more, or out of an output that this pack's loader lacks
            continue
        if slots is not None:
            table["origin_slot"] = slots[table["origin_slot"]]
        links.append([table[field] for field in _FIELDS] if isinstance(link, list) else table)
    if "links" in graph:
        graph["links"] = links
    for node in graph["nodes"]:
        for output in node.get("outputs") or ():
            if output.get("links"):
                output["links"] = [number for number in output["links"] if number not in gone]
        for given in node.get("inputs") or ():
            if given.get("link") in gone:
                given["link"] = None
    for given in graph.get("inputs") or ():  # of a subgraph
        if isinstance(given, dict) and given.get("linkIds"):
            given["linkIds"] = [number for number in given["linkIds"] if number not in gone]
    return len(swapped)


def _replace(node, widgets):
    kind, title, outputs, slots = SWAPS[node["type"]]
    before = node.get("outputs") or []
    links = {here: before[there].get("links") or [] for there, here in slots.items() if there < len(before)}
    node["outputs"] = [
        {"name": name, "type": type, "links": links.get(slot, [])} for slot, (name, type) in enumerate(outputs)
    ]
    node["inputs"], node["widgets_values"] = [], list(widgets[kind])
    node["properties"] = {"Node name for S&R": kind}
    node["type"] = kind
    node.pop("title", None)
