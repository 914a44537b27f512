//! The catalogue of everything that can be wrong in a way the operator must know of. A number is never used again.

use std::fmt;

/// A stable number for one kind of trouble: in log lines (`E101`), as CNI error code (>= 100), in the documentation.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Code(u16);

macro_rules! catalogue {
    ($($name:ident = $number:literal, $title:literal, $todo:literal;)*) => {
        impl Code {
            $(#[doc = $title] pub const $name: Self = Self($number);)*

            /// Every code, in order.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// What is wrong, in a few words.
            pub fn title(self) -> &'static str {
                match self.0 { $($number => $title,)* _ => "unknown code" }
            }

            /// What to do about it.
            pub fn remedy(self) -> &'static str {
                match self.0 { $($number => $todo,)* _ => "" }
            }
        }
    };
}

catalogue! {
    CONFIG_ABSENT = 101, "no network config in the store",
        "put one there, for example: etcdctl put /coreos.com/network/config '{\"Network\":\"10.100.0.0/16\",\"Backend\":{\"Type\":\"vxlan\"}}'";
    CONFIG_BROKEN = 102, "the network config cannot be used",
        "correct the document in the store; it is watched, no restart is needed";
    CONFIG_UNKNOWN_KEY = 103, "the network config has a key that nothing reads",
        "remove it or correct its spelling";
    BACKEND_ABSENT = 104, "the network config names no backend",
        "say it, for example {\"Backend\":{\"Type\":\"vxlan\"}}: udp is what Go flanneld takes, too, but not what its documentation says";
    NETWORK_OVERLAP = 105, "the network overlaps a route of this host",
        "choose another Network, or remove the route";
    OUT_OF_SUBNETS = 106, "every subnet of the network is taken",
        "raise SubnetMax (no restart is needed), or remove leases of hosts that are gone";
    LEASE_MALFORMED = 107, "a key under the store's subnets is no lease",
        "remove the key; the other leases are used meanwhile";
    LEASE_DUPLICATE = 108, "two leases claim the same or overlapping addresses",
        "remove the one whose host is gone";
    LEASE_LOST = 109, "this host's lease was taken or has expired",
        "nothing: it is acquired again, with the same subnet if that is free";
    PEER_OTHER_BACKEND = 110, "a peer uses another backend",
        "restart that peer's flanneld, so that it follows the config";
    PEER_DATA = 111, "a peer's BackendData cannot be read",
        "look at the peer's lease in the store; the other peers are served";
    STORE_DOWN = 112, "the store cannot be reached",
        "start it or correct the endpoints; the data path stays as it is meanwhile";
    UPLINK_ABSENT = 113, "no interface to reach the peers by",
        "give one with --iface, or add a default route";
    PUBLIC_IP_FOREIGN = 114, "the backend needs the public address on the uplink itself",
        "choose another backend, or drop --public-ip";
    CHANGE_FAILED = 115, "the kernel refused a change",
        "see the reason; it is tried again";
    AGENT_HELD = 116, "another agent serves this network on this host",
        "nothing: its subnet file is read along; it is taken over once that one has ended for good";
    BRIDGE_NAME = 117, "the network has a bridge of another name on this host",
        "use that name";
    FORWARD_DROPPED = 118, "the host's firewall drops forwarded traffic",
        "accept the network there, for example: iptables -I FORWARD -d CIDR -j ACCEPT";
    PLAN_CONFLICT = 119, "two parts of the plan contradict each other",
        "report it: this is a fault of flannel";
    PEER_UNREACHABLE = 120, "host-gw cannot reach a peer without a gateway",
        "put the hosts on one network, or use vxlan with DirectRouting";
    LEASE_OUTSIDE = 121, "a peer's subnet is not in the network",
        "remove its lease if the host is gone; after a change of Network the peer moves when it restarts";
    PUBLIC_IP_SHARED = 122, "a peer's lease has this host's own public address",
        "remove the lease if it was this host's; hosts behind one address need --public-ip each";
    VTEP_MAC_SHARED = 123, "two hosts have the same VtepMAC",
        "one was cloned from the other: delete its flannel device and state directory, and restart it";
    MTU_ABOVE_UPLINK = 124, "the MTU of the config does not fit the uplink",
        "lower Backend.MTU, or raise the uplink's MTU";
    FAMILY_NOT_CARRIED = 125, "the backend does not carry IPv6",
        "use vxlan or host-gw for a network with IPv6";
    EXTENSION_REFUSED = 126, "the network config has commands that this host may not run",
        "whoever can write the store would run commands here as root: if that is meant, start flanneld with --allow-extension; else choose another backend";
    EXTENSION_FAILED = 127, "a command of the extension backend failed",
        "see what it said; it is run again, later and later";
    CHARON_ABSENT = 130, "there is no strongSwan to agree on keys with the peers",
        "install it, on Debian: apt-get install --no-install-recommends strongswan-charon libstrongswan-standard-plugins";
    CHARON_FAILED = 131, "strongSwan's charon does not serve",
        "see the reason, and its own words: journalctl -t charon; it is tried again";
    TUNNEL_ABSENT = 132, "there is no IPsec tunnel to a peer",
        "see the reason; it is tried again, and packets to that peer wait until then";
    ROUTE_ABSENT = 133, "packets to peers have no route, and without one they never reach the encryption",
        "add a default route: which way it leads does not matter";
    WIREGUARD_KEY_SHARED = 134, "two hosts have the same WireGuard key",
        "one was cloned from the other: stop its flanneld, delete wireguard.key in its state directory and /run/flannel/wgkey, and start it";
    WIREGUARD_KEY_BROKEN = 135, "this host's WireGuard key cannot be read",
        "put a key as `wg genkey` prints it into the file, or delete the file: a new key is made, and the peers learn it";
    PEER_SILENT = 136, "a WireGuard peer does not answer",
        "see that both hosts have the same PSK, that no firewall drops UDP to the port, and that the peer's flanneld runs";
    TUNNEL_STRANGER = 137, "packets come into the tunnel from a host that holds no lease",
        "see who it is: tcpdump -ni any 'udp port 8472 or proto 4'; a host of this network whose packets arrive from another address than its lease says must say that one (--public-ip), or all hosts do without the guard (--tunnel-guard=false)";
    LEASES_VANISHED = 138, "leases vanished all at once",
        "see who emptied the store, or restored a backup of it; hosts that run write their leases again within seconds";
    LEASE_FENCED = 139, "a bridge of this host has the subnet of another host's lease",
        "start what is attached to it again, so that it gets addresses of this host's own subnet (Docker: write its options anew and restart it); or remove the lease, if that is the wrong one";
    ATTACHMENT_DRIFT = 140, "a container's place on the network is not as it was made",
        "start the container anew; the details name what is missing as the commands that would make it";
    ATTACHMENT_EXISTS = 141, "the container's interface is attached already",
        "detach it first (CNI DEL), then attach it";
    ADDRESS_TAKEN = 142, "the address asked for has an owner",
        "choose another, or stop its owner";
    LEFTOVER = 143, "something of a container could not be taken back",
        "see the reason; the next DEL or GC tries again";
}

impl Code {
    /// The number.
    pub const fn number(self) -> u16 {
        self.0
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "E{}", self.0)
    }
}
