"""Three trainers on the toy, against its exact optimum: train.py, own_model.py and TRL's.

    pip install -r requirements.txt -r examples/requirements.txt -r examples/requirements-trl.txt
    python examples/on_the_toy.py DIR                half an hour on two cores; goes on if stopped

The same reference, feedback, number of responses a step, learning rate, beta and 400 steps. TRL has
train.py's batches and schedule too; own_model.py has the Trainer's own: shuffled otherwise, and the
rate's two ramps one after the other, where train.py multiplies them. Writes DIR/on_the_toy.json.
Beside them dpo by train.py once more, from first weights that differ by 1e-7 of themselves.
"""
import copy
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import train
from lab import exact, run

HERE = Path(__file__).resolve().parent
SEEDS, STEPS, BATCH = (1, 2, 3), 400, 192
# method of train.py: (its file of the export, own_model.py's flags)
OWN = {"dpo": ("pairs", ""), "una-binary-bce": ("binary", "--g bce"), "una-score": ("scores", ""),
       "una-score-offset": ("scores", "--offset estimated"), "una-mixed": ("mixed", "")}
TRL = ("dpo", "kto")


def python(log, script, *arguments):
    """Runs one of the project's scripts on one thread; what it says goes to the file log."""
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    with open(log, "w") as file:
        subprocess.run(command, stdout=file, stderr=file, check=True,
                       env=os.environ | dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1"))


def export(folder, seed):
    if not (folder / "toy.json").exists():
        python(folder.with_suffix(".log"), "toy_as_transformers.py", folder, "--seed", seed)


def ours(folder, seed):
    """train.py's runs: [{seed, by, method, lost, kl}]."""
    out = folder / "train"
    methods = [*OWN, *(name for name in TRL if name not in OWN)]
    python(folder / "train.log", "../train.py", "--seed", seed, "--methods", ",".join(methods),
           "--device", "cpu", "--jobs", 1, "--out", out)
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    start = results["reference"][0]["train"]["regret"]
    return [dict(seed=seed, by="train.py", method=entry["method"], kl=entry["train"]["kl"],
                 lost=entry["train"]["regret"] / start) for entry in results["runs"]]


def policy_by(by, method, folder, seed):
    """own_model.py's run of a method, or TRL's: a list as above."""
    row, out = train.METHODS[method], folder / f"{by}-{method}"
    log, beta = f"{out}.log", row.beta * train.Settings().beta
    if by == "TRL":
        python(log, "trl_on_toy.py", folder, "--method", method, "--learning_rate",
               row.learning_rate, "--beta", beta, "--steps", STEPS, "--batch", BATCH, "--seed",
               seed, "--out", out)
    else:
        kind, flags = OWN[method]
        rows = (folder / f"{kind}.jsonl").read_text(encoding="utf-8").count("\n")
        python(log, "own_model.py", "--model", folder / "reference", "--data",
               folder / f"{kind}.jsonl", "--beta", beta, *flags.split(), "--heldout", 0,
               "--learning_rate", row.learning_rate, "--adam_beta2", 0.99, "--max_steps", STEPS,
               "--per_device_train_batch_size", round(BATCH * rows / train.Settings().judged),
               "--warmup_steps", STEPS // 20, "--lr_scheduler_type", "linear", "--seed", seed,
               "--per_device_eval_batch_size", 1024, "--save_strategy", "no", "--use_cpu", "True",
               "--report_to", "none", "--output_dir", out)
    told = subprocess.run(
        [sys.executable, str(HERE / "toy_as_transformers.py"), str(folder), "--evaluate", str(out),
         "--json"], stdout=subprocess.PIPE, text=True, check=True)
    reached = json.loads(told.stdout)["train"]
    return [dict(seed=seed, by=by, method=method, kl=reached["kl"], lost=reached["lost"])]


def noisy(seed, runs=3):
    """How far does rounding carry? Runs of dpo as ours has it, from weights with noise of 1e-7."""
    settings, method = train.Settings(device="cpu", out=""), train.METHODS["dpo"]
    reference = train.train_reference(settings, seed)
    shared = SimpleNamespace(reference=reference, feedback=train.collect_feedback(
        settings, seed, reference))
    world = exact.World(reference, data.TRAIN_PROMPTS, settings.beta)
    start, entries = exact.evaluate(world, world.ref_logprobs)["regret"], []
    for number in range(1, 1 + runs):
        generator = torch.Generator().manual_seed(number)
        policy = copy.deepcopy(reference).requires_grad_(True)
        with torch.no_grad():
            for part in policy.parameters():
                part *= 1 + 1e-7 * torch.randn(part.shape, generator=generator)
        batches = train.batches_for(method, policy, None, shared, settings, seed)
        train.align(method, policy, batches, method.beta * settings.beta, STEPS)
        reached = exact.evaluate(world, exact.policy_logprobs(policy, world.prompts))
        entries.append(dict(seed=seed, by="train.py, noise", method="dpo",
                            lost=reached["regret"] / start))
    return entries


def main(folder):
    folder.mkdir(parents=True, exist_ok=True)
    folders = {seed: folder / f"seed-{seed}" for seed in SEEDS}
    jobs = [("ours", seed, partial(ours, folders[seed], seed)) for seed in SEEDS]
    jobs += [(f"{by}-{method}", seed, partial(policy_by, by, method, folders[seed], seed))
             for by, methods in (("TRL", TRL), ("own_model.py", OWN))
             for seed in SEEDS for method in methods]
    jobs += [("noisy", seed, partial(noisy, seed)) for seed in SEEDS]
    torch.set_num_threads(1)

    def result(job):
        name, seed, work = job
        path = folder / f"{name}-{seed}.json"
        if not path.exists():
            run.write_json(path, work())
            run.say(f"{path}: done")
        return json.loads(path.read_text(encoding="utf-8"))

    with ThreadPoolExecutor(run.cores()) as pool:
        list(pool.map(lambda seed: export(folders[seed], seed), SEEDS))
        runs = [entry for entries in pool.map(result, jobs) for entry in entries]
    run.write_json(folder / "on_the_toy.json", dict(versions=run.versions(), runs=runs))


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
