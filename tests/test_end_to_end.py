"""Every script run as a user runs it, in miniature."""
import json
import os
import re
import signal
import subprocess
import sys

import bench_speed
import pytest
from conftest import ROOT, in_processes, launch, read_to_end, run_in
from PIL import Image
from transformers.modeling_utils import load_state_dict

from rollout import format_call, toy
from train_sft import TINY, card_text, write_traces

ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}


def start(*command, cwd, code=0):
    """Runs a command in a process of its own. -> its output"""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env=ENVIRONMENT,
                          capture_output=True, text=True)
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


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def answer_turn(thought, answer):
    return f"<think>{thought}</think>\n<answer>{answer}</answer>"


def script_traces(path, n):
    """Right traces of the first training questions, as a search would write them: to start from
    where no base can search yet."""
    chains = []
    for index in range(n):
        question = toy("toy-search", "train", 0, index)
        turns, thought = [], ""
        for number, card in enumerate(question.scene.candidates, 1):
            point = card.x / 4, card.y / 4
            text = card_text(number, point)
            turns.append(f"<think>{thought}{text}</think>\n{format_call(point)}")
            thought = f"{card.pattern.capitalize()}. "
            if card.pattern != "plain":
                break
        turns.append(answer_turn(thought.strip(), question.answer))
        chains.append((question, turns))
    write_traces(path, chains)


MINI = ["--base-steps", 3, "--sft-steps", 2, "--sft-batch", 4, "--search-questions", 6,
        "--cache-tokens", 4000]
MINI_RL = [*MINI, "--steps", 4, "--questions", 3, "--update-questions", 2, "--group", 3,
           "--eval-n", 4, "--save-every", 2, "--traces", "given.jsonl"]
RUN = "runs/toy-search-zoom"
BASE = "runs/tiny/search-seed-0-steps-3"

KILLED = """
import builtins, os, signal, train_rl
from model import rank
from rollout import run
write = print
def killed(*words, **how):
    if rank() == 0 and str(words[0]).startswith("step 3/4"):
        os.kill(os.getpid(), signal.SIGKILL)
    write(*words, **how)
builtins.print = killed
run("train_rl", "", train_rl.main)
"""

NOT_FORKED = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
if __name__ == "__main__":
    import evaluate
    from rollout import run
    sys.platform = "darwin"
    run("evaluate", "", evaluate.main)
