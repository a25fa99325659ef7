"""Proof without weights: folders laid out as the hub has Qwen2.5-VL-3B-Instruct and
Qwen3-VL-4B-Instruct, in small, through every script and every data format. What is at stake: what
works on checkpoints that we wrote ourselves, and fails on those that others did."""
import json
import math
import re
import shutil
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
    converse,
    hr_bench,
    plain_log_probs,
    prompts,
    recorded,
    remember_images,
    talk,
)
from PIL import Image
from transformers import (
    AddedToken,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Qwen2Tokenizer,
)
from transformers.modeling_utils import load_state_dict, safe_save_file

from evaluate import FORMATS, open_file
from model import Engine, Policy, load
from rollout import SYSTEM_PROMPTS, Dialogue, Question, format_call, make_dialogue
from train_sft import fine_tune, messages_of

# ----------------------------------------------------------------------- the hub's folder, in small

SPECIAL = [f"<|{name}|>" for name in (
    "endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end", "box_start", "box_end",
    "quad_start", "quad_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")]
PLAIN = ["<tool_call>", "</tool_call>", *(f"<|{name}|>" for name in (
    "fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep"))]
STOCK = "You are a helpful assistant."
TEMPLATE = """\
{%- set seen = namespace(images=0, videos=0) -%}
{%- if messages[0].role != 'system' -%}
  {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
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
# Qwen3-VL's adds no system message.
TEMPLATE_OF_QWEN3 = re.sub(r"{%- if messages.*?endif -%}\n", "", TEMPLATE, count=1, flags=re.S)
SPARE = 21      # rows of the embedding beyond the tokenizer's last token (271 in the real one)


def write_tokenizer(folder):
    """Byte-level BPE, trained on a few words of ours, as the five files of the hub.
    -> {special or added token: id}"""
    words = [*SYSTEM_PROMPTS.values(), "<answer>", "</answer>", "<think>", "</think>\n",
             format_call((1, 2))]
    empty = Qwen2Tokenizer(vocab={}, merges=[])
    trained = empty.train_new_from_iterator(words * 3, vocab_size=600, show_progress=False)
    tokenizer = trained.backend_tokenizer
    parts = json.loads(tokenizer.to_str())["model"]
    write_json(folder / "vocab.json", parts["vocab"])
    merges = "".join(" ".join(pair) + "\n" for pair in parts["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges)
    trained.add_tokens([AddedToken(token, special=token in SPECIAL, normalized=False)
                        for token in SPECIAL + PLAIN])
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL + PLAIN}
    tokenizer.save(str(folder / "tokenizer.json"))
    flags = dict(lstrip=False, normalized=False, rstrip=False, single_word=False)
    added = {i: dict(content=token, special=token in SPECIAL, **flags) for token, i in ids.items()}
    write_json(folder / "tokenizer_config.json", dict(
        added_tokens_decoder=added, add_bos_token=False, add_prefix_space=False,
        additional_special_tokens=SPECIAL[1:], bos_token=None, unk_token=None,
        chat_template=TEMPLATE, clean_up_tokenization_spaces=False, eos_token="<|im_end|>",
        errors="replace", model_max_length=131072, pad_token="<|endoftext|>",
        split_special_tokens=False, tokenizer_class="Qwen2Tokenizer"))
    write_json(folder / "chat_template.json", {"chat_template": TEMPLATE})
    return ids


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False))


def write_configs(folder, ids):
    """config.json in the flat layout of the hub's, generation_config.json and
    preprocessor_config.json, with their fields."""
    vision = dict(
        depth=2, hidden_act="silu", hidden_size=32, intermediate_size=48, num_heads=2, in_chans=3,
        out_hidden_size=64, patch_size=14, spatial_merge_size=2, spatial_patch_size=14,
        window_size=112, fullatt_block_indexes=[1], tokens_per_second=2, temporal_patch_size=2)
    write_json(folder / "config.json", dict(
        architectures=["Qwen2_5_VLForConditionalGeneration"], attention_dropout=0.0,
        bos_token_id=ids["<|endoftext|>"], eos_token_id=ids["<|im_end|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        vision_token_id=ids["<|vision_pad|>"], image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"], hidden_act="silu", hidden_size=64,
        initializer_range=0.1, intermediate_size=96, max_position_embeddings=128000,
        max_window_layers=2, model_type="qwen2_5_vl", num_attention_heads=4, num_hidden_layers=2,
        num_key_value_heads=2, rms_norm_eps=1e-06, rope_theta=1000000.0, sliding_window=32768,
        tie_word_embeddings=True, torch_dtype="bfloat16", transformers_version="4.41.2",
        use_cache=True, use_sliding_window=False, vision_config=vision,
        rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]},
        vocab_size=max(ids.values()) + 1 + SPARE))
    write_json(folder / "generation_config.json", dict(
        bos_token_id=ids["<|endoftext|>"], pad_token_id=ids["<|endoftext|>"], do_sample=True,
        repetition_penalty=1.05, eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]],
        temperature=1e-06, transformers_version="4.49.0"))
    write_json(folder / "preprocessor_config.json", dict(
        min_pixels=3136, max_pixels=12845056, patch_size=14, temporal_patch_size=2, merge_size=2,
        image_mean=[0.48145466, 0.4578275, 0.40821073],
        image_std=[0.26862954, 0.26130258, 0.27577711],
        image_processor_type="Qwen2VLImageProcessor", processor_class="Qwen2_5_VLProcessor"))


def write_configs_of_qwen3(folder, ids):
    """The same of Qwen3-VL: nested, heads that are no share of the hidden size, DeepStack."""
    text = dict(
        attention_bias=False, attention_dropout=0.0, bos_token_id=ids["<|endoftext|>"],
        dtype="bfloat16", eos_token_id=ids["<|im_end|>"], head_dim=24, hidden_act="silu",
        hidden_size=64, initializer_range=0.1, intermediate_size=96, max_position_embeddings=262144,
        model_type="qwen3_vl_text", num_attention_heads=4, num_hidden_layers=3,
        num_key_value_heads=2, rms_norm_eps=1e-06, rope_theta=5000000, tie_word_embeddings=True,
        rope_scaling={"mrope_interleaved": True, "mrope_section": [6, 3, 3],
                      "rope_type": "default"},
        use_cache=True, vocab_size=max(ids.values()) + 1 + SPARE)
    vision = dict(
        deepstack_visual_indexes=[0, 1], depth=3, hidden_act="gelu_pytorch_tanh", hidden_size=32,
        in_channels=3, initializer_range=0.1, intermediate_size=48, model_type="qwen3_vl",
        num_heads=2, num_position_embeddings=64, out_hidden_size=64, patch_size=16,
        spatial_merge_size=2, temporal_patch_size=2)
    write_json(folder / "config.json", dict(
        architectures=["Qwen3VLForConditionalGeneration"], image_token_id=ids["<|image_pad|>"],
        model_type="qwen3_vl", text_config=text, tie_word_embeddings=True,
        transformers_version="4.57.0.dev0", video_token_id=ids["<|video_pad|>"],
        vision_config=vision, vision_end_token_id=ids["<|vision_end|>"],
        vision_start_token_id=ids["<|vision_start|>"]))
    write_json(folder / "generation_config.json", dict(
        bos_token_id=ids["<|endoftext|>"], pad_token_id=ids["<|endoftext|>"], do_sample=True,
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]], top_k=20, top_p=0.8,
        repetition_penalty=1.0, temperature=0.7, transformers_version="4.56.0"))
    write_json(folder / "preprocessor_config.json", dict(
        size={"longest_edge": 16777216, "shortest_edge": 65536}, patch_size=16,
        temporal_patch_size=2, merge_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3,
        processor_class="Qwen3VLProcessor", image_processor_type="Qwen2VLImageProcessorFast"))
    write_json(folder / "chat_template.json", {"chat_template": TEMPLATE_OF_QWEN3})
    edit(folder / "tokenizer_config.json", chat_template=TEMPLATE_OF_QWEN3)


def write_weights(folder):
    """bfloat16 weights under the hub's names, in two shards with their index: no lm_head, for it is
    tied. -> {name: tensor}"""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    state = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).state_dict()
    state.pop("lm_head.weight")
    weights = {}
    for name, weight in state.items():
        if weight.ndim == 1:                                 # no bias is zero
            weight = weight + 0.1 * torch.randn_like(weight)
        old_name = hub_name(name) if config.model_type == "qwen2_5_vl" else name
        weights[old_name] = weight.bfloat16()
    where = {}
    for i in range(2):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        part = dict(list(weights.items())[i::2])
        safe_save_file(part, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    size = sum(weight.nbytes for weight in weights.values())
    write_json(folder / "model.safetensors.index.json",
               {"metadata": {"total_size": size}, "weight_map": where})
    return weights


def hub_name(name):
    """What the hub's files call a weight of transformers' Qwen2.5-VL; in Qwen3-VL's it is as it
    is."""
    if ".visual." in name:
        return name.removeprefix("model.")
    return name.replace(".language_model.", ".")


FAMILIES = {"Qwen2.5-VL-3B-Instruct": write_configs, "Qwen3-VL-4B-Instruct": write_configs_of_qwen3}
QWEN, QWEN3 = FAMILIES
pytestmark = pytest.mark.slow
both_families = pytest.mark.parametrize("hub", FAMILIES, indirect=True)
qwen3 = pytest.mark.parametrize("hub", [QWEN3], indirect=True)


@pytest.fixture(scope="module")
def hub(request, tmp_path_factory):
    """-> (the folder, the weights that were written to it)"""
    name = getattr(request, "param", QWEN)
    folder = tmp_path_factory.mktemp("hub") / name
    folder.mkdir()
    FAMILIES[name](folder, write_tokenizer(folder))
    return folder, write_weights(folder)


def edit(file, **fields):
    """Changes fields of a JSON file; None removes one."""
    made = json.loads(file.read_text()) | fields
    write_json(file, {key: value for key, value in made.items() if value is not None})


def our_name(name):
    """Where transformers keeps what the hub's files call `name`."""
    if name.startswith("visual."):
        return f"model.{name}"
    if name.startswith(("model.visual.", "model.language_model.")):
        return name
    return name.replace("model.", "model.language_model.")


