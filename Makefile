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
WITH_QEMU_10 := --test background --test restore
KEEP ?=

.PHONY: demo test check bench build guest deps

demo: deps build guest
	BERTH_BIN=$(TARGET)/release/berth BERTH_DEMO_KEEP=$(KEEP) cargo xtask demo

# What runs tests; nextest, where it is installed, stops those that hang.
RUN_TESTS = if cargo nextest --version > /dev/null 2>&1; then cargo nextest run --workspace $(1); else cargo test --workspace $(1); fi

# Binaries and tests are built together first, so that both are built from the same dependencies, once. What goes by QEMU's
# release is tested with QEMU 10 as well, if there is one for this system.
test: deps guest
	cargo build --workspace --all-targets
	$(call RUN_TESTS)
	newer="$$(cargo xtask qemu)" || exit 1; if [ -n "$$newer" ]; then \
		export BERTH_QEMU="$$newer" BERTH_MACHINE_TYPE=pc-q35-10.0; $(call RUN_TESTS,$(WITH_QEMU_10)); fi

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
