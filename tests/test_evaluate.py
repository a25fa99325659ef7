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
from evaluate import (
    evaluate,
    figures,
    interval,
    open_file,
    read_answers,
    row_of,
    table,
)
from model import UserError, load, rank
from reward import official_rule, targets_hit, true_thoughts
from rollout import (
    Dialogue,
    Frame,
    Question,
    Trace,
    Turn,
    crop_box,
    draw_trace,
    format_call,
    open_lock,
    parse_turn,
)

# ---------------------------------------------------------------------------- figures from regions

NAMES = frozenset({"dotted", "plain", "rising", "dark red", "red"})
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


@pytest.mark.parametrize("thought, true", [
    ("Dotted.", True), ("It is dotted, as I thought", True), ("DOTTED", True),
    ("Dotted, really dotted.", True), ("Plain.", False), ("Dotted or rising.", False),
    ("Not plain but dotted.", False), ("Nothing.", False), ("", False), ("undotted", False)])
def test_a_thought_that_describes(thought, true):
    """Guards the measure against a thought that names all regions, or none, or a word in which one
    stands; where nothing is shown, no name is true."""
    assert thoughts(turn_of("Here (8, 8).", 8, 8), turn_of(thought)) == [true]
    named = thought not in ("Nothing.", "", "undotted")
    assert thoughts(turn_of("Here.", 8, 56), turn_of(thought)) == [not named]


def test_names_that_change_when_letters_are_folded():
    """Guards names in other scripts: a thought is compared without its capitals."""
    regions = [{"box": [12, 12, 52, 52], "name": "Straße"}]
    shown = trace_of(turn_of("", 8, 8), turn_of("The STRASSE."), regions=regions, names=["Straße"])
    assert true_thoughts(shown) == [True]


def test_names_within_names():
    """Guards "dark red", which also says "red"."""
    regions = [{"box": [12, 12, 52, 52], "name": "dark red"}]
    first = turn_of("", 8, 8)
    assert thoughts(first, turn_of("It is Dark Red."), regions=regions) == [True]
    assert thoughts(first, turn_of("It is red."), regions=regions) == [False]


def test_what_a_crop_shows():
    """Guards what thoughts are measured by: the most central region counts, of those of which 0.3
    is seen in x and in y."""
    near = [{"box": [24, 12, 64, 52], "name": "dotted"},
            {"box": [64, 12, 104, 52], "name": "plain"}]

    def shown(x, y, regions):
        names = [name for name in ("dotted", "plain")
                 if thoughts(turn_of("", x, y), turn_of(name), regions=regions) == [True]]
        return names[0] if names else None
    assert [shown(x, 8, near) for x in (15, 17)] == ["dotted", "plain"]
    assert [shown(x, 8, REGIONS) for x in (8, 17, 18, 19, 40)] == ["dotted"] * 3 + [None] + [
        "plain"]                                     # 16 px and 12 px are seen, and then less
    assert shown(8, 20, REGIONS) is None and shown(8, 18, REGIONS) == "dotted"


def test_which_thoughts_count():
    """Guards the share: each thought is about the crop before it; what follows words instead of a
    crop is none about a crop; without regions nothing is known."""
    first = turn_of("", 8, 8)
    assert thoughts(turn_of("Dotted.", 40, 8), turn_of("Plain. On.", 8, 40),
                    turn_of("None.", 8, 8), turn_of("None.")) == [True, True, False]
    assert thoughts(turn_of("", 900, 3), turn_of("Dotted.")) == thoughts(turn_of("Dotted.")) == []
    assert thoughts(first, turn_of("Dotted."), regions=[]) == []
    found = figures([[row_of(trace_of(first, turn_of("Dotted."), regions=REGIONS, names=NAMES))],
                     [row_of(trace_of(first, turn_of("Dotted.")))]])
    assert (found["true_thoughts"], found["on_target"]) == (1, 1)
    found = figures([[row_of(trace_of(first, turn_of("Dotted.")))]])
    assert found["true_thoughts"] is found["on_target"] is None


