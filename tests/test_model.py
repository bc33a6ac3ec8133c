import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from helpers import abc, gpt, near, random_tokens
from lab.exact import all_logprobs, all_responses
from model import GPT, GPTConfig, ScalarGPT, sample

# The matrices that GPT-2 has transposed.
MATRICES = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def gpt2_format(model):
    """The parameters as GPT-2 is published: a block's matrices are (inputs, outputs), x @ W + b."""
    return {name: p.T if name.endswith(MATRICES) else p for name, p in model.named_parameters()}


def tanh_gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))


def layer_norm(x, gain, bias, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * gain + bias


def gpt2(weights, tokens, n_head=3, positions=(0, 1, 2, 3, 4, 5), sees=lambda t: range(t + 1),
         gelu=tanh_gelu, head_scale=True, eps=1e-5, output="wte.weight"):
    """GPT-2 once more, from weights in its own format: six tokens -> logits (6, V).

    Head by head. What is an argument has a wrong value that a test tries; sees(t) are the tokens
    that token t attends to.
    """
    T, D = len(tokens), weights["wte.weight"].shape[1]
    d = D // n_head
    x = weights["wte.weight"][tokens] + weights["wpe.weight"][list(positions)]
    for n in range(sum(name.endswith("ln_1.weight") for name in weights)):
        block = f"h.{n}."
        w = {name.removeprefix(block): p for name, p in weights.items() if name.startswith(block)}
        normed = layer_norm(x, w["ln_1.weight"], w["ln_1.bias"], eps)
        qkv = normed @ w["attn.c_attn.weight"] + w["attn.c_attn.bias"]
        rows = []
        for t in range(T):
            heads = []
            for h in range(n_head):
                q, k, v = (qkv[:, i * D + h * d:i * D + (h + 1) * d] for i in range(3))
                scores = torch.stack([q[t] @ k[s] for s in sees(t)])
                scores = scores / (math.sqrt(d) if head_scale else 1)
                attention = scores.exp() / scores.exp().sum()
                heads.append(sum(a * v[s] for a, s in zip(attention, sees(t), strict=True)))
            rows.append(torch.cat(heads))
        x = x + torch.stack(rows) @ w["attn.c_proj.weight"] + w["attn.c_proj.bias"]
        normed = layer_norm(x, w["ln_2.weight"], w["ln_2.bias"], eps)
        hidden = gelu(normed @ w["mlp.c_fc.weight"] + w["mlp.c_fc.bias"])
        x = x + hidden @ w["mlp.c_proj.weight"] + w["mlp.c_proj.bias"]
    x = layer_norm(x, weights["ln_f.weight"], weights["ln_f.bias"], eps)
    return x @ weights[output].T


# ---------------------------------------------------------------- the network is GPT-2
def test_logits_and_all_gradients_agree_with_an_independent_gpt2():
    # Theirs computes each row alone, with one matrix for input and output, and without dropout.
    model, tokens = gpt(), random_tokens(3, 6)
    weights = gpt2_format(model)
    ours, theirs = model(tokens), torch.stack([gpt2(weights, row) for row in tokens])
    assert near(ours, theirs, 1e-10) and near(model.eval()(tokens), theirs, 1e-10)
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(ours.shape, dtype=torch.float64, generator=generator)
    names, parameters = zip(*model.named_parameters(), strict=True)
    for name, mine, other in zip(names, torch.autograd.grad((ours * direction).sum(), parameters),
                                 torch.autograd.grad((theirs * direction).sum(), parameters)):
        assert near(mine, other, 1e-9), name


def test_no_neighbour_of_gpt2_has_these_logits():
    model, tokens = gpt(), random_tokens(6)
    weights = gpt2_format(model)
    matrix = "h.0.attn.c_proj.weight"      # square: not transposed it would load without an error
    neighbours = {
        "erf GELU": dict(gelu=F.gelu), "no head scale": dict(head_scale=False),
        "one head": dict(n_head=1), "four heads": dict(n_head=4), "another eps": dict(eps=1e-6),
        "sees the future": dict(sees=lambda t: range(6)),
        "not itself": dict(sees=lambda t: range(max(t, 1))),
        "only itself": dict(sees=lambda t: [t]),
        "positions from 1": dict(positions=range(1, 7)), "no positions": dict(positions=[0] * 6),
        "not transposed": dict(weights=weights | {matrix: weights[matrix].T}),
        # Mistakes of a cache that has three tokens when three more come: positions, mask.
        "stale positions": dict(positions=[0, 1, 2, 0, 1, 2]),
        "a mask without offset": dict(sees=lambda t: range(t % 3 + 1)),
        "no cached tokens": dict(sees=lambda t: range(t // 3 * 3, t + 1)),
    }
    with torch.no_grad():
        logits = model(tokens[None])[0]
        assert near(logits, gpt2(weights, tokens), 1e-10)
        for name, wrong in neighbours.items():
            other = gpt2(**{"weights": weights, "tokens": tokens, **wrong})
            assert not near(logits, other, 1e-6), name


def test_gpt2_small_has_the_published_names_shapes_and_size():
    with torch.device("meta"):
        model = GPT(GPTConfig(50257, 1024, 12, 12, 768))
    published = {"wte.weight": (50257, 768), "wpe.weight": (1024, 768)}
    layers = {"ln_f": (768,)}
    for n in range(12):
        layers |= {
            f"h.{n}.ln_1": (768,), f"h.{n}.attn.c_attn": (768, 2304),
            f"h.{n}.attn.c_proj": (768, 768), f"h.{n}.ln_2": (768,),
            f"h.{n}.mlp.c_fc": (768, 3072), f"h.{n}.mlp.c_proj": (3072, 768)}
    for name, shape in layers.items():
        published |= {f"{name}.weight": shape, f"{name}.bias": shape[-1:]}
    assert {name: tuple(p.shape) for name, p in gpt2_format(model).items()} == published
    assert model.state_dict().keys() == published.keys()
    assert sum(p.numel() for p in model.parameters()) == 124_439_808


def test_the_default_gpt_is_the_experiments():
    config = GPTConfig(26, 7)
    assert config == GPTConfig(26, 7, n_layer=2, n_head=4, n_embd=64)
    embeddings, block, norm = (26 + 7) * 64, 12 * 64 ** 2 + 13 * 64, 2 * 64
    assert sum(p.numel() for p in GPT(config).parameters()) == embeddings + 2 * block + norm


def test_initialisation_is_gpt2s():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=500, block_size=200, n_layer=3, n_head=4, n_embd=128))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            std = 0.02 / math.sqrt(2 * 3) if name.endswith("c_proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.03), name
            assert abs(parameter.mean().item()) < 1e-3, name
        else:
            assert (parameter == (1 if name.endswith("weight") else 0)).all(), name


def test_a_scalar_gpt_is_the_same_network_with_another_head():
    trained, tokens = gpt(dtype=torch.float32), random_tokens(2, 6)
    model = ScalarGPT(trained).double()
    with torch.no_grad():
        model.scalar.weight.normal_(), model.scalar.bias.normal_()
        weights = gpt2_format(trained.double()) | {"scalar.weight": model.scalar.weight}
        theirs = torch.stack([gpt2(weights, row, output="scalar.weight") for row in tokens])
        assert model(tokens).shape == (2, 6)                     # column t from tokens 0..t
        assert near(model(tokens)[..., None], theirs + model.scalar.bias, 1e-10)


# ---------------------------------------------------------------- causality and the cache
def test_a_token_changes_no_logits_before_it_and_all_from_it_on():
    model, tokens = gpt(), random_tokens(2, 6)
    logits = model(tokens)
    for t in range(6):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % 5
        difference = (logits - model(changed)).abs().amax(dim=(0, 2))
        assert (difference[:t] < 1e-12).all() and (difference[t:] > 1e-3).all(), t
    # So the last three tokens may be the padding of the first three. The first three may not be
    # that of the last: positions are learned.
    assert near(model(tokens[:, :3]), logits[:, :3])
    assert not near(model(tokens[:, 3:]), logits[:, 3:], 1e-3)


def test_the_cache_changes_no_output_however_the_sequence_is_cut():
    scalar, tokens = ScalarGPT(gpt()).double(), random_tokens(2, 6)
    torch.nn.init.normal_(scalar.scalar.weight)
    for model in (gpt(), scalar):
        for cuts in (cuts for n in range(6) for cuts in itertools.combinations(range(1, 6), n)):
            cache = []
            pieces = [model(tokens[:, a:b], cache) for a, b in itertools.pairwise([0, *cuts, 6])]
            assert near(torch.cat(pieces, dim=1), model(tokens), 1e-10), cuts
            assert [(*k.shape, *v.shape) for k, v in cache] == [2 * (2, 3, 6, 4)] * 2, cuts


def test_two_continuations_of_one_cache_do_not_disturb_each_other():
    model, tokens, cache = gpt(), random_tokens(2, 6), []
    model(tokens[:, :3], cache)
    branch, before = list(cache), [(k.clone(), v.clone()) for k, v in cache]
    model((tokens[:, 3:] + 1) % 5, branch)
    for (k, v), (k_before, v_before) in zip(cache, before, strict=True):
        assert torch.equal(k, k_before) and torch.equal(v, v_before)
    assert near(model(tokens[:, 3:], cache), model(tokens)[:, 3:], 1e-10)


def test_a_sequence_that_is_too_long_is_refused_with_both_numbers():
    model, tokens, cache = gpt(block_size=7), random_tokens(1, 9), []
    assert model(tokens[:, :7]).shape == (1, 7, 5)
    with pytest.raises(ValueError, match="^8 tokens do not fit in a block_size of 7$"):
        model(tokens[:, :8])
    model(tokens[:, :6], cache)
    with pytest.raises(ValueError, match="^9 tokens do not fit in a block_size of 7$"):
        model(tokens[:, 6:], cache)
    # The refused call left the cache alone.
    assert near(model(tokens[:, 6:7], cache), model(tokens[:, :7])[:, 6:], 1e-10)
    # The last token of a response predicts nothing, so no forward pass takes it.
    assert sample(model, tokens[:, :4], 4, eot=2)[0].shape == (1, 4)
    assert len(all_logprobs(model, tokens[0, :5], 3, eot=2)) == 1 + 4 + 4 ** 2 + 4 ** 3
    with pytest.raises(ValueError, match="8 tokens .* block_size of 7"):
        sample(gpt(noise=0), tokens[:, :4], 5, 2, torch.Generator().manual_seed(0))


# ---------------------------------------------------------------- sampling
def test_samples_have_the_enumerated_probabilities():
    # Two prompts, alternating in one batch. Each sample is one of the 15 responses: filled with
    # eot behind the first, and masked up to it.
    def chi_square(counts, probs):
        expected = counts.sum() * probs
        return ((counts - expected) ** 2 / expected).sum().item()

    model, prompts, eot = abc(seed=5), torch.tensor([[0, 1], [2, 2]]), 1
    responses, mask = all_responses(3, 3, eot)
    generator = torch.Generator().manual_seed(0)
    drawn, drawn_mask = sample(model, prompts.repeat(6000, 1), 3, eot, generator)
    index = (drawn[:, None] == responses).all(-1).int().argmax(1)
    assert torch.equal(responses[index], drawn) and torch.equal(mask[index], drawn_mask)
    counts = [torch.bincount(index[i::2], minlength=15) for i in range(2)]
    probs = [all_logprobs(model, prompt, 3, eot).exp() for prompt in prompts]
    # 65: the chance of a chi-square above it, 14 degrees of freedom, is 1e-8.
    assert chi_square(counts[0], probs[0]) < 65 and chi_square(counts[1], probs[1]) < 65
    assert chi_square(counts[0], probs[1]) > 300                 # the other row's prompt
    assert chi_square(counts[1], probs[0]) > 300
    assert chi_square(counts[0], probs[0].sqrt() / probs[0].sqrt().sum()) > 300    # flatter


def test_sampling_with_the_cache_is_sampling_without_it_from_the_same_generator():
    model, prompts, eot = gpt(), random_tokens(200, 3), 2
    generator, tokens, builds_a_graph = torch.Generator().manual_seed(7), prompts, []
    for _ in range(4):
        token = torch.multinomial(model(tokens)[:, -1].softmax(-1), 1, generator=generator)
        ended = (tokens[:, 3:] == eot).any(1, keepdim=True)
        tokens = torch.cat([tokens, torch.where(ended, eot, token)], dim=1)

    def watched(*inputs):
        builds_a_graph.append(torch.is_grad_enabled())
        return model(*inputs)

    drawn, _ = sample(watched, prompts, 4, eot, torch.Generator().manual_seed(7))
    assert torch.equal(drawn, tokens[:, 3:]) and builds_a_graph == [False] * 4


def test_sampling_from_a_model_that_has_left_the_numbers_is_refused():
    for weight in (math.nan, math.inf):
        model = gpt(dtype=torch.float32)
        model.ln_f.weight.data[0] = weight
        with pytest.raises(FloatingPointError, match="not numbers"):
            sample(model, random_tokens(2, 3), 3, 2)


# ---------------------------------------------------------------- precision and device
def test_bfloat16_and_float64_models_work():
    tokens = random_tokens(2, 5)
    exact = gpt(noise=0.2)(tokens)
    tolerances = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.1}
    for dtype, tolerance in tolerances.items():
        model, cache = gpt(noise=0.2).to(dtype), []
        logits = torch.cat([model(tokens[:, :3], cache), model(tokens[:, 3:], cache)], dim=1)
        assert logits.dtype == dtype and near(logits.double(), exact, tolerance), dtype
        assert sample(model, tokens[:, :2], 3, 2)[0].shape == (2, 3)


def test_everything_is_computed_where_the_model_is(monkeypatch):
    # A device without numbers: a tensor that was made on another one would not mix with it.
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: True)    # "are they finite?"
    model, prompts, cache = gpt(dtype=torch.float32).to("meta"), random_tokens(2, 3).to("meta"), []
    assert model(prompts, cache).device == model(prompts[:, :2], cache).device == prompts.device
    assert all(t.device == prompts.device for t in sample(model, prompts, 3, 2))
