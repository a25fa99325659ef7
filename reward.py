"""What a trace is worth, and why. Pure functions of a trace: no model is run, no judge.

In:  a `rollout.Trace` (its question, turns, frames, and how it ended).
Out: a `Score`: the total, and the parts that make it; and a row of all that is counted (`row_of`).

    total = w.correct * correct + w.format * format * grounded * (1 + diversity)

    correct    1 if the answer is right: an option or a text, a point in a region, or a web action
    format     1 if every turn keeps to the grammar of its mode and the policy ended the trace
    grounded   1 if the thoughts point at the image, and only inside it (modes grounded and zoom)
    diversity  zoom: 0.2 for each further distinct crop, up to a bound, with format and grounding

Departures from the paper's public code:
- The diversity bonus is bounded, and `Weights` refuses numbers with which a wrong trace could pass
  a right one. Without a bound, a wrong answer after four crops earns 0.64, and a right one that is
  ill-formed 0.6: the policy learns to zoom, not to see.
- A point in a thought counts only inside the image, however it is written: (999999, 2) grounds
  nothing, [ 12.5 , 40 ] does. Two years are no point (`is_period`).
- Answers are compared in full, after one normalisation of both sides. A part is no match, so it
  never pays to list all options.
- In `zoom`, too, format is paid only for a grounded trace; theirs needs no point.
- A web action is parsed from the left, and only words may follow it. Typed text is compared, and
  "stop [x]" inside of it is only text.
"""
import math
import re
import unicodedata
from dataclasses import dataclass
from itertools import pairwise
from string import ascii_uppercase as LETTERS
from string import punctuation

from rollout import NUMBER, format_point, in_box, parse_points

# --------------------------------------------------------------------------------- answers in words

STRAIGHT_QUOTES = str.maketrans("“”‘’", "\"\"''")
QUOTES = "\"'`*"
END_MARKS = " .,;:!?。、"
BOXED = re.compile(r"\$*\\boxed\{(.*)\}[.$]*")     # LaTeX
# "b", "(b)", "b)"; and with a text behind the letter "b. red", "b - red", "b (red)"
LETTER = re.compile(r"(?:option )?\(?([a-z])(?:[).:]*|[).:]+ ?(.+)| [-–—] ?(.+)| \((.+)\))")


def squeeze(text):
    """Lower case, and every run of white space as one blank: " Two\\nLines " -> "two lines"."""
    return " ".join(text.casefold().split())


def normalise(text):
    """The form in which answers are compared: '"Red."' -> "red", "（Ｂ）" -> "(b)", "\\boxed{B}" ->
    "b". What is nothing but punctuation stays as it is."""
    text = squeeze(unicodedata.normalize("NFKC", text).translate(STRAIGHT_QUOTES))
    if boxed := BOXED.fullmatch(text):
        text = boxed[1].strip()
    plain = text.rstrip(END_MARKS)
    unquoted = plain
    if plain and plain[0] == plain[-1] and plain[0] in QUOTES:
        unquoted = plain.strip(plain[0]).rstrip(END_MARKS).lstrip()
    return unquoted or plain or text


def option_text(text, choices=()):
    """An answer that names an option -> that option's text; any other -> itself. Both normalised.

    With choices ("blue", "red"): "B", "(b)", "Option B", "B. red", "(B) red", "B - red", "B (red)"
    and "Red." -> "red". A letter with another option's text names none: "A. red" -> "a. red". A
    letter alone is read as a letter, also where some option's text is a letter. Without choices,
    only a letter can be recognised: "(B)" -> "b"."""
    text = normalise(text)
    found = LETTER.fullmatch(text)
    if not found:
        return text
    letter = found[1]
    said = found[2] or found[3] or found[4]
    if not choices:
        return text if said else letter
    index = ord(letter) - ord("a")
    if index >= len(choices):
        return text
    choice = normalise(choices[index])
    return choice if not said or normalise(said) == choice else text


def match_answer(answer, truth, choices=()):
    """Whether two answers are the same, for kinds "choice" and "string": letters or texts.

    match_answer("(B) red", "red", ("blue", "red")) -> True
    match_answer("A. blue B. red", "B", ("blue", "red")) -> False"""
    return bool(answer.strip()) and option_text(answer, choices) == option_text(truth, choices)


# ------------------------------------------------------------------------------- answers that point

NUMBERS = re.compile(rf"(?<![\d.]){NUMBER}(?:\s*,\s*{NUMBER})+")    # "x, y", or more of them


