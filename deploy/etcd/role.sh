#!/bin/sh
# A user of etcd that may touch flannel's keys and nothing else. Run with etcdctl's flags for root in ETCDCTL_*.
set -eu
etcdctl role add flannel
etcdctl role grant-permission flannel --prefix=true readwrite "${1:-/coreos.com/network}/"
etcdctl user add "flannel:${FLANNEL_PASSWORD:?set FLANNEL_PASSWORD}"
etcdctl user grant-role flannel flannel
