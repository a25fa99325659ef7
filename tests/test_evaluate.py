"""The task toy-search is honest, and the figures are what they say."""
import json
import random
import sys

import numpy as np
import pytest
import torch

import evaluate as evaluation
import model as models
from conftest import in_processes
from evaluate import (ANSWERS, CARD, SIDE, Card, DrawnQuestions, Records, Scene, blind_accuracy, evaluate, interval, record_of, report,
                      search_scene, toy_search, true_thoughts)
from model import UserError
from rollout import Dialogue, Question, call_text, draw_trace, rank, window
from train_sft import replay


def test_the_answer_is_not_in_what_the_policy_first_sees(policy):
    """Guards the honesty of toy-search: whatever the patterns, and whichever card bears one, the overview is the same, bit by bit."""
    rng = random.Random(0)
    for _ in range(30):
        scene = search_scene(rng)
        shuffled = [c.pattern for c in scene.cards]
        rng.shuffle(shuffled)
        for patterns in (["plain"] * len(scene.cards), shuffled, [rng.choice(ANSWERS) for _ in scene.cards]):
            other = Scene(tuple(Card(c.colour, p, c.x, c.y) for c, p in zip(scene.cards, patterns)), scene.colour)
            seen, same = (policy.picture(drawn.draw()).image for drawn in (scene, other))
            assert seen.tobytes() == same.tobytes()


def test_a_close_up_shows_the_answer():
    """Guards the task from being impossible: the patterns differ in a close-up."""
    looks = set()
    for pattern in ("plain", *ANSWERS):
        scene = Scene((Card("red", pattern, 96, 96),), "red")
        looks.add(np.asarray(scene.draw().crop(window((SIDE, SIDE), (96, 96), 32))).tobytes())
    assert len(looks) == 7


