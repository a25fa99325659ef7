"""A tiny policy with random weights, made once for all tests."""
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
import torch

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
