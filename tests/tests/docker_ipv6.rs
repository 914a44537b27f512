//! Docker networks with IPv6, under real engines.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use flannel_tests::flanneld::{leases, put_config};
use flannel_tests::{
    Container, Daemon, Host, HttpServer, IMAGE, Lab, LabPlan, Place as _, eventually, http_get, in_lab,
    ping_within, seen_as,
};

/// How long until a lease of one host is in the kernel of the other.
const FOLLOW: Duration = Duration::from_secs(20);

const V4: &str = "10.100.0.0/16";
const V6: &str = "fd00:100::/48";
const FLANNEL: &[&str] = &["network", "create", "-d", "flannel", "--ipam-driver", "flannel"];

fn plan(name: &str, hosts: usize) -> LabPlan {
    Lab::new(name).hosts(hosts).ip_forward(false).needs(&["dockerd", "docker", "busybox"])
}

fn start_plugin(lab: &Lab, host: &Host) -> Result<Daemon> {
    let endpoints = format!("--etcd-endpoints={}", lab.etcd_endpoint());
    let daemon = host.spawn("flannel-docker-plugin", &["flannel-docker-plugin", &endpoints], &[])?;
    eventually("the plugin's socket", FOLLOW, || host.exists("/run/docker/plugins/flannel.sock"))
        .with_context(|| daemon.tail())?;
    Ok(daemon)
}

fn start_all(lab: &Lab, host: &Host) -> Result<(Daemon, Daemon)> {
    let plugin = start_plugin(lab, host)?;
    let dockerd = host.start_dockerd(&[])?;
    host.load_image()?;
    Ok((plugin, dockerd))
}

fn create(host: &Host, args: &[&str]) -> Result<String> {
    host.docker(&[FLANNEL, args].concat())
}

/// The command that a refusal names must not be.
fn refused(host: &Host, args: &[&str], said: &str) -> Result<()> {
    let output = host.try_docker(args)?;
    ensure!(!output.ok() && output.stderr.contains(said), "{args:?}: {output}\nnot: {said}");
    Ok(())
}

/// A container's IPv6 address as it has it: `fd00:100:0:7::2`.
fn v6(container: &Container) -> Result<String> {
    let said = container.out(&["ip", "-6", "-o", "addr", "show", "dev", "eth0", "scope", "global"])?;
    let address = said.split_whitespace().skip_while(|word| *word != "inet6").nth(1);
    let address = address.with_context(|| format!("no IPv6 address: {said:?}"))?;
    let (address, len) = address.split_once('/').context("no length")?;
    ensure!(len == "64", "{said}");
    Ok(address.to_owned())
}

/// `FLANNEL_IPV6_SUBNET` of a host without its last digit: `fd00:100:0:7::`
fn v6_lease(host: &Host, network: &str) -> Result<String> {
    let env = host.read(&format!("/run/flannel/{network}"))?;
    let subnet =
        env.lines().find_map(|line| line.strip_prefix("FLANNEL_IPV6_SUBNET=")).context(env.clone())?;
    Ok(subnet.strip_suffix("1/64").context(subnet.to_owned())?.to_owned())
}

fn reach(from: &Container, to: &Container) -> Result<()> {
    ping_within(FOLLOW, from, to.ip()?)?;
    ping_within(FOLLOW, from, v6(to)?)
}