def test_scenes():
    """Guards the task's promise: 4 to 6 cards apart from each other, 1 to 3 candidates, exactly one of them with a pattern."""
    counts = []
    for index in range(300):
        question = toy_search("test", 0, index)
        scene = question.scene
        patterned = [c for c in scene.candidates if c.pattern != "plain"]
        assert len(patterned) == 1 and patterned[0].pattern == question.answer and scene.colour in question.text
        assert 4 <= len(scene.cards) <= 6
        for i, a in enumerate(scene.cards):
            assert CARD // 2 <= a.x <= SIDE - CARD // 2 and CARD // 2 <= a.y <= SIDE - CARD // 2
            assert all(max(abs(a.x - b.x), abs(a.y - b.y)) >= CARD for b in scene.cards[:i])
        counts.append(len(scene.candidates))
    assert set(counts) == {1, 2, 3}
    assert scene.candidates == sorted(scene.candidates, key=lambda c: (c.y // 64, c.x // 64))


def test_splits_do_not_overlap():
    """Guards held-out questions: no drawing of one split is in another."""
    drawings = {split: {toy_search(split, 0, i).scene for i in range(500)} for split in ("train", "validation", "test")}
    assert not drawings["train"] & drawings["test"] and not drawings["train"] & drawings["validation"]
    assert toy_search("test", 0, 3).scene == toy_search("test", 0, 3).scene != toy_search("test", 1, 3).scene
    questions = DrawnQuestions("toy-search", "test", 5)
    assert len(list(questions)) == len(questions) == 5


def test_the_blind_player():
    """Guards the yardstick: without a look the chance of a guess, more with more looks, far from certain."""
    questions = DrawnQuestions("toy-search", "test", 400)
    none, one, four = (blind_accuracy(questions, Dialogue(), looks) for looks in (0, 1, 4))
    assert none == pytest.approx(1 / 6) and none < one < four < 0.6


def test_wilson_interval():
    """Guards the interval, against values from the literature (Wilson 1927; 8 of 10)."""
    assert interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-3) and interval(0, 0) == (0, 1)
    assert interval(0, 50)[0] == pytest.approx(0) and interval(50, 50)[1] == pytest.approx(1)


def solve(policy, question, wrong=False):
    turns = []
    for number, card in enumerate(question.scene.candidates, 1):
        spot = card.x / 4, card.y / 4
        turns.append(f"<think>Card at ({spot[0]:.0f}, {spot[1]:.0f}).</think>\n{call_text(spot)}")
        if card.pattern != "plain":
            break
    said = next(a for a in ANSWERS if a != question.answer) if wrong else question.answer
    return replay(policy, Dialogue(), question, turns + [f"<think>So.</think>\n<answer>{said}</answer>"])


def test_the_figures_of_a_report(policy):
    """Guards the table: a player who looks at the candidates in turn is right, on target, and looks again where it must."""
    questions = [toy_search("test", 0, i) for i in range(12)]
    traces = [solve(policy, q, wrong=i % 4 == 0) for i, q in enumerate(questions)]
    found = report([record_of(i, t) for i, t in enumerate(traces)])
    looks = [1 + [c.pattern == "plain" for c in q.scene.candidates].index(False) for q in questions]
    assert found.n == 12 and found.accuracy == 0.75 and found.format == 1 and found.on_target == 1
    assert found.true_thoughts == 0 and found.overlong == 0       # it says "So." of what it saw
    assert found.crops == pytest.approx(sum(looks) / 12) and found.looks_again == pytest.approx(sum(l > 1 for l in looks) / 12)
    assert sum(row["n"] for row in found.by.values()) == 12


# One red card with a pattern, a plain one, and a blue one, in the middle of three cells.
SCENE = Scene((Card("red", "dotted", 32, 32), Card("red", "plain", 160, 32), Card("blue", "rising", 32, 160)), "red")


def test_what_a_window_shows():
    """Guards what thoughts are measured by: the most central candidate counts, a card of another colour is nothing, and so is
    one of which too little is seen to read it."""
    def face(x, y):
        return SCENE.face_in(window((SIDE, SIDE), (x, y), 32))
    assert face(32, 32) == face(70, 32) == "dotted" and face(160, 40) == "plain"
    assert face(32, 160) == face(230, 230) == face(90, 32) == "nothing"
    near = Scene((Card("red", "dotted", 44, 32), Card("red", "checked", 84, 32)), "red")
    assert [near.face_in(window((SIDE, SIDE), (x, 32), 32)) for x in (60, 68)] == ["dotted", "checked"]
    assert SCENE.contains((32, 52)) and not SCENE.contains((32, 53)) and not SCENE.contains((32, 160))
    cells = SCENE.cells()
    assert len(cells) == 16 and [cells[i] for i in (0, 2, 8)] == list(SCENE.cards) and sum(c is not None for c in cells) == 3


@pytest.mark.parametrize("thought, true", [
    ("Dotted.", True), ("It is dotted, as I thought", True), ("DOTTED", True), ("Dotted, really dotted.", True),
    ("Plain.", False), ("Dotted or checked.", False), ("Not plain but dotted.", False), ("Nothing.", False),
    ("A card.", False), ("", False), ("undotted", False)])
def test_a_thought_that_describes(thought, true):
    """Guards the measure against a thought that names all patterns, or none, or a word in which one stands."""
    assert SCENE.describes(thought, (0, 0, 64, 64)) == true
    assert SCENE.describes("Nothing.", (0, 128, 64, 192)) and not SCENE.describes("Rising.", (0, 128, 64, 192))


def test_true_thoughts(policy):
    """Guards the share of true thoughts: each is about the crop before it; what was written for the policy, and what follows
    words instead of a crop, is not its thought about a crop; without a scene nothing is known."""
    question = Question("One red card bears a pattern. Which?", [SCENE.draw], "dotted", scene=SCENE)
    def turn(thought, *point):
        return f"<think>{thought}</think>\n" + (call_text(point) if point else "<answer>dotted</answer>")
    def thoughts(*turns, **how):
        return true_thoughts(replay(policy, Dialogue(**how), question, turns))
    dotted, plain, nothing = (8, 8), (40, 8), (8, 40)
    first = turn("Card 1 at (8, 8).", *dotted)
    assert thoughts(first, turn("Dotted.")) == [True] and thoughts(first, turn("Checked.")) == [False]
    assert thoughts(first, turn("Dotted. Plain.")) == [False]
    assert thoughts(turn("Dotted.", *plain), turn("Plain. On.", *nothing), turn("Nothing.", *dotted), turn("Nothing.")) == [
        True, True, False]
    assert thoughts(first, turn("Dotted.", *plain), "dotted</answer>", max_crops=1) == [True]          # the last was forced
    assert thoughts(turn("", 900, 3), turn("Nothing.")) == [] and thoughts(turn("Dotted.")) == []
    trace = replay(policy, Dialogue(), question, (first, turn("Dotted."), turn("")))
    assert record_of(0, trace).thoughts == [True] and report([record_of(0, trace)]).true_thoughts == 1
    trace.turns[1].forced = True
    assert true_thoughts(trace) == []
    question.scene = None
    assert true_thoughts(trace) == [] and report([record_of(0, trace)]).true_thoughts is None


def test_evaluation_streams_every_question_once(policy):
    """Guards the count: each question is answered once, whatever the cache holds at a time."""
    questions = DrawnQuestions("toy-search", "test", 9)
    seen = []
    found = evaluate(policy, questions, Dialogue(), on_trace=lambda t, s: seen.append(t.question.id), turn_tokens=9,
                     response_tokens=60, cache_tokens=300)
    assert found.n == 9 and sorted(seen) == sorted(q.id for q in questions)


LIMITS = dict(turn_tokens=7, response_tokens=40, cache_tokens=2000)
SETTINGS = {"seed": 3, "temperature": 1.0}
QUESTIONS = 10


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 4 questions: 10 questions make two whole ones and a half."""
    monkeypatch.setattr(evaluation, "QUESTIONS_A_BLOCK", 4)


def answers(path):
    """What a file of records says of each question, times aside."""
    rows = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    return sorted(({k: v for k, v in row.items() if k != "seconds"} for row in rows), key=lambda r: (not r["tool"], r["index"]))


def figures(found):
    return {k: v for k, v in vars(found).items() if k != "minutes"}


def ask(policy, path, **more):
    questions = DrawnQuestions("toy-search", "test", QUESTIONS)
    records = path and Records(path, SETTINGS, QUESTIONS)
    return evaluate(policy, questions, Dialogue(), 3, records=records, **LIMITS, **more)


def test_blocks_do_not_depend_on_each_other(policy, small_blocks, tmp_path):
    """Guards the streams of random numbers: what a block answers depends on the seed and its number, not on what ran before."""
    questions = DrawnQuestions("toy-search", "test", QUESTIONS)
    def texts(seed, done=()):
        records, seen = Records(), {}
        records.found = list(done)
        evaluate(policy, questions, Dialogue(), seed, records=records, **LIMITS,
                 on_trace=lambda trace, record: seen.update({record.index: record.text}))
        return records.found, seen
    found, whole = texts(3)
    last = texts(3, [r for r in found if r.index < 8])[1]
    assert last == {i: whole[i] for i in (8, 9)} and len(set(whole.values())) > 5
    assert texts(4)[1] != whole


@pytest.mark.parametrize("die_after", [2, 5, 9])
def test_going_on_after_a_kill_equals_an_uninterrupted_run(policy, small_blocks, tmp_path, die_after):
    """Guards --json: whole blocks are kept, others run again; the figures and the file are those of a run in one go."""
    whole, broken, said = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl", []
    class Killed(BaseException):
        pass
    def die(trace, record):
        said.append(record)
        if len(said) == die_after:
            raise Killed
    expected = ask(policy, whole)
    with pytest.raises(Killed):
        ask(policy, broken, on_trace=die)
    with broken.open("a") as file:
        file.write(whole.read_text().splitlines()[-2] + "\n")     # a block that is not whole, and a line that is not
        file.write('{"index": 9, "tool": true, "id": "te')
    lines, again = [], []
    found = ask(policy, broken, log=lines.append, on_trace=lambda t, r: again.append(r.index))
    kept = die_after // 4 * 4
    assert len(again) == QUESTIONS - kept and (f"{kept} of 10 questions were answered before" in lines[0]) == (kept > 0)
    assert figures(found) == figures(expected) and answers(broken) == answers(whole)
    assert lines[-1].startswith("10/10 questions")
    lines.clear()
    assert figures(ask(policy, broken, log=lines.append)) == figures(expected) and len(lines) == 1     # nothing is left to do


def test_with_and_without_the_tool_in_one_file(policy, small_blocks, tmp_path):
    """Guards the two halves of an evaluation: the records of one must not count as done for the other."""
    path = tmp_path / "found.jsonl"
    records, questions = Records(path, SETTINGS, QUESTIONS), DrawnQuestions("toy-search", "test", QUESTIONS)
    both = [evaluate(policy, questions, Dialogue(tool=tool), records=records, **LIMITS) for tool in (True, False)]
    assert [found.n for found in both] == [10, 10] and [r["tool"] for r in answers(path)] == [True] * 10 + [False] * 10
    assert all(r["ended"] in ("forced", "length") and not r["crops"] for r in answers(path)[10:])


def test_records_of_another_command_are_refused(policy, small_blocks, tmp_path):
    """Guards against mixed figures, and against writing over a file that is something else."""
    path = tmp_path / "found.jsonl"
    ask(policy, path)
    before = path.read_text()
    with pytest.raises(UserError, match="temperature 1.0.*another --json"):
        Records(path, {**SETTINGS, "temperature": 0.5}, QUESTIONS)
    with pytest.raises(UserError, match="another --json"):
        Records(path, {"seed": 3}, QUESTIONS)
    assert path.read_text() == before
    for text in ("no JSON\n", "[1]\n", '{"problem": "Which?", "answer": "red"}\n'):
        path.write_text(text)
        with pytest.raises(UserError, match="another --json"):
            Records(path, SETTINGS, QUESTIONS)
        assert path.read_text() == text
    with pytest.raises(UserError, match="another --json"):
        Records(tmp_path / "found.jsonl" / "inside" / "a.jsonl", SETTINGS, QUESTIONS)


def answer_all(model, path):
    evaluation.QUESTIONS_A_BLOCK = 4
    found = ask(models.load(model, device="cpu"), path)
    print("printed by the first", flush=True)
    print(rank(), found.n, found.accuracy, found.crops, found.ci95, found.by, file=sys.stderr, flush=True)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without processes")
def test_two_processes_equal_one(policy, tiny_folder, small_blocks, tmp_path):
    """Guards torchrun: the same records and the same report on every process, printed once; and another number of processes can
    go on with the file."""
    expected = ask(policy, tmp_path / "one.jsonl")
    path = tmp_path / "two.jsonl"
    (out, told), (silent, told_too) = in_processes(2, answer_all, tiny_folder, path)
    assert out == "printed by the first\n" and silent == ""
    one, two = told.splitlines()[-1], told_too.splitlines()[-1]
    assert one == f"0 10 {expected.accuracy} {expected.crops} {expected.ci95} {expected.by}" and two == "1" + one[1:]
    assert answers(path) == answers(tmp_path / "one.jsonl")
    lines = []
    assert figures(ask(policy, path, log=lines.append)) == figures(expected) and "10 of 10" in lines[0]


def test_a_picture_of_a_trace(policy):
    """Guards --save: image, looks and close-ups."""
    question = next(q for q in DrawnQuestions("toy-search", "test", 50) if len(q.scene.candidates) == 3)
    sheet = draw_trace(solve(policy, question))
    assert sheet.width == 768 and sheet.height > 768
