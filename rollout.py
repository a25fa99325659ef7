"""The dialogue: prompts, coordinates, the zoom tool, many turns, many traces.

In:  questions about images. Out: `Trace`s: which tokens the policy sampled, where it pointed, what it was shown, how it ended.
Then come several processes, the flags that all scripts share, and `WebAgent`: the same dialogue, as
VisualWebArena asks for one action after another.

Four modes, as in the paper: `direct` (an answer only), `think` (a thought, then the answer), `grounded` (a thought whose
steps point at the image) and `zoom` (turns: a thought that points, a look at the point, ..., the answer).

Coordinates live in two frames. The policy speaks pixels of the image *as it sees it* (after the image processor's resize);
files, boxes and crops are in pixels of the *original*. `Frame` is the one place that converts.

Departures from the public code: crops are cut from the original, so that a zoom adds detail; a window at the border is moved
inside, never stretched; bad calls and points outside are answered in words; what is injected is known by construction.
"""
import argparse
import io
import json
import logging
import os
import random
import re
import sys
import threading
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.tensor import DTensor, distribute_tensor

from model import Chunk, Engine, Policy, Sequence, UserError, load

MODES = ("direct", "think", "grounded", "zoom")
MAX_IMAGE_PIXELS = 2**27    # of a file, refused before it is decoded: 134 million, 384 MiB in memory
Image.MAX_IMAGE_PIXELS = None   # our own check, below, is an error and not a warning

SYSTEM_PROMPTS = {
    "direct": "Answer the question about the image. Write nothing but <answer> your answer </answer>.",
    "think": "Answer the question about the image. First reason, step by step, between <think> and </think>; then write "
             "<answer> your answer </answer>.",
    "grounded": "Answer the question about the image. First reason between <think> and </think>, in three to seven steps. Each "
                "step is a sentence about one place in the image and ends with that place as a point (x, y), in pixels from the "
                "top left corner. Look again where a step turns out to be wrong. Then write <answer> your answer </answer>.",
    "zoom": "Answer the question about the image. You may look closer before you answer. In every turn, first write a thought "
            "between <think> and </think> that names the place it is about as a point (x, y), in pixels of the first image from "
            "its top left corner. Then either look at a place with <tool_call>\n{\"name\": \"search_coordinate\", "
            "\"arguments\": {\"coordinate\": [x, y]}}\n</tool_call>, which shows you a close-up of it, or finish with "
            "<answer> your answer </answer>. Look elsewhere when a close-up does not show what you need.",
}
OBSERVATION = ("<observation>\n", "\n</observation>")
FORCED_ANSWER = "<think></think>\n<answer>"   # written for the policy when it must answer now
OVERLONG = ("length", "forced")               # how a trace ends that ran out of tokens, or of looks


# ------------------------------------------------------------------------------------------------ web actions

# The actions of VisualWebArena, each as it is written.
USAGE = {"click": "click [12]", "type": "type [12] [text] [1]", "hover": "hover [12]", "press": "press [Control+v]",
         "scroll": "scroll [down]", "goto": "goto [url]", "new_tab": "new_tab", "tab_focus": "tab_focus [0]",
         "close_tab": "close_tab", "go_back": "go_back", "go_forward": "go_forward", "stop": "stop [answer]"}
NAME = re.compile(r"[A-Za-z_]{0,20}")
ID = re.compile(r"\[\s*([0-9]{1,9})\s*\]")
DIRECTION = re.compile(r"\[?\s*(?:direction\s*=\s*)?(up|down)\s*\]?")
ENTER = re.compile(r"\s*(?:press_enter_after\s*=\s*)?([01])\s*\]")


@dataclass(frozen=True)
class Action:
    """One action of VisualWebArena. id: the element's number (for tab_focus the tab's). text: what is typed, pressed, gone
    to or answered, as written, or the direction of a scroll. enter: whether Enter follows what is typed."""
    name: str
    id: int | None = None
    text: str = ""
    enter: bool = True

    def __str__(self):
        """As VisualWebArena reads it: in one line, and with whether Enter follows."""
        text = " ".join(self.text.split())
        places = {"click": (self.id,), "hover": (self.id,), "tab_focus": (self.id,), "type": (self.id, text, int(self.enter)),
                  "press": (text,), "scroll": (text,), "goto": (text,), "stop": (text,)}.get(self.name, ())
        return " ".join([self.name, *(f"[{place}]" for place in places)])


