"""The policy: load, encode, sample, score, save. It knows tokens and images, and nothing of tasks.

In:  a Hugging Face folder or hub id of Qwen2.5-VL or Qwen3-VL, and dialogues of text and PIL
     images.
Out: `Sequence`s of sampled tokens with their log-probabilities, log-probabilities with gradients,
     checkpoints.

A GRPO group is one prompt with G continuations, and it is computed as that: image and prompt are
run once, the G continuations attend to them. The forward pass is Hugging Face's own; ours is only
the attention, in three layouts:

    train     [prompt | response 1 | ... | response G]: each response sees the prompt and itself
    read      chunks of tokens: prompts (one copy of their K/V a group), observations of some rows
    decode    one token of each row, which sees [prompt K/V | own K/V]

Departures from common practice: vision tokens and unused rows of the vocabulary are forbidden in
sampling and in every log-softmax, so an image token in a sequence is always one that we placed;
positions are always given explicitly; the vision tower stays frozen, so an image is encoded once.
"""
import json
import math
import os
import random
import shutil
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.distributed import fsdp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, logging
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, load_state_dict
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as processing
from transformers.utils import cached_file

logging.disable_progress_bar()

# Of a GPU. Lengths change all the time: less memory is lost between blocks that can grow; and cuDNN
# would first plan the attention of every new length, for a tenth of a second or more.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
torch.backends.cuda.enable_cudnn_sdp(False)

# The model types that are supported (the second: its dense models), and the coordinates that they
# point in, see rollout.Dialogue.
COORDINATES = {"qwen2_5_vl": "input", "qwen3_vl": "thousandths"}
# A chat whose reply is easily found in what the template makes of it.
EXCHANGE = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "\0"}]
MAX_LOGITS = 2**26          # floats in the largest (tokens, vocabulary) tensor: 256 MiB
MAX_VISION_PATCHES = 2**16  # patches in one pass of the vision tower
REPLICATED = 100_000_000    # parameters of a model at most of which each process has a copy


class UserError(Exception):
    """A mistake of the user's, told in one line: what is wrong, where, and how to repair it."""


@dataclass(eq=False)
class Picture:
    """An image as the model sees it.

    image: RGB, of the model input's size; grid (t, h, w) in patches; tokens: how many stand for it;
    features (tokens, hidden): what the vision tower makes of it; with DeepStack (tokens, (1 + D) *
    hidden): behind them, those that are added after each of the first D layers of the language
    model. Once they are there the image is dropped."""
    # Pixels are kept as bytes: what the tower gets, floats and each twice, is eight times as large.
    image: Image.Image | None
    grid: tuple
    tokens: int
    features: torch.Tensor | None = None


@dataclass
class Chunk:
    """Tokens that we write: text, with the images that its image tokens stand for, in order."""
    ids: list[int]
    pictures: list[Picture] = field(default_factory=list)


@dataclass(eq=False)
class Sequence:
    """A prompt and what follows it.

    sampled[i]: whether the policy sampled ids[i]; it is known by construction, and exactly these
    tokens are trained on. log_probs[i]: the log-probability of sampling it (0.0 where it was
    injected). rng: its own random numbers, so what is sampled does not depend on what runs beside
    it; greedy decoding needs none."""
    prompt: Chunk
    ids: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    rng: random.Random | None = None

    def add(self, chunk, sampled=False):
        self.ids += chunk.ids
        self.sampled += [sampled] * len(chunk.ids)
        self.log_probs += [0.0] * len(chunk.ids)
        self.pictures += chunk.pictures
        return self


# ------------------------------------------------------------------------------------ load and save

