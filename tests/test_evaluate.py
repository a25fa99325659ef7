"""The figures of an evaluation are what they say."""
import json
import math
import sys

import numpy as np
import pytest
from conftest import in_processes

import evaluate as evaluation
from evaluate import (
    behaviours,
    evaluate,
    interval,
    official_rule,
    questions_of,
    read_records,
    record_of,
    report,
    summarise,
    table,
    targets_hit,
    true_thoughts,
)
from model import UserError, load, rank
from rollout import (
    ANSWERS,
    SIDE,
    Card,
    Config,
    Dialogue,
    Frame,
    Question,
    Scene,
    Trace,
    Turn,
    crop_box,
    draw_trace,
    format_call,
    format_point,
    parse_turn,
    toy,
)
from train_sft import replay

# ------------------------------------------------------------------------------- what a scene knows

# One red card with a pattern, a plain one, and a blue one, in the middle of three cells.
SCENE = Scene((Card("red", "dotted", 32, 32), Card("red", "plain", 160, 32),
               Card("blue", "rising", 32, 160)), "red")


def face(scene, x, y):
    return scene.face_in(crop_box((SIDE, SIDE), (x, y), 32))


def test_what_a_crop_shows():
    """Guards what thoughts are measured by: the most central candidate counts, a card of another
    colour is nothing, and so is one of which too little is seen to read it."""
    assert face(SCENE, 32, 32) == face(SCENE, 70, 32) == "dotted"
    assert face(SCENE, 160, 40) == "plain"
    assert face(SCENE, 32, 160) == face(SCENE, 230, 230) == face(SCENE, 90, 32) == "nothing"
    near = Scene((Card("red", "dotted", 44, 32), Card("red", "checked", 84, 32)), "red")
    assert [face(near, x, 32) for x in (60, 68)] == ["dotted", "checked"]
    on_a_candidate = [SCENE.contains(point) for point in ((32, 52), (32, 53), (32, 160))]
    assert on_a_candidate == [True, False, False]
    cells = SCENE.cells()
    assert len(cells) == 16 and [cells[i] for i in (0, 2, 8)] == list(SCENE.cards)
    assert cells.count(None) == 13


@pytest.mark.parametrize("thought, true", [
    ("Dotted.", True), ("It is dotted, as I thought", True), ("DOTTED", True),
    ("Dotted, really dotted.", True), ("Plain.", False), ("Dotted or checked.", False),
    ("Not plain but dotted.", False), ("Nothing.", False), ("A card.", False), ("", False),
    ("undotted", False)])
def test_a_thought_that_describes(thought, true):
    """Guards the measure against a thought that names all patterns, or none, or a word in which one
    stands."""
    assert SCENE.describes(thought, (0, 0, 64, 64)) == true
    assert SCENE.describes("Nothing.", (0, 128, 64, 192))
    assert not SCENE.describes("Rising.", (0, 128, 64, 192))


# ------------------------------------------------------------------------------ figures of a trace

def ask_for(n, seed=0):
    return questions_of(Config(seed=seed), "test", n)


def turn_of(thought, *point):
    action = format_call(point) if point else "<answer>dotted</answer>"
    return f"<think>{thought}</think>\n{action}"


def solve(policy, question, wrong=False):
    turns = []
    for card in question.scene.candidates:
        x, y = card.x // 4, card.y // 4
        turns.append(turn_of(f"Card at ({x}, {y}).", x, y))
        if card.pattern != "plain":
            break
    said = question.answer
    if wrong:
        said = next(answer for answer in ANSWERS if answer != question.answer)
    turns.append(f"<think>So.</think>\n<answer>{said}</answer>")
    return replay(policy, Dialogue(), question, turns)


