import itertools
import math

import pytest
import torch

import data
from lab.exact import all_logprobs, all_responses
from model import GPT, GPTConfig, ScalarGPT, sample
from models import abc, close, gpt, random_tokens

# The matrices that GPT-2 has transposed.
MATRICES = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def gpt2_format(model):
    """The parameters as GPT-2 is published: a block's matrices are (inputs, outputs), x @ W + b."""
    return {name: p.T if name.endswith(MATRICES) else p for name, p in model.named_parameters()}


def tanh_gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))


def erf_gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def layer_norm(x, gain, bias, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * gain + bias


def gpt2(weights, tokens, n_head=3, positions=None, sees=lambda t: range(t + 1), gelu=tanh_gelu,
         head_scale=True, eps=1e-5, output="wte.weight"):
    """GPT-2 once more, from weights in its own format: one sequence (T,) -> logits (T, V).

    Head by head. What is an argument has a wrong value that a test tries; sees(t) are the tokens
    that token t attends to.
    """
    T, D = len(tokens), weights["wte.weight"].shape[1]
    d = D // n_head
    positions = range(T) if positions is None else positions
    x = weights["wte.weight"][tokens] + weights["wpe.weight"][positions]
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


def chi_square(counts, probs):
    expected = counts.sum() * probs
    return ((counts - expected) ** 2 / expected).sum().item()


# ---------------------------------------------------------------- the network is GPT-2
def test_logits_and_all_gradients_agree_with_an_independent_gpt2():
    model, tokens = gpt(), random_tokens(3, 6)
    weights = gpt2_format(model)
    ours, theirs = model(tokens), torch.stack([gpt2(weights, row) for row in tokens])
    assert close(ours, theirs)
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(ours.shape, dtype=torch.float64, generator=generator)
    parameters = list(model.parameters())
    for mine, other in zip(torch.autograd.grad((ours * direction).sum(), parameters),
                           torch.autograd.grad((theirs * direction).sum(), parameters),
                           strict=True):
        assert close(mine, other, 1e-9)


@pytest.mark.parametrize("wrong", [
    dict(gelu=erf_gelu), dict(head_scale=False), dict(n_head=1), dict(n_head=4), dict(eps=1e-6),
    dict(sees=lambda t: range(6)), dict(sees=lambda t: range(max(t, 1))), dict(sees=lambda t: [t]),
    dict(positions=[1, 2, 3, 4, 5, 6]), dict(positions=[0] * 6),
], ids=["erf GELU", "no head scale", "one head", "four heads", "another eps", "sees the future",
        "not itself", "only itself", "positions from 1", "no positions"])
def test_no_neighbour_of_gpt2_has_these_logits(wrong):
    model, tokens = gpt(), random_tokens(6)
    with torch.no_grad():
        assert not close(model(tokens[None])[0], gpt2(gpt2_format(model), tokens, **wrong), 1e-6)


def test_gpt2_small_has_the_published_names_shapes_and_size():
    with torch.device("meta"):
        model = GPT(GPTConfig(50257, 1024, 12, 12, 768))
    published = {"wte.weight": (50257, 768), "wpe.weight": (1024, 768),
                 "ln_f.weight": (768,), "ln_f.bias": (768,)}
    for n in range(12):
        published |= {
            f"h.{n}.ln_1.weight": (768,), f"h.{n}.ln_1.bias": (768,),
            f"h.{n}.attn.c_attn.weight": (768, 2304), f"h.{n}.attn.c_attn.bias": (2304,),
            f"h.{n}.attn.c_proj.weight": (768, 768), f"h.{n}.attn.c_proj.bias": (768,),
            f"h.{n}.ln_2.weight": (768,), f"h.{n}.ln_2.bias": (768,),
            f"h.{n}.mlp.c_fc.weight": (768, 3072), f"h.{n}.mlp.c_fc.bias": (3072,),
            f"h.{n}.mlp.c_proj.weight": (3072, 768), f"h.{n}.mlp.c_proj.bias": (768,),
        }
    ours = {name: tuple(p.T.shape if name.endswith(MATRICES) else p.shape)
            for name, p in model.state_dict().items()}
    assert ours == published
    assert sum(p.numel() for p in model.parameters()) == 124_439_808


def test_the_default_gpt_is_the_experiments():
    model = GPT(GPTConfig(data.ENCODING.n_vocab, data.BLOCK_SIZE))
    assert model.config == GPTConfig(26, 7, n_layer=2, n_head=4, n_embd=64)
    embeddings, block, norm = (26 + 7) * 64, 12 * 64 ** 2 + 13 * 64, 2 * 64
    assert sum(p.numel() for p in model.parameters()) == embeddings + 2 * block + norm == 102_208


def test_a_square_matrix_that_is_not_transposed_changes_the_logits():
    # attn.c_proj alone would load without an error.
    model, tokens = gpt(), random_tokens(6)
    weights = gpt2_format(model)
    weights["h.0.attn.c_proj.weight"] = weights["h.0.attn.c_proj.weight"].T
    with torch.no_grad():
        assert not close(model(tokens[None])[0], gpt2(weights, tokens), 1e-6)


def test_output_weights_are_tied_to_the_token_embedding():
    # Token 4 is not in the input, and its logit is taken: row 4 has a gradient as an output, rows 0
    # and 1 as inputs.
    model = gpt(vocab_size=6)
    model(torch.tensor([[0, 1, 0]]))[..., 4].sum().backward()
    has_gradient = model.wte.weight.grad.abs().sum(1) > 1e-9
    assert has_gradient.tolist() == [True, True, False, False, True, False]


def test_training_mode_changes_nothing():
    model, tokens = gpt(), random_tokens(2, 6)
    assert torch.equal(model.train()(tokens), model.eval()(tokens))


@pytest.mark.parametrize("n_layer", [1, 3])
def test_initialisation_is_gpt2s(n_layer):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=500, block_size=200, n_layer=n_layer, n_head=4, n_embd=128))
    residual_std = 0.02 / math.sqrt(2 * n_layer)
    for name, parameter in model.named_parameters():
        if name.endswith("c_proj.weight"):
            assert parameter.std().item() == pytest.approx(residual_std, rel=0.03), name
        elif parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.03), name
        else:
            assert (parameter == (1 if name.endswith("weight") else 0)).all(), name
        assert abs(parameter.mean().item()) < 1e-3 or parameter.dim() == 1, name


