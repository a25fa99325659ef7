"""The dialogue: settings, questions, coordinates, the zoom tool, turns, many traces at once.

In:  questions about images. Out: `Trace`s: which tokens the policy sampled, where it pointed, what
it was shown, how it ended.

Four modes, as in the paper: `direct` (an answer only), `think` (a thought, then the answer),
`grounded` (a thought whose steps point at the image) and `zoom` (turns: a thought that points and a
zoom call, answered by a crop, ..., the answer).

There are two systems of coordinates. The policy reads and writes pixels of the model input, the
image after the image processor's resize, or, if it is Qwen3-VL, thousandths of width and height.
Files, boxes and crops are in pixels of the original image. `Frame` converts, and nothing else does.

Departures from the public code: crops are cut from the original, so that a zoom adds detail; a
window at the border is moved inside, never stretched; bad calls and points outside are answered in
words; what is injected is known by construction.
"""
import argparse
import base64
import fcntl
import hashlib
import io
import json
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
import unicodedata
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import partial
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import ExifTags, Image, ImageDraw, ImageOps
from transformers.utils import cached_file

from model import Engine, Sequence, UserError, rank, world_size

# ----------------------------------------------------------------------------------------- settings

MODES = ("direct", "think", "grounded", "zoom")
# What the paper trains a family of tasks with, and what the authors' evaluation changes: for
# checkpoints without a dialogue.json, which counts more. Pixels bound the model input, crop_half is
# half the side of a crop in px of the original image, crop_size its side as the model gets it,
# crop_dot marks the point of the call in it.
GUI = (dict(max_pixels=4_194_304, crop_half=50, crop_size=384, crop_dot=True),
       dict(max_pixels=12_960_000, crop_half=100, crop_size=512))
FAMILIES = {
    "spatial": (dict(max_pixels=4_194_304), dict(max_image_side=1260)),
    "search": (dict(max_pixels=2_850_000, crop_half=182, crop_size=672),
               dict(max_pixels=12_960_000)),
    "gui": GUI,
    "web": GUI,
}
# The defaults of flags are the paper's for `zoom`; in the other modes it has these.
SINGLE_TURN_FLAGS = dict(top_p=1.0, turn_tokens=2048, response_tokens=2048, group=5, warm_up=0,
                         clip_norm=1.0)
# of a --config file; "why" has remarks, and is not read
SECTIONS = ("rollout", "evaluate", "train_sft", "train_rl", "why")
RECIPE = Path(__file__).parent / "tests/tiny/recipe.json"


def family_settings(family, training):
    """{name: value} for tasks of a family; {} for those of none (None)."""
    if not family:
        return {}
    trained, changes = FAMILIES[family]
    return trained if training else trained | changes


def shared_flags(parser):
    """Adds the flags that all scripts have."""
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.allow_abbrev = False           # a misspelt name in a --config file is no abbreviation
    add = parser.add_argument_group("policy, task and sampling").add_argument
    add("--model", default="", help="checkpoint folder or hub id")
    add("--task", default="", help="file of questions")
    add("--image-root", default="", help="folder that a file's images are named from")
    add("--mode", choices=MODES, default="zoom", help="how the policy answers")
    add("--dialogue", default="", help="JSON file with parts of the wording, see dialogue.json")
    add("--config", default="", help="JSON file {section: {flag: value}}; flags count more")
    add("--seed", type=whole(0), default=0, help="decides everything that is random")
    add("--max-pixels", type=whole(1), help="of the model input at most (None: the family's)")
    add("--temperature", type=number(most=1e3), default=1.0, help="of sampling; 0: the likeliest")
    add("--top-p", type=number(1e-6, 1), default=1.0,
        help="sample from the likeliest tokens that add up to this")
    add("--turn-tokens", type=whole(1), default=1024, help="sampled a turn at most")
    # the paper's 2,048 sampled ones, and room for four crops
    add("--response-tokens", type=whole(1), default=4608,
        help="behind the question at most, crops included")


def number(least=0, most=math.inf, kind=float):
    """The type of a flag that is a finite number from `least` to `most`."""
    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most or math.isinf(value):
            what = "number" if kind is float else "whole number"
            raise argparse.ArgumentTypeError(f"{text!r} is no {what} from {least} to {most}")
        return value
    return read