def answer_point(answer):
    """The only pair of numbers in an answer, with or without brackets: "At 660, 1029." -> (660.0,
    1029.0). None for no pair, for a box (four numbers) and for several pairs."""
    answer = unicodedata.normalize("NFKC", answer).replace("、", ",")
    match [numbers.split(",") for numbers in NUMBERS.findall(answer)]:
        case [[x, y]]:
            return float(x), float(y)
    return None


def in_region(point, region):
    """Whether a point lies in a box (x1, y1, x2, y2), edges included, or in a polygon
    ((x, y), ...), by the even-odd rule."""
    if isinstance(region[0], (int, float)):
        return in_box(point, region)
    x, y = point
    inside = False
    for (ax, ay), (bx, by) in zip(region, [*region[1:], region[0]], strict=True):
        between = (ay > y) != (by > y)          # a ray to the right may cross the edge a-b
        if between and x < ax + (bx - ax) * (y - ay) / (by - ay):
            inside = not inside
    return inside


def match_point(answer, region, frame):
    """Whether an answer has one point (px of the model input), inside the image and in the region
    (px of the original). No point, or several, is wrong: two guesses are not an answer."""
    point = answer_point(answer)
    if point is None or not frame.contains(point):
        return False
    return in_region(frame.to_original(point), region)


# -------------------------------------------------------------------------------------- web actions

# The actions of VisualWebArena, each as it is written.
USAGE = {
    "click": "click [12]",
    "type": "type [12] [text] [1]",
    "hover": "hover [12]",
    "clear": "clear [12]",
    "press": "press [Control+v]",
    "scroll": "scroll [down]",
    "goto": "goto [url]",
    "new_tab": "new_tab",
    "tab_focus": "tab_focus [0]",
    "close_tab": "close_tab",
    "go_back": "go_back",
    "go_forward": "go_forward",
    "stop": "stop [answer]",
}
NAME = re.compile(r"([A-Za-z_]{0,20})\s*(.*)", re.DOTALL)    # and what follows it
ID = r"\[\s*(?P<id>[0-9]{1,9})\s*\]"
TEXT = r"\[(?P<text>.*)\]"
ENTER = r"\[\s*(?:press_enter_after\s*=\s*)?(?P<enter>[01])\s*\]"
MORE = r"[^\[\]]*"   # "click [3].", "stop [red] is the answer"; brackets could be another action's
# what follows the name; nothing, or "[]", where it is not here
ARGUMENTS = dict.fromkeys(("click", "hover", "clear", "tab_focus"), ID + MORE) | {
    "type": rf"{ID}\s*\[(?P<text>.*?)\]\s*(?:{ENTER}{MORE})?",
    "press": TEXT + MORE,
    "goto": TEXT + MORE,
    "scroll": rf"\[?\s*(?i:direction\s*=\s*)?(?P<text>(?i:up|down))\s*\]?{MORE}",
    "stop": rf"(?:{TEXT}{MORE})?",
}


@dataclass(frozen=True)
class Action:
    """One action of VisualWebArena. id: the element's number (for tab_focus the tab's). text: what
    is typed, pressed, gone to or answered, as written, or the direction of a scroll. enter: whether
    Enter follows what is typed."""
    name: str
    id: int | None = None
    text: str = ""
    enter: bool = True

    def __str__(self):
        """As VisualWebArena reads it: in one line, and with whether Enter follows."""
        text = " ".join(self.text.split())
        match self.name:
            case "click" | "hover" | "clear" | "tab_focus":
                return f"{self.name} [{self.id}]"
            case "type":
                return f"type [{self.id}] [{text}] [{int(self.enter)}]"
            case "press" | "scroll" | "goto" | "stop":
                return f"{self.name} [{text}]"
        return self.name


def parse_action(text):
    """"type [5] [red shoes] [0]" -> Action("type", 5, "red shoes", False).

    The text in brackets may hold brackets, new lines or another action. Backticks around the action
    are taken off, and words behind it, as in VisualWebArena. Raises ValueError, with how it should
    be written."""
    text = text.strip()
    for fence in ("```", "`"):
        text = re.sub(f"^{fence}(.+){fence}$", r"\1", text, flags=re.DOTALL).strip()
    name, rest = NAME.fullmatch(text).groups()
    name = name.lower()
    if name not in USAGE:
        raise ValueError(f"no such action: {text[:60]!r}; there are {', '.join(USAGE)}")
    found = re.fullmatch(ARGUMENTS.get(name, r"(?:\[\s*\])?"), rest, re.DOTALL)
    if not found:
        raise ValueError(f"write {USAGE[name]!r}, not {text[:60]!r}")
    parts = found.groupdict()
    number = int(parts["id"]) if "id" in parts else None
    argument = parts.get("text") or ""
    if name == "scroll":
        argument = argument.lower()
    return Action(name, number, argument, parts.get("enter") != "0")


