"""The synthetic tasks are honest: what can be known from what, and how well players do that know
all, or not."""
import random
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest

from reward import score
from rollout import (
    ANSWERS,
    CARD,
    DIRECTIONS,
    PATTERNS,
    SIDE,
    TOYS,
    Card,
    Dialogue,
    Scene,
    ask_screen,
    ask_spatial,
    chance,
    crop_box,
    format_call,
    format_point,
    in_box,
    random_zoom_accuracy,
    search_scene,
    toy,
)
from train_sft import replay

# --------------------------------------------------------------------------------------- toy-search


def test_the_answer_is_not_in_what_the_policy_first_sees(policy):
    """Guards the honesty of toy-search: whatever the patterns, and whichever card bears one, the
    model input is the same, bit by bit."""
    rng = random.Random(0)
    for _ in range(30):
        scene = search_scene(rng)
        shuffled = [card.pattern for card in scene.cards]
        rng.shuffle(shuffled)
        others = [rng.choice(ANSWERS) for _ in scene.cards]
        for patterns in (["plain"] * len(scene.cards), shuffled, others):
            cards = tuple(Card(card.colour, pattern, card.x, card.y)
                          for card, pattern in zip(scene.cards, patterns, strict=True))
            one, other = policy.picture(scene.draw()), policy.picture(Scene(cards, "").draw())
            assert one.image.tobytes() == other.image.tobytes()


def test_a_crop_shows_the_answer():
    """Guards the task from being impossible: the patterns differ in a crop."""
    crops = set()
    for pattern in ("plain", *ANSWERS):
        scene = Scene((Card("red", pattern, 96, 96),), "red")
        crop = scene.draw().crop(crop_box((SIDE, SIDE), (96, 96), 32))
        crops.add(np.asarray(crop).tobytes())
    assert len(crops) == 7