def parse_action(text):
    """"type [5] [red shoes] [0]" -> Action("type", 5, "red shoes", False). Raises ValueError, with how it should be written.

    The text in brackets may hold brackets, new lines or another action; the whole may stand in backticks."""
    text = text.strip()
    for fence in ("```", "`"):
        if len(text) > 2 * len(fence) and text.startswith(fence) and text.endswith(fence):
            text = text[len(fence):-len(fence)].strip()
    said = NAME.match(text)[0]
    name, rest = said.lower(), text[len(said):].strip()
    if name not in USAGE:
        raise ValueError(f"no such action: {text[:60]!r}; there are {', '.join(USAGE)}")
    if name in ("click", "hover", "tab_focus"):
        if found := ID.fullmatch(rest):
            return Action(name, int(found[1]))
    elif name == "type":
        if found := ID.match(rest):
            typed, enter = split_enter(rest[found.end():].strip())
            if bracketed(typed):
                return Action(name, int(found[1]), typed[1:-1], enter)
    elif name == "scroll":
        if found := DIRECTION.fullmatch(rest.lower()):
            return Action(name, text=found[1])
    elif name in ("press", "goto", "stop") and bracketed(rest):
        return Action(name, text=rest[1:-1])
    elif name in ("stop", "new_tab", "close_tab", "go_back", "go_forward") and not rest:
        return Action(name)
    raise ValueError(f"write {USAGE[name]!r}, not {text[:60]!r}")


def bracketed(text):
    return text.startswith("[") and text.endswith("]")


def split_enter(text):
    """What follows the element of a `type`: "[a [b]] [0]" -> ("[a [b]]", False). A lone "[0]" is the text: ("[0]", True)."""
    before, _, after = text.rpartition("[")
    flag = ENTER.fullmatch(after)
    if flag and before.rstrip().endswith("]"):
        return before.rstrip(), flag[1] == "1"
    return text, True


# ------------------------------------------------------------------------------------------------ questions

# What the answer shall look like, by the kind of question, for rows that do not say it ("Description: the search button"); and
# how to tell the rows that do. The list of actions is always given: a page that quotes it must not be able to suppress it.
HINTS = {
    "point": (r"\(x,\s*y\)|\[x,\s*y\]|<answer>",
              "The answer is one point (x, y), in pixels of the image, between <answer> and </answer>."),
    "choice": (r"<answer>|\b(answer|respond|reply)\b[^.:\n]{0,40}\b(letter|text|option)",
               "The answer is the letter or the text of one of the options."),
    "action": (None, "The answer is one of these actions, with numbers and words that fit: " + ", ".join(USAGE.values()) + "."),
}


@dataclass(eq=False)
class Question:
    """A question about one or more images.

    images: PIL images, paths, or functions without arguments that return PIL images; they are read when they are needed.
    answer: text for kind "choice", "string" and "action"; a box (x1, y1, x2, y2) or a polygon ((x, y), ...) in px of the
    original for "point". choices: the options' texts in the order of their letters, if there are any.
    scene: what is drawn where, for drawn images. where: file and row, for messages."""
    text: str
    images: list
    answer: object
    kind: str = "string"
    choices: tuple = ()
    id: str = ""
    category: str = ""
    scene: object = None
    where: str = ""

    def load(self):
        return [read_image(i, self.where) if isinstance(i, (str, Path)) else i() if callable(i) else i for i in self.images]


def with_hint(question):
    """A question's text, and behind it what its answer shall look like, unless it says so itself."""
    said, hint = HINTS.get(question.kind, (None, ""))
    return question.text if not hint or said and re.search(said, question.text, re.I) else f"{question.text}\n{hint}"


def read_image(source, where=""):
    """Path or bytes -> RGB image. A missing, broken or absurdly large file is a UserError that names it."""
    name = source if isinstance(source, (str, Path)) else "the embedded image"
    at = f" ({where})" if where else ""
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise UserError(f"{name}{at}: {image.width}x{image.height} px is more than {MAX_IMAGE_PIXELS:,} px; "
                                "scale it down first")
            if max(image.size) > 200 * min(image.size):
                raise UserError(f"{name}{at}: {image.width}x{image.height} px is too thin; the model takes at most 200:1")
            return image.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{name}{at}: no such image; check the path and --image-root") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{name}{at}: cannot be read as an image ({error}); replace the file or remove the row") from None


# ------------------------------------------------------------------------------------------------ coordinates

