"""The dialogue: settings, questions, coordinates, the zoom tool, turns, many traces at once; and
the synthetic scenes that the tiny base acts in.

In:  questions about images. Out: `Trace`s: which tokens the policy sampled, where it pointed, what
it was shown, how it ended.

Four modes, as in the paper: `direct` (an answer only), `think` (a thought, then the answer),
`grounded` (a thought whose steps point at the image) and `zoom` (turns: a thought that points and a
zoom call, answered by a crop, ..., the answer).

There are two systems of coordinates. The policy reads and writes pixels of the model input, the
image after the image processor's resize. Files, boxes and crops are in pixels of the original
image. `Frame` converts, and nothing else does.

Departures from the public code: crops are cut from the original, so that a zoom adds detail; a
window at the border is moved inside, never stretched; bad calls and points outside are answered in
words; what is injected is known by construction.
"""
import argparse
import inspect
import io
import json
import logging
import math
import os
import random
import re
import signal
import sys
import textwrap
import threading
import time
import traceback
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import partial
from itertools import islice, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, get_args, get_type_hints

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageOps
from torch.multiprocessing.spawn import ProcessExitedException, start_processes
from transformers.utils import cached_file

from model import Engine, Sequence, UserError, rank, world_size

# ----------------------------------------------------------------------------------------- settings

MODES = ("direct", "think", "grounded", "zoom")
FAMILIES = ("drawn", "spatial", "search", "gui", "web")


@dataclass
class Config:
    """Every setting of the three scripts: a flag each, whose help text is the comment behind it.

    The defaults are those of the tiny base and a synthetic task; PRESETS has what differs for real
    models and data. A heading names the scripts that know the flags below it."""

    # train_sft, train_rl, evaluate: the policy and its task
    model: str = ""                    # checkpoint folder or hub id; none: the tiny base, made here
    task: str = "toy-search"           # toy-search, toy-spatial, toy-gui, or a file of questions
    image_root: str = ""               # folder that a file's images are named from
    family: Literal[FAMILIES] | None = None    # kind of task, for the defaults (known by the task)
    mode: Literal[MODES] = "zoom"      # how the policy answers
    dialogue: str = ""                 # JSON file with parts of the wording, see dialogue.json
    seed: int = 0                      # decides everything that is random
    processes: int | None = None       # on a CPU, of one thread each (one a core, 8 at most)

    # train_sft, train_rl, evaluate: images, crops and sampling
    max_pixels: int | None = None      # area of the model input at most, px (the checkpoint's own)
    min_pixels: int | None = None      # area of the model input at least, px (the checkpoint's own)
    max_image_side: int | None = None  # longest side of the model input at most, px (any)
    crop_half: int = 32                # half the side of a crop, px of the original image
    crop_size: int = 64                # side of a crop as the model gets it, px
    crop_dot: bool = False             # mark the point of a zoom call by a red dot in its crop
    max_crops: int = 4                 # zoom calls answered a trace; then the answer is asked for
    temperature: float = 1.0           # of sampling; 0: the likeliest token
    top_p: float = 1.0                 # sample from the likeliest tokens that add up to this
    turn_tokens: int = 48              # tokens sampled a turn at most
    response_tokens: int = 288         # tokens behind the question at most, crops included
    cache_tokens: int | None = 65_536  # columns of K/V in flight (real: by a GPU's free memory)

    # train_sft, train_rl, evaluate: results
    out: str = ""                      # folder of the run (runs/TASK-MODE), or of --draw's pictures

    # train_sft, train_rl: the run
    resume: bool = False               # go on with the run in --out
    micro_tokens: int = 2048           # tokens in a forward and backward pass at most
    train_vision: bool = False         # train the vision tower too

    # train_sft, train_rl: warm start
    base_steps: int = 1050             # pretraining steps of the tiny base before its exam
    teacher: str = ""                  # checkpoint that searches for traces (the policy itself)
    traces: str = ""                   # fine-tune on this file of traces instead of searching
    export: str = ""                   # also write the traces in the release's form, crops as files
    search_mode: Literal["zoom", "grounded"] = "zoom"    # with --mode zoom: search in single turns?
    search_questions: int = 128        # training questions that are searched
    simulations: int = 8               # of the tree search, a question
    chains: int = 2                    # traces kept a question at most
    show_trees: int = 0                # search trees to print
    backtrack: bool = True             # also traces that correct a wrong one (--no-backtrack)
    sft_steps: int | None = 30         # steps of fine-tuning; 0: GRPO starts from the base
    sft_batch: int = 32                # traces a step
    sft_lr: float = 5e-4               # peak learning rate, AdamW

    # train_rl: GRPO
    steps: int = 45                    # GRPO steps
    questions: int = 16                # questions a step
    update_questions: int | None = None    # questions an update (all of a step)
    group: int = 8                     # traces a question
    optimizer: Literal["muon", "adamw"] = "muon"    # muon: of hidden matrices; AdamW of the rest
    lr: float = 6e-3                   # peak learning rate
    adamw_lr: float = 4e-4             # peak learning rate of the rest, with muon
    warm_up: int = 5                   # steps until the peak
    final_lr: float = 0.0              # share of the peak at the end
    kl: float = 0.15                   # coefficient of the KL penalty to the SFT model; 0: none
    clip_norm: float = 1.0             # norm to which gradients are clipped
    diversity: float = 0.0             # bonus of a further distinct crop; fades out by half-time
    overlong: Literal["mask", "zero"] = "zero"    # truncated and forced traces: unused, or reward 0
    scale_by_std: bool = True          # divide advantages by the group's standard deviation
    eval_n: int = 1024                 # held-out questions of the final table
    eval_task: str = ""                # file of these questions (a tenth of --task is held out)
    save_every: int = 25               # steps between checkpoints to resume from
    dry_run: bool = False              # print the settings and an estimate of GPU memory, and stop

    # evaluate: one evaluation
    n: int | None = None               # questions (synthetic 512; of a file all, or so many)
    samples: int = 1                   # rollouts a question; more: mean accuracy and majority vote
    tool: bool = True                  # --no-tool: the answer is asked for at once
    json: str = ""                     # file for the figures; answers go to the .jsonl beside it
    image: str = ""                    # ask about this image
    question: str = ""                 # what to ask about --image
    save: str = ""                     # draw the (first) trace to this PNG file
    report: str = ""                   # HTML file for figures and traces, to be looked at
    rate: str = ""                     # HTML file on which a person rates steps; nothing else
    ratings: tuple | None = None       # files that such pages exported; prints what they say
    draw: str = ""                     # synthetic task: --n pictures and questions go to --out

    given: tuple = ()

    def values(self, *names):
        return {name: getattr(self, name) for name in names}

    def sampling(self):
        """Arguments of `model.Engine`."""
        return self.values("temperature", "top_p", "turn_tokens", "response_tokens",
                           "cache_tokens")

    def input_limits(self):
        """Arguments of `model.load`."""
        return self.values("max_pixels", "min_pixels", "max_image_side")


