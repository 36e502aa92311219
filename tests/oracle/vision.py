"""Tiny random checkpoints of multimodal models, and an oracle that sees images.

The text model is that of `checkpoints`, with M-RoPE: a token has three positions (time, height, width), which
differ inside an image. Images are encoded by Hugging Face's vision model and its image processor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageTextToText

from .checkpoints import BIAS, NORM_SPREAD, ROPE_THETA, random_weights, write_tokenizer
from .families import make_family_checkpoint
from .oracle import Oracle

FAMILIES = ("qwen2_vl", "qwen2_5_vl")
VOCAB = 1024
SPECIAL = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|vision_pad|>")
TOKEN_ID = {word: VOCAB - len(SPECIAL) + i for i, word in enumerate(SPECIAL)}
NUM_WORDS = VOCAB - len(SPECIAL)  # token ids below this are plain words
PATCH, MERGE = 14, 2  # an image token covers (PATCH * MERGE) squared pixels


def make_vision_checkpoint(path: Path, family: str, *, layers: int = 8, seed: int = 0, sharpness: float = 3.5) -> Path:
    """Write config.json, bf16 weights, tokenizer and image processor settings to `path`."""
    hidden, heads, head_dim = 256, 4, 64
    text = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "intermediate_size": 512,
        "vocab_size": VOCAB,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA, "mrope_section": [8, 12, 12]},
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    vision = {"depth": 2, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": MERGE}
    if family == "qwen2_vl":
        vision |= {"embed_dim": 64, "mlp_ratio": 2, "hidden_size": hidden}
    else:
        vision |= {"hidden_size": 64, "intermediate_size": 128, "out_hidden_size": hidden, "fullatt_block_indexes": [1]}
    config = AutoConfig.for_model(
        family,
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=False,
        vision_start_token_id=TOKEN_ID["<|vision_start|>"],
        vision_end_token_id=TOKEN_ID["<|vision_end|>"],
        image_token_id=TOKEN_ID["<|image_pad|>"],
        video_token_id=TOKEN_ID["<|video_pad|>"],
    )
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    shapes = {name: tensor.shape for name, tensor in model.named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    weights = random_weights(
        {name: shape for name, shape in shapes.items() if ".visual." not in name},
        config.text_config,
        head_dim=head_dim,
        generator=generator,
        sharpness=sharpness,
    )
    for name, shape in shapes.items():
        if ".visual." in name:
            noise = torch.randn(shape, generator=generator)
            if len(shape) > 1:
                weights[name] = noise / math.sqrt(math.prod(shape[1:]))
            else:
                weights[name] = 1 + NORM_SPREAD * noise if name.endswith("weight") else BIAS * noise
    model.load_state_dict(weights)
    model.to(torch.bfloat16).save_pretrained(path)
    for folder in (path, path / "tokenizer"):
        write_vision_tokenizer(folder)
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor" if family == "qwen2_vl" else "Qwen2_5_VLProcessor",
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 256},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.25, 0.25, 0.25],
    }
    (path / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))
    return path


GEMMA_SPECIAL = {"boi_token": "<start_of_image>", "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>"}


def make_gemma3_checkpoints(folder: Path) -> tuple[Path, Path]:
    """Gemma 3 as a text model, and the multimodal model around it, with the same weights."""
    text, whole = folder / "text", folder / "whole"
    make_family_checkpoint(text, "gemma3_text")
    language_model = AutoModelForCausalLM.from_pretrained(text, dtype=torch.float32)
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 56, "patch_size": PATCH}
    tokens = {"boi_token_index": VOCAB - 3, "image_token_id": VOCAB - 2, "eoi_token_index": VOCAB - 1}
    config = AutoConfig.for_model(
        "gemma3", text_config=language_model.config.to_dict(), vision_config=vision, mm_tokens_per_image=4, **tokens
    )
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.get_decoder().load_state_dict(language_model.get_decoder().state_dict())
    model.to(torch.bfloat16).save_pretrained(whole)
    # As in published checkpoints, which the release reads.
    tower = "vision_tower."
    weights = load_file(whole / "model.safetensors")
    weights = {name.replace(tower, f"{tower}vision_model."): weight for name, weight in weights.items()}
    save_file(weights, whole / "model.safetensors", metadata={"format": "pt"})
    # vLLM looks up newlines, which may merge with those that it writes around an image.
    write_vision_tokenizer(whole, (*("\n" * n for n in range(1, 5)), *GEMMA_SPECIAL.values()))
    settings = json.loads((whole / "tokenizer_config.json").read_text())
    (whole / "tokenizer_config.json").write_text(json.dumps(settings | {"extra_special_tokens": GEMMA_SPECIAL}))
    images = {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 56, "width": 56}}
    (whole / "preprocessor_config.json").write_text(json.dumps(images))
    processor = {"processor_class": "Gemma3Processor", "image_seq_length": 4}
    (whole / "processor_config.json").write_text(json.dumps(processor))
    return text, whole


def write_vision_tokenizer(folder: Path, special: Sequence[str] = SPECIAL) -> None:
    """The tokenizer of `checkpoints`, whose last words are a model's marks."""
    write_tokenizer(folder, VOCAB)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    names = [f"w{i}" for i in range(VOCAB - len(special))] + list(special)
    tokenizer["model"]["vocab"] = {name: i for i, name in enumerate(names)}
    tokenizer["added_tokens"] = [
        {
            "id": names.index(word),
            "content": word,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for word in special
    ]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def make_image(width: int, height: int, seed: int) -> Image.Image:
    """Coloured noise in squares of 14 pixels."""
    generator = torch.Generator().manual_seed(seed)
    squares = torch.randint(0, 256, (height // PATCH, width // PATCH, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(squares.repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1).numpy())


class VisionOracle(Oracle):
    """`Oracle` for the two families. Call `show` before `run`: it says what the prompt's images are."""

    def __init__(self, path: Path) -> None:
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
        self.processor = AutoImageProcessor.from_pretrained(path)
        self._adopt(model, model.model.language_model)
        self.grid: Tensor | None = None

    @torch.inference_mode()
    def show(self, prompt_ids: list[int], images: list[Image.Image]) -> None:
        """Prepare for a prompt whose image tokens, as many as the images need, are all there."""
        ids = torch.tensor([prompt_ids])
        self.images = torch.zeros(0, self.decoder.config.hidden_size)
        self.num_prompt = len(prompt_ids)
        if not images:
            self.grid, self.delta = torch.arange(len(prompt_ids)).expand(3, -1), 0
            return
        pixels = self.processor(images=images, return_tensors="pt")
        features = self.model.model.get_image_features(pixels["pixel_values"], pixels["image_grid_thw"])
        self.images = torch.cat(list(features.pooler_output))
        grid, delta = self.model.model.get_rope_index(
            ids,
            mm_token_type_ids=(ids == TOKEN_ID["<|image_pad|>"]).int(),
            image_grid_thw=pixels["image_grid_thw"],
        )
        self.grid, self.delta = grid[:, 0], int(delta)

    def _embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        hidden = self.decoder.embed_tokens(ids)
        is_image = (ids == TOKEN_ID["<|image_pad|>"]) & (positions < self.num_prompt)
        if is_image.any():
            hidden = hidden.masked_scatter(is_image[:, None], self.images)
        return hidden

    def _rotary_positions(self, positions: Tensor) -> Tensor:
        """[3, 1, T]: an output token's three positions are equal, `delta` from its place."""
        prompt = self.grid[:, positions.clamp(max=self.num_prompt - 1)]
        return torch.where(positions < self.num_prompt, prompt, positions + self.delta)[:, None]
