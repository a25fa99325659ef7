"""Every script run as a user runs it, in miniature."""
import json
import os
import signal
import subprocess
import sys

import bench_speed
import pytest
import torch
from PIL import Image
from transformers.modeling_utils import load_state_dict

import evaluate as evaluation
import train_sft as sft
from conftest import ROOT, in_processes, launch, main_of, read_to_end
from rollout import call_text

ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}


def start(*command, cwd, code=0):
    """Runs a command in a process of its own. -> its output"""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def start_forked(*command, cwd, code=0):
    """The same for a script that starts processes of its own, with one import of torch less."""
    process, pipe = launch(cwd, *command)
    output = read_to_end(pipe, 300)
    process.join()
    assert process.exitcode == code, output
    return output


@pytest.fixture
def call(script):
    """call(name, *arguments, cwd, code) -> what a script writes, to stdout and then to stderr."""
    return lambda *arguments, **how: "".join(script(*arguments, **how))


def script_traces(path, n):
    """Right traces of the first training questions, as a search would write them: to start from where no base can search yet."""
    chains = []
    for index in range(n):
        question = evaluation.toy_search("train", 0, index)
        turns, thought = [], ""
        for number, card in enumerate(question.scene.candidates, 1):
            spot = card.x / 4, card.y / 4
            turns.append(f"<think>{thought}{sft.card_text(number, spot)}</think>\n{call_text(spot)}")
            thought = f"{card.pattern.capitalize()}. "
            if card.pattern != "plain":
                break
        chains.append((question, turns + [f"<think>{thought.strip()}</think>\n<answer>{question.answer}</answer>"]))
    sft.write_traces(path, chains)


MINI = ["--base-steps", 3, "--sft-steps", 2, "--sft-batch", 4, "--search-questions", 6, "--cache-tokens", 4000]
MINI_RL = [*MINI, "--steps", 4, "--questions", 3, "--update-questions", 2, "--group", 3,
           "--eval-n", 4, "--save-every", 2, "--traces", "given.jsonl"]


KILLED = """
import os, signal, train_rl
from rollout import run
keep = train_rl.keep_log
def killed(out, line, flat):
    keep(out, line, flat)
    if line["step"] == 3:
        os.kill(os.getpid(), signal.SIGKILL)
train_rl.keep_log = killed
run(train_rl.main)
"""


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """One whole run of the main job, in miniature, on two processes."""
    folder = tmp_path_factory.mktemp("run")
    script_traces(folder / "given.jsonl", 6)
    output = start(ROOT / "train_rl.py", *MINI_RL, "--processes", 2, cwd=folder)
    return folder, output


def test_the_whole_job(run_folder):
    """Guards the main job: base, fine-tuning, GRPO, the table, and the files that it promises. Two
    processes do it and share the questions unevenly: one has none in each second update."""
    folder, output = run_folder
    out = folder / "runs" / "toy-search-zoom"
    for name in ("args.json", "log.jsonl", "traces.jsonl", "summary.json", "state.pt", "sft/config.json", "rl/config.json"):
        assert (out / name).is_file(), name
    assert len((out / "log.jsonl").read_text().splitlines()) == 4
    asked = [json.loads(line)["id"] for line in (out / "traces.jsonl").read_text().splitlines()]
    assert asked == [f"train-0-{i}" for i in range(6, 6 + 4 * 3) for _ in range(3)]
    summary = json.loads((out / "summary.json").read_text())
    for stage in ("base", "sft", "rl"):
        assert {"accuracy", "ci95", "accuracy_no_tool", "format", "on_target", "crops", "minutes", "n"} <= set(summary[stage])
    assert "without tool" in output and output.count("step 4/4") == 1 and "blind player" in output


def test_a_second_run_does_not_overwrite_the_first(run_folder, call):
    """Guards results: a run folder in use is refused with a line that says what to do."""
    output = call("train_rl", *MINI_RL, cwd=run_folder[0], code=2)
    assert "--resume" in output and "Traceback" not in output


