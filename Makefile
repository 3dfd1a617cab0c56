# Builds redis-server with slot migration: fetches upstream, assembles it with
# our patches and files in build/redis, and lets upstream's own Makefile build
# it there. Upstream's variables pass through: BUILD_TLS, MALLOC, SANITIZER,
# PREFIX, CFLAGS and the rest. Ours:
#
#   BUILD=DIR        the build directory; another one is a wholly separate build
#   UPSTREAM=FILE    use this orig tarball of upstream's instead of asking apt
#   ONLY=VERSION     accept this upstream version alone
#   SUITE=SUITE      of make deb and make test-deb: in a chroot of that suite
#   FORCE=1          give up edits of the assembled tree that stand in the way
#   PYTHON=PROGRAM   let upstream's Makefile regenerate commands.def and the like
#
# The work is done by the scripts in deps/redis, each of which says at its head
# what it does; this file only says what depends on what.

BUILD = build
CACHE = $(BUILD)
UPSTREAM =
ONLY =
SUITE =
FORCE =

tree = $(BUILD)/redis
fetched = $(BUILD)/state/fetched
programs = redis-server redis-sentinel redis-cli redis-benchmark redis-check-rdb redis-check-aof

# Ours are not for upstream's Makefiles to see. Without python they take the
# generated files as they are, which is what a user's machine should do.
MAKEOVERRIDES := $(filter-out BUILD=% CACHE=% UPSTREAM=% ONLY=% SUITE=% FORCE=%,$(MAKEOVERRIDES))
python := $(if $(filter command line,$(origin PYTHON)),$(PYTHON))
upstream_make = $(MAKE) --no-print-directory -C $(tree)/src PYTHON='$(python)'

.PHONY: all
all: assemble settings ## build the programs, in build/redis/src (the default)
	+@$(upstream_make) all

.PHONY: $(programs)
$(programs): assemble settings ## (or one of them alone)
	+@$(upstream_make) $@

.PHONY: install
install: assemble settings ## install them under PREFIX, as upstream's install does
	+@$(upstream_make) install

# Upstream remembers CFLAGS of the last build and lets them win over SANITIZER;
# so another SANITIZER than last time begins with a clean slate.
.PHONY: settings
settings: assemble
ifneq ($(origin SANITIZER),undefined)
	@if [ "$$(cat $(BUILD)/state/sanitizer 2>/dev/null)" != '$(SANITIZER)' ]; then \
	    $(MAKE) --no-print-directory -C $(tree)/src SANITIZER= distclean >/dev/null && \
	    echo '$(SANITIZER)' >$(BUILD)/state/sanitizer; \
	fi
endif

# With UPSTREAM= or ONLY= the answer may differ from what is there already.
.PHONY: fetch
fetch: ## get upstream's source, or its newest Debian revision if there is one
	@deps/redis/fetch -b '$(BUILD)' -c '$(CACHE)' $(if $(ONLY),-v '$(ONLY)') $(if $(UPSTREAM),-t '$(UPSTREAM)')

$(fetched):
	@deps/redis/fetch -b '$(BUILD)' -c '$(CACHE)'

.PHONY: assemble
assemble: $(if $(UPSTREAM)$(ONLY),fetch,$(fetched)) ## make build/redis of upstream, our patches and our files
	@deps/redis/assemble '$(BUILD)' $(FORCE)

.PHONY: patches
patches: ## regenerate deps/redis/patches from the edits made in build/redis
	@deps/redis/export '$(BUILD)' $(FORCE)

.PHONY: commands
commands: assemble ## regenerate commands.def from the .json files (needs python3)
	cd $(tree)/src && python3 ../utils/generate-command-code.py

# Without LTO and jemalloc: it stands by in tests, it is not measured.
.PHONY: vanilla
vanilla: assemble ## build upstream without our patches in build/vanilla, for the tests
	@[ -e '$(BUILD)/vanilla/src/redis-server' ] && [ '$(BUILD)/vanilla/src/redis-server' -nt '$(BUILD)/state/upstream.id' ] || \
	    { rm -rf '$(BUILD)/vanilla' && cp -a '$(BUILD)/upstream' '$(BUILD)/vanilla' && \
	      $(MAKE) --no-print-directory -C '$(BUILD)/vanilla/src' PYTHON= MALLOC=libc SANITIZER= OPTIMIZATION=-O1 redis-server >/dev/null; }