def load(path, *, max_pixels=None, max_image_side=None, dtype=None, device=None):
    """Loads a checkpoint folder or hub id of Qwen2.5-VL or Qwen3-VL. -> Policy

    max_pixels: the model input's area (px) at most, where the checkpoint's own bound is not lower;
    max_image_side: its longest side (px). dtype: if not given the checkpoint's own on a GPU,
    float32 on a CPU. Raises UserError where it is no such checkpoint."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype is None:
        dtype = "auto" if torch.device(device).type == "cuda" else torch.float32
    with reading(path, "config.json"):
        model_type = AutoConfig.from_pretrained(path).model_type
    if model_type not in COORDINATES:
        raise UserError(f"{path}: model type '{model_type}' is not supported; give a checkpoint "
                        "of Qwen2.5-VL, or of a dense Qwen3-VL")

    with reading(path, "its tokenizer or chat_template.json"):
        tokenizer = AutoTokenizer.from_pretrained(path)
        # Only older checkpoints have a file for it; it counts more than the tokenizer's own.
        template = cached_file(path, "chat_template.json",
                               _raise_exceptions_for_missing_entries=False)
        if template:
            tokenizer.chat_template = read_json(template)["chat_template"]
    with reading(path, "preprocessor_config.json"):
        processor = processing.Qwen2VLImageProcessorPil.from_pretrained(path)
        side = processor.patch_size * processor.merge_size
        tried = processor([Image.new("RGB", (side, side))], do_resize=False, return_tensors="pt")
        if not tried["pixel_values"].isfinite().all():
            raise ValueError("its image_mean and image_std make pixels that are not finite")

    for file in Path(path).glob("*.safetensors"):
        with reading(file, "its header"):                # of a truncated file
            load_state_dict(file, map_location="meta")
    with reading(path, "its weights"):
        model, report = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True)
    mismatched = {name for name, *_ in report["mismatched_keys"]}
    missing = report["missing_keys"] | mismatched
    if missing:                                          # they would stay random
        raise UserError(f"{path}: {len(missing)} weights are missing or of another size than "
                        f"config.json says, the first is {min(missing)}; get all its files again")
    image_token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    if image_token != model.config.image_token_id or not tokenizer.chat_template:
        raise UserError(f"{path}: its tokenizer, in which <|image_pad|> is {image_token}, does not "
                        "fit config.json, or its chat template is missing; put tokenizer.json, "
                        "tokenizer_config.json and chat_template.json of that model beside it")
    with reading(path, "its chat template"):
        text = tokenizer.apply_chat_template(EXCHANGE, tokenize=False)
    end = text.partition("\0")[2].strip()
    if end != tokenizer.eos_token:
        raise UserError(f"{path}: its tokenizer's end token is {tokenizer.eos_token!r}, but its "
                        f"chat template ends a turn with {end!r}; put tokenizer_config.json of "
                        "that model beside its config.json")

    vision = model.config.vision_config
    sides = vision.patch_size, vision.spatial_merge_size
    its_sides = processor.patch_size, processor.merge_size
    size = processor.size
    least = size.shortest_edge or size.min_pixels
    most = size.longest_edge or size.max_pixels
    if not least or not most or sides != its_sides:
        raise UserError(f"{path}: preprocessor_config.json has to have patch_size, merge_size "
                        f"{sides}, as config.json, and a size of shortest_edge and longest_edge, "
                        "in pixels; get it again")
    own_size = {"shortest_edge": least, "longest_edge": most}
    most = min(most, max_pixels or most)
    processor.size = {"shortest_edge": min(least, most), "longest_edge": most}
    visual = model.model.visual
    visual.config._attn_implementation = "flash_by_length"
    model.model.language_model.config._attn_implementation = "layout"
    # The patch embedding is a convolution whose kernel covers a patch; as the matrix product that
    # it is, it takes a third of the time on a CPU.
    embed = visual.patch_embed

    def product(patches):
        weight = embed.proj.weight.flatten(1)
        return F.linear(patches, weight, embed.proj.bias)
    embed.forward = product
    norm = nn.utils.get_total_norm(model.parameters())
    if not norm.isfinite():
        raise UserError(f"{path}: its weights are not finite numbers; take another checkpoint")
    return Policy(model.to(device), tokenizer, processor, max_image_side, own_size).eval()


@contextmanager
def reading(path, part):
    """Makes any error inside a UserError in a line: libraries raise many kinds of them for a
    missing, foreign or truncated file."""
    try:
        yield
    except Exception as error:
        why = str(error).strip() or repr(error)
        raise UserError(f"{path}: {part} cannot be read ({why.splitlines()[0]}); give a folder "
                        "with config.json, complete weights and tokenizer, or a hub id") from error


def names_of_transformers_4(folder):
    """The config and tokenizer_config of a folder that transformers 5 wrote, {name: parts}, with
    the names that 4.57, and vLLM with it, looks for; version 5 knows both."""
    config = read_json(folder / "config.json")
    tokenizer_config = read_json(folder / "tokenizer_config.json")
    text_config = config["text_config"]
    rope = text_config.pop("rope_parameters")
    text_config["rope_theta"] = rope.pop("rope_theta")
    if "type" in rope:                                   # two names of one thing, which may differ
        del rope["rope_type"]
    text_config["rope_scaling"] = rope
    text_config["tie_word_embeddings"] = config["tie_word_embeddings"]
    special = tokenizer_config.pop("extra_special_tokens", [])
    tokenizer_config["additional_special_tokens"] = special
    return {"config": config, "tokenizer_config": tokenizer_config}


def move_into_place(part, final):
    """Renames a finished file or folder to its final name, over what was there."""
    if final.is_dir():
        old = final.with_name(final.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(final, old)
        os.rename(part, final)
        shutil.rmtree(old)
    else:
        os.replace(part, final)


def read_json(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_text(path, text):
    """Writes a file completely or not at all."""
    part = Path(f"{path}.part")
    part.write_text(text, encoding="utf-8")
    move_into_place(part, Path(path))


# --------------------------------------------------------------------------------------- the policy

class Policy(nn.Module):
    """Model, tokenizer and image processor of a checkpoint, and the few numbers they imply. As a
    module it is `log_probs`."""

    def __init__(self, model, tokenizer, image_processor, max_image_side=None, own_size=None):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.max_image_side = max_image_side or math.inf               # px, of the model input
        self.own_size = own_size               # the checkpoint's bounds, where those of a run count
        config = model.config
        self.coordinates = COORDINATES[config.model_type]
        self.text_config = text = config.text_config
        attention = model.model.language_model.layers[0].self_attn
        self.kv_shape = text.num_hidden_layers, text.num_key_value_heads, attention.head_dim
        self.image_token = config.image_token_id
        vision = config.vision_config
        self.merge = vision.spatial_merge_size                         # patches a token, each side
        self.token_px = vision.patch_size * self.merge                 # px a token, each side

        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self.end_tokens = {tokenizer.eos_token_id, *ends}
        forbidden = torch.zeros(text.vocab_size, dtype=torch.bool, device=model.device)
        forbidden[len(tokenizer):] = True            # rows of the matrix that stand for no token
        forbidden[[self.image_token, config.video_token_id,
                   config.vision_start_token_id, config.vision_end_token_id]] = True
        self.register_buffer("forbidden", forbidden, persistent=False)

    @property
    def device(self):
        return self.model.device

    def trainable(self):
        """The parameters that training changes: all but the vision tower's."""
        named = self.model.named_parameters()
        return [parameter for name, parameter in named if ".visual." not in name]

    def save(self, folder, **notes):
        """Writes a Hugging Face checkpoint folder, completely or not at all. notes: what else is
        kept in it, each as NAME.json. All processes have to call it; the first one writes."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(self.model, options=options)
        if rank():
            return
        folder = Path(folder)
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        if self.model.config.tie_word_embeddings:
            state.pop("lm_head.weight", None)        # of sharded weights both names are there
        self.model.save_pretrained(part, state_dict=state)
        self.tokenizer.save_pretrained(part)
        self.image_processor.save_pretrained(part)
        notes |= names_of_transformers_4(part)
        if self.own_size:                            # not the bounds of this run
            processor = read_json(part / "preprocessor_config.json")
            notes["preprocessor_config"] = processor | {"size": self.own_size}
        for name, note in notes.items():
            text = json.dumps(note, indent=1, ensure_ascii=False)
            write_text(part / f"{name}.json", text + "\n")
        move_into_place(part, folder)

    # -------------------------------------------------------------------- text and images to tokens

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids):
        return self.tokenizer.decode(ids)

    def input_size(self, width, height, rounded=True):
        """(width, height) in px of the model input made of an image of this size.

        rounded False: before the sides are rounded to whole tokens."""
        size = self.image_processor.size
        least, most = size["shortest_edge"], size["longest_edge"]
        scale = min(1, self.max_image_side / max(width, height))
        width = max(1, round(width * scale))
        height = max(1, round(height * scale))
        if not rounded:
            scale = min(1, math.sqrt(most / (width * height)))
            return int(width * scale), int(height * scale)
        try:
            height, width = processing.smart_resize(height, width, self.token_px, least, most)
        except ValueError as error:
            raise UserError(f"an image of {width}x{height} px cannot be encoded: {error}") from None
        return width, height

    def picture(self, image):
        """PIL image -> Picture. Transparency is ignored."""
        size = width, height = self.input_size(*image.size)
        image = image.convert("RGB").resize(size, self.image_processor.resample)
        patch = self.image_processor.patch_size
        grid = 1, height // patch, width // patch
        tokens = math.prod(grid) // self.merge**2
        return Picture(image, grid, tokens)

    def chunk(self, text, images=()):
        """Text in which every "<|image_pad|>" stands for one of `images` (PIL or Picture)."""
        first, *rest = text.split("<|image_pad|>")
        chunk = Chunk(self.encode(first))
        for image, text_behind in zip(images, rest, strict=True):
            picture = image if isinstance(image, Picture) else self.picture(image)
            chunk.pictures.append(picture)
            chunk.ids += [self.image_token] * picture.tokens
            chunk.ids += self.encode(text_behind)
        return chunk

    def render(self, messages):
        """Chat messages -> text, by the chat template, up to where the assistant speaks."""
        return self.tokenizer.apply_chat_template(messages, tokenize=False,
                                                  add_generation_prompt=True)

    def prompt(self, messages, images=()):
        """Chat messages -> the Chunk after which the assistant speaks.

        Content: text, or a list of {"type": "image"} and {"type": "text", "text": ...}; `images` in
        the order of their places."""
        return self.chunk(self.render(messages), images)

    def reply(self, content, images=()):
        """A user turn between an end token of the assistant's and its next turn, as a Chunk."""
        text = self.render([*EXCHANGE, {"role": "user", "content": content}])
        text = text.partition("\0")[2]
        return self.chunk(text.removeprefix(self.tokenizer.eos_token), images)

    def default_system_message(self):
        """The system message that the chat template adds where a dialogue has none. "": nothing, or
        the Qwen models' sentence, which says nothing of a task."""
        text = self.render(EXCHANGE[:1]).partition("<|im_start|>system\n")[2]
        message = text.partition("<|im_end|>")[0].strip()
        return "" if message == "You are a helpful assistant." else message

    def clean(self, text):
        """Text of unknown origin, with special tokens broken up, so that it cannot speak as the
        chat itself. Half characters, which no tokenizer takes, become question marks."""
        for token in self.tokenizer.added_tokens_decoder.values():   # all_special_tokens lacks some
            if token.special:
                text = text.replace(token.content, token.content.replace("|", " "))
        return text.encode(errors="replace").decode()

    # ----------------------------------------------------------- tokens to embeddings and positions

    def pixel_values(self, pictures):
        """What the vision tower gets of some pictures: their patches, in the pictures' order,
        (patches, channels * 2 * patch * patch) float32."""
        images = [picture.image for picture in pictures]
        out = self.image_processor(images=images, do_resize=False, return_tensors="pt")
        return out["pixel_values"]

    @torch.no_grad()
    def features(self, pictures):
        """Vision features of several pictures, see Picture. They are computed once, without
        gradients, and kept in the pictures."""
        new = [picture for picture in dict.fromkeys(pictures) if picture.features is None]
        new.sort(key=lambda picture: picture.grid)
        for part in split_by_size(new, lambda picture: math.prod(picture.grid), MAX_VISION_PATCHES):
            for picture, its_features in zip(part, self.run_vision_tower(part), strict=True):
                picture.features = its_features
                picture.image = None
        return [picture.features for picture in pictures]

    def run_vision_tower(self, pictures):
        """Pictures in the order of their sizes -> the features of each."""
        pixels = self.pixel_values(pictures).to(self.device)
        # Those of one size are given to it as the frames of one film: it encodes each frame by
        # itself, and works out positions and windows once for all of them.
        frames = Counter(picture.grid[1:] for picture in pictures)
        grids = [(count, *sides) for sides, count in frames.items()]
        grids = torch.tensor(grids, device=self.device)
        out = self.model.model.get_image_features(pixels, grids)
        depths = [out.pooler_output, *getattr(out, "deepstack_features", ())]
        features = torch.cat([torch.cat(depth) for depth in depths], 1)
        lengths = [picture.tokens for picture in pictures]
        return features.split(lengths)

    def positions(self, ids, pictures, start):
        """m-RoPE positions (3, N) of a chunk that starts at position `start`, and the one after it.

        Text counts on in all three rows. An image stands at one time; its tokens count down and
        across from there, and the text behind it goes on after its longer side."""
        after = start + len(ids)
        positions = torch.arange(start, after).repeat(3, 1)
        end = 0                                              # of the image before
        for picture in pictures:
            first = ids.index(self.image_token, end)
            end = first + picture.tokens
            height = picture.grid[1] // self.merge                               # in tokens
            width = picture.grid[2] // self.merge
            steps = torch.ones(1, height, width).nonzero().T                     # (3, tokens)
            positions[:, first:end] = positions[0, first] + steps
            fewer = picture.tokens - max(height, width)
            positions[:, end:] -= fewer
            after -= fewer
        return positions, after

    # ------------------------------------------------------------- hidden states, log-probabilities

    def hidden_states(self, batch, layout):
        """A PackedBatch of N tokens through the language model -> (N, hidden). layout: what attends
        to what."""
        language_model = self.model.model.language_model
        ids = torch.tensor(batch.ids, device=self.device)
        x = language_model.embed_tokens(ids)                                     # (N, hidden)
        deepstack = {}
        if batch.pictures:
            seen = ids == self.image_token
            features = torch.cat(self.features(batch.pictures)).to(x.dtype)
            features, *deeper = features.split(x.shape[1], 1)                    # (tokens, hidden)
            x = x.index_put((seen,), features)
            if deeper:
                deepstack = dict(visual_pos_masks=seen[None], deepstack_visual_embeds=deeper)
        positions = torch.cat(batch.positions, 1).to(self.device)                # (3, N)
        out = language_model(inputs_embeds=x[None], position_ids=positions[:, None],
                             use_cache=False, layout=layout, **deepstack)
        return out.last_hidden_state[0]

    def log_softmax(self, hidden, temperature=1.0, penalty=1.0, seen=()):
        """Hidden states (N, hidden) -> log-probabilities (N, vocabulary) of the distribution that
        is sampled from, float32. penalty, seen: see choose."""
        logits = self.model.lm_head(hidden).float()
        if seen:
            penalties = torch.ones_like(logits)
            for row, ids in zip(penalties, seen, strict=True):
                row[ids] = penalty
            logits = torch.where(logits < 0, logits * penalties, logits / penalties)
        logits = logits.masked_fill(self.forbidden, -torch.inf) / temperature
        return logits.log_softmax(1)

    def choose(self, hidden, rngs, temperature=1.0, top_p=1.0, top_k=0, penalty=1.0, seen=()):
        """Samples a token from each of N hidden states (N, hidden), by the next number of each of N
        random rngs. -> N tokens, N log-probabilities, as lists

        temperature 0: the likeliest token, and no number is drawn. top_k 0: all tokens. penalty:
        logits of the token ids in seen, N lists, are divided by it, negative ones multiplied."""
        log_probs = self.log_softmax(hidden, temperature or 1.0, penalty, seen)  # (N, vocabulary)
        if log_probs[:, 0].isnan().any():                                        # then all of a row
            raise UserError("the policy's logits are not finite; take another checkpoint, or start "
                            "again with a lower learning rate")
        if top_k:
            best, _ = log_probs.topk(min(top_k, len(self.forbidden)))
            log_probs = without(log_probs, log_probs < best[:, -1:])
        if top_p < 1:
            log_probs = nucleus(log_probs, top_p)
        if temperature == 0:
            tokens = log_probs.argmax(1, keepdim=True)                          # (N, 1)
        else:
            uniforms = [rng.getrandbits(32) / 2**32 for rng in rngs]
            tokens = invert(log_probs, uniforms)                                 # (N, 1)
        chosen = log_probs.gather(1, tokens)                                     # (N, 1)
        return tokens.squeeze(1).tolist(), chosen.squeeze(1).tolist()

    def log_probs(self, groups, temperature=1.0):
        """Log-probabilities, with gradients, of every sampled token: each prompt is run once.

        groups: lists of Sequences, those of a list sharing one prompt. -> (N,), ordered by group,
        sequence and token"""
        batch, lengths, targets, predicted_from = pack(self, groups)
        hidden = self.hidden_states(batch, TrainLayout(lengths))
        hidden = hidden[predicted_from]                                          # (N, hidden)
        tokens = torch.tensor(targets, dtype=torch.long, device=self.device)     # (N,)

        def log_probs_of(h, t):
            return self.log_softmax(h, temperature).gather(1, t[:, None])        # (n, 1)
        # In parts, whose logits are computed again for the gradients: few are in memory at a time.
        size = MAX_LOGITS // self.text_config.vocab_size
        parts = zip(hidden.split(size), tokens.split(size), strict=True)
        found = [checkpoint(log_probs_of, *part, use_reentrant=False) for part in parts]
        return torch.cat(found).squeeze(1)

    forward = log_probs