def whole(least):
    """The type of a flag that is a whole number from `least` on."""
    return number(least, 2**63 - 1, int)


def parse(parser, *sections):
    """Reads the command line, and before it these sections of the --config file. -> Namespace

    Without a task and a config it is the tiny run of tests/tiny/recipe.json. Beside the flags there
    are `training`, and `family` and `max_image_side`, which the task decides. Raises UserError."""
    def refuse(message):
        raise UserError(f"{message} (--help lists the flags)")
    parser.error = refuse                 # instead of its own, of two lines
    words = sys.argv[1:]
    args = parser.parse_args(words)
    training = "train_sft" in sections
    if training and args.model and not (args.task or args.config):
        raise UserError("--model without --task: give the file of questions to train it on")
    alone = [name for name in ("task", "image", "serve") if vars(args).get(name)]
    if args.config or not alone:
        # of a flag that stands twice the last one counts
        words = config_words(parser, args.config or RECIPE, sections) + words
        args = parser.parse_args(words)
    if args.mode != "zoom":
        set_single_turn(parser)
        args = parser.parse_args(words)
    if not args.model:
        raise UserError("--model: give a checkpoint folder or a hub id")
    # Traces that do not differ teach nothing, and divided by less, logits are infinite.
    if args.temperature < 1e-3 and (training or args.temperature):
        raise UserError("--temperature: give at least 0.001, or, in an evaluation, 0 for the "
                        "likeliest token")
    # Log-probabilities of the update are those of the whole distribution.
    if training and args.top_p < 1:
        raise UserError("--top-p below 1: the update would not know the probabilities of what was "
                        "sampled; leave it out in training")
    args.training, args.family, args.max_image_side = training, None, None
    return args


def config_words(parser, path, sections):
    """Sections of a --config file as the words of a command line, checked by the parser. "{here}"
    in a text is the file's folder. Raises UserError."""
    words = []
    try:
        config = parse_json(Path(path).read_text(encoding="utf-8-sig"))
        for section in config:
            if section not in SECTIONS:
                raise ValueError(f"no section {section!r}; there are {', '.join(SECTIONS)}")
        for section in sections:
            for name, value in config.get(section, {}).items():
                flag = name.replace("_", "-")
                if type(value) is bool:
                    words.append(f"--{flag}" if value else f"--no-{flag}")
                else:
                    words.append(f"--{flag}={value}".replace("{here}", str(Path(path).parent)))
        parser.parse_args(words)
    except (OSError, ValueError, TypeError, AttributeError, UserError) as error:
        raise UserError(f"{path}: cannot be read as {{section: {{flag: value}}}}: "
                        f"{error}") from None
    return words


def parse_json(text):
    """JSON -> its value. Half characters ("\\ud83d" alone), which no file and no tokenizer takes,
    become question marks. Raises ValueError."""
    try:
        text = json.dumps(json.loads(text), ensure_ascii=False)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return json.loads(text.encode(errors="replace"))


def set_single_turn(parser):
    """Makes SINGLE_TURN_FLAGS the defaults of those flags that a parser has."""
    known = {name: value for name, value in SINGLE_TURN_FLAGS.items() if parser.get_default(name)}
    parser.set_defaults(**known)


def sampling_of(args):
    """Arguments of `model.Engine`."""
    return dict(temperature=args.temperature, top_p=args.top_p, turn_tokens=args.turn_tokens,
                response_tokens=args.response_tokens)


def input_limits(args):
    """Arguments of `model.load`."""
    return dict(max_pixels=args.max_pixels, max_image_side=args.max_image_side)


def describe_settings(args):
    """The settings in force, to be printed."""
    settings = [f"{name}={value}" for name, value in vars(args).items() if value not in (None, "")]
    return indented(f"settings: {'  '.join(settings)}")


def indented(text):
    """A text in lines of at most 100 columns."""
    return textwrap.fill(text, 100, initial_indent="  ", subsequent_indent="    ",
                         break_on_hyphens=False, break_long_words=False)


# --------------------------------------------------------------------------------- running a script

