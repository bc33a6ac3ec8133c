"""The paper's claims, settled: variants are tuned on grids, the best run on other seeds.

    python -m lab.claims                 resumes; an hour and a half on two cores
    python -m lab.claims --tables        page and pictures anew, from claims.json alone

Writes claims.json, README.md and two pictures into a folder; in its parts/ lies each run by itself.
"""
import ast
import functools
import hashlib
import itertools
import json
import math
import os
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import train
from lab import figures, memory, page, run, variants
from lab.run import setting, whole

# Every variant has a grid of 16 candidates, tuned on the training prompts of seeds not reported.
TUNING_SEEDS, REPORTED_SEEDS = range(100, 102), range(11, 19)
ONLINE = [name for name in variants.COMPARED if train.METHODS[name].feedback == "fresh"]
STORED = [name for name in variants.COMPARED if name not in ONLINE]
GRIDS = {  # variant: (learning rates, multiples of the task's beta)
    ("una-pair", "zero"): ((5e-4, 1e-3, 2e-3, 4e-3), (1, 2, 4, 8)),     # dpo's too: the same loss
    **{(name, "zero"): ((5e-4, 1e-3, 2e-3, 4e-3), (0.0625, 0.125, 0.25, 0.5))
       for name in STORED if name not in ("una-pair", "dpo")},
    # With beta log Z the task's beta is the right one.
    **{variant: ((1e-3, 2e-3, 4e-3, 8e-3), (0.5, 1, 2, 4))
       for variant in (("una-score", "batch"), ("una-score", "prompt"), ("una-score", "exact"),
                       ("una-binary-bce", "exact"))},
    **{(name, "zero"): ((1e-3, 3e-3, 6e-3, 1.2e-2), (0.25, 0.5, 1, 2)) for name in ONLINE},
}
SIZES = (256, 1024, 4096, 16384)                                 # judged responses


# ---------------------------------------------------------------- parts
# A part is the result of one function, kept on the disk. Its name has all that the result depends
# on, the code that trains included, but none of that code's prose.
ROOT = Path(__file__).parent.parent
TRAINS = ("una.py", "model.py", "data.py", "train.py", "lab/exact.py", "lab/variants.py")


