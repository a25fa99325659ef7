"""Proof without weights: a folder laid out as the hub has Qwen2.5-VL-3B-Instruct, in small, through every script and every
data format. What is at stake: what works on checkpoints that we wrote ourselves, and fails on those that others did."""
import json
import shutil

import pytest
import torch
from PIL import Image
from transformers import (AddedToken, AutoConfig, AutoModelForImageTextToText, AutoTokenizer,
                          Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer)
from transformers.modeling_utils import load_state_dict, safe_save_file

import evaluate
import model as models
from conftest import (ACTION_RL, ATLAS, POINT_RL, PRO, PROBE, ROBOSPATIAL, SAT, SCREENSPOT, SEARCH, SFT, VSTAR, converse,
                      draw, hr_bench, plain_log_probs, prompts, recorded, talk)
from model import Engine
from rollout import SYSTEM_PROMPTS, call_text

# ------------------------------------------------------------------------------------------------ the hub's folder, in small

SPECIAL = [f"<|{name}|>" for name in ("endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start "
                                      "quad_end vision_start vision_end vision_pad image_pad video_pad").split()]
PLAIN = ["<tool_call>", "</tool_call>", *(f"<|{name}|>" for name in
                                          "fim_prefix fim_middle fim_suffix fim_pad repo_name file_sep".split())]
TEMPLATE = """\
{%- set seen = namespace(images=0, videos=0) -%}
{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif -%}
{%- for message in messages -%}
  {{- '<|im_start|>' + message.role + '\\n' -}}
  {%- if message.content is string %}{{ message.content }}{% else -%}
    {%- for part in message.content -%}
      {%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}
        {%- set seen.images = seen.images + 1 -%}
        {%- if add_vision_id %}{{ 'Picture ' + seen.images|string + ': ' }}{% endif -%}
        {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
      {%- elif part.type == 'video' or 'video' in part -%}
        {%- set seen.videos = seen.videos + 1 -%}
        {%- if add_vision_id %}{{ 'Video ' + seen.videos|string + ': ' }}{% endif -%}
        {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
      {%- elif 'text' in part %}{{ part.text }}{% endif -%}
    {%- endfor -%}
  {%- endif -%}
  {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""
SPARE = 21      # rows of the embedding beyond the tokenizer's last token (151,936 - 151,665 of them in the real one)


def write_tokenizer(folder):
    """Byte-level BPE, trained on a few words of ours, as the five files of the hub. -> {special or added token: id}"""
    words = [*SYSTEM_PROMPTS.values(), "<answer>", "</answer>", "<think>", "</think>\n", call_text((1, 2))] * 3
    trained = Qwen2Tokenizer(vocab={}, merges=[]).train_new_from_iterator(words, vocab_size=600, show_progress=False)
    tokenizer = trained.backend_tokenizer
    whole = json.loads(tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(whole["vocab"], ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(" ".join(pair) + "\n" for pair in whole["merges"]))
    trained.add_tokens([AddedToken(token, special=token in SPECIAL, normalized=False) for token in SPECIAL + PLAIN])
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL + PLAIN}
    tokenizer.save(str(folder / "tokenizer.json"))
    flags = dict(lstrip=False, normalized=False, rstrip=False, single_word=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(
        added_tokens_decoder={i: dict(content=t, special=t in SPECIAL, **flags) for t, i in ids.items()}, add_bos_token=False,
        add_prefix_space=False, additional_special_tokens=SPECIAL[1:], bos_token=None, unk_token=None, chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False, eos_token="<|im_end|>", errors="replace", model_max_length=131072,
        pad_token="<|endoftext|>", split_special_tokens=False, tokenizer_class="Qwen2Tokenizer")))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return ids


def write_configs(folder, ids):
    """config.json in the flat layout of the hub's, generation_config.json and preprocessor_config.json, with their fields."""
    vision = dict(depth=2, hidden_act="silu", hidden_size=32, intermediate_size=48, num_heads=2, in_chans=3, out_hidden_size=64,
                  patch_size=14, spatial_merge_size=2, spatial_patch_size=14, window_size=112, fullatt_block_indexes=[1],
                  tokens_per_second=2, temporal_patch_size=2)
    (folder / "config.json").write_text(json.dumps(dict(
        architectures=["Qwen2_5_VLForConditionalGeneration"], attention_dropout=0.0,
        bos_token_id=ids["<|endoftext|>"], eos_token_id=ids["<|im_end|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        vision_token_id=ids["<|vision_pad|>"], image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        hidden_act="silu", hidden_size=64, initializer_range=0.1, intermediate_size=96, max_position_embeddings=128000,
        max_window_layers=2, model_type="qwen2_5_vl", num_attention_heads=4, num_hidden_layers=2, num_key_value_heads=2,
        rms_norm_eps=1e-06, rope_theta=1000000.0, sliding_window=32768, tie_word_embeddings=True, torch_dtype="bfloat16",
        transformers_version="4.41.2", use_cache=True, use_sliding_window=False, vision_config=vision,
        rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]}, vocab_size=max(ids.values()) + 1 + SPARE), indent=2))
    (folder / "generation_config.json").write_text(json.dumps(dict(
        bos_token_id=ids["<|endoftext|>"], pad_token_id=ids["<|endoftext|>"], do_sample=True, repetition_penalty=1.05,
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]], temperature=1e-06, transformers_version="4.49.0")))
    (folder / "preprocessor_config.json").write_text(json.dumps(dict(
        min_pixels=3136, max_pixels=12845056, patch_size=14, temporal_patch_size=2, merge_size=2,
        image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711],
        image_processor_type="Qwen2VLImageProcessor", processor_class="Qwen2_5_VLProcessor")))