GO_ON = "a training run goes on with --resume, an evaluation with the same --json FILE"
INTERRUPTED = f"interrupted; {GO_ON}"


def run_script(main):
    """Runs a script's main(), as one of torchrun's processes where it started this one.

    A UserError is told in a line, exit code 2. Where one of several processes ends, torchrun ends
    the others."""
    for stream in filter(None, (sys.stdout, sys.stderr)):     # one may be closed
        stream.reconfigure(errors="replace", line_buffering=True)     # an ASCII terminal gets "?"
    try:
        if "WORLD_SIZE" in os.environ:
            join_processes()
        main()
    except (UserError, OSError) as error:        # the second: of a disk or a pipe
        leave(f"error: {in_one_line(error)}", 2)
    except KeyboardInterrupt:
        leave(INTERRUPTED, 130)
    except Exception:
        if world_size() > 1:
            time.sleep(2)               # if another's end is the cause, torchrun ends this one
        leave(traceback.format_exc().rstrip(), 1)
    if dist.is_initialized():
        dist.destroy_process_group()


def join_processes():
    """Joins the processes that torchrun started. From now on only the first one prints."""
    backend = "gloo"
    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            backend = "nccl"
        dist.init_process_group(backend, timeout=timedelta(hours=4))
    except (ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"WORLD_SIZE is set, but this process cannot join others ({error}); start "
                        "it by torchrun, or unset WORLD_SIZE") from None
    if rank():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    # Ctrl-C has to end a process that waits for another one in a collective, too, where Python
    # hears nothing: the signal writes to a pipe, on which a thread waits.
    pipe, signalled = os.pipe()
    os.set_blocking(signalled, False)
    signal.set_wakeup_fd(signalled)
    signal.signal(signal.SIGINT, lambda *_: None)

    def end_by_signal():
        os.read(pipe, 1)
        leave(INTERRUPTED if rank() == 0 else "", 130)
    threading.Thread(target=end_by_signal, daemon=True).start()


def leave(message, code):
    """Ends the process with a line. The first process goes first, and torchrun ends the others
    while they wait: what all have to say is said once."""
    if message:
        time.sleep(min(2 * rank(), 4))
        print(message, file=sys.stderr, flush=True)
    if world_size() == 1:
        sys.exit(code)
    sys.stdout.flush()
    os._exit(code)                      # at once: to tear torch down can take a second


@contextmanager
def writing(path):
    """Makes any error inside a UserError in a line: of a full disk libraries tell in many ways."""
    try:
        yield
    except Exception as error:
        why = first_line(error.__context__ or error)         # torch hides the first one
        raise UserError(f"{path} cannot be written ({why}); make room, or give another name; what "
                        f"is finished is kept: {GO_ON}") from None


def first_line(error):
    return (str(error).strip() or repr(error)).splitlines()[0]


def open_lock(path, flag):
    """-> the open file that keeps a second run from writing there: until it is closed, or the
    process ends, however it does. Raises UserError."""
    with writing(path):
        lock = path.open("w")
    try:
        if rank() == 0:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{path}: another run is writing there; wait for it, or give another "
                        f"{flag}") from None
    return lock


def fingerprint(path):
    """A hash of what a file or a checkpoint holds: something else may lie there later."""
    files = [Path(path)]
    if not files[0].is_file():
        with suppress(OSError, TypeError):      # of what is not there at all, its reader tells
            path = Path(cached_file(path, "config.json")).parent
        kinds = (".json", ".safetensors", ".bin")
        files = sorted(file for file in Path(path).glob("*") if file.suffix in kinds)
    digest = hashlib.sha1()
    for file in files:
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha1").digest())
    return digest.hexdigest()


TEXT_SHOWN = 8_000                                 # characters of a text
# letters and marks that are not seen though they count as printable
UNSEEN = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0e\uffa0"
                    "\U000e0100-\U000e01ef]")
SEEN = "\n\t\u200c\u200d"                         # the last two join letters


