"""Benchmarks: where questions come from, and how well a policy answers them.

In:  a checkpoint and a file of one of the data sets below, or one image and a question.
Out: accuracy with its interval, with and without the tool, the behaviours that the paper counts,
     a page with traces.

    python evaluate.py --model PATH --task FILE --image-root FOLDER
    python evaluate.py --model PATH --image my.png --question "..." --save trace.png
"""
import argparse
import base64
import csv
import hashlib
import html
import io
import json
import math
import os
import re
import socket
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
from multiprocessing.connection import Listener, wait
from pathlib import Path
from string import ascii_uppercase as LETTERS

import numpy as np

from model import Policy, UserError, gather, load, rank, world_size, write_text
from reward import (
    PHRASES,
    ROBOSPATIAL,
    Unusable,
    as_box,
    parse_action,
    row_of,
    score,
    scored_by,
)
from rollout import (
    Question,
    describe_settings,
    draw_trace,
    family_settings,
    fingerprint,
    in_one_line,
    in_words,
    input_limits,
    make_dialogue,
    number,
    open_lock,
    parse,
    parse_json,
    parse_points,
    read_image,
    rollout,
    run_script,
    sampling_of,
    set_single_turn,
    shared_flags,
    visible,
    web_question,
    whole,
    writing,
)

# ------------------------------------------------------------------------------- data sets: formats

# A reader makes a Question of a row, with the row's own names of images. An answer in words is as
# the row has it, and `make_question` finds out how it is scored; an answer that needs the image's
# size is a function of it. Sources: the page and the evaluation code of each.

FACET = " | "    # between the parts of a category, "mobile | text": scores are given by each part
PLATFORMS = {"ios": "mobile", "android": "mobile", "windows": "desktop", "macos": "desktop"}
ASKS_FOR_SHARES = re.compile(r"\s*Your answer should be formatted as a list of tuples.*", re.S)
CATEGORIES = ("category", "question_type", "sub_task", "data_source")    # fields, the first counts
# without one: of BLINK in a row's id, of V*Bench in its image's folder
CATEGORY = re.compile(r"^(?:val|test)_(\S+)_\d+ |(direct_attributes|relative_position)")
# What an answer of a kind shall look like, for rows that do not say it ("Description: the search
# button").
HINTS = {
    "point": "The answer is one point (x, y), in pixels of the image, between <answer> and "
             "</answer>.",
    "choice": "The answer is the letter or the text of one of the options.",
}
# How to know the rows that say it.
SAID = {
    "point": r"\(x,\s*y\)|\[x,\s*y\]|<answer>",
    "choice": r"<answer>|\b(answer|respond|reply)\b[^.:\n]{0,40}\b(letter|text|option)",
}


def read_conversation(row):
    """ViGoRL, evaluation and search: the first value is the question, the second its answer."""
    turns = row["conversations"]
    if isinstance(turns, dict):
        turns = [turns]
    said = [turn["value"] for turn in turns]
    if isinstance(said[0], list):                      # {"from": [...], "value": [...]}
        said = said[0]
    text, answer = said[:2]
    return Question(text, row.get("image"), answer)


def read_sft(row):
    """ViGoRL, SFT: the user's first turn is the question. Later images are crops of the trace."""
    text = next(turn["content"] for turn in row["messages"] if turn["role"] in ("user", "human"))
    return Question(text, row["images"][:max(1, text.count("<image>"))], row["gt_answer"])


def read_problem(row, answer):
    return Question(row["problem"], row["images"], row[answer])


def read_vstar(row):
    scored = scored_by(row["text"], row["label"], label=True)
    return Question(row["text"], row["image"], **scored)


def read_robospatial(row):
    """Yes or no; in the category "context" a polygon in [0, 1], and a question that asks for points
    in [0, 1], too: that sentence is left out, for points are in px here."""
    category = row["category"]
    text = ASKS_FOR_SHARES.sub("", row["question"])
    answer = row["answer"]
    if answer[0] not in "[(":
        category = f"{ROBOSPATIAL}, yes or no{FACET}{category}"
        return Question(text, row["img"], answer, category=category)
    corners = parse_points(answer)
    values = sum(corners, ())
    in_shares = all(0 <= value <= 1 for value in values)
    if len(corners) < 3 or not in_shares or answer.count(",") != len(values) - 1:
        raise Unusable("its answer is no polygon in [0, 1]")
    category = f"{ROBOSPATIAL}, {category}"
    return Question(text, row["img"], partial(scaled_to, corners), "point", category=category)


def read_element(row, answer, category=""):
    """An element of a screen, asked for in the words of ViGoRL's own rows."""
    text = f"Description: {row['instruction']}"
    return Question(text, row["img_filename"], answer, "point", category=category)


def read_screenspot(row):
    """bbox: x, y, width, height in px."""
    x, y, width, height = row["bbox"]
    platform = PLATFORMS.get(row["data_source"], "web")
    box = as_box([x, y, x + width, y + height])
    return read_element(row, box, f"{platform}{FACET}{row['data_type']}")


def read_screenspot_pro(row):
    """bbox: x1, y1, x2, y2 in px."""
    return read_element(row, as_box(row["bbox"]), f"{row['group']}{FACET}{row['ui_type']}")