# ----------------------------------------------------------------------------------- the checkpoint

@both_families
def test_every_weight_arrives(hub):
    """Guards the hub's old names: a weight that finds no place is left random by transformers,
    without an error."""
    folder, written = hub
    state = load(str(folder), device="cpu").model.state_dict()
    assert {our_name(name) for name in written} == set(state) - {"lm_head.weight"}
    for name, weight in written.items():
        assert torch.equal(state[our_name(name)], weight.float())
    tied = state["model.language_model.embed_tokens.weight"]
    assert torch.equal(state["lm_head.weight"], tied)


def test_numbers_of_the_checkpoint(hub):
    """Guards what depends on the real files: factor 28, two end tokens, spare rows of the embedding
    that stand for no token and could be sampled, and the bounds of the model input, from the file
    or from --max-pixels, which lowers it and never raises it."""
    folder, _ = hub
    policy = load(str(folder), device="cpu")
    ids = {token: policy.tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    size = len(policy.tokenizer)
    assert policy.token_px == 28 and policy.image_token == ids["<|image_pad|>"]
    assert policy.end_tokens == {ids["<|im_end|>"], ids["<|endoftext|>"]}
    assert len(policy.forbidden) == size + SPARE and policy.forbidden[size:].all()
    unsaid = {ids[f"<|{name}|>"]
              for name in ("vision_start", "vision_end", "image_pad", "video_pad")}
    assert set(policy.forbidden[:size].nonzero()[:, 0].tolist()) == unsaid
    assert policy.input_size(20, 20) == (56, 56)
    assert policy.input_size(8000, 4000) == (5068, 2520)
    large = load(str(folder), max_pixels=10**8, device="cpu")
    assert large.input_size(8000, 4000) == (5068, 2520)
    small = load(str(folder), max_pixels=7000, device="cpu")
    assert small.input_size(200, 100) == (112, 56)
    assert small.picture(Image.new("RGB", (200, 100))).tokens == 8


@qwen3
def test_numbers_of_qwen3(hub):
    """Guards what is another in Qwen3-VL: patches of 16 px, bounds under their newer names, the
    size of heads, of which the cache's is a part."""
    policy = load(str(hub[0]), device="cpu")
    ids = {token: policy.tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    assert policy.token_px == 32 and policy.kv_shape == (3, 2, 24)
    assert policy.end_tokens == {ids["<|im_end|>"], ids["<|endoftext|>"]}
    assert policy.input_size(200, 100) == (384, 192)
    assert policy.input_size(9000, 4500) == (5792, 2880)
    assert policy.default_system_message() == ""


@pytest.mark.parametrize("fields, bounds", [
    (dict(size={"min_pixels": 3200, "max_pixels": 50_000}), (3200, 50_000)),
    (dict(size={"min_pixels": 60_000, "max_pixels": 50_000}), (50_000, 50_000)),
    (dict(size={"shortest_edge": 3300, "longest_edge": 51_000}), (3300, 51_000)),
    (dict(size={"min_pixels": 1, "max_pixels": 2}, min_pixels=3400, max_pixels=52_000),
     (3400, 52_000)),
    (dict(min_pixels=3500, max_pixels=53_000), (3500, 53_000))])
def test_the_bounds_of_the_model_input_under_all_their_names(fields, bounds, hub, tmp_path):
    """Guards preprocessor_config.json of several versions: bounds under another name were none, and
    the first image ended in a TypeError."""
    folder = shutil.copytree(hub[0], tmp_path / "in")
    edit(folder / "preprocessor_config.json", **{"min_pixels": None, "max_pixels": None} | fields)
    policy = load(str(folder), device="cpu")
    for each in (policy, load_again(policy, tmp_path)):
        assert tuple(each.image_processor.size[f"{edge}_edge"]
                     for edge in ("shortest", "longest")) == bounds
    large = policy.picture(Image.new("RGB", (900, 900))).image
    assert bounds[1] * 0.7 < large.width * large.height <= bounds[1]


def load_again(policy, folder):
    policy.save(folder / "again")
    return load(str(folder / "again"), device="cpu")


def test_the_chat_of_the_real_template(hub, tmp_path):
    """Guards prompts and observations: a system message that the template adds by itself, an end
    token said twice; questions that hold special tokens; a template that only chat_template.json
    has, as in older checkpoints."""
    folder, _ = hub
    policy = load(str(folder), device="cpu")
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]}
    begin = "<|im_start|>assistant\n"
    asked = ("<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Which?<|im_end|>\n"
             + begin)
    system = "<|im_start|>system\n{}<|im_end|>\n"
    assert policy.render([user]) == system.format(STOCK) + asked
    ours = {"role": "system", "content": "Look."}
    assert policy.render([ours, user]) == system.format("Look.") + asked
    observed = policy.reply([{"type": "text", "text": "here:"}])
    assert policy.decode(observed.ids) == f"\n<|im_start|>user\nhere:<|im_end|>\n{begin}"
    special = set(policy.tokenizer.convert_tokens_to_ids(SPECIAL))
    assert not special & set(policy.encode(policy.clean("".join(SPECIAL))))
    shutil.copytree(folder, tmp_path / "older")
    edit(tmp_path / "older/tokenizer_config.json", chat_template=None)
    assert load(str(tmp_path / "older"), device="cpu").render([user]) == policy.render([user])


