"""The policy: load, encode, sample, score, save. It knows tokens and images, and nothing of tasks.

In:  a Hugging Face folder or hub id of the Qwen2.5-VL family, and dialogues of text and PIL images.
Out: `Sequence`s of sampled tokens with their log-probabilities, log-probabilities with gradients,
     checkpoints.

A GRPO group is one prompt with G continuations, and it is computed as that: image and prompt are
run once, the G continuations attend to them. The forward pass is Hugging Face's own; ours is only
the attention, in three layouts:

    read      chunks of tokens: prompts (one copy of their K/V a group), observations of some rows
    decode    one token of each row, which sees [prompt K/V | own K/V]
    train     [prompt | response 1 | ... | response G]: each response sees the prompt and itself

Departures from common practice: vision tokens and unused rows of the vocabulary are forbidden in
sampling and in every log-softmax, so an image token in a sequence is always one that we placed;
positions are always given explicitly.
"""
import json
import math
import os
import random
import re
import shutil
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import compress, groupby, islice
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, logging
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, load_state_dict
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
    smart_resize,
)
from transformers.utils import cached_file

logging.disable_progress_bar()

# Of a GPU. Lengths change all the time: less memory is lost between blocks that can grow; and cuDNN
# would first plan the attention of every new length, for a tenth of a second or more.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
torch.backends.cuda.enable_cudnn_sdp(False)

MAX_LOGITS = 2**26          # floats in the largest (tokens, vocabulary) tensor: 256 MiB
MAX_VISION_PATCHES = 2**16  # patches in one pass of the vision tower


class UserError(Exception):
    """A mistake of the user's, told in one line: what is wrong, where, and how to repair it."""


@dataclass(eq=False)
class Picture:
    """An image as the model sees it.

    image: RGB, of the model input's size; grid (t, h, w) in patches; tokens: how many stand for it.
    While the vision tower is frozen, its features (tokens, hidden) are kept, and then the image is
    dropped. Pixels are kept as bytes: what the tower gets, floats and each twice, is eight times as
    large."""
    image: Image.Image | None
    grid: tuple[int, int, int]
    tokens: int
    features: torch.Tensor | None = None


@dataclass(eq=False)
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

