# Run as process 1 of a new node, in its new namespaces. Turns a view of the machine into a host of its own:
# what a daemon writes goes to a tmpfs that dies with the node, what it reads is the machine's.
# Environment: NODE, KIND (host | plain), BIN_DIR, SHARED_DIR, CGROUPS_V1 (dir:options ...), CGROUP_V2 (dir),
# IP_FORWARD, RP_FILTER. Says `ready <pid as the machine counts>` and then waits for its stdin to end.
set -e
read -r pid _ < /proc/self/stat # still the machine's /proc: the pid outside

mount -n -t tmpfs -o mode=755,size=4g tmpfs /mnt
cd /mnt
mkdir -p lock netns docker/plugins lab/bin lab/shared lab/tmp lab/cgroup lab/etc/u lab/etc/w lab/opt/u lab/opt/w lab/var/lib lab/var/log
if [ -d "$BIN_DIR" ]; then mount -n --bind "$BIN_DIR" lab/bin; fi
mount -n --bind "$SHARED_DIR" lab/shared
cd /
# What the machine has mounted below what is hidden here (its /run/netns, its engines' layers) could not be unmounted any more.
awk '$5 ~ "^/(var/lib|run)/" {print $5}' /proc/self/mountinfo | sort -r |
    while read -r mount; do umount -n -l "$mount" 2> /dev/null || true; done
mount -n --move /mnt /run
mount -n -t proc proc /proc
mount -n -t sysfs sysfs /sys

if [ "$KIND" = host ]; then
    mount -n -t overlay overlay -o lowerdir=/etc,upperdir=/run/lab/etc/u,workdir=/run/lab/etc/w /etc
    mount -n -t overlay overlay -o lowerdir=/opt,upperdir=/run/lab/opt/u,workdir=/run/lab/opt/w /opt
    mount -n --bind /run/lab/var/lib /var/lib
    mount -n --bind /run/lab/var/log /var/log
    rm -rf /etc/docker /etc/cni # a shared /etc/docker/key.json would give all engines the same identity
    rm -f /etc/resolv.conf
    mkdir -p /var/lib/docker /var/lib/cni /var/lib/containerd /etc/docker/plugins /etc/cni/net.d /opt/cni/bin
    echo "$NODE" > /etc/hostname
    echo "127.0.0.1 localhost $NODE" > /etc/hosts
    # The router answers no names, so asking it fails at once. An empty list would make engines use one of the internet.
    echo "nameserver 10.77.0.1
options timeout:1 attempts:1" > /etc/resolv.conf
    if [ -n "$CGROUP_V2" ] && [ "$CGROUP_V2" = . ]; then
        mount -n -t cgroup2 cgroup2 /sys/fs/cgroup
    else
        mount -n -t tmpfs -o mode=755 tmpfs /sys/fs/cgroup
        for c in $CGROUPS_V1; do
            mkdir "/sys/fs/cgroup/${c%%:*}"
            mount -n -t cgroup -o "${c#*:}" cgroup "/sys/fs/cgroup/${c%%:*}"
            case "${c%%:*}" in *,*)
                for name in $(echo "${c%%:*}" | tr , ' '); do ln -s "${c%%:*}" "/sys/fs/cgroup/$name"; done ;;
            esac
        done
        if [ -n "$CGROUP_V2" ]; then
            mkdir "/sys/fs/cgroup/$CGROUP_V2"
            mount -n -t cgroup2 cgroup2 "/sys/fs/cgroup/$CGROUP_V2"
        fi
    fi
    mount -n -t tmpfs -o mode=1777 tmpfs /dev/shm
fi

hostname "$NODE"
cd /proc/sys/net
echo "$RP_FILTER" > ipv4/conf/all/rp_filter
echo "$RP_FILTER" > ipv4/conf/default/rp_filter
echo "$IP_FORWARD" > ipv4/ip_forward
if [ -d ipv6 ]; then
    echo 0 > ipv6/conf/all/accept_dad
    echo 0 > ipv6/conf/default/accept_dad
    echo "$IP_FORWARD" > ipv6/conf/all/forwarding
fi
ip link set lo up
cd /

echo "ready $pid"
exec > /dev/null
# An ignored SIGCHLD survives exec: the kernel then reaps orphans by itself. The pipe's other end is held by the test
# process alone, so however that process ends, this one ends, and with process 1 the kernel ends the whole node.
exec env --ignore-signal=CHLD cat
