"""The paper's claims in miniature: trains every arm on the CPU and says which claims hold.

    python tests/claims.py --seeds 5 --write .github/claims.md    # all arms, then the tables
    python tests/claims.py --tasks spatial --arms grounded think --seeds 2
    python tests/claims.py --scaling .github/scaling.png          # group size, questions
    python tests/claims.py --short                                # some updates: tries it all

Arms start from tests/tiny/base and make 70 updates, of SFT (32 traces each) and GRPO (128)
together. A novice was shown no thought that points; warm-started it has 150 of SFT, which the
grammar takes, and 40 of GRPO, together as many minutes as 70 of GRPO. A search takes 128 questions
and GRPO 16 a step. An arm of SFT alone learns from its own right answers: train_sft.py holds a
tenth of the questions out, so 114 of its 128 are those of the other arms. Results stay in
runs/claims until the command, the six files, base, recipe or data change.

A claim compares a figure of two arms or stages seed by seed, or one with a level: the mean
difference and its 95 % interval by Student's t. "supported": the interval lies above 0; "not
supported": it ends below 0.02; "undecided": all else.
"""
import argparse
import hashlib
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import mean, stdev
from threading import Lock

from PIL import Image, ImageDraw

REPOSITORY = Path(__file__).resolve().parent.parent
RUNS = REPOSITORY / "runs" / "claims"
TINY = REPOSITORY / "tests" / "tiny"

COLD, WARM, ONLY_SFT = (0, 70), (30, 40), (70, 0)        # updates: of SFT, of GRPO
ARMS = {                                                 # name: mode, updates, flags
    "sft-answers": ("direct", ONLY_SFT, ""),
    "direct": ("direct", COLD, ""),
    "think": ("think", COLD, ""),
    "think-warm": ("think", WARM, ""),
    "grounded-cold": ("grounded", COLD, ""),
    "grounded-sft": ("grounded", ONLY_SFT, ""),
    "straight": ("grounded", WARM, "--simulations 1 --no-backtrack"),
    "grounded": ("grounded", WARM, ""),
    "zoom-cold": ("zoom", COLD, ""),
    "zoom-sft": ("zoom", ONLY_SFT, ""),
    "zoom-no-bonus": ("zoom", WARM, "--diversity 0"),
    "zoom": ("zoom", WARM, ""),
}
# A policy that was shown no thought that points and no zoom call; the base teaches it both.
TEACHER = "--model {novice} --teacher {base}"
for mode in ("grounded", "zoom"):
    straight = f"{TEACHER} --simulations 1 --no-backtrack"
    ARMS |= {f"novice-{mode}-cold": (mode, COLD, "--model {novice}"),
             f"novice-{mode}-straight": (mode, (150, 40), straight),
             f"novice-{mode}": (mode, (150, 40), TEACHER)}
# A warm start whose traces zoom once has stopped looking. What brings it back?
# {(learning rate, bonus, KL): arm}
COLLAPSE = {(4e-4, 0.2, 0.01): "one-look-recipe"}
COLLAPSE |= {(1e-3, bonus, kl): f"one-look-{bonus}-{kl}"
             for bonus in (0, 0.2) for kl in (0.01, 0.05)}
ARMS |= {arm: ("zoom", WARM, f"--traces {{one_look}} --lr {lr} --diversity {bonus} --kl {kl}")
         for (lr, bonus, kl), arm in COLLAPSE.items()}
# {panel: {value: arm}}; the recipe has 8 traces a question and searches 128 questions
SCALING = {"traces a question": {2: "group-2", 4: "group-4", 8: "zoom", 16: "group-16"},
           "questions searched": {8: "searched-8", 32: "searched-32", 128: "zoom"}}
ARMS |= {f"group-{n}": ("zoom", WARM, f"--group {n}") for n in (2, 4, 16)}
ARMS |= {f"searched-{n}": ("zoom", WARM, f"--search-questions {n}") for n in (8, 32)}

