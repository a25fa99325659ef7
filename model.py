"""The policy: load, encode, sample, score, save. It knows tokens and images, and nothing about the task.

In:  a Hugging Face folder or hub id of the Qwen2.5-VL family, and dialogues made of text and PIL images.
Out: `Sequence`s of sampled tokens with their log-probabilities, log-probabilities with gradients, checkpoints.

A GRPO group is one prompt with G continuations, and it is computed as that: image and prompt are run once, the G
continuations attend to them. The forward pass is Hugging Face's own; ours is only the attention, in four layouts:

    prefill   prompts, end to end, each causal                        -> prompt K/V, one copy a group
    decode    one token of each live row: [prompt K/V | own K/V]
    extend    an observation of some rows: the same, several tokens a row, the others go on decoding meanwhile
    train     [prompt | response 1 | ... | response G]: each response sees the prompt and itself

Where it departs from common practice: vision tokens and unused vocabulary rows are forbidden in sampling *and* in every
log-softmax, so an image token in a sequence is always one that we placed; and positions are always given explicitly.
"""
import json
import math
import os
import shutil
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer, logging
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

logging.disable_progress_bar()

MAX_LOGITS = 2**26          # floats in the largest (tokens, vocabulary) tensor that is ever made: 256 MiB
MAX_VISION_PATCHES = 2**16  # patches in one pass of the vision tower


class UserError(Exception):
    """A mistake of the user's, told in one line: what is wrong, where, and how to mend it."""


@dataclass(eq=False)
class Picture:
    """An image as the model sees it.

    pixel_values (patches, channels * 2 * patch * patch) float32; grid (t, h, w) in patches; features (tokens, hidden),
    kept only while the vision tower is frozen."""
    pixel_values: torch.Tensor
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
    exactly these tokens are trained on. `log_probs[i]` is the log-probability of sampling it (0.0 where it was injected)."""
    prompt: Chunk
    ids: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)

    def add(self, chunk, sampled=False):
        self.ids += chunk.ids
        self.sampled += [sampled] * len(chunk.ids)
        self.log_probs += [0.0] * len(chunk.ids)
        self.pictures += chunk.pictures
        return self


# ------------------------------------------------------------------------------------------------ processes (torchrun)

def start_processes():
    """Joins the processes that torchrun started, one a GPU (or on the CPU); does nothing without torchrun."""
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(hours=4))


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value):
    """Every process's `value` (anything that pickles), as a list by rank, on every process. It also waits for all of them."""
    if world() == 1:
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values


# ------------------------------------------------------------------------------------------------ the policy

