"""Proof without weights: folders laid out as the hub has Qwen2.5-VL-3B-Instruct and
Qwen3-VL-4B-Instruct, in small, through every script and every data format. What is at stake: what
works on checkpoints that we wrote ourselves, and fails on those that others did."""
import json
import math
import re
import shutil
from itertools import cycle
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    ACTION_RL,
    ATLAS,
    POINT_RL,
    PRO,
    PROBE,
    ROBOSPATIAL,
    SAT,
    SCREENSPOT,
    SEARCH,
    SFT,
    VSTAR,
    hr_bench,
    talk,
)
from PIL import Image
from transformers import (
    AddedToken,
    AutoConfig,
    AutoModelForImageTextToText,
    Qwen2Tokenizer,
)
from transformers.modeling_utils import load_state_dict, safe_save_file

from evaluate import FORMATS, open_file
from model import UserError, load, read_json
from rollout import SYSTEM_PROMPTS, Dialogue, Question, format_call, make_dialogue
from train_sft import fine_tune, messages_of

# ----------------------------------------------------------------------- the hub's folder, in small

SPECIAL = [f"<|{name}|>" for name in (
    "endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end", "box_start", "box_end",
    "quad_start", "quad_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")]
PLAIN = ["<tool_call>", "</tool_call>"]
STOCK = "You are a helpful assistant."
TEMPLATE = """\
{%- if messages[0].role != 'system' -%}
  {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
  {{- '<|im_start|>' + message.role + '\\n' -}}
  {%- if message.content is string %}{{ message.content }}{% else -%}
    {%- for part in message.content -%}
      {%- if part.type == 'image' -%}
        {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
      {%- else %}{{ part.text }}{% endif -%}
    {%- endfor -%}
  {%- endif -%}
  {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""
# Qwen3-VL's adds no system message.
TEMPLATE_OF_QWEN3 = re.sub(r"{%- if messages.*?endif -%}\n", "", TEMPLATE, count=1, flags=re.S)
SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
SPARE = 21      # rows of the embedding beyond the tokenizer's last token (271 in the real one)


def write_tokenizer(folder):
    """Byte-level BPE, trained on a few words of ours, as files of the hub.
    -> {special or added token: id}"""
    words = [*SYSTEM_PROMPTS.values(), "<answer>", "</answer>", "<think>", "</think>\n",
             format_call((1, 2))]
    empty = Qwen2Tokenizer(vocab={}, merges=[])
    trained = empty.train_new_from_iterator(words * 3, vocab_size=600, show_progress=False)
    trained.add_tokens([AddedToken(token, special=token in SPECIAL, normalized=False)
                        for token in SPECIAL + PLAIN])
    tokenizer = trained.backend_tokenizer
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", dict(
        additional_special_tokens=SPECIAL[1:], bos_token=None, chat_template=TEMPLATE,
        eos_token="<|im_end|>", pad_token="<|endoftext|>", tokenizer_class="Qwen2Tokenizer"))
    write_json(folder / "chat_template.json", {"chat_template": TEMPLATE})
    return {token: tokenizer.token_to_id(token) for token in SPECIAL + PLAIN}


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False))


def write_configs(folder, ids):
    """config.json in the flat layout of the hub's, and preprocessor_config.json."""
    vision = dict(
        depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64,
        patch_size=14, spatial_merge_size=2, window_size=112, fullatt_block_indexes=[1])
    write_json(folder / "config.json", token_ids(ids) | dict(
        hidden_size=64, initializer_range=0.1, intermediate_size=96, model_type="qwen2_5_vl",
        num_attention_heads=4, num_hidden_layers=2, num_key_value_heads=2, rope_theta=1000000.0,
        tie_word_embeddings=True, torch_dtype="bfloat16", vision_config=vision,
        rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]},
        vocab_size=max(ids.values()) + 1 + SPARE))
    write_json(folder / "preprocessor_config.json", dict(
        min_pixels=3136, max_pixels=12845056, patch_size=14, temporal_patch_size=2, merge_size=2,
        image_mean=[0.48, 0.46, 0.41], image_std=[0.27, 0.26, 0.28],
        image_processor_type="Qwen2VLImageProcessor", processor_class="Qwen2_5_VLProcessor"))


def token_ids(ids):
    return {"image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"],
            "vision_start_token_id": ids["<|vision_start|>"],
            "vision_end_token_id": ids["<|vision_end|>"]}