def write_weights(folder):
    """bfloat16 weights under the hub's names, in two shards with their index: no lm_head, for it is tied. -> {name: tensor}"""
    torch.manual_seed(0)
    weights = Qwen2_5_VLForConditionalGeneration(AutoConfig.from_pretrained(folder)).state_dict()
    weights.pop("lm_head.weight")
    weights = {name.removeprefix("model.") if ".visual." in name else name.replace(".language_model.", "."):
               (w + 0.1 * torch.randn_like(w) * (w.ndim == 1)).bfloat16() for name, w in weights.items()}   # no bias is zero
    files, where = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)], {}
    for i, file in enumerate(files):
        part = dict(list(weights.items())[i::2])
        safe_save_file(part, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    size = sum(w.nbytes for w in weights.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": where}))
    return weights


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """-> (the folder, the weights that were written to it)"""
    folder = tmp_path_factory.mktemp("hub") / "Qwen2.5-VL-3B-Instruct"
    folder.mkdir()
    write_configs(folder, write_tokenizer(folder))
    return folder, write_weights(folder)


def edit(file, **fields):
    """Changes fields of a JSON file; None removes one."""
    made = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({key: value for key, value in made.items() if value is not None}))


def our_name(name):
    """Where transformers keeps what the hub's files call `name`."""
    return f"model.{name}" if name.startswith("visual.") else name.replace("model.", "model.language_model.")


# ------------------------------------------------------------------------------------------------ the checkpoint

def test_every_weight_arrives(hub):
    """Guards the hub's old names: a weight that finds no place is left random by transformers, without an error."""
    folder, written = hub
    state = models.load(str(folder), device="cpu").model.state_dict()
    assert {our_name(name) for name in written} == set(state) - {"lm_head.weight"}
    assert all(torch.equal(state[our_name(name)], weight.float()) for name, weight in written.items())
    assert torch.equal(state["lm_head.weight"], written["model.embed_tokens.weight"].float())      # tied


def test_numbers_of_the_checkpoint(hub):
    """Guards what depends on the real files: factor 28, two end tokens, spare rows of the embedding that stand for no token
    and could be sampled, and the bounds of what is seen, from the file or from --max-pixels."""
    folder, _ = hub
    policy = models.load(str(folder), device="cpu")
    ids, size = dict(zip(SPECIAL, policy.tokenizer.convert_tokens_to_ids(SPECIAL))), len(policy.tokenizer)
    assert policy.factor == 28 and policy.image_token == ids["<|image_pad|>"]
    assert policy.end_tokens == {ids["<|im_end|>"], ids["<|endoftext|>"]}
    assert len(policy.forbidden) == size + SPARE and policy.forbidden[size:].all()
    unsaid = {ids[f"<|{name}|>"] for name in ("vision_start", "vision_end", "image_pad", "video_pad")}
    assert set(policy.forbidden[:size].nonzero()[:, 0].tolist()) == unsaid
    assert policy.seen_size(20, 20) == (56, 56) and policy.seen_size(8000, 4000) == (5068, 2520)
    small = models.load(str(folder), max_pixels=7000, device="cpu")
    assert small.seen_size(200, 100) == (112, 56)
    assert small.picture(Image.new("RGB", (200, 100))).tokens == 8


def test_the_chat_of_the_real_template(hub, tmp_path):
    """Guards prompts and observations: a system message that the template adds by itself, an end token said twice; questions
    that hold special tokens; a template that only chat_template.json has, as in older checkpoints."""
    folder, _ = hub
    policy = models.load(str(folder), device="cpu")
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]}
    asked = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Which?<|im_end|>\n<|im_start|>assistant\n"
    system = "<|im_start|>system\n{}<|im_end|>\n"
    assert policy.render([user]) == system.format("You are a helpful assistant.") + asked
    assert policy.render([{"role": "system", "content": "Look."}, user]) == system.format("Look.") + asked
    observed = policy.reply([{"type": "text", "text": "here:"}])
    assert policy.decode(observed.ids) == "\n<|im_start|>user\nhere:<|im_end|>\n<|im_start|>assistant\n"
    assert not set(policy.encode(policy.clean("".join(SPECIAL)))) & set(policy.tokenizer.convert_tokens_to_ids(SPECIAL))
    shutil.copytree(folder, tmp_path / "older")
    edit(tmp_path / "older/tokenizer_config.json", chat_template=None)
    assert models.load(str(tmp_path / "older"), device="cpu").render([user]) == policy.render([user])


