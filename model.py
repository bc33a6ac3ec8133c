"""One GPT, in GPT-2's architecture and with GPT-2's parameter names, and the exact distribution over its short responses.

A decoder-only transformer: tokens (B, T) -> logits (B, T, V), where logits[:, t] depend on tokens[:, :t+1] alone and
predict tokens[:, t+1]. Pre-norm blocks, learned positions, tanh GELU, output weights tied to the token embedding, no
dropout (the log-probability of a response has to be one number). GPT(GPTConfig(50257, 1024, 12, 12, 768)) is GPT-2 small:
state_dict() has the published names and shapes, but for four matrices of each block, which GPT-2 stores transposed.
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
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # queries, keys and values in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, past):
        B, T, D = x.shape
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2) for part in self.c_attn(x).split(D, dim=2))
        if past is not None:                                                # (B, heads, T, .) -> (B, heads, S, .)
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        S = k.shape[2]
        weights = q @ k.transpose(2, 3) / math.sqrt(k.shape[3])             # (B, heads, T, S)
        visible = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)  # new token t sees S - T + t + 1 tokens
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
        # GPT-2's initialisation: the residual stream adds up 2 n_layer projections, so each begins that much smaller.
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def hidden(self, tokens, cache=None):
        """tokens (B, T) int -> what the last layer makes of each, (B, T, D); the cache as in forward."""
        start = cache[0][0].shape[2] if cache else 0
        T = tokens.shape[1]
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens do not fit in a block_size of {self.config.block_size}")
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

        cache: a list, empty at first, that the call fills with each layer's keys and values; pass it again with the tokens
        that follow, alone. ValueError where the sequence outgrows block_size.
        """
        return F.linear(self.hidden(tokens, cache), self.wte.weight)


class ScalarGPT(GPT):
    """A GPT with a scalar head, begun from a trained GPT: a value model, or a reward model read at the last token."""

    def __init__(self, model):
        super().__init__(model.config)
        self.load_state_dict(model.state_dict())
        self.scalar = nn.Linear(model.config.n_embd, 1)
        nn.init.zeros_(self.scalar.weight)
        nn.init.zeros_(self.scalar.bias)

    def forward(self, tokens):
        """tokens (B, T) int -> (B, T): column t knows tokens[:, :t+1]."""
        return self.scalar(self.hidden(tokens)).squeeze(-1)


@torch.no_grad()
def sample(model, prompts, max_tokens, eot, generator=None):
    """y ~ pi(.|x), one for each row of prompts (B, P) int.

    Returns responses (B, max_tokens) int, filled with eot behind their end, and their mask (B, max_tokens) bool: True up to
    and including the first eot; all True where none came in time.
    """
    cache, tokens, responses, masks = [], prompts, [], []
    running = torch.ones(len(prompts), dtype=torch.bool, device=prompts.device)
    for _ in range(max_tokens):
        probs = model(tokens, cache)[:, -1].softmax(-1)
        token = torch.multinomial(probs, 1, generator=generator).squeeze(1).where(running, eot)
        responses.append(token)
        masks.append(running)
        running = running & (token != eot)
        tokens = token[:, None]
    return torch.stack(responses, dim=1), torch.stack(masks, dim=1)


# All responses, shortest first. A response is n < max_tokens words and an end-of-text, or max_tokens words, cut off there:
# with W = V - 1 words there are 1 + W + ... + W^max_tokens. Every sample is one of them, so that pi sums to 1.
def all_responses(vocab_size, max_tokens, eot):
    """Every possible response: tokens (Y, max_tokens) int, filled with eot behind their end, and mask (Y, max_tokens) bool.

    Tokens and mask are as sample's; the order is response_logprobs'.
    """
    words = torch.tensor([token for token in range(vocab_size) if token != eot])
    prefix = torch.empty(1, 0, dtype=torch.long)                            # (N, n): all strings of n words
    leaves = []
    for n in range(max_tokens + 1):
        leaves.append(F.pad(prefix, (0, max_tokens - n), value=eot))
        prefix = torch.cat([prefix.repeat_interleave(len(words), 0), words.repeat(len(prefix))[:, None]], dim=1)
    n_words = torch.cat([torch.full((len(leaf),), n) for n, leaf in enumerate(leaves)])
    return torch.cat(leaves), torch.arange(max_tokens) <= n_words[:, None]


@torch.no_grad()
def response_logprobs(model, prompt, max_tokens, eot):
    """log pi(y|x) of every possible response to one prompt (P,) int. Returns (Y,), nats, in the order of all_responses.

    The tree of prefixes is walked breadth first. A level holds all prefixes of n words and their cache, so that a prefix is
    computed once for all responses that share it, and the last word of a response costs nothing: its parent's logits have it.
    """
    words = torch.tensor([token for token in range(model.config.vocab_size) if token != eot], device=prompt.device)
    cache = []
    next_token = model(prompt[None], cache)[:, -1].log_softmax(-1)          # (1, V): one prefix, the prompt
    prefix = torch.zeros_like(next_token[:, 0])                             # log pi(prefix|x), (N,)
    leaves = [next_token[:, eot]]
    for _ in range(max_tokens - 1):
        tokens = words.repeat(len(prefix))                                  # (N W,): each prefix and one word more
        prefix = (prefix[:, None] + next_token[:, words]).view(-1)
        cache = [(k.repeat_interleave(len(words), 0), v.repeat_interleave(len(words), 0)) for k, v in cache]
        next_token = model(tokens[:, None], cache)[:, -1].log_softmax(-1)   # (N W, V)
        leaves.append(prefix + next_token[:, eot])                          # these words, then end-of-text
    leaves.append((prefix[:, None] + next_token[:, words]).view(-1))        # max_tokens words, cut off
    return torch.cat(leaves)
