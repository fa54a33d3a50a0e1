# make demo      builds and installs trine in $(VENV), then runs the main job; results in out/demo
# make test      the same with everything that tests need, then the whole test suite
# make sanitize  every op under the address, undefined-behaviour and thread sanitizers
# make test-arm  every op on Arm's instruction sets, cross-compiled and run under qemu-aarch64
# make lint      formatting and style of Python and C++ (make format mends what can be mended)
# make build     compiles into python/trine, for work on trine itself (use with PYTHONPATH=python)

PYTHON ?= python3
VENV ?= .venv
# So many test files run side by side.
JOBS ?= 2
# Any torch >= 2.11 serves. This one is pinned so that two runs of the demo compare.
TORCH ?= torch==2.13.0

BIN := $(abspath $(VENV))/bin
CXX_FILES = $(shell git ls-files 'benchmarks/*.cpp' 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.cpp' 'tests/*.h' 'tests/*.cu' 'tests/*.cuh')

.PHONY: demo test sanitize test-arm lint format build clean

demo: $(VENV)/.tools
	$(BIN)/pip install --quiet --no-build-isolation '.[demo]'
	$(BIN)/trine demo

test: $(VENV)/.tools
	$(BIN)/pip install --quiet --no-build-isolation '.[all]'
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

sanitize: $(VENV)/.tools
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DTRINE_SANITIZE=ON -DTRINE_CUDA=OFF \
	  -DPython_EXECUTABLE=$(BIN)/python -DCMAKE_MAKE_PROGRAM=$(BIN)/ninja
	$(BIN)/cmake --build build/sanitize --target sanitize_address sanitize_thread
	$(BIN)/ctest --test-dir build/sanitize --output-on-failure -j 2

test-arm: $(VENV)/.tools
	@for tool in aarch64-linux-gnu-g++ qemu-aarch64; do command -v $$tool >/dev/null || { \
	  echo "make test-arm needs $$tool; on Debian: apt-get install g++-aarch64-linux-gnu qemu-user"; \
	  exit 1; }; done
	$(BIN)/pip install --quiet pytest
	$(BIN)/cmake -S tests/arm -B build/arm -G Ninja -DPython_EXECUTABLE=$(BIN)/python \
	  -DCMAKE_MAKE_PROGRAM=$(BIN)/ninja
	$(BIN)/cmake --build build/arm
	$(BIN)/python -m pytest --noconftest tests/arm/check_operators.py

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

build: $(VENV)/.tools
	$(BIN)/cmake -S . -B build/inplace -G Ninja -DPython_EXECUTABLE=$(BIN)/python \
	  -DCMAKE_MAKE_PROGRAM=$(BIN)/ninja -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(CURDIR)/python/trine
	$(BIN)/cmake --build build/inplace

clean:
	rm -rf build out python/trine/*.so

# The build tools, and torch before everything that would otherwise choose one.
$(VENV)/.tools:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet '$(TORCH)' numpy
	$(BIN)/pip install --quiet 'scikit-build-core>=0.10' 'pybind11>=2.13' 'cmake>=3.28' 'ninja>=1.11'
	touch $@

$(VENV)/.lint: $(VENV)/.tools
	$(BIN)/pip install --quiet ruff clang-format
	touch $@
