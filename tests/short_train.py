"""train.py made small: on few prompts, or in a language with 651 responses to each of four prompts.

A script too, for what only a process of its own shows. Its workers read this file as it does, so
they know the same language.
"""
import copy
import functools
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
import train
from lab import exact


def sentences(n, rng):
    """A prompt and one word."""
    return ([rng.choice(data.PROMPTS) for _ in range(n)],
            [f" {rng.choice(list(data.ADJECTIVES))}" for _ in range(n)])


def reward(prompts, responses):
    """The first word's fit to the mood; 0 for what is no adjective."""
    return data.FITS[prompts[:, 0].cpu(), responses[:, 0].cpu()]


LANGUAGE = dict(TRAIN_PROMPTS=data.TRAIN_PROMPTS[:3], HELDOUT_PROMPTS=data.HELDOUT_PROMPTS[:1],
                MAX_TOKENS=2, sentences=sentences, reward=reward)
FLAGS = ("--steps 3 --judged 48 --reference-steps 8 --evaluations 2 --n-layer 1 --n-head 1 "
         "--n-embd 8 --batch 48 --device cpu").split()


@functools.cache
def small():
    """What train.prepare makes, of two training prompts and one held-out. Change nothing of it.

    A namespace: settings, reference, feedback, reward_model (None), worlds and start.
    """
    settings = train.Settings(device="cpu", steps=10, judged=96, reference_steps=20, evaluations=1,
                              n_layer=1, n_head=2, n_embd=16, batch=48, out="")
    reference = train.train_reference(settings, 0)
    worlds = {"train": exact.World(reference, data.TRAIN_PROMPTS[:2], settings.beta),
              "heldout": exact.World(reference, data.HELDOUT_PROMPTS[:1], settings.beta)}
    return SimpleNamespace(settings=settings, reference=reference, reward_model=None, worlds=worlds,
                           feedback=train.collect_feedback(settings, 0, reference),
                           start=exact.evaluate(worlds["train"], worlds["train"].ref_logprobs))


def moved(model, scale=0.05, seed=1):
    """A copy some way from the model, to be trained."""
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(model).requires_grad_(True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model


def timeless(value):
    """Without what the clock said."""
    if isinstance(value, dict):
        return {key: timeless(v) for key, v in value.items()
                if key not in ("seconds", "evaluation_seconds", "stages")}
    return [timeless(v) for v in value] if isinstance(value, list) else value


if __name__ in ("__main__", "__mp_main__"):
    for name, value in LANGUAGE.items():
        setattr(data, name, value)

if __name__ == "__main__":
    sys.exit(train.main([*FLAGS, *sys.argv[1:]]))
