"""LoRA without the host: the numbers of the dequantised weights with the LoRA added, in every memory mode, and weights that stay as they are."""

import gc
import json
import struct
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lora_spellings as ls
import wild_files
from ltx2_gguf.ltx2_core import cli, media
from ltx2_gguf.ltx2_core.convert import synthetic
from ltx2_gguf.ltx2_core.convert.lora import rewrite
from ltx2_gguf.ltx2_core.loading.lora import attach_loras
from ltx2_gguf.ltx2_core.loading.transformer import load_dit
from ltx2_gguf.ltx2_core.lora import apply
from ltx2_gguf.ltx2_core.lora.file import LoraError
from ltx2_gguf.ltx2_core.offload import streamer
from ltx2_gguf.ltx2_core.pipeline import LTX2Pipeline
from ltx2_gguf.quant import low_rank, tensor

WIDTH, RANK = 256, 4
QUICK = {"width": 64, "height": 64, "frames": 9, "steps": 2, "cfg": 1.0, "stg": 0.0}
PROMPT = "a red kite"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    wild_files.gemma_gguf(folder / "gemma.gguf")
    for version in ("2.3", "2.0"):
        for kind in ("q4_0", "q8_0"):
            synthetic.make(
                folder / f"model-{version}-{kind}.gguf", wild_files.geometry(version, num_layers=4), type=kind
            )
    synthetic.make(folder / "model-2.3-bf16.safetensors", wild_files.geometry("2.3", num_layers=4), type="bf16")
    return folder


def save(tmp_path, tensors, metadata=None, name="lora.safetensors"):
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / name, metadata=metadata)
    return tmp_path / name


def layers(version="2.3"):
    return ls.video_layers(WIDTH, version)


def spelled(spelling="released", version="2.3", **options):
    return ls.lora(spelling, layers(version), **options)


