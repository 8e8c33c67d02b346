"""What the verdicts are made of: metrics against closed forms, gates that hold and gates that break."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.rtn import round_to_nearest
from exporter.codes import check_codes, digest
from exporter.latency import measure_latency
from exporter.metrics import bootstrap_interval, kl_divergence, negative_log_likelihood, perplexity, top1_agreement
from exporter.model.reference import round_activations
from exporter.parity import (
    Drive,
    Floor,
    Gate,
    GoldenLogits,
    Structure,
    check_parity,
    drive_for,
    gate,
    structure_bound,
)
from exporter.quality import evaluation_windows
from exporter.quantized import QuantizedTensor
from exporter.spec import (
    Activations,
    Arithmetic,
    Artifact,
    Logits,
    ModelSpec,
    Precision,
    RopeSpec,
    Verdict,
    WeightScheme,
    activation_block,
)

SCHEME = WeightScheme(body=Precision.INT4, embedding=Precision.INT8, head=Precision.INT8, group_size=32)


def logits(seed: int, *, rows: int = 5, columns: int = 200) -> torch.Tensor:
    return 3 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_kl_of_two_coins_is_the_textbook_value() -> None:
    fair, biased = torch.log(torch.tensor([[0.5, 0.5]])), torch.log(torch.tensor([[0.9, 0.1]]))
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert kl_divergence(fair, biased).item() == pytest.approx(expected, rel=1e-6)


@given(st.integers(0, 1000), st.floats(-50, 50))
def test_kl_ignores_a_shift_of_all_logits_and_is_never_negative(seed: int, shift: float) -> None:
    a, b = logits(seed), logits(seed + 1)
    assert torch.allclose(kl_divergence(a, b), kl_divergence(a, b + shift), atol=1e-4)
    assert (kl_divergence(a, a + shift) < 1e-9).all()
    assert (kl_divergence(a, b) >= 0).all()


def test_perplexity_of_a_uniform_guess_is_the_vocabulary() -> None:
    nll = negative_log_likelihood(torch.zeros(7, 50), torch.arange(7))
    assert perplexity(nll) == pytest.approx(50)


def test_top1_counts_positions() -> None:
    a = torch.eye(4)
    b = a.clone()
    b[0] = torch.tensor([0.0, 2.0, 0.0, 0.0])
    assert top1_agreement(a, b).tolist() == [False, True, True, True]


def test_the_bootstrap_interval_holds_the_mean_and_narrows_with_more_values() -> None:
    values = torch.randn(4000, generator=torch.Generator().manual_seed(0)).double()
    low, high = bootstrap_interval(values)
    assert low < values.mean() < high
    few_low, few_high = bootstrap_interval(values[:100])
    assert high - low < few_high - few_low
    assert high - low == pytest.approx(2 * 1.96 / math.sqrt(4000), rel=0.1)  # of a mean of N(0, 1)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(0.0, 2.0))
def test_golden_kl_is_at_most_the_whole_kl(seed: int, noise: float) -> None:
    """Grouping outcomes cannot raise a divergence (the data processing inequality)."""
    expected = logits(seed)
    got = expected + noise * logits(seed + 7)
    golden = GoldenLogits.of(expected).figures(got)
    assert golden["mean_kl_nats"] <= kl_divergence(expected, got).mean().item() + 1e-6
    if noise > 0.1:
        assert golden["mean_kl_nats"] > 0


def artifact_of(precision: str, *, compute: str = "fp32") -> Artifact:
    spec = ModelSpec(
        **{"name": "x", "vocab_size": 200, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1},
        **{"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 64},
        **{"rms_norm_eps": 1e-5, "tie_word_embeddings": True, "bos_token_id": None, "eos_token_ids": ()},
        rope=RopeSpec(theta=1e4),
    )
    body = Precision(precision)
    return Artifact(
        **{"target": "x", "backend": "y", "path": Path("z"), "context": 64, "logits": Logits.LAST, "spec": spec},
        scheme=WeightScheme(body=body, embedding=body, head=body, group_size=32),
        arithmetic=Arithmetic(activations=Activations.FLOAT, compute_dtype=compute, kv_dtype=compute),
    )


FLOOR = Floor(mean_kl_nats=1e-6, worst_kl_nats=1e-5)


@pytest.mark.parametrize(
    ("precision", "compute", "structure", "noise", "verdict", "says"),
    [
        ("int4", "fp32", 9e-5, 0.0, "passed", ""),
        ("int4", "fp32", 2e-4, 0.0, "failed", "structure"),
        ("fp16", "fp32", 9e-4, 0.0, "passed", ""),
        ("fp16", "fp32", 2e-3, 0.0, "failed", "structure"),
        ("int4", "fp32", float("nan"), 0.0, "failed", "structure"),
        ("int4", "fp32", 0.0, 0.05, "failed", "mean KL"),
        ("int4", "fp32", 0.0, float("nan"), "failed", "mean KL is nan"),
        ("int4", "fp16", 0.0, 0.003, "passed", ""),
        ("int4", "fp16", 0.0, 0.05, "failed", "mean KL"),
    ],
)
def test_each_gate_of_parity_fails_on_its_own(
    precision: str, compute: str, structure: float, noise: float, verdict: str, says: str
) -> None:
    expected, artifact = logits(3, rows=40), artifact_of(precision, compute=compute)
    report = check_parity(
        expected=expected,
        got=expected + noise * logits(4, rows=40),
        structure=Structure(max_abs_logit_diff=structure, allowed=structure_bound(artifact), positions=40),
        floor=FLOOR,
        artifact=artifact,
        runtime="none",
    )
    assert report.verdict == verdict
    assert says in report.reason


@pytest.mark.parametrize(("compute", "most"), [("fp32", 1e-4), ("fp16", 1e-3)])
def test_one_position_that_is_wrong_fails_where_the_mean_of_all_does_not(compute: str, most: float) -> None:
    expected = logits(3, rows=1000)
    got = expected.clone()
    got[700] += 0.2 * logits(4, rows=1000)[700]
    report = check_parity(
        expected=expected,
        got=got,
        structure=None,
        floor=Floor(mean_kl_nats=1e-3, worst_kl_nats=1e-5),
        artifact=artifact_of("int4", compute=compute),
        runtime="none",
    )
    assert report.verdict is Verdict.FAILED
    assert re.fullmatch(f"KL at the worst position is 0.0[0-9]+ nats, at most {most} was expected", report.reason)


def test_a_choice_that_was_clear_and_is_lost_fails_where_the_target_computes_in_fp16() -> None:
    expected = torch.full((40, 200), -30.0)
    expected[:, 0], expected[:, 1] = 10.0, 9.98  # two spacings of fp16 are 0.0156
    got = expected.clone()
    got[0, 1] = 10.001
    report = check_parity(
        expected=expected,
        got=got,
        structure=None,
        floor=FLOOR,
        artifact=artifact_of("int4", compute="fp16"),
        runtime="none",
    )
    assert report.verdict is Verdict.FAILED
    assert report.reason.startswith("top-1 agreement where the reference is decided is 97.50%")


def test_golden_kl_is_that_of_the_kept_tokens_and_one_bin_for_all_others() -> None:
    expected = logits(0)
    got = expected + 0.5 * logits(1)

    def binned(scores: torch.Tensor) -> torch.Tensor:
        probabilities = torch.softmax(scores.double(), dim=1).gather(1, expected.topk(64, dim=1).indices)
        return torch.cat([probabilities, 1 - probabilities.sum(dim=1, keepdim=True)], dim=1).log()

    direct = kl_divergence(binned(expected), binned(got)).mean().item()
    assert GoldenLogits.of(expected).figures(got)["mean_kl_nats"] == pytest.approx(direct, rel=1e-5)


def test_gates_follow_the_floor_unless_the_target_computes_in_fp16() -> None:
    def arithmetic(compute: str, cache: str = "fp32") -> Arithmetic:
        return Arithmetic(activations=Activations.FLOAT, compute_dtype=compute, kv_dtype=cache)

    floor = Floor(mean_kl_nats=2e-6, worst_kl_nats=5e-6)
    assert gate(arithmetic("fp32"), floor=floor, decided=400) == Gate(
        mean_kl_nats=pytest.approx(2e-5), worst_kl_nats=pytest.approx(5e-5), decided_top1_agreement=0.0
    )
    half = Gate(mean_kl_nats=1e-4, worst_kl_nats=1e-3, decided_top1_agreement=0.995)
    assert gate(arithmetic("fp16"), floor=floor, decided=400) == half
    assert gate(arithmetic("fp32", "fp16"), floor=floor, decided=400) == half
    high = Floor(mean_kl_nats=2e-4, worst_kl_nats=5e-2)
    assert gate(arithmetic("fp16"), floor=high, decided=400) == half
    assert gate(arithmetic("fp16"), floor=floor, decided=400, routed=True) == half
    routed = gate(arithmetic("fp16"), floor=high, decided=400, routed=True)
    assert (routed.mean_kl_nats, routed.worst_kl_nats) == (pytest.approx(2e-3), pytest.approx(0.5))


@pytest.mark.parametrize(("decided", "missed"), [(40, 0), (99, 0), (100, 1), (191, 1), (299, 1), (400, 2)])
def test_half_a_percent_of_the_positions_is_taken_to_the_nearest_one(decided: int, missed: int) -> None:
    arithmetic = Arithmetic(activations=Activations.FLOAT, compute_dtype="fp16", kv_dtype="fp16")
    floor = Floor(mean_kl_nats=0.0, worst_kl_nats=0.0)
    least = gate(arithmetic, floor=floor, decided=decided).decided_top1_agreement
    agreement = torch.ones(decided, dtype=torch.float64)
    agreement[:missed] = 0
    assert agreement.mean().item() >= least
    agreement[missed] = 0
    assert not agreement.mean().item() >= least


def test_top1_counts_a_near_tie_that_fp16_cannot_tell_as_undecided() -> None:
    """At 10 the spacing of fp16 is 2**-7: a margin of 0.01 is undecided, one of 0.02 is decided."""
    expected = torch.tensor([[10.0, 9.99, 0.0], [10.0, 9.98, 0.0], [10.0, 5.0, 0.0]])
    flipped = torch.tensor([[9.99, 10.0, 0.0], [9.98, 10.0, 0.0], [10.0, 5.0, 0.0]])
    figures = GoldenLogits.of(expected).figures(flipped)
    assert figures["decided_positions"] == 2
    assert figures["decided_top1_agreement"] == 0.5
    assert figures["top1_agreement"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("context", [16, 64, 128, 300, 2048])
def test_a_drive_fits_its_context_and_prefills_twice_and_decodes(context: int) -> None:
    steps = drive_for(list(range(5000)), context=context)
    first, second = steps.prefills
    assert len(steps.ids) == min(context, 305)
    assert len(steps.positions) == len(steps.ids) - first - second + 2
    assert steps.positions[-1] == len(steps.ids) - 1
    assert first + second < len(steps.ids)


def test_goldens_of_a_usual_context_hold_at_least_64_positions() -> None:
    assert len(drive_for(list(range(5000)), context=512).positions) >= 64
    assert isinstance(drive_for([1, 2, 3, 4], context=4), Drive)


def test_evaluation_windows_begin_with_the_begin_token_once() -> None:
    windows = evaluation_windows([1, *range(10, 1000)], bos=1, context=64)
    assert all(window[0] == 1 and window.count(1) == 1 and len(window) == 64 for window in windows)
    assert len({token for window in windows for token in window[1:]}) == 63 * len(windows)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([1e-6, 1.0, 1e4]))
def test_rounded_activations_are_within_half_a_step(seed: int, spread: float) -> None:
    x = spread * logits(seed, columns=256)
    per_token = round_activations(x, Activations.INT8_PER_TOKEN, group_size=32)
    span = x.amax(dim=1).clamp(min=0) - x.amin(dim=1).clamp(max=0)
    assert ((x - per_token).abs().amax(dim=1) <= span / 255 * 1.001).all()
    per_block = round_activations(x, Activations.INT8_PER_BLOCK, group_size=32)
    steps = x.view(5, 8, 32).abs().amax(dim=2) / 127
    assert ((x - per_block).abs().view(5, 8, 32).amax(dim=2) <= steps * 0.501).all()
    assert round_activations(x, Activations.FLOAT, group_size=32) is x


def test_rounding_activations_of_zeros_gives_zeros() -> None:
    for scheme in set(Activations) - {Activations.STATIC_UINT16}:  # whose steps come from elsewhere: test_static.py
        assert not round_activations(torch.zeros(2, 64), scheme, group_size=32).any()


@pytest.mark.parametrize(
    ("columns", "group_size", "block"), [(256, 32, 32), (256, 256, 128), (704, 704, 64), (96, 96, 32), (48, 48, 16)]
)
def test_activation_blocks_follow_the_groups_or_divide_the_row(columns: int, group_size: int, block: int) -> None:
    assert activation_block(columns=columns, group_size=group_size) == block


def quantized(name: str = "model.layers.0.mlp.up_proj.weight", **changes: Any) -> QuantizedTensor:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    tensor = round_to_nearest(weight, name=name, bits=4, group_size=32)
    return QuantizedTensor(
        **{**{"name": name, "bits": 4, "group_size": 32, "codes": tensor.codes, "scales": tensor.scales}, **changes}
    )


def test_codes_pass_when_equal_and_name_what_differs() -> None:
    tensor = quantized()
    expected = {tensor.name: digest(tensor)}
    assert check_codes([(tensor.name, tensor)], expected=expected, scheme=SCHEME).verdict is Verdict.PASSED

    one_code = tensor.codes.clone()
    one_code[3, 5] ^= 1
    one_scale = tensor.scales.clone()
    one_scale[7, 1] = torch.nextafter(one_scale[7, 1], torch.tensor(10.0))
    for changes in ({"codes": one_code}, {"scales": one_scale}):
        report = check_codes([(tensor.name, quantized(**changes))], expected=expected, scheme=SCHEME)
        assert report.verdict is Verdict.FAILED
        assert tensor.name in report.reason


def test_codes_fail_for_a_missing_an_unknown_and_an_unquantized_weight() -> None:
    tensor = quantized()
    expected = {tensor.name: digest(tensor)}
    missing = check_codes([], expected=expected, scheme=SCHEME)
    unknown = check_codes([(tensor.name, tensor), ("extra", tensor)], expected=expected, scheme=SCHEME)
    dense = check_codes([(tensor.name, tensor.dequantize())], expected=expected, scheme=SCHEME)
    assert [report.verdict for report in (missing, unknown, dense)] == [Verdict.FAILED] * 3
    assert "is missing" in missing.reason
    assert "extra is not a weight" in unknown.reason
    assert "float32" in dense.reason


def test_a_scale_repeated_for_finer_blocks_is_the_same_and_one_of_them_changed_is_not() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(2))
    name = "model.embed_tokens.weight"
    tensor = round_to_nearest(weight, name=name, bits=8, group_size=64)
    expected = {name: digest(tensor)}
    finer = tensor.scales.repeat(1, 4)
    fields = {"name": name, "bits": 8, "group_size": 16, "codes": tensor.codes}
    same = QuantizedTensor(**fields, scales=finer)
    assert check_codes([(name, same)], expected=expected, scheme=SCHEME).verdict is Verdict.PASSED
    finer = finer.clone()
    finer[2, 3] *= 2
    changed = QuantizedTensor(**fields, scales=finer)
    assert check_codes([(name, changed)], expected=expected, scheme=SCHEME).verdict is Verdict.FAILED


class Timed:
    """A runner whose n-th run takes n seconds to read, and n to 2n milliseconds a token."""

    load_s = 0.5
    steps_s: tuple[float, ...] = ()
    run = 0

    def rewind(self, position: int) -> None:
        assert position == 0
        self.run += 1

    def feed(self, ids: list[int]) -> None:
        self.steps_s = (float(self.run),)

    def feed_each(self, ids: list[int]) -> None:
        self.steps_s = tuple(1e-3 * self.run * (1 + index / len(ids)) for index in range(len(ids)))


def test_latency_keeps_each_decoded_token_of_each_counted_run() -> None:
    runner: Any = Timed()
    figures = measure_latency(runner, list(range(40)), context=64, threads=1).figures
    assert (figures["prompt_tokens"], figures["decoded_tokens"], figures["runs"]) == (32, 8, 5)
    steps = figures["decode_steps_ms"]
    assert len(steps) == 5 * 8
    assert (steps[0], steps[8], steps[-1]) == (2.0, 3.0, 11.2)  # the first run does not count
    assert figures["time_to_first_token_ms"] == 4000
