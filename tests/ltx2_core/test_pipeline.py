import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

import wild_files
from ltx2_gguf.ltx2_core import pipeline
from ltx2_gguf.ltx2_core.convert import synthetic
from ltx2_gguf.ltx2_core.files import structure
from ltx2_gguf.ltx2_core.offload import streamer
from ltx2_gguf.ltx2_core.offload.streamer import MemoryBudgetError
from ltx2_gguf.ltx2_core.pipeline import ImageInput, LTX2Pipeline
from ltx2_gguf.ltx2_core.sampling import conditioning, guidance
from ltx2_gguf.ltx2_core.sampling.finite import NotFiniteError

SIZE = {"width": 64, "height": 64, "frames": 9}
QUICK = {**SIZE, "steps": 2, "cfg": 1.0, "stg": 0.0}
PROMPT = "a red kite"


def geometry(version="2.3"):
    return wild_files.geometry(version, num_layers=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    wild_files.gemma_gguf(folder / "gemma.gguf")
    for version in ("2.3", "2.0"):
        synthetic.make(folder / f"model-{version}.gguf", geometry(version), type="q8_0")
    return folder


def make(folder, version="2.3", **options):
    return LTX2Pipeline.from_files(folder / f"model-{version}.gguf", folder / "gemma.gguf", **options)


@pytest.fixture(scope="module")
def pipe(folder):
    return make(folder)


@pytest.fixture(scope="module")
def frames(pipe):
    return pipe.generate(PROMPT, **QUICK)


@pytest.fixture(scope="module")
def picture():
    y, x = np.mgrid[0:80, 0:96]
    return np.stack([x * 2, y * 3, (x + y) % 256], -1).astype(np.uint8)


def count_calls(pipe, monkeypatch):
    """Record the arguments of every call of the network."""
    calls, original = [], pipe.dit.velocity

    def velocity(x, sigma, context, **kwargs):
        calls.append({"sigma": sigma, "context": context, **kwargs})
        return original(x, sigma, context, **kwargs)

    monkeypatch.setattr(pipe.dit, "velocity", velocity)
    return calls


def test_a_prompt_becomes_frames(frames):
    assert frames.shape == (9, 64, 64, 3) and frames.dtype == torch.float32 and frames.device.type == "cpu"
    assert frames.min() >= 0 and frames.max() <= 1 and frames.std() > 0.02


def test_the_same_seed_gives_the_same_frames_and_another_seed_prompt_or_frame_rate_gives_others(pipe, frames):
    assert torch.equal(pipe.generate(PROMPT, **QUICK), frames)
    for other in (
        pipe.generate(PROMPT, **QUICK, seed=11),
        pipe.generate("snow at night", **QUICK),
        pipe.generate(PROMPT, **QUICK, fps=8),
    ):
        assert (other - frames).abs().mean() > 1e-4


def test_frames_are_handed_on_in_pieces_that_make_up_the_whole(pipe, frames):
    pieces = list(pipe.stream(PROMPT, **QUICK))
    assert torch.equal(torch.cat(pieces), frames)


def test_version_2_0_runs_by_the_same_page(folder):
    frames = make(folder, "2.0").generate(PROMPT, **QUICK)
    assert frames.shape == (9, 64, 64, 3) and frames.std() > 0.02


def test_parts_in_files_of_their_own_give_the_same_frames(folder, tmp_path):
    g = geometry()
    full = structure.checkpoint_shapes(g)

    def save(name, keep, strip=""):
        tensors = {n.removeprefix(strip): synthetic.tensor(n, s) for n, s in full.items() if keep(n)}
        synthetic.save_safetensors(tmp_path / name, tensors, synthetic.metadata(g))
        return tmp_path / name

    connector = save("connector.safetensors", lambda n: "embeddings_connector" in n)
    projection = save("projection.safetensors", lambda n: n.startswith("text_embedding_projection"))
    vae = save("vae.safetensors", lambda n: n.startswith("vae."), "vae.")
    dit = save("dit.safetensors", lambda n: n.startswith(structure.DIT_PREFIX) and "embeddings_connector" not in n)
    whole = save("whole.safetensors", lambda n: True)
    apart = LTX2Pipeline.from_files(dit, folder / "gemma.gguf", projection, connector, vae).generate(PROMPT, **QUICK)
    together = LTX2Pipeline.from_files(whole, folder / "gemma.gguf").generate(PROMPT, **QUICK)
    assert (
        apart - together
    ).abs().max() < 1e-5  # tensors lie at other addresses in the map, by which products may round


# -- guidance ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, passes",
    [({"cfg": 1.0, "stg": 0.0}, 1), ({"cfg": 3.0, "stg": 0.0}, 2), ({"cfg": 1.0, "stg": 1.0}, 2), ({}, 3)],
)
def test_each_kind_of_guidance_costs_one_pass(pipe, monkeypatch, settings, passes):
    calls = count_calls(pipe, monkeypatch)
    pipe.sample(PROMPT, pipe.settings(**SIZE, steps=2, **settings))
    assert len(calls) == 2 * passes