def test_targets():
    """Guards on_target: zoom calls in a region, or, without regions, in the box that is the answer,
    in px of the original; in one turn each point of the thought."""
    calls = turn_of("", 10, 10), turn_of("", 20, 20), turn_of("")
    assert targets_hit(trace_of(*calls, regions=REGIONS)) == [True, False]
    trace = trace_of(*calls, kind="point")
    trace.question.answer = (70, 70, 90, 90)
    assert targets_hit(trace) == [False, True]
    assert targets_hit(trace_of(*calls)) == []
    said = turn_of("One at (10, 10), one at (40, 8), (60, 60) is none.")
    assert targets_hit(trace_of(said, mode="grounded", regions=REGIONS)) == [True, True, False]


# ------------------------------------------------------------------------------ figures of a trace

def counts(trace):
    row = row_of(trace)
    return [row[name] for name in ("regions", "subgoals", "verifications", "backtracks")]


def test_behaviours_of_several_turns():
    """Guards the counts: a point and the zoom call at it are one region, so is a place some px
    away; a place that is returned to is a verification, a place that is named twice in a row is
    none; a point outside is no region."""
    trace = trace_of(turn_of("First the cup (10, 10).", 10, 10),
                     turn_of("Not here. The box (60, 40).", 60, 40),
                     turn_of("Let me check (12, 12).", 13, 12), turn_of("Wait, at (900, 3)."))
    assert counts(trace) == [2, 2, 2, 2]
    assert counts(trace_of(turn_of("Dotted, not checked."))) == [0, 0, 0, 0]
    assert counts(trace_of("no tags at all")) == [0, 0, 0, 0]


def test_behaviours_of_a_single_turn():
    """Guards the mode `grounded`, whose steps are all in one thought; the sentence that our tree
    search puts between a wrong and a right chain; words in which a phrase stands."""
    thought = ("I need to find the sign (10, 10). Next, the door (50, 20). That was not it. "
               "Actually the sign (11, 9) is red, I can confirm. The waiter stands nextdoor.")
    trace = trace_of(f"<think>{thought}</think>\n<answer>red</answer>", mode="grounded")
    assert counts(trace) == [2, 2, 2, 2]


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
    good = [turn_of("Card (8, 8).", 8, 8), turn_of("Dotted.")]
    twice = [turn_of("Card (40, 8).", 40, 8), turn_of("Plain.", 8, 8), turn_of("Dotted.")]
    groups = [[row_of(trace_of(*texts, regions=REGIONS, names=NAMES, category="hard"))]
              for texts in [good] * 4 + [twice] * 4]
    cut = trace_of("<think>So", ended="truncated", regions=REGIONS, names=NAMES)
    found = figures([*groups, [row_of(cut)] * 2])
    assert (found["n"], found["accuracy"], found["ci95"]) == (9, 8 / 9, interval([1] * 8 + [0]))
    assert (found["zoom_calls"], found["several_crops"], found["overlong"]) == (1.2, 0.4, 0.2)
    assert found["format"] == found["grounded"] == 0.8 and found["diversity"] == 0.08
    assert found["on_target"] == found["true_thoughts"] == 1
    assert found["reward"] == pytest.approx((4 + 4 * (0.6 + 0.4 * 1.2)) / 10)
    assert found["by"]["hard"]["n"] == 8


# --------------------------------------------------------------------------------- rules of scoring

def said(answer, question):
    """A trace that answers this, its model input of half the size."""
    frame = Frame((100, 50), (200, 100))
    return Trace(None, question=question, frames=[frame], turns=[Turn("", answer=answer)])


@pytest.mark.parametrize("truth, answer, right", [
    ("right", "right", True), ("right", "Right.", True), ("right", "left or right", True),
    ("right", "B. right", True), ("right", "B", False), ("right", "left", False),
    ("B", "B", True), ("B", "(B)", True), ("B", "B. right", True), ("B", "blue", True),
    ("B", "right", False), ("B", "Because", True), ("B", "", False), ("B", None, False),
    ("Yes", "yes, it is", True), ("no", "I do not know", True), ("dark green", "Dark-green!", True),
    ("3", "13", True), ("it's 3:45", "Its 345", True), ("left\nside", "left side", False)])
