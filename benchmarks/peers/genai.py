"""onnxruntime-genai's model builder."""

from __future__ import annotations

from importlib.metadata import version

from benchmarks.peers import arguments, recorded
from benchmarks.rivals.genai import build_model

OPTIONS = {
    "ships": [],
    "ours": ["prune_lm_head=true", "algo_config=rtn_last"],  # the head for the last position only, and in int8
}


def main() -> None:
    args = arguments("genai")
    options = OPTIONS[args.scheme]
    with recorded(args.out, version=f"onnxruntime-genai {version('onnxruntime-genai')}", options=options):
        build_model(args.checkpoint, args.out, precision="int4", options=options, cache=args.out / "cache")


if __name__ == "__main__":
    main()
