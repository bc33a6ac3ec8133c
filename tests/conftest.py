import contextlib
import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)   # at these sizes a second thread costs more than it brings


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """All methods on seed 1, on four prompts: listing all responses to sixteen would take longer.

    A namespace: folder, results, status, out, err.
    """
    import data
    import short_train
    import train

    folder = tmp_path_factory.mktemp("tiny")
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "TRAIN_PROMPTS", data.TRAIN_PROMPTS[:3])
        patch.setattr(data, "HELDOUT_PROMPTS", data.HELDOUT_PROMPTS[:1])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = train.main([*short_train.FLAGS, "--jobs", "1", "--seed", "1",
                                 "--out", str(folder)])
    return SimpleNamespace(folder=folder, status=status, out=out.getvalue(), err=err.getvalue(),
                           results=json.loads((folder / "results.json").read_text("utf-8")))


@pytest.fixture
def short(monkeypatch):
    """A function that runs train.main(FLAGS + flags) in this process, in short_train's language."""
    import data
    import short_train
    import train

    for name, value in short_train.LANGUAGE.items():
        monkeypatch.setattr(data, name, value)

    def main(folder, flags=""):
        return train.main([*short_train.FLAGS, "--jobs", "1", "--out", str(folder),
                           *flags.split()])
    return main


@pytest.fixture
def odd_environment():
    """A function that makes this environment with some variables changed; no others of theirs."""
    def environment(changes):
        named = ("LANG", "LC_ALL", "PYTHONUTF8", "PYTHONIOENCODING", "MPLBACKEND")
        return {key: value for key, value in os.environ.items() if key not in named} | changes
    return environment