def test_the_perturbed_pass_has_the_positive_prompt_and_the_blocks_at_the_official_depth(pipe, monkeypatch):
    calls = count_calls(pipe, monkeypatch)
    pipe.sample(PROMPT, pipe.settings(**SIZE, steps=1))
    positive, negative, perturbed = calls
    assert perturbed["stg_blocks"] == guidance.stg_blocks_for(28, 4) == (2,)
    assert torch.equal(perturbed["context"], positive["context"]) and not torch.equal(
        negative["context"], positive["context"]
    )
    assert "stg_blocks" not in positive and "stg_blocks" not in negative


def test_the_negative_prompt_is_used_and_has_a_default(pipe):
    settings = {**SIZE, "steps": 2, "stg": 0.0, "cfg": 4.0}
    default = pipe.generate(PROMPT, **settings)
    assert torch.equal(
        pipe.generate(PROMPT, negative_prompt=guidance.NEGATIVE_PROMPTS[pipe.dit.config.version], **settings), default
    )
    assert not torch.equal(pipe.generate(PROMPT, negative_prompt="", **settings), default)


def test_presets_fill_what_is_not_given(folder, pipe):
    run = pipe.settings()
    assert (run.width, run.height, run.frames, run.fps, run.seed, run.image_crf) == (768, 512, 121, 24.0, 10, 33)
    assert len(run.sigmas) == 31 and run.sampler == "euler" and run.guidance == guidance.Guidance(3.0, 1.0, 0.7, (2,))
    assert len(make(folder, "2.0").settings().sigmas) == 41
    distilled = make(folder, preset="distilled").settings(**SIZE)
    assert len(distilled.sigmas) == 9 and distilled.guidance.passes == 1
    hq = make(folder, preset="2.3 HQ").settings()
    assert (hq.sampler, len(hq.sigmas), hq.width, hq.height, hq.guidance.rescale) == ("res_2s", 16, 1920, 1088, 0.45)


def test_distilled_weights_never_encode_a_negative_prompt(folder):
    pipe = make(folder, preset="distilled")
    pipe.sample(PROMPT, pipe.settings(**SIZE))
    assert list(pipe._contexts) == [PROMPT]


def test_stg_can_be_asked_for_where_the_preset_has_none(folder):
    run = make(folder, preset="distilled").settings(**SIZE, stg=1.0)
    assert run.guidance.needs_perturbed and run.guidance.stg_blocks == (2,)


@pytest.mark.parametrize("schedule, count", [("distilled", 8), ("linear quadratic", 3), ("1, 0.5, 0.2, 0", 3)])
def test_schedules_by_name_or_as_numbers(pipe, schedule, count):
    assert len(pipe.settings(**SIZE, steps=3, schedule=schedule).sigmas) == count + 1


def test_res_2s_runs_two_predictions_per_step_and_one_at_the_end(pipe, monkeypatch):
    calls = count_calls(pipe, monkeypatch)
    pipe.sample(PROMPT, pipe.settings(**QUICK, sampler="res_2s"))
    assert len(calls) == 2 * 2 + 1


# -- images -----------------------------------------------------------------------------------------------------------------------------