def velocity(model, seed=0):
    def random(seed, *shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    with torch.inference_mode():
        context = model.preprocess_text_embeds(
            random(seed + 1, 1, 5, model.config.connector.inner_dim), unprocessed=True
        )
        return model.velocity(random(seed, 1, 128, 2, 2, 3), 0.7, context, 24.0)


def rel(a, b):
    return ((a - b).norm() / b.norm()).item()


def load(folder, kind="q8_0", version="2.3"):
    with torch.inference_mode():
        return load_dit(
            folder / (f"model-{version}-{kind}" + (".safetensors" if kind == "bf16" else ".gguf")), dtype=torch.float32
        )


def with_added(model, *changes):
    """The model with dense weights, to which the LoRAs (layer -> (up, down), factor) are added."""
    with torch.inference_mode():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight = nn.Parameter(tensor.unpack(module.weight).clone(), requires_grad=False)
        for matrices, factor in changes:
            for layer, (up, down) in matrices.items():
                model.get_submodule(layer).weight += factor * (up.float() @ down.float())
    return model


def stored(model):
    return {name: (p._qdata if hasattr(p, "_qdata") else p).clone() for name, p in model.named_parameters()}


@pytest.fixture(params=[True, False], ids=["beside the weights", "on the weights"])
def way(request, monkeypatch):
    monkeypatch.setattr(low_rank, "beside_is_cheaper", lambda *sizes: request.param)


# -- numbers -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version, kind", [("2.3", "q4_0"), ("2.3", "q8_0"), ("2.3", "bf16"), ("2.0", "q8_0")])
def test_the_velocity_is_that_of_the_dequantised_weights_with_the_lora_added(folder, tmp_path, way, version, kind):
    model = load(folder, kind, version)
    plain, before = velocity(model), stored(model)
    first, second = (
        save(tmp_path, spelled(version=version, seed=1)),
        save(tmp_path, spelled(version=version, seed=2, dtype=torch.bfloat16, alpha=None), name="b.safetensors"),
    )
    reports = attach_loras(model, [(first, 0.8), (second, -0.3)])
    expected = with_added(
        load(folder, kind, version),
        (ls.matrices(layers(version), seed=1), 0.8 * 2 / RANK),
        (ls.matrices(layers(version), seed=2, dtype=torch.bfloat16), -0.3),
    )
    assert rel(velocity(model), velocity(expected)) < 1e-5
    assert rel(velocity(model), plain) > 0.01, "the LoRA must change the result"
    assert [report.text for report in reports] == [
        f"{name}: 7 of 9 layers applied, 2 audio layers skipped" for name in ("lora.safetensors", "b.safetensors")
    ]

    attach_loras(model, [(first, 0.1)])
    weak = velocity(model)
    assert (
        rel(
            weak,
            velocity(with_added(load(folder, kind, version), (ls.matrices(layers(version), seed=1), 0.1 * 2 / RANK))),
        )
        < 1e-5
    )
    attach_loras(model, [])
    assert torch.equal(velocity(model), plain) and not apply.is_attached(model)
    after = stored(model)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("spelling", ls.SPELLINGS)
def test_every_spelling_gives_the_same_numbers(folder, tmp_path, spelling):
    model = load(folder)
    attach_loras(model, [(save(tmp_path, spelled()), 1.0)])
    expected = velocity(model)
    attach_loras(model, [(save(tmp_path, spelled(spelling), name="b.safetensors"), 1.0)])
    assert torch.equal(velocity(model), expected)


def test_an_alpha_in_the_header_counts(folder, tmp_path):
    model = load(folder)
    attach_loras(model, [(save(tmp_path, spelled("diffusers", alpha=None), ls.peft_header(r=RANK, lora_alpha=2)), 1.0)])
    by_header = velocity(model)
    attach_loras(model, [(save(tmp_path, spelled(alpha=2.0), name="b.safetensors"), 1.0)])
    assert torch.equal(by_header, velocity(model))


def test_the_same_file_twice_adds_up(folder, tmp_path):
    model, path = load(folder), save(tmp_path, spelled())
    attach_loras(model, [(path, 0.25), (path, 0.5)])
    twice = velocity(model)
    attach_loras(model, [(path, 0.75)])
    assert rel(twice, velocity(model)) < 1e-5


# -- the whole way -----------------------------------------------------------------------------------------------------------------------


def pipeline(folder, **options):
    return LTX2Pipeline.from_files(folder / "model-2.3-q8_0.gguf", folder / "gemma.gguf", **options)


def test_a_budget_counts_the_matrices_streams_them_and_changes_nothing(folder, tmp_path, caplog, way):
    loras = [(save(tmp_path, spelled(rank=64)), 0.5)]
    free = pipeline(folder, loras=loras)
    expected = free.sample(PROMPT, free.settings(**QUICK))
    roomy = pipeline(folder, memory_budget=8, loras=loras)
    assert torch.equal(roomy.sample(PROMPT, roomy.settings(**QUICK)), expected)
    bare = pipeline(folder, memory_budget=8)
    plain = bare.sample(PROMPT, bare.settings(**QUICK))
    assert rel(expected, plain) > 0.01
    matrices = sum(4 * 64 * (outs + ins) for layer, (outs, ins) in layers().items() if "connector" not in layer)
    assert roomy.memory.peak - bare.memory.peak == matrices
    blocks = [streamer.Bundle(block).nbytes for block in roomy.dit.transformer_blocks]
    budget = roomy.memory.peak - blocks[3]
    tight = pipeline(folder, memory_budget=budget / 2**30, loras=loras)
    with caplog.at_level("INFO"):
        assert torch.equal(tight.sample(PROMPT, tight.settings(**QUICK)), expected)
    assert "blocks stay on cpu" in caplog.text and "pass through 2 buffers" in caplog.text
    assert 0 < tight.memory.peak <= budget and tight.memory.used == 0
    tight.set_loras([])
    assert torch.equal(tight.sample(PROMPT, tight.settings(**QUICK)), plain)


def test_prompts_are_encoded_again_only_when_the_connector_changes(folder, tmp_path):
    pipe = pipeline(folder)
    (before,) = pipe.encode_prompts([PROMPT])
    pipe.set_loras([(save(tmp_path, ls.lora(layers={k: v for k, v in layers().items() if "connector" not in k})), 1.0)])
    assert PROMPT in pipe._contexts
    pipe.set_loras([(save(tmp_path, spelled(), name="b.safetensors"), 1.0)])
    assert not pipe._contexts
    (changed,) = pipe.encode_prompts([PROMPT])
    assert rel(changed, before) > 1e-3
    pipe.set_loras([])
    assert torch.equal(pipe.encode_prompts([PROMPT])[0], before)


def test_the_files_pages_are_let_go_when_a_lora_leaves(folder, tmp_path):
    model = load(folder)
    attach_loras(model, [(save(tmp_path, spelled()), 1.0)])
    matrix = weakref.ref(model.get_submodule("patchify_proj").changes[0].up)
    apply.detach(model)
    gc.collect()
    assert matrix() is None


# -- refusals and warnings ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tensors, words",
    [
        ({"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(2, 2)}, "a LoRA for a Wan video model"),
        ({"diffusion_model.transformer_blocks.0.audio_attn1.to_q.lora_A.weight": torch.zeros(2, 2)}, "sound stream only"),
        (ls.lora(layers={"transformer_blocks.0.attn1.to_q": (64, 64)}), "of width 64, this model is 256 wide"),
        (ls.lora(layers={"transformer_blocks.40.attn1.to_q": (256, 256)}), "has none of its 1 layers"),
        ({"lycoris_transformer_blocks_0_attn1_to_q.lokr_w1": torch.zeros(16, 16), "lycoris_transformer_blocks_0_attn1_to_q.lokr_w2": torch.zeros(16, 16)}, "LoKr.*only ComfyUI"),
        (ls.lora(layers={"patchify_proj": (256, 128)}) | {"diffusion_model.patchify_proj.dora_scale": torch.ones(256, 1)}, "DoRA.*only ComfyUI"),
        ({"vae.per_channel_statistics.mean": torch.zeros(2)}, "lora.safetensors"),
    ],
    ids=["Wan", "sound", "width", "depth", "LoKr", "DoRA", "no LoRA"],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_and_the_model_keeps_what_it_has(folder, tmp_path, tensors, words):
    model, good = load(folder), save(tmp_path, spelled(), name="good.safetensors")
    attach_loras(model, [(good, 1.0)])
    expected = velocity(model)
    with pytest.raises(LoraError, match=words) as error:
        attach_loras(model, [(good, 0.5), (save(tmp_path, tensors), 1.0)])
    assert "\n" not in str(error.value)
    assert torch.equal(velocity(model), expected)


def test_layers_that_do_not_fit_are_named(folder, tmp_path):
    tensors = spelled() | ls.lora(
        layers={"transformer_blocks.9.attn1.to_q": (256, 256), "transformer_blocks.1.attn1.to_k": (256, 64)},
        audio=False,
    )
    (report,) = attach_loras(load(folder), [(save(tmp_path, tensors), 1.0)])
    assert "7 of 11 layers applied" in report.text
    assert (
        "1 layer is (transformer_blocks.1.attn1.to_k) of another shape" in report.warnings[0]
        and "transformer_blocks.9.attn1.to_q" in report.warnings[1]
    )


def test_a_lora_of_the_other_version_is_pointed_out(folder, tmp_path):
    path = save(
        tmp_path,
        ls.lora(layers={"transformer_blocks.0.attn1.to_q": (256, 256), "caption_projection.linear_1": (256, 256)}),
    )
    (report,) = attach_loras(load(folder), [(path, 1.0)])
    assert "made for LTX-2, this model is LTX-2.3" in report.warnings[-1]


# -- command line ------------------------------------------------------------------------------------------------------------------------


def run(capsys, *args):
    code = cli.main([str(arg) for arg in args])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_generate_takes_loras_with_strengths(capsys, folder, tmp_path, monkeypatch):
    path, frames = save(tmp_path, spelled("diffusers")), []
    monkeypatch.setattr(
        media, "write_video", lambda made, *_, **__: frames.append(torch.cat(list(made)))
    )  # two encodings of one video may differ
    common = ["generate", "--model", folder / "model-2.3-q8_0.gguf", "--text-encoder", folder / "gemma.gguf", "--prompt", PROMPT, "--width", 64, "--height", 64,
              "--frames", 9, "--steps", 1, "--cfg", 1, "--stg", 0, "--seed", 3, "--device", "cpu", "--overwrite", "-o", tmp_path / "v.mp4"]  # fmt: skip
    for options in (
        [],
        ["--lora", path],
        ["--lora", f"{path}:0.5", "--lora", f"{path}:0.5"],
        ["--lora", f"{path}:0.0"],
    ):
        code, _, err = run(capsys, *common, *options)
        assert code == 0, err
        assert err.count("lora.safetensors: 7 of 9 layers applied, 2 audio layers skipped") == len(options) // 2
    plain, whole, halves, none = frames
    assert rel(whole, plain) > 0.01 and rel(halves, whole) < 1e-3 and torch.equal(none, plain)


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors", "a.safetensors:0.5", 0.5),
        ("a.safetensors", "a.safetensors:-1", -1.0),
        ("a:b.safetensors", "a:b.safetensors", 1.0),
        ("a:2", "a:2", 1.0),
        ("a:b.safetensors", "a:b.safetensors:2", 2.0),
    ],
)
def test_a_lora_is_written_as_file_and_strength(tmp_path, monkeypatch, name, text, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).touch()
    assert cli.parse_lora(text) == (name, expected)


@pytest.mark.parametrize(
    "text, words",
    [
        ("gone.safetensors:0.5", "gone.safetensors does not exist"),
        ("gone.safetensors", "does not exist"),
        ("x:y", "x:y does not exist"),
        ("a:nan", "no number"),
    ],
)
def test_a_lora_that_is_not_there_is_named(tmp_path, monkeypatch, text, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").touch()
    with pytest.raises(ValueError, match=words):
        cli.parse_lora(text)


def header(path):
    with open(path, "rb") as file:
        return json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))