def test_engine_and_training_equal_a_plain_forward_with_grouped_queries(hub):
    """Guards the attention layouts where several query heads share a K/V head, which the tiny base's do not."""
    folder, _ = hub
    policy = models.load(str(folder), max_pixels=128 * 128, device="cpu")
    policy.end_tokens = set(range(0, policy.text_config.vocab_size, 8))
    engine = Engine(policy, turn_tokens=8, response_tokens=60, cache_tokens=900)
    jobs = list(engine.run(prompts(policy, 4, 3, seed=1), converse(policy, 2)))
    plain = torch.cat([plain_log_probs(folder, policy, sequence) for job in jobs for sequence in job])
    with torch.no_grad():
        trained = policy.log_probs(jobs)
    assert any(s.pictures for job in jobs for s in job) and len(plain) > 60
    assert torch.allclose(recorded(jobs), plain, atol=1e-4) and torch.allclose(trained, plain, atol=1e-4)


def test_what_we_save_is_what_we_loaded(hub, tmp_path):
    """Guards checkpoints on their way to others: weights, tokenizer, end tokens, bounds and template, through `Policy.save`."""
    folder, _ = hub
    policy = models.load(str(folder), device="cpu")
    policy.save(tmp_path / "out")
    again = models.load(str(tmp_path / "out"), device="cpu")
    state = policy.model.state_dict()
    for model in (again.model, AutoModelForImageTextToText.from_pretrained(tmp_path / "out")):
        assert set(model.state_dict()) == set(state)
        assert all(torch.equal(weight, state[name]) for name, weight in model.state_dict().items())
    text = "<|im_start|>Où 17?<|im_end|>\n" + call_text((1, 2))
    for tokenizer in (again.tokenizer, AutoTokenizer.from_pretrained(tmp_path / "out")):
        assert tokenizer.get_vocab() == policy.tokenizer.get_vocab() and tokenizer.chat_template == TEMPLATE
        assert tokenizer.encode(text) == policy.tokenizer.encode(text) and tokenizer.decode(tokenizer.encode(text)) == text
    assert (again.end_tokens, again.image_processor.size) == (policy.end_tokens, policy.image_processor.size)
    assert again.factor == 28 and (again.forbidden == policy.forbidden).all()