# What differs from Config's defaults (paper, appendix; evaluation: the authors' scripts); a later
# one counts more. response_tokens: the paper's 2,048 sampled ones, and room for four crops.
GUI = dict(max_pixels=4_194_304, response_tokens=3072, crop_half=50, crop_size=384, crop_dot=True)
PRESETS = {
    "real": dict(turn_tokens=1024, response_tokens=4608, cache_tokens=None,
                 crop_half=182, crop_size=672),
    "toy-spatial": dict(mode="grounded", base_steps=1400, steps=50),
    "toy-gui": dict(base_steps=1400, steps=50),
    "spatial": dict(max_pixels=4_194_304),
    "search": dict(max_pixels=2_850_000),
    "gui": GUI,
    "web": GUI,
    "single turn": dict(turn_tokens=2048, response_tokens=2048),
    "evaluation": dict(temperature=0.5),
    "evaluation, several turns": dict(top_p=0.99),
    "evaluation, spatial": dict(max_image_side=1260),
    "evaluation, search": dict(max_pixels=12_960_000),
    "evaluation, gui": dict(max_pixels=12_960_000, crop_half=100, crop_size=512),
    "model": dict(micro_tokens=16_384, sft_steps=None, sft_lr=1e-6, steps=500, questions=128,
                  update_questions=64, group=5, optimizer="adamw", lr=1e-6, warm_up=0,
                  final_lr=1.0, kl=0.01, overlong="mask"),
    "model, several turns": dict(group=8, warm_up=25, clip_norm=0.2, diversity=0.2),
}


def presets_of(config, family, script):
    """The names of the PRESETS that go with a task of a family and a policy."""
    turns = "several turns" if config.mode == "zoom" else "single turn"
    names = ["real", family, turns] if family != "drawn" else []
    if script == "evaluate" and names:
        return [*names, "evaluation", *(f"evaluation, {name}" for name in names)]
    if script != "evaluate" and config.model:
        return [*names, "model", f"model, {turns}"]
    return names


def make_config(given, family, script):
    """The Config in force: the defaults, PRESETS over them, over these what was given by flags."""
    task = given.get("task")
    values = dict(PRESETS.get(task, {})) if task in TOYS else {}
    for name in presets_of(Config(**(values | given)), family, script):
        values |= PRESETS.get(name, {})
    config = Config(**{**values, **given, "family": family, "given": tuple(sorted(given))})
    if script != "evaluate" and config.temperature == 0:
        raise UserError("--temperature 0: the traces of a question would not differ, and there is "
                        "nothing to learn; give one above 0")
    if not 0 < config.top_p <= 1:
        raise UserError(f"--top-p {config.top_p}: must be above 0 and at most 1")
    least = {"seed": -math.inf, "max_crops": 0, "warm_up": 0, "group": 2, "show_trees": 0,
             "sft_steps": 0}
    for name, value in vars(config).items():
        bound = least.get(name, 1)
        if type(value) is int and value < bound:
            raise UserError(f"--{flag_of(name)} {value}: must be at least {bound}")
        if type(value) is float and not 0 <= value < math.inf:
            raise UserError(f"--{flag_of(name)} {value}: must be a number that is not negative")
    return config


def describe_fields(script):
    """The fields that are flags of a script, from Config's source.
    -> {heading: {name: help text}}"""
    described = {}
    for line in inspect.getsource(Config).splitlines():
        if found := re.fullmatch(r"    # ([\w, ]+): (.+)", line):
            fields = {}                  # dropped where the script does not know them
            if script in found[1].split(", "):
                described[found[2]] = fields
        elif found := re.match(r"    (\w+): .*  # (.+)", line):
            fields[found[1]] = found[2]
    return described


def flag_of(name):
    return name.replace("_", "-")


def default_text(name):
    """A field's defaults: "[48; real 1024; single turn 2048]"; nothing where there is none."""
    default = getattr(Config, name)
    values = [] if default in (None, "", False) else [str(default)]
    values += [f"{key} {preset[name]}" for key, preset in PRESETS.items()
               if preset.get(name) is not None]
    return f" [{'; '.join(values)}]" if values else ""


def read_command_line(script, description):
    """-> {name: value} of the flags that were given. Raises UserError."""
    parser = argparse.ArgumentParser(description=description, argument_default=argparse.SUPPRESS)
    parser.error = refuse
    types = get_type_hints(Config)
    for heading, fields in describe_fields(script).items():
        group = parser.add_argument_group(heading)
        for name, text in fields.items():
            group.add_argument(f"--{flag_of(name)}", help=text + default_text(name),
                               **options_of(types[name]))
    return vars(parser.parse_args())


