"""Small GPTs with random weights, and random tokens for them."""
import torch

import data
from model import GPT, GPTConfig


def gpt(vocab_size=5, block_size=7, n_layer=2, n_head=3, n_embd=12, seed=0, noise=0.5,
        dtype=torch.float64):
    """A GPT far from its initialisation: no bias is 0, no gain 1, no distribution near uniform."""
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
    return gpt(data.ENCODING.n_vocab, data.BLOCK_SIZE, n_head=4, n_embd=64, noise=0.3,
               dtype=torch.float32)


def random_tokens(*shape, vocab_size=5, seed=0):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


