#!/bin/sh
# A user of etcd that may touch flannel's keys and nothing else. Run with etcdctl's flags for root in ETCDCTL_*.
set -eu
# As flanneld reads --etcd-prefix: slashes at its end do not count.
prefix=$(printf '%s' "${1:-/coreos.com/network}" | sed 's:/*$::')
etcdctl role add flannel
etcdctl role grant-permission flannel --prefix=true readwrite "$prefix/"
etcdctl user add "flannel:${FLANNEL_PASSWORD:?set FLANNEL_PASSWORD}"
etcdctl user grant-role flannel flannel