def read_os_atlas(row):
    """bbox: x1, y1, x2, y2 in [0, 1]."""
    return read_element(row, partial(scaled_to, as_box(row["bbox"], limit=1)))


def scaled_to(shares, size):
    """A box or a polygon in shares of an image's sides -> in px of an image of this size."""
    if isinstance(shares, tuple):
        size = [*size, *size]
    return (np.array(shares) * size).tolist()


def read_hr_bench(row):
    """The image is in the row, in base64."""
    answer, options = row["answer"], [row[letter] for letter in "ABCD"]
    if not {str, int, float}.issuperset(map(type, options)):
        raise Unusable(f"its options, {options}, are not in words")
    if answer not in list("ABCD"):
        raise Unusable(f"its answer, {answer}, is none of its 4 options")
    lines = map("({}) {}".format, "ABCD", options)
    text = "\n".join([row["question"], *lines])
    image = f"data:image/jpeg;base64,{row['image']}"
    category = f"{row['category']}{FACET}cycle {row['cycle_category']}"
    return Question(text, image, answer, "choice", tuple(map(str, options)), category=category)


# A file has the format of its first row that has all the fields of one. The format says what the
# numbers of a box mean, never the numbers. family: of the settings; "": it depends on the answers.
FORMATS = (    # name, family, fields, reader
    ("ViGoRL SFT", "", "messages, images", read_sft),
    ("ViGoRL evaluation or search", "", "conversations", read_conversation),
    ("VisualProbe", "search", "problem, solution", partial(read_problem, answer="solution")),
    ("ViGoRL RL", "", "problem, answer", partial(read_problem, answer="answer")),
    ("V*Bench", "search", "text, label, category", read_vstar),
    ("RoboSpatial-Home", "spatial", "question, answer, img", read_robospatial),
    ("ScreenSpot-Pro", "gui", "img_filename, bbox, instruction, ui_type", read_screenspot_pro),
    ("ScreenSpot or ScreenSpot-V2", "gui", "img_filename, bbox, instruction, data_source",
     read_screenspot),
    ("OS-Atlas", "gui", "img_filename, bbox, instruction", read_os_atlas),
    ("HR-Bench", "search", "question, A, B, C, D, cycle_category", read_hr_bench),
)


def find_format(row):
    """The line of FORMATS for a row. Raises Unusable."""
    names = set(row) if isinstance(row, dict) else set()
    for line in FORMATS:
        if names.issuperset(line[2].split(", ")):
            return line
    known = "; ".join(f"{name} ({fields})" for name, _, fields, _ in FORMATS)
    seen = ", ".join(sorted(map(str, names))) or "(none)"
    raise Unusable(f"unknown format, its fields are {seen}. Known are: {known}")


def make_question(read, row, number, where):
    """A row -> its Question, checked. No image is opened. Raises Unusable."""
    try:
        question = read(row)
        if question.kind == "string":
            question = replace(question, **scored_by(question.text, question.answer))
        question.text = question.text.replace("<image>", "").strip()
        question.regions = [{"box": as_box(region["box"]), "name": str(region["name"])}
                            for region in row.get("regions") or []]
        if not all(region["name"].strip() for region in question.regions):
            raise Unusable("one of its regions has no name")
    except Unusable:
        raise
    except Exception as error:                         # a foreign file may hold anything
        raise Unusable("its fields do not hold what they should "
                       f"({type(error).__name__}: {error})") from None
    images = question.images if isinstance(question.images, list) else [question.images]
    if not images or not all(image and type(image) is str for image in images):
        raise Unusable("it has no image")
    if not question.text:
        raise Unusable("it has no question")
    question.images = images
    question.where = where
    question.id = str(first_of(row, ("id", "question_id", "doc_id", "index"), number))
    # by its content, so that a question stays itself wherever its row stands
    answer = getattr(question.answer, "args", question.answer)
    content = json.dumps([question.text, answer, images])
    question.key = hashlib.sha1(content.encode()).hexdigest()[:16]
    if not question.category:
        found = CATEGORY.search(f"{row.get('id')} {images[0][:1000]}")
        named = found[1] or found[2] if found else ""
        question.category = str(first_of(row, CATEGORIES, named))
    if not re.search(SAID.get(question.kind, "(?!)"), question.text, re.I):
        question.hint = HINTS.get(question.kind, "")
    return question


def first_of(row, names, default):
    """The first of these fields that a row has."""
    return next((row[name] for name in names if row.get(name) not in (None, "")), default)


# --------------------------------------------------------------------------------- data sets: files

READ_AT_ONCE = 4               # questions whose images are read at a time
PIXELS_IN_MEMORY = 2**28       # about, of images that are loaded at a time: 768 MiB
ROOTS = (".", "images", "../images", "..", "../..")    # of images, from the file's folder


