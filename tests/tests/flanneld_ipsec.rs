//! flanneld's ipsec backend up to the packets, which a kernel without ESP cannot carry (`tests/vm/ipsec.rs` has those): what is in etcd, in
//! the kernel and in charon, who repairs what, and what is never touched.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use flannel_tests::flanneld::{Flanneld, PREFIX, SubnetEnv, leases, put_config};
use flannel_tests::{Host, Lab, eventually, in_lab, secs};

/// How long until a change is everywhere, with keys of 4096 bits on a busy machine.
const FOLLOW: Duration = Duration::from_secs(60);

/// A key as short as one may be.
fn key(digit: char) -> String {
    digit.to_string().repeat(96)
}

fn config(key: &str) -> String {
    format!(r#"{{"Network":"10.100.0.0/16","Backend":{{"Type":"ipsec","PSK":"{key}"}}}}"#)
}

/// What a host's kernel and charon should have for a peer.
fn connection(own: &SubnetEnv, host: &Host, peer: &str, ip: &str) -> String {
    format!("{}-{}-{peer}-{ip}", host.ip(), own.subnet())
}

fn policies(host: &Host) -> Result<Vec<String>> {
    let said = host.sh("ip xfrm policy | awk '/^src/ {s=$2\" \"$4} /dir/ {d=$2} /tmpl/ {t=$3\" \"$5} /reqid 11/ {print d, s, t}' | sort")?;
    Ok(said.lines().map(str::to_owned).collect())
}

/// The names that charon has for connections.
fn connections(host: &Host) -> Result<Vec<String>> {
    let said = host.out(&["timeout", "10", "swanctl", "--list-conns", "--raw"])?;
    let mut names: Vec<String> = said
        .lines()
        .filter_map(|line| Some(line.strip_prefix("list-conn event {")?.split_once(' ')?.0.to_owned()))
        .collect();
    names.sort();
    Ok(names)
}

fn holds(host: &Host, wanted: &[&str]) -> Result<()> {
    let mut wanted = wanted.to_vec();
    wanted.sort_unstable();
    eventually(format!("the connections of {}", host.name()), FOLLOW, || {
        let found = connections(host)?;
        ensure!(found == wanted, "{found:?} instead of {wanted:?}");
        Ok(())
    })
}

fn has_policies(host: &Host, peers: &[(&SubnetEnv, &str, &str)]) -> Result<()> {
    let mut wanted = Vec::new();
    for (own, subnet, ip) in peers {
        let (own, here) = (own.subnet(), host.ip());
        wanted.push(format!("in {subnet} {own} {ip} {here}"));
        wanted.push(format!("fwd {subnet} {own} {ip} {here}"));
        wanted.push(format!("out {own} {subnet} {here} {ip}"));
    }
    wanted.sort();
    eventually(format!("the policies of {}", host.name()), FOLLOW, || {
        let found = policies(host)?;
        ensure!(found == wanted, "{found:#?} instead of {wanted:#?}");
        Ok(())
    })
}

/// The two have proven to each other that they have the same key.
fn agree(host: &Host, name: &str) -> Result<()> {
    eventually(format!("{name} is established"), FOLLOW, || {
        let said = host.out(&["timeout", "10", "swanctl", "--list-sas", "--ike", name])?;
        ensure!(said.contains("ESTABLISHED") && said.contains("MODP_4096"), "{said}");
        Ok(())
    })
}

fn charon(host: &Host) -> Result<String> {
    Ok(host.read("/run/charon.pid")?.trim().to_owned())
}

/// Somebody else's business with IPsec on the same host.
fn make_others(host: &Host) -> Result<()> {
    host.sh(
        "ip xfrm policy add src 10.100.1.0/24 dst 192.0.2.0/24 dir out tmpl src 192.0.2.1 dst 192.0.2.2 proto esp reqid 11 mode tunnel
         ip xfrm policy add src 10.100.1.0/24 dst 10.100.2.0/24 dir out priority 9 tmpl src 192.0.2.1 dst 192.0.2.2 proto esp reqid 7 mode tunnel
         mkdir -p /etc/swanctl/conf.d
         echo 'connections { home { remote_addrs = 192.0.2.2
             local { auth = psk }
             remote { auth = psk }
             children { office { remote_ts = 192.0.2.0/24 } } } }' > /etc/swanctl/conf.d/home.conf",
    )?;
    Ok(())
}

