"""The program that tests the paper's claims: what it compares, what it keeps, a miniature of it."""
import json

import claims
import pytest
from claims import ARMS, CLAIMS, TASKS, Claim, compare, jobs_of, verdict

from evaluate import Report


def results_of(arm, accuracies, other=()):
    def result(accuracy):
        return {"stages": {"sft": {"accuracy": 0.1, "by": {}},
                           "rl": {"accuracy": accuracy, "by": {"alike": {"accuracy": 0.7}}}}}
    return {("toy-gui", arm): {seed: result(a) for seed, a in enumerate(accuracies)},
            ("toy-gui", "other"): {seed: result(a) for seed, a in enumerate(other)}}


def test_a_difference_is_paired_by_seed():
    """Guards the figures of a claim: differences seed by seed, their mean, and Student's interval
    of it; a seed that only one arm has does not count, nor one that lacks the figure."""
    claim = Claim("", "toy-gui", "accuracy", "mine", "other")
    results = results_of("mine", [0.9, 0.8, 0.7, 0.1], [0.8, 0.6, 0.4])
    mine, theirs, middle, (low, high), n = compare(claim, results)
    assert (mine, theirs, middle) == pytest.approx((0.8, 0.6, 0.2)) and n == 3
    half = 4.30 * 0.1 / 3**0.5                            # differences 0.1, 0.2, 0.3
    assert (low, high) == pytest.approx((0.2 - half, 0.2 + half))
    assert compare(claim, results_of("mine", [0.9, None, 0.7], [0.8, 0.6, 0.4]))[4] == 2


def test_stages_categories_and_levels():
    """Guards what a claim can name: an earlier stage, a category's accuracy, a level."""
    results = results_of("mine", [0.9, 0.9])
    stage = Claim("", "toy-gui", "accuracy", "mine", "mine:sft")
    assert compare(stage, results)[:3] == pytest.approx((0.9, 0.1, 0.8))
    category = Claim("", "toy-gui", "accuracy alike", "mine", level=0.5)
    assert compare(category, results)[:3] == pytest.approx((0.7, 0.5, 0.2))
    assert compare(Claim("", "toy-gui", "accuracy", "mine", "other"), results) is None
    assert compare(stage, results_of("mine", [0.9])) is None


@pytest.mark.parametrize("interval, said", [
    ((0.01, 0.2), "supported"), ((-0.1, 0.3), "undecided"), ((-0.3, -0.1), "not supported"),
    ((-0.02, 0.01), "not supported"), ((0.0, 0.5), "undecided")])
def test_verdicts(interval, said):
    assert verdict(interval) == said


def test_claims_name_what_there_is():
    """Guards the table from claims that are never tested: their arms are trained on their task, and
    their figures are a Report's."""
    trained = {(job.task, job.arm) for job in jobs_of(TASKS, ARMS, [0], [])}
    for claim in CLAIMS:
        for arm in filter(None, (claim.arm, claim.other)):
            name, _, stage = arm.partition(":")
            assert (claim.task, name) in trained and stage in ("", "base", "sft", "rl")
        assert claim.figure.split()[0] in Report.__dataclass_fields__


def test_a_result_is_kept_until_the_flags_change(tmp_path, monkeypatch):
    """Guards the cache: a result counts for the command that made it, and no other."""
    monkeypatch.chdir(tmp_path)
    job, = jobs_of(["toy-spatial"], ["grounded"], [3], [])
    assert job.result() is None
    job.folder.mkdir(parents=True)
    (job.folder / "result.json").write_text(json.dumps({"command": job.command, "stages": {}}))
    assert job.result()["stages"] == {}
    changed, = jobs_of(["toy-spatial"], ["grounded"], [3], ["--kl", "0.3"])
    assert changed.folder == job.folder and changed.result() is None


def test_scaling_is_drawn(tmp_path):
    """Guards the picture: it is written, and a better curve looks different."""
    def results(accuracy):
        return {key: {"accuracies": [accuracy] * 20, "stages": {"rl": {"accuracy": accuracy}}}
                for key in claims.scaling_jobs([])}
    for name, accuracy in (("low", 0.2), ("high", 0.9)):
        claims.draw_scaling(tmp_path / f"{name}.png", results(accuracy))
    assert (tmp_path / "low.png").read_bytes() != (tmp_path / "high.png").read_bytes()


def test_in_miniature(tmp_path, monkeypatch, capsys):
    """Guards the whole: two arms of a few steps are trained through the scripts, their figures are
    printed; called again, nothing is trained."""
    for name in ("train_sft.py", "train_rl.py", "evaluate.py"):
        (tmp_path / name).write_text(f"import sys\nsys.path.insert(0, {str(claims.REPOSITORY)!r})\n"
                                     f"from {name[:-3]} import *\n"
                                     f"run({name[:-3]!r}, '', main)\n")
    monkeypatch.setattr(claims, "REPOSITORY", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(claims, "EVALUATION", 8)
    command = ["--arms", "grounded-cold", "sft-answers", "--tasks", "toy-spatial", "--jobs", "2",
               "--base-steps", "4", "--questions", "2", "--group", "2", "--search-questions", "4"]
    monkeypatch.setitem(ARMS, "grounded-cold",
                        ("train_rl", "--mode grounded --sft-steps 0 --steps 2"))
    monkeypatch.setitem(ARMS, "sft-answers", ("train_sft", "--mode direct --sft-steps 0"))
    claims.main(command)
    out = capsys.readouterr().out
    assert "2 of them to be trained" in out and "2/2" in out
    assert out.count("grounded-cold") == 2
    folder = tmp_path / "runs/claims/toy-spatial/grounded-cold/seed-0"
    result = json.loads((folder / "result.json").read_text())
    assert list(result["stages"]) == ["base", "sft", "rl"] and len(result["accuracies"]) == 2
    assert not list(folder.rglob("*.safetensors"))
    claims.main(command)
    assert " 0 of them to be trained" in capsys.readouterr().out