def test_an_output_matrix_of_its_own(hub, tmp_path):
    """Guards the 7B, whose embedding and output matrix are two: read as tied, its logits would be nonsense."""
    folder, written = hub
    shutil.copytree(folder, tmp_path / "7B")
    edit(tmp_path / "7B/config.json", tie_word_embeddings=False)
    shard, head = "model-00001-of-00002.safetensors", torch.randn_like(written["model.embed_tokens.weight"])
    safe_save_file(load_state_dict(folder / shard) | {"lm_head.weight": head}, tmp_path / "7B" / shard, metadata={"format": "pt"})
    index = tmp_path / "7B/model.safetensors.index.json"
    edit(index, weight_map=json.loads(index.read_text())["weight_map"] | {"lm_head.weight": shard})
    models.load(str(tmp_path / "7B"), device="cpu").save(tmp_path / "out")
    for path in (tmp_path / "7B", tmp_path / "out"):
        model = models.load(str(path), device="cpu").model
        assert torch.equal(model.lm_head.weight, head.float())
        assert torch.equal(model.model.language_model.embed_tokens.weight, written["model.embed_tokens.weight"].float())


# ------------------------------------------------------------------------------------------------ the scripts, on every format

SPOT = "(17, 20)"     # in every format's box or polygon, where the 200x100 image is seen as 112x56
EVERY_FORMAT = {      # name: the file, or the folder and a file in it; how it is answered; rows, and their right answers
    "ViGoRL SFT": ("chains.json", "zoom", [SFT], ["A"]),
    "ViGoRL evaluation or search": ("a.jsonl", "think", [talk(SAT, "Yes, left"), talk(SEARCH, "C")], ["Yes, left", "C"]),
    "VisualProbe": ("val.json", "zoom", [PROBE], ["EXIT"]),
    "ViGoRL RL": ("vigorl_RL.jsonl", "zoom", [POINT_RL, ACTION_RL], [SPOT, "click [12]"]),
    "V*Bench": ("test_questions.jsonl", "zoom", [VSTAR], ["A"]),
    "RoboSpatial-Home": ("annotations.json", "grounded", ROBOSPATIAL, [SPOT, "Yes"]),
    "ScreenSpot-Pro": ("pro/annotations/word.json", "zoom", [PRO], [SPOT]),
    "ScreenSpot or ScreenSpot-V2": ("screenspot_web.json", "direct", [SCREENSPOT], [SPOT]),
    "OS-Atlas": ("desktop.json", "grounded", [ATLAS], [SPOT]),
    "HR-Bench": ("hr_bench_4k.tsv", "zoom", [hr_bench()], ["C"]),
}
ROWS = 4              # of each file, of which one is held out
SMALL = ["--max-pixels", 7000, "--crop-size", 56]
TRAINING = [*SMALL, "--turn-tokens", 48, "--response-tokens", 120, "--search-questions", 3, "--traces", "given.jsonl",
            "--sft-steps", 40, "--sft-batch", 2, "--sft-lr", 1e-2]
GRPO = [*TRAINING, "--steps", 2, "--questions", 2, "--group", 4, "--eval-n", 1]


@pytest.fixture
def call(script):
    """call(name, *arguments, code) -> what a script prints, or where it is to fail, what it says of it."""
    return lambda *arguments, code=0: script(*arguments, code=code)[code > 0]