def syntax(source):
    """A Python source without its comments and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:]
    return ast.dump(tree)


@functools.cache
def code_that_trains():
    return [syntax((ROOT / name).read_text(encoding="utf-8")) for name in TRAINS]


def part_path(folder, settings, seed, name, *what):
    key = json.dumps([code_that_trains(), run.versions(), asdict(settings), seed, name, *what])
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    return os.path.join(folder, f"{name}-{seed}-{digest}.json")


def make_part(path, function, *arguments):
    entries = function(*arguments)
    run.write_json(path, entries)
    return entries


def finish(pool, title, jobs):
    """What the parts of jobs (path, function, *arguments) say, in order: {kind: entry} each.

    What lies there already is not run again.
    """
    missing, ended = [job for job in jobs if not os.path.exists(job[0])], 0
    run.say(f"{title}: {len(jobs)} parts, {len(jobs) - len(missing)} of them are there already")

    def tell(job, entries):
        nonlocal ended
        ended += 1
        run.say(f"{title}, {ended} of {len(missing)} | {figures.line(entries)}")

    try:
        pool.run(make_part, missing, tell)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{title}, {ended} of {len(missing)} parts done") from None
    return [json.loads(Path(job[0]).read_text(encoding="utf-8")) for job in jobs]


# ---------------------------------------------------------------- the whole comparison
def tuned(tried, shares):
    """claims.json's rows of the grids. shares[variant, candidate]: what each tuning seed lost.

    The best candidate lost least in the mean; a run that diverged lost more than any number.
    """
    rows = []
    for variant, candidate in tried:
        best = min((other for other in tried if other[0] == variant),
                   key=lambda other: sum(shares[other]))
        rows.append(dict(method=variant[0], offset=variant[1], learning_rate=candidate[0],
                         multiple=candidate[1], best=(variant, candidate) == best,
                         lost=[share if share < math.inf else None
                               for share in shares[variant, candidate]]))
    return rows


def groups(settings):
    """What is reported: (key in claims.json, variants, seeds, settings that differ)."""
    stored, online = ([(name, "zero") for name in names] for names in (STORED, ONLINE))
    yield "runs", stored, REPORTED_SEEDS, {}
    yield "runs", online, REPORTED_SEEDS, dict(evaluations=2 * settings.evaluations - 1)
    yield "runs", [("una-online", "zero"), ("ppo", "zero")], REPORTED_SEEDS, dict(reward="model")
    yield "longer", [("una-online", "zero")], REPORTED_SEEDS, dict(steps=5 * settings.steps // 2)
    yield "offsets", [variant for variant in GRIDS if variant[1] != "zero"], REPORTED_SEEDS, {}
    for judged in SIZES:
        if judged != settings.judged:
            # dpo is left out: it is una-pair.
            yield "sizes", [variant for variant in stored if variant[0] != "dpo"], \
                REPORTED_SEEDS[:5], dict(judged=judged)


def settle(settings):
    """Tunes every variant, runs the best of each on the reported seeds: what claims.json says."""
    folder = os.path.join(settings.out, "parts")
    os.makedirs(folder, exist_ok=True)
    base = replace(settings, out="", jobs=1, evaluations=1)      # out and jobs change no figure
    prepare = {seed: part_path(folder, base, seed, "shared")
               for seed in (*TUNING_SEEDS, *REPORTED_SEEDS)}
    shared = {seed: f"{path}.pt" for seed, path in prepare.items()}
    for seed, path in shared.items():
        if not os.path.exists(path):                             # both, or none
            Path(prepare[seed]).unlink(missing_ok=True)

    def job(seed, variant, candidate, **changes):
        changed = replace(base, **changes)
        path = part_path(folder, changed, seed, *variant, *candidate)
        return path, variants.run_variant, changed, seed, variant, candidate, shared[seed]

    with run.Jobs(settings.jobs) as pool:
        prepared = finish(pool, "seeds", [(path, train.prepare, base, seed, shared[seed])
                                          for seed, path in prepare.items()])
        tried = [(variant, candidate) for variant, grid in GRIDS.items()
                 for candidate in itertools.product(*grid)]
        parts = finish(pool, "tuning", [job(seed, *both) for seed in TUNING_SEEDS
                                        for both in tried])
        shares = defaultdict(list)
        for both, part in zip(itertools.cycle(tried), parts):
            shares[both].append(figures.lost(part["runs"]))
        tuning = tuned(tried, shares)
        best = {(row["method"], row["offset"]): (row["learning_rate"], row["multiple"])
                for row in tuning if row["best"]}
        best["dpo", "zero"] = best["una-pair", "zero"]
        jobs = [(key, job(seed, variant, best[variant], **changes)) for seed in REPORTED_SEEDS
                for key, which, seeds, changes in groups(settings) if seed in seeds
                for variant in which]
        parts = finish(pool, "reported seeds", [job for _, job in jobs])
    claims = dict(settings=asdict(settings) | dict(seed=REPORTED_SEEDS[0],
                                                   seeds=len(REPORTED_SEEDS)),
                  device=settings.device, versions=run.versions(), tuning=tuning, reference=[],
                  optimum=[], runs=[], longer=[], offsets=[], sizes=[])
    for part in prepared[len(TUNING_SEEDS):]:
        for kind, entry in part.items():
            claims[kind].append({name: value for name, value in entry.items()
                                 if name not in ("dots", "samples")})
    for entry in claims["optimum"][1:]:                          # the picture has one frontier
        del entry["frontier"]
    for (key, _), part in zip(jobs, parts):
        claims[key].append(part["runs"])
    return claims | dict(peak_memory=memory.peak_memories(settings))


def write_page(claims, folder):
    """README.md and the pictures, from what claims.json says."""
    shown = claims | dict(runs=[entry for entry in claims["runs"] if "diverged" not in entry
                                and entry.get("reward_source") != "model"])
    for name, draw, height in (("frontier.png", figures.draw_frontier, 5),
                               ("regret-over-time.png", figures.draw_regret, 4.5)):
        figures.picture(os.path.join(folder, name), draw, shown, figsize=(7, height))
    text = page.page(claims)
    run.save(os.path.join(folder, "README.md"),
             lambda partial: Path(partial).write_text(text, encoding="utf-8"))


@dataclass
class Options:
    out: str = setting("lab", "folder for claims.json, README.md, pictures and parts/")
    jobs: int = setting(0, "runs side by side, a thread each, 0: one a core, 1 on an accelerator",
                        whole(0))
    device: str = setting("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    tables: bool = setting(False, "README.md and pictures anew from claims.json, without training")


def main(arguments=None, settings=None):
    """Returns the status."""
    parser = run.parser_of(Options, "lab.claims", "The paper's claims, settled.")
    options = Options(**vars(parser.parse_args(arguments)))
    run.check_writable(parser, options.out)
    path = os.path.join(options.out, "claims.json")
    if options.tables:
        if not os.path.exists(path):
            parser.error(f"--tables: there is no {path}")
        write_page(json.loads(Path(path).read_text(encoding="utf-8")), options.out)
        return 0
    torch.set_num_threads(1)                                     # as in the processes of Jobs
    device = run.pick_device(parser, options.device)
    jobs = options.jobs or (run.cores() if device == "cpu" else 1)
    settings = replace(settings or train.Settings(methods=[*variants.COMPARED]), device=device,
                       jobs=jobs, out=options.out)
    try:
        claims = settle(settings)
        run.write_json(path, claims)
        write_page(claims, options.out)
    except KeyboardInterrupt as stop:
        run.say(f"lab.claims: interrupted in {stop or 'what follows the runs'}. Finished parts are "
                f"in {options.out}/parts: the same command goes on from there")
        return 130
    run.say(f"{options.out}: claims.json, README.md, two pictures")
    diverged = [entry for key in ("runs", "longer", "offsets", "sizes") for entry in claims[key]
                if "diverged" in entry]
    for entry in diverged:
        run.say(f"seed {entry['seed']} | {entry['method']} diverged: {entry['diverged']}")
    return 1 if diverged else 0


if __name__ == "__main__":
    sys.exit(main())
