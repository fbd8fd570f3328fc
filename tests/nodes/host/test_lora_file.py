"""The LoRA node on quantised models: the host's own result to the bit, for every spelling, and a sentence for what does not fit."""

import logging
import os

import pytest
import torch
from safetensors.torch import save_file

import host_models as hm
import lora_spellings as ls

pytestmark = pytest.mark.usefixtures("host")

SMALL = {"heads": 2, "head_dim": 64, "connector_heads": 2, "connector_head_dim": 64, "registers": 128}
STRENGTH = 0.8


@pytest.fixture(autouse=True)
def loras(host, tmp_path, monkeypatch):
    """A 'loras' folder of this test's own, and no file at hand."""
    import folder_paths

    from ltx2_gguf.nodes.host import lora_file

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors", ".pt"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(lora_file, "_files", type(lora_file._files)())
    return tmp_path


@pytest.fixture
def save(loras):
    def write(tensors, metadata=None, name="lora.safetensors"):
        save_file({key: value.contiguous() for key, value in tensors.items()}, loras / name, metadata=metadata)
        return name

    return write


def tiny(fmt="Q8_0", version="2.3", **options):
    return hm.model(fmt, version, **{**(SMALL if version == "2.3" else {}), **options})


def ours(patcher, name, strength=STRENGTH):
    from ltx2_gguf.nodes.lora_loader import LTX2GGUFLoraLoader

    with torch.inference_mode():
        return LTX2GGUFLoraLoader.execute(patcher, name, strength).args[0]


def hosts(patcher, name, strength=STRENGTH):
    import nodes

    with torch.inference_mode():
        return nodes.LoraLoaderModelOnly().load_lora_model_only(patcher, name, strength)[0]


def flat(patcher):
    """The patches of a model as comparable values: key -> [(strength, adapter's class, its tensors and numbers)]."""
    return {
        key: [
            (
                entry[0],
                type(entry[1]).__name__,
                [v.tolist() if isinstance(v, torch.Tensor) else v for v in entry[1].weights],
                *entry[2:],
            )
            for entry in entries
        ]
        for key, entries in patcher.patches.items()
    }


# -- the same result ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ls.HOST_READS)
def test_in_a_spelling_the_host_knows_everything_is_as_its_own_loader_does_it(save, spelling):
    name = save(ls.lora(spelling), {"reference_downscale_factor": "2", "format": "pt"})
    base = tiny("Q4_0")
    mine, theirs = ours(base, name), hosts(base, name)
    assert flat(mine) == flat(theirs) and list(mine.patches) == list(theirs.patches) and len(mine.patches) == 7
    assert (
        mine.attachments == theirs.attachments
        and mine.attachments["lora_metadata"]["reference_downscale_factor"] == "2"
    )
    assert type(mine) is type(theirs) and not base.patches
    assert torch.equal(hm.ksample(mine, hm.latent()), hm.ksample(theirs, hm.latent()))


@pytest.fixture(scope="module")
def changed(host):
    """fmt -> what the dequantised model with the LoRA added to its weights samples."""

    def sample(fmt):
        dense = tiny(fmt, dense=True)
        weights = dense.model.state_dict()
        with torch.inference_mode():
            for layer, (up, down) in ls.matrices(ls.video_layers()).items():
                weights[f"diffusion_model.{layer}.weight"] += STRENGTH * (2.0 / 4) * (up @ down)
        return hm.ksample(dense, hm.latent())

    return {fmt: sample(fmt) for fmt in ("Q4_0", "Q8_0")}


@pytest.mark.parametrize("fmt", ["Q4_0", "Q8_0"])
@pytest.mark.parametrize("spelling", ls.SPELLINGS)
def test_every_spelling_equals_the_dequantised_weights_with_the_lora_added(save, changed, spelling, fmt):
    name = save(ls.lora(spelling))
    base = tiny(fmt)
    result = ours(base, name)
    assert flat(result) == flat(ours(base, save(ls.lora(), name="released.safetensors")))
    video = hm.ksample(result, hm.latent())
    assert hm.error(video, changed[fmt]) < 1e-3
    assert hm.error(video, hm.ksample(base, hm.latent())) > 0.01, "the LoRA must change the result"


def test_an_alpha_in_the_header_counts(save):
    layers = {"transformer_blocks.0.attn1.to_q": (128, 128)}
    with_header = ours(tiny(), save(ls.lora("diffusers", layers, alpha=None), ls.peft_header(r=4, lora_alpha=2)))
    with_keys = ours(tiny(), save(ls.lora("released", layers, alpha=2.0), name="keys.safetensors"))
    assert flat(with_header) == flat(with_keys)


