import itertools
import math
import time

import pytest
import torch

import data
from model import GPT, GPTConfig, ScalarGPT, all_responses, response_logprobs, sample
from una import sequence_logprob

# The matrices that GPT-2 has transposed.
MATRICES = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def gpt(vocab_size=5, block_size=7, n_layer=2, n_head=3, n_embd=12, seed=0, noise=0.5, dtype=torch.float64):
    """A GPT far from its initialisation: no bias is 0, no gain is 1, no distribution is near the uniform one."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size, block_size, n_layer, n_head, n_embd)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return model


def abc(seed=0, **config):
    """The world {a, b, end} of three tokens: a model for it."""
    return gpt(vocab_size=3, seed=seed, **config)


def toy_gpt():
    """A GPT of the experiment's size, vocabulary and precision."""
    return gpt(data.ENCODING.n_vocab, data.BLOCK_SIZE, n_head=4, n_embd=64, noise=0.3, dtype=torch.float32)


def random_tokens(*shape, vocab_size=5, seed=0):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, tolerance=1e-10):
    return a.shape == b.shape and (a - b).abs().max().item() < tolerance


def gpt2_format(model):
    """The parameters as GPT-2 is published: the matrices of its blocks are (inputs, outputs), for x @ W + b."""
    return {name: p.T if name.endswith(MATRICES) else p for name, p in model.named_parameters()}


def tanh_gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))


def erf_gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def layer_norm(x, gain, bias, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * gain + bias


def gpt2(weights, tokens, n_head=3, positions=None, sees=lambda t: range(t + 1), gelu=tanh_gelu, head_scale=True,
         eps=1e-5, output="wte.weight"):
    """GPT-2 once more, from weights in its own format: one sequence (T,) to logits (T, V), head by head.

    What is an argument has a wrong value that a test tries; sees(t) are the tokens that token t attends to.
    """
    T, D = len(tokens), weights["wte.weight"].shape[1]
    d = D // n_head
    x = weights["wte.weight"][tokens] + weights["wpe.weight"][range(T) if positions is None else positions]
    for n in range(sum(name.endswith("ln_1.weight") for name in weights)):
        w = {name.removeprefix(f"h.{n}."): p for name, p in weights.items() if name.startswith(f"h.{n}.")}
        qkv = layer_norm(x, w["ln_1.weight"], w["ln_1.bias"], eps) @ w["attn.c_attn.weight"] + w["attn.c_attn.bias"]
        rows = []
        for t in range(T):
            heads = []
            for h in range(n_head):
                q, k, v = (qkv[:, i * D + h * d:i * D + (h + 1) * d] for i in range(3))
                scores = torch.stack([q[t] @ k[s] for s in sees(t)]) / (math.sqrt(d) if head_scale else 1)
                attention = scores.exp() / scores.exp().sum()
                heads.append(sum(a * v[s] for a, s in zip(attention, sees(t))))
            rows.append(torch.cat(heads))
        x = x + torch.stack(rows) @ w["attn.c_proj.weight"] + w["attn.c_proj.bias"]
        hidden = gelu(layer_norm(x, w["ln_2.weight"], w["ln_2.bias"], eps) @ w["mlp.c_fc.weight"] + w["mlp.c_fc.bias"])
        x = x + hidden @ w["mlp.c_proj.weight"] + w["mlp.c_proj.bias"]
    return layer_norm(x, weights["ln_f.weight"], weights["ln_f.bias"], eps) @ weights[output].T


def chi_square(counts, probs):
    expected = counts.sum() * probs
    return ((counts - expected) ** 2 / expected).sum().item()


# ---------------------------------------------------------------- the network is GPT-2
def test_logits_and_all_gradients_agree_with_an_independent_gpt2():
    model, tokens = gpt(), random_tokens(3, 6)
    weights = gpt2_format(model)
    ours, theirs = model(tokens), torch.stack([gpt2(weights, row) for row in tokens])
    assert close(ours, theirs)
    direction = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    parameters = list(model.parameters())
    for mine, other in zip(torch.autograd.grad((ours * direction).sum(), parameters),
                           torch.autograd.grad((theirs * direction).sum(), parameters)):
        assert close(mine, other, 1e-9)


@pytest.mark.parametrize("wrong", [
    dict(gelu=erf_gelu), dict(head_scale=False), dict(n_head=1), dict(n_head=4), dict(eps=1e-6),
    dict(sees=lambda t: range(6)), dict(sees=lambda t: range(max(t, 1))), dict(sees=lambda t: [t]),
    dict(positions=[1, 2, 3, 4, 5, 6]), dict(positions=[0] * 6),
], ids=["erf GELU", "no head scale", "one head", "four heads", "another eps", "sees the future", "not itself",
        "only itself", "positions from 1", "no positions"])
def test_no_neighbour_of_gpt2_has_these_logits(wrong):
    model, tokens = gpt(), random_tokens(6)
    with torch.no_grad():
        assert not close(model(tokens[None])[0], gpt2(gpt2_format(model), tokens, **wrong), 1e-6)


def test_gpt2_small_has_the_published_names_shapes_and_size():
    with torch.device("meta"):
        model = GPT(GPTConfig(50257, 1024, 12, 12, 768))
    published = {"wte.weight": (50257, 768), "wpe.weight": (1024, 768), "ln_f.weight": (768,), "ln_f.bias": (768,)}
    for n in range(12):
        published |= {
            f"h.{n}.ln_1.weight": (768,), f"h.{n}.ln_1.bias": (768,),
            f"h.{n}.attn.c_attn.weight": (768, 2304), f"h.{n}.attn.c_attn.bias": (2304,),
            f"h.{n}.attn.c_proj.weight": (768, 768), f"h.{n}.attn.c_proj.bias": (768,),
            f"h.{n}.ln_2.weight": (768,), f"h.{n}.ln_2.bias": (768,),
            f"h.{n}.mlp.c_fc.weight": (768, 3072), f"h.{n}.mlp.c_fc.bias": (3072,),
            f"h.{n}.mlp.c_proj.weight": (3072, 768), f"h.{n}.mlp.c_proj.bias": (768,),
        }
    ours = {name: tuple(p.T.shape if name.endswith(MATRICES) else p.shape) for name, p in model.state_dict().items()}
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
    # Token 4 is not in the input, and its logit is taken: row 4 has a gradient as an output, rows 0 and 1 as inputs.
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
    for name, parameter in model.named_parameters():
        if name.endswith("c_proj.weight"):
            assert parameter.std().item() == pytest.approx(0.02 / math.sqrt(2 * n_layer), rel=0.03), name
        elif parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.03), name
        else:
            assert (parameter == (1 if name.endswith("weight") else 0)).all(), name
        assert abs(parameter.mean().item()) < 1e-3 or parameter.dim() == 1, name