def match_action(answer, truth):
    """Whether two actions do the same: name, element and text, whatever its case and spacing. Enter
    is not compared.

    An answer that is no action is wrong. A truth that is none raises ValueError."""
    wanted = parse_action(truth)
    try:
        done = parse_action(answer)
    except ValueError:
        return False
    compared = option_text if done.name == "stop" else squeeze
    return ((done.name, done.id) == (wanted.name, wanted.id)
            and compared(done.text) == compared(wanted.text))


# --------------------------------------------------------- how the answer to a question is scored

# "(A) red or (B) blue. Please answer ..."; and "A. red", a line each
OPTIONS = (re.compile(r"\(([A-Z])\)\s*(.*?)(?=[\s,;]*(?:\b(?:or|and)\s*)?\([A-Z]\)|\n|$"
                      r"|[.!?。]\s*(?:Hint|Note|Please|Answer|Choose|Pick|Select|Respond|Reply|Give"
                      r"|Write|Return|Output|Provide|Say)\b)"),
           re.compile(r"^[^\S\n]*([A-Z])[.):、][^\S\n]*(.+)$", re.M))
NO_OPTION = re.compile(r"\W*(or|and)?\W*", re.I)         # of "answer with (A) or (B)."
LETTER_ALONE = re.compile(r"\(?[a-z]\)?")
BOX = re.compile(r"[(\[]?\s*\d+(?:\s*,\s*\d+){3}\s*[)\]]?")
OTHER_NUMBERS = re.compile(r"[(\[]+\s*-?[\d.]+(?:[\s,()\[\]]+-?[\d.]+)+\s*[)\]]+")
ACTION = re.compile(rf"({'|'.join(USAGE)})\s*\[.*\]|(new|close)_tab|go_(back|forward)", re.S | re.I)
BARE_ACTION = re.compile(r"stop|scroll (up|down)")       # these words may stand on a sign, too


class Unusable(Exception):
    """Why a row cannot be asked or scored."""


def parse_options(text):
    """The options' texts in the order of their letters, or ().

    "Which?\\nA. Yes, left\\nB. No" -> ("Yes, left", "No")"""
    text = unicodedata.normalize("NFKC", text).rpartition("Answer Choices:")[2]
    for pattern in OPTIONS:
        # a preamble or a hint may name the letters, too: each A begins a list, the longest counts,
        # and of equals the last
        lists = [[]]
        for letter, option in pattern.findall(text):
            if letter == "A":
                lists.append([])
            next_one = LETTERS.index(letter) == len(lists[-1])
            if next_one and not NO_OPTION.fullmatch(option):
                lists[-1].append(option.strip())
        longest = max(reversed(lists), key=len)
        if len(longest) > 1:
            return tuple(longest)
    return ()


def as_box(values, limit=1_000_000):
    """Corners (x1, y1, x2, y2), checked. limit: 1 for shares of the image's sides."""
    x1, y1, x2, y2 = values
    if not (0 <= x1 <= x2 <= limit and 0 <= y1 <= y2 <= limit):      # NaN is refused, too
        unit = "[0, 1]" if limit == 1 else "px"
        raise Unusable(f"{list(values)} are not the corners of a box in {unit}")
    return tuple(values)


