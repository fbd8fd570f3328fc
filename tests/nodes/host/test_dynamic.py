"""Dynamic VRAM: the host's own patcher and casting code with a stand-in for the GPU allocator (``fake_vram``)."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fake_vram
import host_models as hm
from dynamic_models import EVERYTHING_FITS, HALF_FITS, NOTHING_FITS, dynamic, load, velocity
from host_models import lora, stored_bytes, tiny, with_lora

pytestmark = pytest.mark.usefixtures("host")


@pytest.fixture(scope="module")
def expected(host):
    """Velocities of the dequantised model on the host's static path: without LoRA, with one, with two."""
    results = []
    for chain in ((), ((1, 0.7),), ((1, 0.7), (2, -0.4))):
        patcher = tiny("Q4_0", dense=True)
        for seed, strength in chain:
            patcher = with_lora(patcher, lora(seed=seed), strength)
        with torch.inference_mode():
            patcher.patch_model(patcher.load_device)
        results.append(static_velocity(patcher))
    return results


def static_velocity(patcher, seed=2):
    from host_models import velocity as on_cpu

    return on_cpu(patcher, seed)


@pytest.mark.parametrize(
    "fits", [EVERYTHING_FITS, HALF_FITS, NOTHING_FITS], ids=["all resident", "half resident", "none resident"]
)
def test_packed_weights_under_dynamic_vram_equal_the_dequantised_model_with_and_without_loras(
    monkeypatch, fits, expected
):
    base = dynamic(monkeypatch, fits, fmt="Q4_0")
    before = stored_bytes(base)
    one = with_lora(base, lora(seed=1), 0.7)
    two = with_lora(one, lora(seed=2), -0.4)
    for patcher, wanted in ((base, expected[0]), (one, expected[1]), (two, expected[2]), (base, expected[0])):
        load(patcher)
        for _ in range(2):  # the second pass finds resident weights
            assert hm.error(velocity(patcher), wanted) < 1e-5
    base.restore_loaded_backups()  # the host keeps modules of up to 16 KiB decoded on the device while the model is loaded
    after = stored_bytes(base)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_what_is_staged_is_the_packed_bytes(monkeypatch):
    patcher = dynamic(monkeypatch, EVERYTHING_FITS, fmt="Q4_0")
    load(patcher)
    layer = patcher.model.diffusion_model.transformer_blocks[0].ff.net[2]
    assert layer._v.data.numel() <= layer.weight._qdata.nbytes + layer.bias.nbytes + 2 * 1024
    assert layer._v.data.numel() < 0.4 * layer.weight.numel() * 4


def test_the_next_block_is_prefetched_while_a_block_runs(monkeypatch):
    import comfy.model_prefetch

    patcher = dynamic(monkeypatch, EVERYTHING_FITS)
    load(patcher)
    popped = []
    monkeypatch.setattr(comfy.model_prefetch, "make_prefetch_queue", lambda blocks, device, options: list(blocks))
    monkeypatch.setattr(comfy.model_prefetch, "prefetch_queue_pop", lambda queue, device, block: popped.append(block))
    velocity(patcher)
    assert popped == [*patcher.model.diffusion_model.transformer_blocks, None]


def test_a_static_copy_can_be_made_for_nodes_that_need_one(monkeypatch, tmp_path):
    """Device selectors and hooks ask the loader for a model outside of dynamic VRAM."""
    import comfy.model_patcher

    from ltx2_gguf.ltx2_core.convert import synthetic
    from ltx2_gguf.ltx2_core.files import structure
    from ltx2_gguf.nodes.host import files
    from ltx2_gguf.nodes.host import model as host_model

    fake_vram.install(monkeypatch)
    monkeypatch.setattr(files, "back_by_files", lambda *args: 0)
    path = synthetic.make(tmp_path / "tiny.gguf", structure.Geometry.small("2.3"), type="q8_0")
    patcher = host_model.load_model(str(path))
    assert patcher.is_dynamic()
    with torch.inference_mode():
        copy = patcher.clone(disable_dynamic=True)
    assert not copy.is_dynamic() and copy.model is not patcher.model
    assert type(copy) is comfy.model_patcher.ModelPatcher


def test_weights_are_given_to_the_host_as_slices_of_the_file_with_the_same_bytes(tmp_path):
    """In a process of its own, because the host's mapper is initialised before anything else is imported."""
    script = """
import sys
sys.path.insert(0, 'tests/support')
import comfy_aimdo.control
if not comfy_aimdo.control.init():
    print('no mapper'); sys.exit(0)
import packloader, hostenv
hostenv.import_host()
import torch
from ltx2_gguf.ltx2_core.loading import transformer as checkpoint
from ltx2_gguf.ltx2_core.files import structure
from ltx2_gguf.ltx2_core.convert import synthetic
from ltx2_gguf.nodes.host import files as host_files
from ltx2_gguf.nodes.host.ops import GGUFOps
path = synthetic.make(sys.argv[1], structure.Geometry.small('2.3'), type='q8_0')
raw = open(path, 'rb').read()
with torch.inference_mode():
    net = checkpoint.load_dit(path, operations=GGUFOps, dtype=torch.float32)
    before = {n: (p._qdata if hasattr(p, '_qdata') else p).clone() for n, p in net.named_parameters()}
    replaced = host_files.back_by_files(net, net.weight_sources)
    for name, p in net.named_parameters():
        data = p._qdata if hasattr(p, '_qdata') else p.data
        assert torch.equal(data, before[name]), name
        where = getattr(data.untyped_storage(), '_comfy_tensor_file_slice', None)
        if where is not None:
            assert data.storage_offset() == 0 and data.is_contiguous() and data.nbytes == where.size
            assert raw[where.offset : where.offset + where.size] == data.contiguous().view(torch.uint8).numpy().tobytes(), name
    packed = sum(hasattr(p, '_qdata') for p in net.parameters())
    assert replaced >= packed > 20, (replaced, packed)
print('same bytes')
"""
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "m.gguf")],
        cwd=Path(__file__).resolve().parents[3],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    if run.stdout.strip().endswith("no mapper"):
        pytest.skip("the host's file mapper does not load on this machine")
    assert run.stdout.strip().endswith("same bytes")