# Claim, task, figure, arm, against: an arm or a level. "ARM:STAGE" is an earlier stage.
CLAIMS = (
    ("GRPO over SFT on answers", "spatial", "accuracy", "grounded", "sft-answers"),
    ("GRPO over SFT on answers", "sizes", "accuracy", "zoom", "sft-answers"),
    ("GRPO over the warm start alone", "spatial", "accuracy", "grounded", "grounded-sft"),
    ("GRPO over the warm start alone", "search", "accuracy", "zoom", "zoom-sft"),
    ("grounded over direct GRPO", "spatial", "accuracy", "grounded", "direct"),
    ("grounded over ungrounded GRPO", "spatial", "accuracy", "grounded", "think"),
    ("grounded over the same without points", "spatial", "accuracy", "grounded", "think-warm"),
    ("the warm start is needed", "spatial", "accuracy", "grounded", "grounded-cold"),
    ("the warm start is needed", "search", "accuracy", "zoom", "zoom-cold"),
    ("the warm start is needed (novice)", "spatial", "accuracy", "novice-grounded",
     "novice-grounded-cold"),
    ("the warm start is needed (novice)", "search", "accuracy", "novice-zoom", "novice-zoom-cold"),
    ("tree search over straight traces", "spatial", "accuracy", "grounded", "straight"),
    ("tree search over straight traces (novice)", "spatial", "accuracy", "novice-grounded",
     "novice-grounded-straight"),
    ("tree search over straight traces (novice)", "search", "accuracy", "novice-zoom",
     "novice-zoom-straight"),
    ("zoom helps with small elements", "sizes", "accuracy small", "zoom", "grounded"),
    ("zoom helps with medium elements", "sizes", "accuracy medium", "zoom", "grounded"),
    ("zoom helps with large elements", "sizes", "accuracy large", "zoom", "grounded"),
    ("zoom helps where the colour is enough", "sizes", "accuracy alone", "zoom", "grounded"),
    ("the bonus keeps zoom calls alive", "search", "several_crops", "zoom", "zoom-no-bonus"),
    ("the bonus makes answers right", "search", "accuracy", "zoom", "zoom-no-bonus"),
    ("GRPO amplifies regions", "search", "regions", "zoom", "zoom:sft"),
    ("SFT amplifies regions", "search", "regions", "zoom:sft", "zoom:base"),
    ("GRPO amplifies back-tracks (said)", "search", "backtracks", "zoom", "zoom:sft"),
    ("SFT amplifies back-tracks (said)", "search", "backtracks", "zoom:sft", "zoom:base"),
    ("GRPO amplifies back-tracks (done)", "search", "turns_back", "zoom", "zoom:sft"),
    ("SFT amplifies back-tracks (done)", "search", "turns_back", "zoom:sft", "zoom:base"),
    ("grounded back-tracks more than without points (said)", "spatial", "backtracks", "grounded",
     "think-warm"),
    ("GRPO amplifies verifications", "search", "verifications", "zoom", "zoom:sft"),
    ("points lie on target", "spatial", "on_target", "grounded", 0.9),
    ("points lie on target", "search", "on_target", "zoom", 0.9),
    ("comparisons in thoughts are true", "spatial", "true_thoughts", "grounded", 0.9),
    ("thoughts are true of the crop", "search", "true_thoughts", "zoom", 0.9),
    ("thoughts are true of the crop", "sizes", "true_thoughts", "zoom", 0.9),
)
# Student's t for 1, 2, ... seeds: 97.5 % quantiles; one seed alone decides nothing
T = (math.inf, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
TASKS = {"spatial": [], "search": [], "sizes": []}         # the arms that their claims name
for _, task, _, *arms in CLAIMS:
    TASKS[task] += [arm for arm in arms if arm in ARMS and arm not in TASKS[task]]
TASKS["search"] += COLLAPSE.values()
# {elements of the task sizes: px in the overview, of icons and buttons}. The one asked for is
# "alone", named by its colour, or "alike": of two or three the one that bears a pattern, which a
# crop shows; without a crop 0.42 of these can be found.
SIZES = {"small": "6 x 6, 10 x 6", "medium": "8 x 8, 12 x 8", "large": "10 x 10, 14 x 8"}


# ----------------------------------------------------------------------------------------- training

# What all arms start from, in tests/tiny.
FILES = "recipe.json", "make_data.py", "base/model.safetensors", "base/dialogue.json"
LOCKS = defaultdict(Lock)                                # of what several arms are given, by path


def digest(*files):
    """Names what files contain, of tests/tiny or of other places."""
    return hashlib.sha1(b"".join((TINY / file).read_bytes() for file in files)).hexdigest()[:10]


@dataclass(frozen=True)
class Job:
    """An arm to be trained: what makes it, and where its result is kept."""
    task: str
    arm: str
    seed: int
    short: bool = False

    @property
    def runs(self):
        return RUNS / "short" if self.short else RUNS

    @property
    def folder(self):
        return self.runs / self.task / self.arm / f"seed-{self.seed}"

    @property
    def common(self):
        """Words of both scripts' command lines."""
        mode = ARMS[self.arm][0]
        return ["--config", TINY / "recipe.json", "--mode", mode, "--seed", self.seed]

    @property
    def given(self):
        """{what some arms begin with: path}"""
        novice = f"novice-{digest('make_base.py', 'make_data.py')}"
        one_look = f"one-look-{digest(*FILES)}-{self.seed}.jsonl"
        return {"base": TINY / "base", "novice": self.runs / novice,
                "one_look": self.runs / one_look}

    def data(self, split):
        return self.runs / "data" / f"{self.task}-{split}.jsonl"

    def command(self):
        """The training script's command line."""
        _, (sft, rl), flags = ARMS[self.arm]
        if self.short:
            sft, rl = round(sft / 35), round(rl / 35)
            flags += " --search-questions 8"
            flags += " --questions 4 --update-questions 4 --group 4" if rl else ""
        flags = flags.format(**self.given)
        words = ["train_rl.py" if rl else "train_sft.py", *self.common, "--out", self.folder,
                 "--task", self.data("train"), "--sft-steps", sft, *flags.split()]
        if rl:
            words += ["--steps", rl, "--eval-task", self.data("test"), "--n", self.n]
        return list(map(str, words))

    @property
    def n(self):
        """Held-out questions; the table of sizes has six kinds of them."""
        return 16 if self.short else 512 if self.task == "sizes" else 256

    def evaluate(self, stage):
        """-> the figures of a stage's policy, and the rows of its traces, with the tool"""
        model = TINY / "base" if stage == "base" else self.folder / stage
        path = self.folder / f"{stage}.json"
        call("evaluate.py", *self.common, "--model", model, "--task", self.data("test"),
             "--n", self.n, "--json", path)
        _, *lines = path.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
        rows = sum(map(json.loads, lines), [])       # the first line has the settings
        return json.loads(path.read_text(encoding="utf-8")), [row for row in rows if row["tool"]]

    def key(self):
        """What decides the result: the command, the files that all arms start from, the code."""
        code = sorted(REPOSITORY.glob("*.py"))
        words = [word.replace(f"{REPOSITORY}/", "") for word in self.command()]
        return [*words, self.n, digest(*FILES), digest(*code)]

    def result(self):
        """What an earlier run found, or None; a damaged file is none."""
        try:
            found = json.loads((self.folder / "result.json").read_text(encoding="utf-8"))
            return found if found["key"] == self.key() else None
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None


def call(script, *words):
    """Runs a script of the repository with one thread. Raises RuntimeError with its last lines."""
    command = [sys.executable, REPOSITORY / script, *words]
    command = list(map(str, command))
    done = subprocess.run(command, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n" + "\n".join(done.stdout.splitlines()[-5:]))


def write_whole(path, text):
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def comparisons_true(rows):
    """Of the thoughts that say a direction, the share whose only one is the truth; None of none.

    rows: an evaluation's traces, {"turns": [text, ...], "truth": direction, ...}"""
    right = []
    for row in rows:
        for thought in re.findall(r"<think>(.*?)</think>", "".join(row["turns"]), re.S):
            if said := set(re.findall(r"\b(left|right|above|below)\b", thought.lower())):
                right.append(said == {row["truth"]})
    return mean(right) if right else None


def turns_back(rows):
    """Back-tracks a trace, by what it does: a zoom call to another place after a thought that says
    the crop does not show the pattern. rows: as above"""
    count = 0
    for row in rows:
        places = []
        for turn in row["turns"]:
            missed = re.match(r"<think>(plain|nothing)\b", turn.lower())
            call = re.search(r'"coordinate": \[(\d+), (\d+)\]', turn)
            place = call and tuple(map(int, call.groups()))
            if missed and place and all(math.dist(place, other) >= 10 for other in places):
                count += 1
            places += [place] if place else []
    return count / len(rows)


def make_novice(job, folder):
    call(TINY / "make_base.py", "--no-dialogues", "--steps", 2 if job.short else 1500,
         "--out", folder)


def make_one_look(job, path):
    """Writes the traces that a search finds, those alone that zoom once."""
    folder = path.with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)            # of a run that was killed
    call("train_sft.py", *job.common, "--task", job.data("train"), "--out", folder,
         "--sft-steps", 1, *(["--search-questions", 8] if job.short else []))
    lines = (folder / "search.jsonl").read_text(encoding="utf-8").splitlines()
    spoken = [sum(message["role"] == "assistant" for message in json.loads(line)["messages"])
              for line in lines]
    kept = [f"{line}\n" for line, turns in zip(lines, spoken, strict=True) if turns == 2]
    if not kept:
        raise RuntimeError(f"{folder}: no trace of the search zooms once")
    write_whole(path, "".join(kept))


def prepare(job):
    """Makes what an arm is given, unless another one has."""
    for name, make in (("novice", make_novice), ("one_look", make_one_look)):
        path = job.given[name]
        if f"{{{name}}}" in ARMS[job.arm][2]:
            with LOCKS[path]:
                if not path.exists():
                    make(job, path)


def train(job):
    """Trains an arm from the start and keeps its result, {"stages": {stage: figures}, ...}."""
    prepare(job)
    started = time.monotonic()
    shutil.rmtree(job.folder, ignore_errors=True)
    job.folder.mkdir(parents=True)
    command = job.command()
    call(*command)
    stages, log, last = {}, [], "sft"
    if command[0] == "train_rl.py":
        last = "rl"
        stages = json.loads((job.folder / "summary.json").read_text(encoding="utf-8"))
        log = (job.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
        log = [json.loads(line) for line in log]
    if last == "sft" or job.task == "spatial":
        stages[last], rows = job.evaluate(last)
        if job.task == "spatial":        # of a comparison, no crop shows whether it is true
            stages[last]["true_thoughts"] = comparisons_true(rows)
    if (job.task, job.arm) == ("search", "zoom"):
        for stage in stages:
            stages[stage]["turns_back"] = turns_back(job.evaluate(stage)[1])
    curves = {name: [line[name] for line in log] for name in ("accuracy", "zoom_calls")}
    result = {"key": job.key(), "stages": stages, "curves": curves,
              "seconds": time.monotonic() - started}
    for weights in (*job.folder.rglob("*.safetensors"), *job.folder.rglob("state.pt")):
        weights.unlink()                 # results are kept, not the policies
    write_whole(job.folder / "result.json", json.dumps(result))


def train_all(jobs, parallel):
    """Draws the questions and trains the jobs that have no result yet, several side by side. One
    that fails is named, and the others go on. -> the names of those"""
    left = [job for job in jobs if not job.result()]
    print(f"{len(jobs)} arms and seeds, {len(left)} of them to be trained", flush=True)
    for task in sorted({job.task for job in left}):
        n = "50" if left[0].short else "1200"
        call(TINY / "make_data.py", "--task", task, "--n", n, "--out", left[0].runs / "data")
    started = time.monotonic()
    threads = ThreadPoolExecutor(parallel)
    for job in [job for job in left if "novice" in job.arm][:1]:
        threads.submit(prepare, job)         # takes minutes, while others are trained
    waiting = {threads.submit(train, job): job for job in left}
    failed = []
    try:
        for number, future in enumerate(as_completed(waiting), 1):
            job = waiting[future]
            if error := future.exception():
                print(f"{job.task} {job.arm} seed {job.seed} failed: {error}", file=sys.stderr)
                failed.append(job.arm)
                continue
            minutes = (time.monotonic() - started) / number * (len(left) - number) / 60
            print(f"{number}/{len(left)}  {job.task}  {job.arm}  seed {job.seed}  "
                  f"{job.result()['seconds']:.0f} s  ({minutes:.0f} min left)", flush=True)
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
    return failed


# ------------------------------------------------------------------------------------------- tables

TITLE = "# The paper in miniature"


def figures_of(results, task, arm, figure):
    """{seed: figure} of an arm's last stage, or of "ARM:STAGE"; figure: name or "name CATEGORY".

    A seed without the figure does not count: a policy that says nothing says nothing false."""
    arm, _, stage = arm.partition(":")
    name, _, category = figure.partition(" ")
    found = {}
    for seed, result in results.get((task, arm), {}).items():
        figures = result["stages"][stage or list(result["stages"])[-1]]
        if category:
            figures = figures["by"].get(category, {name: None})
        found[seed] = figures[name]
    return {seed: value for seed, value in found.items() if value is not None}


def compare(claim, results):
    """results: {(task, arm): {seed: result}}. -> mean of the arm, of the other one (or the level),
    their difference's mean and interval, seeds; None where no seed has both"""
    _, task, figure, arm, against = claim
    mine = figures_of(results, task, arm, figure)
    theirs = dict.fromkeys(mine, against)
    if isinstance(against, str):
        theirs = figures_of(results, task, against, figure)
    pairs = [(mine[seed], theirs[seed]) for seed in mine if seed in theirs]
    if not pairs:
        return None
    n = len(pairs)
    differences = [a - b for a, b in pairs]
    deviation = stdev(differences) / math.sqrt(n) if n > 1 else 1.0
    half = T[min(n, len(T)) - 1] * deviation
    middle = mean(differences)
    return *map(mean, zip(*pairs, strict=True)), middle, (middle - half, middle + half), n


def verdict(interval):
    low, high = interval
    if low > 0:
        return "supported"
    return "not supported" if high < 0.02 else "undecided"


def spread(figures):
    """{seed: figure} -> its mean, and from the least to the most."""
    values = figures.values()
    return f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})" if values else "-"


