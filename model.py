"""One GPT, in GPT-2's architecture and with GPT-2's parameter names, and sampling from it.

A decoder-only transformer: tokens (B, T) -> logits (B, T, V), where logits[:, t] depend on
tokens[:, :t+1] alone and predict tokens[:, t+1]. Pre-norm blocks, learned positions, tanh GELU,
output weights tied to the token embedding. There is no dropout: the log-probability of a response
has to be one number. GPT(GPTConfig(50257, 1024, 12, 12, 768)) is GPT-2 small: state_dict() has the
published names and shapes, but for four matrices of each block, which GPT-2 stores transposed.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    vocab_size: int
    block_size: int  # the longest prompt + response, in tokens
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 64


class Attention(nn.Module):
    """Causal self-attention over the new tokens and, through the cache, everything before them."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)     # queries, keys and values
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, past):
        B, T, D = x.shape
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2)           # (B, heads, T, .)
                   for part in self.c_attn(x).split(D, dim=2))
        if past is not None:                                                  # (B, heads, S, .)
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        S = k.shape[2]
        weights = q @ k.transpose(2, 3) / math.sqrt(k.shape[3])               # (B, heads, T, S)
        # New token t sees the S - T tokens before the new ones, and the new ones up to itself.
        visible = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
        weights = weights.masked_fill(~visible, -math.inf).softmax(-1)
        y = (weights @ v).transpose(1, 2).reshape(B, T, D)
        return self.c_proj(y), (k, v)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, past):
        attended, present = self.attn(self.ln_1(x), past)
        x = x + attended
        return x + self.mlp(self.ln_2(x)), present


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        # GPT-2's initialisation: the residual stream adds up 2 n_layer projections, so each begins
        # that much smaller.
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def hidden(self, tokens, cache=None):
        """tokens (B, T) int -> the last layer's output, (B, T, D); cache as in forward."""
        start = cache[0][0].shape[2] if cache else 0
        T = tokens.shape[1]
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens do not fit in a block_size of "
                             f"{self.config.block_size}")
        x = self.wte(tokens) + self.wpe.weight[start:start + T]
        presents = []
        for i, block in enumerate(self.h):
            x, present = block(x, cache[i] if cache else None)
            presents.append(present)
        if cache is not None:
            cache[:] = presents
        return self.ln_f(x)

    def forward(self, tokens, cache=None):
        """tokens (B, T) int -> logits (B, T, V).

        cache: a list, empty at first, which the call fills with each layer's keys and values. Pass
        it again with the tokens that follow, alone. ValueError beyond block_size tokens in all.
        """
        return F.linear(self.hidden(tokens, cache), self.wte.weight)


class ScalarGPT(GPT):
    """A GPT with a scalar head, begun from a trained GPT: a value model, or a reward model.

    A reward model is read at the response's last token.
    """

    def __init__(self, model):
        super().__init__(model.config)
        self.load_state_dict(model.state_dict())
        self.scalar = nn.Linear(model.config.n_embd, 1)
        nn.init.zeros_(self.scalar.weight)
        nn.init.zeros_(self.scalar.bias)

    def forward(self, tokens, cache=None):
        """tokens (B, T) int -> (B, T): column t knows tokens[:, :t+1]. cache as GPT's."""
        return self.scalar(self.hidden(tokens, cache)).squeeze(-1)


@torch.no_grad()
def sample(model, prompts, max_tokens, eot, generator=None):
    """y ~ pi(.|x), one for each row of prompts (B, S) int.

    Returns responses (B, max_tokens) int, filled with eot behind their end, and their mask
    (B, max_tokens) bool: True up to and including the first eot; all True where none came in time.
    FloatingPointError where the model has left the numbers.
    """
    cache, tokens, responses, masks = [], prompts, [], []
    running = torch.ones(len(prompts), dtype=torch.bool, device=prompts.device)
    for _ in range(max_tokens):
        probs = model(tokens, cache)[:, -1].softmax(-1)
        if not probs.isfinite().all():
            raise FloatingPointError("the policy's probabilities are not numbers")
        token = torch.multinomial(probs, 1, generator=generator).squeeze(1).where(running, eot)
        responses.append(token)
        masks.append(running)
        running = running & (token != eot)
        tokens = token[:, None]
    return torch.stack(responses, dim=1), torch.stack(masks, dim=1)
