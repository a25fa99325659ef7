"""The task toy-search is honest, and the figures are what they say."""
import random

import numpy as np
import pytest

from evaluate import (ANSWERS, CARD, SIDE, Card, DrawnQuestions, Scene, blind_accuracy, evaluate, interval, report,
                      search_scene, toy_search)
from rollout import Dialogue, call_text, draw_trace, window
from train_sft import replay
from reward import score


def test_the_answer_is_not_in_what_the_policy_first_sees(policy):
    """Guards the honesty of toy-search: whatever the patterns, and whichever card bears one, the overview is the same, bit by bit."""
    rng = random.Random(0)
    for _ in range(30):
        scene = search_scene(rng)
        shuffled = [c.pattern for c in scene.cards]
        rng.shuffle(shuffled)
        for patterns in (["plain"] * len(scene.cards), shuffled, [rng.choice(ANSWERS) for _ in scene.cards]):
            other = Scene(tuple(Card(c.colour, p, c.x, c.y) for c, p in zip(scene.cards, patterns)), scene.colour)
            assert (policy.picture(scene.draw()).pixel_values == policy.picture(other.draw()).pixel_values).all()


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
    found = report(traces, [score(t) for t in traces], 1.0)
    looks = [1 + [c.pattern == "plain" for c in q.scene.candidates].index(False) for q in questions]
    assert found.n == 12 and found.accuracy == 0.75 and found.format == 1 and found.on_target == 1
    assert found.crops == pytest.approx(sum(looks) / 12) and found.looks_again == pytest.approx(sum(l > 1 for l in looks) / 12)
    assert sum(row["n"] for row in found.by.values()) == 12


def test_evaluation_streams_every_question_once(policy):
    """Guards the count: each question is answered once, whatever the cache holds at a time."""
    questions = DrawnQuestions("toy-search", "test", 9)
    seen = []
    found = evaluate(policy, questions, Dialogue(), on_trace=lambda t, s: seen.append(t.question.id), turn_tokens=9,
                     response_tokens=60, cache_tokens=300)
    assert found.n == 9 and sorted(seen) == sorted(q.id for q in questions)


def test_a_picture_of_a_trace(policy):
    """Guards --save: image, looks and close-ups."""
    question = next(q for q in DrawnQuestions("toy-search", "test", 50) if len(q.scene.candidates) == 3)
    sheet = draw_trace(solve(policy, question))
    assert sheet.width == 768 and sheet.height > 768
