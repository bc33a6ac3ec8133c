"""How much memory a method's training takes, measured from outside, in processes of their own."""
import copy
import importlib.util
import sys
from dataclasses import replace
from types import SimpleNamespace

import torch

import data
import train
from lab import run, variants
from model import GPT, GPTConfig, ScalarGPT


def peak_memory(settings, name):
    """Bytes by which 20 steps of training raise the peak of this, a fresh, process.

    On a GPU: the GPU's peak.
    """
    import resource  # Unix alone

    device = settings.device
    settings = replace(settings, steps=20, judged=settings.batch)
    config = GPTConfig(data.ENCODING.n_vocab, data.BLOCK_SIZE, settings.n_layer, settings.n_head,
                       settings.n_embd)
    reference = GPT(config).to(device).requires_grad_(False)
    shared = SimpleNamespace(reference=reference, reward_model=None,
                             feedback=train.collect_feedback(settings, 0, reference))
    if settings.reward == "model":
        shared.reward_model = ScalarGPT(reference).to(device).requires_grad_(False)
    first = GPT(config).to(device)                               # torch loads parts of itself here
    train.descend(torch.optim.Adam(first.parameters(), fused=True),
                  first(shared.feedback.tokens[:1]).mean(), 1e-3, 1, 1)

    def peak():
        if device == "cuda":
            return torch.cuda.max_memory_allocated()
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    before = 0 if device == "cuda" else peak()
    method, policy = train.METHODS[name], copy.deepcopy(reference).requires_grad_(True)
    value = ScalarGPT(reference).to(device) if name == "ppo" else None
    batches = train.batches_for(method, policy, value, shared, settings, 0)
    train.align(method, policy, batches, method.beta * settings.beta, settings.steps, value)
    return dict(method=name, reward_source=settings.reward, bytes=peak() - before)


def peak_memories(settings):
    """Of every method, one after the other; none where no process can tell its peak."""
    if importlib.util.find_spec("resource") is None:
        run.say("peak memory: not measured, as this system does not tell a process its peak")
        return []
    entries = []
    for reward, names in (("judge", variants.COMPARED), ("model", ("una-online", "ppo"))):
        for name in names:
            job = (replace(settings, reward=reward), name)
            with run.Jobs(2) as pool:                            # Jobs(1) is this process
                pool.run(peak_memory, [job], lambda _, entry: entries.append(entry))
    return entries