@pytest.mark.parametrize("spelling", ls.SPELLINGS)
@pytest.mark.parametrize("drop", [False, True], ids=["with sound", "without sound"])
def test_a_rewritten_file_has_the_released_keys_and_the_same_bytes(capsys, tmp_path, spelling, drop):
    source = save(
        tmp_path, ls.lora(spelling, dtype=torch.bfloat16), {"reference_downscale_factor": "2", "note": "kept"}
    )
    output = tmp_path / "out.safetensors"
    code, out, err = run(capsys, "lora", source, output, "-q", *(["--drop-audio"] if drop else []))
    assert code == 0 and err == "" and f"7 video layers, 2 audio layers {'dropped' if drop else 'kept'}" in out
    expected = ls.lora(
        "down and up" if "down" in ls.SPELLINGS[spelling][1][0] else "released", dtype=torch.bfloat16, audio=True
    )
    expected = {key: value for key, value in expected.items() if not (drop and ("audio" in key or "av_ca" in key))}
    result = load_file(output)
    assert result.keys() == expected.keys()
    assert all(torch.equal(result[key], expected[key]) and result[key].dtype == expected[key].dtype for key in expected)
    with safe_open(output, "pt") as file:
        assert file.metadata() == {"reference_downscale_factor": "2", "note": "kept"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora.safetensors", "out.safetensors"]


def test_rewriting_makes_alphas_of_the_header_and_columns_of_magnitudes(tmp_path):
    layer = "transformer_blocks.0.attn1.to_q"
    tensors = ls.lora("diffusers", {layer: (8, 8)}, alpha=None) | {
        f"transformer.{layer}.lora_magnitude_vector": torch.arange(8.0)
    }
    settings = ls.peft_header(r=4, lora_alpha=16) | {"format": "pt"}
    result = rewrite(save(tmp_path, tensors, settings), tmp_path / "out.safetensors", keep_audio=False)
    written = load_file(tmp_path / "out.safetensors")
    assert result["alphas_added"] == 1 and written[f"diffusion_model.{layer}.alpha"].item() == 16.0
    assert torch.equal(written[f"diffusion_model.{layer}.dora_scale"], torch.arange(8.0)[:, None])
    assert header(tmp_path / "out.safetensors")["__metadata__"] == {"format": "pt"}


def test_the_hosts_own_loader_reads_a_rewritten_file(host, tmp_path):
    import comfy.sd

    import host_models as hm

    rewrite(save(tmp_path, ls.lora("PEFT over diffusers")), tmp_path / "out.safetensors")
    base = hm.model("Q8_0", heads=2, head_dim=64, connector_heads=2, connector_head_dim=64, registers=128)
    with torch.inference_mode():
        direct, again = (
            comfy.sd.load_lora_for_models(base, None, tensors, 1.0, 0.0)[0]
            for tensors in (ls.lora(), load_file(tmp_path / "out.safetensors"))
        )
    assert len(again.patches) == 7 and torch.equal(hm.ksample(again, hm.latent()), hm.ksample(direct, hm.latent()))


def test_the_rewritten_file_is_whole_or_not_there(tmp_path):
    source = save(tmp_path, ls.lora("diffusers"))

    def stop(done, key):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rewrite(source, tmp_path / "out.safetensors", progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]


@pytest.mark.parametrize(
    "source, output, words",
    [
        ("lora.safetensors", "lora.safetensors", "is the source itself"),
        ("lora.safetensors", "there.safetensors", "pass --overwrite"),
        ("lora.safetensors", "out.bin", "ending in .safetensors"),
        ("lora.safetensors", "no/out.safetensors", "does not exist"),
        ("gone.safetensors", "out.safetensors", "gone.safetensors does not exist"),
        ("wan.safetensors", "out.safetensors", "a Wan video model"),
        ("gemma.gguf", "out.safetensors", "is no LoRA but Gemma-3"),
    ],
)
def test_what_cannot_be_rewritten_is_said_in_one_sentence(capsys, folder, tmp_path, monkeypatch, source, output, words):
    save(tmp_path, ls.lora("diffusers"))
    save(tmp_path, {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(2, 2)}, name="wan.safetensors")
    (tmp_path / "there.safetensors").write_bytes(b"as it was")
    (tmp_path / "gemma.gguf").symlink_to(folder / "gemma.gguf")
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "lora", source, output)
    assert code == 1 and out == "" and words in err and err.count("\n") == 1
    assert (tmp_path / "there.safetensors").read_bytes() == b"as it was" and len(list(tmp_path.iterdir())) == 4