.PHONY: unpatched
unpatched: assemble ## build upstream without our patches and with our flags in build/unpatched, to measure against
	@[ -e '$(BUILD)/unpatched/src/redis-server' ] && [ '$(BUILD)/unpatched/src/redis-server' -nt '$(BUILD)/state/upstream.id' ] || \
	    { rm -rf '$(BUILD)/unpatched' && cp -a '$(BUILD)/upstream' '$(BUILD)/unpatched' && \
	      $(MAKE) --no-print-directory -C '$(BUILD)/unpatched/src' PYTHON= redis-server >/dev/null; }

# Upstream's BUILD_TLS=module compiles the whole server again; its rule needs no
# more than these two words to make the module for the server that is there.
.PHONY: tls
tls: assemble settings ## build redis-tls.so, TLS for the server in build/redis, with certificates for tests
	+@$(upstream_make) redis-tls.so TLS_CLIENT_LIBS='-lssl -lcrypto' \
	    TLS_MODULE_CFLAGS='$$(FINAL_CFLAGS) -DUSE_OPENSSL=2 -DBUILD_TLS_MODULE=2'
	@cd '$(tree)' && mkdir -p tests/tls && \
	    { [ -s tests/tls/redis.dh ] || openssl genpkey -genparam -algorithm DH -pkeyopt group:ffdhe2048 -out tests/tls/redis.dh 2>/dev/null; } && \
	    utils/gen-test-certs.sh >/dev/null 2>&1 || { echo 'make tls: no certificates were made: is openssl installed?' >&2; exit 1; }

.PHONY: check-upstreams
check-upstreams: ## assemble and compile every upstream version that the lock accepts
	@deps/redis/check-upstreams '$(BUILD)' '$(MAKE)'

.PHONY: dist
dist: assemble ## write the source tarball, which builds anywhere with plain make
	@deps/redis/dist '$(BUILD)'

# In a chroot of another suite nothing is installed here; what it is made from is fetched here.
.PHONY: deb
ifeq ($(SUITE),)
deb: assemble ## build Debian packages, in build/deb (SUITE=trixie: for trixie, in build/deb-trixie)
	@deps/redis/deb '$(BUILD)'
else
deb: $(if $(UPSTREAM)$(ONLY),fetch,$(fetched))
	@utils/check-in-chroot --take '$(BUILD)/state' --take '$(CACHE)/download' --bring '$(BUILD)/deb-$(SUITE)' '$(SUITE)' -- \
	    "utils/install-deps build deb && deps/redis/deb '$(BUILD)' '$(BUILD)/deb-$(SUITE)'"
endif

.PHONY: test-deb
test-deb: ## install the packages over the distribution's in a chroot (SUITE=trixie), and back
	tests/deb $(if $(SUITE),'$(SUITE)',trixie) $(ONLY)

.PHONY: test check test-upstream test-big test-clients demo bench bench-quick
check: ## our tests and the nearest of upstream's
	tests/run --quick
test: ## our tests, upstream's main and cluster suites
	tests/run
test-upstream: ## as test, and upstream's module API and sentinel suites
	tests/run --all
test-big: ## gigabytes, millions of keys, all slots: does any turn of the event loop get long?
	tests/run --big
test-clients: all ## client libraries of npm, Python and C while slots move: does any notice?
	BUILD='$(BUILD)' tests/clients/run
demo: ## a cluster of several nodes that moves slots before your eyes
	utils/demo
bench-quick: ## this server, its classic procedure, Redis 8.6 and Valkey 9.1 side by side, in five minutes
	utils/bench --quick 1
bench: ## the same with gigabytes, all loads and replicas, three rounds: some hours
	utils/bench

.PHONY: clean
clean: ## remove what was compiled; the next make compiles everything
	@if [ -d '$(tree)/src' ]; then $(MAKE) --no-print-directory -C $(tree)/src distclean >/dev/null; fi
	@rm -f '$(BUILD)/state/sanitizer'

.PHONY: clean-tree
clean-tree: ## remove build/redis with all edits made in it
	rm -rf '$(tree)'
	@rm -f '$(BUILD)/state/tree.id' '$(BUILD)/state/tree.sums' '$(BUILD)/state/bodies' '$(BUILD)/state/sanitizer'

.PHONY: distclean
distclean: ## remove the build directory
	rm -rf '$(BUILD)'

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z$$().-]+:.*## / { sub(/^\$$.programs./, "redis-...", $$1); printf "  %-16s %s\n", $$1, $$2 }' Makefile
	@awk '/^# +[A-Z]+=/ { sub(/^# +/, "  "); print }' Makefile
