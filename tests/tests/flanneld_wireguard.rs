//! flanneld's wireguard backend on hosts whose kernel has none (`vm/wireguard.rs` has those with one): what it leaves in etcd and the kernel, what it carries, who comes
//! and goes, and what becomes of all that over restarts.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use flannel_tests::flanneld::{Flanneld, PREFIX, Pod, SUBNET_FILE, SubnetEnv, leases, put_config};
use flannel_tests::{
    Host, HttpServer, Lab, PingStream, Place, Signal, eventually, http_get, in_lab, largest_packet, needs,
    ping, ping_within, secs, unchanged, vm,
};

/// How long until a change is everywhere, on a busy machine.
const FOLLOW: Duration = Duration::from_secs(30);

/// 32 bytes each.
const SHARED: &str = "UFNLUFNLUFNLUFNLUFNLUFNLUFNLUFNLUFNLUFNLUFM=";
const OTHER: &str = "b3RoZXJvdGhlcm90aGVyb3RoZXJvdGhlcm90aGVyb3Q=";

const KEY: &str = "/var/lib/flannel/default/wireguard.key";

fn config(psk: &str) -> String {
    format!(r#"{{"Network":"10.100.0.0/16","Backend":{{"Type":"wireguard","PSK":"{psk}"}}}}"#)
}

fn dual(options: &str) -> String {
    format!(
        r#"{{"Network":"10.100.0.0/16","EnableIPv6":true,"IPv6Network":"fd42:cafe::/48","Backend":{{"Type":"wireguard"{options}}}}}"#
    )
}

/// The test is of what goes on without the kernel's.
fn needs_userspace() -> bool {
    !needs::has(needs::WIREGUARD) || needs::skipped("a kernel without WireGuard")
}

fn pods(lab: &Lab) -> Result<Vec<Pod>> {
    lab.hosts().iter().map(|host| Pod::new(host, &SubnetEnv::read(host)?, 2)).collect()
}

fn reach_each_other(pods: &[Pod]) -> Result<()> {
    for from in pods {
        for to in pods.iter().filter(|to| to.ip() != from.ip()) {
            ping_within(FOLLOW, from, to.ip())?;
        }
    }
    Ok(())
}

/// What ping prints, whether or not anybody answers.
fn pinged(from: &dyn Place, flags: &[&str], to: Ipv4Addr) -> Result<String> {
    let to = to.to_string();
    let said = from.run(&[&["ping", "-n", "-c", "1", "-W", "2"], flags, &[&to]].concat())?;
    Ok(format!("{}{}", said.stdout, said.stderr))
}

/// Large TCP segments, byte for byte.
fn carries_text(from: &Pod, to: &Pod) -> Result<()> {
    let text: String = (0..400_000u32).map(|n| format!("{n:x}.")).collect();
    let server = HttpServer::start(to, 8000, &text)?;
    let come = eventually("the text arrives", FOLLOW, || {
        http_get(from, format!("http://{}:8000/", to.ip()).as_str())
    })?;
    ensure!(come == text, "{} bytes came of {}", come.len(), text.len());
    server.stop()
}

/// The value of a host's lease, but for its key.
fn lease_of(lab: &Lab, host: &Host) -> Result<String> {
    let key = SubnetEnv::read(host)?.key();
    leases(lab)?.remove(&key).with_context(|| format!("no lease {key}"))
}

fn is_as_upstream_has_it(lab: &Lab, daemon: &Flanneld) -> Result<()> {
    let (host, env) = (daemon.host(), SubnetEnv::read(daemon.host())?);
    ensure!(env.mtu == 1420, "{}", env.text);
    let value = lease_of(lab, host)?;
    let start = format!(
        r#"{{"PublicIP":"{}","PublicIPv6":null,"BackendType":"wireguard","BackendData":{{"PublicKey":""#,
        host.ip()
    );
    let rest = value.strip_prefix(&start).with_context(|| value.clone())?;
    ensure!(
        rest.len() == 44 + r#"","Port":51820}}"#.len() && rest.ends_with(r#"=","Port":51820}}"#),
        "{value}"
    );
    let link = host.out(&["ip", "-d", "link", "show", "flannel-wg"])?;
    ensure!(link.contains(" mtu 1420 ") && link.contains(",UP,LOWER_UP>"), "{link}");
    let address = host.out(&["ip", "-4", "-br", "addr", "show", "dev", "flannel-wg"])?;
    ensure!(address.contains(&format!(" {}/32", env.base())), "{address}");
    let routes = host.out(&["ip", "route", "show", "dev", "flannel-wg"])?;
    ensure!(routes.trim() == "10.100.0.0/16 scope link", "{routes}");
    let mode = host.out(&["stat", "-c", "%a", KEY])?;
    ensure!(mode.trim() == "400", "{mode}");
    ensure!(daemon.said("this kernel has no WireGuard").len() == 1, "{}", daemon.daemon().tail());
    Ok(())
}

/// Neither the key nor what is shared, in any log.
fn keeps_its_secrets(daemon: &Flanneld) -> Result<()> {
    let (log, key) = (daemon.daemon().log(), daemon.host().read(KEY)?);
    for secret in [key.trim(), SHARED, OTHER] {
        ensure!(!log.contains(&secret[..20]), "a secret is in the log of {}", daemon.host().name());
    }
    Ok(())
}

#[test]
fn wireguard_without_the_kernels_is_as_flannel_has_it() {
    if !needs_userspace() {
        return;
    }
    in_lab(Lab::new("wg").hosts(3).etcd(), |lab| {
        put_config(lab, &config(SHARED))?;
        // Who is silent is seen when the kernel is looked at, and told when it is looked at again.
        let often = ["--iface", "eth0", "--ip-masq", "--iptables-resync=4"];
        let start = |n: usize| Flanneld::start_with(lab, lab.host(n), &often);
        let mut daemons = vec![start(1)?, start(2)?];
        daemons.iter().try_for_each(|daemon| daemon.ready().map(|_| ()))?;
        // Who joins is reached.
        daemons.push(start(3)?);
        daemons[2].ready()?;
        let pods = pods(lab)?;
        reach_each_other(&pods)?;
        for daemon in &daemons {
            is_as_upstream_has_it(lab, daemon)?;
        }

        let said = pinged(&pods[0], &["-M", "do", "-s", "1393"], pods[1].ip())?;
        ensure!(said.contains("Frag needed and DF set (mtu = 1420)"), "{said}");
        eventually("1420 bytes pass, and no more", FOLLOW, || {
            let largest = largest_packet(&pods[0], pods[1].ip())?;
            ensure!(largest == 1420, "{largest} bytes");
            Ok(())
        })?;
        let said = pinged(&pods[0], &["-M", "dont", "-s", "20000"], pods[1].ip())?;
        ensure!(said.contains(" 0% packet loss"), "{said}");
        carries_text(&pods[0], &pods[1])?;
        carries_text(&pods[2], &pods[0])?;
        let base = SubnetEnv::read(lab.host(1))?.base();
        let said = pinged(&pods[0], &[], Ipv4Addr::new(10, 100, 0, 9))?;
        ensure!(said.contains(&format!("From {base} icmp_seq=1 Destination Net Unreachable")), "{said}");

        comes_back(lab, &mut daemons, &pods, || start(1))?;
        is_repaired(lab.host(1), &pods)?;
        leaves(lab, &daemons[2], &pods)?;
        daemons[2] = start(3)?;
        daemons[2].ready()?;
        reach_each_other(&pods)?;
        hears_of_another_psk(lab, &daemons, &pods)?;
        for daemon in &daemons {
            keeps_its_secrets(daemon)?;
            ensure!(daemon.said(" ERROR ").is_empty(), "{}", daemon.daemon().tail());
        }
        Ok(())
    });
}

/// The device goes with the process; key, lease and packets are back with the next one.
fn comes_back(
    lab: &Lab,
    daemons: &mut [Flanneld],
    pods: &[Pod],
    start: impl Fn() -> Result<Flanneld>,
) -> Result<()> {
    let (host, held, key) = (lab.host(1), leases(lab)?, lab.host(1).read(KEY)?);
    for signal in [Signal::SIGKILL, Signal::SIGTERM] {
        daemons[0].daemon().kill(signal)?;
        daemons[0].daemon().wait(secs(10))?;
        ensure!(!host.exists("/sys/class/net/flannel-wg"), "flannel-wg is left after {signal}");
        // Only the other side sends: it has a session that this one knows nothing of.
        let stream = PingStream::start(&pods[1], pods[0].ip(), Duration::from_millis(50))?;
        daemons[0] = start()?;
        daemons[0].ready()?;
        let ready = Instant::now();
        ping_within(FOLLOW, &pods[1], pods[0].ip())?;
        let took = ready.elapsed();
        // Without being greeted the other side would notice after 15 s.
        ensure!(took < secs(8), "{took:?} after it was ready, after {signal}");
        stream.stop()?;
        reach_each_other(pods)?;
    }
    ensure!(leases(lab)? == held && host.read(KEY)? == key, "{held:?} became {:?}", leases(lab)?);
    Ok(())
}

/// Somebody removes the device, its address, its route; sets it down.
fn is_repaired(host: &Host, pods: &[Pod]) -> Result<()> {
    let state = || host.sh("ip -4 -o addr | sed 's/^[0-9]*//'; ip -4 route");
    let before = state()?;
    for harm in [
        "ip link del flannel-wg",
        "ip addr flush dev flannel-wg",
        "ip route flush dev flannel-wg",
        "ip link set flannel-wg down",
    ] {
        host.sh(harm)?;
        ping_within(FOLLOW, &pods[0], pods[1].ip()).context(harm)?;
        ping_within(FOLLOW, &pods[1], pods[0].ip()).context(harm)?;
    }
    eventually("everything is as it was", FOLLOW, || unchanged("the host", &before, &state()?))
}

/// Gone from the store: nobody's.
fn leaves(lab: &Lab, third: &Flanneld, pods: &[Pod]) -> Result<()> {
    let key = SubnetEnv::read(third.host())?.key();
    third.daemon().crash()?;
    lab.etcdctl(&["del", &format!("{PREFIX}/subnets/{key}")])?;
    eventually("the third one is nobody's", FOLLOW, || {
        let said = pinged(&pods[0], &[], pods[2].ip())?;
        ensure!(said.contains("Destination Net Unreachable"), "{said}");
        Ok(())
    })?;
    ping(&pods[0], pods[1].ip())
}

/// A host that does not hear of another PSK is silent, and that is said.
fn hears_of_another_psk(lab: &Lab, daemons: &[Flanneld], pods: &[Pod]) -> Result<()> {
    let third = lab.host(3);
    let etcd = lab.etcd_endpoint();
    let etcd = etcd.trim_start_matches("http://").split(':').next().unwrap_or_default();
    let cut = |verb: &str| {
        third.sh(&format!(
            "iptables -{verb} INPUT -s {etcd} -p tcp -j DROP; \
             iptables -{verb} OUTPUT -d {etcd} -p tcp -j REJECT --reject-with tcp-reset"
        ))
    };
    cut("I")?;
    put_config(lab, &config(OTHER))?;
    eventually("the two who heard of it have it", FOLLOW, || {
        ensure!(ping(&pods[0], pods[2].ip()).is_err(), "the third is reached with another PSK");
        ping(&pods[0], pods[1].ip())
    })?;
    eventually("it is said", FOLLOW, || {
        let _ = ping(&pods[0], pods[2].ip());
        let env = SubnetEnv::read(third)?;
        let said = daemons[0].said("E136");
        ensure!(said.iter().any(|line| line.contains(&env.subnet())), "{said:?}");
        Ok(())
    })?;
    cut("D")?;
    reach_each_other(pods)?;
    eventually("it is over", FOLLOW, || !daemons[0].said("over: E136").is_empty())
}

#[test]
fn on_debians_kernel() {
    vm::again(&["wireguard_carries_both_families_in_every_mode"], secs(900));
}

/// With the kernel's or without, whatever the machine has.
#[test]
fn wireguard_carries_both_families_in_every_mode() {
    in_lab(Lab::new("wg-dual").etcd(), |lab| {
        put_config(lab, &dual(""))?;
        let daemons = Flanneld::start_all(lab)?;
        let v6_base = |host: &Host| -> Result<String> {
            let text = host.read(SUBNET_FILE)?;
            let line = text.lines().find_map(|line| line.strip_prefix("FLANNEL_IPV6_SUBNET="));
            let gateway = line.and_then(|line| line.strip_suffix("1/64")).context("no IPv6 subnet")?;
            Ok(gateway.to_owned())
        };
        let reach = |what: &str, v4: bool| -> Result<()> {
            let (one, two) = (lab.host(1), lab.host(2));
            for (from, to) in [(one, two), (two, one)] {
                if v4 {
                    ping_within(FOLLOW, from, SubnetEnv::read(to)?.base()).context(what.to_owned())?;
                }
                // IPv6 alone is another lease, with another subnet.
                eventually(format!("{what}: IPv6"), FOLLOW, || ping(from, v6_base(to)?))?;
            }
            Ok(())
        };
        reach("separate", true)?;
        for host in lab.hosts() {
            ensure!(host.exists("/sys/class/net/flannel-wg") && host.exists("/sys/class/net/flannel-wg-v6"));
            let value = lease_of_both(lab, host)?;
            ensure!(value.contains(r#","Port":51820},"BackendV6Data":{"#), "{value}");
            ensure!(value.ends_with(r#","Port":51821}}"#), "{value}");
        }
        for (n, mode) in ["auto", "ipv6", "ipv4"].into_iter().enumerate() {
            put_config(lab, &dual(&format!(r#","Mode":"{mode}""#)))?;
            for daemon in &daemons {
                eventually("it is heard of", FOLLOW, || daemon.said("Found network config").len() == n + 2)?;
            }
            for host in lab.hosts() {
                eventually("one device is left", FOLLOW, || {
                    ensure!(!host.exists("/sys/class/net/flannel-wg-v6"), "flannel-wg-v6 is there");
                    // Both families name the port where that one listens.
                    let value = lease_of_both(lab, host)?;
                    ensure!(value.matches(r#""Port":51820}"#).count() == 2, "{value}");
                    Ok(())
                })?;
            }
            reach(mode, true)?;
        }
        // Whoever has two devices again first meets hosts that still have one.
        put_config(lab, &dual(""))?;
        for host in lab.hosts() {
            eventually("two devices again", FOLLOW, || {
                let value = lease_of_both(lab, host)?;
                ensure!(value.ends_with(r#","Port":51821}}"#), "{value}");
                Ok(())
            })?;
        }
        reach("separate again", true)?;
        let alone = dual("").replace(r#""Network":"10.100.0.0/16","#, r#""EnableIPv4":false,"#);
        put_config(lab, &alone)?;
        for host in lab.hosts() {
            eventually("the device of IPv6 is left", FOLLOW, || {
                ensure!(!host.exists("/sys/class/net/flannel-wg"), "flannel-wg is there");
                ensure!(host.exists("/sys/class/net/flannel-wg-v6"), "no flannel-wg-v6");
                Ok(())
            })?;
        }
        reach("IPv6 alone", false)?;
        for daemon in &daemons {
            // But for an etcd that answers late, emulated.
            let mut errors = daemon.said(" ERROR ");
            errors.retain(|line| !line.contains("E112"));
            ensure!(errors.is_empty(), "{errors:#?}");
        }
        Ok(())
    });
}

fn lease_of_both(lab: &Lab, host: &Host) -> Result<String> {
    let public = format!(r#""PublicIP":"{}""#, host.ip());
    leases(lab)?.into_values().find(|value| value.contains(&public)).context("no lease")
}
