"""The CLIP object under the host's text nodes, and the companion files that ``auto`` finds."""

from collections import Counter

import pytest
import torch
from safetensors.torch import save_file

import host_models as hm
import tiny_gemma
from ltx2_gguf.ltx2_core.convert import synthetic
from ltx2_gguf.ltx2_core.files import structure
from ltx2_gguf.ltx2_core.loading.text_encoder import load_text_encoder
from ltx2_gguf.quant import tensor

pytestmark = pytest.mark.usefixtures("host")

SMALL = {"gemma_width": tiny_gemma.WIDTH, "gemma_layers": tiny_gemma.LAYERS}
PROMPT = "a red circle moves right"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Gemma, a full checkpoint, and the same model in parts."""
    path = tmp_path_factory.mktemp("files")
    tiny_gemma.write(path / "gemma.gguf")
    geometry = structure.Geometry.small("2.3", **SMALL)
    synthetic.make(path / "whole.gguf", geometry, type="q8_0")
    synthetic.make(path / "dit.gguf", geometry, type="q8_0", vae=False, projection=False, connector=False)
    synthetic.make(path / "whole.safetensors", geometry, type="bf16")
    return path


@pytest.fixture(scope="module")
def clip(host, folder):
    from ltx2_gguf.nodes.host import clip as host_clip

    return host_clip.load_clip(str(folder / "gemma.gguf"), str(folder / "whole.gguf"))


def encode(clip, prompt=PROMPT):
    import nodes

    with torch.inference_mode():
        return nodes.CLIPTextEncode().encode(clip, prompt)[0][0]


def test_the_conditioning_is_the_headless_encoders_features_and_says_that_connectors_are_still_to_run(clip, folder):
    features, extra = encode(clip)
    assert torch.equal(features, load_text_encoder(folder / "gemma.gguf", folder / "whole.gguf").encode(PROMPT))
    assert extra["unprocessed_ltxav_embeds"] is True and features.dtype == torch.float32
    assert hm.error(encode(clip, "a blue square")[0][:, -1], features[:, -1]) > 0.05


def test_a_prompt_that_is_too_long_is_cut_with_a_notice_that_says_where(clip, caplog):
    from ltx2_gguf.nodes.host.clip import TOKENS

    words = [f"word{number}" for number in range(1200)]
    assert len(clip.tokenize(" ".join(words))[TOKENS][0]) == 1024
    assert "tokens and the model reads 1024" in caplog.text and "was cut off" in caplog.text
    caplog.clear()
    clip.tokenize("short")
    assert not caplog.text


def test_a_clone_encodes_like_the_original_and_zeroing_out_keeps_the_flag(clip):
    import nodes

    with torch.inference_mode():
        assert torch.equal(encode(clip.clone())[0], encode(clip)[0])
        zero, extra = nodes.ConditioningZeroOut().zero_out([list(encode(clip))])[0][0]
    assert not zero.any() and extra["unprocessed_ltxav_embeds"] is True


def test_saving_a_text_encoder_is_refused_in_one_sentence(clip, tmp_path, monkeypatch):
    import folder_paths
    from comfy_extras.nodes_model_merging import CLIPSave

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    with torch.inference_mode(), pytest.raises(RuntimeError, match="cannot be saved by this node.*Keep the GGUF file"):
        CLIPSave().save(clip, "c")
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    "layer",
    ["gemma3_12b.transformer.model.layers.1.self_attn.q_proj", "text_embedding_projection.video_aggregate_embed"],
)
def test_a_lora_on_the_text_encoder_equals_the_lora_on_dequantised_weights_and_can_be_removed(clip, folder, layer):
    import comfy.sd

    from ltx2_gguf.nodes.host import clip as host_clip

    rows, columns = clip.cond_stage_model.get_submodule(layer).weight.shape
    generator = torch.Generator().manual_seed(4)
    lora = {
        f"text_encoders.{layer}.lora_A.weight": torch.randn(4, columns, generator=generator) * 0.2,
        f"text_encoders.{layer}.lora_B.weight": torch.randn(rows, 4, generator=generator) * 0.2,
    }
    dense = host_clip.load_clip(str(folder / "gemma.gguf"), str(folder / "whole.gguf"))
    plain = encode(clip)[0]
    with torch.inference_mode():
        for module in dense.cond_stage_model.modules():
            if tensor.is_packed(getattr(module, "weight", None)):
                module.weight = torch.nn.Parameter(tensor.unpack(module.weight), requires_grad=False)
        patched = [comfy.sd.load_lora_for_models(None, one, lora, 0.0, 0.7)[1] for one in (clip, dense)]
    assert all(len(one.patcher.patches) == 1 for one in patched)
    ours, expected = (encode(one)[0] for one in patched)
    assert hm.error(ours, expected) < 1e-3
    assert hm.error(ours, plain) > 1e-3
    assert torch.equal(encode(clip)[0], plain)


def test_only_the_rows_of_the_prompts_tokens_are_decoded(clip, monkeypatch):
    decoded = []
    original = tensor.QuantizedTensor.dequantize
    monkeypatch.setattr(
        tensor.QuantizedTensor, "dequantize", lambda self: decoded.append(tuple(self.shape)) or original(self)
    )
    encode(clip)
    assert (len(tiny_gemma.PIECES), tiny_gemma.WIDTH) not in decoded


@pytest.fixture
def model_folders(folder, tmp_path, monkeypatch):
    """Puts files of ``folder`` into fresh model folders of the host: ``place(key, name)``."""
    import folder_paths

    for key in ("diffusion_models", "text_encoders", "vae", "checkpoints"):
        (tmp_path / key).mkdir()
        monkeypatch.setitem(
            folder_paths.folder_names_and_paths, key, ([str(tmp_path / key)], folder_paths.supported_pt_extensions)
        )

    def place(key, name):
        target = tmp_path / key / name
        target.symlink_to(folder / name) if (folder / name).exists() else None
        return str(target)

    return place


def test_auto_takes_parts_from_the_model_file_itself_when_they_are_there(model_folders):
    from ltx2_gguf.nodes import companions

    with companions.Load() as load:
        model = load.model(model_folders("diffusion_models", "whole.gguf"))
        gemma = load.open(model_folders("text_encoders", "gemma.gguf"))
        assert load.connectors(model, "auto") == []
        assert load.vae(model, "auto") is model
        assert load.projection(gemma, "auto") is model


def test_each_header_is_read_and_classified_once_per_load(model_folders, monkeypatch):
    """Also while the folders are searched: the file that is found there is handed on open."""
    from ltx2_gguf.ltx2_core.files import opened, safetensors
    from ltx2_gguf.ltx2_core.loading import identify as identify_module
    from ltx2_gguf.nodes import companions
    from ltx2_gguf.nodes.loaders import LTX2GGUFLoader, LTX2GGUFTextEncoder
    from ltx2_gguf.quant.gguf import reader

    counts = Counter()

    def counted(owner, name, label, file_of):
        original = getattr(owner, name)

        def wrapper(*args, **kwargs):
            counts[label, file_of(*args)] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapper)

    counted(reader.GGUFFile, "_read_header", "header", lambda file: file.name)
    counted(safetensors, "read_header", "header", lambda name, *_: name)
    counted(opened, "classify", "classified", len)
    counted(identify_module, "_identify", "identified", lambda file: file.name)
    model_folders("diffusion_models", "dit.gguf"), model_folders("checkpoints", "whole.safetensors")
    model_folders("text_encoders", "gemma.gguf")
    for again in (False, True):
        companions._reports.clear() if not again else None
        counts.clear()
        LTX2GGUFLoader.execute("dit.gguf", "exact", "auto", "auto")
        model = dict(counts)
        counts.clear()
        LTX2GGUFTextEncoder.execute("gemma.gguf", "auto", "default")
        assert max(model.values()) == 1 and max(counts.values()) == 1
        assert {name for label, name in model if label == "header"} >= {"dit.gguf", "whole.safetensors"}
        assert {name for label, name in counts if label == "header"} >= {"gemma.gguf", "whole.safetensors"}


def test_a_bad_file_in_the_folders_is_skipped_with_one_warning(model_folders, tmp_path, caplog):
    from ltx2_gguf.nodes import companions
    from ltx2_gguf.nodes.loaders import LTX2GGUFLoader, LTX2GGUFTextEncoder

    (
        model_folders("diffusion_models", "dit.gguf"),
        model_folders("checkpoints", "whole.safetensors"),
        model_folders("text_encoders", "gemma.gguf"),
    )
    (tmp_path / "checkpoints" / "dangling.safetensors").symlink_to(tmp_path / "nowhere")
    (tmp_path / "vae" / "cut.gguf").write_bytes((tmp_path / "diffusion_models" / "dit.gguf").read_bytes()[:5000])
    (tmp_path / "vae" / "empty.safetensors").write_bytes(b"")
    (tmp_path / "vae" / "noise.safetensors").write_bytes(bytes(range(256)) * 8)
    companions._reports.clear()
    for _ in range(2):
        LTX2GGUFLoader.execute("dit.gguf", "exact", "auto", "auto")
        LTX2GGUFTextEncoder.execute("gemma.gguf", "auto", "default")
    skipped = Counter(
        record.getMessage().split(" is skipped: ")[0]
        for record in caplog.records
        if " is skipped: " in record.getMessage()
    )
    assert {"cut.gguf": 1, "empty.safetensors": 1, "noise.safetensors": 1}.items() <= skipped.items()
    assert max(skipped.values()) == 1


def test_wrong_models_are_refused_before_their_parts_are_looked_for(model_folders, folder, tmp_path):
    from ltx2_gguf.ltx2_core.loading.transformer import CheckpointError
    from ltx2_gguf.nodes.loaders import LTX2GGUFLoader

    shapes = structure.dit_shapes(structure.Geometry.small("2.3", **SMALL))
    newer = {name: torch.zeros(shape) for name, shape in shapes.items() if not name.endswith("ff.net.0.proj.bias")}
    captions = {"caption_projection.linear_1.weight": torch.zeros(8, 4096)}
    older = {name: torch.zeros(shape) for name, shape in shapes.items()} | captions
    for label, tensors, words in (("newer", newer, "LTX-2.5"), ("older", older, "LTX-Video 0.9")):
        save_file(tensors, tmp_path / "diffusion_models" / f"{label}.safetensors")
        with pytest.raises(CheckpointError, match=f"{label}.safetensors is an {words}"):
            LTX2GGUFLoader.execute(f"{label}.safetensors", "exact", "auto", "auto")


def test_a_vae_of_another_version_is_named(model_folders, folder):
    from ltx2_gguf.ltx2_core.loading.transformer import CheckpointError
    from ltx2_gguf.nodes.loaders import LTX2GGUFLoader

    synthetic.make(folder / "old-vae.safetensors", structure.Geometry.small("2.0", **SMALL), type="bf16")
    model_folders("diffusion_models", "whole.gguf"), model_folders("vae", "old-vae.safetensors")
    with pytest.raises(
        CheckpointError, match="old-vae.safetensors holds the video VAE of LTX-2, but the model is LTX-2.3"
    ):
        LTX2GGUFLoader.execute("whole.gguf", "exact", "auto", "old-vae.safetensors")


def test_auto_finds_missing_parts_in_other_files_and_the_model_runs_with_them(model_folders):
    from ltx2_gguf.nodes.loaders import LTX2GGUFLoader

    model_folders("diffusion_models", "dit.gguf"), model_folders("checkpoints", "whole.safetensors")
    with torch.inference_mode():
        patcher, vae = LTX2GGUFLoader.execute("dit.gguf", "exact", "auto", "auto").args
        assert vae.decode(torch.zeros(1, 128, 1, 2, 2)).shape == (1, 1, 64, 64, 3)
    assert torch.isfinite(hm.ksample(patcher, hm.latent(), steps=1)).all()


def test_auto_says_what_to_download_when_a_part_is_nowhere(model_folders):
    from ltx2_gguf.ltx2_core.loading.transformer import CheckpointError
    from ltx2_gguf.nodes import companions

    with companions.Load() as load:
        model = load.model(model_folders("diffusion_models", "dit.gguf"))
        gemma = load.open(model_folders("text_encoders", "gemma.gguf"))
        with pytest.raises(CheckpointError, match="dit.gguf contains no embeddings connectors.*models/text_encoders"):
            load.connectors(model, "auto")
        with pytest.raises(CheckpointError, match="No file in your folders has a text projection.*gemma.gguf"):
            load.projection(gemma, "auto")
        assert load.vae(model, "auto") is None


def test_projections_for_two_versions_are_not_guessed_between(model_folders, folder):
    from ltx2_gguf.ltx2_core.loading.transformer import CheckpointError
    from ltx2_gguf.nodes import companions

    old = folder / "old.safetensors"
    if not old.exists():
        synthetic.make(old, structure.Geometry.small("2.0", **SMALL), type="bf16")
    model_folders("checkpoints", "old.safetensors"), model_folders("diffusion_models", "whole.gguf")
    with companions.Load() as load:
        gemma = load.open(model_folders("text_encoders", "gemma.gguf"))
        with pytest.raises(
            CheckpointError, match=r"two versions: old.safetensors \(LTX-2.0\) and whole.gguf \(LTX-2.3\); choose"
        ):
            load.projection(gemma, "auto")
        assert load.projection(gemma, "whole.gguf").name == "whole.gguf"


def test_a_replaced_file_is_loaded_again(model_folders, folder, tmp_path):
    from ltx2_gguf.nodes.loaders import LTX2GGUFLoader

    target = tmp_path / "diffusion_models" / "model.gguf"
    target.write_bytes((folder / "dit.gguf").read_bytes())
    before = LTX2GGUFLoader.fingerprint_inputs("model.gguf", "exact", "auto", "auto")
    assert LTX2GGUFLoader.fingerprint_inputs("model.gguf", "exact", "auto", "auto") == before
    target.write_bytes((folder / "whole.gguf").read_bytes())
    assert LTX2GGUFLoader.fingerprint_inputs("model.gguf", "exact", "auto", "auto") != before


def test_the_fingerprint_of_auto_is_the_file_it_resolves_to(model_folders, tmp_path):
    from ltx2_gguf.nodes.loaders import LTX2GGUFLoader, LTX2GGUFTextEncoder

    model_folders("diffusion_models", "dit.gguf"), model_folders("text_encoders", "gemma.gguf")

    def fingerprints():
        return LTX2GGUFLoader.fingerprint_inputs(
            "dit.gguf", "exact", "auto", "auto"
        ), LTX2GGUFTextEncoder.fingerprint_inputs("gemma.gguf", "auto", "default")

    without = fingerprints()
    assert "contains no embeddings connectors" in without[0][0] and "has a text projection" in without[1][0]
    (tmp_path / "vae" / "unrelated.safetensors").write_bytes(b"noise")
    assert fingerprints() == without
    model_folders("checkpoints", "whole.safetensors")
    found = fingerprints()
    assert [entry[0].rsplit("/", 1)[-1] for entry in found[0]] == ["dit.gguf", "whole.safetensors", "whole.safetensors"]
    assert [entry[0].rsplit("/", 1)[-1] for entry in found[1] if entry] == ["gemma.gguf", "whole.safetensors"]
    assert fingerprints() == found


@pytest.mark.parametrize("output, refused", [(1, True), (0, False)])
def test_a_missing_vae_stops_the_loader_only_when_something_takes_it(
    model_folders, folder, monkeypatch, output, refused
):
    from types import SimpleNamespace

    from ltx2_gguf.nodes.host import model as host_model
    from ltx2_gguf.nodes.loaders import LTX2GGUFLoader

    lone = folder / "lone.gguf"
    if not lone.exists():
        synthetic.make(lone, structure.Geometry.small("2.3", **SMALL), type="q8_0", vae=False, projection=False)
    model_folders("diffusion_models", "lone.gguf")
    loaded = []
    monkeypatch.setattr(host_model, "load_model", lambda *args, **options: loaded.append(args))
    graph = {"7": {"inputs": {"model_file": "lone.gguf"}}, "9": {"inputs": {"vae": ["7", output], "tile_size": 0}}}
    monkeypatch.setattr(LTX2GGUFLoader, "hidden", SimpleNamespace(prompt=graph, unique_id="7"))
    if refused:
        with pytest.raises(RuntimeError, match="lone.gguf contains no video VAE"):
            LTX2GGUFLoader.execute("lone.gguf", "exact", "auto", "auto")
    else:
        LTX2GGUFLoader.execute("lone.gguf", "exact", "auto", "auto")
    assert bool(loaded) is not refused


def test_the_nodes_and_the_headless_pipeline_make_the_same_frames(host, folder, model_folders):
    """Text to video with official guidance and a first frame, node by node, against ``LTX2Pipeline`` on the same files."""
    from comfy_extras.nodes_lt import EmptyLTXVLatentVideo, LTXVConditioning

    import nodes
    from ltx2_gguf.ltx2_core.pipeline import ImageInput, LTX2Pipeline
    from ltx2_gguf.nodes.conditioning import LTX2GGUFImageCondition
    from ltx2_gguf.nodes.decode import LTX2GGUFDecode
    from ltx2_gguf.nodes.loaders import LTX2GGUFLoader, LTX2GGUFTextEncoder
    from ltx2_gguf.nodes.sampling import LTX2GGUFSampler

    image = torch.randint(0, 256, (1, 50, 70, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    headless = LTX2Pipeline.from_files(folder / "whole.gguf", folder / "gemma.gguf").generate(
        PROMPT,
        negative_prompt="blur",
        width=96,
        height=64,
        frames=9,
        fps=24.0,
        steps=2,
        seed=5,
        images=[ImageInput(image[0].numpy(), 0, 0.8)],
        image_crf=33,
    )
    model_folders("diffusion_models", "whole.gguf"), model_folders("text_encoders", "gemma.gguf")
    with torch.inference_mode():
        model, vae = LTX2GGUFLoader.execute("whole.gguf", "exact", "auto", "auto").args
        clip = LTX2GGUFTextEncoder.execute("gemma.gguf", "auto", "default").args[0]
        positive, negative = (nodes.CLIPTextEncode().encode(clip, text)[0] for text in (PROMPT, "blur"))
        positive, negative = LTXVConditioning.execute(positive, negative, 24.0).args
        latent = EmptyLTXVLatentVideo.execute(96, 64, 9).args[0]
        latent, positive, negative = LTX2GGUFImageCondition.execute(
            vae, latent, image.float() / 255, 0, 0.8, 33, "auto", positive, negative
        ).args
        samples = LTX2GGUFSampler.execute(
            model, positive, negative, latent, 5, 2, 3.0, "ltx2", "official", "euler", 1.0, "", 0.7
        ).args[0]
        frames = LTX2GGUFDecode.execute(samples, vae, 0).args[0]
    assert frames.shape == headless.shape == (9, 64, 96, 3)
    assert (frames - headless).abs().max() < 2e-3
    assert hm.error(frames, headless) < 1e-4


@pytest.mark.parametrize("form, layout", [("float8_e4m3fn", "TensorCoreFP8Layout"), ("nvfp4", "TensorCoreNVFP4Layout")])
def test_a_text_encoder_in_the_hosts_own_quantised_form_gives_what_its_decoded_weights_give(
    clip, folder, tmp_path, form, layout
):
    """fp8 and fp4 safetensors as the host's templates use them, through the same layers as GGUF weights."""
    import json

    from comfy_kitchen.tensor import QuantizedTensor, get_layout_class

    from ltx2_gguf.ltx2_core.files.opened import open_model
    from ltx2_gguf.ltx2_core.text.tokenizer import sentencepiece_model
    from ltx2_gguf.nodes.host import clip as host_clip

    source = open_model(folder / "gemma.gguf")
    spiece = sentencepiece_model(
        tiny_gemma.PIECES, [-float(i) for i in range(len(tiny_gemma.PIECES))], tiny_gemma.TYPES
    )
    stored, decoded = ({"spiece_model": torch.frombuffer(bytearray(spiece), dtype=torch.uint8)} for _ in range(2))
    for name, theirs in source.gemma.items():
        value = source.weights.load(theirs, torch.float32)
        value = value - 1 if value.ndim == 1 else value
        stored[name] = decoded[name] = value.clone()
        if value.ndim == 2 and "embed_tokens" not in name:
            with torch.no_grad():
                packed = QuantizedTensor.from_float(value, layout)
            decoded[name] = packed.dequantize().clone()
            del stored[name]
            stored |= {
                name + suffix: part.clone()
                for suffix, part in get_layout_class(layout).state_dict_tensors(packed._qdata, packed._params).items()
            }
            stored[name.removesuffix("weight") + "comfy_quant"] = torch.tensor(
                list(json.dumps({"format": form}).encode()), dtype=torch.uint8
            )
    results, sizes = [], []
    for label, tensors in (("quantised", stored), ("decoded", decoded)):
        save_file(tensors, tmp_path / f"{label}.safetensors")
        one = host_clip.load_clip(str(tmp_path / f"{label}.safetensors"), str(folder / "whole.gguf"))
        results.append(encode(one)[0])
        sizes.append(one.patcher.model_size())
    assert sizes[0] < sizes[1], "the quantised file must stay quantised in memory"
    assert hm.error(*results) < 1e-4
    assert hm.error(results[0], encode(clip)[0]) < 0.5


