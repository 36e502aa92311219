"""Train the needle model from random weights on one CPU core.

    python -m evals.needle.train --out checkpoint.pt

Stages grow the sequence length from 64 to 4,096 tokens while position gaps stretch the positions to 32K. Beside the
language-model loss on answer tokens, the attention is supervised:

- bind: layer 0, head 0: a value looks at its key;
- asked: layer 0, head 1: a token of the prompt's tail looks at the nearest asked key;
- value: layers 1 to 6, head 2: tail tokens look at the value that answers;
- needle: layers 1 to 6, head 3: tail tokens look at the statement that answers;
- spread: every head, every token: nothing but <bos>, near neighbours and, for tail tokens, the asked statements.

Short training sequences have few tokens to be distracted by, so the logits of distant tokens get
log(emulated length / length) added in these losses: what is learned at 512 tokens holds at 16K.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from evals.needle.model import ModelConfig, NeedleModel
from evals.needle.training_data import KIND_NAMES, NONE, make_batch

NEAR = 48  # tokens back that count as neighbours
SUPERVISED_LAYERS = range(1, 7)
LATE_LAYERS = range(3, 7)
BIND_HEAD, ASKED_HEAD, VALUE_HEAD, NEEDLE_HEAD = 0, 1, 2, 3


@dataclass(frozen=True)
class Stage:
    length: int
    batch: int
    steps: int
    tail_tokens: int
    lr: float
    attention: float  # weight of bind, asked, value, needle
    spread: float  # weight of spread
    emulated_length: int  # see the file header
    max_position: int = 32768


STAGES = (
    Stage(64, 32, 100, 0, 6e-4, 0.3, 0.0, 64, 16384),
    Stage(64, 32, 150, 0, 8e-4, 1.0, 0.2, 64, 16384),
    Stage(128, 16, 200, 30, 8e-4, 1.0, 0.3, 256, 16384),
    Stage(256, 10, 240, 100, 8e-4, 0.5, 0.5, 2048),
    Stage(512, 6, 160, 100, 8e-4, 0.5, 1.0, 16384),
    Stage(1024, 4, 110, 100, 8e-4, 0.5, 1.5, 32768),
    Stage(2048, 2, 60, 100, 8e-4, 0.5, 2.0, 32768),
    Stage(4096, 1, 50, 100, 8e-4, 0.5, 2.0, 32768),
)


def choose_rows(batch: dict[str, Tensor], count: int) -> Tensor:
    """Up to `count` query positions a sequence [batch, count], those with supervision preferred."""
    length = batch["ids"].shape[1]
    if count >= length:
        return torch.arange(length).expand(batch["ids"].shape[0], length)
    weight = 1.0 + 6.0 * (batch["bind"] >= 0) + 5.0 * (batch["value_at"] >= 0)
    weight += 12.0 * ((batch["label"] >= 0) & (batch["value_at"] >= 0))
    return torch.multinomial(weight, count).sort(1).values


def distant_mask(batch: dict[str, Tensor], rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For the chosen rows [batch, rows, length]: causal keys, distant keys, keys of the asked statements."""
    keys = torch.arange(batch["ids"].shape[1])
    back = rows[..., None] - keys
    statement = batch["statement"][:, None]
    asked = torch.zeros_like(back, dtype=torch.bool)
    for name in ("asked_a", "asked_b"):
        wanted = batch[name].gather(1, rows)[..., None]
        asked |= (wanted == statement) & (wanted != NONE)
    causal = back >= 0
    asked &= causal
    distant = causal & (back >= NEAR) & (keys != 0) & ~asked
    return causal, distant, asked


def mean_where(values: Tensor, where: Tensor) -> Tensor:
    return (values * where).sum() / where.sum().clamp(min=1)


def attention_losses(
    config: ModelConfig, queries_keys: list[tuple[Tensor, Tensor]], batch: dict[str, Tensor], rows: Tensor,
    emulated_length: int,
) -> dict[str, Tensor]:  # fmt: skip
    """The five losses of the file header, each a mean over its tokens (and layers)."""
    causal, distant, asked = distant_mask(batch, rows)
    length = batch["ids"].shape[1]
    stretch = torch.log(torch.tensor(max(1.0, emulated_length / length)))
    bias = torch.where(distant, stretch, 0.0).masked_fill(~causal, -1e9)
    target = {name: batch[name].gather(1, rows) for name in ("bind", "asked_key", "value_at", "late_only")}

    def at_target(log_mass: Tensor, name: str, extra: Tensor | bool = True) -> Tensor:
        picked = log_mass.gather(2, target[name].clamp(min=0)[..., None])[..., 0]
        return -mean_where(picked, (target[name] >= 0) & extra)

    zero = torch.zeros(())
    losses = {"bind": zero, "asked": zero, "value": zero, "needle": zero, "spread": zero}
    tail = asked.any(-1) & (target["value_at"] >= 0)
    for index, (q, k) in enumerate(queries_keys):
        if index in config.sliding_layers:
            continue
        rows_of_heads = rows[:, None, :, None].expand(-1, config.num_heads, -1, config.head_dim)
        q = q.gather(2, rows_of_heads).float()
        k = k.float().repeat_interleave(config.group_size, 1)
        scores = torch.matmul(q, k.transpose(-1, -2)) * config.head_dim**-0.5 + bias[:, None]
        log_mass = scores.log_softmax(-1)
        far = log_mass.masked_fill(~distant[:, None], -1e9).logsumexp(-1)
        losses["spread"] = losses["spread"] - torch.log1p(-far.exp().clamp(max=1 - 1e-6)).mean()
        if index == 0:
            losses["bind"] = at_target(log_mass[:, BIND_HEAD], "bind")
            losses["asked"] = at_target(log_mass[:, ASKED_HEAD], "asked_key")
        if index in SUPERVISED_LAYERS:
            early_enough = True if index in LATE_LAYERS else target["late_only"] == 0
            losses["value"] = losses["value"] + at_target(log_mass[:, VALUE_HEAD], "value_at", early_enough)
            on_needle = log_mass[:, NEEDLE_HEAD].masked_fill(~asked, -1e9).logsumexp(-1)
            losses["needle"] = losses["needle"] - mean_where(on_needle, tail & early_enough)
    scored = [i for i in SUPERVISED_LAYERS if i not in config.sliding_layers]
    losses["value"] = losses["value"] / len(scored)
    losses["needle"] = losses["needle"] / len(scored)
    losses["spread"] = losses["spread"] / (len(queries_keys) - len(config.sliding_layers))
    return losses


