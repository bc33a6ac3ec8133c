"""What several test files need: comparing, derivatives, and small models with random weights."""
import copy

import torch

import data
from model import GPT, GPTConfig


def close(a, b, tol=1e-10):
    """Is tensor a equal to b: a tensor of its shape, a list of numbers, or one number for all?"""
    b = b if torch.is_tensor(b) else torch.tensor(b, dtype=a.dtype).expand_as(a)
    return a.shape == b.shape and torch.allclose(a, b, rtol=tol, atol=tol)


def near(a, b, atol=1e-12):
    """Do two tensors of the same shape differ by at most atol, be they large or small?"""
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=atol)


def normals(seed):
    """A source of standard normal float64 numbers: normals(seed)(2, 3) is a 2 x 3 tensor."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def gradient(loss, theta):
    """d loss(theta).sum() / d theta."""
    theta = theta.detach().requires_grad_()
    return torch.autograd.grad(loss(theta).sum(), theta)[0]


def gradient_in(model, loss):
    return torch.autograd.grad(loss, [*model.parameters()])


def gpt(vocab_size=5, block_size=7, n_layer=2, n_head=3, n_embd=12, seed=0, noise=0.5,
        dtype=torch.float64):
    """A GPT far from its initialisation: no bias is 0, no gain 1, no distribution near uniform."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size, block_size, n_layer, n_head, n_embd)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return model


def toy_gpt():
    """A GPT of the experiment's size, vocabulary and precision."""
    return gpt(data.ENCODING.n_vocab, data.BLOCK_SIZE, n_head=4, n_embd=64, noise=0.3,
               dtype=torch.float32)


def random_tokens(*shape, vocab_size=5, seed=0):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def moved(model, scale=0.05, seed=1):
    """A copy some way from the model, to be trained."""
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(model).requires_grad_(True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model
