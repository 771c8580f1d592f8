# The two commands of the README are `make demo` and `make test`; both set up what they need first.

SHELL := /bin/bash
CARGO_TARGET_DIR ?= target
export CARGO_TARGET_DIR
BIN := $(CARGO_TARGET_DIR)/release
TOOLS := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/opencomputer/tools
BUF := $(TOOLS)/python/bin/buf

ROUNDS ?= 100

.PHONY: help demo test test-kvm torture up down bench build build-test build-parts lint setup setup-test clean

help: ## shows this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: build ## sets up, builds, starts everything, uses one sandbox, cleans up
	tools/demo $(BIN)

test: build-test ## sets up, builds, runs every test
	cargo test --release --workspace --locked --no-fail-fast

test-kvm: export OC_VMM = firecracker
test-kvm: export OC_FIRECRACKER ?= $(TOOLS)/firecracker/firecracker
test-kvm: export OC_JAILER ?= $(TOOLS)/firecracker/jailer
test-kvm: build-test ## the tests of sandboxes under Firecracker, on a machine where its guests boot
	OC_GUESTS_BOOT=1 cargo test --release --workspace --locked --test firecracker
	cargo test --release --workspace --locked --test functional

torture: build-test ## the tests of writers that are interrupted, ROUNDS times (100)
	OC_TORTURE_ROUNDS=$(ROUNDS) cargo test --release --workspace --locked --test functional -- writers_lose_nothing

bench: setup-test build ## prints the tables of the README, measured here and now
	@cargo run --quiet --release --locked -p oc-integration --bin oc-bench

up: build ## keeps a mesh running on this machine until Ctrl-C
	$(BIN)/oc up

down: ## ends what `oc up --detach` started
	$(BIN)/oc down

build: setup build-parts ## release binaries in target/release, the guest's static one included
	cargo build --release --locked --workspace --bins
	@# In the place of the one that is optimised as the rest, which is a link to a file of cargo's.
	cargo build --profile edge --locked -p oc-gateway --bin oc-gateway
	@cmp -s $(CARGO_TARGET_DIR)/edge/oc-gateway $(BIN)/oc-gateway \
		|| cp --remove-destination $(CARGO_TARGET_DIR)/edge/oc-gateway $(BIN)/oc-gateway

# The same programs beside the tests, and together with them: those turn features of dependencies on, with which cargo would
# compile all of it once more.
build-test: setup-test build-parts
	cargo build --release --locked --workspace --tests \
		--bin oc --bin oc-scheduler --bin oc-vmm-agent --bin oc-gateway

# What no package is for cargo as it stands: what runs in the guest and in the VMM.
build-parts: setup
	cargo build --release --locked -p oc-preload
	@# Linked statically, under a name of its own: the guest has no libraries when it starts.
	cargo rustc --profile guest --locked -p oc-guest --bin oc-guest -- -C target-feature=+crt-static
	@cmp -s $(CARGO_TARGET_DIR)/guest/oc-guest $(BIN)/oc-init || cp $(CARGO_TARGET_DIR)/guest/oc-guest $(BIN)/oc-init

lint: setup-test ## formatting, contract, lints; fails on any warning
	cargo fmt --all --check
	$(BUF) lint
	$(BUF) format --diff --exit-code --exclude-path proto/google
	tools/buf_breaking $(BUF)
	cargo clippy --release --locked --workspace --all-targets -- -D warnings
	bash -n tools/setup tools/demo tools/protoc tools/buf_breaking vmm-agent/templates/build .ci/run

setup:
	@tools/setup

setup-test:
	@tools/setup --test

clean: ## removes what was built (not what was set up)
	cargo clean