def write_configs_of_qwen3(folder, ids):
    """The same of Qwen3-VL: nested, heads that are no share of the hidden size, DeepStack."""
    text = dict(
        dtype="bfloat16", head_dim=24, hidden_size=64, initializer_range=0.1, intermediate_size=96,
        model_type="qwen3_vl_text", num_attention_heads=4, num_hidden_layers=3,
        num_key_value_heads=2, rope_theta=5000000, tie_word_embeddings=True,
        rope_scaling={"mrope_interleaved": True, "mrope_section": [6, 3, 3],
                      "rope_type": "default"},
        vocab_size=max(ids.values()) + 1 + SPARE)
    vision = dict(
        deepstack_visual_indexes=[0, 1], depth=3, hidden_size=32, intermediate_size=48,
        initializer_range=0.1, model_type="qwen3_vl", num_heads=2, num_position_embeddings=64,
        out_hidden_size=64, patch_size=16, spatial_merge_size=2)
    write_json(folder / "config.json", token_ids(ids) | dict(
        model_type="qwen3_vl", text_config=text, tie_word_embeddings=True, vision_config=vision))
    write_json(folder / "preprocessor_config.json", dict(
        size={"longest_edge": 16777216, "shortest_edge": 65536}, patch_size=16,
        temporal_patch_size=2, merge_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3,
        processor_class="Qwen3VLProcessor", image_processor_type="Qwen2VLImageProcessorFast"))
    write_json(folder / "chat_template.json", {"chat_template": TEMPLATE_OF_QWEN3})


def write_weights(folder):
    """bfloat16 weights under the hub's names, in two shards with their index: no lm_head where it
    is tied. -> {name in transformers: tensor}"""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    state = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).state_dict()
    if config.tie_word_embeddings:
        state.pop("lm_head.weight")
    for name, weight in state.items():
        if weight.ndim == 1:                                 # no bias is zero
            weight = weight + 0.1 * torch.randn_like(weight)
        state[name] = weight.bfloat16()
    old = config.model_type == "qwen2_5_vl"
    weights = {hub_name(name) if old else name: weight for name, weight in state.items()}
    where = {}
    for i, file in enumerate(SHARDS):
        part = dict(list(weights.items())[i::2])
        safe_save_file(part, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})
    return state


def hub_name(name):
    """What the hub's files call a weight of transformers' Qwen2.5-VL; in Qwen3-VL's it is as it
    is."""
    if ".visual." in name:
        return name.removeprefix("model.")
    return name.replace(".language_model.", ".")


FAMILIES = {"Qwen2.5-VL-3B-Instruct": write_configs, "Qwen2.5-VL-7B-Instruct": write_configs,
            "Qwen3-VL-4B-Instruct": write_configs_of_qwen3}
QWEN, QWEN_7B, QWEN3 = FAMILIES
pytestmark = pytest.mark.slow
all_families = pytest.mark.parametrize("hub", FAMILIES, indirect=True)


@pytest.fixture(scope="module")
def hub(request, tmp_path_factory):
    """-> (the folder, the weights that were written to it)"""
    name = getattr(request, "param", QWEN)
    folder = tmp_path_factory.mktemp("hub") / name
    folder.mkdir()
    ids = write_tokenizer(folder)
    write_json(folder / "generation_config.json", dict(
        bos_token_id=ids["<|endoftext|>"], pad_token_id=ids["<|endoftext|>"], do_sample=True,
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]], temperature=1e-06))
    FAMILIES[name](folder, ids)
    if name == QWEN_7B:
        edit(folder / "config.json", tie_word_embeddings=False)
    return folder, write_weights(folder)


def edit(file, **fields):
    """Changes fields of a JSON file; None removes one."""
    made = json.loads(file.read_text()) | fields
    write_json(file, {key: value for key, value in made.items() if value is not None})


# ----------------------------------------------------------------------------------- the checkpoint

@all_families
def test_every_weight_arrives(hub):
    """Guards the hub's old names: a weight that finds no place is left random by transformers,
    without an error. The 7B has an output matrix of its own."""
    folder, written = hub
    state = load(str(folder), device="cpu").model.state_dict()
    assert set(written) | {"lm_head.weight"} == set(state)
    for name, weight in written.items():
        assert torch.equal(state[name], weight.float())


