"""The paper's claims in miniature: trains every arm on the CPU and says which claims hold.

    python tests/claims.py --seeds 5                       # all arms, then the table
    python tests/claims.py --tasks toy-spatial --arms grounded think --seeds 2
    python tests/claims.py --seeds 5 --table               # only what is there already
    python tests/claims.py --scaling .github/scaling.png   # seed 0: steps, group size, traces

An arm is a set of flags for the two training scripts. Those of a task and seed start from the same
tiny base, see the same questions, and make 80 updates, of SFT and GRPO together. Several arms run
side by side, one thread each. Each leaves its result in runs/claims; a run that was cut off loses
those that were running, and an arm whose flags have changed is trained again. Flags that this
script does not know go on to the training scripts: `--base-steps 50 --steps 2` tries it all.

A claim compares a figure of two arms, or of two stages of one, seed by seed: mean difference, and
its 95 % interval by Student's t. "supported": the interval lies above 0; "not supported": it ends
below 0.02; "undecided": all else. A claim of one figure is compared with a level.
"""
import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from PIL import Image, ImageDraw

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from evaluate import table  # noqa: E402
from model import write_text  # noqa: E402
from rollout import describe_fields, flag_of  # noqa: E402
from train_sft import remaining  # noqa: E402

# --------------------------------------------------------------------------------------------- arms

COLD = "--sft-steps 0 --steps 80"        # no warm start
WARM = "--sft-steps 30 --steps 50"
ONLY_SFT = "--sft-steps 80"
ARMS = {                                 # name: script, flags
    "sft-answers": ("train_sft", f"--mode direct {ONLY_SFT}"),
    "direct": ("train_rl", f"--mode direct {COLD}"),
    "think": ("train_rl", f"--mode think {COLD}"),
    "think-warm": ("train_rl", f"--mode think {WARM}"),
    "grounded-cold": ("train_rl", f"--mode grounded {COLD}"),
    "grounded-sft": ("train_sft", f"--mode grounded {ONLY_SFT}"),
    "straight": ("train_rl", f"--mode grounded --simulations 1 --no-backtrack {WARM}"),
    "grounded": ("train_rl", f"--mode grounded {WARM}"),
    "zoom-cold": ("train_rl", f"--mode zoom --diversity 0.2 {COLD}"),
    "zoom-sft": ("train_sft", f"--mode zoom {ONLY_SFT}"),
    "zoom-no-bonus": ("train_rl", f"--mode zoom {WARM}"),
    "zoom": ("train_rl", f"--mode zoom --diversity 0.2 {WARM}"),
}
FEWER = ("straight", "think-warm", "grounded-sft", "zoom-sft", "zoom-no-bonus")    # 3 seeds at most
TASKS = {                                # their arms
    "toy-spatial": ("sft-answers", "direct", "think", "think-warm", "grounded-cold", "grounded-sft",
                    "straight", "grounded"),
    "toy-search": ("zoom-cold", "zoom-sft", "zoom-no-bonus", "zoom"),
    "toy-gui": ("sft-answers", "straight", "grounded", "zoom"),
}
SCALING = {
    "group": {n: f"--mode zoom --group {n} {WARM}" for n in (2, 4, 8, 16)},
    "traces": {n: f"--mode zoom --search-questions {n} {WARM}" for n in (8, 32, 128)},
}
EVALUATION = 512                         # held-out questions


@dataclass(frozen=True)
class Job:
    """An arm to be trained: what makes it, and where its result is kept."""
    task: str
    arm: str
    seed: int
    script: str
    flags: tuple

    @property
    def folder(self):
        return Path("runs/claims") / self.task / self.arm / f"seed-{self.seed}"

    @property
    def command(self):
        return (f"{self.script}.py", "--task", self.task, "--seed", str(self.seed),
                "--out", str(self.folder), *self.flags)

    def result(self):
        """What an earlier run found with the same flags, or None."""
        path = self.folder / "result.json"
        found = json.loads(path.read_text()) if path.is_file() else {}
        return found if found.get("command") == list(self.command) else None


def known_to(script, flags):
    """The flags that a script knows, with their values."""
    names = set().union(*describe_fields(script).values())
    known = {f"--{flag_of(name)}" for name in names}
    kept, keep = [], True
    for part in flags:
        if part.startswith("--"):
            keep = part.replace("--no-", "--") in known
        kept += [part] * keep
    return kept