def test_the_figures_of_a_report(policy):
    """Guards the table: a player who zooms into the candidates in turn is right, on target, and
    zooms again where it must."""
    questions = ask_for(12)
    traces = [solve(policy, question, wrong=i % 4 == 0) for i, question in enumerate(questions)]
    figures = report([[record_of(i, trace)] for i, trace in enumerate(traces)])
    calls = [1 + [card.pattern == "plain" for card in question.scene.candidates].index(False)
             for question in questions]
    assert (figures.n, figures.accuracy, figures.majority) == (12, 0.75, 0.75)
    assert figures.format == 1 and figures.on_target == 1
    assert figures.true_thoughts == 0 and figures.overlong == 0       # it says "So." of what it saw
    assert figures.crops == pytest.approx(sum(calls) / 12)
    assert figures.several_crops == pytest.approx(sum(n > 1 for n in calls) / 12)
    assert sum(group["n"] for group in figures.by.values()) == 12
    assert figures.ci95 == interval([1.0] * 9 + [0.0] * 3)


def test_true_thoughts(policy):
    """Guards the share of true thoughts: each is about the crop before it; what was written for the
    policy, and what follows words instead of a crop, is not its thought about a crop; without a
    scene nothing is known."""
    question = Question("One red card bears a pattern. Which?", [SCENE.draw], "dotted", scene=SCENE)

    def thoughts(*turns, **how):
        return true_thoughts(replay(policy, Dialogue(**how), question, turns))
    dotted, plain, nothing = (8, 8), (40, 8), (8, 40)
    first = turn_of("Card 1 at (8, 8).", *dotted)
    assert thoughts(first, turn_of("Dotted.")) == [True]
    assert thoughts(first, turn_of("Checked.")) == [False]
    assert thoughts(first, turn_of("Dotted. Plain.")) == [False]
    assert thoughts(turn_of("Dotted.", *plain), turn_of("Plain. On.", *nothing),
                    turn_of("Nothing.", *dotted), turn_of("Nothing.")) == [True, True, False]
    assert thoughts(first, turn_of("Dotted.", *plain), "dotted</answer>", max_crops=1) == [True]
    assert thoughts(turn_of("", 900, 3), turn_of("Nothing.")) == thoughts(turn_of("Dotted.")) == []
    trace = replay(policy, Dialogue(), question, (first, turn_of("Dotted."), turn_of("")))
    record = record_of(0, trace)
    assert record.thoughts == [True] and report([[record]]).true_thoughts == 1
    trace.turns[1].forced = True
    assert true_thoughts(trace) == []
    question.scene = None
    assert true_thoughts(trace) == [] and report([[record_of(0, trace)]]).true_thoughts is None


def test_targets(policy):
    """Guards on_target: zoom calls at the box of an element, in px of the original; nothing is
    known of a question in words."""
    size, box = (SIDE, SIDE), (20, 20, 60, 60)
    question = Question("Which?", [SCENE.draw], box, "point")
    turns = [turn_of("", 10, 10), turn_of("", 20, 20), turn_of("")]
    trace = replay(policy, Dialogue(), question, turns)
    assert trace.frames[0] == Frame((64, 64), size) and targets_hit(trace) == [True, False]
    question.kind, question.answer = "string", "red"
    assert targets_hit(trace) == [] and report([[record_of(0, trace)]]).on_target is None


def test_points_of_a_single_turn_are_targets(policy):
    """Guards on_target in the mode `grounded`: each point of the thought, on a card that is asked
    about or not; a card that moved may be pointed at in both places."""
    question = toy("toy-spatial", "test", 0, 1)
    new, old = question.scene.named
    assert question.scene.cards[0] is old and new != old
    other = question.scene.cards[1]
    places = [format_point((card.x / 4, card.y / 4)) for card in (old, new, other)]
    text = f"<think>{' '.join(f'Card at {place}.' for place in places)}</think>\n<answer>x</answer>"
    trace = replay(policy, Dialogue("grounded"), question, [text])
    assert targets_hit(trace) == [True, True, False]


def test_true_comparisons(policy):
    """Guards the share of true thoughts on relations: every direction that a thought names is one
    in which the first card lies; a thought that names none does not count."""
    question = toy("toy-spatial", "test", 0, 0)
    true = question.scene.directions()
    false = next(word for word in ("left", "right") if word not in true)

    def thoughts(words):
        text = f"<think>Card 1. {words}</think>\n<answer>{question.answer}</answer>"
        return true_thoughts(replay(policy, Dialogue("think"), question, [text]))
    assert question.answer in true
    assert thoughts(" ".join(true)) == thoughts(true[0]) == [True]
    assert thoughts(f"{false} {true[0]}") == [False] and thoughts("") == []


