//! A tunnel that this program itself carries, packet by packet: what the udp backend wants beside facts of the kernel.

use std::collections::BTreeMap;
use std::fmt;
use std::net::Ipv4Addr;

use super::addr::Prefix;
use super::name::LinkName;
use super::units::{Mtu, Port};

/// What the data path of the udp backend is told.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Tunnel {
    /// The TUN device.
    pub device: LinkName,
    /// Its address: the source of ICMP errors.
    pub address: Ipv4Addr,
    /// Largest inner packet.
    pub mtu: Mtu,
    /// Where datagrams leave and arrive.
    pub local: Ipv4Addr,
    /// On every host of the network.
    pub port: Port,
    /// What packets from peers may be for.
    pub own: Prefix,
    /// The peers' IPv4 subnets, and the addresses at which their holders are reached.
    pub peers: BTreeMap<Prefix, Ipv4Addr>,
}

impl fmt::Display for Tunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { device, local, port, own, .. } = self;
        writeln!(f, "ip tuntap add {device} mode tun; carry {own} by UDP from {local} port {port}")?;
        self.peers
            .iter()
            .try_for_each(|(subnet, holder)| writeln!(f, "carry {subnet} dev {device} to {holder}"))
    }
}
