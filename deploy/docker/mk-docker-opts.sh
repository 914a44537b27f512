#!/bin/sh
# Turns flannel's subnet file into options for dockerd, as an environment file.
#
# For a dockerd whose docker0 is flannel's bridge on this host: a unit reads the file (EnvironmentFile=-/run/docker_opts.env)
# and starts `dockerd $DOCKER_OPTS`. Flags and output are those of the script of this name in Go flannel.
set -eu

env_file=/run/flannel/subnet.env
out_file=/run/docker_opts.env
key=DOCKER_OPTS
individual=no
combined=no
masquerade=yes

usage() {
	cat >&2 <<-EOF
	$(basename "$0") [-f FLANNEL-ENV-FILE] [-d DOCKER-ENV-FILE] [-i] [-c] [-m] [-k COMBINED-KEY]

	Makes an environment file for dockerd from the file that flanneld writes.

	  -f  what flanneld wrote        (/run/flannel/subnet.env)
	  -d  where to write             (/run/docker_opts.env)
	  -i  one variable for each option (DOCKER_OPT_BIP, DOCKER_OPT_IPMASQ, DOCKER_OPT_MTU)
	  -c  one variable with all options
	  -k  the name of that variable  (DOCKER_OPTS)
	  -m  leave --ip-masq to dockerd's own default

	Without -i and -c both are written.
	EOF
	exit 1
}

while getopts 'f:d:icmk:h?' flag; do
	case $flag in
	f) env_file=$OPTARG ;;
	d) out_file=$OPTARG ;;
	i) individual=yes ;;
	c) combined=yes ;;
	m) masquerade=no ;;
	k) key=$OPTARG ;;
	*) usage ;;
	esac
done
shift $((OPTIND - 1))
[ $# -eq 0 ] || usage
case $key in
'' | [0-9]* | *[!A-Za-z0-9_]*)
	echo "$key cannot be the name of a variable" >&2
	exit 1
	;;
esac
if [ $individual = no ] && [ $combined = no ]; then
	individual=yes
	combined=yes
fi

# The value of a key of the subnet file, quoted or not; the last one counts. The file is read and not run.
value_of() {
	[ -f "$env_file" ] || return 0
	sed -n "s/^[[:space:]]*\(export[[:space:]]\{1,\}\)\{0,1\}$1=//p" "$env_file" | tail -n 1 |
		sed 's/[[:space:]]*$//; s/^"\(.*\)"$/\1/; s/^'\''\(.*\)'\''$/\1/'
}

subnet=$(value_of FLANNEL_SUBNET)
mtu=$(value_of FLANNEL_MTU)
ipmasq=$(value_of FLANNEL_IPMASQ)

[ -z "$subnet" ] || DOCKER_OPT_BIP="--bip=$subnet"
[ -z "$mtu" ] || DOCKER_OPT_MTU="--mtu=$mtu"
# One of the two masquerades.
if [ $masquerade = yes ] && [ -n "$ipmasq" ]; then
	case $ipmasq in
	true) DOCKER_OPT_IPMASQ="--ip-masq=false" ;;
	false) DOCKER_OPT_IPMASQ="--ip-masq=true" ;;
	*)
		echo "Invalid value of FLANNEL_IPMASQ in $env_file: $ipmasq" >&2
		exit 1
		;;
	esac
fi

# Options that whoever calls us has in the environment are passed on, too.
inherited=$(env | sed -n 's/^\(DOCKER_OPT_[A-Za-z0-9_]*\)=.*/\1/p')
names=$(printf '%s\n' DOCKER_OPT_BIP DOCKER_OPT_IPMASQ DOCKER_OPT_MTU "$inherited" | LC_ALL=C sort -u)

quoted() {
	printf '%s="%s"\n' "$1" "$(printf '%s' "$2" | sed 's/[\\"$`]/\\&/g')"
}

mkdir -p "$(dirname "$out_file")"
# A file is replaced whole. What is none (/dev/stdout), and what a link leads to, is written into.
whole=yes
if [ -L "$out_file" ] || { [ -e "$out_file" ] && [ ! -f "$out_file" ]; }; then
	whole=no
fi
if [ $whole = yes ]; then
	made=$(mktemp "$out_file.XXXXXX")
else
	made=$(mktemp)
fi
trap 'rm -f "$made"' EXIT
eval "all=\${$key-}"
[ -z "$all" ] || all="$all "
for name in $names; do
	eval "option=\${$name-}"
	[ -n "$option" ] || continue
	[ $individual = no ] || quoted "$name" "$option" >>"$made"
	all="$all $option"
done
[ $combined = no ] || quoted "$key" "$all" >>"$made"
if [ $whole = yes ]; then
	chmod 0644 "$made"
	mv "$made" "$out_file"
else
	cat "$made" >"$out_file"
	rm -f "$made"
fi
trap - EXIT

# docker0 on a subnet that is routed elsewhere would take its packets away from there.
case $subnet in
*.*.*.*/*)
	address=${subnet%/*}
	base="${address%.*}.$((${address##*.} - 1))/${subnet#*/}"
	if ip route show | grep -F "$base " | grep -q ' via '; then
		echo "Your routing table already contains the subnet: $base" >&2
		exit 1
	fi
	;;
esac
