"""What samplers, community nodes and training rely on: names, call signatures, hooks, gradients."""

import inspect

import pytest
import torch

import reference_dit as ref
from ltx2_gguf.ltx2_core.transformer import layers, modulation, patchify
from ltx2_gguf.ltx2_core.transformer.model import LTX2Model
from reference_dit import one_thread  # noqa: F401  (applies to every test here)

TIGHT = 3e-6
SIGMA = torch.tensor([0.7, 0.31])
versions = pytest.mark.parametrize("version", ["2.0", "2.3"])


def run(model, config, **kwargs):
    latent, context = ref.inputs(config)
    with torch.no_grad():
        return model(
            [latent],
            (SIGMA, SIGMA),
            context,
            frame_rate=24.0,
            transformer_options=kwargs.pop("transformer_options", {}),
            **kwargs,
        )


def fresh(version="2.3"):
    config = ref.tiny_config(version)
    return config, ref.our_model(config, seed=1)


@versions
def test_every_parameter_has_the_name_it_has_in_the_host(host, version):
    config, model = ref.ours(version)
    theirs = ref.theirs("host", version).state_dict()
    assert {name: p.shape for name, p in model.state_dict().items()}.items() <= {
        name: p.shape for name, p in theirs.items()
    }.items()


OF_LTX_2_5 = {
    "keyframes_abs_pos_mask",
    "apply_keyframes_abs_pos_embedding",
}  # steps of a forward pass that LTX-2 does not have
SAME_VALUE = [
    "inner_dim",
    "num_layers",
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "out_channels",
    "cross_attention_dim",
    "caption_channels",
    "apply_gated_attention",
    "cross_attention_adaln",
    "caption_proj_before_connector",
    "positional_embedding_theta",
    "positional_embedding_max_pos",
    "vae_scale_factors",
    "audio_positional_embedding_max_pos",
    "timestep_scale_multiplier",
    "ff_bias",
    "audio_ff_bias",
    "use_prompt_adaln_single",
    "use_keyframes_abs_pos_embedding",
]


@versions
def test_every_public_attribute_of_the_hosts_network_exists_and_plain_ones_have_its_value(host, version):
    config, model = ref.ours(version)
    theirs = ref.theirs("host", version)
    public = {name for name in dir(theirs) if not name.startswith("_")} - OF_LTX_2_5
    assert not {name for name in public if not hasattr(model, name)}
    for name in SAME_VALUE:
        if hasattr(theirs, name):
            ours, expected = getattr(model, name), getattr(theirs, name)
            assert (list(ours) if isinstance(ours, tuple) else ours) == (
                list(expected) if isinstance(expected, tuple) else expected
            ), name
    generated = model.freq_grid_generator(10000.0, 3, config.inner_dim, "cpu")
    assert ref.relative_error(generated, theirs.freq_grid_generator(10000.0, 3, config.inner_dim, "cpu")) < 1e-7
    video, audio = model.separate_audio_and_video_latents([torch.zeros(2, 128, 1, 2, 2)], None)
    assert audio.shape[2] == theirs.separate_audio_and_video_latents([video], None)[1].shape[2] == 0
    assert model.recombine_audio_and_video_latents(video, audio) is video


def test_block_attention_and_feed_forward_are_called_like_the_hosts(host):
    from comfy.ldm.lightricks import av_model
    from comfy.ldm.lightricks import model as lt

    def parameters(f):
        return list(inspect.signature(f).parameters)

    _, ours = ref.ours("2.3")
    block = ours.transformer_blocks[0]
    assert parameters(block.forward) == parameters(av_model.BasicAVTransformerBlock.forward)[1:]
    assert parameters(block.attn1.forward) == parameters(lt.CrossAttention.forward)[1:]
    assert parameters(block.ff.forward) == parameters(lt.FeedForward.forward)[1:]
    assert parameters(block.get_ada_values) == parameters(av_model.BasicAVTransformerBlock.get_ada_values)[1:]
    assert set(parameters(av_model.LTXAVModel.forward)[1:-1]) <= set(parameters(ours.forward))