def test_an_image_for_the_first_frame_stays_exactly_the_encoded_image(pipe, picture):
    run = pipe.settings(**QUICK, image_crf=0)
    latent = pipe.sample(PROMPT, run, images=[ImageInput(picture)])
    given = pipe.condition(run, [ImageInput(picture)]).clean
    assert torch.equal(latent[:, :, 0], given[:, :, 0]) and latent.shape == (1, 128, 2, 2, 2)
    assert not torch.equal(latent[:, :, 1], given[:, :, 1])


def test_an_image_for_another_frame_is_a_guide_that_changes_the_video_and_is_cropped(pipe, picture, monkeypatch):
    run = pipe.settings(**QUICK)
    without = pipe.sample(PROMPT, run)
    calls = count_calls(pipe, monkeypatch)
    latent = pipe.sample(PROMPT, run, images=[ImageInput(picture, -1, 0.8)])
    assert latent.shape == without.shape and not torch.equal(latent, without)
    call = calls[0]
    assert call["keyframe_idxs"].shape == (1, 3, 4, 2) and not call["keyframe_idxs"].is_floating_point()
    assert call["keyframe_idxs"][0, 0].unique().tolist() == [8, 9]
    assert call["denoise_mask"][0, 0, :, 0, 0].tolist() == pytest.approx([1, 1, 0.2])


def test_a_partly_given_frame_lies_between_the_image_and_free_generation(pipe, picture):
    run = pipe.settings(**QUICK, image_crf=0)
    given = pipe.condition(run, [ImageInput(picture)]).clean[:, :, 0]
    distance = [
        (pipe.sample(PROMPT, run, images=[ImageInput(picture, 0, s)])[:, :, 0] - given).norm().item()
        for s in (1.0, 0.6, 0.0)
    ]
    assert distance[0] == 0 and 0 < distance[1] < distance[2]


def test_compression_before_encoding_changes_the_latent_a_little(pipe, picture):
    def encode(crf):
        return pipe.condition(pipe.settings(**QUICK, image_crf=crf), [ImageInput(picture)]).clean[:, :, 0]

    assert 0 < (encode(33) - encode(0)).norm() < 0.5 * encode(0).norm()


def test_an_image_may_be_a_path(pipe, picture, tmp_path):
    from PIL import Image

    Image.fromarray(picture).save(tmp_path / "p.png")
    run = pipe.settings(**QUICK)
    by_path, by_array = (pipe.condition(run, [ImageInput(source)]).clean for source in (tmp_path / "p.png", picture))
    assert torch.equal(by_path, by_array)


# -- memory -----------------------------------------------------------------------------------------------------------------------------


def test_a_memory_budget_streams_the_blocks_and_changes_nothing(folder, pipe, caplog):
    roomy = make(folder, memory_budget=8)
    expected = roomy.sample(PROMPT, roomy.settings(**QUICK))
    block = sum(streamer.Bundle(b).nbytes for b in roomy.dit.transformer_blocks) // 4
    budget = roomy.memory.peak - block  # one block less than all of them
    tight = make(folder, memory_budget=budget / 2**30)
    with caplog.at_level("INFO"):
        assert torch.equal(tight.sample(PROMPT, tight.settings(**QUICK)), expected)
    assert "1 of 4 blocks stay on cpu" in caplog.text and "pass through 2 buffers" in caplog.text
    assert 0 < tight.memory.peak <= budget and tight.memory.used == 0
    assert tight.dit.streamer is None
    assert torch.equal(expected, pipe.sample(PROMPT, pipe.settings(**QUICK)))


def test_the_whole_way_stays_within_a_budget(folder, frames):
    small = make(folder, memory_budget=0.3)  # decoding alone keeps 0.2 GB for libraries' scratch
    assert torch.equal(small.generate(PROMPT, **QUICK), frames)
    assert small.memory.peak <= 0.3 * 2**30 and small.memory.used == 0


def test_a_budget_that_nothing_fits_says_what_would(folder):
    pipe = make(folder, memory_budget=0.001)
    with pytest.raises(MemoryBudgetError, match="raise it"):
        pipe.generate(PROMPT, **QUICK)
    assert pipe.memory.used == 0