def jobs_of(tasks, arms, seeds, more):
    """The jobs of all tasks, arms and seeds. more: flags for all of them, behind an arm's own."""
    jobs = []
    for seed in seeds:
        for task in tasks:
            for arm in TASKS[task]:
                script, flags = ARMS[arm]
                if arm in arms and not (arm in FEWER and seed > 2):
                    every = known_to(script, more)
                    jobs.append(Job(task, arm, seed, script, (*flags.split(), *every)))
    return jobs


def scaling_jobs(more):
    return {(name, value): Job("toy-search", f"{name}-{value}", 0, "train_rl",
                               (*flags.split(), *more))
            for name, values in SCALING.items() for value, flags in values.items()}


def call(*command):
    """Runs a script of the repository with one thread. Raises RuntimeError with its last lines."""
    done = subprocess.run([sys.executable, *command], cwd=REPOSITORY, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n" + "\n".join(done.stdout.splitlines()[-5:]))


def train(job):
    """Trains an arm from the start and keeps its result, {"stages": {stage: figures}, ...}."""
    started = time.time()
    shutil.rmtree(job.folder, ignore_errors=True)
    mode = job.flags[job.flags.index("--mode") + 1]
    own = ("--processes", "1")
    if job.script == "train_rl":
        call(*job.command, *own, "--eval-n", str(EVALUATION))
        stages = json.loads((job.folder / "summary.json").read_text())
        del stages["random_zoom"]
        log = [json.loads(line) for line in (job.folder / "log.jsonl").read_text().splitlines()]
    else:
        call(*job.command, *own)
        figures = job.folder / "figures.json"
        call("evaluate.py", "--model", str(job.folder / "sft"), "--task", job.task, "--mode", mode,
             "--seed", str(job.seed), "--n", str(EVALUATION), "--json", str(figures), *own)
        stages, log = {"sft": json.loads(figures.read_text())}, []
    result = {"command": job.command, "stages": stages,
              "tokens": sum(line["tokens"] for line in log),
              "accuracies": [line["accuracy"] for line in log],
              "seconds": time.time() - started}
    for weights in job.folder.rglob("*.safetensors"):
        weights.unlink()                 # results are kept, not the policies
    (job.folder / "state.pt").unlink(missing_ok=True)
    write_text(job.folder / "result.json", json.dumps(result) + "\n")


def train_all(jobs, parallel, more):
    """Trains the jobs that have no result yet, the bases of their tasks and seeds first."""
    left = [job for job in jobs if not job.result()]
    print(f"{len(jobs)} arms and seeds, {len(left)} of them to be trained, {parallel} at a time",
          flush=True)
    for task, seed in sorted({(job.task, job.seed) for job in left}):
        print(f"base of {task}, seed {seed}", flush=True)
        out = f"runs/claims/base/{task}/seed-{seed}"
        shutil.rmtree(out, ignore_errors=True)
        call("train_sft.py", "--task", task, "--seed", str(seed), "--out", out,
             *known_to("train_sft", more), "--sft-steps", "0")
    started = time.time()
    with ThreadPoolExecutor(parallel) as threads:
        waiting = {threads.submit(train, job): job for job in left}
        try:
            for number, future in enumerate(as_completed(waiting), 1):
                job = waiting[future]
                future.result()
                print(f"{number}/{len(left)}  {job.task}  {job.arm}  seed {job.seed}  "
                      f"{job.result()['seconds']:.0f} s  "
                      f"({remaining(started, number, len(left))})", flush=True)
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise


# ------------------------------------------------------------------------------------------- claims

@dataclass(frozen=True)
class Claim:
    """`figure` of `arm` is above that of `other`, or above a level. Arms are named "ARM" or
    "ARM:STAGE", with STAGE base, sft or rl (the last one unless named)."""
    text: str
    task: str
    figure: str            # of a Report, or "accuracy CATEGORY"
    arm: str
    other: str = ""
    level: float = 0.0


CLAIMS = (
    Claim("GRPO over SFT on answers", "toy-spatial", "accuracy", "grounded", "sft-answers"),
    Claim("GRPO over SFT on answers", "toy-gui", "accuracy", "zoom", "sft-answers"),
    Claim("GRPO over the warm start alone", "toy-spatial", "accuracy", "grounded", "grounded-sft"),
    Claim("GRPO over the warm start alone", "toy-search", "accuracy", "zoom", "zoom-sft"),
    Claim("grounded over direct GRPO", "toy-spatial", "accuracy", "grounded", "direct"),
    Claim("grounded over ungrounded GRPO", "toy-spatial", "accuracy", "grounded", "think"),
    Claim("grounded over the same without points", "toy-spatial", "accuracy", "grounded",
          "think-warm"),
    Claim("the warm start is needed", "toy-spatial", "accuracy", "grounded", "grounded-cold"),
    Claim("the warm start is needed", "toy-search", "accuracy", "zoom", "zoom-cold"),
    Claim("tree search over straight traces", "toy-spatial", "accuracy", "grounded", "straight"),
    Claim("tree search over straight traces", "toy-gui", "accuracy", "grounded", "straight"),
    Claim("zoom helps where targets are alike (small)", "toy-gui", "accuracy alike", "zoom",
          "grounded"),
    Claim("zoom helps where a target is alone (large)", "toy-gui", "accuracy alone", "zoom",
          "grounded"),
    Claim("the bonus keeps zoom calls alive", "toy-search", "several_crops", "zoom",
          "zoom-no-bonus"),
    Claim("the bonus makes answers right", "toy-search", "accuracy", "zoom", "zoom-no-bonus"),
    Claim("GRPO amplifies: regions", "toy-search", "regions", "zoom", "zoom:sft"),
    Claim("SFT amplifies: regions", "toy-search", "regions", "zoom:sft", "zoom:base"),
    Claim("GRPO amplifies: back-tracks", "toy-search", "backtracks", "zoom", "zoom:sft"),
    Claim("SFT amplifies: back-tracks", "toy-search", "backtracks", "zoom:sft", "zoom:base"),
    Claim("GRPO amplifies: verifications", "toy-search", "verifications", "zoom", "zoom:sft"),
    Claim("points lie on target", "toy-spatial", "on_target", "grounded", level=0.9),
    Claim("points lie on target", "toy-search", "on_target", "zoom", level=0.9),
    Claim("comparisons in thoughts are true", "toy-spatial", "true_thoughts", "grounded",
          level=0.9),
    Claim("thoughts are true of the crop", "toy-search", "true_thoughts", "zoom", level=0.9),
    Claim("thoughts are true of the crop", "toy-gui", "true_thoughts", "zoom", level=0.9),
)
# Student's t: 97.5 % quantiles for 2, 3, ... seeds.
T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


def figure_of(result, stage, name):
    """A figure of a result's stage: of a Report, or of a category."""
    figures = result["stages"][stage or list(result["stages"])[-1]]
    name, _, category = name.partition(" ")
    return figures["by"][category][name] if category else figures[name]


def compare(claim, results):
    """results: {(task, arm): {seed: result}}. -> mean of the arm, of the other one (or the level),
    their difference's mean and interval, seeds; None where there are not two seeds of both

    A seed without the figure does not count: a policy that says nothing says nothing false."""
    arm, _, stage = claim.arm.partition(":")
    other, _, other_stage = claim.other.partition(":")
    found = results.get((claim.task, arm), {})
    against = results.get((claim.task, other), {}) if other else found
    pairs = []
    for seed in sorted(set(found) & set(against)):
        mine = figure_of(found[seed], stage, claim.figure)
        theirs = figure_of(against[seed], other_stage, claim.figure) if other else claim.level
        if mine is not None and theirs is not None:
            pairs.append((mine, theirs))
    n = len(pairs)
    if n < 2:
        return None
    mine, theirs = map(mean, zip(*pairs, strict=True))
    half = T[min(n, len(T) + 1) - 2] * stdev(a - b for a, b in pairs) / math.sqrt(n)
    middle = mine - theirs
    return mine, theirs, middle, (middle - half, middle + half), n


def verdict(interval):
    low, high = interval
    if low > 0:
        return "supported"
    return "not supported" if high < 0.02 else "undecided"


def print_claims(results):
    rows = [["claim", "task", "figure", "arms", "mean", "against", "difference", "95 %", "seeds",
             "verdict"]]
    for claim in CLAIMS:
        found = compare(claim, results)
        if found:
            mine, theirs, middle, interval, n = found
            arms = f"{claim.arm} - {claim.other}" if claim.other else claim.arm
            rows.append([claim.text, claim.task, claim.figure, arms, f"{mine:.3f}", f"{theirs:.3f}",
                         f"{middle:+.3f}", "{:+.3f} to {:+.3f}".format(*interval), n,
                         verdict(interval)])
    print("\n" + table(rows))


def print_arms(results):
    """Means over seeds of each arm's last stage."""
    rows = [["arm", "task", "seeds", "accuracy", "least", "most", "on target", "true thoughts",
             "zoom calls", "overlong", "tokens trained on", "s an arm"]]
    for (task, arm), by_seed in results.items():
        last = [list(result["stages"].values())[-1] for result in by_seed.values()]
        accuracies = [figures["accuracy"] for figures in last]
        row = [arm, task, len(last), f"{mean(accuracies):.3f}", f"{min(accuracies):.3f}",
               f"{max(accuracies):.3f}"]
        for name in ("on_target", "true_thoughts", "crops", "overlong"):
            values = [figures[name] for figures in last if figures[name] is not None]
            row.append(f"{mean(values):.3f}" if values else "-")
        row.append(f"{mean(result['tokens'] for result in by_seed.values()):,.0f}")
        row.append(f"{mean(result['seconds'] for result in by_seed.values()):.0f}")
        rows.append(row)
    print("\n" + table(rows))


# ------------------------------------------------------------------------------------------ scaling

def draw_scaling(path, results):
    """Three panels: accuracy against GRPO steps (each of fresh questions, a mean of 5 steps), group
    size and warm-start questions. results: {(name, value): result}"""
    groups = {value: result for (name, value), result in results.items() if name == "group"}
    steps = groups[8]["accuracies"]
    curve = [(i + 5, mean(steps[i:i + 5])) for i in range(0, len(steps) - 4, 5)]
    panels = [("GRPO steps", curve)]
    for name, title in (("group", "traces a question (group)"), ("traces", "questions searched")):
        panels.append((title, [(value, result["stages"]["rl"]["accuracy"])
                               for (which, value), result in results.items() if which == name]))
    sheet = Image.new("RGB", (3 * 360, 300), "white")
    for number, (title, points) in enumerate(panels):
        draw_panel(ImageDraw.Draw(sheet), 360 * number, title, points, number > 0)
    sheet.save(path)


def draw_panel(canvas, left, title, points, logarithmic):
    """A curve of accuracies from 0 to 1, with its points' abscissae below."""
    scale = math.log2 if logarithmic else float
    low, high = scale(points[0][0]), scale(points[-1][0])
    places = [(left + 50 + 280 * (scale(x) - low) / ((high - low) or 1), 250 - 210 * y)
              for x, y in points]
    for level in (0, 0.25, 0.5, 0.75, 1):
        y = 250 - 210 * level
        canvas.line([(left + 50, y), (left + 330, y)], fill="#cfd5dc")
        canvas.text((left + 42, y), f"{level:g}", fill="black", anchor="rm", font_size=12)
    canvas.line(places, fill="#0072b2", width=2)
    for number, ((x, y), (value, accuracy)) in enumerate(zip(places, points, strict=True)):
        canvas.ellipse((x - 3, y - 3, x + 3, y + 3), fill="#0072b2")
        if logarithmic or number % 4 == 3:
            canvas.text((x, 256), f"{value}", fill="black", anchor="mt", font_size=12)
        if logarithmic:
            canvas.text((x, y + 8), f"{accuracy:.2f}", fill="black", anchor="mt", font_size=12)
    canvas.text((left + 190, 276), title, fill="black", anchor="mt", font_size=14)
    canvas.text((left + 190, 8), "accuracy", fill="black", anchor="mt", font_size=14)


# ------------------------------------------------------------------------------------------ command

def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0 to N - 1 [1]")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="[all]")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="[all]")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1,
                        help="arms that are trained side by side [one a core]")
    parser.add_argument("--table", action="store_true", help="train nothing, show what is there")
    parser.add_argument("--scaling", metavar="PNG", help="train the scaling arms and draw them")
    asked, more = parser.parse_known_args(arguments)
    os.chdir(REPOSITORY)
    scaling = scaling_jobs(more) if asked.scaling else {}
    jobs = list(scaling.values()) or jobs_of(asked.tasks, asked.arms, range(asked.seeds), more)
    if not asked.table:
        train_all(jobs, asked.jobs, more)
    if scaling:
        draw_scaling(asked.scaling, {key: job.result() for key, job in scaling.items()})
        return print(asked.scaling)
    results = {}
    for job in jobs:
        if result := job.result():
            results.setdefault((job.task, job.arm), {})[job.seed] = result
    print_arms(results)
    print_claims(results)


if __name__ == "__main__":
    main()