def test_a_scalar_gpt_is_the_same_network_with_another_head():
    model, tokens = ScalarGPT(gpt()).double(), random_tokens(2, 6)
    with torch.no_grad():
        model.scalar.weight.normal_(), model.scalar.bias.normal_()
        weights = gpt2_format(model)
        theirs = torch.stack([gpt2(weights, row, output="scalar.weight") for row in tokens])
        assert model(tokens).shape == (2, 6)                     # column t from tokens 0..t
        assert close(model(tokens)[..., None], theirs + model.scalar.bias)


# ---------------------------------------------------------------- causality and the cache
@pytest.mark.parametrize("t", range(6))
def test_a_token_changes_no_logits_before_it_and_all_from_it_on(t):
    model, tokens = gpt(), random_tokens(2, 6)
    changed = tokens.clone()
    changed[:, t] = (changed[:, t] + 1) % 5
    difference = (model(tokens) - model(changed)).abs().amax(dim=(0, 2))
    assert (difference[:t] < 1e-12).all() and (difference[t:] > 1e-3).all()


@pytest.mark.parametrize("padding", [1, 2, 4])
def test_right_padding_changes_no_logits(padding):
    model, tokens = gpt(), random_tokens(2, 3)
    for filler in range(5):
        padded = torch.cat([tokens, torch.full((2, padding), filler)], dim=1)
        assert close(model(padded)[:, :3], model(tokens), 1e-12)


def test_left_padding_would_change_the_logits():
    # Positions are learned: this model is to be padded on the right alone.
    model, tokens = gpt(), random_tokens(2, 3)
    padded = torch.cat([torch.zeros(2, 1, dtype=torch.long), tokens], dim=1)
    assert not close(model(padded)[:, 1:], model(tokens), 1e-3)


def test_rows_of_a_batch_do_not_see_each_other():
    model, tokens = gpt(), random_tokens(4, 6)
    assert close(model(tokens), torch.cat([model(row[None]) for row in tokens]), 1e-12)


