"""What a sliding context costs: ``python -m benchmarks.sliding``, on the trained sample and its evaluation text.

Quality: every token of a long text is foretold by a small cache that slides, and by one that holds all of it, both in
full precision. Parity: an artifact that slides against its reference that slides, token by token.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import targets
from calibration.layers import quantize
from exporter.checkpoint import BUNDLED_MODEL, open_checkpoint
from exporter.metrics import kl_divergence
from exporter.model.reference import FULL_PRECISION, Reference
from exporter.model.trace import trace
from exporter.parity import FLOOR_MULTIPLE, FLOOR_NOISE, Answering
from exporter.planning import plan
from exporter.sliding import Sliding, SlidingRunner
from exporter.tokenizer import Tokenizer

TOKENS = 384
CONTEXT = 96
SLIDES = (Sliding(sink=0, window=48), Sliding(sink=4, window=48), Sliding(sink=4, window=80))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sliding", description=__doc__)
    parser.add_argument("--targets", default="onnxruntime,executorch,coreml,coreml-ane")
    args = parser.parse_args()
    checkpoint = open_checkpoint(BUNDLED_MODEL)
    graph, text = trace(checkpoint.spec), (BUNDLED_MODEL / "evaluation.txt").read_text(encoding="utf-8")
    ids = Tokenizer(BUNDLED_MODEL).encode(text)[:TOKENS]

    weights = {name: checkpoint.read(name) for name in checkpoint.spec.weights()}
    whole = step_by_step(Reference(graph, weights, FULL_PRECISION), ids)
    told = f"perplexity with all of them in the cache {perplexity(whole, ids):.2f}"
    print(f"context {CONTEXT}, {len(ids)} tokens; {told}\n")
    print("| sink | window | perplexity | mean KL from the whole text, nats |\n|-:|-:|-:|-:|")
    for sliding in SLIDES:
        slid = step_by_step(SlidingRunner(Reference(graph, weights, FULL_PRECISION), sliding, context=CONTEXT), ids)
        kl = kl_divergence(whole, slid).mean()
        print(f"| {sliding.sink} | {sliding.window} | {perplexity(slid, ids):.2f} | {kl:.3f} |")

    print("\n| target | mean KL from its reference | floor | gate |\n|-|-:|-:|-:|")
    with tempfile.TemporaryDirectory() as folder:
        for label in args.targets.split(","):
            precision = "int8" if label == "coreml-ane" else "int4"  # which the Neural Engine takes per row alone
            made = plan(
                BUNDLED_MODEL, target=label, precision=precision, context=CONTEXT, calibration="none", store=folder
            )
            store, _ = quantize(checkpoint, made.scheme, root=Path(folder))
            target, out = targets.load(label), Path(folder) / label
            out.mkdir()
            artifact = target.lower(graph, store, made, out)
            expected, noisy = (
                step_by_step(
                    SlidingRunner(
                        Reference(graph, store, artifact.arithmetic, noise=noise), SLIDES[1], context=CONTEXT
                    ),
                    ids,
                )
                for noise in (0.0, FLOOR_NOISE)
            )
            with target.open(artifact, threads=1) as runner:
                got = step_by_step(SlidingRunner(runner, SLIDES[1], context=CONTEXT), ids)
            kl, floor = (kl_divergence(expected, other).mean().item() for other in (got, noisy))
            gate = "1.0e-04 (fp16)" if artifact.arithmetic.kv_dtype == "fp16" else f"{FLOOR_MULTIPLE * floor:.1e}"
            print(f"| {label} | {kl:.1e} | {floor:.1e} | {gate} |")


def step_by_step(runner: Answering, ids: Sequence[int]) -> Tensor:
    """Logits after each token, ``[T, V]``."""
    return torch.stack([runner.feed([token])[-1] for token in ids])


def perplexity(logits: Tensor, ids: Sequence[int]) -> float:
    surprise = torch.nn.functional.cross_entropy(logits[:-1].float(), torch.tensor(list(ids[1:])))
    return math.exp(surprise.item())


if __name__ == "__main__":
    main()