def written(*texts, mode="zoom"):
    """A trace of turns in which the policy wrote these texts, its image 100x50 px as model
    input."""
    question = Question("Which?", [], "red")
    turns = [parse_turn(text) for text in texts]
    frame = Frame((100, 50), (200, 100))
    return Trace(None, question=question, mode=mode, frames=[frame], turns=turns)


def test_behaviours_of_several_turns():
    """Guards the counts: a point and the zoom call at it are one region, so is a place some px
    away; a place that is returned to is a verification, a place that is named twice in a row is
    none; a point outside is no region."""
    trace = written(turn_of("First the cup (10, 10).", 10, 10),
                    turn_of("Not here. The box (80, 40).", 80, 40),
                    turn_of("Let me check (12, 12).", 13, 12), turn_of("Wait, it is at (900, 3)."))
    assert behaviours(trace) == {"regions": 2, "subgoals": 2, "verifications": 2, "backtracks": 2}
    assert behaviours(written(turn_of("Dotted, not checked."))) == {
        "regions": 0, "subgoals": 0, "verifications": 0, "backtracks": 0}
    assert behaviours(written()) == behaviours(written("no tags at all"))


def test_behaviours_of_a_single_turn():
    """Guards the mode `grounded`, whose steps are all in one thought; the sentence that our tree
    search puts between a wrong and a right chain; words in which a phrase stands."""
    thought = ("I need to find the sign (10, 10). Next, the door (50, 20). That was not it. "
               "Actually the sign (11, 9) is red, I can confirm. The waiter stands nextdoor.")
    trace = written(f"<think>{thought}</think>\n<answer>red</answer>", mode="grounded")
    assert behaviours(trace) == {"regions": 2, "subgoals": 2, "verifications": 2, "backtracks": 2}


def test_behaviours_are_in_the_report(policy):
    """Guards the report: means a trace, over all samples."""
    question = ask_for(1)[0]
    records = [record_of(0, replay(policy, Dialogue(), question, turns)) for turns in (
        [turn_of("First (3, 4).", 3, 4), turn_of("Not here (50, 50).", 50, 50), turn_of("")],
        [turn_of("")])]
    figures = report([records])
    assert (figures.regions, figures.subgoals) == (1, 0.5)
    assert (figures.verifications, figures.backtracks) == (0, 0.5)


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
    question = Question("Is it?", [], "Yes", category="compatibility")
    for answer, right in ((" yes, it is.", True), ("no", False), ("Oh yes", False), (None, False)):
        assert official_rule(said(answer, question), not right) == right
    polygon = ((20, 30), (40, 30), (40, 50), (20, 50))
    question = Question("Where?", [], polygon, "point", category="context")
    cases = {"[(15, 20), (90, 40)]": True, "(30, 40)": False, "[(90, 40), (15, 20)]": False,
             "left": False}
    for answer, right in cases.items():
        assert official_rule(said(answer, question), not right) == right


def records_of(question, *answers):
    """The Records of some samples of a question."""
    traces = [said(answer, question) for answer in answers]
    for trace in traces:
        trace.ended = "answer" if trace.answer else "truncated"
    return [record_of(0, trace) for trace in traces]


def test_strict_and_official_stand_side_by_side():
    """Guards: one figure under the other's name. RoboSpatial-Home's own rule is that of its scores,
    and of no others."""
    question = Question("Which?", [], "red", category="Counting")
    figures = report([records_of(question, "red or blue")])
    assert (figures.accuracy, figures.official) == (0, 1)
    assert figures.by["Counting"]["accuracy"] == 0
    question = Question("Is it?", [], "Yes", category="configuration")
    figures = report([records_of(question, "Yes, it is")])
    assert (figures.accuracy, figures.official) == (0, 1)
    assert figures.by["configuration"]["accuracy"] == 1