#[test]
fn containers_of_two_hosts_reach_each_other_by_both_families() {
    in_lab(plan("docker-v6", 2).outside().etcd(), |lab| {
        let (h1, h2) = (lab.host(1), lab.host(2));
        let (plugin, _dockerd) = start_all(lab, h1)?;
        let _other = start_all(lab, h2)?;
        // The first host defines the network, the second one joins it by its CIDRs.
        let create_web =
            ["flannel-docker-plugin", "network", "create", "--subnet", V4, "--subnet", V6, "web"];
        h1.out(&create_web)?;
        create(h2, &["--ipv6", "--subnet", V4, "--subnet", V6, "web"])?;
        ensure!(leases(lab)?.keys().all(|key| key.contains("&fd00:100:0:")), "{:?}", leases(lab)?);
        let c1 = h1.docker_run("c1", &["--network", "web"])?;
        let c2 = h2.docker_run("c2", &["--network", "web"])?;
        for (host, container) in [(h1, &c1), (h2, &c2)] {
            let lease = v6_lease(host, "subnet.env")?;
            ensure!(v6(container)? == format!("{lease}2"), "{} is not {lease}2", v6(container)?);
            let routes = container.out(&["ip", "-6", "route"])?;
            for route in [format!("default via {lease}1 dev eth0"), format!("{V6} via {lease}1 dev eth0")] {
                ensure!(routes.contains(&route), "no {route} in {routes}");
            }
            ensure!(container.mtu("eth0")? == 1430, "MTU {}", container.mtu("eth0")?);
            let format = "{{.NetworkSettings.Networks.web.GlobalIPv6Address}}";
            let shown = host.docker(&["inspect", "-f", format, &container_name(host)])?;
            ensure!(shown == v6(container)?, "{shown}");
        }
        reach(&c1, &c2)?;
        reach(&c2, &c1)?;
        let _server = HttpServer::start_v6(&c2, 80, "hello by IPv6")?;
        ensure!(http_get(&c1, &format!("http://[{}]/", v6(&c2)?))? == "hello by IPv6");
        ensure!(http_get(h1, &format!("http://[{}]/", v6(&c2)?))? == "hello by IPv6");
        // Containers know each other by name, and what leaves has the host's address.
        let _world = HttpServer::start_v6(lab.outside(), 8086, "outside")?;
        let seen = seen_as(&c1, format!("[{}]", lab.outside().ip6()), 8086)?;
        ensure!(seen == h1.ip6().to_string(), "seen as {seen}");

        // A published port leads into the container by both families.
        let published = h2.docker_run("published", &["--network", "web", "-p", "8080:80"])?;
        let _page = HttpServer::start_v6(&published, 80, "published")?;
        for at in [h2.ip().to_string(), format!("[{}]", h2.ip6())] {
            for from in [h1, lab.outside()] {
                eventually(format!("{} finds {at}", from.name()), FOLLOW, || {
                    let page = http_get(from, &format!("http://{at}:8080/"))?;
                    ensure!(page == "published", "{page}");
                    Ok(())
                })?;
            }
        }
        // A plugin that was killed knows everything again.
        plugin.crash()?;
        let _plugin = start_plugin(lab, h1)?;
        reach(&c2, &c1)?;
        let before = v6(&c1)?;
        let c3 = h1.docker_run("c3", &["--network", "web"])?;
        ensure!(v6(&c3)? != before, "{before} twice");
        reach(&c3, &c2)?;
        h1.docker(&["rm", "-f", "c1", "c3"])?;
        ledger_is_empty(h1)?;
        h1.docker(&["network", "rm", "web"])?;
        eventually("the bridge is gone", FOLLOW, || !h1.exists("/sys/class/net/cni0"))
    });
}

fn container_name(host: &Host) -> String {
    host.name().replace('h', "c")
}

/// `--ip6`: inside this host's subnet, once.
fn fixed_addresses(host: &Host, network: &str) -> Result<()> {
    let lease = v6_lease(host, "subnet.env")?;
    let wanted = format!("{lease}beef");
    let fixed = host.docker_run("fixed", &["--network", network, "--ip6", &wanted])?;
    ensure!(v6(&fixed)? == wanted, "{} is not {wanted}", v6(&fixed)?);
    refused(
        host,
        &["run", "--rm", "--network", network, "--ip6", &wanted, IMAGE, "true"],
        &format!("{wanted} is already taken"),
    )?;
    refused(
        host,
        &["run", "--rm", "--network", network, "--ip6", &format!("{lease}1"), IMAGE, "true"],
        "gateway",
    )?;
    host.docker(&["restart", "-t", "0", "fixed"])?;
    let again = host.docker_container("fixed")?;
    ensure!(v6(&again)? == wanted, "{} is not {wanted}", v6(&again)?);
    host.docker(&["rm", "-f", "fixed"]).map(drop)
}

fn ledger_is_empty(host: &Host) -> Result<()> {
    eventually("nobody holds an address", FOLLOW, || {
        // Of a call for IPv6 that is refused, engines do not give the IPv4 address back; that is found later.
        let files = "find /var/lib/cni/networks -type f -name '*[.:]*[.:]*' ! -name 'last_*'";
        let script = format!("for f in $({files}); do grep -q docker:pending $f || echo ${{f##*/}}; done");
        let held = host.sh(&script)?;
        ensure!(held.is_empty(), "{held}");
        Ok(())
    })
}

