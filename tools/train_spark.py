"""Train spark, qrun's embedded model, from text that the project generates.

Run it as `python tools/train_spark.py --out qrun/spark`.

Needs torch, tokenizers and safetensors; two CPU cores are enough, in less than two hours. Seeds are fixed and nothing
depends on the clock, so a second run on the same kind of machine makes the same model. The weights in `--out` are
replaced every few minutes by a rename, so the directory is usable all the time.
"""

import argparse
import copy
import json
import math
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import spark_text
import torch
import torch.nn.functional as F
from spark_checkpoint import read_weights, tensors, train_tokenizer, write_rest, write_weights
from spark_model import Shape, Spark
from spark_optim import Optimizer
from tokenizers import Tokenizer
from torch import Tensor

HELD_SEED, HELD_SIZE, USER_SHARE = 7777, 48_000, 0.25
Row = tuple[list[int], list[bool]]
Batch = tuple[Tensor, Tensor]


def encode(tokenizer: Tokenizer, items: list[spark_text.Dialogue], longest: int) -> list[Row]:
    """Ids of dialogues, and for each whether the assistant says it."""
    pieces = [item.render() for item in items]
    ids = iter(tokenizer.encode_batch_fast([text for item in pieces for text, _ in item], add_special_tokens=False))
    out: list[Row] = []
    for item in pieces:
        row: list[int] = []
        said: list[bool] = []
        for _, assistant in item:
            new = next(ids).ids
            row += new
            said += [assistant] * len(new)
        out.append((row[:longest], said[:longest]))
    return out


def batches(tokenizer: Tokenizer, seed: int, *, tokens: int, wild: int, longest: int = 1024) -> Iterator[Batch]:
    """Padded ids of about `tokens` positions, and which of them to learn: all of the assistant's, a share of the rest.

    Dialogues of like length come together, so little is padding.
    """
    stream, rng = spark_text.dialogues(seed, wild=wild), random.Random(seed)
    while True:
        rows = sorted(encode(tokenizer, list(islice(stream, 4096)), longest), key=lambda row: len(row[0]))
        groups: list[list[Row]] = [[]]
        for row in rows:
            if groups[-1] and (len(groups[-1]) + 1) * len(row[0]) > tokens:
                groups.append([])
            groups[-1].append(row)
        rng.shuffle(groups)
        for group in groups:
            width = max(len(ids) for ids, _ in group)
            ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in group])
            learn = [[mine or rng.random() < USER_SHARE for mine in said] for _, said in group]
            yield ids, torch.tensor([row + [False] * (width - len(row)) for row in learn])


class Halves:
    """Gradients of a batch by two threads, one torch thread each: each takes half of the rows through its own replica.

    The replicas share the weights and have gradients of their own, added in a fixed order. On two cores this is faster
    than splitting every operation, and much faster when other programs want the cores too.
    """

    def __init__(self, model: Spark, count: int) -> None:
        self.model = model
        self.replicas = [model, *(copy.deepcopy(model) for _ in range(count - 1))]
        for replica in self.replicas[1:]:
            for mine, shared in zip(replica.parameters(), model.parameters(), strict=True):
                mine.data = shared.data
        self.pool = ThreadPoolExecutor(count)

    def backward(self, ids: Tensor, learn: Tensor) -> float:
        """Set the gradients of the mean loss on the model, and return the loss."""
        total, n = int(learn[:, 1:].sum()), len(self.replicas)
        used = self.replicas[: len(ids)]
        work = [self.pool.submit(_part, r, ids[i::n], learn[i::n], total) for i, r in enumerate(used)]
        loss = sum(part.result() for part in work)
        for replica in used[1:]:
            for mine, shared in zip(replica.parameters(), self.model.parameters(), strict=True):
                if shared.grad is None:
                    shared.grad = mine.grad
                elif mine.grad is not None:
                    shared.grad += mine.grad
                mine.grad = None
        return loss

    def balance(self, rate: float) -> None:
        """Balance the experts by the load that all replicas saw."""
        for moe, *others in zip(*(r.mixtures for r in self.replicas), strict=True):
            for other in others:
                moe.load += other.load
                other.load.zero_()
            moe.balance(rate)
            for other in others:
                other.bias.copy_(moe.bias)

    def set_fake_int4(self, on: bool) -> None:
        """See all linear weights through 4 bits, or not."""
        for replica in self.replicas:
            replica.set_fake_int4(on)


def _part(model: Spark, ids: Tensor, learn: Tensor, total: int) -> float:
    keep = learn.roll(-1, 1)  # the position before a token predicts it
    keep[:, -1] = False
    loss = F.cross_entropy(model(ids, keep), ids.roll(-1, 1)[keep], reduction="sum") / total
    loss.backward()  # pyright: ignore[reportUnknownMemberType]
    return loss.item()


