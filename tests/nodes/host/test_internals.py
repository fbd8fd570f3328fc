"""What the pack uses of the host: all of it declared, what is missing said in a sentence or done without."""

import ast
import logging
from pathlib import Path

import pytest
import torch

import host_models as hm
from host_models import load, lora, tiny, velocity, with_lora
from late_copies import LateCopier

pytestmark = pytest.mark.usefixtures("host")

NODES = Path(__file__).resolve().parents[3] / "nodes"
HOST = ("comfy", "comfy_aimdo")


def used_names():
    """{"comfy.module.name": files}: every chain of attributes on the host's modules, and what is imported from them."""
    found = {}
    for path in sorted(NODES.rglob("*.py")):
        tree, skip = ast.parse(path.read_text(encoding="utf-8")), set()
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.ImportFrom)
                and not node.level
                and node.module
                and node.module.split(".")[0] in HOST
            ):
                for alias in node.names:
                    found.setdefault(f"{node.module}.{alias.name}", set()).add(path.name)
            if isinstance(node, ast.Import):
                assert not [alias for alias in node.names if alias.name.split(".")[0] in HOST and alias.asname], (
                    f"{path.name} renames a module"
                )
            if isinstance(node, ast.Attribute) and id(node) not in skip:
                names, inner = [node.attr], node.value
                while isinstance(inner, ast.Attribute):
                    skip.add(id(inner))
                    names.append(inner.attr)
                    inner = inner.value
                if isinstance(inner, ast.Name) and inner.id in HOST:
                    found.setdefault(".".join([inner.id, *reversed(names)]), set()).add(path.name)
    return found


def declared():
    from ltx2_gguf.nodes.host import internals

    lists = [internals.NEEDED, *(accelerator.names for accelerator in internals.ACCELERATORS)]
    return {f"{module}.{name}" for names in lists for module, wanted in names.items() for name in wanted}


def test_every_name_of_the_host_that_is_used_is_in_one_of_the_lists():
    names, known = used_names(), declared()
    assert len(names) > 70
    missing = {
        name: files
        for name, files in names.items()
        if not any(name == k or k.startswith(name + ".") or name.startswith(k + ".") for k in known)
    }
    assert missing == {}
    bare = [name for name in names if name.count(".") == 1 and not any(name == k for k in known)]
    assert bare == [], "a module under another name hides what is used of it"


def test_what_is_declared_is_used():
    names = used_names()
    idle = [
        k
        for k in declared()
        if not any(name == k or k.startswith(name + ".") or name.startswith(k + ".") for name in names)
    ]
    # Methods that are overridden, or called on objects.
    assert [k for k in idle if not k.startswith(("comfy.model_patcher.", "comfy.latent_formats."))] == []


def test_this_host_has_everything_and_a_missing_name_or_parameter_is_reported_in_one_sentence(monkeypatch):
    from ltx2_gguf.nodes.host import internals

    assert internals.differences(internals.NEEDED) == []
    assert [
        accelerator.title
        for accelerator in internals.ACCELERATORS
        if internals.differences(accelerator.names) and not accelerator.newer
    ] == []
    monkeypatch.setattr(internals, "NEEDED", {
        "comfy.ops": {"manual_cast": "", "a_name_of_tomorrow": "", "cast_bias_weight": "input color"}, "comfy.no_such_module": {"anything": ""},
    })  # fmt: skip
    sentence = r"lacks comfy\.ops\.a_name_of_tomorrow, comfy\.ops\.cast_bias_weight\(color\), comfy\.no_such_module\.anything\. Update ComfyUI to 0\.23\.0"
    with pytest.raises(internals.HostError, match=sentence):
        internals.require()


