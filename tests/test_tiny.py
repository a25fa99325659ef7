"""The drawn questions are honest: what can be known from what, and how well a player does who knows
all, or not. And the shipped base knows what it has to, without being trained here."""
import json
import random
from collections import Counter, defaultdict
from dataclasses import replace

import make_base
import make_data
import numpy as np
import pytest
from conftest import BASE
from make_data import ANSWERS, DIRECTIONS, PATTERNS, SIDE, SIZES, TASKS, WEB_SIZES, ask, write

from model import load
from rollout import Dialogue, crop_box, in_box, read_image

TINY = BASE.parent


@pytest.fixture(scope="module")
def base():
    return load(str(BASE))


def questions(task, n):
    return [ask(task, "test", 0, i) for i in range(n)]


# ---------------------------------------------------------------------------------------- the files

@pytest.mark.parametrize("task, sizes", [("search", SIZES), ("web", WEB_SIZES)])
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_shipped_files_are_what_make_data_writes(task, sizes, split):
    """Guards that the data can be made again: rows as drawn, images the same to the pixel."""
    lines = (TINY / f"{task}-{split}.jsonl").read_text().splitlines()
    assert len(lines) == sizes[split]
    for number in range(0, len(lines), 40):
        row = json.loads(lines[number])
        asked = ask(task, split, 0, number)
        shown, = map(read_image, row["images"])
        assert np.array_equal(shown, asked.draw()[0])
        expected = json.loads(json.dumps(asked.row(row["id"])))
        assert row == expected | {"images": row["images"]}


@pytest.mark.slow
@pytest.mark.parametrize("task", [*TASKS, "web"])
def test_the_same_seed_gives_the_same_bytes(task, tmp_path):
    """Guards repeatable runs and held-out questions: nothing but task, split, seed and number
    decides; an image stands for each "<image>"."""
    one, same = (write(task, "train", 3, 0, tmp_path / name).read_bytes() for name in "ab")
    other = write(task, "train", 3, 1, tmp_path / "c").read_bytes()
    test = write(task, "test", 3, 0, tmp_path / "d").read_bytes()
    assert one == same != other and test not in (one, other)
    for row in map(json.loads, one.splitlines()):
        assert row["problem"].count("<image>") == len(row["images"])
    train = {ask(task, "train", 0, i).scene for i in range(200)}
    shared = train & {one.scene for one in questions(task, 200)}
    # of a site's pages few differ
    assert all(scene.cards[0].size == make_data.POSTER for scene in shared)


# -------------------------------------------------------------------------------- what can be known

@pytest.mark.parametrize("task", TASKS)
def test_patterns_are_not_in_the_model_input(task, base):
    """Guards the honesty of each task: whatever the patterns, the model input is the same, bit by
    bit. Only a crop tells."""
    rng = random.Random(0)
    for asked in questions(task, 20):
        cards = tuple(replace(card, pattern=rng.choice(list(PATTERNS)))
                      for card in asked.scene.cards)
        other = replace(asked.scene, cards=cards)
        one, two = base.picture(asked.scene.draw()), base.picture(other.draw())
        assert one.image.tobytes() == two.image.tobytes()
        assert one.image.tobytes() == make_base.overview(other.draw()).tobytes()


def test_a_crop_shows_the_answer():
    """Guards the task from being impossible: the patterns differ in a crop."""
    crops = set()
    for pattern in PATTERNS:
        scene = make_data.Scene((make_data.Card("red", pattern, 96, 96),), "red")
        crops.add(scene.draw().crop(crop_box((SIDE, SIDE), (96, 96), 32)).tobytes())
    assert len(crops) == 7


def test_a_player_who_zooms_is_always_right():
    """Guards that crops and regions tell enough: who zooms into one region after the other, and
    knows of each crop the pattern that it shows, finds the answer."""
    for asked in questions("search", 100) + questions("gui", 100) + questions("sizes", 100):
        assert len(asked.regions) == len(asked.scene.candidates)
        found = []
        for region in asked.regions:
            left, top, right, bottom = region["box"]
            point = (left + right) / 2, (top + bottom) / 2
            shown = asked.scene.face_in(crop_box((SIDE, SIDE), point, 32))
            assert shown == region["name"]
            if shown != "plain":
                found.append((shown, tuple(region["box"])))
        (pattern, box), = found
        assert asked.answer in (pattern, box)


