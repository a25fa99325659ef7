"""What test files share: a tiny policy with random weights, made once for all tests; the shipped
base; data files with drawn images; scripts run in this process, and functions in several.

    python -m pytest -m "not slow"      what neither starts processes nor trains: some seconds
    python -m pytest                    all
"""
import base64
import gc
import importlib
import io
import json
import multiprocessing
import os
import random
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache, partial
from itertools import chain, compress
from pathlib import Path
from tempfile import TemporaryDirectory
from weakref import WeakKeyDictionary

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "tiny"))
sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1",
               "PYTHONPATH": os.pathsep.join(sys.path[:3])}    # of the processes that tests start

import make_base
import numpy as np
import pytest
import torch
from make_base import make_tiny, strings
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen2Tokenizer
from transformers.models.qwen3_vl import Qwen3VLConfig, Qwen3VLForConditionalGeneration

import evaluate as evaluation
from model import Sequence, load
from rollout import run_script

ROOT = Path(__file__).parent.parent
BASE = ROOT / "tests/tiny/base"
torch.set_num_threads(1)    # the tests' matrices are too small for more
gc.freeze()                 # what is imported: each collection would look through all of it


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: starts processes, trains, or runs a model often")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A checkpoint like the tiny base before its training."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny(folder, strings())
    shutil.copy(BASE / "dialogue.json", folder)
    return str(folder)


# "Ċ" is how the tokenizer writes a new line, of which a byte-level vocabulary has no other sign
MERGES = [(".", "<"), (")", "<"), (".<", "/"), (")<", "/"), (")", ".</"), (".", "Ċ"), (">", "B")]


@pytest.fixture(scope="session")
def merged_folder(tmp_path_factory):
    """A checkpoint of random weights whose tokenizer, as the Qwen models' own does, has tokens in
    which a stop, a bracket or an answer runs into a tag: ").</", ")</", ".\n", ">B"."""
    def merging(vocab, merges, **how):
        for pair in MERGES:
            vocab["".join(pair)] = len(vocab)
        return Qwen2Tokenizer(vocab=vocab, merges=MERGES, **how)
    folder = tmp_path_factory.mktemp("models") / "merged"
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_base, "Qwen2Tokenizer", merging)
        make_tiny(folder, [])
    shutil.copy(BASE / "dialogue.json", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for token in (").</", ")</", ".\n", ">B"):
        assert len(tokenizer.encode(token)) == 1, token
    return str(folder)


@pytest.fixture
def policy(tiny_folder):
    return remember_images(load(tiny_folder, device="cpu"))


def draw(path, size=(200, 100), box=None):
    """A white image with, perhaps, a red rectangle."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, "white")
    if box:
        ImageDraw.Draw(image).rectangle(box, fill="red")
    image.save(path)
    return path


@pytest.fixture
def data(tmp_path):
    """write(name, rows) -> the path of a .jsonl, .json or .tsv file beside a 200x100 image.png."""
    draw(tmp_path / "image.png", box=(20, 30, 39, 39))

    def write(name, rows):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".json"):
            path.write_text(json.dumps(rows, indent=2))
        elif name.endswith(".tsv"):
            lines = [rows[0], *(row.values() for row in rows)]
            path.write_text("".join("\t".join(map(str, cells)) + "\n" for cells in lines))
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path
    return write


# ---------------------------------------------------------------------------- scripts and processes

@pytest.fixture
def script(monkeypatch, capsys, tmp_path):
    """script(name, *arguments, cwd, code) -> what `python NAME.py ARGUMENTS` writes to stdout, and
    to stderr. It is run in this process, on the CPU: a new one would take seconds to import torch.
    code: its exit code."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def ended(name, *arguments, cwd=tmp_path, code=0):
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        evaluation.open_file.cache_clear()               # a new process has read no file
        status = 0
        try:
            run_script(importlib.import_module(name).main)
        except SystemExit as stop:
            status = stop.code or 0
        out, err = capsys.readouterr()
        assert status == code, out + err
        return out, err
    return ended


FORKS = multiprocessing.get_context("forkserver")        # the server imports all this, once
FORKS.set_forkserver_preload(["conftest"])


def start(place, outputs, function, *arguments):
    """Starts a process that runs function(*arguments) as a script's main(), on the CPU. place: of
    its environment; outputs: files for its stdout and its stderr. -> the process"""
    process = FORKS.Process(target=run_as_one, args=(place, outputs, function, arguments))
    process.start()
    return process


def run_as_one(place, outputs, function, arguments):
    os.environ |= place
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    torch.cuda.is_available = lambda: False
    run_script(partial(function, *arguments))


def in_processes(number, function, *arguments):
    """Runs function(*arguments) in so many processes, which join as torchrun's do, on the CPU.
    -> of each, what it writes to stdout, and to stderr"""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(number)}
    processes, written = [], []
    with TemporaryDirectory() as folder:
        for rank in range(number):
            place = address | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            outputs = [Path(folder, f"{rank}.{name}") for name in ("out", "err")]
            processes.append(start(place, outputs, function, *arguments))
        for rank, process in enumerate(processes):
            process.join(300)
            written.append([Path(folder, f"{rank}.{name}").read_text() for name in ("out", "err")])
    assert all(process.exitcode == 0 for process in processes), written
    return written


