"""Write a training checkpoint as a Hugging Face model directory: weights (bf16), configurations and tokenizer.

    python -m evals.needle.export checkpoint.pt evals/needle/model

With sliding layers it is a MinistralForCausalLM for transformers, else a LlamaForCausalLM. The written directory is
loaded with transformers and compared with the training code on a prompt; the program fails if they differ.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from evals.needle import prompts as P
from evals.needle.model import ModelConfig, NeedleModel

MAX_DIFFERENCE = 1e-3
# the messages' texts as one prompt; the word in front that the tokenizer gives a completion's prompt
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %} {{ message.content }}{% endfor %}"
LAYER_NAMES = {
    "attention_norm": "input_layernorm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "q.weight": "self_attn.q_proj.weight",
    "k.weight": "self_attn.k_proj.weight",
    "v.weight": "self_attn.v_proj.weight",
    "o.weight": "self_attn.o_proj.weight",
    "gate.weight": "mlp.gate_proj.weight",
    "up.weight": "mlp.up_proj.weight",
    "down.weight": "mlp.down_proj.weight",
}
TOP_NAMES = {"embedding.weight": "model.embed_tokens.weight", "final_norm": "model.norm.weight"}


def hugging_face_name(name: str) -> str:
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    _, index, rest = name.split(".", 2)
    return f"model.layers.{index}.{LAYER_NAMES[rest]}"


def hugging_face_config(config: ModelConfig) -> dict[str, object]:
    out: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": P.MAX_TOKENS,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": P.BOS_ID,
        "eos_token_id": [P.EOS_ID, P.DOT_ID],
        "pad_token_id": P.PAD_ID,
        "dtype": "bfloat16",
        "use_cache": True,
    }
    if config.sliding_layers:
        # transformers goes by the type, whose layers may slide; vLLM by the architecture, whose layers may there.
        del out["mlp_bias"]
        out["model_type"] = "ministral"
        out["sliding_window"] = config.sliding_window
        out["layer_types"] = [
            "sliding_attention" if i in config.sliding_layers else "full_attention" for i in range(config.num_layers)
        ]
    return out


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per whitespace-separated word, <bos> put in front."""
    tokenizer = Tokenizer(models.WordLevel(P.TOKEN_ID, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", P.BOS_ID)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>",
        model_max_length=P.MAX_TOKENS, clean_up_tokenization_spaces=False, chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def export(weights: dict[str, torch.Tensor], config: ModelConfig, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    tensors = {hugging_face_name(n): w.to(torch.bfloat16).contiguous() for n, w in weights.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    write_json(out / "config.json", hugging_face_config(config))
    generation = {"bos_token_id": P.BOS_ID, "eos_token_id": [P.EOS_ID, P.DOT_ID], "pad_token_id": P.PAD_ID}
    write_json(out / "generation_config.json", generation | {"do_sample": False})
    make_tokenizer().save_pretrained(out, save_jinja_files=False)


@torch.no_grad()
def largest_difference(weights: dict[str, torch.Tensor], config: ModelConfig, out: Path) -> float:
    """Largest difference of the logits between transformers and the training code, fp32 on bf16-rounded weights."""
    ours = NeedleModel(config)
    ours.load_state_dict({n: w.bfloat16().float() for n, w in weights.items()})
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(out)(P.make_prompt("multikey", 512, 0).text, return_tensors="pt").input_ids
    positions = torch.arange(ids.shape[1])[None]
    logits, _ = ours(ids, positions, torch.ones_like(ids, dtype=torch.bool))
    return (logits - theirs(ids).logits[0]).abs().max().item()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write a training checkpoint as a Hugging Face model directory.")
    parser.add_argument("checkpoint", type=Path, help="what train.py wrote")
    parser.add_argument("out", type=Path, help="directory to write")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    state = torch.load(args.checkpoint, weights_only=True)
    config = ModelConfig(**state["config"])
    export(state["weights"], config, args.out)
    difference = largest_difference(state["weights"], config, args.out)
    size = (args.out / "model.safetensors").stat().st_size
    print(f"{args.out}: {size:,} bytes of weights, largest logit difference to the training code {difference:.2g}")
    if difference > MAX_DIFFERENCE:
        print(f"the difference is over {MAX_DIFFERENCE}: transformers computes another model", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
