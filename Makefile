# make demo, make test and make check set up everything they need in .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := out/demo
# Tests of the sample apps want a browser or a compiler of their own: make check-web, check-kotlin, check-swift; those of
# phones' processors an emulator: make check-arm64; those of llama.cpp's quantizer a C++ compiler: make check-gguf.
HERE := not web and not kotlin and not swift and not arm64 and not gguf
# One thread for each of two processes: more of them wait for each other's cores.
TWO := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

.PHONY: setup demo test test-matrix check check-web check-tutorial check-kotlin check-swift check-arm64 check-gguf format
.PHONY: bench bench-quality bench-calibration docs clean

setup: $(VENV)/installed

# torch on its own and first, so that no dependency chooses another build of it.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable ".[dev]"
# For executorch-arm. It asks for numpy below 2.2, and does with ours.
	$(BIN)/pip install --quiet --no-deps tosa-tools==2026.5.0
	touch $@

demo: setup
	$(BIN)/llama-export --target all --out $(DEMO)

test: setup
	$(TWO) -m "not slow and $(HERE)"

# What it has measured fills the table of README.md; where that is another one than it was, it fails.
test-matrix: setup
	mkdir -p out
	status=0; $(TWO) -m "slow and $(HERE)" --junitxml=out/test-matrix.xml || status=$$?; \
	$(BIN)/python -m tests.readme_table out/test-matrix.xml || status=$$?; exit $$status

check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(TWO) -m "not slow and not toolchain and $(HERE)"

# The web sample in headless Chromium, some ten minutes: wants node 20.19 and chromium, and says how to get them.
BUNDLE ?= $(DEMO)/onnxruntime

check-web: setup
	test -e $(BUNDLE)/manifest.json || $(BIN)/llama-export --target onnxruntime --out $(DEMO)
	BUNDLE=$(abspath $(BUNDLE)) $(BIN)/pytest -m web tests/samples/test_web.py

# The commands of docs/tutorial.md, in a clone, an empty home and a new environment; wants what check-web wants.
check-tutorial: setup
	$(BIN)/pytest -m web tests/samples/test_tutorial.py

# The Android sample's library: a JDK of 17 or later, and a download of 80 MB on the first run, which holds the compiler.
# LLAMA_BUNDLE=folder tests a bundle that is there, in place of two of the sample model.
check-kotlin: export KOTLIN_CACHE := $(CURDIR)/.cache/kotlin
check-kotlin: setup
	$(BIN)/pytest -m kotlin tests/samples/test_kotlin.py

# The sample for iOS: its package tested, its self-test on a real artifact, its app against stubs. LLAMA_BUNDLE names an
# ONNX bundle to be used in place of a new one. Without a swift on the PATH: root and debootstrap, 3 GB in .cache/swift.
check-swift: setup
	samples/ios/check-app.sh
	$(BIN)/pytest -m swift tests/samples/test_swift.py

# The aarch64 runtimes on a bundle's goldens, under qemu as Cortex-A53, A76 and A710: x86-64 Debian (elsewhere
# DEBIAN_MIRROR=URL), no root; 620 MB in .cache/arm64, and 1.5 GB free while they come. LLAMA_BUNDLE=folder takes a bundle
# that is there, in place of two of the sample model. What one core says is no measure of time.
check-arm64: setup
	$(BIN)/pytest -m arm64 -s tests/arm64

# Every type of llama.cpp's own quantizer, built from the source of llama-cpp-python: cmake and a C++ compiler.
check-gguf: setup
# Before the tests, each of which has a bound of time.
	$(BIN)/python -c "from benchmarks.rivals import llamacpp; llamacpp.build()"
	$(BIN)/pytest -m gguf tests/gguf

# Other tools are quantized with, too: an environment of its own, and a C++ compiler and cmake for llama.cpp.
$(VENV)-bench/installed: pyproject.toml benchmarks/rivals/requirements.txt
	$(PYTHON) -m venv $(VENV)-bench
	$(VENV)-bench/bin/pip install --quiet torch==2.13.0
	$(VENV)-bench/bin/pip install --quiet --editable . --requirement benchmarks/rivals/requirements.txt
	touch $@

# The documents' figures: make bench-quality CALIBRATION=wikitext2-valid.txt EVAL_TEXT=wikitext2-test.txt QUALITY=docs
CALIBRATION ?= samples/tiny-llama/calibration.txt
EVAL_TEXT ?= samples/tiny-llama/evaluation.txt
QUALITY ?= out/quality

bench-quality: $(VENV)-bench/installed
	$(VENV)-bench/bin/python -m benchmarks.quality --calibration $(CALIBRATION) --eval-text $(EVAL_TEXT) --out $(QUALITY)

# Hours for all of it: SIZES=1b takes 40 minutes, and 20 more on the first run, when llama.cpp is built and the peers
# export; PEERS=none leaves them out.
SIZES ?= 1b,3b,8b
PEERS ?= genai,executorch,llamacpp,coreml

bench: $(VENV)-bench/installed
	$(VENV)-bench/bin/python -m benchmarks.bench --sizes $(SIZES) --peers $(PEERS) --out docs

bench-calibration: setup
	$(BIN)/python -m benchmarks.calibration

docs: setup
	$(BIN)/python -m typer exporter.cli utils docs --name llama-export --output docs/options.md

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) $(VENV)-bench out