def test_the_oldest_host_is_the_same_everywhere():
    from ltx2_gguf.nodes.host import internals

    text = (NODES.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert f'requires-comfyui = ">={internals.OLDEST_HOST}"' in text


class Without:
    """The package ``comfy`` as this pack sees it on a host where ``path`` has another name."""

    def __init__(self, real, path):
        self._real, self._path = real, path

    def __getattr__(self, name):
        head, _, rest = self._path.partition(".")
        if name != head:
            return getattr(self._real, name)
        if not rest:
            raise AttributeError(f"renamed: {name}")
        return Without(getattr(self._real, name), rest)

    def __setattr__(self, name, value):
        object.__setattr__(self, name, value) if name.startswith("_") else setattr(self._real, name, value)

    def __call__(self, *args, **kwargs):
        return self._real(*args, **kwargs)


def optional_names():
    from ltx2_gguf.nodes.host import internals

    return [
        (accelerator, module, name)
        for accelerator in internals.ACCELERATORS
        for module, names in accelerator.names.items()
        for name in names
        if name not in internals.NEEDED.get(module, ())
    ]


@pytest.fixture
def accelerators(monkeypatch):
    """Not asked yet, and forgotten afterwards."""
    from ltx2_gguf.nodes.host import internals, stream

    for accelerator in internals.ACCELERATORS:
        monkeypatch.setattr(accelerator, "_usable", None)
    monkeypatch.setattr(LateCopier, "made", [])
    monkeypatch.setattr(stream, "copier_kind", lambda device: LateCopier)
    return internals


def test_whatever_optional_name_the_host_renames_the_velocity_is_the_same(accelerators, monkeypatch):
    import sys

    patcher = with_lora(
        tiny("Q4_0", num_layers=3), lora(layers=[f"transformer_blocks.{b}.attn1.to_q" for b in range(3)])
    )
    load(patcher)
    expected = velocity(patcher)
    ours = [m for name, m in sys.modules.items() if name.startswith("ltx2_gguf.nodes.host.") and hasattr(m, "comfy")]
    real, names = ours[0].comfy, optional_names()
    assert len(names) >= 10
    for accelerator, module, name in names:
        path = f"{module}.{name}".partition(".")[2]
        with monkeypatch.context() as renamed:
            for one in accelerators.ACCELERATORS:
                renamed.setattr(one, "_usable", None)
            find = accelerators.find
            renamed.setattr(
                accelerators,
                "find",
                lambda m, n, gone=(module, name): (
                    (_ for _ in ()).throw(AttributeError(n)) if (m, n) == gone else find(m, n)
                ),
            )
            for m in ours:
                renamed.setattr(m, "comfy", Without(real, path))
            patcher.model.diffusion_model.loras.release()
            assert torch.equal(velocity(patcher), expected), path
            assert not accelerator, path
    patcher.model.diffusion_model.loras.release()


@pytest.mark.parametrize("where", ["start", "wait", "mark", "close", "gather"])
def test_an_error_while_matrices_are_streamed_switches_streaming_off_and_the_step_is_right(
    accelerators, monkeypatch, caplog, where
):
    from ltx2_gguf.nodes.host import stream

    patcher = with_lora(
        tiny("Q4_0", num_layers=3), lora(layers=[f"transformer_blocks.{b}.attn1.to_q" for b in range(3)])
    )
    load(patcher)
    network = patcher.model.diffusion_model
    monkeypatch.setattr(stream, "room_on", lambda device, needed=0: 0)
    expected = velocity(patcher)
    network.loras.release()
    asked = []

    def broken(*args, **kwargs):
        asked.append(1)
        raise RuntimeError("a stand-in for what nobody thought of")

    monkeypatch.setattr(stream.Matrices if where == "gather" else LateCopier, where, broken)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(velocity(patcher), expected)
        network.loras.release()
    assert asked and not any(
        getattr(m, "lora", None) is not None and m.lora.staged is not None for m in network.modules()
    )
    if where != "close":  # a run's end is no step
        assert len(asked) == 1 and not accelerators.LORA_STREAMING
        assert [r.message for r in caplog.records if "streaming of a LoRA" in r.message][0].count("stand-in") == 1
        assert torch.equal(
            hm.ksample(patcher, hm.latent(), steps=1, cfg=1.0), hm.ksample(patcher, hm.latent(), steps=1, cfg=1.0)
        )


@pytest.mark.parametrize("where", ["make_prefetch_queue", "prefetch_queue_pop"])
def test_an_error_while_weights_are_prefetched_switches_it_off_and_the_step_is_right(accelerators, monkeypatch, where):
    import comfy.model_prefetch

    patcher = tiny("Q4_0")
    load(patcher)
    expected, cleared = velocity(patcher), []
    calls = {
        "make_prefetch_queue": lambda blocks, device, options: [None, *blocks, None],
        "prefetch_queue_pop": lambda queue, device, block: None,
    }
    calls[where] = lambda *args: (_ for _ in ()).throw(TypeError("missing 1 required positional argument"))
    for name, function in calls.items():
        monkeypatch.setattr(comfy.model_prefetch, name, function)
    monkeypatch.setattr(comfy.model_prefetch, "cleanup_prefetch_queues", lambda: cleared.append(1))
    monkeypatch.setattr(accelerators.PREFETCH, "names", {})
    for _ in range(2):
        assert torch.equal(velocity(patcher), expected)
    assert not accelerators.PREFETCH and len(cleared) == (where == "prefetch_queue_pop")


def test_what_signatures_do_not_tell_is_used_up_to_the_version_it_was_tested_with(monkeypatch, caplog):
    from ltx2_gguf.nodes.host import internals

    for found, used in (("0.33.7", True), ("0.34.0", False), ("unknown", True)):
        monkeypatch.setattr(internals, "version", lambda found=found: found)
        assert bool(internals.Accelerator("something", {}, last="0.33")) is used
    assert "Without something from here on (this ComfyUI is 0.34.0, tested was up to 0.33)" in caplog.text
