# The only commands a person must know. Each makes what it needs first; `.ci/env` says where that is kept.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
export PYTHON ?= python3
BUDGET ?= 60

env := .ci/env
cargo := $(env) cargo

.DEFAULT_GOAL := help
.PHONY: help setup demo compare compare-auto compare-ranks compare-s3 fleet test test-gpu test-s3 torture check bench bench-gpu profile wheel docs clean native everything fmt

help: ## list these commands
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1|\2/p' Makefile | while IFS='|' read -r name text; do printf '  make %-12s %s\n' "$$name" "$$text"; done

setup: native ## make the Python environment and build the native module, ckpt-tool and the coordinator

demo: native ## train a small GPT, kill it in the middle of a save, resume it, and compare the loss curves; REMOTE=s3://bucket/prefix brings checkpoints there too
	@$(env) python python/examples/demo.py $(if $(REMOTE),--remote $(REMOTE))

compare: native ## measure beside torch.save, safetensors, DCP and torch_checkpointing; ARGS="--quick" for less
	@$(env) python benches/compare/compare.py $(ARGS)

compare-auto: native ## measure compression="auto" on a slowed device (as root)
	@$(env) python benches/compare/auto.py $(ARGS)

compare-ranks: native ## measure saves and restores by several ranks beside DCP and torch.save (ten minutes)
	@$(env) python benches/compare/multi_rank.py $(ARGS)

compare-s3: everything ## measure uploads to S3 and restores beside aws s3 cp and s3torchconnector (four minutes)
	@$(env) python benches/compare/s3.py $(ARGS)

fleet: native ## put the coordinator under the load of 10,000 workers, beside etcd and torch's store (four minutes)
	@$(cargo) build --quiet --locked --release -p dtr-benches --example fleet
	@$(env) python benches/compare/coordinator.py $(ARGS)

test: everything ## run every test
	$(cargo) test --locked --release --workspace
	$(env) pytest tests/python

test-s3: ## run the tests of S3 against Garage, or against the service in DTR_S3_ENDPOINT (builds Garage once, ten minutes)
	@$(env) python tests/s3/garage.py $(ARGS)

test-gpu: native ## try everything on this machine's GPU (a few minutes; says so where there is none)
	@$(env) python tests/gpu/check.py $(ARGS)

torture: native ## try every promise as often as its row says, for BUDGET minutes, going on where the last run ended (best as root)
	@$(env) python tests/torture/torture.py --minutes $(BUDGET) $(ARGS)

check: everything ## formatting, lints, types, documentation and house rules, as CI runs them
	$(cargo) fmt --all --check
	$(cargo) clippy --locked --release --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(cargo) doc --locked --release --workspace --no-deps
	$(cargo) test --locked --release --workspace --test tidy
	$(env) ruff format --check
	$(env) ruff check
	$(env) mypy
	$(env) python -m mypy.stubtest dtruntime._native

bench: ## measure saves, loads and stalls with criterion (six minutes), and write its HTML report
	$(cargo) bench --locked --workspace
	@$(env) bash -c 'echo "$$CARGO_TARGET_DIR/criterion/report/index.html"'

bench-gpu: native ## measure saves and loads on this machine's GPU beside PyTorch's own
	@$(env) python benches/compare/gpu.py $(ARGS)

profile: ## show where the CPU time of a save and of a load goes, span by span
	@$(cargo) run --locked --release -p dtr-benches --example profile

fmt: ## format every source file
	$(cargo) fmt --all
	$(env) ruff format
	$(env) ruff check --fix

wheel: ## build the wheel into dist/, install it into a new environment and import it there
	rm -rf dist
	$(env) maturin build --release --locked --out dist
	@scratch=$$(mktemp -d); trap 'rm -rf "$$scratch"' EXIT; \
	$(PYTHON) -m venv "$$scratch"; \
	"$$scratch/bin/pip" install --quiet --disable-pip-version-check dist/*.whl; \
	cd "$$scratch"; \
	bin/python -c 'import dtruntime; print("imported", dtruntime.__file__)'; \
	bin/ckpt-tool --version
	@ls -l dist

docs: ## build the documentation of every crate
	$(cargo) doc --locked --release --workspace --no-deps
	@$(env) bash -c 'echo "$$CARGO_TARGET_DIR/doc/dtr_engine/index.html"'

clean: ## remove what was built for this clone
	$(env) bash -c 'rm -rf "$$CARGO_TARGET_DIR"'
	rm -rf dist python/dtruntime/_native*.so

# The module is put into the source tree by rename: a Python that has the old one loaded keeps it.
put_module := $(env) bash -c 'cp "$$CARGO_TARGET_DIR/release/lib_native.so" python/dtruntime/.native.new && mv python/dtruntime/.native.new python/dtruntime/_native.abi3.so'

native:
	@$(cargo) build --locked --release -p dtr-python -p ckpt-tool -p coordinator
	@$(put_module)

# What `cargo test` builds, in one go and with the same features of dependencies, so that nothing is built twice. The module
# then holds the simulated device of the engine's tests besides; nothing in it can be told to use that.
everything:
	@$(cargo) build --locked --release --workspace --all-targets
	@$(put_module)