def load(path, *, max_pixels=None, min_pixels=None, max_image_side=None, dtype=None, device=None):
    """Loads a checkpoint folder or hub id of the Qwen2.5-VL family. -> Policy

    max_pixels, min_pixels: bounds of the model input's area (px), instead of the checkpoint's own.
    max_image_side: of its longest side (px). dtype: bfloat16 on a GPU and float32 on a CPU, if not
    given. Raises UserError where it is no such checkpoint."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype is None:
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    config = read_config(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        template = cached_file(path, "chat_template.json",
                               _raise_exceptions_for_missing_entries=False)
        if template:                # of older checkpoints; it counts more than the tokenizer's own
            tokenizer.chat_template = json.loads(Path(template).read_text())["chat_template"]
        processor = Qwen2VLImageProcessorPil.from_pretrained(path)
        model, report = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True)
    except Exception as error:      # of many kinds, for a missing, foreign or truncated file alike
        raise not_a_checkpoint(truncated_file(path), error) from error
    mismatched = {name for name, *_ in report["mismatched_keys"]}
    if missing := sorted(report["missing_keys"] | mismatched):      # they would stay random
        raise UserError(f"{path}: {len(missing)} weights are missing or of another size than "
                        f"config.json says, the first is {missing[0]}; get all its files again")
    if len(tokenizer) <= config.image_token_id or not tokenizer.chat_template:
        raise UserError(f"{path}: its tokenizer ({len(tokenizer)} tokens) or its chat template is "
                        "missing; put tokenizer.json, tokenizer_config.json and chat_template.json "
                        "of that model beside its config.json")
    least, most = processor.size["shortest_edge"], processor.size["longest_edge"]
    processor.size = {"shortest_edge": min_pixels or least, "longest_edge": max_pixels or most}
    model.model.language_model.config._attn_implementation = "layout"
    model.model.visual.config._attn_implementation = "flash_by_length"
    # The patch embedding is a convolution whose kernel covers a patch; as the matrix product that
    # it is, it takes a third of the time on a CPU.
    embed = model.model.visual.patch_embed
    embed.forward = lambda patches: F.linear(patches, embed.proj.weight.flatten(1))
    return Policy(model.to(device).eval(), tokenizer, processor, max_image_side)


def read_config(path):
    """The config of a checkpoint folder or hub id; no weights are read. Raises UserError."""
    try:
        config = AutoConfig.from_pretrained(path)
    except Exception as error:      # of many kinds, for a missing or foreign folder alike
        raise not_a_checkpoint(path, error) from error
    if config.model_type != "qwen2_5_vl":
        raise UserError(f"{path}: model type '{config.model_type}' is not Qwen2.5-VL's; give a "
                        "checkpoint of that family")
    return config


def not_a_checkpoint(path, error):
    why = (str(error).strip() or repr(error)).splitlines()[0]
    return UserError(f"{path}: cannot be loaded as a checkpoint ({why}); give a folder with "
                     "config.json, complete weights and tokenizer, or a hub id")


def truncated_file(path):
    """The first weights file of a folder whose header cannot be read, or else the folder."""
    for file in sorted(Path(path).glob("*.safetensors")):
        try:
            load_state_dict(file, map_location="meta")
        except Exception:
            return file
    return path


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


def write_text(path, text):
    """Writes a file completely or not at all."""
    part = Path(f"{path}.part")
    part.write_text(text)
    move_into_place(part, Path(path))


# --------------------------------------------------------------------------------------- the policy

class Policy:
    """Model, tokenizer and image processor of a checkpoint, and the few numbers they imply."""

    def __init__(self, model, tokenizer, image_processor, max_image_side=None):
        self.model, self.tokenizer, self.image_processor = model, tokenizer, image_processor
        self.max_image_side = max_image_side         # px, of the model input; None: any
        self.train_vision = False
        config = model.config
        self.text_config = config.text_config
        self.image_token = config.image_token_id
        self.merge = config.vision_config.spatial_merge_size         # patches a token, each side
        self.factor = config.vision_config.patch_size * self.merge   # px a token, each side
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self.end_tokens = {tokenizer.eos_token_id, *ends} - {None}
        forbidden = torch.zeros(self.text_config.vocab_size, dtype=torch.bool)
        forbidden[len(tokenizer):] = True            # rows of the matrix that stand for no token
        for name in ("image", "video", "vision_start", "vision_end"):
            token = getattr(config, f"{name}_token_id")
            if token is not None and token < len(forbidden):
                forbidden[token] = True
        self.forbidden = forbidden.to(model.device)
        self.cached_encode = lru_cache(50_000)(self.tokenize)
        self.cached_render = lru_cache(10_000)(self.apply_template)

    @property
    def device(self):
        return self.model.device

    def trainable(self):
        """The parameters that training changes: all, or all but the vision tower's."""
        return [parameter for name, parameter in self.model.named_parameters()
                if self.train_vision or ".visual." not in name]

    def save(self, folder, **notes):
        """Writes a Hugging Face checkpoint folder, completely or not at all. notes: what else is
        kept in it, each as NAME.json. All processes have to call it; the first one writes."""
        folder, state = Path(folder), self.model.state_dict(keep_vars=True)
        gathered = {}
        for weight in state.values():                # one at a time, and tied ones once
            full = full_tensor(weight.detach())
            gathered[id(weight)] = full.cpu() if rank() == 0 else None
        if rank():
            return
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        state = {name: gathered[id(weight)] for name, weight in state.items()}
        self.model.save_pretrained(part, state_dict=state)
        self.tokenizer.save_pretrained(part)
        self.image_processor.save_pretrained(part)
        for name, note in notes.items():
            (part / f"{name}.json").write_text(json.dumps(note, indent=1) + "\n")
        move_into_place(part, folder)

    # -------------------------------------------------------------------- text and images to tokens

    def encode(self, text):
        return list(self.cached_encode(text))

    def tokenize(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=False,
                                     clean_up_tokenization_spaces=False)

    def input_size(self, width, height, rounded=True):
        """(width, height) in px of the model input made of an image of this size.

        rounded False: before the sides are rounded to whole tokens."""
        size = self.image_processor.size
        scale = min(1, (self.max_image_side or math.inf) / max(width, height))
        width, height = max(1, round(width * scale)), max(1, round(height * scale))
        if not rounded:
            scale = min(1, math.sqrt(size["longest_edge"] / (width * height)))
            return int(width * scale), int(height * scale)
        try:
            height, width = smart_resize(height, width, self.factor, size["shortest_edge"],
                                         size["longest_edge"])
        except ValueError as error:
            raise UserError(f"an image of {width}x{height} px cannot be encoded: {error}") from None
        return width, height

    def picture(self, image):
        """PIL image -> Picture. Transparency is ignored."""
        size = self.input_size(*image.size)
        image = image.convert("RGB").resize(size, self.image_processor.resample)
        columns, rows = (side // self.image_processor.patch_size for side in size)
        return Picture(image, (1, rows, columns), rows * columns // self.merge**2)

    def chunk(self, text, images=()):
        """Text in which every "<|image_pad|>" stands for one of `images` (PIL or Picture)."""
        first, *rest = text.split(self.tokenizer.convert_ids_to_tokens(self.image_token))
        if len(rest) != len(images):
            raise ValueError(f"{len(rest)} image places in the text, {len(images)} images")
        chunk = Chunk(self.encode(first))
        for image, text_behind in zip(images, rest, strict=True):
            picture = image if isinstance(image, Picture) else self.picture(image)
            chunk.pictures.append(picture)
            chunk.ids += [self.image_token] * picture.tokens + self.encode(text_behind)
        return chunk

    def render(self, messages):
        """Chat messages -> text, by the chat template, up to where the assistant speaks."""
        return self.cached_render(json.dumps(messages))

    def apply_template(self, messages):
        return self.tokenizer.apply_chat_template(json.loads(messages), tokenize=False,
                                                  add_generation_prompt=True)

    def prompt(self, messages, images=()):
        """Chat messages -> the Chunk after which the assistant speaks.

        Content: text, or a list of {"type": "image"} and {"type": "text", "text": ...}; `images` in
        the order of their places."""
        return self.chunk(self.render(messages), images)

    def reply(self, content, images=()):
        """A user turn between an end token of the assistant's and its next turn, as a Chunk."""
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "\0"},
                    {"role": "user", "content": content}]
        text = self.render(messages).partition("\0")[2]
        return self.chunk(text.removeprefix(self.tokenizer.eos_token), images)

    def default_system_message(self):
        """The system message that the chat template adds where a dialogue has none. "": nothing, or
        the Qwen models' sentence, which says nothing of a task."""
        text = self.render([{"role": "user", "content": "?"}])
        system = re.match(r"<\|im_start\|>system\n(.*?)<\|im_end\|>", text, re.S)
        message = system[1].strip() if system else ""
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
        (patches, channels * 2 * patch * patch) float32.

        The image processor would loop over a list. Its patches run from top to bottom, so
        neighbours of equal width are given to it as one tall image: the patches are the same."""
        values = []
        for width, neighbours in groupby(pictures, lambda picture: picture.image.width):
            images = [picture.image for picture in neighbours]
            tall, top = Image.new("RGB", (width, sum(image.height for image in images))), 0
            for image in images:
                tall.paste(image, (0, top))
                top += image.height
            out = self.image_processor(images=[tall], do_resize=False, return_tensors="pt")
            values.append(out["pixel_values"])
        return torch.cat(values)

    def features(self, pictures):
        """Vision features of several pictures, each (tokens, hidden). With the vision tower frozen
        they are computed once and kept in the picture."""
        new = [picture for picture in dict.fromkeys(pictures) if picture.features is None]
        new.sort(key=lambda picture: picture.grid)
        features = {}
        for part in split_by_size(new, lambda picture: math.prod(picture.grid), MAX_VISION_PATCHES):
            features |= zip(part, self.run_vision_tower(part), strict=True)
        if not self.train_vision:
            for picture in new:
                picture.features, picture.image = features[picture], None
        return [features.get(picture, picture.features) for picture in pictures]

    def run_vision_tower(self, pictures):
        """Pictures in the order of their sizes -> features, each (tokens, hidden).

        Those of one size are given to it as the frames of one film: it encodes each frame by
        itself, and works out positions and windows once for all of them."""
        pixels = self.pixel_values(pictures).to(self.device, self.model.dtype)
        grids = [(len(list(same)), height, width)
                 for (_, height, width), same in groupby(picture.grid for picture in pictures)]
        grids = torch.tensor(grids, device=self.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.train_vision):
            out = self.model.model.get_image_features(pixels, grids).pooler_output
        return torch.cat(out).split([picture.tokens for picture in pictures])

    def embed(self, ids, pictures):
        """Token ids (list, N) and the pictures of their image tokens -> embeddings (N, hidden)."""
        ids = torch.tensor(ids, device=self.device)
        x = self.model.model.language_model.embed_tokens(ids)                    # (N, hidden)
        if pictures:
            places = (ids == self.image_token).nonzero()[:, 0]
            x = x.index_put((places,), torch.cat(self.features(pictures)).to(x.dtype))
        return x

    def positions(self, ids, pictures, start=0):
        """m-RoPE positions (3, N) of a chunk that starts at position `start`, and the one after it.

        Text counts on in all three rows. An image stands at one time; its tokens count down and
        across from there, and the text behind it goes on after its longer side."""
        parts, end = [], 0                                   # tokens that have positions
        for picture in pictures:
            first = ids.index(self.image_token, end)
            origin = start + first - end
            _, height, width = (side // self.merge for side in picture.grid)     # in tokens
            grid = [torch.arange(side) for side in (1, height, width)]
            parts.append(torch.arange(start, origin).expand(3, -1))
            parts.append(torch.cartesian_prod(*grid).T + origin)                 # (3, tokens)
            start = origin + max(height, width)
            end = first + picture.tokens
        after = start + len(ids) - end
        parts.append(torch.arange(start, after).expand(3, -1))
        return torch.cat(parts, 1), after

    # ------------------------------------------------------------- hidden states, log-probabilities

    def hidden(self, x, positions, layout):
        """Embeddings (B, L, hidden) at positions (3, B, L) through the language model -> (B, L,
        hidden). layout: what attends to what."""
        masks = {"full_attention": None, "sliding_attention": None}      # the layout is the mask
        out = self.model.model.language_model(
            inputs_embeds=x, position_ids=positions.to(self.device), attention_mask=masks,
            use_cache=False, layout=layout)
        return out.last_hidden_state

    def hidden_of(self, batch, layout):
        """A PackedBatch of N tokens -> (N, hidden)."""
        x = self.embed(batch.ids, batch.pictures)[None]                          # (1, N, hidden)
        positions = torch.cat(batch.positions, 1)[:, None]                       # (3, 1, N)
        return self.hidden(x, positions, layout)[0]

    def log_softmax(self, hidden, temperature=1.0):
        """Hidden states (N, hidden) -> log-probabilities (N, vocabulary) of the distribution that
        is sampled from, float32."""
        logits = self.model.lm_head(hidden).float()
        return torch.log_softmax(logits.masked_fill(self.forbidden, -torch.inf) / temperature, -1)

    def choose(self, hidden, rngs, temperature=1.0, top_p=1.0):
        """Samples a token from each of N hidden states (N, hidden), by the next number of each of N
        random rngs. -> N tokens, N log-probabilities, as lists

        temperature 0: the likeliest token, and no number is drawn."""
        log_probs = self.log_softmax(hidden, temperature or 1.0)                 # (N, vocabulary)
        if top_p < 1:
            log_probs = nucleus(log_probs, top_p)
        if temperature == 0:
            tokens = log_probs.argmax(-1, keepdim=True)                          # (N, 1)
        else:
            tokens = invert(log_probs, [rng.getrandbits(32) / 2**32 for rng in rngs])
        return tokens[:, 0].tolist(), log_probs.gather(1, tokens)[:, 0].tolist()

    def token_log_probs(self, hidden, targets, temperature):
        """Log-probabilities (N,) of `targets` (N,) after hidden states (N, hidden), with MAX_LOGITS
        logits in memory at most."""
        def log_probs_of(h, t):
            return self.log_softmax(h, temperature).gather(1, t[:, None])[:, 0]
        size = max(1, MAX_LOGITS // self.text_config.vocab_size)
        if len(targets) <= size:
            return log_probs_of(hidden, targets)
        parts = zip(hidden.split(size), targets.split(size), strict=True)
        return torch.cat([checkpoint(log_probs_of, *part, use_reentrant=False) for part in parts])

    def log_probs(self, groups, temperature=1.0):
        """Log-probabilities, with gradients, of every sampled token: each prompt is run once.

        groups: lists of Sequences, those of a list sharing one prompt. -> (N,), ordered by group,
        sequence and token"""
        batch = pack(self, groups)
        hidden = self.hidden_of(batch, TrainLayout(batch.lengths))               # (tokens, hidden)
        targets = torch.tensor(batch.ids, device=self.device)[batch.targets]     # (N,)
        return self.token_log_probs(hidden[batch.predicted_from], targets, temperature)


@dataclass
class PackedBatch:
    """Chunks end to end, as one row of N tokens; ids, pictures and positions (3, length) of all.

    Of training batches also: lengths, of each group: [prompt, response 1, ..., response G];
    targets: places of the sampled tokens; predicted_from: of each the place of the token before
    it."""
    ids: list = field(default_factory=list)
    pictures: list = field(default_factory=list)
    positions: list = field(default_factory=list)
    lengths: list = field(default_factory=list)
    targets: list = field(default_factory=list)
    predicted_from: list = field(default_factory=list)

    def add(self, policy, chunk, start):
        """Appends a Chunk, or a Sequence without its prompt, from position `start` on. -> the
        position after it"""
        positions, after = policy.positions(chunk.ids, chunk.pictures, start)
        self.ids += chunk.ids
        self.pictures += chunk.pictures
        self.positions.append(positions)
        return after


def pack(policy, groups):
    """Groups of Sequences -> the PackedBatch [prompt | response 1 | ... | response G] of each."""
    batch = PackedBatch()
    for group in groups:
        prompt = group[0].prompt
        after = batch.add(policy, prompt, 0)
        prompt_end = len(batch.ids) - 1
        lengths = [len(prompt.ids)]
        for sequence in group:
            first = len(batch.ids)
            batch.add(policy, sequence, after)
            places = range(first, len(batch.ids))
            batch.targets += compress(places, sequence.sampled)
            batch.predicted_from += compress([prompt_end, *places], sequence.sampled)
            lengths.append(len(places))
        batch.lengths.append(lengths)
    return batch


def invert(log_probs, uniforms):
    """Inverse transform sampling: the first token at which the cumulated probability exceeds the
    uniform number in [0, 1). log_probs (N, vocabulary); uniforms: N numbers. -> tokens (N, 1)

    A token of probability 0 is never the first."""
    cumulated = log_probs.exp().cumsum(-1, dtype=torch.float64)                  # (N, vocabulary)
    uniforms = torch.tensor(uniforms, dtype=torch.float64, device=log_probs.device)
    return torch.searchsorted(cumulated, uniforms[:, None] * cumulated[:, -1:], right=True)


def nucleus(log_probs, top_p):
    """Keeps the fewest tokens whose probabilities add up to top_p, and renormalises; (N,
    vocabulary) both."""
    ordered, index = log_probs.sort(-1, descending=True)
    beyond = ordered.exp().cumsum(-1) - ordered.exp() >= top_p
    dropped = torch.zeros_like(beyond).scatter(-1, index, beyond)
    return torch.log_softmax(log_probs.masked_fill(dropped, -torch.inf), -1)


# -------------------------------------------------------------------------- attention and its cache

def layout_attention(module, q, k, v, attention_mask, scaling=None, layout=None, **kwargs):
    """Hugging Face's attention interface, of the language model: q (B, H, L, D), k, v (B, Hk, L, D)
    -> (B, L, H, D). Without a layout: plain SDPA."""
    if layout is None:
        plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return plain(module, q, k, v, attention_mask, scaling=scaling, **kwargs)
    return layout(module.layer_idx, q, k, v, scaling).transpose(1, 2), None


def window_attention(module, q, k, v, attention_mask, scaling=None, cu_seq_lens_q=None, **kwargs):
    """The same of the vision tower: q, k, v (1, H, N, D), N patches of windows or images that begin
    at cu_seq_lens_q (W + 1,). All windows of one length are a batch: one call, not one a window."""
    out, starts = torch.empty_like(q), cu_seq_lens_q[:-1]
    lengths = cu_seq_lens_q.diff()                                               # (W,)
    for length in lengths.unique().tolist():
        offsets = torch.arange(length, device=q.device)
        index = starts[lengths == length][:, None] + offsets                     # (w, length)
        windows = [x[0, :, index].transpose(0, 1) for x in (q, k, v)]            # (w, H, length, D)
        attended = F.scaled_dot_product_attention(*windows, scale=scaling)
        out[0, :, index] = attended.transpose(0, 1)                              # (H, w, length, D)
    return out.transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register("layout", layout_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register("layout", sdpa_mask)
# transformers calls one named "flash" once, with cu_seq_lens_q, and all others once a window
ALL_ATTENTION_FUNCTIONS.register("flash_by_length", window_attention)


def causal_attention(q, k, v, scale):
    """q (B, H, L, D), k, v (B, Hk, M, D), M >= L: the queries are the last L of the M columns.
    -> (B, H, L, D)"""
    mask = causal_lower_right(q.shape[2], k.shape[2])        # a bias that the flash kernel knows
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)


class TrainLayout:
    """Tokens (1, N), of each group [prompt | response 1 | ... | response G]. Each response is
    computed with a copy of its prompt's K/V, a single one as its prompt's end. lengths: see
    PackedBatch."""

    def __init__(self, lengths):
        self.lengths = [[sum(group)] if len(group) == 2 else group for group in lengths]

    def __call__(self, layer, q, k, v, scale):
        flat = sum(self.lengths, [])
        parts = zip(q.split(flat, 2), k.split(flat, 2), v.split(flat, 2), strict=True)
        out = []
        for _, *responses in self.lengths:
            q, prompt_k, prompt_v = next(parts)
            out.append(causal_attention(q, prompt_k, prompt_v, scale))
            for q, k, v in islice(parts, len(responses)):
                k, v = torch.cat([prompt_k, k], 2), torch.cat([prompt_v, v], 2)
                out.append(causal_attention(q, k, v, scale))
        return torch.cat(out, 2)


class Cache:
    """K/V of what is in flight: the prompts of S groups, and what came behind them, in S * G rows.
    Those in use are always the first."""

    def __init__(self, policy, groups, rows, prompt_columns, own_columns):
        config, model = policy.text_config, policy.model
        self.groups, self.rows, self.prompt_columns = groups, rows, prompt_columns      # S, G, P
        self.heads = config.num_key_value_heads
        dim = config.hidden_size // config.num_attention_heads
        self.prompt, self.own = [], []                       # K and V of each layer
        for _ in range(config.num_hidden_layers):
            new = partial(torch.zeros, dtype=model.dtype, device=model.device)
            self.prompt.append(new(2, groups, self.heads, prompt_columns, dim))  # (2, S, Hk, P, D)
            self.own.append(new(2, groups * rows, self.heads, own_columns, dim)) # (2, SG, Hk, T, D)


class ReadLayout:
    """Tokens (1, N): chunks, end to end, to be kept in the cache.

    parts: of each (place of its group, prompt length, place of its row, own column where it begins,
    length); a prompt itself has no row, None."""

    def __init__(self, cache, parts):
        self.cache, self.parts = cache, parts

    def __call__(self, layer, q, k, v, scale):
        prompt, own = self.cache.prompt[layer], self.cache.own[layer]
        lengths = [length for *_, length in self.parts]
        queries, new = q.split(lengths, 2), torch.cat([k, v]).split(lengths, 2)
        out = []
        for part, q, kv in zip(self.parts, queries, new, strict=True):           # kv (2, Hk, L, D)
            group, prompt_length, row, column, length = part
            if row is None:
                prompt[:, group, :, :length] = kv
            else:
                end = column + length
                own[:, row, :, column:end] = kv
                kv = torch.cat([prompt[:, group, :, :prompt_length], own[:, row, :, :end]], 2)
            out.append(causal_attention(q, kv[:1], kv[1:], scale))
        return torch.cat(out, 2)


class DecodeLayout:
    """A token of each of N rows: q (N, H, 1, D). (N,) each: the places of the rows, the columns
    where their new K/V goes, the lengths of their prompts, their seats: row i of group s has seat
    s * G + i.

    The queries of a group meet its prompt's K/V as one matrix product, so that it is read once a
    group, and each row's own K/V is read where it lies; for rows that wait there are zeros."""

    def __init__(self, cache, places, columns, prompts, seats):
        G, Hk, device = cache.rows, cache.heads, cache.own[0].device
        self.cache = cache
        self.groups, self.rows = int(seats.max()) // G + 1, int(places.max()) + 1      # S, R
        self.prompt_width, self.own_width = int(prompts.max()), int(columns.max()) + 1  # P, T
        numbers = (x[:, None].to(device) for x in (places, columns, prompts, seats))
        places, columns, prompts, seats = numbers                                # (N, 1) each
        seen_prompt = torch.arange(self.prompt_width, device=device) < prompts   # (N, P)
        seen_own = torch.arange(self.own_width, device=device) <= columns        # (N, T)
        hidden = torch.cat([seen_prompt, seen_own], 1).logical_not().repeat_interleave(Hk, 0)
        bias = torch.zeros(hidden.shape, device=device).masked_fill(hidden, -torch.inf)
        self.bias = bias[:, None]                                               # (N * Hk, 1, P + T)
        self.places, self.columns = places[:, 0], columns[:, 0]
        heads = torch.arange(Hk, device=device)
        self.by_seat = ((seats // G * Hk + heads) * G + seats % G).flatten()     # in (S * Hk * G)
        self.by_place = (places * Hk + heads).flatten()                          # in (R * Hk)

    def __call__(self, layer, q, k, v, scale):
        N, H, _, D = q.shape
        Hk, P, T = k.shape[1], self.prompt_width, self.own_width
        prompt, own = self.cache.prompt[layer], self.cache.own[layer]
        own[:, self.places, :, self.columns] = torch.stack([k, v], 1)[..., 0, :]
        prompt_k, prompt_v = prompt[:, :self.groups, :, :P].flatten(1, 2)        # (S * Hk, P, D)
        own_k, own_v = own[:, :self.rows, :, :T].flatten(1, 2)                   # (R * Hk, T, D)
        q = q.view(N * Hk, H // Hk, D)                       # f query heads share one K/V head
        of_prompt = partial(product_at, index=self.by_seat, rows=self.cache.rows)
        of_own = partial(product_at, index=self.by_place, rows=1)
        scores = torch.cat([of_prompt(q, prompt_k.mT), of_own(q, own_k.mT)], -1)
        weights = (scores * scale + self.bias).softmax(-1).to(q.dtype)          # (N * Hk, f, P + T)
        to_prompt, to_own = weights.split([P, T], -1)
        out = of_prompt(to_prompt, prompt_v) + of_own(to_own, own_v)             # (N * Hk, f, D)
        return out.view(N, H, 1, D).to(q.dtype)


def product_at(x, kv, index, rows):
    """x (n, f, a), kv (B, a, b), each of which `rows` of x meet -> (n, f, b). index: where x is
    among the B * rows; those in between are zeros."""
    f = x.shape[1]
    spread = x.new_zeros(len(kv) * rows, *x.shape[1:])                          # (B * rows, f, a)
    spread[index] = x
    out = product(spread.view(len(kv), rows * f, -1), kv)                       # (B, rows * f, b)
    return out.view(len(spread), f, -1)[index]


def product(a, b):
    """Batched matrix product (B, m, n) x (B, n, k) with a float32 result, as the kernels of
    training have it: scores rounded to bfloat16 would be those of another policy."""
    if a.is_cuda and a.dtype == torch.bfloat16:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


# ------------------------------------------------------------------------------- the rollout engine

@dataclass(eq=False)
class Group:
    """Continuations in flight that share a prompt."""
    job: list            # all its Sequences
    place: int           # of the prompt in the cache
    rows: list           # the Rows that are not done


@dataclass(eq=False)
class Row:
    """One continuation in flight."""
    sequence: Sequence
    group: Group
    number: int                    # in the group
    place: int                     # in the cache
    position: int = 0              # m-RoPE position of the next token
    column: int = 0                # own columns in use
    turn_tokens: int = 0           # sampled in this turn
    unread: Chunk | None = None    # what has to be read before it goes on


def take_out(items, item, layers):
    """Takes a Group or Row out of those in flight, `items` by place. The last one takes its place
    in each layer's K/V (2, places, ...), so that there are no gaps to be read."""
    last = items.pop()
    if last is not item:
        items[item.place] = last
        for kv in layers:
            kv[:, item.place] = kv[:, last.place]
        last.place = item.place


def free_columns(policy):
    """How many columns of keys and values half of the GPU's free memory holds; without a GPU as
    many as fit anywhere."""
    if policy.device.type != "cuda":
        return 262_144
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(policy.device)
    config = policy.text_config
    head_dim = config.hidden_size // config.num_attention_heads
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    return free // 2 // (numbers * policy.model.dtype.itemsize)


class Engine:
    """Runs many groups of continuations at once, each row decoded at its own pace.

    policy, and: temperature (0: greedy), top_p, turn_tokens (sampled tokens a turn at most),
    response_tokens (all tokens behind the prompt at most), cache_tokens (K/V columns at most:
    decides how many groups run at once; one always does; None: what the GPU's free memory holds).

    A row that waits for its observation to be read holds up nobody: it is read when a tenth of the
    rows wait, or when there is nothing else to do. When a group is done, the next one starts. For a
    longer prompt than the cache was made for, all that is in flight is finished first, and the
    cache is made anew."""

    def __init__(self, policy, *, temperature=1.0, top_p=1.0, turn_tokens=1024,
                 response_tokens=2048, cache_tokens=65_536):
        self.policy, self.temperature, self.top_p = policy, temperature, top_p
        self.turn_tokens, self.response_tokens = turn_tokens, response_tokens
        self.cache_tokens = cache_tokens

    @torch.no_grad()
    def run(self, jobs, on_turn):
        """jobs: iterable of lists of Sequences that share one prompt, no list longer than the
        first. A sequence may already have tokens: they are read before it goes on.
        on_turn(sequence, truncated) is called when the policy ends a turn (truncated: when it ran
        out of tokens); it returns the Chunk to go on from, or None to end. Yields each job as it is
        finished."""
        self.jobs = iter(jobs)
        self.coming = deque()          # jobs that are known and have not started
        self.groups, self.rows = [], []          # in flight, by place
        self.cache = None
        while self.groups or self.next_job():
            rows = list(self.rows)
            waiting = [row for row in rows if row.unread]
            ready = [row for row in rows if not row.unread]
            hidden = []
            # decode: read the last sampled token of each row that does not wait
            if ready:
                hidden.append(self.decode(ready))
            # admit: start groups where there is room
            started = self.admit()
            # prefill: read prompts and observations
            if (ready or started) and len(waiting) < 0.1 * len(rows):
                waiting = []
            if started or waiting:
                read, hidden_at_end = self.prefill(started, waiting)
                ready += read
                hidden.append(hidden_at_end)
            # sample: the next token of each of these rows
            for row in self.sample(ready, torch.cat(hidden), on_turn):
                group = row.group
                group.rows.remove(row)
                take_out(self.rows, row, self.cache.own)
                if not group.rows:
                    take_out(self.groups, group, self.cache.prompt)
                    yield group.job

    def next_job(self):
        """The job that comes next, which stays the next one; None at the end."""
        if not self.coming:
            self.coming.extend(islice(self.jobs, 1))
        return self.coming[0] if self.coming else None

    def admit(self):
        """Starts the jobs that there is room for. -> their Groups"""
        started = []
        while job := self.next_job():
            if not self.groups and not self.has_room(job):
                self.make_cache()
            if not self.has_room(job):
                break
            self.coming.popleft()
            group = Group(job, len(self.groups), [])
            for number, sequence in enumerate(job):
                row = Row(sequence, group, number, len(self.rows) + number)
                if sequence.ids:
                    row.unread = Chunk(list(sequence.ids), sequence.pictures)
                group.rows.append(row)
            self.groups.append(group)
            self.rows += group.rows
            started.append(group)
        return started

    def has_room(self, job):
        """Whether a group can start, and has enough columns for its prompt."""
        return (self.cache is not None and len(self.groups) < self.cache.groups
                and len(job[0].prompt.ids) <= self.cache.prompt_columns)

    def make_cache(self):
        """A cache for as many of the coming jobs as cache_tokens allow, for prompts that are up to
        a quarter longer than theirs."""
        self.cache = None                                    # frees the one before
        cache_tokens = self.cache_tokens or free_columns(self.policy)
        rows = len(self.coming[0])
        while True:
            prompt_columns = max(len(job[0].prompt.ids) for job in self.coming) * 5 // 4
            fits = cache_tokens // (prompt_columns + rows * self.response_tokens)
            job = next(self.jobs, None) if len(self.coming) < fits else None
            if job is None:
                break
            self.coming.append(job)
        groups = max(1, min(fits, len(self.coming)))
        self.cache = Cache(self.policy, groups, rows, prompt_columns, self.response_tokens)

    def decode(self, rows):
        """Reads the last sampled token of each row. -> hidden states (rows, hidden)"""
        numbers = [(row.position, row.place, row.column, len(row.sequence.prompt.ids),
                    row.group.place * self.cache.rows + row.number) for row in rows]
        positions, places, columns, prompts, seats = torch.tensor(numbers).T     # (rows,) each
        x = self.policy.embed([row.sequence.ids[-1] for row in rows], [])[:, None]
        for row in rows:
            row.position += 1
            row.column += 1
        layout = DecodeLayout(self.cache, places, columns, prompts, seats)
        return self.policy.hidden(x, positions.expand(3, -1)[..., None], layout)[:, 0]

    def prefill(self, groups, rows):
        """Reads, end to end, the prompts of new groups and what rows have unread. -> the Rows that
        can go on, and the hidden states (rows, hidden) at the end of what each of them read"""
        todo = []                                            # (rows, chunk, place of its K/V)
        for group in groups:
            todo.append((group.rows, group.job[0].prompt, None))
            rows = rows + [row for row in group.rows if row.unread]
        todo += [([row], row.unread, row.place) for row in rows]
        batch, parts, ends = PackedBatch(), [], {}
        for readers, chunk, place in todo:
            first, length = readers[0], len(chunk.ids)
            after = batch.add(self.policy, chunk, first.position)
            prompt_length = len(first.sequence.prompt.ids)
            parts.append((first.group.place, prompt_length, place, first.column, length))
            for row in readers:
                row.position, ends[row] = after, len(batch.ids) - 1
            if place is not None:
                first.column += length
                first.unread = None
        hidden = self.policy.hidden_of(batch, ReadLayout(self.cache, parts))     # (N, hidden)
        return list(ends), hidden[list(ends.values())]

    def sample(self, rows, hidden, on_turn):
        """Samples a token of each row and appends it. Where a turn ends, what the row goes on from
        is left unread. -> the rows that are done"""
        rngs, done = [row.sequence.rng for row in rows], []
        tokens, log_probs = self.policy.choose(hidden, rngs, self.temperature, self.top_p)
        for row, token, log_prob in zip(rows, tokens, log_probs, strict=True):
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
                continue
            sequence.add(chunk)
            row.unread = Chunk([token, *chunk.ids], chunk.pictures)      # `token` is unread as well
        return done


# -------------------------------------------------------------------------------- several processes

REPLICATED = 100_000_000            # parameters of a model at most of which each process has a copy


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
    total = sum(len(share) for share in shares)
    return [shares[i % len(shares)][i // len(shares)] for i in range(total)]


def sum_over_processes(numbers):
    """The sums over all processes of some numbers, a list; cheaper than `gather`."""
    if world_size() == 1:
        return numbers
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sums = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


def full_tensor(x):
    """A sharded tensor, gathered (all processes have to call it); anything else as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def shard_like(x, parameter):
    """A full tensor, sharded as the parameter is."""
    if not isinstance(parameter, DTensor):
        return x
    return distribute_tensor(x.to(parameter.device), parameter.device_mesh, parameter.placements,
                             src_data_rank=None)


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


class MicroBatch(NamedTuple):
    """Groups of Sequences in one forward and backward pass, and the weight of its loss: 0.0 for a
    filler, by which sharded processes make the same number of passes."""
    groups: list
    weight: float = 1.0


def micro_batches(groups, tokens, spare=None):
    """Groups of Sequences -> MicroBatches of at most `tokens` tokens (one group at least), those of
    similar length together.

    spare: groups of a filler, where weights are sharded. All processes gather these together, so
    each gets as many micro-batches as the one that has most."""
    def size(group):
        return len(group[0].prompt.ids) + sum(len(sequence.ids) for sequence in group)
    batches = [MicroBatch(part) for part in split_by_size(sorted(groups, key=size), size, tokens)]
    if spare is not None:
        missing = max(gather(len(batches))) - len(batches)
        batches += [MicroBatch(spare, 0.0)] * missing
    return batches


def average_gradients(parameters):
    """Makes the gradients of replicated parameters their mean over all processes, by one all-reduce
    in float32; those of sharded ones are averaged by FSDP already.

    A missing gradient counts as zeros; where no process has one, none is made."""
    if world_size() == 1 or isinstance(parameters[0], DTensor):
        return
    device = parameters[0].device
    present = torch.tensor([float(p.grad is not None) for p in parameters], device=device)
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    flat = torch.cat([present, *(p.grad.flatten().float() for p in parameters)])
    dist.all_reduce(flat)
    flat /= world_size()
    present, *means = flat.split([len(parameters), *(p.numel() for p in parameters)])
    for p, share, mean in zip(parameters, present.tolist(), means, strict=True):
        p.grad = mean.view_as(p).to(p.dtype) if share else None


def shard_if_large(policy):
    """Prepares a policy for training in several processes: a large one is sharded, of a small one
    each keeps a copy."""
    if world_size() > 1 and sum(p.numel() for p in policy.model.parameters()) > REPLICATED:
        shard(policy)


def is_sharded(policy):
    return isinstance(policy.model, FSDPModule)


def shard(policy):
    """FSDP2: each process keeps a part of every weight, gradient and optimizer state. In an update,
    the weights of the language model are gathered layer by layer, and all others at once; gradients
    are averaged over the processes. A frozen vision tower stays unsharded: which process has images
    to encode, and when, is its own affair.

    With several nodes, each has all the parts, and weights are gathered inside of a node."""
    gpus = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    mesh = init_device_mesh(policy.device.type, (world_size() // gpus, gpus),
                            mesh_dim_names=("replicate", "shard"))
    options = dict(mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32),
                   reshard_after_forward=True)
    trained = set(policy.trainable())
    frozen = {p for p in policy.model.parameters() if p not in trained}
    for layer in policy.model.model.language_model.layers:
        fully_shard(layer, **options)
    fully_shard(policy.model, **options, ignored_params=frozen)
    # FSDP gathers the weights around methods of the model, so `log_probs` becomes one
    policy.model.log_probs = policy.log_probs
    register_fsdp_forward_method(policy.model, "log_probs")
    policy.log_probs = policy.model.log_probs
    with torch.no_grad():          # the first to run becomes FSDP's root: not a layer, in a rollout
        policy.log_probs([[Sequence(Chunk([0]))]])


@contextmanager
def unsharded(policy):
    """Inside, every process has all weights of a sharded policy, and samples without waiting for
    the others."""
    units = [module for module in policy.model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.unshard()
        unit.set_reshard_after_forward(False, recurse=False)
    yield
    for unit in units:
        unit.set_reshard_after_forward(True, recurse=False)
        unit.reshard()
