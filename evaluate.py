"""Benchmarks: where questions come from, and how well a policy answers them.

In:  a checkpoint and a task (a name, or a file of one of the real data sets), or one image and a
     question.
Out: accuracy with its interval, with and without the tool, the behaviours that the paper counts,
     pictures of traces.

    python evaluate.py --model runs/toy-search-zoom/rl --task toy-search
    python evaluate.py --model runs/toy-search-zoom/rl --image my.png --question "..." --save a.png

The synthetic task `toy-search` is V*Bench's idea in miniature. Of 4 to 6 coloured cards, 1 to 3 have
the colour that is asked about (the candidates), and exactly one of these bears a pattern. Which one
it is, and which pattern, cannot be known from the model input: each pattern has a mean of zero over
every block of 4x4 px, the cards' edges lie on block edges, and the policy gets the means of the
blocks. So it has to zoom into a candidate, see whether it is plain, and zoom into the next.
"""
import ast
import base64
import csv
import json
import math
import random
import re
import string
import time
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from string import ascii_uppercase as LETTERS

import numpy as np
from PIL import ExifTags, Image

from model import Policy, UserError, gather, load, rank, world_size, write_text
from reward import (USAGE, Action, distinct_crops, in_region, option_text, parse_action, score)
from rollout import (MAX_IMAGE_PIXELS, OVERLONG, Config, Question, crop_box, describe_config,
                     draw_trace, make_config, make_dialogue, parse_points, read_image, rollout, run)

# -------------------------------------------------------------------------------- synthetic scenes

BLOCK = 4                  # px of the drawing that become one px of the model input
SIDE = 256                 # px, width and height of the drawing
CELL, CARD = 64, 40        # px: the cards lie in a 4x4 grid of cells, each moved by one of JITTER
JITTER = (-12, 0, 12)      # px, in x and in y
READABLE = 12              # px of a card in a crop, in x and in y, that are enough to read its pattern
COLOURS = {"red": (190, 50, 50), "green": (50, 170, 70), "blue": (60, 80, 200),
           "yellow": (200, 190, 50), "purple": (150, 50, 180), "cyan": (60, 180, 190)}
CONTRAST = 36
ROW, COLUMN = np.mgrid[:BLOCK, :BLOCK]
PATTERNS = {               # added to a card's colour, times CONTRAST; each block sums to zero
    "plain": np.zeros((BLOCK, BLOCK)),
    "horizontal": np.where(ROW < 2, 1.0, -1.0),
    "vertical": np.where(COLUMN < 2, 1.0, -1.0),
    "checked": np.where((ROW < 2) == (COLUMN < 2), 1.0, -1.0),
    "rising": np.where((ROW + COLUMN) % 4 < 2, 1.0, -1.0),
    "falling": np.where((ROW - COLUMN) % 4 < 2, 1.0, -1.0),
    "dotted": np.where((ROW % 3 > 0) & (COLUMN % 3 > 0), 1.5, -0.5),
}
ANSWERS = tuple(pattern for pattern in PATTERNS if pattern != "plain")
NOTHING = "nothing"        # said of a crop that shows no candidate
QUESTION = ("One", " card bears a pattern. Which?")     # the colour stands between


