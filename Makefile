# Every recipe is one or two plain commands, so that everything can be typed by hand where make is missing.

CARGO ?= cargo
TARGET := x86_64-unknown-linux-gnu
MUSL := x86_64-unknown-linux-musl
DIST := target/$(TARGET)/release
PLUGIN ?= flannel:latest
CNI_BIN ?= /opt/cni/bin
CNI_CONF ?= /etc/cni/net.d
# Skips, one line each: nextest keeps to itself what a passing test says.
SKIPS := $(CURDIR)/target/skipped
# nextest runs every test in a process of its own and says which was slow; plain cargo test does without.
NEXTEST := $(shell $(CARGO) nextest --version >/dev/null 2>&1 && echo yes)

.PHONY: help setup build test vm quickstart bench bench-flanneld check dist cni-install rootfs plugin

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

setup: ## install what is missing (Debian packages, nothing is started)
	@tests/setup

build: setup ## debug binaries of everything
	$(CARGO) build --locked --workspace --bins

test: build ## every suite; what this machine lacks is skipped by name
ifeq ($(NEXTEST),yes)
	rm -f $(SKIPS)
	FLANNEL_TESTS_SKIP_LOG=$(SKIPS) $(CARGO) nextest run --locked --workspace --success-output never --no-fail-fast; \
		status=$$?; cat $(SKIPS) 2>/dev/null; exit $$status
	$(CARGO) test --locked --workspace --doc
else
	$(CARGO) test --locked --workspace --no-fail-fast -- --test-threads=2
endif

vm: setup ## the scenes that need Debian's kernel, in an emulated machine: minutes
	tests/setup-vm
	$(CARGO) build --locked --workspace --bins
	FLANNEL_TESTS_LONG=1 $(CARGO) test --locked -p flannel-tests --tests --no-fail-fast on_debians_kernel -- --test-threads=1 --nocapture

quickstart: setup ## two hosts in a lab: networks, containers, a ping across, and everything gone again
	$(CARGO) build --locked -q --workspace --bins
	target/debug/quickstart

bench: dist ## the benchmarks: ratios measured in one run
	$(CARGO) build --locked --release -p flannel-tests --bins
	FLANNEL_BIN_DIR=$(CURDIR)/$(DIST) target/release/bench all

bench-flanneld: setup ## those about flanneld alone, in eight minutes
	RUSTFLAGS="-C target-feature=+crt-static" $(CARGO) build --locked --release --target $(TARGET) -p flannel-core -p flannel-tests --bins
	FLANNEL_BIN_DIR=$(CURDIR)/$(DIST) $(DIST)/bench flanneld

check: ## format, lints, documentation
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --workspace --no-deps -q

# An explicit --target keeps +crt-static away from build scripts and procedural macros.
dist: setup $(DIST)/flannel ## static release binaries in target/x86_64-unknown-linux-gnu/release
	RUSTFLAGS="-C target-feature=+crt-static" $(CARGO) build --locked --release --target $(TARGET) -p flannel-core -p flannel-docker-plugin

# By itself, so that the features which the daemons switch on in flannel-core stay out of it. musl makes it half as large, and
# it starts in half the time (docs/adr/0012); where rustup cannot get that target, glibc does.
.PHONY: $(DIST)/flannel
$(DIST)/flannel:
	rustup target add $(MUSL) || echo "no $(MUSL) here: linking with glibc" >&2
	target=$(TARGET); [ ! -d "$$(rustc --print sysroot)/lib/rustlib/$(MUSL)" ] || target=$(MUSL); \
		RUSTFLAGS="-C target-feature=+crt-static" $(CARGO) build --locked --profile cni --target $$target -p flannel-cni && \
		install -D target/$$target/cni/flannel $@

# Needs nothing of what `setup` installs: this one is for nodes.
cni-install: $(DIST)/flannel ## the CNI plugin, its other names and a network on this machine (CNI_BIN, CNI_CONF)
	$(DIST)/flannel --install --bin-dir $(CNI_BIN) --conf-dir $(CNI_CONF)

rootfs: dist ## config.json and rootfs/ of the managed plugin in build/plugin
	rm -rf build/plugin && mkdir -p build/plugin/rootfs
	cp $(DIST)/flannel-docker-plugin build/plugin/rootfs/ && cp config.json build/plugin/

plugin: rootfs ## create the managed plugin on this machine's Docker engine (PLUGIN=name:tag)
	docker plugin create $(PLUGIN) build/plugin
	@echo "now: docker plugin enable $(PLUGIN)"
