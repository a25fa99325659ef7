"""What a trace is worth, and why. Pure functions: no model, no torch, no judge.

In:  a `rollout.Trace` (its question, turns, frames, and how it ended). Out: a `Score`: the total and the parts that make it.

    total = w.correct * correct + w.format * format * grounded * (1 + diversity)

    correct    1 if the answer is right: an option or a text, a point in a region, or a web action
    format     1 if every turn keeps to the grammar of its mode and the policy ended the trace itself
    grounded   1 if the thoughts point at the image, and only inside it (not asked for in `direct` and `think`)
    diversity  multi-turn: 0.2 for each further distinct crop, up to a bound, and only with format and grounding

Departures from the paper's public code:
- The diversity bonus is bounded, and `Weights` refuses numbers with which a wrong trace could pass a right one. Without a
  bound, twenty crops and a wrong answer earn 1.92, one look and the right answer 1.0: the policy learns to look, not to see.
- A point counts only inside the image, however it is written: (999999, 2) is no grounding, [ 12.5 , 40 ] is.
- Answers are compared whole, after one normalisation of both sides. A part is no match, so listing all options never pays.
- Web actions are parsed from the left and whole. Typed text is compared, and "stop [x]" inside of it is only text.
"""
import json
import math
import re
from dataclasses import dataclass

from rollout import ToolError, format_point, parse_call, parse_points

# ------------------------------------------------------------------------------------------------ answers in words

STRAIGHT_QUOTES = str.maketrans("“”‘’", "\"\"''")
QUOTES = "\"'`*"
END_MARKS = " .,;:!?"
LETTER = re.compile(r"([a-z])|\(([a-z])\)|\(?([a-z])[).:]+\s*(\S.*)?")    # of an option, alone or before its text


def squeeze(text):
    """Lower case, and every run of white space as one blank: " Two\\nLines " -> "two lines"."""
    return " ".join(text.casefold().split())


def normalise(text):
    """The form in which answers are compared: '"Red."' -> "red". What is nothing but punctuation stays as it is."""
    text = squeeze(text.translate(STRAIGHT_QUOTES))
    plain = bare = text.rstrip(END_MARKS)
    if bare and bare[0] == bare[-1] and bare[0] in QUOTES:
        bare = bare.strip(bare[0]).rstrip(END_MARKS).lstrip()
    return bare or plain or text


def option_text(text, choices=()):
    """An answer that names an option -> that option's text; any other answer -> itself. Both normalised.

    With choices ("blue", "red"): "B", "(b)", "B.", "B. red", "(B) red" and "Red." -> "red". A letter with another option's
    text names none: "A. red" -> "a. red". A bare letter is read as a letter, also where some option's text is a letter.
    Without choices only the letter can be told: "(B)" -> "b"."""
    text = normalise(text)
    if found := LETTER.fullmatch(text):
        letter, said = found[1] or found[2] or found[3], found[4]
        if not choices:
            return text if said else letter
        index = ord(letter) - ord("a")
        if index < len(choices) and (not said or normalise(said) == normalise(choices[index])):
            return normalise(choices[index])
    return text


def match_answer(answer, truth, choices=()):
    """Whether two answers are the same, for kinds "choice" and "string". Each may be a letter or a text.

    match_answer("(B) red", "red", ("blue", "red")) -> True; match_answer("A. blue B. red", "B", ("blue", "red")) -> False"""
    return bool(answer.strip()) and option_text(answer, choices) == option_text(truth, choices)


# ------------------------------------------------------------------------------------------------ answers that point

def in_region(point, region):
    """Whether a point lies in a box (x1, y1, x2, y2), edges included, or a polygon ((x, y), ...), by the even-odd rule."""
    x, y = point
    if isinstance(region[0], (int, float)):
        x1, y1, x2, y2 = region
        return x1 <= x <= x2 and y1 <= y <= y2
    inside = False
    for (ax, ay), (bx, by) in zip(region, [*region[1:], region[0]]):    # a ray to the right crosses the edge a-b, or not
        if (ay > y) != (by > y) and x < ax + (bx - ax) * (y - ay) / (by - ay):
            inside = not inside
    return inside


def match_point(answer, region, frame):
    """Whether an answer has one point (px as seen), inside the image and in the region (px of the original).

    No point, or several, is wrong: two guesses are not an answer."""
    points = parse_points(answer)
    return len(points) == 1 and frame.contains(points[0]) and in_region(frame.to_original(points[0]), region)


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


# ------------------------------------------------------------------------------------------------ answers that act

def match_action(answer, truth):
    """Whether two actions do the same: name, element and text, whatever its case and spacing. Enter is not compared.

    An answer that is no action is wrong; a truth that is none is an error of the data: ValueError."""
    wanted = parse_action(truth)
    try:
        done = parse_action(answer)
    except ValueError:
        return False
    if (done.name, done.id) != (wanted.name, wanted.id):
        return False
    return squeeze(done.text) == squeeze(wanted.text) or done.name == "stop" and match_answer(done.text, wanted.text)


def is_correct(trace):
    """Whether the trace's answer is right, whatever its form. A trace without an answer is wrong."""
    answer, question = trace.answer, trace.question
    if answer is None:
        return False
    if question.kind == "point":
        return match_point(answer, question.answer, trace.frames[0])
    if question.kind == "action":
        return match_action(answer, question.answer)
    if question.kind in ("choice", "string"):
        return match_answer(answer, question.answer, question.choices)
    raise ValueError(f"{question.where or 'a question'}: no such kind of answer: {question.kind!r}")


# ------------------------------------------------------------------------------------------------ format