@pytest.mark.parametrize("hub, token_px, kv_shape, sizes", [
    (QWEN, 28, (2, 2, 16), {(20, 20): (56, 56), (8000, 4000): (5068, 2520)}),
    (QWEN3, 32, (3, 2, 24), {(200, 100): (384, 192), (9000, 4500): (5792, 2880)})],
    indirect=["hub"])
def test_numbers_of_the_checkpoint(hub, token_px, kv_shape, sizes):
    """Guards what depends on the real files: sizes of tokens and heads, two end tokens, spare rows
    of the embedding that stand for no token and could be sampled, and the bounds of the model
    input, which --max-pixels never raises."""
    policy, large = (load(str(hub[0]), device="cpu", max_pixels=most) for most in (None, 10**8))
    ids = {token: policy.tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    assert policy.image_token == ids["<|image_pad|>"]
    assert policy.token_px == token_px and policy.kv_shape == kv_shape
    assert policy.end_tokens == {ids["<|im_end|>"], ids["<|endoftext|>"]}
    size = len(policy.tokenizer)
    assert len(policy.forbidden) == size + SPARE and policy.forbidden[size:].all()
    unsaid = [ids[f"<|{name}|>"]
              for name in ("vision_start", "vision_end", "image_pad", "video_pad")]
    assert policy.forbidden[:size].nonzero()[:, 0].tolist() == sorted(unsaid)
    for size, expected in sizes.items():
        assert policy.input_size(*size) == large.input_size(*size) == expected
    with pytest.raises(UserError, match="1x201 px cannot be encoded"):
        policy.input_size(1, 201)


@pytest.mark.parametrize("fields, bounds", [
    (dict(size={"min_pixels": 3200, "max_pixels": 50_000}), (3200, 50_000)),
    (dict(size={"min_pixels": 60_000, "max_pixels": 50_000}), (50_000, 50_000)),
    (dict(size={"min_pixels": 1, "max_pixels": 2}, min_pixels=3400, max_pixels=52_000),
     (3400, 52_000))])
def test_the_bounds_of_the_model_input_under_all_their_names(fields, bounds, hub, tmp_path):
    """Guards preprocessor_config.json of several versions: bounds under another name were none, and
    the first image ended in a TypeError. A run's own bound is not what it saves."""
    folder = shutil.copytree(hub[0], tmp_path / "in")
    edit(folder / "preprocessor_config.json", **{"min_pixels": None, "max_pixels": None} | fields)
    load(str(folder), device="cpu", max_pixels=3136).save(tmp_path / "out")
    for path in (folder, tmp_path / "out"):
        size = load(str(path), device="cpu").image_processor.size
        assert (size["shortest_edge"], size["longest_edge"]) == bounds


def test_the_chat_of_the_real_template(hub, tmp_path):
    """Guards prompts and observations: a system message that the template adds by itself, an end
    token said twice; questions that hold special tokens; a template that only chat_template.json
    has, as in older checkpoints."""
    folder = shutil.copytree(hub[0], tmp_path / "older")
    edit(folder / "tokenizer_config.json", chat_template=None)
    policy = load(str(folder), device="cpu")
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]}
    image, begin = "<|vision_start|><|image_pad|><|vision_end|>", "<|im_start|>assistant\n"
    asked = f"<|im_start|>user\n{image}Which?<|im_end|>\n{begin}"
    for before, system in (([], STOCK), ([{"role": "system", "content": "Look."}], "Look.")):
        text = policy.render([*before, user])
        assert text == f"<|im_start|>system\n{system}<|im_end|>\n{asked}"
    observed = policy.reply([{"type": "text", "text": "here:"}])
    assert policy.decode(observed.ids) == f"\n<|im_start|>user\nhere:<|im_end|>\n{begin}"
    special = set(policy.tokenizer.convert_tokens_to_ids(SPECIAL))
    assert not special & set(policy.encode(policy.clean("".join(SPECIAL))))


