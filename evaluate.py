"""Benchmarks: where questions come from, and how well a policy answers them.

In:  a checkpoint and a task (a name, or a file of one of the real data sets), or one image and a
     question.
Out: accuracy with its interval, with and without the tool, the behaviours that the paper counts,
     pictures of traces.

    python evaluate.py --model runs/toy-search-zoom/rl --task toy-search
    python evaluate.py --model runs/toy-search-zoom/rl --image my.png --question "..." --save a.png
"""
import ast
import base64
import csv
import io
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
from PIL import Image

from model import Policy, UserError, gather, load, rank, world_size, write_text
from reward import USAGE, Action, distinct_crops, in_region, option_text, parse_action, score
from rollout import (
    FACET,
    OVERLONG,
    POINT,
    TOYS,
    Config,
    Question,
    describe_config,
    draw_trace,
    format_point,
    make_config,
    make_dialogue,
    parse_points,
    random_zoom_accuracy,
    read_image,
    rollout,
    run,
    toy,
)

# ----------------------------------------------------------------- data sets: how a row is answered

OPTIONS = (re.compile(r"\(([A-Z])\)\s*(.*?)(?=\s*\([A-Z]\)|\n|$)"),    # (A) red (B) blue
           re.compile(r"^\s*([A-Z])[.)][^\S\n]+(.+)$", re.M))           # A. red: a line each
BOX = re.compile(r"[(\[]\s*\d+(?:\s*,\s*\d+){3}\s*[)\]]")
NUMBERS = re.compile(r"[(\[]+\s*-?[\d.]+(?:[\s,()\[\]]+-?[\d.]+)+\s*[)\]]+")
ACTION = re.compile(rf"({'|'.join(USAGE)})\s*\[.*\]|(new|close)_tab|go_(back|forward)", re.S)
# What an answer of a kind shall look like, for rows that do not say it ("Description: the search
# button").
HINTS = {
    "point": "The answer is one point (x, y), in pixels of the image, between <answer> and "
             "</answer>.",
    "choice": "The answer is the letter or the text of one of the options.",
    "action": "The answer is one of these actions, with numbers and words that fit: "
              f"{', '.join(USAGE.values())}.",
}
# How to know the rows that say it. The actions are always listed: a web page that is quoted in the
# question must not be able to suppress that.
SAID = {
    "point": r"\(x,\s*y\)|\[x,\s*y\]|<answer>",
    "choice": r"<answer>|\b(answer|respond|reply)\b[^.:\n]{0,40}\b(letter|text|option)",
}


class Unusable(Exception):
    """Why a row cannot be asked or scored."""


def hint_for(kind, text):
    """What an answer of a kind shall look like, or "" where the question's text says so itself."""
    if kind in SAID and re.search(SAID[kind], text, re.I):
        return ""
    return HINTS.get(kind, "")


def parse_options(text):
    """The options' texts in the order of their letters, or ().

    "Which?\\nA. Yes, left\\nB. No" -> ("Yes, left", "No")"""
    text = text.rpartition("Answer Choices:")[2]
    for pattern in OPTIONS:
        options = pattern.findall(text)
        letters = "".join(letter for letter, _ in options)
        start = letters.rfind("A")       # of a list of options that a preamble may name, too
        if 0 <= start < len(letters) - 1 and LETTERS.startswith(letters[start:]):
            return tuple(option.strip() for _, option in options[start:])
    return ()


def as_box(values, limit=1_000_000):
    """Corners (x1, y1, x2, y2), checked. limit: 1 for shares of the image's sides."""
    x1, y1, x2, y2 = values
    if not (0 <= x1 <= x2 <= limit and 0 <= y1 <= y2 <= limit):
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
        corners = list(map(int, re.findall(r"\d+", answer)))
        return {"kind": "point", "answer": as_box(corners)}
    if NUMBERS.fullmatch(answer):
        raise Unusable(f"its answer, {answer}, is neither in words nor a box (x1, y1, x2, y2) in "
                       "whole px")
    if ACTION.fullmatch(answer):
        parse_action(answer)
        return {"kind": "action", "answer": answer}
    choices = parse_options(text)
    texts = [choice.casefold().rstrip(".") for choice in choices]
    plain = answer.casefold().rstrip(".")
    letter = re.fullmatch(r"\(?([A-Z])[.)]?", answer)
    if plain in texts and not (label and letter):
        index = texts.index(plain)
    elif choices and letter:
        index = LETTERS.index(letter[1])
        if index >= len(choices):
            raise Unusable(f"its answer, {answer}, is none of its {len(choices)} options")
    else:
        return {"kind": "string", "answer": answer}
    answer = LETTERS[index] if letter else choices[index]
    return {"kind": "choice", "answer": answer, "choices": choices}


# ------------------------------------------------------------------------------- data sets: formats

# A reader makes a Question of a row, with the row's own names of images. An answer in words is as
# the row has it, and `make_question` finds out how it is scored; an answer that needs the image's
# size is a function of it. Sources: the data cards and the evaluation code of each.

PLATFORMS = {"ios": "mobile", "android": "mobile", "windows": "desktop", "macos": "desktop"}
ASKS_FOR_SHARES = re.compile(r"\s*Your answer should be formatted as a list of tuples.*", re.S)
# of BLINK in a row's id, of V*Bench in its image's folder
CATEGORY = re.compile(r"^(?:val|test)_(\S+)_\d+ |(direct_attributes|relative_position)")


def read_conversation(row):
    """ViGoRL, evaluation and search: the first value is the question, the second its answer."""
    turns = row["conversations"]
    if isinstance(turns, dict):
        turns = [turns]
    said = [turn["value"] for turn in turns]
    if isinstance(said[0], list):                      # {"from": [...], "value": [...]}
        said = said[0]
    text, answer = said[:2]
    found = CATEGORY.search(f"{row.get('id')} {row.get('image')}")
    category = found and (found[1] or found[2])
    return Question(text, row.get("image"), answer, category=category)


def read_sft(row):
    """ViGoRL, SFT: the user's first turn is the question. Later images are crops of the trace."""
    text = next(turn["content"] for turn in row["messages"] if turn["role"] in ("user", "human"))
    return Question(text, row["images"][:max(1, text.count("<image>"))], row["gt_answer"])


def read_problem(row, answer):
    return Question(row["problem"], row["images"], row[answer], category=row.get("data_source"))


def read_vstar(row):
    return Question(row["text"], row["image"], category=row["category"],
                    **scored_by(row["text"], row["label"], label=True))


def read_robospatial(row):
    """Yes or no; in the category "context" a polygon in [0, 1], and a question that asks for points
    in [0, 1], too: that sentence is left out, for points are in px here."""
    text = ASKS_FOR_SHARES.sub("", row["question"])
    question = Question(text, row["img"], row["answer"], category=row["category"])
    if question.answer[0] in "[(":
        corners = np.array(ast.literal_eval(question.answer))
        if len(corners) < 3 or corners.min() < 0 or corners.max() > 1:
            raise Unusable("its answer is no polygon in [0, 1]")
        question.kind = "point"
        question.answer = lambda size: (corners * size).tolist()
    return question


