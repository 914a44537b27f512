# Run inside a host: what a power cut does to it. Disks stay, memory does not: processes, mounts, links, rules, /run.
# The cable stays plugged in; the lab gives eth0 its addresses back afterwards. Environment: IP_FORWARD.
kill -9 -1 # everybody but process 1 and this shell
set -e
boot_id=/run/lab/boot_id
cat /proc/sys/kernel/random/uuid > $boot_id
mountpoint -q /proc/sys/kernel/random/boot_id || mount -n --bind $boot_id /proc/sys/kernel/random/boot_id

# A killed process may still be on its way out: what is busy is tried again, a hundred times.
gone() {
    for _ in $(seq 100); do
        awk '$5 ~ "^/(var/lib|run)/" && $5 !~ "^/run/lab(/|$)" {print $5}' /proc/self/mountinfo | sort -r |
            while read -r mount; do umount -n "$mount" 2> /dev/null || true; done
        awk '$5 ~ "^/(var/lib|run)/" && $5 !~ "^/run/lab(/|$)" {exit 1}' /proc/self/mountinfo && return 0
        sleep 0.05
    done
    echo "still mounted:"; cat /proc/self/mountinfo
    return 1
}
gone
find /run -mindepth 1 -maxdepth 1 ! -name lab -exec rm -rf {} +
mkdir -p /run/lock /run/netns /run/docker/plugins
rm -rf /run/lab/tmp /run/lab/www && mkdir -p /run/lab/tmp

# Deleting one link of a pair deletes the other, and some links cannot be deleted: a list is only good for one try each.
for link in $(ls /sys/class/net); do
    case $link in lo | eth0) ;; *) ip link del "$link" 2> /dev/null || true ;; esac
done
ip link set eth0 down
ip addr flush dev eth0
for family in -4 -6; do
    ip $family route flush table all 2> /dev/null || true
    ip $family rule flush # keeps the one for the local table
    ip $family rule add from all lookup main pref 32766
done
ip -4 rule add from all lookup default pref 32767
ip link set lo down && ip link set lo up # brings its routes back
nft flush ruleset
echo "$IP_FORWARD" > /proc/sys/net/ipv4/ip_forward
[ ! -d /proc/sys/net/ipv6 ] || echo "$IP_FORWARD" > /proc/sys/net/ipv6/conf/all/forwarding
