# `make demo` and `make test` are all a newcomer needs; both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# One thread per test worker: more only fight over the same cores.
TEST_ENV := OMP_NUM_THREADS=1

BENCH_OUT := runs/bench

.PHONY: demo test test-slow test-gpu lint format bench bench-gpu clean
.DEFAULT_GOAL := demo

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"Stiefel needs Python 3.11 to 3.13, this is {v[0]}.{v[1]}; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/stiefel run recipes/digits.yaml $(DEMO_OPTIONS)

test: $(INSTALLED)
	$(TEST_ENV) $(BIN)/python -m pytest -q -n 2 $(TEST_OPTIONS)

test-slow: $(INSTALLED)
	$(TEST_ENV) $(BIN)/python -m pytest -q -n 2 -m 'slow and not gpu' $(TEST_OPTIONS)

test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -q -n 4 -m gpu $(TEST_OPTIONS)

# Every study at small scale. With CIFAR=DIR (train/<class>, test/<class>) those that train, and with
# STIEFEL_DATA=DIR (the published ResNets) those that convert.
bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.training_cost --networks smallconv,vgg13,resnet32,mobilenetv1 --out $(BENCH_OUT)/training-cost.json
	$(BIN)/python -m benchmarks.conversion_speed --scale small --out $(BENCH_OUT)/conversion-speed.json
	$(BIN)/python -m benchmarks.inference --scale small --out $(BENCH_OUT)/inference.json
ifdef CIFAR
	$(BIN)/python -m benchmarks.training --scale small --data imagefolder:$(CIFAR) --out $(BENCH_OUT)/training.json
	$(BIN)/python -m benchmarks.training --study ablation --scale small --seeds 1 --data imagefolder:$(CIFAR) --out $(BENCH_OUT)/ablation.json
ifdef STIEFEL_DATA
	$(BIN)/python -m benchmarks.conversion_accuracy --scale small --cifar $(CIFAR) --out $(BENCH_OUT)/conversion-accuracy.json
	$(BIN)/python -m benchmarks.finetuning --network resnet32 --images 4000 --epochs 1 --cifar $(CIFAR) --out $(BENCH_OUT)/finetuning.json
endif
endif

# What needs CUDA, each study whole; training with CIFAR=DIR, for hours.
bench-gpu: $(INSTALLED)
	$(BIN)/python -m benchmarks.step_profile --device cuda --precision bf16 --out $(BENCH_OUT)/step-profile-cuda.json
	$(BIN)/python -m benchmarks.training_cost --device cuda --precision bf16 --out $(BENCH_OUT)/training-cost-cuda.json
	$(BIN)/python -m benchmarks.inference --devices cuda --out $(BENCH_OUT)/inference-cuda.json
ifdef CIFAR
	$(BIN)/python -m benchmarks.training --scale full --device cuda --precision bf16 --jobs 6 --data imagefolder:$(CIFAR) --out $(BENCH_OUT)/training-full.json
endif

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
