import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from helpers import gpt, near, normals, random_tokens
from lab.exact import all_logprobs
from model import GPT, GPTConfig, ScalarGPT, sample

MATRICES = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
tanh_gelu = lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))


def gpt2_format(model):
    """The parameters as GPT-2 is published: a block's matrices are (inputs, outputs), x @ W + b."""
    return {name: p.T if name.endswith(MATRICES) else p for name, p in model.named_parameters()}


def layer_norm(x, gain, bias, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * gain + bias


def gpt2(weights, tokens, n_head=3, positions=(0, 1, 2, 3, 4, 5), sees=lambda t: range(t + 1),
         gelu=tanh_gelu, head_scale=True, eps=1e-5, output="wte.weight"):
    """GPT-2 once more, from weights in its own format, head by head: six tokens -> logits (6, V).
    What is an argument has a wrong value that the test tries; token t attends to sees(t)."""
    T, D = len(tokens), weights["wte.weight"].shape[1]
    d = D // n_head
    x = weights["wte.weight"][tokens] + weights["wpe.weight"][list(positions)]
    for n in range(sum(name.endswith("ln_1.weight") for name in weights)):
        block = f"h.{n}."
        w = {name.removeprefix(block): p for name, p in weights.items() if name.startswith(block)}
        normed = layer_norm(x, w["ln_1.weight"], w["ln_1.bias"], eps)
        qkv = normed @ w["attn.c_attn.weight"] + w["attn.c_attn.bias"]
        attended = torch.zeros_like(x)
        for t, h in itertools.product(range(T), range(n_head)):
            q, k, v = (qkv[:, i * D + h * d:i * D + (h + 1) * d] for i in range(3))
            scores = torch.stack([q[t] @ k[s] for s in sees(t)]) / (d ** 0.5 if head_scale else 1)
            attention = scores.exp() / scores.exp().sum()
            attended[t, h * d:(h + 1) * d] = sum(a * v[s] for a, s in zip(attention, sees(t)))
        x = x + attended @ w["attn.c_proj.weight"] + w["attn.c_proj.bias"]
        normed = layer_norm(x, w["ln_2.weight"], w["ln_2.bias"], eps)
        hidden = gelu(normed @ w["mlp.c_fc.weight"] + w["mlp.c_fc.bias"])
        x = x + hidden @ w["mlp.c_proj.weight"] + w["mlp.c_proj.bias"]
    x = layer_norm(x, weights["ln_f.weight"], weights["ln_f.bias"], eps)
    return x @ weights[output].T


def test_logits_and_all_gradients_are_those_of_an_independent_gpt2_and_of_none_of_its_neighbours():
    model, tokens = gpt(), random_tokens(3, 6)
    weights = gpt2_format(model)
    ours, theirs = model(tokens), torch.stack([gpt2(weights, row) for row in tokens])
    assert near(ours, theirs, 1e-10) and near(model.eval()(tokens), theirs, 1e-10)
    names, parameters = zip(*model.named_parameters(), strict=True)
    direction = normals(1)(3, 6, 5)
    for name, mine, other in zip(names, torch.autograd.grad((ours * direction).sum(), parameters),
                                 torch.autograd.grad((theirs * direction).sum(), parameters)):
        assert near(mine, other, 1e-9), name
    matrix = "h.0.attn.c_proj.weight"      # square: not transposed it would load without an error
    for name, wrong in {
        "erf GELU": dict(gelu=F.gelu), "no head scale": dict(head_scale=False),
        "one head": dict(n_head=1), "four heads": dict(n_head=4), "another eps": dict(eps=1e-6),
        "not transposed": dict(weights=weights | {matrix: weights[matrix].T}),
        "sees the future": dict(sees=lambda t: range(6)), "only itself": dict(sees=lambda t: [t]),
        "not itself": dict(sees=lambda t: range(max(t, 1))),
        "positions from 1": dict(positions=range(1, 7)), "no positions": dict(positions=[0] * 6),
    }.items():
        other = gpt2(**dict(weights=weights, tokens=tokens[0]) | wrong)
        assert not near(ours[0], other, 1e-6), name


def test_gpt2_small_has_the_published_names_shapes_and_size():
    with torch.device("meta"):
        model = GPT(GPTConfig(50257, 1024, 12, 12, 768))
    published = {"wte.weight": (50257, 768), "wpe.weight": (1024, 768), "ln_f.weight": (768,),
                 "h.11.attn.c_attn.weight": (768, 2304), "h.11.mlp.c_proj.weight": (3072, 768)}
    shapes = {name: tuple(p.shape) for name, p in gpt2_format(model).items()}
    assert shapes.items() >= published.items() and len(shapes) == 4 + 12 * 12
    assert sum(p.numel() for p in model.parameters()) == 124_439_808


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


def test_a_scalar_gpt_is_a_copy_of_its_gpt_with_another_head_that_starts_at_0():
    trained, tokens = gpt(dtype=torch.float32).requires_grad_(False), random_tokens(2, 6)
    model, before = ScalarGPT(trained), copy.deepcopy(trained.state_dict())
    assert torch.equal(model.hidden(tokens), trained.hidden(tokens)) and not model(tokens).any()
    assert all(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    assert all(torch.equal(weight, before[name]) for name, weight in trained.state_dict().items())
    weights = gpt2_format(model.double())
    theirs = torch.stack([gpt2(weights, row, output="scalar.weight")[:, 0] for row in tokens])
    assert near(model(tokens), theirs + model.scalar.bias, 1e-10)     # column t from tokens 0..t


def test_neither_later_tokens_nor_the_cache_change_an_output_however_the_sequence_is_cut():
    scalar, tokens = ScalarGPT(gpt()).double(), random_tokens(2, 6)
    torch.nn.init.normal_(scalar.scalar.weight)
    for model in (gpt(), scalar):
        for cuts in ((), (3,), (1, 2, 4), (1, 2, 3, 4, 5)):
            cache, pieces = [], []
            for a, b in itertools.pairwise([0, *cuts, 6]):
                model((tokens[:, a:b] + 1) % 5, list(cache))     # another continuation of it
                pieces.append(model(tokens[:, a:b], cache))
            assert near(torch.cat(pieces, dim=1), model(tokens), 1e-10), cuts
            assert [(*k.shape, *v.shape) for k, v in cache] == [2 * (2, 3, 6, 4)] * 2, cuts
        # So padding may follow a sequence, but not come first: positions are learned.
        assert not near(model(tokens[:, 3:]), model(tokens)[:, 3:], 1e-3)


def test_a_sequence_that_is_too_long_is_refused_with_both_numbers():
    model, tokens, cache = gpt(block_size=7), random_tokens(1, 9), []
    model(tokens[:, :6], cache)
    for n, refused in [(8, lambda: model(tokens[:, :8])), (9, lambda: model(tokens[:, 6:], cache))]:
        with pytest.raises(ValueError, match=f"^{n} tokens do not fit in a block_size of 7$"):
            refused()
    # The last token of a response predicts nothing, so no forward pass takes it.
    assert sample(model, tokens[:, :4], 4, eot=2)[0].shape == (1, 4)
    assert len(all_logprobs(model, tokens[0, :5], 3, eot=2)) == 1 + 4 + 4 ** 2 + 4 ** 3


def test_sampling_is_sampling_without_a_cache_and_refused_where_the_model_has_left_the_numbers():
    model, prompts, eot = gpt(), random_tokens(200, 3), 2
    generator, tokens, masks, builds_a_graph = torch.Generator().manual_seed(7), prompts, [], []
    for _ in range(4):
        token = torch.multinomial(model(tokens)[:, -1].softmax(-1), 1, generator=generator)
        ended = (tokens[:, 3:] == eot).any(1, keepdim=True)
        tokens = torch.cat([tokens, torch.where(ended, eot, token)], dim=1)
        masks.append(~ended)                                     # the end is in the mask

    watched = lambda *of: (builds_a_graph.append(torch.is_grad_enabled()), model(*of))[1]
    drawn, mask = sample(watched, prompts, 4, eot, torch.Generator().manual_seed(7))
    assert torch.equal(drawn, tokens[:, 3:]) and torch.equal(mask, torch.cat(masks, dim=1))
    assert builds_a_graph == [False] * 4 and 0 < mask[:, 1:].sum() < mask[:, 1:].numel()
    model.ln_f.weight.data[0] = math.inf
    with pytest.raises(FloatingPointError, match="not numbers"):
        sample(model, prompts, 3, eot)


def test_everything_is_computed_where_the_model_is(monkeypatch):
    # A device without numbers: a tensor that was made on another one would not mix with it.
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: True)    # "are they finite?"
    model, prompts = gpt(dtype=torch.float32).to("meta"), random_tokens(2, 3).to("meta")
    assert all(t.device == prompts.device for t in sample(model, prompts, 3, 2))