@dataclass
class PackedBatch(Chunk):
    """Chunks end to end, as one row of N tokens, and the positions (3, length) of each."""
    positions: list = field(default_factory=list)

    def add(self, policy, chunk, start):
        """Appends a Chunk, or a Sequence without its prompt, from position `start` on. -> the
        position after it"""
        positions, after = policy.positions(chunk.ids, chunk.pictures, start)
        self.ids += chunk.ids
        self.pictures += chunk.pictures
        self.positions.append(positions)
        return after


def pack(policy, groups):
    """Groups of Sequences -> the PackedBatch [prompt | response 1 | ... | response G] of each; the
    lengths of these, a list a group; the sampled tokens; and of each of these the place of the
    token before it."""
    batch = PackedBatch([])
    lengths, targets, predicted_from = [], [], []
    for group in groups:
        prompt = group[0].prompt
        after = batch.add(policy, prompt, 0)
        prompt_end = len(batch.ids) - 1
        pieces = [len(prompt.ids)]
        for sequence in group:
            first = len(batch.ids)
            batch.add(policy, sequence, after)
            places = range(first, len(batch.ids))
            # The first token is predicted by the prompt's last one, which all responses share.
            targets += compress(sequence.ids, sequence.sampled)
            predicted_from += compress([prompt_end, *places], sequence.sampled)
            pieces.append(len(places))
        if len(group) == 1:                                  # it is computed as its prompt's end
            pieces = [sum(pieces)]
        lengths.append(pieces)
    return batch, lengths, targets, predicted_from


