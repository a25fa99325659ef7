"""The human study: do the points lie on what is named, and do they help to follow the reasoning?

    python tests/rating.py --model runs/tiny/rl --out rate.html     # a page, to be sent to raters
    python tests/rating.py --ratings anna.json ben.json             # what they exported from it

The page is one file. It shows random steps of sampled traces, one by one, each with its point
alone, and is worked by the keyboard: y, n, c and 1 to 5, and the arrows. Answers are kept in the
browser until they are exported. Printed is each rater's share of points on the thing named, how
that agrees with the truth where it is known, how helpful steps are, and of several raters Fleiss'
kappa.
"""
import argparse
import base64
import io
import json
import random
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluate import eval_sampling, make_parser, mean, open_file, settle
from model import UserError, load, write_text
from reward import in_region
from rollout import (
    POINT,
    TEXT_SHOWN,
    format_point,
    input_limits,
    make_dialogue,
    parse,
    parse_points,
    rollout,
    run_script,
    visible,
)

TRACES, STEPS = 48, 48                       # at most, on a page
IMAGE_BYTES, CROP_BYTES = 45_000, 24_000     # at most: of a question's image, of a trace's crops
# What a rater says: is the point on what its step names; does it help to follow the step?
SCALES = {"on": ("yes", "no", "cannot tell"), "helps": (1, 2, 3, 4, 5)}


# ----------------------------------------------------------------------------------------- the page

def write_rating_page(path, title, traces):
    """Writes the page on which a person rates random steps of traces. Raises UserError."""
    cases = [describe_case(trace) for trace in traces]
    steps = []
    for number, (trace, case) in enumerate(zip(traces, cases, strict=True)):
        for place, point in enumerate(case["traces"][0]["points"]):
            steps.append({"id": f"question {number}, point {place}", "case": number,
                          "place": place, "truth": on_target(trace.question, point["at"])})
    if not steps:
        raise UserError(f"--out {path}: no trace has a point that could be rated")
    rng = random.Random(str(cases))
    rng.shuffle(steps)
    data = {"title": visible(title), "key": str(rng.random()), "steps": steps[:STEPS],
            "cases": cases}
    # "<" is written as its code: no text can end the script
    write_text(path, PAGE.replace("{DATA}", json.dumps(data).replace("<", "\\u003c")))


def on_target(question, point):
    """Whether a point (px of the original) lies on what a question is about; None where that is not
    known."""
    boxes = [region["box"] for region in question.regions]
    if question.kind == "point":
        boxes.append(question.answer)
    return any(in_region(point, box) for box in boxes) if boxes else None


def describe_case(trace):
    """What the page has of a trace. Points and boxes are in px of the original image."""
    question, frame = trace.question, trace.frames[0]
    image, points, turns = question.load()[0], [], []
    for turn in trace.turns:
        crop = None
        if turn.crop:
            crop = picture_uri(image.crop(turn.crop), CROP_BYTES // len(trace.zoom_points))
        turns.append({"pieces": split_at_points(turn.text, points), "error": visible(turn.error),
                      "crop": crop})
    question.release()
    points = [{"text": format_point(point), "at": frame.to_original(point),
               "inside": frame.contains(point)} for point in points]
    return {"question": visible(question.text), "image": picture_uri(image, IMAGE_BYTES),
            "size": image.size, "traces": [{"turns": turns, "points": points}]}


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


# -------------------------------------------------------------------------------- what they said

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
        exported = json.loads(Path(path).read_text(encoding="utf-8"))
        ratings = exported["ratings"]
        for row in ratings:
            if any(row[name] not in (*values, None) for name, values in SCALES.items()):
                raise ValueError(f"{row} is no rating")
            row.setdefault("truth")
        return (str(exported["key"]), len(ratings)), ratings
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read as ratings ({error!r}); export them again from "
                        "the page that this script wrote") from None


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
svg { display: block; width: 100%; fill: none; stroke-width: 2; }
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

// ------------------------------------------------------------------------------------------ traces
function showImage({image, size: [width, height]}, {points}, only) {
  const dots = points.map(({at: [x, y], text, inside}, i) => button(i + 1, null, {class: "point",
    style: `left: clamp(0%, ${100 * x / width}%, 100%); top: clamp(0%, ${100 * y / height}%, 100%)`,
    "data-point": i, "aria-label": `point ${i + 1} at ${text}${inside ? "" : ", outside"}`}));
  return make("div", {class: "stage"}, picture(image, "the image of the question"),
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

const showQuestion = item => make("h2", {dir: "auto"}, item.question);

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

rating();
</script>
"""


# ----------------------------------------------------------------------------------------- command

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], add_help=False)
    parser.add_argument("--ratings", nargs="+", default=[])
    parser.add_argument("--out", default="")
    own, words = parser.parse_known_args()
    if own.ratings:
        return print_ratings(own.ratings)
    if not own.out and "--help" not in words:
        raise UserError("give --model PATH --out FILE.html, or --ratings FILE ...")
    sys.argv[1:] = words                 # the others are those of evaluate.py
    args = parse(make_parser(), "rollout", "evaluate")
    settle(args, training=False)
    policy = load(args.model, **input_limits(args))
    dialogue = make_dialogue(args, args.model, policy)
    questions = open_file(args.task, args.image_root).part(args.n or TRACES)[:TRACES]
    seeds = [f"rating {args.seed} {question.key}" for question in questions]
    groups = rollout(policy, questions, dialogue, 1, seeds, **eval_sampling(args))
    write_rating_page(own.out, f"Rating: {args.task}", [trace for trace, in groups])
    print(f"rating page: {own.out}")


if __name__ == "__main__":
    run_script(main)
