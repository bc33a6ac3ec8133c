"""A reported run against a live one, in half a minute: not among the tests, CI runs it.

    python -m pytest tests/live.py
"""
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_una_online_ends_where_online_json_says(tmp_path):
    # The feedback that others learn from is nothing to it, so the least will do.
    subprocess.run([sys.executable, "train.py", "--methods", "una-online", "--judged", "24",
                    "--seed", "21", "--out", str(tmp_path)], cwd=ROOT, check=True)
    live, told = (json.loads(path.read_text(encoding="utf-8"))["runs"]
                  for path in (tmp_path / "results.json", ROOT / "lab" / "online.json"))
    (run,), (expected, *_) = live, [entry for entry in told if entry["seed"] == 21]
    for split in ("train", "heldout"):
        for figure, off in dict(reward=0.02, kl=0.05, objective=0.01).items():   # by rounding
            assert run[split][figure] == pytest.approx(expected[split][figure], abs=off)
        assert run[split]["lost"] < 0.05