def invert(log_probs, uniforms):
    """Inverse transform sampling: the first token at which the cumulated probability exceeds the
    uniform number in [0, 1). log_probs (N, vocabulary); uniforms: N numbers. -> tokens (N, 1)

    A token of probability 0 is never the first."""
    cumulated = log_probs.exp().cumsum(1, dtype=torch.float64)                   # (N, vocabulary)
    uniforms = cumulated.new_tensor(uniforms)
    wanted = uniforms[:, None] * cumulated[:, -1:]                               # (N, 1)
    return torch.searchsorted(cumulated, wanted, right=True)


def nucleus(log_probs, top_p):
    """Keeps the fewest tokens whose probabilities add up to top_p, and renormalises; (N,
    vocabulary) both."""
    ordered, index = log_probs.sort(1, descending=True)
    probs = ordered.exp()
    beyond = probs.cumsum(1) - probs >= top_p
    dropped = beyond.scatter(1, index, beyond)               # in the vocabulary's order
    return without(log_probs, dropped)


def without(log_probs, dropped):
    """The distribution without the dropped tokens (bool), renormalised."""
    return log_probs.masked_fill(dropped, -torch.inf).log_softmax(1)


# -------------------------------------------------------------------------- attention and its cache

def layout_attention(module, q, k, v, attention_mask, scaling, layout, **kwargs):
    """Hugging Face's attention interface, of the language model: q (1, H, N, D), k, v (1, Hk, N, D)
    -> (1, N, H, D). layout: what attends to what."""
    kv = torch.cat([k, v])                                                       # (2, Hk, N, D)
    return layout(module.layer_idx, q, kv, scaling), None