def test_running_out_of_memory_is_tried_again_once_and_then_reported_with_what_it_takes(clip, monkeypatch):
    expected = encode(clip)[0]
    encoder = clip.cond_stage_model._encoder[0]
    original, failures = encoder.encode_ids, [True]

    def short_of_memory(*args, **kwargs):
        if failures.pop() if failures else False:
            raise torch.OutOfMemoryError("stand-in")
        return original(*args, **kwargs)

    monkeypatch.setattr(encoder, "encode_ids", short_of_memory)
    assert torch.equal(encode(clip)[0], expected)
    failures += [True, True]
    with pytest.raises(
        torch.OutOfMemoryError, match=r"twice while encoding a prompt of \d+ tokens, which takes about \d+\.\d GB"
    ):
        encode(clip)
    assert torch.equal(encode(clip)[0], expected)


@pytest.mark.parametrize(
    "mode",
    [
        {"sampling_mode": "off"},
        {
            "sampling_mode": "on",
            "temperature": 0.9,
            "top_k": 8,
            "top_p": 0.95,
            "min_p": 0.05,
            "repetition_penalty": 1.1,
            "seed": 3,
        },
    ],
)
@pytest.mark.parametrize("name", ["TextGenerate", "TextGenerateLTX2Prompt"])
def test_the_hosts_nodes_write_text_with_the_loaded_gemma(clip, folder, name, mode):
    """Node by node what the headless encoder writes from the same tokens and seed."""
    from comfy_extras import nodes_textgen

    from ltx2_gguf.ltx2_core.text.chat import chat_tokens
    from ltx2_gguf.ltx2_core.text.generate import Sampling

    node, seen = getattr(nodes_textgen, name), []
    original = clip.tokenizer.tokenize_with_weights
    clip.tokenizer.tokenize_with_weights = lambda text, *a, **k: seen.append(text) or original(text, *a, **k)
    try:
        with torch.inference_mode():
            text = node.execute(clip.clone(), PROMPT, 12, mode).args[0]
    finally:
        del clip.tokenizer.tokenize_with_weights
    encoder = load_text_encoder(folder / "gemma.gguf", folder / "whole.gguf")
    options = {k: v for k, v in mode.items() if k != "sampling_mode"}
    tokens = chat_tokens(encoder.tokenizer, seen[0])
    ids = encoder.generate(tokens, 12, Sampling(do_sample=mode["sampling_mode"] == "on", **options))
    expected = encoder.tokenizer.decode(ids)
    assert text in (expected, expected.strip() or PROMPT)
    assert PROMPT in seen[0] and len(tokens) > len(PROMPT.split())


