"""NaN and infinity in settings, latents and layers."""

import math

import pytest
import torch

from ltx2_gguf.ltx2_core.sampling import finite


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused_by_name(value):
    finite.check_numbers(cfg=3.0, stg=None, steps=4)
    with pytest.raises(ValueError, match="rescale is .*; give a finite number"):
        finite.check_numbers(cfg=3.0, rescale=value)


@pytest.mark.parametrize("fps", [0, -24, math.nan, math.inf])
def test_frame_rates_of_no_video_are_refused(fps):
    finite.check_frame_rate(23.976)
    with pytest.raises(ValueError, match="above 0"):
        finite.check_frame_rate(fps)


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Linear(8, 8)), torch.nn.Linear(8, 4)
    )


def test_a_damaged_weight_is_named():
    net, x = network(), torch.ones(2, 4)
    finite.check_latent(net(x), "after the first step", net, lambda: net(x))
    with torch.no_grad():
        net[1][1].weight[3, 2] = math.nan
    with pytest.raises(
        finite.NotFiniteError, match="not numbers after the first step: the weight '1.1.weight' in the model's file"
    ):
        finite.check_latent(net(x), "after the first step", net, lambda: net(x))


def test_a_layer_that_overflows_is_named_and_the_hooks_are_gone_afterwards():
    net, x = network(), torch.ones(2, 4)
    net[1][1].forward = lambda x: x * math.inf
    with pytest.raises(finite.NotFiniteError, match="they begin in the output of '1.1', whose weights are finite"):
        finite.check_latent(net(x), "at the end", net, lambda: net(x))
    assert not any(module._forward_hooks for module in net.modules())
    with pytest.raises(finite.NotFiniteError, match="no layer could be named"):
        finite.check_latent(torch.tensor([math.nan]), "at the end")