def window_attention(module, q, k, v, attention_mask, scaling, cu_seq_lens_q, **kwargs):
    """The same of the vision tower: q, k, v (1, H, N, D), N patches of windows or images that begin
    at cu_seq_lens_q (W + 1,). All windows of one length are a batch: one call, not one a window."""
    qkv = torch.cat([q, k, v])                                                   # (3, H, N, D)
    out = torch.empty_like(q)
    lengths = cu_seq_lens_q.diff()                                               # (W,)
    for length in lengths.unique().tolist():
        starts = cu_seq_lens_q[:-1][lengths == length]                           # (w,)
        index = starts[:, None] + torch.arange(length, device=q.device)          # (w, length)
        windows = qkv[:, :, index].transpose(1, 2)                               # (3, w, H, L, D)
        attended = F.scaled_dot_product_attention(*windows, scale=scaling)
        out[0, :, index] = attended.transpose(0, 1)                              # (H, w, length, D)
    return out.transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register("layout", layout_attention)
# transformers calls one named "flash" once, with cu_seq_lens_q, and all others once a window
ALL_ATTENTION_FUNCTIONS.register("flash_by_length", window_attention)


def causal_attention(q, kv, scale):
    """q (1, H, L, D), kv (2, Hk, M, D), M >= L: the queries are the last L of the M columns.
    -> (1, L, H, D)"""
    k, v = kv.split(1)                                                           # (1, Hk, M, D)
    mask = causal_lower_right(q.shape[2], k.shape[2])        # a bias that the flash kernel knows
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