@torch.no_grad()
def perplexity(model: Spark, tokenizer: Tokenizer, text: str) -> tuple[float, float]:
    """Perplexity of the rendered dialogues in `text`: of all tokens, and of what the assistant says."""
    model.eval()
    total, count, said, said_count = 0.0, 0, 0.0, 0
    marker, end = tokenizer.encode("\nAssistant: ").ids[-1], tokenizer.encode(spark_text.SEP).ids[-1]
    for part in text.split(spark_text.BOS)[1:]:
        row = tokenizer.encode(spark_text.BOS + part, add_special_tokens=False).ids[:2048]
        ids = torch.tensor([row])
        each = F.cross_entropy(model(ids)[0, :-1], ids[0, 1:], reduction="none")
        speaking = False
        mask: list[bool] = []
        for token in row:
            mask.append(speaking)
            speaking = (speaking or token == marker) and token != end
        chosen = torch.tensor(mask[1:])
        total, count = total + each.sum().item(), count + len(each)
        said, said_count = said + each[chosen].sum().item(), said_count + int(chosen.sum())
    model.train()
    return math.exp(total / count), math.exp(said / max(said_count, 1))


@dataclass(frozen=True)
class Round:
    """A stretch of training with its own optimizer: `steps` long, the learning rate falling from step `fall`.

    `wild` text dwells on copying (1) or counting (2). With `mean` the result is the mean of the weights before and
    after the round, which keeps what was known and takes up what is new.
    """

    steps: int
    fall: int
    peak: float
    wild: int = 0
    mean: bool = False

    def scale(self, step: int) -> float:
        """Learning-rate scale: a short warm-up, flat until `fall`, then a cosine down to nearly nothing."""
        rest = max(0, step - self.fall) / max(1, self.steps - self.fall)
        return self.peak * min(1.0, (step + 1) / 30) * (0.01 + 0.99 * (1 + math.cos(math.pi * min(1.0, rest))) / 2)


ROUNDS = (Round(596, 268, 1.0), Round(320, 120, 0.6, wild=1), Round(130, 30, 0.4, wild=2, mean=True))


def run(model: Spark, plan: Round, data: Iterator[Batch], out: Path, options: argparse.Namespace) -> None:
    """One round; from `fall` on, every other step sees the weights through 4 bits."""
    halves, optimizer, coin = Halves(model, options.threads), Optimizer(model), random.Random(options.seed)
    start = saved = time.monotonic()
    seen, mean = 0, 0.0
    for step in range(plan.steps):
        halves.set_fake_int4(step > plan.fall and coin.random() < 0.5)
        ids, learn = next(data)
        loss = halves.backward(ids, learn)
        scale = plan.scale(step)
        optimizer.step(scale)
        halves.balance(0.002 * scale)
        seen += ids.numel()
        mean = loss if step == 0 else 0.95 * mean + 0.05 * loss
        now = time.monotonic()
        if (step + 1) % 25 == 0:
            row = {"step": step + 1, "loss": round(mean, 4), "scale": round(scale, 3)}
            print(json.dumps(row | {"tok/s": round(seen / (now - start)), "s": round(now - start)}), flush=True)
        if now - saved > 60 * options.save_minutes:
            write_weights(model, out)
            saved = now
    halves.set_fake_int4(False)
    write_weights(model, out)
    print(f"{plan.steps} steps, {seen / 1e6:.2f} M tokens, {(time.monotonic() - start) / 60:.1f} minutes", flush=True)


@torch.no_grad()
def average(model: Spark, before: list[Tensor], out: Path) -> None:
    """Write the mean of the written weights and those of `before`."""
    read_weights(model, out)
    for part, old in zip(tensors(model).values(), before, strict=True):
        part.add_(old).mul_(0.5)
    write_weights(model, out)


def train(options: argparse.Namespace) -> None:
    """Make the tokenizer, the held-out text and the model."""
    torch.manual_seed(options.seed)  # pyright: ignore[reportUnknownMemberType]
    torch.set_num_threads(1)  # of an operation: the threads are in `Halves`
    torch.set_flush_denormal(True)
    out, shape = Path(options.out), Shape()
    texts = (item.text for item in islice(spark_text.dialogues(options.seed + 1), 20_000))
    tokenizer = train_tokenizer(texts, shape.vocab)
    write_rest(shape, tokenizer, out)
    held = spark_text.held_out(HELD_SEED, HELD_SIZE)
    (out / "heldout.txt").write_text(held, encoding="utf-8")
    model = Spark(shape)
    words = tokenizer.get_vocab_size()
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, vocabulary {words}", flush=True)
    for number, plan in list(enumerate(ROUNDS))[options.first - 1 :]:
        if number:
            read_weights(model, out)  # BF16 as written, so that a round can also be run by itself
        data = batches(tokenizer, options.seed + 2 + number, tokens=options.tokens, wild=plan.wild)
        before = [part.clone() for part in tensors(model).values()]
        run(model, plan, data, out, options)
        if plan.mean:
            average(model, before, out)
    read_weights(model, out)
    for name in ("bf16", "int4"):
        model.set_fake_int4(name == "int4")
        every, assistant = perplexity(model, tokenizer, held)
        print(f"held-out perplexity, weights in {name}: {every:.3f} of all tokens, {assistant:.3f} of the assistant's")


def main() -> None:
    """Parse the options and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="qrun/spark", help="the directory to write")
    parser.add_argument("--first", type=int, default=1, help="the round to begin with, on the model in --out")
    parser.add_argument("--tokens", type=int, default=5120, help="positions in a batch")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-minutes", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=1)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
