"""Benchmarks: where questions come from, and how well a policy does.

In:  a checkpoint and a task (a name, or a file of one of the real data sets), or one image and a question.
Out: accuracy with its interval, with and without the tool, the behaviours that the paper counts, pictures of traces.

    python evaluate.py --model runs/toy-search-zoom/rl --task toy-search
    python evaluate.py --model runs/toy-search-zoom/rl --image my.png --question "..." --save trace.png

The task `toy-search` is V*Bench's idea in miniature. Of 4 to 6 coloured cards, 1 to 3 have the colour that is asked about, and
exactly one of these bears a pattern. Which one it is, and which pattern, cannot be known from the image as the policy first sees
it: each pattern has a mean of zero over every block of 4x4 px, the cards' edges lie on block edges, and the policy sees the means
of the blocks. So it has to look at a candidate, see whether it is plain, and look at the next.
"""
import ast
import base64
import csv
import json
import math
import random
import re
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from string import ascii_uppercase as LETTERS

import numpy as np
from PIL import Image

from model import Policy, UserError, gather, load, rank, world_size, write_text
from reward import (USAGE, Action, distinct_crops, in_region, option_text, parse_action, score)
from rollout import (OVERLONG, Config, Question, crop_box, describe_config, draw_trace, make_config, make_dialogue,
                     parse_points, read_image, rollout, run)

# ------------------------------------------------------------------------------------------------ toy-search: drawn scenes

BLOCK = 4                       # px of the drawing that become one px of what the policy sees
SIDE = 256                      # px, width and height of the drawing
CELL, CARD = 64, 40             # px: the cards lie in a 4x4 grid of cells, moved by one of JITTER in each direction
JITTER = (-12, 0, 12)           # px
COLOURS = {"red": (190, 50, 50), "green": (50, 170, 70), "blue": (60, 80, 200), "yellow": (200, 190, 50),
           "purple": (150, 50, 180), "cyan": (60, 180, 190)}
_row, _column = np.mgrid[:BLOCK, :BLOCK]
PATTERNS = {                    # added to a card's colour, times CONTRAST; each block sums to zero
    "plain": np.zeros((4, 4)),
    "horizontal": np.where(_row < 2, 1.0, -1.0),
    "vertical": np.where(_column < 2, 1.0, -1.0),
    "checked": np.where((_row < 2) == (_column < 2), 1.0, -1.0),
    "rising": np.where((_row + _column) % 4 < 2, 1.0, -1.0),
    "falling": np.where((_row - _column) % 4 < 2, 1.0, -1.0),
    "dotted": np.where((_row % 3 > 0) & (_column % 3 > 0), 1.5, -0.5),
}
CONTRAST = 36
ANSWERS = tuple(p for p in PATTERNS if p != "plain")
NOTHING = "nothing"             # said of a crop that shows no candidate
QUESTION = ("One", " card bears a pattern. Which?")     # the colour stands between