def visible(text, most=TEXT_SHOWN):
    """How a text that is not trusted is shown, in a terminal or on a page: its beginning, with the
    codes of characters that are not seen, turn it around or drive a terminal."""
    text = str(text)
    if len(text) > most:
        text = f"{text[:most]} ... ({len(text) - most:,} more characters)"
    letters = []
    for letter in text:
        printable = letter.isprintable() or unicodedata.category(letter) == "Zs"
        if letter in SEEN or printable and not UNSEEN.match(letter):
            letters.append(letter)
        else:
            letters.append(f"[U+{ord(letter):04X}]")
    return "".join(letters)


def in_one_line(text):
    return visible(text).replace("\n", " ")


# ---------------------------------------------------------------------------- questions and images

MAX_IMAGE_PIXELS = 2**27    # of a file, refused before it is decoded: 384 MiB in memory
MAX_RATIO = 200             # of an image's sides, for the model
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
Image.MAX_IMAGE_PIXELS = None    # our own check, below, is an error and not a warning
warnings.filterwarnings("ignore", module="PIL")              # of damaged EXIF


@dataclass(eq=False)
class Question:
    """A question about one or more images.

    images: PIL images, paths, data URIs ("data:image/png;base64,..."), or functions without
    arguments that return PIL images; they are read when they are needed. answer: text for kind
    "choice", "string" and "action"; a box (x1, y1, x2, y2) or a polygon ((x, y), ...) in px of the
    original image for "point". choices: the options' texts in the order of their letters. regions:
    what it is about and where, [{"box": [x1, y1, x2, y2], "name": text}, ...] in px of the original
    image; names: all names of regions in its file. hint: what the answer shall look like, where the
    text does not say it. key: of its content, the same wherever it stands. where: file and row, for
    messages."""
    text: str
    images: list
    answer: object
    kind: str = "string"
    choices: tuple = ()
    regions: list = field(default_factory=list)
    names: frozenset = frozenset()
    category: str = ""
    hint: str = ""
    id: str = ""
    key: str = ""
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
        return to_rgb(image() if callable(image) else image)


def read_image(source, where=""):
    """Path, bytes or data URI -> RGB image, turned upright as its EXIF orientation says.

    A missing, broken or absurdly large file is a UserError that names it."""
    embedded = isinstance(source, bytes) or str(source).startswith("data:")
    name = "the embedded image" if embedded else source
    if where:
        name = f"{name} ({where})"
    try:
        if isinstance(source, str) and embedded:
            source = base64.b64decode(source.partition(",")[2])
        if embedded:
            source = io.BytesIO(source)
        elif not Path(source).is_file():                     # a pipe would be waited for
            raise UserError(f"{name}: no such image; check the path and --image-root")
        with Image.open(source, formats=IMAGE_FORMATS) as image:
            width, height = image.size
            if width * height > MAX_IMAGE_PIXELS:
                raise UserError(f"{name}: {width}x{height} px is more than {MAX_IMAGE_PIXELS:,} "
                                "px; scale it down first")
            if max(width, height) > MAX_RATIO * min(width, height):
                raise UserError(f"{name}: {width}x{height} px is too thin; the model takes at most "
                                f"{MAX_RATIO}:1")
            return upright(image, to_rgb(image))
    except UserError:
        raise
    except Exception as error:           # of many kinds: a foreign file may hold anything
        why = re.sub(" <_io.*?>", "", str(error))            # an address, another one each time
        raise UserError(f"{name}: cannot be read as an image ({why}); replace the file (formats: "
                        f"{', '.join(IMAGE_FORMATS)}) or remove the row") from None