@pytest.mark.slow
@both_families
def test_engine_and_training_equal_a_plain_forward_with_grouped_queries(hub):
    """Guards the attention layouts where several query heads share a K/V head, which the tiny
    base's do not."""
    folder, _ = hub
    policy = remember_images(load(str(folder), max_pixels=128 * 128, device="cpu"))
    policy.end_tokens = set(range(0, policy.text_config.vocab_size, 8))
    engine = Engine(policy, turn_tokens=8, response_tokens=60, cache_tokens=900)
    groups = list(engine.run(list(prompts(policy, 4, 3, seed=1)), converse(policy, 2)))
    sequences = sum(groups, [])
    plain = torch.cat([plain_log_probs(folder, policy, sequence) for sequence in sequences])
    with torch.no_grad():
        trained = policy.log_probs(groups)
    assert any(sequence.pictures for sequence in sequences) and len(plain) > 60
    assert torch.allclose(recorded(groups), plain, atol=1e-4)
    assert torch.allclose(trained, plain, atol=1e-4)


@both_families
def test_what_we_save_is_what_we_loaded(hub, tmp_path):
    """Guards checkpoints on their way to others: weights, tokenizer, end tokens, bounds and
    template, through `Policy.save`."""
    folder, _ = hub
    policy = load(str(folder), device="cpu")
    policy.save(tmp_path / "out")
    again = load(str(tmp_path / "out"), device="cpu")
    state = policy.model.state_dict()
    for model in (again.model, AutoModelForImageTextToText.from_pretrained(tmp_path / "out")):
        assert set(model.state_dict()) == set(state)
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, state[name])
    text = "<|im_start|>Où 17?<|im_end|>\n" + format_call((1, 2))
    ids = policy.tokenizer.encode(text)
    for tokenizer in (again.tokenizer, AutoTokenizer.from_pretrained(tmp_path / "out")):
        assert tokenizer.get_vocab() == policy.tokenizer.get_vocab()
        assert tokenizer.chat_template == policy.tokenizer.chat_template
        assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == text
    assert again.end_tokens == policy.end_tokens and again.token_px == policy.token_px
    assert again.image_processor.size == policy.image_processor.size
    assert (again.forbidden == policy.forbidden).all()