def write_task(data, name):
    """A file of a format, and beside it given.jsonl with two traces for each question to train on: one well-formed, and one
    without its thought and with words outside of its tags, so that a policy which learnt both earns unequal rewards.
    -> the flags of the task"""
    file, mode, rows, answers = EVERY_FORMAT[name]
    rows = [{key: f"{value}-{i}" if key in ("id", "question_id", "doc_id", "index") else value
             for key, value in rows[i % len(rows)].items()} for i in range(ROWS)]
    task = data(file, rows)
    task = task.parent.parent if "/" in file else task
    look = [f"<think>See {SPOT}.</think>\n{call_text((17, 20))}"] if mode == "zoom" else []
    thought = {"direct": "", "grounded": f"<think>See {SPOT}.</think>\n"}.get(mode, "<think>So.</think>\n")
    questions = evaluate.read_questions(task)
    data("given.jsonl", [{"id": questions[i].id, "turns": [*look, f"{words}<answer>{answers[i % len(answers)]}</answer>"]}
                         for i in evaluate.shuffled(ROWS, 0)[1:] for words in (thought, "So: ")])
    return ["--task", task, "--mode", mode]


def changed(a, b):
    """Which towers differ between two checkpoints: {"visual", "language_model"}, one of them, or none."""
    a, b = (models.load(str(folder), device="cpu").model.model.state_dict() for folder in (a, b))
    return {name.split(".")[0] for name in a if not torch.equal(a[name], b[name])}


def test_no_format_is_left_out():
    """Guards this file: a format without its row in the table is never run."""
    assert set(EVERY_FORMAT) == {name for name, *_ in evaluate.FORMATS}


@pytest.mark.parametrize("name", EVERY_FORMAT)
def test_every_script_on_every_format(name, hub, call, data, tmp_path):
    """Guards the way of a real checkpoint and a real file through evaluation, fine-tuning and GRPO, in all four modes: a kind
    of answer that one of them cannot ask for or score; training that changes nothing, or the frozen vision tower too."""
    folder = hub[0]
    common = ["--model", folder, *write_task(data, name)]
    out = call("evaluate", *common, *SMALL, "--turn-tokens", 3, "--response-tokens", 6, "--json", "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert f"{name}, {ROWS} questions" in out and found["n"] == ROWS and 0 <= found["accuracy"] <= 1
    out = call("train_sft", *common, *TRAINING, "--out", "run")
    assert "6 of 6 traces are whole and right" in out
    assert changed(folder, "run/sft") == {"language_model"}
    out = call("train_rl", *common, *GRPO, "--out", "run")
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert len(log) == 2 and sum(line["groups_used"] for line in log) > 0 and "1 held-out" in out
    assert changed("run/sft", "run/rl") == {"language_model"}


def test_train_vision(hub, call, data, tmp_path):
    """Guards --train-vision: a vision tower that stays frozen all the same, in either stage."""
    task = write_task(data, "ScreenSpot or ScreenSpot-V2")
    call("train_rl", "--model", hub[0], *task, "--train-vision", *GRPO, "--out", "run")
    assert changed(hub[0], "run/sft") == changed("run/sft", "run/rl") == {"visual", "language_model"}


# ------------------------------------------------------------------------------------------------ bad input

def told(err):
    """The one line of an error, without a traceback."""
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


GOOD = talk(SAT, "No")


@pytest.mark.parametrize("name, rows, message", [
    ("a.jsonl", [GOOD, talk(SAT, "No", image="gone.png")], ["gone.png", "a.jsonl:2", "no such image", "--image-root"]),
    ("a.jsonl", [GOOD, talk(SAT, "No", image="cut.png")], ["cut.png", "a.jsonl:2", "cannot be read as an image", "replace"]),
    ("a.jsonl", [GOOD, talk(SAT, "No", image="huge.ppm")], ["huge.ppm", "a.jsonl:2", "60000x60000 px", "scale it down"]),
    ("o.json", [ATLAS | {"img_filename": "huge.ppm"}], ["huge.ppm", "o.json:1", "60000x60000 px", "scale it down"]),
    ("a.jsonl", [GOOD, "{"], ["a.jsonl:2", "cannot be read", "mend or remove it"]),
    ("a.jsonl", [{"picture": "image.png", "caption": "a cup"}], ["a.jsonl:1", "its fields are caption, picture", "Known are"]),
    ("a.jsonl", [talk("Where?", "(3, 4)")], ["a.jsonl:1", "(3, 4), is neither in words nor a box"]),
    ("a.parquet", [GOOD], ["a.parquet", "take the .jsonl files"])])
def test_bad_data_is_told_in_a_line(name, rows, message, hub, call, data, tmp_path):
    """Guards against tracebacks from the midst of an evaluation, and gigabytes of pixels decoded before they are counted."""
    (tmp_path / "cut.png").write_bytes(draw(tmp_path / "whole.png").read_bytes()[:90])
    (tmp_path / "huge.ppm").write_bytes(b"P6 60000 60000 255\n")
    (tmp_path / name).write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    draw(tmp_path / "image.png")
    few = [*SMALL, "--turn-tokens", 2, "--response-tokens", 4]
    err = told(call("evaluate", "--model", hub[0], "--task", tmp_path / name, *few, code=2))
    assert all(part in err for part in message), err


TOKENIZER = ["tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt"]


def halve(file):
    file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])


