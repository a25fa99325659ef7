"""The program that tests the paper's claims: what it compares, what it keeps, a miniature of it."""
import importlib
import json
import math
import sys
from pathlib import Path

import claims
import pytest
from claims import ARMS, CLAIMS, SCALING, TASKS, Job, compare, verdict


def result_of(accuracy):
    last = {"accuracy": accuracy, "by": {"alike": {"accuracy": 0.7}}, "on_target": None,
            "true_thoughts": None, "zoom_calls": 1.5, "overlong": 0.0}
    return {"seconds": 60, "stages": {"sft": {"accuracy": 0.1, "by": {}}, "rl": last},
            "curves": {"accuracy": [accuracy] * 40}}


def results_of(arm, accuracies, other=()):
    """Results of two arms of sizes, a seed each accuracy."""
    return {("sizes", arm): dict(enumerate(map(result_of, accuracies))),
            ("sizes", "other"): dict(enumerate(map(result_of, other)))}


def test_a_difference_is_paired_by_seed():
    """Guards the figures of a claim: differences seed by seed, their mean, and Student's interval
    of it; a seed that only one arm has does not count, nor one that lacks the figure; one alone
    decides nothing."""
    claim = "", "sizes", "accuracy", "mine", "other"
    results = results_of("mine", [0.9, 0.8, 0.7, 0.1], [0.8, 0.6, 0.4])
    mine, theirs, middle, (low, high), n = compare(claim, results)
    assert (mine, theirs, middle) == pytest.approx((0.8, 0.6, 0.2)) and n == 3
    half = 4.30 * 0.1 / 3**0.5                            # differences 0.1, 0.2, 0.3
    assert (low, high) == pytest.approx((0.2 - half, 0.2 + half))
    assert compare(claim, results_of("mine", [0.9, None, 0.7], [0.8, 0.6, 0.4]))[4] == 2
    assert compare(claim, results_of("mine", [0.9], [0.8]))[3:] == ((-math.inf, math.inf), 1)


@pytest.mark.parametrize("figure, against, found", [
    ("accuracy", "mine:sft", (0.9, 0.1, 0.8)), ("accuracy alike", 0.5, (0.7, 0.5, 0.2)),
    ("accuracy alone", 0.5, None), ("accuracy", "other", None)])
def test_stages_categories_and_levels(figure, against, found):
    """Guards what a claim can name: an earlier stage, a category's accuracy, a level. What no seed
    has is no row."""
    row = compare(("", "sizes", figure, "mine", against), results_of("mine", [0.9, 0.9]))
    assert row is found or row[:3] == pytest.approx(found)


@pytest.mark.parametrize("interval, said", [
    ((0.01, 0.2), "supported"), ((-0.02, 0.01), "not supported"), ((0.0, 0.5), "undecided"),
    ((-math.inf, math.inf), "undecided")])
def test_verdicts(interval, said):
    """Guards what is said of an interval above zero, below the least gain, and of all else."""
    assert verdict(interval) == said


def test_claims_name_what_there_is():
    """Guards the table from claims that are never tested: what they compare are arms, their stages
    or levels."""
    named = [(task, part) for _, task, _, *parts in CLAIMS for part in parts if type(part) is str]
    for task, part in named:
        arm, _, stage = part.partition(":")
        assert arm in TASKS[task] and stage in ("", "base", "sft", "rl")
    assert {arm for panel in SCALING.values() for arm in panel.values()} <= set(ARMS)


def test_comparisons_are_true_of_the_thought_alone():
    """Guards the figure of spatial thoughts: a thought counts if it says a direction, is true if
    the truth is the only one, and the answer does not count."""
    def row(thought, truth="left"):
        return {"turns": [f"<think>{thought}</think>\n<answer> left </answer>"], "truth": truth}
    thoughts = "Red at (1, 2). Left.", "left above.", "right.", "Red at (1, 2)."
    assert claims.comparisons_true([*map(row, thoughts), row("below", "below")]) == 0.5
    assert claims.comparisons_true([row("Red.")]) is None


def test_back_tracks_are_counted_by_what_is_done():
    """Guards the figure from words: a zoom call to another place counts after a thought that the
    crop shows nothing; one to the same place does not, nor a sentence that is not acted upon."""
    def turn(thought, x, y):
        call = f'{{"name": "search_coordinate", "arguments": {{"coordinate": [{x}, {y}]}}}}'
        return f"<think>{thought}</think>\n<tool_call>\n{call}\n</tool_call>"
    first = turn("Card 1 at (5, 5).", 5, 5)
    seconds = (turn("Plain. Card 2 at (40, 9).", 40, 9),
               turn("Nothing. That was not it. Card 1 at (6, 5).", 6, 5),
               turn("Dotted. That was not it.", 40, 9), "<think>Plain. That was not it.</think>")
    assert claims.turns_back([{"turns": [first, second]} for second in seconds]) == 0.25


def test_a_policy_looks_again_when_five_steps_say_so():
    """Guards the table of what follows a warm start that looks once from a single lucky step."""
    assert claims.looks_again([1.0] * 9 + [2.0, 1.0, 1.0]) == "never"
    assert claims.looks_again([1.0] * 9 + [2.0] * 3) == "11"


def test_a_result_is_kept_until_what_made_it_changes(tmp_path, monkeypatch):
    """Guards the cache: a result counts for the flags and the base that made it, and no other; a
    short run's is not mistaken for a long one's."""
    monkeypatch.setattr(claims, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(claims, "TINY", tmp_path)
    weights = tmp_path / "base/model.safetensors"
    weights.parent.mkdir()
    for name in (*claims.FILES, "make_base.py"):
        (tmp_path / name).write_text(name)
    job = Job("spatial", "grounded", 3)
    assert job.result() is None
    job.folder.mkdir(parents=True)
    (job.folder / "result.json").write_text(json.dumps({"key": job.key(), "stages": {}}))
    assert job.result()["stages"] == {}
    assert Job("spatial", "grounded", 3, short=True).result() is None
    weights.write_text("another base")
    assert job.result() is None
    weights.write_text("base/model.safetensors")
    assert job.result()
    monkeypatch.setitem(ARMS, "grounded", ("grounded", (30, 40), "--kl 0.3"))
    assert job.result() is None


def test_tables_are_written_and_a_reading_is_kept(tmp_path):
    """Guards the file of tables: date and command stand above, what a person wrote below is kept;
    a claim's row has its verdict, and arms that were not trained have none."""
    path = tmp_path / "claims.md"
    path.write_text("# Old\n\n## Reading\n\nIt works.\n")
    results = results_of("zoom", [0.9, 0.8, 0.9], [0.5, 0.4, 0.5])
    results["sizes", "sft-answers"] = results.pop(("sizes", "other"))
    claims.write_tables(path, results, "python tests/claims.py")
    text = path.read_text()
    assert "tests/claims.py" in text and "Old" not in text and "It works." in text
    row, = (line for line in text.splitlines() if line.startswith("| GRPO over SFT"))
    assert "zoom 0.867" in row and "sft-answers 0.467" in row and row.count("supported") == 1
    assert "grounded over" not in text and "looks once" not in text


def test_scaling_is_drawn(tmp_path):
    """Guards the picture: it is written, and a better curve looks different."""
    arms = {arm for panel in SCALING.values() for arm in panel.values()}
    for name, accuracy in (("low", 0.2), ("high", 0.9)):
        results = {("search", arm): {0: result_of(accuracy)} for arm in arms}
        claims.draw_scaling(tmp_path / f"{name}.png", results)
    assert (tmp_path / "low.png").read_bytes() != (tmp_path / "high.png").read_bytes()


@pytest.mark.slow
def test_in_miniature(tmp_path, monkeypatch, capsys):
    """Guards the whole: arms of both training scripts are trained in short, their figures are
    printed; called again, nothing is trained. The scripts run in this process, for each new one
    would import torch."""
    def call(script, *words):
        monkeypatch.setattr(sys, "argv", list(map(str, (script, *words))))
        importlib.import_module(Path(script).stem).main()
    monkeypatch.setattr(claims, "RUNS", tmp_path)
    monkeypatch.setattr(claims, "call", call)
    command = ["--short", "--tasks", "spatial", "--arms", "grounded", "sft-answers", "--jobs", "1"]
    claims.main(command)
    out = capsys.readouterr().out
    assert "2 of them to be trained" in out and "2/2" in out
    assert "| GRPO over SFT on answers" in out and "undecided" in out
    folder = tmp_path / "short" / "spatial" / "grounded" / "seed-0"
    result = json.loads((folder / "result.json").read_text())
    assert list(result["stages"]) == ["base", "sft", "rl"]
    assert len(result["curves"]["accuracy"]) == len(result["curves"]["zoom_calls"]) == 1
    assert not list(folder.rglob("*.safetensors"))
    claims.main(command)
    assert " 0 of them to be trained" in capsys.readouterr().out


def test_a_script_that_fails_ends_its_arm(tmp_path):
    """Guards the call of a script: it gets each word, and its last lines tell why it failed."""
    script = tmp_path / "script.py"
    script.write_text("import sys\nsys.exit(f'{sys.argv[1:]} failed' if sys.argv[2] == '3' else 0)")
    claims.call(script, "--n", 2)
    with pytest.raises(RuntimeError, match=r"\['--n', '3'\] failed"):
        claims.call(script, "--n", 3)
