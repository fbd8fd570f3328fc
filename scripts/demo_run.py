"""The part of the demo that runs inside its environment: models in place, server up, shipped workflows run, videos checked.

Started by ``demo.py``.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import demo
import environment
from comfy_server import PromptFailed, Server, copy_input, prepare, read_video
from workflow_api import to_prompt

ROOT = environment.ROOT
FOLDERS = {
    "dit": "diffusion_models",
    "gemma": "text_encoders",
    "projection": "text_encoders",
    "connector": "text_encoders",
    "vae": "vae",
    "lora": "loras",
}
RUNS = (("text to video", "ltx2.3_t2v.json"), ("image to video", "ltx2.3_i2v.json"))
SMALL = {"width": 128, "height": 128, "frames": 25}
TOY = ROOT / "assets" / "toy-ltx2.3-Q8_0.gguf"
TOY_SAMPLING = {
    "steps": 20,
    "cfg": 2.0,
    "guidance": "custom",
    "stg_scale": 0.0,
    "rescale": 0.7,
}  # chosen on prompts of its own: docs/developer/toy-model.md


def load_pack():
    """Import the pack by its path, whatever its folder is called."""
    spec = importlib.util.spec_from_file_location(
        "ltx2_gguf", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["ltx2_gguf"] = module
    spec.loader.exec_module(module)


def cli(*args):
    subprocess.run([sys.executable, "-m", f"{ROOT.name}.ltx2_core.cli", *map(str, args)], cwd=ROOT.parent, check=True)


def small_model(args):
    """(path, settings) of the model that needs no download: the trained one of the pack, or a random one of the real structure."""
    gemma = os.environ["GEMMA_GGUF"]
    if TOY.is_file() and not args.synthetic:
        prompt = args.prompt or "a red circle moves to the right on a dark background"
        motion = "a yellow star moves to the left on a dark background"
        return TOY, {**SMALL, **TOY_SAMPLING, "crf": 0, "prompts": (prompt, args.prompt or motion), "negative": ""}
    path = environment.home() / "synthetic-Q8_0.gguf"
    if not path.is_file():
        cli("make-synthetic", path, "--type", "q8_0", "--gemma", gemma)
    prompt = args.prompt or "a lighthouse in a storm"
    return path, {**SMALL, "frames": 17, "steps": 4, "prompts": (prompt, prompt)}


def user_models(folder):
    """(model-folder, path) of every usable weight file below `folder`, by content; says what it skips and why."""
    from ltx2_gguf.ltx2_core.files.weights import WeightFileError, open_weights
    from ltx2_gguf.ltx2_core.loading.identify import identify

    found, kinds = [], set()
    for path in sorted(p for p in Path(folder).rglob("*") if p.suffix in (".gguf", ".safetensors")):
        try:
            with contextlib.closing(open_weights(path)) as file:
                report = identify(file)
        except WeightFileError as error:
            print(f"  skipped: {error}")
            continue
        if not report:
            print(f"  skipped: {report.refusal}")
            continue
        kind = "dit" if report.kind == "checkpoint" else report.kind
        found.append((FOLDERS[kind], path))
        kinds |= {kind, *report.parts}
        print(f"  {path.name}: {report.title}")
    missing = [name for name in ("dit", "gemma", "projection", "vae") if name not in kinds]
    if missing:
        raise SystemExit(
            f"{folder} lacks: {', '.join(missing)} (found: {', '.join(sorted(kinds)) or 'nothing usable'}). See 'Which files' in the README."
        )
    return found


def fill_in(prompt, names, settings, image, seed, text, clip):
    """Put file names, sizes, seed and texts into the API form of a shipped workflow."""
    positive = None
    for node in prompt.values():
        kind, inputs = node["class_type"], node["inputs"]
        if kind == "LTX2GGUFLoader":
            inputs["model_file"] = names["model"]
        elif kind == "LTX2GGUFTextEncoder":
            inputs["gemma_file"] = names["gemma"]
        elif kind == "EmptyLTXVLatentVideo" and "width" in settings:
            inputs.update(width=settings["width"], height=settings["height"], length=settings["frames"])
        elif kind == "LTX2GGUFSampler":
            inputs["seed"] = seed
            inputs.update(
                {
                    name: settings[name]
                    for name in ("steps", "cfg", "guidance", "stg_scale", "rescale")
                    if name in settings
                }
            )
            positive = positive or inputs["positive"][0]
        elif kind == "LoadImage":
            inputs["image"] = image
        elif kind == "LTX2GGUFImageCondition" and "crf" in settings:
            inputs["crf"] = settings["crf"]
        elif kind == "SaveVideo":
            inputs["filename_prefix"] = f"video/{clip}"
    texts = text_nodes(prompt, positive)
    if text is not None:
        prompt[texts[0]]["inputs"]["text"] = text
    if "negative" in settings and len(texts) > 1:
        prompt[texts[1]]["inputs"]["text"] = settings["negative"]
    return prompt


def text_nodes(prompt, node_id):
    """Ids of the prompt nodes behind a conditioning node, however many others lie between: positive first, negative second."""
    inputs = prompt[node_id]["inputs"]
    if prompt[node_id]["class_type"] == "CLIPTextEncode":
        return [node_id]
    positive, negative = (
        text_nodes(prompt, inputs[name][0]) if name in inputs else [] for name in ("positive", "negative")
    )
    return positive[:1] + negative[-1:]


def expected(prompt):
    """(width, height, frames, fps) that the filled-in prompt asks for."""
    size = next(n["inputs"] for n in prompt.values() if n["class_type"] == "EmptyLTXVLatentVideo")
    fps = next(n["inputs"]["fps"] for n in prompt.values() if n["class_type"] == "CreateVideo")
    return size["width"], size["height"], size["length"], float(fps)


def example_image(args, names):
    if args.image:
        return Path(args.image)
    toy_image = ROOT / "assets" / "toy-first-frame.png"
    return toy_image if names["model"] == TOY.name and toy_image.is_file() else ROOT / "assets" / "coffee.jpg"


def main(argv):
    args = demo.parse(argv)
    load_pack()
    base = environment.home() / "base"
    shutil.rmtree(base / "models", ignore_errors=True)  # links of an earlier run with other models
    if args.models:
        print(f"Looking at the files in {args.models}:")
        files = user_models(args.models)
        settings = {"prompts": (args.prompt, args.prompt)}
    else:
        model, settings = small_model(args)
        files = [("diffusion_models", model), ("text_encoders", os.environ["GEMMA_GGUF"])]
    prepare(base, files)
    names = {
        "model": next(Path(p).name for folder, p in files if folder == "diffusion_models"),
        "gemma": next(Path(p).name for folder, p in files if folder == "text_encoders" and "gemma" in kind_of(p)),
    }
    image = copy_input(base, example_image(args, names))
    arguments = [] if args.gpu or (args.models and has_gpu()) else ["--cpu"]
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    with Server(base, os.environ["COMFYUI_PATH"], arguments) as server:
        info = server.object_info()
        for (title, workflow), text in zip(RUNS, settings["prompts"]):
            clip = Path(workflow).stem
            prompt = to_prompt(json.loads((ROOT / "workflows" / workflow).read_text(encoding="utf-8")), info)
            prompt = fill_in(prompt, names, settings, image, args.seed, text, clip)
            entry = server.run(prompt, timeout=24 * 3600)
            video = server.output_files(entry)[-1]
            frames, fps = read_video(video)
            width, height, count, rate = expected(prompt)
            if frames.shape[:3] != (count, height, width) or abs(fps - rate) > 0.01:
                raise SystemExit(
                    f"{video}: found {frames.shape[2]}x{frames.shape[1]}, {len(frames)} frames at {fps} fps, expected {width}x{height}, {count} at {rate}."
                )
            target = output / f"{clip}.mp4"
            shutil.copyfile(video, target)
            print(f"{title}: {target}  ({width}x{height}, {count} frames, {fps:g} fps)")
        if args.keep_running:
            print(f"The server is at {server.url}; press Ctrl-C to stop it.", flush=True)
            try:
                server.process.wait()
            except KeyboardInterrupt:
                pass
    return 0


def kind_of(path):
    from ltx2_gguf.ltx2_core.files.weights import open_weights
    from ltx2_gguf.ltx2_core.loading.identify import identify

    with contextlib.closing(open_weights(path)) as file:
        return identify(file).kind


def has_gpu():
    import torch

    return torch.cuda.is_available() or torch.backends.mps.is_available()


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except PromptFailed as error:
        sys.exit(f"The workflow failed. {error}")