# ------------------------------------------------------------------------------------------ samples

def test_wilson_interval():
    """Guards the interval of one sample a question, against values from the literature (Wilson
    1927; 8 of 10; 76 of 100); that it stays in [0, 1], and is not empty when all are right."""
    assert interval([1] * 8 + [0] * 2) == pytest.approx((0.4902, 0.9433), abs=1e-3)
    assert interval([True] * 76 + [False] * 24) == pytest.approx((0.668, 0.833), abs=1e-3)
    assert interval([]) == (0, 1) and interval([0] * 50)[0] == pytest.approx(0)
    low, high = interval([1.0] * 10)
    assert 0.7 < low < 0.75 and high == pytest.approx(1)


def test_interval_of_clusters():
    """Guards an interval that takes the samples of a question for independent: with four equal
    samples each, 20 questions give that of 20, not of 80, answers."""
    shares = [1.0, 0.25, 0.5, 0.75, 0.0] * 4
    mean, deviation = 0.5, np.std(shares, ddof=1)
    half = 1.96 * deviation / math.sqrt(20)
    assert interval(shares) == pytest.approx((mean - half, mean + half))
    assert interval([0.9, 1.0, 1.0])[1] == 1 and interval([0.1, 0.0, 0.0])[0] == 0
    assert interval([0.5]) == (0.5, 0.5)
    question = Question("Which?", [], "red", category="hard")
    same = [records_of(question, *["red"] * 4), records_of(question, *["blue"] * 4)] * 10
    figures = report(same)
    assert figures.n == figures.by["hard"]["n"] == 20
    assert figures.ci95 == figures.by["hard"]["ci95"] == interval([1, 0] * 10)


def test_majority_vote():
    """Guards the vote: the same answer in other words counts together, the first of equals wins, a
    trace without an answer has no vote; the mean is over samples."""
    question = Question("Which?\n(A) red (B) blue", [], "A", "choice", ("red", "blue"))
    cases = [(("B", "red", "(A)"), 2 / 3, 1), (("B", "A"), 1 / 2, 0), (("A", "B"), 1 / 2, 1),
             ((None, None, "A"), 1 / 3, 1), ((None, ""), 0, 0), (("B", "B", "A"), 1 / 3, 0)]
    for answers, accuracy, majority in cases:
        figures = report([records_of(question, *answers)])
        assert (figures.n, figures.majority) == (1, majority), answers
        assert figures.accuracy == pytest.approx(accuracy)


# ------------------------------------------------------------------------------- scores, benchmarks

def test_scores_by_category_and_by_its_parts():
    """Guards: ScreenSpot's table (platform by type) without its margins."""
    rows = [("mobile | text", 1), ("mobile | icon", 0), ("web | text", 1), ("", 1)]
    by, benchmarks = summarise(rows)
    assert {name: (group["accuracy"], group["n"]) for name, group in by.items()} == {
        "mobile": (0.5, 2), "web": (1, 1), "text": (1, 2), "icon": (0, 1),
        "mobile | text": (1, 1), "mobile | icon": (0, 1), "web | text": (1, 1)}
    assert benchmarks == {}


def test_benchmarks():
    """Guards: BLINK pooled over questions, not averaged over sub-tasks; RoboSpatial's 228 averaged,
    not pooled."""
    _, blink = summarise([("Relative_Depth", 1)] * 3 + [("Spatial_Relation", 0), ("Counting", 0)])
    assert blink["BLINK, mean of sub-tasks"]["accuracy"] == pytest.approx(1 / 3)
    assert blink["BLINK, mean of the spatial three"] == {"accuracy": 0.5, "n": 4}
    cycles = [(f"single | cycle {i}", i % 2) for i in range(4)] + [("cross | cycle 0", 1)]
    _, cycles = summarise(cycles)
    mean = (0.5 + 1 + 0 + 1) / 4
    assert cycles["HR-Bench, mean of option cycles"]["accuracy"] == pytest.approx(mean)
    robot = [("configuration", 1)] * 3 + [("compatibility", 0), ("context", 0)]
    by, robot = summarise(robot)
    assert robot["RoboSpatial-Home, yes or no"] == {
        "accuracy": 0.75, "ci95": interval([1, 1, 1, 0]), "n": 4}
    assert by["context"] == {"accuracy": 0, "ci95": interval([0]), "n": 1}