def test_a_scalar_gpt_is_the_same_network_with_another_head():
    model, tokens = ScalarGPT(gpt()).double(), random_tokens(2, 6)
    with torch.no_grad():
        model.scalar.weight.normal_(), model.scalar.bias.normal_()
        theirs = torch.stack([gpt2(gpt2_format(model), row, output="scalar.weight") for row in tokens])
        assert model(tokens).shape == (2, 6)                                            # column t from tokens 0..t
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
        assert close(model(torch.cat([tokens, torch.full((2, padding), filler)], dim=1))[:, :3], model(tokens), 1e-12)


def test_left_padding_would_change_the_logits():
    # Positions are learned: this model is to be padded on the right alone.
    model, tokens = gpt(), random_tokens(2, 3)
    assert not close(model(torch.cat([torch.zeros(2, 1, dtype=torch.long), tokens], dim=1))[:, 1:], model(tokens), 1e-3)


def test_rows_of_a_batch_do_not_see_each_other():
    model, tokens = gpt(), random_tokens(4, 6)
    assert close(model(tokens), torch.cat([model(row[None]) for row in tokens]), 1e-12)


@pytest.mark.parametrize("cuts", [cuts for n in range(6) for cuts in itertools.combinations(range(1, 6), n)])
def test_the_cache_changes_no_logits_however_the_sequence_is_cut(cuts):
    model, tokens, cache = gpt(), random_tokens(2, 6), []
    pieces = [model(tokens[:, a:b], cache) for a, b in zip((0, *cuts), (*cuts, 6))]
    assert close(torch.cat(pieces, dim=1), model(tokens))
    assert all(k.shape == v.shape == (2, 3, 6, 4) for k, v in cache) and len(cache) == 2


