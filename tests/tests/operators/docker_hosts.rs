//! Four hosts on two LANs, Docker started with `--bip`: from the first config over udp to vxlan, without a restart of anything.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use flannel_tests::flanneld::{Flanneld, Pod, SubnetEnv, leases, put_config};
use flannel_tests::{
    Container, Host, HttpServer, Lab, blocks, eventually, http_get, in_lab, ping_within, secs,
};

const FIRST: &str = r#"{"Network":"10.100.0.0/16"}"#;
const VXLAN: &str = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"vxlan","VNI":1,"Port":8472}}"#;
const VNI_2: &str = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"vxlan","VNI":2,"Port":8472}}"#;

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/docker/mk-docker-opts.sh");

/// How long until a change in etcd is in the kernel of every host, on a machine that does many other things.
const FOLLOW: Duration = Duration::from_secs(30);

#[test]
fn the_first_guide() {
    let plan = Lab::new("docker1-4").hosts(4).two_subnets().etcd();
    in_lab(plan.needs(&["dockerd", "docker", "ethtool"]), |lab| {
        put_config(lab, FIRST)?;
        let start = |host: &Host| Flanneld::start_with(lab, host, &["-iface=eth0"]);
        let mut daemons = lab.hosts().iter().map(start).collect::<Result<Vec<_>>>()?;
        let envs = daemons.iter().map(Flanneld::ready).collect::<Result<Vec<_>>>()?;
        is_leased(lab, &daemons, &envs)?;
        is_udp(lab, &envs)?;

        // Docker on one host of each LAN.
        let engines = [(lab.host(1), &envs[0]), (lab.host(3), &envs[2])];
        for (host, env) in engines {
            starts_docker(host, env)?;
        }
        let webs = [engines[0].0.docker_run("web", &[])?, engines[1].0.docker_run("web", &[])?];
        // More than fits one packet of any backend, so that a path that became narrower shows.
        let pages = [0, 1].map(|n| format!("page of docker{n} {}", "0123456789".repeat(5000)));
        for (web, page) in webs.iter().zip(&pages) {
            HttpServer::start(web, 8000, page)?;
        }
        let served = || each_gets_the_others_page(&webs, &pages);
        eventually("web servers by udp", FOLLOW, served)?;
        ensure!(webs[0].mtu("eth0")? == 1472, "{}", webs[0].mtu("eth0")?);

        // From one bridge address to the other, as upstream's own tests ping.
        let bridges = [&envs[0], &envs[2]].map(|env| env.address(1).to_string());
        for (n, (from, to)) in [(0, 1), (1, 0)].into_iter().enumerate() {
            let ping = ["ping", "-n", "-c", "1", "-W", "1", "-I", &bridges[from], &bridges[to]];
            eventually("bridge to bridge", FOLLOW, || engines[n].0.out(&ping))?;
        }

        // What took a restart of everything, and left the old device behind.
        let states = daemons.iter().map(|daemon| daemon.daemon().log().len()).collect::<Vec<_>>();
        for (config, device, old) in [(VXLAN, "flannel.1", "flannel0"), (VNI_2, "flannel.2", "flannel.1")] {
            put_config(lab, config)?;
            for (host, env) in lab.hosts().iter().zip(&envs) {
                eventually(format!("{device} on {}", host.name()), FOLLOW, || {
                    is_vxlan(host, env, device, old)
                })?;
            }
            eventually(format!("web servers by {device}"), FOLLOW, served)?;
        }
        for (daemon, before) in daemons.iter().zip(states) {
            let log = daemon.daemon().log();
            let new = &log[before..];
            ensure!(daemon.daemon().alive() && new.lines().count() < 80, "{new}");
            ensure!(!new.contains(" ERROR "), "{new}");
        }
        behind_nat(lab, &mut daemons, &envs)?;
        guide_is_typed(lab, &daemons[0])
    });
}

/// What the guide from Go's flanneld has one look at, and how its way back ends.
fn guide_is_typed(lab: &Lab, daemon: &Flanneld) -> Result<()> {
    const GUIDE: &str = include_str!("../../../docs/guides/from-go-flanneld.md");
    let host = daemon.host();
    let endpoint = lab.etcd_endpoint();
    let typed = |says: &str| -> Result<String> {
        let lines = blocks(GUIDE, says).concat();
        ensure!(!lines.is_empty(), "the guide has no block {says:?}");
        host.run_env(&["sh", "-ec", &lines], &[("FLANNELD_ETCD_ENDPOINTS", &endpoint)])?.text()
    };
    let said = typed("sh on every host")?;
    let subnet = SubnetEnv::read(host)?.subnet();
    ensure!(
        said.contains("served by    flanneld (process ") && said.contains(&format!("* {subnet}")),
        "{said}"
    );
    daemon.daemon().stop(secs(10))?;
    typed("sh on the way back")?;
    let tables = host.out(&["nft", "list", "tables"])?;
    ensure!(!tables.contains("flannel"), "{tables}");
    Ok(())
}

