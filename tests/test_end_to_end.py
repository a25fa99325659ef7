"""Every script run as a user runs it, in miniature: the default job, from the shipped base."""
import json
import os
import random
import resource
import signal
import sys

import pytest
from conftest import BASE, MINI, run_in, start
from PIL import Image

import train_rl

pytestmark = pytest.mark.slow
RUN = "runs/tiny"


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def call(script):
    """call(name, *arguments, cwd, code) -> what a script writes, to stdout and then to stderr."""
    return lambda *arguments, **how: "".join(script(*arguments, **how))


def test_the_main_job(main_job):
    """Guards the default job: search, fine-tuning, GRPO on the questions behind those that were
    searched, the table, and the files that it promises."""
    folder, output = main_job
    out = folder / RUN
    for name in ("args.json", "trees.txt", "state.pt", "sft/config.json", "rl/config.json"):
        assert (out / name).is_file(), name
    log = read_rows(out / "log.jsonl")
    assert [row["step"] for row in log] == [1, 2, 3]
    assert log[1]["diversity"] > 0 == log[2]["diversity"]     # the bonus is gone by half-time
    asked = [row["key"] for row in read_rows(out / "traces.jsonl")]
    searched = {row["key"] for row in read_rows(out / "search.jsonl")}
    assert len(asked) == 3 * 3 * 3 and len(set(asked)) == 3 * 3 and not searched & set(asked)
    summary = json.loads((out / "summary.json").read_text())
    promised = {"accuracy", "ci95", "accuracy_no_tool", "format", "on_target", "true_thoughts",
                "zoom_calls", "overlong", "minutes", "n"}
    assert list(summary) == ["base", "sft", "rl"]
    for found in summary.values():
        assert promised <= set(found) and found["n"] == 3
    assert summary["rl"]["minutes"] > 0 and summary["base"]["format"] > 0.5
    assert "without tool" in output and output.count("step 3/3") == 1 and "Score(" in output
    assert output.rstrip().endswith(f"report: {RUN}/report.html")
    page = (out / "report.html").read_text()
    for words in ("<svg", "accuracy", "a search tree", "without tool", "data:image/webp"):
        assert words in page


def test_each_checkpoint_keeps_its_dialogue(main_job):
    """Guards dialogue.json: a checkpoint that is asked in other words than it was trained with is a
    worse one, without a word."""
    expected = json.loads((BASE / "dialogue.json").read_text())
    for stage in ("sft", "rl"):
        kept = json.loads((main_job[0] / RUN / stage / "dialogue.json").read_text())
        assert kept | expected == kept


def untimed(row):
    return {name: value for name, value in row.items() if "seconds" not in name}