@both_families
@pytest.mark.parametrize("tied", [True, False])
def test_what_we_save_has_the_names_of_transformers_4(tied, hub, tmp_path):
    """Guards the public code and its vLLM, which run transformers 4.57: of version 5's own names it
    makes a model without m-RoPE, an output matrix that is missing, and no tokenizer."""
    released = json.loads((hub[0] / "config.json").read_text())
    released = released.get("text_config", released)
    config = AutoConfig.from_pretrained(hub[0])
    config.tie_word_embeddings = tied
    model = AutoModelForImageTextToText.from_config(config)
    parts = load(str(hub[0]), device="cpu")
    Policy(model, parts.tokenizer, parts.image_processor).save(tmp_path / "out")
    written = json.loads((tmp_path / "out/config.json").read_text())
    text = written["text_config"]
    assert text["rope_scaling"] == released["rope_scaling"] and "rope_parameters" not in text
    assert text["rope_theta"] == released["rope_theta"]
    assert text["tie_word_embeddings"] is written["tie_word_embeddings"] is tied
    tokens = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert tokens["additional_special_tokens"] == SPECIAL[1:]
    assert "extra_special_tokens" not in tokens
    again = AutoConfig.from_pretrained(tmp_path / "out")
    assert again.text_config.rope_parameters == config.text_config.rope_parameters
    assert again.tie_word_embeddings == tied


def test_an_output_matrix_of_its_own(hub, tmp_path):
    """Guards the 7B, whose embedding and output matrix are two: read as tied, its logits would be
    nonsense."""
    folder, written = hub
    shutil.copytree(folder, tmp_path / "7B")
    edit(tmp_path / "7B/config.json", tie_word_embeddings=False)
    embedding = written["model.embed_tokens.weight"]
    shard, head = "model-00001-of-00002.safetensors", torch.randn_like(embedding)
    state = load_state_dict(folder / shard) | {"lm_head.weight": head}
    safe_save_file(state, tmp_path / "7B" / shard, metadata={"format": "pt"})
    index = tmp_path / "7B/model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map=where | {"lm_head.weight": shard})
    load(str(tmp_path / "7B"), device="cpu").save(tmp_path / "out")
    for path in (tmp_path / "7B", tmp_path / "out"):
        model = load(str(path), device="cpu").model
        assert torch.equal(model.lm_head.weight, head.float())
        read = model.model.language_model.embed_tokens.weight
        assert torch.equal(read, embedding.float())