/// What the guide shows of the log and of etcd.
fn is_leased(lab: &Lab, daemons: &[Flanneld], envs: &[SubnetEnv]) -> Result<()> {
    for (daemon, env) in daemons.iter().zip(envs) {
        let ip = daemon.host().ip();
        for line in [
            "Found network config - Backend type: udp".to_owned(),
            format!("Using interface with name eth0 and address {ip}"),
            format!("Defaulting external address to interface address ({ip})"),
            "Picking subnet in range 10.100.1.0 ... 10.100.255.0".to_owned(),
            format!("Allocated lease (ip: {} ipv6: ::/0) to current node ({ip}) ", env.subnet()),
            "Wrote subnet file to /run/flannel/subnet.env".to_owned(),
        ] {
            ensure!(daemon.said(&line).len() == 1, "{line:?} is not in\n{}", daemon.daemon().log());
        }
        ensure!(env.len == 24 && (1..=255).contains(&env.base().octets()[2]), "{}", env.text);
    }
    ensure!(leases(lab)?.len() == 4, "{:?}", leases(lab)?);
    Ok(())
}

fn is_udp(lab: &Lab, envs: &[SubnetEnv]) -> Result<()> {
    for (host, env) in lab.hosts().iter().zip(envs) {
        ensure!(env.mtu == 1472, "{}", env.text);
        ensure!(host.out(&["ip", "route", "show", "dev", "flannel0"])?.trim() == "10.100.0.0/16");
        for peer in envs.iter().filter(|peer| *peer != env) {
            // One hop less at either end of the tunnel.
            eventually(format!("{} reaches {}", host.name(), peer.base()), FOLLOW, || {
                let said = host.run(&["ping", "-n", "-c", "1", "-W", "1", &peer.base().to_string()])?.all();
                ensure!(said.contains("ttl=62"), "{said}");
                Ok(())
            })?;
        }
    }
    Ok(())
}

/// As its unit does: options from the subnet file.
fn starts_docker(host: &Host, env: &SubnetEnv) -> Result<()> {
    host.out(&["sh", SCRIPT, "-c", "-d", "/run/docker_opts.env"])?;
    let options = host.read("/run/docker_opts.env")?;
    let expected = format!("DOCKER_OPTS=\" --bip={} --ip-masq=true --mtu=1472\"", env.gateway());
    ensure!(options.trim() == expected, "{options}");
    let options = host.sh(". /run/docker_opts.env; echo $DOCKER_OPTS")?;
    host.start_dockerd(&options.split_whitespace().collect::<Vec<_>>())?;
    host.load_image()?;
    let address = host.out(&["ip", "-4", "-o", "addr", "show", "dev", "docker0"])?;
    ensure!(address.contains(&env.gateway()), "{address}");
    Ok(())
}

fn each_gets_the_others_page(webs: &[Container; 2], pages: &[String; 2]) -> Result<()> {
    for (from, to) in [(0, 1), (1, 0)] {
        let come = http_get(&webs[from], &format!("http://{}:8000/", webs[to].ip()?))?;
        ensure!(come == pages[to], "{} bytes came of {}", come.len(), pages[to].len());
    }
    Ok(())
}

/// The device as the guide looks at it, and nothing left of the one before.
fn is_vxlan(host: &Host, env: &SubnetEnv, device: &str, old: &str) -> Result<()> {
    let driver = host.out(&["ethtool", "-i", device])?;
    ensure!(driver.contains("driver: vxlan"), "{driver}");
    let links = host.out(&["ip", "-br", "link"])?;
    ensure!(!links.lines().any(|line| line.starts_with(&format!("{old} "))), "{links}");
    let routes = host.out(&["ip", "route"])?;
    ensure!(!routes.contains(&format!(" dev {old}")) && !routes.contains("10.100.0.0/16"), "{routes}");
    ensure!(routes.matches(&format!(" dev {device} onlink")).count() == 3, "{routes}");
    let now = SubnetEnv::read(host)?;
    ensure!(now.mtu == 1450 && now.subnet() == env.subnet(), "{}", now.text);
    Ok(())
}

/// The fourth host gets another address on its way out, one to one, as clouds do it.
fn behind_nat(lab: &Lab, daemons: &mut [Flanneld], envs: &[SubnetEnv]) -> Result<()> {
    const PUBLIC: &str = "10.77.0.204";
    let (host, router) = (lab.host(4), lab.router());
    let own = host.ip();
    router.sh(&format!(
        "ip addr add {PUBLIC}/32 dev eth0; nft 'table ip nat {{ \
           chain in {{ type nat hook prerouting priority -100; ip daddr {PUBLIC} dnat to {own}; }}; \
           chain out {{ type nat hook postrouting priority 100; oif eth0 ip saddr {own} snat to {PUBLIC}; }}; }}'"
    ))?;
    daemons[3].daemon().stop(secs(10))?;
    daemons[3] = Flanneld::start_with(lab, host, &["-iface=eth0", &format!("-public-ip={PUBLIC}")])?;
    let env = daemons[3].ready()?;
    // It is the same host.
    ensure!(env.subnet() == envs[3].subnet(), "{} became {}", envs[3].text, env.text);
    ensure!(daemons[3].said(&format!("Using {PUBLIC} as external address")).len() == 1);
    eventually("the lease says so", FOLLOW, || {
        let all = leases(lab)?;
        let value = all.get(&env.key()).context("there is no lease")?;
        ensure!(value.contains(&format!(r#""PublicIP":"{PUBLIC}""#)) && all.len() == 4, "{all:?}");
        Ok(())
    })?;
    let there = Pod::new(lab.host(2), &envs[1], 2)?;
    let here = Pod::new(host, &env, 2)?;
    ping_within(FOLLOW, &there, here.ip())?;
    ping_within(FOLLOW, &here, there.ip())
}
