# The plugin's root file system: one static binary. `make plugin` builds the same without Docker; this is for machines that
# have Docker and a registry but no Rust.
#
#   docker build -t flannel-docker-plugin-rootfs .
#   id=$(docker create flannel-docker-plugin-rootfs /flannel-docker-plugin)
#   mkdir -p build/plugin/rootfs && docker export "$id" | tar -x -C build/plugin/rootfs && docker rm "$id"
#   cp config.json build/plugin/ && docker plugin create flannel:latest build/plugin

FROM rust:1.95-slim-bookworm AS build
# protoc: etcd's client is generated from its protocol definition.
RUN apt-get update && apt-get install -y --no-install-recommends protobuf-compiler && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
# An explicit --target keeps +crt-static away from build scripts and procedural macros.
RUN target="$(uname -m)-unknown-linux-gnu" \
    && RUSTFLAGS="-C target-feature=+crt-static" cargo build --locked --release --target "$target" -p flannel-docker-plugin \
    && cp "target/$target/release/flannel-docker-plugin" /flannel-docker-plugin

FROM scratch
COPY --from=build /flannel-docker-plugin /flannel-docker-plugin
ENTRYPOINT ["/flannel-docker-plugin"]