def test_official_rule_of_answers_in_words(truth, answer, right):
    """Guards comparisons with published figures: the public code asks whether the truth is a part
    of the answer, punctuation, blanks and capitals aside, and knows no options. Ours is
    stricter."""
    for kind in ("choice", "string"):
        question = Question("Where?", [], truth, kind, ("left", "right"))
        assert official_rule(said(answer, question), not right) == right


def test_official_rule_of_points_and_actions_is_ours():
    """Guards the same rule applied to answers that are no words: "(3, 4)" has "(0, 0, 9, 9)" not in
    it, and a page that says "stop" does no action."""
    for kind, truth in (("point", (0, 0, 9, 9)), ("action", "click [1]")):
        for correct in (True, False):
            trace = said("(3, 4)", Question("Where?", [], truth, kind))
            assert official_rule(trace, correct) == correct


def test_official_rule_of_robospatial():
    """Guards: "Yes, it is." wrong on RoboSpatial-Home, where a prefix counts; a list of points
    wrong there, where the first one counts; the polygon compared with px of the model input."""
    question = Question("Is it?", [], "Yes", category="RoboSpatial-Home, yes or no | configuration")
    for answer, right in ((" yes, it is.", True), ("no", False), ("Oh yes", False), (None, False)):
        assert official_rule(said(answer, question), not right) == right
    polygon = ((20, 30), (40, 30), (40, 50), (20, 50))
    question = Question("Where?", [], polygon, "point", category="RoboSpatial-Home, context")
    cases = {"[(15, 20), (90, 40)]": True, "(30, 40)": False, "[(90, 40), (15, 20)]": False,
             "left": False}
    for answer, right in cases.items():
        assert official_rule(said(answer, question), not right) == right


def rows_of(question, *answers):
    """The rows of some samples of a question."""
    traces = [said(answer, question) for answer in answers]
    for trace in traces:
        trace.ended = "answer" if trace.answer else "truncated"
    return [row_of(trace) for trace in traces]


def test_strict_and_official_stand_side_by_side():
    """Guards: one figure under the other's name. RoboSpatial-Home's own rule is that of its scores,
    and of no others."""
    for category, answer, truth, by in (("Counting", "red or blue", "red", 0),
                                        ("RoboSpatial-Home, yes or no", "Yes, it is", "Yes", 1)):
        found = figures([rows_of(Question("Is it?", [], truth, category=category), answer)])
        assert (found["accuracy"], found["official"]) == (0, 1)
        assert found["by"][category]["accuracy"] == by


# ------------------------------------------------------------------------------------------ samples

def test_wilson_interval():
    """Guards the interval of one sample a question, against values from the literature (Wilson
    1927; 8 of 10; 76 of 100); that it is not empty when all are right."""
    assert interval([1] * 8 + [0] * 2) == pytest.approx((0.4902, 0.9433), abs=1e-3)
    assert interval([True] * 76 + [False] * 24) == pytest.approx((0.668, 0.833), abs=1e-3)
    assert interval([]) == (0, 1)
    low, high = interval([1.0] * 10)
    assert 0.7 < low < 0.75 and high == pytest.approx(1)


def test_intervals_stay_in_their_bounds():
    """Guards "-0.000" in a table, by rounding of none or all right, and 1.02 of shares."""
    for n in range(1, 300):
        for shares in ([0] * n, [1] * n, [0.9] + [1.0] * n, [0.1] + [0.0] * n):
            low, high = interval(shares)
            assert 0 <= low <= high <= 1 and math.copysign(1, low) == 1


def test_interval_of_clusters():
    """Guards an interval that takes the samples of a question for independent: with four equal
    samples each, 20 questions give that of 20, not of 80, answers."""
    shares = [1.0, 0.25, 0.5, 0.75, 0.0] * 4
    mean, deviation = 0.5, np.std(shares, ddof=1)
    half = 1.96 * deviation / math.sqrt(20)
    assert interval(shares) == pytest.approx((mean - half, mean + half))
    assert interval([0.5]) == (0.5, 0.5)
    question = Question("Which?", [], "red", category="hard")
    same = [rows_of(question, *["red"] * 4), rows_of(question, *["blue"] * 4)] * 10
    found = figures(same)
    assert found["n"] == found["by"]["hard"]["n"] == 20
    assert found["ci95"] == found["by"]["hard"]["ci95"] == interval([1, 0] * 10)