def remove(folder, *files):
    for file in files:
        (folder / file).unlink()


def lose_a_weight(folder):
    shard = folder / "model-00001-of-00002.safetensors"
    kept = {name: weight for name, weight in load_state_dict(shard).items() if name != "visual.patch_embed.proj.weight"}
    safe_save_file(kept, shard, metadata={"format": "pt"})


def lose_the_template(folder):
    remove(folder, "chat_template.json")
    edit(folder / "tokenizer_config.json", chat_template=None)


@pytest.mark.parametrize("harm, message", [
    (lambda f: edit(f / "config.json", model_type="qwen2_vl"), ["'qwen2_vl'", "checkpoint of that family"]),
    (lambda f: edit(f / "config.json", model_type="llama", vision_config=None), ["'llama'", "checkpoint of that family"]),
    (lambda f: edit(f / "config.json", model_type="qwen2", vision_config=None), ["'qwen2'", "checkpoint of that family"]),
    (lambda f: halve(f / "config.json"), ["config.json", "give a folder with"]),
    (lambda f: halve(f / "model-00002-of-00002.safetensors"), ["model-00002-of-00002.safetensors: ", "whole weights"]),
    (lambda f: remove(f, "model-00002-of-00002.safetensors"), ["model-00002-of-00002.safetensors", "whole weights"]),
    (lose_a_weight, ["1 weights are missing", "patch_embed.proj.weight", "the whole checkpoint"]),
    (lambda f: edit(f / "config.json", num_hidden_layers=3), ["12 weights are missing", "layers.2.", "the whole checkpoint"]),
    (lambda f: edit(f / "config.json", intermediate_size=80), ["6 weights", "of another size", "the whole checkpoint"]),
    (lambda f: remove(f, "preprocessor_config.json"), ["preprocessor_config.json"]),
    (lambda f: remove(f, *TOKENIZER), ["(1 tokens)", "put tokenizer.json"]),
    (lambda f: remove(f, *TOKENIZER[1:]), ["(22 tokens)", "put tokenizer.json"]),
    (lose_the_template, ["chat template is missing", "chat_template.json"])])
def test_bad_checkpoints_are_told_in_a_line(harm, message, hub, call, data, tmp_path):
    """Guards against tracebacks, and worse: transformers goes on with random weights for those that a folder lacks, and with an
    empty tokenizer where there is none."""
    harm(shutil.copytree(hub[0], tmp_path / "bad"))
    err = told(call("evaluate", "--model", tmp_path / "bad", "--task", data("a.jsonl", [GOOD]), code=2))
    assert str(tmp_path / "bad") in err and all(part in err for part in message), err