# -------------------------------------------------------------- its system message, its coordinates

OWN = "First point, then answer."


def speak(folder, message, file="chat_template.json"):
    """Gives a checkpoint's template, in one of the files where one can be, a default system
    message."""
    template = TEMPLATE.replace(STOCK, message)
    if file == "chat_template.json":             # as released: the tokenizer keeps the stock one
        write_json(folder / file, {"chat_template": template})
        return folder
    remove(folder, "chat_template.json")
    in_config = template if file == "tokenizer_config.json" else None
    edit(folder / "tokenizer_config.json", chat_template=in_config)
    if file == "chat_template.jinja":
        (folder / file).write_text(template)
    return folder


def dialogue_of(folder, policy, dialogue=""):
    args = SimpleNamespace(family="gui", training=False, mode="zoom", dialogue=dialogue)
    return make_dialogue(args, str(folder), policy)


def asked(policy, dialogue, question):
    return policy.decode(dialogue.prompt(policy, question)[0].ids)


@pytest.fixture
def wide():
    """A question about an image of 200x100 px."""
    return Question("Where?", [Image.new("RGB", (200, 100), "white")], (0, 0, 9, 9), "point")


@pytest.mark.parametrize("file", ["chat_template.json", "chat_template.jinja",
                                  "tokenizer_config.json"])
@pytest.mark.parametrize("message", [OWN, STOCK])
def test_a_checkpoint_keeps_its_own_system_message(file, message, hub, wide, tmp_path):
    """Guards released checkpoints: their prompt stands in their chat template, and ours was put in
    its place. The stock sentence, which says nothing of a task, counts as none."""
    folder = speak(shutil.copytree(hub[0], tmp_path / "own"), message, file)
    policy = load(str(folder), max_pixels=7000, device="cpu")
    dialogue = dialogue_of(folder, policy)
    said = asked(policy, dialogue, wide)
    ours = SYSTEM_PROMPTS["zoom"]
    assert said.count("<|im_start|>system") == 1
    if message == OWN:
        assert OWN in said and ours not in said and dialogue.system_prompts == {}
    else:
        assert ours in said and STOCK not in said
    mine = tmp_path / "mine.json"
    write_json(mine, {"system_prompts": {"zoom": "Mine."}})
    said = asked(policy, dialogue_of(folder, policy, str(mine)), wide)
    assert "Mine." in said and message not in said and ours not in said


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
    assert frame.contains((size[0] - 1, size[1] - 1)) and not frame.contains((size[0], 0))
    trace.ids += policy.encode("<think>a</think>" + format_call((size[0] / 2, size[1] / 2)))
    dialogue.on_turn(policy, trace, False)
    left, top, right, bottom = trace.turns[0].crop
    assert (right - left, bottom - top) == (20, 20)
    assert abs(left + 10 - 100) <= 1 and abs(top + 10 - 50) <= 1


@qwen3
def test_qwen3_points_in_thousandths(hub, wide, tmp_path):
    """Guards the points of Qwen3-VL, from 0 to 1000 of width and height: read as pixels they would
    be anywhere. Texts that say the unit follow; dialogue.json can say otherwise."""
    folder = shutil.copytree(hub[0], tmp_path / "own")
    policy = load(str(folder), max_pixels=7000, device="cpu")
    dialogue = dialogue_of(folder, policy)
    assert dialogue.coordinates == "thousandths"
    wide.hint = "Give a point, in pixels."
    said = asked(policy, dialogue, wide)
    assert said.count("in thousandths of width and height") == 2 and "in pixels" not in said
    (trace,) = dialogue.start(policy, wide, 1)
    (frame,) = trace.frames
    assert frame.to_original((250, 800)) == (50, 80) and frame.to_input((50, 80)) == (250, 800)
    assert frame.contains((999, 999)) and not frame.contains((1001, 5))
    dialogue.crop_half = 10
    for point in ((500, 400), (999, 1200)):
        trace.ids += policy.encode("<think>a</think>" + format_call(point))
        trace.add(dialogue.on_turn(policy, trace, False))
    assert trace.turns[0].crop == (90, 30, 110, 50) and trace.turns[1].crop is None
    assert "(999, 1200) is outside the image, which is 1000 wide" in trace.turns[1].error
    write_json(folder / "dialogue.json", {"coordinates": "input"})
    dialogue = dialogue_of(folder, policy)
    assert dialogue.coordinates == "input" and "in pixels" in asked(policy, dialogue, wide)


