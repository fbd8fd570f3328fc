"""What the shipped demo model generates is what its prompts ask for, in every format, headless and in the real host.

The prompts are held out from training (``tools/toy/captions.py``); clips are measured by ``tools/toy/vision.py``, whose own errors
test_toy_data.py bounds. docs/developer/toy-model.md has the scores.
"""

import contextlib
import json

import numpy as np
import pytest
import torch

import comfy_server as server_tools
import demo_run
import toytools
import workflow_api
from toy import evaluate, vision

CHANCE = {"colour": 0.25, "shape": 0.35, "motion": 0.2}  # one in eight, in five and in thirteen, with room for the draw
PROMPT = "A red circle moves to the right on a black background."
IMAGES = 24
PROMPTS = 32


@pytest.fixture(scope="module")
def exam():
    """A part of the prompts that the model is examined with, spread over all of them; the whole exam is tools/toy/evaluate.py."""
    whole = evaluate.exam()[0]
    return whole[:: len(whole.prompts) // PROMPTS][:PROMPTS]


@pytest.fixture(scope="module")
def clips(exam, gemma_gguf, tmp_path_factory):
    """Format -> clips of the held-out prompts, generated once."""
    made = {}

    def of(kind):
        if kind not in made:
            path = toytools.MODEL
            if kind != "Q8_0":
                path = tmp_path_factory.mktemp("toy") / f"toy-{kind}.gguf"
                evaluate.convert.convert([toytools.MODEL], path, kind.lower())
            made[kind] = evaluate.Model(path, gemma_gguf).clips(exam.prompts)
        return made[kind]

    return of


def test_the_demo_model_is_small_enough_to_ship_and_describes_itself():
    from ltx2_gguf.ltx2_core.files.weights import open_weights
    from ltx2_gguf.ltx2_core.loading.identify import identify

    assert toytools.MODEL.stat().st_size <= 20e6
    with contextlib.closing(open_weights(toytools.MODEL)) as file:
        report = identify(file)
        config = json.loads(file.metadata["config"])
    assert report.version == "2.3" and report.kind == "checkpoint"
    assert config["transformer"]["num_layers"] == 6 and config["transformer"]["num_attention_heads"] == 4
    assert config["vae"]["encoder_base_channels"] == 32 and config["scheduler"]


def test_the_demo_samples_as_the_model_was_examined():
    assert demo_run.TOY_SAMPLING == {
        "steps": evaluate.STEPS,
        "cfg": evaluate.CFG,
        "guidance": "custom",
        "stg_scale": 0.0,
        "rescale": evaluate.RESCALE,
    }


@pytest.mark.slow
def test_the_batched_loop_makes_the_frames_of_the_pipeline(gemma_gguf):
    batched = evaluate.Model(toytools.MODEL, gemma_gguf).clips([PROMPT, "A white star grows."], seed=42, steps=4)[0]
    frames = headless(gemma_gguf, seed=42, steps=4)
    assert np.abs(batched.astype(int) - frames).max() <= 1


@pytest.mark.slow
def test_clips_show_the_colour_motion_and_shape_of_held_out_prompts(exam, clips):
    scores = vision.score(clips("Q8_0"), exam.wanted)
    assert scores["colour"] >= 0.95 and scores["motion"] >= 0.9 and scores["shape"] >= 0.8, scores


@pytest.mark.slow
def test_against_other_prompts_the_scores_fall_to_chance(exam, clips):
    scores = vision.score(clips("Q8_0"), evaluate.shuffled(exam.wanted))
    assert all(scores[key] <= CHANCE[key] for key in CHANCE), scores


@pytest.mark.slow
def test_without_the_prompt_the_clips_know_nothing_of_it(exam, gemma_gguf):
    asked = exam
    # Guidance between two empty prompts is the empty prompt's own prediction, so cfg 1 gives the same clips in half the time.
    made = evaluate.Model(toytools.MODEL, gemma_gguf).clips([""] * PROMPTS, cfg=1.0)
    scores = vision.score(made, asked.wanted)
    assert all(scores[key] <= CHANCE[key] for key in CHANCE), scores
    assert sum(len(vision.measure(clip)) > 0 for clip in made) >= 0.9 * PROMPTS  # things all the same, not empty clips


@pytest.mark.slow
def test_a_format_of_half_the_size_loses_few_points(exam, clips):
    before, after = (vision.score(clips(kind), exam.wanted) for kind in ("Q8_0", "Q4_0"))
    assert all(after[key] >= before[key] - 3 / PROMPTS - 1e-9 for key in before), (before, after)


@pytest.mark.slow
def test_a_first_frame_is_kept_and_moves_as_the_prompt_says(exam, gemma_gguf):
    asked = exam[:IMAGES]
    made = evaluate.Model(toytools.MODEL, gemma_gguf).clips(asked.prompts, images=asked.truth[:, 0])
    assert np.mean([vision.psnr(clip[0], truth[0]) for clip, truth in zip(made, asked.truth)]) >= 30
    assert vision.score(made, asked.wanted)["motion"] >= 0.85


@pytest.mark.slow
@pytest.mark.parametrize(
    "workflow, prompt",
    [("ltx2.3_t2v", PROMPT), ("ltx2.3_i2v", "A yellow star moves to the left on a black background.")],
)
def test_the_shipped_workflow_in_the_host_makes_the_headless_frames(running, gemma_gguf, workflow, prompt):
    saved = json.loads((toytools.ROOT / "workflows" / f"{workflow}.json").read_text(encoding="utf-8"))
    graph = workflow_api.to_prompt(saved, running.object_info())
    names = {"model": toytools.MODEL.name, "gemma": gemma_gguf.name}
    settings = {**demo_run.SMALL, **demo_run.TOY_SAMPLING, "crf": 0, "negative": ""}
    graph = demo_run.fill_in(graph, names, settings, toytools.FIRST_FRAME.name, 42, prompt, "toy")
    (decode,) = [number for number, node in graph.items() if node["class_type"] == "LTX2GGUFDecode"]
    for number in [number for number, node in graph.items() if node["class_type"] in ("SaveVideo", "CreateVideo")]:
        del graph[number]
    graph["900"] = {
        "class_type": "SaveImage",
        "inputs": {"images": [decode, 0], "filename_prefix": workflow},
    }  # lossless, unlike a video
    paths = sorted(running.output_files(running.run(graph, timeout=600)))
    hosted = np.stack([picture(path) for path in paths])
    images = [toytools.FIRST_FRAME] if workflow.endswith("i2v") else []
    frames = headless(gemma_gguf, seed=42, prompt=prompt, images=images)
    assert hosted.shape == frames.shape == (25, 128, 128, 3)
    assert np.abs(hosted.astype(int) - frames).max() <= 1
    expected = ("star", "yellow", "left") if images else ("circle", "red", "right")
    assert vision.score([hosted], [[expected]]) == {"colour": 1, "shape": 1, "motion": 1}


@pytest.fixture(scope="module")
def running(host, gemma_gguf, tmp_path_factory):
    """The host's server with the demo model, the small Gemma and the first frame in its folders."""
    base = server_tools.prepare(
        tmp_path_factory.mktemp("host"), [("diffusion_models", toytools.MODEL), ("text_encoders", gemma_gguf)]
    )
    server_tools.copy_input(base, toytools.FIRST_FRAME)
    with server_tools.Server(base) as server:
        yield server


def picture(path):
    from PIL import Image

    return np.asarray(Image.open(path).convert("RGB"))


def headless(gemma, seed, steps=evaluate.STEPS, prompt=PROMPT, images=()):
    """uint8-valued frames [25, 128, 128, 3] of the pipeline, rounded down as the host rounds pictures it saves."""
    from ltx2_gguf.ltx2_core.pipeline import ImageInput, LTX2Pipeline

    pipeline = LTX2Pipeline.from_files(toytools.MODEL, gemma)
    frames = pipeline.generate(
        prompt, negative_prompt="", width=128, height=128, frames=25, steps=steps, cfg=evaluate.CFG, stg=0.0, rescale=evaluate.RESCALE, seed=seed,
        image_crf=0, images=[ImageInput(str(path)) for path in images],
    )  # fmt: skip
    return (frames * 255).to(torch.uint8).numpy().astype(int)