def looks_again(zoom_calls):
    """The first GRPO step at which the mean of five steps' zoom calls is above 1.3, or "never"."""
    steps = range(5, len(zoom_calls) + 1)
    return next((str(step) for step in steps if mean(zoom_calls[step - 5:step]) > 1.3), "never")


def tables(results):
    """-> {title: rows of cells, the heads first}; without those of which there is nothing"""
    claims = [["claim", "task", "figure", "arm", "against", "difference", "95 %", "seeds",
               "verdict"]]
    for claim in CLAIMS:
        if found := compare(claim, results):
            text, task, figure, arm, against = claim
            mine, theirs, middle, (low, high), n = found
            other = f"{against} {theirs:.3f}" if isinstance(against, str) else f"{against}"
            claims.append([text, task, figure, f"{arm} {mine:.3f}", other, f"{middle:+.3f}",
                           f"{low:+.3f} to {high:+.3f}", n, verdict((low, high))])
    collapse = [["learning rate", "bonus", "KL", "looks again, by step", "zoom calls: SFT", "GRPO",
                 "accuracy: SFT", "GRPO"]]
    for settings, arm in COLLAPSE.items():
        if by_seed := results.get(("search", arm)):
            steps = [looks_again(result["curves"]["zoom_calls"]) for result in by_seed.values()]
            cells = [spread(figures_of(results, "search", arm + stage, figure))
                     for figure in ("zoom_calls", "accuracy") for stage in (":sft", ":rl")]
            collapse.append([*settings, ", ".join(steps), *cells])
    sizes = [["elements", "px in the overview", "colour is enough", "grounded", "zoom"]]
    for size, px in SIZES.items():
        for kind, enough in (("alone", "yes"), ("alike", "no")):
            cells = [spread(figures_of(results, "sizes", arm, f"accuracy {size} | {kind}"))
                     for arm in ("grounded", "zoom")]
            if ("sizes", "zoom") in results:
                sizes.append([size, px, enough, *cells])
    names = ("accuracy", "on_target", "true_thoughts", "zoom_calls", "overlong")
    arms = [["arm", "task", "seeds", *names, "s an arm"]]
    for (task, arm), by_seed in results.items():
        accuracy, *others = [spread(figures_of(results, task, arm, name)) for name in names]
        cells = [accuracy, *(cell.split()[0] for cell in others)]
        seconds = mean(result["seconds"] for result in by_seed.values())
        arms.append([arm, task, len(by_seed), *cells, f"{seconds:.0f}"])
    found = {"Claims": claims, "After a warm start that looks once (search)": collapse,
             "Accuracy by size of the element asked for (sizes)": sizes,
             "Arms, after their last stage": arms}
    return {title: rows for title, rows in found.items() if len(rows) > 1}