# --------------------------------------------------------------------- the scripts, on every format

SPOT = "(17, 20)"     # in every format's box or polygon, where the model input is 112x56 px
EVERY_FORMAT = {      # name: file (and its folder), mode, rows, their right answers
    "ViGoRL SFT": ("chains.json", "zoom", [SFT], ["A"]),
    "ViGoRL evaluation or search":
        ("a.jsonl", "think", [talk(SAT, "Yes, left"), talk(SEARCH, "C")], ["Yes, left", "C"]),
    "VisualProbe": ("val.json", "zoom", [PROBE], ["EXIT"]),
    "ViGoRL RL": ("vigorl_RL.jsonl", "zoom", [POINT_RL, ACTION_RL], [SPOT, "click [12]"]),
    "V*Bench": ("test_questions.jsonl", "zoom", [VSTAR], ["A"]),
    "RoboSpatial-Home": ("annotations.json", "grounded", ROBOSPATIAL, [SPOT, "Yes"]),
    "ScreenSpot-Pro": ("pro/annotations/word.json", "zoom", [PRO], [SPOT]),
    "ScreenSpot or ScreenSpot-V2": ("screenspot_web.json", "direct", [SCREENSPOT], [SPOT]),
    "OS-Atlas": ("desktop.json", "grounded", [ATLAS], [SPOT]),
    "HR-Bench": ("hr_bench_4k.tsv", "zoom", [hr_bench()], ["C"]),
}
TRAINED = ("ViGoRL SFT", "ViGoRL RL", "ViGoRL evaluation or search", "RoboSpatial-Home",
           "ScreenSpot or ScreenSpot-V2")    # of each kind of answer, and each mode
ROWS = 4              # of each file, of which one is held out
SMALL = ["--max-pixels", 7000, "--dialogue", "small.json"]
TRAINING = [*SMALL, "--turn-tokens", 48, "--response-tokens", 120, "--search-questions", 3,
            "--traces", "traces.jsonl", "--sft-steps", 40, "--sft-lr", 1e-2]
GRPO = ["--steps", 2, "--questions", 2, "--group", 4, "--n", 1, "--lr", 1e-3]


@pytest.fixture
def call(script, monkeypatch):
    """call(name, *arguments, code) -> what a script prints, or, where it is to fail, its error. A
    step of fine-tuning learns from two traces."""
    monkeypatch.setitem(fine_tune.__kwdefaults__, "batch", 2)
    return lambda *arguments, code=0: script(*arguments, code=code)[code > 0]


def write_task(data, name, own=False, points=((17, 20), (40, 30)), **parts):
    """A file of a format; small.json, with small crops and these parts of the dialogue; and
    traces.jsonl, in the release's form, with right, well-formed and grounded traces for each
    question to train on. Rewards of a policy that learnt them have to differ: in the mode zoom,
    there is one with a zoom call and one with two; in others, sampling is warmer. own: the
    checkpoint has a system message of its own; points: which the traces look at, the first one a
    point's right answer. -> the flags of the task"""
    file, mode, rows, answers = EVERY_FORMAT[name]
    spot = str(points[0])
    answers = [answer.replace(SPOT, spot) for answer in answers]
    task = data(file, [numbered(rows[i % len(rows)], i) for i in range(ROWS)])
    if "/" in file:
        task = task.parent.parent
    write_json(data("small.json", []), {"crop_size": 56} | parts)
    dialogue = Dialogue(mode, **parts)
    if own:
        dialogue.system_prompts = {}
    pointing = f"<think>See {spot}.</think>\n"
    thought = {"direct": "", "grounded": pointing}.get(mode, "<think>So.</think>\n")
    calls = [pointing + format_call(point) for point in points]
    traces = []
    for i, question in enumerate(open_file(task)):
        last = f"{thought}<answer> {answers[i % len(answers)]} </answer>"
        for number in ((1, 2) if mode == "zoom" else (0,)):
            messages = messages_of(dialogue, question, [*calls[:number], last])
            truth = answers[i % len(answers)]
            if question.kind == "point":
                truth = "(10, 20, 60, 80)"
            elif len(truth) == 1:
                truth = f"({truth})"         # a letter, even where an option's text is a letter
            images = list(map(str, question.images))
            traces.append({"messages": messages, "images": images, "gt_answer": truth})
    data("traces.jsonl", traces)
    return ["--task", task, "--mode", mode, "--temperature", 1.0 if mode == "zoom" else 1.3]


def numbered(row, i):
    """The row with an id of its own."""
    names = ("id", "question_id", "doc_id", "index")
    return row | {name: f"{row[name]}-{i}" for name in names if name in row}


def changed(a, b):
    """Which towers differ between two checkpoints: {"visual", "language_model"}, one, or none."""
    a, b = (load(str(folder), device="cpu").model.model.state_dict() for folder in (a, b))
    return {name.split(".")[0] for name in a if not torch.equal(a[name], b[name])}


