"""onnxruntime-genai's model builder."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from benchmarks.peers import arguments, recorded
from benchmarks.rivals.genai import build_model

OPTIONS: dict[str, list[str]] = {
    "ships": [],
    "ours": ["prune_lm_head=true", "algo_config=rtn_last"],  # the head for the last position only, and in int8
}


def settings(scheme: str) -> dict[str, Any]:
    return {"version": f"onnxruntime-genai {version('onnxruntime-genai')}", "options": OPTIONS[scheme]}


def main() -> None:
    args = arguments("genai")
    with recorded(args.out, settings=settings(args.scheme)):
        build_model(args.checkpoint, args.out, precision="int4", options=OPTIONS[args.scheme], cache=args.out / "cache")


if __name__ == "__main__":
    main()
