//! The attributes of IPIP devices: what the kernel has, and what is asked of it.

use std::net::{IpAddr, Ipv4Addr};

use netlink_packet_route::link::{InfoData, InfoIpTunnel};

use super::netlink::{attributes, ip_of};
use crate::words::fact::Ipip;

/// uapi/linux/if_tunnel.h
const IFLA_IPTUN_LOCAL: u16 = 2;
const IFLA_IPTUN_REMOTE: u16 = 3;
const IFLA_IPTUN_TTL: u16 = 4;
const IFLA_IPTUN_PMTUDISC: u16 = 10;
const IFLA_IPTUN_ENCAP_TYPE: u16 = 15;
const IFLA_IPTUN_COLLECT_METADATA: u16 = 19;

/// What the kernel says of one.
pub(super) fn read(bytes: &[u8]) -> Ipip {
    let (mut local, mut ours) = (None, true);
    for (kind, value) in attributes(bytes) {
        let is_zero = value.iter().all(|byte| *byte == 0);
        match kind {
            IFLA_IPTUN_LOCAL => local = ip_of(value),
            IFLA_IPTUN_REMOTE | IFLA_IPTUN_TTL | IFLA_IPTUN_PMTUDISC | IFLA_IPTUN_ENCAP_TYPE => {
                ours &= is_zero
            }
            // A flag: it is there or not.
            IFLA_IPTUN_COLLECT_METADATA => ours = false,
            _ => {}
        }
    }
    let local = match local {
        Some(IpAddr::V4(local)) if ours && !local.is_unspecified() => Some(local),
        _ => None,
    };
    Ipip { local }
}

/// What upstream asks for (pkg/backend/ipip/ipip.go). Of the protocols that such devices carry the kernel then takes IPv4 alone,
/// and no MPLS.
pub(super) fn data(ipip: &Ipip) -> InfoData {
    InfoData::IpTunnel(vec![
        InfoIpTunnel::Local(ipip.local.unwrap_or(Ipv4Addr::UNSPECIFIED).into()),
        InfoIpTunnel::PMtuDisc(false),
        InfoIpTunnel::Ttl(0),
        InfoIpTunnel::Tos(0),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = (4 + value.len() as u16).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    /// As kernel 6.1 shows a device made by `ip link add type ipip local 10.77.0.11 nopmtudisc`.
    fn shown() -> Vec<u8> {
        [
            attribute(1, &0u32.to_ne_bytes()),
            attribute(2, &[10, 77, 0, 11]),
            attribute(3, &[0; 4]),
            attribute(4, &[0]),
            attribute(5, &[0]),
            attribute(10, &[0]),
            attribute(20, &0u32.to_ne_bytes()),
            attribute(9, &[4]),
            attribute(15, &[0; 2]),
            attribute(17, &[0; 2]),
            attribute(18, &[0; 2]),
            attribute(16, &[0; 2]),
        ]
        .concat()
    }

    #[test]
    fn a_device_of_ours_is_known_again() {
        assert_eq!(read(&shown()), Ipip { local: Some(Ipv4Addr::new(10, 77, 0, 11)) });
    }

    #[test]
    fn a_device_with_anything_of_its_own_is_another() {
        for (kind, value) in [
            (IFLA_IPTUN_REMOTE, &[10, 77, 0, 12][..]),
            (IFLA_IPTUN_TTL, &[64]),
            (IFLA_IPTUN_PMTUDISC, &[1]),
            (IFLA_IPTUN_ENCAP_TYPE, &[1, 0]),
            (IFLA_IPTUN_COLLECT_METADATA, &[]),
            (IFLA_IPTUN_LOCAL, &[0; 4]),
        ] {
            let bytes = [shown(), attribute(kind, value)].concat();
            assert_eq!(read(&bytes), Ipip { local: None }, "attribute {kind}");
        }
    }
}
