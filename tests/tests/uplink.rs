//! Which interface carries us, and what a node keeps, on a real kernel.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;

use anyhow::{Result, ensure};
use flannel_core::touch::identity;
use flannel_core::touch::uplink::{self, Sought, UplinkChoice, UplinkError};
use flannel_core::touch::world::kernel::Kernel;
use flannel_core::words::addr::Family;
use flannel_core::words::name::{LinkName, NetworkName};
use flannel_core::words::node::Uplink;
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

fn flags(ifaces: &[&str]) -> Sought {
    let ifaces: Vec<_> = ifaces.iter().map(|iface| iface.parse().unwrap()).collect();
    Sought::by(UplinkChoice::of_flags(&ifaces, &[], None))
}

/// For a network of IPv4 only.
fn choose(kernel: &mut Kernel, sought: &Sought) -> Result<Uplink, UplinkError> {
    uplink::choose(kernel, sought, &[Family::V4]).map(|pick| pick.uplink)
}

#[test]
fn the_best_default_route_decides() {
    alone(|| {
        interfaces()?;
        let mut kernel = Kernel::open()?;
        let error = choose(&mut kernel, &flags(&[])).unwrap_err().to_string();
        ensure!(error.contains("there is no default route; say which interface with --iface"), "{error}");
        ensure!(error.contains("b0 [198.51.100.1/24 198.51.100.2/24") && !error.contains("lo ["), "{error}");

        sh("ip route add default via 198.51.100.254 dev b0 metric 200")?;
        sh("ip route add default via 192.0.2.254 dev a0 metric 100")?;
        sh("ip route add default via 198.51.100.254 dev b0 table 7 metric 1")?;
        let uplink = choose(&mut kernel, &flags(&[]))?;
        ensure!(uplink.link.as_str() == "a0" && uplink.mtu.bytes() == 1400, "{uplink:?}");
        // Permanent before leased, global before link-local.
        ensure!(uplink.v4 == Some("192.0.2.1/24".parse()?), "{uplink:?}");
        ensure!(uplink.v6 == Some("2001:db8::1/64".parse()?), "{uplink:?}");
        ensure!(uplink::read(&mut kernel, uplink.link, &flags(&[]), &[Family::V4])? == uplink);

        sh("ip route del default metric 100; ip route del default metric 200")?;
        sh("ip route add default nexthop via 192.0.2.254 dev a0 nexthop via 198.51.100.254 dev b0")?;
        let error = choose(&mut kernel, &flags(&[])).unwrap_err().to_string();
        ensure!(error.contains("leaves by several interfaces"), "{error}");
        Ok(())
    });
}

#[test]
fn an_interface_is_found_by_name_and_by_address() {
    alone(|| {
        interfaces()?;
        let mut kernel = Kernel::open()?;
        let b0 = choose(&mut kernel, &flags(&["nowhere", "b0"]))?;
        ensure!(b0.link.as_str() == "b0" && b0.v4 == Some("198.51.100.1/24".parse()?));
        ensure!(b0.v6.is_none(), "a link-local address is of no use to peers: {b0:?}");
        // The address that was asked for is the one that is used.
        let public = Sought { public_v4: Some("198.51.100.2".parse()?), ..flags(&[]) };
        for sought in [&flags(&["198.51.100.2"]), &public] {
            let b0 = choose(&mut kernel, sought)?;
            ensure!(b0.link.as_str() == "b0" && b0.v4 == Some("198.51.100.2/24".parse()?), "{b0:?}");
            // And it stays so when the interface is looked at again.
            ensure!(uplink::read(&mut kernel, b0.link, sought, &[Family::V4])? == b0);
        }
        let error = choose(&mut kernel, &flags(&["nowhere", "203.0.113.1"])).unwrap_err().to_string();
        let tried = "--iface nowhere: there is none of this name; --iface 203.0.113.1: no interface has this address; there are: a0 [";
        ensure!(error.contains(tried), "{error}");
        sh("ip addr flush dev b0")?;
        let error = choose(&mut kernel, &flags(&["b0"])).unwrap_err().to_string();
        ensure!(
            error.contains("--iface b0: interface b0 has no usable IPv4 address; there are: "),
            "{error}"
        );
        Ok(())
    });
}

