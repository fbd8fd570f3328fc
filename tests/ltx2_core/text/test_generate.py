"""Writing text: greedy texts equal transformers', sampling equals the host's, caches, images' attention, cancelling."""

import pytest
import torch

import reference_gemma
import reference_gemma4
from ltx2_gguf.ltx2_core.files.gemma import hf_name
from ltx2_gguf.ltx2_core.files.weights import open_weights
from ltx2_gguf.ltx2_core.text import generate as writing
from ltx2_gguf.ltx2_core.text.config import GemmaConfig
from ltx2_gguf.ltx2_core.text.gemma import GemmaModel
from ltx2_gguf.ltx2_core.text.generate import Prompt, Sampler, Sampling, generate
from ltx2_gguf.ltx2_core.text.tokenizer import GemmaTokenizer
from ltx2_gguf.quant import tensor

GREEDY = Sampling(do_sample=False)


def gemma_of(path):
    """(model, tokenizer) of a Gemma GGUF."""
    weights = open_weights(path)
    names = {hf_name(name): name for name in weights.names()}
    with torch.inference_mode():
        config = GemmaConfig.from_shapes({hf: weights.shape(name) for hf, name in names.items()}, weights.metadata)
        net = GemmaModel(config, device="meta")
        net.load_state_dict({hf: weights.load_packed(name, torch.float32) for hf, name in names.items()}, assign=True)
    return net, GemmaTokenizer.from_gguf(weights.metadata)


def transformers_text(model, kind, ids, count):
    """Greedy continuation by transformers of a text model with its embedding table as the last matrix."""
    head = kind(model.config).eval()
    head.model = model
    head.lm_head.weight = model.embed_tokens.weight
    with torch.no_grad():
        out = head.generate(
            torch.tensor([ids]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    return out[0, len(ids) :].tolist()


@pytest.mark.parametrize("n, window", [(1, 5), (4, 5), (5, 5), (12, 5), (12, 1024)])
def test_greedy_texts_of_gemma_3_equal_transformers(n, window):
    from transformers import Gemma3ForCausalLM

    model = reference_gemma.reference(window=window)
    ids = torch.randint(0, reference_gemma.VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist()
    net = reference_gemma.ours(model, sliding_window=window, rope_factor=8.0)
    assert generate(net, Prompt(ids), 24, {-1}, GREEDY) == transformers_text(model, Gemma3ForCausalLM, ids, 24)


@pytest.mark.parametrize("n", [3, 20])
def test_greedy_texts_of_gemma_4_equal_the_longer_prompts_last_logits(n):
    """Every token is what the whole text so far, run at once, puts first."""
    model = reference_gemma4.ours(reference_gemma4.reference(), **{"general.architecture": "gemma4"})
    ids = torch.randint(0, reference_gemma4.VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist()
    text = generate(model, Prompt(ids), 20, {-1}, GREEDY)
    with torch.inference_mode():
        state = model(torch.tensor(ids + text))[-1]
        want = (state @ model.model.embed_tokens.weight.T).argmax(-1)[n - 1 : -1].tolist()
    assert text == want and len(set(text)) > 1


def test_writing_ends_with_the_first_stop_token_and_at_the_longest_length():
    net = reference_gemma.ours(reference_gemma.reference(), rope_factor=8.0)
    text = generate(net, Prompt([2, 5, 7]), 20, set(), GREEDY)
    assert len(text) == 20
    stop = text[6]
    assert generate(net, Prompt([2, 5, 7]), 20, {stop}, GREEDY) == text[: text.index(stop) + 1]


def test_cancelling_stops_at_once_and_leaves_the_weights_as_they_were():
    net = reference_gemma.ours(reference_gemma.reference(), rope_factor=8.0)
    before = dict(net.named_parameters())
    calls = []

    def cancel():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(net, Prompt([2, 5, 7]), 20, set(), GREEDY, on_token=cancel)
    assert len(calls) == 3 and all(value is before[name] for name, value in net.named_parameters())


@pytest.mark.parametrize("budget", [0, 1 << 30])
def test_packed_weights_write_what_their_decoded_values_write(budget, monkeypatch):
    """Packed products per token (large models) and matrices decoded once (small ones), each against dense weights."""
    from ltx2_gguf.quant import decode
    from ltx2_gguf.quant.formats import FORMATS

    monkeypatch.setattr(writing, "DECODED_BYTES", budget)
    net = reference_gemma.ours(reference_gemma.reference(), rope_factor=8.0)
    with torch.inference_mode():
        packed = {}
        for name, value in list(net.named_parameters()):
            if value.ndim == 2:
                raw = decode.quantize(value.float(), FORMATS["Q8_0"])
                packed[name] = tensor.pack(raw, "Q8_0", tuple(value.shape), torch.float32)
        net.load_state_dict({**net.state_dict(), **{n: tensor.unpack(p) for n, p in packed.items()}}, assign=True)
        want = generate(net, Prompt([2, 5, 7]), 16, set(), GREEDY)
        for name, value in packed.items():
            owner, _, leaf = name.rpartition(".")
            setattr(net.get_submodule(owner), leaf, torch.nn.Parameter(value, requires_grad=False))
    assert generate(net, Prompt([2, 5, 7]), 16, set(), GREEDY) == want
    assert all(tensor.is_packed(value) for name, value in net.named_parameters() if name in packed)


@pytest.mark.parametrize("options", [
    {}, {"top_k": 0}, {"top_k": 0, "top_p": 1.0, "min_p": 0.1}, {"repetition_penalty": 1.3, "presence_penalty": 0.7}, {"temperature": 0.4, "min_p": 0.05, "top_p": 0.7},
])  # fmt: skip
def test_sampling_draws_what_the_host_draws(host, options):
    from comfy.text_encoders.llama import BaseGenerate

    options = Sampling(**{"temperature": 0.9, "top_k": 40, **options, "seed": 7})
    ours, theirs = Sampler(options, 500, torch.device("cpu")), torch.Generator().manual_seed(7)
    logits = [torch.randn(500, generator=torch.Generator().manual_seed(i // 3)) * 4 for i in range(30)]
    history, drawn = [], []
    for one in logits:
        drawn.append(ours(one).item())
        host_token = BaseGenerate.sample_token(
            None, one.clone()[None], options.temperature, options.top_k, options.top_p, options.min_p, options.repetition_penalty,
            history, theirs, presence_penalty=options.presence_penalty,
        )  # fmt: skip
        history.append(host_token.item())
    assert drawn == history and len(set(drawn)) > 5


def test_equal_seeds_write_equal_texts_and_other_seeds_others():
    net = reference_gemma.ours(reference_gemma.reference(), rope_factor=8.0)
    texts = [generate(net, Prompt([2, 5, 7]), 20, set(), Sampling(temperature=1.5, seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.slow
def test_the_real_file_writes_what_transformers_writes_from_it(gemma_gguf):
    from transformers import AutoModelForCausalLM

    net, tokenizer = gemma_of(gemma_gguf)
    ids = tokenizer.encode("<start_of_turn>user\nName three birds.<end_of_turn>\n<start_of_turn>model\n")
    text = generate(net, Prompt(ids), 30, {1, 106}, GREEDY)
    reference = AutoModelForCausalLM.from_pretrained(
        str(gemma_gguf.parent), gguf_file=gemma_gguf.name, dtype=torch.float32
    ).eval()
    with torch.no_grad():
        out = reference.generate(torch.tensor([ids]), max_new_tokens=30, do_sample=False, eos_token_id=[1, 106])
    assert text == out[0, len(ids) :].tolist()
