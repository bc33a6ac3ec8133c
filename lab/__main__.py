"""The campaigns, by name.

    python -m lab stored|online|budget|noise      goes on where it stopped; the last two need stored
    python -m lab tables                          page and pictures anew, from the four JSON files
"""
import json
import os
import sys

import torch

from lab import budget, noise, online, run, stored, tables
from lab.campaign import Lab

PLANS = dict(stored=stored.settle, online=online.settle, budget=budget.settle, noise=noise.settle)


def main(arguments=None):
    """Returns the status."""
    parser = run.Parser("python -m lab", description=__doc__)
    parser.add_argument("what", choices=[*PLANS, "tables"])
    parser.add_argument("--out", default="lab", help="folder for the files, and for parts/ [lab]")
    parser.add_argument("--jobs", type=int, default=run.cores(), help="runs at a time [one a core]")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)                                     # as in the processes of the runs
    try:
        if given.what == "tables":
            tables.fill(given.out)
        else:
            told = PLANS[given.what](Lab(given.out, given.jobs))
            run.write_json(os.path.join(given.out, f"{given.what}.json"), told)
    except KeyboardInterrupt:
        run.say(f"interrupted. What has ended is in {given.out}/parts: the same command goes on")
        return 130
    except (OSError, json.JSONDecodeError) as error:             # a file is missing, or half
        parser.error(f"--out {given.out}: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