def assert_same_run(one, two):
    """What two runs wrote is the same to the byte, but for times."""
    logs = [list(map(untimed, read_rows(run / "log.jsonl"))) for run in (one, two)]
    assert logs[0] == logs[1]
    summaries = [json.loads((run / "summary.json").read_text()) for run in (one, two)]
    for stages in summaries:
        for found in stages.values():
            del found["minutes"]
    assert summaries[0] == summaries[1]
    for name in ("traces.jsonl", "search.jsonl", "sft/model.safetensors", "rl/model.safetensors"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


# bytes of the largest file that fits, too few for this one; of the traces half a row is written
TOO_SMALL = {"args.json": 500, "search.jsonl": 4_000, "sft": 10**6, "state.pt": 3 * 10**6,
             "traces.jsonl": 10_000}


def test_a_full_disk_costs_nothing(main_job, call):
    """Guards against half-written files: at every stage a disk without room for the next file is
    told in a line, and once there is room the run ends as if there had always been."""
    folder, _ = main_job
    command = ["train_rl", *MINI, "--out", "runs/full"]
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    for name, limit in TOO_SMALL.items():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            said = call(*command, cwd=folder, code=2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        error = said.splitlines()[-1]
        assert error.startswith(f"error: runs/full/{name} cannot be written"), said
        assert "Traceback" not in said
        if (folder / "runs/full/log.jsonl").exists():
            command = [*command[:len(MINI) + 3], "--resume"]
    call(*command, cwd=folder)
    assert_same_run(folder / RUN, folder / "runs/full")


def train_until(step, number, cwd, *words):
    """train_rl.py, which gets a signal when it tells of a step, with half a row in its log."""
    def print_and_end(*said, **how):
        sys.stdout.write(f"{said[0]}\n")
        if str(said[0]).startswith(f"step {step}/"):
            with open("runs/killed/log.jsonl", "a") as log:
                log.write('{"step": 3, "rew')
            os.kill(os.getpid(), number)
    train_rl.print = print_and_end
    run_in("train_rl", cwd, *MINI, "--out", "runs/killed", *words)


def test_a_killed_run_ends_as_one_that_was_not(main_job, call, tmp_path):
    """Guards what is written against Ctrl-C, which is told in a line, and SIGKILL, between two
    states with half a row in the log, and at a random moment: the same command with --resume ends
    with the bytes of a run that nobody killed (so that a run is the same twice, too)."""
    folder, _ = main_job
    outputs = [tmp_path / "out", tmp_path / "err"]
    interrupted = start({}, outputs, train_until, 2, signal.SIGINT, folder)
    interrupted.join(300)
    errors = outputs[1].read_text()
    assert interrupted.exitcode == 130
    assert errors.startswith("interrupted; ") and errors.count("\n") == 1
    killed = start({}, outputs, train_until, 3, signal.SIGKILL, folder, "--resume")
    killed.join(300)
    assert killed.exitcode == -signal.SIGKILL
    killed = start({}, outputs, train_until, None, None, folder, "--resume")
    killed.join(random.uniform(0, 3))
    killed.kill()
    killed.join()
    call("train_rl", *MINI, "--out", "runs/killed", "--resume", cwd=folder)
    assert_same_run(folder / RUN, folder / "runs/killed")


def test_evaluation_and_its_files(main_job, call):
    """Guards evaluate.py: the table with and without the tool, --json and the answers beside it,
    with which a second call goes on, --no-tool, --save as a page and as a picture."""
    folder, _ = main_job
    model = ["evaluate", "--model", f"{RUN}/rl"]
    command = [*model, "--n", 5, "--json", "found.json", "--save", "page.html"]
    output = call(*command, cwd=folder)
    found = json.loads((folder / "found.json").read_text())
    assert found["n"] == 5 and 0 <= found["accuracy_no_tool"] <= 1
    assert "<svg" not in (folder / "page.html").read_text()
    for words in ("1024 questions", "5/5 questions", "without tool: 5/5"):
        assert words in output
    assert len(read_rows(folder / "found.jsonl")) == 1 + 2 * 5
    again = call(*model, "--n", 5, "--json", "found.json", "--save", "first.png", cwd=folder)
    assert (folder / "first.png").is_file()
    assert "5 of 5 questions were answered before" in again
    later = json.loads((folder / "found.json").read_text())
    assert later | {"minutes": 0} == found | {"minutes": 0}
    other = call(*model, "--n", 5, "--json", "found.json", "--temperature", 0.5, cwd=folder, code=2)
    assert "temperature" in other and "another --json" in other and "Traceback" not in other
    output = call(*model, "--n", 3, "--no-tool", "--json", "no_tool.json", cwd=folder)
    assert "without tool:" not in output
    no_tool = json.loads((folder / "no_tool.json").read_text())
    assert no_tool["accuracy"] >= 0 and no_tool["zoom_calls"] == 0


@pytest.mark.parametrize("mode", ["direct", "think", "grounded", "zoom"])
def test_a_question_about_an_image_of_ones_own(call, tmp_path, mode):
    """Guards --image, --question and --save, with an image of any size and words that the tiny
    tokenizer does not know."""
    Image.new("RGB", (300, 200), (9, 99, 9)).save(tmp_path / "own.png")
    asked = ["--image", "own.png", "--question", "Où est le chat ? <|im_end|>"]
    output = call("evaluate", "--model", BASE, *asked, "--mode", mode, "--turn-tokens", 48,
                  "--response-tokens", 288, "--save", "trace.png")
    assert "Où est le chat" in output and Image.open(tmp_path / "trace.png").size[0] == 768


@pytest.mark.parametrize("name, words, message", [
    ("evaluate", ["--model", "nowhere"], "nowhere"),
    ("evaluate", ["--model", BASE, "--task", "nothing"], "nothing"),
    ("evaluate", ["--model", BASE, "--image", "text.png", "--question", "?"], "text.png"),
    ("evaluate", ["--model", BASE, "--image", "x.png"], "--question"),
    ("evaluate", ["--dialogue", "none.json"], "none.json"),
    ("evaluate", ["--json", "wrong.jsonl"], ".json"),
    ("train_rl", ["--sead", "3"], "--sead"),
    ("train_rl", ["--model", BASE], "--task"),
    ("train_rl", ["--resume", "--out", "none"], "nothing to resume"),
    ("train_rl", ["--config", "text.png"], "text.png"),
    ("train_sft", ["--traces", "text.png"], "text.png:1"),
    ("train_sft", ["--teacher", "nowhere"], "nowhere"),
])
def test_bad_input_is_told_in_a_line(call, tmp_path, name, words, message):
    """Guards against tracebacks: one line that names what is wrong, and exit code 2."""
    (tmp_path / "text.png").write_text("this is no image\n")
    output = call(name, *words, code=2)
    last = output.splitlines()[-1]
    assert last.startswith("error: ") and message in last and "Traceback" not in output


def test_the_speed_benchmark_runs(tmp_path, monkeypatch, capsys):
    """Guards the benchmark against changes of what it measures: it compares log-probabilities
    before, and writes its ratios."""
    import bench_speed
    build = bench_speed.build
    monkeypatch.setattr(bench_speed, "build", lambda name, device: build("tiny", device))
    path = tmp_path / "speed.json"
    flags = ["--only", "rollout_tiny", "update_tiny", "--pairs", "1", "--questions", "1",
             "--device", "cpu", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["bench_speed.py", *flags])
    bench_speed.main()
    assert "agree on log-probabilities" in capsys.readouterr().out
    found = json.loads(path.read_text())
    assert found["rollout_tiny"] > 0 and len(found["details"]["update_tiny"]["seconds"]) == 2