fn others_are_there(host: &Host) -> Result<()> {
    let said = host.out(&["ip", "xfrm", "policy"])?;
    ensure!(said.contains("src 10.100.1.0/24 dst 192.0.2.0/24") && said.contains("reqid 7 mode"), "{said}");
    Ok(())
}

/// Without the policy outside of the network, which has our reqid: what is left of ours.
fn without_others(lines: Vec<String>) -> Vec<String> {
    lines.into_iter().filter(|line| !line.contains("192.0.2.0/24")).collect()
}

#[test]
fn charon_and_kernel_have_what_the_leases_say() {
    in_lab(Lab::new("ipsec").etcd().needs(&["swanctl"]), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        put_config(lab, &config(&key('a')))?;
        // There is no strongSwan at first.
        one.sh("mount --bind /dev/null /usr/lib/ipsec/charon")?;
        let first = Flanneld::start_with(lab, one, &["--iface", "eth0", "--v", "4"])?;
        let second = Flanneld::start(lab, two)?;
        second.ready()?;
        first.daemon().wait_log("E130", FOLLOW)?;
        ensure!(!first.said("apt-get install").is_empty(), "{}", first.daemon().tail());
        ensure!(first.health("/readyz")?.0 == 503);
        one.sh("umount /usr/lib/ipsec/charon")?;
        eventually("ready with strongSwan", FOLLOW, || {
            ensure!(first.health("/readyz")?.0 == 200);
            Ok(())
        })?;
        let envs = [SubnetEnv::read(one)?, SubnetEnv::read(two)?];
        ensure!(envs[0].mtu == 1423, "{}", envs[0].text);
        let value = format!(r#"{{"PublicIP":"{}","PublicIPv6":null,"BackendType":"ipsec"}}"#, one.ip());
        ensure!(leases(lab)?.get(&envs[0].key()) == Some(&value), "{:?}", leases(lab)?);

        let (to_one, to_two) = (
            (&envs[1], &*envs[0].subnet(), &*one.ip().to_string()),
            (&envs[0], &*envs[1].subnet(), &*two.ip().to_string()),
        );
        let names =
            [connection(to_two.0, one, to_two.1, to_two.2), connection(to_one.0, two, to_one.1, to_one.2)];
        has_policies(one, &[to_two])?;
        has_policies(two, &[to_one])?;
        holds(one, &[&names[0]])?;
        holds(two, &[&names[1]])?;
        agree(one, &names[0])?;

        // A peer comes, and another that cannot be served; somebody flushes, unloads, kills.
        let lease = |ip: &str, backend: &str| {
            format!(r#"{{"PublicIP":"{ip}","PublicIPv6":null,"BackendType":"{backend}"}}"#)
        };
        let third = format!("{PREFIX}/subnets/10.100.200.0-24");
        lab.etcdctl(&["put", &third, &lease("10.77.0.99", "ipsec")])?;
        lab.etcdctl(&["put", &format!("{PREFIX}/subnets/10.100.201.0-24"), &lease("10.77.0.98", "vxlan")])?;
        let to_third = (&envs[0], "10.100.200.0/24", "10.77.0.99");
        let name = connection(to_third.0, one, to_third.1, to_third.2);
        has_policies(one, &[to_two, to_third])?;
        holds(one, &[&names[0], &name])?;
        one.sh("ip xfrm policy flush")?;
        has_policies(one, &[to_two, to_third])?;
        // swanctl unloads what its files do not have.
        make_others(one)?;
        one.sh("timeout 10 swanctl --load-creds --clear; timeout 10 swanctl --load-conns")?;
        holds(one, &["home", &names[0], &name])?;
        let pid = charon(one)?;
        one.sh(&format!("kill -9 {pid}"))?;
        holds(one, &[&names[0], &name])?;
        ensure!(charon(one)? != pid);
        agree(one, &names[0])?;

        // charon outlives a crash, and what it prints has no reader any more; a peer leaves while nobody looks.
        let pid = charon(one)?;
        first.daemon().crash()?;
        ensure!(without_others(policies(one)?).len() == 6);
        lab.etcdctl(&["del", &third])?;
        let first = Flanneld::start_with(lab, one, &["--iface", "eth0", "--v", "4"])?;
        eventually("the policies of the one who left are gone", FOLLOW, || {
            let found = without_others(policies(one)?);
            ensure!(found.len() == 3 && !found.concat().contains("10.100.200.0"), "{found:#?}");
            Ok(())
        })?;
        holds(one, &[&names[0]])?;
        agree(one, &names[0])?;
        first.daemon().wait_log(&format!("Charon daemon runs already: process {pid}"), FOLLOW)?;
        ensure!(charon(one)? == pid, "it was {pid}");
        ensure!(first.ready()?.subnet() == envs[0].subnet());
        ensure!(!first.daemon().log().contains(&key('a')[..32]), "the key is in the log");

        // Another backend: nothing of this one is left, and everything of others.
        put_config(lab, r#"{"Network":"10.100.0.0/16","Backend":{"Type":"host-gw"}}"#)?;
        eventually("nothing is left", FOLLOW, || {
            ensure!(without_others(policies(one)?).is_empty());
            ensure!(!one.exists(&format!("/proc/{}", charon(one).unwrap_or_else(|_| "none".into()))));
            Ok(())
        })?;
        others_are_there(one)?;
        first.daemon().stop(secs(20)).map(drop)
    });
}

#[test]
fn an_operators_charon_is_used_and_left() {
    in_lab(Lab::new("ipsec-charon").etcd().needs(&["swanctl"]), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        make_others(one)?;
        let own = one.spawn("charon", &["/usr/lib/ipsec/charon"], &[])?;
        eventually("charon listens", FOLLOW, || one.sh("timeout 10 swanctl --load-conns"))?;
        let pid = charon(one)?;

        // Two hosts that each know of the other and do not have the same key.
        for (prefix, digit) in [("/a", 'a'), ("/b", 'b')] {
            lab.etcdctl(&["put", &format!("{prefix}/config"), &config(&key(digit))])?;
            for (n, other) in [(11, one), (12, two)] {
                let value =
                    format!(r#"{{"PublicIP":"{}","PublicIPv6":null,"BackendType":"ipsec"}}"#, other.ip());
                lab.etcdctl(&["put", &format!("{prefix}/subnets/10.100.{n}.0-24"), &value])?;
            }
        }
        let start =
            |host, prefix| Flanneld::start_with(lab, host, &["--iface", "eth0", "--etcd-prefix", prefix]);
        let (first, second) = (start(one, "/a")?, start(two, "/b")?);
        let env = first.ready()?;
        second.ready()?;
        let name = connection(&env, one, "10.100.12.0/24", &two.ip().to_string());
        holds(one, &["home", &name])?;
        first.daemon().wait_log("using the charon that listens", FOLLOW)?;
        let said = |flanneld: &Flanneld| -> Result<()> {
            eventually("the operator is told of the keys", FOLLOW, || {
                let lines = flanneld.said("E132");
                ensure!(
                    lines.iter().any(|line| line.contains("Backend.PSK is not the same on both hosts")),
                    "{lines:#?}"
                );
                Ok(())
            })
        };
        said(&first)?;
        said(&second)?;

        // With the same key it goes on by itself.
        lab.etcdctl(&["put", "/b/config", &config(&key('a'))])?;
        agree(one, &name)?;

        first.daemon().stop(secs(20))?;
        ensure!(own.alive() && charon(one)? == pid);
        holds(one, &["home", &name])?;
        let endpoints = format!("--etcd-endpoints={}", lab.etcd_endpoint());
        one.out(&["flanneld", &endpoints, "--etcd-prefix", "/a", "--cleanup"]).context("cleanup")?;
        holds(one, &["home"])?;
        ensure!(without_others(policies(one)?).is_empty());
        others_are_there(one)?;
        ensure!(own.alive());
        own.stop(secs(20)).map(drop)
    });
}