@all_families
def test_what_we_save_is_what_we_loaded(hub, tmp_path):
    """Guards checkpoints on their way to others: weights, tokenizer, end tokens and bounds; and to
    the public code and its vLLM, which run transformers 4.57: of version 5's own names it makes a
    model without m-RoPE, an output matrix that is missing, and no tokenizer."""
    policy = load(str(hub[0]), device="cpu")
    policy.save(tmp_path / "out")
    again = load(str(tmp_path / "out"), device="cpu")
    state, same = policy.model.state_dict(), again.model.state_dict()
    assert set(state) == set(same)
    assert all(torch.equal(weight, same[name]) for name, weight in state.items())
    text = "<|im_start|>Où 17?<|im_end|>\n" + format_call((1, 2))
    assert again.tokenizer.get_vocab() == policy.tokenizer.get_vocab()
    assert again.tokenizer.chat_template == policy.tokenizer.chat_template
    assert again.encode(text) == policy.encode(text)
    assert again.end_tokens == policy.end_tokens
    assert again.image_processor.size == policy.image_processor.size
    rope = policy.text_config.rope_parameters
    assert again.text_config.rope_parameters == rope

    released, config = (read_json(folder / "config.json") for folder in (hub[0], tmp_path / "out"))
    text_config = config["text_config"]
    released_text = released.get("text_config", released)
    assert "rope_parameters" not in text_config
    for name in ("rope_scaling", "rope_theta"):
        assert text_config[name] == released_text[name]
    tied = released["tie_word_embeddings"]
    assert text_config["tie_word_embeddings"] is config["tie_word_embeddings"] is tied
    tokens = read_json(tmp_path / "out/tokenizer_config.json")
    assert tokens["additional_special_tokens"] == SPECIAL[1:]
    assert "extra_special_tokens" not in tokens


# -------------------------------------------------------------- its system message, its coordinates

OWN = "First point, then answer."


@pytest.fixture
def own(hub, tmp_path):
    """A checkpoint whose template has a system message, as released: the tokenizer keeps the stock
    one."""
    folder = shutil.copytree(hub[0], tmp_path / "own")
    template = TEMPLATE.replace(STOCK, OWN)
    write_json(folder / "chat_template.json", {"chat_template": template})
    return folder


def dialogue_of(folder, policy):
    args = SimpleNamespace(family="gui", training=False, mode="zoom", dialogue="")
    return make_dialogue(args, str(folder), policy)


def asked(policy, dialogue, question):
    return policy.decode(dialogue.prompt(policy, question)[0].ids)


@pytest.fixture
def wide():
    """A question about an image of 200x100 px."""
    return Question("Where?", [Image.new("RGB", (200, 100), "white")], (0, 0, 9, 9), "point")


def test_a_checkpoint_keeps_its_own_system_message(hub, own, wide):
    """Guards released checkpoints: their prompt stands in their chat template, and ours was put in
    its place. The stock sentence, which says nothing of a task, counts as none."""
    for folder, message, other in ((own, OWN, SYSTEM_PROMPTS["zoom"]),
                                   (hub[0], SYSTEM_PROMPTS["zoom"], STOCK)):
        policy = load(str(folder), max_pixels=7000, device="cpu")
        said = asked(policy, dialogue_of(folder, policy), wide)
        assert said.count("<|im_start|>system") == 1
        assert message in said and other not in said


@pytest.mark.parametrize("coordinates, limits, size", [
    ("input", dict(max_pixels=7000), (112, 56)),
    ("unrounded", dict(max_pixels=7000), (118, 59)),
    ("input", dict(max_image_side=110), (112, 56)),
    ("unrounded", dict(max_image_side=110), (110, 55)),
])
def test_both_systems_of_coordinates(coordinates, limits, size, hub, wide):
    """Guards points of the public code's checkpoints, which are of the image scaled to at most
    max_pixels, before its sides are rounded to whole tokens: read as points of the model input they
    lie up to 12 px away."""
    policy = load(str(hub[0]), **limits, device="cpu")
    dialogue = Dialogue(coordinates=coordinates, crop_half=10)
    (trace,) = dialogue.start(policy, wide, 1)
    assert trace.prompt.pictures[0].image.size == policy.input_size(200, 100)
    (frame,) = trace.frames
    assert frame.input_size == size and frame.original_size == (200, 100)
    assert frame.to_original((size[0] / 2, size[1] / 4)) == (100, 25)
    assert frame.to_input((100, 25)) == (size[0] / 2, size[1] / 4)
    trace.ids += policy.encode("<think>a</think>" + format_call((size[0] / 2, size[1] / 2)))
    dialogue.on_turn(policy, trace, False)
    left, top, right, bottom = trace.turns[0].crop
    assert (right - left, bottom - top) == (20, 20)
    assert abs(left + 10 - 100) <= 1 and abs(top + 10 - 50) <= 1


