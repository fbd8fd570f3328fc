"""Previews of the sampler node, and several notices on one node."""

import pytest
import torch

import host_models as hm

pytestmark = pytest.mark.usefixtures("host")


@pytest.fixture(scope="module")
def patcher():
    return hm.model("Q8_0", heads=2, head_dim=64, connector_heads=2, connector_head_dim=64, registers=128)


def previews(patcher, monkeypatch, method, latent, steps=2):
    """(preview images the page would get, x0 of each step) of one run."""
    import comfy.utils
    import latent_preview

    from ltx2_gguf.nodes.host import preview as host_preview
    from ltx2_gguf.nodes.sampling import LTX2GGUFSampler

    images, seen, original = [], [], host_preview.callback

    def recorded(*args):
        show = original(*args)

        def step(number, x0, *rest):
            seen.append(x0.clone())
            show(number, x0, *rest)

        return step

    monkeypatch.setattr(host_preview, "callback", recorded)
    monkeypatch.setattr(latent_preview.args, "preview_method", latent_preview.LatentPreviewMethod.from_string(method))
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, image, **_: images.append(image))
    monkeypatch.setattr(comfy.utils, "PROGRESS_THROTTLE_MIN_INTERVAL", -1.0)
    with torch.inference_mode():
        LTX2GGUFSampler.execute(
            patcher,
            hm.conditioning(patcher),
            hm.conditioning(patcher, seed=6),
            latent,
            3,
            steps,
            1.0,
            "ltx2",
            "cfg only",
            "euler",
            0.0,
            "",
            0.0,
        )
    return [image[1] for image in images if image is not None], seen


def test_a_frame_from_the_middle_is_shown_with_the_hosts_colours_for_this_latent(patcher, monkeypatch):
    import latent_preview
    import numpy as np

    from ltx2_gguf.nodes.host.guides import GUIDE_FRAMES

    images, seen = previews(patcher, monkeypatch, "latent2rgb", {**hm.latent(frames=6), GUIDE_FRAMES: 1})
    previewer = latent_preview.get_previewer(torch.device("cpu"), patcher.model.latent_format)
    assert len(images) == len(seen) == 2
    for image, x0 in zip(images, seen):
        assert np.array_equal(np.asarray(image), np.asarray(previewer.decode_latent_to_preview(x0[:, :, 2:3])))
    assert np.asarray(images[0]).std() > 1


def test_no_preview_is_made_when_none_is_wanted(patcher, monkeypatch):
    images, seen = previews(patcher, monkeypatch, "none", hm.latent())
    assert not images and len(seen) == 2


def test_the_tiny_decoder_of_the_models_version_is_used_when_it_is_there(patcher, monkeypatch, tmp_path, caplog):
    import comfy.taesd.taehv
    import folder_paths
    import numpy as np
    from safetensors.torch import save_file

    torch.manual_seed(0)
    weights = {
        name: value.clone().contiguous()
        for name, value in comfy.taesd.taehv.TAEHV(latent_channels=128).state_dict().items()
    }
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "vae_approx", ([str(tmp_path)], {".safetensors"}))
    save_file(weights, tmp_path / "taeltx_2.safetensors")  # LTX-2's: not for this model, which is 2.3
    folder_paths.filename_list_cache.pop("vae_approx", None)
    colours, _ = previews(patcher, monkeypatch, "taesd", hm.latent(frames=3), steps=1)
    assert np.asarray(colours[0]).shape == (2, 3, 3)
    monkeypatch.undo()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "vae_approx", ([str(tmp_path)], {".safetensors"}))
    save_file(weights, tmp_path / "taeltx2_3.safetensors")
    folder_paths.filename_list_cache.pop("vae_approx", None)
    decoded, _ = previews(patcher, monkeypatch, "taesd", hm.latent(frames=3), steps=1)
    assert np.asarray(decoded[0]).shape == (64, 96, 3), caplog.text
    monkeypatch.undo()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "vae_approx", ([str(tmp_path)], {".safetensors"}))
    (tmp_path / "taeltx2_3.safetensors").write_bytes(b"damaged")
    spoilt, _ = previews(patcher, monkeypatch, "taesd", hm.latent(frames=3), steps=1)
    assert np.asarray(spoilt[0]).shape == (2, 3, 3) and "is not used for previews" in caplog.text
    folder_paths.filename_list_cache.pop("vae_approx", None)


def test_every_notice_of_an_execution_stays_on_the_node(monkeypatch):
    import sys
    from types import ModuleType, SimpleNamespace

    from ltx2_gguf.nodes.host import internals

    shown = []
    server = ModuleType("server")
    server.PromptServer = SimpleNamespace(
        instance=SimpleNamespace(send_progress_text=lambda text, node_id: shown.append((node_id, text)))
    )
    monkeypatch.setitem(sys.modules, "server", server)

    def execution():
        return type("Node", (), {"hidden": SimpleNamespace(unique_id="4")})  # the host makes a class for each execution

    first, second = execution(), execution()
    for node, text in ((first, "one"), (first, "two"), (second, "three")):
        internals.notice(node, text)
    assert shown == [("4", "one"), ("4", "one\ntwo"), ("4", "three")]
    internals.notice(second, "a key <img src=x>")
    assert shown[-1] == ("4", "three\na key &lt;img src=x&gt;")
