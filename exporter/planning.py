"""What was asked for, in the words of the command line, a recipe file or a call -> a Plan, or what is wrong with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict, Unpack

import targets
from exporter.checkpoint import read_spec
from exporter.devices import find_device
from exporter.errors import UsageError
from exporter.forecast import fitting_context, is_roomy_for_int8, serving
from exporter.kept import can_keep, kept_scheme, refuse_changes
from exporter.spec import (
    EMBEDDING,
    GROUP_SIZES,
    HEAD,
    PER_ROW,
    ROUTER,
    Logits,
    Method,
    ModelSpec,
    Plan,
    Precision,
    Prefer,
    Recipe,
    Rule,
    Sampling,
    WeightScheme,
)
from exporter.systems import System, oldest_system, parse_system, too_old

DEFAULT_CONTEXT = 2048
DEFAULT_WINDOW_LENGTH = 512
DEFAULT_THREADS = 2
DEFAULT_OUT = Path("llama-export-out")
NO_CALIBRATION = "none"


class Choices(TypedDict, total=False):
    """What one may ask of an export; what is left out is decided here. Each is an option of the command line, which
    tells more of it, and a key of a recipe file (with hyphens)."""

    target: str
    """Names with commas between, or all; a name may have a backend behind it, as ``executorch-portable``."""
    backend: str
    """Names with commas between: each holds for those of the targets that have it."""
    device: str
    """A slug of ``targets/devices.toml``: decides whatever of target, precision and context is left out."""
    os: str
    """The oldest system that the app runs on, as ``ios18``: what that one does not know is refused."""
    precision: str
    prefer: str
    head: str
    head_tokens: list[int]
    """The only tokens that the head keeps rows of; on the command line a JSON file that has them."""
    group_size: str
    rule: list[str]
    budget_mb: float
    max_kl: float
    context: int
    kv_cache: str
    images: bool
    """What looks at images is exported too."""
    requantize: bool
    """Codes that the checkpoint has are decoded and chosen anew."""
    logits: str
    calibration: str
    calibration_column: str
    method: str
    windows: int
    window_length: int
    seed: int
    act_order: bool
    damping: float
    eval_text: str
    threads: int


def plan(
    checkpoint: Path | str,
    *,
    adapter: Path | str | None = None,
    out: Path | str = DEFAULT_OUT,
    store: Path | str | None = None,
    **choices: Unpack[Choices],
) -> Plan:
    """A run as asked for, with all defaults filled in. Reads the checkpoint's config and no weight; of a quantized one
    the headers of its weights, too.

    ``adapter``: a folder of PEFT to be merged in; ``out``: folder for the bundles; ``store``: where quantized weights
    are kept, by default in the user's cache.
    Raises UsageError for choices that cannot be carried out, InputError for a checkpoint that is none.
    """
    if "target" not in choices and "device" not in choices:
        raise UsageError(
            "no target was named", hint="say --target executorch, onnxruntime, coreml or all; or name a phone: --device"
        )
    images, requantize = choices.get("images", False), choices.get("requantize", False)
    head_tokens = tuple(choices.get("head_tokens", ()))
    spec = read_spec(Path(checkpoint), decoded=requantize, images=images, head_tokens=head_tokens)
    kept = kept_scheme(Path(checkpoint), choices, spec)
    settled, _ = settle(choices, spec, kept=kept)
    labels = _targets(settled["target"], backends=settled.get("backend"))
    if kept and can_keep(kept, labels):
        refuse_changes(Path(checkpoint), kept, settled, adapter=Path(adapter) if adapter else None)
        choices = settled
    else:
        kept, (choices, _) = None, settle(choices, spec)
    system = _system(choices)
    corpus, method = choices.get("calibration"), choices.get("method")
    _refuse_two_budgets(choices, calibrated=corpus != NO_CALIBRATION and method != "rtn")
    prefer = _prefer(choices)
    scheme = kept or _weights_asked(choices, body=_body(choices.get("precision"), prefer=prefer), spec=spec)
    if prefer is Prefer.DECODE:
        scheme = _widened(scheme, asked=choices.get("group_size"), spec=spec)
    sampling = _only(choices, "windows", "window_length", "seed")
    longest = min(DEFAULT_WINDOW_LENGTH, spec.max_position_embeddings)
    budget_mb, text = choices.get("budget_mb"), choices.get("eval_text")
    if system:
        _refuse_system(labels, system, scheme, spec)
    return Plan(
        checkpoint=Path(checkpoint),
        adapter=Path(adapter) if adapter else None,
        targets=labels,
        scheme=scheme,
        requantize=choices.get("requantize", False),
        head_tokens=head_tokens,
        recipe=_recipe(
            scheme,
            corpus=NO_CALIBRATION if kept else corpus,
            method=method,
            sampling=sampling,
            tuning=_only(choices, "act_order", "damping"),
        ),
        corpus=None if corpus == NO_CALIBRATION else corpus,
        corpus_column=choices.get("calibration_column"),
        budget_bytes=None if budget_mb is None else round(budget_mb * 1e6),
        max_kl_nats=choices.get("max_kl"),
        sampling=Sampling(**{"window_length": longest, **sampling}),
        context=choices.get("context") or min(DEFAULT_CONTEXT, spec.max_position_embeddings),
        logits=Logits(_one_of("--logits", choices.get("logits", Logits.LAST), list(Logits))),
        prefer=prefer,
        device=choices.get("device"),
        system=str(system) if system else None,
        kv_cache=_kv_cache(choices.get("kv_cache")),
        images=choices.get("images", False),
        out=Path(out),
        store=Path(store) if store else default_store(),
        evaluation_text=Path(text) if text else None,
        threads=choices.get("threads", DEFAULT_THREADS),
    )


def settle(choices: Choices, spec: ModelSpec, *, kept: WeightScheme | None = None) -> tuple[Choices, tuple[str, ...]]:
    """The choices with all that a named device decides, and why each was decided so. ``kept``: the scheme, where a
    checkpoint's own codes decide it (``exporter.kept``). Raises UsageError for an unknown device, MissingToolError
    where nothing here serves it."""
    if "device" not in choices:
        return choices, ()
    device, reasons = find_device(choices["device"]), []
    system = _system(choices)
    if system and system.kind != device.os:
        raise UsageError(
            f"--os is {system}, but {device.name} runs {device.os}", hint="leave it out, or name another device"
        )
    if "target" not in choices:
        if "backend" in choices:
            raise UsageError("--backend says what runs inside a --target", hint="name one, or leave --backend out")
        label, why = serving(device, system)
        choices = {**choices, "target": label}
        reasons.append(f"--target {label}: {why}")
    label = _targets(choices["target"], backends=choices.get("backend"))[0]
    context = choices.get("context") or min(DEFAULT_CONTEXT, spec.max_position_embeddings)
    int4 = kept or _weights_asked(choices, body=Precision.INT4, spec=spec)
    if not kept and "precision" not in choices and "prefer" not in choices:
        roomy = is_roomy_for_int8(label, spec, int4, device, context=context)
        body = Precision.INT8 if roomy else Precision.INT4
        choices = {**choices, "precision": body.value}
        why = "leaves an app most of its memory" if roomy else "half the memory of int8, half to read for each token"
        reasons.append(f"--precision {body}: {why}")
    if "context" not in choices:
        body = _body(choices.get("precision"), prefer=_prefer(choices))
        scheme = kept or _weights_asked(choices, body=body, spec=spec)
        fitting = fitting_context(label, spec, scheme, device, wanted=context)
        choices = {**choices, "context": fitting}
        why = "the default" if fitting == context else f"{context} would not fit {device.name}"
        reasons.append(f"--context {fitting}: {why}")
    if oldest := oldest_system(label, device.os):
        shipped = f"; {device.name} came with {device.os_shipped}" if device.os_shipped else ""
        reasons.append(f"needs {oldest} or later{shipped}")
    return choices, tuple(reasons)


def _weights_asked(choices: Choices, *, body: Precision, spec: ModelSpec) -> WeightScheme:
    group_size, rules = choices.get("group_size") or "32", choices.get("rule", [])
    return _scheme(body=body, head=choices.get("head"), group_size=group_size, rules=rules, spec=spec)


def choices_of(plan: Plan) -> Choices:
    """The choices that give this plan again, every default among them, but where it reads and writes."""
    asked: dict[str, Any] = {
        "device": plan.device,
        "os": plan.system,
        "kv_cache": plan.kv_cache.value if plan.kv_cache else None,
        "requantize": plan.requantize or None,
        "images": plan.images or None,
        "head_tokens": list(plan.head_tokens) or None,
        "calibration": plan.corpus,
        "calibration_column": plan.corpus_column,
        "budget_mb": plan.budget_bytes / 1e6 if plan.budget_bytes is not None else None,
        "max_kl": plan.max_kl_nats,
        "eval_text": str(plan.evaluation_text) if plan.evaluation_text else None,
    }
    chosen: Any = {
        "target": ",".join(plan.targets),
        "prefer": plan.prefer.value,
        "context": plan.context,
        "logits": plan.logits.value,
        "threads": plan.threads,
        **_weight_choices(plan),
        **{name: value for name, value in asked.items() if value is not None},
    }
    choices: Choices = chosen
    return choices


def _weight_choices(plan: Plan) -> dict[str, Any]:
    scheme, recipe = plan.scheme, plan.recipe
    if scheme.kept:
        return {"head": scheme.head.value} if scheme.head.bits and not scheme.kept_kind(HEAD) else {}
    chosen: dict[str, Any] = {"precision": scheme.body.value}
    if scheme.body.bits:
        chosen |= {
            "head": scheme.head.value,
            "group_size": str(scheme.group_size or "row"),
            "method": recipe.method.value,
            "rule": [f"{rule.pattern} = {rule.precision.value}" for rule in scheme.rules],
        }
        if recipe.method.needs_text:
            sampling = plan.sampling
            chosen |= {"windows": sampling.windows, "window_length": sampling.window_length, "seed": sampling.seed}
        else:
            chosen["calibration"] = NO_CALIBRATION
        if recipe.method.compensates:
            chosen |= {"act_order": recipe.act_order, "damping": recipe.damping}
    return chosen


def default_store() -> Path:
    import platformdirs

    return platformdirs.user_cache_path("llama-export")


def _targets(words: str, *, backends: str | None) -> tuple[str, ...]:
    """The labels that ``--target`` and ``--backend`` stand for."""
    named = _words(words)
    if "all" in named:
        named = tuple(dict.fromkeys((*targets.COMPILED, *(name for name in named if name != "all"))))
    pairs = {name: targets.split(name) for name in named}
    asked = _words(backends) if backends else ()
    known = {backend for target, _ in pairs.values() for backend in targets.BACKENDS[target]}
    for backend in asked:
        if backend not in known:
            raise UsageError(
                f"--backend {backend} is none of {', '.join(named)}; known: {', '.join(sorted(known))}",
                hint="choose one of these, or name its target with --target",
            )
    labels = []
    for name, (target, backend) in pairs.items():
        own = [one for one in asked if one in targets.BACKENDS[target] and name == target]
        labels += [targets.label(target, one) for one in own or [backend]]
    return tuple(dict.fromkeys(labels))


def _words(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word.strip() for word in text.split(",")))


def _system(choices: Choices) -> System | None:
    return parse_system(choices["os"]) if "os" in choices else None


def _refuse_system(labels: Sequence[str], system: System, scheme: WeightScheme, spec: ModelSpec) -> None:
    """Raises UsageError for a label whose bundle does not run on ``system``, naming those that do."""
    stored = {scheme.precision(name) for name, shape in spec.weights().items() if len(shape) == 2}
    for label in labels:
        if why := too_old(label, system, stored):
            others = [name for name in targets.NAMES if too_old(name, system) is None]
            raise UsageError(
                f"target {label} does not run on --os {system}, {why}",
                hint=f"take --target {' or '.join(others)}, or a newer --os",
            )


def _prefer(choices: Choices) -> Prefer:
    return Prefer(_one_of("--prefer", choices.get("prefer", Prefer.QUALITY), list(Prefer)))


def _body(precision: str | None, *, prefer: Prefer) -> Precision:
    """The precision of the body, by what was asked for."""
    if precision is None:
        return Precision.INT8 if prefer is Prefer.PREFILL else Precision.INT4
    body = Precision(_one_of("--precision", precision, [kind.value for kind in Precision]))
    if prefer is Prefer.PREFILL and body is not Precision.INT8:
        raise UsageError(
            f"--prefer prefill multiplies int8 by int8, --precision is {body}",
            hint="leave --precision out, which then means int8, or leave --prefer out",
        )
    if prefer is Prefer.DECODE and body is not Precision.INT4:
        raise UsageError(
            f"--prefer decode widens the groups of int4, --precision is {body}", hint="leave one of them out"
        )
    return body


def _kv_cache(precision: str | None) -> Precision | None:
    return None if precision is None else Precision(_one_of("--kv-cache", precision, [Precision.INT8.value]))


def _widened(scheme: WeightScheme, *, asked: str | None, spec: ModelSpec) -> WeightScheme:
    """The scheme in the widest int4 groups that divide every row; ``asked`` is what ``--group-size`` said."""
    if asked == "row":
        return scheme
    shapes = spec.weights().items()
    rows = {shape[1] for name, shape in shapes if len(shape) == 2 and scheme.precision(name) is Precision.INT4}
    wide = [size for size in GROUP_SIZES[1:] if all(columns % size == 0 for columns in rows)]
    if not wide:
        raise UsageError(
            f"--prefer decode wants int4 groups of {' or '.join(map(str, GROUP_SIZES[1:]))}, "
            f"rows of {', '.join(map(str, sorted(rows)))} columns have none in common",
            hint="leave it out, or take --group-size row",
        )
    if asked and scheme.group_size < max(wide):
        raise UsageError(
            f"--prefer decode takes int4 groups of {max(wide)}, --group-size is {asked}", hint="leave one of them out"
        )
    return scheme if asked else replace(scheme, group_size=max(wide))


def _scheme(
    *, body: Precision, head: str | None, group_size: str, rules: Sequence[str], spec: ModelSpec
) -> WeightScheme:
    sizes = {**{str(size): size for size in GROUP_SIZES}, "row": PER_ROW}
    if group_size not in sizes:
        raise UsageError(
            f"--group-size {group_size} is unknown; known: {', '.join(sizes)}",
            hint="32 loses least, row is smallest",
        )
    ends = Precision.INT8 if body.bits else body
    if (head or rules) and not body.bits:
        option = f"--head {head}" if head else f"--rule {rules[0]!r}"
        raise UsageError(f"{option} goes with int8 and int4, not with --precision {body}", hint="leave it out")
    chosen = Precision(_one_of("--head", head, ["int8", "int4"])) if head else ends
    return WeightScheme(
        body=body,
        embedding=chosen if spec.tie_word_embeddings or spec.head_tokens else ends,
        head=chosen,
        group_size=sizes[group_size],
        rules=tuple(_rule(rule, spec=spec) for rule in rules),
    )


def _rule(words: str, *, spec: ModelSpec) -> Rule:
    pattern, equals, precision = (part.strip() for part in words.partition("="))
    if not (pattern and equals and precision):
        raise UsageError(
            f"--rule {words!r} is not of the form 'pattern = precision'",
            hint="for instance --rule 'layers.0.mlp.down_proj = int8'",
        )
    rule = Rule(pattern=pattern, precision=Precision(_one_of("--rule ... =", precision, ["int8", "int4"])))
    matrices = [name for name, shape in spec.weights().items() if len(shape) == 2 and name not in (EMBEDDING, HEAD)]
    matrices = [name for name in matrices if not name.endswith(ROUTER)]
    if not any(rule.matches(name) for name in matrices):
        names = [name.removeprefix("model.").removesuffix(".weight") for name in matrices]
        raise UsageError(
            f"--rule {words!r} matches no matrix of the {len(names)} between embedding and head",
            hint=f"they are called {names[0]} to {names[-1]}; --head sets head and tied embedding",
        )
    return rule


def _recipe(
    scheme: WeightScheme,
    *,
    corpus: str | None,
    method: str | None,
    sampling: dict[str, int],
    tuning: dict[str, Any],
) -> Recipe:
    """How codes are chosen, by what was asked for; whatever could have no effect is refused."""
    chosen = Method(_one_of("--method", method, list(Method))) if method else None
    given = {
        "--calibration": None if corpus == NO_CALIBRATION else corpus,
        "--method": method,
        **_options(sampling),
        **_options(tuning),
    }
    asked = [option for option, value in given.items() if value is not None]
    if not scheme.body.bits:
        if asked:
            raise UsageError(
                f"{asked[0]} goes with int8 and int4, not with --precision {scheme.body}", hint="leave it out"
            )
        return Recipe(method=Method.ROUND)
    if corpus == NO_CALIBRATION:
        chosen = chosen or Method.ROUND
    chosen = chosen or Method.AWQ_GPTQ
    if corpus == NO_CALIBRATION and chosen.needs_text:
        raise UsageError(f"--method {chosen} needs text, --calibration is none", hint="leave one of them out")
    idle = [*(["--calibration"] if corpus != NO_CALIBRATION else []), *_options(sampling)]
    idle = [option for option in idle if option in asked]
    if not chosen.needs_text and idle:
        raise UsageError(f"{idle[0]} names text, which --method {chosen} does not use", hint="leave one of them out")
    if tuning and not chosen.compensates:
        raise UsageError(
            f"{next(iter(_options(tuning)))} is an option of GPTQ, --method {chosen} has none",
            hint="leave it out, or take --method gptq or awq-gptq",
        )
    if chosen is Method.SMOOTH and scheme.body is not Precision.INT8:
        raise UsageError(
            f"--method {chosen} makes room for int8 activations in int8 weights, not in {scheme.body}",
            hint="take --precision int8, or another method",
        )
    return Recipe(method=chosen, **tuning)


def _refuse_two_budgets(choices: Choices, *, calibrated: bool) -> None:
    given = _options(_only(choices, "budget_mb", "max_kl"))
    for option, value in given.items():
        if not value:
            raise UsageError(f"{option} is {value:g}, a number above 0 was expected", hint="leave it out, or raise it")
    if len(given) == 2:
        raise UsageError("--budget-mb and --max-kl pull two ways", hint="leave one of them out")
    if given and not calibrated:
        raise UsageError(
            f"{next(iter(given))} is met by what is measured on text, and nothing is to be calibrated",
            hint="leave it out, or take another --method or --calibration",
        )


def _only(choices: Choices, *names: str) -> dict[str, Any]:
    return {name: value for name, value in choices.items() if name in names and value is not None}


def _options(values: dict[str, Any]) -> dict[str, Any]:
    return {f"--{name.replace('_', '-')}": value for name, value in values.items()}


def _one_of(option: str, value: str, known: list[str]) -> str:
    if value not in known:
        raise UsageError(f"{option} {value} is unknown; known: {', '.join(known)}", hint=f"choose one with {option}")
    return value
