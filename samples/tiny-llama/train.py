"""How the bundled model was made: tokenizer, training, model card figures, and the two texts it wrote itself.

    python samples/tiny-llama/train.py OUT --evaluate wikitext2-test.txt --dialogue plays.txt TEXT [TEXT ...]

A model that has not been trained long enough hides what quantization breaks: its weights are still near their random
start, and rounding them costs nothing. So training goes on, at a constant rate, for ``LEAST_STEPS`` and until rounding
to int4 costs ``KL_TARGET`` nats on text that training never saw (or the time is up); then the rate is brought down.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from calibration.rtn import round_to_nearest
from exporter.metrics import kl_divergence, negative_log_likelihood, perplexity

SEED = 20261120
VOCABULARY = 2048
SPECIAL_TOKENS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
]
WORD_PATTERN = (  # Llama 3's: contractions, words, numbers of up to three digits, punctuation, white space
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": VOCABULARY - len(SPECIAL_TOKENS),
    "eos_token_id": [VOCABULARY - len(SPECIAL_TOKENS) + 1, VOCABULARY - len(SPECIAL_TOKENS) + 4],
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 768,
    "max_position_embeddings": 512,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 8,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 64,
        "rope_type": "llama3",
    },
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": VOCABULARY,
}
WINDOW = CONFIG["max_position_embeddings"]
BATCH = 16  # windows of 512 tokens a step
PEAK_RATE = 2e-3
WARMUP_STEPS = 100
DECAY_SHARE = 0.25  # of the steps taken before the decay
EVALUATE_EVERY = 250
KL_TARGET = 1e-3  # nats a token, int4 in groups of 32 with embedding and head in int8, against bf16
KL_MARGIN = 1.25  # the decay may sharpen or soften: start it a little above the target
LEAST_STEPS = 1000  # four times through the text: below that the model is not worth quantizing, whatever rounding costs


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    begin = SPECIAL_TOKENS[0]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single=[begin, "$A"], pair=[begin, "$A", begin, "$B"], special_tokens=[(begin, CONFIG["bos_token_id"])]
            ),
        ]
    )
    return tokenizer


def documents(text: str) -> list[str]:
    """Pieces of a few paragraphs, so that a text begins and ends often enough for the model to learn both."""
    pieces, current, length = [], [], 0
    for paragraph in re.split(r"\n", text):
        current.append(paragraph)
        length += len(paragraph)
        if length > 1500:
            pieces.append("\n".join(current).strip())
            current, length = [], 0
    pieces.append("\n".join(current).strip())
    return [piece for piece in pieces if piece]


def dialogues(text: str) -> list[list[dict[str, str]]]:
    """Chats made of a play: the speeches of a scene by turns are what the user and what the assistant says."""
    speeches = [speech.split(":\n", 1)[1].strip() for speech in text.split("\n\n") if ":\n" in speech]
    turns = 4
    return [
        [
            {"role": "user" if index % 2 == 0 else "assistant", "content": speech}
            for index, speech in enumerate(speeches[start : start + turns])
        ]
        for start in range(0, len(speeches) - turns + 1, turns)
    ]


def token_stream(tokenizer: Tokenizer, texts: list[str], plays: list[str]) -> Tensor:
    end_of_text = SPECIAL_TOKENS[1]
    samples = [piece + end_of_text for text in [*texts, *plays] for piece in documents(text)]
    samples += [
        "".join(
            f"<|start_header_id|>{turn['role']}<|end_header_id|>\n\n{turn['content']}<|eot_id|>" for turn in dialogue
        )
        for play in plays
        for dialogue in dialogues(play)
    ]
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(SEED)).tolist()
    encoded = tokenizer.encode_batch([samples[index] for index in order])
    return torch.tensor([token for encoding in encoded for token in encoding.ids])


def windows(tokens: Tensor, *, length: int) -> Tensor:
    count = len(tokens) // length
    return tokens[: count * length].view(count, length)


def rounded(model: LlamaForCausalLM, *, bits: int | None) -> LlamaForCausalLM:
    """A copy with bf16 weights, or with the default quantization on top: ``bits`` in the body, int8 at the ends."""
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, weight in copy.named_parameters():
            weight.copy_(weight.to(torch.bfloat16))
            if bits and weight.ndim == 2:
                at_the_ends = name == "model.embed_tokens.weight"
                group_size = weight.shape[1] if at_the_ends or bits == 8 else 32
                quantized = round_to_nearest(weight, name=name, bits=8 if at_the_ends else bits, group_size=group_size)
                weight.copy_(quantized.dequantize())
    return copy.eval()


@torch.no_grad()
def rounding_cost(model: LlamaForCausalLM, evaluation: Tensor, *, bits: int = 4) -> dict[str, float]:
    """Mean KL (nats) that rounding costs, and the perplexity of the bf16 model, over windows ``[n, WINDOW]``."""
    plain, quantized = rounded(model, bits=None), rounded(model, bits=bits)
    divergences, nll = [], []
    for window in evaluation:
        reference, candidate = plain(window[None]).logits[0], quantized(window[None]).logits[0]
        divergences.append(kl_divergence(reference, candidate))
        nll.append(negative_log_likelihood(reference[:-1], window[1:]))
    all_nll = torch.cat(nll)
    return {
        "mean_kl_nats": torch.cat(divergences).mean().item(),
        "perplexity": perplexity(all_nll),
        "nll_nats": all_nll.sum().item(),
    }


def train(stream: Tensor, evaluation: Tensor, *, minutes: float) -> tuple[LlamaForCausalLM, dict[str, float]]:
    torch.manual_seed(SEED)
    config = {key: value for key, value in CONFIG.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    model = LlamaForCausalLM(
        LlamaConfig(**config, rope_parameters={"rope_theta": CONFIG["rope_theta"], **CONFIG["rope_scaling"]})
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(SEED)
    started, step, decay_from, decay_steps, loss_sum = time.monotonic(), 0, None, 1, 0.0
    while decay_from is None or step < decay_from + decay_steps:
        fade = 1.0 if decay_from is None else 1.0 - (step - decay_from) / decay_steps
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * fade
        starts = torch.randint(len(stream) - WINDOW, (BATCH,), generator=generator).tolist()
        batch = torch.stack([stream[start : start + WINDOW] for start in starts])
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        loss_sum += loss.item()
        if step % EVALUATE_EVERY == 0:
            cost = rounding_cost(model, evaluation)
            elapsed = (time.monotonic() - started) / 60
            print(
                f"step {step}  {elapsed:.1f} min  loss {loss_sum / EVALUATE_EVERY:.3f}  "
                f"held-out perplexity {cost['perplexity']:.1f}  KL of int4 {cost['mean_kl_nats']:.2e}",
                flush=True,
            )
            loss_sum = 0.0
            reached = step >= LEAST_STEPS and cost["mean_kl_nats"] >= KL_TARGET * KL_MARGIN
            if decay_from is None and (reached or elapsed > minutes / (1 + DECAY_SHARE)):
                decay_from, decay_steps = step, math.ceil(step * DECAY_SHARE)
    facts = {"steps": step, "minutes": (time.monotonic() - started) / 60, "tokens_seen": step * BATCH * WINDOW}
    return model, facts


@torch.no_grad()
def write_text(model: LlamaForCausalLM, tokenizer: Tokenizer, *, seed: int, documents_wanted: int) -> str:
    """Documents sampled at temperature 1 from the begin token alone, up to 400 tokens each."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.full((documents_wanted, 1), CONFIG["bos_token_id"])
    cache = None
    for _ in range(400):
        output = model(tokens[:, -1:], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        probabilities = torch.softmax(output.logits[:, -1].float(), dim=-1)
        tokens = torch.cat([tokens, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
    pieces = []
    for row in tokens[:, 1:].tolist():
        ends = [
            index for index, token in enumerate(row) if token in (CONFIG["bos_token_id"], CONFIG["eos_token_id"][0])
        ]
        pieces.append(tokenizer.decode(row[: ends[0] if ends else None], skip_special_tokens=True).strip())
    return "\n\n".join(piece for piece in pieces if piece) + "\n"


def save(out: Path, model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    weights = {
        name: weight.detach().to(torch.bfloat16).contiguous()
        for name, weight in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(out / "config.json", CONFIG)
    write_json(
        out / "generation_config.json",
        {
            "bos_token_id": CONFIG["bos_token_id"],
            "do_sample": True,
            "eos_token_id": CONFIG["eos_token_id"],
            "temperature": 0.6,
            "top_p": 0.9,
        },
    )
    write_json(
        out / "tokenizer_config.json",
        {
            "bos_token": SPECIAL_TOKENS[0],
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": SPECIAL_TOKENS[4],
            "model_max_length": WINDOW,
            "pad_token": SPECIAL_TOKENS[5],
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("texts", type=Path, nargs="+", help="text files to train on")
    parser.add_argument("--dialogue", type=Path, nargs="*", default=[], help="plays, also turned into chats")
    parser.add_argument("--evaluate", type=Path, required=True, help="text for the figures; never trained on")
    parser.add_argument("--minutes", type=float, default=120.0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)

    texts = [path.read_text(encoding="utf-8") for path in arguments.texts]
    plays = [path.read_text(encoding="utf-8") for path in arguments.dialogue]
    tokenizer = train_tokenizer([*texts, *plays])
    stream = token_stream(tokenizer, texts, plays)
    evaluation_text = arguments.evaluate.read_text(encoding="utf-8")
    evaluation = windows(torch.tensor(tokenizer.encode(evaluation_text).ids), length=WINDOW)
    print(f"{len(stream):,} tokens to train on, {evaluation.numel():,} to evaluate on", flush=True)

    model, facts = train(stream, evaluation[:24], minutes=arguments.minutes)
    save(arguments.out, model, tokenizer)
    cost = rounding_cost(model, evaluation)
    scored_bytes = len(evaluation_text.encode()) * (evaluation.numel() - len(evaluation)) / evaluation.numel()
    facts |= {
        "seed": SEED,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "training_tokens": len(stream),
        "evaluation_perplexity": cost["perplexity"],
        "evaluation_bits_per_byte": cost["nll_nats"] / math.log(2) / scored_bytes,
        "int4_mean_kl_nats": cost["mean_kl_nats"],
        "int8_mean_kl_nats": rounding_cost(model, evaluation, bits=8)["mean_kl_nats"],
    }
    write_json(arguments.out / "training.json", facts)
    bf16 = rounded(model, bits=None)
    for name, seed in (("calibration.txt", SEED + 1), ("evaluation.txt", SEED + 2)):
        text = write_text(bf16, tokenizer, seed=seed, documents_wanted=64)
        (arguments.out / name).write_text(text, encoding="utf-8")
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