@pytest.mark.parametrize("hub", [QWEN3], indirect=True)
def test_qwen3_points_in_thousandths(hub, wide):
    """Guards the points of Qwen3-VL, from 0 to 1000 of width and height: read as pixels they would
    be anywhere. Texts that say the unit follow."""
    policy = load(str(hub[0]), max_pixels=7000, device="cpu")
    dialogue = dialogue_of(hub[0], policy)
    assert dialogue.coordinates == "thousandths"
    wide.hint = "Give a point, in pixels."
    said = asked(policy, dialogue, wide)
    assert said.count("in thousandths of width and height") == 2 and "in pixels" not in said
    (trace,) = dialogue.start(policy, wide, 1)
    assert trace.frames[0].to_input((50, 80)) == (250, 800)
    dialogue.crop_half = 10
    for point in ((500, 400), (999, 1001)):
        trace.ids += policy.encode("<think>a</think>" + format_call(point))
        trace.add(dialogue.on_turn(policy, trace, False))
    assert trace.turns[0].crop == (90, 30, 110, 50) and trace.turns[1].crop is None
    assert "(999, 1001) is outside the image, which is 1000 wide" in trace.turns[1].error


# --------------------------------------------------------------------- the scripts, on every format

TWO_IMAGES = talk("<image>" + SAT, "Yes, left", image=["image.png"] * 2)
EVERY_FORMAT = {      # name: file (and its folder), mode, rows
    "ViGoRL SFT": ("chains.json", "zoom", [SFT]),
    "ViGoRL evaluation or search": ("a.jsonl", "think", [TWO_IMAGES, talk(SEARCH, "C")]),
    "VisualProbe": ("val.json", "zoom", [PROBE]),
    "ViGoRL RL": ("vigorl_RL.jsonl", "zoom", [POINT_RL, ACTION_RL]),
    "V*Bench": ("test_questions.jsonl", "zoom", [VSTAR]),
    "RoboSpatial-Home": ("annotations.json", "grounded", ROBOSPATIAL),
    "ScreenSpot-Pro": ("pro/annotations/word.json", "zoom", [PRO]),
    "ScreenSpot or ScreenSpot-V2": ("screenspot_web.json", "direct", [SCREENSPOT]),
    "OS-Atlas": ("desktop.json", "grounded", [ATLAS]),
    "HR-Bench": ("hr_bench_4k.tsv", "zoom", [hr_bench()]),
}
# Points that traces look at: the first one is in every format's box or polygon, where the model
# input is 112x56 px.
POINTS, THOUSANDTHS = ((17, 20), (40, 30)), ((150, 350), (400, 300))
BOX = "(10, 20, 60, 80)"
TRAINED = [           # the rows' right answers, and how a file of traces writes them
    (QWEN, "ViGoRL RL", {"(17, 20)": BOX, "click [12]": "click [12]"}),
    (QWEN, "ViGoRL evaluation or search", {"Yes, left": "Yes, left", "C": "(C)"}),
    (QWEN, "RoboSpatial-Home", {"(17, 20)": BOX, "Yes": "Yes"}),
    (QWEN3, "ScreenSpot-Pro", {"(150, 350)": BOX})]
ROWS = 4              # of each file, of which one is held out
SMALL = ["--max-pixels", 7000, "--dialogue", "small.json"]
FEW = ["--turn-tokens", 3, "--response-tokens", 6]
TRAINING = [*SMALL, "--turn-tokens", 48, "--response-tokens", 120, "--traces", "traces.jsonl",
            "--sft-lr", 1e-2]
GRPO = ["--steps", 2, "--questions", 2, "--group", 4, "--n", 1, "--lr", 1e-3]


@pytest.fixture
def call(script, monkeypatch):
    """call(name, *arguments, code) -> what a script prints, or, where it is to fail, its error. A
    step of fine-tuning learns from two traces."""
    monkeypatch.setitem(fine_tune.__kwdefaults__, "batch", 2)
    return lambda *arguments, code=0: script(*arguments, code=code)[code > 0]


def write_task(data, name, **said):
    """A file of a format; and small.json, with small crops and what else is said of the dialogue.
    -> the task's flags"""
    file, mode, rows = EVERY_FORMAT[name]
    task = data(file, [numbered(rows[i % len(rows)], i) for i in range(ROWS)])
    if "/" in file:
        task = task.parent.parent
    write_json(data("small.json", []), {"crop_size": 56} | said)
    return ["--task", task, "--mode", mode, "--temperature", 0.8 if mode == "zoom" else 1.3]