# ------------------------------------------------------------------------------------- task by task

def test_search():
    """Guards the promise: 4 to 6 cards apart from each other, 1 to 3 candidates, exactly one of
    them with a pattern, and each pattern as often as others."""
    counts = Counter()
    for asked in questions("search", 600):
        cards = asked.scene.cards
        patterned, = (card for card in asked.scene.candidates if card.pattern != "plain")
        assert patterned.pattern == asked.answer and asked.scene.colour in asked.text
        assert 4 <= len(cards) <= 6
        for i, card in enumerate(cards):
            assert min(card.box) >= 0 and max(card.box) <= SIDE
            gaps = [card.distance((other.x, other.y)) for other in cards[:i]]
            assert min(gaps, default=SIDE) >= make_data.CARD[0]
        counts.update([len(asked.scene.candidates), asked.answer])
    for pattern in ANSWERS:
        assert counts[pattern] / 600 == pytest.approx(1 / 6, abs=0.06)
    assert counts[1] < counts[2] < counts[3]


def test_spatial_is_balanced():
    """Guards the chance level: each direction in a quarter of the questions of either kind; and who
    knows but the place of the first card is right in two of three."""
    counts = Counter()
    by_cell = defaultdict(Counter)
    for asked in questions("spatial", 2000):
        counts[asked.category, asked.answer] += 1
        across = asked.answer in ("left", "right")
        by_cell[asked.scene.named[0].cell[across], across][asked.answer] += 1
    for category in ("relation", "moved"):
        n = sum(counts[category, direction] for direction in DIRECTIONS)
        assert n > 900
        for direction in DIRECTIONS:
            assert counts[category, direction] / n == pytest.approx(0.25, abs=0.05)
    right = sum(max(cells.values()) for cells in by_cell.values())
    assert right / 2000 == pytest.approx(2 / 3, abs=0.04)


def test_spatial_is_true():
    """Guards the truth: the named cards are the only ones of their colours, and lie as the answer
    says; a card that moves is all that changes."""
    for asked in questions("spatial", 200):
        scene = asked.scene
        first, second = scene.named
        colours = [card.colour for card in scene.cards]
        assert len(set(colours)) == len(colours) and scene.colour in asked.text
        assert first.steps_from(second)[asked.answer] == 1
        if asked.category == "moved":
            before, after = map(np.asarray, asked.draw())
            changed = (before != after).any(-1)
            assert changed.any()
            for left, top, right, bottom in (first.box, second.box):
                changed[top:bottom, left:right] = False
            assert not changed.any()
        else:
            assert second.colour in asked.text and len(asked.draw()) == 1


def test_gui():
    """Guards the promise: buttons in windows and icons beside them, none over another; the target
    is named by its colour where it is alone, and else is the only one of its colour that bears a
    pattern; every category is frequent."""
    counts = Counter()
    for asked in questions("gui", 1000):
        scene = asked.scene
        target = scene.cards[0]
        counts[asked.category] += 1
        assert asked.answer == target.box
        assert [card for card in scene.candidates if card.pattern != "plain"] == [target]
        assert ("bears a pattern" in asked.text) == (len(scene.candidates) > 1)
        for number, card in enumerate(scene.cards):
            assert min(card.box) >= 0 and max(card.box) <= SIDE
            in_window = any(in_box((card.x, card.y), window) for window in scene.windows)
            assert (card.size != make_data.CARD) == in_window
            for other in scene.cards[:number]:
                across = abs(card.x - other.x) >= (card.size[0] + other.size[0]) / 2
                assert across or abs(card.y - other.y) >= (card.size[1] + other.size[1]) / 2
    assert set(counts) == {"icon | alone", "icon | alike", "button | alone", "button | alike"}
    assert min(counts.values()) > 100


def test_sizes():
    """Guards the study of small elements: those of the colour asked about have one of three sizes,
    every size and kind of question is frequent."""
    counts = Counter()
    for asked in questions("sizes", 1000):
        size, _ = asked.category.split(" | ")
        counts[asked.category] += 1
        assert asked.answer == asked.scene.cards[0].box
        assert {card.size for card in asked.scene.candidates} <= set(make_data.ELEMENTS[size])
    assert len(counts) == 6 and min(counts.values()) > 80


