#!/bin/busybox sh
# Process 1 of the virtual machine: mounts the host's root, read-only, under a layer in memory, and goes on there.
B=/bin/busybox
$B mount -t devtmpfs devtmpfs /dev
$B mount -t proc proc /proc
$B mount -t sysfs sysfs /sys
for m in $($B cat /modules/order); do $B insmod /modules/$m.ko; done
$B mkdir -p /lower /up /new
$B mount -t 9p -o trans=virtio,version=9p2000.L,ro,cache=loose,msize=512000 host /lower || $B poweroff -f
$B mount -t tmpfs -o size=80% tmpfs /up
$B mkdir /up/u /up/w
$B mount -t overlay -o lowerdir=/lower,upperdir=/up/u,workdir=/up/w overlay /new
$B mkdir /new/vm
$B cp /root /command $B /new/vm/
exec $B switch_root /new /vm/root