def test_lora_counts_as_json_and_what_it_did_not_know(capsys, tmp_path):
    source = save(tmp_path, ls.lora("diffusers") | {"transformer.other.lora_A.weight": torch.zeros(2, 2)})
    code, out, err = run(capsys, "lora", source, tmp_path / "out.safetensors", "--json")
    data = json.loads(out)
    assert (
        code == 0
        and data["layers"] == {"video": 7, "audio": 2, "projection": 0, "text": 0, "unknown": 1}
        and data["unknown"] == ["other"]
    )
    assert data["tensors"] == data["renamed"] == 28


def test_inspect_tells_a_person_about_a_lora(capsys, tmp_path):
    code, out, _ = run(capsys, "inspect", save(tmp_path, ls.lora("diffusers")))
    assert code == 0
    for words in (
        "LoRA for an LTX-2.3 transformer, 9 layers",
        "transformer.… (diffusers), diffusers' module names",
        "LoRA, rank 4",
        "LTX-2 GGUF LoRA Loader",
        "rewrites the file",
    ):
        assert words in out
    code, out, _ = run(
        capsys,
        "inspect",
        "--json",
        save(
            tmp_path, {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(2, 2)}, name="wan.safetensors"
        ),
    )
    assert json.loads(out)["usable"] is False and "Wan" in json.loads(out)["refusal"]