def options_of(kind):
    """A field's type -> how argparse reads its flag."""
    if type(None) in get_args(kind):       # "int | None": the flag gives the int
        kind = get_args(kind)[0]
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_args(kind):                     # Literal's
        return {"choices": get_args(kind)}
    if kind is tuple:
        return {"nargs": "+", "metavar": "FILE"}
    return {"type": kind, "metavar": kind.__name__.upper()}


def refuse(message):
    """In place of argparse's own: an error of the command line is told as any other, in a line."""
    raise UserError(f"{message} (--help lists the flags)")


def describe_config(config, script):
    """The settings in force, to be printed; a star marks those given by a flag."""
    lines = [f"settings of the family '{config.family}' (* given by a flag)"]
    for heading, fields in describe_fields(script).items():
        settings = []
        for name, value in config.values(*fields).items():
            if value not in (None, ""):
                star = "*" if name in config.given else ""
                settings.append(f"{name}={value}{star}")
        if settings:
            lines.append(indented(f"{heading}: {'  '.join(settings)}"))
    return "\n".join(lines)


def indented(text):
    """A text in lines of at most 100 columns."""
    return textwrap.fill(text, 100, initial_indent="  ", subsequent_indent="    ")


# ---------------------------------------------------------------------------------------- questions

MAX_IMAGE_PIXELS = 2**27    # of a file, refused before it is decoded: 384 MiB in memory
Image.MAX_IMAGE_PIXELS = None    # our own check, below, is an error and not a warning


FACET = " | "    # between the parts of a category, "mobile | text": scores are given by each part


@dataclass(eq=False)
class Question:
    """A question about one or more images.

    images: PIL images, paths, or functions without arguments that return PIL images; they are read
    when they are needed. answer: text for kind "choice", "string" and "action"; a box
    (x1, y1, x2, y2) or a polygon ((x, y), ...) in px of the original image for "point". choices:
    the options' texts in the order of their letters. hint: what the answer shall look like, where
    the text does not say it. scene: what is drawn where, of a synthetic image. where: file and row,
    for messages."""
    text: str
    images: list
    answer: object
    kind: str = "string"
    choices: tuple = ()
    hint: str = ""
    id: str = ""
    category: str = ""
    scene: object = None
    where: str = ""
    loaded: list | None = None

    def load(self):
        """-> the images, RGB. They are kept until `release`: each zoom call needs them again."""
        if self.loaded is None:
            self.loaded = [self.load_one(image) for image in self.images]
        return self.loaded

    def release(self):
        self.loaded = None

    def load_one(self, image):
        if isinstance(image, (str, Path)):
            return read_image(image, self.where)
        return image() if callable(image) else image


def read_image(source, where=""):
    """Path or bytes -> RGB image, turned upright as its EXIF orientation says.

    A missing, broken or absurdly large file is a UserError that names it."""
    name, file = source, source
    if isinstance(source, bytes):
        name, file = "the embedded image", io.BytesIO(source)
    if where:
        name = f"{name} ({where})"
    try:
        with Image.open(file) as image:
            width, height = image.size
            if width * height > MAX_IMAGE_PIXELS:
                raise UserError(f"{name}: {width}x{height} px is more than {MAX_IMAGE_PIXELS:,} "
                                "px; scale it down first")
            if max(width, height) > 200 * min(width, height):
                raise UserError(f"{name}: {width}x{height} px is too thin; the model takes at most "
                                "200:1")
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{name}: no such image; check the path and --image-root") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{name}: cannot be read as an image ({error}); replace the file or remove "
                        "the row") from None


# -------------------------------------------------------------------------------------- coordinates

NUMBER = r"-?\d{1,15}(?:\.\d{1,15})?"
POINT = re.compile(rf"\(\s*({NUMBER})\s*,\s*({NUMBER})\s*\)|\[\s*({NUMBER})\s*,\s*({NUMBER})\s*\]")


def parse_points(text):
    """All points "(x, y)" or "[x, y]" of a text, as floats: "at ( 12.5 , 40 )" -> [(12.5, 40.0)].

    Inside the image or not."""
    return [(float(a or c), float(b or d)) for a, b, c, d in POINT.findall(text)]


def format_point(point):
    """A point as the policy writes it, in whole pixels: (3.2, 40) -> "(3, 40)"."""
    x, y = map(round, point)
    return f"({x}, {y})"


@dataclass(frozen=True)
class Frame:
    """The sizes (width, height) in px of an image: of the model input, and of the original."""
    input_size: tuple[int, int]
    original_size: tuple[int, int]

    def contains(self, point):
        """Whether a point of the model input lies inside the image."""
        return 0 <= point[0] < self.input_size[0] and 0 <= point[1] < self.input_size[1]

    def to_original(self, point):
        return rescale(point, self.input_size, self.original_size)

    def to_input(self, point):
        return rescale(point, self.original_size, self.input_size)


def rescale(point, old_size, new_size):
    """A point of an image of one size -> where it lies when the image has another size."""
    (x, y), (old_w, old_h), (new_w, new_h) = point, old_size, new_size
    return x * new_w / old_w, y * new_h / old_h


def in_box(point, box):
    """Whether a point lies in a box (left, top, right, bottom), edges included."""
    return box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]


# ------------------------------------------------------------------------------------ the zoom tool

MAX_CALL = 400                      # characters of a zoom call