class Policy:
    """Model, tokenizer and image processor of one checkpoint, and the few numbers that depend on them."""

    def __init__(self, model, tokenizer, image_processor, system_prompts=None):
        self.model, self.tokenizer, self.image_processor = model, tokenizer, image_processor
        self.system_prompts = system_prompts or {}   # mode -> text: a checkpoint remembers what it was trained with
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

    def seen_size(self, width, height):
        """(width, height) in px of an image of this size as the model sees it: the frame in which it speaks coordinates."""
        size = self.image_processor.size
        try:
            h, w = smart_resize(height, width, self.factor, size["shortest_edge"], size["longest_edge"])
        except ValueError as error:
            raise UserError(f"an image of {width}x{height} px cannot be encoded: {error}") from None
        return w, h

    def picture(self, image):
        """PIL image -> Picture."""
        out = self.image_processor(images=[image], return_tensors="pt")
        grid = tuple(out["image_grid_thw"][0].tolist())
        return Picture(out["pixel_values"], grid, math.prod(grid) // self.image_processor.merge_size**2)

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

    def clean(self, text):
        """Text of unknown origin, with the tokenizer's special tokens broken up, so that it cannot speak as the chat itself.
        Half characters, which no tokenizer takes, become question marks."""
        for token in self.tokenizer.added_tokens_decoder.values():      # `all_special_tokens` lacks some, <|im_start|> for one
            if token.special:
                text = text.replace(token.content, token.content.replace("|", " "))
        return text.encode(errors="replace").decode()

    # -------------------------------------------------------------------------------------------- embedding

    def features(self, pictures):
        """Vision features of several pictures, each (tokens, hidden). With the vision tower frozen they are computed once and
        kept in the picture."""
        todo, found = [p for p in pictures if p.features is None], {}
        while todo:
            ends = torch.tensor([len(p.pixel_values) for p in todo]).cumsum(0)
            n = max(1, int((ends <= MAX_VISION_PATCHES).sum()))
            pixels = torch.cat([p.pixel_values for p in todo[:n]]).to(self.device, self.model.dtype)
            grids = torch.tensor([p.grid for p in todo[:n]], device=self.device)
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.train_vision):
                out = self.model.model.get_image_features(pixels, grids).pooler_output
            for picture, features in zip(todo[:n], out):
                found[id(picture)] = features
                if not self.train_vision:
                    picture.features = features
            todo = todo[n:]
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
        hidden = self.hidden(x, torch.cat(positions, 1)[:, None], TrainLayout(sizes, self.device))[0]   # (N, hidden)
        targets = torch.tensor(ids, device=self.device)[target]
        return self.token_log_probs(hidden[source], targets, temperature)

    def micro_batches(self, groups, tokens):
        """Splits groups into batches of at most `tokens` tokens (one group at least), those of like length together."""
        def size(group):
            return len(group[0].prompt.ids) + sum(len(s.ids) for s in group)
        batch, total = [], 0
        for group in sorted(groups, key=size):
            if batch and total + size(group) > tokens:
                yield batch
                batch, total = [], 0
            batch.append(group)
            total += size(group)
        if batch:
            yield batch

    def save(self, folder, **notes):
        """Writes a Hugging Face checkpoint folder, whole or not at all. notes: what else shall be known of it (notes.json)."""
        folder = Path(folder)
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        self.model.save_pretrained(part)
        self.tokenizer.save_pretrained(part)
        self.image_processor.save_pretrained(part)
        (part / "system_prompts.json").write_text(json.dumps(self.system_prompts, indent=1))
        (part / "notes.json").write_text(json.dumps(notes))
        replace(part, folder)


def replace(part, final):
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
    replace(part, Path(path))


def load(path, *, max_pixels=None, min_pixels=None, dtype=None, device=None):
    """Loads a checkpoint folder or hub id of the Qwen2.5-VL family.

    max_pixels, min_pixels: bounds of the area that the model sees (px), instead of the checkpoint's own.
    dtype: default bfloat16 on a GPU and float32 on a CPU. Raises UserError where it is no such model."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32)
    try:
        config = AutoConfig.from_pretrained(path)
        if config.model_type != "qwen2_5_vl":
            raise UserError(f"{path}: model type '{config.model_type}' is not Qwen2.5-VL's; give a checkpoint of that family")
        tokenizer = AutoTokenizer.from_pretrained(path)
        processor = AutoImageProcessor.from_pretrained(path, backend="pil")
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, device_map=None)
    except UserError:
        raise
    except Exception as error:   # Hugging Face raises many kinds here, for a missing, foreign or truncated checkpoint alike
        raise UserError(f"{path}: cannot be loaded as a checkpoint ({str(error).strip().splitlines()[0]}); "
                        "give a folder with config.json, weights and tokenizer, or a hub id") from error
    size = dict(processor.size)
    processor.size = {"shortest_edge": min_pixels or size["shortest_edge"], "longest_edge": max_pixels or size["longest_edge"]}
    model.model.language_model.config._attn_implementation = "layout"
    prompts = Path(path) / "system_prompts.json"
    prompts = json.loads(prompts.read_text()) if prompts.is_file() else {}
    return Policy(model.to(device).eval(), tokenizer, processor, prompts)


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


class Padded:
    """Pieces (start, length) of a row of tokens as a batch, padded on the right, and back."""

    def __init__(self, pieces, device):
        self.longest, self.n = max(length for _, length in pieces), len(pieces)
        column = torch.arange(self.longest)
        starts, lengths = torch.tensor(pieces).T[..., None]
        self.index = torch.where(column < lengths, starts + column, 0).flatten().to(device)
        self.tokens = (column < lengths).flatten().nonzero()[:, 0].to(device)

    def batch(self, x):       # (N, H, D) -> (B, H, longest, D)
        return x.index_select(0, self.index).view(self.n, self.longest, *x.shape[1:]).transpose(1, 2)

    def flat(self, x):        # (B, H, longest, D) -> (tokens, H, D), piece after piece
        return x.transpose(1, 2).flatten(0, 1).index_select(0, self.tokens)


class TrainLayout:
    """Tokens (1, N): for each group [prompt | response 1 | ... | response G]. sizes: [(prompt length, [response lengths])].

    The prompts go as one causal batch, padded on the right: no query sees the padding behind it. Then the responses of each
    group, as a batch of continuations of its prompt. A single response needs no such second step: it is the prompt's end."""

    def __init__(self, sizes, device):
        heads, self.groups, start = [], [], 0
        for prompt, responses in sizes:
            end = start + prompt + sum(responses)
            if len(responses) < 2:
                heads.append((start, end - start))
            else:
                heads.append((start, prompt))
                ends = torch.tensor(responses).cumsum(0) + start + prompt
                pieces = [(int(e) - n, n) for e, n in zip(ends, responses)]
                self.groups.append((len(heads) - 1, prompt, Padded(pieces, device)))
            start = end
        self.heads = Padded(heads, device)
        computed = torch.cat([p.index[p.tokens] for p in (self.heads, *(rest for *_, rest in self.groups))])
        self.order = computed.argsort()     # from heads, then responses, to the tokens' own order

    def __call__(self, layer, q, k, v, scale):
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))                                            # (N, H, D)
        kh, vh = self.heads.batch(k), self.heads.batch(v)                                              # (B, Hk, P, D)
        out = [self.heads.flat(causal_attention(self.heads.batch(q), kh, vh, scale))]
        for i, prompt, rest in self.groups:
            keys, values = (torch.cat([h[i:i + 1, :, :prompt].expand(rest.n, -1, -1, -1), rest.batch(x)], 2)
                            for h, x in ((kh, k), (vh, v)))                                            # (G, Hk, P + R, D)
            out.append(rest.flat(causal_attention(rest.batch(q), keys, values, scale)))
        return torch.cat(out).index_select(0, self.order).transpose(0, 1)[None]                        # (1, H, N, D)