@pytest.mark.parametrize("matrices", ["lokr", "dora"])
def test_other_methods_reach_the_hosts_adapters(save, matrices):
    layer, generator = "transformer_blocks.0.attn1.to_q", torch.Generator().manual_seed(1)
    if matrices == "lokr":
        values = {
            "lokr_w1": torch.randn(8, 8, generator=generator) * 0.2,
            "lokr_w2": torch.randn(16, 16, generator=generator) * 0.2,
        }
        spelled, standard = (
            {f"lycoris_{layer.replace('.', '_')}.{name}": v for name, v in values.items()},
            {f"diffusion_model.{layer}.{name}": v for name, v in values.items()},
        )
    else:
        plain, magnitude = (
            ls.lora("released", {layer: (128, 128)}, audio=False, alpha=None),
            torch.rand(128, generator=generator) + 0.5,
        )
        spelled = {key.replace("diffusion_model.", "transformer."): value for key, value in plain.items()} | {
            f"transformer.{layer}.lora_magnitude_vector": magnitude
        }
        standard = plain | {f"diffusion_model.{layer}.dora_scale": magnitude[:, None]}
    base = tiny()
    mine, theirs = ours(base, save(spelled)), hosts(base, save(standard, name="standard.safetensors"))
    assert list(mine.patches) == [f"diffusion_model.{layer}.weight"]
    assert torch.equal(hm.ksample(mine, hm.latent()), hm.ksample(theirs, hm.latent()))
    assert hm.error(hm.ksample(mine, hm.latent()), hm.ksample(base, hm.latent())) > 1e-3


def test_nodes_stack_and_leave_the_stored_bytes_as_they_were(save):
    first, second = (
        save(ls.lora("diffusers", seed=1), name="a.safetensors"),
        save(ls.lora("kohya", seed=2), name="b.safetensors"),
    )
    base = tiny("Q4_0")
    stored = {
        key: value._qdata.clone() if hasattr(value, "_qdata") else value.clone()
        for key, value in base.model.state_dict().items()
    }
    before = hm.ksample(base, hm.latent())
    both = ours(hosts(ours(base, first, 0.7), second, 0.2), first, -0.7)
    assert hm.error(hm.ksample(both, hm.latent()), hm.ksample(hosts(base, second, 0.2), hm.latent())) < 1e-3
    assert torch.equal(hm.ksample(base, hm.latent()), before)
    with torch.inference_mode():
        base.detach()
    after = base.model.state_dict()
    assert all(
        torch.equal(stored[key], after[key]._qdata if hasattr(after[key], "_qdata") else after[key]) for key in stored
    )


def test_the_hosts_own_model_with_sound_gets_its_audio_layers(save, monkeypatch):
    """What the host finds in the model decides, not the kind of layer. (A bias stands for the layer: this pack's models have no sound.)"""
    import comfy.lora

    name, base = save(ls.lora("diffusers")), tiny()
    known = comfy.lora.model_lora_keys_unet
    with monkeypatch.context() as patch:
        patch.setattr(
            comfy.lora,
            "model_lora_keys_unet",
            lambda model, keys: (
                known(model, keys)
                | {f"diffusion_model.{layer}": "diffusion_model.proj_out.bias" for layer in ls.AUDIO[:1]}
            ),
        )
        assert "diffusion_model.proj_out.bias" in ours(base, name).patches


# -- what the user is told ---------------------------------------------------------------------------------------------------------------


def test_the_log_says_how_many_layers_fit(save, caplog):
    with caplog.at_level(logging.INFO):
        ours(tiny(), save(ls.lora("diffusers")))
    assert "lora.safetensors: 7 of 9 layers applied, 2 audio layers skipped" in caplog.text
    assert "not loaded" not in caplog.text and "left out" not in caplog.text


def test_layers_the_model_lacks_or_has_in_another_shape_are_named(save, caplog):
    tensors = ls.lora("diffusers") | ls.lora(
        "diffusers",
        {"transformer_blocks.9.attn1.to_q": (128, 128), "transformer_blocks.1.attn1.to_k": (128, 64)},
        audio=False,
    )
    with caplog.at_level(logging.INFO):
        patched = ours(tiny(), save(tensors))
    assert len(patched.patches) == 7 and "7 of 11 layers applied" in caplog.text
    assert (
        "1 layer is (transformer_blocks.1.attn1.to_k) of another shape" in caplog.text
        and "1 layer is (transformer_blocks.9.attn1.to_q) not in this model" in caplog.text
    )