def test_a_cache_with_stale_positions_or_a_mask_without_offset_has_other_logits():
    model, tokens, cache = gpt(), random_tokens(6), []
    with torch.no_grad():
        ours = torch.cat([model(tokens[None, :3], cache), model(tokens[None, 3:], cache)], dim=1)[0]
        weights = gpt2_format(model)
        assert close(ours, gpt2(weights, tokens))
        assert not close(ours, gpt2(weights, tokens, positions=[0, 1, 2, 0, 1, 2]), 1e-3)
        assert not close(ours, gpt2(weights, tokens, sees=lambda t: range(t % 3 + 1)), 1e-3)          # 3 sees 0 alone
        assert not close(ours, gpt2(weights, tokens, sees=lambda t: range(t // 3 * 3, t + 1)), 1e-3)  # 3 sees 3 alone


def test_two_continuations_of_one_cache_do_not_disturb_each_other():
    model, tokens, cache = gpt(), random_tokens(2, 6), []
    model(tokens[:, :3], cache)
    branch, before = list(cache), [(k.clone(), v.clone()) for k, v in cache]
    model((tokens[:, 3:] + 1) % 5, branch)
    for (k, v), (k_before, v_before) in zip(cache, before):
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
    assert close(model(tokens[:, 6:7], cache), model(tokens[:, :7])[:, 6:])    # the refused call left the cache alone


# ---------------------------------------------------------------- all responses and their probabilities
@pytest.mark.parametrize("vocab_size, max_tokens, eot",
                         [(3, 3, 2), (3, 3, 0), (4, 3, 1), (5, 2, 2), (2, 4, 1), (4, 1, 3)])
def test_all_responses_are_the_strings_cut_behind_their_first_end(vocab_size, max_tokens, eot):
    tokens, mask = all_responses(vocab_size, max_tokens, eot)
    expected = set()
    for string in itertools.product(range(vocab_size), repeat=max_tokens):
        length = string.index(eot) + 1 if eot in string else max_tokens
        rest = max_tokens - length
        expected.add((string[:length] + (eot,) * rest, (True,) * length + (False,) * rest))
    rows = [(tuple(t), tuple(m)) for t, m in zip(tokens.tolist(), mask.tolist())]
    assert set(rows) == expected
    assert len(rows) == len(expected) == sum((vocab_size - 1) ** n for n in range(max_tokens + 1))
    words = (tokens != eot).sum(1)
    assert (words.diff() >= 0).all()                                            # shortest first
    assert mask[words == max_tokens].all() and tokens.dtype == torch.long and mask.dtype == torch.bool


def test_the_toy_has_406901_responses_each_once():
    tokens, mask = all_responses(data.ENCODING.n_vocab, data.MAX_TOKENS, data.EOT)
    assert tokens.shape == mask.shape == (406_901, 4) and 1 + 25 + 25 ** 2 + 25 ** 3 + 25 ** 4 == 406_901
    keys = (tokens * 26 ** torch.arange(4)).sum(1)
    assert len(keys.unique()) == 406_901


def test_enumerated_probabilities_sum_to_one():
    model, prompt = toy_gpt(), data.encode_prompts(data.PROMPTS)[5]
    logprobs = response_logprobs(model, prompt, data.MAX_TOKENS, data.EOT)
    probs = logprobs.double().exp()
    first_token = model(prompt[None])[0, -1].softmax(-1)
    entropy = -(first_token * first_token.log()).sum()
    assert entropy < 0.8 * math.log(26) and logprobs.max() - logprobs.min() > 10      # far from uniform
    assert logprobs.dtype == torch.float32 and logprobs.shape == (406_901,)
    assert probs.sum().item() == pytest.approx(1, abs=1e-4)
    assert probs[:1 + 25 + 25 ** 2 + 25 ** 3].sum().item() < 0.99                     # without those that were cut off


@pytest.mark.parametrize("max_tokens", [1, 2, 3])
@pytest.mark.parametrize("eot", [0, 1, 2])
def test_enumerated_probabilities_sum_to_one_in_float64(eot, max_tokens):
    logprobs = response_logprobs(abc(), torch.tensor([0, 2, 1]), max_tokens, eot)
    assert len(logprobs) == 2 ** (max_tokens + 1) - 1 and logprobs.dtype == torch.float64
    assert logprobs.exp().sum().item() == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize("eot", [0, 2, 4])
@pytest.mark.parametrize("prompt", [[1], [3, 0, 2, 2]])
def test_response_logprobs_agree_with_one_forward_pass_per_response(prompt, eot):
    model, prompt = gpt(), torch.tensor(prompt)
    responses, mask = all_responses(5, 3, eot)

    def one_by_one(mask, shift=0):
        logprobs = []
        for response, row in zip(responses, mask):
            tokens = torch.cat([prompt, response])[None]
            row = torch.cat([torch.zeros(len(prompt), dtype=torch.bool), row])[None]
            logprobs.append(sequence_logprob(model(tokens).roll(shift, 1), tokens, row))
        return torch.cat(logprobs).detach()

    logprobs = response_logprobs(model, prompt, 3, eot)
    assert close(logprobs, one_by_one(mask)) and not logprobs.requires_grad
    assert not close(logprobs.flip(0), one_by_one(mask), 1e-3)
    assert not close(logprobs, one_by_one(mask, shift=1), 1e-3)
    assert not close(logprobs, one_by_one(torch.ones_like(mask)), 1e-3)            # padding counted
    without_end = mask & ((responses != eot) | (mask.cumsum(1) == 1))
    assert not close(logprobs, one_by_one(without_end), 1e-3)


def test_exact_evaluation_of_a_policy_on_all_prompts_takes_seconds():
    model, prompts = toy_gpt(), data.encode_prompts(data.PROMPTS)
    start = time.process_time()
    for prompt in prompts:
        response_logprobs(model, prompt, data.MAX_TOKENS, data.EOT)
    assert time.process_time() - start < 10


# ---------------------------------------------------------------- sampling
def test_samples_have_the_enumerated_probabilities():
    # Two prompts, alternating in one batch. 65: the chance of a chi-square above it, 14 degrees of freedom, is 1e-8.
    model, prompts, eot = abc(seed=5), torch.tensor([[0, 1], [2, 2]]), 1
    responses, mask = all_responses(3, 3, eot)
    drawn, drawn_mask = sample(model, prompts.repeat(20_000, 1), 3, eot, torch.Generator().manual_seed(0))
    index = (drawn[:, None] == responses).all(-1).int().argmax(1)
    assert torch.equal(responses[index], drawn) and torch.equal(mask[index], drawn_mask)
    counts = [torch.bincount(index[i::2], minlength=15) for i in range(2)]
    probs = [response_logprobs(model, prompt, 3, eot).exp() for prompt in prompts]
    assert chi_square(counts[0], probs[0]) < 65 and chi_square(counts[1], probs[1]) < 65
    assert chi_square(counts[0], probs[1]) > 1000 and chi_square(counts[1], probs[0]) > 1000   # the other row's prompt
    assert chi_square(counts[0], probs[0].sqrt() / probs[0].sqrt().sum()) > 1000               # flatter


@pytest.mark.parametrize("eot", [0, 1, 2])
def test_samples_are_filled_with_end_of_text_and_masked_up_to_the_first(eot):
    tokens, mask = sample(abc(noise=0.1), random_tokens(500, 2, vocab_size=3), 4, eot, torch.Generator().manual_seed(0))
    assert tokens.shape == mask.shape == (500, 4) and tokens.dtype == torch.long and mask.dtype == torch.bool
    for row, row_mask in zip(tokens.tolist(), mask.tolist()):
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
        tokens = torch.cat([tokens, torch.where((tokens[:, 3:] == eot).any(1, keepdim=True), eot, token)], dim=1)
    assert torch.equal(sample(model, prompts, 4, eot, torch.Generator().manual_seed(7))[0], tokens[:, 3:])


def test_the_generator_decides_the_samples():
    model, prompts = abc(), random_tokens(100, 2, vocab_size=3)
    first, again, other = (sample(model, prompts, 3, 2, torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_samples_carry_no_gradient():
    model = abc()
    tokens, mask = sample(model, random_tokens(3, 2, vocab_size=3), 3, 2)
    assert not tokens.requires_grad and not mask.requires_grad
    assert torch.is_grad_enabled() and model(tokens).requires_grad
    recorded = []
    sample(lambda *inputs: recorded.append(torch.is_grad_enabled()) or model(*inputs), tokens, 3, 2)
    assert recorded == [False] * 3                                              # nor is a graph built, and thrown away


def test_a_response_may_fill_the_block_but_for_its_last_token():
    # The last token of a response predicts nothing, so no forward pass takes it.
    model, prompts = abc(block_size=5), torch.tensor([[0, 1, 1]])
    assert sample(model, prompts, 3, 2)[0].shape == (1, 3) and len(response_logprobs(model, prompts[0], 3, 2)) == 15
    with pytest.raises(ValueError, match="6 tokens .* block_size of 5"):
        sample(abc(block_size=5, noise=0), prompts, 4, 2, torch.Generator().manual_seed(0))


# ---------------------------------------------------------------- precision and device
def test_bfloat16_and_float64_models_work():
    tokens = random_tokens(2, 5)
    exact = gpt(noise=0.2)(tokens)
    for dtype, tolerance in [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 0.1)]:
        model, cache = gpt(noise=0.2).to(dtype), []
        logits = torch.cat([model(tokens[:, :3], cache), model(tokens[:, 3:], cache)], dim=1)
        assert logits.dtype == dtype and close(logits.double(), exact, tolerance)
        assert sample(model, tokens[:, :2], 3, 2)[0].shape == (2, 3)
        assert response_logprobs(model, tokens[0, :2], 3, 2).double().exp().sum().item() == pytest.approx(1, abs=0.03)


def test_everything_is_computed_where_the_model_is():
    # A device without numbers: a tensor that was made on another one would not mix with it.
    model, prompts = gpt(dtype=torch.float32).to("meta"), random_tokens(2, 3).to("meta")
    cache = []
    assert model(prompts, cache).device == model(prompts[:, :2], cache).device == prompts.device
    assert response_logprobs(model, prompts[0], 3, 2).device == prompts.device
    assert all(t.device == prompts.device for t in sample(model, prompts, 3, 2))
