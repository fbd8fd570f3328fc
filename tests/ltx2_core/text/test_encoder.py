"""The text encoder from files: the real Gemma-3 270M against transformers, every form of file, every refusal."""

import json

import pytest
import torch
from safetensors.torch import save_file

from ltx2_gguf.ltx2_core.convert import synthetic
from ltx2_gguf.ltx2_core.files.comfy_quant import FORMATS as FORMATS_OF_THE_HOST
from ltx2_gguf.ltx2_core.files.gemma import is_norm
from ltx2_gguf.ltx2_core.files.structure import Geometry
from ltx2_gguf.ltx2_core.files.weights import WeightFileError, open_weights
from ltx2_gguf.ltx2_core.loading.text_encoder import TextEncoderError, load_text_encoder
from ltx2_gguf.ltx2_core.text.config import GemmaConfig
from ltx2_gguf.ltx2_core.text.gemma import GemmaModel
from ltx2_gguf.ltx2_core.text.tokenizer import sentencepiece_model
from ltx2_gguf.quant import decode, tensor
from ltx2_gguf.quant.formats import FORMATS

PROMPT = "A lighthouse at dusk, waves crashing against the rocks; the camera slowly pulls back."
WIDTH, FFN, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 64, 96, 2, 1, 32, 3


def rel(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def dense(module):
    """Replace every packed parameter by its decoded float32 values."""
    for child in module.modules():
        for name, p in child.named_parameters(recurse=False):
            if tensor.is_packed(p):
                setattr(child, name, torch.nn.Parameter(tensor.unpack(p, torch.float32), requires_grad=False))
    return module


# --- the real 270M file -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def projection_270m(tmp_path_factory):
    return synthetic.make(tmp_path_factory.mktemp("p") / "ltx.safetensors", Geometry.small("2.3"), vae=False)


@pytest.fixture(scope="module")
def encoder_270m(gemma_gguf, projection_270m):
    return load_text_encoder(gemma_gguf, projection_270m)


def transformers_270m(encoder):
    """transformers' model with the file's decoded weights; config as published for google/gemma-3-270m."""
    from transformers import Gemma3TextConfig, Gemma3TextModel

    config = Gemma3TextConfig(
        vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4, num_key_value_heads=1,
        head_dim=256, query_pre_attn_scalar=256, sliding_window=512, max_position_embeddings=32768, attn_implementation="eager",
    )  # fmt: skip
    assert [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"] == [5, 11, 17]
    with torch.device("meta"):
        model = Gemma3TextModel(config)
    state = {
        name.removeprefix("model."): (
            tensor.unpack(p, torch.float32) - 1 if is_norm(name) else tensor.unpack(p, torch.float32)
        ).clone()
        for name, p in encoder.gemma.named_parameters()
    }
    model.load_state_dict(state, assign=True)
    model.rotary_emb = type(model.rotary_emb)(config)
    model.embed_tokens.embed_scale = torch.tensor(640**0.5)
    return model.eval()


@pytest.mark.slow
def test_the_real_270m_gives_transformers_hidden_states_at_every_layer_also_beyond_the_sliding_window(encoder_270m):
    with torch.inference_mode():
        model = transformers_270m(encoder_270m)
        for prompt in (PROMPT, "", PROMPT * 34):
            ids = torch.tensor([encoder_270m.tokenizer.encode(prompt)])
            got = encoder_270m.gemma(ids)
            want = torch.stack(model(ids, output_hidden_states=True, use_cache=False).hidden_states)[:, 0]
            cosine = torch.nn.functional.cosine_similarity(got, want, dim=-1)
            assert got.shape == want.shape == (19, ids.shape[1], 640)
            assert cosine.min() > 0.99999
            assert max(rel(a, b) for a, b in zip(got, want)) < 2e-5
    assert ids.shape[1] > 512


@pytest.mark.slow
def test_packed_weights_give_what_their_decoded_weights_give(encoder_270m, gemma_gguf, projection_270m):
    packed = encoder_270m.encode(PROMPT)
    with torch.inference_mode():
        decoded = dense(load_text_encoder(gemma_gguf, projection_270m))
    assert not any(tensor.is_packed(p) for p in decoded.parameters())
    assert rel(packed, decoded.encode(PROMPT)) < 2e-5


def test_loading_copies_no_matrix(encoder_270m, gemma_gguf):
    weights = open_weights(gemma_gguf)
    sizes = [p._qdata.nbytes for p in encoder_270m.gemma.parameters() if tensor.is_packed(p)]
    assert len(sizes) == 18 * 7 + 1
    assert sum(sizes) == sum(weights.nbytes(n) for n in weights.names() if weights.format(n) != "F32")
    assert {tensor.format_of(p).name for p in encoder_270m.gemma.parameters() if tensor.is_packed(p)} == {
        "Q4_K",
        "Q5_0",
        "Q6_K",
        "Q8_0",
    }


def test_features_depend_on_the_prompt_and_have_one_row_per_token(encoder_270m):
    one, two = encoder_270m.encode("a red circle moves right"), encoder_270m.encode("a red circle moves left")
    assert one.shape == (1, 6, 256) and one.dtype == torch.float32 and torch.isfinite(one).all()
    assert rel(one[:, :-1], two[:, :-1]) < 1e-5 < 0.05 < rel(one[:, -1], two[:, -1])
    assert encoder_270m.encode("").shape == (1, 1, 256)
    assert encoder_270m.version == "2.3"


def test_names_of_parameters_are_the_hosts(encoder_270m):
    names = set(encoder_270m.state_dict())
    assert "gemma3_12b.transformer.model.layers.17.self_attn.q_proj.weight" in names
    assert "text_embedding_projection.video_aggregate_embed.bias" in names
    assert len(names) == 18 * 13 + 2 + 2


# --- small files of every form ------------------------------------------------------------------------------------------------------


def vocabulary():
    pieces = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        *[f"<0x{i:02X}>" for i in range(256)],
        *"abcdefghijklmnopqrstuvwxyz▁",
        "▁a",
        "th",
        "the",
        "▁the",
    ]
    return pieces, [-float(i) for i in range(len(pieces))], [3, 3, 3, 2, *[6] * 256, *[1] * (len(pieces) - 260)]


def small_gemma(layers=LAYERS):
    """Tensors of a small Gemma-3 under transformers' names, norms as ``w``."""
    g = torch.Generator().manual_seed(7)
    shapes = {"model.embed_tokens.weight": (len(vocabulary()[0]), WIDTH), "model.norm.weight": (WIDTH,)}
    for i in range(layers):
        p = f"model.layers.{i}."
        q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
        for name, shape in {
            "self_attn.q_proj": (q, WIDTH), "self_attn.k_proj": (kv, WIDTH), "self_attn.v_proj": (kv, WIDTH), "self_attn.o_proj": (WIDTH, q),
            "self_attn.q_norm": (HEAD_DIM,), "self_attn.k_norm": (HEAD_DIM,), "mlp.gate_proj": (FFN, WIDTH), "mlp.up_proj": (FFN, WIDTH),
            "mlp.down_proj": (WIDTH, FFN), "input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,),
            "pre_feedforward_layernorm": (WIDTH,), "post_feedforward_layernorm": (WIDTH,),
        }.items():  # fmt: skip
            shapes[f"{p}{name}.weight"] = shape
    return {n: torch.randn(s, generator=g) * (0.3 if is_norm(n) else s[-1] ** -0.5) for n, s in shapes.items()}


LLAMA_CPP = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
    "model.layers.": "blk.",
}  # fmt: skip