def test_resuming_gives_what_an_uninterrupted_run_gives(run_folder):
    """Guards --resume: after a kill of one of two processes between two checkpoints, log and
    weights must be those of a run that was not killed (so that a run is the same twice, too); and
    the kill is told in one line, which says how to go on."""
    folder, _ = run_folder
    (folder / "killed.py").write_text(KILLED)
    arguments = [*MINI_RL, "--out", "again"]
    output = start_forked(folder / "killed.py", *arguments, "--processes", 2, cwd=folder, code=1)
    last = output.splitlines()[-1]
    assert last.startswith("error: SIGKILL ended process 0; a training run goes on with --resume")
    assert "Traceback" not in output and output.count("error") == 1
    (output, _), (silent, _) = in_processes(2, main_of, "train_rl", folder, *arguments, "--resume")
    assert output.count("resuming after step 2") == 1 and not silent
    first, again = folder / "runs" / "toy-search-zoom", folder / "again"
    def log(path):
        return [{k: v for k, v in json.loads(line).items() if "seconds" not in k} for line in path.read_text().splitlines()]
    assert log(first / "log.jsonl") == log(again / "log.jsonl")
    assert (first / "traces.jsonl").read_text() == (again / "traces.jsonl").read_text()
    assert (first / "rl/model.safetensors").read_bytes() == (again / "rl/model.safetensors").read_bytes()


def test_several_processes(run_folder, call):
    """Guards torchrun: the main job on two processes, cut off, goes on with one; lines and files come once."""
    folder, _ = run_folder
    def torchrun(*command, code=0):
        return start("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--", *command, cwd=folder, code=code)
    (folder / "killed.py").write_text(KILLED)
    output = torchrun(folder / "killed.py", *MINI_RL, "--out", "two", code=1)
    assert output.count("step 1/4") == 1 and "step 3/4" not in output
    output = call("train_rl", *MINI_RL, "--out", "two", "--resume", cwd=folder)
    assert "resuming after step 2" in output and "step 4/4" in output
    out = folder / "two"
    assert [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    assert len((out / "traces.jsonl").read_text().splitlines()) == 4 * 3 * 3


def test_one_process_learns_what_two_do(run_folder, call, tmp_path):
    """Guards the number of processes: neither what is sampled nor what is learnt may depend on it,
    from pretraining to GRPO. Its first step has the same traces, token by token, and its figures
    and weights are the same but for roundings."""
    folder, _ = run_folder
    call("train_rl", *MINI_RL, "--traces", folder / "given.jsonl", cwd=tmp_path)
    run = "runs/toy-search-zoom"
    for path in ("runs/tiny/seed-0-steps-3", f"{run}/sft", f"{run}/rl"):
        ours, theirs = (load_state_dict(where / path / "model.safetensors")
                        for where in (folder, tmp_path))
        assert ours.keys() == theirs.keys()
        # Not element by element: AdamW makes a whole step of a gradient that is nothing but roundings.
        assert all((x - theirs[n]).norm() <= 1e-4 * (1 + x.norm()) for n, x in ours.items())
    def lines(name):
        return ([json.loads(line) for line in (where / run / name).read_text().splitlines()]
                for where in (folder, tmp_path))
    ours, theirs = lines("traces.jsonl")
    assert [t["turns"] for t in ours if t["step"] == 1] == [t["turns"] for t in theirs if t["step"] == 1]
    for ours, theirs in zip(*lines("log.jsonl"), strict=True):
        measured = [name for name in ours if "seconds" not in name]
        assert ours.keys() == theirs.keys()
        assert [ours[name] for name in measured] == pytest.approx([theirs[name] for name in measured], rel=1e-3, abs=1e-4)


def test_an_error_of_all_processes_is_told_once(call, tmp_path):
    """Guards the output of several processes: one line and exit code 2, even of a wrong command
    line, which argparse would tell in each of them, and nothing of the launcher's own reports."""
    output = start_forked(ROOT / "evaluate.py", "--sead", 3, "--processes", 2, cwd=tmp_path, code=2)
    assert output == "error: unrecognized arguments: --sead 3 (--help lists the flags)\n"
    output = call("evaluate", "--processes", 0, code=2)
    assert output == "error: --processes must be at least 1\n"


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143),
                                          (signal.SIGKILL, -9)])