@pytest.mark.parametrize("cuts", [cuts for n in range(6)
                                  for cuts in itertools.combinations(range(1, 6), n)])
def test_the_cache_changes_no_output_however_the_sequence_is_cut(cuts):
    scalar = ScalarGPT(gpt()).double()
    torch.nn.init.normal_(scalar.scalar.weight)
    for model in (gpt(), scalar):
        tokens, cache = random_tokens(2, 6), []
        pieces = [model(tokens[:, a:b], cache) for a, b in itertools.pairwise([0, *cuts, 6])]
        assert close(torch.cat(pieces, dim=1), model(tokens))
        assert all(k.shape == v.shape == (2, 3, 6, 4) for k, v in cache) and len(cache) == 2


def test_a_cache_with_stale_positions_or_a_mask_without_offset_has_other_logits():
    model, tokens, cache = gpt(), random_tokens(6), []
    with torch.no_grad():
        ours = torch.cat([model(tokens[None, :3], cache), model(tokens[None, 3:], cache)], dim=1)[0]
        weights = gpt2_format(model)
        assert close(ours, gpt2(weights, tokens))
        assert not close(ours, gpt2(weights, tokens, positions=[0, 1, 2, 0, 1, 2]), 1e-3)
        zero_alone, itself_alone = lambda t: range(t % 3 + 1), lambda t: range(t // 3 * 3, t + 1)
        assert not close(ours, gpt2(weights, tokens, sees=zero_alone), 1e-3)        # token 3 does
        assert not close(ours, gpt2(weights, tokens, sees=itself_alone), 1e-3)      # token 3 does


def test_two_continuations_of_one_cache_do_not_disturb_each_other():
    model, tokens, cache = gpt(), random_tokens(2, 6), []
    model(tokens[:, :3], cache)
    branch, before = list(cache), [(k.clone(), v.clone()) for k, v in cache]
    model((tokens[:, 3:] + 1) % 5, branch)
    for (k, v), (k_before, v_before) in zip(cache, before, strict=True):
        assert torch.equal(k, k_before) and torch.equal(v, v_before)
    assert close(model(tokens[:, 3:], cache), model(tokens)[:, 3:])


def test_a_sequence_that_is_too_long_is_refused_with_both_numbers():
    model, tokens, cache = gpt(block_size=7), random_tokens(1, 9), []
    assert model(tokens[:, :7]).shape == (1, 7, 5)
    with pytest.raises(ValueError, match="^8 tokens do not fit in a block_size of 7$"):
        model(tokens[:, :8])
    model(tokens[:, :6], cache)
    with pytest.raises(ValueError, match="^9 tokens do not fit in a block_size of 7$"):
        model(tokens[:, 6:], cache)
    # The refused call left the cache alone.
    assert close(model(tokens[:, 6:7], cache), model(tokens[:, :7])[:, 6:])


# ---------------------------------------------------------------- sampling
def test_samples_have_the_enumerated_probabilities():
    # Two prompts, alternating in one batch. 65: the chance of a chi-square above it, 14 degrees of
    # freedom, is 1e-8.
    model, prompts, eot = abc(seed=5), torch.tensor([[0, 1], [2, 2]]), 1
    responses, mask = all_responses(3, 3, eot)
    generator = torch.Generator().manual_seed(0)
    drawn, drawn_mask = sample(model, prompts.repeat(20_000, 1), 3, eot, generator)
    index = (drawn[:, None] == responses).all(-1).int().argmax(1)
    assert torch.equal(responses[index], drawn) and torch.equal(mask[index], drawn_mask)
    counts = [torch.bincount(index[i::2], minlength=15) for i in range(2)]
    probs = [all_logprobs(model, prompt, 3, eot).exp() for prompt in prompts]
    assert chi_square(counts[0], probs[0]) < 65 and chi_square(counts[1], probs[1]) < 65
    assert chi_square(counts[0], probs[1]) > 1000                # the other row's prompt
    assert chi_square(counts[1], probs[0]) > 1000
    assert chi_square(counts[0], probs[0].sqrt() / probs[0].sqrt().sum()) > 1000    # flatter


@pytest.mark.parametrize("eot", [0, 1, 2])
def test_samples_are_filled_with_end_of_text_and_masked_up_to_the_first(eot):
    prompts, generator = random_tokens(500, 2, vocab_size=3), torch.Generator().manual_seed(0)
    tokens, mask = sample(abc(noise=0.1), prompts, 4, eot, generator)
    assert tokens.shape == mask.shape == (500, 4)
    assert tokens.dtype == torch.long and mask.dtype == torch.bool
    for row, row_mask in zip(tokens.tolist(), mask.tolist(), strict=True):
        length = row.index(eot) + 1 if eot in row else 4
        assert row[length:] == [eot] * (4 - length)
        assert row_mask == [True] * length + [False] * (4 - length)
    assert set(mask.sum(1).tolist()) == {1, 2, 3, 4}


def test_sampling_with_the_cache_is_sampling_without_it():
    model, prompts, eot = gpt(), random_tokens(200, 3), 2
    generator = torch.Generator().manual_seed(7)
    tokens = prompts
    for _ in range(4):
        token = torch.multinomial(model(tokens)[:, -1].softmax(-1), 1, generator=generator)
        ended = (tokens[:, 3:] == eot).any(1, keepdim=True)
        tokens = torch.cat([tokens, torch.where(ended, eot, token)], dim=1)
    generator = torch.Generator().manual_seed(7)
    assert torch.equal(sample(model, prompts, 4, eot, generator)[0], tokens[:, 3:])


def test_the_generator_decides_the_samples():
    model, prompts = abc(), random_tokens(100, 2, vocab_size=3)
    first, again, other = (sample(model, prompts, 3, 2, torch.Generator().manual_seed(seed))[0]
                           for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_samples_carry_no_gradient():
    model = abc()
    tokens, mask = sample(model, random_tokens(3, 2, vocab_size=3), 3, 2)
    assert not tokens.requires_grad and not mask.requires_grad
    assert torch.is_grad_enabled() and model(tokens).requires_grad
    # Nor is a graph built, and thrown away.
    recorded = []
    sample(lambda *inputs: recorded.append(torch.is_grad_enabled()) or model(*inputs), tokens, 3, 2)
    assert recorded == [False] * 3


def test_a_response_may_fill_the_block_but_for_its_last_token():
    # The last token of a response predicts nothing, so no forward pass takes it.
    model, prompts = abc(block_size=5), torch.tensor([[0, 1, 1]])
    assert sample(model, prompts, 3, 2)[0].shape == (1, 3)
    assert len(all_logprobs(model, prompts[0], 3, 2)) == 15
    with pytest.raises(ValueError, match="6 tokens .* block_size of 5"):
        sample(abc(block_size=5, noise=0), prompts, 4, 2, torch.Generator().manual_seed(0))


# ---------------------------------------------------------------- precision and device
def test_bfloat16_and_float64_models_work():
    tokens = random_tokens(2, 5)
    exact = gpt(noise=0.2)(tokens)
    tolerances = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.1}
    for dtype, tolerance in tolerances.items():
        model, cache = gpt(noise=0.2).to(dtype), []
        logits = torch.cat([model(tokens[:, :3], cache), model(tokens[:, 3:], cache)], dim=1)
        assert logits.dtype == dtype and close(logits.double(), exact, tolerance)
        assert sample(model, tokens[:, :2], 3, 2)[0].shape == (2, 3)


def test_everything_is_computed_where_the_model_is(monkeypatch):
    # A device without numbers: a tensor that was made on another one would not mix with it.
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: True)    # "are they finite?"
    model, prompts = gpt(dtype=torch.float32).to("meta"), random_tokens(2, 3).to("meta")
    cache = []
    assert model(prompts, cache).device == model(prompts[:, :2], cache).device == prompts.device
    assert all(t.device == prompts.device for t in sample(model, prompts, 3, 2))


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_sampling_from_a_model_that_has_left_the_numbers_is_refused(weight):
    model = gpt(dtype=torch.float32)
    with torch.no_grad():
        model.ln_f.weight[0] = weight
    with pytest.raises(FloatingPointError, match="not numbers"):
        sample(model, random_tokens(2, 3), 3, 2)