def test_the_headless_entry_and_the_hosts_entry_run_the_same_code():
    config, model = ref.ours("2.3")
    latent, context = ref.inputs(config)
    mask = torch.rand(2, 1, 4, 5, 6)
    mask[:, :, -1] = 1
    timestep = (mask * SIGMA.view(2, 1, 1, 1, 1)).flatten(2).transpose(1, 2)
    with torch.no_grad():
        headless = model.velocity(latent, SIGMA, context, 24.0, denoise_mask=mask)
        hosted = model(
            [latent],
            (timestep, SIGMA),
            context,
            frame_rate=24.0,
            denoise_mask=mask.expand(-1, config.in_channels, -1, -1, -1),
        )
    assert torch.equal(headless, hosted)


def test_scaling_by_the_mask_is_a_switch_of_the_hosts_entry_only():
    config, model = fresh()
    latent, context = ref.inputs(config)
    mask = torch.full((2, 1, 4, 5, 6), 0.3)
    mask[:, :, -1] = -1.0  # a hole of a dilated guide
    plain = run(model, config, denoise_mask=mask)
    model.scale_velocity_by_mask = True
    scaled = run(model, config, denoise_mask=mask)
    assert torch.equal(scaled, plain * mask.clamp(min=0))
    assert torch.equal(run(model, config), plain)
    with torch.no_grad():
        assert not torch.equal(model.velocity(latent, SIGMA, context, 24.0, denoise_mask=mask), scaled)


def test_sound_in_the_latent_passes_through_with_zero_velocity():
    config, model = ref.ours("2.3")
    latent, context = ref.inputs(config)
    audio = torch.randn(2, 8, 10, 16)
    with torch.no_grad():
        video_v, audio_v = model([latent, audio], (SIGMA, SIGMA), context, frame_rate=24.0)
    assert torch.equal(video_v, run(model, config)) and audio_v.shape == audio.shape and not audio_v.any()
    with torch.no_grad():
        without_length = model([latent, audio[:, :, :0]], (SIGMA, SIGMA), context, frame_rate=24.0)
    assert torch.equal(without_length[0], video_v) and without_length[1].shape == (2, 8, 0, 16)


def test_the_sampler_tells_the_prompts_sigma_where_it_can():
    config, model = ref.ours("2.3")
    told = run(model, config, transformer_options={"sigmas": SIGMA})
    assert torch.equal(told, run(model, config))
    assert not torch.equal(run(model, config, transformer_options={"sigmas": SIGMA * 0.5}), told)
    assert torch.equal(
        run(model, config, transformer_options={"sigmas": SIGMA[:1]}),
        run(model, config, transformer_options={"sigmas": SIGMA[:1].repeat(2)}),
    )


def test_text_features_get_the_connector_and_finished_context_does_not(host):
    config, model = ref.ours("2.3")
    theirs = ref.theirs("host", "2.3")
    width, audio = config.connector.inner_dim, theirs.audio_inner_dim
    features = torch.randn(1, 9, width + audio)
    with torch.no_grad():
        expected = theirs.preprocess_text_embeds(features, unprocessed=True)
        context = model.preprocess_text_embeds(features, unprocessed=True)
        assert ref.relative_error(context, expected[..., :width]) < TIGHT
        assert torch.equal(model.preprocess_text_embeds(expected), expected[..., :width])
        assert torch.equal(model.preprocess_text_embeds(features[..., :width]), context)


def test_text_features_of_2_0_get_the_connector(host):
    config, model = ref.ours("2.0")
    features = torch.randn(1, 9, config.connector.inner_dim)
    with torch.no_grad():
        expected = model.video_embeddings_connector(features)[0]
        assert torch.equal(model.preprocess_text_embeds(features, unprocessed=True), expected)
        assert torch.equal(model.preprocess_text_embeds(features), expected)
        assert torch.equal(model.preprocess_text_embeds(torch.cat((expected, expected), -1)), expected)


