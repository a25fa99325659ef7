"""Draws the questions of five tasks in miniature, of which the truth is known.

    python tests/tiny/make_data.py                       # search-train.jsonl, search-test.jsonl
    python tests/tiny/make_data.py --task gui --n 1200 --split train --out runs/tiny

search (as V*Bench): of 4 to 6 cards, 1 to 3 have the colour asked about, the candidates; one of
these bears a pattern. Which? The policy has to zoom into a candidate, and, where it is plain, into
the next.
spatial (as SAT-2, BLINK): is one card left or right of another, above or below; or, of two images,
of its old place? All of it can be seen in the images.
gui (as ScreenSpot): a screen with windows, buttons in them and icons beside. The answer is a box:
the element asked for. Its colour will do where it is alone; of several alike, the one that bears a
pattern is the one, and has to be zoomed into.
sizes (as ScreenSpot-Pro): the same, but what has the colour asked about is of one of three sizes.
web (as VisualWebArena): steps on a site of two screens of cards, each card with a numbered mark and
a page of its own, that shows its pattern large. The answer is the next action of a shortest path:
to click a mark, to scroll, to go back, or to stop with the pattern.

Of the first four, a pattern is seen in a crop alone: it has a mean of zero over every block of 4x4
px, the cards' edges lie on block edges, and the model gets the means of the blocks.

A row is one of the release's RL form, its images as data URIs, and `regions`: what the question is
about, boxes in px of the image with the pattern that is there (of spatial and web, the colour).
"""
import argparse
import base64
import io
import json
import random
import sys
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from rollout import Dialogue  # noqa: E402

BLOCK = 4                  # px of the drawing that become one px of the model input
SIDE = 256                 # px, width and height of the drawing
CELL = 64                  # px: the cards lie in a 4x4 grid of cells, each moved by one of JITTER
JITTER = (-12, 0, 12)      # px, in x and in y
CARD = (40, 40)            # px, width and height of a card, or of an icon
BUTTON = (56, 32)          # px, width and height
ELEMENTS = {               # px, of an icon and of a button
    "small": ((24, 24), (40, 24)), "medium": ((32, 32), (48, 32)), "large": (CARD, BUTTON)}
POSTER = (128, 128)        # px, of the card on its page: its pattern is BLOCK times as large
VISIBLE = 0.3              # of a card's sides: then its pattern can be read
COLOURS = {"red": (190, 50, 50), "green": (50, 170, 70), "blue": (60, 80, 200),
           "yellow": (200, 190, 50), "purple": (150, 50, 180), "cyan": (60, 180, 190)}
CONTRAST = 36
LEVELS = {"0": 0.0, "+": 1.0, "-": -1.0, "#": 1.5, ".": -0.5}


def block(drawing):
    """16 letters, row by row -> (4, 4), what is added to a card's colour, times CONTRAST."""
    return np.array([LEVELS[letter] for letter in drawing]).reshape(BLOCK, BLOCK)


PATTERNS = {               # each has a mean of zero
    "plain": block("0000" "0000" "0000" "0000"),
    "horizontal": block("++++" "++++" "----" "----"),
    "vertical": block("++--" "++--" "++--" "++--"),
    "checked": block("++--" "++--" "--++" "--++"),
    "rising": block("++--" "+--+" "--++" "-++-"),
    "falling": block("+--+" "++--" "-++-" "--++"),
    "dotted": block("...." ".##." ".##." "...."),
}
ANSWERS = tuple(pattern for pattern in PATTERNS if pattern != "plain")
NOTHING = "nothing"        # said of a crop that shows no candidate
DIRECTIONS = ("left", "right", "above", "below")

# The digits of marks, of which each point is a block.
DIGITS = {1: ".#. ##. .#. .#. ###", 2: "### ..# ### #.. ###", 3: "### ..# ### ..# ###",
          4: "#.# #.# ### ..# ..#", 5: "### #.. ### ..# ###", 6: "### #.. ### #.# ###"}

# What is asked: a colour stands between, and RELATION is followed by another.
SEARCH = ("One", " card bears a pattern. Which?")
IS_THE = "Is the"
RELATION = {("left", "right"): " card left or right of the",
            ("above", "below"): " card above or below the"}
MOVED = {("left", "right"): " card now left or right of its old place?",
         ("above", "below"): " card now above or below its old place?"}