def test_samples_of_a_question_count_as_one():
    """Guards accuracy and n: a question counts once, by the share of its samples that are right,
    however many there are."""
    question = Question("Which?\n(A) red (B) blue", [], "A", "choice", ("red", "blue"))
    cases = [(("B", "red", "(A)"), 2 / 3), (("B", "A"), 1 / 2), ((None, None, "A"), 1 / 3),
             ((None, ""), 0)]
    groups = [rows_of(question, *answers) for answers, _ in cases]
    for group, (_, accuracy) in zip(groups, cases, strict=True):
        assert figures([group])["accuracy"] == pytest.approx(accuracy)
    found = figures(groups)
    assert (found["n"], found["accuracy"]) == (4, pytest.approx(1.5 / 4))


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
    assert {name: (group["accuracy"], group["n"]) for name, group in by.items()} == {
        "mobile": (0.5, 2), "web": (1, 1), "text": (1, 2), "icon": (0, 1),
        "mobile | text": (1, 1), "mobile | icon": (0, 1), "web | text": (1, 1)}
    assert benchmarks == {}


def test_benchmarks():
    """Guards: BLINK pooled over questions, not averaged over sub-tasks; RoboSpatial's 228 averaged,
    not pooled."""
    _, blink = scores(*[("Relative_Depth", 1)] * 3, ("Spatial_Relation", 0), ("Counting", 0))
    assert blink == {"BLINK, mean of sub-tasks": pytest.approx(1 / 3),
                     "BLINK, mean of the spatial three": 0.5}
    _, cycles = scores(*((f"single | cycle {i}", i % 2) for i in range(4)), ("cross | cycle 0", 1))
    mean = (0.5 + 1 + 0 + 1) / 4
    assert cycles == {"HR-Bench, mean of option cycles": pytest.approx(mean)}
    robot = "RoboSpatial-Home, yes or no"
    by, benchmarks = scores(*[(f"{robot} | configuration", 1)] * 3,
                            (f"{robot} | compatibility", 0), ("RoboSpatial-Home, context", 0))
    assert by[robot] == {"accuracy": 0.75, "ci95": interval([1, 1, 1, 0]), "n": 4}
    assert by["compatibility"]["n"] == 1 and by["RoboSpatial-Home, context"]["n"] == 1
    assert benchmarks == {}


def test_a_table():
    """Guards columns out of line, and cells that are numbers."""
    assert table([["", "n"], ["first", 7], ["b", 100]]) == "         n\nfirst    7\nb      100"


# ------------------------------------------------------------------------------ a whole evaluation