def all_traces_are_used(output):
    used, of = re.search(r"sft: (\d+) of (\d+) traces are", output).groups()
    return used == of


def test_no_format_is_left_out():
    """Guards this file: a format without its row in the table is never run."""
    assert set(EVERY_FORMAT) == {name for name, *_ in FORMATS}


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY_FORMAT)
def test_every_script_on_every_format(name, hub, call, data, tmp_path):
    """Guards the way of a real checkpoint and a real file through evaluation, fine-tuning and GRPO,
    in all four modes: a kind of answer that one of them cannot ask for or score; training, of each
    kind, that changes nothing, or the frozen vision tower too."""
    folder = hub[0]
    flags = write_task(data, name)
    task, common = flags[1], ["--model", folder, *flags]
    few = ["--turn-tokens", 3, "--response-tokens", 6, "--json", "found.json"]
    out = call("evaluate", *common, *SMALL, *few)
    found = json.loads((tmp_path / "found.json").read_text())
    assert f"{name}, {ROWS} questions" in out
    assert found["n"] == ROWS and 0 <= found["accuracy"] <= 1
    if name not in TRAINED:
        return
    out = call("train_rl", *common, *TRAINING, *GRPO, "--eval-task", task, "--out", "run")
    assert all_traces_are_used(out)
    assert changed(folder, "run/sft") == {"language_model"}
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert len(log) == 2 and "1 held-out" in out
    assert sum(line["signal"] for line in log) > 0
    assert changed("run/sft", "run/rl") == {"language_model"}


@pytest.mark.slow
@pytest.mark.parametrize("coordinates, size", [("input", (112, 56)), ("unrounded", (118, 59))])
def test_from_fine_tuning_to_evaluation_as_the_checkpoint_speaks(
        coordinates, size, hub, call, data, tmp_path, monkeypatch):
    """Guards the way of a released checkpoint through all three scripts: its own system message and
    its coordinates, said once by --dialogue, are those of every prompt and of what is saved; ours
    came in at the first saved checkpoint."""
    folder = speak(shutil.copytree(hub[0], tmp_path / "own"), OWN)
    task = write_task(data, "ScreenSpot-Pro", own=True, coordinates=coordinates)
    start, prompts_said, sizes = Dialogue.start, [], set()

    def noted(dialogue, policy, question, *rest):
        traces = start(dialogue, policy, question, *rest)
        prompts_said.append(policy.decode(traces[0].prompt.ids))
        sizes.add(traces[0].frames[0].input_size)
        return traces
    monkeypatch.setattr(Dialogue, "start", noted)

    out = call("train_sft", "--model", folder, *task, *TRAINING, "--out", "run")
    assert all_traces_are_used(out)
    limits = ["--max-pixels", 7000, "--turn-tokens", 48, "--response-tokens", 120]
    call("train_rl", "--model", "run/sft", *task, *limits, *GRPO, "--sft-steps", 0,
         "--eval-task", task[1], "--out", "rl")
    few = ["--turn-tokens", 3, "--response-tokens", 6]
    call("evaluate", "--model", "rl/rl", *task, "--max-pixels", 7000, *few)
    assert len(prompts_said) > 8 and sizes == {size}
    for text in prompts_said:
        assert text.startswith(f"<|im_start|>system\n{OWN}<|im_end|>\n")
        assert text.count("<|im_start|>system") == 1
    for path in ("run/sft", "rl/sft", "rl/rl"):
        kept = json.loads((tmp_path / path / "dialogue.json").read_text())
        assert kept["system_prompts"] == {} and kept["coordinates"] == coordinates
        assert kept["crop_size"] == 56


@pytest.mark.slow
@qwen3
def test_qwen3_from_fine_tuning_to_evaluation(hub, call, data, tmp_path):
    """Guards the whole way of Qwen3-VL, with nothing said of its family: right points are in
    thousandths, and what is saved says so."""
    task = write_task(data, "ScreenSpot-Pro", points=((150, 350), (400, 300)),
                      coordinates="thousandths")
    write_json(tmp_path / "small.json", {"crop_size": 56})
    out = call("train_rl", "--model", hub[0], *task, *TRAINING, *GRPO, "--eval-task", task[1],
               "--out", "run")
    assert all_traces_are_used(out)
    assert changed(hub[0], "run/sft") == changed("run/sft", "run/rl") == {"language_model"}
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert sum(line["signal"] for line in log) > 0
    assert max(line["reward"] for line in log) > 0
    kept = json.loads((tmp_path / "run/rl/dialogue.json").read_text())
    assert kept["coordinates"] == "thousandths"
    out = call("evaluate", "--model", "run/rl", *task, "--max-pixels", 7000, "--turn-tokens", 3,
               "--response-tokens", 6)
    assert "coordinates='thousandths'" in out


# ---------------------------------------------------------------------------------------- bad input