TAG = re.compile(r"(</?(?:think|tool_call|answer|observation)>)")
ENDED = {"forced": "the looks ran out before the answer", "truncated": "the tokens ran out before the end",
         "stopped": "it stopped without an answer"}


def format_fault(trace):
    """The first reason why a trace is not well-formed, or "" (paper: format reward).

    direct: <answer>; think, grounded: <think> <answer>; zoom: turns of <think> <tool_call>, then <think> <answer>. Each tag
    once, closed and not empty, and nothing but white space around it."""
    if trace.ended != "answer":
        return ENDED.get(trace.ended, "it has not ended")
    if not trace.turns or trace.mode != "zoom" and len(trace.turns) > 1:
        return f"it has {len(trace.turns)} turns"
    thought = [] if trace.mode == "direct" else ["think"]
    for number, turn in enumerate(trace.turns, 1):
        last = number == len(trace.turns)
        if fault := turn_fault(turn, thought + ["answer" if last else "tool_call"], trace.frames):
            return f"turn {number}: {fault}"
    return ""


def turn_fault(turn, tags, frames):
    """The first reason why a turn's text is not exactly these tags in this order, or ""."""
    if turn.forced:
        return "its answer was forced"
    if turn.error:
        return f"its call was refused: {turn.error}"
    pieces = TAG.split(turn.text)    # [around, <tag>, inside, </tag>, around, <tag>, inside, </tag>, around]
    if pieces[1::2] != [part for tag in tags for part in (f"<{tag}>", f"</{tag}>")]:
        return f"its tags are not {' '.join(f'<{tag}>..</{tag}>' for tag in tags)}"
    if any(around.strip() for around in pieces[0::4]):
        return "there is text outside of the tags"
    if not all(inside.strip() for inside in pieces[2::4]):
        return "a tag is empty"
    return call_fault(pieces[6], frames[0]) if tags[-1] == "tool_call" else ""


def call_fault(text, frame):
    """The first reason why a call is not a look at two integers inside the (first) image, or ""."""
    try:
        point = parse_call(text)
    except ToolError as error:
        return str(error)
    if not all(type(v) is int for v in json.loads(text)["arguments"]["coordinate"]):
        return "its coordinates are not integers"
    return "" if frame.contains(point) else f"it looks at {format_point(point)}, outside the image"


# ------------------------------------------------------------------------------------------------ grounding, diversity

def grounding_fault(trace):
    """The first reason why the thoughts are not grounded in the image, or ""."""
    if trace.mode not in ("grounded", "zoom"):
        return ""
    points = [point for turn in trace.turns for point in turn.points]
    outside = [point for point in points if not trace.in_image(point)]
    if outside:
        return f"the point {format_point(outside[0])} is outside the image"
    return "" if points else "no thought has a point"


def distinct_crops(points, min_distance):
    """How many of the points (px as seen) are at least min_distance from all that were counted before: a look 1 px away is
    the same look. distinct_crops([(0, 0), (1, 0), (30, 0)], 10) -> 2"""
    kept = []
    for point in points:
        if all(math.dist(point, other) >= min_distance for other in kept):
            kept.append(point)
    return len(kept)


# ------------------------------------------------------------------------------------------------ the score

@dataclass(frozen=True)
class Weights:
    """What each part is worth. diversity: for a further distinct crop, as a share of `format`; max_extra: how many are paid;
    min_distance: px as seen between distinct crops.

    The best wrong trace (format and the whole bonus) must not pass the barest right one (correct, and nothing else). So it
    stays below every right, well-formed one. ValueError for weights that break this, or that are not finite numbers >= 0."""
    correct: float = 0.5
    format: float = 0.5
    diversity: float = 0.0
    max_extra: int = 0
    min_distance: float = 10.0

    def __post_init__(self):
        if not all(0 <= v < math.inf for v in vars(self).values()) or self.correct == 0:
            raise ValueError(f"weights are finite and not negative, and a right answer is worth something: {self}")
        wrong, right = self.total(0, 1, 1, self.diversity * self.max_extra), self.total(1, 0, 0, 0)
        if not wrong <= right:
            raise ValueError(f"a wrong trace could score {wrong:g} and a right one {right:g}: "
                             "lower format, diversity or max_extra")

    def total(self, correct, format, grounded, diversity):
        return self.correct * correct + self.format * format * grounded * (1 + diversity)


SINGLE_TURN = Weights()
MULTI_TURN = Weights(correct=0.6, format=0.4, diversity=0.2, max_extra=2)    # a wrong trace: at most 0.4 * 1.4 = 0.56


@dataclass(frozen=True)
class Score:
    """A trace's reward and its parts: total == weights.total(correct, format, grounded, diversity).

    correct, format, grounded: 0 or 1. diversity: the bonus, 0 to weights.diversity * weights.max_extra. crops: looks that
    were answered with a picture, distinct or not. why: the first fault of format, or else of grounding, for people."""
    total: float
    correct: float
    format: float
    grounded: float
    diversity: float
    zoom_calls: int
    why: str = ""


def score(trace, weights=None):
    """The Score of a finished trace; weights: the paper's for the trace's mode unless given."""
    weights = weights or (MULTI_TURN if trace.mode == "zoom" else SINGLE_TURN)
    format_why, grounding_why = format_fault(trace), grounding_fault(trace)
    extra, diversity = distinct_crops(trace.zoom_points, weights.min_distance) - 1, 0.0
    if extra > 0 and not (format_why or grounding_why):
        diversity = weights.diversity * min(extra, weights.max_extra)
    parts = float(is_correct(trace)), float(not format_why), float(not grounding_why), diversity
    return Score(weights.total(*parts), *parts, len(trace.zoom_points), format_why or grounding_why)
