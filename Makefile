# `make` alone lists what there is.

# Where the server listens: HOST:PORT. Empty: port 9999 on every address.
ADDR =
# A running server to test, as HOST:PORT. Empty: this repository's, one for each transcript.
SERVER =
# Which levels of transcripts: core, telnet, overload, linechat, or several with commas. Empty: all.
LEVEL ?=
# Not empty: time-outs and limits too, which takes minutes.
SLOW ?=
# What the suite's clients are: nc or telnet. Empty: sockets of its own.
VIA ?=
# Only the transcripts with this in their name.
ONLY ?=

help:
	@echo 'make run-server [ADDR=host:port]    run the server, by default on port 9999'
	@echo 'make run-client [SERVER=host:port]  run the client'
	@echo 'make conformance [SERVER=host:port] [LEVEL=core,telnet,overload] [SLOW=1]'
	@echo '                 [VIA=nc|telnet] [ONLY=name]'
	@echo '                                    replay the transcripts against a server'
	@echo 'make test                           every test: units, then the transcripts'
	@echo 'make bench                          how fast, as multiples of the bare kernel calls'
	@echo 'make install [PREFIX=/usr/local]    install both programs; DESTDIR is respected'
	@echo 'make check                          format and lints too, as CI does'

run-server:
	@cargo run --quiet --release --bin linechat-server -- $(ADDR)

run-client:
	@cargo run --quiet --release --bin linechat-client -- $(SERVER)

# The program runs by itself, because cargo would print more after the verdict.
conformance:
	@program=$$(cargo test --quiet --test conformance --no-run \
		--message-format json-render-diagnostics | \
		sed -n 's|.*"executable":"\([^"]*/conformance-[^"/]*\)".*|\1|p') && \
	[ -n "$$program" ] && "$$program" $(if $(SERVER),--server $(SERVER)) $(if $(LEVEL),--level $(LEVEL)) \
		$(if $(SLOW),--slow) $(if $(VIA),--via $(VIA)) $(if $(ONLY),--only $(ONLY))

test:
	cargo test

bench:
	@cargo bench --quiet --bench bench

check:
	cargo fmt --check
	cargo clippy --all-targets -- --deny warnings
	cargo test

# Where `make install` puts the programs; DESTDIR goes before it.
PREFIX = /usr/local

# If the programs are newer than their files, no cargo is needed, which root may not have.
install: target/release/linechat-server target/release/linechat-client
	install -d '$(DESTDIR)$(PREFIX)/bin'
	install -m 755 $^ '$(DESTDIR)$(PREFIX)/bin'
	@echo 'README.md has a systemd unit, which goes to /etc/systemd/system/linechat.service'

target/release/linechat-%: %.rs Cargo.toml
	cargo build --release --target-dir target --bin linechat-$*
	@touch $@

.PHONY: help run-server run-client install conformance test bench check