def read_element(row, answer, *category):
    """An element of a screen, asked for in the words of ViGoRL's own rows."""
    return Question(f"Description: {row['instruction']}", row["img_filename"], answer, "point",
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
    box = np.array(as_box(row["bbox"], limit=1))
    return read_element(row, lambda size: tuple((box * [*size, *size]).tolist()))


def read_hr_bench(row):
    """The image is in the row, in base64; it is decoded when it is needed."""
    if row["answer"] not in list("ABCD"):
        raise Unusable(f"its answer, {row['answer']}, is none of its 4 options")
    lines = [row["question"], *(f"({letter}) {row[letter]}" for letter in "ABCD")]
    image = row["image"] and partial(embedded_image, row["image"])
    return Question("\n".join(lines), image, row["answer"], "choice",
                    tuple(row[letter] for letter in "ABCD"),
                    category=f"{row['category']}{FACET}cycle {row['cycle_category']}")


def embedded_image(text, where):
    try:
        data = base64.b64decode(text)
    except ValueError:
        data = b""
    return read_image(data, where)


# A file has the format of its first row that has all the fields of one. The format says what the
# numbers of a box mean, never the numbers. family: of the settings; "": it depends on the answers.
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
        if question.kind == "string":
            question = replace(question, **scored_by(question.text, question.answer))
        question.text = question.text.replace("<image>", "").strip()
    except Unusable:
        raise
    except KeyError as error:
        raise Unusable(f"it has no field {error}") from None
    except Exception as error:                         # a foreign file may hold anything
        raise Unusable("its fields do not hold what they should "
                       f"({type(error).__name__}: {error})") from None
    if not isinstance(question.images, list):
        question.images = [question.images]
    known = [callable(image) or image and isinstance(image, str) for image in question.images]
    if not known or not all(known):
        raise Unusable("it has no image")
    if not question.text:
        raise Unusable("it has no question")
    names = ("id", "question_id", "doc_id", "index")
    question.id = str(next((row[name] for name in names if name in row), number))
    question.where = where
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
        question = replace(self.questions[index])
        if callable(question.answer):
            image = question.load_one(question.images[0])      # upright, as boxes are
            question.answer = question.answer(image.size)
        return question

    def part(self, n):
        """`n` questions at most, spread evenly, for files are often sorted."""
        total = len(self)
        n = min(n, total)
        return replace(self, questions=[self.questions[i * total // n] for i in range(n)])


def read_questions(path, image_root=""):
    """A file in one of the FORMATS, or a folder of .json files -> QuestionFile."""
    path = Path(path)
    folder, files = path.parent, [path]
    if path.is_dir():
        folder = path
        files = sorted(path.glob("annotations/*.json")) or sorted(path.glob("*.json"))
    elif path.suffix not in (".jsonl", ".json", ".tsv"):
        raise UserError(f"{path}: not a .jsonl, .json or .tsv file, nor a folder of .json files. "
                        "(SAT and BLINK: take the .jsonl files of the ViGoRL release.)")
    read, questions, skipped = None, [], []
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
    root = find_root(questions[0], folder, image_root)
    for question in questions:
        where = question.where
        question.images = [partial(image, where=where) if callable(image) else root / image
                           for image in question.images]
    return QuestionFile(name, family, questions, skipped)


def read_rows(path):
    """Yields (number, row) of JSON lines, a JSON list, or tab-separated lines with a header."""
    number = 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(parse_rows(file, path.suffix), 1):
                if row is not None:
                    yield number, row
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the path of a data file") from None
    except (ValueError, RecursionError, csv.Error) as error:
        line = number + getattr(error, "lineno", 1)
        why = getattr(error, "msg", error)
        raise UserError(f"{path}:{line}: cannot be read ({why}); repair or remove it") from None


def parse_rows(file, suffix):
    if suffix == ".tsv":
        csv.field_size_limit(2**31 - 1)                # a cell may be an image
        return csv.DictReader(file, delimiter="\t")
    text = file.read()
    if text.lstrip().startswith("["):
        return json.loads(text)
    return (json.loads(line.strip() or "null") for line in text.split("\n"))


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


@lru_cache
def open_file(path, image_root="", n=None):
    """The QuestionFile at a path, read once. n: questions at most."""
    if n:
        return open_file(path, image_root).part(n)
    file = read_questions(path, image_root)
    print(f"{path}: {file.format}, {len(file)} questions")
    if file.skipped:
        print(f"{len(file.skipped)} rows cannot be used, the first: {file.skipped[0]}")
    return file


def questions_of(config, split, n, first=0):
    """`n` questions of the task, from number `first` on. -> list of Questions

    Of a file, in an order that the seed decides, a tenth is held out as the split "test"; the
    others come again after the last."""
    if config.task in TOYS:
        return [toy(config.task, split, config.seed, index) for index in range(first, first + n)]
    file = open_file(config.task, config.image_root)
    if len(file) < 2:
        raise UserError(f"{config.task}: one question is too few to train on; give a larger file")
    order = shuffled(len(file), config.seed)
    held_out = max(1, len(file) // 10)
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
QUESTIONS_A_BLOCK = 128


@dataclass
class Record:
    """What an evaluation keeps of a trace.

    index: the question's number. tool: whether there were zoom calls. vote: the normalised answer.
    ended: see `rollout.Trace`. hits: of each zoom call, whether its point lies on what was asked
    for; thoughts: of each thought behind a crop, whether it is true of it; both empty where that is
    not known. seconds: the trace's share of its block's time. The others: see Report."""
    index: int
    tool: bool
    id: str
    category: str
    text: str
    answer: str | None
    vote: str
    ended: str
    correct: bool
    official: bool
    format: bool
    crops: int
    several_crops: bool
    overlong: bool
    regions: int
    subgoals: int
    verifications: int
    backtracks: int
    hits: list
    thoughts: list
    seconds: float = 0.0


def record_of(index, trace, tool=True):
    """The Record of a finished trace."""
    scored, question = score(trace), trace.question
    return Record(
        index, tool, question.id, question.category, trace.text(), trace.answer,
        vote=option_text(trace.answer or "", question.choices),
        ended=trace.ended,
        correct=bool(scored.correct),
        official=official_rule(trace, bool(scored.correct)),
        format=bool(scored.format),
        crops=scored.zoom_calls,
        several_crops=distinct_crops(trace.zoom_points, SAME_PLACE) > 1,
        overlong=trace.ended in OVERLONG,
        hits=targets_hit(trace),
        thoughts=true_thoughts(trace),
        **behaviours(trace))


def on_target(question, point):
    """Whether a point (px of the original) lies on what a question is about: a candidate; the box.
    None where that is not known."""
    if question.scene:
        return question.scene.contains(point)
    return in_region(point, question.answer) if question.kind == "point" else None


def targets_hit(trace):
    """Of each zoom call that was answered (in the modes of one turn: of each point in the thought),
    whether it is on target; empty where that is not known."""
    pointed = trace.zoom_points
    if trace.mode != "zoom":
        pointed = [point for turn in trace.turns for point in turn.points]
    frame = trace.frames[0]
    hits = [on_target(trace.question, frame.to_original(point)) for point in pointed]
    return [hit for hit in hits if hit is not None]


def true_thoughts(trace):
    """Of each thought of the policy's own behind a crop, whether it says what the crop shows; of a
    thought that compares two cards, whether it does so truly; empty where that is not known."""
    scene = trace.question.scene
    if not scene:
        return []
    if scene.named:
        compared = [scene.compares(turn.thought) for turn in trace.turns if not turn.forced]
        return [true for true in compared if true is not None]
    return [scene.describes(turn.thought, before.crop)
            for before, turn in pairwise(trace.turns) if before.crop and not turn.forced]


def evaluate(policy, questions, dialogue, seed, *, samples=1, answered=(), path=None, log=None,
             **sampling):
    """Answers every question `samples` times. -> Report, on every process

    Processes take turns at blocks of questions. Neither breaks nor the number of processes change
    the result: see `ask`.

    questions: anything with a length and an index. answered: what `read_records` found. path: file
    that new Records are added to, a line a question. log: called with a line a round of blocks.
    sampling: see `model.Engine`."""
    done = [records for records in answered if records[0].tool == dialogue.tool]
    earlier = {records[0].index for records in done}
    left = [number for number in range(len(questions)) if number not in earlier]
    if log and earlier:
        log(f"{len(earlier)} of {len(questions)} questions were answered before")
    for start in range(0, len(left), world_size() * QUESTIONS_A_BLOCK):      # a block a process
        first = start + rank() * QUESTIONS_A_BLOCK
        block = left[first:first + QUESTIONS_A_BLOCK]                        # empty, perhaps
        started, mine = time.time(), []
        for number, traces in ask(policy, questions, block, dialogue, seed, samples, **sampling):
            mine.append([record_of(number, trace, dialogue.tool) for trace in traces])
        for record in sum(mine, []):
            record.seconds = (time.time() - started) / len(block) / samples
        new = sum(gather(mine), [])
        if path and rank() == 0:
            with open(path, "a") as file:
                file.writelines(json.dumps(records, default=vars) + "\n" for records in new)
        done += new
        if log:
            accuracy = mean(record.correct for records in done for record in records)
            log(f"{len(done)}/{len(questions)} questions, accuracy {accuracy:.3f}")
    return report(done)


def ask(policy, questions, numbers, dialogue, seed, samples, **sampling):
    """Yields (number, its Traces) of the questions with these numbers, each as it is answered. The
    random numbers of a question follow from the seed and its number alone."""
    asked = {questions[number]: number for number in numbers}
    seeds = [f"evaluation {seed} {number}" for number in numbers]
    for traces in rollout(policy, asked, dialogue, samples, seeds, **sampling):
        yield asked[traces[0].question], traces


def read_records(path, settings):
    """What an earlier run left in a file: for each question answered, the Records of its samples.

    The file is made if it is not there. Its first line holds the settings, all that decides the
    result: where they differ, it is a UserError. A last line that is not complete is dropped. Only
    the first process reads and writes."""
    if rank():
        return gather(None)[0]
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
        raise UserError(f"{path}: no answers of an evaluation; move it away, or give another "
                        "--json FILE") from None
    other = [f"{name} {earlier.get(name)}" for name in earlier | settings
             if earlier.get(name) != settings.get(name)]
    if other:
        raise UserError(f"{path} has answers with {', '.join(other)}; go on with the same, move "
                        "it away, or give another --json FILE")
    write_text(path, "\n".join([first, *lines, ""]))
    return gather(answered)[0]


# ---------------------------------------------------------------------- report and rules of scoring

ROBOSPATIAL = ("configuration", "compatibility", "context")     # categories of RoboSpatial-Home
PUNCTUATION = str.maketrans("", "", string.punctuation + " ")


def official_rule(trace, correct):
    """Whether the answer is right by the public code's rule. correct: by our own.

    RoboSpatial-Home's own: a prefix will do for yes or no, and the first of several points counts.
    Answers in words, as in ViGoRL's evaluation: without punctuation, blanks and capitals, the truth
    is a part of the answer. So "left or right" is right for "right", and "blue" for "B"."""
    question, answer = trace.question, trace.answer or ""
    robospatial = question.category in ROBOSPATIAL
    if question.kind == "point" and robospatial:
        points = parse_points(answer)
        return bool(points) and on_target(question, trace.frames[0].to_original(points[0]))
    if question.kind not in ("choice", "string"):
        return correct
    if robospatial:
        return answer.strip().casefold().startswith(question.answer.casefold())
    truth = question.answer.translate(PUNCTUATION).strip().lower()
    return truth in answer.translate(PUNCTUATION).strip().lower()


# The behaviours that the paper counts in traces: there by GPT-4o, here by rules. `regions` counts
# the points in thoughts and zoom calls, but those at one place once; the others count such phrases.
# To go back to a place after another one is a verification, too.
SAME_PLACE = 10    # px of the model input; points that are nearer to each other are at one place
PHRASES = {
    "subgoals": "first|next|then|let me|let's|need to|I will|I'll",
    "verifications": "check|checking|verify|confirm|confirms|make sure|indeed",
    "backtracks": "not it|not here|wait|instead|actually|on second thought|at first",
}


def behaviours(trace):
    """How often each behaviour occurs in a trace, of one turn or several. -> {name: count}"""
    points = [point for turn in trace.turns for point in (*turn.points, turn.call)
              if point and trace.in_image(point)]
    text = " ".join(turn.thought for turn in trace.turns)
    counts = {name: len(re.findall(rf"\b({phrases})\b", text, re.I))
              for name, phrases in PHRASES.items()}
    for number, point in enumerate(points):
        near = [math.dist(point, other) < SAME_PLACE for other in points[:number]]
        if any(near) and not near[-1]:
            counts["verifications"] += 1
    return {"regions": distinct_crops(points, SAME_PLACE), **counts}


@dataclass
class Report:
    """The figures of an evaluation.

    accuracy: share of right answers; ci95: bounds of its 95 % interval; majority: accuracy of the
    answer that most samples of a question give. on_target: share of zoom calls at what was asked
    for; true_thoughts: share of the thoughts behind a crop that say what it shows; None where that
    is not known. minutes: of all processes and runs together. by: accuracy by category; benchmarks:
    scores as the benchmarks define them. Means over traces: official (right by the public code's
    rule), format (well-formed), crops (zoom calls answered), several_crops (of different places),
    overlong (out of tokens or zoom calls), and the behaviours."""
    n: int
    accuracy: float
    ci95: tuple[float, float]
    majority: float
    on_target: float | None
    true_thoughts: float | None
    minutes: float
    by: dict
    benchmarks: dict
    official: float
    format: float
    crops: float
    several_crops: float
    overlong: float
    regions: float
    subgoals: float
    verifications: float
    backtracks: float


MEANS = ("official", "format", "crops", "several_crops", "overlong", "regions", *PHRASES)


def mean(values, empty=0.0):
    values = list(values)
    return sum(values) / len(values) if values else empty


def interval(shares, z=1.96):
    """95 % interval of the mean of some questions' shares of right samples.

    The samples of a question are one cluster: it is the normal approximation over questions, and
    where each share is 0 or 1 (one sample, for instance) Wilson's."""
    n = len(shares)
    p = mean(shares)
    if not n:
        return 0.0, 1.0
    if set(shares) <= {0, 1}:
        scale = 1 + z**2 / n
        middle = p + z**2 / n / 2
        half = z * math.sqrt(p * (1 - p) / n + (z / n / 2)**2)
        return (middle - half) / scale, (middle + half) / scale
    half = z * float(np.std(shares)) / math.sqrt(max(1, n - 1))
    return max(0.0, p - half), min(1.0, p + half)


def majority_right(records):
    """Whether the answer that most of a question's samples give is right; of equals, the first."""
    votes = [record.vote for record in records if record.vote]
    winner = max(votes, key=votes.count, default=None)
    return any(record.correct for record in records if record.vote == winner)


def report(answered):
    """For each question, the Records of its samples -> Report."""
    answered = sorted(answered, key=lambda records: records[0].index)
    records = sum(answered, [])
    shares = [mean(record.correct for record in samples) for samples in answered]
    by, benchmarks = summarise((samples[0].category, mean(map(benchmark_right, samples)))
                               for samples in answered)
    means = {name: mean(getattr(record, name) for record in records) for name in MEANS}
    return Report(
        **rate(shares),
        majority=mean(majority_right(samples) for samples in answered),
        on_target=mean(sum((record.hits for record in records), []), None),
        true_thoughts=mean(sum((record.thoughts for record in records), []), None),
        minutes=sum(record.seconds for record in records) / 60,
        by=by,
        benchmarks=benchmarks,
        **means)


def benchmark_right(record):
    """Whether a trace is right by its benchmark's rule: ours, but for RoboSpatial-Home."""
    return record.official if record.category in ROBOSPATIAL else record.correct


BLINK = ("Art_Style", "Counting", "Forensic_Detection", "Functional_Correspondence", "IQ_Test",
         "Jigsaw", "Multi-view_Reasoning", "Object_Localization", "Relative_Depth",
         "Relative_Reflectance", "Semantic_Correspondence", "Spatial_Relation",
         "Visual_Correspondence", "Visual_Similarity")
BENCHMARKS = (    # name, categories, whether accuracies are averaged or questions pooled
    ("BLINK, mean of sub-tasks", BLINK, "mean"),
    ("BLINK, mean of the spatial three",
     ("Multi-view_Reasoning", "Relative_Depth", "Spatial_Relation"), "mean"),
    ("HR-Bench, mean of option cycles", ("cycle 0", "cycle 1", "cycle 2", "cycle 3"), "mean"),
    ("RoboSpatial-Home, yes or no", ("configuration", "compatibility"), "pooled"),
)


def rate(shares):
    return {"accuracy": mean(shares), "ci95": interval(shares), "n": len(shares)}


def summarise(results):
    """(category, share of right samples) of each question -> the figures by category and by its
    parts, and the scores of BENCHMARKS whose categories are among them.

    The scores of V*Bench, ScreenSpot and ScreenSpot-Pro are the accuracy over all questions."""
    groups = {}
    for category, share in results:
        for name in {category, *category.split(FACET)} - {""}:
            groups.setdefault(name, []).append(share)
    benchmarks = {}
    for name, categories, how in BENCHMARKS:
        present = [groups[category] for category in categories if category in groups]
        pooled = sum(present, [])
        if len(present) > 1 and how == "pooled":
            benchmarks[name] = rate(pooled)
        elif len(present) > 1:
            benchmarks[name] = {"accuracy": mean(map(mean, present)), "n": len(pooled)}
    return {name: rate(groups[name]) for name in sorted(groups)}, benchmarks


HEADS = ["", "accuracy", "95 %", "without tool", "format", "on target", "true thoughts",
         "zoom calls", "several crops", "overlong"]


def cells(name, figures, no_tool=None):
    """A row of a table under HEADS. no_tool: the Report without the tool, if there is one."""
    def share(value):
        return "-" if value is None else f"{value:.3f}"
    return [name, share(figures.accuracy), "{:.3f}-{:.3f}".format(*figures.ci95),
            share(no_tool and no_tool.accuracy), share(figures.format), share(figures.on_target),
            share(figures.true_thoughts), f"{figures.crops:.2f}", share(figures.several_crops),
            share(figures.overlong)]


def table(rows):
    """Lists of cells -> aligned lines, the first column to the left and the others to the right."""
    rows = [list(map(str, row)) for row in rows]
    first, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([name.ljust(first), *map(str.rjust, cells, widths)])
                     for name, *cells in rows)


# -------------------------------------------------------------------------------------- a web agent

MAX_ELEMENTS, MAX_INTENT, MAX_ACTION = 12_000, 4_000, 300    # characters of each in a question
MAX_HISTORY = 30                                             # previous actions, the latest


def web_question(trajectory, intent, meta_data, images=None):
    """A state of VisualWebArena -> Question of kind "action", without an answer.

    trajectory: states and actions in turn, a state last: {"observation": {"image": uint8 array
    (height, width, 3 or 4), "text": the page's elements}, "info": {"page": with a url, or "url":
    text}}. meta_data: {"action_history": texts}. images: PIL images of the intent's. What is too
    long is shortened. Raises UserError where there is no screenshot."""
    try:
        state = trajectory[-1]
        observation, info = state["observation"], state.get("info") or {}
        screen = Image.fromarray(np.asarray(observation["image"])).convert("RGB")
        screen.getpixel((0, 0))                        # it has pixels
    except (LookupError, TypeError, ValueError) as error:
        raise UserError("the trajectory does not end with a state that has a screenshot, a uint8 "
                        f"array (height, width, 3 or 4) as observation['image'] ({error!r}); run "
                        "VisualWebArena with --observation_type image_som") from None
    images = [screen, *(image.convert("RGB") for image in images or [])]
    history = [" ".join(str(action).split()) for action in meta_data.get("action_history", [])]
    history = [action for action in history if action != "None"]    # an empty history has a "None"
    lines = [f"{i}. {action[:MAX_ACTION]}" for i, action in enumerate(history[-MAX_HISTORY:], 1)]
    parts = [f"OBJECTIVE: {shorten(intent, MAX_INTENT)}",
             "PREVIOUS ACTIONS:\n" + ("\n".join(lines) or "none")]
    url = info.get("url") or getattr(info.get("page"), "url", "")
    elements = str(observation.get("text") or "").strip()
    if url:
        parts.append(f"URL: {url}"[:MAX_ACTION])
    if elements:
        parts.append(f"ELEMENTS:\n{shorten(elements, MAX_ELEMENTS)}")
    if len(images) > 1:
        parts.append("The first image is the page; the others belong to the objective.")
    return Question("\n\n".join(parts), images, "", "action", hint=HINTS["action"])


def shorten(text, most):
    """The first lines of a text, `most` characters at most; of a longer line its beginning."""
    if len(text) <= most:
        return text
    kept = text[:most].rpartition("\n")[0] or text[:most]
    return f"{kept}\n({len(text) - len(kept):,} characters left out)"


class WebAgent:
    """A policy behind the interface of VisualWebArena's agents. An answer is parsed, never run, and
    handed on as text.

    policy: a Policy, or a checkpoint's path or hub id. tries: how often an action is asked for,
    each time with other random numbers, until one can be used. settings: flags that the scripts
    share, such as temperature=0.5; the others are those of the family "web".

    VisualWebArena pins older versions of torch and transformers, so the agent runs in a process of
    its own, and the two exchange JSON and PNG bytes; nothing is unpickled. Both need the same
    secret in the environment, VIGORL_KEY. The agent's side, in this folder:

        import os
        from multiprocessing.connection import Listener
        from evaluate import WebAgent
        agent = WebAgent("CHECKPOINT")
        key = os.environb[b"VIGORL_KEY"]
        with Listener(("localhost", 6000), authkey=key) as listener:
            line = listener.accept()
            while True:
                message, *images = [line.recv_bytes() for _ in range(int(line.recv_bytes()))]
                line.send_bytes(agent.answer_json(message, images))

    In VisualWebArena's `run.py`, with `--observation_type image_som --action_set_tag som`, instead
    of `construct_agent(...)` (`create_id_based_action` is in its `browser_env.actions`):

        import io, json, os
        from multiprocessing.connection import Client
        from PIL import Image

        class ViGoRL:
            line = Client(("localhost", 6000), authkey=os.environb[b"VIGORL_KEY"])

            def next_action(self, trajectory, intent, meta_data, images=None, **other):
                state, history = trajectory[-1], meta_data["action_history"]
                message = {"intent": intent, "action_history": history,
                           "text": state["observation"]["text"],
                           "url": state["info"]["page"].url, "reset": history == ["None"]}
                parts = [json.dumps(message).encode()]
                screen = Image.fromarray(state["observation"]["image"])
                for image in [screen, *(images or [])]:
                    file = io.BytesIO()
                    image.save(file, "PNG")
                    parts.append(file.getvalue())
                for part in [b"%d" % len(parts), *parts]:
                    self.line.send_bytes(part)
                return create_id_based_action(json.loads(self.line.recv_bytes())["action"])

            def reset(self, test_config_file): pass
            def set_action_set_tag(self, tag): pass
    """

    def __init__(self, policy, mode="zoom", tries=3, **settings):
        self.config = make_config({"mode": mode, **settings}, "web", "evaluate")
        checkpoint = "" if isinstance(policy, Policy) else str(policy)
        if checkpoint:
            policy = load(checkpoint, **self.config.input_limits())
        self.policy = policy
        self.tries = tries
        self.dialogue = make_dialogue(self.config, checkpoint, policy)
        self.reset()

    def reset(self, test_config_file=None):
        """A new task begins: its random numbers do not depend on the tasks before."""
        self.asked = 0

    def set_action_set_tag(self, tag):
        """Part of the interface. Actions are written with the elements' numbers in any case."""

    def next_action(self, trajectory, intent, meta_data, images=None, output_response=False):
        """See `web_question` for what comes in. -> one action, such as "click [12]"

        Where no try gives one it is "stop [...]", with the reason. output_response: print the
        traces. Raises UserError where there is no screenshot."""
        question = web_question(trajectory, intent, meta_data, images)
        sampling = self.config.sampling()
        for _ in range(self.tries):
            self.asked += 1
            seed = f"web {self.config.seed} {self.asked}"
            trace, = next(rollout(self.policy, [question], self.dialogue, 1, [seed], **sampling))
            if output_response:
                print(trace.text(), flush=True)
            try:
                action = parse_action(trace.answer or "")
                if action.text.strip() or action.name not in ("type", "press", "goto"):
                    return str(action)
                why = f"there is nothing to {action.name}"
            except ValueError as error:
                why = str(error)
            sampling["temperature"] = sampling["temperature"] or 1.0    # else it would say the same
        return str(Action("stop", text=f"no usable action in {self.tries} tries: {why}"))

    def answer_json(self, message, images):
        """`next_action` for an environment in another process, which is not trusted.

        message: a JSON object with the "intent", the "action_history", the "text" (the page's
        elements), the "url", and "reset": true where a new task begins. images: PNG files as bytes,
        the screenshot first. -> bytes, a JSON object with the "action", or with an "error"."""
        try:
            request = json.loads(message)
            screen, *others = [read_image(image) for image in images]
            if request.get("reset"):
                self.reset()
            state = {"observation": request | {"image": screen}, "info": request}
            reply = {"action": self.next_action([state], str(request["intent"]), request, others)}
        except Exception as error:                     # a foreign message may hold anything
            reply = {"error": repr(error)}
        return json.dumps(reply).encode()


# ------------------------------------------------------------------------- pages: report and rating

PAGE_TRACES, PAGE_STEPS = 48, 48             # on a page: traces; steps to be rated
IMAGE_BYTES, CROP_BYTES = 45_000, 24_000     # at most: of a question's image, of a trace's crops
TEXT_SHOWN = 4_000                           # characters of a text
HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e"
                    r"\u2060-\u206f\ud800-\udfff\ufeff]")
# What a rater says: is the point on what its step names; does it help to follow the step?
SCALES = {"on": ("yes", "no", "cannot tell"), "helps": (1, 2, 3, 4, 5)}


def sample_traces(policy, questions, dialogue, seed, n, **sampling):
    """A trace of each of the first `n` questions: those that `evaluate` samples with this seed."""
    numbers = range(min(n, len(questions)))
    traces = dict(ask(policy, questions, numbers, dialogue, seed, 1, **sampling))
    return [traces[number][0] for number in numbers]


def write_report(path, config, traces, folder, rows=()):
    """Writes the page of a run: curves, table, settings, a search tree, traces.

    traces: {checkpoint: its Traces}, of the same questions in the same order. folder: the run's,
    with log.jsonl and trees.txt if it has them. rows: of the table, the heads first."""
    write_page(path, {
        "kind": "report",
        "title": visible(f"{config.task}, {config.mode}"),
        "log": read_if_there(folder / "log.jsonl"),
        "table": rows,
        "settings": vars(config),
        "tree": visible(read_if_there(folder / "trees.txt").split("\n\n")[0]),
        "cases": describe_cases(traces),
    })


def read_if_there(path):
    return path.read_text() if path.is_file() else ""


def write_rating_page(path, config, traces):
    """Writes the page on which a person rates random steps of traces. Raises UserError."""
    cases = describe_cases({"": traces})
    steps = []
    for number, trace in enumerate(traces):
        for place, point in enumerate(cases[number]["traces"][0]["points"]):
            steps.append({
                "id": f"question {number}, point {place}",
                "case": number,
                "place": place,
                "truth": on_target(trace.question, point["at"]),
            })
    if not steps:
        raise UserError(f"--rate {path}: no trace has a point that could be rated")
    rng = random.Random(str(cases))
    rng.shuffle(steps)
    write_page(path, {
        "kind": "rating",
        "title": visible(f"Rating: {config.task}"),
        "key": str(rng.random()),
        "steps": steps[:PAGE_STEPS],
        "cases": cases,
    })


def write_page(path, data):
    """PAGE with its data, in which "<" is written as its code: no text can end the script."""
    text = json.dumps(data).replace("<", "\\u003c")
    write_text(path, PAGE.replace("{DATA}", text))


def describe_cases(traces):
    """{checkpoint: its Traces} -> what a page shows of each question: its (first) image, the truth,
    and the traces side by side. Points and boxes are in px of the original image."""
    cases = []
    for row in zip(*traces.values(), strict=True):
        question = row[0].question
        image = question.load()[0]
        cases.append({
            "question": visible(question.text),
            "truth": visible(question.answer, 300),
            "region": question.answer if question.kind == "point" else None,
            "image": picture_uri(image, IMAGE_BYTES),
            "size": image.size,
            "checkpoints": list(traces),
            "traces": [describe_trace(trace, image) for trace in row],
        })
        question.release()
    return cases


def describe_trace(trace, image):
    """What a page shows of a trace."""
    scored = trace.score or score(trace)
    frame = trace.frames[0]
    points, turns = [], []
    for turn in trace.turns:
        crop = None
        if turn.crop:
            crop = picture_uri(image.crop(turn.crop), CROP_BYTES // len(trace.zoom_points))
        turns.append({
            "pieces": split_at_points(turn.text, points),
            "error": visible(turn.error),
            "box": turn.crop,
            "crop": crop,
        })
    state = "right" if scored.correct else "wrong"
    if trace.ended in OVERLONG:
        state = "truncated"
    elif trace.question.answer == "":        # a question of the user's own
        state = "open"
    return {
        "state": state,
        "ended": trace.ended,
        "answer": visible(trace.answer or "none", 300),
        "reward": {**vars(scored), "why": visible(scored.why)},
        "turns": turns,
        "points": [{"text": format_point(point), "at": frame.to_original(point),
                    "inside": frame.contains(point)} for point in points],
    }


def split_at_points(text, points):
    """A turn's text in pieces [text, number of the point that ends it, or None].

    points: those of the turns before, to which the turn's are added. A zoom call at the point of
    its thought is no other point."""
    pieces, last = [], 0
    for found in POINT.finditer(text[:TEXT_SHOWN]):
        point, = parse_points(found[0])
        if points[-1:] != [point]:
            points.append(point)
        pieces.append([visible(text[last:found.end()]), len(points) - 1])
        last = found.end()
    return [*pieces, [visible(text[last:]), None]]


def visible(text, most=TEXT_SHOWN):
    """The beginning of a text, with the codes of characters that are not seen or turn it around."""
    text = str(text)
    if len(text) > most:
        text = f"{text[:most]} ... ({len(text) - most:,} more characters)"
    return HIDDEN.sub(lambda found: f"[U+{ord(found[0]):04X}]", text)


def picture_uri(image, most, side=1024):
    """An image of at most `most` bytes as a data URI: a drawing as PNG, a photograph as JPEG."""
    small = image.copy()
    small.thumbnail((side, side))
    file = io.BytesIO()
    kind = "png" if small.getcolors(2**13) else "jpeg"
    small.save(file, kind, quality=80)
    if file.tell() > most and side > 32:
        return picture_uri(image, most, max(small.size) * 3 // 4)
    data = base64.b64encode(file.getvalue()).decode()
    return f"data:image/{kind};base64,{data}"


def print_ratings(paths):
    """Prints what raters said, each in a file that the rating page exported. Raises UserError."""
    pages, raters = zip(*map(read_ratings, paths), strict=True)
    if len(set(pages)) > 1:
        raise UserError(f"--ratings {' '.join(paths)}: they are not of one page; give those of one")
    for path, ratings in zip(paths, raters, strict=True):
        told = [row for row in ratings if row["on"] in ("yes", "no")]
        yes = [row["on"] == "yes" for row in told]
        agree = [(row["on"] == "yes") == row["truth"] for row in told if row["truth"] is not None]
        unsure = [row for row in ratings if row["on"] == "cannot tell"]
        helps = mean(row["helps"] for row in ratings if row["helps"])
        print(path)
        print(f"  points on the thing named: {sum(yes)} of {len(yes)}, {mean(yes):.3f}")
        print(f"  cannot tell: {len(unsure)}")
        print(f"  helpfulness, 1 to 5: {helps:.2f}")
        print(f"  agrees with the truth: {sum(agree)} of {len(agree)}")
    if len(paths) > 1:
        for name, values in SCALES.items():
            print_agreement(name, values, raters)


def print_agreement(name, values, raters):
    """Prints Fleiss' kappa of the steps that all have rated."""
    counts = []
    for step in zip(*raters, strict=True):
        said = [row[name] for row in step]
        if None not in said:
            counts.append([said.count(value) for value in values])
    if counts:
        print(f"Fleiss' kappa of {name!r}, {len(counts)} steps: {fleiss_kappa(counts):.3f}")


def read_ratings(path):
    """A file that the rating page exported -> its page, and a row a step. Raises UserError."""
    try:
        exported = json.loads(Path(path).read_text())
        ratings = exported["ratings"]
        for row in ratings:
            if any(row[name] not in (*values, None) for name, values in SCALES.items()):
                raise ValueError(f"{row} is no rating")
            row.setdefault("truth")
        return (str(exported["key"]), len(ratings)), ratings
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read as ratings ({error!r}); export them again from "
                        "the page that --rate wrote") from None


def fleiss_kappa(counts):
    """Agreement of raters beyond chance, at most 1 (Fleiss 1971).

    counts: of each thing rated, how many raters chose each category; each row has the same sum."""
    counts = np.array(counts)                          # (things, categories)
    raters = counts[0].sum()
    agreed = (counts * (counts - 1)).sum(axis=1).mean() / (raters * (raters - 1))
    chance = ((counts.mean(axis=0) / raters)**2).sum()
    if chance == 1:
        return 1.0
    return (agreed - chance) / (1 - chance)


def write_drawings(config):
    """--draw: writes pictures of a synthetic task and questions.jsonl, which --task can read."""
    if config.draw not in TOYS or not config.out:
        raise UserError(f"--draw {config.draw}: needs one of {', '.join(TOYS)}, and --out FOLDER")
    folder = Path(config.out)
    lines = ""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(config.n or 5):
        question = toy(config.draw, "test", config.seed, index)
        names = []
        for when, image in zip(("", "-later"), question.load(), strict=False):
            names.append(f"{question.id}{when}.png")
            image.save(folder / names[-1])
        lines += json.dumps({"problem": question.text, "answer": str(question.answer),
                             "images": names}) + "\n"
        print(f"{folder / names[0]}: {question.text} ({question.answer})")
    write_text(folder / "questions.jsonl", lines)


PAGE = r"""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Traces</title>
<style>
:root { color-scheme: light dark; --ground: #fff; --text: #1b1e23; --soft: #5c6570;
  --line: #cfd5dc; --lit: #ffe08a; --c0: #0072b2; --c1: #c04a00; --c2: #00805c; --c3: #a8477f; }
@media (prefers-color-scheme: dark) { :root { --ground: #15181c; --text: #e6e8eb; --soft: #a0a9b4;
  --line: #3a424c; --lit: #4d3b00; --c0: #56b4e9; --c1: #f09a4a; --c2: #3fc79a; --c3: #e39cc6; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: auto; padding: 1rem;
  background: var(--ground); color: var(--text); overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; white-space: pre-wrap; max-height: 15rem; overflow: auto; }
.grid { display: grid; gap: 1.2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 16rem), 1fr)); }
.bar { display: flex; flex-wrap: wrap; gap: .4rem; align-items: center; margin: .8rem 0; }
button { font: inherit; color: inherit; background: var(--ground); border: 1px solid var(--soft);
  border-radius: .4rem; padding: .3rem .8rem; }
button[aria-pressed=true] { background: var(--text); color: var(--ground); }
figure { margin: 0; align-self: end; }
figcaption span { margin-right: .4rem; border-bottom: 2px solid; white-space: nowrap; }
svg { display: block; width: 100%; fill: none; stroke-width: 2; }
svg text { fill: var(--soft); font-size: 12px; text-anchor: end; }
.axis { stroke: var(--line); stroke-width: 1; }
.band { fill: var(--c0); opacity: .25; }
.line0 { color: var(--c0); }
.line1 { color: var(--c1); stroke-dasharray: 7 3; border-bottom-style: dashed; }
.line2 { color: var(--c2); stroke-dasharray: 2 3; border-bottom-style: dotted; }
.line3 { color: var(--c3); stroke-dasharray: 9 3 2 3; border-bottom-style: double; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; }
td, th { padding: .2rem .7rem; border-bottom: 1px solid var(--line); text-align: left; }
.scroll :is(td, th) { white-space: nowrap; }
.scroll :is(td, th):not(:first-child) { text-align: right; }
.soft { color: var(--soft); font-size: .85em; }
.stage { position: relative; max-width: 30rem; }
.stage img { display: block; width: 100%; }
.stage svg { position: absolute; inset: 0; stroke: #fff; }
.stage path { vector-effect: non-scaling-stroke; filter: drop-shadow(0 0 1px #000); }
.truth { stroke-dasharray: 5 4; }
.point { position: absolute; translate: -50% -50%; width: 1.6rem; height: 1.6rem; padding: 0;
  border: 2px solid #fff; border-radius: 50%; background: #0060a0; color: #fff; line-height: 1; }
.point.lit { background: #ffd24a; color: #000; border-color: #000; z-index: 1; }
.step.lit { background: var(--lit); }
.turn { display: flex; gap: .7rem; justify-content: space-between; max-width: 40rem;
  margin: .7rem 0; border-left: 3px solid var(--line); padding-left: .7rem; white-space: pre-wrap; }
.turn img { width: 7rem; height: 7rem; object-fit: contain; flex: none; }
.sharp { image-rendering: pixelated; }
</style>
<h1></h1>
<main></main>
<script id="data" type="application/json">{DATA}</script>
<script>
const data = JSON.parse(document.getElementById("data").textContent);
const main = document.querySelector("main"), keys = {};
document.title = document.querySelector("h1").textContent = data.title;
document.addEventListener("keydown", event => {
  if (event.key in keys && !event.ctrlKey && !event.altKey && !event.metaKey) keys[event.key]();
});

// An element with attributes, listeners and children. A text becomes text, never markup.
function make(name, attributes = {}, ...children) {
  const space = ["svg", "path", "text"].includes(name) ? "2000/svg" : "1999/xhtml";
  const element = document.createElementNS(`http://www.w3.org/${space}`, name);
  for (const [key, value] of Object.entries(attributes))
    if (key.startsWith("on")) element[key] = value; else element.setAttribute(key, value);
  element.append(...children);
  return element;
}
const button = (text, onclick, more) => make("button", {type: "button", onclick, ...more}, text);
const picture = (src, alt) => make("img", {src, alt, onload: ({target}) =>
  target.classList.toggle("sharp", target.naturalWidth <= 256)});
const line = points => "M" + points.map(([x, y]) => `${x},${y}`).join("L");
const rows = (table, name) =>
  table.map(row => make("tr", {}, ...row.map(cell => make(name, {}, cell))));

// Buttons and the arrow keys step through items, of which show() makes elements. -> start(items)
function pager(show, ...buttons) {
  const place = make("span", {"aria-live": "polite"}), view = make("div");
  let items = [], number = 0;
  function start(list, at = 0) {
    [items, number] = [list, Math.max(0, Math.min(at, list.length - 1))];
    place.textContent = items.length ? `${number + 1} of ${items.length}` : "none";
    view.replaceChildren(...items.slice(number, number + 1).flatMap(show));
  }
  keys.ArrowLeft = () => start(items, number - 1);
  keys.ArrowRight = () => start(items, number + 1);
  main.append(make("nav", {class: "bar"}, ...buttons, button("\u2039 before", keys.ArrowLeft),
    button("next \u203a", keys.ArrowRight), place), view);
  return start;
}

// ------------------------------------------------------------------------------------------ curves
const CHARTS = [["reward and its parts, a trace", "reward", "format", "grounded", "diversity"],
  ["accuracy with its 95 % interval", "accuracy"], ["zoom calls a trace", "zoom_calls"],
  ["overlong: share of traces", "overlong"], ["sampled tokens a step", "tokens"],
  ["KL to SFT, nats a token", "kl"], ["time, s a step", "seconds"]];
const short = value => value.toLocaleString("en", {maximumSignificantDigits: 3});

// The chart of some values of the log's lines, or nothing where the log has none of them. Around
// the first one is its interval, where the log has it, from NAME_low to NAME_high.
function chart(log, [title, ...names]) {
  const values = name => log.map(row => [row.step, row[name]])
    .filter(([_, value]) => Number.isFinite(value));
  const series = names.map(values);
  const band = [...values(`${names[0]}_low`), ...values(`${names[0]}_high`).reverse()];
  const all = [...series.flat(), ...band], steps = all.map(([step]) => step);
  if (!all.length) return "";
  const first = Math.min(...steps), last = Math.max(first + 1, ...steps);
  const most = Math.max(...all.map(([_, value]) => value)) || 1;
  const unit = 10 ** Math.floor(Math.log10(most));
  const top = [1, 2, 4, 6, 8, 10].find(times => times * unit > 0.999 * most) * unit;
  const x = step => 46 + (step - first) / (last - first) * 304;
  const y = value => 170 - value / top * 155;
  const path = points => line(points.map(([step, value]) => [x(step), y(value)]));
  const legend = make("figcaption", {}, make("b", {}, title), make("br")), told = [title];
  const svg = make("svg", {viewBox: "0 0 360 205", role: "img"});
  for (const value of [0, top / 4, top / 2, top * 3 / 4, top])
    svg.append(make("path", {class: "axis", d: `M46,${y(value)}H350`}),
      make("text", {x: 41, y: y(value) + 4}, short(value)));
  for (const step of new Set([first, Math.round((first + last) / 2), last]))
    svg.append(make("text", {x: x(step) + 4, y: 187}, short(step)));
  svg.append(make("text", {x: 210, y: 203}, "step"));
  if (band.length) svg.append(make("path", {class: "band", d: path(band)}));
  series.forEach((points, i) => {
    if (!points.length) return;
    svg.append(make("path", {class: `line${i}`, stroke: "currentColor", d: path(points)}));
    if (names.length > 1) legend.append(make("span", {class: `line${i}`}, names[i]));
    told.push(`${names[i]} ${short(points[0][1])} at first, ${short(points.at(-1)[1])} at last`);
  });
  svg.setAttribute("aria-label", told.join(". "));
  return make("figure", {}, legend, svg);
}

// ------------------------------------------------------------------------------------------ traces
const MARKS = {right: "\u2713", wrong: "\u2717", truncated: "\u2026", open: "?"};

// A box, as its left, top, right and bottom, or a polygon.
function outline(region) {
  const [left, top, right, bottom] = region;
  return region[0].length ? `${line(region)}Z` : `M${left},${top}H${right}V${bottom}H${left}Z`;
}

function showImage({image, size: [width, height], region}, {points, turns}, only) {
  const svg = make("svg", {viewBox: `0 0 ${width} ${height}`});
  if (only === undefined) {
    for (const {box} of turns) if (box) svg.append(make("path", {d: outline(box)}));
    if (region) svg.append(make("path", {class: "truth", d: outline(region)}));
    if (points.length) svg.append(make("path", {d: line(points.map(point => point.at))}));
  }
  const dots = points.map(({at: [x, y], text, inside}, i) => button(i + 1, null, {class: "point",
    style: `left: clamp(0%, ${100 * x / width}%, 100%); top: clamp(0%, ${100 * y / height}%, 100%)`,
    "data-point": i, "aria-label": `point ${i + 1} at ${text}${inside ? "" : ", outside"}`}));
  return make("div", {class: "stage"}, picture(image, "the image of the question"), svg,
    ...dots.filter((_, i) => only === undefined || only == i));
}

function showTurn({pieces, error, crop}, number) {
  const text = make("div", {dir: "auto"});
  for (const [piece, point] of pieces) {
    const parts = piece.split(/(<\/?(?:think|tool_call|answer)>|\{"name.*"coordinate": |\}\})/);
    const step = point === null ? {} : {class: "step", tabindex: 0, "data-point": point};
    text.append(make("span", step,
      ...parts.map((part, i) => i % 2 ? make("span", {class: "soft"}, part) : part),
      point === null ? "" : make("sup", {}, `\u00a0${point + 1}`)));
  }
  if (error) text.append(make("p", {class: "soft"}, `answered: ${error}`));
  const shown = crop ? picture(crop, `crop of turn ${number + 1}`) : "";
  return make("div", {class: "turn"}, text, shown);
}

// only: the point that is rated. Its turn is the last one shown, and its crop, so that nothing
// tells the rater how the trace ends.
function showTrace(item, trace, only) {
  const end = trace.turns.findIndex(turn => turn.pieces.some(([_, point]) => point === only));
  const turns = only === undefined ? trace.turns : trace.turns.slice(0, end + 1);
  const card = make("div", {}, showImage(item, trace, only), ...turns.map(showTurn));
  const light = (point, on) => card.querySelectorAll(`[data-point="${point}"]`).forEach(
    part => part.classList.toggle("lit", on || point == only));
  for (const part of card.querySelectorAll("[data-point]")) {
    part.onmouseenter = part.onfocus = () => light(part.dataset.point, true);
    part.onmouseleave = part.onblur = () => light(part.dataset.point, false);
  }
  light(only, true);
  return card;
}

function showReward({answer, ended, reward: {why, total, ...parts}}) {
  const told = Object.entries(parts).map(([name, value]) => `${name} ${short(value)}`).join(", ");
  return make("p", {}, `answer: ${answer} (${ended})`, make("br"),
    `reward ${short(total)}: ${told.replace("_", " ")}`, make("br"), why && `fault: ${why}`);
}

const showQuestion = item => make("h2", {dir: "auto"}, item.question);

// ------------------------------------------------------------------------------------------ report
function report() {
  const log = data.log.split("\n").slice(0, -1).map(
    text => JSON.parse(text.replace(/-?(NaN|Infinity)/g, "null")));
  const given = ([_, value]) => value !== "" && value !== null;
  const settings = Object.entries(data.settings).filter(given);
  const folded = (title, part) => make("details", {}, make("summary", {}, title), part);
  main.append(make("div", {class: "grid"}, ...CHARTS.map(names => chart(log, names))),
    make("div", {class: "scroll"}, make("table", {}, ...rows(data.table.slice(0, 1), "th"),
      ...rows(data.table.slice(1), "td"))),
    folded("settings", make("table", {}, ...rows(settings, "td"))),
    folded("a search tree", make("pre", {class: "scroll"}, data.tree || "none")));
  const buttons = ["all", "right", "wrong", "truncated"].map(name => {
    const chosen = data.cases.filter(item => name == "all" || item.traces.at(-1).state == name);
    return button(`${name} (${chosen.length})`, event => {
      buttons.forEach(other => other.setAttribute("aria-pressed", other == event.target));
      start(chosen);
    });
  });
  const start = pager(item => [showQuestion(item),
    make("p", {dir: "auto"}, item.truth && `truth: ${item.truth}`),
    make("div", {class: "grid"}, ...item.traces.map((trace, i) => make("article", {},
      make("h3", {}, `${item.checkpoints[i]}: ${MARKS[trace.state]} ${trace.state}`),
      showTrace(item, trace), showReward(trace))))], ...buttons);
  buttons[0].click();
}

// ------------------------------------------------------------------------------------------ rating
const ASKED = [["on", "Is the point on the thing that the step names?",
    {y: "yes", n: "no", c: "cannot tell"}],
  ["helps", "Does it help to follow the step? (1 not at all, 5 very much)",
    {1: 1, 2: 2, 3: 3, 4: 4, 5: 5}]];
const ratings = {};

function exported() {
  const all = data.steps.map(({id, truth}) => ({id, truth, on: null, helps: null, ...ratings[id]}));
  return JSON.stringify({key: data.key, ratings: all}, null, 1);
}

function rating() {
  let now;
  try { Object.assign(ratings, JSON.parse(localStorage.getItem(data.key))); } catch { }
  main.append(make("p", {class: "soft"}, `Keys: y, n, c and 1 to 5 rate the step in colour; the
    arrows step on. Your answers are kept in this browser; export them at the end.`));
  const choices = [], done = make("p", {class: "soft", "aria-live": "polite"});
  for (const [name, question, values] of ASKED) {
    const bar = make("div", {class: "bar", role: "group", "aria-label": question}, question);
    for (const [key, value] of Object.entries(values)) {
      keys[key] = () => {
        ratings[now.id] = {...ratings[now.id], [name]: value};
        try { localStorage.setItem(data.key, JSON.stringify(ratings)); } catch { }
        start(data.steps, data.steps.indexOf(now));
      };
      const choice = button(key == value ? key : `${value} (${key})`, keys[key]);
      choices.push([choice, name, value]);
      bar.append(choice);
    }
    main.append(bar);
  }
  main.append(done);
  const href = () => URL.createObjectURL(new Blob([exported()]));
  const save = () => make("a", {download: "ratings.json", href: href()}).click();
  const start = pager(step => {
    now = step;
    for (const [choice, name, value] of choices)
      choice.setAttribute("aria-pressed", ratings[step.id]?.[name] === value);
    const full = data.steps.filter(({id}) => ratings[id]?.on && ratings[id]?.helps);
    done.textContent = `${full.length} of ${data.steps.length} steps are rated`;
    const item = data.cases[step.case];
    return [showQuestion(item), showTrace(item, item.traces[0], step.place)];
  }, button("export", save));
  start(data.steps);
}

({report, rating})[data.kind]();
</script>
"""


# --------------------------------------------------------------------------------- the command line

def family_of(config):
    """The family of a task: by its format; for the release's, by how the first answer is scored."""
    if config.family or config.task in TOYS:
        return config.family or "drawn"
    file = open_file(config.task, config.image_root)
    first = file.questions[0]
    in_words = "search" if first.answer in tuple(LETTERS) else "spatial"
    by_answer = {"point": "gui", "action": "web"}.get(first.kind, in_words)
    return file.family or by_answer


def configure(given, script):
    """The Config of a script, from the flags that were given. Raises UserError."""
    asked = Config(**given)
    if asked.task not in TOYS and not Path(asked.task).exists():
        raise UserError(f"--task {asked.task}: neither a file nor one of {', '.join(TOYS)}")
    return make_config(given, family_of(asked), script)


def main(given):
    config = configure(given, "evaluate")
    if config.ratings:
        return print_ratings(config.ratings)
    if config.draw:
        return write_drawings(config)
    if not config.model:
        raise UserError("--model PATH is needed: a hub id or a checkpoint folder, such as "
                        "runs/toy-search-zoom/rl")
    if bool(config.image) != bool(config.question):
        raise UserError("--image and --question go together")
    if config.json.endswith(".jsonl"):
        raise UserError(f"--json {config.json}: the answers are kept in a .jsonl beside it; give a "
                        "name that ends in .json")
    policy = load(config.model, **config.input_limits())
    dialogue = make_dialogue(config, config.model, policy)
    if config.image:
        question = Question(config.question, [config.image], "")
        trace, = next(rollout(policy, [question], dialogue, 1, [config.seed], **config.sampling()))
        show_trace(trace, config)
        if config.report:
            write_report(config.report, config, {config.model: [trace]}, Path(config.model).parent)
    else:
        evaluate_task(policy, dialogue, config)


def show_trace(trace, config):
    """Prints a trace, and draws it to --save."""
    print(trace.text())
    answer = trace.answer or "no answer"
    print(f"-> {answer} ({trace.ended}; {len(trace.zoom_points)} zoom calls)\n")
    if config.save:
        draw_trace(trace).save(config.save)


def evaluate_task(policy, dialogue, config):
    """Evaluates a task, with and without the tool; shows its first trace, prints the table, writes
    --json."""
    if config.task in TOYS:
        questions = questions_of(config, "test", config.n or 512)
    else:
        file = open_file(config.task, config.image_root)
        questions = file.part(config.n or len(file))
    print(describe_config(config, "evaluate"))
    print(dialogue.describe())
    sample = partial(sample_traces, policy, questions, dialogue, config.seed, **config.sampling())
    if config.rate:
        write_rating_page(config.rate, config, sample(PAGE_TRACES))
        return print(f"rating page: {config.rate}")
    answered, path = [], None
    if config.json:
        path = Path(config.json).with_suffix(".jsonl")
        answered = read_records(path, settings_of(config, dialogue, len(questions)))
    run_with = partial(evaluate, policy, questions, seed=config.seed, samples=config.samples,
                       answered=answered, path=path, **config.sampling())
    figures, no_tool = run_with(dialogue, log=print), None
    if config.mode == "zoom" and config.tool:
        no_tool = run_with(replace(dialogue, tool=False), log=partial(print, "without tool:"))
    if rank():
        return
    first_trace, = sample(1)
    show_trace(first_trace, config)
    row = cells(Path(config.task).stem, figures, no_tool)
    print_report(config, figures, row)
    if config.task in TOYS:
        print(describe_baseline(blind_accuracy(questions, dialogue)))
    if config.report:
        traces = {config.model: sample(PAGE_TRACES)}
        write_report(config.report, config, traces, Path(config.model).parent, [HEADS, row])
        print(f"report: {config.report}")
    if config.json:
        summary = dict(vars(figures))
        if no_tool or not config.tool:
            summary["accuracy_no_tool"] = (no_tool or figures).accuracy
        write_text(config.json, json.dumps(summary, indent=1) + "\n")


def blind_accuracy(questions, dialogue):
    """Of synthetic questions -> {number of random zoom calls: accuracy of a player who sees nothing
    else}"""
    calls = (0, 1, 4) if dialogue.mode == "zoom" else (0,)
    return {n: random_zoom_accuracy(questions, dialogue, n) for n in calls}


def describe_baseline(blind):
    """A line such as "random-zoom baseline, 0 / 1 / 4 crops: 0.167 / 0.250 / 0.412"."""
    accuracies = " / ".join(f"{accuracy:.3f}" for accuracy in blind.values())
    return f"random-zoom baseline, {' / '.join(map(str, blind))} crops: {accuracies}"


def settings_of(config, dialogue, n):
    """All that decides the result of an evaluation, for the first line of its answers."""
    settings = {name: value for name, value in vars(config).items()
                if name not in ("json", "save", "image", "question", "processes", "given", "out",
                                "report", "rate", "ratings", "draw")}
    return settings | {"dialogue": dialogue.to_json(), "n": n}


def print_report(config, figures, row):
    print(table([[*HEADS, "official", "n"], [*row, f"{figures.official:.3f}", figures.n]]))
    for name, group in (figures.by | figures.benchmarks).items():
        print(f"  {name}: accuracy {group['accuracy']:.3f}, n {group['n']}")
    if config.samples > 1:
        print(f"majority vote of {config.samples} samples: accuracy {figures.majority:.3f}")
    print("a trace:", *(f"{name} {getattr(figures, name):.2f} " for name in ("regions", *PHRASES)))


if __name__ == "__main__":
    run("evaluate", __doc__.splitlines()[0], main)