def to_rgb(image):
    """PIL image of any mode -> RGB: transparency lies on white; more than 8 bits are scaled."""
    if image.mode.startswith(("I", "F")):
        values = np.nan_to_num(np.asarray(image, np.float64))
        # integers have 16 bits, floats the first of these ranges that they keep to
        ranges = (1, 255, 65_535) if image.mode == "F" else (65_535,)
        most = next((most for most in ranges if values.max() <= most), values.max())
        image = Image.fromarray((values.clip(0, most) * (255 / most)).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def upright(image, rgb):
    """`rgb` turned as the EXIF of `image` says, if it can be read: damaged EXIF costs no pixels."""
    rgb.info = {}
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:                    # of many kinds, see above
        return rgb
    rgb.getexif()[ExifTags.Base.Orientation] = orientation
    ImageOps.exif_transpose(rgb, in_place=True)
    return rgb


# ------------------------------------------------------------------------------------- coordinates

NUMBER = r"-?\d{1,15}(?:\.\d{1,15})?(?:[eE][+-]?\d{1,2})?"
POINT = re.compile(rf"\(\s*({NUMBER})\s*,\s*({NUMBER})\s*\)|\[\s*({NUMBER})\s*,\s*({NUMBER})\s*\]")


def parse_points(text):
    """All points "(x, y)" or "[x, y]" of a text, as floats: "at ( 12.5 , 40 )" -> [(12.5, 40.0)].

    Inside the image or not."""
    return [(float(a or c), float(b or d)) for a, b, c, d in POINT.findall(text)]


def format_point(point):
    """A point as the policy writes it, in whole pixels: (3.2, 40) -> "(3, 40)"."""
    x, y = map(round, point)
    return f"({x}, {y})"


# By the system of coordinates, what a policy counts in.
UNITS = {"input": "pixels", "unrounded": "pixels", "thousandths": "thousandths of width and height"}


@dataclass(frozen=True)
class Frame:
    """The sizes (width, height) in px of an image: of the model input, and of the original. Where
    the policy points in thousandths, the first is (1000, 1000), and not in px."""
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
    least = math.ceil(size / MAX_RATIO)
    crop_size = [max(least, round(side * scale)) for side in crop.size]
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


def between(text, tag):
    """What stands between the first <tag> and the </tag> behind it, and the text after that; None
    and the whole text if there is no such pair."""
    _, _, rest = text.partition(f"<{tag}>")
    inside, closed, after = rest.partition(f"</{tag}>")
    return (inside, after) if closed else (None, text)


def parse_turn(text):
    """Splits a turn into thought, points, call and answer. A call beside an answer is not made."""
    thought, rest = between(text, "think")
    thought = (thought or "").strip()
    turn = Turn(text, thought, parse_points(thought))
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


@dataclass(eq=False)
class Trace(Sequence):
    """A `Sequence` as a dialogue. ended: "answer" (of its own accord), "forced" (the answer was
    asked for), "truncated" (the tokens ran out) or "stopped" (neither a call nor an answer)."""
    question: Question = None
    mode: str = "zoom"
    frames: list[Frame] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    ended: str = ""
    turn_start: int = 0               # of the current turn in `ids`
    prefix: str = ""                  # text of the current turn that was written for the policy
    must_answer: bool = False         # its answer was asked for: no calls are left, or no tool
    # Pictures by window (and point, where it is marked), of all traces of the question
    crops: dict = field(default_factory=dict)
    score: object = None              # a reward.Score, once it is scored
    advantage: float = 0.0            # relative to its group

    @property
    def answer(self):
        return self.turns[-1].answer if self.turns else None

    @property
    def overlong(self):
        """Whether it ran out of tokens, or of zoom calls. Without the tool the answer is asked for
        at once: that is not overlong."""
        return self.ended == "truncated" or self.ended == "forced" and len(self.turns) > 1

    @property
    def zoom_points(self):
        """Points (px of the model input) of the zoom calls that were answered by a crop."""
        return [turn.call for turn in self.turns if turn.crop]

    @property
    def windows(self):
        """Boxes (px of the original) of the crops that answered them."""
        return [turn.crop for turn in self.turns if turn.crop]

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
WEB_LAYOUT = "OBJECTIVE: {intent}\n\nPREVIOUS ACTIONS: {history}\n\nIMAGE:"
WEB_ACTIONS = ["click [12]", "type [12] [text]", "scroll [down]", "go_back", "stop [answer]"]
MAX_ELEMENTS, MAX_INTENT, MAX_ACTION = 12_000, 4_000, 300    # characters of each in a web question
MAX_HISTORY = 30                                             # previous actions, the latest


def shorten(text, most):
    """The first lines of a text, `most` characters at most; of a longer line its beginning."""
    if len(text) <= most:
        return text
    kept = text[:most].rpartition("\n")[0] or text[:most]
    return f"{kept}\n({len(text) - len(kept):,} characters left out)"


@dataclass
class Dialogue:
    """How questions are asked and calls are answered. All but `mode` and `tool` belongs to a
    checkpoint, for it is what the policy was trained to see: it is kept beside the weights, in
    dialogue.json.

    tool False: no zoom calls, the answer is asked for at once. system_prompts: by mode; of a mode
    that is not there, the chat template's own. before_crop, after_crop: text around a crop;
    before_dotted: instead of before_crop, where the crop has a dot. no_calls_left: the observation
    after the last call. forced_answer: then written for the policy, as the beginning of its turn.
    crop_half, crop_size, crop_dot: see FAMILIES; max_crops: zoom calls, refused ones too, before
    the answer is asked for. hints: say what an answer shall look like where the question does not.
    coordinates: of the model input ("input"); or, as in the public code, of the image scaled to at
    most max_pixels, before its sides are rounded to whole tokens ("unrounded"); or from 0 to 1000
    of its width and height, as Qwen3-VL's ("thousandths"). Prompts and hints that say "in pixels"
    are given in that unit. web_layout: of the text of a question for a web action, with {intent},
    {history} and, for policies that read them, {url} and {elements}; web_actions: those that its
    hint names.

    The wording of the authors' checkpoints is in Gabesarch/grounded-rl: system prompts in
    scripts/evaluation/eval_multiturn.sh, for the web in web_action_grounded_thinking.jinja and
    web_action_naive_grpo.jinja of src/trainer/rl/examples/format_prompt; observations and the
    request for the answer in src/vlmsearch/models/qwen_vllm.py; their coordinates are
    "unrounded"."""
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
    crop_half: int = 182
    crop_size: int = 672
    crop_dot: bool = False
    max_crops: int = 4
    web_layout: str = WEB_LAYOUT
    web_actions: list = field(default_factory=lambda: list(WEB_ACTIONS))

    def __post_init__(self):
        """Its parts may come from a file. Raises TypeError or ValueError."""
        for part in fields(self):
            if type(getattr(self, part.name)) is not part.type:
                raise TypeError(f"{part.name!r} has to be of type {part.type.__name__}")
        for mode, text in self.system_prompts.items():
            if mode not in MODES or type(text) is not str:
                raise ValueError(f"'system_prompts' has to have texts, by {', '.join(MODES)}")
        if self.coordinates not in UNITS:
            raise ValueError(f"'coordinates' has to be one of {', '.join(UNITS)}")
        if not all(type(action) is str for action in self.web_actions):
            raise ValueError("'web_actions' has to be a list of texts")
        bounds = {"crop_half": (1, 100_000), "crop_size": (1, 4096), "max_crops": (0, 100)}
        for name, (least, most) in bounds.items():
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name!r} has to be from {least} to {most}")

    @property
    def before(self):
        """The text before a crop."""
        return self.before_dotted if self.crop_dot else self.before_crop

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

    def web_text(self, intent, history=(), url="", elements=""):
        """The text of a question for a web action, in a row as in an agent's step. What is too long
        is shortened. history: the actions before, in words; elements: the page's, a line each."""
        done = [" ".join(action.split())[:MAX_ACTION] for action in history[-MAX_HISTORY:]]
        lines = [f"\n{number}. {action}" for number, action in enumerate(done, 1)]
        parts = {"intent": shorten(intent, MAX_INTENT), "history": "".join(lines) or "None",
                 "url": url[:MAX_ACTION], "elements": shorten(elements.strip(), MAX_ELEMENTS)}
        return re.sub(r"{(intent|history|url|elements)}", lambda x: parts[x[1]], self.web_layout)

    def asked(self, question):
        """A question's text, and what its answer shall look like where the text does not say it.
        Web actions are always listed: a page that is quoted must not be able to suppress that."""
        hint = question.hint
        if question.kind == "action" and self.web_actions:
            hint = ("The answer is one of these actions, with numbers and words that fit: "
                    f"{', '.join(self.web_actions)}.")
        return f"{question.text}\n{self.in_unit(hint)}" if self.hints and hint else question.text

    def in_unit(self, text):
        """A prompt or hint, in the unit of the policy's coordinates."""
        return text.replace("in pixels", f"in {UNITS[self.coordinates]}")

    def prompt(self, policy, question):
        """-> the Chunk after which the policy speaks, and the Frames of the question's images."""
        images = question.load()
        content = [{"type": "image"}] * len(images)
        content.append({"type": "text", "text": policy.clean(self.asked(question))})
        messages = [{"role": "user", "content": content}]
        if system := self.system_prompts.get(self.mode):
            messages.insert(0, {"role": "system", "content": self.in_unit(system)})
        try:
            chunk = policy.prompt(messages, images)
        except UserError as error:       # an image's size, by one who does not know the row
            raise UserError(f"{question.where or 'the question'}: {error}") from None
        if not self.tool:
            chunk.ids += policy.encode(self.forced_answer)
        sizes = [policy.input_size(*image.size, self.coordinates == "input") for image in images]
        if self.coordinates == "thousandths":
            sizes = [(1000, 1000)] * len(images)
        return chunk, [Frame(size, image.size) for size, image in zip(sizes, images, strict=True)]

    def start(self, policy, question, group_size, seed=0):
        """`group_size` empty Traces of a question, sharing one prompt; number i samples by random
        numbers from `seed` and i."""
        prompt, frames = self.prompt(policy, question)
        prefix = "" if self.tool else self.forced_answer
        crops = {}
        return [Trace(prompt, rng=random.Random(f"{seed} {i}"), question=question, mode=self.mode,
                      frames=frames, prefix=prefix, must_answer=not self.tool, crops=crops)
                for i in range(group_size)]

    def on_turn(self, policy, trace, truncated):
        """Reads the turn that the policy just ended. truncated: by the bound on tokens.
        -> the Chunk that answers it, or None at the trace's end"""
        ids = trace.ids[trace.turn_start:]
        if ids[-1] in policy.end_tokens:
            ids = ids[:-1]
        turn = parse_turn(trace.prefix + policy.decode(ids))
        trace.turns.append(turn)
        trace.prefix = ""
        if truncated:
            trace.ended = "truncated"
        elif trace.must_answer:
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
            px = "" if self.coordinates == "thousandths" else " px"
            turn.error = (f"The point {format_point(turn.call)} is outside the image, which is "
                          f"{width}{px} wide and {height}{px} high.")
        shown, pictures = {"type": "text", "text": turn.error}, []
        if turn.call and not turn.error:
            shown, pictures = {"type": "image"}, [self.crop(policy, trace, turn)]
        content = [{"type": "text", "text": self.before}, shown,
                   {"type": "text", "text": self.after_crop}]
        chunk = policy.reply(content, pictures)
        chunk.ids += policy.encode(trace.prefix)
        trace.turn_start = len(trace.ids) + len(chunk.ids)
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


