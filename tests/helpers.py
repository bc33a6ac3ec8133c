"""What several test files need."""
import torch


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
