"""Every kind of file that circulates loads and computes what its numbers say, or is refused by its right name."""

import gguf
import numpy as np
import pytest
import torch

import wild_files
from ltx2_gguf.ltx2_core.cli import inspect_file
from ltx2_gguf.ltx2_core.convert import convert, synthetic
from ltx2_gguf.ltx2_core.files.names import classify
from ltx2_gguf.ltx2_core.files.weights import open_weights
from ltx2_gguf.ltx2_core.loading.text_encoder import TextEncoderError, load_text_encoder
from ltx2_gguf.ltx2_core.loading.transformer import CheckpointError, load_dit
from ltx2_gguf.ltx2_core.loading.vae import load_vae
from ltx2_gguf.quant.formats import FORMATS

GGUF_TRANSFORMERS = [wild.name for wild in wild_files.TRANSFORMERS if wild.name.endswith(".gguf")]
names = lambda wilds: [wild.name for wild in wilds]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return wild_files.Shelf(tmp_path_factory.mktemp("wild"))


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def rel(a, b):
    return ((a - b).norm() / b.norm()).item()


def velocity(model):
    """One call of the whole network, text features through the connector included."""

    def random(seed, *shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    context = model.preprocess_text_embeds(random(1, 1, 5, model.config.connector.inner_dim), unprocessed=True)
    return model.velocity(random(0, 1, 128, 2, 2, 3), 0.7, context, 24.0)


def load(shelf, name):
    return load_dit([shelf[name], *(shelf[companion] for companion in wild_files.CATALOGUE[name].needs)])


def decoded_by_gguf_py(path):
    """The file's tensors as the gguf package reads and decodes them."""
    result = {}
    for t in gguf.GGUFReader(path).tensors:
        shape = tuple(int(n) for n in reversed(t.shape))
        result[t.name] = torch.from_numpy(
            np.array(gguf.quants.dequantize(t.data, t.tensor_type), dtype=np.float32).reshape(shape)
        )
    return result


@pytest.mark.parametrize("name", names(wild_files.TRANSFORMERS))
def test_a_transformer_is_recognised_with_version_and_parts(shelf, name):
    wild, report = wild_files.CATALOGUE[name], inspect_file.inspect(shelf[name])
    assert (report.kind, report.version, report.refusal) == (wild.kind, wild.version, None)
    assert set(report.parts) == set(wild.parts)
    assert set(report.missing) == {"dit", "connector", "projection", "vae", "gemma"} - set(wild.parts)


@pytest.mark.parametrize("name", GGUF_TRANSFORMERS)
def test_a_transformer_computes_what_its_numbers_decoded_by_gguf_py_say(shelf, tmp_path, name):
    """Any mix of types on any tensor, any prefix, with or without metadata: the velocity is that of the decoded file in float32."""
    tensors = decoded_by_gguf_py(shelf[name])
    sorted_names = classify(tensors)
    dense = {
        canonical: tensors[source] for part in ("dit", "connector") for canonical, source in sorted_names[part].items()
    }
    version = wild_files.CATALOGUE[name].version
    synthetic.save_safetensors(tmp_path / "dense.safetensors", dense, synthetic.metadata(wild_files.geometry(version)))
    companions = [shelf[companion] for companion in wild_files.CATALOGUE[name].needs]
    expected = velocity(load_dit([tmp_path / "dense.safetensors", *companions]))
    assert rel(velocity(load(shelf, name)), expected) < 1e-5


@pytest.mark.parametrize("name", [n for n in GGUF_TRANSFORMERS if "video" not in n])
def test_without_its_sound_a_file_computes_exactly_the_same(shelf, tmp_path, name):
    convert.strip(shelf[name], tmp_path / "video.gguf")
    companions = [shelf[companion] for companion in wild_files.CATALOGUE[name].needs]
    assert not classify(open_weights(tmp_path / "video.gguf").names())["audio"]
    assert torch.equal(velocity(load_dit([tmp_path / "video.gguf", *companions])), velocity(load(shelf, name)))


@pytest.mark.parametrize("name", [n for n in names(wild_files.TRANSFORMERS) if n.endswith(".safetensors")])
def test_safetensors_transformers_load_through_the_same_path(shelf, name):
    version = wild_files.CATALOGUE[name].version
    exact = velocity(load(shelf, "ltx-2.3-22b-dev.safetensors" if version == "2.3" else "ltx-2-19b-dev.safetensors"))
    assert rel(velocity(load(shelf, name)), exact) < (0.15 if "fp8" in name else 1e-6)


def test_every_format_that_can_be_decoded_stands_in_some_file(shelf):
    used = set()
    for name in (*GGUF_TRANSFORMERS, *(wild.name for wild in wild_files.COMPANIONS if wild.kind == "gemma")):
        weights = open_weights(shelf[name])
        used |= {weights.format(tensor) for tensor in weights.names()}
    assert {fmt for fmt in FORMATS if not fmt.startswith("I") or fmt.startswith("IQ")} - {"F64"} <= used


@pytest.mark.parametrize("name", [wild.name for wild in wild_files.TRANSFORMERS if wild.needs])
def test_a_transformer_without_its_connector_says_which_file_to_add(shelf, name):
    with pytest.raises(CheckpointError, match="no embeddings connector.*also give the file"):
        load_dit(shelf[name])


@pytest.mark.parametrize(
    "connector",
    [
        "connector.safetensors",
        "connector-official-spelling.safetensors",
        "ltx-2.3-22b-dev.safetensors",
        "ltx2-full-checkpoint-Q8_0.gguf",
    ],
)
def test_the_connector_comes_from_whatever_file_holds_it(shelf, connector):
    light = shelf["LTX-2.3-22B-distilled-1.1-Q8_0_light.gguf"]
    expected = velocity(load_dit([light, shelf["connector.safetensors"]]))
    assert rel(velocity(load_dit([light, shelf[connector]])), expected) < (
        0.05 if connector.endswith(".gguf") else 1e-6
    )


@pytest.mark.parametrize("name", names(wild_files.COMPANIONS))
def test_a_companion_is_recognised_and_sent_to_its_input(shelf, name):
    wild, report = wild_files.CATALOGUE[name], inspect_file.inspect(shelf[name])
    assert (report.kind, report.version, report.refusal) == (wild.kind, wild.version, None)
    assert set(report.parts) == set(wild.parts) and len(report.inputs) == max(1, len(wild.parts))


@pytest.mark.parametrize("gemma", [wild.name for wild in wild_files.COMPANIONS if wild.kind == "gemma"])
@pytest.mark.parametrize(
    "projection",
    [
        "ltx-2.3_text_projection_bf16.safetensors",
        "ltx-2-19b-embeddings_connector_dev_bf16.safetensors",
        "ltx2-full-checkpoint-Q8_0.gguf",
        "ltx-2.3-video-q4_0.gguf",
    ],
)
def test_gemma_and_projection_make_a_text_encoder_in_either_order(shelf, gemma, projection):
    features = [
        load_text_encoder(*files).encode("a red kite")
        for files in ((shelf[gemma], shelf[projection]), (shelf[projection], shelf[gemma]))
    ]
    assert torch.equal(*features) and features[0].shape[2] == 256 and features[0].shape[1] > 5
    assert torch.isfinite(features[0]).all() and features[0].std() > 0.05


@pytest.mark.parametrize(
    "name",
    [wild.name for wild in wild_files.COMPANIONS if wild.kind == "vae"]
    + ["ltx2-full-checkpoint-Q8_0.gguf", "ltx-2.3-22b-dev.safetensors", "ltx-2-video-q5_1.gguf"],
)
def test_a_vae_decodes_wherever_it_is(shelf, name):
    version = wild_files.CATALOGUE[name].version
    vae = load_vae(shelf[name], dtype=torch.float32)
    latent = torch.randn(1, 128, 2, 2, 2, generator=torch.Generator().manual_seed(2))
    reference = load_vae(
        shelf["LTX23_video_vae_bf16.safetensors" if version == "2.3" else "LTX2_video_vae_bf16.safetensors"],
        dtype=torch.float32,
    )
    pixels = vae.decode(latent)
    assert pixels.shape == (1, 3, 9, 64, 64)
    # A synthetic GGUF is made from float32 values, the safetensors from bfloat16 ones.
    assert rel(pixels, reference.decode(latent)) < (1e-5 if name.endswith(".safetensors") else 0.03)


@pytest.mark.parametrize("name", names(wild_files.REFUSED))
def test_other_models_are_refused_by_their_right_name(shelf, name):
    wild, report = wild_files.CATALOGUE[name], inspect_file.inspect(shelf[name])
    assert not report and report.kind == wild.kind
    assert wild.refused in report.refusal and name in report.refusal
    with pytest.raises(CheckpointError) as error:
        load_dit(shelf[name])
    assert wild.refused in str(error.value)


@pytest.mark.parametrize(
    "name",
    ["ltx-2.3-22b-dev-Q4_K_M.gguf", "LTX23_video_vae_bf16.safetensors", "mmproj-BF16.gguf", "Llama-3.2-3B-Q8_0.gguf"],
)
def test_files_that_are_no_text_encoder_are_refused_as_one(shelf, name):
    with pytest.raises(TextEncoderError, match=name.split(".")[0]):
        load_text_encoder(shelf[name], shelf["ltx-2.3_text_projection_bf16.safetensors"])


@pytest.mark.parametrize(
    "name",
    [
        "gemma-3-12b-it-Q4_K_M.gguf",
        "ltx-2.3_text_projection_bf16.safetensors",
        "LTX23_video_vae_bf16.safetensors",
        "connector.safetensors",
    ],
)
def test_a_right_file_in_the_wrong_place_is_told_where_it_belongs(shelf, name):
    with pytest.raises(CheckpointError, match="No LTX-2 video transformer was given.*belongs in"):
        load_dit(shelf[name])