GOOD = talk(SAT, "No")
CONFIG, SECOND = "config.json", "model-00002-of-00002.safetensors"
TOKENIZER = ["tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt"]
PIXELS, NO_BOUNDS = "preprocessor_config.json", {"min_pixels": None, "max_pixels": None}


def halve(file):
    file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])


def remove(folder, *files):
    for file in files:
        (folder / file).unlink()


def lose_a_weight(folder):
    shard = folder / "model-00001-of-00002.safetensors"
    state = load_state_dict(shard)
    del state["visual.patch_embed.proj.weight"]
    safe_save_file(state, shard, metadata={"format": "pt"})


def spoil(folder, value):
    shard = folder / "model-00001-of-00002.safetensors"
    state = load_state_dict(shard)
    state["visual.patch_embed.proj.weight"].view(-1)[0] = value
    safe_save_file(state, shard, metadata={"format": "pt"})


def lose_the_template(folder):
    remove(folder, "chat_template.json")
    edit(folder / "tokenizer_config.json", chat_template=None)


@pytest.mark.parametrize("harm, message", [
    (lambda f: edit(f / CONFIG, model_type="qwen2_vl"),
     ["'qwen2_vl'", "checkpoint of Qwen2.5-VL, or of a dense Qwen3-VL"]),
    (lambda f: edit(f / CONFIG, model_type="qwen3_vl_moe", vision_config=None),
     ["'qwen3_vl_moe'", "checkpoint of Qwen2.5-VL, or of a dense Qwen3-VL"]),
    (lambda f: edit(f / CONFIG, model_type="llama", vision_config=None),
     ["'llama'", "give a checkpoint of"]),
    (lambda f: edit(f / CONFIG, model_type="qwen2", vision_config=None),
     ["'qwen2'", "give a checkpoint of"]),
    (lambda f: halve(f / CONFIG), [CONFIG, "give a folder with"]),
    (lambda f: halve(f / SECOND), [f"{SECOND}: ", "give a folder with"]),
    (lambda f: remove(f, SECOND), [SECOND, "give a folder with"]),
    (lose_a_weight, ["1 weights are missing", "patch_embed.proj.weight", " again"]),
    (lambda f: edit(f / CONFIG, num_hidden_layers=3),
     ["12 weights are missing", "layers.2.", " again"]),
    (lambda f: edit(f / CONFIG, intermediate_size=80),
     ["6 weights", "of another size", " again"]),
    (lambda f: remove(f, PIXELS), [PIXELS, "give a folder with"]),
    (lambda f: remove(f, *TOKENIZER), ["<|image_pad|> is", "put tokenizer.json"]),
    (lambda f: remove(f, *TOKENIZER[1:]), ["<|image_pad|> is", "put tokenizer.json"]),
    (lambda f: edit(f / CONFIG, image_token_id=7), ["<|image_pad|> is", "does not fit"]),
    (lambda f: edit(f / PIXELS, image_mean=[0.5]), [PIXELS, "give a folder with"]),
    (lambda f: edit(f / PIXELS, image_std=[0, 1, 1]), [PIXELS, "not finite"]),
    (lambda f: spoil(f, math.nan), ["weights are not finite"]),
    (lambda f: spoil(f, math.inf), ["weights are not finite"]),
    (lose_the_template, ["chat template is missing", "chat_template.json"]),
    (lambda f: remove(f, "tokenizer_config.json"),
     ["'<|endoftext|>'", "'<|im_end|>'", "put tokenizer_config.json"]),
    (lambda f: edit(f / TOKENIZER[0], eos_token="<|endoftext|>"),
     ["'<|endoftext|>'", "'<|im_end|>'", "put tokenizer_config.json"]),
    (lambda f: edit(f / "chat_template.json", chat_template=TEMPLATE.replace("im_end", "box_end")),
     ["'<|im_end|>'", "'<|box_end|>'", "put tokenizer_config.json"]),
    (lambda f: edit(f / "chat_template.json", chat_template=TEMPLATE[:400]),
     ["chat template cannot be read"]),
    (lambda f: edit(f / PIXELS, patch_size=16), [PIXELS, "(14, 2)", "get it again"]),
    (lambda f: edit(f / PIXELS, merge_size=1), [PIXELS, "(14, 2)", "get it again"]),
    (lambda f: edit(f / PIXELS, **NO_BOUNDS, size=224), [PIXELS, "longest_edge", "get it again"]),
    (lambda f: edit(f / PIXELS, **NO_BOUNDS, size={"shortest_edge": 56}),
     [PIXELS, "longest_edge", "get it again"])])
def test_bad_checkpoints_are_told_in_a_line(harm, message, hub, call, data, tmp_path):
    """Guards against tracebacks, and worse: transformers goes on with random weights for those that
    a folder lacks, and with an empty tokenizer where there is none."""
    harm(shutil.copytree(hub[0], tmp_path / "bad"))
    task = data("a.jsonl", [GOOD])
    err = call("evaluate", "--model", tmp_path / "bad", "--task", task, code=2)
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert str(tmp_path / "bad") in err and all(part in err for part in message), err