@dataclass
class TrainLayout:
    """Tokens (1, N), of each group [prompt | response 1 | ... | response G]. Each response is
    computed with a copy of its prompt's K/V. lengths: see pack."""
    lengths: list

    def __call__(self, layer, q, kv, scale):
        flat = sum(self.lengths, [])
        chunks = zip(q.split(flat, 2), kv.split(flat, 2), strict=True)
        out = []
        for _, *responses in self.lengths:
            q, prompt = next(chunks)
            out.append(causal_attention(q, prompt, scale))
            for _ in responses:
                q, kv = next(chunks)
                kv = torch.cat([prompt, kv], 2)                                  # (2, Hk, P + L, D)
                out.append(causal_attention(q, kv, scale))
        return torch.cat(out, 1)


class Cache:
    """K/V of what is in flight: S slots of a group each, with its prompt and, behind it, G rows. A
    slot and the row's number in the group are a fixed seat: nothing is ever moved."""

    def __init__(self, policy, slots, rows, prompt_columns, own_columns):
        layers, heads, dim = policy.kv_shape                                     # slots: S
        kind = dict(dtype=policy.model.dtype, device=policy.device)
        self.rows = rows                                                         # G
        self.prompt = torch.zeros(layers, 2, slots, heads, prompt_columns, dim, **kind)
        self.own = torch.zeros(layers, 2, slots, heads, rows, own_columns, dim, **kind)


@dataclass
class ReadLayout:
    """Tokens (1, N), end to end: the prompts of new groups (lists of Rows), then what each of
    `rows` has not read. Their K/V is kept in the cache."""
    cache: Cache
    groups: list
    rows: list

    def __call__(self, layer, q, kv, scale):
        prompt = self.cache.prompt[layer]
        own = self.cache.own[layer]
        lengths = [group[0].prompt_length for group in self.groups]
        lengths += [row.unread for row in self.rows]
        chunks = zip(q.split(lengths, 2), kv.split(lengths, 2), strict=True)
        out = []
        for row, *_ in self.groups:
            q, kv = next(chunks)                                                 # kv (2, Hk, L, D)
            prompt[:, row.slot, :, :row.prompt_length] = kv
            out.append(causal_attention(q, kv, scale))
        for row in self.rows:
            q, kv = next(chunks)
            seat = own[:, row.slot, :, row.number]                               # (2, Hk, T, D)
            end = row.read + row.unread
            seat[:, :, row.read:end] = kv
            of_prompt = prompt[:, row.slot, :, :row.prompt_length]
            kv = torch.cat([of_prompt, seat[:, :, :end]], 2)
            out.append(causal_attention(q, kv, scale))
        return torch.cat(out, 1)


class DecodeLayout:
    """The last token of each of N rows: q (1, H, N, D), each at its seat among those of the S slots
    in use. The other seats compute with zeros.

    The queries of a slot meet its prompt's K/V as one matrix product, so that it is read once a
    group, and each row's own K/V is read where it lies."""

    def __init__(self, cache, rows):
        # Of each row: its seat, and the last column that it sees of the prompt and of its own.
        places = [(row.slot, row.number, row.prompt_length - 1, row.read) for row in rows]
        places = torch.tensor(places)                                            # (N, 4)
        slots, _, prompt_columns, own_columns = (places.amax(0) + 1).tolist()    # S, , P, T
        self.prompt = cache.prompt[:, :, :slots, :, :prompt_columns]    # (layers, 2, S, Hk, P, D)
        self.own = cache.own[:, :, :slots, :, :, :own_columns]       # (layers, 2, S, Hk, G, T, D)
        slot, number, prompt_end, self.column = places.to(cache.own.device).T    # (N,) each
        self.seats = slot, number
        seen_prompt = up_to(prompt_end, prompt_columns)                          # (N, P)
        seen_own = up_to(self.column, own_columns)                               # (N, T)
        seen = torch.cat([seen_prompt, seen_own], 1)
        self.widths = prompt_columns, own_columns
        shape = slots, 1, cache.rows, 1, sum(self.widths)                    # (S, 1, G, 1, P + T)
        self.bias = torch.zeros(shape, device=seen.device)
        self.bias[slot, 0, number, 0] = seen.log()                               # 0, or -inf

    def __call__(self, layer, q, kv, scale):
        slot, number = self.seats
        own = self.own[layer]
        own[:, slot, :, number, self.column] = kv.permute(2, 0, 1, 3)
        own_k, own_v = own                                                       # (S, Hk, G, T, D)
        prompt_k, prompt_v = self.prompt[layer]                                  # (S, Hk, P, D)

        # f query heads share one head of keys and values.
        by_head = q.unflatten(1, (kv.shape[1], -1))                              # (1, Hk, f, N, D)
        by_head = by_head[0].permute(2, 0, 1, 3)                                 # (N, Hk, f, D)
        queries = q.new_zeros(own_k.shape[:3] + by_head.shape[2:])               # (S, Hk, G, f, D)
        queries[slot, :, number] = by_head
        of_prompt = product(queries, prompt_k.mT)                                # (S, Hk, G, f, P)
        of_own = product(queries, own_k.mT)                                      # (S, Hk, G, f, T)
        scores = torch.cat([of_prompt, of_own], -1)
        scores = scores * scale + self.bias
        weights = scores.softmax(-1).to(q.dtype)
        to_prompt, to_own = weights.split(self.widths, -1)
        out = product(to_prompt, prompt_v) + product(to_own, own_v)              # (S, Hk, G, f, D)
        out = out[slot, :, number]                                               # (N, Hk, f, D)
        return out.flatten(1, 2)[None].to(q.dtype)