def learning_rate(step: int, total: int, peak: float, warmup: int = 40, decay: float = 0.35) -> float:
    """Linear warm-up, flat, then linear decay to 1 % over the last `decay` of the steps."""
    return peak * min((step + 1) / warmup, max(0.01, min(1.0, (total - step) / (decay * total))))


def make_optimizer(model: NeedleModel, weight_decay: float) -> torch.optim.AdamW:
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and not n.startswith("embedding")]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay, "scale": 1.0},
        {"params": vectors, "weight_decay": 0.0, "scale": 1.0},
        {"params": [model.embedding.weight], "weight_decay": 0.0, "scale": 0.1},
    ]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), foreach=True)


def accuracy_by_kind(logits: Tensor, labels: Tensor, kinds: Tensor) -> dict[str, float]:
    right = logits.argmax(-1) == labels
    return {name: float(right[kinds == k].float().mean()) for k, name in KIND_NAMES.items() if bool((kinds == k).any())}


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    config = ModelConfig(sliding_layers=args.sliding_layers)
    model = NeedleModel(config)
    print(f"parameters: {sum(p.numel() for p in model.parameters()):,}", flush=True)
    optimizer = make_optimizer(model, args.weight_decay)
    stages = [s for s in STAGES if s.length <= args.max_length]
    total = sum(s.steps for s in stages)
    total_tokens = sum(s.steps * s.batch * s.length for s in stages)
    step = tokens = 0
    started = time.monotonic()
    for stage in stages:
        running: dict[str, float] = {}
        for _ in range(stage.steps):
            arrays = make_batch(rng, stage.batch, stage.length, stage.tail_tokens, stage.max_position)
            batch = {name: torch.from_numpy(a) for name, a in arrays.items()}
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, total, stage.lr) * group["scale"]
            labelled = batch["label"] >= 0
            with torch.autocast("cpu", torch.bfloat16):
                logits, queries_keys = model(batch["ids"], batch["positions"], labelled)
            labels = batch["label"][labelled]
            answer_loss = F.cross_entropy(logits.float(), labels)
            losses = attention_losses(
                config, queries_keys, batch, choose_rows(batch, args.rows),
                stage.emulated_length,
            )  # fmt: skip
            guide = losses["bind"] + losses["asked"] + 2 * losses["value"] + 0.5 * losses["needle"]
            loss = answer_loss + stage.attention * guide + stage.spread * losses["spread"]
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            tokens += stage.batch * stage.length
            for name, value in accuracy_by_kind(logits.detach(), labels, batch["kind"][labelled]).items():
                running[name] = 0.9 * running.get(name, value) + 0.1 * value
            if step % args.log_every == 0 or step == total - 1:
                elapsed = time.monotonic() - started
                rate = tokens / elapsed
                print(
                    f"step {step}/{total} length {stage.length} {elapsed / 60:.1f} min {rate:.0f} tok/s "
                    f"eta {(total_tokens - tokens) / rate / 60:.1f} min answer {answer_loss.item():.3f} "
                    + " ".join(f"{n} {v.item():.4f}" for n, v in losses.items())
                    + " accuracy "
                    + " ".join(f"{n} {v:.3f}" for n, v in sorted(running.items())),
                    flush=True,
                )
            step += 1
    minutes = (time.monotonic() - started) / 60
    torch.save(
        {"weights": model.state_dict(), "config": asdict(config), "seed": args.seed, "tokens": tokens, "steps": total,
         "minutes": minutes}, args.out,
    )  # fmt: skip
    print(f"saved {args.out}: {tokens:,} tokens in {minutes:.1f} min", flush=True)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the needle model from random weights on one CPU core.")
    parser.add_argument("--out", required=True, help="checkpoint to write (.pt; export.py reads it)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument(
        "--rows", type=int, default=128, help="query positions a sequence whose attention is supervised"
    )
    parser.add_argument("--max-length", type=int, default=4096, help="leave out the stages of longer sequences")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument(
        "--sliding-layers", default="", help="layers with a sliding window of 128, such as 1,3,5,7 (default: none)"
    )
    args = parser.parse_args(argv)
    args.sliding_layers = tuple(int(x) for x in args.sliding_layers.split(",") if x)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    train(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