LIMITS = dict(turn_tokens=7, response_tokens=40, cache_tokens=2000)
SETTINGS = {"seed": 3, "temperature": 1.0}
QUESTIONS = open_file(str(ROOT / "tests/tiny/search-test.jsonl"))[:10]


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 4 questions: 10 questions make two full ones and a half."""
    monkeypatch.setattr(evaluation, "QUESTIONS_A_BLOCK", 4)


def answers(path):
    """What a file of answers says of each question."""
    groups = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    return sorted(groups, key=lambda group: (not group[0]["tool"], group[0]["key"]))


def run_with(policy, path=None, dialogue=None, seed=3, questions=QUESTIONS, keep=0, **more):
    """-> the figures"""
    done = read_answers(path, SETTINGS) if path else ()
    found, kept = evaluate(policy, questions, dialogue or Dialogue(), seed, done=done, path=path,
                           keep=keep, **LIMITS | more)
    assert len(kept) == keep
    return found


@pytest.mark.slow
def test_every_question_is_answered_once(policy, small_blocks, tmp_path):
    """Guards the count; a row that is there twice counts twice, with the same answer."""
    path = tmp_path / "found.jsonl"
    found = run_with(policy, path, questions=[*QUESTIONS, QUESTIONS[0]])
    assert (found["n"], found["skipped"]) == (11, 0)
    assert [group[0]["key"] for group in answers(path)] == sorted(q.key for q in QUESTIONS)


@pytest.mark.slow
def test_answers_depend_on_seed_and_question_alone(policy, small_blocks, tmp_path):
    """Guards the random numbers against what ran before, and against other rows: rows in another
    order, or fewer of them, and a file of half of the answers."""
    run_with(policy, tmp_path / "all.jsonl")
    expected = answers(tmp_path / "all.jsonl")
    lines = (tmp_path / "all.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "some.jsonl").write_text("".join([lines[0], *lines[3:6]]))
    run_with(policy, tmp_path / "some.jsonl", questions=QUESTIONS[::-1])
    assert answers(tmp_path / "some.jsonl") == expected
    assert run_with(policy, tmp_path / "all.jsonl", questions=QUESTIONS[2:5])["n"] == 3
    assert answers(tmp_path / "all.jsonl") == expected
    run_with(policy, tmp_path / "other.jsonl", seed=4)
    assert answers(tmp_path / "other.jsonl") != expected
    assert len({str(group[0]["turns"]) for group in expected}) > 5


@pytest.mark.slow
@pytest.mark.parametrize("die_after", [2, 5, 9])
def test_going_on_after_a_kill_equals_an_uninterrupted_run(policy, small_blocks, monkeypatch,
                                                           tmp_path, die_after):
    """Guards --json: what was written is not asked again, half a line is dropped; the figures and
    the file are those of a run in one go."""
    whole, broken, made = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl", []

    class Killed(BaseException):
        pass

    def counted(trace):
        made.append(trace)
        if len(made) == die_after:
            raise Killed
        return row_of(trace)
    expected = run_with(policy, whole)
    monkeypatch.setattr(evaluation, "row_of", counted)
    with pytest.raises(Killed):
        run_with(policy, broken)
    with broken.open("a") as file:
        file.write('[{"key": "9", "tool": true, "id": "te')
    lines, kept = [], die_after // 4 * 4
    die_after = None
    made.clear()
    assert run_with(policy, broken, log=lines.append) == expected
    assert len(made) == 10 - kept and answers(broken) == answers(whole)
    assert (f"{kept} of 10 questions were answered before" in lines[0]) == (kept > 0)
    assert lines[-1].startswith("10/10 questions")
    lines.clear()
    assert run_with(policy, broken, log=lines.append) == expected
    assert lines == ["10 of 10 questions were answered before"]         # nothing is left to do


@pytest.mark.slow
def test_with_and_without_the_tool_in_one_file(policy, small_blocks, tmp_path):
    """Guards the two halves of an evaluation: the answers of one must not count as done for the
    other."""
    path = tmp_path / "found.jsonl"
    assert [run_with(policy, path, Dialogue(tool=tool))["n"] for tool in (True, False)] == [10, 10]
    groups = answers(path)
    assert [group[0]["tool"] for group in groups] == [True] * 10 + [False] * 10
    for row, in groups[10:]:
        assert row["ended"] in ("forced", "truncated") and not row["zoom_calls"]


@pytest.mark.slow
def test_samples(policy, small_blocks, tmp_path):
    """Guards --samples: so many different traces a question, of which the first is that of one
    sample; all of a question's are on a line, so that a break leaves none without the others."""
    one, three = tmp_path / "one.jsonl", tmp_path / "three.jsonl"
    run_with(policy, one)
    found = run_with(policy, three, samples=3)
    groups = answers(three)
    assert found["n"] == 10 and [len(group) for group in groups] == [3] * 10
    assert [group[0] for group in groups] == [group[0] for group in answers(one)]
    assert sum(len({str(row["turns"]) for row in group}) for group in groups) > 20
    three.write_text("".join(three.read_text().splitlines(keepends=True)[:5]))
    assert run_with(policy, three, samples=3) == found and answers(three) == groups