def web_question(dialogue, trajectory, intent, history=(), images=None):
    """A state of VisualWebArena -> Question of kind "action", without an answer.

    trajectory: states and actions in turn, a state last: {"observation": {"image": uint8 array
    (height, width, 3 or 4), "text": the page's elements}, "info": {"page": with a url, or "url":
    text}}. history: the actions before, in words. images: PIL images of the intent's. Raises
    UserError where there is no screenshot."""
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
    if len(images) > 1:
        intent += "\nThe first image is the page; the others belong to the objective."
    url = info.get("url") or getattr(info.get("page"), "url", "")
    text = dialogue.web_text(intent, history, url, str(observation.get("text") or ""))
    return Question(text, images, "", "action")


def in_words(action, state):
    """An action with its element's line in place of the number, which means another element on the
    next page: "click [BUTTON] [Add red pot]". "" where there is no such line."""
    elements = str(state["observation"].get("text"))
    line = re.search(rf"^\[{action.id}\](.*)", elements, re.M)
    if not line or action.name == "tab_focus":
        return ""
    return action.name + line[1] + (f" [{action.text}]" if action.text else "")


def make_dialogue(args, checkpoint, policy):
    """The Dialogue that goes with a checkpoint and the settings.

    What counts, from the least to the most: the crops of the task's family, the coordinates of the
    model's; the checkpoint's dialogue.json, or, without one, the system message of its chat
    template; --dialogue FILE. Raises UserError."""
    settings = family_settings(args.family, args.training)
    parts = {name: value for name, value in settings.items() if name.startswith("crop")}
    parts["coordinates"] = policy.coordinates
    own = checkpoint and cached_file(checkpoint, "dialogue.json",
                                     _raise_exceptions_for_missing_entries=False)
    if own:
        parts |= read_parts(own)
    elif checkpoint and (Path(checkpoint) / "notes.json").is_file():     # one of ours
        raise UserError(f"{checkpoint}: dialogue.json is missing, which says what it was trained "
                        "to see; copy it from the run, or make the checkpoint again")
    elif policy.default_system_message():
        parts["system_prompts"] = {}
    if args.dialogue:
        parts |= read_parts(args.dialogue)
    tool = getattr(args, "tool", True)               # a flag of evaluate.py alone
    return Dialogue(args.mode, tool, **parts)