"""


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """The main job from end to end, in miniature, on two processes."""
    folder = tmp_path_factory.mktemp("run")
    script_traces(folder / "given.jsonl", 6)
    output = start(ROOT / "train_rl.py", *MINI_RL, "--processes", 2, cwd=folder)
    return folder, output


def test_the_main_job(run_folder):
    """Guards the main job: base, fine-tuning, GRPO, the table, and the files that it promises. Two
    processes do it and share the questions unevenly: one has none in each second update."""
    folder, output = run_folder
    out = folder / RUN
    for name in ("args.json", "log.jsonl", "traces.jsonl", "summary.json", "state.pt",
                 "report.html", "sft/config.json", "rl/config.json"):
        assert (out / name).is_file(), name
    assert len(read_rows(out / "log.jsonl")) == 4
    asked = [row["id"] for row in read_rows(out / "traces.jsonl")]
    assert asked == [f"train-0-{i}" for i in range(6, 6 + 4 * 3) for _ in range(3)]
    summary = json.loads((out / "summary.json").read_text())
    figures = {"accuracy", "ci95", "accuracy_no_tool", "format", "on_target", "crops", "minutes",
               "n"}
    for stage in ("base", "sft", "rl"):
        assert figures <= set(summary[stage])
    assert "without tool" in output and output.count("step 4/4") == 1
    assert "random-zoom baseline" in output
    assert output.rstrip().endswith(f"report: {RUN}/report.html")


def test_each_checkpoint_keeps_its_dialogue(run_folder):
    """Guards dialogue.json: a checkpoint that is asked in other words than it was trained with is a
    worse one, without a word."""
    for folder in (BASE, f"{RUN}/sft", f"{RUN}/rl"):
        kept = json.loads((run_folder[0] / folder / "dialogue.json").read_text())
        assert kept == TINY.to_json()


def test_a_second_run_does_not_overwrite_the_first(run_folder, call):
    """Guards results: a run folder in use is refused with a line that says what to do."""
    output = call("train_rl", *MINI_RL, cwd=run_folder[0], code=2)
    assert "--resume" in output and "Traceback" not in output


def untimed(row):
    return {name: value for name, value in row.items() if "seconds" not in name}


def test_resuming_gives_what_an_uninterrupted_run_gives(run_folder):
    """Guards --resume: after a kill of one of two processes between two checkpoints, log and
    weights must be those of a run that was not killed (so that a run is the same twice, too); and
    the kill is told in one line, which says how to go on."""
    folder, _ = run_folder
    (folder / "killed.py").write_text(KILLED)
    flags = [*MINI_RL, "--out", "again"]
    output = start_forked(folder / "killed.py", *flags, "--processes", 2, cwd=folder, code=1)
    told = "error: SIGKILL ended process 0; a training run goes on with --resume"
    assert output.splitlines()[-1].startswith(told)
    assert "Traceback" not in output and output.count("error") == 1
    (output, _), (silent, _) = in_processes(2, run_in, "train_rl", folder, *flags, "--resume")
    assert output.count("resuming after step 2") == 1 and not silent
    first, again = folder / RUN, folder / "again"
    ours, theirs = (list(map(untimed, read_rows(run / "log.jsonl"))) for run in (first, again))
    assert ours == theirs
    for name in ("traces.jsonl", "rl/model.safetensors"):
        assert (first / name).read_bytes() == (again / name).read_bytes()


def test_several_processes(run_folder, call):
    """Guards torchrun: the main job on two processes, killed, goes on with one; lines and files
    come once."""
    folder, _ = run_folder
    (folder / "killed.py").write_text(KILLED)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--"]
    output = start(*torchrun, folder / "killed.py", *MINI_RL, "--out", "two", cwd=folder, code=1)
    assert output.count("step 1/4") == 1 and "step 3/4" not in output
    output = call("train_rl", *MINI_RL, "--out", "two", "--resume", cwd=folder)
    assert "resuming after step 2" in output and "step 4/4" in output
    assert [row["step"] for row in read_rows(folder / "two/log.jsonl")] == [1, 2, 3, 4]
    assert len(read_rows(folder / "two/traces.jsonl")) == 4 * 3 * 3


def test_one_process_learns_what_two_do(run_folder, call, tmp_path):
    """Guards the number of processes: neither what is sampled nor what is learnt may depend on it,
    from pretraining to GRPO. But for roundings base and fine-tuned weights are the same, and so are
    the first step's figures; its traces are, token by token. (Here no trace earns anything, and
    what GRPO learns from is the penalty on the roundings of weight decay: hence the wide bound on
    its weights. test_processes.py has the update on given traces.)"""
    folder, _ = run_folder
    call("train_rl", *MINI_RL, "--traces", folder / "given.jsonl", cwd=tmp_path)
    for path, bound in ((BASE, 1e-4), (f"{RUN}/sft", 1e-4), (f"{RUN}/rl", 2e-2)):
        ours, theirs = (load_state_dict(where / path / "model.safetensors")
                        for where in (folder, tmp_path))
        assert ours.keys() == theirs.keys()
        for name, weight in ours.items():
            assert (weight - theirs[name]).norm() <= bound * (1 + weight.norm()), name
    ours, theirs = ([row["turns"] for row in read_rows(where / RUN / "traces.jsonl")
                     if row["step"] == 1] for where in (folder, tmp_path))
    assert ours == theirs
    ours, theirs = (read_rows(where / RUN / "log.jsonl") for where in (folder, tmp_path))
    assert untimed(ours[0]) == pytest.approx(untimed(theirs[0]), rel=1e-3, abs=1e-4)


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
    """Guards Ctrl-C (the signal goes to the group of processes) and kill: all processes end, with
    one line where one can be said. They all write to the same pipe, so its end tells that they are
    gone."""
    command = [sys.executable, str(ROOT / "evaluate.py"), "--model", f"{RUN}/rl", "--n", "5000",
               "--processes", "2"]
    started = subprocess.Popen(command, cwd=run_folder[0], env=ENVIRONMENT, start_new_session=True,
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert started.stdout.readline().startswith("settings")
    os.killpg(started.pid, number)
    output, _ = started.communicate(timeout=30)
    assert started.returncode == code
    settings = [line for line in output.splitlines() if line.startswith("  ")]
    said = [line for line in output.splitlines() if line and line not in settings]
    assert len(said) == (number != signal.SIGKILL)
    assert all(line.startswith("interrupted; ") for line in said)


def test_evaluation_and_its_files(run_folder, call):
    """Guards evaluate.py: the table with and without the tool, --json and the answers beside it,
    --no-tool, --save."""
    folder, _ = run_folder
    model = ["evaluate", "--model", folder / RUN / "rl"]
    command = [*model, "--n", 5, "--json", "found.json", "--save", "first.png"]
    output = call(*command, cwd=folder)
    found = json.loads((folder / "found.json").read_text())
    assert found["n"] == 5 and 0 <= found["accuracy_no_tool"] <= 1
    assert (folder / "first.png").is_file()
    for words in ("family 'drawn'", "5/5 questions", "without tool: 5/5"):
        assert words in output
    assert len(read_rows(folder / "found.jsonl")) == 1 + 2 * 5
    again = call(*command, cwd=folder)
    assert again.count("5 of 5 questions were answered before") == 2
    assert json.loads((folder / "found.json").read_text()) == found
    other = call(*command, "--temperature", 0.5, cwd=folder, code=2)
    assert "temperature" in other and "another --json" in other and "Traceback" not in other
    output = call(*model, "--n", 3, "--no-tool", "--json", "no_tool.json", cwd=folder)
    assert "without tool:" not in output
    no_tool = json.loads((folder / "no_tool.json").read_text())
    assert no_tool["accuracy"] == no_tool["accuracy_no_tool"] and no_tool["crops"] == 0
    assert ".json" in call(*model, "--json", "wrong.jsonl", cwd=folder, code=2)


def test_evaluation_on_two_processes(run_folder, call):
    """Guards torchrun: two processes give the figures of one, say everything once, and leave no
    process group behind; also where there are too few questions for both."""
    folder, _ = run_folder
    for n in (5, 66):
        flags = ["--model", f"{RUN}/rl", "--n", n, "--turn-tokens", 8, "--response-tokens", 30,
                 "--json"]
        (output, _), (silent, _) = in_processes(2, run_in, "evaluate", folder, *flags,
                                                f"{n}-two.json")
        assert len(re.findall(r"^ +accuracy +95 %", output, re.M)) == 1 and not silent
        assert output.count("settings of the family") == 1
        call("evaluate", *flags, f"{n}-one.json", cwd=folder)
        one, two = (json.loads((folder / f"{n}-{number}.json").read_text())
                    for number in ("one", "two"))
        assert {**one, "minutes": 0} == {**two, "minutes": 0} and one["n"] == n


def test_processes_where_none_are_forked(run_folder):
    """Guards macOS and Windows, where a process starts from nothing and reads the scripts again."""
    folder, _ = run_folder
    (folder / "not_forked.py").write_text(NOT_FORKED)
    output = start("not_forked.py", "--model", f"{RUN}/rl", "--n", 4, "--turn-tokens", 8,
                   "--response-tokens", 30, "--processes", 2, "--no-tool", cwd=folder)
    assert output.count("settings of the family") == 1 and "4/4 questions" in output


@pytest.mark.parametrize("mode", ["direct", "think", "grounded", "zoom"])
def test_a_question_about_an_image_of_ones_own(run_folder, call, mode):
    """Guards --image, --question and --save, with an image of any size and words that the tiny
    tokenizer does not know."""
    folder, _ = run_folder
    Image.new("RGB", (300, 200), (9, 99, 9)).save(folder / "own.png")
    asked = ["--image", "own.png", "--question", "Où est le chat ? <|im_end|>"]
    output = call("evaluate", "--model", folder / RUN / "rl", *asked, "--mode", mode, "--save",
                  "trace.png", cwd=folder)
    assert "Où est le chat" in output and Image.open(folder / "trace.png").size[0] == 768


def test_a_task_from_a_file(run_folder, call):
    """Guards real data: training and evaluation on a file in the release's own format, with a
    checkpoint given by --model and the paper's settings, boxes and answers in words among the
    questions."""
    folder, _ = run_folder
    rows = []
    for i in range(12):
        Image.new("RGB", (200 + i, 100), (20 * i, 90, 90)).save(folder / f"image{i}.png")
        rows.append({"problem": f"<image>\nWhich? {i}", "images": [f"image{i}.png"],
                     "answer": "red" if i % 2 else "(10, 20, 60, 80)"})
    write_rows(folder / "rows.jsonl", rows)
    turns = ["<think>Here (3, 4).</think>\n" + format_call((3, 4)), answer_turn("So.", "red")]
    write_rows(folder / "rows_traces.jsonl", [{"id": i, "turns": turns} for i in ("2", "4", "6")])
    common = ["--model", folder / BASE, "--task", "rows.jsonl", "--response-tokens", 120,
              "--turn-tokens", 12, "--max-pixels", 4096]
    assert "12 questions" in call("evaluate", *common, cwd=folder)
    output = call("train_rl", *common, "--search-questions", 12, "--traces", "rows_traces.jsonl",
                  "--out", "filed", "--steps", 2, "--questions", 2, "--group", 2, "--eval-n", 3,
                  cwd=folder)
    assert "1 held-out" in output and "step 2/2" in output
    args = json.loads((folder / "filed/args.json").read_text())
    expected = dict(lr=1e-6, kl=0.01, clip_norm=0.2, optimizer="adamw", family="gui")
    assert {name: args[name] for name in expected} == expected


def test_search_runs(run_folder, call):
    """Guards train_sft.py's search: a base that finds nothing must say so, in a line."""
    output = call("train_sft", *MINI, "--simulations", 1, "--out", "searched", cwd=run_folder[0],
                  code=2)
    assert "search 1/1" in output and "no right trace" in output and "Traceback" not in output