NUMBER = r"-?\d{1,15}(?:\.\d{1,15})?"
POINT = re.compile(rf"\(\s*({NUMBER})\s*,\s*({NUMBER})\s*\)|\[\s*({NUMBER})\s*,\s*({NUMBER})\s*\]")


def parse_points(text):
    """All points "(x, y)" or "[x, y]" of a text, as floats: "at ( 12.5 , 40 )" -> [(12.5, 40.0)]. Inside the image or not."""
    return [(float(a or c), float(b or d)) for a, b, c, d in POINT.findall(text)]


@dataclass(frozen=True)
class Frame:
    """The sizes (width, height) in px of one image: as the policy sees it, and as it is in the file."""
    seen: tuple[int, int]
    original: tuple[int, int]

    def inside(self, point):
        return 0 <= point[0] < self.seen[0] and 0 <= point[1] < self.seen[1]

    def to_original(self, point):
        return point[0] * self.original[0] / self.seen[0], point[1] * self.original[1] / self.seen[1]

    def to_seen(self, point):
        return point[0] * self.seen[0] / self.original[0], point[1] * self.seen[1] / self.original[1]


def spoken(point):
    """A point as the policy writes it: whole pixels."""
    return f"({round(point[0])}, {round(point[1])})"


# ------------------------------------------------------------------------------------------------ the zoom tool

def window(size, point, half):
    """The square (left, top, right, bottom) of 2 * half px around a point of an image of `size`, moved inside at the borders.

    Where the image is smaller than the window, the square is as large as the image allows."""
    side = min(2 * half, *size)
    left, top = (min(max(round(p - side / 2), 0), s - side) for p, s in zip(point, size))
    return left, top, left + side, top + side