def test_writing_is_cancelled_by_the_host_at_once(clip, monkeypatch):
    import comfy.model_management
    from comfy_extras.nodes_textgen import TextGenerate

    calls = []

    def interrupted():
        calls.append(1)
        if len(calls) == 3:
            raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", interrupted)
    with pytest.raises(comfy.model_management.InterruptProcessingException), torch.inference_mode():
        TextGenerate.execute(clip, PROMPT, 500, {"sampling_mode": "off"})
    assert len(calls) == 3


def test_tokens_of_a_chat_and_of_a_video_are_not_mixed_up(clip):
    with pytest.raises(ValueError, match="tokens are those of a video's prompt"):
        clip.generate(clip.tokenize("x"))
    with pytest.raises(ValueError, match="tokens of a chat"), torch.inference_mode():
        clip.encode_from_tokens(clip.tokenize("x", skip_template=False))


def test_what_gemma_cannot_look_at_is_said(clip):
    from comfy_extras.nodes_textgen import TextGenerate

    with pytest.raises(ValueError, match="no vision part"), torch.inference_mode():
        TextGenerate.execute(clip, PROMPT, 4, {"sampling_mode": "off"}, image=torch.zeros(1, 8, 8, 3))
    with pytest.raises(ValueError, match="disconnect 'video' and 'audio'"):
        TextGenerate.execute(clip, PROMPT, 4, {"sampling_mode": "off"}, video=torch.zeros(1, 8, 8, 3))