def test_single_turn_traces_become_zoom_calls(run_folder, call):
    """Guards the paper's way to multi-turn traces: single-turn ones, given to the mode zoom, are
    cut into turns with real zoom calls; and --dialogue, whose parts the checkpoint keeps from then
    on, beside the others of its base."""
    folder, _ = run_folder
    chains = []
    for index in range(4):
        question = toy("toy-search", "train", 0, index)
        steps = [f"A card at ({c.x // 4}, {c.y // 4})." for c in question.scene.candidates]
        chains.append((question, [answer_turn(" ".join([*steps, "So."]), question.answer)]))
    write_traces(folder / "single.jsonl", chains)
    several = sum(len(question.scene.candidates) > 1 for question, _ in chains)
    parts = {"system_prompts": {"zoom": "Look twice."}, "crop_half": 40}
    (folder / "mine.json").write_text(json.dumps(parts))
    flags = ["--traces", "single.jsonl", "--out", "converted", "--dialogue", "mine.json"]
    output = call("train_sft", *MINI, *flags, cwd=folder)
    kept = json.loads((folder / "converted/sft/dialogue.json").read_text())
    assert kept == TINY.to_json() | parts
    assert re.search(rf"4 of 4 traces are .*\b{several} of them", output, re.S)
    single = ["--search-mode", "grounded", "--simulations", 1, "--out", "cut"]
    assert "no right trace" in call("train_sft", *MINI, *single, cwd=folder, code=2)