def test_a_table():
    """Guards columns out of line, and cells that are numbers."""
    assert table([["", "n"], ["first", 7], ["b", 100]]) == "         n\nfirst    7\nb      100"


# ------------------------------------------------------------------------------ a whole evaluation

LIMITS = dict(turn_tokens=7, response_tokens=40, cache_tokens=2000)
SETTINGS = {"seed": 3, "temperature": 1.0}
QUESTIONS = 10


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 4 questions: 10 questions make two full ones and a half."""
    monkeypatch.setattr(evaluation, "QUESTIONS_A_BLOCK", 4)


def answers(path):
    """What a file of records says of each question, times aside."""
    groups = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    for record in sum(groups, []):
        del record["seconds"]
    return sorted(groups, key=lambda group: (not group[0]["tool"], group[0]["index"]))


def figures_of(report):
    return {name: value for name, value in vars(report).items() if name != "minutes"}


def run_with(policy, path=None, dialogue=None, seed=3, n=QUESTIONS, **more):
    answered = read_records(path, SETTINGS) if path else ()
    return evaluate(policy, ask_for(n), dialogue or Dialogue(), seed, answered=answered, path=path,
                    **LIMITS | more)


def test_every_question_is_answered_once(policy, tmp_path):
    """Guards the count, whatever the cache holds at a time."""
    path = tmp_path / "found.jsonl"
    assert run_with(policy, path, n=9, cache_tokens=300).n == 9
    assert [group[0]["index"] for group in answers(path)] == list(range(9))
    assert [group[0]["id"] for group in answers(path)] == [f"test-0-{i}" for i in range(9)]


def test_blocks_do_not_depend_on_each_other(policy, small_blocks, tmp_path):
    """Guards the random numbers: what is answered depends on the seed and the question's number,
    not on what ran before."""
    run_with(policy, tmp_path / "all.jsonl")
    lines = (tmp_path / "all.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "some.jsonl").write_text("".join([lines[0], *lines[3:6]]))
    run_with(policy, tmp_path / "some.jsonl")
    assert answers(tmp_path / "some.jsonl") == answers(tmp_path / "all.jsonl")
    run_with(policy, tmp_path / "other.jsonl", seed=4)
    assert answers(tmp_path / "other.jsonl") != answers(tmp_path / "all.jsonl")
    assert len({group[0]["text"] for group in answers(tmp_path / "all.jsonl")}) > 5


@pytest.mark.parametrize("die_after", [2, 5, 9])
def test_going_on_after_a_kill_equals_an_uninterrupted_run(policy, small_blocks, monkeypatch,
                                                           tmp_path, die_after):
    """Guards --json: what was written is not asked again, half a line is dropped; the figures and
    the file are those of a run in one go."""
    whole, broken, made = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl", []

    class Killed(BaseException):
        pass

    def counted(index, trace, tool):
        made.append(index)
        if len(made) == die_after:
            raise Killed
        return record_of(index, trace, tool)
    expected = run_with(policy, whole)
    monkeypatch.setattr(evaluation, "record_of", counted)
    with pytest.raises(Killed):
        run_with(policy, broken)
    with broken.open("a") as file:
        file.write('[{"index": 9, "tool": true, "id": "te')
    lines, kept = [], die_after // 4 * 4
    die_after = None
    made.clear()
    figures = run_with(policy, broken, log=lines.append)
    assert len(made) == QUESTIONS - kept
    assert (f"{kept} of 10 questions were answered before" in lines[0]) == (kept > 0)
    assert figures_of(figures) == figures_of(expected) and answers(broken) == answers(whole)
    assert lines[-1].startswith("10/10 questions")
    lines.clear()
    assert figures_of(run_with(policy, broken, log=lines.append)) == figures_of(expected)
    assert lines == ["10 of 10 questions were answered before"]         # nothing is left to do


def test_with_and_without_the_tool_in_one_file(policy, small_blocks, tmp_path):
    """Guards the two halves of an evaluation: the answers of one must not count as done for the
    other."""
    path = tmp_path / "found.jsonl"
    reports = [run_with(policy, path, Dialogue(tool=tool)) for tool in (True, False)]
    groups = answers(path)
    assert [report.n for report in reports] == [10, 10]
    assert [group[0]["tool"] for group in groups] == [True] * 10 + [False] * 10
    for record, in groups[10:]:
        assert record["ended"] in ("forced", "truncated") and not record["crops"]


def test_samples(policy, small_blocks, tmp_path):
    """Guards --samples: so many different traces a question, of which the first is that of one
    sample; all of a question's are on a line, so that a break leaves none without the others."""
    one, three = tmp_path / "one.jsonl", tmp_path / "three.jsonl"
    run_with(policy, one)
    report = run_with(policy, three, samples=3)
    groups = answers(three)
    assert report.n == 10 and [len(group) for group in groups] == [3] * 10
    assert [group[0] for group in groups] == [group[0] for group in answers(one)]
    assert sum(len({record["text"] for record in group}) for group in groups) > 20
    three.write_text("".join(three.read_text().splitlines(keepends=True)[:5]))
    assert figures_of(run_with(policy, three, samples=3)) == figures_of(report)
    assert answers(three) == groups