def _background():
    """Red rises to the right and green downwards, in steps of a block: position can be told from any patch."""
    ramp = np.round(np.linspace(-60, 60, SIDE // BLOCK)).repeat(BLOCK)
    image = np.full((SIDE, SIDE, 3), 127.0)
    image[..., 0] += ramp[None, :]
    image[..., 1] += ramp[:, None]
    return image.astype(np.uint8)


def _card(colour, pattern):
    tile = np.tile(PATTERNS[pattern], (CARD // BLOCK, CARD // BLOCK))[..., None]
    return (np.array(COLOURS[colour]) + CONTRAST * tile).astype(np.uint8)


BACKGROUND = _background()
CARDS = {(c, p): _card(c, p) for c in COLOURS for p in PATTERNS}


@dataclass(frozen=True)
class Card:
    colour: str
    pattern: str
    x: int           # centre, px of the drawing
    y: int


@dataclass(frozen=True)
class Scene:
    cards: tuple[Card, ...]
    colour: str      # the one asked about

    @property
    def candidates(self):
        """The cards of the colour asked about, in reading order of their cells."""
        return sorted((c for c in self.cards if c.colour == self.colour), key=lambda c: (c.y // CELL, c.x // CELL))

    def draw(self):
        image = BACKGROUND.copy()
        for card in self.cards:
            top, left = card.y - CARD // 2, card.x - CARD // 2
            image[top:top + CARD, left:left + CARD] = CARDS[card.colour, card.pattern]
        return Image.fromarray(image)

    def card_at(self, point):
        """The card under a point (px of the drawing), or None."""
        return next((c for c in self.cards if max(abs(point[0] - c.x), abs(point[1] - c.y)) <= CARD // 2), None)

    def cells(self):
        """The 16 cells of the grid in reading order: the card in each, or None."""
        found = {(c.y // CELL, c.x // CELL): c for c in self.cards}
        return [found.get((row, column)) for row in range(SIDE // CELL) for column in range(SIDE // CELL)]

    def contains(self, point):
        """Whether a point (px of the drawing) lies on a card of the colour asked about."""
        card = self.card_at(point)
        return card is not None and card.colour == self.colour

    def shown(self, box):
        """The candidates of which the window shows at least 12x12 px, enough to read the pattern; the most central first."""
        middle = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        half = CARD // 2
        seen = [c for c in self.candidates if min(c.x + half, box[2]) - max(c.x - half, box[0]) >= 12
                and min(c.y + half, box[3]) - max(c.y - half, box[1]) >= 12]
        return sorted(seen, key=lambda c: max(abs(c.x - middle[0]), abs(c.y - middle[1])))

    def face_in(self, box):
        """What is true of a window: the pattern of the most central candidate that it shows, or "nothing"."""
        seen = self.shown(box)
        return seen[0].pattern if seen else NOTHING

    def describes(self, thought, box):
        """Whether a thought says of a window what is true of it, and nothing else: of all faces it names this one alone."""
        words = set(re.findall(r"\w+", thought.lower()))
        return words & {*PATTERNS, NOTHING} == {self.face_in(box)}


def place_cards(rng, faces):
    """(colour, pattern) pairs -> Cards in different cells of the grid."""
    cells = rng.sample(range(16), len(faces))
    return tuple(Card(c, p, cell % 4 * CELL + CELL // 2 + rng.choice(JITTER), cell // 4 * CELL + CELL // 2 + rng.choice(JITTER))
                 for (c, p), cell in zip(faces, cells))


def search_scene(rng, colour=None, candidates=None):
    """4 to 6 cards, of which 1, 2 or 3 (in one, two and three cases of six) are candidates; the first card bears the pattern."""
    colour = colour or rng.choice(list(COLOURS))
    candidates = candidates or rng.choice((1, 2, 2, 3, 3, 3))
    others = [c for c in COLOURS if c != colour]
    faces = [(colour, rng.choice(ANSWERS))] + [(colour, "plain")] * (candidates - 1)
    faces += [(rng.choice(others), rng.choice(list(PATTERNS))) for _ in range(rng.randint(4, 6) - candidates)]
    return Scene(place_cards(rng, faces), colour)


def toy_search(split, seed, index):
    """Question number `index` of a split ("train", "validation", "test"); each (split, seed, index) has its own stream."""
    scene = search_scene(random.Random(f"toy-search {split} {seed} {index}"))
    return Question(f"{QUESTION[0]} {scene.colour}{QUESTION[1]}", [scene.draw], scene.cards[0].pattern, "string",
                    id=f"{split}-{seed}-{index}", category=str(len(scene.candidates)), scene=scene)


TOYS = {"toy-search": toy_search}


class DrawnQuestions:
    """The questions of a toy task, drawn when they are asked for."""

    def __init__(self, task, split, n, seed=0):
        self.draw, self.split, self.n, self.seed = TOYS[task], split, n, seed

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        if not 0 <= index < self.n:
            raise IndexError(index)
        return self.draw(self.split, self.seed, index)


def blind_accuracy(questions, dialogue, looks, guesses=len(ANSWERS), seed=0):
    """What a player gets who looks at `looks` random places and knows the answer if it was shown, and else guesses."""
    rng, right = random.Random(seed), 0.0
    for question in questions:
        points = [(rng.randrange(SIDE), rng.randrange(SIDE)) for _ in range(looks)]
        boxes = [crop_box((SIDE, SIDE), point, dialogue.crop_half) for point in points]
        right += 1 if any(question.scene.cards[0] in question.scene.shown(box) for box in boxes) else 1 / guesses
    return right / len(questions)


# ------------------------------------------------------------------------------------------------ how an answer is scored

OPTIONS = (re.compile(r"\(([A-Z])\)\s*(.*?)(?=\s*\([A-Z]\)|\n|$)"),     # (A) red (B) blue: on one line or several
           re.compile(r"^\s*([A-Z])[.)][^\S\n]+(.+)$", re.M))           # A. red: a line each
WHOLE_BOX = re.compile(r"[(\[]\s*\d+(?:\s*,\s*\d+){3}\s*[)\]]")
NUMBERS = re.compile(r"[(\[]+\s*-?[\d.]+(?:[\s,()\[\]]+-?[\d.]+)+\s*[)\]]+")
ACTION = re.compile(rf"({'|'.join(USAGE)})\s*\[.*\]|(new|close)_tab|go_(back|forward)", re.S)    # "stop" alone is a word


class Unusable(Exception):
    """Why a row cannot be asked or scored."""


def parse_options(text):
    """The options' texts in the order of their letters: "Which?\\nA. Yes, left\\nB. No" -> ("Yes, left", "No"), or ()."""
    text = text.rpartition("Answer Choices:")[2]
    for pattern in OPTIONS:
        found = pattern.findall(text)
        letters = "".join(letter for letter, _ in found)
        start = letters.rfind("A")
        if 0 <= start < len(letters) - 1 and LETTERS.startswith(letters[start:]):
            return tuple(option.strip() for _, option in found[start:])
    return ()


def as_box(values, limit=10**6):
    """Corners (x1, y1, x2, y2), checked. limit: the largest value there may be."""
    if not (len(values) == 4 and all(type(v) in (int, float) for v in values)
            and 0 <= values[0] <= values[2] <= limit and 0 <= values[1] <= values[3] <= limit):
        raise Unusable(f"{list(values)} are not the corners of a box in " + ("[0, 1]" if limit == 1 else "px"))
    return tuple(values)


def scored_by(text, answer, letter=False):
    """How an answer is scored -> `kind`, `answer` and `choices` of the Question. letter: the answer is an option's letter.

    A box in whole px is to be hit by a point; a web action is an action; where the text has options and the answer is the
    letter or the text of one, it is a choice, and stays letter or text; all else ("yes" too) is compared as a string."""
    answer = str(answer).strip() if type(answer) in (str, int, float) else ""
    if not answer:
        raise Unusable("it has no answer in words")
    if WHOLE_BOX.fullmatch(answer):
        return dict(kind="point", answer=as_box([int(v) for v in re.findall(r"\d+", answer)]))
    if NUMBERS.fullmatch(answer):
        raise Unusable(f"its answer, {answer}, is neither in words nor a box (x1, y1, x2, y2) in whole px")
    if ACTION.fullmatch(answer):
        parse_action(answer)
        return dict(kind="action", answer=answer)
    choices = parse_options(text)
    places = [i for i, c in enumerate(choices) if c.casefold().rstrip(".") == answer.casefold().rstrip(".")]
    named = re.fullmatch(r"\(?([A-Z])[.)]?", answer)
    if choices and named and (letter or not places):
        places = [LETTERS.index(named[1])]
        if places[0] >= len(choices):
            raise Unusable(f"its answer, {answer}, is none of its {len(choices)} options")
    if not places:
        return dict(kind="string", answer=answer)
    return dict(kind="choice", answer=LETTERS[places[0]] if named else choices[places[0]], choices=choices)


# What the answer shall look like, by the kind of question, for rows that do not say it ("Description: the search button"); and
# how to tell the rows that do. The list of actions is always given: a page that quotes it must not be able to suppress it.
HINTS = {
    "point": (r"\(x,\s*y\)|\[x,\s*y\]|<answer>",
              "The answer is one point (x, y), in pixels of the image, between <answer> and </answer>."),
    "choice": (r"<answer>|\b(answer|respond|reply)\b[^.:\n]{0,40}\b(letter|text|option)",
               "The answer is the letter or the text of one of the options."),
    "action": (None, "The answer is one of these actions, with numbers and words that fit: " + ", ".join(USAGE.values()) + "."),
}


def hint_for(kind, text):
    """What an answer of a kind shall look like, unless the question's text says so itself; or ""."""
    said, hint = HINTS.get(kind, (None, ""))
    return "" if said and re.search(said, text, re.I) else hint


# ------------------------------------------------------------------------------------------------ data sets: a row

FACET = " | "          # between the parts of a category, "mobile | text": `summarise` groups by each, and by all together
EMBEDDED = object()    # an image that is in the row itself
PLATFORMS = {"ios": "mobile", "android": "mobile", "windows": "desktop", "macos": "desktop"}    # all others are web pages
ASKS_FOR_SHARES = re.compile(r"\s*Your answer should be formatted as a list of tuples.*", re.S)


def read_conversation(row):
    """ViGoRL, evaluation and search: what is said first is the question, then comes the answer. The sub-task of BLINK is in
    the id ("val_Art_Style_7"), that of V* in the image's folder."""
    turns = row["conversations"]
    said = turns["value"] if isinstance(turns, dict) else [turn["value"] for turn in turns]
    text, answer = (said[0] if isinstance(said[0], list) else said)[:2]
    images = [row["image"]] if isinstance(row.get("image"), str) else row.get("image")
    task = re.match(r"(?:val|test)_(.+)_\d+$", str(row.get("id"))) or re.search("(direct_attributes|relative_position)",
                                                                                str(images))
    return dict(text=text, images=images, category=task and task[1], **scored_by(text, answer))


def read_sft(row):
    """ViGoRL, SFT: the first turn of the user's is the question. Later images are close-ups: they belong to the trace."""
    text = next(turn["content"] for turn in row["messages"] if turn["role"] in ("user", "human"))
    return dict(text=text, images=row["images"][:max(1, text.count("<image>"))], **scored_by(text, row["gt_answer"]))


def read_problem(row, answer):
    text = row["problem"]
    return dict(text=text, images=row["images"], category=row.get("data_source"), **scored_by(text, row[answer]))


def read_vstar(row):
    scored = scored_by(row["text"], row["label"], letter=True)
    return dict(text=row["text"], images=[row["image"]], category=row["category"], **scored)


def read_robospatial(row):
    """Yes or no; in the category "context", a polygon in [0, 1]. There the question asks for points in [0, 1] too: that
    sentence is left out, for points are said in px here."""
    text, answer = ASKS_FOR_SHARES.sub("", row["question"]), row["answer"]
    if answer[:1] in ("[", "("):
        corners = ast.literal_eval(answer)
        if len(corners) < 3 or not all(0 <= x <= 1 and 0 <= y <= 1 for x, y in corners):
            raise Unusable("its answer is no polygon in [0, 1]")
        scored = dict(kind="point", answer=lambda size: tuple((x * size[0], y * size[1]) for x, y in corners))
    else:
        scored = scored_by(text, answer)
    return dict(text=text, images=[row["img"]], category=row["category"], **scored)


def read_element(row, answer, *category):
    """An element of a screen, described in the words of ViGoRL's own rows."""
    return dict(text=f"Description: {row['instruction']}", images=[row["img_filename"]], kind="point", answer=answer,
                category=FACET.join(category))


def read_screenspot(row):
    """bbox: x, y, width, height in px."""
    x, y, width, height = row["bbox"]
    box = as_box([x, y, x + width, y + height])
    return read_element(row, box, PLATFORMS.get(row["data_source"], "web"), row["data_type"])


def read_screenspot_pro(row):
    """bbox: x1, y1, x2, y2 in px."""
    return read_element(row, as_box(row["bbox"]), row["group"], row["ui_type"])


def read_os_atlas(row):
    """bbox: x1, y1, x2, y2 in [0, 1]."""
    box = as_box(row["bbox"], limit=1)
    return read_element(row, lambda size: tuple(v * side for v, side in zip(box, size * 2)))


def read_hr_bench(row):
    if row["answer"] not in ("A", "B", "C", "D"):
        raise Unusable(f"its answer, {row['answer']}, is none of its 4 options")
    text = "\n".join([row["question"], *(f"({letter}) {row[letter]}" for letter in "ABCD")])
    return dict(text=text, images=[EMBEDDED] if row["image"] else [], kind="choice", answer=row["answer"],
                choices=tuple(row[letter] for letter in "ABCD"),
                category=FACET.join([row["category"], f"cycle {row['cycle_category']}"]))


# A file has the format of its first row that has all the fields of one. What the numbers of a box mean follows from the
# format, never from the numbers. A reader makes the fields of a Question; an answer that needs the image's size (width,
# height) is a function of it. Sources: the data cards and the evaluation code of each benchmark.
FORMATS = (
    ("ViGoRL SFT", ("messages", "images"), read_sft),
    ("ViGoRL evaluation or search", ("conversations",), read_conversation),
    ("VisualProbe", ("problem", "solution"), partial(read_problem, answer="solution")),
    ("ViGoRL RL", ("problem", "answer"), partial(read_problem, answer="answer")),
    ("V*Bench", ("text", "label", "category"), read_vstar),
    ("RoboSpatial-Home", ("question", "answer", "img"), read_robospatial),
    ("ScreenSpot-Pro", ("img_filename", "bbox", "instruction", "ui_type"), read_screenspot_pro),
    ("ScreenSpot or ScreenSpot-V2", ("img_filename", "bbox", "instruction", "data_source"), read_screenspot),
    ("OS-Atlas", ("img_filename", "bbox", "instruction"), read_os_atlas),
    ("HR-Bench", ("question", "A", "B", "C", "D", "cycle_category"), read_hr_bench),
)


def find_format(row):
    """-> the name of a row's format, and its reader. Raises Unusable."""
    seen = set(row) if isinstance(row, dict) else set()
    for name, fields, read in FORMATS:
        if seen.issuperset(fields):
            return name, read
    known = "; ".join(f"{name} ({', '.join(fields)})" for name, fields, _ in FORMATS)
    raise Unusable(f"unknown format, its fields are {', '.join(sorted(seen)) or '(none)'}. Known are: {known}")


def make_question(read, row):
    """A row -> the fields of its Question, checked. No image is opened. Raises Unusable."""
    try:
        made = read(row)
        made.update(text=made["text"].replace("<image>", "").strip(), category=str(made.get("category") or ""))
    except KeyError as error:
        raise Unusable(f"it has no field {error}") from None
    except (AttributeError, IndexError, RecursionError, StopIteration, SyntaxError, TypeError, ValueError) as error:
        raise Unusable(f"its fields do not hold what they should ({type(error).__name__}: {error})") from None
    images = made["images"]
    if not (images and isinstance(images, list) and all(i is EMBEDDED or isinstance(i, str) and i for i in images)):
        raise Unusable("it has no image")
    if not made["text"]:
        raise Unusable("it has no question")
    made["hint"] = hint_for(made.get("kind", "string"), made["text"])
    return made


# ------------------------------------------------------------------------------------------------ data sets: a file

ROOTS = (".", "images", "../images", "..", "../..")    # where images are looked for, from the file's folder


def read_questions(path, image_root=None, n=None):
    """A file in one of the FORMATS, or a folder of .json files, -> QuestionFile. n: at most so many, spread evenly."""
    path = Path(path)
    if not path.is_dir() and path.suffix not in (".jsonl", ".json", ".tsv"):
        raise UserError(f"{path}: not a .jsonl, .json or .tsv file, nor a folder of .json files. (SAT and BLINK, which are "
                        "parquet: take the .jsonl files of the ViGoRL release.)")
    return QuestionFile(path, image_root, n)


class QuestionFile:
    """The questions of a file, each made when it is asked for.

    Of rows on lines only the offsets are kept, some 150 bytes a row; a JSON list has to be in memory as a whole. All rows
    are read once at the start, to know the unusable ones: `skipped` counts them, `first_skipped` is where and why."""

    def __init__(self, path, image_root, n):
        self.format, self.index, self.skipped, self.first_skipped = "", [], 0, ""
        for file, number, place, row in scan(path):
            try:
                if not self.format:
                    self.format, self.read = find_format(row)
                make_question(self.read, row)
                self.index.append((file, number, place))
            except Unusable as why:
                self.skipped += 1
                self.first_skipped = self.first_skipped or f"{file}:{number}: {why}"
        if not self.index:
            raise UserError(f"{path}: no usable row among {self.skipped}. {self.first_skipped or 'Is it empty?'}")
        if n and n < len(self.index):            # files are often sorted
            self.index = [self.index[i * len(self.index) // n] for i in range(n)]
        self.root = self.find_root(path if path.is_dir() else path.parent, image_root)

    def find_root(self, folder, image_root):
        """The folder that images are named from: the one given, or the first of ROOTS that has the first image."""
        file, number, place = self.index[0]
        name = make_question(self.read, fetch(file, place))["images"][0]
        roots = [Path(image_root)] if image_root else [folder / root for root in ROOTS]
        for root in roots:
            if name is EMBEDDED or (root / name).exists():
                return root
        raise UserError(f"{file}:{number}: no such image, {roots[0] / name}; "
                        "give as --image-root the folder that its path starts from")

    def __len__(self):
        return len(self.index)

    def __getitem__(self, i):
        file, number, place = self.index[i]
        row, where = fetch(file, place), f"{file}:{number}"
        made = make_question(self.read, row)
        images = [partial(embedded_image, file, place, where) if name is EMBEDDED else self.root / name
                  for name in made.pop("images")]
        if callable(made["answer"]):
            made["answer"] = made["answer"](image_size(images[0], where))
        number = number if self.index[0][0] == self.index[-1][0] else f"{file.stem}-{number}"     # of several files
        name = next((row[key] for key in ("id", "question_id", "doc_id", "index") if key in row), number)
        return Question(images=images, id=str(name), where=where, **made)


def scan(path):
    """Yields (file, number, place, row) of all rows of a file, or of the .json files in a folder or in its `annotations`.
    place: the row's offset in the file; in a JSON list, the row itself."""
    files = (sorted(path.glob("annotations/*.json")) or sorted(path.glob("*.json"))) if path.is_dir() else [path]
    for name in files:
        number = 1
        try:
            with open(name, "rb") as file:
                header = read_header(name, file)
                if file.peek(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":
                    yield from ((name, i, row, row) for i, row in enumerate(json.loads(file.read()), 1))
                while file.peek(1):
                    place = file.tell()
                    row = read_row(file, header)
                    if row is not None:
                        yield name, number, place, row
                    number += 1
        except OSError as error:
            raise UserError(f"{name}: {error.strerror}; give the path of a data file") from None
        except (ValueError, RecursionError, csv.Error) as error:
            line = number + getattr(error, "lineno", 1) - 1
            raise UserError(f"{name}:{line}: cannot be read ({getattr(error, 'msg', error)}); mend or remove it") from None


def read_header(name, file):
    """The names of the columns of a .tsv file; None for others."""
    return file.readline().decode().rstrip("\r\n").split("\t") if name.suffix == ".tsv" else None


def read_row(file, header):
    """The next row of an open file of JSON lines or, with a header, of tab-separated ones. None: a blank line."""
    if header is None:
        line = file.readline().strip()           # an error at its end is on this line, not the next
        return json.loads(line) if line else None
    csv.field_size_limit(2**31 - 1)              # a cell may be an image
    cells = next(csv.reader(iter(lambda: file.readline().decode(), ""), delimiter="\t"))    # in quotes, a row may span lines
    return dict(zip(header, cells)) if cells else None


def fetch(name, place):
    """The row at a place, see `scan`."""
    if not isinstance(place, int):
        return place
    with open(name, "rb") as file:
        header = read_header(name, file)
        file.seek(place)
        return read_row(file, header)


def embedded_image(name, place, where):
    """The image in a row, which is read again for it: no Question holds on to megabytes."""
    try:
        data = base64.b64decode(fetch(name, place)["image"])
    except ValueError:
        data = b""
    return read_image(data, where)


def image_size(path, where):
    """(width, height) in px, from the file's header."""
    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, SyntaxError, ValueError):
        return read_image(path, where).size      # says what is wrong


# ------------------------------------------------------------------------------------------------ other rules of being right

def official_rule(trace, strict):
    """Whether the answer is right by the benchmark's own rule. Only RoboSpatial-Home's differs from `strict`: of yes and no
    a prefix will do, of several points the first counts."""
    question, answer = trace.question, trace.answer or ""
    if question.category not in ("configuration", "compatibility", "context"):
        return strict
    if question.kind == "point":
        return any(in_region(trace.frames[0].to_original(point), question.answer) for point in parse_points(answer)[:1])
    return answer.strip().casefold().startswith(question.answer.casefold())


def lenient_rule(trace, strict):
    """Whether the answer is right by the public code's rule. The right text need only occur in it, blanks and punctuation
    aside: "left or right" passes for "right". (A letter stands for its option here too.) Points and actions: `strict`."""
    if trace.question.kind not in ("choice", "string"):
        return strict
    truth, said = ("".join(c for c in option_text(text, trace.question.choices) if c.isalnum())
                   for text in (trace.question.answer, trace.answer or ""))
    return truth in said if truth else strict


# ------------------------------------------------------------------------------------------------ what is kept of a trace

@dataclass
class Record:
    """What an evaluation keeps of a trace, one for each question. index: the question's number; tool: whether it could look;
    correct, official, lenient: by our own rule, the benchmark's and the public code's; hits: of the points looked at, whether
    they lie on what was asked for, and thoughts: of the thoughts after a crop, whether they are true of it, both where that is
    known; crops, distinct: looks, and different ones; ended: see `rollout.Trace`; text: the trace, to be read; seconds: its share of the time that its block took."""
    index: int
    tool: bool
    id: str
    category: str
    correct: bool
    official: bool
    lenient: bool
    format: bool
    hits: list
    thoughts: list
    crops: int
    distinct: int
    answer: str | None
    ended: str
    text: str
    seconds: float = 0.0


def record_of(index, trace, tool=True):
    """The Record of a finished trace."""
    scored, question = score(trace), trace.question
    correct = bool(scored.correct)
    return Record(index, tool, question.id, question.category, correct, bool(official_rule(trace, correct)),
                  bool(lenient_rule(trace, correct)), bool(scored.format), targets_hit(trace), true_thoughts(trace),
                  scored.zoom_calls, distinct_crops(trace.zoom_points, 10), trace.answer, trace.ended, trace.text())


def on_target(trace, point):
    """Whether a point (px as seen) lies on what the question is about; None where that is not known."""
    point, question = trace.frames[0].to_original(point), trace.question
    if question.scene:
        return question.scene.contains(point)
    return in_region(point, question.answer) if question.kind == "point" else None


def targets_hit(trace):
    """Of each point looked at, whether it lies on what the question is about; empty where that is not known."""
    hits = [on_target(trace, point) for point in trace.zoom_points]
    return [hit for hit in hits if hit is not None]


def true_thoughts(trace):
    """Of each thought of the policy's that follows a crop, whether it names what the crop shows; empty where that is not known."""
    scene = trace.question.scene
    if scene is None:
        return []
    return [scene.describes(turn.thought, before.crop) for before, turn in pairwise(trace.turns)
            if before.crop and not turn.forced]


# ------------------------------------------------------------------------------------------------ how well a policy does

# Questions that a process takes at a time: enough to keep a GPU busy, and few enough that several processes have work in a
# benchmark of some hundred questions, and that little is lost when a run is cut off.
QUESTIONS_A_BLOCK = 64


class Records:
    """The Records of an evaluation of `n` questions, in `found`; with a path, in a file too, to go on from after a break.
    The file begins with the settings, all that decides the result; then come the Records, a line each, whole blocks at a time.
    Other settings, or a file of another sort, are a UserError. Only the first process reads and writes."""

    def __init__(self, path=None, settings=None, n=0):
        self.path = path and Path(path)
        self.found = gather(self.read(settings, n) if path and rank() == 0 else [])[0]

    def read(self, settings, n):
        """What an earlier run left; lines and blocks that are not whole are dropped, from the file too."""
        settings, rows = json.loads(json.dumps(settings)), {}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = self.path.read_text(errors="replace").splitlines() if self.path.exists() else []
            begun = dict(json.loads(lines[0])) if lines else settings
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror}; give another --json FILE") from None
        except (ValueError, TypeError):
            raise UserError(f"{self.path}: no records of an evaluation; move it away, or give another --json FILE") from None
        other = [f"{k} {begun.get(k)}" for k in {**begun, **settings} if begun.get(k) != settings.get(k)]
        if other:
            raise UserError(f"{self.path} was begun with {', '.join(other)}; go on with the same, move the file away, or give "
                            "another --json FILE")
        for line in lines[1:]:
            try:
                record = Record(**json.loads(line))
                rows[record.tool, record.index // QUESTIONS_A_BLOCK, record.index] = record
            except (ValueError, TypeError):
                pass                             # it was being written when the run was cut off
        sizes = Counter(key[:2] for key in rows)
        found = [r for (tool, block, _), r in rows.items() if sizes[tool, block] == len(block_of(block, n))]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in [settings, *map(vars, found)]))
        return found

    def add(self, records):
        self.found += records
        if self.path and rank() == 0:
            with open(self.path, "a") as file:
                file.write("".join(json.dumps(vars(r)) + "\n" for r in records))


def block_of(number, n):
    """The numbers of a block's questions."""
    return range(number * QUESTIONS_A_BLOCK, min((number + 1) * QUESTIONS_A_BLOCK, n))


@dataclass
class Report:
    """What an evaluation found. ci95: bounds of the accuracy's 95 % interval (Wilson). format: share of well-formed traces.
    on_target: share of the points looked at that lie on what was asked for (a candidate; the box), and true_thoughts: share of
    the thoughts after a crop that name what it shows, both where that is known. crops: looks a trace. looks_again: share of
    traces that looked at two or more places. overlong: share that ran out of tokens or looks. minutes: of all processes and runs
    together.
    by: accuracy by category; official: by the benchmark's own rules; lenient: accuracy by the public code's rule."""
    n: int
    accuracy: float
    ci95: tuple[float, float]
    format: float
    on_target: float | None
    true_thoughts: float | None
    crops: float
    looks_again: float
    overlong: float
    minutes: float
    by: dict
    official: dict
    lenient: float


def interval(right, n, z=1.96):
    """Wilson's score interval of a share."""
    if not n:
        return 0.0, 1.0
    p, z2 = right / n, z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z2 / (4 * n))
    return (p + z2 / 2 - half) / (1 + z2), (p + z2 / 2 + half) / (1 + z2)


def evaluate(policy, questions, dialogue, seed=0, *, records=None, log=None, on_trace=None, **sampling):
    """Answers every question once, block by block. The random numbers of a question follow from the seed and its number alone,
    so that the result is the same in one go, after a break, or on several processes (which take turns; each gets the Report).

    questions: anything with a length and an index; records: to go on from, and to add to; log: called with a line now and then;
    on_trace: with each finished trace and its Record; sampling: see `model.Engine`. -> Report"""
    records, n, tool = records or Records(), len(questions), dialogue.tool
    started = told = time.time()
    done = [r for r in records.found if r.tool == tool]
    before = len(done)
    if log and before:
        log(f"{before} of {n} questions were answered before, see {records.path}")
    def tell(ready, processes=1):
        count, spent = min(n, len(done) + len(ready) * processes), time.time() - started
        log(f"{count}/{n} questions, accuracy {mean(r.correct for r in done + ready):.3f}, "
            f"{spent / (count - before) * (n - count):.0f} s left")
    left = [b for b in range(math.ceil(n / QUESTIONS_A_BLOCK)) if b not in {r.index // QUESTIONS_A_BLOCK for r in done}]
    for turn in range(0, len(left), world_size()):
        mine, begun = [], time.time()
        for block in left[turn:][rank():rank() + 1]:
            asked = {replace(questions[i]): i for i in block_of(block, n)}
            seeds = [f"evaluation {seed} {i}" for i in asked.values()]
            for trace, in rollout(policy, asked, dialogue, 1, seeds, **sampling):
                mine.append(record_of(asked[trace.question], trace, tool))
                if on_trace:
                    on_trace(trace, mine[-1])
                if log and time.time() - told > 10 and len(mine) < len(asked):
                    told = time.time()
                    tell(mine, world_size())
        for record in mine:
            record.seconds = (time.time() - begun) / len(mine)
        new = sum(gather(mine), [])
        records.add(new)
        done += new
        if log:
            tell([])
    return report(done)


def report(records):
    """Records, in any order -> Report."""
    records = sorted(records, key=lambda r: r.index)
    hits, right = [hit for r in records for hit in r.hits], [r.correct for r in records]
    thoughts = [true for r in records for true in r.thoughts]
    found = summarise([(r.category, r.official) for r in records])
    return Report(len(records), mean(right), interval(sum(right), len(right)), mean(r.format for r in records),
                  mean(hits) if hits else None, mean(thoughts) if thoughts else None, mean(r.crops for r in records),
                  mean(r.distinct > 1 for r in records), mean(r.ended in OVERLONG for r in records),
                  sum(r.seconds for r in records) / 60, found["by"], found["official"], mean(r.lenient for r in records))


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else 0.0


BLINK = ("Art_Style Counting Forensic_Detection Functional_Correspondence IQ_Test Jigsaw Multi-view_Reasoning "
         "Object_Localization Relative_Depth Relative_Reflectance Semantic_Correspondence Spatial_Relation "
         "Visual_Correspondence Visual_Similarity").split()
OFFICIAL = (    # name, the categories it is about, and: the "mean" of their accuracies, or that of their questions, "pooled"
    ("BLINK, mean of sub-tasks", BLINK, "mean"),
    ("BLINK, mean of the spatial three", ["Multi-view_Reasoning", "Relative_Depth", "Spatial_Relation"], "mean"),
    ("HR-Bench, mean of option cycles", [f"cycle {i}" for i in range(4)], "mean"),
    ("RoboSpatial-Home, yes or no", ["configuration", "compatibility"], "pooled"),    # the ViGoRL paper's 228
)


def rate(correct):
    """[1, 0, 1, 1] (or shares of right answers, a number a question) -> accuracy, 95 % interval, number of questions."""
    return {"accuracy": mean(correct), "ci95": interval(sum(correct), len(correct)), "n": len(correct)}


def summarise(results):
    """(category, correct) of each question -> accuracy, ci95 and n of all; the same `by` category and by its parts; and the
    `official` scores of these categories. V*, ScreenSpot and ScreenSpot-Pro: the accuracy of all is the official one."""
    groups, official = defaultdict(list), {}
    for category, correct in results:
        for name in {"", category, *category.split(FACET)}:
            groups[name].append(float(correct))
    total = rate(groups.pop("", []))
    for name, categories, how in OFFICIAL:
        found = [groups[category] for category in categories if category in groups]
        if len(found) > 1:
            official[name] = rate(sum(found, []))
            if how == "mean":
                official[name] = {"accuracy": mean(map(mean, found)), "n": official[name]["n"]}
    return total | {"by": {name: rate(groups[name]) for name in sorted(groups)}, "official": official}


def table(rows):
    """Lists of cells -> aligned lines, the first column to the left and the others to the right."""
    rows = [[str(c) for c in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    def line(row):
        return "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths)))
    return "\n".join(map(line, rows))


HEADS = ["", "accuracy", "95 %", "without tool", "format", "on target", "true thoughts", "looks", "looks again", "overlong"]


def cells(name, found, bare=None):
    """A row of a table under HEADS. bare: the Report without the tool, if it was evaluated too."""
    return [name, f"{found.accuracy:.3f}", "{:.3f}-{:.3f}".format(*found.ci95), f"{bare.accuracy:.3f}" if bare else "-",
            f"{found.format:.3f}", "-" if found.on_target is None else f"{found.on_target:.3f}",
            "-" if found.true_thoughts is None else f"{found.true_thoughts:.3f}", f"{found.crops:.2f}",
            f"{found.looks_again:.3f}", f"{found.overlong:.3f}"]


# ------------------------------------------------------------------------------------------------ a web agent

MAX_ELEMENTS, MAX_INTENT, MAX_ACTION = 12_000, 4_000, 300    # characters of each in a question
MAX_HISTORY = 30                                             # previous actions, the latest


def web_question(trajectory, intent, meta_data, images=None):
    """A state of VisualWebArena -> Question of kind "action", without an answer.

    trajectory: states and actions in turn, a state last: {"observation": {"image": uint8 array (height, width, 3 or 4), "text":
    the page's elements}, "info": {"page": with a url, or "url": text}}. meta_data: {"action_history": texts}. images: PIL
    images of the intent's. What is too long is cut. Raises UserError where there is no screenshot."""
    state = trajectory[-1] if trajectory else {}
    seen, info = state.get("observation") or {}, state.get("info") or {}
    screen = seen.get("image") if isinstance(seen, dict) else None
    if screen is None:
        raise UserError("the trajectory does not end with a state that has a screenshot, observation['image']; run "
                        "VisualWebArena with --observation_type image_som")
    try:
        screen = screen if isinstance(screen, Image.Image) else Image.fromarray(screen)
        if not all(screen.size):
            raise ValueError("it is empty")
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"observation['image'] is no image ({error}); give a uint8 array (height, width, 3 or 4)") from None
    images = images or []
    history = [" ".join(str(action).split())[:MAX_ACTION] for action in (meta_data or {}).get("action_history", [])]
    history = [action for action in history if action != "None"][-MAX_HISTORY:]    # how an empty history is written there
    parts = ["OBJECTIVE: " + shorten(intent, MAX_INTENT),
             "PREVIOUS ACTIONS:\n" + ("\n".join(f"{i}. {action}" for i, action in enumerate(history, 1)) or "none")]
    if url := info.get("url") or getattr(info.get("page"), "url", ""):
        parts.append("URL: " + str(url)[:MAX_ACTION])
    if elements := str(seen.get("text") or "").strip():
        parts.append("ELEMENTS:\n" + shorten(elements, MAX_ELEMENTS))
    if images:
        parts.append(f"The first image is the page; after it, {len(images)} that belong to the objective.")
    return Question("\n\n".join(parts), [image.convert("RGB") for image in (screen, *images)], "", "action",
                    hint=hint_for("action", ""))


def shorten(text, most):
    """The first lines of a text, `most` characters at most; of a longer line its beginning."""
    if len(text) <= most:
        return text
    kept = text[:most].rpartition("\n")[0] or text[:most]
    return f"{kept}\n({len(text) - len(kept):,} characters left out)"


class WebAgent:
    """A policy behind the interface of VisualWebArena's agents. An answer is parsed, never run, and handed on as text.

    policy: a Policy, or a checkpoint's path or hub id. tries: how often an action is asked for, each time with other random
    numbers, until one can be used. settings: flags that the scripts share, such as temperature=0.5; else the family "web"'s."""

    def __init__(self, policy, mode="zoom", tries=3, **settings):
        self.config, self.tries = make_config({"mode": mode, **settings}, "web", "evaluate"), tries
        path = "" if isinstance(policy, Policy) else str(policy)
        self.policy = load(path, **self.config.input_limits()) if path else policy
        self.dialogue = make_dialogue(self.config, path, self.policy)
        self.reset()

    def reset(self, test_config_file=None):
        """A new task begins: its random numbers do not depend on the tasks before."""
        self.asked = 0

    def set_action_set_tag(self, tag):
        """The tag of the action set; actions are written with the elements' numbers in any case."""
        self.action_set_tag = tag

    def next_action(self, trajectory, intent, meta_data, images=None, output_response=False):
        """See `web_question` for what comes in. -> one action, such as "click [12]"; "stop [...]", with the reason, where no
        try gave one. output_response: print the traces. Raises UserError where there is no screenshot."""
        question, sampling, why = web_question(trajectory, intent, meta_data, images), self.config.sampling(), ""
        for _ in range(self.tries):
            self.asked += 1
            seed = f"web {self.config.seed} {self.asked}"
            trace = next(rollout(self.policy, [question], self.dialogue, 1, [seed], **sampling))[0]
            if output_response:
                print(trace.text(), flush=True)
            try:
                action = parse_action(trace.answer or "")
                if action.name not in ("type", "press", "goto") or action.text.strip():
                    return str(action)
                why = f"there is nothing to {action.name}"
            except ValueError as error:
                why = str(error)
            sampling["temperature"] = sampling["temperature"] or 1.0      # the likeliest would come again
        return str(Action("stop", text=f"no usable action in {self.tries} tries: {why}"))


# ------------------------------------------------------------------------------------------------ the command line

FAMILIES = {"V*Bench": "search", "HR-Bench": "search", "VisualProbe": "search", "ScreenSpot-Pro": "gui", "OS-Atlas": "gui",
            "ScreenSpot or ScreenSpot-V2": "gui", "RoboSpatial-Home": "spatial"}


def family_of(config):
    """The family of a task: by its format, or, for the release's rows, by how the first question is answered."""
    if config.family or config.task in TOYS:
        return config.family or "drawn"
    file = open_file(config.task, config.image_root)
    first = file[0]
    by_answer = {"point": "gui", "action": "web"}.get(first.kind, "search" if first.answer in tuple(LETTERS) else "spatial")
    return FAMILIES.get(file.format, by_answer)


@lru_cache
def open_file(path, image_root, n=None):
    file = read_questions(path, image_root, n)
    print(f"{path}: {file.format}, {len(file)} questions"
          + (f"; {file.skipped} rows cannot be used, the first: {file.first_skipped}" if file.skipped else ""))
    return file


def configure(given, script):
    """The Config of a script, from the flags that were given. Raises UserError."""
    asked = Config(**given)
    if asked.task not in TOYS and not Path(asked.task).exists():
        raise UserError(f"--task {asked.task}: neither a file nor one of {', '.join(TOYS)}")
    return make_config(given, family_of(asked), script)


def questions_of(config, split, n, first=0):
    """`n` questions of the task, from number `first` on. Of a file, in an order that the seed decides, a tenth is held out as
    "test"; the others come again after the last. -> list of Questions"""
    if config.task in TOYS:
        return [TOYS[config.task](split, config.seed, index) for index in range(first, first + n)]
    file = open_file(config.task, config.image_root)
    order = shuffled(len(file), config.seed)
    held_out = max(1, len(file) // 10)
    if len(file) < 2:
        raise UserError(f"{config.task}: one question is too few to train on")
    if split == "test":
        return [file[i] for i in order[:held_out][:n]]
    mine = order[held_out:]
    return [file[mine[index % len(mine)]] for index in range(first, first + n)]


@lru_cache
def shuffled(n, seed):
    return random.Random(f"order {seed}").sample(range(n), n)


def settings_of(config, policy, dialogue, n):
    """All that decides the result of an evaluation: flags, number of questions, and the state of the files that are read."""
    def state(path):    # bytes, and when last written
        files = [p.stat() for p in ([path] if path.is_file() else path.glob("*"))]
        return [sum(f.st_size for f in files), max((f.st_mtime for f in files), default=0)]
    own = {k: v for k, v in vars(config).items() if k not in ("json", "save", "image", "question", "processes")}
    return own | {"dialogue": dialogue.to_json(), "n": n, "block": QUESTIONS_A_BLOCK, "device": policy.device.type,
                  "state of the model": state(Path(config.model)), "state of the task": state(Path(config.task))}


def main(given):
    config = configure(given, "evaluate")
    if not config.model:
        raise UserError("--model PATH is needed: a checkpoint folder, such as runs/toy-search-zoom/rl, or a hub id")
    if bool(config.image) != bool(config.question):
        raise UserError("--image and --question go together")
    if not 0 < config.top_p <= 1:
        raise UserError("--top-p must be above 0 and at most 1")
    if config.json and Path(config.json).suffix == ".jsonl":
        raise UserError(f"--json {config.json}: the answers are kept in a .jsonl beside it; give a name that ends in .json")
    policy = load(config.model, **config.input_limits())
    dialogue = make_dialogue(config, config.model, policy)
    if config.image:
        answer_one(policy, dialogue, config)
    else:
        evaluate_task(policy, dialogue, config)


def answer_one(policy, dialogue, config):
    """--image, --question: prints a trace, and draws it to --save."""
    question = Question(config.question, [config.image], "")
    trace = next(rollout(policy, [question], dialogue, 1, [config.seed], **config.sampling()))[0]
    print(trace.text())
    print(f"-> {trace.answer or 'no answer'} ({trace.ended}; {len(trace.zoom_points)} zoom calls)")
    if config.save:
        draw_trace(trace).save(config.save)


def evaluate_task(policy, dialogue, config):
    """Evaluates a task, with and without zoom calls; prints the table and writes --json."""
    if config.task in TOYS:
        questions = DrawnQuestions(config.task, "test", config.n or 512, config.seed)
    else:
        questions = open_file(config.task, config.image_root, config.n)
    print(describe_config(config, "evaluate"))
    drawn, begun = [], settings_of(config, policy, dialogue, len(questions))
    records = Records(config.json and Path(config.json).with_suffix(".jsonl"), begun, len(questions))
    def draw(trace, record):
        if config.save and record.index == 0 and not drawn:
            draw_trace(trace).save(config.save)
            drawn.append(trace)
    sampling = config.sampling()
    found, bare = evaluate(policy, questions, dialogue, config.seed, records=records, log=print, on_trace=draw, **sampling), None
    if config.mode == "zoom" and config.tool:
        bare = evaluate(policy, questions, replace(dialogue, tool=False), config.seed, records=records,
                        log=partial(print, "without tool:"), **sampling)
    print(min(records.found, key=lambda r: (not r.tool, r.index)).text, end="\n\n")
    rows = [[*HEADS, "lenient", "n"], [*cells(Path(config.task).stem, found, bare), f"{found.lenient:.3f}", found.n]]
    without = bare and bare.by | bare.official
    rows += [[f"  {name}", f"{r['accuracy']:.3f}", "", f"{without[name]['accuracy']:.3f}" if bare else "-", *[""] * 7, r["n"]]
             for name, r in {**found.by, **found.official}.items()]
    print(table(rows))
    if config.task in TOYS:
        blind = [blind_accuracy(questions, dialogue, zooms) for zooms in (0, 1, 4)]
        print("a blind player, 0 / 1 / 4 crops at random places: " + " / ".join(f"{b:.3f}" for b in blind))
    if config.save and not drawn and rank() == 0:
        print(f"{config.save}: not drawn, for the first question was answered by an earlier run; leave out --json")
    if config.json and rank() == 0:
        figures = vars(found) | ({"accuracy_no_tool": (bare or found).accuracy} if bare or not config.tool else {})
        write_text(config.json, json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    run("evaluate", "Evaluate a checkpoint on a task, or ask it one question about one image.", main)
