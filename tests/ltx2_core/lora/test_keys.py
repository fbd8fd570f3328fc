"""Keys of LoRA files: every spelling means the same layers, and a file says what it is for."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_spellings as ls
from ltx2_gguf.ltx2_core.files import structure
from ltx2_gguf.ltx2_core.files.names import diffusers_name
from ltx2_gguf.ltx2_core.files.structure import DIT_PREFIX, PROJECTION_PREFIX, Geometry
from ltx2_gguf.ltx2_core.files.weights import open_weights
from ltx2_gguf.ltx2_core.loading.identify import identify
from ltx2_gguf.ltx2_core.loading.lora import open_lora
from ltx2_gguf.ltx2_core.lora.file import LoraError, LoraFile, nothing_fits
from ltx2_gguf.ltx2_core.lora.keys import LoraNames, is_lora, read_key


def all_layers(version):
    """Every layer with a matrix in the real transformer, sound included."""
    names = structure.checkpoint_shapes(Geometry.real(version), audio=True, vae=False, projection=False)
    return [
        n.removeprefix(DIT_PREFIX).removesuffix(".weight")
        for n, s in names.items()
        if n.startswith(DIT_PREFIX) and n.endswith(".weight") and len(s) == 2
    ]


def save(tmp_path, tensors, metadata=None, name="lora.safetensors"):
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / name, metadata=metadata)
    return tmp_path / name


@pytest.mark.parametrize("version", ["2.0", "2.3"])
@pytest.mark.parametrize("spelling", ls.SPELLINGS)
def test_every_layer_of_the_model_is_found_under_every_spelling(spelling, version):
    down, up = ls.SPELLINGS[spelling][1]
    for layer in all_layers(version):
        for matrix, standard in (
            (down, "lora_A" if "A" in down else "lora_down"),
            (up, "lora_B" if "B" in up else "lora_up"),
        ):
            key = read_key(f"{ls.spell(layer, spelling)}.{matrix}")
            assert (key.layer, key.standard) == (layer, f"diffusion_model.{layer}.{standard}.weight"), key
            assert key.kind == ("audio" if "audio" in layer or layer.startswith("av_ca_") else "video")
            assert key.host is (
                spelling in ls.HOST_READS
                or (
                    diffusers_name(layer) == layer
                    and ls.spell(layer, spelling) in (layer, "lora_unet_" + layer.replace(".", "_"))
                )
            )


def test_diffusers_own_conversion_is_understood():
    """What diffusers makes of the released spelling is read as the released spelling."""
    convert = pytest.importorskip(
        "diffusers.loaders.lora_conversion_utils"
    )._convert_non_diffusers_ltx2_lora_to_diffusers
    for version in ("2.0", "2.3"):
        for layer in all_layers(version):
            released = f"diffusion_model.{layer}.lora_A.weight"
            (theirs,) = convert({released: None})
            assert read_key(theirs).standard == released
    for projection in ("aggregate_embed", "video_aggregate_embed"):
        released = f"text_embedding_projection.{projection}.lora_B.weight"
        (theirs,) = convert({released: None}, "text_embedding_projection")
        assert read_key(theirs).standard == released and read_key(theirs).kind == "projection"


def test_full_checkpoints_in_diffusers_names_have_the_same_table():
    """The class that holds the weights in diffusers names its modules as ``diffusers_name`` does."""
    models = pytest.importorskip("diffusers")
    if not hasattr(models, "LTX2VideoTransformer3DModel"):
        pytest.skip("this diffusers has no LTX-2")
    with torch.device("meta"):
        network = models.LTX2VideoTransformer3DModel(num_layers=1)
    theirs = {name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)}
    ours = {
        diffusers_name(layer)
        for layer in all_layers("2.0")
        if "connector" not in layer and (layer.split(".")[1:2] == ["0"] or "blocks" not in layer)
    }
    assert theirs - ours == set(), "layers of diffusers' network that no key of ours means"


@pytest.mark.parametrize(
    "written, matrix",
    [("lora_magnitude_vector", "dora_scale"), ("lora_magnitude_vector.default.weight", "dora_scale"), ("dora_scale", "dora_scale"), ("lokr_w1", "lokr_w1"),
     ("lokr_w2_a", "lokr_w2_a"), ("hada_w1_a", "hada_w1_a"), ("alpha", "alpha"), ("lora_mid.weight", "lora_mid.weight"), ("diff_b", "diff_b"), ("a1.weight", "a1.weight")],
)  # fmt: skip
def test_other_matrices_keep_their_names(written, matrix):
    key = read_key(f"transformer.transformer_blocks.3.attn1.to_q.{written}")
    assert key.standard == f"diffusion_model.transformer_blocks.3.attn1.to_q.{matrix}"


def test_layers_are_counted_by_what_they_belong_to():
    names = LoraNames([
        *ls.lora(), "text_embedding_projection.aggregate_embed.lora_A.weight", "text_encoders.gemma3_12b.transformer.model.layers.1.mlp.up_proj.lora_A.weight",
        "diffusion_model.transformer_blocks.0.attn9.to_q.lora_A.weight", "something",
    ])  # fmt: skip
    assert {kind: len(names.layers(kind)) for kind in ("video", "audio", "projection", "text", "unknown")} == {
        "video": 7,
        "audio": 2,
        "projection": 1,
        "text": 1,
        "unknown": 2,
    }
    assert (
        names.counted()
        == "7 of 13 layers applied, 2 audio layers skipped, 1 text projection layer skipped, 1 text encoder layer skipped"
    )
    assert names.counted(6).startswith("6 of 13 layers applied")
    assert names.layers("unknown") == ["transformer_blocks.0.attn9.to_q", "something"]
    assert (
        read_key("diffusion_model.transformer_blocks.0.attn9.to_q.lora_A.weight").standard
        == "diffusion_model.transformer_blocks.0.attn9.to_q.lora_A.weight"
    )


@pytest.mark.parametrize(
    "name",
    ["transformer_blocks.0.attn1.to_q.weight", "decoder.conv_in.conv.weight", "model.alpha", "blk.0.attn_q.weight"],
)
def test_other_files_are_no_lora(name):
    assert not is_lora([name])


# -- files -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ls.SPELLINGS)
def test_inspect_says_spelling_rank_version_and_node(tmp_path, spelling):
    report = identify(open_weights(save(tmp_path, ls.lora(spelling))))
    assert report.kind == "lora" and report.version == "2.3" and report.refusal is None
    assert "LoRA for an LTX-2.3 transformer, 9 layers, 2 of them of the sound stream" in report.title
    assert report.lora["rank"] == [4, 4] and report.lora["layers"]["video"] == 7 and report.lora["spelling"]
    assert "'lora_name' of 'LTX-2 GGUF LoRA Loader (Model)'" in report.inputs[0]
    assert len(report.inputs) == (2 if spelling in ls.HOST_READS else 1)
    assert any("ltx2-gguf lora" in note for note in report.notes) is (spelling not in ls.HOST_READS)


@pytest.mark.parametrize(
    "layers, metadata, version",
    [
        ({"transformer_blocks.0.attn1.to_q": (4096, 4096)}, {}, None),
        ({"transformer_blocks.0.attn1.to_gate_logits": (32, 4096)}, {}, "2.3"),
        ({"prompt_adaln_single.linear": (8192, 4096)}, {}, "2.3"),
        ({"caption_projection.linear_1": (4096, 3840)}, {}, "2.0"),
        ({"adaln_single.linear": (6 * 4096, 4096)}, {}, "2.0"),
        ({"adaln_single.linear": (9 * 4096, 4096)}, {}, "2.3"),
        ({ls.CONNECTOR_LAYER.replace("to_v", "to_q"): (3840, 3840)}, {}, "2.0"),
        ({ls.CONNECTOR_LAYER.replace("to_v", "to_q"): (4096, 4096)}, {}, "2.3"),
        ({"transformer_blocks.0.attn1.to_q": (4096, 4096)}, {"ss_base_model_version": "ltx2.3"}, "2.3"),
        ({"transformer_blocks.0.attn1.to_q": (4096, 4096)}, {"modelspec.architecture": "LTX-2-19b/lora"}, "2.0"),
    ],
)
def test_the_version_is_told_where_the_file_tells_it(tmp_path, layers, metadata, version):
    lora = LoraFile(open_weights(save(tmp_path, ls.lora(layers=layers, audio=False, rank=1), metadata)))
    assert lora.version() == version


FOREIGN = {
    "a Wan video model": [
        "diffusion_model.blocks.0.self_attn.q.lora_A.weight",
        "lora_unet_blocks_0_cross_attn_k.lora_down.weight",
    ],
    "Flux or HunyuanVideo": [
        "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight",
        "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight",
    ],
    "Stable Diffusion or SDXL": [
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight",
    ],
    "Qwen-Image": [
        "transformer_blocks.0.img_mlp.net.2.lora_A.weight",
        "transformer.transformer_blocks.0.attn.add_q_proj.lora_A.weight",
    ],
    "for a text encoder": ["text_encoders.gemma3_12b.transformer.model.layers.1.mlp.up_proj.lora_A.weight"],
    "sound stream only": ["diffusion_model.transformer_blocks.0.audio_attn1.to_q.lora_A.weight"],
    "text projection only": ["text_embedding_projection.aggregate_embed.lora_A.weight"],
    "does not know": ["mystery.layer.lora_A.weight"],
}


@pytest.mark.parametrize("words, keys", FOREIGN.items())
def test_a_lora_of_another_model_is_called_by_its_name(tmp_path, words, keys):
    for key in keys:
        path = save(tmp_path, {key: torch.zeros(2, 2)})
        assert words in nothing_fits(open_lora(path))
        report = identify(open_weights(path))
        assert report.kind == "lora" and words in (report.refusal or report.title)
        assert (report.refusal is None) is (words == "for a text encoder")


def test_what_is_no_lora_is_named_and_sent_to_its_place(tmp_path):
    path = save(tmp_path, {PROJECTION_PREFIX + "aggregate_embed.weight": torch.zeros(2, 2)})
    with pytest.raises(LoraError, match="is no LoRA but LTX-2 text projection; it belongs in 'projection_file'"):
        open_lora(path)


def test_several_adapters_in_one_file_are_refused(tmp_path):
    tensors = {
        f"base_model.model.transformer_blocks.0.attn1.to_q.lora_{m}.{name}.weight": torch.zeros(2, 2)
        for name in ("one", "two")
        for m in "AB"
    }
    lora = open_lora(save(tmp_path, tensors))
    with pytest.raises(LoraError, match="several adapters"):
        lora.check()
    assert "adapter one, two" in lora.names.spelling


# -- PEFT's settings in the header -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
def test_alpha_in_the_header_counts_unless_the_file_has_alphas_of_its_own(tmp_path, rslora):
    header = ls.peft_header(r=4, lora_alpha=8, alpha_pattern={"1.ff.net.2": 2, "proj_in": 4}, use_rslora=rslora)
    lora = open_lora(save(tmp_path, ls.lora("diffusers", alpha=None), header))
    root = 2.0 if rslora else 1.0
    alphas = lora.alphas()
    assert (
        alphas["transformer_blocks.0.attn1.to_q"] == 8 * root
        and alphas.get("transformer_blocks.1.ff.net.2", 4.0) == 2 * root
    )
    assert alphas.get("patchify_proj", 4.0) == 4 * root
    tensors = lora.standard(load_file(lora.path))
    assert tensors["diffusion_model.transformer_blocks.0.attn1.to_q.alpha"].item() == 8 * root
    own = open_lora(save(tmp_path, ls.lora("diffusers", alpha=1.0), header, "own.safetensors"))
    assert own.alphas() == {} and own.standard(load_file(own.path))["diffusion_model.patchify_proj.alpha"].item() == 1.0


@pytest.mark.parametrize("text", ["not json", "[]", "{}", json.dumps({"transformer.r": 4})])
def test_a_header_without_settings_changes_nothing(tmp_path, text):
    assert open_lora(save(tmp_path, ls.lora(alpha=None), {"lora_adapter_metadata": text})).alphas() == {}


def test_magnitudes_of_peft_become_the_hosts_columns(tmp_path):
    layer = "transformer_blocks.0.attn1.to_q"
    tensors = ls.lora("diffusers", {layer: (8, 8)}, audio=False) | {
        f"transformer.{layer}.lora_magnitude_vector": torch.arange(8.0)
    }
    lora = open_lora(save(tmp_path, tensors))
    assert lora.standard(tensors)[f"diffusion_model.{layer}.dora_scale"].shape == (8, 1) and lora.names.methods == [
        "DoRA"
    ]
