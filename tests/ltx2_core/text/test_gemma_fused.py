"""Gemma's element-wise passes: Triton kernels (in Triton's interpreter when there is no GPU) against their torch definitions and transformers."""

import pytest
import torch

pytest.importorskip("triton")

from ltx2_gguf.ltx2_core.text import gemma
from ltx2_gguf.ltx2_core.text import gemma_fused as passes
from ltx2_gguf.ltx2_core.text import triton_gemma as kernels
from ltx2_gguf.ltx2_core.transformer import fused
from reference_gemma import VOCAB, ours, reference, reference_states, rel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter cuts bfloat16 off where a device rounds
LIMITS = {torch.float32: 2e-6, HALF: 8e-3}


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def norm_of(width, seed=0):
    norm = torch.nn.RMSNorm(width, eps=1e-6, device=DEVICE)
    norm.weight = torch.nn.Parameter(1 + 0.5 * rand(width, seed=seed), requires_grad=False)
    return norm


@pytest.fixture
def on_kernels(monkeypatch):
    """Let activations on the CPU go to the kernels too; yields the names of those that ran."""
    ran = []
    for name in ("add_norm", "norm_rope_", "geglu_"):
        kernel = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, name=name, kernel=kernel: (ran.append(name), kernel(*a))[1])
    monkeypatch.setattr(fused, "_TRITON_DEVICES", ("cpu", "cuda"))
    with torch.inference_mode():
        yield ran


@pytest.fixture
def in_torch(monkeypatch):
    """Calls a pass by its torch definition."""

    def call(name, *arguments, **options):
        with monkeypatch.context() as patch:
            patch.setattr(fused, "_HAS_TRITON", False)
            return getattr(passes, name)(*arguments, **options)

    return call


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("width", [96, 128, 320])
def test_norms_and_residuals_equal_their_definition(on_kernels, in_torch, width, dtype):
    x, h, post, following = (
        3000 * rand(2, 5, width),
        rand(2, 5, width, seed=1, dtype=dtype),
        norm_of(width),
        norm_of(width, 1),
    )
    assert rel(passes.norm(post, x, dtype).float(), in_torch("norm", post, x, dtype).float()) < LIMITS[dtype]
    total, normed = passes.add_norm(x, h, post, following, dtype)
    expected, expected_normed = in_torch("add_norm", x, h, post, following, dtype)
    assert total.dtype == torch.float32 and normed.dtype == dtype
    assert rel(total, expected) < 2e-6 and rel(normed.float(), expected_normed.float()) < LIMITS[dtype]
    assert rel(total - x, post(h.float())) < 1e-3  # the update itself, beside a stream thousands of times larger
    alone, nothing = passes.add_norm(x.clone(), h, post, None, dtype)
    assert torch.equal(alone, total) and nothing is None
    again = x.clone()
    assert passes.add_norm(again, h, post, None, dtype, overwrite=True)[0] is again and torch.equal(again, total)
    assert on_kernels == ["add_norm"] * 4


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("heads, kv_heads, half, batch", [(4, 2, 16, 1), (3, 1, 64, 2)])
def test_norm_and_rotation_of_heads_equal_their_definition_also_in_views(
    on_kernels, in_torch, dtype, heads, kv_heads, half, batch
):
    n, hd = 7, 2 * half
    wide = rand(batch, n, (heads + 2 * kv_heads) * hd, dtype=dtype)
    q, k, v = wide.split([heads * hd, kv_heads * hd, kv_heads * hd], dim=-1)
    norms, rope, before = (
        (norm_of(hd), norm_of(hd, 1)),
        gemma.rope_table(torch.arange(n, device=DEVICE), hd, 1e4, 2.0),
        v.clone(),
    )
    expected = in_torch("norm_rope", q.clone(), k.clone(), *norms, rope)
    for got, want in zip(passes.norm_rope(q, k, *norms, rope), expected):
        assert got.shape == want.shape and got.dtype == dtype and rel(got.float(), want.float()) < LIMITS[dtype]
    assert torch.equal(v, before) and on_kernels == ["norm_rope_"]


def test_geglu_equals_its_definition(on_kernels, in_torch):
    gate, up = 3 * rand(2, 5, 1000), rand(2, 5, 1000, seed=1)
    expected = in_torch("geglu", gate.clone(), up)
    assert rel(passes.geglu(gate, up), expected) < 2e-6 and on_kernels == ["geglu_"]


@pytest.mark.parametrize("change", ["hook", "patch", "elsewhere", "gradients", "subclass"])
def test_a_norm_that_is_more_than_its_weight_is_called_as_a_module(on_kernels, change):
    x, norm = rand(1, 4, 96), norm_of(96)
    if change == "hook":
        norm.register_forward_hook(lambda module, args, out: 2 * out)
    elif change == "patch":
        norm.weight_function = [lambda w: w]
    elif change == "elsewhere":
        norm.weight = torch.nn.Parameter(torch.empty(96, device="meta"), requires_grad=False)
        assert passes._kernels(x, norm) is None
        return
    elif change == "subclass":
        x = x.as_subclass(type("Traced", (torch.Tensor,), {}))
    with torch.inference_mode(False), torch.set_grad_enabled(change == "gradients"):
        assert passes._kernels(x.clone(), norm) is None
        expected = torch.nn.functional.rms_norm(x, (96,), norm.weight, norm.eps) * (2 if change == "hook" else 1)
        assert torch.equal(
            passes.norm(norm, x, torch.float32).as_subclass(torch.Tensor), expected.as_subclass(torch.Tensor)
        )
    assert on_kernels == []


@pytest.mark.parametrize("window", [1024, 7])
def test_hidden_states_by_way_of_the_kernels_equal_transformers(on_kernels, window):
    model = reference(window=window)
    ids = torch.randint(0, VOCAB, (20,), generator=torch.Generator().manual_seed(1))
    want = reference_states(model, ids)
    got = ours(model, sliding_window=window, rope_factor=8.0).to(DEVICE)(ids)
    assert set(on_kernels) == {"add_norm", "norm_rope_", "geglu_"} and len(on_kernels) == 7 * 5
    for layer in range(8):
        assert rel(got[layer], want[layer]) < (2e-5 if DEVICE == "cpu" else 2e-4), f"hidden state {layer}"


@pytest.mark.parametrize("gathered", [0, 1, 3 * 5 * 8 * 4, 1 << 20])
def test_states_arrive_whole_however_many_are_gathered_first(gathered):
    states = [rand(1, 5, 8, seed=s) for s in range(8)]
    out = gemma.collect(iter(states), torch.full((8, 5, 8), float("nan")), torch.device(DEVICE), gathered)
    assert torch.equal(out, torch.cat(states).cpu())