@pytest.mark.slow
def test_traces_for_a_page(policy, small_blocks, tmp_path):
    """Guards a page with other traces than those that the figures are about, also after a break."""
    path, shown = tmp_path / "found.jsonl", []
    for done in ((), read_answers(path, SETTINGS)):
        found, kept = evaluate(policy, QUESTIONS, Dialogue(), 3, done=done, path=path, keep=3,
                               **LIMITS)
        assert [trace.question for trace in kept] == QUESTIONS[:3] and found["n"] == 10
        shown.append([[turn.text for turn in trace.turns] for trace in kept])
    texts = {group[0]["key"]: group[0]["turns"] for group in answers(path)}
    assert shown[0] == shown[1] == [texts[question.key] for question in QUESTIONS[:3]]


def test_a_bad_image_is_skipped_and_counted(policy, small_blocks, tmp_path, capsys):
    """Guards an evaluation of hours that one photograph ends; and a count over fewer questions than
    it says."""
    (tmp_path / "bad.png").write_bytes(b"no image")
    bad = Question("Which?", [tmp_path / "bad.png"], "red", key="bad", where="a.jsonl:8")
    path, lines = tmp_path / "found.jsonl", []
    found = run_with(policy, path, questions=[*QUESTIONS[:7], bad])
    assert (found["n"], found["skipped"]) == (7, 1)
    assert "a.jsonl:8" in capsys.readouterr().err
    found = run_with(policy, path, questions=QUESTIONS[:7], log=lines.append)    # it is removed
    assert found["n"] == 7 and lines == ["7 of 7 questions were answered before"]
    with pytest.raises(UserError, match="none of 1 questions"):
        run_with(policy, questions=[bad])


@pytest.mark.slow
def test_a_page_after_a_break_does_not_need_the_first_question(policy, tmp_path):
    """Guards a resumed evaluation whose first image cannot be read: there is a trace to show."""
    (tmp_path / "bad.png").write_bytes(b"no image")
    bad = Question("Which?", [tmp_path / "bad.png"], "red", key="bad", where="a.jsonl:1")
    path = tmp_path / "found.jsonl"
    questions = [bad, *QUESTIONS[:2]]
    for _ in range(2):
        run_with(policy, path, questions=questions, keep=1)


@pytest.mark.slow
@pytest.mark.parametrize("pixels, most", [(1, 2), (5 * 256**2, 6), (2**28, 9)])
def test_images_in_memory_are_bounded(policy, monkeypatch, pixels, most):
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
    watched = [Watched(**vars(question)) for question in QUESTIONS[:9]]
    assert run_with(policy, questions=watched) == run_with(policy, questions=QUESTIONS[:9])
    assert max(at_a_time) == most and not loaded


@pytest.mark.slow
def test_answers_of_another_command_are_refused(policy, small_blocks, tmp_path):
    """Guards against mixed figures, and against writing over a file that is something else."""
    path = tmp_path / "found.jsonl"
    run_with(policy, path)
    before = path.read_text()
    cases = (({**SETTINGS, "temperature": 0.5}, "temperature 1.0"), ({"seed": 3}, ""),
             ({**SETTINGS, "samples": 2}, "samples None"))
    for settings, other in cases:
        with pytest.raises(UserError, match=f"{other}.*another --json"):
            read_answers(path, settings)
    assert path.read_text() == before
    foreign = ("no JSON\n", "[1]\n", '{"problem": "Which?", "answer": "red"}\n', "no end of line",
               "", json.dumps(SETTINGS) + "\n[1]\n", json.dumps(SETTINGS) + "\n[]\n",
               json.dumps(SETTINGS) + '\n[{"key": "a", "tool": true}]\n',
               before.replace('"category"', '"kind"'), before.replace('"key": "', '"key": ["'),
               json.dumps(SETTINGS) + "\n" + "[" * 99_999 + "\n")
    for text in foreign:
        path.write_text(text)
        with pytest.raises(UserError, match="another --json"):
            read_answers(path, SETTINGS)
        assert path.read_text() == text
    with pytest.raises(UserError, match="another --json"):
        read_answers(path / "inside" / "a.jsonl", SETTINGS)