def crop_box(size, point, half):
    """The window (left, top, right, bottom) of 2 * half px around a point of an image of `size`.

    At a border it is moved inside. An image smaller than the window is shown whole."""
    box = []
    for middle, length in zip(point, size, strict=True):
        side = min(2 * half, length)
        start = min(max(round(middle - side / 2), 0), length - side)
        box.append((start, start + side))
    (left, right), (top, bottom) = box
    return left, top, right, bottom


def zoom(image, point, half, size, dot=False):
    """The crop of `image` around `point` (px of the original), its longer side scaled to `size` px.

    dot: mark the point, by a red dot of 5 % of the crop's side with a white outline."""
    box = crop_box(image.size, point, half)
    crop = image.crop(box)
    scale = size / max(crop.size)
    crop_size = [max(1, round(side * scale)) for side in crop.size]
    crop = crop.resize(crop_size, Image.Resampling.BICUBIC)
    if dot:
        place = (point[0] - box[0]) * scale, (point[1] - box[1]) * scale
        radius = max(3, size // 40)
        ImageDraw.Draw(crop).circle(place, radius, fill=(255, 0, 0), outline="white",
                                    width=radius // 3)
    return crop


class ToolError(Exception):
    """What is wrong with a zoom call, in words for the policy."""


def format_call(point):
    arguments = {"coordinate": [round(v) for v in point]}
    call = json.dumps({"name": "search_coordinate", "arguments": arguments})
    return f"<tool_call>\n{call}\n</tool_call>"


def parse_call(text):
    """What stands between the tool_call tags -> (x, y), as written. Raises ToolError."""
    if len(text) > MAX_CALL:
        raise ToolError("The call is too long.")
    try:
        call = json.loads(text)
    except ValueError:
        raise ToolError("The call is not valid JSON.") from None
    if not isinstance(call, dict) or call.get("name") != "search_coordinate":
        raise ToolError('The only tool is "search_coordinate".')
    match call:
        case {"arguments": {"coordinate": [x, y]}} if is_coordinate(x) and is_coordinate(y):
            return x, y
    raise ToolError('The argument "coordinate" must be a list of two numbers, [x, y].')


def is_coordinate(value):
    return type(value) in (int, float) and abs(value) < 1e7


# --------------------------------------------------------------------------------- turns and traces

@dataclass
class Turn:
    """One turn of the policy's: its text as written (end token excluded), and what was in it.

    Points are in px of the model input, the crop's box in px of the original image."""
    text: str
    thought: str = ""
    points: list = field(default_factory=list)     # in the thought
    call: tuple | None = None                      # the point of a zoom call
    error: str = ""                                # why a call was refused, as told to the policy
    answer: str | None = None
    crop: tuple | None = None                      # box of the crop that answered the call
    forced: bool = False                           # begun for the policy, to make it answer


def between(text, tag):
    """What stands between the first <tag> and the </tag> behind it, and the text after that; None
    and the whole text if there is no such pair."""
    _, _, rest = text.partition(f"<{tag}>")
    inside, closed, after = rest.partition(f"</{tag}>")
    return (inside, after) if closed else (None, text)


def parse_turn(text, forced=False):
    """Splits a turn into thought, points, call and answer. A call beside an answer is not made."""
    thought, rest = between(text, "think")
    thought = (thought or "").strip()
    turn = Turn(text, thought, parse_points(thought), forced=forced)
    answer, _ = between(rest, "answer")
    call, _ = between(rest, "tool_call")
    if answer is not None:
        turn.answer = answer.strip()
    elif call is not None:
        try:
            turn.call = parse_call(call)
        except ToolError as error:
            turn.error = str(error)
    elif "<tool_call>" in rest:
        turn.error = "The call is not closed by </tool_call>."
    return turn


OVERLONG = ("truncated", "forced")    # how a trace ends that ran out of tokens, or of zoom calls


@dataclass(eq=False)
class Trace(Sequence):
    """A `Sequence` as a dialogue. ended: "answer" (of its own accord), "forced" (the zoom calls ran
    out and the answer was asked for), "truncated" (the tokens ran out) or "stopped" (neither a call
    nor an answer)."""
    question: Question = None
    mode: str = "zoom"
    frames: list[Frame] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    ended: str = ""
    turn_starts: list[int] = field(default_factory=lambda: [0])    # of each turn in `ids`
    prefix: str = ""                  # text of the current turn that was written for the policy
    must_answer: bool = False         # the zoom calls ran out, or there is no tool
    crops: dict = field(default_factory=dict)    # Pictures by window, of all traces of the question
    score: object = None              # a reward.Score, once it is scored
    advantage: float = 0.0            # relative to its group

    @property
    def answer(self):
        return self.turns[-1].answer if self.turns else None

    @property
    def zoom_points(self):
        """Points (px of the model input) of the zoom calls that were answered by a crop."""
        return [turn.call for turn in self.turns if turn.crop]

    def in_image(self, point):
        """Whether a point lies inside one of the question's images."""
        return any(frame.contains(point) for frame in self.frames)

    def text(self):
        """The whole dialogue as a person reads it."""
        lines = [self.question.text]
        for turn in self.turns:
            lines.append(turn.text)
            shown = f"[image: {turn.crop}]" if turn.crop else turn.error
            if shown:
                lines.append(f"<observation> {shown} </observation>")
        return "\n".join(lines)


# ------------------------------------------------------------------------------------- the dialogue

SYSTEM_PROMPTS = {
    "direct":
        "Answer the question about the image. Write nothing but <answer> your answer </answer>.",
    "think":
        "Answer the question about the image. First reason, step by step, between <think> and "
        "</think>; then write <answer> your answer </answer>.",
    "grounded":
        "Answer the question about the image. First reason between <think> and </think>, in three "
        "to seven steps. Each step is a sentence about one place in the image and ends with that "
        "place as a point (x, y), in pixels from the top left corner. Look again where a step "
        "turns out to be wrong. Then write <answer> your answer </answer>.",
    "zoom":
        "Answer the question about the image. You may look closer before you answer. In every "
        "turn, first write a thought between <think> and </think> that names the place it is about "
        "as a point (x, y), in pixels of the first image from its top left corner. Then either "
        "look at a place with <tool_call>\n"
        '{"name": "search_coordinate", "arguments": {"coordinate": [x, y]}}\n'
        "</tool_call>, which shows you a close-up of it, or finish with <answer> your answer "
        "</answer>. Look elsewhere when a close-up does not show what you need.",
}


@dataclass
class Dialogue:
    """How questions are asked and calls are answered. All but `mode` and `tool` belongs to a
    checkpoint, for it is what the policy was trained to see: it is kept beside the weights, in
    dialogue.json.

    tool False: no zoom calls, the answer is asked for at once. system_prompts: by mode; of a mode
    that is not there, the chat template's own. before_crop, after_crop: text around a crop;
    before_dotted: instead of before_crop, where the crop has a dot. no_calls_left: the observation
    after the last call. forced_answer: then written for the policy, as the beginning of its turn.
    hints: say what an answer shall look like where the question does not. coordinates: of the model
    input ("input"), or, as in the public code, of the image scaled to at most max_pixels, before
    its sides are rounded to whole tokens ("unrounded").

    The wording of the authors' checkpoints is in Gabesarch/grounded-rl: system prompts in
    scripts/evaluation/eval_multiturn.sh, observations and the request for the answer in
    src/vlmsearch/models/qwen_vllm.py; their coordinates are "unrounded"."""
    mode: str = "zoom"
    tool: bool = True
    system_prompts: dict = field(default_factory=lambda: dict(SYSTEM_PROMPTS))
    before_crop: str = "<observation>\n"
    before_dotted: str = "<observation>\n"
    after_crop: str = "\n</observation>"
    no_calls_left: str = "There are no looks left."
    forced_answer: str = "<think></think>\n<answer>"
    hints: bool = True
    coordinates: str = "input"
    crop_half: int = 32
    crop_size: int = 64
    crop_dot: bool = False
    max_crops: int = 4

    def to_json(self):
        """What dialogue.json has."""
        parts = asdict(self)
        del parts["mode"], parts["tool"]
        return parts

    def describe(self):
        """The wording in force, to be printed below the settings."""
        parts = self.to_json()
        parts["system_prompts"] = parts["system_prompts"].get(self.mode, "the chat template's own")
        settings = "  ".join(f"{name}={value!r}" for name, value in parts.items())
        return indented(f"dialogue: {settings}")

    def prompt(self, policy, question):
        """-> the Chunk after which the policy speaks, and the Frames of the question's images."""
        images = question.load()
        text = question.text
        if self.hints and question.hint:
            text += "\n" + question.hint
        content = [{"type": "image"}] * len(images)
        content.append({"type": "text", "text": policy.clean(text)})
        messages = [{"role": "user", "content": content}]
        if system := self.system_prompts.get(self.mode):
            messages.insert(0, {"role": "system", "content": system})
        chunk = policy.prompt(messages, images)
        if not self.tool:
            chunk.ids += policy.encode(self.forced_answer)
        rounded = self.coordinates == "input"
        frames = [Frame(policy.input_size(*image.size, rounded), image.size) for image in images]
        return chunk, frames

    def start(self, policy, question, group, seed=0):
        """`group` empty Traces of a question, sharing one prompt; number i samples by random
        numbers from `seed` and i."""
        prompt, frames = self.prompt(policy, question)
        prefix = "" if self.tool else self.forced_answer
        crops = {}
        return [Trace(prompt, rng=random.Random(f"{seed} {i}"), question=question, mode=self.mode,
                      frames=frames, prefix=prefix, must_answer=not self.tool, crops=crops)
                for i in range(group)]

    def on_turn(self, policy, trace, truncated):
        """Reads the turn that the policy just ended. truncated: by the bound on tokens.
        -> the Chunk that answers it, or None at the trace's end"""
        ids = trace.ids[trace.turn_starts[-1]:]
        if ids[-1] in policy.end_tokens:
            ids = ids[:-1]
        turn = parse_turn(trace.prefix + policy.decode(ids), trace.must_answer)
        trace.turns.append(turn)
        trace.prefix = ""
        if truncated:
            trace.ended = "truncated"
        elif turn.forced:
            trace.ended = "forced"
        elif turn.answer is not None:
            trace.ended = "answer"
        elif self.mode != "zoom" or not (turn.call or turn.error):
            trace.ended = "stopped"
        else:
            return self.answer_call(policy, trace, turn)
        return None

    def answer_call(self, policy, trace, turn):
        """The user turn that answers a zoom call, by a crop or by words where there is none to
        show; and the prefix of the policy's next turn. -> Chunk"""
        frame = trace.frames[0]
        if len(trace.turns) > self.max_crops:
            turn.call, turn.error = None, self.no_calls_left
            trace.must_answer, trace.prefix = True, self.forced_answer
        elif turn.call and not frame.contains(turn.call):
            width, height = frame.input_size
            turn.error = (f"The point {format_point(turn.call)} is outside the image, which is "
                          f"{width} px wide and {height} px high.")
        shown, pictures = {"type": "text", "text": turn.error}, []
        if turn.call and not turn.error:
            shown, pictures = {"type": "image"}, [self.crop(policy, trace, turn)]
        before = self.before_dotted if self.crop_dot else self.before_crop
        content = [{"type": "text", "text": before}, shown,
                   {"type": "text", "text": self.after_crop}]
        chunk = policy.reply(content, pictures)
        chunk.ids += policy.encode(trace.prefix)
        trace.turn_starts.append(len(trace.ids) + len(chunk.ids))
        return chunk

    def crop(self, policy, trace, turn):
        """What a turn's zoom call shows. -> Picture; of all traces of a question, a window is
        encoded once"""
        frame = trace.frames[0]
        point = frame.to_original(turn.call)
        turn.crop = crop_box(frame.original_size, point, self.crop_half)
        key = turn.crop, point if self.crop_dot else None
        if key not in trace.crops:
            image = trace.question.load()[0]
            crop = zoom(image, point, self.crop_half, self.crop_size, self.crop_dot)
            trace.crops[key] = policy.picture(crop)
        return trace.crops[key]


def make_dialogue(config, checkpoint, policy):
    """The Dialogue that goes with a checkpoint and the settings.

    What counts, from the least to the most: the settings' defaults; the checkpoint's dialogue.json,
    or, without one, the system message of its chat template; --dialogue FILE; flags. Raises
    UserError."""
    names = ("crop_half", "crop_size", "crop_dot", "max_crops")
    parts = config.values(*names)
    own = checkpoint and cached_file(checkpoint, "dialogue.json",
                                     _raise_exceptions_for_missing_entries=False)
    if own:
        parts |= read_parts(own)
    elif policy.default_system_message():
        parts["system_prompts"] = {}
    if config.dialogue:
        parts |= read_parts(config.dialogue)
    parts |= config.values(*(name for name in names if name in config.given))
    return Dialogue(config.mode, config.tool, **parts)


def read_parts(path):
    """A file like dialogue.json -> {field of Dialogue: value}. Raises UserError."""
    known = Dialogue().to_json()
    try:
        parts = json.loads(Path(path).read_text())
        for name, value in parts.items():
            if name not in known or type(value) is not type(known[name]):
                raise ValueError(f"{name!r} has to be one of {', '.join(known)}, of its type")
        complete = known | parts
        for mode, text in complete["system_prompts"].items():
            if mode not in MODES or type(text) is not str:
                raise ValueError(f"'system_prompts' has to have texts, by {', '.join(MODES)}")
        if complete["coordinates"] not in ("input", "unrounded"):
            raise ValueError("'coordinates' has to be 'input' or 'unrounded'")
        for name, least in (("crop_half", 1), ("crop_size", 1), ("max_crops", 0)):
            if complete[name] < least:
                raise ValueError(f"{name!r} has to be at least {least}")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read as parts of a dialogue ({error})") from None
    return parts


# ----------------------------------------------------------------------------------------- rollouts

def rollout(policy, questions, dialogue, group, seeds, **sampling):
    """Traces of many questions at once: yields lists of `group` Traces, each as it is finished.

    questions: an iterable, read as there is room for more. seeds: one for each (anything that
    prints), from which alone its random numbers follow, whatever runs beside it and in how many
    processes. sampling: see `model.Engine`."""
    with ThreadPoolExecutor(READ_AHEAD) as threads:
        starts = (threads.submit(dialogue.start, policy, question, group, seed)
                  for question, seed in zip(questions, seeds, strict=False))
        yield from continue_traces(policy, results_ahead(starts), dialogue, **sampling)


READ_AHEAD = 4          # questions whose images are read by threads while the model works


def results_ahead(futures):
    """Yields the result of each future, while the next ones are on their way."""
    waiting = deque(islice(futures, READ_AHEAD))
    while waiting:
        waiting.extend(islice(futures, 1))
        yield waiting.popleft().result()


def continue_traces(policy, groups, dialogue, **sampling):
    """Runs lists of Traces with a common prompt to their ends; yields them as they are finished."""
    for traces in Engine(policy, **sampling).run(groups, partial(dialogue.on_turn, policy)):
        for trace in traces:
            trace.ended = trace.ended or "truncated"     # there was no room for the observation
        traces[0].question.release()
        yield traces


# ----------------------------------------------------------------------------- a picture of a trace

def draw_trace(trace):
    """The image with the points in their order, and the crops in a row below. -> PIL image"""
    width = 768            # px
    image = trace.question.load()[0]
    scale = width / image.width
    top = image.resize((width, round(image.height * scale)), Image.Resampling.LANCZOS)
    canvas = ImageDraw.Draw(top)
    marks = []             # (place, number, colour)
    crops = []             # (number, crop)

    def mark(point, number, colour):
        x, y = trace.frames[0].to_original(point)
        marks.append(((x * scale, y * scale), number, colour))
    for number, turn in enumerate(trace.turns, 1):
        if turn.crop:
            canvas.rectangle([v * scale for v in turn.crop], outline="white", width=3)
            crops.append((number, image.crop(turn.crop)))
        if turn.call:
            mark(turn.call, number, (200, 30, 30))
        else:
            for i, point in enumerate(turn.points, 1):
                mark(point, i, (30, 90, 200))
    canvas.line([place for place, _, _ in marks], fill="white", width=3)
    for place, number, colour in marks:
        canvas.circle(place, 13, fill=colour, outline="white", width=2)
        canvas.text(place, str(number), fill="white", anchor="mm", font_size=16)
    if not crops:
        return top
    column = width // 4                  # px: four crops fit in the row
    sheet = ImageOps.expand(top, (0, 0, 0, column + 8), "white")
    canvas = ImageDraw.Draw(sheet)
    y = top.height + 8
    for x, (number, crop) in zip(range(8, width, column), crops, strict=False):
        crop = ImageOps.contain(crop, (column - 10, column - 10), Image.Resampling.NEAREST)
        sheet.paste(crop, (x, y))
        canvas.text((x + 6, y + 4), str(number), fill="white", font_size=20, stroke_width=2,
                    stroke_fill="black")
    return sheet


# -------------------------------------------------------------------------------- synthetic scenes

# Three tasks in miniature, on drawings of which the truth is known. All are drawn with cards: a
# colour, and a pattern that only a crop shows, for each pattern has a mean of zero over every block
# of 4x4 px, the cards' edges lie on block edges, and the policy gets the means of the blocks.
#
# toy-search (V*Bench): of 4 to 6 cards, 1 to 3 have the colour asked about, the candidates; one of
# these bears a pattern. Which? The policy has to zoom into a candidate, and, where it is plain,
# into the next.
# toy-spatial (SAT-2, BLINK): is one card left or right of another, above or below; or, of two
# images, of its old place? All of it can be seen in the images.
# toy-gui (ScreenSpot): a screen with windows, buttons in them and icons beside. The answer is a
# point on the element asked for. Its colour will do where it is alone; of several alike, the one
# that bears a pattern is the one, and has to be zoomed into.

BLOCK = 4                  # px of the drawing that become one px of the model input
SIDE = 256                 # px, width and height of the drawing
CELL = 64                  # px: the cards lie in a 4x4 grid of cells, each moved by one of JITTER
JITTER = (-12, 0, 12)      # px, in x and in y
CARD = 40                  # px, width and height of a card, or of an icon
BUTTON = (56, 32)          # px, width and height
READABLE = 12              # px of a card, in x and in y, in which its pattern can be read
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
# What is asked: colours and a pattern stand between.
SEARCH = ("One", " card bears a pattern. Which?")
IS_THE = "Is the"
RELATION = {("left", "right"): " card left or right of the",
            ("above", "below"): " card above or below the"}
MOVED = {("left", "right"): " card now left or right of its old place?",
         ("above", "below"): " card now above or below its old place?"}
CLICK = ("Click the", " element.")
CLICK_ALIKE = ("Click the", " element that bears a pattern.")


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
    x, y = left + BLOCK, top + BLOCK // 2
    for colour in ((230, 90, 80), (230, 190, 70), (100, 200, 90)):
        image[y:y + BLOCK, x:x + BLOCK] = colour
        x += 2 * BLOCK


@dataclass(frozen=True)
class Card:
    colour: str
    pattern: str
    x: int                 # centre, px of the drawing
    y: int
    width: int = CARD
    height: int = CARD

    @property
    def cell(self):
        """(row, column) in the grid."""
        return self.y // CELL, self.x // CELL

    @property
    def box(self):
        """(left, top, right, bottom), px of the drawing."""
        dx, dy = self.width // 2, self.height // 2
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
        return min(width, height) >= READABLE

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
            image[top:bottom, left:right] = face[:card.height, :card.width]
        return Image.fromarray(image)

    def draw_later(self):
        """The second image: the first card has moved."""
        return replace(self, cards=(self.named[0], *self.cards[1:])).draw()

    def card_at(self, point):
        """The card under a point, or None."""
        return next((card for card in self.cards if card.contains(point)), None)

    def cells(self):
        """The 16 cells of the grid in reading order: the card in each, or None."""
        cards = {card.cell: card for card in self.cards}
        return [cards.get(divmod(number, 4)) for number in range(16)]

    def contains(self, point):
        """Whether a point lies on what is asked about, in either image."""
        return any(card.contains(point) for card in [*self.candidates, *self.named])

    def face_in(self, box):
        """What is true of a crop: the pattern of the most central candidate that can be read in it,
        or "nothing"."""
        middle = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        readable = [card for card in self.candidates if card.readable_in(box)]
        if not readable:
            return NOTHING
        return min(readable, key=lambda card: card.distance(middle)).pattern

    def describes(self, thought, box):
        """Whether a thought names what a crop shows, and no other pattern."""
        words = set(re.findall(r"\w+", thought.lower()))
        return words & {*PATTERNS, NOTHING} == {self.face_in(box)}

    def compares(self, thought):
        """Whether a thought says truly how the named cards lie; None where it does not say it."""
        said = set(re.findall(r"\w+", thought.lower())) & set(DIRECTIONS)
        return said <= set(self.directions()) if said else None

    def directions(self):
        """Of a spatial question: where the first card named lies, seen from the second."""
        first, second = self.named
        return first.directions_from(second)


def place_cards(rng, faces, windows=()):
    """(colour, pattern) pairs -> Cards in different cells of the grid; in a window, buttons."""
    cards = []
    for (colour, pattern), cell in zip(faces, rng.sample(range(16), len(faces)), strict=True):
        row, column = divmod(cell, 4)
        x = column * CELL + CELL // 2
        y = row * CELL + CELL // 2
        dx, dy = rng.choice(JITTER), rng.choice(JITTER)
        if any(in_box((x, y), window) for window in windows):
            cards.append(Card(colour, pattern, x, y + abs(dy), *BUTTON))    # below the title
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


def ask_search(rng):
    scene = search_scene(rng)
    return Question(f"{SEARCH[0]} {scene.colour}{SEARCH[1]}", [scene.draw], scene.cards[0].pattern,
                    category=str(len(scene.candidates)), scene=scene)


def ask_spatial(rng):
    axis = rng.choice(list(RELATION))
    direction = rng.choice(axis)
    if rng.random() < 0.5:
        category, scene = "relation", relation_scene(rng, direction)
        asked, images = f"{RELATION[axis]} {scene.named[1].colour} card?", [scene.draw]
    else:
        category, scene = "moved", moved_scene(rng, direction)
        asked, images = MOVED[axis], [scene.draw, scene.draw_later]
    text = f"{IS_THE} {scene.colour}{asked}"
    return Question(text, images, direction, category=category, scene=scene)


def ask_screen(rng):
    windows = windows_of(rng)
    scene = search_scene(rng, candidates=rng.choice((1, 2, 3)), windows=windows)
    target = scene.cards[0]
    alike = len(scene.candidates) > 1
    before, after = CLICK_ALIKE if alike else CLICK
    kind = "icon" if target.width == CARD else "button"
    return Question(f"{before} {scene.colour}{after}", [scene.draw], target.box, "point",
                    scene=scene, category=f"{kind}{FACET}{'alike' if alike else 'alone'}")


TOYS = {"toy-search": ask_search, "toy-spatial": ask_spatial, "toy-gui": ask_screen}


def toy(task, split, seed, index):
    """Question number `index` of a split ("train", "validation", "test"); each (split, seed, index)
    has random numbers of its own."""
    question = TOYS[task](random.Random(f"{task} {split} {seed} {index}"))
    question.id = f"{split}-{seed}-{index}"
    return question


def chance(question):
    """The probability that a guess is right: of a pattern, of two directions, of the elements that
    are alike."""
    if question.kind == "point":
        return 1 / len(question.scene.candidates)
    return 1 / 2 if question.scene.named else 1 / len(ANSWERS)


def random_zoom_accuracy(questions, dialogue, zoom_calls):
    """The random-zoom baseline: the accuracy of a player who zooms at random points, knows the
    answer where a crop shows it, and else guesses."""
    rng = random.Random(0)
    right = 0.0
    for question in questions:
        points = [(rng.randrange(SIDE), rng.randrange(SIDE)) for _ in range(zoom_calls)]
        boxes = [crop_box((SIDE, SIDE), point, dialogue.crop_half) for point in points]
        target = question.scene.cards[0]
        shown = not question.scene.named and any(target.readable_in(box) for box in boxes)
        right += 1 if shown else chance(question)
    return right / len(questions)


# --------------------------------------------------------------------------------- running a script

MAX_PROCESSES = 8                   # that are started unasked
GO_ON = "a training run goes on with --resume, an evaluation with the same --json FILE"


def run(script, description, main):
    """Reads the command line and calls main({setting: value}), in as many processes as it asks
    for."""
    with errors_in_a_line():
        given = read_command_line(script, description)
        number = processes_to_start(given)
        if number > 1:
            return launch(number, main, given)
        if "WORLD_SIZE" in os.environ and not dist.is_initialized():      # torchrun's
            backend = "gloo"
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
                backend = "nccl"
            join_processes(backend)
        main(given)
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def errors_in_a_line():
    """Ends the process where it fails: by a line and exit code 2 after a UserError. Of several
    processes the launcher ends the others."""
    try:
        yield
    except UserError as error:
        leave(f"error: {error}", 2)
    except KeyboardInterrupt:
        leave(f"interrupted; {GO_ON}", 130)
    except Exception:
        if world_size() == 1:
            raise
        time.sleep(1)                   # if another's end is the cause, the launcher ends this one
        leave(traceback.format_exc().rstrip(), 1)


def leave(message, code):
    """Ends the process with a line. The first process goes first, and the launcher ends the others
    while they wait: what all have to say is said once."""
    time.sleep(min(2 * rank(), 4))
    print(message, file=sys.stderr, flush=True)
    if world_size() > 1:
        sys.stdout.flush()
        os._exit(code)                  # at once: to tear torch down can take a second
    sys.exit(code)


def processes_to_start(given):
    """The number of processes that the command line asks for; 1: this one alone."""
    on_gpu = torch.cuda.is_available()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    asked = given.get("processes", 1 if on_gpu else min(cores, MAX_PROCESSES))
    if asked < 1:
        raise UserError("--processes must be at least 1")
    alone = ("image", "dry_run", "rate", "ratings", "draw")
    if "WORLD_SIZE" in os.environ or any(given.get(name) for name in alone):
        return 1
    if on_gpu and asked > 1:
        raise UserError(f"on GPUs use torchrun: torchrun --nproc-per-node {asked} -- "
                        f"{Path(sys.argv[0]).name} ...")
    return asked


def launch(number, main, given):
    """Calls main(given) in `number` processes of one thread each.

    Where one process fails, the others are ended, and this one ends with its exit code, 1 where a
    signal ended it. All are ended when this one ends, by Ctrl-C, too."""
    def stop(signal_number, frame):
        leave(f"interrupted; {GO_ON}", 128 + signal_number)
    for stopped_by in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stopped_by, stop)
    how = "fork" if sys.platform == "linux" else "spawn"     # a fork has imported torch already
    with TemporaryDirectory() as folder:
        processes = start_processes(work, (number, os.getpid(), folder, main, given), number,
                                    join=False, daemon=True, start_method=how)
        logging.disable()               # reports of processes that are ended
        try:
            while not processes.join():
                pass
        except ProcessExitedException as error:
            if error.exit_code > 0:
                sys.exit(error.exit_code)
            leave(f"error: {error.signal_name} ended process {error.error_index}; {GO_ON}", 1)


def work(number, processes, launcher, folder, main, given):
    """What process `number` of those that `launch` starts does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)             # the launcher hears it, too
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=end_with, args=[launcher], daemon=True).start()
    torch.set_num_threads(1)
    sys.stdout.reconfigure(line_buffering=True)
    with errors_in_a_line():
        join_processes("gloo", init_method=f"file://{folder}/store", rank=number,
                       world_size=processes)
        main(given)
        dist.destroy_process_group()


def join_processes(backend, **where):
    """From now on only the first process prints."""
    dist.init_process_group(backend, timeout=timedelta(hours=4), **where)
    if rank():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def end_with(parent):
    """Ends this process when its parent is gone: a launcher that was killed could not do so."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