def test_a_conditioning_of_the_other_version_is_refused_with_both_widths():
    config, model = ref.ours("2.3")
    with pytest.raises(ValueError, match=r"10 wide, this LTX-2.3 model takes 64"):
        model.preprocess_text_embeds(torch.zeros(1, 4, 10), unprocessed=True)


def test_features_wider_than_the_models_own_are_not_cut_to_fit():
    for version in ("2.0", "2.3"):
        _, model = ref.ours(version)
        with pytest.raises(ValueError, match="encode the prompt with the text encoder and projection of LTX-2"):
            model.preprocess_text_embeds(torch.zeros(1, 4, model.config.connector.inner_dim + 2), unprocessed=True)


def test_wide_context_is_cut_to_the_videos_columns():
    config, model = ref.ours("2.3")
    latent, context = ref.inputs(config)
    with torch.no_grad():
        wide = model([latent], (SIGMA, SIGMA), torch.cat((context, torch.randn(2, 40, 32)), -1), frame_rate=24.0)
    assert torch.equal(wide, run(model, config))


def test_a_text_mask_hides_tokens_and_one_of_another_length_is_ignored():
    config, model = ref.ours("2.3")
    latent, context = ref.inputs(config)
    mask = torch.ones(2, 40, dtype=torch.int64)
    mask[:, 10:] = 0
    with torch.no_grad():
        masked = model([latent], (SIGMA, SIGMA), context, mask, 24.0)
        short = model([latent], (SIGMA, SIGMA), context[:, :10], None, 24.0)
        other = model([latent], (SIGMA, SIGMA), context, mask[:, :7], 24.0)
    assert ref.relative_error(masked, short) < TIGHT
    assert torch.equal(other, run(model, config))


def test_replaced_blocks_get_the_hosts_arguments_and_may_call_the_original():
    config, model = ref.ours("2.3")
    seen = []

    def replacement(args, extra):
        seen.append(sorted(args))
        vx, ax = args["img"]
        out = extra["original_block"]({**args, "added": "by a node"})
        return {"img": (out["img"][0] + 1.0, ax)}

    plain = run(model, config)
    replaced = run(model, config, transformer_options={"patches_replace": {"dit": {("double_block", 1): replacement}}})
    assert len(seen) == 1 and {
        "img",
        "v_context",
        "v_timestep",
        "v_pe",
        "transformer_options",
        "self_attention_mask",
        "v_prompt_timestep",
        "a_context",
    } <= set(seen[0])
    assert not torch.equal(plain, replaced)


@pytest.mark.parametrize("piece", ["attn1", "attn2", "ff"])
def test_a_replaced_forward_of_a_piece_is_used(piece):
    config, model = fresh()
    plain = run(model, config)
    calls = []
    module = getattr(model.transformer_blocks[1], piece)
    original = module.forward

    def forward(*args, **kwargs):
        calls.append(kwargs)
        return original(*args, **kwargs) * 0.5

    module.forward = forward
    assert not torch.equal(run(model, config), plain) and len(calls) == 1
    del module.forward
    assert torch.equal(run(model, config), plain)


def test_a_hooked_norm_is_called_and_not_fused_away():
    config, model = fresh()
    plain = run(model, config)
    handle = model.transformer_blocks[0].attn1.q_norm.register_forward_hook(lambda module, args, out: out * 0.0)
    assert not torch.equal(run(model, config), plain)
    handle.remove()
    assert torch.equal(run(model, config), plain)


def test_attention_is_injected_everywhere():
    calls = []

    def attention(q, k, v, heads, mask=None, transformer_options=None):
        calls.append((q.shape, k.shape, heads))
        return layers.sdpa(q, k, v, heads, mask)

    config = ref.tiny_config()
    model = LTX2Model(config, dtype=torch.float32, attention=attention)
    ref.randomize_(model, 1)
    assert torch.equal(run(model, config), run(ref.ours("2.3")[1], config))
    assert len(calls) == 2 * config.num_layers
    with torch.no_grad():
        model.preprocess_text_embeds(torch.randn(1, 4, config.connector.inner_dim), unprocessed=True)
    assert len(calls) == 2 * config.num_layers + config.connector.num_layers