def up_to(last, width):
    """Which of the numbers 0 to width - 1 are not above each of N last ones. -> (N, width), bool"""
    return torch.arange(width, device=last.device) <= last[:, None]


def product(x, kv):
    """Matrix product of x (S, Hk, G, f, a) with kv (S, Hk, a, b) or (S, Hk, G, a, b). -> (S, Hk, G,
    f, b), float32

    Float32 as in the kernels of training: scores rounded to bfloat16 would be those of another
    policy."""
    kv = kv.flatten(0, -3)                                                       # (B, a, b)
    rows = x.reshape(len(kv), -1, kv.shape[1])                                   # (B, rows, a)
    if x.is_cuda and x.dtype == torch.bfloat16:
        out = torch.bmm(rows, kv, out_dtype=torch.float32)
    else:
        out = torch.bmm(rows.float(), kv.float())
    return out.view(*x.shape[:-1], -1)


# ------------------------------------------------------------------------------- the rollout engine

@dataclass(eq=False)
class Row:
    """One continuation in flight."""
    sequence: Sequence
    slot: int                      # of its group in the cache
    number: int                    # in the group
    read: int = 0                  # of sequence.ids: as many are in the cache
    pictures_read: int = 0
    position: int = 0              # m-RoPE position of the next token to be read
    turn_tokens: int = 0           # sampled in this turn

    @property
    def unread(self):
        return len(self.sequence.ids) - self.read

    @property
    def prompt_length(self):
        return len(self.sequence.prompt.ids)


