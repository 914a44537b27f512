//! What few bridges, ports and routes have.

use std::collections::BTreeMap;

use anyhow::ensure;
use flannel_core::decide::bridge::{self, BridgeOptions, BridgeSpec, VlanGateway};
use flannel_core::touch::world::World as _;
use flannel_core::touch::world::kernel::Kernel;
use flannel_core::words::fact::{
    BridgePort, Change, Fact, Facts, Guard, Link, LinkModes, PortVlans, Route, RouteExtras, RouteScope,
    RouteTable, VlanMember, diff,
};
use flannel_core::words::territory::Territory;
use flannel_core::words::units::Mtu;
use flannel_tests::needs::{self, BRIDGE_VLANS, require_kernel};
use flannel_tests::{alone, secs, sh, vm};

use crate::facts::{address, bridge, mac, name, route, veth};
use crate::{all, there_and_back};

fn with_modes(fact: Fact, modes: LinkModes) -> Fact {
    match fact {
        Fact::Link(link) => Fact::Link(Box::new(Link { modes, ..*link })),
        other => other,
    }
}

#[test]
fn routes_of_other_tables_with_metrics() {
    alone(|| {
        let mut kernel = Kernel::open()?;
        let beside = |table| RouteExtras { table: RouteTable(table), ..RouteExtras::default() };
        let plain = Route { onlink: false, ..route("cni0", "10.9.0.0/16", Some("10.100.5.9"), 0) };
        let facts = vec![
            bridge("cni0"),
            address("cni0", "10.100.5.1/24"),
            address("cni0", "fd42::1/64"),
            Fact::Route(plain.clone()),
            Fact::Route(Route { extras: beside(7), ..plain.clone() }),
            Fact::Route(Route { extras: beside(70_000), metric: 5, ..plain.clone() }),
            Fact::Route(Route {
                extras: RouteExtras { mtu: Some(1300), advmss: Some(1200), ..RouteExtras::default() },
                metric: 9,
                ..plain
            }),
            Fact::Route(Route {
                scope: RouteScope::Other(200),
                onlink: false,
                ..route("cni0", "10.10.0.0/16", None, 0)
            }),
            Fact::Route(Route {
                extras: RouteExtras { mtu: Some(1280), ..beside(7) },
                onlink: false,
                ..route("cni0", "fd43::/64", Some("fd42::9"), 1024)
            }),
        ];
        let seen = there_and_back(&mut kernel, &Territory::of(&facts), facts)?;
        for line in [
            "ip route replace 10.9.0.0/16 via 10.100.5.9 dev cni0 table 7",
            "ip route replace 10.9.0.0/16 via 10.100.5.9 dev cni0 metric 5 table 70000",
            "ip route replace 10.9.0.0/16 via 10.100.5.9 dev cni0 metric 9 mtu 1300 advmss 1200",
            "ip route replace 10.10.0.0/16 dev cni0 scope 200",
        ] {
            ensure!(seen.to_string().contains(line), "{line} is not in\n{seen}");
        }
        Ok(())
    });
}

#[test]
fn what_is_not_asked_of_a_route_is_let_be() {
    alone(|| {
        sh("ip link add cni0 type bridge; ip addr add 10.100.5.1/24 dev cni0; ip link set cni0 up")?;
        sh("ip route add 10.9.0.0/16 via 10.100.5.9 mtu 1300 proto boot")?;
        let plain = Route { onlink: false, ..route("cni0", "10.9.0.0/16", Some("10.100.5.9"), 0) };
        let wanted: Facts = [Fact::Route(plain.clone())].into_iter().collect();
        let mut seen = Kernel::open()?.observe(&crate::owned(&["cni0"]))?;
        seen.retain(|fact| matches!(fact, Fact::Route(_)));
        ensure!(diff(&wanted, &seen).is_empty(), "{seen}");
        let extras = RouteExtras { mtu: Some(1400), ..RouteExtras::default() };
        let wanted: Facts = [Fact::Route(Route { extras, ..plain })].into_iter().collect();
        ensure!(matches!(diff(&wanted, &seen)[..], [Change::Replace { .. }]), "{seen}");
        Ok(())
    });
}

#[test]
fn a_bridge_that_takes_every_frame() {
    alone(|| {
        let mut kernel = Kernel::open()?;
        let modes = LinkModes { promiscuous: true, ..LinkModes::default() };
        let wanted = with_modes(bridge("cni0"), modes);
        let facts = vec![wanted.clone()];
        there_and_back(&mut kernel, &Territory::of(&facts), facts)?;
        // One that is there is made so; and stays so when nobody asks.
        all(kernel.apply(&[Change::Create(&bridge("cni0"))]))?;
        ensure!(!sh("ip link show cni0")?.contains("PROMISC"));
        let desired: Facts = [wanted].into_iter().collect();
        let territory = Territory::of(desired.iter());
        let seen = kernel.observe(&territory)?;
        all(kernel.apply(&diff(&desired, &seen)))?;
        ensure!(sh("ip link show cni0")?.contains("PROMISC"), "{}", sh("ip link show cni0")?);
        let plain: Facts = [bridge("cni0")].into_iter().collect();
        ensure!(diff(&plain, &kernel.observe(&territory)?).is_empty());
        Ok(())
    });
}