#[test]
fn the_kernel_says_by_which_interface_an_address_is_reached() {
    alone(|| {
        interfaces()?;
        sh("ip route add 203.0.113.0/24 via 198.51.100.254 dev b0 src 198.51.100.2
            ip route add blackhole 203.0.113.9; ip route add 203.0.113.64/26 dev a0
            ip -6 route add 2001:db8:9::/48 via 2001:db8::ff dev a0")?;
        let mut kernel = Kernel::open()?;
        let toward = |address: &str| Sought::by(UplinkChoice::of_flags(&[], &[], address.parse().ok()));
        let b0 = choose(&mut kernel, &toward("203.0.113.1"))?;
        ensure!(b0.link.as_str() == "b0" && b0.v4 == Some("198.51.100.2/24".parse()?), "{b0:?}");
        ensure!(uplink::read(&mut kernel, b0.link, &toward("203.0.113.1"), &[Family::V4])? == b0);
        let a0 = choose(&mut kernel, &toward("203.0.113.65"))?;
        // What the kernel would use, whatever our own order is.
        ensure!(a0.link.as_str() == "a0" && a0.v4 == Some("169.254.3.3/16".parse()?), "{a0:?}");
        let v6 = uplink::choose(&mut kernel, &toward("2001:db8:9::1"), &Family::BOTH)?;
        ensure!(v6.uplink.link.as_str() == "a0" && v6.why == "by --iface-can-reach 2001:db8:9::1", "{v6:?}");
        ensure!(v6.uplink.v6 == Some("2001:db8::1/64".parse()?), "{v6:?}");
        for (address, reason) in [
            ("203.0.113.9", "this host has no route to it"),
            ("8.8.8.8", "this host has no route to it"),
            ("2001:db8:a::1", "this host has no route to it"),
            ("192.0.2.1", "it is this host's own address"),
        ] {
            let error = choose(&mut kernel, &toward(address)).unwrap_err().to_string();
            ensure!(
                error.contains(&format!("--iface-can-reach {address}: {reason}; there are: ")),
                "{error}"
            );
        }
        Ok(())
    });
}

#[test]
fn ipv6_has_an_uplink_of_its_own_only_where_there_is_no_ipv4() {
    alone(|| {
        interfaces()?;
        sh("ip -6 addr add 2001:db8::2/64 dev a0 nodad; ip -6 addr add 2001:db8:b::1/64 dev b0 nodad
            ip -6 route add default via 2001:db8:b::ff dev b0; ip route add default via 192.0.2.254 dev a0")?;
        let mut kernel = Kernel::open()?;
        // The kernel lists the newest first.
        let both = uplink::choose(&mut kernel, &flags(&[]), &Family::BOTH)?.uplink;
        ensure!(both.link.as_str() == "a0" && both.v6 == Some("2001:db8::2/64".parse()?), "{both:?}");
        let only = uplink::choose(&mut kernel, &flags(&[]), &[Family::V6])?.uplink;
        ensure!(only.link.as_str() == "b0" && only.v6 == Some("2001:db8:b::1/64".parse()?), "{only:?}");
        let public = Sought { public_v6: Some("2001:db8::1".parse()?), ..flags(&[]) };
        for sought in [&flags(&["2001:db8::1"]), &public] {
            let named = uplink::choose(&mut kernel, sought, &Family::BOTH)?.uplink;
            ensure!(named.link.as_str() == "a0" && named.v6 == Some("2001:db8::1/64".parse()?), "{named:?}");
            ensure!(named.v4 == Some("192.0.2.1/24".parse()?), "{named:?}");
        }
        // One address less: there is still one family to go on with.
        sh("ip -6 addr flush dev a0 scope global")?;
        let v4 = uplink::read(&mut kernel, both.link, &flags(&[]), &Family::BOTH)?;
        ensure!(v4.v4.is_some() && v4.v6.is_none(), "{v4:?}");
        let error = uplink::read(&mut kernel, both.link, &flags(&[]), &[Family::V6]).unwrap_err().to_string();
        ensure!(error == "interface a0 has no usable IPv6 address", "{error}");
        sh("ip -6 route flush default")?;
        let error = uplink::choose(&mut kernel, &flags(&[]), &[Family::V6]).unwrap_err().to_string();
        ensure!(error.contains("there is no IPv6 default route; say which interface"), "{error}");
        Ok(())
    });
}

#[test]
fn router_advertisements_are_lost_to_a_host_that_begins_to_forward() {
    alone(|| {
        sh(
            "ip link add a0 type bridge; cd /proc/sys/net/ipv6/conf; echo 1 > a0/accept_ra; echo 0 > all/forwarding",
        )?;
        let kernel = Kernel::open()?;
        let a0 = LinkName::new("a0")?;
        ensure!(kernel.loses_router_advertisements(a0)?);
        sh("echo 2 > /proc/sys/net/ipv6/conf/a0/accept_ra")?;
        ensure!(!kernel.loses_router_advertisements(a0)?);
        sh("cd /proc/sys/net/ipv6/conf; echo 1 > a0/accept_ra; echo 1 > all/forwarding")?;
        ensure!(!kernel.loses_router_advertisements(a0)?, "it does not follow them now");
        ensure!(!kernel.loses_router_advertisements(LinkName::new("nowhere")?)?);
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