def scored_by(text, answer, label=False):
    """How the answer to a question is scored: the `kind`, `answer` and `choices` of a Question.

    Four whole numbers are a box that a point has to hit, a web action is an action. The letter or
    the text of one of the question's options is a choice, and is kept as it is written; where
    `label` is set, a letter is never an option's text. All else ("yes", too) is a string."""
    in_list = isinstance(answer, list)
    no_number = isinstance(answer, float) and not math.isfinite(answer)
    if no_number or type(answer) not in (str, int, float, list):
        answer = ""
    answer = str(answer).strip()
    plain = normalise(answer)
    if not any(map(str.isprintable, answer)):
        raise Unusable("it has no answer in words")
    if BOX.fullmatch(plain):
        corners = list(map(int, re.findall(r"\d+", plain)))
        return {"kind": "point", "answer": as_box(corners)}
    if in_list or OTHER_NUMBERS.fullmatch(plain):
        raise Unusable(f"its answer, {answer}, is neither in words nor a box (x1, y1, x2, y2) in "
                       "whole px")
    on_web_page = "OBJECTIVE:" in text
    if ACTION.fullmatch(answer) or on_web_page and BARE_ACTION.fullmatch(plain):
        parse_action(answer)
        return {"kind": "action", "answer": answer}
    choices = parse_options(text)
    texts = [normalise(choice) for choice in choices]
    letter = LETTER_ALONE.fullmatch(plain)
    by_text = plain in texts and not (label and letter)
    # a letter, perhaps with its text: "B", "(b)", "B. blue"
    option = plain if by_text else option_text(answer, choices)
    if option not in texts:
        if choices and letter:
            raise Unusable(f"its answer, {answer}, is none of its {len(choices)} options")
        return {"kind": "string", "answer": answer}
    index = texts.index(option)
    answer = choices[index] if by_text and not letter else LETTERS[index]
    return {"kind": "choice", "answer": answer, "choices": choices}


# ------------------------------------------------------------------------------------------- format

TAG = re.compile(r"(</?(?:think|tool_call|answer|observation)>)")
SPECIAL = re.compile(r"<\|\w+\|>")               # of the chat itself: "<|im_start|>"
UNFINISHED = {
    "": "it has not ended",
    "forced": "its answer was asked for",
    "truncated": "the tokens ran out before the end",
    "stopped": "it stopped without an answer",
}


def format_fault(trace):
    """The first reason why a trace is not well-formed, or "" (paper: format reward).

    direct: <answer>; think, grounded: <think> <answer>; zoom: turns of <think> <tool_call>, then
    <think> <answer>. Each tag once, closed and not empty, and nothing but white space around it.
    Where a point is asked for, the answer is one point."""
    if trace.ended != "answer":
        return UNFINISHED[trace.ended]
    if not trace.turns or (trace.mode != "zoom" and len(trace.turns) > 1):
        return f"it has {len(trace.turns)} turns"
    thought = "" if trace.mode == "direct" else "<think> </think> "
    for number, turn in enumerate(trace.turns, 1):
        last = number == len(trace.turns)
        tags = thought + ("<answer> </answer>" if last else "<tool_call> </tool_call>")
        fault = turn_fault(turn, tags, trace.frames)
        if fault:
            return f"turn {number}: {fault}"
    if trace.question.kind == "point" and answer_point(trace.answer) is None:
        return "its answer is not one point"
    return ""


def turn_fault(turn, tags, frames):
    """The first reason why a turn's text is not exactly these tags in this order, or its zoom call
    not two integers inside the (first) image; or ""."""
    if turn.error:
        return f"its call was refused: {turn.error}"
    if SPECIAL.search(turn.text):
        return "it has a special token"
    pieces = TAG.split(turn.text)    # around, <tag>, inside, </tag>, around, <tag>, ..., around
    if " ".join(pieces[1::2]) != tags:
        return f"its tags are not {tags}"
    if "".join(pieces[0::4]).strip():
        return "there is text outside of the tags"
    if not all(inside.strip() for inside in pieces[2::4]):
        return "a tag is empty"
    if turn.call:
        if not all(type(value) is int for value in turn.call):
            return "its coordinates are not integers"
        if not frames[0].contains(turn.call):
            return f"its point {format_point(turn.call)} is outside the image"
    return ""


# -------------------------------------------------------------------------- grounding and diversity

def is_period(point):
    """Whether two numbers in brackets can be years, "Built (1990, 2005)": whole, rising, and of the
    last two centuries or this one."""
    start, end = point
    return 1800 <= start <= end < 2100 and start % 1 == end % 1 == 0


def grounding_fault(trace):
    """The first reason why the thoughts are not grounded in the image, or "".

    Two numbers in brackets are a point, wherever they stand in a sentence, and a point outside the
    image is a fault. Only two years outside of it are no point: `is_period`."""
    if trace.mode not in ("grounded", "zoom"):
        return ""
    points = [point for turn in trace.turns for point in turn.points]
    outside = [point for point in points if not trace.in_image(point)]
    for point in outside:
        if not is_period(point):
            return f"the point {format_point(point)} is outside the image"
    return "" if len(points) > len(outside) else "no thought has a point"


