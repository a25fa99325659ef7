"""What test files share: a tiny policy with random weights, made once for all tests, and data files with drawn images."""
import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
import torch
from PIL import Image, ImageDraw

import model as models
import train_sft as sft

torch.set_num_threads(1)    # the tests' matrices are too small for more


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    sft.make_tiny(folder, sft.tiny_strings(), sft.TINY_PROMPTS)
    return str(folder)


@pytest.fixture
def policy(tiny_folder):
    return models.load(tiny_folder, device="cpu")


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
            text = json.dumps(rows, indent=2)
        elif name.endswith(".tsv"):
            text = "".join("\t".join(map(str, cells)) + "\n" for cells in [rows[0], *(row.values() for row in rows)])
        else:
            text = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(text)
        return path
    return write
