"""The demo model's scenes, captions, measurements and export: quick checks without the model's weights."""

import re

import numpy as np
import pytest
import torch

import toytools
from toy import captions, resume, scenes, steps, text, train_dit, vision


def test_the_numpy_and_the_torch_renderer_paint_the_same_clips():
    rng = np.random.default_rng(0)
    drawn = scenes.sample(rng, *scenes.random_things(rng, 6, 0.5))
    painted = (scenes.render_torch(drawn).permute(0, 2, 3, 4, 1) + 1) * 127.5
    assert np.abs(painted.numpy() - scenes.render(drawn)).max() < 1.5


def test_a_seed_gives_the_same_captions_and_another_seed_others():
    assert captions.evaluation_set(1) == captions.evaluation_set(1) != captions.evaluation_set(2)


def test_no_held_out_prompt_is_a_training_caption_and_some_ask_for_combinations_never_trained():
    trained = captions.training_set(0)
    known, combinations = (
        {c.text.lower() for c in trained},
        {thing for c in trained if len(c.things) == 1 for thing in c.things},
    )
    asked = captions.evaluation_set(1)
    singles = [c.things[0] for c in asked if len(c.things) == 1]
    assert not [c.text for c in asked if c.text.lower() in known]
    assert sum(thing not in combinations for thing in singles) >= 8
    assert {m for _, _, m in singles} == set(scenes.MOTIONS) and {c for _, c, _ in singles} == set(scenes.COLOURS)


def test_measurements_of_true_clips_are_right():
    for report in vision.error_rates(n=40).values():
        assert max(report.values()) <= 0.01, report


def test_the_measurement_sees_wrong_colours_shapes_motions_and_empty_clips():
    wanted = ("star", "red", "left")
    (things,), background = captions.classes([captions.Caption("", (wanted,), "black")])
    (clip,) = scenes.render(scenes.sample(np.random.default_rng(0), things[None], background))
    for wrong, key in (
        (("circle", "red", "left"), "shape"),
        (("star", "blue", "left"), "colour"),
        (("star", "red", "right"), "motion"),
    ):
        seen = vision.compare(vision.measure(clip), [wrong])
        assert {name: values[0] for name, values in seen.items()} == {name: name != key for name in seen}
    assert vision.measure(np.full_like(clip, 30)) == []


def test_the_folded_projection_gives_the_features_that_were_trained():
    from ltx2_gguf.ltx2_core.text.projection import TextProjection

    generator = torch.Generator().manual_seed(0)
    width, features, rank, states = 64, 32, 16, 19
    basis = {
        "mean": torch.randn(width * text.STATES, generator=generator),
        "scale": torch.rand(rank, generator=generator) + 0.5,
    }
    basis["directions"] = torch.linalg.qr(torch.randn(width * text.STATES, rank, generator=generator))[0].T
    weight, bias = torch.randn(features, rank, generator=generator), torch.randn(features, generator=generator)
    hidden = torch.randn(states, 5, width, generator=generator)
    normed = hidden[: text.STATES].transpose(0, 1)
    normed = normed * torch.rsqrt(normed.square().mean(-1, keepdim=True) + 1e-6)
    expected = (normed.flatten(1) - basis["mean"]) @ basis["directions"].T / basis["scale"] @ weight.T + bias

    projection = TextProjection("2.3", width, states, features)
    folded_weight, folded_bias = text.fold(weight, bias, basis, states)
    projection.load_state_dict(
        {"video_aggregate_embed.weight": folded_weight, "video_aggregate_embed.bias": folded_bias}
    )
    with torch.inference_mode():
        result = projection(hidden, torch.device("cpu"))
    assert (result - expected).norm() / expected.norm() == pytest.approx(0, abs=1e-4)


def test_training_never_sees_the_examinations_way_to_negate_a_direction():
    trained = [c.text.lower() for c in captions.training_set(0, per_combination=6, pairs=20)]
    assert sum(" but " in text and "n't" in text for text in trained) > 20
    assert not [
        text
        for text in trained
        if re.search(r"doesn't move (left|right|up|down) but|rather than (left|right|up|down)", text)
    ]


def test_a_run_resumes_from_the_shipped_file_with_the_same_text_features():
    generator = torch.Generator().manual_seed(0)
    wide, bias = resume.exported_projection(toytools.MODEL)
    directions = torch.linalg.qr(torch.cat((wide, torch.randn(20, wide.shape[1], generator=generator))).T)[
        0
    ].T  # any basis with the rows' span
    scale = torch.rand(len(directions), generator=generator) + 0.5
    basis = {"mean": torch.randn(wide.shape[1], generator=generator), "directions": directions, "scale": scale}
    toy = train_dit.load_exported(toytools.MODEL, basis)
    states = torch.randn(5, wide.shape[1], generator=generator)
    with torch.no_grad():
        found = toy.projection((states - basis["mean"]) @ directions.T / basis["scale"])
    expected = states @ wide.T + bias
    assert (found - expected).norm() / expected.norm() < 1e-4
    exported, _ = text.fold(toy.projection.weight, toy.projection.bias, basis)
    assert (text.unfold(exported) - wide).norm() / wide.norm() < 1e-4


def test_the_empty_caption_stands_for_every_clip():
    class Bank:
        latents = torch.arange(50.0).view(50, 1, 1, 1, 1).expand(50, 2, *steps.GRID)
        table = torch.zeros(2, 3, dtype=torch.int64)

    single, pair = torch.tensor([0]), torch.tensor([], dtype=torch.int64)
    draws = steps.Draws(
        Bank, torch.zeros(2, 4, 8), torch.ones(2, 4, dtype=torch.bool), single, pair, 1, 0.0, dropout=1.0
    )
    assert len(draws(steps.Kind(64, 2, True))["latent"][:, 0, 0, 0, 0].unique()) > 30
    draws.dropout = 0.0
    assert draws(steps.Kind(64, 2, True))["latent"].unique().tolist() == [0.0]
