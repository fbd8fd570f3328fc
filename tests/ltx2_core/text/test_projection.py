"""The text projection against diffusers' connectors and the host's text encoder, dense and packed, on left-padded references."""

import contextlib
import math

import pytest
import torch

from ltx2_gguf.ltx2_core.text import projection as text_projection
from ltx2_gguf.ltx2_core.text.projection import ProjectionError, projection_geometry, weight_tiles
from ltx2_gguf.quant import decode, tensor
from ltx2_gguf.quant.formats import FORMATS
from projection_references import (
    FEATURES,
    LAYERS,
    WIDTH,
    diffusers_features,
    hidden_states,
    host_features,
    projection,
    rel,
)


@pytest.mark.parametrize("version", ["2.3", "2.0"])
def test_features_equal_diffusers_on_left_padded_states(version):
    module, hidden = projection(version), hidden_states()
    with torch.no_grad():
        assert rel(module(hidden), diffusers_features(version, module, hidden)) < 2e-5


@pytest.mark.parametrize("version", ["2.3", "2.0"])
def test_features_equal_the_host(host, version):
    module, hidden = projection(version), hidden_states()
    with torch.no_grad():
        assert rel(module(hidden), host_features(version, module, hidden)) < 2e-5


def test_audio_features_equal_the_hosts_and_stand_behind_the_videos(host):
    module, hidden = projection("2.3", audio_features=WIDTH), hidden_states()
    with torch.no_grad():
        features = module(hidden)
        assert features.shape[1] == FEATURES + WIDTH
        assert rel(features, host_features("2.3", module, hidden)) < 2e-5
        alone = projection("2.3")
        alone.load_state_dict({name: value for name, value in module.state_dict().items() if "audio" not in name})
        assert torch.equal(features[:, :FEATURES], alone(hidden))


def test_the_flattened_index_runs_over_layers_fastest():
    module, hidden = projection("2.3"), hidden_states()
    with torch.no_grad():
        module.linear.weight.zero_()
        module.linear.bias.zero_()
        module.linear.weight[0, 9 * LAYERS + 2] = 1.0
        x = hidden[2]
        want = x[:, 9] / (x.square().mean(-1) + 1e-6).sqrt() * math.sqrt(FEATURES / WIDTH)
        got = module(hidden)
    assert torch.allclose(got[:, 0], want, rtol=1e-5) and not got[:, 1:].any()


@pytest.mark.parametrize("version", ["2.3", "2.0"])
def test_small_chunks_and_tiles_change_nothing(version, monkeypatch):
    module, hidden = projection(version), hidden_states(n=23)
    with torch.no_grad():
        whole = module(hidden)
        monkeypatch.setattr(text_projection, "INPUT_BYTES", 5 * 4 * WIDTH * LAYERS)
        monkeypatch.setattr(text_projection, "TILE_BYTES", 7 * 4 * WIDTH * LAYERS)
        assert rel(module(hidden), whole) < 1e-6


@pytest.mark.parametrize("name", ["Q8_0", "Q5_1", "Q4_0"])
@pytest.mark.parametrize("version", ["2.3", "2.0"])
def test_a_packed_weight_gives_what_its_decoded_weight_gives(version, name):
    module, hidden = projection(version), hidden_states()
    weight = module.linear.weight.detach()
    with torch.inference_mode():
        raw = decode.quantize(weight, FORMATS[name])
        dense = decode.dequantize(raw, FORMATS[name])
        module.linear.weight = torch.nn.Parameter(dense, requires_grad=False)
        want = module(hidden)
        module.linear.weight = torch.nn.Parameter(
            tensor.pack(raw, name, tuple(weight.shape), torch.float32), requires_grad=False
        )
        assert rel(module(hidden), want) < 1e-6


def test_a_bfloat16_weight_is_used_with_float32_products():
    module, hidden = projection("2.3"), hidden_states()
    with torch.no_grad():
        module.linear.weight.data = module.linear.weight.data.bfloat16()
        got = module(hidden)
        module.linear.weight.data = module.linear.weight.data.float()
        assert got.dtype == torch.float32 and rel(got, module(hidden)) < 1e-6


def test_no_tile_is_larger_than_allowed_and_together_they_are_the_weight():
    weight = torch.randn(33, 40)
    tiles = list(weight_tiles(weight, tile_bytes=4 * 40 * 8))
    assert max(len(tile) for _, tile in tiles) == 8
    assert torch.equal(torch.cat([tile for _, tile in tiles]), weight)
    assert [rows.start for rows, _ in tiles] == list(range(0, 33, 8))


def test_weights_kept_elsewhere_are_borrowed_for_the_call():
    log = []

    @contextlib.contextmanager
    def access(linear, device):
        log.append(device)
        yield linear.weight * 2, linear.bias * 2
        log.append("returned")

    hidden = hidden_states()
    with torch.no_grad():
        assert rel(projection("2.3", weight_access=access)(hidden), 2 * projection("2.3")(hidden)) < 1e-6
    assert log == [torch.device("cpu"), "returned"]


def test_states_are_not_changed():
    hidden = hidden_states()
    before = hidden.clone()
    with torch.no_grad():
        for version in ("2.3", "2.0"):
            projection(version)(hidden)
    assert torch.equal(hidden, before)


def test_a_projection_of_another_size_is_refused_with_both_numbers():
    with pytest.raises(ProjectionError, match=r"takes 7 hidden states of width 64.*gives 5 of width 64"):
        projection("2.3")(hidden_states(layers=5))
    with pytest.raises(
        ProjectionError, match=r"takes 188160 numbers per token \(Gemma-3 12B\), this Gemma gives 12160"
    ):
        projection_geometry({"video_aggregate_embed.weight": (4096, 188160)}, 640, 19)
    with pytest.raises(ProjectionError, match="no video text projection"):
        projection_geometry({"audio_aggregate_embed.weight": (2048, 188160)}, 3840, 49)
    with pytest.raises(ProjectionError, match="as wide as Gemma"):
        projection_geometry({"aggregate_embed.weight": (100, 188160)}, 3840, 49)


def test_the_version_is_told_by_the_names():
    assert projection_geometry({"video_aggregate_embed.weight": (4096, 188160)}, 3840, 49) == ("2.3", 4096)
    assert projection_geometry({"aggregate_embed.weight": (3840, 188160)}, 3840, 49) == ("2.0", 3840)
