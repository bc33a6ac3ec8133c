"""What is kto's z_0 here? How often it is 0, and what kto loses without it.

    python -m lab.kto                    resumes; ten minutes on two cores

KTO's reference point is the mean log pi/pi_ref of mismatched pairs, cut off at 0. In the map of
methods it is what stands for f(x) + c. This runs kto in the cells that lab/claims.py chose, at both
levels, on the reported seeds, and once more with 0 in its place. Writes kto.json, from claims.json
in the same folder.
"""
import sys
from dataclasses import replace

import train
from lab import exact, run, tables
from lab.claims import REPORTED_SEEDS
from lab.resume import Options, Parts, claims_in, finish, part_path, settled

LEVELS = (0.0, 1.0)

# Fixed before any of this ran, but for one run of seed 21 at level 0.
PREDICTIONS = dict(
    zero="z₀ is 0 in at least nine steps of ten, on every seed at both levels",
    same="without z₀ the median lost moves by less than a tenth of itself, at both levels",
)


def run_kto(settings, seed, cell, without, path):
    """{"runs": what a run lost, and at how many of its steps z_0 was 0}."""
    shared, zeros = train.load(path), []

    def loss(policy, batch, beta):
        if without:
            batch.other_tokens, batch.other_mask = batch.tokens[:1], batch.mask[:1]
            batch.other_ref_logprob = batch.ref_logprob[:1] + 1e6          # so z_0 is cut off at 0
        else:
            rho = (train.model_logprob(policy, batch.other_tokens, batch.other_mask).detach()
                   - batch.other_ref_logprob)
            zeros.append((rho.mean() <= 0).item())
        return train.kto(policy, batch, beta)

    method = train.METHODS["kto"]._replace(loss=loss, **cell)
    entry = train.run_method(settings, seed, "kto", shared, method, exact.Observer)["runs"]
    entry = {name: entry[name] for name in entry if name not in ("dots", "samples")}
    return dict(runs=entry | dict(level=settings.level, without=without, zeros=sum(zeros)))


def settle(settings, claims):
    """What kto.json says."""
    with run.Jobs(settings.jobs) as pool:
        parts = Parts(pool, settings)
        parts.prepared(REPORTED_SEEDS, [(level, "judge") for level in LEVELS])
        jobs = []
        for level in LEVELS:
            cell = tables.best_cell(claims, "kto", level=level)
            for seed in REPORTED_SEEDS:
                path, _ = parts.shared(seed, level, "judge")
                for without in (False, True):
                    its = replace(parts.base, level=level)
                    jobs.append((part_path(parts.folder, its, seed, "kto-z0", cell, without),
                                 run_kto, its, seed, cell, without, f"{path}.pt"))
        found = finish(pool, "kto, with z_0 and without", jobs)
    return dict(predictions=PREDICTIONS, runs=[part["runs"] for part in found])


def main(arguments=None, settings=None):
    """Returns the status."""
    parser = run.parser_of(Options, "lab.kto", "What is kto's z_0 here?")
    options = Options(**vars(parser.parse_args(arguments)))
    run.check_writable(parser, options.out)
    claims = claims_in(parser, options.out)
    said = settled(parser, options, settings or train.Settings(), "kto.json",
                   lambda settings: settle(settings, claims))
    return 130 if said is None else 0


if __name__ == "__main__":
    sys.exit(main())