# ----------------------------------------------------------------------------------------- the base

@pytest.mark.slow
@pytest.mark.parametrize("name", ["base", "web-base"])
def test_the_base_passes_its_exam(name):
    """Guards that what is shipped is what make_base made: it names, finds, lists and compares on
    scenes that no lesson showed, by the marks that its notes promise."""
    notes = json.loads((TINY / name / "notes.json").read_text())
    marks = make_base.exam(load(str(TINY / name)), "held out", 128, web=name == "web-base")
    assert set(marks) == set(notes["exam"])
    for part, mark in marks.items():
        least = make_base.PASSES[part.split()[0]]
        assert notes["exam"][part] >= least, part
        assert mark >= least - SLACK[part.split()[0]], part


# What a mark may lose, that is measured on few scenes: about three standard errors.
SLACK = {"says": 0.02, "target": 0.02, "lists": 0.08, "relation": 0.14, "moved": 0.14,
         "compare": 0.2, "screen": 0.14, "marks": 0.05, "actions": 0.1,
         "steps": 0.2}


@pytest.mark.parametrize("name, answers", [
    ("base", [*ANSWERS, *DIRECTIONS]),
    ("web-base", ["click [2]", "scroll [down]", "go_back", "stop [dotted]"])])
def test_the_base_has_words_as_tokens(name, answers):
    """Guards that a forced beginning meets the tokens of the lessons, as in a real vocabulary:
    words have their blank in front, and so have actions and what is asked at a step."""
    base = load(str(TINY / name))
    assert json.loads((TINY / name / "dialogue.json").read_text()) == make_base.DIALOGUE
    for answer in answers:
        assert len(base.encode(f"<answer> {answer} </answer>")) == 3
    assert len(base.encode("Plain. That was not it. Card 2 at (")) == 5
    forced = base.encode(make_base.DIALOGUE["forced_answer"])
    whole = base.encode(make_base.DIALOGUE["forced_answer"] + " (24, 40) </answer>")
    assert whole[:len(forced)] == forced and len(whole) == len(forced) + 8
    goal = "Which pattern does the red card's page show?"
    step = Dialogue().web_text(goal, ["click [CARD] [red]"])
    assert (len(base.encode(step)) == 10) == (name == "web-base")


@pytest.mark.slow
def test_a_base_is_made_and_goes_on(tmp_path, monkeypatch):
    """Guards the script: from random weights, through tower, lessons and exam, to a checkpoint that
    loads, with an honest note of what it did not pass; and --base: lessons go on from there
    until an exam is passed, and words that are new become tokens behind the others."""
    make_base.make_base(str(tmp_path / "old"), steps=1, seed=0)
    monkeypatch.setattr(make_base, "PASSES", dict.fromkeys(make_base.PASSES, 0))
    make_base.make_base(str(tmp_path / "new"), steps=1, seed=0, base=str(tmp_path / "old"))
    notes, later = (json.loads((tmp_path / name / "notes.json").read_text())
                    for name in ("old", "new"))
    assert (notes["steps"], later["steps"]) == (4, 5) and max(notes["exam"].values()) < 0.9
    old, new = load(str(tmp_path / "old")), load(str(tmp_path / "new"))
    assert old.encode(" checked") == new.encode(" checked") == load(str(BASE)).encode(" checked")
    assert len(old.encode(" stop [dotted]")) > 1
    assert new.encode(" stop [dotted]") == [len(new.tokenizer) - 1] >= [len(old.tokenizer)]


@pytest.mark.parametrize("share", [0.1, 0.3, 0.9])
def test_lessons_without_dialogues(base, share):
    """Guards --no-dialogues: no lesson has a zoom call, or a point in a thought."""
    for number, kind in enumerate(make_base.lesson_mix(share, dialogues=False) * 2):
        lesson = kind(base, random.Random(number), share)
        text = base.decode(lesson.ids)
        assert "<tool_call>" not in text
        thoughts = [part.partition("</think>")[0] for part in text.split("<think>")[1:]]
        assert not any("(" in thought for thought in thoughts)
