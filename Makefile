PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/demo
DATA ?= ../shared/data

.PHONY: install demo test bench check clean

install: $(VENV)/installed

# The constraints hold every version, torch's too: an open range may fetch gigabytes of CUDA.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,dev,openvino,serve]'
	touch $@

demo: install
	rm -rf $(RUN)
	$(BIN)/stillroom finetune --model minilm-l6 --dataset builtin/verdicts \
	  --set training.learning_rate=1e-4 --set training.batch_size=16 --set training.epochs=3 -o $(RUN)/teacher
	$(BIN)/stillroom distill recipes/demo.yaml -o $(RUN)
	$(BIN)/stillroom export $(RUN) --format onnx-int8
	$(BIN)/stillroom report $(RUN)

test: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# On an idle machine. peers.py needs textbrewer==0.2.1.post1 and tensorboardX beside what is installed.
bench: install
	mkdir -p runs/bench
	$(BIN)/python benchmarks/padding.py --data-dir $(DATA) > runs/bench/padding.json
	$(BIN)/python benchmarks/utilisation.py --data-dir $(DATA) --work runs/bench > runs/bench/utilisation.json
	$(BIN)/python benchmarks/methods.py --data-dir $(DATA) --rounds 20 --json > runs/bench/methods.json
	$(BIN)/python benchmarks/scaling.py --data-dir $(DATA) --work runs/bench/scaling > runs/bench/scaling.json
	$(BIN)/python benchmarks/peers.py --data-dir $(DATA) --work runs/bench/peers --json > runs/bench/peers.json

clean:
	rm -rf $(VENV) runs dist