def run_in(name, cwd, *arguments):
    """A script's main(), for `in_processes`."""
    os.chdir(cwd)
    sys.argv = [name, *map(str, arguments)]
    importlib.import_module(name).main()


MINI = ["--search-questions", 3, "--simulations", 2, "--sft-steps", 2, "--steps", 3, "--questions",
        3, "--update-questions", 2, "--group", 3, "--n", 3, "--save-every", 2]


@pytest.fixture(scope="session")
def main_job(tmp_path_factory):
    """`python train_rl.py` from end to end, for a few steps. -> its folder, what it writes"""
    folder = tmp_path_factory.mktemp("job")
    done = subprocess.run([sys.executable, ROOT / "train_rl.py", *map(str, MINI)], cwd=folder,
                          env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    return folder, done.stdout


# --------------------------------------------------------------------------- policies and dialogues

def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def prompts(policy, n, group, seed=0):
    """Prompts of different lengths and images, each for a group of sequences with random numbers
    from `seed`."""
    for i in range(n):
        content = [{"type": "image"}, {"type": "text", "text": "Which? " * (i % 3 + 1)}]
        image = noise(64 + 32 * (i % 3), 64, i)
        prompt = policy.prompt([{"role": "user", "content": content}], [image])
        yield [Sequence(prompt, rng=random.Random(f"{seed} {i} {j}")) for j in range(group)]


def converse(policy, turns, seed=0):
    """An on_turn that answers with crops of different sizes until `turns` turns are over; how often
    differs by row."""
    rounds = {}

    def on_turn(sequence, truncated):
        done = rounds[id(sequence)] = rounds.get(id(sequence), 0) + 1
        fewer = len(sequence.ids) % 2 if turns > 1 else 0
        if done >= turns - fewer:
            return None
        content = [{"type": "text", "text": "here:"}, {"type": "image"}]
        return policy.reply(content, [noise(64 + 16 * done, 64, seed)])
    return on_turn


IMAGES = WeakKeyDictionary()     # of Pictures, which drop theirs once they are encoded


def remember_images(policy):
    """Makes a policy note in IMAGES what its Pictures were made of. -> the policy"""
    make = policy.picture

    def picture(image):
        made = make(image)
        IMAGES[made] = made.image
        return made
    policy.picture = picture
    return policy


def pixel_values(policy, pictures):
    """What the vision tower got of some pictures."""
    return policy.pixel_values([replace(picture, image=IMAGES[picture]) for picture in pictures])


@lru_cache
def plain_model(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def plain_log_probs(folder, policy, sequence):
    """Log-probabilities of the sampled tokens, by a plain Hugging Face forward of the dialogue."""
    model = plain_model(folder)
    model.model.rope_deltas = None                       # of the dialogue before
    ids = torch.tensor([sequence.prompt.ids + sequence.ids])
    pictures = sequence.prompt.pictures + sequence.pictures
    logits = model(input_ids=ids, pixel_values=pixel_values(policy, pictures),
                   image_grid_thw=torch.tensor([p.grid for p in pictures]),
                   mm_token_type_ids=(ids == policy.image_token).int()).logits[0].float()
    log_probs = torch.log_softmax(logits.masked_fill(policy.forbidden, -torch.inf), -1)
    before = len(sequence.prompt.ids) - 1                # of the token that predicts the first one
    found = [log_probs[before + i, token] for i, token in enumerate(sequence.ids)
             if sequence.sampled[i]]
    return torch.stack(found)


def recorded(groups):
    """The log-probabilities that were recorded while sampling."""
    found = []
    for sequence in chain(*groups):
        found += compress(sequence.log_probs, sequence.sampled)
    return torch.tensor(found)


# ----------------------------------------------------------------------- rows of the real data sets

def talk(question, answer, **fields):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": 7, "image": "image.png", **fields, "conversations": turns}


SAT = ("<image>\nQuestion: Which way?\nAnswer Choices:\nA. Yes, left\nB. No\n"
       "Answer with the text of the option.")
SEARCH = ("<image>\nWhat colour is the glove?\n(A) red\n(B) blue\n(C) dark green\n"
          "Answer with the option's letter.")
SCREENSPOT = {"img_filename": "image.png", "bbox": [20, 30, 20, 10], "instruction": "send",
              "data_type": "text", "data_source": "ios"}
PRO = {"img_filename": "image.png", "bbox": [20, 30, 40, 40], "instruction": "undo", "id": "word_1",
       "application": "word", "platform": "windows", "img_size": [200, 100], "ui_type": "icon",
       "group": "Office"}
ATLAS = {"img_filename": "image.png", "bbox": [0.1, 0.3, 0.2, 0.4], "instruction": "undo"}
POINT_RL = {"problem": "<image>Description: check sports news", "answer": "(20, 30, 40, 40)",
            "images": ["image.png"]}
ACTION_RL = {"problem": "<image>OBJECTIVE: buy it\n\nPREVIOUS ACTIONS: \n1. click [3]\n\nIMAGE:\n",
             "answer": "click [12]", "images": ["image.png"]}
SFT = {"messages": [{"role": "system", "content": "You look closer."},
                    {"role": "user", "content": SEARCH},
                    {"role": "assistant", "content": "<think> (3, 4) </think>"},
                    {"role": "user", "content": "<observation><image></observation>"},
                    {"role": "assistant", "content": "<answer> A </answer>"}],
       "images": ["image.png", "crop.png"], "gt_answer": "A"}
VSTAR = {"image": "image.png", "text": "Which sign?\n(A) B\n(B) A", "label": "A",
         "category": "direct_attributes", "question_id": 4}
ROBOSPATIAL = [
    {"category": "context", "img": "image.png", "answer": "[(0.1, 0.3), (0.2, 0.3), (0.2, 0.5)]",
     "question": "Point to the space left of the cup. Your answer should be formatted as a list of "
                 "tuples, i.e. [(x1, y1), ...], between 0 and 1."},
    {"category": "configuration", "img": "image.png", "answer": "Yes",
     "question": "Is the cup left?"}]
PROBE = {"images": ["image.png"], "doc_id": "d1", "problem": "<image>What?", "solution": "EXIT",
         "data_source": "hard"}


def hr_bench(side=8, **fields):
    """A row of HR-Bench, with a noisy image of side x side px in it."""
    buffer = io.BytesIO()
    Image.effect_noise((side, side), 99).save(buffer, "PNG")
    return {"index": 0, "question": '"Which ""one""?\nLook."', "A": "red", "B": "blue",
            "C": "green", "D": "white", "answer": "C", "category": "single", "cycle_category": 0,
            **fields, "image": base64.b64encode(buffer.getvalue()).decode()}


def as_qwen3(folder, out):
    """Writes a Qwen3-VL with random weights, of the tokenizer and the sizes of a tiny Qwen2.5-VL,
    but with heads that are no share of the hidden size, and grouped queries."""
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_heads",
              "out_hidden_size", "patch_size", "spatial_merge_size", "temporal_patch_size",
              "eos_token_id", "initializer_range")
    text, vision = ({name: config[part][name] for name in shared if name in config[part]}
                    for part in ("text_config", "vision_config"))
    text |= dict(num_attention_heads=6, num_key_value_heads=2, head_dim=16, rope_theta=5e6,
                 rope_scaling=dict(rope_type="default", mrope_section=[4, 2, 2],
                                   mrope_interleaved=True))
    vision |= dict(depth=3, deepstack_visual_indexes=[0, 2], num_position_embeddings=36)
    tokens = {name: config[name] for name in config if name.endswith("_token_id")}
    torch.manual_seed(1)
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False, **tokens))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:                              # no bias is zero, no norm is one
                p.add_(0.1 * torch.randn_like(p))
    model.generation_config.eos_token_id = text["eos_token_id"]
    model.save_pretrained(out)
