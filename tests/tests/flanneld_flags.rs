//! What flanneld's flags do on a host: which interface, which address, what is left to drain nowhere; and what dockerd is
//! told of it.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::io::Read;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use flannel_tests::flanneld::{Flanneld, Pod, leases, put_config};
use flannel_tests::{Host, Lab, eventually, in_lab, ping_within, secs};

const VXLAN: &str = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"vxlan"}}"#;
const HOST_GW: &str = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"host-gw"}}"#;

/// How long a change on a host may take to be in etcd and on the other hosts, on a machine that does many other things.
const FOLLOW: Duration = Duration::from_secs(40);

/// Two more interfaces, each with two addresses.
fn interfaces(host: &Host) -> Result<()> {
    host.sh("ip link add east type bridge; ip link set east up; ip addr add 198.51.100.5/24 dev east
             ip addr add 198.51.100.6/24 dev east
             ip link add west type bridge; ip link set west up; ip addr add 203.0.113.5/24 dev west
             ip addr add 203.0.113.6/24 dev west; ip route add 192.0.2.0/24 via 203.0.113.1 src 203.0.113.6")
        .map(drop)
}

/// The address that a host's only lease names.
fn published(lab: &Lab, key: &str) -> Result<String> {
    let all = leases(lab)?;
    let value = all.get(key).with_context(|| format!("{key} is not among {all:?}"))?;
    let value: serde_json::Value = serde_json::from_str(value)?;
    Ok(value["PublicIP"].as_str().unwrap_or_default().to_owned())
}

#[test]
fn the_interface_is_the_one_that_the_flags_say() {
    /// Flags, the device below ours, its address, the address in the lease, and why.
    const CASES: &[(&[&str], [&str; 4])] = &[
        (
            &["--iface-regex", r"^198\.51\."],
            ["east", "198.51.100.5", "198.51.100.5", "by --iface-regex ^198"],
        ),
        (&["--iface-regex=0.6$"], ["east", "198.51.100.6", "198.51.100.6", "by --iface-regex 0.6$"]),
        (&["--iface-regex=^wes"], ["west", "203.0.113.5", "203.0.113.5", "by --iface-regex ^wes"]),
        (
            &["-iface=nowhere", "-iface=203.0.113.6"],
            ["west", "203.0.113.6", "203.0.113.6", "by --iface 203.0.113.6"],
        ),
        (
            &["-iface-can-reach=192.0.2.9"],
            ["west", "203.0.113.6", "203.0.113.6", "by --iface-can-reach 192.0.2.9"],
        ),
        (
            &["--public-ip=198.51.100.6"],
            ["east", "198.51.100.6", "198.51.100.6", "it has the public address"],
        ),
        (
            &["--iface=east", "--public-ip=192.0.2.1"],
            ["east", "198.51.100.5", "192.0.2.1", "by --iface east"],
        ),
    ];
    in_lab(Lab::new("iface").hosts(1).etcd(), |lab| {
        put_config(lab, VXLAN)?;
        let host = lab.host(1);
        interfaces(host)?;
        for (flags, [device, local, public, why]) in CASES {
            let daemon = Flanneld::start_with(lab, host, flags)?;
            let env = daemon.ready().with_context(|| format!("{flags:?}"))?;
            let shown = host.out(&["ip", "-d", "link", "show", "flannel.1"])?;
            ensure!(shown.contains(&format!("local {local} dev {device} ")), "{flags:?}: {shown}");
            let lease = published(lab, &env.key())?;
            ensure!(lease == *public, "{flags:?}: the lease names {lease}");
            let chosen = format!("Using interface with name {device}: {why}");
            ensure!(
                daemon.said(&chosen).len() == 1,
                "{flags:?}: {chosen:?} is not in\n{}",
                daemon.daemon().log()
            );
            ensure!(daemon.said("there are: ")[0].contains("west [203.0.113.5/24 203.0.113.6/24"));
            if flags.contains(&"-iface=nowhere") {
                let passed =
                    daemon.said("Could not find valid interface matching --iface nowhere: there is none");
                ensure!(passed.len() == 1, "{passed:?}");
            }
            daemon.daemon().stop(secs(10))?;
        }
        Ok(())
    });
}

#[test]
fn an_interface_that_is_missing_is_waited_for_and_what_was_tried_is_said() {
    in_lab(Lab::new("iface-none").hosts(1).etcd(), |lab| {
        put_config(lab, VXLAN)?;
        let host = lab.host(1);
        host.sh("ip route add blackhole 192.0.2.0/24")?;
        let flags = ["--iface=late0", "--iface-regex=^192\\.0\\.2\\.", "--iface-can-reach=192.0.2.9"];
        let daemon = Flanneld::start_with(lab, host, &flags)?;
        daemon.daemon().wait_log("no interface fits", secs(10))?;
        let line = daemon.said("no interface fits").remove(0);
        for part in [
            "--iface late0: there is none of this name",
            "--iface-regex ^192\\.0\\.2\\.: it matches no interface's address or name",
            "--iface-can-reach 192.0.2.9: this host has no route to it",
            "there are: eth0 [",
        ] {
            ensure!(line.contains(part), "{part:?} is not in {line}");
        }
        host.sh(
            "ip link add late0 type bridge; ip addr add 198.51.100.7/24 dev late0; ip link set late0 up",
        )?;
        let env = daemon.ready()?;
        ensure!(published(lab, &env.key())? == "198.51.100.7");
        ensure!(daemon.said("no interface fits").len() == 1, "{}", daemon.daemon().log());
        Ok(())
    });
}

#[test]
fn an_address_that_changes_is_published_in_the_same_lease() {
    for (name, config) in [("moves-vxlan", VXLAN), ("moves-gw", HOST_GW)] {
        in_lab(Lab::new(name).hosts(2).etcd(), |lab| {
            put_config(lab, config)?;
            let daemons = Flanneld::start_all(lab)?;
            let (env1, env2) = (daemons[0].ready()?, daemons[1].ready()?);
            let (h1, h2) = (lab.host(1), lab.host(2));
            let pods = [Pod::new(h1, &env1, 2)?, Pod::new(h2, &env2, 2)?];
            ping_within(FOLLOW, &pods[0], pods[1].ip())?;
            let before = leases(lab)?;
            let old = h1.ip();
            // A free address of the same link.
            let octets = old.octets();
            let new = std::net::Ipv4Addr::new(octets[0], octets[1], octets[2], 201);
            let lines = h1.out(&["ip", "-4", "-o", "addr", "show", "dev", "eth0"])?;
            let len = lines.split_whitespace().find_map(|word| word.strip_prefix(&format!("{old}/")));
            let len = len.with_context(|| format!("{old} is not in {lines}"))?;
            h1.sh(&format!("ip addr del {old}/{len} dev eth0; ip addr add {new}/{len} dev eth0"))?;
            eventually("the lease names the new address", FOLLOW, || {
                let now = published(lab, &env1.key())?;
                ensure!(now == new.to_string(), "{now}");
                Ok(())
            })
            .with_context(|| daemons[0].daemon().tail())?;
            ensure!(leases(lab)?.keys().eq(before.keys()), "{:?}", leases(lab)?);
            ping_within(FOLLOW, &pods[0], pods[1].ip())?;
            ping_within(FOLLOW, &pods[1], pods[0].ip())?;
            // Nothing of the old address is left on the other host.
            eventually("the other host has forgotten the old address", FOLLOW, || {
                let state = h2.sh("ip route; bridge fdb show")?;
                ensure!(!state.contains(&format!("{old} ")) && state.contains(&new.to_string()), "{state}");
                Ok(())
            })?;
            ensure!(daemons[0].ready()? == env1, "the subnet is the same");
            Ok(())
        });
    }
}

#[test]
fn containers_addresses_are_never_the_uplinks() {
    in_lab(Lab::new("not-ours").hosts(1).etcd(), |lab| {
        put_config(lab, VXLAN)?;
        let host = lab.host(1);
        // It fits what containers have, too.
        let daemon = Flanneld::start_with(lab, host, &["--iface-regex=^10\\."])?;
        let env = daemon.ready()?;
        Pod::new(host, &env, 2)?;
        let ip = host.ip().to_string();
        host.sh(&format!("ip addr del {ip}/24 dev eth0"))?;
        daemon.daemon().wait_log("E113", FOLLOW)?;
        host.sh(&format!("ip addr add {ip}/24 dev eth0"))?;
        daemon.daemon().wait_log("not waiting any more", FOLLOW)?;
        let others =
            daemon.said("Using interface with name").into_iter().filter(|line| !line.contains("name eth0"));
        ensure!(others.count() == 0, "{:#?}", daemon.said("Using interface"));
        ensure!(published(lab, &env.key())? == ip, "{:?}", leases(lab)?);
        let shown = host.out(&["ip", "-d", "link", "show", "flannel.1"])?;
        ensure!(shown.contains(&format!("local {ip} dev eth0 ")), "{shown}");
        Ok(())
    });
}

#[test]
fn what_nothing_takes_leads_nowhere() {
    in_lab(Lab::new("blackhole").hosts(1).etcd(), |lab| {
        put_config(lab, VXLAN)?;
        let host = lab.host(1);
        // What Go's flanneld left here, for a subnet that we may get.
        host.sh("ip route add blackhole 10.100.77.0/24")?;
        let daemon = Flanneld::start_with(lab, host, &["--iface=eth0", "--ip-blackhole-route"])?;
        let env = daemon.ready()?;
        let line = format!("blackhole {} proto 70 metric 65535", env.subnet());
        let shown = || host.out(&["ip", "route", "show", "type", "blackhole"]);
        ensure!(shown()?.contains(&line), "{}", shown()?);
        host.sh(&format!("ip route del blackhole {} metric 65535", env.subnet()))?;
        eventually("it is back", secs(5), || {
            ensure!(shown()?.contains(&line), "{}", shown()?);
            Ok(())
        })?;
        ensure!(daemon.repaired()?.get("blackhole") == Some(&1), "{:?}", daemon.repaired()?);
        daemon.daemon().stop(secs(10))?;
        let daemon = Flanneld::start_with(lab, host, &["--iface=eth0"])?;
        daemon.ready()?;
        eventually("it goes with the flag, and only it", secs(5), || {
            ensure!(!shown()?.contains(&line) && shown()?.contains("10.100.77.0/24"), "{}", shown()?);
            Ok(())
        })
    });
}

#[test]
fn rules_come_back_after_whoever_flushes_them() {
    const ACCEPTS: &str = "-A FLANNEL-FWD -s 10.100.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT\n\
        -A FLANNEL-FWD -d 10.100.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT";
    const JUMP: &str = "-A FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD\n";
    let plan = Lab::new("flushed").hosts(1).etcd();
    in_lab(plan.needs(&["iptables-nft", "iptables-legacy", "nft"]), |lab| {
        put_config(lab, VXLAN)?;
        let host = lab.host(1);
        // As Docker has it, in either variant.
        host.sh("iptables-nft -P FORWARD DROP; iptables-legacy -P FORWARD DROP")?;
        let daemon = Flanneld::start_with(lab, host, &["--iface=eth0", "--ip-masq", "--iptables-resync=2"])?;
        daemon.ready()?;
        let complete = |variant: &str| {
            let rules = host.out(&[variant, "-S"])?;
            let all = ["-P FORWARD DROP\n", JUMP, ACCEPTS];
            ensure!(all.iter().all(|line| rules.contains(line)), "{variant}: {rules}");
            Ok(())
        };
        // The older tables say nothing when they change: there it takes until the next look.
        for (variant, patience) in [("iptables-nft", secs(5)), ("iptables-legacy", secs(12))] {
            eventually(format!("{variant} accepts"), patience, || complete(variant))?;
            for flush in ["-F", "-F FORWARD", "-F FLANNEL-FWD"] {
                host.sh(&format!("{variant} {flush}"))?;
                eventually(format!("back after {variant} {flush}"), patience, || complete(variant))?;
            }
        }
        let nat = || host.out(&["iptables", "-t", "nat", "-S"]);
        let before = nat()?;
        ensure!(before.matches("MASQUERADE --random-fully").count() == 2, "{before}");
        host.sh("nft flush ruleset")?;
        eventually("our chain is back", secs(5), || {
            ensure!(nat()? == before, "{}", nat()?);
            Ok(())
        })?;
        host.sh("iptables-nft -P FORWARD DROP")?;
        eventually("Docker's chain accepts again", secs(5), || complete("iptables-nft"))?;

        daemon.daemon().stop(secs(10))?;
        let flags =
            ["--iface=eth0", "--ip-masq", "--ip-masq-fully-random-disable", "--iptables-forward-rules=false"];
        Flanneld::start_with(lab, host, &flags)?.ready()?;
        eventually("source ports are kept and nothing is accepted", secs(5), || {
            let (nat, rules) = (nat()?, host.sh("iptables-nft -S; iptables-legacy -S")?);
            ensure!(nat.contains("MASQUERADE") && !nat.contains("random"), "{nat}");
            ensure!(!rules.contains("FLANNEL-FWD"), "{rules}");
            Ok(())
        })
    });
}

#[test]
fn etcd_that_stays_away_is_said_again_after_a_minute() {
    in_lab(Lab::new("etcd-reminder").hosts(1).etcd(), |lab| {
        put_config(lab, VXLAN)?;
        lab.etcd_stop()?;
        let daemon = Flanneld::start(lab, lab.host(1))?;
        let first = daemon.daemon().wait_log("E112", secs(20))?;
        ensure!(first < secs(20), "{first:?}");
        eventually("it is said twice", secs(100), || {
            ensure!(daemon.said("E112").len() >= 2, "{:#?}", daemon.said("E112"));
            Ok(())
        })?;
        ensure!(daemon.said("E112").len() == 2, "{:#?}", daemon.said("E112"));
        // It does not wait for an answer that does not come.
        daemon.daemon().stop(secs(3))?;
        Ok(())
    });
}

#[test]
fn flanneld_says_how_it_stands() {
    in_lab(Lab::new("errands").hosts(2).etcd().needs(&["setpriv"]), |lab| {
        put_config(lab, VXLAN)?;
        let (h1, h2) = (lab.host(1), lab.host(2));
        let etcd = format!("--etcd-endpoints={}", lab.etcd_endpoint());
        let ask = |errand: &[&str]| h1.run(&[&["flanneld", etcd.as_str()], errand].concat());
        let nobody = ask(&["status"])?;
        ensure!(!nobody.ok() && nobody.all().contains("nobody"), "{nobody}");
        ensure!(!h1.exists("/run/flannel"), "who only asks leaves a trace");
        let daemons = Flanneld::start_all(lab)?;
        let (env1, env2) = (daemons[0].ready()?, daemons[1].ready()?);
        eventually("each knows the other", FOLLOW, || {
            let status = ask(&["status"])?;
            let text = status.all();
            ensure!(
                status.ok() && text.contains("served by    flanneld (process ") && text.contains("MTU 1450"),
                "{text}"
            );
            ensure!(text.contains("network      10.100.0.0/16 (vxlan)"), "{text}");
            ensure!(
                text.contains(&format!("lease        {} as {}; other leases: 1", env1.subnet(), h1.ip())),
                "{text}"
            );
            Ok(())
        })?;
        // Everybody may ask.
        let unprivileged = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "flanneld", &etcd];
        for (errand, part) in
            [("status", "served by    flanneld (process "), ("leases", &format!("* {}", env1.subnet()))]
        {
            let told = h1.run(&[&unprivileged[..], &[errand]].concat())?;
            ensure!(told.ok() && told.all().contains(part), "{errand}: {told}");
        }
        let refused = h1.run(&[&unprivileged[..], &["plan"]].concat())?;
        ensure!(
            !refused.ok() && refused.all().contains("last.json is not used: Permission denied"),
            "{refused}"
        );
        let leases = ask(&["leases"])?;
        let text = leases.all();
        ensure!(leases.ok() && text.contains(&format!("* {}", env1.subnet())), "{text}");
        ensure!(
            text.contains(&format!("  {}", env2.subnet())) && text.contains(&h2.ip().to_string()),
            "{text}"
        );
        let there = env2.address(7).to_string();
        let explained = ask(&["explain", &there])?;
        let text = explained.all();
        for part in [
            format!("{there} is in {}, which {} has (vxlan)", env2.subnet(), h2.ip()),
            format!("  ip route replace {} via {} dev flannel.1", env2.subnet(), env2.base()),
            format!(" dst {} self permanent", h2.ip()),
            format!("add element inet flannel_tunnel hosts {{ {} }}", h2.ip()),
            "this host sends it by flannel.1 from ".to_owned(),
        ] {
            ensure!(explained.ok() && text.contains(&part), "{part:?} is not in {text}");
        }
        let outside = ask(&["explain", "192.0.2.1"])?;
        ensure!(!outside.ok() && outside.all().contains("192.0.2.1 is not in the network"), "{outside}");
        let stranger = "no lease names it: what it sends into the tunnel is dropped";
        ensure!(outside.all().contains(stranger), "{outside}");
        let holder = ask(&["explain", &h2.ip().to_string()])?;
        ensure!(holder.all().contains("the tunnel takes packets from it"), "{holder}");
        let quiet = h1.run(&["flanneld", &etcd, "--iface=eth0", "--ip-masq", "plan"])?;
        ensure!(quiet.ok() && quiet.all().contains("nothing to do"), "{quiet}");
        daemons[0].daemon().stop(secs(10))?;
        h1.sh("ip route flush dev flannel.1")?;
        let drift = h1.run(&["flanneld", &etcd, "--iface=eth0", "--ip-masq", "plan"])?;
        let line = format!("+ ip route replace {} via {} dev flannel.1 onlink", env2.subnet(), env2.base());
        // The guard of the tunnel went with flanneld.
        let said = drift.all();
        let routes: Vec<_> = said.lines().filter(|line| line.contains("route")).collect();
        ensure!(!drift.ok() && routes == [line] && said.contains("flannel_tunnel"), "{drift}");
        ensure!(h1.out(&["ip", "route", "show", "dev", "flannel.1"])?.is_empty(), "a plan changes nothing");
        // Without the store: what was known last, and that it is so.
        lab.etcd_stop()?;
        let leases = ask(&["leases"])?;
        ensure!(
            leases.all().contains("this is what was known last") && leases.all().contains(&env2.subnet()),
            "{leases}"
        );
        Ok(())
    });
}