def write_traces(data, task, answers, points, **parts):
    """Writes traces.jsonl, in the release's form: right, well-formed and grounded traces for each
    question, of a dialogue with these parts. Rewards of a policy that learnt them have to differ:
    in the mode zoom, there is one with a zoom call and one with two; in others, sampling is
    warmer."""
    _, file, _, mode, *_ = task
    pointing = f"<think>See {points[0]}.</think>\n"
    thought = {"direct": "", "grounded": pointing}.get(mode, "<think>So.</think>\n")
    calls = [pointing + format_call(point) for point in points]
    traces = []
    for question, (answer, truth) in zip(open_file(file), cycle(answers.items())):
        last = f"{thought}<answer> {answer} </answer>"
        images = list(map(str, question.images))
        for number in ((1, 2) if mode == "zoom" else (0,)):
            messages = messages_of(Dialogue(mode, **parts), question, [*calls[:number], last])
            traces.append({"messages": messages, "images": images, "gt_answer": truth})
    data("traces.jsonl", traces)


def numbered(row, i):
    """The row with an id of its own."""
    names = ("id", "question_id", "doc_id", "index")
    return row | {name: f"{row[name]}-{i}" for name in names if name in row}


def changed(a, b):
    """Which towers differ between two checkpoints: {"visual", "language_model"}, one, or none."""
    a, b = (load(str(folder), device="cpu").model.model.state_dict() for folder in (a, b))
    return {name.split(".")[0] for name in a if not torch.equal(a[name], b[name])}


@pytest.mark.parametrize("name", [name for name, *_ in FORMATS])
def test_evaluation_on_every_format(name, hub, call, data, tmp_path):
    """Guards the way of a real checkpoint and a real file through evaluation, in all four modes: a
    kind of answer that one of them cannot ask for or score."""
    task = write_task(data, name)
    out = call("evaluate", "--model", hub[0], *task, *SMALL, *FEW, "--json", "found.json")
    found = read_json(tmp_path / "found.json")
    assert f"{name}, {ROWS} questions" in out
    assert found["n"] == ROWS and 0 <= found["accuracy"] <= 1


@pytest.mark.parametrize("hub, name, answers", TRAINED, indirect=["hub"])
def test_training_on_answers_of_every_kind(name, answers, hub, call, data, tmp_path):
    """Guards the same way through fine-tuning and GRPO: a kind of answer that finds no reward;
    training that changes nothing, or the frozen vision tower, too; and points of Qwen3-VL, which
    are in thousandths with nothing said of its family."""
    task = write_task(data, name)
    unit, points = "input", POINTS
    if hub[0].name == QWEN3:
        unit, points = "thousandths", THOUSANDTHS
    write_traces(data, task, answers, points, coordinates=unit)
    out = call("train_rl", "--model", hub[0], *task, *TRAINING, *GRPO, "--sft-steps", 40,
               "--eval-task", task[1], "--out", "run")
    assert re.search(r"sft: (\d+) of \1 traces are", out) and "1 held-out" in out
    assert changed(hub[0], "run/sft") == changed("run/sft", "run/rl") == {"language_model"}
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert len(log) == 2 and sum(line["signal"] for line in log) > 0
    assert max(line["reward"] for line in log) > 0
    assert read_json(tmp_path / "run/rl/dialogue.json")["coordinates"] == unit


