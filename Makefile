# Everything works on a fresh clone with nothing but Python 3.11 and pip.
PYTHON ?= python3.11
VENV := .venv
export TF_CPP_MIN_LOG_LEVEL ?= 3
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/installed

.PHONY: demo test test-full bench bench-accuracy clean

demo: $(INSTALLED)
	$(RUN) recipes/digits.py --out=model.tflite

test: $(INSTALLED)
	$(RUN) -m pytest -n 2 -m "not full"

test-full: $(INSTALLED)
	$(RUN) -m pytest -n 2

bench: $(INSTALLED)
	$(RUN) benchmarks/step_overhead.py
	$(RUN) benchmarks/export_time.py
	$(RUN) benchmarks/op_parity.py
	$(RUN) benchmarks/op_counts.py
	$(RUN) benchmarks/chain.py
	$(RUN) benchmarks/callbacks_overhead.py
	$(RUN) benchmarks/int8_evaluation.py

bench-accuracy: $(INSTALLED)  # make bench-accuracy DATA=folder, with fashion_mnist.npz, fsdd.npz and har.npz
	$(RUN) benchmarks/architectures.py --data_dir=$(DATA)
	$(RUN) benchmarks/pruning_accuracy.py --data_dir=$(DATA)
	$(RUN) benchmarks/clipping_ablation.py --data_dir=$(DATA)

$(INSTALLED): setup.cfg pyproject.toml
	command -v $(PYTHON) >/dev/null && $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --editable ".[dev,micro]"
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) build *.egg-info model.tflite
