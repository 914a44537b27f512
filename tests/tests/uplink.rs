//! Which interface carries us, and what a node keeps, on a real kernel.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;

use anyhow::{Result, ensure};
use flannel_core::touch::identity;
use flannel_core::touch::uplink::{UplinkChoice, choose, read};
use flannel_core::touch::world::kernel::Kernel;
use flannel_core::words::name::{LinkName, NetworkName};
use flannel_tests::{alone, sh};

/// Two interfaces of the test's own, with several addresses each.
fn interfaces() -> Result<()> {
    sh("ip link set lo up
        ip link add a0 type bridge; ip link set a0 up mtu 1400
        ip link add b0 type bridge; ip link set b0 up
        ip addr add 169.254.3.3/16 dev a0
        ip addr add 192.0.2.9/24 dev a0 valid_lft 1000 preferred_lft 1000
        ip addr add 192.0.2.1/24 dev a0
        ip -6 addr add 2001:db8::1/64 dev a0 nodad
        ip addr add 198.51.100.1/24 dev b0
        ip addr add 198.51.100.2/24 dev b0")
    .map(drop)
}

fn flags(ifaces: &[&str]) -> UplinkChoice {
    UplinkChoice::of_flags(&ifaces.iter().map(|iface| (*iface).to_owned()).collect::<Vec<_>>()).unwrap()
}

#[test]
fn the_best_default_route_decides() {
    alone(|| {
        interfaces()?;
        let mut kernel = Kernel::open()?;
        let error = choose(&mut kernel, &flags(&[]), None).unwrap_err().to_string();
        ensure!(error.contains("there is no default route; say which interface with --iface"), "{error}");
        ensure!(error.contains("b0 [198.51.100.1/24 198.51.100.2/24") && !error.contains("lo ["), "{error}");

        sh("ip route add default via 198.51.100.254 dev b0 metric 200")?;
        sh("ip route add default via 192.0.2.254 dev a0 metric 100")?;
        sh("ip route add default via 198.51.100.254 dev b0 table 7 metric 1")?;
        let uplink = choose(&mut kernel, &flags(&[]), None)?;
        ensure!(uplink.link.as_str() == "a0" && uplink.mtu.bytes() == 1400, "{uplink:?}");
        // Permanent before leased, global before link-local.
        ensure!(uplink.v4 == Some("192.0.2.1/24".parse()?), "{uplink:?}");
        ensure!(uplink.v6 == Some("2001:db8::1/64".parse()?), "{uplink:?}");
        ensure!(read(&mut kernel, uplink.link)? == uplink);

        sh("ip route del default metric 100; ip route del default metric 200")?;
        sh("ip route add default nexthop via 192.0.2.254 dev a0 nexthop via 198.51.100.254 dev b0")?;
        let error = choose(&mut kernel, &flags(&[]), None).unwrap_err().to_string();
        ensure!(error.contains("leaves by several interfaces"), "{error}");
        Ok(())
    });
}

#[test]
fn an_interface_is_found_by_name_and_by_address() {
    alone(|| {
        interfaces()?;
        let mut kernel = Kernel::open()?;
        let b0 = choose(&mut kernel, &flags(&["nowhere", "b0"]), None)?;
        ensure!(b0.link.as_str() == "b0" && b0.v4 == Some("198.51.100.1/24".parse()?));
        ensure!(b0.v6.is_none_or(|v6| v6.to_string().starts_with("fe80:")), "{b0:?}");
        // The address that was asked for is the one that is used.
        let b0 = choose(&mut kernel, &flags(&["198.51.100.2"]), None)?;
        ensure!(b0.v4 == Some("198.51.100.2/24".parse()?), "{b0:?}");
        let b0 = choose(&mut kernel, &flags(&[]), Some("198.51.100.2".parse()?))?;
        ensure!(b0.link.as_str() == "b0" && b0.v4 == Some("198.51.100.2/24".parse()?), "{b0:?}");
        let error = choose(&mut kernel, &flags(&["nowhere", "203.0.113.1"]), None).unwrap_err().to_string();
        ensure!(error.contains("no interface matches nowhere or 203.0.113.1; there are: a0 ["), "{error}");
        sh("ip addr flush dev b0")?;
        let error = choose(&mut kernel, &flags(&["b0"]), None).unwrap_err().to_string();
        ensure!(error == "interface b0 has no usable IPv4 address", "{error}");
        Ok(())
    });
}

#[test]
fn a_mac_is_made_once_kept_and_taken_over_from_a_device() {
    alone(|| {
        interfaces()?;
        let state = tempfile::tempdir()?;
        let network = NetworkName::default_network();
        let devices = [Some(LinkName::new("flannel.1")?), Some(LinkName::new("flannel-v6.1")?)];
        let mut kernel = Kernel::open()?;
        let made = identity::load(&mut kernel, state.path(), &network, devices)?;
        ensure!(made.vtep_mac != made.vtep_mac_v6 && made.vtep_mac.0[0] & 3 == 2, "{made:?}");
        ensure!(identity::load(&mut kernel, state.path(), &network, devices)? == made);
        // A node that Go's flanneld has run on keeps the MAC its peers know.
        sh(
            "ip link add flannel.1 address 02:00:00:00:00:07 type vxlan id 1 local 192.0.2.1 dev a0 dstport 8472",
        )?;
        let taken = identity::load(&mut kernel, state.path(), &network, devices)?;
        ensure!(taken.vtep_mac == "02:00:00:00:00:07".parse()? && taken.vtep_mac_v6 == made.vtep_mac_v6);
        sh("ip link del flannel.1")?;
        ensure!(identity::load(&mut kernel, state.path(), &network, devices)? == taken);
        // Something else of that name is not ours to learn from.
        sh("ip link add flannel.1 address 02:00:00:00:00:08 type bridge")?;
        ensure!(identity::load(&mut kernel, state.path(), &network, devices)? == taken);
        let left: Vec<_> =
            fs::read_dir(state.path().join("default"))?.flatten().map(|entry| entry.file_name()).collect();
        ensure!(left == ["identity.json"], "{left:?}");
        Ok(())
    });
}
