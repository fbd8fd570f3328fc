"""The embeddings connector against the host's and diffusers', for short, full and long prompts and ragged batches."""

import pytest
import torch

import reference_dit as ref
from connector_references import diffusers_connector, features, padded
from ltx2_gguf.ltx2_core.transformer.connector import Embeddings1DConnector
from reference_dit import one_thread  # noqa: F401  (applies to every test here)

TIGHT = 3e-6
all_geometries = pytest.mark.parametrize("version, index", ref.CASES)


@all_geometries
@pytest.mark.parametrize("n", [1, 5, 128, 1000, 1024])
def test_context_equals_the_hosts(host, version, index, n):
    _, model = ref.ours(version, index)
    theirs = ref.theirs("host", version, index).video_embeddings_connector
    x = features(model.config.connector.inner_dim, 1, n)
    with torch.no_grad():
        context, mask = model.video_embeddings_connector(x)
        expected = theirs(x)[0]
    assert context.shape == (1, 1024, x.shape[-1]) and mask.shape == (1, 1024) and mask.all()
    assert ref.relative_error(context, expected) < TIGHT


@pytest.mark.parametrize("n, total", [(1025, 1152), (1300, 1408)])
def test_a_long_prompt_grows_to_whole_sets_of_registers_like_the_hosts(host, n, total):
    _, model = ref.ours("2.3")
    x = features(model.config.connector.inner_dim, 1, n)
    with torch.no_grad():
        context, _ = model.video_embeddings_connector(x)
        expected = ref.theirs("host", "2.3").video_embeddings_connector(x)[0]
    assert context.shape[1] == total and ref.relative_error(context, expected) < TIGHT


@all_geometries
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_of_different_lengths_equals_diffusers(version, index, side):
    _, model = ref.ours(version, index)
    config = model.config.connector
    rows = [features(config.inner_dim, 1, n, seed=n)[0] for n in (3, 200, 1024)]
    x, additive = padded(rows, 1024, side)
    theirs = diffusers_connector(config, model.video_embeddings_connector.state_dict())
    with torch.no_grad():
        context, _ = model.video_embeddings_connector(x, (additive[:, 0, 0] == 0).int())
        expected = theirs(x, additive)[0]
        alone = torch.cat([model.video_embeddings_connector(row[None])[0] for row in rows])
    assert ref.relative_error(context, expected) < TIGHT
    assert ref.relative_error(context, alone) < TIGHT


def test_registers_fill_by_absolute_position():
    """A prompt of 130 tokens is followed by register 2, not by register 0."""
    config = ref.tiny_config().connector
    module = Embeddings1DConnector(config)
    ref.randomize_(module, 2)
    filled = module._fill_with_registers(torch.zeros(1, 130, config.inner_dim), None)
    assert torch.equal(filled[0, 130], module.learnable_registers[2]) and torch.equal(
        filled[0, 1023], module.learnable_registers[127]
    )


def test_the_order_of_tokens_matters():
    _, model = ref.ours("2.3")
    x = features(model.config.connector.inner_dim, 1, 6)
    with torch.no_grad():
        there, back = model.video_embeddings_connector(x)[0], model.video_embeddings_connector(x.flip(1))[0]
    assert ref.relative_error(back, there) > 1e-2


@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_bfloat16_is_as_close_to_float32_as_the_hosts(host, version):
    config, model = ref.ours(version)
    half = ref.our_model(config, seed=1, dtype=torch.bfloat16)
    theirs = ref.theirs("host", version, 0, torch.bfloat16)
    x = features(config.connector.inner_dim, 1, 12)
    with torch.no_grad():
        exact = model.video_embeddings_connector(x)[0]
        got = half.video_embeddings_connector(x.bfloat16())[0]
        reference = theirs.video_embeddings_connector(x.bfloat16())[0]
    assert ref.relative_error(got, exact) <= 2 * ref.relative_error(reference, exact)