def zoom(image, point, half, size, dot=False):
    """The close-up of `image` around `point` (both of the original), `size` px wide and high. dot: mark the point in red."""
    box = window(image.size, point, half)
    side = box[2] - box[0]
    crop = image.crop(box)
    if side != size:
        crop = crop.resize((size, size), Image.Resampling.BICUBIC)
    if dot:
        x, y, r = (point[0] - box[0]) * size / side, (point[1] - box[1]) * size / side, max(2, size // 100)
        ImageDraw.Draw(crop).ellipse((x - r, y - r, x + r, y + r), fill=(255, 0, 0))
    return crop


class ToolError(Exception):
    """What is wrong with a tool call, in words for the policy."""


def call_text(point):
    x, y = (round(v) for v in point)
    return '<tool_call>\n{"name": "search_coordinate", "arguments": {"coordinate": [%d, %d]}}\n</tool_call>' % (x, y)


def parse_call(text):
    """What stands between the tool_call tags -> (x, y). Raises ToolError."""
    try:
        call = json.loads(text) if len(text) < 400 else None
    except (ValueError, RecursionError):
        raise ToolError("The call is not valid JSON.") from None
    if not isinstance(call, dict) or call.get("name") != "search_coordinate":
        raise ToolError('The only tool is "search_coordinate".')
    arguments = call.get("arguments")
    point = arguments.get("coordinate") if isinstance(arguments, dict) else None
    if not (isinstance(point, list) and len(point) == 2 and all(type(v) in (int, float) and abs(v) < 1e7 for v in point)):
        raise ToolError('The argument "coordinate" must be a list of two numbers, [x, y].')
    return float(point[0]), float(point[1])


# ------------------------------------------------------------------------------------------------ turns and traces

def between(text, tag):
    """What stands between the first <tag> and the </tag> behind it, and the text after that; None and the whole text if there
    is no such pair."""
    _, opened, rest = text.partition(f"<{tag}>")
    inside, closed, after = rest.partition(f"</{tag}>")
    return (inside, after) if opened and closed else (None, text)


@dataclass
class Turn:
    """One turn of the policy's: its text as written (end token excluded), and what was in it. Points in px as seen."""
    text: str
    thought: str = ""
    points: list = field(default_factory=list)     # in the thought
    call: tuple | None = None                      # the point looked at
    error: str = ""                                # why a call was refused, as told to the policy
    answer: str | None = None
    crop: tuple | None = None                      # window in px of the original
    forced: bool = False                           # its beginning was written for the policy, to make it answer


def parse_turn(text, forced=False):
    """Splits a turn into thought, points, call and answer. A call that stands after an answer, or before one, is not made."""
    turn = Turn(text, forced=forced)
    thought, rest = between(text, "think")
    if thought is not None:
        turn.thought, turn.points = thought.strip(), parse_points(thought)
    answer, call = between(rest, "answer")[0], between(rest, "tool_call")[0]
    if answer is not None:
        turn.answer = answer.strip()
    elif "<tool_call>" in rest:
        try:
            if call is None:
                raise ToolError("The call is not closed by </tool_call>.")
            turn.call = parse_call(call)
        except ToolError as error:
            turn.error = str(error)
    return turn


@dataclass(eq=False)
class Trace(Sequence):
    """A `Sequence` as a dialogue. ended: "answer" (of its own accord), "forced" (the looks ran out and the answer was asked
    for), "length" (the tokens ran out) or "stopped" (neither a call nor an answer)."""
    question: Question = None
    mode: str = "zoom"
    frames: list[Frame] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    ended: str = ""
    starts: list[int] = field(default_factory=lambda: [0])   # where each turn begins in `ids`
    begun: str = ""                                # text of the current turn that was written for the policy
    shown: dict = field(default_factory=dict)      # close-ups of this question so far, of all its traces: Pictures by window

    @property
    def answer(self):
        return self.turns[-1].answer if self.turns else None

    @property
    def crops(self):
        """Points (px as seen) of the looks that were answered with a picture, in order."""
        return [t.call for t in self.turns if t.crop]

    def inside(self, point):
        return any(frame.inside(point) for frame in self.frames)

    def text(self):
        """The whole dialogue as a person reads it."""
        lines = [self.question.text]
        for turn in self.turns:
            lines.append(turn.text)
            if turn.crop:
                lines.append(f"<observation> [image: {turn.crop}] </observation>")
            elif turn.error:
                lines.append(f"<observation> {turn.error} </observation>")
        return "\n".join(lines)


@dataclass
class Dialogue:
    """How questions are asked and calls are answered.

    crop_half (px of the original), crop_size (px shown), crop_dot: the close-up; max_crops: looks answered a trace;
    tool False: no looks at all, the answer is asked for at once; system_prompt: instead of the mode's own."""
    mode: str = "zoom"
    crop_half: int = 32
    crop_size: int = 64
    crop_dot: bool = False
    max_crops: int = 4
    tool: bool = True
    system_prompt: str | None = None

    def prompt(self, policy, question):
        """-> the Chunk after which the policy speaks, and the Frames of the question's images."""
        images = question.load()
        system = self.system_prompt or policy.system_prompts.get(self.mode) or SYSTEM_PROMPTS[self.mode]
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": policy.clean(with_hint(question))}]
        chunk = policy.prompt([{"role": "system", "content": system}, {"role": "user", "content": content}], images)
        if not self.tool:
            chunk.ids += policy.encode(FORCED_ANSWER)
        return chunk, [Frame(policy.seen_size(*image.size), image.size) for image in images]

    def start(self, policy, question, group, seed=0):
        """`group` empty Traces of a question, sharing one prompt; number i samples by random numbers from `seed` and i."""
        prompt, frames = self.prompt(policy, question)
        begun, shown = "" if self.tool else FORCED_ANSWER, {}
        return [Trace(prompt, question=question, mode=self.mode, frames=frames, begun=begun, shown=shown,
                      stream=random.Random(f"{seed} {i}")) for i in range(group)]

    def on_turn(self, policy, trace, cut):
        """Reads the turn that the policy just ended, appends it to the trace and answers it: a Chunk, or None at the end."""
        ids = trace.ids[trace.starts[-1]:]
        if ids and ids[-1] in policy.end_tokens:
            ids = ids[:-1]
        forced = not self.tool or trace.ended == "forced"
        turn = parse_turn(trace.begun + policy.decode(ids), forced)
        trace.turns.append(turn)
        trace.begun = ""
        called = self.mode == "zoom" and (turn.call is not None or turn.error)
        if cut:
            trace.ended = "length"
        elif forced:
            trace.ended = "forced"
        elif turn.answer is not None:
            trace.ended = "answer"
        elif not called:
            trace.ended = "stopped"
        elif len(trace.turns) <= self.max_crops:
            return self.look(policy, trace, turn)
        else:
            trace.ended, trace.begun = "forced", FORCED_ANSWER
            turn.call, turn.error = None, "There are no looks left."
            return self.answer_call(policy, trace, turn.error)
        return None

    def look(self, policy, trace, turn):
        """Answers a call with a close-up, or in words where there is nothing to show. What another trace of the question has
        looked at already is not cut out and encoded again."""
        if not turn.error and not trace.frames[0].inside(turn.call):
            width, height = trace.frames[0].seen
            turn.error = f"The point {spoken(turn.call)} is outside the image, which is {width} px wide and {height} px high."
        if turn.error:
            return self.answer_call(policy, trace, turn.error)
        point = trace.frames[0].to_original(turn.call)
        turn.crop = window(trace.frames[0].original, point, self.crop_half)
        same = (turn.crop, self.crop_dot and point)
        if same not in trace.shown:
            image = zoom(trace.question.load()[0], point, self.crop_half, self.crop_size, self.crop_dot)
            trace.shown[same] = policy.picture(image)
        return self.answer_call(policy, trace, trace.shown[same])

    def answer_call(self, policy, trace, shown):
        """The observation (a picture or words) as a user turn, and what the policy's next turn is begun with."""
        words = isinstance(shown, str)
        before, after = ({"type": "text", "text": text} for text in OBSERVATION)
        part = {"type": "text", "text": shown} if words else {"type": "image"}
        chunk = policy.reply([before, part, after], [] if words else [shown])
        chunk = Chunk(chunk.ids + policy.encode(trace.begun), chunk.pictures)
        trace.starts.append(len(trace.ids) + len(chunk.ids))
        return chunk


def rollout(policy, questions, dialogue, group, seeds, **sampling):
    """Traces of many questions at once: yields lists of `group` Traces, each as soon as it is finished.

    questions: an iterable, read as places become free; seeds: one for each (anything that prints), from which alone its random
    numbers follow, whatever runs beside it and in how many processes; sampling: see `model.Engine`."""
    jobs = (dialogue.start(policy, question, group, seed) for question, seed in zip(questions, seeds))
    yield from run_dialogues(policy, jobs, dialogue, **sampling)


def run_dialogues(policy, jobs, dialogue, **sampling):
    """Runs lists of Traces with a common prompt to their ends; yields them as they are finished."""
    for job in Engine(policy, **sampling).run(jobs, lambda trace, cut: dialogue.on_turn(policy, trace, cut)):
        for trace in job:
            trace.ended = trace.ended or "length"     # the observation would not have fitted in
        yield job


def draw_trace(trace, width=768):
    """The image with every look and point in its order, and the close-ups in a row below. -> PIL image"""
    image = trace.question.load()[0]
    factor = width / image.width
    top = image.resize((width, round(image.height * factor)), Image.Resampling.LANCZOS)
    draw, crops = ImageDraw.Draw(top), []
    def mark(point, label, colour):
        x, y = (v * factor for v in trace.frames[0].to_original(point))
        draw.ellipse((x - 13, y - 13, x + 13, y + 13), fill=colour, outline="white", width=2)
        draw.text((x, y), label, fill="white", anchor="mm", font_size=16)
    last = None
    for number, turn in enumerate(trace.turns, 1):
        spots = [turn.call] if turn.call else turn.points
        for spot in spots:
            if last:
                a, b = ([v * factor for v in trace.frames[0].to_original(p)] for p in (last, spot))
                draw.line((*a, *b), fill="white", width=3)
            last = spot
        if turn.crop:
            draw.rectangle([v * factor for v in turn.crop], outline="white", width=3)
            crops.append((number, image.crop(turn.crop)))
    for number, turn in enumerate(trace.turns, 1):
        for i, spot in enumerate([turn.call] if turn.call else turn.points, 1):
            mark(spot, str(number) if turn.call else str(i), (200, 30, 30) if turn.call else (30, 90, 200))
    side = width // 4 - 8
    sheet = Image.new("RGB", (width, top.height + (side + 16 if crops else 0)), "white")
    sheet.paste(top)
    for i, (number, crop) in enumerate(crops[:4]):
        x, y = 8 + i * (side + 8), top.height + 8
        sheet.paste(crop.resize((side - 2, side - 2), Image.Resampling.NEAREST), (x, y))
        ImageDraw.Draw(sheet).text((x + 6, y + 4), str(number), fill="white", font_size=20, stroke_width=2, stroke_fill="black")
    return sheet


# ------------------------------------------------------------------------------------ processes

MOST_PROCESSES = 8                  # that are started unasked
LAUNCHER = "VIGORL_LAUNCHER"        # environment variable: id of the process that started this one
REPLICATED = 100_000_000            # parameters of a model at most that every process keeps whole
GO_ON = "a training run goes on with --resume, an evaluation with the same --json FILE"


def processes_to_start():
    """The number of processes the command line asks for; 1: this one alone. Raises UserError."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.error = refuse
    parser.add_argument("--processes", type=int)
    parser.add_argument("--image")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("-h", "--help", action="store_true")
    asked = parser.parse_known_args()[0]
    if asked.processes is not None and asked.processes < 1:
        raise UserError("--processes must be at least 1")
    if "WORLD_SIZE" in os.environ or asked.image or asked.dry_run or asked.help:
        return 1
    if torch.cuda.is_available():
        if asked.processes and asked.processes > 1:
            raise UserError(f"on GPUs use torchrun: torchrun --nproc-per-node {asked.processes} -- "
                            f"{Path(sys.argv[0]).name} ...")
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return asked.processes or min(cores, MOST_PROCESSES)


def launch(number):
    """Runs the same command in `number` processes of one thread each, as torchrun does.
    -> the exit code: that of the first process that failed, 1 where a signal ended it.

    Where one process fails, the launcher ends the others. A signal to this process ends them all,
    and SIGINT then goes on as a KeyboardInterrupt."""
    logging.disable()                   # the launcher's own reports, which are pages long
    os.environ |= {"OMP_NUM_THREADS": "1", LAUNCHER: str(os.getpid())}
    with TemporaryDirectory() as folder:
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=number, max_restarts=0, monitor_interval=0.1,
            run_id="local", rdzv_backend="c10d", rdzv_endpoint="localhost:0",
            local_addr="localhost", logs_specs=DefaultLogsSpecs(folder),
            signals_to_handle="SIGTERM,SIGHUP")
        try:
            elastic_launch(config, sys.executable)("-u", *sys.orig_argv[1:])
        except ChildFailedError as error:
            which, failure = error.get_first_failure()
            if failure.exitcode > 0:
                return failure.exitcode
            print(f"error: {failure.signal_name()} ended process {which}; {GO_ON}", file=sys.stderr)
            return 1
        except SignalException as error:
            print(f"interrupted; {GO_ON}", file=sys.stderr)
            return 128 + error.sigval
    return 0


def join_processes():
    """Joins the processes that `launch` or torchrun started; does nothing without them. From now on
    only the first process prints."""
    if LAUNCHER in os.environ:
        threading.Thread(target=end_with, args=[int(os.environ[LAUNCHER])], daemon=True).start()
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(hours=4))
    if rank():
        sys.stdout = open(os.devnull, "w")


def end_with(parent):
    """Ends this process when its parent is gone: a launcher that was killed could not do so."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value):
    """Every process's `value` (anything that pickles), as a list by rank, on every process. It also waits for all of them."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def sum_over_processes(numbers):
    """The sums over all processes of some numbers, a list; cheaper than `gather`."""
    if world_size() == 1:
        return numbers
    sums = torch.tensor(numbers, dtype=torch.float64)
    if torch.cuda.is_available():
        sums = sums.cuda()                       # NCCL takes no others
    dist.all_reduce(sums)
    return sums.tolist()


def gather_shares(values):
    """The values of all items in their order, on every process. values: of this process's items,
    number rank, rank + world_size, and so on."""
    shares = gather(values)
    return [shares[i % len(shares)][i // len(shares)] for i in range(sum(map(len, shares)))]


def like(x, parameter):
    """A whole tensor, shared out as the parameter is."""
    if not isinstance(parameter, DTensor):
        return x
    return distribute_tensor(x.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)


def micro_batches(groups, tokens, spare=None):
    """Splits groups of Sequences into batches of at most `tokens` tokens (one group at least),
    those of like length together. -> [(batch, 1.0)]

    spare: a batch, where weights are sharded. All processes gather these together, so each gets as
    many batches as the one that has most: its list is filled up with (spare, 0.0), whose loss is
    not to count."""
    batches, room = [], 0
    def size(group):
        return len(group[0].prompt.ids) + sum(len(s.ids) for s in group)
    for group in sorted(groups, key=size):
        room -= size(group)
        if room < 0 or not batches:
            batches.append([])
            room = tokens - size(group)
        batches[-1].append(group)
    counted = [(batch, 1.0) for batch in batches]
    if spare is None:
        return counted
    return counted + [(spare, 0.0)] * (max(gather(len(batches))) - len(batches))


def average_gradients(parameters):
    """Makes the gradients of replicated parameters their mean over all processes, by one all-reduce;
    those of sharded ones are averaged by FSDP already.

    The sum is in float32. A missing gradient counts as zeros; where no process has one, none is made."""
    if world_size() == 1 or isinstance(parameters[0], DTensor):
        return
    device = parameters[0].device
    present = torch.tensor([float(p.grad is not None) for p in parameters], device=device)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([present, *(x.flatten().float() for x in gradients)])
    dist.all_reduce(flat)
    sizes = [len(parameters), *(p.numel() for p in parameters)]
    present, *means = (flat / world_size()).split(sizes)
    for p, anywhere, mean in zip(parameters, present.tolist(), means):
        p.grad = mean.view_as(p).to(p.dtype) if anywhere else None


def share_out(policy):
    """Prepares a policy for training in several processes: a large one is sharded, a small one
    stays whole in each."""
    if world_size() > 1 and sum(p.numel() for p in policy.model.parameters()) > REPLICATED:
        shard(policy)


def is_sharded(policy):
    return isinstance(policy.model, FSDPModule)


def shard(policy):
    """FSDP2: each process keeps a part of every weight, gradient and optimizer state. In an update, the weights of the language
    model are gathered layer by layer, and all others at once; gradients are averaged over the processes. A frozen vision tower
    stays whole: which process has images to encode, and when, is its own affair."""
    how = dict(mesh=init_device_mesh(policy.device.type, (world_size(),)),
               mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    for layer in policy.model.model.language_model.layers:
        fully_shard(layer, **how)
    trained = {id(p) for p in policy.trainable()}
    fully_shard(policy.model, **how, ignored_params={p for p in policy.model.parameters() if id(p) not in trained})
    policy.model.within = policy.within
    register_fsdp_forward_method(policy.model, "within")
    policy.within = policy.model.within
    policy.within(lambda: None)                  # so that the model is FSDP's root, and not the layer that runs first


@contextmanager
def unsharded(policy):
    """Inside, every process has all weights of a sharded policy, and samples without waiting for the others."""
    units = [m for m in policy.model.modules() if isinstance(m, FSDPModule)]
    for unit in units:
        unit.unshard()
        unit.set_reshard_after_forward(False, recurse=False)
    yield
    for unit in units:
        unit.set_reshard_after_forward(unit is not policy.model, recurse=False)
        unit.reshard()


# ------------------------------------------------------------------------------------------------ flags and their defaults

# What goes with a family of tasks, unless a flag says otherwise (paper, appendix): close-ups, what is seen, bounds of an answer.
# response_tokens: the paper's 2,048 of the policy's own, and room for four close-ups of 672 px (576 tokens) or 384 px (196).
REAL = dict(max_pixels=None, turn_tokens=1024, response_tokens=4608, cache_tokens=262_144, crop_half=182, crop_size=672,
            crop_dot=False)
PRESETS = {
    "drawn": dict(max_pixels=None, turn_tokens=48, response_tokens=288, cache_tokens=65_536, crop_half=32, crop_size=64,
                  crop_dot=False),
    "spatial": REAL | dict(max_pixels=4_194_304),
    "search": REAL | dict(max_pixels=2_850_000),
    "gui": REAL | dict(max_pixels=4_194_304, response_tokens=3072, crop_half=50, crop_size=384, crop_dot=True),
}
PRESETS["web"] = PRESETS["gui"]
SINGLE = dict(turn_tokens=2048, response_tokens=2048)    # of real tasks in the modes of one turn: no close-ups, the turn is all

# Rows of the settings that a training run prints first.
ROWS = {
    "task": ("model", "task", "seed", "train_vision"),
    "looks": ("max_pixels", "crop_half", "crop_size", "crop_dot", "max_crops"),
    "roll-out": ("temperature", "turn_tokens", "response_tokens", "cache_tokens"),
    "SFT": ("sft_lr", "sft_batch", "sft_steps", "micro_tokens", "adam_dtype"),
    "GRPO": ("lr", "optimizer", "steps", "questions", "update_questions", "group", "warm_up", "final_lr"),
    "": ("kl", "clip_norm", "diversity", "reference"),
}


def preset(family, mode):
    """The defaults {flag: value} that go with a family of tasks and a mode."""
    return PRESETS[family] | (SINGLE if family != "drawn" and mode != "zoom" else {})


def parse(parser):
    """Parses the command line; `given` are the flags that were on it. Raises UserError."""
    parser.error = refuse
    args = parser.parse_args()
    del args.processes                  # `run` has read it, and it is no part of a run's settings
    args.given = sorted(name for name, value in vars(args).items() if value != parser.get_default(name))
    return args


def refuse(message):
    """In place of argparse's own: an error of the command line is told as any other, in a line."""
    raise UserError(f"{message} (--help lists the flags)")


def settings(args):
    """The settings in force, to be printed: a row a concern, those given by a flag with a star."""
    lines = [f"settings of the family '{args.family}' in the mode '{args.mode}' (* given by a flag)"]
    for row, names in ROWS.items():
        shown = [f"{n} {getattr(args, n)}{'*' * (n in args.given)}" for n in names if getattr(args, n, None) is not None]
        lines += [f"  {row:<8}  {'  '.join(shown)}"] if shown else []
    return "\n".join(lines)


def add_arguments(parser):
    """The flags that all three scripts share."""
    add = parser.add_argument
    add("--model", metavar="PATH", help="checkpoint folder or hub id of the Qwen2.5-VL family")
    add("--task", default="toy-search", metavar="NAME|FILE", help="a drawn task or a file of questions (%(default)s)")
    add("--image-root", metavar="DIR", help="folder that the images of a file are named from (looked for around the file)")
    add("--family", choices=tuple(PRESETS), help="kind of task, for the defaults of what follows (told by the task)")
    add("--mode", default="zoom", choices=MODES, help="how the policy answers (%(default)s)")
    add("--system-prompt", metavar="FILE", help="text to use instead of the mode's own system prompt")
    add("--seed", type=int, default=0, help="decides everything that is random (%(default)s)")
    add("--processes", type=int, metavar="N", help="processes on a CPU, of one thread each (one a "
        "core, 8 at most); on GPUs torchrun starts them")
    add("--temperature", type=float, default=1.0, help="of sampling; 0: the likeliest token (%(default)s)")
    add("--crop-half", type=int, metavar="PX", help="half the side of a close-up, px of the original (drawn 32, gui and "
        "web 50, others 182)")
    add("--crop-size", type=int, metavar="PX", help="side of the close-up as shown (drawn 64, gui and web 384, others 672)")
    add("--crop-dot", action=argparse.BooleanOptionalAction, help="mark the point looked at with a red dot (gui, web: yes)")
    add("--max-crops", type=int, default=4, help="looks a trace; after that the answer is asked for (%(default)s)")
    add("--max-pixels", type=int, metavar="N", help="area that the policy sees of an image at most (drawn: the "
        "checkpoint's own; search 2850000, others 4194304)")
    add("--turn-tokens", type=int, metavar="N", help="tokens sampled a turn at most (drawn 48, files 1024, in a single "
        "turn 2048)")
    add("--response-tokens", type=int, metavar="N", help="tokens behind the question at most, close-ups too (drawn 288, "
        "gui and web 3072, others 4608, in a single turn 2048)")
    add("--cache-tokens", type=int, metavar="N", help="K/V columns of all roll-outs in flight (drawn 65536, files 262144)")
    add("--cuda-graphs", action="store_true", help="decode by CUDA graphs: fewer launches (not measured yet, so off)")


def dialogue_of(args, tool=True):
    prompt = None
    if args.system_prompt:
        try:
            prompt = Path(args.system_prompt).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--system-prompt {args.system_prompt}: cannot be read ({error})") from None
    return Dialogue(args.mode, args.crop_half, args.crop_size, args.crop_dot, args.max_crops, tool, prompt)


def sampling_of(args, **more):
    """Arguments for `model.Engine`."""
    return dict(temperature=args.temperature, turn_tokens=args.turn_tokens, response_tokens=args.response_tokens,
                cache_tokens=args.cache_tokens, graphs=args.cuda_graphs, **more)


def run(main):
    """Runs a script's `main`, in as many processes as the command line asks for. A UserError
    becomes one line and exit code 2. Where one process fails, the launcher ends the others."""
    try:
        number = processes_to_start()
        if number > 1:
            sys.exit(launch(number))
        join_processes()
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
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
    return Question("\n\n".join(parts), [image.convert("RGB") for image in (screen, *images)], "", "action")


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
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        known = vars(parser.parse_args([])) | preset("web", mode) | {"mode": mode}
        if unknown := settings.keys() - known:
            raise TypeError(f"no such setting: {', '.join(sorted(unknown))}")
        self.args, self.tries = argparse.Namespace(**known | settings), tries
        self.policy = policy if isinstance(policy, Policy) else load(str(policy), max_pixels=self.args.max_pixels)
        self.dialogue = dialogue_of(self.args)
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
        question, sampling, why = web_question(trajectory, intent, meta_data, images), sampling_of(self.args), ""
        for _ in range(self.tries):
            self.asked += 1
            seed = f"web {self.args.seed} {self.asked}"
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