CLICK = ("Click the", " element.")
CLICK_ALIKE = ("Click the", " element that bears a pattern.")
SHOWN = ("Which pattern does the", " card's page show?")


# ------------------------------------------------------------------------------------------ drawing

def draw_background():
    """Red rises to the right, green downwards, in steps of a block: a patch tells its place."""
    ramp = 127 + np.round(np.linspace(-60, 60, SIDE // BLOCK)).repeat(BLOCK)
    red, green = np.meshgrid(ramp, ramp)
    return np.dstack([red, green, np.full_like(red, 127)]).astype(np.uint8)


def draw_face(colour, pattern):
    """What a card is cut from, (CELL, CELL, 3)."""
    tile = np.tile(PATTERNS[pattern], (CELL // BLOCK, CELL // BLOCK))
    return (COLOURS[colour] + CONTRAST * tile[..., None]).astype(np.uint8)


BACKGROUND = draw_background()
WINDOW = BACKGROUND + np.array([0, 0, 48], np.uint8)
FACES = {face: draw_face(*face) for face in product(COLOURS, PATTERNS)}


def draw_window(image, box):
    """A frame and a title bar with three buttons; inside, the ground is bluer."""
    left, top, right, bottom = box
    image[top:bottom, left:right] = 60, 64, 76
    inside = slice(top + 2 * BLOCK, bottom - BLOCK), slice(left + BLOCK, right - BLOCK)
    image[inside] = WINDOW[inside]
    x = left + BLOCK
    y = top + BLOCK // 2
    for colour in ((230, 90, 80), (230, 190, 70), (100, 200, 90)):
        image[y:y + BLOCK, x:x + BLOCK] = colour
        x += 2 * BLOCK


def draw_mark(number):
    """A white digit on black, (28, 20, 3)."""
    points = np.array([[point == "#" for point in line] for line in DIGITS[number].split()])
    framed = np.pad(255 * points.astype(np.uint8), 1)
    return framed.repeat(BLOCK, 0).repeat(BLOCK, 1)[..., None].repeat(3, 2)


MARKS = {number: draw_mark(number) for number in DIGITS}


@dataclass(frozen=True)
class Card:
    colour: str
    pattern: str
    x: int                 # centre, px of the drawing
    y: int
    size: tuple = CARD
    mark: int = 0          # the number in its corner, by which it is clicked

    @property
    def cell(self):
        """(row, column) in the grid."""
        return self.y // CELL, self.x // CELL

    @property
    def box(self):
        """(left, top, right, bottom), px of the drawing."""
        dx, dy = (side // 2 for side in self.size)
        return self.x - dx, self.y - dy, self.x + dx, self.y + dy

    def contains(self, point):
        return in_box(point, self.box)

    def distance(self, point):
        """From the centre to a point, the larger of both axes, px."""
        return max(abs(point[0] - self.x), abs(point[1] - self.y))

    def readable_in(self, box):
        """Whether a crop shows enough of the card."""
        left, top, right, bottom = self.box
        width = min(right, box[2]) - max(left, box[0])
        height = min(bottom, box[3]) - max(top, box[1])
        return width >= VISIBLE * self.size[0] and height >= VISIBLE * self.size[1]

    def steps_from(self, other):
        """How many columns or rows it lies in each direction of another card."""
        (row, column), (other_row, other_column) = self.cell, other.cell
        return {"left": other_column - column, "right": column - other_column,
                "above": other_row - row, "below": row - other_row}

    def directions_from(self, other):
        """The directions in which it lies, seen from another card."""
        return [direction for direction, steps in self.steps_from(other).items() if steps > 0]


@dataclass(frozen=True)
class Scene:
    """What is drawn where. Points and boxes are in px of the drawing.

    colour: asked about. named: the two cards of a spatial question, in its order; the first card
    where it has moved to in a second image, and in its old place. windows: boxes."""
    cards: tuple[Card, ...]
    colour: str
    named: tuple[Card, ...] = ()
    windows: tuple = ()

    @property
    def candidates(self):
        """The cards of the colour asked about, in reading order of their cells."""
        candidates = [card for card in self.cards if card.colour == self.colour]
        return sorted(candidates, key=lambda card: card.cell)

    def draw(self):
        image = BACKGROUND.copy()
        for window in self.windows:
            draw_window(image, window)
        for card in self.cards:
            left, top, right, bottom = card.box
            face = FACES[card.colour, card.pattern]
            if card.size == POSTER:
                face = face.repeat(BLOCK, 0).repeat(BLOCK, 1)
            image[top:bottom, left:right] = face[:bottom - top, :right - left]
            if card.mark:
                height, width, _ = MARKS[card.mark].shape
                image[top:top + height, left:left + width] = MARKS[card.mark]
        return Image.fromarray(image)

    def draw_later(self):
        """The second image: the first card has moved."""
        return replace(self, cards=(self.named[0], *self.cards[1:])).draw()

    def face_in(self, box):
        """What is true of a crop: the pattern of the most central candidate that can be read in it,
        or "nothing"."""
        middle = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        readable = [card for card in self.candidates if card.readable_in(box)]
        if not readable:
            return NOTHING
        return min(readable, key=lambda card: card.distance(middle)).pattern


def in_box(point, box):
    """Whether a point lies in a box (left, top, right, bottom), edges included."""
    return box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]


# ------------------------------------------------------------------------------------------- scenes

def place_cards(rng, faces, windows=()):
    """(colour, pattern) pairs -> Cards in different cells of the grid; in a window, buttons."""
    cards = []
    for (colour, pattern), cell in zip(faces, rng.sample(range(16), len(faces)), strict=True):
        row, column = divmod(cell, 4)
        x = column * CELL + CELL // 2
        y = row * CELL + CELL // 2
        dx, dy = rng.choice(JITTER), rng.choice(JITTER)
        if any(in_box((x, y), window) for window in windows):
            cards.append(Card(colour, pattern, x, y + abs(dy), BUTTON))    # below the title
        else:
            cards.append(Card(colour, pattern, x + dx, y + dy))
    return tuple(cards)


def search_scene(rng, colour=None, candidates=None, windows=()):
    """4 to 6 cards, the first of which bears the pattern; 1, 2 or 3 of them (in one, two and three
    cases of six) are candidates. windows: of a screen."""
    colour = colour or rng.choice(list(COLOURS))
    candidates = candidates or rng.choice((1, 2, 2, 3, 3, 3))
    faces = [(colour, rng.choice(ANSWERS))] + [(colour, "plain")] * (candidates - 1)
    others = [other for other in COLOURS if other != colour]
    for _ in range(rng.randint(4, 6) - candidates):
        faces.append((rng.choice(others), rng.choice(list(PATTERNS))))
    return Scene(place_cards(rng, faces, windows), colour, windows=windows)


def relation_scene(rng, direction):
    """4 to 6 cards of different colours; the first lies in `direction` of the second, in the next
    row or column: of cards anywhere the place of one alone would give most answers away."""
    colours = rng.sample(list(COLOURS), rng.randint(4, 6))
    faces = [(colour, rng.choice(list(PATTERNS))) for colour in colours]
    while True:
        cards = place_cards(rng, faces)
        if cards[0].steps_from(cards[1])[direction] == 1:
            return Scene(cards, colours[0], named=cards[:2])


def moved_scene(rng, direction):
    """The same, in two images: the first card moves to where the second one was to lie."""
    scene = relation_scene(rng, direction)
    first, second, *others = scene.cards
    old = replace(first, x=second.x, y=second.y)
    return Scene((old, *others), first.colour, named=(first, old))


def windows_of(rng):
    """Boxes of one or two windows, two or three cells wide and high."""
    windows = []
    for _ in range(rng.randint(1, 2)):
        columns, rows = rng.randint(2, 3), rng.randint(2, 3)
        left, top = rng.randint(0, 4 - columns), rng.randint(0, 4 - rows)
        box = left, top, left + columns, top + rows
        windows.append(tuple(number * CELL for number in box))
    return tuple(windows)


# ---------------------------------------------------------------------------------------- questions

@dataclass(frozen=True)
class Asked:
    """A question about a scene. answer: text, or a box."""
    text: str
    scene: Scene
    answer: object
    category: str

    def draw(self):
        """-> the images, two where a card moves."""
        images = [self.scene.draw()]
        if self.category == "moved":
            images.append(self.scene.draw_later())
        return images

    @property
    def regions(self):
        """What the question is about, and where."""
        if self.scene.named:
            return [{"box": card.box, "name": card.colour} for card in self.scene.named]
        return [{"box": card.box, "name": card.pattern} for card in self.scene.candidates]

    def row(self, name):
        """As a row of a file."""
        images = self.draw()
        return {"id": name, "problem": "<image>" * len(images) + self.text,
                "answer": str(self.answer), "images": [data_uri(image) for image in images],
                "regions": self.regions, "category": self.category}


def data_uri(image):
    """A drawing as text, without loss; most are shorter than a kilobyte."""
    file = io.BytesIO()
    image.save(file, "WEBP", lossless=True, method=1, quality=20)    # quick, and as short
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def ask_search(rng):
    scene = search_scene(rng)
    return Asked(f"{SEARCH[0]} {scene.colour}{SEARCH[1]}", scene, scene.cards[0].pattern,
                 str(len(scene.candidates)))


def ask_spatial(rng):
    axis = rng.choice(list(RELATION))
    direction = rng.choice(axis)
    if rng.random() < 0.5:
        category, scene = "relation", relation_scene(rng, direction)
        asked = f"{RELATION[axis]} {scene.named[1].colour} card?"
    else:
        category, scene = "moved", moved_scene(rng, direction)
        asked = MOVED[axis]
    return Asked(f"{IS_THE} {scene.colour}{asked}", scene, direction, category)


def ask_screen(rng):
    windows = windows_of(rng)
    scene = search_scene(rng, candidates=rng.choice((1, 2, 3)), windows=windows)
    target = scene.cards[0]
    alike = len(scene.candidates) > 1
    before, after = CLICK_ALIKE if alike else CLICK
    kind = "icon" if target.size == CARD else "button"
    return Asked(f"{before} {scene.colour}{after}", scene, target.box,
                 f"{kind} | {'alike' if alike else 'alone'}")


def ask_sizes(rng):
    """A question of gui, whose elements of the colour asked about have one of three sizes. Large is
    what the lessons of the base showed; patterns are as fine at every size."""
    asked = ask_screen(rng)
    size = rng.choice(list(ELEMENTS))
    icon, button = ELEMENTS[size]
    cards = [replace(card, size=icon if card.size == CARD else button)
             if card.colour == asked.scene.colour else card for card in asked.scene.cards]
    _, alike = asked.category.split(" | ")
    return Asked(asked.text, replace(asked.scene, cards=tuple(cards)), cards[0].box,
                 f"{size} | {alike}")


# --------------------------------------------------------------------------------------- the site

SCROLL = {"top": "scroll [down]", "bottom": "scroll [up]"}
PATHS = (2, 3, 3, 4)       # the steps of a shortest path, by kind: see Site
STEPS = [(kind, step) for kind, length in enumerate(PATHS) for step in range(length)]


class Site:
    """Two screens of cards, "top" and "bottom", and of each card its page, named by its colour.

    The goal is to tell the pattern of one card. kind: 0: this card is on the first screen, "top";
    1: it is on the other one; 2 and 3: the same, but the browser was left on another card's page.
    screens: {name: Scene}. links: {(screen, element): screen}."""

    def __init__(self, rng, kind):
        colours = rng.sample(list(COLOURS), len(COLOURS))
        split = rng.randint(2, 4)
        on_bottom = kind % 2 == 1
        self.goal = colours[-1 if on_bottom else 0]
        self.intent = f"{SHOWN[0]} {self.goal}{SHOWN[1]}"
        self.start = ["top"] if kind < 2 else ["top", colours[1]]
        self.screens = {"top": self.draw_list(rng, colours[:split]),
                        "bottom": self.draw_list(rng, colours[split:])}
        self.links = {("top", SCROLL["top"]): "bottom", ("bottom", SCROLL["bottom"]): "top"}
        for name in SCROLL:
            for card in self.screens[name].cards:
                self.links[name, element(card.colour)] = card.colour
        for colour in colours:
            pattern = rng.choice(ANSWERS)
            if colour == self.goal:
                self.pattern = pattern
            page = Card(colour, pattern, SIDE // 2, SIDE // 2, POSTER)
            self.screens[colour] = Scene((page,), self.goal, windows=((0, 0, SIDE, SIDE),))

    def draw_list(self, rng, colours):
        """A screen like those of the task gui, of plain cards with marks in any order."""
        windows = windows_of(rng)
        cards = place_cards(rng, [(colour, "plain") for colour in colours], windows)
        marks = rng.sample(list(MARKS), len(cards))
        marked = [replace(card, mark=mark) for card, mark in zip(cards, marks, strict=True)]
        return Scene(tuple(marked), self.goal, windows=windows)

    def best(self, screen):
        """The action that a shortest path goes on with."""
        scene = self.screens[screen]
        if scene.candidates:
            card, = scene.candidates
            return own_action(card)
        return SCROLL.get(screen, "go_back")

    def named(self, screen, action):
        """An action with the element in place of its number: click [CARD] [red]."""
        for card in self.screens[screen].cards:
            if card.mark and action == f"click [{card.mark}]":
                return f"click {element(card.colour)}"
        return action

    def after(self, visited, action):
        """The screens that were visited, the shown one last -> the same after an action; what leads
        nowhere changes nothing."""
        if action == "go_back":
            return visited[:-1] or visited
        link = visited[-1], self.named(visited[-1], action).removeprefix("click ")
        if link not in self.links:
            return visited
        kept = visited[:-1] if "scroll" in action else visited
        return [*kept, self.links[link]]

    def ask(self, screen, history):
        """The question at a step. history: what was done before, with named elements."""
        best = self.best(screen)
        text = Dialogue().web_text(self.intent, history)
        return Step(text, self.screens[screen], best, best.split()[0])

    def path(self):
        """-> the questions of a shortest path."""
        visited = self.start
        history = []
        steps = []
        while not steps or steps[-1].category != "stop":
            steps.append(self.ask(visited[-1], history))
            history.append(self.named(visited[-1], steps[-1].answer))
            visited = self.after(visited, steps[-1].answer)
        return steps


class Step(Asked):
    """A question about the next action."""

    @property
    def regions(self):
        return [{"box": card.box, "name": card.colour} for card in self.scene.candidates]

    def row(self, name):
        return super().row(name) | {"problem": self.text + "\n<image>"}


def own_action(card):
    """What can be done with a card: to click its mark, or, on its page, to tell its pattern."""
    return f"click [{card.mark}]" if card.mark else f"stop [{card.pattern}]"


def element(colour):
    return f"[CARD] [{colour}]"


def ask_web(split, seed, index):
    """Every step of one path after the other, of all kinds in turn."""
    cycle, place = divmod(index, len(STEPS))
    kind, step = STEPS[place]
    return site_of(split, seed, cycle * len(PATHS) + kind).path()[step]


def site_of(split, seed, number):
    """The site of goal `number`."""
    return Site(random.Random(f"web {split} {seed} {number}"), number % len(PATHS))


# ---------------------------------------------------------------------------------------- the files

TASKS = {"search": ask_search, "spatial": ask_spatial, "gui": ask_screen, "sizes": ask_sizes}
SIZES = {"train": 1200, "test": 1024}
WEB_SIZES = {"train": 1200, "test": 516}       # whole rounds of STEPS


def ask(task, split, seed, index):
    """Question number `index` of a split ("train", "test", or any other name); each (split, seed,
    index) has random numbers of its own, and each path of the task web."""
    if task == "web":
        return ask_web(split, seed, index)
    return TASKS[task](random.Random(f"{task} {split} {seed} {index}"))


def write(task, split, n, seed, folder):
    """Writes TASK-SPLIT.jsonl. -> its path"""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{task}-{split}.jsonl"
    rows = (ask(task, split, seed, i).row(f"{task}-{split}-{seed}-{i}") for i in range(n))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=[*TASKS, "web"], default="search")
    parser.add_argument("--split", choices=SIZES, help="[both]")
    parser.add_argument("--n", type=int, help=f"rows of a split [{SIZES}, web {WEB_SIZES}]")
    parser.add_argument("--seed", type=int, default=0, help="[0]")
    parser.add_argument("--out", default=HERE, help="folder [the one of this script]")
    args = parser.parse_args()
    if args.n is not None and args.n < 1:
        parser.error("--n: give a number from 1 on")
    sizes = WEB_SIZES if args.task == "web" else SIZES
    for split in [args.split] if args.split else sizes:
        print(write(args.task, split, args.n or sizes[split], args.seed, args.out))


if __name__ == "__main__":
    main()