def test_from_fine_tuning_to_evaluation_as_the_checkpoint_speaks(own, call, data, tmp_path,
                                                                 monkeypatch):
    """Guards the way of a released checkpoint through fine-tuning, GRPO and evaluation: its own
    system message and its coordinates, said once by --dialogue, are those of every prompt and of
    what is saved; ours came in at the first saved checkpoint."""
    task = write_task(data, "ScreenSpot or ScreenSpot-V2", coordinates="unrounded")
    write_traces(data, task, {"(17, 20)": BOX}, POINTS, system_prompts={}, coordinates="unrounded")
    start, asked_of = Dialogue.start, []

    def noted(dialogue, policy, *rest):
        (trace, *others) = start(dialogue, policy, *rest)
        asked_of.append((policy.decode(trace.prompt.ids), trace.frames[0].input_size))
        return [trace, *others]
    monkeypatch.setattr(Dialogue, "start", noted)

    call("train_sft", "--model", own, *task, *TRAINING, "--sft-steps", 2, "--out", "run")
    call("train_rl", "--model", "run/sft", *task, "--max-pixels", 7000, *FEW, *GRPO,
         "--sft-steps", 0, "--eval-task", task[1], "--out", "rl")
    call("evaluate", "--model", "rl/rl", *task, "--max-pixels", 7000, *FEW)
    assert len(asked_of) > 8
    for text, size in asked_of:
        assert size == (118, 59)
        assert text.startswith(f"<|im_start|>system\n{OWN}<|im_end|>\n")
        assert text.count("<|im_start|>system") == 1
    for path in ("run/sft", "rl/sft", "rl/rl"):
        kept = read_json(tmp_path / path / "dialogue.json")
        assert kept["system_prompts"] == {} and kept["coordinates"] == "unrounded"
        assert kept["crop_size"] == 56


# ---------------------------------------------------------------------------------------- bad input

CONFIG, PIXELS, TEMPLATES = "config.json", "preprocessor_config.json", "chat_template.json"
TOKENIZER, ITS_CONFIG = "tokenizer.json", "tokenizer_config.json"
AGAIN, OTHER = "give a folder with", "give a checkpoint of Qwen2.5-VL, or of a dense Qwen3-VL"


def halve(file):
    file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])


def edit_weight(folder, value):
    """Sets a number of the first shard; None: removes its whole weight."""
    name = "visual.patch_embed.proj.weight"
    state = load_state_dict(folder / SHARDS[0])
    if value is None:
        del state[name]
    else:
        state[name].view(-1)[0] = value
    safe_save_file(state, folder / SHARDS[0], metadata={"format": "pt"})


def lose_the_template(folder):
    (folder / TEMPLATES).unlink()
    edit(folder / ITS_CONFIG, chat_template=None)


@pytest.mark.parametrize("harm, message", [
    (shutil.rmtree, [CONFIG, AGAIN]),
    (lambda f: edit(f / CONFIG, model_type="qwen3_vl_moe", vision_config=None),
     ["'qwen3_vl_moe'", OTHER]),
    (lambda f: halve(f / CONFIG), [CONFIG, AGAIN]),
    (lambda f: halve(f / SHARDS[1]), [f"{SHARDS[1]}: ", AGAIN]),
    (lambda f: (f / SHARDS[1]).unlink(), [SHARDS[1], AGAIN]),
    (lambda f: edit_weight(f, None), ["1 weights are missing", "patch_embed.proj.weight"]),
    (lambda f: edit_weight(f, math.nan), ["weights are not finite"]),
    (lambda f: edit(f / CONFIG, intermediate_size=80), ["6 weights", "of another size"]),
    (lambda f: halve(f / TOKENIZER), ["tokenizer", AGAIN]),
    (lambda f: (f / TOKENIZER).unlink(), ["<|image_pad|> is", "put tokenizer.json"]),
    (lambda f: (f / ITS_CONFIG).unlink(), ["'<|endoftext|>'", "'<|im_end|>'", ITS_CONFIG]),
    (lose_the_template, ["chat template is missing", TEMPLATES]),
    (lambda f: edit(f / TEMPLATES, chat_template=TEMPLATE[:400]), ["chat template cannot be read"]),
    (lambda f: edit(f / PIXELS, image_std=[0, 1, 1]), [PIXELS, "not finite"]),
    (lambda f: edit(f / PIXELS, patch_size=16), [PIXELS, "(14, 2)", "get it again"]),
    (lambda f: edit(f / PIXELS, min_pixels=None, max_pixels=None, size={"shortest_edge": 56}),
     [PIXELS, "longest_edge", "get it again"])])
def test_bad_checkpoints_are_told_in_a_line(harm, message, hub, call, data, tmp_path):
    """Guards against tracebacks, and worse: transformers goes on with random weights for those that
    a folder lacks, and with an empty tokenizer where there is none."""
    harm(shutil.copytree(hub[0], tmp_path / "bad"))
    task = data("a.jsonl", [talk(SAT, "No")])
    err = call("evaluate", "--model", tmp_path / "bad", "--task", task, code=2)
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert str(tmp_path / "bad") in err and all(part in err for part in message), err
