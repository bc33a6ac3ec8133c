"""What alignment does to rewards: each response a dot, explicit against implicit reward.

A policy is optimal where its dots lie on the diagonal (Eq. 18). claims.json has those of some
methods on the first reported seed, of the responses that pi_ref gives over 1 time in 300.
"""
import copy
import math
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.figure import Figure

import data
import train
import una
from lab import exact, figures, variants
from lab.run import save
from lab.variants import Variant

SCORE, OFFSET = Variant("una-score"), Variant("una-score-offset", "estimated")
DPO, ONLINE = Variant("dpo"), Variant("una-online")
FILMED = [variant._replace(level=level) for level in (0.0, 1.0)
          for variant in (SCORE, OFFSET, ONLINE)] + [DPO]
MOVING = (OFFSET, DPO, ONLINE)
PICTURES = ("implicit-against-explicit.png", "training.gif")
FRAMES = 12                            # quadratic in time: most happens early


def text(numbers):
    """In claims.json a frame is one line."""
    return " ".join(f"{number:.2f}".rstrip("0").rstrip(".") for number in numbers)


def numbers(text):
    return np.array([float(word) for word in text.split()])


def film(settings, seed, variant, cell, path):
    """{dots: implicit rewards beta log pi/pi_ref, frame by frame; explicit ones; prompts}."""
    shared, method = train.load(path), variants.method_of(variant, cell)
    world, beta = shared.worlds["train"], method.beta * settings.beta
    likely = world.ref_logprobs > math.log(1 / 300)
    frames = []

    def observe(step, seconds, loss, policy):
        logprobs = exact.policy_logprobs(policy, world.prompts)
        implicit = una.implicit_reward(logprobs, world.ref_logprobs, world.beta)[likely]
        frames.append(text(implicit.tolist()))

    observe(0, 0.0, None, shared.reference)
    policy = copy.deepcopy(shared.reference).requires_grad_(True)
    offsets = None
    if method.feedback != "fresh":
        offsets = train.start_offsets(method, shared.feedback, beta)
    batches = train.batches_for(method, policy, None, shared, settings, seed, offsets)
    steps = [math.ceil(settings.steps * (i / (FRAMES - 1)) ** 2) for i in range(FRAMES)]
    train.align(method, policy, batches, beta, settings.steps, None, set(steps), observe, offsets)
    if variant not in MOVING:
        frames, steps = [frames[0], frames[-1]], [0, settings.steps]
    return dict(dots=dict(
        method=variant.method, level=variant.level, seed=seed, steps=steps, frames=frames,
        beta_log_z=world.optimum.tolist(), explicit=text(world.rewards[likely].tolist()),
        prompt=text(likely.nonzero()[:, 0].tolist())))


def of(dots, variant):
    """explicit (N,), frames: a list of implicit (N,), beta log Z (N,) and the prompt of each."""
    entry = next(entry for entry in dots if (entry["method"], entry["level"]) == (
        variant.method, variant.level))
    prompt = numbers(entry["prompt"]).astype(int)
    frames = [numbers(frame) for frame in entry["frames"]]
    return numbers(entry["explicit"]), frames, np.array(entry["beta_log_z"])[prompt], prompt


def draw_pictures(dots, folder):
    figures.picture(f"{folder}/{PICTURES[0]}", draw_regression, dots, figsize=(8.5, 5))
    save(f"{folder}/{PICTURES[1]}", lambda partial: animate(dots, partial))


def diagonal(axes, title):
    axes.plot([-4, 3], [-4, 3], color="black", linewidth=0.8)
    axes.set(xlim=(-4.2, 3.2), ylim=(-4.7, 3.2))
    axes.set_title(title, fontsize=9)


def draw_regression(figure, dots):
    """Above, at level 0, with beta log Z(x); below, at level 1, without it, a color for each noun.
    """
    grid = figure.subplots(2, 4, sharex=True, sharey=True)
    nouns = [prompt.split()[1] for prompt in data.TRAIN_PROMPTS]
    for level, row in enumerate(grid):
        panels = [("before", SCORE, 0), *((variant.method, variant, -1)
                                          for variant in (SCORE, OFFSET, ONLINE))]
        for axes, (title, variant, frame) in zip(row, panels):
            explicit, frames, offset, prompt = of(dots, variant._replace(level=float(level)))
            diagonal(axes, title)
            if level == 0:
                implicit = np.maximum(frames[frame] + offset, -4.5)
                axes.scatter(explicit, implicit, s=3, color=figures.COLORS[0])
                continue
            for color, noun in zip(figures.COLORS, data.NOUNS):
                its = np.array([nouns[number] == noun for number in prompt])
                axes.scatter(explicit[its], np.maximum(frames[frame][its], -4.5), s=3, color=color,
                             label=noun)
    grid[1, 0].legend(fontsize=7, loc="upper left", markerscale=3)
    grid[0, 0].set_ylabel("β log π/π_ref + β log Z(x)", fontsize=9)
    grid[1, 0].set_ylabel("β log π/π_ref alone", fontsize=9)
    figure.supxlabel("the judge's reward", fontsize=9)
    figure.suptitle("Optimal where the dots lie on the diagonal (above). Where nouns have levels "
                    "of their own (below),\nthe best policy has a band for each: f(x) folds them "
                    "into one", fontsize=10)


def animate(dots, path):
    """The first row of that picture, and dpo, as they train."""
    figure = Figure(figsize=(7.5, 3), layout="constrained")
    panels, films = figure.subplots(1, len(MOVING), sharey=True), [of(dots, v) for v in MOVING]
    marks = []
    for axes, variant, (explicit, *_) in zip(panels, MOVING, films):
        diagonal(axes, variant.method)
        marks.append(axes.scatter(explicit, explicit, s=3, color=figures.COLORS[0]))
    panels[0].set_ylabel("β log π/π_ref + β log Z(x)", fontsize=9)
    figure.supxlabel("the judge's reward", fontsize=9)
    steps = next(entry["steps"] for entry in dots if entry["method"] == DPO.method)

    def show(frame):
        for mark, (explicit, frames, offset, _) in zip(marks, films):
            implicit = np.maximum(frames[frame] + offset, -4.5)
            mark.set_offsets(np.stack([explicit, implicit], axis=1))
        figure.suptitle(f"Implicit against explicit reward, step {steps[frame]}: "
                        "optimal on the diagonal", fontsize=10)

    order = [*range(FRAMES), *[FRAMES - 1] * 5]                  # it rests at the end
    with tempfile.TemporaryDirectory() as folder:                # the writer wants a name in .gif
        whole = Path(folder) / PICTURES[1]
        FuncAnimation(figure, show, order).save(whole, PillowWriter(fps=3), dpi=80)
        Path(path).write_bytes(whole.read_bytes())