def test_scenes():
    """Guards the task's promise: 4 to 6 cards apart from each other, 1 to 3 candidates, exactly one
    of them with a pattern."""
    counts = set()
    for index in range(300):
        question = toy("toy-search", "test", 0, index)
        scene = question.scene
        patterned, = (card for card in scene.candidates if card.pattern != "plain")
        assert patterned.pattern == question.answer and scene.colour in question.text
        assert 4 <= len(scene.cards) <= 6
        for i, card in enumerate(scene.cards):
            for middle in (card.x, card.y):
                assert CARD // 2 <= middle <= SIDE - CARD // 2
            assert all(card.distance((other.x, other.y)) >= CARD for other in scene.cards[:i])
        counts.add(len(scene.candidates))
    assert counts == {1, 2, 3}
    in_order = sorted(scene.candidates, key=lambda card: (card.y // 64, card.x // 64))
    assert scene.candidates == in_order


def test_scenes_stay_what_they_were():
    """Guards figures measured earlier: a seed gives the same drawing, to the pixel."""
    question = toy("toy-search", "test", 0, 0)
    image = np.asarray(question.load()[0]).astype(int)
    assert (question.text, question.answer) == SEED_0[:2]
    assert [(card.x, card.y) for card in question.scene.cards] == SEED_0[2]
    assert image.sum(axis=(0, 1)).tolist() == SEED_0[3]


SEED_0 = ("One cyan card bears a pattern. Which?", "dotted",
          [(44, 224), (212, 236), (108, 96), (32, 108), (160, 224)], [8187072, 7966112, 8411072])


def test_splits_do_not_overlap():
    """Guards held-out questions: no drawing of one split is in another."""
    drawings = {split: {toy("toy-search", split, 0, i).scene for i in range(500)}
                for split in ("train", "validation", "test")}
    assert not drawings["train"] & drawings["test"]
    assert not drawings["train"] & drawings["validation"]
    assert toy("toy-search", "test", 0, 3).scene == toy("toy-search", "test", 0, 3).scene
    assert toy("toy-search", "test", 0, 3).scene != toy("toy-search", "test", 1, 3).scene


def test_the_random_zoom_baseline():
    """Guards the yardstick: without a zoom call the chance of a guess, more with more of them, far
    from certain."""
    questions = [toy("toy-search", "test", 0, index) for index in range(400)]
    none, one, four = (random_zoom_accuracy(questions, Dialogue(), n) for n in (0, 1, 4))
    assert none == pytest.approx(1 / 6) and none < one < four < 0.6


# -------------------------------------------------------------------------------------- all of them

@pytest.mark.parametrize("task", TOYS)
def test_a_question_is_its_own(task):
    """Guards held-out questions and repeatable runs, for each task."""
    scenes = {split: {toy(task, split, 0, i).scene for i in range(200)}
              for split in ("train", "validation", "test")}
    assert not scenes["train"] & scenes["test"] and not scenes["train"] & scenes["validation"]
    again = [np.asarray(image) for _ in range(2) for image in toy(task, "test", 0, 3).load()]
    half = len(again) // 2
    assert all(map(np.array_equal, again[:half], again[half:]))
    assert toy(task, "test", 0, 3).scene != toy(task, "test", 1, 3).scene


@pytest.mark.parametrize("task", TOYS)
def test_patterns_are_not_in_the_model_input(task, policy):
    """Guards the honesty of each task: whatever the patterns, the model input is the same, bit by
    bit. Where elements are alike, only a crop tells which of them is asked for."""
    rng = random.Random(0)
    for index in range(20):
        scene = toy(task, "test", 0, index).scene
        cards = tuple(replace(card, pattern=rng.choice(list(PATTERNS))) for card in scene.cards)
        other = replace(scene, cards=cards)
        one, two = policy.picture(scene.draw()), policy.picture(other.draw())
        assert one.image.tobytes() == two.image.tobytes()


def truth_of(question):
    """What a player answers who knows the scene."""
    scene = question.scene
    if question.kind == "point":
        return format_point((scene.cards[0].x / 4, scene.cards[0].y / 4))
    first, second = scene.named
    return next(direction for direction in DIRECTIONS
                if direction in question.text and first.steps_from(second)[direction] == 1)


def play(policy, question, answer):
    """The Score of a trace of the mode `grounded` that points at what is asked about."""
    cards = question.scene.named or question.scene.cards[:1]
    points = " ".join(f"Card at {format_point((card.x / 4, card.y / 4))}." for card in cards)
    text = f"<think>{points}</think>\n<answer>{answer}</answer>"
    return score(replay(policy, Dialogue(mode="grounded"), question, [text]))


@pytest.mark.parametrize("task", ["toy-spatial", "toy-gui"])
def test_a_player_who_knows_the_scene_is_always_right(task, policy):
    """Guards the ceiling: 1.0, through the real dialogue, its coordinates and the real reward."""
    for index in range(60):
        question = toy(task, "test", 0, index)
        assert play(policy, question, truth_of(question)).total == 1.0


# -------------------------------------------------------------------------------------- toy-spatial

def spatial_questions(n=2000):
    return [ask_spatial(random.Random(i)) for i in range(n)]


def test_spatial_questions_are_balanced():
    """Guards the chance level: each direction in a quarter of the questions of either kind, so a
    player without the image, who knows which two are asked about, is right in half of them."""
    counts = Counter((question.category, question.answer) for question in spatial_questions())
    for category in ("relation", "moved"):
        n = sum(counts[category, direction] for direction in DIRECTIONS)
        assert n > 900
        for direction in DIRECTIONS:
            assert counts[category, direction] / n == pytest.approx(0.25, abs=0.05)
    assert {chance(question) for question in spatial_questions(20)} == {1 / 2}


def test_spatial_questions_are_plain():
    """Guards the truth: the named cards are the only ones of their colours, and they lie as the
    answer says, and do not overlap along it; a card that moves is the only one that does."""
    for question in spatial_questions(200):
        scene = question.scene
        colours = [card.colour for card in scene.cards]
        assert len(set(colours)) == len(colours) and scene.colour in question.text
        first, second = scene.named
        if question.category == "moved":
            assert len(question.images) == 2 and first.steps_from(second)[question.answer] == 1
            before, after = (np.asarray(image).astype(int) for image in question.load())
            changed = np.argwhere((before != after).any(-1))
            for y, x in changed:
                assert any(in_box((x, y), card.box) for card in (first, second))
            assert scene.card_at((first.x, first.y)) is None
        else:
            assert first.steps_from(second)[question.answer] == 1
            assert second.colour in question.text


def test_a_player_who_sees_one_card_alone(policy):
    """Guards how far a short cut leads: who knows but the place of the first card, and answers with
    the more frequent of the two directions there, is right in two of three questions."""
    by_cell = defaultdict(Counter)
    for question in spatial_questions():
        first = question.scene.named[0]
        across = question.answer in ("left", "right")
        by_cell[first.cell[across], across][question.answer] += 1
    right = sum(max(counts.values()) for counts in by_cell.values())
    assert right / 2000 == pytest.approx(2 / 3, abs=0.04)


def test_crops_do_not_help_on_relations():
    """Guards the baseline in the mode `zoom`: random crops tell nothing about directions."""
    questions = spatial_questions(50)
    assert {random_zoom_accuracy(questions, Dialogue(), n) for n in (0, 1, 4)} == {0.5}


# ------------------------------------------------------------------------------------------ toy-gui

def screens(n=1000):
    return [ask_screen(random.Random(i)) for i in range(n)]


def test_screens():
    """Guards the task's promise: buttons in windows and icons beside them, none over another; the
    target is named by its colour where it is alone, and else is the only one of its colour that
    bears a pattern; every category is frequent."""
    counts = Counter()
    for question in screens():
        scene = question.scene
        target = scene.cards[0]
        counts[question.category] += 1
        assert question.answer == target.box
        assert [card for card in scene.candidates if card.pattern != "plain"] == [target]
        assert ("bears a pattern" in question.text) == (len(scene.candidates) > 1)
        for number, card in enumerate(scene.cards):
            assert min(card.box) >= 0 and max(card.box) <= SIDE
            in_window = any(in_box((card.x, card.y), window) for window in scene.windows)
            assert (card.width != CARD) == in_window
            for other in scene.cards[:number]:
                across = abs(card.x - other.x) >= (card.width + other.width) / 2
                assert across or abs(card.y - other.y) >= (card.height + other.height) / 2
    assert set(counts) == {"icon | alone", "icon | alike", "button | alone", "button | alike"}
    assert min(counts.values()) > 100


def test_a_player_without_the_zoom_has_to_guess(policy):
    """Guards that a share of the elements needs the zoom: who knows the colours alone is right
    where an element is alone, and else in one case of as many as are alike."""
    questions = screens(400)
    guessed = sum(chance(question) for question in questions) / len(questions)
    assert guessed == pytest.approx((1 + 1 / 2 + 1 / 3) / 3, abs=0.03)
    rng = random.Random(0)
    right = 0
    for question in questions[:150]:
        card = rng.choice(question.scene.candidates)
        right += play(policy, question, format_point((card.x / 4, card.y / 4))).correct
    assert right / 150 == pytest.approx(guessed, abs=0.1)


def test_a_player_who_zooms_is_always_right(policy):
    """Guards that a crop shows what the overview hides: who zooms into one candidate after the
    other, knows of each crop what `face_in` says of it, and nothing else, is always right."""
    for question in screens(60):
        scene = question.scene
        turns = []
        for card in scene.candidates:
            point = card.x / 4, card.y / 4
            place = format_point(point)
            turns.append(f"<think>Card at {place}.</think>\n{format_call(point)}")
            face = scene.face_in(crop_box((SIDE, SIDE), (card.x, card.y), 32))
            if face != "plain":
                break
        turns.append(f"<think>{face.capitalize()}.</think>\n<answer>{place}</answer>")
        scored = score(replay(policy, Dialogue(), question, turns))
        assert scored.correct == scored.format == scored.grounded == 1