def test_answers_that_cannot_be_written(tmp_path):
    """Guards against a traceback where the disk is full or a name is taken."""
    (tmp_path / "a.jsonl.part").mkdir()
    with pytest.raises(UserError, match=r"a\.jsonl cannot be written .*the same --json FILE"):
        (tmp_path / "a.jsonl").write_text(json.dumps(SETTINGS) + "\n")
        read_answers(tmp_path / "a.jsonl", SETTINGS)
    with pytest.raises(UserError, match="cannot be written"):
        open_lock(tmp_path, "--json")


def answer_all(model, path):
    evaluation.QUESTIONS_A_BLOCK = 4
    found = run_with(load(model, device="cpu"), path)
    print("printed by the first", flush=True)
    print(json.dumps({**found, "rank": rank()}), file=sys.stderr, flush=True)


@pytest.mark.slow
def test_two_processes_equal_one(policy, tiny_folder, small_blocks, tmp_path):
    """Guards torchrun: the same answers and the same figures on every process, printed once; and
    another number of processes can go on with the file."""
    expected = run_with(policy, tmp_path / "one.jsonl")
    path = tmp_path / "two.jsonl"
    (out, first), (silent, second) = in_processes(2, answer_all, tiny_folder, path)
    assert out.endswith("printed by the first\n") and silent.count("printed") == 0
    for number, text in enumerate((first, second)):
        found = json.loads(text.splitlines()[-1])
        assert found == {**json.loads(json.dumps(expected)), "rank": number}
    assert answers(path) == answers(tmp_path / "one.jsonl")
    lines = []
    assert run_with(policy, path, log=lines.append) == expected
    assert lines == ["10 of 10 questions were answered before"]


# --------------------------------------------------------------------------------- the command line

TINY = ["--n", 3, "--turn-tokens", 8, "--response-tokens", 40]
TASK = ["--task", ROOT / "tests/tiny/search-test.jsonl"]


@pytest.mark.slow
def test_evaluate_from_the_command_line(tiny_folder, script, tmp_path):
    """Guards the way from the flags to table, figures and page; a second call asks nothing again,
    other settings are refused, more questions are not."""
    command = ["--model", tiny_folder, *TASK, *TINY, "--json", "out/a.json"]
    out, _ = script("evaluate", *command, "--save", "out/a.html")
    found = json.loads((tmp_path / "out/a.json").read_text())
    assert found["n"] == 3 and "accuracy_no_tool" in found
    assert "temperature=0.5" in out and "top_p=0.99" in out and "3/3 questions" in out
    assert out.count("search-test ") == 1 and "<h1>" in (tmp_path / "out/a.html").read_text()
    out, _ = script("evaluate", *command, "--n", 5)
    assert "5/5 questions" in out and " of 5 questions were answered before" in out
    _, err = script("evaluate", *command, "--seed", 1, code=2)
    assert "has answers with seed 0" in err
    out, _ = script("evaluate", "--model", tiny_folder, *TASK, *TINY, "--no-tool", "--mode",
                    "direct", "--samples", 2)
    assert "3/3 questions" in out and "turn_tokens=8" in out and "top_p=1.0" in out