def draw_background():
    """Red rises to the right and green downwards, in steps of a block: each patch tells its place."""
    ramp = np.round(np.linspace(-60, 60, SIDE // BLOCK)).repeat(BLOCK)
    image = np.full((SIDE, SIDE, 3), 127.0)
    image[..., 0] += ramp[None, :]
    image[..., 1] += ramp[:, None]
    return image.astype(np.uint8)


def draw_card(colour, pattern):
    tile = np.tile(PATTERNS[pattern], (CARD // BLOCK, CARD // BLOCK))
    return (np.array(COLOURS[colour]) + CONTRAST * tile[..., None]).astype(np.uint8)


BACKGROUND = draw_background()
CARDS = {(colour, pattern): draw_card(colour, pattern) for colour in COLOURS for pattern in PATTERNS}


@dataclass(frozen=True)
class Card:
    colour: str
    pattern: str
    x: int                 # centre, px of the drawing
    y: int

    @property
    def cell(self):
        """(row, column) in the grid."""
        return self.y // CELL, self.x // CELL

    def distance(self, point):
        """From the centre to a point, the larger of both axes, px."""
        return max(abs(point[0] - self.x), abs(point[1] - self.y))

    def readable_in(self, box):
        """Whether a crop shows enough of the card."""
        half = CARD // 2
        width = min(self.x + half, box[2]) - max(self.x - half, box[0])
        height = min(self.y + half, box[3]) - max(self.y - half, box[1])
        return min(width, height) >= READABLE


@dataclass(frozen=True)
class Scene:
    """What is drawn where. Points and boxes are in px of the drawing."""
    cards: tuple[Card, ...]
    colour: str            # the one asked about

    @property
    def candidates(self):
        """The cards of the colour asked about, in reading order of their cells."""
        candidates = [card for card in self.cards if card.colour == self.colour]
        return sorted(candidates, key=lambda card: card.cell)

    def draw(self):
        image = BACKGROUND.copy()
        for card in self.cards:
            top, left = card.y - CARD // 2, card.x - CARD // 2
            image[top:top + CARD, left:left + CARD] = CARDS[card.colour, card.pattern]
        return Image.fromarray(image)

    def card_at(self, point):
        """The card under a point, or None."""
        return next((card for card in self.cards if card.distance(point) <= CARD // 2), None)

    def cells(self):
        """The 16 cells of the grid in reading order: the card in each, or None."""
        cards = {card.cell: card for card in self.cards}
        return [cards.get(divmod(number, 4)) for number in range(16)]

    def contains(self, point):
        """Whether a point lies on a candidate."""
        card = self.card_at(point)
        return card is not None and card.colour == self.colour

    def shown(self, box):
        """The candidates that can be read in a crop, the most central first."""
        middle = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        readable = [card for card in self.candidates if card.readable_in(box)]
        return sorted(readable, key=lambda card: card.distance(middle))

    def face_in(self, box):
        """What is true of a crop: the pattern of the most central candidate, or "nothing"."""
        shown = self.shown(box)
        return shown[0].pattern if shown else NOTHING

    def describes(self, thought, box):
        """Whether a thought names what a crop shows, and no other pattern."""
        words = set(re.findall(r"\w+", thought.lower()))
        return words & {*PATTERNS, NOTHING} == {self.face_in(box)}


def place_cards(rng, faces):
    """(colour, pattern) pairs -> Cards in different cells of the grid."""
    cards = []
    for (colour, pattern), cell in zip(faces, rng.sample(range(16), len(faces)), strict=True):
        x = cell % 4 * CELL + CELL // 2 + rng.choice(JITTER)
        y = cell // 4 * CELL + CELL // 2 + rng.choice(JITTER)
        cards.append(Card(colour, pattern, x, y))
    return tuple(cards)


def search_scene(rng, colour=None, candidates=None):
    """4 to 6 cards, the first of which bears the pattern; 1, 2 or 3 of them (in one, two and three
    cases of six) are candidates."""
    colour = colour or rng.choice(list(COLOURS))
    candidates = candidates or rng.choice((1, 2, 2, 3, 3, 3))
    faces = [(colour, rng.choice(ANSWERS))] + [(colour, "plain")] * (candidates - 1)
    others = [other for other in COLOURS if other != colour]
    for _ in range(rng.randint(4, 6) - candidates):
        faces.append((rng.choice(others), rng.choice(list(PATTERNS))))
    return Scene(place_cards(rng, faces), colour)


def toy_search(split, seed, index):
    """Question number `index` of a split ("train", "validation", "test"); each (split, seed, index)
    has random numbers of its own."""
    scene = search_scene(random.Random(f"toy-search {split} {seed} {index}"))
    return Question(f"{QUESTION[0]} {scene.colour}{QUESTION[1]}", [scene.draw],
                    scene.cards[0].pattern, id=f"{split}-{seed}-{index}",
                    category=str(len(scene.candidates)), scene=scene)


TOYS = {"toy-search": toy_search}


def random_zoom_accuracy(questions, dialogue, zoom_calls, seed=0):
    """The random-zoom baseline: the accuracy of a player who zooms at random points, knows the answer
    where a crop shows it, and else guesses one of ANSWERS."""
    rng, right = random.Random(seed), 0.0
    for question in questions:
        points = [(rng.randrange(SIDE), rng.randrange(SIDE)) for _ in range(zoom_calls)]
        boxes = [crop_box((SIDE, SIDE), point, dialogue.crop_half) for point in points]
        shown = any(question.scene.cards[0].readable_in(box) for box in boxes)
        right += 1 if shown else 1 / len(ANSWERS)
    return right / len(questions)


# ----------------------------------------------------------------- data sets: how a row is answered

OPTIONS = (re.compile(r"\(([A-Z])\)\s*(.*?)(?=\s*\([A-Z]\)|\n|$)"),    # (A) red (B) blue
           re.compile(r"^\s*([A-Z])[.)][^\S\n]+(.+)$", re.M))           # A. red: a line each
BOX = re.compile(r"[(\[]\s*\d+(?:\s*,\s*\d+){3}\s*[)\]]")
NUMBERS = re.compile(r"[(\[]+\s*-?[\d.]+(?:[\s,()\[\]]+-?[\d.]+)+\s*[)\]]+")
ACTION = re.compile(rf"({'|'.join(USAGE)})\s*\[.*\]|(new|close)_tab|go_(back|forward)", re.S)
# What an answer of a kind shall look like, for rows that do not say it ("Description: the search
# button"), and how to know the rows that do. The actions are always listed: a web page that is
# quoted in the question must not be able to suppress that.
HINTS = {
    "point": (r"\(x,\s*y\)|\[x,\s*y\]|<answer>", "The answer is one point (x, y), in pixels of the "
              "image, between <answer> and </answer>."),
    "choice": (r"<answer>|\b(answer|respond|reply)\b[^.:\n]{0,40}\b(letter|text|option)",
               "The answer is the letter or the text of one of the options."),
    "action": ("(?!)", "The answer is one of these actions, with numbers and words that fit: "
               f"{', '.join(USAGE.values())}."),
    "string": ("", ""),
}


class Unusable(Exception):
    """Why a row cannot be asked or scored."""


def hint_for(kind, text):
    """What an answer of a kind shall look like, or "" where the question's text says so itself."""
    said, hint = HINTS[kind]
    return "" if re.search(said, text, re.I) else hint


def parse_options(text):
    """The options' texts in the order of their letters: "Which?\\nA. left\\nB. No" -> ("left", "No").

    A text without options has none, ()."""
    text = text.rpartition("Answer Choices:")[2]
    for pattern in OPTIONS:
        options = pattern.findall(text)
        letters = "".join(letter for letter, _ in options)
        start = letters.rfind("A")       # of a list of options that a preamble may name, too
        if 0 <= start < len(letters) - 1 and LETTERS.startswith(letters[start:]):
            return tuple(option.strip() for _, option in options[start:])
    return ()


def as_box(values, limit=10**6):
    """Corners (x1, y1, x2, y2), checked. limit: 1 for shares of the image's sides."""
    numbers = len(values) == 4 and all(type(value) in (int, float) for value in values)
    if not numbers or not (0 <= values[0] <= values[2] <= limit
                           and 0 <= values[1] <= values[3] <= limit):
        unit = "[0, 1]" if limit == 1 else "px"
        raise Unusable(f"{list(values)} are not the corners of a box in {unit}")
    return tuple(values)


def scored_by(text, answer, label=False):
    """How the answer to a question is scored: the `kind`, `answer` and `choices` of a Question.

    Four whole numbers are a box that a point has to hit, a web action is an action. The letter or
    the text of one of the question's options is a choice, and is kept as it is written; where
    `label` is set, a letter is never an option's text. All else ("yes", too) is a string."""
    answer = str(answer).strip() if type(answer) in (str, int, float) else ""
    if not answer:
        raise Unusable("it has no answer in words")
    if BOX.fullmatch(answer):
        corners = [int(number) for number in re.findall(r"\d+", answer)]
        return {"kind": "point", "answer": as_box(corners)}
    if NUMBERS.fullmatch(answer):
        raise Unusable(f"its answer, {answer}, is neither in words nor a box (x1, y1, x2, y2) in "
                       "whole px")
    if ACTION.fullmatch(answer):
        parse_action(answer)
        return {"kind": "action", "answer": answer}
    choices = parse_options(text)
    texts = [choice.casefold().rstrip(".") for choice in choices]
    letter = re.fullmatch(r"\(?([A-Z])[.)]?", answer)
    if answer.casefold().rstrip(".") in texts and not (label and letter):
        index = texts.index(answer.casefold().rstrip("."))
    elif choices and letter:
        index = LETTERS.index(letter[1])
        if index >= len(choices):
            raise Unusable(f"its answer, {answer}, is none of its {len(choices)} options")
    else:
        return {"kind": "string", "answer": answer}
    answer = LETTERS[index] if letter else choices[index]
    return {"kind": "choice", "answer": answer, "choices": choices}


# ------------------------------------------------------------------------------- data sets: formats

# A reader makes a Question of a row. The names of images are still those of the row. An answer that
# needs the image's size is a function of it. Sources: the data cards and the evaluation code of each.

FACET = " | "    # between the parts of a category, "mobile | text": scores are given by each part
PLATFORMS = {"ios": "mobile", "android": "mobile", "windows": "desktop", "macos": "desktop"}
ASKS_FOR_SHARES = re.compile(r"\s*Your answer should be formatted as a list of tuples.*", re.S)
# of BLINK in a row's id, of V*Bench in its image's folder
CATEGORY = re.compile(r"^(?:val|test)_(\S+)_\d+ |(direct_attributes|relative_position)")


def read_conversation(row):
    """ViGoRL, evaluation and search: the first thing said is the question, then comes the answer."""
    turns = row["conversations"]
    said = turns["value"] if isinstance(turns, dict) else [turn["value"] for turn in turns]
    if isinstance(said[0], list):
        said = said[0]
    text, answer = said[:2]
    images = row.get("image")
    if isinstance(images, str):
        images = [images]
    found = CATEGORY.search(f"{row.get('id')} {images}")
    category = (found[1] or found[2]) if found else ""
    return Question(text, images, category=category, **scored_by(text, answer))


def read_sft(row):
    """ViGoRL, SFT: the user's first turn is the question. Later images are crops of the trace."""
    text = next(turn["content"] for turn in row["messages"] if turn["role"] in ("user", "human"))
    images = row["images"][:max(1, text.count("<image>"))]
    return Question(text, images, **scored_by(text, row["gt_answer"]))


def read_problem(row, answer):
    text = row["problem"]
    return Question(text, row["images"], category=row.get("data_source"),
                    **scored_by(text, row[answer]))


def read_vstar(row):
    return Question(row["text"], [row["image"]], category=row["category"],
                    **scored_by(row["text"], row["label"], label=True))


def read_robospatial(row):
    """Yes or no; in the category "context" a polygon in [0, 1], and a question that asks for points
    in [0, 1], too: that sentence is left out, for points are in px here."""
    text, answer = ASKS_FOR_SHARES.sub("", row["question"]), row["answer"]
    if answer[:1] not in ("[", "("):
        return Question(text, [row["img"]], category=row["category"], **scored_by(text, answer))
    corners = ast.literal_eval(answer)
    if len(corners) < 3 or not all(0 <= x <= 1 and 0 <= y <= 1 for x, y in corners):
        raise Unusable("its answer is no polygon in [0, 1]")

    def polygon(size):
        return tuple((x * size[0], y * size[1]) for x, y in corners)
    return Question(text, [row["img"]], polygon, "point", category=row["category"])


def read_element(row, answer, *category):
    """An element of a screen, asked for in the words of ViGoRL's own rows."""
    return Question(f"Description: {row['instruction']}", [row["img_filename"]], answer, "point",
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
    x1, y1, x2, y2 = as_box(row["bbox"], limit=1)

    def box(size):
        return x1 * size[0], y1 * size[1], x2 * size[0], y2 * size[1]
    return read_element(row, box)


def read_hr_bench(row):
    """The image is in the row, in base64; it is decoded when it is needed."""
    choices = tuple(row[letter] for letter in "ABCD")
    if row["answer"] not in ("A", "B", "C", "D"):
        raise Unusable(f"its answer, {row['answer']}, is none of its 4 options")
    options = [f"({letter}) {choice}" for letter, choice in zip("ABCD", choices, strict=True)]
    images = [partial(embedded_image, row["image"])] if row["image"] else []
    return Question("\n".join([row["question"], *options]), images, row["answer"], "choice", choices,
                    category=f"{row['category']}{FACET}cycle {row['cycle_category']}")


def embedded_image(text, where):
    try:
        data = base64.b64decode(text)
    except ValueError:
        data = b""
    return read_image(data, where)


# A file has the format of its first row that has all the fields of one. The format says what the
# numbers of a box mean, never the numbers. family: of the settings; none: it depends on the answers.
FORMATS = (    # name, family, fields, reader
    ("ViGoRL SFT", "", ("messages", "images"), read_sft),
    ("ViGoRL evaluation or search", "", ("conversations",), read_conversation),
    ("VisualProbe", "search", ("problem", "solution"), partial(read_problem, answer="solution")),
    ("ViGoRL RL", "", ("problem", "answer"), partial(read_problem, answer="answer")),
    ("V*Bench", "search", ("text", "label", "category"), read_vstar),
    ("RoboSpatial-Home", "spatial", ("question", "answer", "img"), read_robospatial),
    ("ScreenSpot-Pro", "gui", ("img_filename", "bbox", "instruction", "ui_type"),
     read_screenspot_pro),
    ("ScreenSpot or ScreenSpot-V2", "gui", ("img_filename", "bbox", "instruction", "data_source"),
     read_screenspot),
    ("OS-Atlas", "gui", ("img_filename", "bbox", "instruction"), read_os_atlas),
    ("HR-Bench", "search", ("question", "A", "B", "C", "D", "cycle_category"), read_hr_bench),
)


def find_format(row):
    """The line of FORMATS for a row. Raises Unusable."""
    names = set(row) if isinstance(row, dict) else set()
    for line in FORMATS:
        if names.issuperset(line[2]):
            return line
    known = "; ".join(f"{name} ({', '.join(fields)})" for name, _, fields, _ in FORMATS)
    seen = ", ".join(sorted(map(str, names))) or "(none)"
    raise Unusable(f"unknown format, its fields are {seen}. Known are: {known}")


def make_question(read, row, number, where):
    """A row -> its Question, checked. No image is opened. Raises Unusable."""
    try:
        question = read(row)
        question.text = question.text.replace("<image>", "").strip()
    except KeyError as error:
        raise Unusable(f"it has no field {error}") from None
    except (AttributeError, IndexError, RecursionError, StopIteration, SyntaxError, TypeError,
            ValueError) as error:
        raise Unusable("its fields do not hold what they should "
                       f"({type(error).__name__}: {error})") from None
    images = question.images
    if not isinstance(images, list) or not images or not all(
            callable(image) or isinstance(image, str) and image for image in images):
        raise Unusable("it has no image")
    if not question.text:
        raise Unusable("it has no question")
    names = [row[key] for key in ("id", "question_id", "doc_id", "index") if key in row]
    question.id, question.where = str([*names, number][0]), where
    question.category = str(question.category or "")
    question.hint = hint_for(question.kind, question.text)
    return question


# --------------------------------------------------------------------------------- data sets: files

ROOTS = (".", "images", "../images", "..", "../..")    # of images, from the file's folder


@dataclass
class QuestionFile:
    """The questions of a file, in memory; their images are read when they are needed."""
    format: str
    family: str            # or "", see FORMATS
    questions: list
    skipped: list          # where and why, for each row that cannot be used

    def __len__(self):
        return len(self.questions)

    def __getitem__(self, index):
        question = self.questions[index]
        answer = question.answer
        if callable(answer):
            answer = answer(image_size(question.images[0], question.where))
        return replace(question, answer=answer)

    def part(self, n):
        """`n` questions at most, spread evenly, for files are often sorted."""
        total = len(self)
        if n >= total:
            return self
        return replace(self, questions=[self.questions[i * total // n] for i in range(n)])


def read_questions(path, image_root=""):
    """A file in one of the FORMATS, or a folder of .json files, -> QuestionFile. Raises UserError."""
    path = Path(path)
    if not path.is_dir() and path.suffix not in (".jsonl", ".json", ".tsv"):
        raise UserError(f"{path}: not a .jsonl, .json or .tsv file, nor a folder of .json files. (SAT "
                        "and BLINK, which are parquet: take the .jsonl files of the ViGoRL release.)")
    files = [path]
    if path.is_dir():
        files = sorted(path.glob("annotations/*.json")) or sorted(path.glob("*.json"))
    name, family, read, questions, skipped = "", "", None, [], []
    for file in files:
        prefix = f"{file.stem}-" if len(files) > 1 else ""
        for number, row in read_rows(file):
            where = f"{file}:{number}"
            try:
                if read is None:
                    name, family, _, read = find_format(row)
                questions.append(make_question(read, row, f"{prefix}{number}", where))
            except Unusable as why:
                skipped.append(f"{where}: {why}")
    if not questions:
        why = skipped[0] if skipped else "Is it empty?"
        raise UserError(f"{path}: no usable row among {len(skipped)}. {why}")
    folder = path if path.is_dir() else path.parent
    root = find_root(questions[0], folder, image_root)
    for question in questions:
        where = question.where
        question.images = [partial(image, where=where) if callable(image) else root / image
                           for image in question.images]
    return QuestionFile(name, family, questions, skipped)


def read_rows(path):
    """Yields (number, row) of JSON lines, of a JSON list, or of tab-separated lines with a header."""
    number = 1
    try:
        if path.suffix == ".tsv":
            csv.field_size_limit(2**31 - 1)            # a cell may be an image
            with open(path, encoding="utf-8-sig", newline="") as file:
                for number, row in enumerate(csv.DictReader(file, delimiter="\t"), 1):
                    yield number, row
            return
        text = path.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            yield from enumerate(json.loads(text), 1)
            return
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield number, json.loads(line)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the path of a data file") from None
    except (ValueError, RecursionError, csv.Error) as error:
        line = number + getattr(error, "lineno", 1) - 1
        raise UserError(f"{path}:{line}: cannot be read ({getattr(error, 'msg', error)}); repair or "
                        "remove it") from None


def find_root(question, folder, image_root):
    """The folder that images are named from: the one given, or the first of ROOTS that has the
    question's image."""
    name = question.images[0]
    roots = [Path(image_root)] if image_root else [folder / root for root in ROOTS]
    for root in roots:
        if callable(name) or (root / name).exists():
            return root
    raise UserError(f"{question.where}: no such image, {roots[0] / name}; give as --image-root the "
                    "folder that its path starts from")


def image_size(path, where):
    """(width, height) in px of an image as `read_image` turns it; of most, only the header is read."""
    try:
        with Image.open(path) as image:
            if image.width * image.height <= MAX_IMAGE_PIXELS:
                turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
                return image.size[::-1] if turned else image.size
    except (OSError, SyntaxError, ValueError):
        pass
    return read_image(path, where).size                # says what is wrong


@lru_cache
def open_file(path, image_root="", n=None):
    """The QuestionFile at a path, read once. n: questions at most."""
    if n:
        return open_file(path, image_root).part(n)
    file = read_questions(path, image_root)
    skipped = ""
    if file.skipped:
        skipped = f"; {len(file.skipped)} rows cannot be used, the first: {file.skipped[0]}"
    print(f"{path}: {file.format}, {len(file)} questions{skipped}")
    return file


def questions_of(config, split, n, first=0):
    """`n` questions of the task, from number `first` on. -> list of Questions

    Of a file, in an order that the seed decides, a tenth is held out as the split "test"; the others
    come again after the last."""
    if config.task in TOYS:
        return [TOYS[config.task](split, config.seed, index) for index in range(first, first + n)]
    file = open_file(config.task, config.image_root)
    if len(file) < 2:
        raise UserError(f"{config.task}: one question is too few to train on; give a larger file")
    order, held_out = shuffled(len(file), config.seed), max(1, len(file) // 10)
    if split == "test":
        return [file[number] for number in order[:held_out][:n]]
    rest = order[held_out:]
    return [file[rest[index % len(rest)]] for index in range(first, first + n)]


@lru_cache
def shuffled(n, seed):
    return random.Random(f"order {seed}").sample(range(n), n)


# -------------------------------------------------------------------------------------- evaluation

# Questions that a process takes at a time: enough to keep a GPU busy; and few, so that several
# processes have work in a benchmark of some hundred questions, and that a killed run loses little.
QUESTIONS_A_BLOCK = 64


@dataclass
class Record:
    """What an evaluation keeps of a trace.

    index: the question's number. tool: whether there were zoom calls. correct: by our own rule;
    official: by that of the public code. hits: of each zoom call, whether its point lies on what was
    asked for; thoughts: of each thought behind a crop, whether it is true of it; both empty where
    that is not known. crops: zoom calls answered; distinct: those at different places. vote: the
    normalised answer. ended: see `rollout.Trace`. seconds: the trace's share of its block's time."""
    index: int
    tool: bool
    id: str
    category: str
    correct: bool
    official: bool
    format: bool
    hits: list
    thoughts: list
    crops: int
    distinct: int
    behaviours: dict
    answer: str | None
    vote: str
    ended: str
    text: str
    seconds: float = 0.0


def record_of(index, trace, tool=True):
    """The Record of a finished trace."""
    scored, question = score(trace), trace.question
    correct = bool(scored.correct)
    return Record(
        index, tool, question.id, question.category, correct, official_rule(trace, correct),
        bool(scored.format), targets_hit(trace), true_thoughts(trace), scored.zoom_calls,
        distinct_crops(trace.zoom_points, REGION_RADIUS), behaviours(trace), trace.answer,
        option_text(trace.answer or "", question.choices), trace.ended, trace.text())


def targets_hit(trace):
    """Of each zoom call that was answered, whether its point lies on what the question is about (a
    candidate; the box); empty where that is not known."""
    question = trace.question
    points = [trace.frames[0].to_original(point) for point in trace.zoom_points]
    if question.scene:
        return [question.scene.contains(point) for point in points]
    if question.kind == "point":
        return [in_region(point, question.answer) for point in points]
    return []


def true_thoughts(trace):
    """Of each thought of the policy's own behind a crop, whether it says what the crop shows; empty
    where that is not known."""
    scene = trace.question.scene
    if not scene:
        return []
    return [scene.describes(turn.thought, before.crop)
            for before, turn in pairwise(trace.turns) if before.crop and not turn.forced]


def evaluate(policy, questions, dialogue, seed=0, *, samples=1, answered=(), path=None, log=None,
             **sampling):
    """Answers every question `samples` times. -> Report, on every process

    Processes take turns at blocks of questions. The random numbers of a question follow from the
    seed and its number alone, so neither breaks nor the number of processes change the result.

    questions: anything with a length and an index. answered: what `read_records` found. path: file
    that new Records are added to, a line a question. log: called with a line a round of blocks.
    sampling: see `model.Engine`."""
    done = [records for records in answered if records[0].tool == dialogue.tool]
    earlier = {records[0].index for records in done}
    left = [number for number in range(len(questions)) if number not in earlier]
    blocks = [left[i:i + QUESTIONS_A_BLOCK] for i in range(0, len(left), QUESTIONS_A_BLOCK)]
    blocks += [[]] * (-len(blocks) % world_size())         # as many for each process
    if log and earlier:
        log(f"{len(earlier)} of {len(questions)} questions were answered before")
    started = time.time()
    for block in blocks[rank()::world_size()]:
        mine = answer_block(policy, questions, block, dialogue, seed, samples, **sampling)
        new = [records for share in gather(mine) for records in share]
        if path and rank() == 0:
            lines = [json.dumps([vars(record) for record in records]) for records in new]
            with open(path, "a") as file:
                file.write("\n".join([*lines, ""]))
        done += new
        if log:
            speed = (len(done) - len(earlier)) / (time.time() - started)
            log(f"{len(done)}/{len(questions)} questions, "
                f"accuracy {mean(record.correct for records in done for record in records):.3f}, "
                f"{(len(questions) - len(done)) / speed:.0f} s left")
    return report(done)


def answer_block(policy, questions, block, dialogue, seed, samples, **sampling):
    """Answers the questions with the numbers in `block`. -> for each, the Records of its samples"""
    started, answered = time.time(), []
    asked = [questions[number] for number in block]
    seeds = [f"evaluation {seed} {number}" for number in block]
    for traces in rollout(policy, asked, dialogue, samples, seeds, **sampling):
        index = block[asked.index(traces[0].question)]
        answered.append([record_of(index, trace, dialogue.tool) for trace in traces])
    for records in answered:
        for record in records:
            record.seconds = (time.time() - started) / len(block) / samples
    return answered


def read_records(path, settings):
    """What an earlier run left in a file: for each question answered, the Records of its samples.

    The file is made if it is not there. Its first line holds the settings, all that decides the
    result: where they differ, it is a UserError. A last line that is not complete is dropped. Only
    the first process reads and writes."""
    if rank():
        return gather(None)[0]
    settings = json.loads(json.dumps(settings))
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(settings) + "\n")
        first, *lines, _ = path.read_text().split("\n")
        earlier = dict(json.loads(first))
        answered = [[Record(**row) for row in json.loads(line)] for line in lines]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give another --json FILE") from None
    except (ValueError, TypeError):
        raise UserError(f"{path}: no answers of an evaluation; move it away, or give another --json "
                        "FILE") from None
    other = [f"{name} {earlier.get(name)}" for name in {**earlier, **settings}
             if earlier.get(name) != settings.get(name)]
    if other:
        raise UserError(f"{path} has answers with {', '.join(other)}; go on with the same settings, "
                        "move it away, or give another --json FILE")
    write_text(path, "\n".join([first, *lines, ""]))
    return gather(answered)[0]


# ---------------------------------------------------------------------- report and rules of scoring

ROBOSPATIAL = ("configuration", "compatibility", "context")     # categories of RoboSpatial-Home
PUNCTUATION = str.maketrans("", "", string.punctuation + " ")


def official_rule(trace, correct):
    """Whether the answer is right by the public code's rule, where it differs from ours (`correct`).

    RoboSpatial-Home's own: a prefix will do for yes or no, and the first of several points counts.
    Answers in words, ViGoRL's evaluation: without punctuation, blanks and capitals, the true answer
    is a part of the answer. So "left or right" is right for "right", and "(B) red" for "B"."""
    question, answer = trace.question, trace.answer or ""
    if question.kind == "point" and question.category in ROBOSPATIAL:
        points = [trace.frames[0].to_original(point) for point in parse_points(answer)[:1]]
        return any(in_region(point, question.answer) for point in points)
    if question.kind not in ("choice", "string"):
        return correct
    if question.category in ROBOSPATIAL:
        return answer.strip().casefold().startswith(question.answer.casefold())
    truth, said = (text.translate(PUNCTUATION).strip().lower() for text in (question.answer, answer))
    return truth in said


# The behaviours that the paper counts in traces, there by GPT-4o, here by rules. Of `regions`, points
# are counted, in thoughts and zoom calls, but once within REGION_RADIUS; of the others, sentences
# with such a phrase. Going back to a region after another one is a verification, too.
REGION_RADIUS = 10    # px of the model input
PHRASES = {
    "subgoals": "first|next|then|let me|let's|need to|I will|I'll",
    "verifications": "check|checking|verify|confirm|confirms|make sure|indeed",
    "backtracks": "not it|not here|wait|instead|actually|on second thought|at first",
}


def behaviours(trace):
    """How often each behaviour occurs in a trace, of one turn or several. -> {name: count}"""
    points = [point for turn in trace.turns for point in (*turn.points, turn.call)]
    regions, returns, last = [], 0, None
    for point in points:
        if point is None or not trace.in_image(point):
            continue
        near = [region for region in regions if math.dist(region, point) < REGION_RADIUS]
        if not near:
            regions.append(point)
        elif near[0] != last:
            returns += 1
        last = near[0] if near else point
    text = " ".join(turn.thought for turn in trace.turns)
    counts = {"regions": len(regions)}
    for name, phrases in PHRASES.items():
        pattern = re.compile(rf"\b({phrases})\b", re.I)
        counts[name] = sum(bool(pattern.search(sentence)) for sentence in re.split("[.!?]", text))
    counts["verifications"] += returns
    return counts


@dataclass
class Report:
    """The figures of an evaluation.

    accuracy: share of right answers; ci95: bounds of its 95 % interval; majority: accuracy of the
    answer that most samples of a question give. official: accuracy by the public code's rule; by: by
    category; benchmarks: scores as the benchmarks define them. format: share of well-formed traces.
    on_target: share of zoom calls at what was asked for; true_thoughts: share of the thoughts behind
    a crop that say what it shows; None where that is not known. crops: zoom calls a trace.
    several_crops: share of traces with crops of different places. overlong: share out of tokens or
    zoom calls. behaviours: means a trace. minutes: of all processes and runs together."""
    n: int
    accuracy: float
    ci95: tuple[float, float]
    majority: float
    official: float
    format: float
    on_target: float | None
    true_thoughts: float | None
    crops: float
    several_crops: float
    overlong: float
    behaviours: dict
    minutes: float
    by: dict
    benchmarks: dict


def mean(values, empty=0.0):
    values = list(values)
    return sum(values) / len(values) if values else empty


def interval(shares, z=1.96):
    """95 % interval of the mean of some questions' shares of right samples.

    A question's samples are one cluster: the interval is the normal approximation over questions.
    Where each share is 0 or 1 (one sample, for instance) it is Wilson's."""
    n = len(shares)
    if not n:
        return 0.0, 1.0
    p = mean(shares)
    if set(shares) <= {0, 1}:
        centre, shrink = p + z * z / (2 * n), 1 + z * z / n
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (centre - half) / shrink, (centre + half) / shrink
    half = z * math.sqrt(sum((share - p)**2 for share in shares) / max(1, n - 1) / n)
    return max(0.0, p - half), min(1.0, p + half)


def majority_right(records):
    """Whether the answer that most of a question's samples give is right; of equals, the first."""
    votes = [record.vote for record in records if record.vote]
    winner = max(votes, key=votes.count, default=None)
    return any(record.correct for record in records if record.vote == winner)


def report(answered):
    """For each question, the Records of its samples -> Report."""
    answered = sorted(answered, key=lambda records: records[0].index)
    records = [record for group in answered for record in group]
    shares = [mean(record.correct for record in group) for group in answered]
    by, benchmarks = summarise((group[0].category, mean(map(benchmark_right, group)))
                               for group in answered)
    return Report(
        n=len(answered),
        accuracy=mean(shares),
        ci95=interval(shares),
        majority=mean(majority_right(group) for group in answered),
        official=mean(record.official for record in records),
        format=mean(record.format for record in records),
        on_target=mean((hit for record in records for hit in record.hits), None),
        true_thoughts=mean((true for record in records for true in record.thoughts), None),
        crops=mean(record.crops for record in records),
        several_crops=mean(record.distinct > 1 for record in records),
        overlong=mean(record.ended in OVERLONG for record in records),
        behaviours={name: mean(record.behaviours[name] for record in records)
                    for name in ("regions", *PHRASES)},
        minutes=sum(record.seconds for record in records) / 60,
        by=by,
        benchmarks=benchmarks)


def benchmark_right(record):
    """Whether a trace is right by the rule of its benchmark; RoboSpatial-Home's alone is not ours."""
    return record.official if record.category in ROBOSPATIAL else record.correct


BLINK = ("Art_Style Counting Forensic_Detection Functional_Correspondence IQ_Test Jigsaw "
         "Multi-view_Reasoning Object_Localization Relative_Depth Relative_Reflectance "
         "Semantic_Correspondence Spatial_Relation Visual_Correspondence Visual_Similarity").split()
BENCHMARKS = (    # name, categories, and whether their questions are pooled or their accuracies averaged
    ("BLINK, mean of sub-tasks", BLINK, "mean"),
    ("BLINK, mean of the spatial three",
     ("Multi-view_Reasoning", "Relative_Depth", "Spatial_Relation"), "mean"),
    ("HR-Bench, mean of option cycles", ("cycle 0", "cycle 1", "cycle 2", "cycle 3"), "mean"),
    ("RoboSpatial-Home, yes or no", ("configuration", "compatibility"), "pooled"),
)


def summarise(results):
    """(category, share of right samples) of each question -> the figures by category and by its
    parts, and the scores of BENCHMARKS whose categories are among them; each {name: {accuracy, n}}.

    The scores of V*Bench, ScreenSpot and ScreenSpot-Pro are the accuracy over all questions."""
    groups = {}
    for category, share in results:
        for name in {category, *category.split(FACET)} - {""}:
            groups.setdefault(name, []).append(share)
    by = {name: {"accuracy": mean(shares), "n": len(shares)} for name, shares in sorted(groups.items())}
    benchmarks = {}
    for name, categories, how in BENCHMARKS:
        present = [groups[category] for category in categories if category in groups]
        if len(present) < 2:
            continue
        pooled = [share for shares in present for share in shares]
        accuracy = mean(pooled) if how == "pooled" else mean(map(mean, present))
        benchmarks[name] = {"accuracy": accuracy, "n": len(pooled)}
    return by, benchmarks


HEADS = ["", "accuracy", "95 %", "without tool", "format", "on target", "true thoughts",
         "zoom calls", "several crops", "overlong"]


def cells(name, figures, no_tool=None):
    """A row of a table under HEADS, of one or two Reports: with, and if it was evaluated without, the
    tool."""
    low, high = figures.ci95
    shares = [no_tool and no_tool.accuracy, figures.format, figures.on_target, figures.true_thoughts]
    return [name, f"{figures.accuracy:.3f}", f"{low:.3f}-{high:.3f}",
            *("-" if share is None else f"{share:.3f}" for share in shares),
            f"{figures.crops:.2f}", f"{figures.several_crops:.3f}", f"{figures.overlong:.3f}"]


def table(rows):
    """Lists of cells -> aligned lines, the first column to the left and the others to the right."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        line = first.ljust(widths[0])
        for cell, width in zip(others, widths[1:], strict=True):
            line += "  " + str(cell).rjust(width)
        lines.append(line)
    return "\n".join(lines)


# --------------------------------------------------------------------------------------- a web agent

MAX_ELEMENTS, MAX_INTENT, MAX_ACTION = 12_000, 4_000, 300    # characters of each in a question
MAX_HISTORY = 30                                             # previous actions, the latest


def web_question(trajectory, intent, meta_data, images=None):
    """A state of VisualWebArena -> Question of kind "action", without an answer.

    trajectory: states and actions in turn, a state last: {"observation": {"image": uint8 array
    (height, width, 3 or 4) or PIL image, "text": the page's elements}, "info": {"page": with a url,
    or "url": text}}. meta_data: {"action_history": texts}. images: PIL images of the intent's. What
    is too long is shortened. Raises UserError where there is no screenshot."""
    state = trajectory[-1] if trajectory else {}
    observation, info = state.get("observation"), state.get("info") or {}
    if not isinstance(observation, dict) or observation.get("image") is None:
        raise UserError("the trajectory does not end with a state that has a screenshot, "
                        "observation['image']; run VisualWebArena with --observation_type image_som")
    history = [" ".join(str(action).split())[:MAX_ACTION]
               for action in (meta_data or {}).get("action_history", [])]
    history = [action for action in history if action != "None"]    # an empty history has a "None"
    lines = [f"{i}. {action}" for i, action in enumerate(history[-MAX_HISTORY:], 1)]
    parts = [f"OBJECTIVE: {shorten(intent, MAX_INTENT)}",
             "PREVIOUS ACTIONS:\n" + ("\n".join(lines) or "none")]
    url = info.get("url") or getattr(info.get("page"), "url", "")
    if url:
        parts.append(f"URL: {url}"[:MAX_ACTION])
    elements = str(observation.get("text") or "").strip()
    if elements:
        parts.append(f"ELEMENTS:\n{shorten(elements, MAX_ELEMENTS)}")
    if images:
        parts.append(f"The first image is the page; {len(images)} more belong to the objective.")
    pictures = [as_image(observation["image"]), *(images or [])]
    return Question("\n\n".join(parts), [picture.convert("RGB") for picture in pictures], "", "action",
                    hint=hint_for("action", ""))


def as_image(screen):
    try:
        image = screen if isinstance(screen, Image.Image) else Image.fromarray(screen)
        if not all(image.size):
            raise ValueError("it is empty")
        return image
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"observation['image'] is no image ({error}); give a uint8 array (height, "
                        "width, 3 or 4)") from None


def shorten(text, most):
    """The first lines of a text, `most` characters at most; of a longer line its beginning."""
    if len(text) <= most:
        return text
    kept = text[:most].rpartition("\n")[0] or text[:most]
    return f"{kept}\n({len(text) - len(kept):,} characters left out)"


class WebAgent:
    """A policy behind the interface of VisualWebArena's agents. An answer is parsed, never run, and
    handed on as text.

    policy: a Policy, or a checkpoint's path or hub id. tries: how often an action is asked for, each
    time with other random numbers, until one can be used. settings: flags that the scripts share,
    such as temperature=0.5; the others are those of the family "web"."""

    def __init__(self, policy, mode="zoom", tries=3, **settings):
        self.config = make_config({"mode": mode, **settings}, "web", "evaluate")
        checkpoint = "" if isinstance(policy, Policy) else str(policy)
        if checkpoint:
            policy = load(checkpoint, **self.config.input_limits())
        self.policy, self.tries = policy, tries
        self.dialogue = make_dialogue(self.config, checkpoint, policy)
        self.reset()

    def reset(self, test_config_file=None):
        """A new task begins: its random numbers do not depend on the tasks before."""
        self.asked = 0

    def set_action_set_tag(self, tag):
        """Part of the interface. Actions are written with the elements' numbers in any case."""

    def next_action(self, trajectory, intent, meta_data, images=None, output_response=False):
        """See `web_question` for what comes in. -> one action, such as "click [12]"

        Where no try gives one it is "stop [...]", with the reason. output_response: print the traces.
        Raises UserError where there is no screenshot."""
        question = web_question(trajectory, intent, meta_data, images)
        sampling = self.config.sampling()
        for _ in range(self.tries):
            self.asked += 1
            seed = f"web {self.config.seed} {self.asked}"
            trace, = next(rollout(self.policy, [question], self.dialogue, 1, [seed], **sampling))
            if output_response:
                print(trace.text(), flush=True)
            try:
                return str(usable_action(trace.answer or ""))
            except ValueError as error:
                why = error
            sampling["temperature"] = sampling["temperature"] or 1.0    # another answer than the last
        return str(Action("stop", text=f"no usable action in {self.tries} tries: {why}"))

    def answer_json(self, message, images):
        """`next_action` for an environment in another process, which is not trusted.

        message: bytes, a JSON object with "intent", "action_history", "text" (the page's elements),
        "url", and "reset" where a new task begins. images: PNG files as bytes, the screenshot first.
        -> bytes, a JSON object with the "action", or with an "error" that says what was wrong"""
        try:
            request = json.loads(message)
            screen, *others = [read_image(image) for image in images]
            if request.get("reset"):
                self.reset()
            observation = {"image": screen, "text": request.get("text")}
            state = {"observation": observation, "info": {"url": request.get("url")}}
            reply = {"action": self.next_action([state], str(request["intent"]), request, others)}
        except (UserError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        return json.dumps(reply).encode()


def usable_action(text):
    """`parse_action`, but refuses to type, press or go to nothing. Raises ValueError."""
    action = parse_action(text)
    if action.name in ("type", "press", "goto") and not action.text.strip():
        raise ValueError(f"there is nothing to {action.name}")
    return action


# ---------------------------------------------------------------------------------- the command line

def family_of(config):
    """The family of a task: by its format; for the release's, by how the first answer is scored."""
    if config.family or config.task in TOYS:
        return config.family or "drawn"
    file = open_file(config.task, config.image_root)
    first = file.questions[0]
    if file.family:
        return file.family
    if first.kind in ("point", "action"):
        return {"point": "gui", "action": "web"}[first.kind]
    return "search" if first.answer in tuple(LETTERS) else "spatial"


def configure(given, script):
    """The Config of a script, from the flags that were given. Raises UserError."""
    asked = Config(**given)
    if asked.task not in TOYS and not Path(asked.task).exists():
        raise UserError(f"--task {asked.task}: neither a file nor one of {', '.join(TOYS)}")
    return make_config(given, family_of(asked), script)


def main(given):
    config = configure(given, "evaluate")
    if not config.model:
        raise UserError("--model PATH is needed: a checkpoint folder, such as runs/toy-search-zoom/rl, "
                        "or a hub id")
    if bool(config.image) != bool(config.question):
        raise UserError("--image and --question go together")
    if not 0 < config.top_p <= 1:
        raise UserError("--top-p must be above 0 and at most 1")
    if config.json.endswith(".jsonl"):
        raise UserError(f"--json {config.json}: the answers are kept in a .jsonl beside it; give a "
                        "name that ends in .json")
    policy = load(config.model, **config.input_limits())
    dialogue = make_dialogue(config, config.model, policy)
    if config.image:
        question = Question(config.question, [config.image], "")
        show_trace(policy, dialogue, config, question, config.seed)
    else:
        evaluate_task(policy, dialogue, config)


def show_trace(policy, dialogue, config, question, seed):
    """Prints a trace, and draws it to --save."""
    trace, = next(rollout(policy, [question], dialogue, 1, [seed], **config.sampling()))
    print(trace.text())
    print(f"-> {trace.answer or 'no answer'} ({trace.ended}; {len(trace.zoom_points)} zoom calls)\n")
    if config.save:
        draw_trace(trace).save(config.save)


def evaluate_task(policy, dialogue, config):
    """Evaluates a task with and without the tool; shows a trace, prints a table, writes --json."""
    if config.task in TOYS:
        questions = questions_of(config, "test", config.n or 512)
    else:
        questions = open_file(config.task, config.image_root, config.n)
    print(describe_config(config, "evaluate"))
    answered, path = [], None
    if config.json:
        path = Path(config.json).with_suffix(".jsonl")
        answered = read_records(path, settings_of(config, dialogue, len(questions)))
    if rank() == 0:
        show_trace(policy, dialogue, config, questions[0], f"evaluation {config.seed} 0")

    def run_with(dialogue, log):
        return evaluate(policy, questions, dialogue, config.seed, samples=config.samples,
                        answered=answered, path=path, log=log, **config.sampling())
    figures, no_tool = run_with(dialogue, print), None
    if config.mode == "zoom" and config.tool:
        no_tool = run_with(replace(dialogue, tool=False), partial(print, "without tool:"))
    print_report(config, figures, no_tool)
    if config.task in TOYS:
        baseline = [random_zoom_accuracy(questions, dialogue, n) for n in (0, 1, 4)]
        print("random-zoom baseline, 0 / 1 / 4 zoom calls: {:.3f} / {:.3f} / {:.3f}".format(*baseline))
    if config.json and rank() == 0:
        summary = vars(figures)
        if no_tool or not config.tool:
            summary = summary | {"accuracy_no_tool": (no_tool or figures).accuracy}
        write_text(config.json, json.dumps(summary, indent=1) + "\n")


def settings_of(config, dialogue, n):
    """All that decides the result of an evaluation, for the first line of its answers."""
    settings = {name: value for name, value in vars(config).items()
                if name not in ("json", "save", "image", "question", "processes", "given")}
    return settings | {"dialogue": dialogue.to_json(), "n": n}


def print_report(config, figures, no_tool):
    rows = [[*HEADS, "official", "n"],
            [*cells(Path(config.task).stem, figures, no_tool), f"{figures.official:.3f}", figures.n]]
    without = no_tool and no_tool.by | no_tool.benchmarks
    for name, score in (figures.by | figures.benchmarks).items():
        accuracy = f"{without[name]['accuracy']:.3f}" if no_tool else "-"
        rows.append([f"  {name}", f"{score['accuracy']:.3f}", "", accuracy, *[""] * 7, score["n"]])
    print(table(rows))
    if config.samples > 1:
        print(f"majority vote of {config.samples} samples: {figures.majority:.3f}")
    print("a trace: " + ", ".join(f"{name} {n:.2f}" for name, n in figures.behaviours.items()))


if __name__ == "__main__":
    run("evaluate", "Evaluate a checkpoint on a task, or ask it one question about one image.", main)