def test_a_lora_of_the_other_version_is_pointed_out(save, caplog):
    layers = {"transformer_blocks.0.attn1.to_q": (256, 256), "caption_projection.linear_1": (256, 640)}
    ours(tiny(version="2.3", heads=4, connector_heads=4), save(ls.lora("released", layers, audio=False)))
    assert "made for LTX-2, this model is LTX-2.3" in caplog.text and "caption_projection.linear_1" in caplog.text


@pytest.mark.parametrize(
    "tensors, sentence",
    [
        (
            {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(2, 2)},
            "is a LoRA for a Wan video model; use a LoRA made for LTX-2",
        ),
        (
            {"text_encoders.gemma3_12b.transformer.model.layers.1.mlp.up_proj.lora_A.weight": torch.zeros(2, 2)},
            "for a text encoder; load it with 'Load LoRA'",
        ),
        (
            {"diffusion_model.transformer_blocks.0.audio_attn1.to_q.lora_A.weight": torch.zeros(2, 2)},
            "sound stream only",
        ),
        (
            ls.lora("diffusers", {"transformer_blocks.0.attn1.to_q": (64, 64)}),
            "made for a transformer of width 64, this model is 128 wide",
        ),
        (ls.lora("diffusers", {"transformer_blocks.40.attn1.to_q": (128, 128)}), "this model has none of its 1 layers"),
        ({"vae.per_channel_statistics.mean": torch.zeros(2)}, "."),
    ],
    ids=["Wan", "text encoder", "sound", "width", "depth", "no LoRA"],
)
def test_a_file_of_which_nothing_fits_is_refused_in_one_sentence(save, tensors, sentence):
    from ltx2_gguf.ltx2_core.lora.file import LoraError

    with pytest.raises(LoraError) as error:
        ours(tiny(), save(tensors))
    assert "lora.safetensors" in str(error.value) and sentence in str(error.value) and "\n" not in str(error.value)


def test_pickles_are_not_offered_and_not_read(loras):
    from ltx2_gguf.ltx2_core.files.weights import WeightFileError
    from ltx2_gguf.nodes import folders

    torch.save({"diffusion_model.proj_out.lora_A.weight": torch.zeros(2, 2)}, loras / "old.pt")
    save_file(ls.lora(), loras / "new.safetensors")
    assert folders.loras() == ["new.safetensors"]
    with pytest.raises(WeightFileError, match="old.pt"):
        ours(tiny(), "old.pt")


# -- files at hand -----------------------------------------------------------------------------------------------------------------------


def test_a_file_is_read_once_until_it_changes(save, monkeypatch, loras):
    import comfy.utils

    reads, read = [], comfy.utils.load_torch_file
    monkeypatch.setattr(
        comfy.utils, "load_torch_file", lambda *args, **kwargs: reads.append(args[0]) or read(*args, **kwargs)
    )
    base, name = tiny(), save(ls.lora("diffusers", seed=1))
    first, second = ours(base, name, 1.0), ours(base, name, 0.5)
    key = next(iter(first.patches))
    assert len(reads) == 1 and first.patches[key][0][1].weights[0] is second.patches[key][0][1].weights[0]
    save(ls.lora("diffusers", seed=2, rank=5))
    assert ours(base, name).patches[key][0][1].weights[0].shape[1] == 5 and len(reads) == 2
    for number in range(6):
        ours(base, save(ls.lora(seed=number), name=f"{number}.safetensors"))
    from ltx2_gguf.nodes.host import lora_file

    assert len(lora_file._files) == lora_file.KEPT_FILES


def test_strength_0_hands_the_model_on_unread(monkeypatch):
    base = tiny()
    assert ours(base, "no such file.safetensors", 0) is base


def test_a_replaced_file_or_another_strength_runs_the_node_again(save, loras):
    from ltx2_gguf.nodes.lora_loader import LTX2GGUFLoraLoader

    name = save(ls.lora())
    first = LTX2GGUFLoraLoader.fingerprint_inputs(lora_name=name, strength_model=1.0)
    assert first == LTX2GGUFLoraLoader.fingerprint_inputs(lora_name=name, strength_model=1.0)
    assert first != LTX2GGUFLoraLoader.fingerprint_inputs(lora_name=name, strength_model=0.5)
    os.utime(loras / name, ns=(1, 1))
    assert first != LTX2GGUFLoraLoader.fingerprint_inputs(lora_name=name, strength_model=1.0)