class Cache:
    """K/V of the groups in flight: a prompt once a slot, and the own columns of its G rows. Row r belongs to slot r // G."""

    def __init__(self, config, slots, group, prompt_columns, own_columns, dtype, device):
        self.slots, self.group, self.own_columns = slots, group, own_columns
        self.heads = config.num_key_value_heads
        dim, layers = config.hidden_size // config.num_attention_heads, config.num_hidden_layers
        def new(rows, columns):
            return [torch.zeros(rows, self.heads, columns, dim, dtype=dtype, device=device) for _ in range(layers)]
        self.prompt_k, self.prompt_v = new(slots, prompt_columns), new(slots, prompt_columns)     # (S, Hk, P, D) a layer
        self.own_k, self.own_v = new(slots * group, own_columns), new(slots * group, own_columns)  # (S * G, Hk, T, D)
        self.prompt_length = torch.zeros(slots, dtype=torch.long, device=device)

    @property
    def prompt_columns(self):
        return self.prompt_k[0].shape[2]

    def widen(self, columns):
        """Makes room for longer prompts."""
        for kv in (self.prompt_k, self.prompt_v):
            kv[:] = [F.pad(x, (0, 0, 0, columns - x.shape[2])) for x in kv]

    def keep(self, slots):
        """Drops all slots but these; they are renumbered in this order."""
        index = torch.tensor(slots, device=self.prompt_length.device)
        rows = (index[:, None] * self.group + torch.arange(self.group, device=index.device)).flatten()
        for kv in (self.prompt_k, self.prompt_v):
            kv[:] = [x[index] for x in kv]
        for kv in (self.own_k, self.own_v):
            kv[:] = [x[rows] for x in kv]
        self.prompt_length, self.slots = self.prompt_length[index], len(slots)


class PrefillLayout:
    """Tokens (1, N): prompts end to end, to be kept in the cache. places: [(slot, length)]."""

    def __init__(self, cache, places):
        self.cache, self.places = cache, places

    def __call__(self, layer, q, k, v, scale):
        out, start = [], 0
        for slot, length in self.places:
            part = slice(start, start + length)
            self.cache.prompt_k[layer][slot, :, :length] = k[0, :, part]
            self.cache.prompt_v[layer][slot, :, :length] = v[0, :, part]
            out.append(causal_attention(q[:, :, part], k[:, :, part], v[:, :, part], scale))
            start += length
        return torch.cat(out, 2)