@pytest.mark.parametrize("name, arguments, message", [
    ("evaluate", [], "--model"),
    ("evaluate", ["--model", "nowhere"], "nowhere"),
    ("evaluate", ["--model", "MODEL", "--task", "nothing"], "nothing"),
    ("evaluate", ["--model", "MODEL", "--image", "none.png", "--question", "?"], "none.png"),
    ("evaluate", ["--model", "MODEL", "--image", "text.png", "--question", "?"], "text.png"),
    ("evaluate", ["--model", "MODEL", "--image", "x.png"], "--question"),
    ("evaluate", ["--model", "MODEL", "--dialogue", "none.json"], "none.json"),
    ("train_rl", ["--group", "1"], "--group"),
    ("train_rl", ["--temperature", "0"], "--temperature"),
    ("train_sft", ["--temperature", "0"], "--temperature"),
    ("train_rl", ["--model", "nowhere", "--out", RUN], "nowhere"),
    ("train_sft", ["--model", "nowhere", "--out", RUN], "nowhere"),
    ("train_sft", ["--traces", "none.jsonl", "--out", "a", "--base-steps", "3"], "none.jsonl"),
    ("train_sft", ["--traces", "text.png", "--out", "b", "--base-steps", "3"], "line 1"),
    ("train_sft", ["--traces", "wrong.jsonl", "--out", "c", "--base-steps", "3"],
     "none of the 1 traces"),
    ("train_sft", ["--export", "made.json", "--sft-steps", "0", "--out", "d"], "made.json"),
])
def test_bad_input_is_told_in_a_line(run_folder, call, name, arguments, message):
    """Guards against tracebacks: one line that names what is wrong, and exit code 2. A model that
    is not there is what is wrong also where --out holds another's run; and without randomness there
    is nothing to learn."""
    folder, _ = run_folder
    (folder / "text.png").write_text("this is no image\n")
    wrong = {"id": "train-0-0", "turns": ["<answer>no such pattern</answer>"]}
    write_rows(folder / "wrong.jsonl", [wrong])
    arguments = [str(folder / RUN / "rl") if a == "MODEL" else a for a in arguments]
    output = call(name, *arguments, cwd=folder, code=2)
    assert message in output.splitlines()[-1] and "Traceback" not in output


def test_the_speed_benchmark_runs(tmp_path, monkeypatch, capsys):
    """Guards the benchmark against changes of what it measures: it compares log-probabilities
    before, and writes its ratios."""
    path = tmp_path / "speed.json"
    flags = ["--only", "rollout_tiny", "update_tiny", "--pairs", "1", "--questions", "1",
             "--device", "cpu", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["bench_speed.py", *flags])
    bench_speed.main()
    assert "agree on log-probabilities" in capsys.readouterr().out
    found = json.loads(path.read_text())
    assert found["rollout_tiny"] > 0 and len(found["details"]["update_tiny"]["seconds"]) == 2