def markdown(rows):
    """Rows of cells -> a table in Markdown with aligned columns."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows)


def write_tables(path, results, command):
    """Prints the tables and, where there is a path, writes them; what a person wrote there from
    "## Reading" on is kept."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=REPOSITORY, text=True,
                            capture_output=True).stdout.strip()
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall("model name.*: (.*)", cpuinfo.read_text()) if cpuinfo.is_file() else []
    machine = f"{os.cpu_count()} cores of {(names or [platform.machine()])[0]}"
    text = f"{TITLE}\n\n`{command}`, {date.today()}, commit {commit}, {machine}\n"
    for title, rows in tables(results).items():
        text += f"\n## {title}\n\n{markdown(rows)}\n"
    print("\n" + text)
    if path:
        before = path.read_text(encoding="utf-8") if path.is_file() else ""
        _, heading, reading = before.partition("\n## Reading\n")
        write_whole(path, text + heading + reading)


LINES = "#d55e00", "#e69f00", "#0072b2", "#009e73"


def draw_scaling(path, results):
    """Training accuracy by GRPO step, means of five: a panel for group sizes, and one for numbers
    of questions searched, a line each.

    results: {(task, arm): {seed: result}}, of which seed 0 is drawn."""
    sheet = Image.new("RGB", (460 * len(SCALING), 300), "white")
    canvas = ImageDraw.Draw(sheet)
    for left, (title, arms) in zip((60, 520), SCALING.items(), strict=True):
        for level in (0.4, 0.6, 0.8, 1):
            y = 250 - 350 * (level - 0.4)
            canvas.line([(left, y), (left + 380, y)], fill="#cfd5dc")
            canvas.text((left - 8, y), f"{level:g}", fill="black", anchor="rm", font_size=12)
        for number, (n, arm) in enumerate(arms.items()):
            accuracy = results["search", arm][0]["curves"]["accuracy"]
            means = [mean(accuracy[i:i + 5]) for i in range(len(accuracy) - 4)]
            step = 380 / max(1, len(means) - 1)
            places = [(left + step * i, 250 - 350 * (y - 0.4)) for i, y in enumerate(means)]
            canvas.line(places, fill=LINES[number], width=2)
            canvas.text((left + 320, 130 + 20 * number), f"{n}", fill=LINES[number], font_size=14)
        canvas.text((left + 370, 110), title, fill="black", anchor="rt", font_size=14)
        canvas.text((left, 258), "5", fill="black", anchor="mt", font_size=12)
        canvas.text((left + 380, 258), f"{len(accuracy)}", fill="black", anchor="mt", font_size=12)
        canvas.text((left + 190, 276), "GRPO steps", fill="black", anchor="mt", font_size=14)
        canvas.text((left + 190, 8), "accuracy", fill="black", anchor="mt", font_size=14)
    sheet.save(path)