class QuestionFile(list):
    """The questions of a file, in memory; their images are read when they are needed.

    family: or "", see FORMATS. skipped: where and why, for each row that cannot be used."""
    def __init__(self):
        self.family, self.skipped = "", []

    def part(self, n=None):
        """`n` questions at most (None: all), spread evenly, for files are often sorted."""
        total = len(self)
        n = min(n or total, total)
        return [self[i * total // n] for i in range(n)]


@lru_cache
def open_file(path, image_root=""):
    """A file in one of the FORMATS, or a folder of .json files -> QuestionFile, read once."""
    path = Path(path)
    folder, files = path.parent, [path]
    if path.is_dir():
        folder = path
        files = sorted(path.glob("annotations/*.json")) or sorted(path.glob("*.json"))
    elif path.suffix not in (".jsonl", ".json", ".tsv"):
        raise UserError(f"{path}: not a .jsonl, .json or .tsv file, nor a folder of .json files. "
                        "(SAT and BLINK: take the .jsonl files of the ViGoRL release.)")
    found, name, read = QuestionFile(), "", None
    for file in files:
        for place, row in read_rows(file):
            where = f"{file}:{place}"
            try:
                if read is None:
                    name, found.family, _, read = find_format(row)
                found.append(make_question(read, row, place, where))
            except Unusable as why:
                found.skipped.append(f"{where}: {why}")
    place_images(found, folder, image_root)
    skipped = len(found.skipped)
    first = in_one_line(found.skipped[0]) if skipped else "Is it empty?"
    if not found:
        raise UserError(f"{path}: no usable row among {skipped}. {first}")
    names = frozenset(region["name"] for question in found for region in question.regions)
    for question in found:
        question.names = names
    print(f"{path}: {name}, {len(found)} questions")
    if skipped:
        print(f"{skipped} rows cannot be used, the first: {first}")
    return found


def read_rows(path):
    """Yields (number, row) of JSON lines, a JSON list, or tab-separated lines with a header."""
    number = 0
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is no file; give the path of a data file")
        # a byte that is no UTF-8 becomes a mark in its text; it costs no row
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
            if path.suffix == ".tsv":
                csv.field_size_limit(2**31 - 1)        # a cell may be an image
                rows = csv.DictReader(file, delimiter="\t")
            elif (text := file.read()).lstrip().startswith("["):
                rows = parse_json(text)
            else:
                rows = (parse_json(line.strip() or "null") for line in text.split("\n"))
            for number, row in enumerate(rows, 1):
                if row is not None:
                    yield number, row
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the path of a data file") from None
    except (ValueError, csv.Error) as error:
        line = number + getattr(error, "lineno", 1)
        why = getattr(error, "msg", error)
        raise UserError(f"{path}:{line}: cannot be read ({why}); repair or remove it") from None


def place_images(file, folder, image_root):
    """Makes paths of the rows' names of images: below image_root, or below the first of ROOTS where
    one is. A row whose name leads out of it is skipped."""
    names = [question.images[0] for question in file[:50]]
    roots = [Path(image_root)] if image_root else [folder / root for root in ROOTS]
    there = (root for root in roots for name in names if os.path.exists(root / name))
    root = next(there, roots[0])
    questions = file[:]
    file.clear()
    for question in questions:
        try:
            question.images = [below(root, name) for name in question.images]
            file.append(question)
        except Unusable as why:
            file.skipped.append(f"{question.where}: {why}")


def below(root, name):
    """A row's name of an image -> its path, or the data URI that it is. Raises Unusable where it
    leads out of the root."""
    if name.startswith("data:"):
        return name
    path = root / name
    inside = os.path.join(os.path.abspath(root), "")
    if not os.path.abspath(path).startswith(inside):
        raise Unusable(f"{path} lies outside of {root}; give as --image-root a folder above it")
    return path


def usable(questions):
    """Yields those of the questions that can be asked, with their images loaded, in lists as large
    as memory allows. Answers that need an image's size are filled in. The others are named on
    stderr."""
    part, pixels = [], 0
    with ThreadPoolExecutor() as threads:
        for begin in range(0, len(questions), READ_AT_ONCE):
            some = questions[begin:begin + READ_AT_ONCE]
            for question, fault in zip(some, threads.map(fault_of, some), strict=True):
                if fault:
                    name_skipped(fault)
                    continue
                part.append(question)
                pixels += sum(image.width * image.height for image in question.load())
                if pixels >= PIXELS_IN_MEMORY:
                    yield part
                    part, pixels = [], 0
    if part:
        yield part


def fault_of(question):
    """Why a question cannot be asked, or ""."""
    try:
        width, height = size = question.load()[0].size
    except UserError as error:
        return str(error)
    if callable(question.answer):
        question.answer = question.answer(size)
    if question.kind == "point" and type(question.answer[0]) in (int, float):
        left, top = question.answer[:2]
        if left >= width or top >= height:
            return f"{question.where}: its box {question.answer} lies outside of its image, {size}"
    return ""


@lru_cache
def name_skipped(fault):
    """Once in a process, for a file is read many times."""
    print(f"skipped: {in_one_line(fault)}", file=sys.stderr)


def settle(args, training):
    """Fills in what the task decides: `family`, and bounds of the model input that no flag gave.

    The family is that of the file's format; for the release's, of how its first answer is scored;
    of a single image, "search"."""
    if args.task and not args.family:
        file = open_file(args.task, args.image_root)
        first = file[0]
        # in the release, visual search is answered by letters, spatial tasks by texts
        in_words = "search" if first.answer in tuple(LETTERS) else "spatial"
        by_answer = {"point": "gui", "action": "web"}.get(first.kind, in_words)
        args.family = file.family or by_answer
    settings = family_settings(args.family or "search", training)
    args.max_image_side = settings.get("max_image_side")
    if args.max_pixels is None:
        args.max_pixels = settings.get("max_pixels")


# -------------------------------------------------------------------------------------- evaluation

# Questions that a process takes at a time: enough to keep a GPU busy; and few, so that several
# processes have work in a benchmark of some hundred questions, and that a killed run loses little.
QUESTIONS_A_BLOCK = 128


def evaluate(policy, questions, dialogue, seed, *, samples=1, done=(), path=None, log=None, keep=0,
             **sampling):
    """Answers every question `samples` times. -> ({figure: value}, the Traces for a page), the
    figures on every process

    Processes take turns at blocks of questions. The random numbers of a question follow from the
    seed and its content alone, so that neither breaks nor the number of processes nor other
    questions change its answers. One that cannot be asked is skipped, named and counted.

    done: what `read_answers` found. path: file that answers are added to, a line a question. log:
    called with a line a round of blocks. keep: of so many questions, the first ones, the first
    Trace is returned (by the first process). sampling: see `model.Engine`."""
    asked = {question.key: question for question in questions}
    answers = {rows[0]["key"]: rows for rows in done
               if rows[0]["tool"] == dialogue.tool and rows[0]["key"] in asked}
    if log and answers:
        log(f"{len(answers)} of {len(questions)} questions were answered before")
    # those that a page shows are asked anew; a row that is there twice is asked once
    on_page = {*[key for key in asked if key in answers][:keep]}
    left = [question for key, question in asked.items() if key in on_page or key not in answers]
    kept = []
    for begin in range(0, len(left), world_size() * QUESTIONS_A_BLOCK):      # a block a process
        first = begin + rank() * QUESTIONS_A_BLOCK
        mine = []
        for part in usable(left[first:first + QUESTIONS_A_BLOCK]):
            seeds = [f"evaluation {seed} {question.key}" for question in part]
            groups = rollout(policy, part, dialogue, samples, seeds, **sampling)
            for traces in groups:
                mine.append([row_of(trace) | {"tool": dialogue.tool} for trace in traces])
            kept += [traces[0] for traces in groups[:keep - len(kept)]]
        new = sum(gather(mine), [])
        if path and rank() == 0:
            with writing(path), open(path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(rows) + "\n" for rows in new)
        answers |= {rows[0]["key"]: rows for rows in new}
        if log:
            accuracy = mean(row["correct"] for rows in answers.values() for row in rows)
            log(f"{len(answers)}/{len(questions)} questions, accuracy {accuracy:.3f}")
    found = [answers[question.key] for question in questions if question.key in answers]
    if not found:
        raise UserError(f"none of {len(questions)} questions can be asked, see above")
    return figures(found) | {"skipped": len(questions) - len(found)}, kept


def read_answers(path, settings):
    """What an earlier run left in a file: for each question answered, the rows of its samples.

    The file is made if it is not there. Its first line holds the settings, all that decides the
    result: where they differ, it is a UserError. A last line that is not complete is dropped. Only
    the first process reads and writes."""
    if rank():
        return gather(None)[0]
    try:
        if not path.exists():
            write_text(path, json.dumps(settings) + "\n")
        first, *lines, _ = path.read_text(encoding="utf-8").split("\n")
        earlier = dict(json.loads(first))
        answered = [rows for rows in map(json.loads, lines) if {rows[0]["key"], rows[0]["tool"]}]
        figures(answered)                              # each row has what they need
    except Exception as error:                         # a damaged file may hold anything
        raise UserError(f"{path}: cannot be read as answers of an evaluation ({error}); move it "
                        "away, or give another --json FILE") from None
    settings = json.loads(json.dumps(settings))
    other = [f"{name} {earlier.get(name)}" for name in earlier | settings
             if earlier.get(name) != settings.get(name)]
    if other:
        raise UserError(f"{path} has answers with {', '.join(other)}; go on with the same, move "
                        "it away, or give another --json FILE")
    with writing(path):
        write_text(path, "\n".join([first, *lines, ""]))
    return gather(answered)[0]


# ------------------------------------------------------------------------------------------ figures

MEANS = ("official", "format", "grounded", "diversity", "zoom_calls", "several_crops", "overlong",
         "regions", *PHRASES)
BLINK = ("Art_Style", "Counting", "Forensic_Detection", "Functional_Correspondence", "IQ_Test",
         "Jigsaw", "Multi-view_Reasoning", "Object_Localization", "Relative_Depth",
         "Relative_Reflectance", "Semantic_Correspondence", "Spatial_Relation",
         "Visual_Correspondence", "Visual_Similarity")
# Whose score is a mean over categories, each of the same weight. That of the others is the accuracy
# over all questions, of RoboSpatial-Home over its category "yes or no".
BENCHMARKS = {
    "BLINK, mean of sub-tasks": BLINK,
    "BLINK, mean of the spatial three": ("Multi-view_Reasoning", "Relative_Depth",
                                         "Spatial_Relation"),
    "HR-Bench, mean of option cycles": ("cycle 0", "cycle 1", "cycle 2", "cycle 3"),
}


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
    middle = p
    half = z * float(np.std(shares)) / math.sqrt(max(1, n - 1))
    if set(shares) <= {0, 1}:
        scale = 1 + z**2 / n
        middle = (p + z**2 / n / 2) / scale
        half = z * math.sqrt(p * (1 - p) / n + (z / n / 2)**2) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


def figures(groups):
    """The rows of each question's samples -> the figures of an evaluation, a dict.

    accuracy: share of right answers; ci95: bounds of its 95 % interval. on_target, true_thoughts:
    shares, None where that is not known. by: accuracy by category and by its parts; benchmarks: see
    BENCHMARKS; the rule of RoboSpatial-Home's is its own. The others are means over traces: reward,
    official (right by the public code's rule), format, grounded, diversity, zoom_calls (that were
    answered), several_crops (of different places), overlong (out of tokens or zoom calls), and the
    behaviours."""
    rows = sum(groups, [])
    found = rate([mean(row["correct"] for row in samples) for samples in groups])
    found["reward"] = mean(row["total"] for row in rows)
    for name in MEANS:
        found[name] = mean(row[name] for row in rows)
    for name in ("on_target", "true_thoughts"):
        found[name] = mean(sum((row[name] for row in rows), []), None)
    shares = {}                                        # of right samples, by category
    for samples in groups:
        category = samples[0]["category"]
        rule = "official" if category.startswith(ROBOSPATIAL) else "correct"
        share = mean(row[rule] for row in samples)
        for name in {category, *category.split(FACET)} - {""}:
            shares.setdefault(name, []).append(share)
    found["by"] = {name: rate(shares[name]) for name in sorted(shares)}
    found["benchmarks"] = {}
    for name, categories in BENCHMARKS.items():
        present = [mean(shares[category]) for category in categories if category in shares]
        if len(present) > 1:
            found["benchmarks"][name] = mean(present)
    return found


def rate(shares):
    return {"n": len(shares), "accuracy": mean(shares), "ci95": interval(shares)}


HEADS = ["", "accuracy", "95 %", "without tool", "format", "on target", "true thoughts",
         "zoom calls", "several crops", "overlong"]


def cells(name, found, no_tool=None):
    """A row of a table under HEADS. found: figures; no_tool: the accuracy without the tool."""
    def share(value):
        return "-" if value is None else f"{value:.3f}"
    return [name, share(found["accuracy"]), "{:.3f}-{:.3f}".format(*found["ci95"]), share(no_tool),
            share(found["format"]), share(found["on_target"]), share(found["true_thoughts"]),
            f"{found['zoom_calls']:.2f}", share(found["several_crops"]), share(found["overlong"])]


def table(rows):
    """Lists of cells -> aligned lines, the first column to the left and the others to the right."""
    rows = [list(map(str, row)) for row in rows]
    first, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([name.ljust(first), *map(str.rjust, cells, widths)])
                     for name, *cells in rows)


# -------------------------------------------------------------------------------------- a web agent

MANY_TOKENS = 4_096     # of a page, at which its step may take minutes
SILENCE = 10            # s, before the key is shown or in mid-message, that end a connection


class WebAgent:
    """A policy behind the interface of VisualWebArena's agents. An answer is parsed, never run, and
    handed on as text.

    policy: a Policy, or a checkpoint's path or hub id. tries: how often an action is asked for,
    each time with other random numbers, until one can be used. settings: flags of this script, such
    as temperature=0.5; the others are those of the family "web".

    VisualWebArena pins older versions of torch and transformers, so the agent runs in a process of
    its own, and the two exchange JSON and PNG bytes; nothing is unpickled. Both need the same
    secret in the environment, VIGORL_KEY. The agent's side, in this folder:

        python evaluate.py --model CHECKPOINT --mode grounded --serve 6000

    In VisualWebArena's `run.py`, with `--observation_type image_som --action_set_tag som`, this,
    and `agent = ViGoRL()` instead of `construct_agent(...)`:

        import io, json, os, sys
        from multiprocessing.connection import Client
        from PIL import Image
        from browser_env.actions import create_id_based_action

        class ViGoRL:
            def __init__(self):
                key = os.environb.get(b"VIGORL_KEY") or sys.exit("VIGORL_KEY is not set")
                self.line = Client(("localhost", 6000), authkey=key)

            def next_action(self, trajectory, intent, meta_data, images=None, **other):
                state, history = trajectory[-1], meta_data["action_history"]
                begins = history == ["None"]
                message = {"intent": intent, "action_history": history, "reset": begins,
                           "text": state["observation"]["text"], "url": state["info"]["page"].url}
                parts = [json.dumps(message).encode()]
                screen = Image.fromarray(state["observation"]["image"])
                shown = images or [] if begins else []        # the agent keeps them for the task
                for image in [screen, *(image.convert("RGB") for image in shown)]:
                    if image is not screen:
                        image.thumbnail((3600, 3600))         # what the policy sees at most
                    file = io.BytesIO()
                    image.save(file, "PNG", compress_level=1)
                    parts.append(file.getvalue())
                try:
                    for part in [b"%d" % len(parts), *parts]:
                        self.line.send_bytes(part)
                    reply = json.loads(self.line.recv_bytes())
                except (OSError, EOFError) as error:          # run.py must not go on without agent
                    sys.exit(f"the agent is gone: {error!r}")
                if "error" in reply:
                    raise ValueError(reply["error"])          # run.py ends this task with it
                action = create_id_based_action(reply["action"])
                action["raw_prediction"] = reply["trace"]
                return action

            def reset(self, test_config_file): pass
            def set_action_set_tag(self, tag): pass
    """

    def __init__(self, policy, mode="zoom", tries=3, **settings):
        parser = make_parser()
        if mode != "zoom":
            set_single_turn(parser)
        self.args = parser.parse_args([f"--mode={mode}"])
        vars(self.args).update(training=False, max_image_side=None, family="")
        if unknown := settings.keys() - vars(self.args).keys():
            raise TypeError(f"no such settings: {', '.join(sorted(unknown))}")
        vars(self.args).update(settings, family="web")
        settle(self.args, training=False)
        checkpoint = "" if isinstance(policy, Policy) else str(policy)
        if checkpoint:
            policy = load(checkpoint, **input_limits(self.args))
        self.policy = policy
        self.tries = tries
        self.dialogue = make_dialogue(self.args, checkpoint, policy)
        self.reset()

    def reset(self, test_config_file=None):
        """A new task begins: what the agent does in it does not depend on the tasks before."""
        self.asked = 0
        self.done = {}           # number of a step: its action in words
        self.intent_images = []

    def set_action_set_tag(self, tag):
        """Part of the interface. Actions are written with the elements' numbers in any case."""

    def next_action(self, trajectory, intent, meta_data, images=None, output_response=False):
        """See `web_question` for what comes in; meta_data: {"action_history": texts}, of which the
        agent's own are told with the elements' names. -> one action, such as "click [12]"

        Where no try gives one it is "stop [...]", with the reason. output_response: print the
        traces. Raises UserError where there is no screenshot."""
        # an empty history has a "None"
        before = [str(one) for one in meta_data.get("action_history", []) if one != "None"]
        history = [self.done.get(step) or action for step, action in enumerate(before)]
        question = web_question(self.dialogue, trajectory, intent, history, images)
        width, height = self.policy.input_size(*question.images[0].size)
        tokens = width * height // self.policy.token_px**2
        if tokens > MANY_TOKENS:
            print(f"a page of {tokens:,} image tokens: it may take minutes")
        sampling = eval_sampling(self.args)
        for _ in range(self.tries):
            self.asked += 1
            seed = f"web {self.args.seed} {self.asked}"
            [[self.trace]] = rollout(self.policy, [question], self.dialogue, 1, [seed], **sampling)
            if output_response:
                print(visible(self.trace.text()), flush=True)
            try:
                action = parse_action(self.trace.answer or "")
                if action.text.strip() or action.name not in ("type", "press", "goto"):
                    self.done[len(before)] = in_words(action, trajectory[-1])
                    return str(action)
                why = f"there is nothing to {action.name}"
            except ValueError as error:
                why = str(error)
            sampling["temperature"] = sampling["temperature"] or 1.0    # else it would say the same
        return f"stop [no usable action in {self.tries} tries: {why}]"

    def answer_json(self, message, images):
        """`next_action` for an environment in another process, which is not trusted.

        message: a JSON object with the "intent", the "action_history", the "text" (the page's
        elements), the "url", and "reset": true where a new task begins. images: PNG files as bytes,
        the screenshot first; behind it the intent's, which are kept until the next task begins.
        -> bytes, a JSON object with the "action", the "seconds", the "question", the "trace" and
        its "points" (px of the model input), or with an "error"."""
        started = time.monotonic()
        try:
            request = parse_json(message)
            screen, *others = [read_image(image) for image in images]
            if request.get("reset"):
                self.reset()
            self.intent_images = others or self.intent_images
            state = {"observation": request | {"image": screen}, "info": request}
            action = self.next_action([state], str(request["intent"]), request, self.intent_images)
            reply = {"action": action, "seconds": round(time.monotonic() - started, 2),
                     "question": self.dialogue.asked(self.trace.question),
                     "trace": "\n".join(turn.text for turn in self.trace.turns),
                     "points": [turn.points for turn in self.trace.turns]}
        except Exception as error:                     # a foreign message may hold anything
            reply = {"error": repr(error)}
        return json.dumps(reply).encode()


def serve(args):
    """Answers VisualWebArena on a port of this machine, one connection after another, and appends
    what was asked and answered to a file, until Ctrl-C. What is no request as `WebAgent` describes
    it ends a connection, never the server. Raises UserError."""
    key = os.environb.get(b"VIGORL_KEY")
    if not key:
        raise UserError("VIGORL_KEY is not set; give both sides the same secret in it")
    path = Path(args.json or "runs/serve.json").with_suffix(".jsonl")
    check_output("--json", path, [".jsonl"])
    try:
        listener = Listener(("localhost", args.serve), backlog=100, authkey=key)
    except (OSError, OverflowError) as error:
        raise UserError(f"--serve {args.serve}: {error}; give another port") from None
    agent = WebAgent(args.model, **vars(args))
    print(describe_settings(agent.args), agent.dialogue.describe(), sep="\n")
    print(f"port {args.serve} is open, steps go to {path}; Ctrl-C ends it")
    port = listener._listener._socket
    port.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", SILENCE, 0))
    with open(path, "ab", buffering=0) as log, listener, suppress(KeyboardInterrupt):
        while wait([port]):
            try:
                with listener.accept() as line:
                    while line.poll(None):
                        answer_request(agent, line, log)
            except Exception as error:                 # a foreign client may do anything
                print(f"a connection ended: {visible(repr(error))}")
    print(f"port {args.serve} is closed")


def answer_request(agent, line, log):
    """Reads a request: how many parts it has, a digit, and the parts, the message first; answers.
    Raises whatever a connection can."""
    parts = range(int(line.recv_bytes(maxlength=1)))
    message, *images = [line.recv_bytes(maxlength=2**26) for _ in parts]
    reply = agent.answer_json(message, images)
    log.write(reply + b"\n")
    print(visible(reply.decode(), 150))
    line.send_bytes(reply)


# --------------------------------------------------------------------------------------- the report

PAGE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: auto; padding: 1rem;
  overflow-wrap: anywhere }}