def write_gguf(path, tensors, architecture="gemma3", tokenizer=True, quant="Q8_0", embedding="F16", rename=True):
    """A GGUF as llama.cpp's converter writes it: its names, norms with the 1 added, matrices quantised."""
    import gguf

    writer = gguf.GGUFWriter(str(path), architecture)
    if tokenizer:
        pieces, scores, types = vocabulary()
        writer.add_tokenizer_model("llama")
        writer.add_token_list(pieces)
        writer.add_token_scores(scores)
        writer.add_token_types(types)
    for name, value in tensors.items():
        kind = "F32" if value.ndim == 1 else embedding if "embed_tokens" in name else quant
        value = (value + 1 if is_norm(name) and architecture == "gemma3" else value).float().numpy()
        for ours, theirs in LLAMA_CPP.items() if rename else ():
            name = name.replace(
                ours + ("" if ours.endswith(".") else ".weight"), theirs + ("" if ours.endswith(".") else ".weight")
            )
        qtype = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quants.quantize(value, qtype), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def spiece():
    return torch.frombuffer(bytearray(sentencepiece_model(*vocabulary())), dtype=torch.uint8)


def small_projection(width=WIDTH, states=LAYERS + 1, version="2.3", prefix="text_embedding_projection."):
    g = torch.Generator().manual_seed(8)
    if version == "2.0":
        return {f"{prefix}aggregate_embed.weight": torch.randn(width, width * states, generator=g) * 0.05}
    return {
        f"{prefix}video_aggregate_embed.weight": torch.randn(48, width * states, generator=g) * 0.05,
        f"{prefix}video_aggregate_embed.bias": torch.randn(48, generator=g),
        f"{prefix}audio_aggregate_embed.weight": torch.randn(24, width * states, generator=g) * 0.05,
        f"{prefix}audio_aggregate_embed.bias": torch.randn(24, generator=g),
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folder with a dense Gemma (safetensors) and a projection, and the features they give."""
    folder = tmp_path_factory.mktemp("text")
    save_file(small_gemma() | {"spiece_model": spiece()}, folder / "gemma.safetensors")
    save_file(small_projection(), folder / "projection.safetensors")
    return folder


@pytest.fixture(scope="module")
def features(files):
    return load_text_encoder(files / "gemma.safetensors", files / "projection.safetensors").encode("the cat")


def test_files_are_taken_in_any_order_alone_or_in_lists_twice_or_open(files, features):
    gemma, projection = files / "gemma.safetensors", files / "projection.safetensors"
    for given in (
        [projection, gemma],
        [[gemma, str(projection)]],
        [gemma, [gemma, projection], None],
        [open_weights(projection), gemma],
    ):
        assert torch.equal(load_text_encoder(*given).encode("the cat"), features)


@pytest.mark.parametrize(
    "prefix", ["language_model.model.", "model.language_model.", "text_encoders.gemma3_12b.transformer.model."]
)
def test_safetensors_prefixes_and_vision_parts_are_understood(files, features, tmp_path, prefix):
    tensors = {prefix + n.removeprefix("model."): v for n, v in small_gemma().items()}
    tensors |= {
        "vision_model.encoder.layers.0.self_attn.q_proj.weight": torch.zeros(4, 4),
        "multi_modal_projector.mm_soft_emb_norm.weight": torch.zeros(4),
    }
    save_file(tensors | {"spiece_model": spiece(), "lm_head.weight": torch.zeros(4, 4)}, tmp_path / "g.safetensors")
    assert torch.equal(
        load_text_encoder(tmp_path / "g.safetensors", files / "projection.safetensors").encode("the cat"), features
    )


def test_gemma_and_projection_in_one_file(features, tmp_path):
    save_file(small_gemma() | small_projection() | {"spiece_model": spiece()}, tmp_path / "both.safetensors")
    assert torch.equal(load_text_encoder(tmp_path / "both.safetensors").encode("the cat"), features)


def test_a_tokenizer_may_lie_beside_the_file_or_in_the_other_file(files, features, tmp_path):
    save_file(small_gemma(), tmp_path / "g.safetensors")
    save_file(small_projection() | {"spiece_model": spiece()}, tmp_path / "p.safetensors")
    assert torch.equal(
        load_text_encoder(tmp_path / "g.safetensors", tmp_path / "p.safetensors").encode("the cat"), features
    )
    with pytest.raises(TextEncoderError, match="g.safetensors.*no tokenizer.*tokenizer.model"):
        load_text_encoder(tmp_path / "g.safetensors", files / "projection.safetensors")
    (tmp_path / "tokenizer.model").write_bytes(spiece().numpy().tobytes())
    assert torch.equal(
        load_text_encoder(tmp_path / "g.safetensors", files / "projection.safetensors").encode("the cat"), features
    )


@pytest.mark.parametrize(
    "embedding, quant", [("F16", "Q8_0"), ("F32", "F32"), ("BF16", "BF16"), ("Q8_0", "Q4_0"), ("Q4_0", "Q5_1")]
)
def test_a_gguf_gives_what_the_same_values_give_dense(files, tmp_path, embedding, quant):
    """Norms with the 1 added, llama.cpp's names, any mix of formats: equal to transformers' form of the decoded values."""
    tensors = small_gemma()
    gguf_file = write_gguf(tmp_path / "g.gguf", tensors, quant=quant, embedding=embedding)
    rounded = {
        n: v if v.ndim == 1 else round_trip(v, embedding if "embed_tokens" in n else quant) for n, v in tensors.items()
    }
    save_file(rounded | {"spiece_model": spiece()}, tmp_path / "d.safetensors")
    got = load_text_encoder(gguf_file, files / "projection.safetensors").encode("the cat")
    assert (
        rel(got, load_text_encoder(tmp_path / "d.safetensors", files / "projection.safetensors").encode("the cat"))
        < 2e-5
    )


def round_trip(x, name):
    fmt = FORMATS[name]
    if not fmt.is_quantized:
        return x.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[name]).float()
    return decode.dequantize(decode.quantize(x, fmt), fmt)


@pytest.mark.parametrize("version", ["2.3", "2.0"])
def test_the_projection_may_be_in_a_checkpoint_of_either_version_and_container(files, tmp_path, version):
    geometry = Geometry.small(version, gemma_width=WIDTH, gemma_layers=LAYERS)
    made = [
        synthetic.make(tmp_path / f"c{i}.{kind}", geometry, type=type, vae=False, audio=i == 0)
        for i, (kind, type) in enumerate((("safetensors", "f32"), ("gguf", "f16"), ("gguf", "q8_0")))
    ]
    results = [load_text_encoder(files / "gemma.safetensors", path) for path in made]
    first = results[0].encode("the cat")
    assert results[0].version == version and first.shape[-1] == (256 if version == "2.3" else WIDTH)
    assert rel(results[1].encode("the cat"), first) < 1e-3 and rel(results[2].encode("the cat"), first) < 2e-2


def test_bfloat16_products_stay_close_and_keep_norms_in_float32(files, features):
    encoder = load_text_encoder(files / "gemma.safetensors", files / "projection.safetensors", dtype=torch.bfloat16)
    assert {p.dtype for n, p in encoder.gemma.named_parameters() if is_norm(n)} == {torch.float32}
    assert encoder.gemma.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert rel(encoder.encode("the cat"), features) < 2e-2


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_packed_weights_on_a_gpu_give_what_they_give_on_the_cpu(files, tmp_path, dtype, limit):
    given = (
        write_gguf(tmp_path / "g.gguf", small_gemma(), quant="Q5_1", embedding="Q8_0"),
        files / "projection.safetensors",
    )
    want = load_text_encoder(*given).encode("the cat")
    encoder = load_text_encoder(*given, device="cuda", dtype=dtype)
    got = encoder.encode("the cat")
    assert got.device.type == "cuda" and rel(got.cpu(), want) < limit
    with torch.inference_mode():
        encoder.gemma.model.embed_tokens.weight = torch.nn.Parameter(
            encoder.gemma.model.embed_tokens.weight.cpu(), requires_grad=False
        )
    assert torch.equal(encoder.encode("the cat"), got)  # the table may stay in main memory


@pytest.mark.parametrize("norms, packed", [("gguf", True), ("f32", False)])
def test_only_parameters_that_are_the_files_bytes_are_said_to_be(files, tmp_path, norms, packed):
    """A loader that reads weights straight from the file must not do so for norms that had the 1 added."""
    path = write_gguf(tmp_path / "g.gguf", small_gemma()) if packed else files / "gemma.safetensors"
    encoder = load_text_encoder(path, files / "projection.safetensors")
    named = {n for n, p in encoder.named_parameters() if packed or not is_norm(n)}
    assert set(encoder.weight_sources) == named
    for name, (weights, stored) in encoder.weight_sources.items():
        parameter = encoder.get_parameter(name)
        assert rel(tensor.unpack(parameter), weights.load(stored)) == 0


def test_the_hosts_operations_and_weight_access_are_used(host, files, features):
    import contextlib

    import comfy.ops

    used = []

    @contextlib.contextmanager
    def access(linear, device):
        used.append(type(linear))
        yield linear.weight, linear.bias

    encoder = load_text_encoder(
        files / "gemma.safetensors",
        files / "projection.safetensors",
        operations=comfy.ops.manual_cast,
        weight_access=access,
    )
    assert rel(encoder.encode("the cat"), features) < 1e-6
    assert used == [comfy.ops.manual_cast.Linear]
    assert isinstance(encoder.gemma.model.layers[0].input_layernorm, comfy.ops.manual_cast.RMSNorm)


def test_lora_keys_of_the_host_name_our_weights(host, files):
    import comfy.lora

    encoder = load_text_encoder(files / "gemma.safetensors", files / "projection.safetensors")
    keys = comfy.lora.model_lora_keys_clip(encoder, {})
    target = "gemma3_12b.transformer.model.layers.1.mlp.up_proj.weight"
    assert keys["text_encoders.gemma3_12b.transformer.model.layers.1.mlp.up_proj"] == target
    assert keys["text_encoders.transformer.model.layers.1.mlp.up_proj"] == target
    assert target in dict(encoder.named_parameters())


def quantise_like_the_host(tensors, kind, style):
    """(tensors as the host saves them, the decoded values) with every matrix of every layer quantised."""
    from comfy_kitchen.tensor import QuantizedTensor, get_layout_class

    form = FORMATS_OF_THE_HOST[kind]
    stored, decoded, layers = {}, dict(tensors), {}
    for name, value in tensors.items():
        if value.ndim == 1 or "embed_tokens" in name:
            stored[name] = value
            continue
        layer = name.removesuffix(".weight")
        packed = QuantizedTensor.from_float(value, form.layout)
        decoded[name] = packed.dequantize()
        for suffix, part in get_layout_class(form.layout).state_dict_tensors(packed._qdata, packed._params).items():
            stored[f"{name}{suffix}"] = (
                part.view(torch.uint8) if part.dtype == getattr(torch, "float8_e8m0fnu", None) else part
            )
        layers[layer] = {"format": kind}
        if style == "marker":
            stored[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(layers[layer]).encode()), dtype=torch.uint8)
        if style == "old":
            stored[f"{layer}.scale_weight"] = stored.pop(f"{name}_scale")
            stored[f"{layer}.scale_input"] = torch.ones(1)
    metadata = {"_quantization_metadata": json.dumps({"layers": layers})} if style == "header" else {}
    return stored, decoded, metadata


@pytest.mark.parametrize(
    "kind, style",
    [
        ("float8_e4m3fn", "marker"),
        ("float8_e4m3fn", "header"),
        ("float8_e4m3fn", "old"),
        ("nvfp4", "marker"),
        ("mxfp8", "marker"),
        ("int8_tensorwise", "marker"),
    ],
)
def test_the_hosts_quantised_files_give_what_their_decoded_weights_give(files, tmp_path, kind, style):
    from comfy_kitchen.tensor import QuantizedTensor

    stored, decoded, metadata = quantise_like_the_host(small_gemma(), kind, style)
    save_file(stored | {"spiece_model": spiece()}, tmp_path / "q.safetensors", metadata)
    save_file(decoded | {"spiece_model": spiece()}, tmp_path / "d.safetensors")
    encoder = load_text_encoder(tmp_path / "q.safetensors", files / "projection.safetensors")
    packed = (
        0 if kind == "int8_tensorwise" else LAYERS * 7
    )  # comfy-kitchen's INT8 products would round the activations too
    assert sum(isinstance(p, QuantizedTensor) for p in encoder.gemma.parameters()) == packed
    assert (
        rel(
            encoder.encode("the cat"),
            load_text_encoder(tmp_path / "d.safetensors", files / "projection.safetensors").encode("the cat"),
        )
        < 2e-5
    )


def test_fp8_with_a_scale_per_row_or_none_and_smoothed_layers_are_decoded_right(files, tmp_path):
    stored = small_gemma()
    decoded = dict(stored)
    table, up, down, gate = (
        "model.embed_tokens.weight",
        *(f"model.layers.0.mlp.{n}_proj.weight" for n in ("up", "down", "gate")),
    )
    rows = decoded[up].abs().amax(1) / 448
    stored[up], stored[up + "_scale"] = (decoded[up] / rows[:, None]).to(torch.float8_e4m3fn), rows
    decoded[up] = stored[up].float() * rows[:, None]
    for name in (down, table):
        stored[name] = decoded[name].to(torch.float8_e4m3fn)
        decoded[name] = stored[name].float()
    smoothing = torch.linspace(0.5, 2, WIDTH)
    stored[gate], stored[gate + "_scale"], stored[gate.replace("weight", "pre_quant_scale")] = (
        decoded[gate].to(torch.float8_e4m3fn),
        torch.tensor(1.0),
        smoothing,
    )
    decoded[gate] = stored[gate].float() * smoothing
    save_file(stored | {"spiece_model": spiece()}, tmp_path / "q.safetensors")
    save_file(decoded | {"spiece_model": spiece()}, tmp_path / "d.safetensors")
    got, want = (
        load_text_encoder(tmp_path / f"{f}.safetensors", files / "projection.safetensors").encode("the cat")
        for f in "qd"
    )
    assert rel(got, want) < 2e-5


def test_an_unknown_quantisation_is_refused_by_its_name(files, tmp_path):
    stored = small_gemma()
    stored["model.layers.0.mlp.up_proj.comfy_quant"] = torch.tensor(
        list(b'{"format": "svdquant_w4a4"}'), dtype=torch.uint8
    )
    save_file(stored | {"spiece_model": spiece()}, tmp_path / "q.safetensors")
    with pytest.raises(
        WeightFileError, match="q.safetensors: 'model.layers.0.mlp.up_proj.weight' is stored as svdquant_w4a4"
    ):
        load_text_encoder(tmp_path / "q.safetensors", files / "projection.safetensors")


def test_an_fp8_projection_is_read_too(files, features, tmp_path):
    stored = small_projection()
    name = "text_embedding_projection.video_aggregate_embed.weight"
    stored[name] = stored[name].to(torch.float8_e4m3fn)
    save_file(stored, tmp_path / "p.safetensors")
    assert (
        1e-4
        < rel(load_text_encoder(files / "gemma.safetensors", tmp_path / "p.safetensors").encode("the cat"), features)
        < 0.05
    )


# --- refusals -----------------------------------------------------------------------------------------------------------------------


def foreign_files(folder):
    t = torch.zeros(4, 4)
    small = small_gemma(1)
    gemma2 = {n: v for n, v in small.items() if "_norm" not in n.replace("layernorm", "")}
    llama = {n: v for n, v in gemma2.items() if "feedforward" not in n}

    def st(name, tensors):
        save_file(tensors, folder / name)
        return folder / name

    return {
        "mmproj gguf": (write_gguf(folder / "mmproj-BF16.gguf", {"v.blk.0.attn_q.weight": t, "mm.input_projection.weight": t}, "clip", False, "F32", rename=False), "mmproj-BF16.gguf is the vision part .mmproj"),
        "gemma 2 gguf": (write_gguf(folder / "gemma2.gguf", gemma2, "gemma2", quant="F32"), "gemma2.gguf is a Gemma 2"),
        "gemma 4 gguf": (write_gguf(folder / "gemma4.gguf", small, "gemma4", quant="F32"), "gemma4.gguf is a Gemma 4"),
        "llama gguf": (write_gguf(folder / "llama.gguf", llama, "llama", quant="F32"), "llama.gguf is a Llama"),
        "t5 gguf": (write_gguf(folder / "t5.gguf", {"enc.blk.0.attn_q.weight": t}, "t5encoder", quant="F32", rename=False), "t5.gguf is a T5"),
        "gemma 2": (st("gemma2.safetensors", gemma2), "gemma2.safetensors is a Gemma 2"),
        "llama": (st("llama.safetensors", llama), "llama.safetensors is a language model .Llama"),
        "t5": (st("t5.safetensors", {"encoder.block.0.layer.0.SelfAttention.q.weight": t}), "t5.safetensors is a T5"),
        "clip": (st("clip_l.safetensors", {"text_model.encoder.layers.0.self_attn.q_proj.weight": t}), "clip_l.safetensors is a CLIP"),
        "transformer": (synthetic.make(folder / "dit.safetensors", Geometry.small("2.3"), vae=False, projection=False), "dit.safetensors is the LTX-2.3 video transformer.*without a text projection.*full checkpoint"),
        "gemma 4 E4B": (st("gemma4-e4b.safetensors", small | {"model.layers.0.layer_scalar": t[0, :1].clone(), "model.layers.0.per_layer_input_gate.weight": t.clone()}), "gemma4-e4b.safetensors is a Gemma 4 text model"),
        "unknown": (st("x.safetensors", {"some.weight": t}), "x.safetensors is neither Gemma 3 nor an LTX-2 text projection .first tensors: some.weight"),
    }  # fmt: skip


KINDS = [
    "mmproj gguf",
    "gemma 2 gguf",
    "gemma 4 gguf",
    "llama gguf",
    "t5 gguf",
    "gemma 2",
    "llama",
    "t5",
    "clip",
    "transformer",
    "gemma 4 E4B",
    "unknown",
]


@pytest.fixture(scope="module")
def strangers(tmp_path_factory):
    return foreign_files(tmp_path_factory.mktemp("foreign"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_foreign_file_is_refused_by_its_right_name(files, strangers, kind):
    path, sentence = strangers[kind]
    other = "gemma.safetensors" if kind == "transformer" else "projection.safetensors"
    with pytest.raises(TextEncoderError, match=sentence) as error:
        load_text_encoder(path, files / other)  # the other file is always the right one
    assert "Gemma 3 12B" in str(error.value) or kind == "transformer"


def test_half_of_the_files_is_refused_with_what_to_add(files):
    with pytest.raises(
        TextEncoderError, match="gemma.safetensors holds Gemma 3 but no text projection; add a file.*full checkpoint"
    ):
        load_text_encoder(files / "gemma.safetensors")
    with pytest.raises(TextEncoderError, match="no Gemma 3 among the given files .projection.safetensors"):
        load_text_encoder(files / "projection.safetensors")
    with pytest.raises(TextEncoderError, match="no Gemma 3 among the given files .no file"):
        load_text_encoder()


def test_two_files_of_one_kind_are_refused_with_both_names(files, tmp_path):
    save_file(small_projection(), tmp_path / "second.safetensors")
    with pytest.raises(
        TextEncoderError, match="projection.safetensors and second.safetensors both hold a text projection"
    ):
        load_text_encoder(
            files / "gemma.safetensors", files / "projection.safetensors", tmp_path / "second.safetensors"
        )
    save_file(small_gemma(), tmp_path / "again.safetensors")
    with pytest.raises(TextEncoderError, match="both hold Gemma 3"):
        load_text_encoder(files / "gemma.safetensors", files / "projection.safetensors", tmp_path / "again.safetensors")


def test_a_projection_for_another_gemma_is_refused_with_both_sizes(files, tmp_path):
    save_file(small_projection(states=9), tmp_path / "other.safetensors")
    with pytest.raises(
        TextEncoderError,
        match=r"other.safetensors with gemma.safetensors.*takes 576 numbers per token, this Gemma gives 256",
    ):
        load_text_encoder(files / "gemma.safetensors", tmp_path / "other.safetensors")


def test_an_incomplete_gemma_is_refused_by_file_and_count(files, tmp_path):
    tensors = {n: v for n, v in small_gemma().items() if not n.endswith("layers.1.mlp.up_proj.weight")}
    save_file(tensors | {"spiece_model": spiece()}, tmp_path / "cut.safetensors")
    with pytest.raises(
        TextEncoderError, match="cut.safetensors.*1 tensor is missing.*layers.1.mlp.up_proj.weight.*incomplete"
    ):
        load_text_encoder(tmp_path / "cut.safetensors", files / "projection.safetensors")


def test_a_tokenizer_larger_than_the_embedding_table_is_refused(files, tmp_path):
    tensors = small_gemma()
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:100].clone()
    save_file(tensors | {"spiece_model": spiece()}, tmp_path / "g.safetensors")
    with pytest.raises(TextEncoderError, match="tokenizer has .* pieces and the embedding table 100 rows"):
        load_text_encoder(tmp_path / "g.safetensors", files / "projection.safetensors")


def test_a_gguf_without_tokenizer_or_with_another_kind_is_refused_by_file(files, tmp_path):
    path = write_gguf(tmp_path / "bare.gguf", small_gemma(), tokenizer=False)
    with pytest.raises(TextEncoderError, match="bare.gguf.*holds no tokenizer"):
        load_text_encoder(path, files / "projection.safetensors")


def test_the_model_itself_needs_no_files():
    """Every module can be built on meta from a config alone, as the host does before it assigns weights."""
    config = GemmaConfig.from_shapes({n: tuple(v.shape) for n, v in small_gemma().items()})
    assert {p.device.type for p in GemmaModel(config, device="meta").parameters()} == {"meta"}
    assert config.size_name == "3 layers of width 64"
