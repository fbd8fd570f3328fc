"""Every file a user may have is named for what it is, and loads or says exactly why not."""

import json
import logging

import pytest
import torch
from safetensors.torch import save_file

import reference_dit as ref
from ltx2_gguf.ltx2_core.convert import synthetic
from ltx2_gguf.ltx2_core.files import structure, unsupported
from ltx2_gguf.ltx2_core.files.errors import WeightFileError, WeightsMismatch
from ltx2_gguf.ltx2_core.files.names import CONNECTOR
from ltx2_gguf.ltx2_core.files.weights import open_weights
from ltx2_gguf.ltx2_core.loading.identify import identify
from ltx2_gguf.ltx2_core.loading.transformer import CheckpointError, ConfigError, load_connector, load_dit
from ltx2_gguf.quant import decode, tensor
from ltx2_gguf.quant.formats import FORMATS
from ltx2_gguf.quant.gguf.writer import GGUFWriter
from reference_dit import one_thread  # noqa: F401  (applies to every test here)

versions = pytest.mark.parametrize("version", ["2.0", "2.3"])
SIGMA = torch.tensor([0.6])


def small(version="2.3", head_dim=32):
    """A reduced geometry, 64 wide (256 wide with head_dim 128, so that rows divide into the K formats' blocks)."""
    return structure.Geometry.small(
        version,
        heads=2,
        head_dim=head_dim,
        gemma_width=2 * head_dim,
        gemma_layers=2,
        vae_channels=8,
        latent_channels=16,
    )


def dit_tensors(version="2.3", audio=False, head_dim=32):
    """Bare name -> float32 tensor: transformer, connector and, if asked for, the sound stream."""
    g = small(version, head_dim)
    shapes = {**structure.dit_shapes(g), **structure.connector_shapes(g)}
    if audio:
        shapes |= structure.audio_dit_shapes(g)
    return {name: synthetic.tensor(name, shape) for name, shape in shapes.items()}


def config_metadata(version="2.3", head_dim=32):
    return synthetic.metadata(small(version, head_dim))


def write_gguf(path, tensors, fmt="Q8_0", metadata=None, architecture="ltxv"):
    """All 2-D weights in ``fmt`` where their rows divide, tables in BF16, the rest in F32 (mixed, as real files are)."""

    def chosen(name, value):
        if fmt != "F32" and value.ndim == 2 and value.shape[-1] % FORMATS[fmt].block_size == 0 and "adaln" not in name:
            return fmt
        return "BF16" if "table" in name else "F32"

    kinds = {name: chosen(name, value) for name, value in tensors.items()}
    meta = ({"general.architecture": architecture} if architecture else {}) | dict(metadata or {})
    with GGUFWriter(path, meta, [(name, kinds[name], tuple(value.shape)) for name, value in tensors.items()]) as writer:
        for name, value in tensors.items():
            writer.write(name, decode.quantize(value.reshape(-1, value.shape[-1]), FORMATS[kinds[name]]))
    return path


