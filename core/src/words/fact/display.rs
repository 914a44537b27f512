//! A fact as the iproute2 (or nft) line that would make it true.

use std::fmt;

use super::{
    Blackhole, Change, Fact, Facts, Ipip, Link, LinkKind, PortVlans, Route, RouteProtocol, RouteScope,
    RouteTable, VlanMember,
};

impl fmt::Display for Facts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.iter().try_for_each(|fact| writeln!(f, "{fact}"))
    }
}

impl fmt::Display for Change<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Create(fact) => write!(f, "+ {fact}"),
            Self::Replace { new, .. } => write!(f, "~ {new}"),
            Self::Delete(fact) => write!(f, "- {fact}"),
        }
    }
}

impl fmt::Display for Fact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sysctl(s) => {
                write!(f, "sysctl -w {}={}", s.path.replace('.', "/").replace('/', "."), s.value)
            }
            Self::Link(link) => write!(f, "{link}"),
            Self::BridgePort(p) => {
                write!(f, "ip link set {} master {}", p.link, p.bridge)?;
                // Two commands: the kernel refuses modes in the message that enslaves.
                let modes = [(p.hairpin, " hairpin on"), (p.isolated, " isolated on")];
                if p.hairpin || p.isolated {
                    write!(f, "; bridge link set dev {}", p.link)?;
                }
                modes.iter().filter(|(on, _)| *on).try_for_each(|(_, mode)| f.write_str(mode))
            }
            Self::PortVlans(vlans) => write!(f, "{vlans}"),
            Self::Guard(g) => write!(
                f,
                "nft 'add element bridge flannel_cni guarded {{ \"{0}\" }}; \
                 add element bridge flannel_cni sources {{ \"{0}\" . {1} }}'",
                g.link, g.mac
            ),
            Self::Address(a) => {
                write!(f, "ip addr replace {} dev {}", a.address, a.link)?;
                if a.no_prefix_route { f.write_str(" noprefixroute") } else { Ok(()) }
            }
            Self::Neighbor(n) => {
                write!(f, "ip neigh replace {} lladdr {} dev {} nud permanent", n.ip, n.mac, n.link)
            }
            Self::Forward(e) => {
                write!(f, "bridge fdb replace {} dev {} dst {} self permanent", e.mac, e.link, e.remote)
            }
            Self::SharedChain(chain) => write!(f, "{chain}"),
            Self::WireguardDevice(device) => write!(f, "{device}"),
            Self::WireguardPeer(peer) => write!(f, "{peer}"),
            Self::Table(table) => write!(f, "nft '{table}'"),
            Self::TunnelHost(host) => write!(f, "{host}"),
            Self::Accept(a) => {
                let iptables = if a.cidr.base().is_ipv4() { "iptables" } else { "ip6tables" };
                write!(
                    f,
                    "{iptables} -A FLANNEL-FWD -s {0} -j ACCEPT; {iptables} -A FLANNEL-FWD -d {0} -j ACCEPT",
                    a.cidr
                )
            }
            Self::Policy(policy) => write!(f, "{policy}"),
            Self::Route(route) => write!(f, "{route}"),
            Self::Blackhole(b) => {
                let (metric, protocol) = (Blackhole::METRIC, RouteProtocol::FLANNEL.0);
                write!(f, "ip route replace blackhole {} metric {metric} proto {protocol}", b.destination)
            }
        }
    }
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verb = if matches!(self.kind, LinkKind::Given) { "set" } else { "add" };
        write!(f, "ip link {verb} {}", self.name)?;
        if let Some(mac) = self.mac {
            write!(f, " address {mac}")?;
        }
        if let Some(mtu) = self.mtu {
            write!(f, " mtu {mtu}")?;
        }
        if self.up {
            f.write_str(" up")?;
        }
        if self.modes.promiscuous {
            f.write_str(" promisc on")?;
        }
        match &self.kind {
            LinkKind::Bridge if self.modes.vlan_filtering => f.write_str(" type bridge vlan_filtering 1")?,
            LinkKind::Bridge => f.write_str(" type bridge")?,
            LinkKind::Vxlan(v) => {
                let no = if v.learning { "" } else { "no" };
                write!(f, " type vxlan id {} local {} dev {}", v.vni, v.local, v.underlay)?;
                write!(f, " dstport {} {no}learning", v.port)?;
                if v.gbp {
                    f.write_str(" gbp")?;
                }
            }
            LinkKind::Ipip(Ipip { local: Some(local) }) => {
                write!(f, " type ipip mode ipip local {local} remote any ttl inherit nopmtudisc")?;
            }
            LinkKind::Ipip(Ipip { local: None }) => f.write_str(" type ipip")?,
            LinkKind::Veth { peer: None } => f.write_str(" type veth")?,
            LinkKind::Veth { peer: Some(peer) } => {
                write!(f, " type veth peer name {}", peer.name)?;
                if let Some(mac) = peer.mac {
                    write!(f, " address {mac}")?;
                }
                if let Some(mtu) = peer.mtu {
                    write!(f, " mtu {mtu}")?;
                }
                if peer.in_sandbox {
                    f.write_str(" netns SANDBOX")?;
                }
            }
            LinkKind::Wireguard => f.write_str(" type wireguard")?,
            LinkKind::Given => {}
        }
        match &self.alias {
            Some(alias) => write!(f, "; ip link set {} alias '{alias}'", self.name),
            None => Ok(()),
        }
    }
}

impl fmt::Display for PortVlans {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        if self.leaves_default() {
            write!(f, "bridge vlan del vid {} dev {}", Self::DEFAULT, self.link)?;
            separator = "; ";
        }
        for (vlan, member) in &self.members {
            let how = match member {
                VlanMember::Access => " pvid untagged",
                VlanMember::Untagged => " untagged",
                VlanMember::Native => " pvid",
                VlanMember::Tagged => "",
            };
            write!(f, "{separator}bridge vlan add vid {vlan} dev {}{how}", self.link)?;
            separator = "; ";
        }
        Ok(())
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.destination.is_default() {
            true => f.write_str("ip route replace default")?,
            false => write!(f, "ip route replace {}", self.destination)?,
        }
        if let Some(via) = self.via {
            write!(f, " via {via}")?;
        }
        write!(f, " dev {}", self.link)?;
        if self.protocol != RouteProtocol::BOOT {
            write!(f, " proto {}", self.protocol.0)?;
        }
        match (self.scope, self.via) {
            (RouteScope::Link, _) => f.write_str(" scope link")?,
            (RouteScope::Global, None) => f.write_str(" scope global")?,
            (RouteScope::Global, Some(_)) => {}
            (RouteScope::Other(scope), _) => write!(f, " scope {scope}")?,
        }
        if let Some(source) = self.source {
            write!(f, " src {source}")?;
        }
        if self.metric != 0 {
            write!(f, " metric {}", self.metric)?;
        }
        if self.extras.table != RouteTable::MAIN {
            write!(f, " table {}", self.extras.table.0)?;
        }
        if let Some(mtu) = self.extras.mtu {
            write!(f, " mtu {mtu}")?;
        }
        if let Some(advmss) = self.extras.advmss {
            write!(f, " advmss {advmss}")?;
        }
        if self.onlink { f.write_str(" onlink") } else { Ok(()) }
    }
}
