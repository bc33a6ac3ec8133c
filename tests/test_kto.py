"""lab/kto.py: kto with its reference point, counted, and without it."""
import json

import pytest
import torch

import data
import short_train
import train
import una
from lab import kto, tables
from lab.variants import Variant, run_variant


def liked(tokens, mask):
    """In place of mismatched pairs, the best response for each: its probability rises, z_0 too."""
    best = data.reward(tokens[:, :3], tokens[:, 3:]).argmax()
    return tokens[best].expand_as(tokens), mask[best].expand_as(mask)


@pytest.fixture(params=[data.mismatched, liked])
def told(request, monkeypatch, tmp_path):
    """kto.json of a miniature, its folder, its cell."""
    monkeypatch.setattr(data, "mismatched", request.param)
    for name, value in short_train.LANGUAGE.items():
        monkeypatch.setattr(data, name, value)
    monkeypatch.setattr(kto, "REPORTED_SEEDS", range(21, 23))
    cell = dict(learning_rate=1e-2, beta=0.5)
    (tmp_path / "claims.json").write_text(json.dumps(dict(tuning=[
        dict(method="kto", offset="zero", level=level, reward="judge", cell=cell, best=True)
        for level in kto.LEVELS])), encoding="utf-8")
    settings = train.Settings(steps=8, judged=192, reference_steps=8, evaluations=2, n_layer=1,
                              n_head=1, n_embd=8, batch=48)
    arguments = ["--device", "cpu", "--jobs", "1", "--out", str(tmp_path)]
    assert kto.main(arguments, settings) == 0
    return json.loads((tmp_path / "kto.json").read_text("utf-8")), tmp_path, cell


def test_with_z0_the_runs_are_the_methods_own_and_without_it_they_are_others(told):
    told, folder, cell = told
    keys = [(run["level"], run["seed"], run["without"]) for run in told["runs"]]
    assert keys == [(level, seed, without) for level in (0.0, 1.0) for seed in (21, 22)
                    for without in (False, True)]
    for path in (folder / "parts").glob("shared-21-*.pt"):
        start = train.load(str(path)).start["objective"]
        level = next(run["level"] for run in told["runs"]
                     if run["seed"] == 21 and run["curve"][0]["objective"] == start)
        settings = train.Settings(device="cpu", steps=8, judged=192, batch=48, evaluations=1,
                                  level=level, out="")
        own = run_variant(settings, 21, Variant("kto", level=level), cell, str(path))["runs"]
        (ours,) = (run for run in told["runs"] if (run["level"], run["seed"], run["without"])
                   == (level, 21, False))
        assert own["curve"][-1]["objective"] == ours["curve"][-1]["objective"]
    assert all(0 <= run["zeros"] <= 8 for run in told["runs"])
    zeros = [run["zeros"] for run in told["runs"][::2]]
    assert min(zeros) > 0                                        # at the first step pi is pi_ref
    assert data.mismatched is not liked or min(zeros) < 8
    for run, other in zip(told["runs"][::2], told["runs"][1::2]):
        differ = run["curve"][-1]["regret"] != other["curve"][-1]["regret"]
        assert differ == (run["zeros"] < 8)                      # all zero: nothing to leave out


def test_without_z0_kto_is_the_absolute_error_of_labels():
    normal = torch.Generator().manual_seed(0)
    logprob, ref_logprob, other, other_ref = torch.randn(4, 6, generator=normal).double()
    labels = torch.tensor([1, 0, 1, 1, 0, 0])
    losses = una.kto_loss(logprob, ref_logprob, labels, other[:1], other_ref[:1] + 1e6, 0.3)
    error = (labels - una.implicit_score(0.3 * (logprob - ref_logprob))).abs()
    assert torch.allclose(losses, error, rtol=0, atol=1e-12)


def test_the_table_tells_zeros_and_what_was_lost():
    def run(level, without, regret, zeros=0):
        return dict(level=level, without=without, zeros=zeros,
                    curve=[dict(step=0, regret=1.0), dict(step=8, regret=regret)])
    told = dict(predictions=kto.PREDICTIONS, runs=[
        run(0.0, False, 0.2, 8), run(0.0, False, 0.4, 6), run(0.0, True, 0.2), run(0.0, True, 0.5),
        run(1.0, False, 1.0, 8), run(1.0, False, 1.0, 8), run(1.0, True, 1.0), run(1.0, True, 1.0)])
    said = tables.kto(told)
    assert said["kto_runs"].splitlines()[2:] == [
        "| 0 | 6 to 8 of 8 | 30 % (20 to 40) | 35 % (20 to 50) | +5 [+0, +10] |",
        "| 1 | 8 to 8 of 8 | 100 % (100 to 100) | 100 % (100 to 100) | +0 [+0, +0] |"]
    assert [line.split(" | ")[-1] for line in said["kto_predictions"].splitlines()[2:]] == [
        "does not hold |", "does not hold |"]