def test_code_written_for_the_hosts_attention_finds_its_rotation_matrix(host):
    from comfy.ldm.lightricks.model import apply_rotary_emb

    config, model = ref.ours("2.3")
    table = model._rotary_tables_for((4, 5, 6), 24.0, None, None, torch.device("cpu"))["v_pe"]
    x = torch.randn(2, 120, config.inner_dim)
    from ltx2_gguf.ltx2_core.transformer import fused

    assert (
        ref.relative_error(apply_rotary_emb(x, table), fused.rope(x, table.tables, config.num_attention_heads)) < TIGHT
    )
    matrix, split = table
    assert split and matrix.shape == (1, 120, config.num_attention_heads, config.attention_head_dim // 2, 2, 2)


@versions
@pytest.mark.parametrize("piece", ["attn1", "attn2", "ff", "block"])
def test_the_hosts_own_forwards_run_on_our_modules(host, version, piece):
    """Community nodes replace ``forward`` by edited copies of the host's: what these touch is there and gives the same numbers."""
    from comfy.ldm.lightricks import av_model
    from comfy.ldm.lightricks import model as lt

    config, model = fresh(version)
    plain = run(model, config)
    for block in model.transformer_blocks:
        module = block if piece == "block" else getattr(block, piece)
        theirs = {"block": av_model.BasicAVTransformerBlock, "ff": lt.FeedForward}.get(piece, lt.CrossAttention)
        module.forward = theirs.forward.__get__(module)
    assert ref.relative_error(run(model, config), plain) < TIGHT


def test_the_network_compiles():
    config, model = fresh()
    plain = run(model, config)
    compiled = torch.compile(model, backend="eager")
    assert ref.relative_error(run(compiled, config), plain) < TIGHT
    block = torch.compile(model.transformer_blocks[0], backend="eager", fullgraph=True)
    x, context = torch.randn(1, 120, config.inner_dim), torch.randn(1, 8, config.inner_dim)
    with torch.no_grad():
        arguments, _ = model._timestep_rows(SIGMA[:1], 1, 4, None, {}, torch.float32)
        arguments["v_timestep"].tokens = 120
        arguments |= {"v_context": context, **model._rotary_tables_for((4, 5, 6), 24.0, None, None, x.device)}
        expected, _ = model.transformer_blocks[0]((x.clone(), x[:, :0]), **arguments)
        got, _ = block((x.clone(), x[:, :0]), **arguments)
    assert ref.relative_error(got, expected) < TIGHT


def test_run_vx_false_leaves_the_video_alone():
    _, model = ref.ours("2.3")
    x = torch.randn(1, 6, model.inner_dim)
    out, _ = model.transformer_blocks[0]((x, x[:, :0]), transformer_options={"run_vx": False})
    assert out is x


def test_patchifiers_equal_the_hosts(host):
    from comfy.ldm.lightricks import symmetric_patchifier as host_patchifier

    latent, audio = torch.randn(2, 5, 3, 4, 2), torch.randn(2, 8, 7, 16)
    for ours, theirs, x in (
        (patchify.SymmetricPatchifier(), host_patchifier.SymmetricPatchifier(1, start_end=True), latent),
        (patchify.AudioPatchifier(), host_patchifier.AudioPatchifier(1, start_end=True), audio),
    ):
        for a, b in zip(ours.patchify(x), theirs.patchify(x)):
            assert a.shape == b.shape and torch.allclose(a.float(), b.float(), atol=1e-6)
    tokens, _ = patchify.SymmetricPatchifier().patchify(latent)
    assert torch.equal(patchify.SymmetricPatchifier().unpatchify(tokens, 4, 2, 3, 5), latent)


def test_pixel_coordinates_equal_the_hosts(host):
    from comfy.ldm.lightricks.symmetric_patchifier import SymmetricPatchifier, latent_to_pixel_coords

    _, coords = SymmetricPatchifier(1, start_end=True).patchify(torch.zeros(1, 1, 4, 3, 2))
    assert torch.equal(
        patchify.pixel_coords(4, 3, 2, (8, 32, 32)), latent_to_pixel_coords(coords, (8, 32, 32), causal_fix=True)
    )


@pytest.mark.parametrize(
    "mask, rows",
    [(None, 1), (torch.ones(2, 1, 4, 5, 6), 1), (torch.ones(2, 1, 4, 5, 6).index_fill(2, torch.tensor([0]), 0.5), 4)],
)
def test_modulation_is_computed_once_per_distinct_timestep(mask, rows):
    timestep = SIGMA[:, None] if mask is None else mask.flatten(1) * SIGMA[:, None]
    values, layout = modulation.distinct_timesteps(timestep, 4)
    assert values.shape == (2 * rows,)
    made = layout(values[:, None])
    assert made.index is None and torch.equal(made.expand().squeeze(-1).expand_as(timestep), timestep)


def test_modulation_of_a_region_mask_is_computed_for_two_values_per_sample():
    mask = torch.ones(2, 1, 4, 5, 6).index_fill(3, torch.tensor([1]), 0.5)
    timestep = mask.flatten(1) * SIGMA[:, None]
    values, layout = modulation.distinct_timesteps(timestep, 4)
    assert values.shape == (4,) and torch.equal(layout(values[:, None]).expand().squeeze(-1), timestep)


def test_feed_forward_in_chunks_equals_the_whole():
    config, model = fresh()
    plain = run(model, config)
    for block in model.transformer_blocks:
        block.ff.chunk_tokens = 50
    assert ref.relative_error(run(model, config), plain) < TIGHT


@versions
def test_gradients_reach_every_parameter_and_do_not_change_the_result(version):
    config, model = fresh(version)
    model.requires_grad_(True)
    latent, _ = ref.inputs(config)
    features = torch.randn(2, 7, config.connector.inner_dim)

    def forward():
        context = model.preprocess_text_embeds(features, unprocessed=True)
        return model.velocity(
            latent, SIGMA, context, 24.0, denoise_mask=torch.ones(2, 1, 4, 5, 6).index_fill(2, torch.tensor([0]), 0.5)
        )

    with torch.inference_mode():
        plain = forward()  # fills the caches of rotary tables; training afterwards must be able to use them
    trained = forward()
    assert ref.relative_error(trained, plain) < TIGHT
    trained.square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A constant added to every key changes no softmax, but the norm of keys makes even their biases matter; nothing is exempt.
    assert not without, without


def test_gradients_are_those_of_the_function():
    config, model = fresh()
    latent, context = ref.inputs(config, batch=1, frames=2, height=2, width=2, text=3)
    model.double()
    model.dtype = torch.float64
    weight = model.transformer_blocks[0].attn1.to_q.weight
    weight.requires_grad_(True)
    model.velocity(latent.double(), 0.5, context.double(), 24.0).sum().backward()
    with torch.no_grad():
        step = torch.zeros_like(weight)
        step[3, 5] = 1e-5
        weight += step
        up = model.velocity(latent.double(), 0.5, context.double(), 24.0).sum()
        weight -= 2 * step
        down = model.velocity(latent.double(), 0.5, context.double(), 24.0).sum()
    assert weight.grad[3, 5].item() == pytest.approx(((up - down) / 2e-5).item(), rel=1e-3)


def test_the_callers_latent_is_not_written_to():
    config, model = ref.ours("2.3")
    latent, context = ref.inputs(config)
    before, before_context = latent.clone(), context.clone()
    with torch.no_grad():
        model.velocity(latent, SIGMA, context, 24.0)
    assert torch.equal(latent, before) and torch.equal(context, before_context)