def read_parts(path):
    """A file like dialogue.json -> {field of Dialogue: value}, checked. Raises UserError."""
    try:
        parts = parse_json(Path(path).read_text(encoding="utf-8-sig"))
        Dialogue("zoom", True, **parts)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read as parts of a dialogue ({error})") from None
    return parts


# ----------------------------------------------------------------------------------------- rollouts

READERS = 4             # threads that read the questions' images


def rollout(policy, questions, dialogue, group_size, seeds, **sampling):
    """`group_size` Traces of each of many questions. -> groups, in the order of the questions

    seeds: one for each question (anything that prints), from which alone its random numbers follow,
    whatever runs beside it and in how many processes. sampling: see `model.Engine`."""
    start = partial(dialogue.start, policy)
    with ThreadPoolExecutor(READERS) as threads:
        groups = list(threads.map(start, questions, repeat(group_size), seeds))
    return run_traces(policy, groups, dialogue, **sampling)


def run_traces(policy, groups, dialogue, **sampling):
    """Runs lists of Traces with a common prompt to their ends. -> groups"""
    engine = Engine(policy, **sampling)
    for traces in engine.run(groups, partial(dialogue.on_turn, policy)):
        for trace in traces:
            if not trace.ended:                          # there was no room for the observation
                trace.ended, trace.turns[-1].crop = "truncated", None
        traces[0].question.release()
    return groups