def distinct_crops(points, min_distance, windows=None):
    """How many of the points (px of the model input) are at least min_distance from all that were
    counted before: a crop 1 px away is the same crop. distinct_crops([(0, 0), (1, 0)], 10) -> 1

    windows: the boxes of their crops; one that was counted before is the same crop, too, for a
    window at the border is moved inside."""
    kept = []
    for point, window in zip(points, windows or points, strict=True):
        if all(math.dist(point, other) >= min_distance and window != seen for other, seen in kept):
            kept.append((point, window))
    return len(kept)


# ---------------------------------------------------------------------------------------- the score

# In the unit that the policy points in: nearer to each other, two points are at one place.
SAME_PLACE = 10.0


@dataclass(frozen=True)
class Weights:
    """What each part is worth. diversity: for a further distinct crop, as a share of `format`;
    max_extra: how many are paid; min_distance: between the points of distinct crops.

    The best wrong trace (format and the full bonus) must not pass the least right one (correct, and
    nothing else). So it stays below every right, well-formed one. ValueError for weights that break
    this, or that are not finite numbers >= 0."""
    correct: float = 0.5
    format: float = 0.5
    diversity: float = 0.0
    max_extra: int = 0
    min_distance: float = SAME_PLACE

    def __post_init__(self):
        if not all(0 <= value < math.inf for value in vars(self).values()) or self.correct == 0:
            raise ValueError("weights are finite and not negative, and a right answer is worth "
                             f"something: {self}")
        best_wrong = self.total(0, 1, 1, self.diversity * self.max_extra)
        least_right = self.total(1, 0, 0, 0)
        if not best_wrong <= least_right + 1e-9:             # 0.4 * 1.5 is 0.6000000000000001
            raise ValueError(f"a wrong trace could score {best_wrong:g} and a right one "
                             f"{least_right:g}: lower format, diversity or max_extra")

    def total(self, correct, format, grounded, diversity):
        return self.correct * correct + self.format * format * grounded * (1 + diversity)


SINGLE_TURN = Weights()
MULTI_TURN = Weights(correct=0.6, format=0.4, diversity=0.2, max_extra=2)    # wrong: 0.56 at most


@dataclass(frozen=True)
class Score:
    """A trace's reward and its parts: total == weights.total(correct, format, grounded, diversity).

    correct, format, grounded: 0 or 1. diversity: the bonus, up to weights.diversity *
    weights.max_extra. zoom_calls: those that were answered by a crop, distinct or not. why: the
    first fault of format, or else of grounding, for people."""
    total: float
    correct: float
    format: float
    grounded: float
    diversity: float
    zoom_calls: int
    why: str = ""


def is_correct(trace):
    """Whether the trace's answer is right, whatever the trace's form; no answer is wrong."""
    answer, question = trace.answer, trace.question
    if answer is None:
        return False
    match question.kind:
        case "point":
            return match_point(answer, question.answer, trace.frames[0])
        case "action":
            return match_action(answer, question.answer)
        case "choice" | "string":
            return match_answer(answer, question.answer, question.choices)
    where = question.where or "a question"
    raise ValueError(f"{where}: no such kind of answer: {question.kind!r}")


def score(trace, weights=None):
    """The Score of a finished trace; weights: the paper's for the trace's mode unless given."""
    if weights is None:
        weights = MULTI_TURN if trace.mode == "zoom" else SINGLE_TURN
    format_why = format_fault(trace)
    grounding_why = grounding_fault(trace)
    correct = float(is_correct(trace))
    format = float(not format_why)
    grounded = float(not grounding_why)
    diversity = 0.0
    if format and grounded and trace.zoom_points:
        further = distinct_crops(trace.zoom_points, weights.min_distance, trace.windows) - 1
        diversity = weights.diversity * min(further, weights.max_extra)
    total = weights.total(correct, format, grounded, diversity)
    return Score(total, correct, format, grounded, diversity, len(trace.zoom_points),
                 format_why or grounding_why)


# ------------------------------------------------------------- whether a trace is true of the image

ROBOSPATIAL = "RoboSpatial-Home"    # whose answers have a rule of their own
PUNCTUATION = str.maketrans("", "", punctuation + " ")
READABLE = 0.3     # share of a region's width, and of its height, that a crop has to show