.grid {{ display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 16rem), 1fr)) }}
.wide {{ overflow-x: auto; overflow-wrap: normal }}
.wide pre {{ white-space: pre; font-family: monospace }}
figure {{ margin: 0 }}
img {{ width: 100% }}
svg {{ display: block; width: 100%; height: 8rem; border: 1px solid #8888; fill: none;
  stroke: #3d8fc6; stroke-width: 2 }}
td {{ padding: .2rem .7rem; border-bottom: 1px solid #8888 }}
pre {{ white-space: pre-wrap; font: inherit; border-left: 3px solid #8888; padding-left: .7rem }}
summary {{ cursor: pointer; font-weight: bold }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


def write_report(path, title, settings, charts, table_rows, tree, traces):
    """Writes the page of a run: one static file without scripts, in which all text is escaped.

    settings: {name: value}. charts: HTML, see `train_rl.curves`. table_rows: lists of cells, the
    heads first. tree: text of a search tree. traces: {stage: its Traces}, of the same questions in
    the same order; they are shown side by side, by how the last stage's ended."""
    in_force = [pair for pair in settings.items() if pair[1] not in (None, "")]
    parts = [html_table(table_rows), '<div class="grid">', *charts, "</div>",
             folded("settings", html_table(in_force))]
    if tree:
        parts.append(folded("a search tree", f'<div class="wide"><pre>{shown(tree)}</pre></div>'))
    by_state = {}
    for row in zip(*traces.values(), strict=True):
        question = html_question(zip(traces, row, strict=True))
        by_state.setdefault(state_of(row[-1]), []).append(question)
    for state, questions in by_state.items():
        parts.append(folded(f"{state} ({len(questions)})", "\n".join(questions), "open"))
    write_text(path, PAGE.format(title=shown(title), body="\n".join(parts)))


def folded(title, content, state=""):
    return f"<details {state}><summary>{title}</summary>\n{content}\n</details>"


def shown(text):
    return html.escape(visible(text))


def html_table(rows):
    lines = ["<tr>" + "".join(f"<td>{shown(cell)}</td>" for cell in row) for row in rows]
    return '<div class="wide"><table>' + "\n".join(lines) + "</table></div>"


def state_of(trace):
    """How a trace ended, in a word; "open": the question is the user's own."""
    if trace.overlong:
        return "truncated"
    if trace.question.answer == "":
        return "open"
    return "right" if (trace.score or score(trace)).correct else "wrong"


def html_question(traces):
    """(stage, Trace) pairs of one question -> picture, text, reward and its first fault of each."""
    sections = []
    for stage, trace in traces:
        question, scored = trace.question, trace.score or score(trace)
        picture, file = draw_trace(trace), io.BytesIO()
        picture.thumbnail((640, 1280))
        picture.save(file, "webp", quality=80)
        data = base64.b64encode(file.getvalue()).decode()
        text = trace.text().removeprefix(question.text).strip()
        parts = [f"{name} {value}" for name, value in vars(scored).items() if value != ""]
        sections.append(f'''<section><h4>{shown(stage)}: {state_of(trace)}</h4>
<img alt="points and crops" src="data:image/webp;base64,{data}">
<pre dir="auto">{shown(text)}</pre>
<p>answer: {shown(trace.answer)} ({trace.ended})<br>reward: {shown(", ".join(parts))}</p>
</section>''')
    question.release()
    return (f'<h3 dir="auto">{shown(question.text)}</h3><p>truth: {shown(question.answer)}</p>'
            f'<div class="grid">{"".join(sections)}</div>')


# --------------------------------------------------------------------------------- the command line

PAGE_TRACES = 16    # questions on a report


def make_parser():
    """The flags of this script; sampling as in the authors' evaluation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shared_flags(parser)
    eval_flags(parser)
    parser.set_defaults(temperature=0.5, top_p=0.99)
    add = parser.add_argument_group("evaluation").add_argument
    add("--top-k", type=whole(0), default=0, help="sample from so many tokens at most (0: all)")
    add("--repetition-penalty", type=number(1e-3), default=1.0,
        help="logits of tokens that are there already are divided by it (1: not)")
    add("--samples", type=whole(1), default=1, help="rollouts a question")
    add("--tool", action=argparse.BooleanOptionalAction, default=True,
        help="without it the answer is asked for at once")
    add("--json", default="", help="file for the figures; answers go to the .jsonl beside it")
    add("--image", default="", help="ask about this image")
    add("--question", default="", help="what to ask about --image")
    add("--save", default="",
        help="file for the (first) trace as a picture (.png), or for a page with some (.html)")
    add("--serve", type=whole(1), help="be the agent of VisualWebArena on this port")
    return parser


def eval_flags(parser):
    """Adds the flag that train_rl.py has, too."""
    parser.add_argument("--n", type=whole(1), help="questions of an evaluation (None: all)")


def eval_sampling(args):
    """Arguments of `model.Engine`."""
    return sampling_of(args) | {"top_k": args.top_k, "repetition_penalty": args.repetition_penalty}


def check_output(flag, path, endings):
    """Raises UserError where a file that is to be written at the end cannot be written."""
    part = Path(f"{path}.part")
    with suppress(OSError, ValueError):
        part.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        part.unlink(missing_ok=True)
        if Path(path).suffix in endings and not os.path.isdir(path):
            return
    raise UserError(f"{flag} {path}: give a name that ends in {' or '.join(endings)}, in a folder "
                    "that can be written to")


def main():
    args = parse(make_parser(), "rollout", "evaluate")
    if args.json:
        check_output("--json", args.json, [".json"])
    if args.save:
        check_output("--save", args.save, [".png", ".jpg", ".html"])
    if bool(args.image) != bool(args.question):
        raise UserError("--image and --question go together")
    if args.serve:
        return serve(args)
    settle(args, training=False)
    policy = load(args.model, **input_limits(args))
    dialogue = make_dialogue(args, args.model, policy)
    print(describe_settings(args))
    print(dialogue.describe())
    rows = []
    if args.image:
        question = Question(args.question, [args.image], "")
        [traces] = rollout(policy, [question], dialogue, 1, [args.seed], **eval_sampling(args))
    else:
        traces, rows = evaluate_task(policy, dialogue, args)
    if rank():
        return
    trace = traces[0]
    print(visible(trace.text()))
    answer = visible(trace.answer or "no answer")
    print(f"-> {answer} ({trace.ended}; {len(trace.zoom_points)} zoom calls)\n")
    if rows:
        print(table(rows))
    with writing(args.save):
        if args.save.endswith(".html"):
            title = f"{args.image or args.task}, {args.mode}"
            write_report(args.save, title, vars(args), [], rows, "", {args.model: traces})
        elif args.save:
            draw_trace(trace).save(args.save)


def evaluate_task(policy, dialogue, args):
    """Evaluates a task, with and without the tool; prints figures, writes --json.
    -> the first Traces, the table's rows"""
    questions = open_file(args.task, args.image_root).part(args.n)
    done, path, lock = [], None, None
    if args.json:
        path = Path(args.json).with_suffix(".jsonl")
        lock = open_lock(path.with_suffix(".lock"), "--json")
        # all that decides an answer; the questions may come and go
        settings = {name: value for name, value in vars(args).items()
                    if name not in ("json", "save", "config", "n", "tool")}
        settings |= {"dialogue": dialogue.to_json(), "sha1_of_model": fingerprint(args.model)}
        done = read_answers(path, settings)
    run = partial(evaluate, policy, questions, seed=args.seed, samples=args.samples, done=done,
                  path=path, **eval_sampling(args))
    keep = PAGE_TRACES if args.save.endswith(".html") else 1
    found, traces = run(dialogue, log=print, keep=keep)
    without = None
    if args.mode == "zoom" and args.tool:
        blind, _ = run(replace(dialogue, tool=False), log=partial(print, "without tool:"))
        without = found["accuracy_no_tool"] = blind["accuracy"]
    for name, part in found["by"].items():
        print(f"  {visible(name)}: accuracy {part['accuracy']:.3f}, n {part['n']}")
    for name, accuracy in found["benchmarks"].items():
        print(f"  {name}: {accuracy:.3f}")
    print("a trace:", *(f"{name} {found[name]:.2f} " for name in ("regions", *PHRASES)))
    if args.json:
        if rank() == 0:
            with writing(args.json):
                write_text(args.json, json.dumps(found, indent=1) + "\n")
        lock.close()
    row = [*cells(Path(args.task).stem, found, without), f"{found['official']:.3f}", found["n"]]
    return traces, [[*HEADS, "official", "n"], row]


if __name__ == "__main__":
    run_script(main)