@dataclass
class Engine:
    """Runs many groups of continuations at once, each row decoded at its own pace."""
    policy: Policy
    temperature: float = 1.0               # 0: greedy
    top_p: float = 1.0
    top_k: int = 0                         # 0: all
    repetition_penalty: float = 1.0        # of all tokens before, the prompt's too
    turn_tokens: int = 1024                # sampled tokens a turn at most
    response_tokens: int = 2048            # all tokens behind the prompt at most
    # K/V columns at most: decides how many groups run at once; one always does. 0: half of a GPU's
    # free memory.
    cache_tokens: int = 0

    @torch.no_grad()
    def run(self, groups, on_turn):
        """groups: a list of lists of Sequences that share one prompt. A sequence may already have
        tokens: they are read before it goes on. on_turn(sequence, truncated) is called when the
        policy ends a turn (truncated: when it ran out of tokens); it returns the Chunk to go on
        from, or None to end. Yields each group as it is finished."""
        if not groups:
            return
        # A cache for the longest prompt, and for as many groups as there is memory for.
        prompt_columns = max(len(group[0].prompt.ids) for group in groups)
        own_rows = max(map(len, groups))
        columns = prompt_columns + own_rows * self.response_tokens       # of a group
        cache_tokens = self.cache_tokens or free_columns(self.policy)
        slots = max(1, min(cache_tokens // columns, len(groups)))
        self.cache = Cache(self.policy, slots, own_rows, prompt_columns, self.response_tokens)

        coming = list(groups)
        in_flight = {}                                       # slot -> its group
        rows = []                                            # in flight, of all slots
        while coming or rows:
            # Start groups while slots are free, the lowest ones: a pass is as wide as the highest.
            started = []
            for slot in range(slots):
                if coming and slot not in in_flight:
                    group = in_flight[slot] = coming.pop(0)
                    new = [Row(s, slot, number) for number, s in enumerate(group)]
                    started.append(new)
                    rows += new

            # Read what is unread: prompts, and observations. A row that waits holds up nobody: it
            # is read when a tenth as many wait as decode.
            decoding = [row for row in rows if row.unread == 1]
            waiting = [row for row in rows if row.unread > 1]
            if len(waiting) < 0.1 * len(decoding):
                waiting = []
            ready, hidden = [], []
            if started or waiting:
                ready, hidden_at_end = self.read(started, waiting)
                hidden.append(hidden_at_end)

            # Decode: read the last sampled token of each row that does not wait.
            if decoding:
                ready += decoding
                hidden.append(self.decode(decoding))

            # Sample a token of each of these rows; where a group is done, its slot is free.
            for row in self.sample(ready, torch.cat(hidden), on_turn):
                rows.remove(row)
                if all(other.slot != row.slot for other in rows):
                    yield in_flight.pop(row.slot)

    def read(self, started, rows):
        """Reads, end to end, the prompts of new groups (lists of Rows) and what `rows` have unread.
        -> the Rows that can go on, and the hidden states (rows, hidden) at the end of what each of
        them read"""
        batch = PackedBatch([])
        ends = {}                                            # Row -> where it has read to
        for group in started:
            prompt = group[0].sequence.prompt
            after = batch.add(self.policy, prompt, 0)
            for row in group:
                row.position = after
                if not row.unread:
                    ends[row] = len(batch.ids) - 1
        for row in rows:
            ids = row.sequence.ids[row.read:]
            pictures = row.sequence.pictures[row.pictures_read:]
            row.position = batch.add(self.policy, Chunk(ids, pictures), row.position)
            ends[row] = len(batch.ids) - 1
        layout = ReadLayout(self.cache, started, rows)
        hidden = self.policy.hidden_states(batch, layout)                            # (N, hidden)
        for row in rows:
            row.read = len(row.sequence.ids)
            row.pictures_read = len(row.sequence.pictures)
        return list(ends), hidden[list(ends.values())]

    def decode(self, rows):
        """Reads the one unread token of each row. -> hidden states (rows, hidden)"""
        layout = DecodeLayout(self.cache, rows)
        ids = [row.sequence.ids[-1] for row in rows]
        positions = torch.tensor([row.position for row in rows])
        batch = PackedBatch(ids, positions=[positions.expand(3, -1)])
        for row in rows:
            row.position += 1
            row.read += 1
        return self.policy.hidden_states(batch, layout)

    def sample(self, rows, hidden, on_turn):
        """Samples a token of each row and appends it, and what on_turn answers where a turn ends.
        -> the rows that are done"""
        rngs = [row.sequence.rng for row in rows]
        seen = ()
        if self.repetition_penalty != 1:
            seen = [row.sequence.prompt.ids + row.sequence.ids for row in rows]
        chosen = self.policy.choose(hidden, rngs, self.temperature, self.top_p, self.top_k,
                                    self.repetition_penalty, seen)
        done = []
        for row, token, log_prob in zip(rows, *chosen, strict=True):
            sequence = row.sequence
            sequence.ids.append(token)
            sequence.sampled.append(True)
            sequence.log_probs.append(log_prob)
            row.turn_tokens += 1
            ended = token in self.policy.end_tokens
            room = self.response_tokens - len(sequence.ids)
            if not ended and room > 0 and row.turn_tokens < self.turn_tokens:
                continue
            row.turn_tokens = 0
            chunk = on_turn(sequence, truncated=not ended)
            if chunk is None or len(chunk.ids) >= room:
                done.append(row)
            else:
                sequence.add(chunk)
        return done


def free_columns(policy):
    """How many columns of keys and values half of the GPU's free memory holds; without a GPU as
    many as fit anywhere."""
    if policy.device.type != "cuda":
        return 262_144
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(policy.device)
    numbers = 2 * math.prod(policy.kv_shape)                 # of a column, K and V
    return free // 2 // (numbers * policy.model.dtype.itemsize)


# -------------------------------------------------------------------------------- several processes

def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value):
    """Every process's `value` (anything that pickles), as a list by rank, on every process. It also
    waits for all of them."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather_shares(values):
    """The values of all items in their order, on every process. values: of this process's items,
    number rank, rank + world_size, and so on."""
    shares = gather(values)
    merged = [None] * sum(map(len, shares))
    for number, share in enumerate(shares):
        merged[number::len(shares)] = share
    return merged


def sum_over_processes(numbers):
    """The sums over all processes of some numbers, a list."""
    return list(map(sum, zip(*gather(numbers), strict=True)))


def sum_gradients(parameters):
    """Makes the gradients of replicated parameters their sums over all processes; those of sharded
    ones are summed by FSDP already. A missing gradient is zeros."""
    if world_size() == 1 or isinstance(parameters[0], DTensor):
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)


def split_by_size(items, size, limit):
    """Splits a list into lists of neighbours whose sizes add up to `limit` at most, or of one."""
    parts, room = [], 0
    for item in items:
        room -= size(item)
        if room < 0 or not parts:
            parts.append([])
            room = limit - size(item)
        parts[-1].append(item)
    return parts


def shard_if_large(policy):
    """Prepares a policy for training in several processes: a large one is sharded, of a small one
    each keeps a copy.

    FSDP2: each process keeps a part of every weight, gradient and optimizer state. In an update,
    the weights of the language model are gathered layer by layer, and all others at once. With
    several nodes, each has all the parts, and weights are gathered inside of a node."""
    if world_size() == 1 or policy.model.num_parameters() <= REPLICATED:
        return
    gpus = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    mesh = dist.init_device_mesh(policy.device.type, (world_size() // gpus, gpus),
                                 mesh_dim_names=("replicate", "shard"))
    options = dict(mesh=mesh, mp_policy=fsdp.MixedPrecisionPolicy(reduce_dtype=torch.float32),
                   reshard_after_forward=True)
    # The vision tower stays unsharded: which process has images to encode, and when, is its own
    # affair.
    frozen = set(policy.model.model.visual.parameters())
    for layer in policy.model.model.language_model.layers:
        fsdp.fully_shard(layer, **options)
    fsdp.fully_shard(policy, **options, ignored_params=frozen)
    fsdp.register_fsdp_forward_method(policy, "log_probs")
    for unit in fsdp_units(policy):
        # Gradients are summed, not averaged: the loss is divided by the tokens of all processes.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)         # what Gloo can do, too
    with torch.no_grad():          # the first to run becomes FSDP's root: not a layer, in a rollout
        policy.log_probs([[Sequence(Chunk([0]))]])


def is_sharded(policy):
    return isinstance(policy, fsdp.FSDPModule)


def fsdp_units(policy):
    return [module for module in policy.modules() if is_sharded(module)]


@contextmanager
def unsharded(policy):
    """Inside, every process has all weights of a sharded policy, and samples without waiting for
    the others."""
    for unit in fsdp_units(policy):
        unit.unshard()
        unit.set_reshard_after_forward(False)
    yield
    for unit in fsdp_units(policy):
        unit.set_reshard_after_forward(True)
        unit.reshard()