class ExtendLayout:
    """Tokens (1, N): chunks of several rows, end to end, for their own columns. places: [(row, column, length, prompt)]."""

    def __init__(self, cache, places):
        self.cache, self.places = cache, places

    def __call__(self, layer, q, k, v, scale):
        cache, out, start = self.cache, [], 0
        for row, column, length, prompt in self.places:
            part, end = slice(start, start + length), column + length
            keys = []
            for own, shared, new in ((cache.own_k, cache.prompt_k, k), (cache.own_v, cache.prompt_v, v)):
                own[layer][row, :, column:end] = new[0, :, part]
                keys.append(torch.cat([shared[layer][row // cache.group, :, :prompt], own[layer][row, :, :end]], 1)[None])
            out.append(causal_attention(q[:, :, part], *keys, scale))
            start += length
        return torch.cat(out, 2)


class DecodeLayout:
    """One token of each of n rows: q (n, H, 1, D). rows, columns (n,): where its K/V goes; `width`: own columns in use.

    The queries of a group meet the prompt's K/V as one matrix product, so the prompt is read once a group, not once a row."""

    def __init__(self, cache, rows, columns, width):
        self.cache, self.rows, self.columns, self.width = cache, rows, columns, width
        device = rows.device
        used = torch.zeros(cache.slots * cache.group, dtype=torch.long, device=device).index_copy_(0, rows, columns)
        own = torch.arange(width, device=device) <= used[:, None]                                     # (S * G, t)
        prompt = torch.arange(cache.prompt_columns, device=device) < cache.prompt_length[:, None]     # (S, P)
        seen = torch.cat([prompt.repeat_interleave(cache.group, 0), own], 1)                          # (S * G, P + t)
        self.hidden = ~seen[:, None, None]
        self.full = len(rows) == len(used)

    def __call__(self, layer, q, k, v, scale):
        cache, rows, t = self.cache, self.rows, self.width
        n, H, _, D = q.shape
        S, G, Hk, P = cache.slots, cache.group, cache.heads, cache.prompt_columns
        f = H // Hk                                                       # query heads that share one K/V head
        cache.own_k[layer][rows, :, self.columns] = k[:, :, 0]
        cache.own_v[layer][rows, :, self.columns] = v[:, :, 0]
        own_k, own_v = cache.own_k[layer][:, :, :t], cache.own_v[layer][:, :, :t]                     # (S * G, Hk, t, D)
        def by_slot(x):                                                   # (S * G, Hk, f, X) -> (S, Hk, G * f, X)
            return x.view(S, G, Hk, f, -1).transpose(1, 2).reshape(S, Hk, G * f, -1)
        def by_row(x):                                                    # and back
            return x.view(S, Hk, G, f, -1).transpose(1, 2).reshape(S * G, Hk, f, -1)
        q = q[:, :, 0] * scale                                                                        # (n, H, D)
        if not self.full:
            q = q.new_zeros(S * G, H, D).index_copy_(0, rows, q)
        q = q.view(S * G, Hk, f, D)
        scores = torch.cat([by_row(by_slot(q) @ cache.prompt_k[layer].mT), q @ own_k.mT], -1)         # (S * G, Hk, f, P + t)
        weights = scores.float().masked_fill_(self.hidden, -torch.inf).softmax(-1).to(q.dtype)
        out = weights[..., P:] @ own_v + by_row(by_slot(weights[..., :P]) @ cache.prompt_v[layer])    # (S * G, Hk, f, D)
        out = out.view(S * G, H, 1, D)
        return out if self.full else out[rows]


# ------------------------------------------------------------------------------------------------ the roll-out engine

@dataclass(eq=False)
class Row:
    """One continuation in flight."""
    sequence: Sequence
    job: list            # all sequences of its group
    slot: int
    index: int           # which of the group's G rows
    position: int        # m-RoPE position of the next token
    column: int = 0      # own columns in use
    turn: int = 0        # tokens sampled in this turn
    queued: Chunk | None = None


class Engine:
    """Many groups of continuations at once, each decoded at its own pace.

    policy, and: temperature (0: greedy), top_p, turn_tokens (sampled tokens a turn at most), response_tokens (all tokens behind
    the prompt at most), cache_tokens (K/V columns at most: decides how many groups run at once; one always does),
    generator (of random numbers). A row that waits for its observation to be read holds up nobody: it is read when a quarter
    of the live rows wait, or when there is nothing else to do."""

    def __init__(self, policy, *, temperature=1.0, top_p=1.0, turn_tokens=1024, response_tokens=2048, cache_tokens=65_536,
                 generator=None, wait=0.25):
        self.policy, self.temperature, self.top_p, self.generator, self.wait = policy, temperature, top_p, generator, wait
        self.turn_tokens, self.response_tokens, self.cache_tokens = turn_tokens, response_tokens, cache_tokens
        self.cache = None

    @torch.no_grad()
    def run(self, jobs, on_turn):
        """jobs: iterable of lists of Sequences that share one prompt, no list longer than the first. A sequence may already
        have tokens: they are read before it goes on.
        on_turn(sequence, cut) is called when the policy ends a turn (cut: it ran out of tokens instead); it answers with the
        Chunk to go on from, or None to end. Yields each job as it is finished."""
        jobs = iter(jobs)
        live, free, running = [], [], {}               # rows by slot and index; empty slots; id(job) -> its rows still running
        self.cache, self.held, self.exhausted = None, None, False
        while True:
            ready, hidden = [], []
            decoding = [r for r in live if r.queued is None]
            if decoding:
                ready += decoding
                hidden.append(self.decode(decoding))
            new = self.admit(jobs, free, live)
            if new:
                started, h = self.prefill(new, [free.pop() for _ in new])
                fresh = [i for i, r in enumerate(started) if r.queued is None]
                ready += [started[i] for i in fresh]
                hidden.append(h[fresh])
                live = sorted(live + started, key=lambda r: (r.slot, r.index))
                running.update({id(job): len(job) for job in new})
            waiting = [r for r in live if r.queued is not None]
            if waiting and (not ready or len(waiting) >= self.wait * len(live)):
                ready += waiting
                hidden.append(self.extend(waiting))
            if not ready:
                return
            over = [r for r in self.sample(ready, torch.cat(hidden), on_turn) if r.queued is None]
            if not over:
                continue
            gone = set(map(id, over))
            live = [r for r in live if id(r) not in gone]
            for row in over:
                running[id(row.job)] -= 1
                if not running[id(row.job)]:
                    del running[id(row.job)]
                    free.append(row.slot)
                    yield row.job
            if self.exhausted and len(free) > self.cache.slots / 2:     # the tail: no empty slots are carried along
                self.drop_slots(live, free, 0)

    def admit(self, jobs, free, live):
        """Takes from `jobs` what there is room for. The first call decides how many slots the cache has; where a longer prompt
        comes later, empty slots are given up until the bound holds again."""
        def columns(jobs):              # of a slot that can hold any of them
            return max(len(job[0].prompt.ids) for job in jobs) + len(jobs[0]) * self.response_tokens
        new = []
        while self.cache is None or len(new) < len(free):
            job, self.held = self.held or next(jobs, None), None
            if job is None:
                self.exhausted = True
                break
            if self.cache is None:
                fits = not new or (len(new) + 1) * columns(new + [job]) <= self.cache_tokens
            else:
                fits = len(job[0].prompt.ids) <= self.cache.prompt_columns
                if not fits and not new:
                    fits = True
                    rest = self.cache_tokens // columns([job]) - (self.cache.slots - len(free))
                    self.drop_slots(live, free, max(1, rest))
                    self.cache.widen(len(job[0].prompt.ids))
            if not fits:
                self.held = job         # for the next call
                break
            new.append(job)
        if new and self.cache is None:
            self.cache = Cache(self.policy.text_config, len(new), len(new[0]), max(len(job[0].prompt.ids) for job in new),
                               self.response_tokens, self.policy.model.dtype, self.policy.device)
            free.extend(range(len(new)))
        return new

    def drop_slots(self, live, free, keep):
        """Gives up all but `keep` of the free slots; the others are renumbered."""
        used = sorted({r.slot for r in live})
        slots = used + free[:keep]
        if len(slots) < self.cache.slots and slots:
            self.cache.keep(slots)
            for row in live:
                row.slot = used.index(row.slot)
            free[:] = range(len(used), len(slots))

    def prefill(self, jobs, slots):
        """Runs the prompts of `jobs`. -> their rows, and the hidden state at the end of each row's prompt (rows, hidden)."""
        policy, rows, ids, pictures, positions = self.policy, [], [], [], []
        for job, slot in zip(jobs, slots):
            prompt = job[0].prompt
            place, after = policy.positions(prompt.ids, prompt.pictures)
            ids += prompt.ids
            pictures += prompt.pictures
            positions.append(place)
            self.cache.prompt_length[slot] = len(prompt.ids)
            for i, sequence in enumerate(job):
                queued = Chunk(list(sequence.ids), sequence.pictures) if sequence.ids else None
                rows.append(Row(sequence, job, slot, i, after, queued=queued))
        lengths = [len(job[0].prompt.ids) for job in jobs]
        hidden = policy.hidden(policy.embed(ids, pictures)[None], torch.cat(positions, 1)[:, None],
                               PrefillLayout(self.cache, list(zip(slots, lengths))))[0]               # (N, hidden)
        last = torch.tensor(lengths).cumsum(0) - 1
        return rows, hidden[last.repeat_interleave(torch.tensor([len(job) for job in jobs])).to(hidden.device)]

    def decode(self, rows):
        """Reads the last sampled token of each row. -> hidden states (rows, hidden) that predict the next."""
        group = self.cache.group
        tokens, positions, index, columns = torch.tensor(
            [(r.sequence.ids[-1], r.position, r.slot * group + r.index, r.column) for r in rows]).T.to(self.policy.device)
        layout = DecodeLayout(self.cache, index, columns, max(r.column for r in rows) + 1)
        for r in rows:
            r.position += 1
            r.column += 1
        x = self.policy.model.model.language_model.embed_tokens(tokens)[:, None]                      # (rows, 1, hidden)
        return self.policy.hidden(x, positions.expand(3, -1)[..., None], layout)[:, 0]

    def extend(self, rows):
        """Reads the queued chunk of each row, after its last sampled token. -> hidden states (rows, hidden) at their ends."""
        policy, ids, pictures, positions, places = self.policy, [], [], [], []
        for r in rows:
            chunk = r.queued
            place, r.position = policy.positions(chunk.ids, chunk.pictures, r.position)
            prompt = len(r.sequence.prompt.ids)
            places.append((r.slot * self.cache.group + r.index, r.column, len(chunk.ids), prompt))
            ids += chunk.ids
            pictures += chunk.pictures
            positions.append(place)
            r.column += len(chunk.ids)
            r.queued = None
        hidden = policy.hidden(policy.embed(ids, pictures)[None], torch.cat(positions, 1)[:, None],
                               ExtendLayout(self.cache, places))[0]                                   # (N, hidden)
        ends = torch.tensor([length for _, _, length, _ in places]).cumsum(0) - 1
        return hidden[ends.to(hidden.device)]

    def sample(self, rows, hidden, on_turn):
        """Samples a token for each row and appends it. -> the rows whose turn is over; what they go on with is queued."""
        policy = self.policy
        log_probs = policy.log_softmax(hidden, self.temperature or 1.0)                               # (rows, vocabulary)
        if self.top_p < 1:
            log_probs = nucleus(log_probs, self.top_p)
        if self.temperature == 0:
            tokens = log_probs.argmax(-1, keepdim=True)
        else:
            tokens = torch.multinomial(log_probs.exp(), 1, generator=self.generator)
        chosen = log_probs.gather(1, tokens)[:, 0].tolist()
        over = []
        for row, token, log_prob in zip(rows, tokens[:, 0].tolist(), chosen):
            sequence = row.sequence
            sequence.ids.append(token)
            sequence.sampled.append(True)
            sequence.log_probs.append(log_prob)
            row.turn += 1
            ended = token in policy.end_tokens
            full = len(sequence.ids) >= self.response_tokens
            if not (ended or full or row.turn >= self.turn_tokens):
                continue
            chunk = on_turn(sequence, cut=not ended)
            over.append(row)
            row.turn = 0
            if chunk is None or len(sequence.ids) + len(chunk.ids) >= self.response_tokens:
                continue
            sequence.add(chunk)
            row.queued = Chunk([token, *chunk.ids], chunk.pictures)     # the last sampled token has not been read yet
        return over


def nucleus(log_probs, top_p):
    """Keeps the fewest tokens whose probabilities add up to top_p, and renormalises. log_probs (N, vocabulary)."""
    ordered, index = log_probs.sort(-1, descending=True)
    beyond = ordered.exp().cumsum(-1) - ordered.exp() >= top_p
    dropped = torch.zeros_like(beyond).scatter(-1, index, beyond)
    return torch.log_softmax(log_probs.masked_fill(dropped, -torch.inf), -1)
