"""compare-reference: the documented layout, files made with diffusers by the documented snippet, and what the command says."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import reference_dit as ref
from ltx2_gguf.ltx2_core.cli import compare, main
from ltx2_gguf.ltx2_core.cli.compare import CompareError
from ltx2_gguf.ltx2_core.convert import synthetic
from ltx2_gguf.ltx2_core.files import structure
from ltx2_gguf.ltx2_core.files.weights import open_weights
from ltx2_gguf.ltx2_core.loading.transformer import load_connector, load_dit
from ltx2_gguf.ltx2_core.loading.vae import load_vae
from ltx2_gguf.ltx2_core.transformer.model import LTX2Model
from ltx2_gguf.ltx2_core.transformer.patchify import pixel_coords
from reference_dit import one_thread  # noqa: F401  (applies to every test here)

DOC = Path(__file__).parents[3] / "docs" / "developer" / "compare-reference.md"


@pytest.fixture(scope="module", params=["2.0", "2.3"])
def checkpoint(request, tmp_path_factory):
    geometry = structure.Geometry.small(
        request.param, heads=2, head_dim=32, gemma_width=64, gemma_layers=2, vae_channels=8
    )
    return synthetic.make(tmp_path_factory.mktemp("compare") / "model.safetensors", geometry, type="f32")


@pytest.fixture(scope="module")
def inputs(checkpoint):
    path = checkpoint.parent / "inputs.safetensors"
    return path, compare.make_inputs(path, [checkpoint])


def documented_functions():
    """The Python of the document, as a namespace."""
    namespace = {}
    exec(re.search(r"```python\n(.*?)```", DOC.read_text(), re.S)[1], namespace)
    return namespace


def test_the_documented_snippet_fills_a_file_that_compares_within_tolerance(checkpoint, inputs, capsys):
    with torch.inference_mode():
        model = load_dit(checkpoint, dtype=torch.float32)
    state = {name: p.clone() for name, p in model.state_dict().items()}
    target = checkpoint.parent / "reference.safetensors"
    documented_functions()["fill"](inputs[0], target, ref.diffusers_model(model.config, state))
    assert main(["compare-reference", str(target), "--checkpoint", str(checkpoint), "--tolerance", "1e-5"]) == 0
    out = capsys.readouterr().out
    assert (
        "reference: diffusers (float32)" in out
        and all(f"dit/{case}" in out for case in ("plain", "first_frame_given", "keyframe", "stg"))
        and "TOO LARGE" not in out
    )


def test_every_component_is_compared_with_what_the_file_expects(checkpoint, inputs):
    """Expected outputs from this pack itself: every case of every component runs, and the errors are those put in."""
    tensors = dict(inputs[1])
    with torch.inference_mode():
        model, vae = load_dit(checkpoint, dtype=torch.float32), load_vae(checkpoint, dtype=torch.float32)
        for case in ("short", "long"):
            tensors[f"connector/{case}/expected"] = (
                model.video_embeddings_connector(tensors[f"connector/{case}/features"])[0] * 1.01
            )
        tensors["vae/clip/expected_latent"] = vae.encode(tensors["vae/clip/pixels"])
        tensors["vae/clip/expected_pixels"] = vae.decode(tensors["vae/clip/latent"])
        dit = {
            "latent": tensors["dit/plain/latent"],
            "features": tensors["connector/short/features"],
            "sigma": torch.tensor([0.5]),
        }
        context = model.preprocess_text_embeds(dit["features"], True)
        tensors |= {f"dit/from_features/{field}": value for field, value in dit.items()}
        tensors["dit/from_features/expected"] = model.velocity(dit["latent"], 0.5, context, 24.0)
    path = checkpoint.parent / "own.safetensors"
    kept = {
        name: value.clone().contiguous()
        for name, value in tensors.items()
        if name.rsplit("/", 1)[0] + "/expected" in tensors or name.startswith("vae/")
    }
    save_file(kept, path)
    rows = {(row.component, row.case, row.output): row for row in compare.compare(path, [checkpoint])}
    assert set(rows) == {
        ("connector", "short", "context"),
        ("connector", "long", "context"),
        ("vae", "clip", "latent"),
        ("vae", "clip", "pixels"),
        ("dit", "from_features", "velocity"),
    }
    assert (
        rows["connector", "long", "context"].error == pytest.approx(0.01 / 1.01, rel=1e-3)
        and not rows["connector", "long", "context"].passed
    )
    assert (
        rows["vae", "clip", "latent"].passed
        and rows["vae", "clip", "pixels"].passed
        and rows["dit", "from_features", "velocity"].passed
    )


def test_features_are_compared_with_diffusers_extractor(checkpoint, inputs):
    from diffusers.pipelines.ltx2.connectors import per_layer_masked_mean_norm, per_token_rms_norm

    hidden = inputs[1]["features/short/hidden_states"]
    weights = load_file(checkpoint)
    x = hidden.permute(1, 2, 0)[None]  # (L, n, D) -> (1, n, D, L)
    if "text_embedding_projection.aggregate_embed.weight" in weights:
        x = per_layer_masked_mean_norm(x, torch.tensor([x.shape[1]]), "cpu")
        expected = x @ weights["text_embedding_projection.aggregate_embed.weight"].T
    else:
        weight, bias = (
            weights[f"text_embedding_projection.video_aggregate_embed.{kind}"] for kind in ("weight", "bias")
        )
        x = per_token_rms_norm(x).flatten(2) * (weight.shape[0] / hidden.shape[2]) ** 0.5
        expected = x @ weight.T + bias
    path = checkpoint.parent / "features.safetensors"
    save_file({"features/short/hidden_states": hidden, "features/short/expected": expected[0].contiguous()}, path)
    (row,) = compare.compare(path, [checkpoint])
    assert row.output == "features" and row.error < 1e-5


def write_dit_case(path, checkpoint, **fields):
    with torch.inference_mode():
        model = load_dit(checkpoint, dtype=torch.float32)
        latent = torch.randn(1, 128, 2, 3, 4)
        context = torch.randn(1, 8, model.config.context_dim)
        mask = torch.rand(1, 1, 2, 3, 4)
        expected = model.velocity(latent, 0.5, context, 12.0, denoise_mask=mask)
    case = {
        "latent": latent,
        "context": context,
        "sigma": torch.tensor([0.5]),
        "frame_rate": torch.tensor([12.0]),
        "timesteps": mask.flatten(1) * 0.5,
        "expected": expected,
    }
    save_file({f"dit/a/{field}": value for field, value in (case | fields).items() if value is not None}, path)
    return path


def test_per_token_timesteps_may_be_given_instead_of_a_mask(checkpoint, tmp_path):
    (row,) = compare.compare(write_dit_case(tmp_path / "a.safetensors", checkpoint), [checkpoint])
    assert row.error < 1e-5


@pytest.mark.parametrize("form", ["intervals", "midpoints"])
def test_positions_of_the_reference_are_compared_too(checkpoint, tmp_path, form):
    frames = torch.tensor([[0.0, 1.0], [1.0, 9.0]]) / 12
    rows, columns = (torch.stack((torch.arange(n) * 32.0, torch.arange(n) * 32.0 + 32), -1) for n in (3, 4))
    positions = torch.stack(
        (
            frames[:, None, None].expand(2, 3, 4, 2),
            rows[None, :, None].expand(2, 3, 4, 2),
            columns[None, None].expand(2, 3, 4, 2),
        )
    ).flatten(1, 3)[None]
    positions = positions if form == "intervals" else positions.mean(-1)
    by_output = {
        row.output: row
        for row in compare.compare(
            write_dit_case(tmp_path / "a.safetensors", checkpoint, positions=positions.contiguous()), [checkpoint]
        )
    }
    assert by_output["positions"].error < 1e-6 and by_output["velocity"].error < 1e-5


@pytest.mark.parametrize("form", ["intervals", "midpoints"])
def test_tokens_with_positions_are_taken_as_the_official_transformer_takes_them(checkpoint, tmp_path, form):
    grid = write_dit_case(tmp_path / "grid.safetensors", checkpoint)
    case = {name.removeprefix("dit/a/"): value for name, value in load_file(grid).items()}
    positions = pixel_coords(2, 3, 4, (8, 32, 32)).float()
    positions[:, 0] /= case.pop("frame_rate")
    in_tokens = {name: case[name].flatten(2).transpose(1, 2).contiguous() for name in ("latent", "expected")}
    x0 = in_tokens["latent"] - case["timesteps"][..., None] * in_tokens["expected"]
    tokens = (
        case
        | in_tokens
        | {
            "expected_x0": x0,
            "timesteps": case["timesteps"][..., None],
            "positions": positions if form == "intervals" else positions.mean(-1),
        }
    )
    path = tmp_path / "tokens.safetensors"
    save_file({f"dit/a/{name}": value.contiguous() for name, value in tokens.items()}, path)
    rows = {row.output: row for row in compare.compare(path, [checkpoint])}
    assert set(rows) == {"velocity", "x0"} and all(row.error < 1e-5 for row in rows.values())


def test_timesteps_multiplied_by_1000_and_tokens_without_positions_are_refused(checkpoint, tmp_path):
    with pytest.raises(CompareError, match="'sigma' goes from 725 to 725; noise levels here lie in 0 … 1"):
        compare.compare(
            write_dit_case(tmp_path / "a.safetensors", checkpoint, sigma=torch.tensor([725.0])), [checkpoint]
        )
    with pytest.raises(CompareError, match="add 'positions'"):
        compare.compare(
            write_dit_case(tmp_path / "a.safetensors", checkpoint, latent=torch.zeros(1, 24, 128)), [checkpoint]
        )


def test_padded_hidden_states_in_the_official_order_give_the_same_features(checkpoint, inputs, tmp_path):
    hidden = inputs[1]["features/short/hidden_states"]  # (L, n, D)
    with torch.inference_mode():
        expected = compare._Features([open_weights(checkpoint)], torch.float32, "cpu")
        ((_, features, _),) = expected({"hidden_states": hidden, "expected": torch.zeros(1, 1)})
    padded = (
        torch.cat((torch.full((*hidden.shape[:1], 5, hidden.shape[2]), 9.0), hidden), dim=1)
        .permute(1, 2, 0)[None]
        .contiguous()
    )
    mask = torch.tensor([0] * 5 + [1] * hidden.shape[1])
    path = tmp_path / "padded.safetensors"
    save_file(
        {
            "features/a/hidden_states": padded,
            "features/a/attention_mask": mask,
            "features/a/expected": torch.cat((torch.zeros(5, features.shape[1]), features))[None].clone(),
        },
        path,
    )
    (row,) = compare.compare(path, [checkpoint])
    assert row.error < 1e-6


@pytest.mark.parametrize("kind", ["ones and zeros", "additive"])
def test_padded_features_of_a_batch_give_the_connectors_context(checkpoint, tmp_path, kind):
    with torch.inference_mode():
        connector = load_connector(checkpoint)
        rows = [torch.randn(n, connector.config.inner_dim) for n in (3, 8)]
        expected = torch.cat([connector(row[None])[0] for row in rows])
    features, mask = torch.randn(2, 8, connector.config.inner_dim), torch.zeros(2, 8)
    for i, row in enumerate(rows):
        features[i, 8 - len(row) :], mask[i, 8 - len(row) :] = row, 1
    if kind == "additive":
        mask = ((1 - mask) * torch.finfo(torch.float32).min)[:, None, None]
    path = tmp_path / "padded.safetensors"
    save_file(
        {
            "connector/a/features": features,
            "connector/a/attention_mask": mask,
            "connector/a/expected": expected.clone(),
        },
        path,
    )
    (row,) = compare.compare(path, [checkpoint])
    assert row.error < 1e-6


def test_an_error_above_the_tolerance_is_marked_and_fails_the_command(checkpoint, tmp_path, capsys):
    path = write_dit_case(tmp_path / "a.safetensors", checkpoint, expected=torch.ones(1, 128, 2, 3, 4))
    assert main(["compare-reference", str(path), "--checkpoint", str(checkpoint)]) == 1
    assert "TOO LARGE" in capsys.readouterr().out
    assert main(["compare-reference", str(path), "--checkpoint", str(checkpoint), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)[0]["passed"] is False


def test_cases_that_were_not_filled_are_left_out_and_said(checkpoint, inputs, tmp_path, caplog):
    path = write_dit_case(tmp_path / "a.safetensors", checkpoint)
    save_file(load_file(path) | {name: value for name, value in inputs[1].items() if name.startswith("vae/")}, path)
    (row,) = compare.compare(path, [checkpoint])
    assert row.component == "dit" and "vae/clip has no expected output" in caplog.text


def test_a_nan_never_passes():
    assert not compare.Row("dit", "a", "velocity", (1,), float("nan"), 0.0, 1.0).passed


@pytest.mark.parametrize(
    "tensors, metadata, message",
    [
        ({"latent": torch.zeros(1)}, None, "'latent' is not of the form 'component/case/field'"),
        ({"dit/a/latents": torch.zeros(1)}, None, "unknown field 'latents'; dit has context, denoise_mask"),
        (
            {"dit/a/latent": torch.zeros(1), "dit/a/expected": torch.zeros(1)},
            None,
            "case 'dit/a' lacks 'context or features'",
        ),
        ({"vae/a/expected_pixels": torch.zeros(1)}, None, "case 'vae/a' lacks 'pixels or latent'"),
        (
            {"vae/a/pixels": torch.zeros(1), "vae/a/expected_pixels": torch.zeros(1)},
            None,
            "expects 'expected_pixels' but gives no 'latent'",
        ),
        ({"vae/a/pixels": torch.zeros(1)}, None, "holds no case with an expected output"),
        (
            {"vae/a/pixels": torch.zeros(1)},
            {"layout": "ltx2-compare 9"},
            "layout 'ltx2-compare 9'; this version reads 'ltx2-compare 1'",
        ),
    ],
)
def test_files_outside_the_layout_are_refused(checkpoint, tmp_path, tensors, metadata, message):
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    with pytest.raises(CompareError, match=message):
        compare.compare(tmp_path / "a.safetensors", [checkpoint])


def test_a_component_that_is_not_there_is_said_so(checkpoint, tmp_path):
    path = write_dit_case(tmp_path / "a.safetensors", checkpoint)
    with pytest.raises(CompareError, match="holds no case of vae"):
        compare.compare(path, [checkpoint], only="vae")


def test_the_document_lists_every_field():
    text = DOC.read_text()
    for component, (needed, optional) in compare.FIELDS.items():
        for field in [field for group in needed for field in group] + list(optional):
            assert f"`{component}/<case>/{field}`" in text or (
                field == "attention_mask" and "`attention_mask`" in text
            ), (component, field)


def test_the_inputs_need_no_loaded_model(inputs, monkeypatch):
    monkeypatch.setattr(LTX2Model, "__init__", lambda *a, **k: pytest.fail("a model was built"))
    assert {name.split("/")[0] for name in inputs[1]} == set(compare.COMPONENTS)
