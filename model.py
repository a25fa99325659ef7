"""The policy: load, encode, sample, score, save. It knows tokens and images, and nothing about the task.

In:  a Hugging Face folder or hub id of the Qwen2.5-VL family, and dialogues made of text and PIL images.
Out: `Sequence`s of sampled tokens with their log-probabilities, log-probabilities with gradients, checkpoints.

A GRPO group is one prompt with G continuations, and it is computed as that: image and prompt are run once, the G
continuations attend to them. The forward pass is Hugging Face's own; ours is only the attention, in three layouts:

    read      chunks of tokens, each of its own place: prompts (one copy of their K/V a group), or observations of some rows
    decode    one token of each row, which sees [prompt K/V | own K/V]
    train     [prompt | response 1 | ... | response G]: each response sees the prompt and itself

Where it departs from common practice: vision tokens and unused vocabulary rows are forbidden in sampling *and* in every
log-softmax, so an image token in a sequence is always one that we placed; and positions are always given explicitly.
"""
import json
import math
import os
import random
import re
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, groupby, pairwise
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, logging
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, load_state_dict
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
from transformers.utils import cached_file

logging.disable_progress_bar()

MAX_LOGITS = 2**26          # floats in the largest (tokens, vocabulary) tensor that is ever made: 256 MiB
MAX_VISION_PATCHES = 2**16  # patches in one pass of the vision tower


class UserError(Exception):
    """A mistake of the user's, told in one line: what is wrong, where, and how to mend it."""


@dataclass(eq=False)
class Picture:
    """An image as the model sees it.

    image: RGB, of the size that is seen; grid (t, h, w) in patches; tokens: how many stand for it;
    features (tokens, hidden), kept only while the vision tower is frozen. Pixels are kept as bytes:
    as what the tower gets, floats and each of them twice, they would take eight times as much."""
    image: Image.Image
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
    """A prompt and what follows it. `sampled[i]` says whether the policy sampled `ids[i]`: it is known by construction, and
    exactly these tokens are trained on. `log_probs[i]` is the log-probability of sampling it (0.0 where it was injected).
    rng: its own random numbers: what is sampled does not depend on what runs beside it. Greedy decoding needs none."""
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


# ------------------------------------------------------------------------------------------------ the policy