def test_no_process_is_left_behind(run_folder, number, code):
    """Guards Ctrl-C (the signal goes to the whole group) and kill: all processes end, with one line
    where one can be said. They all write to the same pipe, so its end tells that they are gone."""
    command = [sys.executable, str(ROOT / "evaluate.py"), "--model", "runs/toy-search-zoom/rl",
               "--n", "5000", "--processes", "2"]
    started = subprocess.Popen(command, cwd=run_folder[0], env=ENVIRONMENT, start_new_session=True,
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert started.stdout.readline().startswith("settings")
    os.killpg(started.pid, number)
    output, _ = started.communicate(timeout=30)
    assert started.returncode == code
    said = [line for line in output.splitlines() if line and not line.startswith("  ")]  # of the settings
    assert len(said) == (number != signal.SIGKILL)
    assert all(line.startswith("interrupted; ") for line in said)


def test_evaluation_and_its_files(run_folder, call):
    """Guards evaluate.py: the table with and without the tool, --json and its records, --no-tool, --save."""
    folder, _ = run_folder
    command = ["evaluate", "--model", folder / "runs/toy-search-zoom/rl", "--n", 5, "--json", "found.json",
               "--save", "first.png"]
    output = call(*command, cwd=folder)
    found = json.loads((folder / "found.json").read_text())
    assert found["n"] == 5 and 0 <= found["accuracy_no_tool"] <= 1 and (folder / "first.png").is_file()
    assert "family 'drawn'" in output and "5/5 questions" in output and "without tool: 5/5" in output and "lenient" in output
    assert len((folder / "found.jsonl").read_text().splitlines()) == 1 + 2 * 5
    again = call(*command, cwd=folder)
    assert again.count("5 of 5 questions were answered before") == 2 and "not drawn" in again
    assert json.loads((folder / "found.json").read_text()) == found
    other = call(*command, "--temperature", 0.5, cwd=folder, code=2)
    assert "temperature 1.0" in other and "another --json" in other and "Traceback" not in other
    output = call("evaluate", "--model", command[2], "--n", 3, "--no-tool", "--json", "bare.json", cwd=folder)
    assert "without tool:" not in output
    bare = json.loads((folder / "bare.json").read_text())
    assert bare["accuracy"] == bare["accuracy_no_tool"] and bare["crops"] == 0
    assert ".json" in call("evaluate", "--model", command[2], "--json", "bare.jsonl", cwd=folder, code=2)


def test_evaluation_on_two_processes(run_folder, call):
    """Guards torchrun: two processes give the figures of one, say everything once, and leave no process group behind; also
    where there are too few questions for both."""
    folder, _ = run_folder
    for n in (5, 66):
        flags = ["--model", "runs/toy-search-zoom/rl", "--n", n, "--turn-tokens", 8, "--response-tokens", 30, "--json"]
        (output, _), (silent, _) = in_processes(2, main_of, "evaluate", folder, *flags, f"{n}-two.json")
        assert output.count("lenient") == output.count("a blind player") == 1 and not silent
        call("evaluate", *flags, f"{n}-one.json", cwd=folder)
        one, two = (json.loads((folder / f"{n}-{name}.json").read_text()) for name in ("one", "two"))
        assert {**one, "minutes": 0} == {**two, "minutes": 0} and one["n"] == n


@pytest.mark.parametrize("mode", ["direct", "think", "grounded", "zoom"])
def test_a_question_about_an_image_of_ones_own(run_folder, call, mode):
    """Guards --image, --question and --save, with an image of any size and words that the tiny tokenizer does not know."""
    folder, _ = run_folder
    Image.new("RGB", (300, 200), (9, 99, 9)).save(folder / "own.png")
    output = call("evaluate", "--model", folder / "runs/toy-search-zoom/rl", "--image", "own.png", "--question",
                  "Où est le chat ? <|im_end|>", "--mode", mode, "--save", "trace.png", cwd=folder)
    assert "Où est le chat" in output and Image.open(folder / "trace.png").size[0] == 768


def test_a_task_from_a_file(run_folder, call):
    """Guards real data: training and evaluation on a file in the release's own format, with a checkpoint given by --model and the
    paper's settings, boxes and answers in words among the questions."""
    folder, _ = run_folder
    rows = []
    for i in range(12):
        Image.new("RGB", (200 + i, 100), (20 * i, 90, 90)).save(folder / f"image{i}.png")
        rows.append({"problem": f"<image>\nWhich? {i}", "answer": "red" if i % 2 else "(10, 20, 60, 80)", "images": [f"image{i}.png"]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    turns = ["<think>Here (3, 4).</think>\n" + call_text((3, 4)), "<think>So.</think>\n<answer>red</answer>"]
    given = [{"id": str(i), "turns": turns} for i in range(2, 13, 2)]
    (folder / "rows_traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given[:3]))
    model = folder / "runs/tiny/seed-0-steps-3"
    common = ["--model", model, "--task", "rows.jsonl", "--response-tokens", 120, "--turn-tokens", 12, "--max-pixels", 4096]
    output = call("evaluate", *common, cwd=folder)
    assert "12 questions" in output and "lenient" in output
    output = call("train_rl", *common, "--search-questions", 12, "--traces", "rows_traces.jsonl", "--out", "filed", "--steps", 2,
                  "--questions", 2, "--group", 2, "--eval-n", 3, cwd=folder)
    assert "1 held-out" in output and "step 2/2" in output
    args = json.loads((folder / "filed/args.json").read_text())
    assert (args["lr"], args["kl"], args["clip_norm"], args["optimizer"], args["family"]) == (1e-6, 0.01, 0.2, "adamw", "gui")


def test_search_runs(run_folder, call):
    """Guards train_sft.py's search: a base that finds nothing must say so, in a line."""
    folder, _ = run_folder
    output = call("train_sft", *MINI, "--simulations", 1, "--out", "searched", cwd=folder, code=2)
    assert "search 1/1" in output and "no right trace" in output and "Traceback" not in output


def test_single_turn_traces_become_looks(run_folder, call):
    """Guards the paper's way to multi-turn traces: single-turn ones, given to the mode zoom, are cut into turns with real looks."""
    folder, _ = run_folder
    chains = []
    for index in range(4):
        question = evaluation.toy_search("train", 0, index)
        steps = " ".join(f"A card at ({c.x // 4}, {c.y // 4})." for c in question.scene.candidates)
        chains.append((question, [f"<think>{steps} So.</think>\n<answer>{question.answer}</answer>"]))
    sft.write_traces(folder / "single.jsonl", chains)
    looks = sum(len(q.scene.candidates) > 1 for q, _ in chains)
    (folder / "mine.txt").write_text("Look twice.\n")
    output = call("train_sft", *MINI, "--traces", "single.jsonl", "--out", "converted", "--system-prompt", "mine.txt", cwd=folder)
    assert json.loads((folder / "converted/sft/system_prompts.json").read_text())["zoom"] == "Look twice."
    assert f"4 of 4 traces are whole and right; {looks} of them look more than once" in output
    again = call("train_sft", *MINI, "--search-mode", "grounded", "--simulations", 1, "--out", "cut", cwd=folder, code=2)
    assert "no right trace" in again


@pytest.mark.parametrize("name, arguments, message", [
    ("evaluate", [], "--model"),
    ("evaluate", ["--model", "nowhere"], "nowhere"),
    ("evaluate", ["--model", "MODEL", "--task", "nothing"], "nothing"),
    ("evaluate", ["--model", "MODEL", "--image", "none.png", "--question", "?"], "none.png"),
    ("evaluate", ["--model", "MODEL", "--image", "text.png", "--question", "?"], "text.png"),
    ("evaluate", ["--model", "MODEL", "--image", "x.png"], "--question"),
    ("evaluate", ["--model", "MODEL", "--system-prompt", "none.txt"], "none.txt"),
    ("train_rl", ["--group", "1"], "--group"),
    ("train_rl", ["--temperature", "0"], "--temperature"),
    ("train_sft", ["--temperature", "0"], "--temperature"),
    ("train_rl", ["--model", "nowhere", "--out", "runs/toy-search-zoom"], "nowhere"),
    ("train_sft", ["--model", "nowhere", "--out", "runs/toy-search-zoom"], "nowhere"),
    ("train_sft", ["--traces", "none.jsonl", "--out", "a", "--base-steps", "3"], "none.jsonl"),
    ("train_sft", ["--traces", "text.png", "--out", "b", "--base-steps", "3"], "line 1"),
    ("train_sft", ["--traces", "wrong.jsonl", "--out", "c", "--base-steps", "3"], "none of the 1 traces"),
])
def test_bad_input_is_told_in_a_line(run_folder, call, name, arguments, message):
    """Guards against tracebacks: one line that names what is wrong, and exit code 2. A model that is not there is what is wrong
    also where --out holds another's run; and without randomness there is nothing to learn."""
    folder, _ = run_folder
    (folder / "text.png").write_text("this is no image\n")
    (folder / "wrong.jsonl").write_text('{"id": "train-0-0", "turns": ["<answer>no such pattern</answer>"]}\n')
    arguments = [str(folder / "runs/toy-search-zoom/rl") if a == "MODEL" else a for a in arguments]
    output = call(name, *arguments, cwd=folder, code=2)
    assert message in output.splitlines()[-1] and "Traceback" not in output


@pytest.mark.parametrize("name", ["train_sft", "train_rl", "evaluate"])
def test_help(name, call):
    """Guards --help: every flag with its help."""
    output = call(name, "--help")
    assert "--seed" in output and "--task" in output


def test_the_speed_benchmark_runs(tmp_path, monkeypatch, capsys):
    """Guards the benchmark against changes of what it measures: it compares log-probabilities before, and writes its ratios."""
    flags = "--only rollout_tiny update_tiny --pairs 1 --questions 1 --device cpu --json".split()
    monkeypatch.setattr(sys, "argv", ["bench_speed.py", *flags, str(tmp_path / "speed.json")])
    bench_speed.main()
    assert "agree on log-probabilities" in capsys.readouterr().out
    found = json.loads((tmp_path / "speed.json").read_text())
    assert found["rollout_tiny"] > 0 and len(found["details"]["update_tiny"]["seconds"]) == 2
