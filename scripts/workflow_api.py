"""A workflow as the page saves it, turned into the prompt the server runs: what the page does when Run is pressed.

Widget values are stored by position, so the order comes from the server's ``/object_info``: every input with a widget, plus one more value after
a seed (``control_after_generate``). Inputs that are connected keep their widget's position.
"""

WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
SKIPPED = {"Note", "MarkdownNote"}  # drawn by the page, unknown to the server


def widget_inputs(info):
    """Names of a node's inputs that have a widget, in order, as (name, specification)."""
    found = []
    for section in ("required", "optional"):
        for name, spec in info["input"].get(section, {}).items():
            kind, options = spec[0], spec[1] if len(spec) > 1 else {}
            is_widget = isinstance(kind, list) or kind in WIDGET_TYPES or kind.startswith("COMFY_DYNAMICCOMBO")
            if is_widget and not options.get("forceInput"):
                found.append((name, options))
    return found


def to_prompt(workflow, object_info):
    """The API prompt ``{id: {class_type, inputs}}`` of a saved workflow. Raises KeyError for a node the server does not know."""
    links = {link[0]: (str(link[1]), link[2]) for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in SKIPPED or node.get("mode", 0) in (2, 4):
            continue
        info = object_info[node["type"]]
        inputs = {}
        values = list(node.get("widgets_values", []))
        for name, options in widget_inputs(info):
            if not values:
                break
            inputs[name] = values.pop(0)
            if options.get("control_after_generate"):
                values.pop(0)
            if options.get("image_upload") and values:
                values.pop(0)
        if values:
            raise ValueError(
                f"Node {node['id']} ({node['type']}) stores {len(values)} more widget values than the server has widgets."
            )
        for socket in node.get("inputs", []):
            if socket.get("link") is not None:
                inputs[socket["name"]] = list(links[socket["link"]])
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt
