"""The figures of an evaluation are what they say, and an evaluation that was broken off, or run by
more processes, or on another order of rows, says the same."""
import fcntl
import json
import math
import os
import shutil
import sys

import numpy as np
import pytest
from conftest import ROOT, in_processes
from PIL import Image

import evaluate as evaluation
from evaluate import evaluate, figures, interval, open_file, read_answers, table
from model import UserError, load, rank
from reward import official_rule, row_of, targets_hit, true_thoughts
from rollout import Dialogue, Frame, Question, Trace, Turn, crop_box, format_call, parse_turn

# ---------------------------------------------------------------------------- figures from regions

NAMES = frozenset({"dotted", "plain", "dark red", "red", "red dots", "Straße"})
REGIONS = [{"box": [12, 12, 52, 52], "name": "dotted"},       # of an image of 256x256 px
           {"box": [140, 12, 180, 52], "name": "plain"}]


def turn_of(thought, *point):
    action = format_call(point) if point else "<answer>dotted</answer>"
    return f"<think>{thought}</think>\n{action}"


def trace_of(*texts, mode="zoom", ended="answer", **question):
    """A trace of turns in which the policy wrote these texts; the model input is 64x64 px. Each
    zoom call is answered by a crop of 64 px of the original."""
    question = Question("Which?", [Image.new("RGB", (256, 256))], "dotted", **question)
    frame, turns = Frame((64, 64), (256, 256)), [parse_turn(text) for text in texts]
    for turn in turns:
        if turn.call and frame.contains(turn.call):
            turn.crop = crop_box((256, 256), frame.to_original(turn.call), 32)
    return Trace(None, question=question, mode=mode, frames=[frame], turns=turns, ended=ended)


def thoughts(*texts, regions=REGIONS):
    return true_thoughts(trace_of(*texts, regions=regions, names=NAMES))


@pytest.mark.parametrize("name, thought, true", [
    ("dotted", "DOTTED, really dotted", True), ("dotted", "", False),
    ("dotted", "Not plain but dotted.", False), ("dotted", "undotted", False),
    ("dark red", "It is Dark Red.", True), ("dark red", "It is red.", False),
    ("red dots", "Red dots", True), ("Straße", "The STRASSE.", True)])
def test_a_thought_that_describes(name, thought, true):
    """Guards the measure against a thought that names all regions, or none, or a word or a name in
    which one stands ("dark red" also says "red"); capitals do not count, in any script."""
    regions = [{"box": [12, 12, 52, 52], "name": name}]
    assert thoughts(turn_of("", 8, 8), turn_of(thought), regions=regions) == [true]


@pytest.mark.parametrize("x, y, name", [
    (15, 8, "dotted"), (17, 8, "plain"), (31, 8, "plain"), (32, 8, "nothing"), (31, 18, "plain"),
    (31, 19, "nothing")])
def test_what_a_crop_shows(x, y, name):
    """Guards what thoughts are measured by: the most central region counts, of those of which 0.3
    is seen in x and in y; where nothing is shown, no name is true."""
    regions = [{"box": [24, 12, 64, 52], "name": "dotted"},
               {"box": [64, 12, 104, 52], "name": "plain"}]
    for said in ("dotted", "plain", "nothing"):
        assert thoughts(turn_of("", x, y), turn_of(said), regions=regions) == [said == name]


def test_which_thoughts_count():
    """Guards the share: each thought is about the crop before it; what follows words instead of a
    crop is none about a crop; without regions nothing is known."""
    assert thoughts(turn_of("Dotted.", 40, 8), turn_of("Plain. On.", 8, 40),
                    turn_of("None.", 8, 8), turn_of("None.")) == [True, True, False]
    assert thoughts(turn_of("", 900, 3), turn_of("Dotted.")) == []
    unknown = trace_of(turn_of("", 8, 8), turn_of("Dotted."))
    found = figures([[row_of(unknown)]])
    assert found["true_thoughts"] is found["on_target"] is None


def test_targets():
    """Guards on_target: zoom calls in a region, or, without regions, in the box that is the answer,
    in px of the original; in one turn each point of the thought."""
    calls = turn_of("", 10, 10), turn_of("", 20, 20), turn_of("")
    assert targets_hit(trace_of(*calls, regions=REGIONS)) == [True, False]
    trace = trace_of(*calls, kind="point")
    trace.question.answer = (70, 70, 90, 90)
    assert targets_hit(trace) == [False, True]
    said = turn_of("One at (10, 10), one at (40, 8), (60, 60) is none.")
    assert targets_hit(trace_of(said, mode="grounded", regions=REGIONS)) == [True, True, False]


# ------------------------------------------------------------------------------ figures of a trace

def counts(trace):
    row = row_of(trace)
    return [row[name] for name in ("regions", "subgoals", "verifications", "backtracks")]


def test_behaviours():
    """Guards the counts: a point and the zoom call at it are one region, so is a place some px
    away; a place that is returned to is a verification, a place that is named twice in a row is
    none; a point outside is no region, a word in which a phrase stands no phrase."""
    trace = trace_of(turn_of("First the cup (10, 10).", 10, 10),
                     turn_of("Not here. The box (60, 40).", 60, 40),
                     turn_of("Let me check (12, 12).", 13, 12), turn_of("Wait, at (900, 3)."))
    assert counts(trace) == [2, 2, 2, 2]
    thought = ("I need to find the sign (10, 10). Next, the door (50, 20). That was not it. "
               "Actually the sign (11, 9) is red, I can confirm. The waiter stands nextdoor.")
    assert counts(trace_of(turn_of(thought), mode="grounded")) == [2, 2, 2, 2]
    assert counts(trace_of("Dotted, not checked, and no tags at all.")) == [0, 0, 0, 0]


def test_a_row_is_json_and_has_all_of_a_trace():
    """Guards traces.jsonl, which is all that is left of a run: texts, how it ended, each part of
    the reward."""
    trace = trace_of(turn_of("Card (8, 8).", 8, 8), turn_of("Dotted (9, 9)."), regions=REGIONS,
                     names=NAMES, id="7", key="abc", category="hard")
    row = json.loads(json.dumps(row_of(trace)))
    expected = {"id": "7", "key": "abc", "category": "hard", "question": "Which?",
                "truth": "dotted", "answer": "dotted", "ended": "answer",
                "total": 1, "correct": 1, "format": 1, "grounded": 1, "diversity": 0, "why": "",
                "zoom_calls": 1, "several_crops": False, "overlong": False, "official": True,
                "on_target": [True], "true_thoughts": [True]}
    assert expected.items() <= row.items()
    assert row["turns"] == [turn.text for turn in trace.turns]


def test_the_figures_of_some_questions():
    """Guards the table: means over traces, of questions with different numbers of calls."""
    texts = [turn_of("Card (40, 8).", 40, 8), turn_of("Plain.", 8, 8), turn_of("Dotted.")]
    once, twice = (row_of(trace_of(*turns, regions=REGIONS, names=NAMES, category="hard"))
                   for turns in ([turn_of("Card (8, 8).", 8, 8), turn_of("Dotted.")], texts))
    cut = row_of(trace_of("<think>So", ended="truncated"))
    found = figures([[once], [twice], [cut, cut]])
    expected = {"n": 3, "accuracy": 2 / 3, "ci95": interval([1, 1, 0]), "zoom_calls": 0.75,
                "several_crops": 0.25, "overlong": 0.5, "format": 0.5, "grounded": 0.5,
                "diversity": 0.05, "on_target": 1, "true_thoughts": 1}
    assert expected.items() <= found.items() and found["by"]["hard"]["n"] == 2
    assert found["reward"] == pytest.approx((1 + 0.6 + 0.4 * 1.2) / 4)


# --------------------------------------------------------------------------------- rules of scoring

def said(answer, question):
    """A trace that answers this, its model input of half the size."""
    frame = Frame((100, 50), (200, 100))
    return Trace(None, question=question, frames=[frame], turns=[Turn("", answer=answer)])


@pytest.mark.parametrize("truth, answer, right", [
    ("right", "left or Right.", True), ("right", "B", False), ("B", "Because", True),
    ("B", "right", False), ("B", None, False), ("dark green", "Dark-green!", True),
    ("left\nside", "left side", False)])
def test_official_rule_of_answers_in_words(truth, answer, right):
    """Guards comparisons with published figures: the public code asks whether the truth is a part
    of the answer, punctuation, blanks and capitals aside, and knows no options. Ours is
    stricter."""
    for kind in ("choice", "string"):
        question = Question("Where?", [], truth, kind, ("left", "right"))
        assert official_rule(said(answer, question), not right) == right


YES_OR_NO = "RoboSpatial-Home, yes or no"
POLYGON = ((20, 30), (40, 30), (40, 50), (20, 50))


@pytest.mark.parametrize("kind, truth, answer, right", [
    ("string", "Yes", " yes, it is.", True), ("string", "Yes", "Oh yes", False),
    ("string", "Yes", None, False), ("point", POLYGON, "(30, 40)", False),
    ("point", POLYGON, "[(15, 20), (90, 40)]", True),
    ("point", POLYGON, "[(90, 40), (15, 20)]", False), ("point", POLYGON, "left", False)])
def test_official_rule_of_robospatial(kind, truth, answer, right):
    """Guards: "Yes, it is." wrong on RoboSpatial-Home, where a prefix counts; a list of points
    wrong there, where the first one counts; the polygon compared with px of the model input."""
    question = Question("Is it?", [], truth, kind, category=YES_OR_NO)
    assert official_rule(said(answer, question), not right) == right


def test_official_rule_of_actions_is_ours():
    """Guards the same rule applied to answers that are no words."""
    question = Question("Where?", [], "click [1]", "action")
    assert official_rule(said("click [1]23", question), False) is False
    assert official_rule(said("`click [1]`", question), True) is True


def rows_of(question, *answers):
    """The rows of some samples of a question."""
    return [row_of(said(answer, question)) for answer in answers]


@pytest.mark.parametrize("category, answer, truth, by", [
    ("Counting", "red or blue", "red", 0), (YES_OR_NO, "Yes, it is", "Yes", 1)])
def test_strict_and_official_stand_side_by_side(category, answer, truth, by):
    """Guards: one figure under the other's name. RoboSpatial-Home's own rule is that of its scores,
    and of no others."""
    found = figures([rows_of(Question("Is it?", [], truth, category=category), answer)])
    assert (found["accuracy"], found["official"], found["by"][category]["accuracy"]) == (0, 1, by)


# ------------------------------------------------------------------------------------------ samples

@pytest.mark.parametrize("right, wrong, bounds", [
    (8, 2, (0.4902, 0.9433)), (76, 24, (0.668, 0.833)), (10, 0, (0.7225, 1)), (0, 0, (0, 1))])
def test_wilson_interval(right, wrong, bounds):
    """Guards the interval of one sample a question, against values from the literature (Wilson
    1927; 8 of 10; 76 of 100); that it is not empty when all are right."""
    assert interval([1] * right + [0] * wrong) == pytest.approx(bounds, abs=1e-3)


def test_intervals_stay_in_their_bounds():
    """Guards "-0.000" in a table, by rounding of none or all right, and 1.02 of shares."""
    for n in range(1, 300):
        for shares in ([0] * n, [1] * n, [0.9] + [1.0] * n):
            low, high = interval(shares)
            assert 0 <= low <= high <= 1 and math.copysign(1, low) == 1


def test_interval_of_clusters():
    """Guards an interval that takes the samples of a question for independent: with four samples
    each, 20 questions give that of 20, not of 80, answers."""
    shares = [1.0, 0.25, 0.5, 0.75, 0.0] * 4
    half = 1.96 * np.std(shares, ddof=1) / math.sqrt(20)
    assert interval(shares) == pytest.approx((0.5 - half, 0.5 + half))
    assert interval([0.5]) == (0.5, 0.5)


def test_samples_of_a_question_count_as_one():
    """Guards accuracy, n and interval, of all and of a category: a question counts once, by the
    share of its samples that are right, however many there are."""
    question = Question("Which?", [], "A", "choice", ("red", "blue"), category="hard")
    samples = ("B", "red"), ("B", "A", "B", "(A)"), (None, None, None, "A"), (None, "")
    found = figures([rows_of(question, *answers) for answers in samples])
    shares = [0.5, 0.5, 0.25, 0]
    for part in (found, found["by"]["hard"]):
        assert (part["n"], part["accuracy"], part["ci95"]) == (4, 1.25 / 4, interval(shares))


# ------------------------------------------------------------------------------- scores, benchmarks

def scores(*results):
    """The figures of questions of these categories, right (1) or wrong (0): by category, and of
    benchmarks."""
    questions = [(Question("Is it?", [], "Yes", category=category), right)
                 for category, right in results]
    found = figures([rows_of(question, "Yes" if right else "No") for question, right in questions])
    return found["by"], found["benchmarks"]


def test_scores_by_category_and_by_its_parts():
    """Guards: ScreenSpot's table (platform by type) without its margins."""
    by, benchmarks = scores(("mobile | text", 1), ("mobile | icon", 0), ("web | text", 1), ("", 1))
    assert [by[name]["accuracy"] for name in ("mobile", "text", "mobile | icon")] == [0.5, 1, 0]
    assert len(by) == 7 and by["text"]["n"] == 2 and not benchmarks


def test_benchmarks():
    """Guards: BLINK pooled over questions, not averaged over sub-tasks; HR-Bench not averaged over
    its cycles."""
    _, blink = scores(("Relative_Depth", 1), ("Relative_Depth", 1), ("Counting", 0),
                      ("Spatial_Relation", 0))
    assert blink == {"BLINK, mean of sub-tasks": pytest.approx(1 / 3),
                     "BLINK, mean of the spatial three": 0.5}
    _, cycles = scores(("single | cycle 0", 1), ("cross | cycle 0", 0), ("single | cycle 1", 0))
    assert cycles == {"HR-Bench, mean of option cycles": 0.25}


def test_a_table():
    """Guards columns out of line, and cells that are numbers."""
    assert table([["", "n"], ["first", 7], ["b", 100]]) == "         n\nfirst    7\nb      100"


# ------------------------------------------------------------------------------ a whole evaluation

LIMITS = dict(turn_tokens=7, response_tokens=40, cache_tokens=2000)
SETTINGS = {"seed": 3, "temperature": 1.0}
QUESTIONS = open_file(str(ROOT / "tests/tiny/search-test.jsonl"))[:5]


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 2 questions: 5 questions make two full ones and a half."""
    monkeypatch.setattr(evaluation, "QUESTIONS_A_BLOCK", 2)


@pytest.fixture(scope="module")
def whole(tiny_folder, tmp_path_factory):
    """An evaluation in one go: its figures, its file."""
    path = tmp_path_factory.mktemp("whole") / "whole.jsonl"
    return run_with(load(tiny_folder, device="cpu"), path), path


def answers(path):
    """What a file of answers says of each question."""
    groups = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    return sorted(groups, key=lambda group: group[0]["key"])


def first_lines(path, n, copy):
    """Writes the first n lines of a file to another one. -> its path"""
    copy.write_text("".join(path.read_text().splitlines(keepends=True)[:n]))
    return copy


def run_with(policy, path=None, dialogue=None, seed=3, questions=QUESTIONS, keep=0, **more):
    """-> the figures, as JSON has them"""
    done = read_answers(path, SETTINGS) if path else ()
    found, kept = evaluate(policy, questions, dialogue or Dialogue(), seed, done=done, path=path,
                           keep=keep, **LIMITS | more)
    assert len(kept) == keep
    return json.loads(json.dumps(found))


@pytest.mark.slow
def test_answers_depend_on_seed_and_question_alone(policy, whole, small_blocks, tmp_path):
    """Guards the random numbers against what ran before, and against other rows: rows in another
    order, fewer of them, one that is there twice and counts twice, and a file of half of the
    answers. Every question is answered once."""
    expected = answers(whole[1])
    path = first_lines(whole[1], 3, tmp_path / "some.jsonl")
    found = run_with(policy, path, questions=[*QUESTIONS[::-1], QUESTIONS[0]])
    assert (found["n"], found["skipped"]) == (6, 0) and answers(path) == expected
    assert run_with(policy, path, questions=QUESTIONS[2:4])["n"] == 2
    run_with(policy, tmp_path / "other.jsonl", seed=4)
    assert answers(path) == expected != answers(tmp_path / "other.jsonl")


class Killed(BaseException):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("die_after, kept", [(1, 0), (5, 4)])
def test_going_on_after_a_kill_equals_an_uninterrupted_run(policy, whole, small_blocks, monkeypatch,
                                                           tmp_path, die_after, kept):
    """Guards --json: what was written is not asked again, half a line is dropped; the figures and
    the file are those of a run in one go."""
    path, made, lines = tmp_path / "broken.jsonl", [], []

    def counted(trace):
        made.append(trace)
        if len(made) == die_after:
            raise Killed
        return row_of(trace)
    monkeypatch.setattr(evaluation, "row_of", counted)
    with pytest.raises(Killed):
        run_with(policy, path)
    with path.open("a") as file:
        file.write('[{"key": "9", "tool": true, "id": "te')
    made[:] = [None] * die_after                         # nothing ends it any more
    assert run_with(policy, path, log=lines.append) == whole[0]
    assert len(made) == die_after + 5 - kept and answers(path) == answers(whole[1])
    assert (f"{kept} of 5 questions were answered before" in lines[0]) == (kept > 0)
    assert lines[-1].startswith("5/5 questions")


@pytest.mark.slow
def test_samples(policy, whole, small_blocks, tmp_path):
    """Guards --samples: so many different traces a question, of which the first is that of one
    sample; all of a question's are on a line, so that a break leaves none without the others."""
    path = tmp_path / "three.jsonl"
    found, groups = run_with(policy, path, samples=3), answers(path)
    assert found["n"] == len(groups) == 5 and {len(group) for group in groups} == {3}
    assert [group[:1] for group in groups] == answers(whole[1])
    assert len({str(row["turns"]) for row in sum(groups, [])}) > 10
    first_lines(path, 4, path)
    assert run_with(policy, path, samples=3) == found and answers(path) == groups


@pytest.mark.slow
def test_traces_for_a_page(policy, whole, small_blocks):
    """Guards a page with other traces than those that the figures are about, also after a break."""
    texts = {row["key"]: row["turns"] for row, in answers(whole[1])}
    for done in ((), read_answers(whole[1], SETTINGS)):
        _, kept = evaluate(policy, QUESTIONS, Dialogue(), 3, done=done, keep=3, **LIMITS)
        found = [[turn.text for turn in trace.turns] for trace in kept]
        assert found == [texts[question.key] for question in QUESTIONS[:3]]


def test_a_bad_image_is_skipped_and_counted(policy, tmp_path, capsys):
    """Guards an evaluation of hours that one photograph ends; and a count over fewer questions than
    it says. A page has a trace to show, also when it goes on; then the photograph may be gone."""
    (tmp_path / "bad.png").write_bytes(b"no image")
    bad = Question("Which?", [tmp_path / "bad.png"], "red", key="bad", where="a.jsonl:8")
    path, lines = tmp_path / "found.jsonl", []
    for _ in range(2):
        found = run_with(policy, path, questions=[bad, *QUESTIONS[:2]], keep=1)
        assert (found["n"], found["skipped"]) == (2, 1)
    assert "a.jsonl:8" in capsys.readouterr().err
    run_with(policy, path, questions=QUESTIONS[:2], log=lines.append)
    assert lines == ["2 of 2 questions were answered before"]
    with pytest.raises(UserError, match="none of 1 questions"):
        run_with(policy, questions=[bad])


@pytest.mark.slow
@pytest.mark.parametrize("pixels, most", [(1, 2), (3 * 256**2, 4)])
def test_images_in_memory_are_bounded(policy, whole, monkeypatch, pixels, most):
    """Guards memory: 128 photographs of 100 MP are 38 GB. So many as the bound allows are loaded
    at a time, and two that are read beside each other; the answers are the same."""
    monkeypatch.setattr(evaluation, "PIXELS_IN_MEMORY", pixels)
    monkeypatch.setattr(evaluation, "READ_AT_ONCE", 2)
    loaded, at_a_time = set(), []

    class Watched(Question):
        def load(self):
            loaded.add(self.key)
            at_a_time.append(len(loaded))
            return super().load()

        def release(self):
            loaded.discard(self.key)
            super().release()
    assert run_with(policy, questions=[Watched(**vars(q)) for q in QUESTIONS]) == whole[0]
    assert max(at_a_time) == most and not loaded


def test_answers_of_another_command_are_refused(whole, tmp_path):
    """Guards against mixed figures, and against writing over a file that is something else."""
    path, header = tmp_path / "found.jsonl", json.dumps(SETTINGS) + "\n"
    shutil.copy(whole[1], path)
    before = path.read_text()
    with pytest.raises(UserError, match="temperature 1.0.*another --json"):
        read_answers(path, SETTINGS | {"temperature": 0.5})
    assert path.read_text() == before
    for text in ("no JSON\n", '{"problem": "Which?", "answer": "red"}\n', header + "[1]\n",
                 header + '[{"key": "a", "tool": true}]\n', header + "[" * 99_999 + "\n"):
        path.write_text(text)
        with pytest.raises(UserError, match="another --json"):
            read_answers(path, SETTINGS)
        assert path.read_text() == text
    with pytest.raises(UserError, match="another --json"):
        read_answers(path / "inside" / "a.jsonl", SETTINGS)


def test_answers_that_cannot_be_written(tmp_path):
    """Guards against a traceback where the disk is full or a name is taken."""
    (tmp_path / "a.jsonl.part").mkdir()
    (tmp_path / "a.jsonl").write_text(json.dumps(SETTINGS) + "\n")
    with pytest.raises(UserError, match=r"a\.jsonl cannot be written .*the same --json FILE"):
        read_answers(tmp_path / "a.jsonl", SETTINGS)
    with pytest.raises(UserError, match="cannot be written"):
        evaluation.open_lock(tmp_path, "--json")


def answer_all(model, path):
    evaluation.QUESTIONS_A_BLOCK = 2
    found = run_with(load(model, device="cpu"), path)
    print("printed by the first", flush=True)
    print(json.dumps([rank(), found]), file=sys.stderr, flush=True)


@pytest.mark.slow
def test_two_processes_equal_one(policy, whole, tiny_folder, tmp_path):
    """Guards torchrun: the same answers and the same figures on every process, printed once; and
    another number of processes can go on with the file."""
    path, lines = tmp_path / "two.jsonl", []
    (out, first), (silent, second) = in_processes(2, answer_all, tiny_folder, path)
    assert out.endswith("printed by the first\n") and "printed" not in silent
    found = [json.loads(text.splitlines()[-1]) for text in (first, second)]
    assert found == [[0, whole[0]], [1, whole[0]]] and answers(path) == answers(whole[1])
    assert run_with(policy, path, log=lines.append) == whole[0]
    assert lines == ["5 of 5 questions were answered before"]


# --------------------------------------------------------------------------------- the command line

TINY = ["--n", 2, "--turn-tokens", 8, "--response-tokens", 40]
TASK = ["--task", ROOT / "tests/tiny/search-test.jsonl"]


@pytest.mark.slow
def test_two_evaluations_with_one_file(tiny_folder, script, tmp_path):
    """Guards figures over twice as many answers as there are questions: while one evaluation
    writes, a second one ends in a line, and reads and changes nothing."""
    command = ["--model", tiny_folder, *TASK, *TINY, "--json", "a.json"]
    (tmp_path / "a.jsonl").write_text("half of what the first one wri")
    with (tmp_path / "a.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        _, err = script("evaluate", *command, code=2)
    assert "another run" in err and "another --json" in err and err.count("\n") == 1
    assert (tmp_path / "a.jsonl").read_text() == "half of what the first one wri"


@pytest.mark.slow
def test_another_checkpoint_under_the_same_name(tiny_folder, script, tmp_path):
    """Guards figures over answers of two checkpoints: one whose weights were trained further lies
    where the first one was; the same one, copied anew, may go on, and with more questions."""
    shutil.copytree(tiny_folder, tmp_path / "model")
    command = ["--model", "model", *TASK, *TINY, "--no-tool", "--json", "a.json"]
    script("evaluate", *command)
    weights = tmp_path / "model/model.safetensors"
    os.utime(weights, (0, 0))
    out, _ = script("evaluate", *command, "--n", 3)
    assert " of 3 questions were answered before" in out and "3/3 questions" in out
    changed = bytearray(weights.read_bytes())
    changed[len(changed) // 2] ^= 1                          # one bit, size and time as before
    weights.write_bytes(changed)
    os.utime(weights, (0, 0))
    _, err = script("evaluate", *command, code=2)
    assert "sha1_of_model" in err and "another --json" in err and err.count("\n") == 1


@pytest.mark.parametrize("flags, expected", [
    ([], [1, 0.5, 0.99, 0, 1]), (["--mode", "direct", "--samples", 2], [2, 0.5, 1, 0, 1]),
    (["--top-k", 3, "--repetition-penalty", 1.05], [1, 0.5, 0.99, 3, 1.05])])
def test_sampling_of_an_evaluation(tiny_folder, script, monkeypatch, flags, expected):
    """Guards what the engine has to get: the authors' settings, or those of the flags."""
    def asked(policy, questions, dialogue, samples, seeds, **sampling):
        names = "temperature", "top_p", "top_k", "repetition_penalty"
        assert [samples, *(sampling[name] for name in names)] == expected
        raise UserError("enough")
    monkeypatch.setattr(evaluation, "rollout", asked)
    _, err = script("evaluate", "--model", tiny_folder, *TASK, *flags, code=2)
    assert err == "error: enough\n"


@pytest.mark.parametrize("name, flag, value, message", [
    ("evaluate", "--repetition-penalty", 0, "--repetition"), ("train_rl", "--top-k", 3, "unrecog")])
def test_training_samples_from_the_whole_distribution(script, name, flag, value, message):
    """Guards flags that an evaluation alone has, and their bounds: all that is sampled in training
    is trained."""
    _, err = script(name, flag, value, code=2)
    assert message in err


@pytest.mark.parametrize("flags, message", [
    (["--json", "a.jsonl"], "ends in .json"), (["--save", "a.gif"], "or .html"),
    (["--save", "my.png/a.html"], "written to"), (["--json", "folder.json"], "written to")])
def test_what_is_written_at_the_end_is_checked_at_the_beginning(tiny_folder, script, tmp_path,
                                                                flags, message):
    """Guards hours of evaluation whose figures have no place to go to."""
    Image.new("RGB", (9, 9)).save(tmp_path / "my.png")
    (tmp_path / "folder.json").mkdir()
    out, err = script("evaluate", "--model", tiny_folder, *TASK, *flags, code=2)
    assert message in err and len(err.splitlines()) == 1 and not out
    assert not list(tmp_path.glob("*.part"))
