//! What is not ours: not seen as a fact of ours, and told to planners who ask.

use std::collections::BTreeSet;

use anyhow::{Context as _, ensure};
use flannel_core::touch::world::World as _;
use flannel_core::touch::world::kernel::Kernel;
use flannel_core::words::addr::Prefix;
use flannel_core::words::fact::RouteProtocol;
use flannel_tests::{alone, sh};

use super::facts::name;
use super::{aliased, owned, underlay};

#[test]
fn nothing_outside_the_territory_is_seen() {
    alone(|| {
        underlay()?;
        sh("ip route add 10.100.1.0/24 via 192.168.77.2 dev up0")?;
        sh("ip route add 10.100.2.0/24 via 192.168.77.2 dev up0 proto 70")?;
        sh("ip route add 10.200.2.0/24 via 192.168.77.2 dev up0 proto 70")?;
        // What throws packets away is ours, and looked for by an agent, where it is marked and inside of the network.
        sh("ip route add blackhole 10.100.3.0/24 proto 70 metric 65535")?;
        sh("ip route add blackhole 10.201.0.0/16 proto 70")?;
        sh("ip neigh add 192.168.77.9 lladdr 02:00:00:00:00:09 dev up0 nud permanent")?;
        let mut kernel = Kernel::open()?;
        let route = "ip route replace 10.100.2.0/24 via 192.168.77.2 dev up0 proto 70\n";
        let blackhole = "ip route replace blackhole 10.100.3.0/24 metric 65535 proto 70\n";
        for (mut territory, agents) in [(owned(&["cni0"]), false), (aliased(&["cni0"]), true)] {
            territory.cidrs.insert("10.100.0.0/16".parse()?);
            let seen: BTreeSet<String> =
                kernel.observe(&territory)?.to_string().lines().map(|line| format!("{line}\n")).collect();
            let mut ours = BTreeSet::from([route.to_owned()]);
            ours.extend(agents.then(|| blackhole.to_owned()));
            ensure!(seen == ours, "{seen:?}");
            let others = kernel.routes_of_others(&territory)?;
            let others: BTreeSet<String> = others.iter().map(|route| route.destination.to_string()).collect();
            let wanted = ["192.168.77.0/24", "10.100.1.0/24", "10.200.2.0/24", "10.201.0.0/16", "fd77::/64"];
            ensure!(others == wanted.map(str::to_owned).into(), "{others:?}");
            // One dump serves a glance and the look behind it, and no other look.
            let (glance, before) = (kernel.glance_at_routes(&territory)?, kernel.observe(&territory)?);
            ensure!(glance == kernel.routes_of_others(&territory)?);
            ensure!(before == kernel.observe(&territory)?);
            kernel.glance_at_routes(&territory)?;
            sh("ip route del 10.100.2.0/24 proto 70")?;
            ensure!(kernel.observe(&territory)? == before && kernel.observe(&territory)? != before);
            sh("ip route add 10.100.2.0/24 via 192.168.77.2 dev up0 proto 70")?;
        }
        Ok(())
    });
}

#[test]
fn routes_of_others_say_what_planners_ask() {
    alone(|| {
        underlay()?;
        sh("ip route add default via 192.168.77.254 dev up0")?;
        sh("ip route add unreachable 10.3.0.0/16")?;
        sh("ip link add d0 type veth peer name d1")?;
        sh("ip addr add 172.17.0.1/16 dev d0")?;
        sh("ip link set d0 up")?;
        let mut kernel = Kernel::open()?;
        let routes = kernel.routes_of_others(&owned(&[]))?;
        let of = |destination: &str| {
            routes.iter().find(|route| route.destination == destination.parse::<Prefix>().unwrap()).cloned()
        };
        let default = of("0.0.0.0/0").context("default")?;
        ensure!(default.bridge && default.via == Some("192.168.77.254".parse()?) && !default.scope_link);
        let connected = of("172.17.0.0/16").context("connected")?;
        ensure!(connected.link == Some(name("d0")) && !connected.bridge && connected.scope_link);
        ensure!(connected.protocol == RouteProtocol(2));
        ensure!(of("10.3.0.0/16").context("unreachable")?.link.is_none());
        ensure!(kernel.link_exists(name("d0"))? && !kernel.link_exists(name("d9"))?);
        ensure!(kernel.existing_links("d")? == [name("d0"), name("d1")].into());
        ensure!(kernel.delete_link(name("d0"))? && !kernel.delete_link(name("d0"))?);
        Ok(())
    });
}