#[test]
fn ipv6_goes_with_every_way_to_name_a_network() {
    in_lab(plan("docker-v6-ways", 1).etcd(), |lab| {
        let host = lab.host(1);
        let default = format!(
            r#"{{"Network":"{V4}","EnableIPv6":true,"IPv6Network":"{V6}","Backend":{{"Type":"vxlan"}}}}"#
        );
        put_config(lab, &default)?;
        let _daemons = start_all(lab, host)?;
        let lease = v6_lease_within(host)?;
        let run = |network: &str| -> Result<Container> {
            host.docker(&["rm", "-f", "cc"]).ok();
            host.docker_run("cc", &["--network", network])
        };

        // Nothing said of IPv6 but --ipv6; and nothing at all.
        create(host, &["--ipv6", "--subnet", V4, "auto"])?;
        ensure!(v6(&run("auto")?)?.starts_with(&lease), "{}", v6(&run("auto")?)?);
        create(host, &["--subnet", V4, "plain"])?;
        ensure!(v6(&run("plain")?).is_err(), "it has IPv6 although nobody asked");

        // Another network with its own IPv6, without a subnet for it.
        let (option, other) = ("ipv6-network=fd00:200::/48", "10.200.0.0/16");
        create(
            host,
            &["--ipv6", "--subnet", other, "--ipam-opt", option, "--ipam-opt", "network=blue", "blue"],
        )?;
        let blue = run("blue")?;
        ensure!(v6(&blue)?.starts_with("fd00:200:0:"), "{}", v6(&blue)?);
        // Networks do not reach each other.
        let c2 = host.docker_run("c2", &["--network", "auto"])?;
        let said = c2.run(&["ping", "-6", "-c", "1", "-W", "1", &v6(&blue)?])?;
        ensure!(!said.ok(), "the networks are not apart: {said}");
        host.docker(&["rm", "-f", "cc", "c2"])?;
        // A part of the subnet, and an address that is nobody's.
        let range = format!("{lease}ff00/120");
        let aux = format!("kept={lease}ff00");
        create(
            host,
            &["--ipv6", "--subnet", V4, "--subnet", V6, "--ip-range", &range, "--aux-address", &aux, "part"],
        )?;
        let c = run("part")?;
        ensure!(v6(&c)? == format!("{lease}ff01"), "{}", v6(&c)?);

        // Without an IPAM driver the driver gives both.
        host.docker(&["network", "create", "-d", "flannel", "--ipam-driver", "null", "null"])?;
        let c = run("null")?;
        ensure!(v6(&c)?.starts_with(&lease), "{}", v6(&c)?);
        host.docker(&["rm", "-f", "cc"])?;

        create(host, &["--ipv6", "--subnet", V4, "--subnet", V6, "both"])?;
        fixed_addresses(host, "both")?;
        let with = |args: &[&'static str]| [FLANNEL, &["--ipv6"], args].concat();
        for (args, said) in [
            (
                with(&["--subnet", other, "--subnet", V6, "wrong"]),
                "is not this host's IPv6 part of the same flannel network",
            ),
            (
                with(&["--subnet", "10.150.0.0/16", "--subnet", "fd00:300::/48", "wrong"]),
                "--subnet fd00:300::/48 --ipam-opt ipv6-network=fd00:300::/48 NAME",
            ),
            (
                with(&["--subnet", "10.150.0.0/16", "--ipam-opt", "ipv6-network=fd00:100:0:5::/64", "wrong"]),
                "overlaps flannel network default",
            ),
            (with(&["--subnet", "10.150.0.0/16", "wrong"]), "has no IPv6: leave --ipv6 out"),
        ] {
            refused(host, &args, said)?;
        }
        // What was defined for them is gone again.
        eventually("no network is left over", FOLLOW, || {
            let keys = lab.etcdctl(&["get", "--prefix", "--keys-only", "/coreos.com/network/"])?;
            ensure!(!keys.contains("10.150"), "{keys}");
            Ok(())
        })?;
        for network in ["auto", "plain", "blue", "part", "null", "both"] {
            host.docker(&["network", "rm", network])?;
        }
        ledger_is_empty(host)
    });
}

/// The default network's lease, once it is there.
fn v6_lease_within(host: &Host) -> Result<String> {
    eventually("subnet.env", FOLLOW, || v6_lease(host, "subnet.env"))
}