@pytest.mark.parametrize("names", ["llama.cpp", "host"])
def test_an_image_is_looked_at_with_the_vision_file(clip, folder, tmp_path, names):
    """An mmproj of small width beside Gemma: another image gives other features, and the node writes with it."""
    from comfy_extras.nodes_textgen import TextGenerate

    from ltx2_gguf.nodes.host import clip as host_clip

    tiny_gemma.write_vision(tmp_path / "mmproj.gguf", names)
    seeing = host_clip.load_clip(
        str(folder / "gemma.gguf"), str(folder / "whole.gguf"), vision_file=str(tmp_path / "mmproj.gguf")
    )
    encoder = seeing.cond_stage_model._encoder[0]
    pictures = [torch.rand(1, 40, 60, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    with torch.inference_mode():
        features = [encoder.vision(picture[0]) for picture in pictures]
        assert features[0].shape == (256, tiny_gemma.WIDTH) and hm.error(*features) > 0.01
        tokens = seeing.tokenize(PROMPT, image=pictures[0], skip_template=False)
        assert sum(isinstance(token, torch.Tensor) for token, _ in tokens["ltx2_gemma3_chat"][0]) == 1
        text = TextGenerate.execute(seeing, PROMPT, 4, {"sampling_mode": "off"}, image=pictures[0]).args[0]
    assert isinstance(text, str)
    assert torch.equal(encode(seeing)[0], encode(clip)[0]) and seeing.patcher.model_size() == clip.patcher.model_size()