def velocity(model):
    latent = torch.randn(1, 16, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    features = torch.randn(1, 5, model.config.connector.inner_dim, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model.velocity(latent, SIGMA, model.preprocess_text_embeds(features, unprocessed=True), 24.0)


def load(*paths, **kwargs):
    with torch.inference_mode():
        return load_dit(list(paths), **kwargs)


@pytest.fixture(scope="module", params=["2.0", "2.3"])
def plain(request, tmp_path_factory):
    """(version, path of a float32 safetensors transformer with bare names, its velocity)."""
    version = request.param
    path = tmp_path_factory.mktemp("plain") / "dit.safetensors"
    save_file(dit_tensors(version), path, config_metadata(version))
    return version, path, velocity(load(path))


@pytest.mark.parametrize(
    "prefix, architecture",
    [
        ("", "ltxv"),
        ("", "ltx2"),
        ("", "ltxav"),
        ("", "pig"),
        ("", "cow"),
        ("", None),
        ("model.diffusion_model.", None),
        ("diffusion_model.", "ltxv"),
        ("some.wrapper.", "ltxv"),
    ],
)
def test_any_prefix_and_architecture_key_load_alike(tmp_path, plain, prefix, architecture):
    version, _, expected = plain
    tensors = {prefix + name: value for name, value in dit_tensors(version).items()}
    path = write_gguf(tmp_path / "a.gguf", tensors, "F32", config_metadata(version), architecture)
    assert ref.relative_error(velocity(load(path)), expected) < 2e-2  # tables are stored as BF16


@pytest.mark.parametrize("fmt", ["Q8_0", "Q5_1", "Q4_0", "Q4_1", "Q5_0", "Q4_K", "Q5_K", "Q6_K"])
def test_packed_weights_give_the_velocity_of_their_dequantised_values(tmp_path, fmt):
    tensors, metadata = dit_tensors(head_dim=128), config_metadata(head_dim=128)
    packed = load(write_gguf(tmp_path / "a.gguf", tensors, fmt, metadata))
    file = open_weights(tmp_path / "a.gguf")
    save_file(
        {name: file.load(name, torch.float32).contiguous() for name in file.names()},
        tmp_path / "dense.safetensors",
        metadata,
    )
    assert (
        tensor.is_packed(packed.transformer_blocks[0].attn1.to_q.weight)
        and tensor.format_of(packed.transformer_blocks[0].ff.net[2].weight).name == fmt
    )
    assert not tensor.is_packed(packed.video_embeddings_connector.learnable_registers)
    assert ref.relative_error(velocity(packed), velocity(load(tmp_path / "dense.safetensors"))) < 1e-5


def test_plain_parameters_are_dense_whatever_their_type(tmp_path):
    tensors = dit_tensors()
    kinds = {
        name: "Q8_0" if value.shape[-1] % 32 == 0 else "F32" for name, value in tensors.items()
    }  # norms, biases and tables too
    with GGUFWriter(
        tmp_path / "a.gguf",
        config_metadata(),
        [(name, kinds[name], tuple(value.shape)) for name, value in tensors.items()],
    ) as writer:
        for name, value in tensors.items():
            writer.write(name, decode.quantize(value.reshape(-1, value.shape[-1]), FORMATS[kinds[name]]))
    model = load(tmp_path / "a.gguf", dtype=torch.bfloat16)
    dense = {name: p for name, p in model.named_parameters() if not tensor.is_packed(p)}
    assert {
        "scale_shift_table",
        "transformer_blocks.0.prompt_scale_shift_table",
        CONNECTOR + "learnable_registers",
        "transformer_blocks.1.attn1.q_norm.weight",
        "proj_out.bias",
    } <= set(dense)
    assert dense["scale_shift_table"].dtype == torch.float32 and dense["proj_out.bias"].dtype == torch.bfloat16
    assert all(p.ndim == 2 and name.endswith(".weight") for name, p in model.named_parameters() if name not in dense)


def test_dense_weights_stay_views_of_the_file_when_no_cast_is_needed(tmp_path):
    save_file(dit_tensors(), tmp_path / "a.safetensors", config_metadata())
    model = load(tmp_path / "a.safetensors", dtype=torch.float32)
    file, source = model.weight_sources["transformer_blocks.0.attn1.to_q.weight"]
    assert model.transformer_blocks[0].attn1.to_q.weight.data_ptr() == file.load(source).data_ptr()


@versions
def test_the_sound_stream_is_dropped_at_the_header_and_the_log_says_what_that_saved(tmp_path, version, caplog):
    tensors = dit_tensors(version, audio=True)
    path = tmp_path / "av.safetensors"
    save_file(
        {"model.diffusion_model." + name: value for name, value in tensors.items()}, path, config_metadata(version)
    )
    video = tmp_path / "v.safetensors"
    save_file(dit_tensors(version), video, config_metadata(version))
    with caplog.at_level(logging.INFO):
        model = load(path)
    sound = sum(value.nbytes for name, value in tensors.items() if name not in dit_tensors(version))
    assert f"sound tensors skipped, {sound / 1e9:.2f} GB not read" in caplog.text
    assert torch.equal(velocity(model), velocity(load(video)))


def test_dropped_bytes_are_never_read(tmp_path, monkeypatch):
    tensors = dit_tensors(audio=True)
    save_file(tensors, tmp_path / "av.safetensors", config_metadata())
    from ltx2_gguf.ltx2_core.files.safetensors import SafetensorsFile

    read, original = [], SafetensorsFile.tensor
    monkeypatch.setattr(SafetensorsFile, "tensor", lambda self, name: read.append(name) or original(self, name))
    load(tmp_path / "av.safetensors")
    assert sorted(read) == sorted(dit_tensors())


def split(version="2.3"):
    tensors = dit_tensors(version)
    return (
        {name: value for name, value in tensors.items() if not name.startswith(CONNECTOR)},
        {name: value for name, value in tensors.items() if name.startswith(CONNECTOR)},
    )


@versions
@pytest.mark.parametrize(
    "spelling",
    ["video_embeddings_connector.", "embeddings_connector.", "model.diffusion_model.video_embeddings_connector."],
)
def test_the_connector_may_be_in_another_file(tmp_path, version, spelling):
    dit, connector = split(version)
    write_gguf(tmp_path / "dit.gguf", dit, "F32", config_metadata(version))
    save_file(
        {name.replace(CONNECTOR, spelling): value for name, value in connector.items()},
        tmp_path / "connector.safetensors",
    )
    save_file(dit_tensors(version), tmp_path / "whole.safetensors", config_metadata(version))
    expected = velocity(load(tmp_path / "whole.safetensors"))
    for order in (("dit.gguf", "connector.safetensors"), ("connector.safetensors", "dit.gguf")):
        assert ref.relative_error(velocity(load(*(tmp_path / name for name in order))), expected) < 2e-2


def test_a_full_checkpoint_serves_as_connector_file(tmp_path):
    dit, _ = split()
    write_gguf(tmp_path / "dit.gguf", dit, "Q8_0", config_metadata())
    full = synthetic.make(tmp_path / "full.safetensors", small(), audio=True, type="f32")
    model = load(tmp_path / "dit.gguf", full)
    assert model.weight_sources[CONNECTOR + "learnable_registers"][0].path == full
    assert model.weight_sources["patchify_proj.weight"][0].path == tmp_path / "dit.gguf"


def test_a_missing_connector_is_an_error_that_names_the_file_and_the_input(tmp_path):
    dit, _ = split()
    path = write_gguf(tmp_path / "light.gguf", dit, "Q8_0", config_metadata())
    with pytest.raises(
        CheckpointError,
        match=r"light.gguf holds the LTX-2.3 transformer but no embeddings connector.*'connector_file' of 'LTX-2 GGUF Loader'",
    ):
        load(path)
    model = load(path, require_connector=False)
    with pytest.raises(ValueError, match="no embeddings connector was loaded"):
        model.preprocess_text_embeds(torch.zeros(1, 3, 64), unprocessed=True)


def test_a_connector_given_twice_is_an_error(tmp_path):
    save_file(dit_tensors(), tmp_path / "dit.safetensors", config_metadata())
    save_file(split()[1], tmp_path / "connector.safetensors")
    with pytest.raises(CheckpointError, match="is in 2 of the files"):
        load(tmp_path / "dit.safetensors", tmp_path / "connector.safetensors")
    load(tmp_path / "dit.safetensors", tmp_path / "dit.safetensors")  # the same file twice is one file


def test_missing_tensors_are_reported_with_count_first_five_and_reason(tmp_path):
    tensors = {
        name: value
        for name, value in dit_tensors().items()
        if ".attn2.q_norm" not in name and ".attn2.to_v" not in name
    }
    save_file(tensors, tmp_path / "a.safetensors", config_metadata())
    with pytest.raises(
        WeightsMismatch,
        match=r"6 tensors are missing \(first: transformer_blocks.0.attn2.q_norm.weight, .*incomplete, or its conversion dropped",
    ) as error:
        load(tmp_path / "a.safetensors")
    assert len(error.value.missing) == 6


def test_an_unknown_extra_tensor_is_a_warning_as_long_as_nothing_is_missing(tmp_path, caplog):
    extra = {"transformer_blocks.0.attn3.to_q.weight": torch.zeros(2, 2), "new_embedding": torch.zeros(3)}
    save_file(dit_tensors() | extra, tmp_path / "a.safetensors", config_metadata())
    model = load_dit(tmp_path / "a.safetensors", require_connector=False)
    assert (
        "a.safetensors: 2 tensors are not part of LTX-2.3 and without effect (first: transformer_blocks.0.attn3.to_q.weight"
        in caplog.text
    )
    assert not set(extra) & set(model.weight_sources)
    lacking = {name: value for name, value in (dit_tensors() | extra).items() if name != "proj_out.bias"}
    save_file(lacking, tmp_path / "b.safetensors", config_metadata())
    with pytest.raises(WeightsMismatch, match="1 tensor is missing .*proj_out.bias.*2 tensors are unexpected"):
        load_dit(tmp_path / "b.safetensors", require_connector=False)


def test_a_half_connector_is_blamed_on_the_connector(tmp_path):
    tensors = {
        name: value
        for name, value in dit_tensors().items()
        if not name.startswith(CONNECTOR + "transformer_1d_blocks.1.ff")
    }
    save_file(tensors, tmp_path / "a.safetensors", config_metadata())
    with pytest.raises(WeightsMismatch, match="The embeddings connector is incomplete"):
        load(tmp_path / "a.safetensors")


def test_metadata_of_another_model_is_an_error(tmp_path):
    save_file(dit_tensors(), tmp_path / "a.safetensors", synthetic.metadata(structure.Geometry.real("2.3")))
    with pytest.raises((ConfigError, CheckpointError), match="the tensors say .*the file's config metadata says"):
        load(tmp_path / "a.safetensors")


def test_fp8_scaled_transformers_load_through_the_same_path(tmp_path, plain):
    version, _, expected = plain
    tensors = {}
    for name, value in dit_tensors(version).items():
        if value.ndim == 2 and name.endswith(".weight") and name.startswith("transformer_blocks."):
            scale = value.abs().amax() / 448
            tensors |= {
                name: (value / scale).to(torch.float8_e4m3fn),
                name.removesuffix("weight") + "weight_scale": scale,
            }
        else:
            tensors[name] = value
    save_file(
        {"model.diffusion_model." + name: value for name, value in tensors.items()},
        tmp_path / "fp8.safetensors",
        config_metadata(version),
    )
    assert 1e-4 < ref.relative_error(velocity(load(tmp_path / "fp8.safetensors")), expected) < 0.2


def test_diffusers_files_load_through_the_same_path(tmp_path, plain):
    """The reverse renaming of a checkpoint, sharded, loads to the same model."""
    version, _, expected = plain
    dit = {ref._diffusers_name(name): value for name, value in split(version)[0].items()}
    synthetic.save_sharded(tmp_path / "transformer", dit, config_metadata(version))
    save_file({name.replace(CONNECTOR, "video_connector.").replace("transformer_1d_blocks", "transformer_blocks").replace("q_norm", "norm_q").replace("k_norm", "norm_k"): value
               for name, value in split(version)[1].items()}, tmp_path / "connectors.safetensors")  # fmt: skip
    assert (
        ref.relative_error(velocity(load(tmp_path / "transformer", tmp_path / "connectors.safetensors")), expected)
        < 1e-5
    )


def test_the_connector_loads_alone(tmp_path, plain):
    _, path, _ = plain
    with torch.inference_mode():
        connector, model = load_connector(path), load(path)
        x = torch.randn(1, 4, connector.config.inner_dim)
        assert torch.equal(connector(x)[0], model.video_embeddings_connector(x)[0])


@versions
def test_inspect_tells_what_a_full_checkpoint_holds(tmp_path, version):
    report = identify(
        open_weights(synthetic.make(tmp_path / "full.safetensors", small(version), audio=True, type="bf16"))
    )
    assert report and report.kind == "checkpoint" and report.version == version
    assert set(report.parts) == {"dit", "connector", "projection", "vae"} and report.missing == ("gemma",)
    assert (
        report.audio_bytes > 0
        and any("only with sound on" in note for note in report.notes)
        and set(report.audio_parts)
        == {"dit", "connector", "vae", "vocoder"} | ({"projection"} if version == "2.3" else set())
        and len(report.inputs) == 4
    )


PARTS = {
    "connector": lambda version: split(version)[1],
    "projection": lambda version: {
        "text_embedding_projection." + n: torch.zeros(s)
        for n, s in structure.projection_shapes(small(version), audio=version == "2.3").items()
    },
    "vae": lambda version: {n: torch.zeros(s) for n, s in structure.vae_shapes(small(version)).items()},
}


@versions
@pytest.mark.parametrize("part", PARTS)
def test_parts_in_files_of_their_own_are_named_and_sent_to_their_input(tmp_path, version, part):
    save_file(PARTS[part](version), tmp_path / "part.safetensors")
    report = identify(open_weights(tmp_path / "part.safetensors"))
    assert (
        report
        and report.kind == part
        and report.version == version
        and len(report.inputs) == 1
        and f"{part}_file" in report.inputs[0]
    )
    with pytest.raises(
        CheckpointError,
        match=f"No LTX-2 video transformer was given: part.safetensors is LTX-2.* and belongs in '{part}_file'",
    ):
        load(tmp_path / "part.safetensors")


def test_the_real_gemma_is_recognised(gemma_gguf):
    report = identify(open_weights(gemma_gguf))
    assert report and report.kind == "gemma" and report.config.width == 640 and "12B" in report.notes[0]
    with pytest.raises(CheckpointError, match="is Gemma-3 270M text encoder and belongs in 'gemma_file'"):
        load(gemma_gguf)


def test_a_gemma_safetensors_is_recognised_under_the_hosts_names(tmp_path):
    names = {
        "model.embed_tokens.weight": (64, 32), "model.norm.weight": (32,), "model.layers.0.self_attn.q_norm.weight": (8,), "model.layers.0.self_attn.k_norm.weight": (8,),
        "model.layers.0.self_attn.q_proj.weight": (16, 32), "model.layers.0.self_attn.k_proj.weight": (8, 32), "model.layers.0.mlp.gate_proj.weight": (64, 32),
        "model.layers.0.pre_feedforward_layernorm.weight": (32,), "vision_model.embeddings.patch_embedding.weight": (4, 3, 2, 2), "spiece_model": (10,),
    }  # fmt: skip
    save_file({name: torch.zeros(shape) for name, shape in names.items()}, tmp_path / "gemma.safetensors")
    assert identify(open_weights(tmp_path / "gemma.safetensors")).kind == "gemma"


def test_a_gemma_3_that_carries_its_projection_is_not_taken_for_ltx_2_5(tmp_path):
    tensors = {
        "model.embed_tokens.weight": torch.zeros(64, 32), "model.norm.weight": torch.zeros(32), "model.layers.0.self_attn.q_norm.weight": torch.zeros(8),
        "model.layers.0.self_attn.q_proj.weight": torch.zeros(16, 32), "model.layers.0.self_attn.k_proj.weight": torch.zeros(8, 32),
        "model.layers.0.mlp.gate_proj.weight": torch.zeros(64, 32), "model.layers.0.pre_feedforward_layernorm.weight": torch.zeros(32),
        "text_embedding_projection.video_aggregate_embed.weight": torch.zeros(8, 64), "text_embedding_projection.video_aggregate_embed.bias": torch.zeros(8),
    }  # fmt: skip
    save_file(tensors, tmp_path / "te.safetensors")
    report = identify(open_weights(tmp_path / "te.safetensors"))
    assert report.kind == "gemma" and report.has("projection") and report.version == "2.3" and len(report.inputs) == 2
    save_file(tensors | {"model.layers.0.layer_scalar": torch.zeros(1)}, tmp_path / "te.safetensors")
    report = identify(open_weights(tmp_path / "te.safetensors"))
    assert (
        report.kind == "gemma"
        and report.version == "2.5"
        and "Gemma-4" in report.title
        and "LTX-2.5 text projection" in report.title
    )


def ltx25(change):
    tensors = dit_tensors()
    change(tensors)
    return tensors


def with_ltx09(captions=4096):
    tensors = dit_tensors("2.0")
    tensors["caption_projection.linear_1.weight"] = torch.zeros(64, captions)
    return {name: value for name, value in tensors.items() if not name.startswith(CONNECTOR)}


def named(*names, shape=(2, 2)):
    return lambda: {name: torch.zeros(shape) for name in names}


# what a user may pick by mistake -> (tensors, words the refusal must contain)
STRANGERS = {
    "LTX-2.5 without feed-forward biases": (
        lambda: ltx25(
            lambda t: [
                t.pop(n)
                for n in list(t)
                if n.endswith("ff.net.0.proj.bias") and "transformer_blocks" in n and CONNECTOR not in n
            ]
        ),
        "LTX-2.5 transformer",
    ),
    "LTX-2.5 with keyframe embedding": (
        lambda: ltx25(lambda t: t.update(keyframes_abs_pos_embedding=torch.zeros(1, 64))),
        "LTX-2.5 transformer",
    ),
    "LTX-2.5 with a duration head": (
        lambda: ltx25(lambda t: t.update({"duration_head.weight": torch.zeros(2, 2)})),
        "LTX-2.5 transformer",
    ),
    "LTX-2.5 without prompt modulation": (
        lambda: ltx25(lambda t: [t.pop(n) for n in list(t) if n.startswith("prompt_adaln_single")]),
        "LTX-2.5 transformer with text attention that can be cached",
    ),
    "LTX-2.5 text encoder": (
        named("model.layers.0.self_attn.q_proj.weight", "text_embedding_projection.video_aggregate_embed.weight"),
        "LTX-2.5 text encoder",
    ),
    "LTX-Video 0.9": (with_ltx09, "LTX-Video 0.9 model"),
    "Wan": (
        named("blocks.0.self_attn.q.weight", "blocks.0.cross_attn.k.weight", "head.modulation"),
        "a Wan video model",
    ),
    "Flux": (
        named("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight", "img_in.weight"),
        "a Flux image model",
    ),
    "HunyuanVideo": (
        named("txt_in.individual_token_refiner.blocks.0.norm1.weight", "double_blocks.0.img_attn_qkv.weight"),
        "a HunyuanVideo model",
    ),
    "Stable Diffusion": (
        named("model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.decoder.conv_in.weight"),
        "a Stable Diffusion or SDXL model",
    ),
    "SD3": (named("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"), "a Stable Diffusion 3 model"),
    "Qwen-Image": (
        named("transformer_blocks.0.img_mlp.net.0.proj.weight", "transformer_blocks.0.txt_mlp.net.0.proj.weight"),
        "a Qwen-Image model",
    ),
    "T5": (named("encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"), "a T5 text encoder"),
    "CLIP": (named("text_model.encoder.layers.0.self_attn.q_proj.weight"), "a CLIP text encoder"),
    "Gemma 2": (
        named("model.layers.0.self_attn.q_proj.weight", "model.layers.0.pre_feedforward_layernorm.weight"),
        "a Gemma 2 text model",
    ),
    "Llama": (
        named("model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.gate_proj.weight"),
        "a language model",
    ),
    "an SD VAE": (
        named("decoder.up_blocks.0.resnets.0.conv1.weight", "decoder.conv_in.weight"),
        "a Stable Diffusion or Flux VAE",
    ),
    "a Wan VAE": (named("decoder.middle.0.residual.0.gamma", "decoder.conv1.weight"), "a Wan or Qwen-Image VAE"),
    "a latent upscaler": (
        named("post_upsample_res_blocks.0.conv1.weight", "upsampler.0.weight", "initial_conv.weight"),
        "a latent upscaler",
    ),
    "a preview autoencoder": (named("decoder.22.bias", "encoder.0.weight"), "a tiny preview autoencoder"),
}


@pytest.mark.parametrize("what", STRANGERS)
def test_a_file_this_pack_cannot_run_is_refused_with_its_right_name_and_what_would_run_it(tmp_path, what):
    tensors, words = STRANGERS[what]
    save_file(tensors(), tmp_path / "picked.safetensors")
    report = identify(open_weights(tmp_path / "picked.safetensors"))
    assert (
        not report
        and words in report.refusal
        and "picked.safetensors" in report.refusal
        and "What runs it: " in report.refusal
    )
    with pytest.raises(CheckpointError, match="picked.safetensors is "):
        load(tmp_path / "picked.safetensors")


@pytest.mark.parametrize(
    "architecture, words",
    [
        ("gemma2", "a Gemma 2 text model"),
        ("gemma4", "a Gemma 4 text model"),
        ("llama", "a Llama text model"),
        ("clip", "vision part (mmproj)"),
        ("t5encoder", "a T5 text encoder"),
    ],
)
def test_gguf_text_models_are_named_by_their_architecture(tmp_path, architecture, words):
    path = write_gguf(
        tmp_path / "m.gguf",
        {"blk.0.attn_q.weight": torch.zeros(2, 32), "blk.0.attn_q_norm.weight": torch.zeros(32)},
        "F32",
        architecture=architecture,
    )
    report = identify(open_weights(path))
    assert not report and words in report.refusal


def test_an_mmproj_without_its_architecture_is_recognised(tmp_path):
    path = write_gguf(
        tmp_path / "m.gguf",
        {"v.blk.0.attn_q.weight": torch.zeros(2, 32), "mm.input_projection.weight": torch.zeros(2, 32)},
        "F32",
        architecture=None,
    )
    assert "mmproj" in identify(open_weights(path)).refusal


def test_model_version_2_5_in_the_header_is_refused(tmp_path):
    save_file(dit_tensors(), tmp_path / "a.safetensors", {"model_version": "2.5.0"})
    assert "LTX-2.5" in identify(open_weights(tmp_path / "a.safetensors")).refusal
    save_file(dit_tensors(), tmp_path / "a.safetensors", {"model_version": "2.3.0"})
    assert identify(open_weights(tmp_path / "a.safetensors"))


def test_a_file_that_is_nothing_known_lists_what_it_has(tmp_path):
    save_file({"alpha": torch.zeros(1), "beta": torch.zeros(1)}, tmp_path / "a.safetensors")
    report = identify(open_weights(tmp_path / "a.safetensors"))
    assert report.kind == "unknown" and "alpha, beta" in report.refusal


@pytest.mark.parametrize(
    "style", ["diffusion_model.{}.lora_A.weight", "{}.lora_up.weight", "base_model.model.{}.lora_A.default.weight"]
)
def test_a_lora_is_named_and_sent_to_the_lora_loader(tmp_path, style):
    layers = ("transformer_blocks.0.attn1.to_q", "transformer_blocks.0.audio_attn1.to_q")
    save_file({style.format(layer): torch.zeros(2, 2) for layer in layers}, tmp_path / "lora.safetensors")
    report = identify(open_weights(tmp_path / "lora.safetensors"))
    assert (
        report.kind == "lora"
        and "2 layers, 1 of them of the sound stream" in report.title
        and "lora_name" in report.inputs[0]
    )
    with pytest.raises(CheckpointError, match="belongs in 'lora_name'"):
        load(tmp_path / "lora.safetensors")


def test_a_damaged_transformer_is_refused_by_name(tmp_path):
    tensors = dit_tensors()
    tensors["transformer_blocks.0.scale_shift_table"] = torch.zeros(7, 64)
    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match="odd.safetensors: Unknown LTX variant: 7-row"):
        load(tmp_path / "odd.safetensors")


def test_every_row_of_the_table_of_strangers_says_what_runs_it():
    assert all(row.what and row.runs and row.patterns for row in unsupported.TABLE)


def test_a_quantisation_nobody_here_reads_is_refused_by_name(tmp_path):
    tensors = dit_tensors()
    name = "transformer_blocks.0.attn1.to_q"
    tensors[name + ".weight_scale"] = torch.ones(1)
    tensors[name + ".comfy_quant"] = torch.tensor(
        list(json.dumps({"format": "convrot_w4a4"}).encode()), dtype=torch.uint8
    )
    save_file(tensors, tmp_path / "w4a4.safetensors", config_metadata())
    with pytest.raises(WeightFileError, match="is stored as convrot_w4a4, which this pack does not read"):
        load(tmp_path / "w4a4.safetensors")


def test_the_hosts_four_bit_floats_are_decoded_when_loaded(tmp_path, plain):
    from comfy_kitchen.tensor import QuantizedTensor

    version, _, expected = plain
    tensors = {}
    for name, value in dit_tensors(version).items():
        if ".ff.net.2.weight" in name and not name.startswith(CONNECTOR):
            packed = QuantizedTensor.from_float(value, "TensorCoreNVFP4Layout")
            tensors |= {name.removesuffix("weight") + suffix: part.clone() for suffix, part in (
                ("weight", packed._qdata), ("weight_scale", packed._params.block_scale.view(torch.float8_e4m3fn)), ("weight_scale_2", packed._params.scale),
                ("comfy_quant", torch.tensor(list(json.dumps({"format": "nvfp4"}).encode()), dtype=torch.uint8)),
            )}  # fmt: skip
        else:
            tensors[name] = value
    save_file(tensors, tmp_path / "fp4.safetensors", config_metadata(version))
    assert 1e-3 < ref.relative_error(velocity(load(tmp_path / "fp4.safetensors")), expected) < 0.3
