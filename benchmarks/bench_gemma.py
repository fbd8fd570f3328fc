"""Encode a prompt, and write text, with a Gemma-3 12B of random weights: packed formats against bf16. Or write with a file of your own.

    python benchmarks/bench_gemma.py [--tokens 128 1024] [--formats BF16 Q4_0 …] [--write 128]
    python benchmarks/bench_gemma.py --device cpu --gguf gemma-3-270m-Q4_K_M.gguf

``--write``: tokens per text (0: none); the figure leaves out the prompt. Rows "write" give tokens per second.
"""

import gc
import time

import torch

from common import arguments, load_pack, measure, peak_memory, reset_memory, save, show
from models import random_value


def gemma_config(tiny=False):
    """Gemma-3 12B, or a small stand-in."""
    load_pack()
    from ltx2_gguf.ltx2_core.text.config import GemmaConfig

    layers = 2 if tiny else 48
    shape = (
        {"vocab_size": 512, "width": 256, "ffn_width": 512}
        if tiny
        else {"vocab_size": 262144, "width": 3840, "ffn_width": 15360}
    )
    return GemmaConfig(
        **shape, num_layers=layers, num_heads=4 if tiny else 16, num_kv_heads=2 if tiny else 8, head_dim=256, query_width=256, sliding_window=1024,
        sliding_layers=tuple((i + 1) % 6 != 0 for i in range(layers)), rope_theta=1e6, rope_local_theta=1e4, rope_factor=8.0, norm_eps=1e-6,
    )  # fmt: skip


def build(config, fmt_name, device):
    """GemmaModel in bf16 with random weights: projections packed, the embedding table in bf16."""
    from common import random_raw
    from ltx2_gguf.ltx2_core.text.gemma import GemmaModel
    from ltx2_gguf.quant import tensor

    model = GemmaModel(config, dtype=torch.bfloat16, device="meta")
    for name, parameter in list(model.named_parameters()):
        shape = tuple(parameter.shape)
        if fmt_name != "BF16" and name.endswith("_proj.weight"):
            value = tensor.pack(random_raw(fmt_name, *shape, device), fmt_name, shape, torch.bfloat16)
        else:
            value = random_value(name, shape, device, parameter.dtype)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(value, requires_grad=False))
    return model.eval()


def tokens_per_second(model, device, count, prompt=64):
    """Speed of writing ``count`` tokens after a prompt of ``prompt``, sampled as ComfyUI's node does; the first eight are not counted."""
    from ltx2_gguf.ltx2_core.text.generate import Prompt, Sampling, generate

    ids = torch.randint(0, model.config.vocab_size, (prompt,)).tolist()
    sampling = Sampling(temperature=0.7, top_k=64, min_p=0.05, repetition_penalty=1.05, seed=0)

    def seconds(n):
        start = time.perf_counter()
        assert (
            len(generate(model, Prompt(ids), n, set(), sampling, device)) == n
        )  # the last token is on the host: nothing is left to run
        return time.perf_counter() - start

    seconds(8)  # kernels are compiled here
    return (count - 8) / (seconds(count) - seconds(8))


def real_file(path, device):
    """The text model of a Gemma GGUF, packed."""
    load_pack()
    from ltx2_gguf.ltx2_core.files.gemma import hf_name
    from ltx2_gguf.ltx2_core.files.weights import open_weights
    from ltx2_gguf.ltx2_core.text.config import GemmaConfig
    from ltx2_gguf.ltx2_core.text.gemma import GemmaModel

    weights, dtype = open_weights(path), torch.float32 if device == "cpu" else torch.bfloat16
    names = {hf_name(name): name for name in weights.names() if hf_name(name) != name}
    model = GemmaModel(
        GemmaConfig.from_shapes({hf: weights.shape(n) for hf, n in names.items()}, weights.metadata),
        dtype=dtype,
        device="meta",
    )
    tensors = {
        hf: weights.load(n, torch.float32) if hf.endswith("norm.weight") else weights.load_packed(n, dtype)
        for hf, n in names.items()
    }
    model.load_state_dict({hf: value.to(device) for hf, value in tensors.items()}, assign=True)
    return model.eval()


def main():
    defaults = {
        "tokens": (128, 1024),
        "formats": ("BF16", "Q4_0", "Q8_0", "Q4_K"),
        "repeats": 5,
        "tiny": False,
        "write": 128,
        "gguf": "",
    }
    args = arguments(__doc__, **defaults).parse_args()
    if args.gguf:
        with torch.inference_mode():
            speed = tokens_per_second(real_file(args.gguf, args.device), args.device, args.write)
        show("Gemma, writing", [{"file": args.gguf, "tokens": args.write, "tokens/s": speed}])
        return
    config, rows, dense = gemma_config(args.tiny), [], {}
    with torch.inference_mode():
        for fmt_name in args.formats:
            model = build(config, fmt_name, args.device)
            for tokens in args.tokens:
                ids = torch.randint(0, config.vocab_size, (1, tokens), device=args.device)
                reset_memory(args.device)
                before = peak_memory(args.device)
                ms = measure(lambda: model(ids, collect_device=args.device), args.device, args.repeats)
                dense.setdefault(tokens, ms if fmt_name == "BF16" else None)
                row = {
                    "format": fmt_name,
                    "tokens": tokens,
                    "ms": ms,
                    "peak MB above weights": (peak_memory(args.device) - before) / 2**20,
                }
                if dense[tokens]:
                    row["x bf16"] = ms / dense[tokens]
                rows.append(row)
            if args.write:
                rows.append(
                    {
                        "format": fmt_name,
                        "tokens": args.write,
                        "tokens/s": tokens_per_second(model, args.device, args.write),
                    }
                )
            del model
            gc.collect()
            reset_memory(args.device)
    show("Gemma-3 12B, encoding and writing", rows)
    save(args.out, "gemma", args.device, rows)


if __name__ == "__main__":
    main()
