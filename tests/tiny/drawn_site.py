"""The drawn site as an environment: whole episodes, in the form of VisualWebArena's states.

    python tests/tiny/drawn_site.py CHECKPOINT --episodes 200     # against a player by chance
"""
import argparse
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from make_data import element, site_of  # noqa: E402

from evaluate import WebAgent  # noqa: E402
from reward import match_action, parse_action  # noqa: E402

MOST_STEPS = 8             # of an episode; a shortest path has four at most


class DrawnSite:
    """A browser that shows drawn sites. Goals are numbered, and those of a split are the ones of
    its file.

    After `reset` and `step`: trajectory: states and actions in turn, a state last. meta_data: with
    "action_history". intent: what the goal is, in words. success: None, or, once the episode has
    ended, whether it was reached."""

    def __init__(self, split="test", seed=0):
        self.split = split
        self.seed = seed

    def reset(self, number):
        """Begins the episode of goal `number`. -> its first state"""
        self.site = site_of(self.split, self.seed, number)
        self.intent = self.site.intent
        self.visited = self.site.start
        self.success = None
        self.meta_data = {"action_history": ["None"]}
        self.trajectory = [self.state()]
        return self.trajectory[-1]

    @property
    def screen(self):
        return self.visited[-1]

    def state(self):
        """What the browser shows: the image, a line for each mark, and the page's address."""
        scene = self.site.screens[self.screen]
        elements = [f"[{card.mark}] {element(card.colour)}" for card in scene.cards if card.mark]
        observation = {"image": np.asarray(scene.draw()), "text": "\n".join(elements)}
        page = SimpleNamespace(url=f"http://drawn.site/{self.screen}")
        return {"observation": observation, "info": {"page": page}}

    def step(self, action):
        """Does what an action says; "stop", or too many steps, end the episode. -> the new state.
        Raises ValueError for what is no action."""
        name = parse_action(action).name
        history = self.meta_data["action_history"]
        history.append(action)
        if name == "stop":
            shown = f"stop [{self.site.pattern}]"
            self.success = match_action(action, shown)
        else:
            self.visited = self.site.after(self.visited, action)
            if len(history) > MOST_STEPS:
                self.success = False
        self.trajectory += [{"action": action}, self.state()]
        return self.trajectory[-1]


class RandomPlayer:
    """Does anything that can be done on the shown screen; on a page this is to go back, or to stop
    with the pattern that it shows."""

    def __init__(self, site, seed=0):
        self.site = site
        self.rng = random.Random(seed)

    def reset(self, test_config_file=None):
        pass

    def next_action(self, trajectory, intent, meta_data):
        card, *others = self.site.site.screens[self.site.screen].cards
        if not card.mark:
            return self.rng.choice([f"stop [{card.pattern}]", "go_back"])
        clicks = [f"click [{card.mark}]" for card in (card, *others)]
        return self.rng.choice([*clicks, "scroll [down]", "scroll [up]", "go_back"])


def play(site, player, number):
    """An episode. -> whether its goal was reached"""
    site.reset(number)
    player.reset()
    while site.success is None:
        action = player.next_action(site.trajectory, site.intent, site.meta_data)
        site.step(action)
    return site.success


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--episodes", type=int, default=200, help="[200]")
    parser.add_argument("--mode", default="grounded", help="[grounded]")
    args = parser.parse_args()
    site = DrawnSite()
    agent = WebAgent(args.checkpoint, args.mode, turn_tokens=48, response_tokens=288)
    for name, player in (("by chance", RandomPlayer(site)), (args.checkpoint, agent)):
        reached = [play(site, player, number) for number in range(args.episodes)]
        print(f"{name}: {sum(reached) / args.episodes:.3f} of {args.episodes} goals are reached")


if __name__ == "__main__":
    main()