# ------------------------------------------------------------------------------------------ command

def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--seeds", type=int, default=1, help="seeds 0 to N - 1 [1]")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="[all]")
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="[all]")
    add("--jobs", type=int, default=os.cpu_count(), help="arms side by side [one a core]")
    add("--table", action="store_true", help="train nothing, show what is there")
    add("--short", action="store_true", help="some updates, 16 questions: does it all run?")
    add("--scaling", metavar="PNG", help="train the scaling arms of seed 0 and draw them")
    add("--write", type=Path, metavar="FILE.md",
        help='the tables; what follows "## Reading" there is kept')
    args = parser.parse_args(arguments)
    jobs = [Job(task, arm, seed, args.short) for seed in range(args.seeds)
            for task in dict.fromkeys(args.tasks) for arm in TASKS[task] if arm in args.arms]
    if args.scaling:
        arms = {arm: None for panel in SCALING.values() for arm in panel.values()}
        jobs = [Job("search", arm, 0, args.short) for arm in arms]
    if not jobs or args.jobs < 1:
        parser.error("nothing to do: see --seeds, --jobs, and which arms a task has")
    for path in (args.write, args.scaling and Path(args.scaling)):
        if path and not path.parent.is_dir():
            parser.error(f"{path.parent}: no such folder")
    if args.write and args.write.is_file():
        before = args.write.read_text(encoding="utf-8", errors="replace")
        if not before.startswith(TITLE) and "\n## Reading\n" not in before:
            parser.error(f"{args.write}: is no file of tables, and would be lost")
    failed = [] if args.table else train_all(jobs, args.jobs)
    results = {}
    for job in jobs:
        if result := job.result():
            results.setdefault((job.task, job.arm), {})[job.seed] = result
    if args.scaling:
        if failed or len(results) < len(jobs):
            sys.exit("error: --scaling: not all of its runs are there")
        return draw_scaling(args.scaling, results)
    words = arguments or sys.argv[1:]
    write_tables(args.write, results, " ".join(["python tests/claims.py", *words]))
    if failed:
        sys.exit(f"error: {len(failed)} runs failed, see above; call it again to repeat them")


if __name__ == "__main__":
    try:
        main()
    except (OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; call it again to go on")