def test_the_text_encoder_is_gone_before_the_transformer_runs(folder, monkeypatch):
    pipe, alive = make(folder), []
    original = pipeline.load_text_encoder

    def load(*args, **kwargs):
        encoder = original(*args, **kwargs)
        alive.append(weakref.ref(encoder.gemma))
        return encoder

    monkeypatch.setattr(pipeline, "load_text_encoder", load)
    calls, velocity = [], pipe.dit.velocity

    def checked(*args, **kwargs):
        gc.collect()
        calls.append([reference() is None for reference in alive])
        return velocity(*args, **kwargs)

    monkeypatch.setattr(pipe.dit, "velocity", checked)
    pipe.sample(PROMPT, pipe.settings(**QUICK))
    assert calls[0] == [True]


def test_prompts_are_encoded_once(folder, monkeypatch):
    pipe, loads = make(folder), []
    original = pipeline.load_text_encoder
    monkeypatch.setattr(pipeline, "load_text_encoder", lambda *a, **k: loads.append(1) or original(*a, **k))
    first = pipe.encode_prompts([PROMPT, "other", PROMPT])
    second = pipe.encode_prompts(["other", PROMPT])
    assert (
        loads == [1]
        and torch.equal(first[0], first[2])
        and torch.equal(first[1], second[0])
        and torch.equal(first[0], second[1])
    )


def test_only_the_last_prompts_are_remembered(folder, monkeypatch):
    pipe = make(folder)
    monkeypatch.setattr(pipeline, "CONTEXTS_KEPT", 3)
    first = pipe.encode_prompts(["a", "b", "c"])
    pipe.encode_prompts(["a", "d"])
    assert list(pipe._contexts) == ["c", "a", "d"]
    found = pipe.encode_prompts(["a", "b", "c", "e"])  # more than are kept: all of one call
    assert list(pipe._contexts) == ["a", "b", "c", "e"] and all(map(torch.equal, found, first))


# -- progress, errors ---------------------------------------------------------------------------------------------------------------------


def test_progress_names_the_stages_in_order_and_counts_each_to_its_end(folder, picture):
    seen = []
    make(folder).generate(PROMPT, **QUICK, images=[ImageInput(picture)], progress=lambda *step: seen.append(step))
    assert list(dict.fromkeys(stage for stage, _, _ in seen)) == ["text", "image", "sample", "decode"]
    last = {stage: (done, total) for stage, done, total in seen}
    assert last == {"text": (1, 1), "image": (1, 1), "sample": (2, 2), "decode": (9, 9)}


@pytest.mark.parametrize("stop", ["text", "sample", "decode"])
def test_raising_from_progress_stops_and_gives_everything_back(folder, frames, stop):
    pipe = make(folder, memory_budget=0.3)

    def cancel(stage, done, total):
        if stage == stop:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        pipe.generate(PROMPT, **QUICK, progress=cancel)
    gc.collect()
    assert pipe.memory.used == 0
    assert torch.equal(pipe.generate(PROMPT, **QUICK), frames)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"width": 60}, "multiples of 32"),
        ({"frames": 10}, "8k.1"),
        ({"schedule": "karras"}, "Unknown schedule 'karras'"),
        ({"sampler": "heun"}, "Unknown sampler 'heun'; choose one of euler, res_2s"),
        ({"fps": -1}, "above 0"),
        ({"fps": 0}, "above 0"),
        ({"steps": 0}, "at least one"),
        ({"frames": 0}, "8k.1"),
        ({"width": 0}, "multiples of 32"),
        ({"image_crf": 60}, "between 0 .* and 51"),
        ({"stg_blocks": (4,)}, "blocks 0 to 3; stg_blocks names 4"),
    ],
)
def test_wrong_settings_are_named_before_anything_is_loaded(pipe, settings, words):
    with pytest.raises(ValueError, match=words):
        pipe.settings(**{**SIZE, **settings})


def test_an_empty_prompt_is_taken_and_noticed(pipe, frames, caplog):
    assert pipe.generate(" ", **QUICK).shape == frames.shape
    assert "The prompt is empty" in caplog.text


def test_an_unknown_preset_is_refused(folder):
    with pytest.raises(ValueError, match="Unknown preset 'turbo'; choose one of 2.0, 2.3, 2.3 HQ, distilled"):
        make(folder, preset="turbo")