def official_rule(trace, correct):
    """Whether the answer is right by the public code's rule. correct: by our own.

    RoboSpatial-Home's own: a prefix will do for yes or no, and the first of several points counts.
    Answers in words, as in ViGoRL's evaluation: without punctuation, blanks and capitals, the truth
    is a part of the answer. So "left or right" is right for "right", and "blue" for "B"."""
    question, answer = trace.question, trace.answer or ""
    robospatial = question.category.startswith(ROBOSPATIAL)
    if question.kind == "point" and robospatial:
        first = map(trace.frames[0].to_original, parse_points(answer)[:1])
        return any(in_region(point, question.answer) for point in first)
    if question.kind not in ("choice", "string"):
        return correct
    if robospatial:
        return answer.strip().casefold().startswith(question.answer.casefold())
    truth = question.answer.translate(PUNCTUATION).lower()
    return truth in answer.translate(PUNCTUATION).lower()


def targets_hit(trace):
    """Whether each point of a trace lies on what the question is about: its regions, or the box
    that is its answer. See `row_of`."""
    question, points = trace.question, trace.zoom_points
    if trace.mode != "zoom":
        points = [point for turn in trace.turns for point in turn.points]
    targets = [region["box"] for region in question.regions]
    if question.kind == "point" and not targets:
        targets = [question.answer]
    if not targets:
        return []
    points = [trace.frames[0].to_original(point) for point in points]
    return [any(in_region(point, target) for target in targets) for point in points]


def true_thoughts(trace):
    """Whether each thought behind a crop is true of it: it names the region nearest to the crop's
    middle of those that it shows enough of, and no other region of the file; none where it shows
    none. See `row_of`."""
    if not trace.question.regions:
        return []
    names = map(str.casefold, trace.question.names)
    names = sorted(names, key=len, reverse=True)    # "dark red" is not "red"
    pattern = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, names))})(?!\w)", re.I)
    found = []
    for before, turn in pairwise(trace.turns):
        if before.crop:
            said = set(pattern.findall(turn.thought.casefold()))
            found.append(said == names_in(before.crop, trace.question.regions))
    return found


def names_in(crop, regions):
    """{name} of the most central region that can be read in a crop, or {}. All boxes are in px of
    the original."""
    x1, y1, x2, y2 = crop
    found = []
    for region in regions:
        left, top, right, bottom = region["box"]
        width = min(right, x2) - max(left, x1)
        height = min(bottom, y2) - max(top, y1)
        if width >= READABLE * (right - left) and height >= READABLE * (bottom - top):
            across = abs(left + right - x1 - x2)
            down = abs(top + bottom - y1 - y2)
            found.append((max(across, down), region["name"].casefold()))
    return {min(found)[1]} if found else set()


# -------------------------------------------------------------------------- what is kept of a trace

# The behaviours that the paper counts in traces: there by GPT-4o, here by rules. `regions` counts
# the points in thoughts and zoom calls, but those at one place once; the others count such phrases.
# To go back to a place after another one is a verification, too.
PHRASES = {
    "subgoals": "first|next|then|let me|let's|need to|I will|I'll",
    "verifications": "check|checking|verify|confirm|confirms|make sure|indeed",
    "backtracks": "not it|not here|wait|instead|actually|on second thought|at first",
}


def row_of(trace):
    """All that is kept of a finished trace, for a line of JSON.

    on_target: of each zoom call that was answered (in the modes of one turn: of each point in the
    thought), whether it lies on what the question is about; true_thoughts: of each thought behind a
    crop, whether it says what the crop shows; both empty where that is not known. official: whether
    it is right by the public code's rule. The behaviours, see PHRASES. The others: see `Score`."""
    scored, question = trace.score or score(trace), trace.question
    thought = " ".join(turn.thought for turn in trace.turns)
    points = [point for turn in trace.turns for point in (*turn.points, turn.call)
              if point and trace.in_image(point)]
    row = {
        "id": question.id,
        "key": question.key,
        "category": question.category,
        "question": question.text,
        "truth": question.answer,
        "turns": [turn.text for turn in trace.turns],
        "answer": trace.answer,
        "ended": trace.ended,
        **vars(scored),
        "several_crops": distinct_crops(trace.zoom_points, SAME_PLACE, trace.windows) > 1,
        "overlong": trace.overlong,
        "official": official_rule(trace, bool(scored.correct)),
        "on_target": targets_hit(trace),
        "true_thoughts": true_thoughts(trace),
        "regions": distinct_crops(points, SAME_PLACE),
    }
    for name, phrases in PHRASES.items():
        row[name] = len(re.findall(rf"\b({phrases})\b", thought, re.I))
    for i, point in enumerate(points):
        near = [math.dist(point, other) < SAME_PLACE for other in points[:i]]
        if any(near) and not near[-1]:
            row["verifications"] += 1
    return row