// ---- what dockerd is told ----

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/docker/mk-docker-opts.sh");
const WRITTEN: &str =
    "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.74.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n";

/// Status and output file of the script.
fn mk_docker_opts(
    dir: &Path,
    written: &str,
    flags: &[&str],
    env: &[(&str, &str)],
) -> (Option<i32>, String, String) {
    let (from, to) = (dir.join("subnet.env"), dir.join("docker_opts.env"));
    std::fs::write(&from, written).unwrap();
    let _ = std::fs::remove_file(&to);
    let output = Command::new("sh")
        .arg(SCRIPT)
        .arg("-f")
        .arg(&from)
        .arg("-d")
        .arg(&to)
        .args(flags)
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .envs(env.iter().copied())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.code(), std::fs::read_to_string(&to).unwrap_or_default(), said)
}

#[test]
fn dockerd_gets_the_options_that_upstreams_script_makes() {
    let dir = tempfile::tempdir().unwrap();
    let run = |flags: &[&str], env: &[(&str, &str)]| mk_docker_opts(dir.path(), WRITTEN, flags, env);
    let each = "DOCKER_OPT_BIP=\"--bip=10.1.74.1/24\"\nDOCKER_OPT_IPMASQ=\"--ip-masq=true\"\nDOCKER_OPT_MTU=\"--mtu=1472\"\n";
    let all = "\" --bip=10.1.74.1/24 --ip-masq=true --mtu=1472\"\n";
    for (flags, expected) in [
        (&[][..], format!("{each}DOCKER_OPTS={all}")),
        (&["-i"], each.to_owned()),
        (&["-c"], format!("DOCKER_OPTS={all}")),
        (&["-c", "-k", "NETWORK_OPTS"], format!("NETWORK_OPTS={all}")),
        (&["-i", "-c"], format!("{each}DOCKER_OPTS={all}")),
        (&["-m", "-c"], "DOCKER_OPTS=\" --bip=10.1.74.1/24 --mtu=1472\"\n".to_owned()),
    ] {
        let (status, text, said) = run(flags, &[]);
        assert_eq!((status, text.as_str()), (Some(0), expected.as_str()), "{flags:?}: {said}");
    }
    let inherited = [("DOCKER_OPTS", "--debug"), ("DOCKER_OPT_DNS", "--dns 192.0.2.53")];
    let (status, text, _) = run(&["-c"], &inherited);
    let expected = "DOCKER_OPTS=\"--debug  --bip=10.1.74.1/24 --dns 192.0.2.53 --ip-masq=true --mtu=1472\"\n";
    assert_eq!((status, text.as_str()), (Some(0), expected));
    for wrong in [&["-h"][..], &["-x"], &["-?"], &["-k", "A B"], &["-c", "surplus"]] {
        let (status, text, said) = run(wrong, &[]);
        assert_eq!((status, text.as_str()), (Some(1), ""), "{wrong:?}: {said}");
    }
    let masquerading = WRITTEN.replace("IPMASQ=false", "IPMASQ='true'");
    let (_, text, _) = mk_docker_opts(dir.path(), &masquerading, &["-i"], &[]);
    assert!(text.contains("DOCKER_OPT_IPMASQ=\"--ip-masq=false\""), "{text}");
    let wrong = WRITTEN.replace("IPMASQ=false", "IPMASQ=$(touch /tmp/x)");
    let (status, text, said) = mk_docker_opts(dir.path(), &wrong, &[], &[]);
    assert_eq!((status, text.as_str()), (Some(1), ""), "{said}");
    assert!(said.contains("Invalid value of FLANNEL_IPMASQ"), "{said}");
    let (status, text, _) = mk_docker_opts(dir.path(), "", &[], &[]);
    assert_eq!((status, text.as_str()), (Some(0), "DOCKER_OPTS=\"\"\n"), "no subnet file is no error");
    // A device, or a link, is written into: it is still there afterwards.
    let (link, file) = (dir.path().join("link"), dir.path().join("elsewhere"));
    std::fs::write(&file, "old\n").unwrap();
    std::os::unix::fs::symlink(&file, &link).unwrap();
    let (status, _, said) = run(&["-c", "-d", link.to_str().unwrap()], &[]);
    assert!(status == Some(0) && link.is_symlink(), "{said}");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), format!("DOCKER_OPTS={all}"));
    let pipe = dir.path().join("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let mut open = std::fs::OpenOptions::new().read(true).write(true).open(&pipe).unwrap();
    let (status, _, said) = run(&["-c", "-d", pipe.to_str().unwrap()], &[]);
    let is_pipe = std::fs::metadata(&pipe).unwrap().file_type().is_fifo();
    assert!(status == Some(0) && is_pipe, "{said}");
    let mut text = [0; 200];
    let length = open.read(&mut text).unwrap();
    assert_eq!(text[..length], *format!("DOCKER_OPTS={all}").as_bytes());
}