@pytest.mark.slow
def test_two_evaluations_with_one_file(tiny_folder, script, tmp_path):
    """Guards figures over twice as many answers as there are questions: while one evaluation
    writes, a second one ends in a line, and nothing of the first one's is lost."""
    command = ["--model", tiny_folder, *TASK, *TINY, "--no-tool", "--json", "a.json"]
    script("evaluate", *command)
    before = (tmp_path / "a.jsonl").read_text()
    with (tmp_path / "a.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        for more in ((), ("--n", 5), ("--seed", 1)):
            _, err = script("evaluate", *command, *more, code=2)
            assert "another run" in err and "another --json" in err and err.count("\n") == 1
    assert (tmp_path / "a.jsonl").read_text() == before
    out, _ = script("evaluate", *command)
    assert "3 of 3 questions were answered before" in out


@pytest.mark.slow
def test_another_checkpoint_under_the_same_name(tiny_folder, script, tmp_path):
    """Guards figures over answers of two checkpoints: one whose weights were trained further lies
    where the first one was; the same one, copied anew, may go on."""
    shutil.copytree(tiny_folder, tmp_path / "model")
    command = ["--model", "model", *TASK, *TINY, "--no-tool", "--json", "a.json"]
    script("evaluate", *command)
    shutil.rmtree(tmp_path / "model")
    shutil.copytree(tiny_folder, tmp_path / "model", copy_function=shutil.copyfile)
    out, _ = script("evaluate", *command)
    assert "3 of 3 questions were answered before" in out
    weights = tmp_path / "model/model.safetensors"
    times = weights.stat()
    for place in (-1, -1000, weights.stat().st_size // 2):
        changed = bytearray(weights.read_bytes())
        changed[place] ^= 1                                  # one bit, size and time as before
        weights.write_bytes(changed)
        os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
        _, err = script("evaluate", *command, code=2)
        assert "sha1_of_model" in err and "another --json" in err
        assert err.count("\n") == 1


@pytest.mark.slow
def test_sampling_of_an_evaluation(tiny_folder, script, monkeypatch):
    """Guards --top-k and --repetition-penalty, which the engine has to get; training has neither,
    for what is trained is the whole distribution."""
    seen = []

    def asked(policy, questions, dialogue, samples, seeds, **sampling):
        seen.append(sampling)
        raise UserError("enough")
    monkeypatch.setattr(evaluation, "rollout", asked)
    command = ["--model", tiny_folder, *TASK, *TINY]
    flags = ["--top-k", 3, "--repetition-penalty", 1.05]
    for more in ([], flags[:2], flags[2:], flags):
        script("evaluate", *command, *more, code=2)
    found = [(s.get("top_k", 0), s.get("repetition_penalty", 1)) for s in seen]
    assert found == [(0, 1), (3, 1), (0, 1.05), (3, 1.05)]
    for bad in (["--top-k", -1], ["--top-k", 1.5], ["--repetition-penalty", 0]):
        _, err = script("evaluate", *command, *bad, code=2)
        assert bad[0] in err
    for flag, value in (flags[:2], flags[2:]):
        _, err = script("train_rl", *command, flag, value, code=2)
        assert "unrecognized arguments" in err


@pytest.mark.slow
def test_a_question_of_ones_own(tiny_folder, script, tmp_path):
    """Guards --image: the trace is printed, drawn and shown; it is neither right nor wrong."""
    Image.new("RGB", (256, 256)).save(tmp_path / "my.png")
    command = ["--model", tiny_folder, "--image", "my.png", *TINY[2:]]
    for name in ("a.png", "a.jpg", "a.html"):
        out, _ = script("evaluate", *command, "--question", "Which?", "--save", name)
        assert "Which?" in out and "\n-> " in out
    assert Image.open(tmp_path / "a.png").format == "PNG"
    assert Image.open(tmp_path / "a.jpg").format == "JPEG"
    page = (tmp_path / "a.html").read_text()
    assert ": open</h4>" in page or ": truncated</h4>" in page
    _, err = script("evaluate", *command, code=2)
    assert "--image and --question go together" in err


@pytest.mark.parametrize("flags, message", [
    (["--json", "a.jsonl"], "ends in .json"), (["--save", "a.txt"], "or .html"),
    (["--save", "my.png/a.html"], "written to"), (["--save", "a.gif"], "ends in .png"),
    (["--save", "x" * 300 + ".png"], "written to"), (["--json", "folder.json"], "written to"),
    (["--save", "/proc/a.html"], "written to"),
    (["--samples", 0], "no whole number"), (["--n", "x"], "no whole number")])
def test_what_is_written_at_the_end_is_checked_at_the_beginning(tiny_folder, script, tmp_path,
                                                                flags, message):
    """Guards hours of evaluation whose figures have no place to go to."""
    Image.new("RGB", (9, 9)).save(tmp_path / "my.png")
    (tmp_path / "folder.json").mkdir()
    out, err = script("evaluate", "--model", tiny_folder, *TASK, *flags, code=2)
    assert message in err and len(err.splitlines()) == 1 and not out
    assert not list(tmp_path.glob("*.part"))


def test_a_picture_of_a_trace():
    """Guards --save: image, points and crops."""
    sheet = draw_trace(trace_of(turn_of("Card (8, 8).", 8, 8), turn_of("Dotted.")))
    assert sheet.width == 768 and sheet.height > 768