class Policy:
    """Model, tokenizer and image processor of one checkpoint, and the few numbers that depend on them."""

    def __init__(self, model, tokenizer, image_processor, max_image_side=None):
        self.model, self.tokenizer, self.image_processor = model, tokenizer, image_processor
        self.max_image_side = max_image_side         # px, of the model input; None: any
        config = model.config
        self.text_config = config.text_config
        self.image_token = config.image_token_id
        self.factor = config.vision_config.patch_size * config.vision_config.spatial_merge_size   # px a token, each side
        ends = model.generation_config.eos_token_id
        self.end_tokens = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        vision = [config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id]
        forbidden = torch.zeros(self.text_config.vocab_size, dtype=torch.bool)
        forbidden[len(tokenizer):] = True            # rows of the matrix that stand for no token
        forbidden[[t for t in vision if t is not None and t < len(forbidden)]] = True
        self.forbidden = forbidden.to(model.device)
        self.train_vision = False
        self.within = lambda function: function()    # of a sharded model: with the weights gathered, see `rollout.shard`
        self._offsets, self._encoded, self._rendered = {}, {}, {}   # what recurs: positions, tokens, chat templates

    @property
    def device(self):
        return self.model.device

    def trainable(self):
        """The parameters that training changes: all, or all but the vision tower's."""
        return [p for n, p in self.model.named_parameters() if self.train_vision or ".visual." not in n]

    # -------------------------------------------------------------------------------------------- encoding

    def encode(self, text):
        if text not in self._encoded:
            self._encoded = self._encoded if len(self._encoded) < 50_000 else {}
            self._encoded[text] = self.tokenizer.encode(text, add_special_tokens=False)
        return list(self._encoded[text])

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

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
            h, w = smart_resize(height, width, self.factor, size["shortest_edge"], size["longest_edge"])
        except ValueError as error:
            raise UserError(f"an image of {width}x{height} px cannot be encoded: {error}") from None
        return w, h

    def picture(self, image):
        """PIL image -> Picture. Transparency is ignored."""
        size = self.input_size(*image.size)
        image = image.convert("RGB").resize(size, self.image_processor.resample)
        columns, rows = (side // self.image_processor.patch_size for side in size)
        tokens = columns * rows // self.image_processor.merge_size**2
        return Picture(image, (1, rows, columns), tokens)

    def pixel_values(self, pictures):
        """What the vision tower gets of some pictures: their patches, in the pictures' order,
        (patches, channels * 2 * patch * patch) float32.

        The image processor would loop over a list. But its patches run from top to bottom, so it is
        given one tall image of neighbours that are equally wide: the patches are the same."""
        found = []
        for width, same in groupby(pictures, lambda picture: picture.image.width):
            images = [picture.image for picture in same]
            tall, top = Image.new("RGB", (width, sum(image.height for image in images))), 0
            for image in images:
                tall.paste(image, (0, top))
                top += image.height
            out = self.image_processor(images=[tall], do_resize=False, return_tensors="pt")
            found.append(out["pixel_values"])
        return torch.cat(found)

    def chunk(self, text, images=()):
        """Text in which every "<|image_pad|>" stands for one of `images` (PIL or Picture) -> Chunk."""
        pictures = [image if isinstance(image, Picture) else self.picture(image) for image in images]
        pad = self.tokenizer.convert_ids_to_tokens(self.image_token)
        first, *rest = text.split(pad)
        if len(rest) != len(pictures):
            raise ValueError(f"{len(rest)} image places in the text, {len(pictures)} images")
        ids = self.encode(first)
        for picture, piece in zip(pictures, rest):
            ids += [self.image_token] * picture.tokens + self.encode(piece)
        return Chunk(ids, pictures)

    def prompt(self, messages, images=()):
        """Chat messages -> the Chunk after which the assistant speaks. Content: text, or a list of {"type": "image"} and
        {"type": "text", "text": ...}; `images` in the order of their places."""
        return self.chunk(self.render(messages), images)

    def render(self, messages):
        key = json.dumps(messages)
        if key not in self._rendered:
            self._rendered = self._rendered if len(self._rendered) < 10_000 else {}
            self._rendered[key] = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return self._rendered[key]

    def reply(self, content, images=()):
        """A user turn between an end token of the assistant's and its next turn, as a Chunk."""
        before = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "\0"}]
        text = self.render([*before, {"role": "user", "content": content}]).partition("\0")[2]
        return self.chunk(text.removeprefix(self.tokenizer.eos_token), images)

    def default_system_message(self):
        """What the chat template says where a dialogue has no system message; "" for nothing, or for
        the sentence of the Qwen models that says nothing of a task."""
        text = self.render([{"role": "user", "content": "?"}])
        found = re.match(r"<\|im_start\|>system\n(.*?)<\|im_end\|>", text, re.S)
        message = found[1].strip() if found else ""
        return "" if message == "You are a helpful assistant." else message

    def clean(self, text):
        """Text of unknown origin, with the tokenizer's special tokens broken up, so that it cannot speak as the chat itself.
        Half characters, which no tokenizer takes, become question marks."""
        for token in self.tokenizer.added_tokens_decoder.values():      # `all_special_tokens` lacks some, <|im_start|> for one
            if token.special:
                text = text.replace(token.content, token.content.replace("|", " "))
        return text.encode(errors="replace").decode()

    # -------------------------------------------------------------------------------------------- embedding

    def features(self, pictures):
        """Vision features of several pictures, each (tokens, hidden). With the vision tower frozen
        they are computed once and kept in the picture.

        Those of one size are given to the tower as the frames of one film: it encodes each frame by
        itself, and works out positions and windows once for all of them."""
        found = {}
        once = {id(p): p for p in pictures if p.features is None}.values()
        todo = sorted(once, key=lambda p: p.grid)
        while todo:
            ends = torch.tensor([math.prod(p.grid) for p in todo]).cumsum(0)
            n = max(1, int((ends <= MAX_VISION_PATCHES).sum()))
            part, todo = todo[:n], todo[n:]
            pixels = self.pixel_values(part).to(self.device, self.model.dtype)
            grids = [(len(list(same)), *size) for (_, *size), same in groupby(p.grid for p in part)]
            grids = torch.tensor(grids, device=self.device)
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.train_vision):
                out = self.model.model.get_image_features(pixels, grids).pooler_output
            parts = torch.cat(out).split([p.tokens for p in part])
            for picture, features in zip(part, parts):
                found[id(picture)] = features
                if not self.train_vision:
                    picture.features = features
        return [p.features if p.features is not None else found[id(p)] for p in pictures]

    def embed(self, ids, pictures):
        """Token ids (list, N) and the pictures of their image tokens -> embeddings (N, hidden)."""
        ids = torch.tensor(ids, device=self.device)
        x = self.model.model.language_model.embed_tokens(ids)                            # (N, hidden)
        if pictures:
            where = (ids == self.image_token).nonzero()[:, 0]
            x = x.index_put((where,), torch.cat(self.features(pictures)).to(x.dtype))
        return x

    def positions(self, ids, pictures, start=0):
        """m-RoPE positions (3, N) of a chunk that starts at position `start`, and the position after it."""
        if not pictures:
            return torch.arange(start, start + len(ids)).expand(3, -1), start + len(ids)
        key = (len(ids), ids.index(self.image_token), *(p.grid for p in pictures)) if len(pictures) == 1 else None
        offsets = self._offsets.get(key)
        if offsets is None:
            tensor = torch.tensor([ids])
            offsets = self.model.model.get_rope_index(tensor, mm_token_type_ids=(tensor == self.image_token).int(),
                                                      image_grid_thw=torch.tensor([p.grid for p in pictures]))[0][:, 0]
            if key and len(self._offsets) < 10_000:
                self._offsets[key] = offsets
        return offsets + start, start + int(offsets.max()) + 1

    # -------------------------------------------------------------------------------------------- running

    def hidden(self, x, positions, layout):
        """Embeddings (B, L, hidden) at positions (3, B, L) through the language model, attending as `layout` says."""
        masks = {"full_attention": None, "sliding_attention": None}   # the layout is the mask
        return self.model.model.language_model(inputs_embeds=x, position_ids=positions.to(self.device), attention_mask=masks,
                                               use_cache=False, layout=layout).last_hidden_state

    def log_softmax(self, hidden, temperature=1.0):
        """Hidden states (N, hidden) -> log-probabilities (N, vocabulary), float32, of the distribution sampled from."""
        logits = self.model.lm_head(hidden).float()
        return torch.log_softmax(logits.masked_fill(self.forbidden, -torch.inf) / temperature, -1)

    def choose(self, hidden, rngs, temperature=1.0, top_p=1.0):
        """Samples a token from each of N hidden states (N, hidden), by the next number of each of N random rngs.

        temperature 0: the likeliest token, and no number is drawn. -> N tokens, N log-probabilities, as lists"""
        log_probs = self.log_softmax(hidden, temperature or 1.0)                         # (N, vocabulary)
        if top_p < 1:
            log_probs = nucleus(log_probs, top_p)
        if temperature == 0:
            tokens = log_probs.argmax(-1, keepdim=True)
        else:
            tokens = invert(log_probs, [rng.getrandbits(32) / 2**32 for rng in rngs])
        return tokens[:, 0].tolist(), log_probs.gather(1, tokens)[:, 0].tolist()

    def token_log_probs(self, hidden, targets, temperature):
        """log-probabilities (N,) of `targets` (N,), never holding more than MAX_LOGITS logits at a time."""
        def chunk(h, t):
            return self.log_softmax(h, temperature).gather(1, t[:, None])[:, 0]
        size = max(1, MAX_LOGITS // self.text_config.vocab_size)
        if len(targets) <= size:
            return chunk(hidden, targets)
        return torch.cat([checkpoint(chunk, h, t, use_reentrant=False)
                          for h, t in zip(hidden.split(size), targets.split(size))])

    def log_probs(self, groups, temperature=1.0):
        """Log-probabilities, with gradients, of every sampled token of some groups: each prompt is run once.

        groups: lists of Sequences, those of a list sharing one prompt. -> (N,), ordered by group, sequence and token."""
        return self.within(lambda: self._log_probs(groups, temperature).clone())     # FSDP wants no view

    def _log_probs(self, groups, temperature):
        ids, pictures, positions, sizes, source, target = [], [], [], [], [], []
        for group in groups:
            prompt = group[0].prompt
            start, prompt_length = len(ids), len(prompt.ids)
            place, after = self.positions(prompt.ids, prompt.pictures)
            ids += prompt.ids
            pictures += prompt.pictures
            positions.append(place)
            for sequence in group:
                first = len(ids)
                for i, sampled in enumerate(sequence.sampled):
                    if sampled:            # predicted by the token before it, the first by the prompt's last
                        source.append(first + i - 1 if i else start + prompt_length - 1)
                        target.append(first + i)
                positions.append(self.positions(sequence.ids, sequence.pictures, after)[0])
                ids += sequence.ids
                pictures += sequence.pictures
            sizes.append((prompt_length, [len(s.ids) for s in group]))
        x = self.embed(ids, pictures)[None]                                                # (1, N, hidden)
        hidden = self.hidden(x, torch.cat(positions, 1)[:, None], TrainLayout(sizes))[0]   # (N, hidden)
        targets = torch.tensor(ids, device=self.device)[target]
        return self.token_log_probs(hidden[source], targets, temperature)

    def save(self, folder, **notes):
        """Writes a Hugging Face checkpoint folder, whole or not at all. notes: what else is kept in
        it, each as NAME.json. Where there are several processes, all have to call it, and the first
        one writes."""
        folder, state = Path(folder), self.model.state_dict(keep_vars=True)
        first, gathered = not dist.is_initialized() or dist.get_rank() == 0, {}
        for x in state.values():                        # one at a time, and tied ones once
            full = full_tensor(x.detach())
            gathered[id(x)] = full.cpu() if first else None
        if not first:
            return
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        self.model.save_pretrained(part, state_dict={name: gathered[id(x)] for name, x in state.items()})
        self.tokenizer.save_pretrained(part)
        self.image_processor.save_pretrained(part)
        for name, note in notes.items():
            (part / f"{name}.json").write_text(json.dumps(note, indent=1) + "\n")
        move_into_place(part, folder)


def full_tensor(x):
    """A tensor that is shared out over processes, gathered (all have to call it); anything else as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


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
    """Writes a file whole or not at all."""
    part = Path(f"{path}.part")
    part.write_text(text)
    move_into_place(part, Path(path))


def read_config(path):
    """The config of a checkpoint folder or hub id; no weights are read. Raises UserError where it is not Qwen2.5-VL's."""
    try:
        config = AutoConfig.from_pretrained(path)
    except Exception as error:                  # of many kinds, for a missing or foreign folder alike
        why = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(f"{path}: cannot be loaded as a checkpoint ({why}); "
                        "give a folder with config.json, whole weights and tokenizer, or a hub id") from error
    if config.model_type != "qwen2_5_vl":
        raise UserError(f"{path}: model type '{config.model_type}' is not Qwen2.5-VL's; give a checkpoint of that family")
    return config


def load(path, *, max_pixels=None, min_pixels=None, max_image_side=None, dtype=None, device=None):
    """Loads a checkpoint folder or hub id of the Qwen2.5-VL family.

    max_pixels, min_pixels: bounds of the area that the model sees (px), instead of the checkpoint's own.
    dtype: default bfloat16 on a GPU and float32 on a CPU. Raises UserError where it is no such model."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32)
    try:
        config = read_config(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
        template = cached_file(path, "chat_template.json", _raise_exceptions_for_missing_entries=False)
        if template:                             # where older checkpoints have it, beside another in the tokenizer's files
            tokenizer.chat_template = json.loads(Path(template).read_text())["chat_template"]
        processor = Qwen2VLImageProcessorPil.from_pretrained(path)
        model, found = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, device_map=None, output_loading_info=True,
                                                                   ignore_mismatched_sizes=True)
    except UserError:
        raise
    except Exception as error:   # Hugging Face raises many kinds here, for a missing, foreign or truncated checkpoint alike
        why = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(f"{cut_off(path)}: cannot be loaded as a checkpoint ({why}); "
                        "give a folder with config.json, whole weights and tokenizer, or a hub id") from error
    if lacking := sorted(found["missing_keys"] | {key for key, *_ in found["mismatched_keys"]}):    # they would stay random
        raise UserError(f"{path}: {len(lacking)} weights are missing or of another size than config.json says, the first is "
                        f"{lacking[0]}; get the whole checkpoint again")
    if len(tokenizer) <= config.image_token_id or not tokenizer.chat_template:      # nor does it mind an empty tokenizer
        raise UserError(f"{path}: its tokenizer ({len(tokenizer)} tokens) or its chat template is missing; put tokenizer.json, "
                        "tokenizer_config.json and chat_template.json of that model beside its config.json")
    size = dict(processor.size)
    processor.size = {"shortest_edge": min_pixels or size["shortest_edge"], "longest_edge": max_pixels or size["longest_edge"]}
    model.model.language_model.config._attn_implementation = "layout"
    return Policy(model.to(device).eval(), tokenizer, processor, max_image_side)


def cut_off(path):
    """The first weights file of a folder that is not whole, or the folder."""
    for file in sorted(Path(path).glob("*.safetensors")):
        try:
            load_state_dict(file, map_location="meta")          # reads its header
        except Exception:
            return file
    return path


# ------------------------------------------------------------------------------------------------ attention layouts

def causal_attention(q, k, v, scale):
    """q (B, H, L, D), k and v (B, Hk, M, D) with M >= L: the queries are the last L of the M columns. -> (B, H, L, D)"""
    L, M = q.shape[2], k.shape[2]
    if L == M or L == 1:
        return F.scaled_dot_product_attention(q, k, v, is_causal=L > 1, scale=scale, enable_gqa=True)
    if q.is_cuda:                                    # a bias that the flash kernel knows
        mask = causal_lower_right(L, M)
    else:
        mask = torch.ones(L, M, dtype=torch.bool, device=q.device).tril(M - L)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)


def layout_attention(module, q, k, v, mask, scaling=None, layout=None, **kwargs):
    """Hugging Face's attention interface: q (B, H, L, D), k, v (B, Hk, L, D) -> (B, L, H, D). Without a layout: plain SDPA."""
    if layout is None:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, mask, scaling=scaling, **kwargs)
    return layout(module.layer_idx, q, k, v, scaling).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register("layout", layout_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register("layout", sdpa_mask)

# What F.scaled_dot_product_attention calls on a CPU; it keeps the log-sum-exps to itself, which SharedPrompt needs.
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class SharedPrompt(torch.autograd.Function):
    """q (1, H, N, D), k, v (1, Hk, N, D), scale, parts: TrainLayout's -> (1, H, N, D), on a CPU.

    What a response sees of itself and of its prompt is computed apart, and put together by the log-sum-exps of the two: nothing
    is copied or padded, and all responses meet their prompt in one product. Backward: with the output and the log-sum-exp of
    both, the gradient of flash attention for one part is that part's share of the whole gradient."""

    @staticmethod
    def forward(ctx, q, k, v, scale, parts):
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        for queries, keys, causal in parts:
            o, l = FLASH(q[:, :, queries], k[:, :, keys], v[:, :, keys], 0.0, causal, scale=scale)
            if not causal:                   # the prompt, after the responses themselves: its share in the sum of weights
                before = lse[:, :, queries]
                o = out[:, :, queries].lerp(o, torch.sigmoid(l - before)[..., None].to(o.dtype))
                l = torch.logaddexp(l, before)
            out[:, :, queries], lse[:, :, queries] = o, l
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale, ctx.parts = scale, parts
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        grads = [torch.zeros_like(x) for x in (q, k, v)]
        for queries, keys, causal in ctx.parts:
            new = FLASH_BACKWARD(grad[:, :, queries], q[:, :, queries], k[:, :, keys], v[:, :, keys], out[:, :, queries],
                                 lse[:, :, queries], 0.0, causal, scale=ctx.scale)
            for whole_grad, part, place in zip(grads, new, (queries, keys, keys)):
                whole_grad[:, :, place] += part
        return *grads, None, None


class TrainLayout:
    """Tokens (1, N): for each group [prompt | response 1 | ... | response G]. sizes: [(prompt length, [response lengths])].

    A single response is computed as its prompt's end."""

    def __init__(self, sizes):
        self.groups, start = [], 0                          # slices of the N tokens, a group's prompt first
        for prompt, responses in sizes:
            lengths = [prompt, *responses] if len(responses) > 1 else [prompt + sum(responses)]
            ends = list(accumulate(lengths, initial=start))
            self.groups.append([slice(*ab) for ab in pairwise(ends)])
            start = ends[-1]
        parts = [(piece, piece, True) for group in self.groups for piece in group]             # (queries, keys, causal)
        parts += [(slice(first.stop, rest[-1].stop), first, False) for first, *rest in self.groups if rest]
        self.parts = [part for part in parts if part[0].start < part[0].stop]                  # the kernel takes no empty ones

    def __call__(self, layer, q, k, v, scale):
        if q.device.type == "cpu":
            return SharedPrompt.apply(q, k, v, scale, self.parts)
        return self.plain(q, k, v, scale)

    def plain(self, q, k, v, scale):
        """The same by PyTorch's public functions, as a GPU computes it: each response with a copy of its prompt's K/V."""
        out = []
        for group in self.groups:
            for i, piece in enumerate(group):
                seen = [group[0], piece] if i else [piece]
                keys, values = (torch.cat([x[:, :, s] for s in seen], 2) for x in (k, v))
                out.append(causal_attention(q[:, :, piece], keys, values, scale))
        return torch.cat(out, 2)


class Cache:
    """K/V of what is in flight: S slots, each with a prompt, and R rows, each with what came behind its prompt. Slots and rows
    in use are always the first ones."""

    def __init__(self, config, slots, rows, prompt_columns, own_columns, dtype, device):
        self.heads = config.num_key_value_heads
        dim, layers = config.hidden_size // config.num_attention_heads, config.num_hidden_layers
        def new(places, columns):
            return [torch.zeros(places, self.heads, columns, dim, dtype=dtype, device=device) for _ in range(layers)]
        self.prompt_k, self.prompt_v = new(slots, prompt_columns), new(slots, prompt_columns)     # (S, Hk, P, D) a layer
        self.own_k, self.own_v = new(rows, own_columns), new(rows, own_columns)                   # (R, Hk, T, D) a layer

    def move_slot(self, source, target, columns):
        for kv in self.prompt_k + self.prompt_v:
            kv[target, :, :columns] = kv[source, :, :columns]

    def move_row(self, source, target, columns):
        for kv in self.own_k + self.own_v:
            kv[target, :, :columns] = kv[source, :, :columns]

    def resize(self, slots, rows, prompt_columns):
        """Keeps the first slots and rows only, and makes room for longer prompts."""
        for kv in (self.prompt_k, self.prompt_v):
            kv[:] = [F.pad(x[:slots], (0, 0, 0, prompt_columns - x.shape[2])) for x in kv]
        for kv in (self.own_k, self.own_v):
            kv[:] = [x[:rows].clone() for x in kv]


class ReadLayout:
    """Tokens (1, N): chunks, end to end, to be kept in the cache. places: [(slot, prompt, row, column, length)], where a prompt
    itself has prompt 0 and row None, and what is behind one the prompt's length and where its own columns begin."""

    def __init__(self, cache, places):
        self.cache, self.places = cache, places

    def __call__(self, layer, q, k, v, scale):
        cache, out, start = self.cache, [], 0
        for slot, prompt, row, column, length in self.places:
            part, keys = slice(start, start + length), []
            for own, shared, new in ((cache.own_k, cache.prompt_k, k), (cache.own_v, cache.prompt_v, v)):
                kept = (shared[layer][slot] if row is None else own[layer][row])[:, :column + length]     # (Hk, M, D)
                kept[:, column:] = new[0, :, part]
                keys.append(torch.cat([shared[layer][slot, :, :prompt], kept], 1)[None])
            out.append(causal_attention(q[:, :, part], *keys, scale))
            start += length
        return torch.cat(out, 2)


class DecodeLayout:
    """A token of each of the first N rows: q (N, H, 1, D). places (N,): slot * group + index in the group; prompts (N,): tokens
    of its prompt; columns (N,): where its K/V goes. Of the cache, `slots` slots and `width` own columns are read.

    The queries of a group meet the prompt's K/V as one matrix product, so the prompt is read once a group, not once a row."""

    def __init__(self, cache, group, places, prompts, columns, slots, width):
        self.cache, self.group, self.slots, self.width = cache, group, slots, width
        device, P, T = places.device, cache.prompt_k[0].shape[2], cache.own_k[0].shape[2]
        seen = torch.cat([torch.arange(P, device=device) < prompts[:, None],
                          torch.arange(width, device=device) <= columns[:, None]], 1)                 # (N, P + t)
        self.bias = torch.zeros(seen.shape, device=device).masked_fill_(~seen, -torch.inf)[:, None, None]
        head, rows = (torch.arange(n, device=device) for n in (cache.heads, len(places)))
        row_of = torch.zeros(slots * group, dtype=torch.long, device=device).index_copy_(0, places, rows)     # idle places: any
        self.target = ((rows[:, None] * cache.heads + head) * T + columns[:, None]).flatten()       # in (R * Hk * T, D)
        self.to_slots = (row_of.view(slots, 1, group) * cache.heads + head[:, None]).flatten()      # (S * Hk * G): row, head
        slot, index = (places // group)[:, None], (places % group)[:, None]
        self.to_rows = ((slot * cache.heads + head) * group + index).flatten()                      # and back (N * Hk)

    def __call__(self, layer, q, k, v, scale):
        cache, S, G, Hk, (N, H, _, D) = self.cache, self.slots, self.group, self.cache.heads, q.shape
        f = H // Hk                                                       # query heads that share one K/V head
        own = []
        for kv, new in ((cache.own_k[layer], k), (cache.own_v[layer], v)):
            kv.view(-1, D).index_copy_(0, self.target, new.reshape(-1, D))
            own.append(kv[:N, :, :self.width])                                                        # (N, Hk, t, D)
        prompt_k, prompt_v = cache.prompt_k[layer][:S], cache.prompt_v[layer][:S]                     # (S, Hk, P, D)
        P = prompt_k.shape[2]
        def by_slot(x):                                                   # (N, Hk, f, X) -> (S, Hk, G * f, X)
            return x.reshape(N * Hk, -1).index_select(0, self.to_slots).view(S, Hk, G * f, -1)
        def by_row(x):                                                    # and back
            return x.view(S * Hk * G, -1).index_select(0, self.to_rows).view(N, Hk, f, -1)
        q = q.view(N, Hk, f, D) * scale
        scores = torch.cat([by_row(by_slot(q) @ prompt_k.mT), q @ own[0].mT], -1)                     # (N, Hk, f, P + t)
        weights = (scores + self.bias).softmax(-1).to(q.dtype)
        out = weights[..., P:] @ own[1] + by_row(by_slot(weights[..., :P]) @ prompt_v)                # (N, Hk, f, D)
        return out.view(N, H, 1, D)


# ------------------------------------------------------------------------------------------------ the roll-out engine

@dataclass(eq=False)
class Group:
    """Rows in flight that share a prompt."""
    job: list            # all its sequences
    slot: int
    running: int         # rows that are not done


@dataclass(eq=False)
class Row:
    """One continuation in flight."""
    sequence: Sequence
    group: Group
    index: int           # in its group
    position: int = 0    # m-RoPE position of the next token
    column: int = 0      # own columns in use
    turn: int = 0        # tokens sampled in this turn
    queued: Chunk | None = None


class Engine:
    """Many groups of continuations at once, each row decoded at its own pace.

    policy, and: temperature (0: greedy), top_p, turn_tokens (sampled tokens a turn at most), response_tokens (all tokens behind
    the prompt at most), cache_tokens (K/V columns at most: decides how many groups run at once; one always does),
    A row that waits for its observation to be read holds up
    nobody: it is read when a tenth of the rows wait, or when there is nothing else to do. A row that is done makes room at
    once, and the next group begins as soon as there is room for all of its rows."""

    def __init__(self, policy, *, temperature=1.0, top_p=1.0, turn_tokens=1024, response_tokens=2048, cache_tokens=65_536,
                 wait=0.1):
        self.policy, self.temperature, self.top_p, self.wait = policy, temperature, top_p, wait
        self.turn_tokens, self.response_tokens, self.cache_tokens = turn_tokens, response_tokens, cache_tokens

    @torch.no_grad()
    def run(self, jobs, on_turn):
        """jobs: iterable of lists of Sequences that share one prompt, no list longer than the first. A sequence may already
        have tokens: they are read before it goes on.
        on_turn(sequence, truncated) is called when the policy ends a turn (truncated: it ran out of tokens instead); it answers with the
        Chunk to go on from, or None to end. Yields each job as it is finished."""
        self.rows, self.groups = [], []                # rows[i] has row i of the cache, groups[j] slot j
        self.cache, self.n, self.size, self.width, self.held = None, math.inf, 0, 0, None
        jobs = iter(jobs)
        while True:
            ready = [r for r in self.rows if r.queued is None]
            hidden = [self.decode()] if ready else []
            started = self.admit(jobs)
            if started:
                last = self.prefill(started)
                fresh = [r.queued is None for r in started]
                ready += [r for r, f in zip(started, fresh) if f]
                hidden.append(last[torch.tensor(fresh, device=last.device)])
            waiting = [r for r in self.rows if r.queued is not None]
            if waiting and (not ready or len(waiting) >= self.wait * len(self.rows)):
                hidden.append(self.extend(waiting))
                ready += waiting
            if not ready:
                return
            for row in self.sample(ready, torch.cat(hidden), on_turn):
                if row.queued is None and self.leave(row):
                    yield row.group.job

    def admit(self, jobs):
        """Begins with those of `jobs` that there is room for. -> their rows

        n groups have room, in n * size rows of the cache and half as many slots again as groups, for the last rows of a group
        keep its slot. The first call decides n; a longer prompt lowers it, and waits until what is in flight fits."""
        started = []
        while job := self.held or next(jobs, None):
            self.held, length = job, len(job[0].prompt.ids)
            self.size, width = self.size or len(job), max(self.width, length)
            n = min(self.n, max(1, int(self.cache_tokens / (1.5 * width + self.size * self.response_tokens))))
            if len(self.groups) >= n + n // 2 or len(self.rows) + self.size > n * self.size:
                break
            if self.cache and width > self.width:
                self.cache.resize(n + n // 2, n * self.size, width)
                self.n = n
            self.held, self.width = None, width
            self.groups.append(Group(job, len(self.groups), len(job)))
            for index, s in enumerate(job):
                started.append(Row(s, self.groups[-1], index, queued=Chunk(list(s.ids), s.pictures) if s.ids else None))
            self.rows += started[-len(job):]
        if started and not self.cache:
            self.n = n = len(self.groups)
            self.cache = Cache(self.policy.text_config, n + n // 2, n * self.size, self.width, self.response_tokens,
                               self.policy.model.dtype, self.policy.device)
        return started

    def leave(self, row):
        """Takes out a row that is done: the last row moves to its place, so rows in use stay the first ones. -> whether its
        group is done; then the same is done with its slot."""
        place, last = self.rows.index(row), self.rows.pop()
        if last is not row:
            self.cache.move_row(len(self.rows), place, last.column)
            self.rows[place] = last
        group = row.group
        group.running -= 1
        if group.running == 0:
            last = self.groups.pop()
            if last is not group:
                self.cache.move_slot(len(self.groups), group.slot, len(last.job[0].prompt.ids))
                self.groups[group.slot], last.slot = last, group.slot
        return group.running == 0

    def prefill(self, rows):
        """Runs the prompts of some new groups. -> the hidden state at the end of each row's prompt (rows, hidden)"""
        policy, ids, pictures, positions, places, last = self.policy, [], [], [], [], []
        for row in rows:
            prompt = row.sequence.prompt
            if row.index == 0:
                place, after = policy.positions(prompt.ids, prompt.pictures)
                ids += prompt.ids
                pictures += prompt.pictures
                positions.append(place)
                places.append((row.group.slot, 0, None, 0, len(prompt.ids)))
            row.position = after
            last.append(len(ids) - 1)
        hidden = policy.hidden(policy.embed(ids, pictures)[None], torch.cat(positions, 1)[:, None],
                               ReadLayout(self.cache, places))[0]                                  # (N, hidden)
        return hidden[torch.tensor(last, device=hidden.device)]

    def decode(self):
        """Reads the last sampled token of each row. -> hidden states that predict the next, of the rows that do not wait (their
        number, hidden). A row that waits is computed too: its next column is written twice."""
        G, slots, width = self.size, len(self.groups), max(r.column for r in self.rows) + 1
        step = [(r.sequence.ids[-1], r.position, r.group.slot * G + r.index, len(r.sequence.prompt.ids), r.column)
                for r in self.rows]
        going = [i for i, r in enumerate(self.rows) if r.queued is None]
        for i in going:
            self.rows[i].position += 1
            self.rows[i].column += 1
        return self.step(torch.tensor(step).T.to(self.policy.device), slots, width)[torch.tensor(going, device=self.policy.device)]

    def step(self, inputs, slots, width):
        tokens, positions, places, prompts, columns = inputs                                          # (N,) each
        layout = DecodeLayout(self.cache, self.size, places, prompts, columns, slots, width)
        x = self.policy.model.model.language_model.embed_tokens(tokens)[:, None]                      # (N, 1, hidden)
        return self.policy.hidden(x, positions.expand(3, -1)[..., None], layout)[:, 0]

    def extend(self, rows):
        """Reads the queued chunk of each row, after its last sampled token. -> hidden states (rows, hidden) at their ends."""
        policy, ids, pictures, positions, places, last = self.policy, [], [], [], [], []
        numbers = {id(r): i for i, r in enumerate(self.rows)}
        for r in rows:
            chunk, prompt = r.queued, len(r.sequence.prompt.ids)
            place, r.position = policy.positions(chunk.ids, chunk.pictures, r.position)
            places.append((r.group.slot, prompt, numbers[id(r)], r.column, len(chunk.ids)))
            ids += chunk.ids
            pictures += chunk.pictures
            positions.append(place)
            last.append(len(ids) - 1)
            r.column += len(chunk.ids)
            r.queued = None
        hidden = policy.hidden(policy.embed(ids, pictures)[None], torch.cat(positions, 1)[:, None],
                               ReadLayout(self.cache, places))[0]                                   # (N, hidden)
        return hidden[torch.tensor(last, device=hidden.device)]

    def sample(self, rows, hidden, on_turn):
        """Samples a token for each row and appends it. -> the rows whose turn is over; what they go on with is queued."""
        policy, over = self.policy, []
        rngs = [row.sequence.rng for row in rows]
        for row, token, log_prob in zip(rows, *policy.choose(hidden, rngs, self.temperature, self.top_p)):
            sequence = row.sequence
            sequence.ids.append(token)
            sequence.sampled.append(True)
            sequence.log_probs.append(log_prob)
            row.turn += 1
            ended = token in policy.end_tokens
            full = len(sequence.ids) >= self.response_tokens
            if not (ended or full or row.turn >= self.turn_tokens):
                continue
            chunk = on_turn(sequence, truncated=not ended)
            over.append(row)
            row.turn = 0
            if chunk is None or len(sequence.ids) + len(chunk.ids) >= self.response_tokens:
                continue
            sequence.add(chunk)
            row.queued = Chunk([token, *chunk.ids], chunk.pictures)     # the last sampled token has not been read yet
        return over


def invert(log_probs, uniforms):
    """Inverse transform sampling: the first token at which the cumulated probability exceeds the uniform number in [0, 1).

    log_probs (N, vocabulary); uniforms: N numbers. A token of probability 0 is never the first. -> tokens (N, 1)"""
    cumulated = log_probs.exp().cumsum(-1, dtype=torch.float64)                          # (N, vocabulary)
    uniforms = torch.tensor(uniforms, dtype=torch.float64, device=log_probs.device)
    return torch.searchsorted(cumulated, uniforms[:, None] * cumulated[:, -1:], right=True)


def nucleus(log_probs, top_p):
    """Keeps the fewest tokens whose probabilities add up to top_p, and renormalises. log_probs (N, vocabulary)."""
    ordered, index = log_probs.sort(-1, descending=True)
    beyond = ordered.exp().cumsum(-1) - ordered.exp() >= top_p
    dropped = torch.zeros_like(beyond).scatter(-1, index, beyond)
    return torch.log_softmax(log_probs.masked_fill(dropped, -torch.inf), -1)


# -------------------------------------------------------------------------------- several processes

REPLICATED = 100_000_000            # parameters of a model at most that every process keeps whole


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value):
    """Every process's `value` (anything that pickles), as a list by rank, on every process. It also waits for all of them."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def sum_over_processes(numbers):
    """The sums over all processes of some numbers, a list; cheaper than `gather`."""
    if world_size() == 1:
        return numbers
    sums = torch.tensor(numbers, dtype=torch.float64)
    if torch.cuda.is_available():
        sums = sums.cuda()                       # NCCL takes no others
    dist.all_reduce(sums)
    return sums.tolist()


def gather_shares(values):
    """The values of all items in their order, on every process. values: of this process's items,
    number rank, rank + world_size, and so on."""
    shares = gather(values)
    return [shares[i % len(shares)][i // len(shares)] for i in range(sum(map(len, shares)))]


def shard_like(x, parameter):
    """A whole tensor, shared out as the parameter is."""
    if not isinstance(parameter, DTensor):
        return x
    return distribute_tensor(x.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)


@dataclass
class MicroBatch:
    groups: list
    weight: float = 1.0


def micro_batches(groups, tokens, spare=None):
    """Splits groups of Sequences into batches of at most `tokens` tokens (one group at least),
    those of like length together. -> [(batch, 1.0)]

    spare: a batch, where weights are sharded. All processes gather these together, so each gets as
    many batches as the one that has most: its list is filled up with (spare, 0.0), whose loss is
    not to count."""
    batches, room = [], 0
    def size(group):
        return len(group[0].prompt.ids) + sum(len(s.ids) for s in group)
    for group in sorted(groups, key=size):
        room -= size(group)
        if room < 0 or not batches:
            batches.append([])
            room = tokens - size(group)
        batches[-1].append(group)
    weighted = [MicroBatch(batch) for batch in batches]
    if spare is None:
        return weighted
    return weighted + [MicroBatch(spare, 0.0)] * (max(gather(len(batches))) - len(batches))


def average_gradients(parameters):
    """Makes the gradients of replicated parameters their mean over all processes, by one all-reduce;
    those of sharded ones are averaged by FSDP already.

    The sum is in float32. A missing gradient counts as zeros; where no process has one, none is made."""
    if world_size() == 1 or isinstance(parameters[0], DTensor):
        return
    device = parameters[0].device
    present = torch.tensor([float(p.grad is not None) for p in parameters], device=device)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([present, *(x.flatten().float() for x in gradients)])
    dist.all_reduce(flat)
    sizes = [len(parameters), *(p.numel() for p in parameters)]
    present, *means = (flat / world_size()).split(sizes)
    for p, anywhere, mean in zip(parameters, present.tolist(), means):
        p.grad = mean.view_as(p).to(p.dtype) if anywhere else None


def shard_if_large(policy):
    """Prepares a policy for training in several processes: a large one is sharded, a small one
    stays whole in each."""
    if world_size() > 1 and sum(p.numel() for p in policy.model.parameters()) > REPLICATED:
        shard(policy)


def is_sharded(policy):
    return isinstance(policy.model, FSDPModule)


def shard(policy):
    """FSDP2: each process keeps a part of every weight, gradient and optimizer state. In an update, the weights of the language
    model are gathered layer by layer, and all others at once; gradients are averaged over the processes. A frozen vision tower
    stays whole: which process has images to encode, and when, is its own affair."""
    how = dict(mesh=init_device_mesh(policy.device.type, (world_size(),)),
               mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    for layer in policy.model.model.language_model.layers:
        fully_shard(layer, **how)
    trained = {id(p) for p in policy.trainable()}
    fully_shard(policy.model, **how, ignored_params={p for p in policy.model.parameters() if id(p) not in trained})
    policy.model.within = policy.within
    register_fsdp_forward_method(policy.model, "within")
    policy.within = policy.model.within
    policy.within(lambda: None)                  # so that the model is FSDP's root, and not the layer that runs first


@contextmanager
def unsharded(policy):
    """Inside, every process has all weights of a sharded policy, and samples without waiting for the others."""
    units = [m for m in policy.model.modules() if isinstance(m, FSDPModule)]
    for unit in units:
        unit.unshard()
        unit.set_reshard_after_forward(False, recurse=False)
    yield
    for unit in units:
        unit.set_reshard_after_forward(unit is not policy.model, recurse=False)
        unit.reshard()
