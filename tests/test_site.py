"""The drawn site: its rows, its paths, and whole episodes that a player goes through."""
import random
from collections import Counter

import numpy as np
import pytest
from conftest import BASE
from drawn_site import MOST_STEPS, DrawnSite, RandomPlayer, play
from make_data import COLOURS, DIGITS, PATHS, STEPS, ask, site_of

from evaluate import WebAgent, open_file
from model import load
from reward import parse_action


class BestPlayer:
    """Knows the site."""

    def __init__(self, site):
        self.site = site

    def reset(self):
        pass

    def next_action(self, trajectory, intent, meta_data):
        return self.site.site.best(self.site.screen)


# --------------------------------------------------------------------------------------- the rows

@pytest.mark.parametrize("split", ["train", "test"])
def test_the_shipped_rows_are_web_actions(split):
    """Guards that every row is read, as a web action; and that who always does the same is right in
    a sixth of them."""
    file = open_file(BASE.parent / f"web-{split}.jsonl")
    assert not file.skipped and {question.kind for question in file} == {"action"}
    assert max(Counter(question.answer for question in file).values()) <= len(file) / 6


def test_a_row_reads_as_one_of_the_release():
    """Guards the layout: objective, previous actions that name elements, then the image."""
    asked = ask("web", "test", 0, len(STEPS) - 1)
    goal = asked.scene.colour
    assert asked.row("")["problem"] == (
        f"OBJECTIVE: Which pattern does the {goal} card's page show?\n\nPREVIOUS ACTIONS: \n"
        f"1. go_back\n2. scroll [down]\n3. click [CARD] [{goal}]\n\nIMAGE:\n<image>")
    first = ask("web", "test", 0, 0)
    assert first.row("")["problem"].endswith("show?\n\nPREVIOUS ACTIONS: None\n\nIMAGE:\n<image>")
    assert asked.answer == f"stop [{asked.scene.cards[0].pattern}]"
    assert str(parse_action(asked.answer)) == asked.answer


def test_the_number_has_to_be_read_off_the_image():
    """Guards against a rule that needs no image: an element's number is any of the digits, whatever
    its colour, and no other element of its screen has it."""
    numbers = Counter()
    for number in range(300):
        site = site_of("test", 0, number)
        for name in ("top", "bottom"):
            cards = site.screens[name].cards
            assert 2 <= len(cards) <= 4 and len({card.mark for card in cards}) == len(cards)
            numbers.update((card.colour, card.mark) for card in cards)
    assert len(numbers) == len(COLOURS) * len(DIGITS)
    assert min(numbers.values()) > 20


def test_each_path_is_a_shortest_one():
    """Guards the truth of the rows: the actions of a path reach the goal's page, and no fewer do,
    by trying all links from the screen where it begins."""
    for number in range(40):
        site = site_of("test", 0, number)
        path = site.path()
        assert len(path) == PATHS[number % len(PATHS)]
        assert path[-1].answer == f"stop [{site.pattern}]"
        reached = [site.start]
        for _ in path[:-1]:
            assert all(visited[-1] != site.goal for visited in reached)
            reached = [site.after(visited, action) for visited in reached
                       for action in possible_actions(site, visited[-1])]
        assert any(visited[-1] == site.goal for visited in reached)


def possible_actions(site, screen):
    clicks = [f"click [{card.mark}]" for card in site.screens[screen].cards if card.mark]
    return [*clicks, "scroll [down]", "scroll [up]", "go_back"]


# ------------------------------------------------------------------------------------ the episodes

def test_the_states_are_those_of_visual_web_arena():
    """Guards what an agent is handed: an image as a uint8 array, elements, an address, a history;
    and that numbers which stand nowhere lead nowhere."""
    site = DrawnSite()
    state = site.reset(0)
    assert state is site.trajectory[0] and site.meta_data == {"action_history": ["None"]}
    image = state["observation"]["image"]
    assert (image.dtype, image.shape) == (np.uint8, (256, 256, 3))
    lines = state["observation"]["text"].splitlines()
    goal, = (line for line in lines if f"[{site.site.goal}]" in line)
    missing = next(number for number in DIGITS if f"[{number}] " not in " ".join(lines))
    assert state["info"]["page"].url == "http://drawn.site/top"
    same = site.step(f"click [{missing}]")
    assert np.array_equal(same["observation"]["image"], image) and site.success is None
    page = site.step(f"click {goal.split()[0]}")
    assert page["info"]["page"].url == f"http://drawn.site/{site.site.goal}"
    assert np.array_equal(site.step("go_back")["observation"]["image"], image)
    assert len(site.trajectory) == 7 and site.meta_data["action_history"][-1] == "go_back"
    with pytest.raises(ValueError, match="no such action"):
        site.step("fly")


def test_who_knows_the_site_reaches_every_goal():
    """Guards episodes: by the best actions each ends with success after the steps of its path; by
    others it ends, too, and seldom so."""
    site = DrawnSite()
    for number in range(40):
        assert play(site, BestPlayer(site), number)
        assert len(site.meta_data["action_history"]) - 1 == PATHS[number % len(PATHS)]
    reached = [play(site, RandomPlayer(site, number), number) for number in range(300)]
    assert 0.1 < sum(reached) / 300 < 0.35
    site.reset(0)
    for _ in range(MOST_STEPS):
        assert site.success is None
        site.step("scroll [up]")
    assert site.success is False


def test_a_policy_goes_through_an_episode():
    """Guards the way from the site to the agent and back: the tiny policy is asked at each step,
    about the shown screen, and what it says is done."""
    agent = WebAgent(load(str(BASE.parent / "web-base")), "grounded", turn_tokens=48)
    site = DrawnSite()
    assert play(site, agent, random.Random(0).randrange(100)) in (True, False)
    actions = site.meta_data["action_history"][1:]
    assert 1 <= len(actions) <= MOST_STEPS
    assert [str(parse_action(action)) for action in actions] == actions