def test_answers_of_another_command_are_refused(policy, small_blocks, tmp_path):
    """Guards against mixed figures, and against writing over a file that is something else."""
    path = tmp_path / "found.jsonl"
    run_with(policy, path)
    before = path.read_text()
    cases = (({**SETTINGS, "temperature": 0.5}, "temperature 1.0"), ({"seed": 3}, ""),
             ({**SETTINGS, "samples": 2}, "samples None"))
    for settings, other in cases:
        with pytest.raises(UserError, match=f"{other}.*another --json"):
            read_records(path, settings)
    assert path.read_text() == before
    foreign = ("no JSON\n", "[1]\n", '{"problem": "Which?", "answer": "red"}\n', "no end of line",
               "", json.dumps(SETTINGS) + "\n[1]\n")
    for text in foreign:
        path.write_text(text)
        with pytest.raises(UserError, match="another --json"):
            read_records(path, SETTINGS)
        assert path.read_text() == text
    with pytest.raises(UserError, match="another --json"):
        read_records(path / "inside" / "a.jsonl", SETTINGS)


def answer_all(model, path):
    evaluation.QUESTIONS_A_BLOCK = 4
    report = run_with(load(model, device="cpu"), path)
    print("printed by the first", flush=True)
    figures = {**figures_of(report), "rank": rank()}
    print(json.dumps(figures), file=sys.stderr, flush=True)


def test_two_processes_equal_one(policy, tiny_folder, small_blocks, tmp_path):
    """Guards torchrun: the same answers and the same report on every process, printed once; and
    another number of processes can go on with the file."""
    expected = figures_of(run_with(policy, tmp_path / "one.jsonl"))
    path = tmp_path / "two.jsonl"
    (out, first), (silent, second) = in_processes(2, answer_all, tiny_folder, path)
    assert out == "printed by the first\n" and silent == ""
    for number, text in enumerate((first, second)):
        figures = json.loads(text.splitlines()[-1])
        assert figures == {**json.loads(json.dumps(expected)), "rank": number}
    assert answers(path) == answers(tmp_path / "one.jsonl")
    lines = []
    assert figures_of(run_with(policy, path, log=lines.append)) == expected
    assert lines == ["10 of 10 questions were answered before"]


def test_a_picture_of_a_trace(policy):
    """Guards --save: image, points and crops."""
    question = next(question for question in ask_for(50) if len(question.scene.candidates) == 3)
    sheet = draw_trace(solve(policy, question))
    assert sheet.width == 768 and sheet.height > 768
