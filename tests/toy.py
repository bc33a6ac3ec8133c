"""train.py made small: a language with 651 responses to each of four prompts."""
import functools
from types import SimpleNamespace
from unittest import mock

import torch

import data
import train


def sentences(n, rng):
    """A prompt and one word."""
    return ([rng.choice(data.PROMPTS) for _ in range(n)],
            [f" {rng.choice([*data.ADJECTIVES])}" for _ in range(n)])


def reward(prompts, responses):
    """The first word's fit to the mood; 0 for what is no adjective."""
    return data.FITS[prompts[:, 0].cpu(), responses[:, 0].cpu()]


# Three training prompts, each of another mood and noun, and one held out, of the fourth.
LANGUAGE = dict(TRAIN_PROMPTS=data.TRAIN_PROMPTS[::4], HELDOUT_PROMPTS=data.HELDOUT_PROMPTS[3:],
                MAX_TOKENS=2, GRAMMAR=torch.tensor([data.ADJECTIVE, data.END]),
                sentences=sentences, reward=reward)
language = functools.partial(mock.patch.multiple, data, **LANGUAGE)     # with language(): ...


FLAGS = ("--steps 3 --judged 48 --reference-steps 8 --n-layer 1 --n-head 1 --n-embd 8 --batch 48 "
         "--device cpu --jobs 1").split()


@functools.cache
def small():
    """What train.prepare makes in this language, its settings, and start: figures of pi_ref on the
    training prompts. A namespace. Change nothing of it."""
    settings = train.parse([*FLAGS, *("--steps 10 --judged 96 --reference-steps 20 --n-head 2 "
                                      "--n-embd 16").split(), "--out", ""])
    with language():
        shared, start, _ = train.prepare(settings, 0)
    return SimpleNamespace(settings=settings, start=start["train"], **vars(shared))


def changed(space, **changes):
    """A copy of a namespace: settings, feedback, a batch."""
    return SimpleNamespace(**vars(space) | changes)


def timeless(value):
    """Without what the clock said."""
    if isinstance(value, dict):
        return {key: timeless(part) for key, part in value.items() if key != "seconds"}
    return [timeless(part) for part in value] if isinstance(value, list) else value
