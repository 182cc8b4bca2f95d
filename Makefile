# The commands for people; what they do is done by cargo, `cargo xtask` and scripts/deps.sh.
#
#   make demo            the main job, shown with its figures; KEEP=1 leaves the cluster up
#   make test            all tests
#   make check           the gate: formatting, clippy, house rules, tests, documents
#   make bench           figures, beside the peer's; BENCH=snapshots or permissions picks others
#   make build guest     the release binary and the test guest
#   make deps            the system packages that are missing

TARGET := $(or $(CARGO_TARGET_DIR),$(CURDIR)/target)
BENCH ?= first-light
KEEP ?=

.PHONY: demo test check bench build guest deps

demo: deps build guest
	BERTH_BIN=$(TARGET)/release/berth BERTH_DEMO_KEEP=$(KEEP) cargo xtask demo

# Binaries and tests are built together first, so that both are built from the same dependencies, once.
test: deps guest
	cargo build --workspace --all-targets
	if cargo nextest --version > /dev/null 2>&1; then cargo nextest run --workspace; else cargo test --workspace; fi

check: deps guest
	cargo xtask check

bench: deps build guest
	BERTH_BIN=$(TARGET)/release/berth cargo run --release --quiet --package xtask -- bench $(BENCH)

build:
	cargo build --release --package berth-cli

guest: deps
	cargo xtask guest

deps:
	@scripts/deps.sh
