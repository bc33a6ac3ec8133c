import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)   # at these sizes a second thread costs more than it brings


@pytest.fixture
def language():
    """The small language of toy.py, while the test runs."""
    import toy
    with toy.language():
        yield


@pytest.fixture
def short(language, monkeypatch):
    """A function that runs train.main(FLAGS + flags) without pictures: status, results."""
    import toy
    import train

    def main(folder, flags=""):
        monkeypatch.setattr(train.figures, "draw_all", lambda *_: None)
        status = train.main([*toy.FLAGS, "--out", str(folder), *flags.split()])
        return status, json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return main


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """All methods on seed 1 in the small language: a namespace of folder, status, results, and
    runs: {method: entry}."""
    import toy
    import train

    folder = tmp_path_factory.mktemp("tiny")
    with toy.language():
        status = train.main([*toy.FLAGS, "--seed", "1", "--out", str(folder)])
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return SimpleNamespace(folder=folder, status=status, results=results,
                           runs={entry["method"]: entry for entry in results["runs"]})