def test_the_settings_can_be_steered_by_tokens(pipe):
    few, many = (
        pipe.settings(width=64 * n, height=64 * n, frames=9, schedule="ltx2 (tokens)", steps=8).sigmas for n in (1, 24)
    )
    assert many[4] > few[4]
    assert torch.equal(
        pipe.settings(**SIZE, steps=8).sigmas, pipe.settings(width=640, height=640, frames=9, steps=8).sigmas
    )


def test_the_pipeline_page_stays_readable():
    assert len(Path(pipeline.__file__).read_text("utf-8").splitlines()) < 500
    assert conditioning.latent_shape(64, 64, 9) == (2, 2, 2)


# -- not a number -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "where, words",
    [("weight", r"transformer_blocks\.2\.ff\.net\.0\.proj\.(weight|bias)"), ("output", r"transformer_blocks\.1")],
)
def test_not_a_number_stops_after_the_first_step_and_names_the_layer(folder, monkeypatch, where, words):
    pipe = make(folder)
    with torch.inference_mode():
        if where == "weight":
            pipe.dit.transformer_blocks[2].ff.net[0].proj.bias[3] = float("nan")
        else:
            pipe.dit.transformer_blocks[1].attn1.register_forward_hook(
                lambda module, inputs, output: output * float("inf")
            )
    steps = []
    with pytest.raises(NotFiniteError, match=words) as caught:
        pipe.generate(PROMPT, **QUICK, progress=lambda stage, done, total: steps.append((stage, done)))
    assert "The latent after step 1" in str(caught.value) and ("sample", 1) not in steps and pipe.memory.used == 0


def test_a_damaged_vae_is_told_instead_of_a_black_video(folder, monkeypatch):
    pipe, load = make(folder), pipeline.load_vae

    def damaged(*args, **kwargs):
        vae = load(*args, **kwargs)
        with torch.inference_mode():
            vae.decoder.conv_in.conv.bias = torch.nn.Parameter(
                torch.full_like(vae.decoder.conv_in.conv.bias, float("inf")), requires_grad=False
            )
        return vae

    monkeypatch.setattr(pipeline, "load_vae", damaged)
    with pytest.raises(NotFiniteError, match=r"The decoded picture .*'decoder\.conv_in\.conv\.bias"):
        pipe.generate(PROMPT, **QUICK)


def test_a_prompt_that_is_too_long_is_cut_with_a_notice_that_says_where(folder, caplog):
    pipe = make(folder)
    pipe.encode_prompts([" ".join(f"word{number}" for number in range(1200))])
    assert "the model reads 1024" in caplog.text and "was cut off" in caplog.text


# -- devices and plain paths ---------------------------------------------------------------------------------------------------------------


def test_the_device_is_chosen_where_none_is_given(folder, monkeypatch):
    from ltx2_gguf.ltx2_core import devices

    assert make(folder).device.type == devices.available()[0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices.choose_device().type == "cuda" and devices.choose_device("cuda:1").index == 1
    with pytest.raises(ValueError, match="There is no cuda:2; this machine has cuda:0 to cuda:1"):
        devices.choose_device("cuda:2")
    for name in ("gpu", "cuda:x", "meta"):
        with pytest.raises(ValueError, match="use one of"):
            devices.choose_device(name)


def test_images_are_refused_before_anything_is_loaded(folder, picture, monkeypatch):
    pipe = make(folder)
    monkeypatch.setattr(pipeline, "load_text_encoder", None)
    for images, words in (
        ([(picture, 9)], "Frame 9"),
        ([(picture, 0, 2.0)], "strength is 2"),
        (["gone.png"], "gone.png"),
        ([picture / 2.0], "uint8"),
    ):
        with pytest.raises(ValueError, match=words):
            pipe.stream(PROMPT, **QUICK, images=images)


def test_a_frame_rate_and_seed_without_end_are_refused(pipe):
    for settings, words in (
        ({"fps": float("inf")}, "frame rate is inf"),
        ({"cfg": float("nan")}, "cfg is nan"),
        ({"seed": 2**64}, "between 0 and"),
    ):
        with pytest.raises(ValueError, match=words):
            pipe.settings(**SIZE, **settings)
    assert len(pipe.sample(PROMPT, pipe.settings(**QUICK, seed=2**64 - 1, sampler="res_2s"))) == 1
