#!/vm/busybox sh
# Process 1 on its real root: what a distribution sets up, then the command, then the end. busybox comes from memory: less to
# fetch from the host.
exec </dev/null
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 TMPDIR=/vm/tmp
B=/vm/busybox
m() { $B mount "$@"; }
m -t devtmpfs dev /dev
$B mkdir -p /dev/pts /dev/shm
m -t devpts devpts /dev/pts
m -t tmpfs shm /dev/shm
m -t proc proc /proc
m -t sysfs sys /sys
m -t tmpfs -o mode=755 run /run
$B mkdir -p /run/lock /run/netns /vm/tmp /lib/modules
m -t cgroup2 cgroup2 /sys/fs/cgroup
# Engines and etcd find an empty disk.
for d in /var/lib/docker /var/lib/containerd /var/lib/etcd /var/lib/cni /var/lib/flannel /mnt; do
    $B mkdir -p $d
    m -t tmpfs disk $d
done
m --bind @MODULES@ /lib/modules
echo '127.0.0.1 localhost vm' > /etc/hosts
$B hostname vm
$B ip link set lo up
# Namespaces made later start with what the first one has.
echo 1 > /proc/sys/net/ipv4/ip_forward
$B stty -F /dev/ttyS1 raw -echo
$B setsid /bin/sh /vm/command >/dev/ttyS1 2>&1
printf 'flannel-vm-exit %d\n' $? >/dev/ttyS1
$B sleep 0.1
$B poweroff -f