#[test]
fn guards_are_elements_of_one_table() {
    alone(|| {
        let mut kernel = Kernel::open()?;
        let guard = |link: &str, of: &str| Fact::Guard(Guard { link: name(link), mac: mac(of) });
        let facts = vec![guard("veth0", "0a:58:0a:64:05:02"), guard("veth1", "0a:58:0a:64:05:03")];
        let territory = Territory::of(&facts);
        there_and_back(&mut kernel, &territory, facts.clone())?;
        all(kernel.apply(&[Change::Create(&facts[0]), Change::Create(&facts[1])]))?;
        // Another MAC takes the place of the first; and it goes by the name, whatever the MAC was.
        let other = guard("veth0", "0a:58:0a:64:05:09");
        let seen = kernel.observe(&territory)?;
        let desired: Facts = [other.clone(), facts[1].clone()].into_iter().collect();
        all(kernel.apply(&diff(&desired, &seen)))?;
        ensure!(kernel.observe(&territory)? == desired);
        all(kernel.apply(&[Change::Delete(&facts[0])]))?;
        let left = kernel.observe(&territory)?;
        ensure!(left == [facts[1].clone()].into_iter().collect(), "{left}");
        // What is there is what nft would have written.
        if needs::require("nft") {
            let rules = sh("nft list table bridge flannel_cni")?;
            ensure!(
                rules.contains("iifname @guarded iifname . ether saddr != @sources drop")
                    && rules.contains("elements = { \"veth1\" . 0a:58:0a:64:05:03 }")
                    && rules.contains("type filter hook prerouting priority dstnat; policy accept;"),
                "{rules}"
            );
            sh(&facts[0].to_string())?;
            ensure!(kernel.observe(&territory)?.len() == 2);
            // Without the rule nobody is guarded.
            sh("nft flush chain bridge flannel_cni prerouting")?;
            ensure!(kernel.observe(&territory)?.is_empty());
        }
        Ok(())
    });
}

#[test]
fn on_debians_kernel() {
    let names = ["ports::ports_in_vlans", "ports::a_gateway_in_a_vlan", "policies::policies_of_ipsec"];
    vm::again(&names, secs(300));
}

#[test]
fn ports_in_vlans() {
    alone(|| {
        if !require_kernel(BRIDGE_VLANS) {
            return Ok(());
        }
        let mut kernel = Kernel::open()?;
        let tagged = VlanMember::Tagged;
        let port = |link: &str| {
            let bridge = name("cni0");
            Fact::BridgePort(BridgePort { link: name(link), bridge, hairpin: false, isolated: false })
        };
        let members = |list: &[(u16, VlanMember)]| list.iter().copied().collect::<BTreeMap<_, _>>();
        let vlans = |link: &str, list: &[(u16, VlanMember)], not_default| {
            Fact::PortVlans(PortVlans { link: name(link), members: members(list), not_default })
        };
        let filtering = LinkModes { vlan_filtering: true, ..LinkModes::default() };
        let facts = vec![
            with_modes(bridge("cni0"), filtering),
            veth("v0", "c0", false),
            port("v0"),
            vlans("v0", &[(100, VlanMember::Access)], true),
        ];
        all(kernel.apply(&facts.iter().map(Change::Create).collect::<Vec<_>>()))?;
        let desired: Facts = facts.iter().cloned().collect();
        let territory = Territory::of(&facts);
        let seen = kernel.observe(&territory)?;
        ensure!(diff(&desired, &seen).is_empty(), "{seen}");
        ensure!(sh("bridge vlan show dev v0")?.contains("100 PVID Egress Untagged"));
        // A trunk beside it, and a bridge that was made without.
        sh("ip link set cni0 type bridge vlan_filtering 0; bridge vlan del vid 100 dev v0")?;
        let trunk = vlans("v0", &[(5, tagged), (6, tagged), (7, tagged), (9, tagged)], false);
        let mut desired = desired;
        desired.set(trunk);
        let seen = kernel.observe(&territory)?;
        let changes: Vec<_> =
            diff(&desired, &seen).into_iter().filter(|c| !matches!(c, Change::Delete(_))).collect();
        all(kernel.apply(&changes))?;
        let left = kernel.observe(&territory)?;
        ensure!(!diff(&desired, &left).iter().any(|c| !matches!(c, Change::Delete(_))), "{left}");
        Ok(())
    });
}

#[test]
fn a_gateway_in_a_vlan() {
    alone(|| {
        if !require_kernel(BRIDGE_VLANS) {
            return Ok(());
        }
        let spec = BridgeSpec {
            name: name("cni0"),
            gateways: vec!["10.100.5.1/24".parse()?, "fd42::1/64".parse()?],
            mtu: Mtu::new(1450)?,
            alias: None,
            options: BridgeOptions {
                vlan_filtering: true,
                vlan_gateway: Some(VlanGateway::new(name("cni0"), 100, false)?),
                ..BridgeOptions::default()
            },
        };
        let desired = bridge::plan(&spec)?;
        let territory = Territory::of(desired.iter());
        let mut kernel = Kernel::open()?;
        for _ in 0..2 {
            let seen = kernel.observe(&territory)?;
            let changes: Vec<_> =
                diff(&desired, &seen).into_iter().filter(|c| !matches!(c, Change::Delete(_))).collect();
            all(kernel.apply(&changes))?;
        }
        let seen = kernel.observe(&territory)?;
        ensure!(!diff(&desired, &seen).iter().any(|c| !matches!(c, Change::Delete(_))), "{seen}");
        ensure!(sh("ip -br addr show dev cni0.100")?.contains("10.100.5.1/24"));
        Ok(())
    });
}