# ----------------------------------------------------------------------------- a picture of a trace

def draw_trace(trace):
    """The image with the points in their order, and the crops in a row below. -> PIL image"""
    column = 192                         # px: four crops fit in the row
    image = trace.question.load()[0]
    scale = min(4 * column / image.width, 1024 / image.height)
    width, height = (max(1, round(side * scale)) for side in image.size)
    row = column if any(turn.crop for turn in trace.turns) else 0
    sheet = Image.new("RGB", (max(width, 4 * column if row else 0), height + row), "white")
    sheet.paste(image.resize((width, height), Image.Resampling.LANCZOS))
    canvas = ImageDraw.Draw(sheet)
    marks = []                           # (place, number, colour)
    x = 0
    for number, turn in enumerate(trace.turns, 1):
        if turn.crop:
            canvas.rectangle([side * scale for side in turn.crop], outline="white", width=3)
            crop = ImageOps.contain(image.crop(turn.crop), (column - 8, column - 8))
            sheet.paste(crop, (x + 4, height + 4))
            canvas.text((x + 8, height + 8), str(number), fill="white", font_size=20,
                        stroke_width=2, stroke_fill="black")
            x += column
        if turn.call:
            points, numbers, colour = [turn.call], [number], (200, 30, 30)
        else:
            points, numbers, colour = turn.points, range(1, len(turn.points) + 1), (30, 90, 200)
        for point, label in zip(points, numbers, strict=True):
            px, py = trace.frames[0].to_original(point)
            marks.append(((px * scale, py * scale), str(label), colour))
    canvas.line([place for place, _, _ in marks], fill="white", width=3)
    for place, label, colour in marks:
        canvas.circle(place, 13, fill=colour, outline="white", width=2)
        canvas.text(place, label, fill="white", anchor="mm", font_size=16)
    return sheet
