//! Backend ipsec where the kernel has ESP: what is on the wire, and what goes on while daemons come and go.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use flannel_tests::flanneld::{Flanneld, PREFIX, Pod, SubnetEnv, put_config};
use flannel_tests::needs::ESP;
use flannel_tests::{
    Host, HttpServer, Lab, PingStream, eventually, http_get, in_lab, largest_packet, ping, ping_within, secs,
};

/// Keys of 4096 bits take seconds here.
const FOLLOW: Duration = secs(15);
/// How often a packet is sent that must not be lost.
const PACE: Duration = Duration::from_millis(100);
/// Packets of a stream of these that may be lost while keys are agreed anew: 1 to 4 were, emulated on a busy machine.
const FEW: u32 = 10;

fn config(options: &str) -> String {
    let key = "0123456789abcdef".repeat(6);
    format!(r#"{{"Network":"10.100.0.0/16","Backend":{{"Type":"ipsec","PSK":"{key}"{options}}}}}"#)
}

/// Counts what comes in by the wire: ESP, ESP in UDP, and what pods say in clear.
fn count(host: &Host) -> Result<()> {
    host.sh("nft -f - <<'RULES'
table netdev wire {
  chain come {
    type filter hook ingress device eth0 priority 0;
    ip protocol esp counter comment \"esp\"
    udp dport 4500 counter comment \"udp\"
    ip saddr 10.100.0.0/16 meta secpath missing counter comment \"clear\"
  }
}
RULES")?;
    Ok(())
}

fn counted(host: &Host, what: &str) -> Result<u64> {
    let said = host.out(&["nft", "list", "table", "netdev", "wire"])?;
    let line = said.lines().find(|line| line.contains(&format!("comment \"{what}\"")));
    let number = line.and_then(|line| line.split("packets ").nth(1)?.split(' ').next()?.parse().ok());
    number.ok_or_else(|| anyhow::anyhow!("no counter {what} in\n{said}"))
}

fn all_reach_all(pods: &[Pod]) -> Result<()> {
    for from in pods {
        for to in pods.iter().filter(|to| to.ip() != from.ip()) {
            ping_within(FOLLOW, from, to.ip())?;
        }
    }
    Ok(())
}

/// Who runs charon on a host now.
fn charon(host: &Host) -> Result<String> {
    Ok(host.read("/run/charon.pid")?.trim().to_owned())
}

/// A charon that is not this one has agreed with the peer on a tunnel.
fn another_agrees(host: &Host, pid: &str) -> Result<()> {
    eventually(format!("another charon on {} has a tunnel", host.name()), FOLLOW, || {
        ensure!(charon(host)? != pid, "it is still {pid}");
        let said = host.out(&["timeout", "30", "swanctl", "--list-sas"])?;
        ensure!(said.contains("INSTALLED"), "{said}");
        Ok(())
    })
}

/// What is lost between two pods while something happens, and a while after it.
fn lost_while((from, to): (&Pod, &Pod), what: &str, happens: impl FnOnce() -> Result<()>) -> Result<u32> {
    let stream = PingStream::start(from, to.ip(), PACE)?;
    stream.more(5)?;
    happens().context(what.to_owned())?;
    stream.more(20)?;
    let count = stream.stop()?;
    eprintln!("{what}: {count:?}");
    Ok(count.lost())
}

#[test]
fn two_hosts() {
    in_lab(Lab::new("ipsec").etcd().needs(&["swanctl"]).needs_kernel(ESP), |lab| {
        put_config(lab, &config(""))?;
        let mut daemons = Flanneld::start_all(lab)?;
        let pods: Vec<Pod> = daemons
            .iter()
            .map(|daemon| Pod::new(daemon.host(), &daemon.ready()?, 2))
            .collect::<Result<_>>()?;
        lab.hosts().iter().try_for_each(count)?;
        all_reach_all(&pods)?;
        for host in lab.hosts() {
            ensure!(counted(host, "esp")? > 0 && counted(host, "clear")? == 0, "{}", host.name());
        }
        carries_large(&pods)?;
        restarts(lab, &mut daemons, &pods)?;
        is_repaired(lab.host(1), &pods)?;
        leaves_and_returns(lab, &mut daemons, &pods)?;
        for host in lab.hosts() {
            ensure!(counted(host, "clear")? == 0, "{} was told something in clear", host.name());
        }

        // In UDP, for every host.
        put_config(lab, &config(r#","UDPEncap":true"#))?;
        eventually("ESP comes in UDP", FOLLOW, || {
            let (udp, esp) = (counted(lab.host(2), "udp")?, counted(lab.host(2), "esp")?);
            (0..5).try_for_each(|_| ping(&pods[0], pods[1].ip()))?;
            let (udp, esp) = (counted(lab.host(2), "udp")? - udp, counted(lab.host(2), "esp")? - esp);
            ensure!(udp >= 5 && esp == 0, "{udp} packets in UDP, {esp} without");
            Ok(())
        })?;
        all_reach_all(&pods)?;
        goes_for_good(lab, &mut daemons)
    });
}

/// TCP finds its way, also where the pods have more than flannel's MTU.
fn carries_large(pods: &[Pod]) -> Result<()> {
    // Small: a client that waits two seconds for all of it.
    let text = "0123456789".repeat(2_000);
    let server = HttpServer::start(&pods[1], 8000, &text)?;
    let url = format!("http://{}:8000/", pods[1].ip());
    for mtu in [1500, 1423] {
        pods.iter().try_for_each(|pod| pod.set_mtu(mtu))?;
        let come = eventually("the text arrives", FOLLOW, || http_get(&pods[0], &url))?;
        ensure!(come == text, "{} bytes", come.len());
        // 1446 is what the tunnel carries (the matrix has it with the answer to one more).
        let largest = largest_packet(&pods[0], pods[1].ip())?;
        ensure!(largest == mtu.min(1446), "{largest}");
    }
    server.stop()
}

/// charon outlives flanneld, so that nothing has to be agreed anew.
fn restarts(lab: &Lab, daemons: &mut [Flanneld], pods: &[Pod]) -> Result<()> {
    let one = lab.host(1);
    let pid = charon(one)?;
    let ways = [(&pods[1], &pods[0]), (&pods[0], &pods[1])];
    let mut again = |end: fn(&Flanneld) -> Result<()>| {
        end(&daemons[0])?;
        daemons[0] = Flanneld::start(lab, one)?;
        daemons[0].ready()?;
        daemons[0].daemon().wait_log(&format!("Charon daemon runs already: process {pid}"), FOLLOW).map(drop)
    };
    let lost = lost_while(ways[0], "restart", || again(|one| one.daemon().stop(secs(30)).map(drop)))?;
    ensure!(lost == 0, "{lost} packets lost by a restart");
    let lost = lost_while(ways[1], "a crash", || again(|one| one.daemon().crash().map(drop)))?;
    ensure!(lost == 0, "{lost} packets lost by a crash");
    ensure!(charon(one)? == pid, "it was {pid}");
    // Which is still looked after.
    let lost = lost_while(ways[1], "charon killed", || {
        one.sh(&format!("kill -9 {pid}"))?;
        another_agrees(one, &pid)
    })?;
    ensure!(lost <= FEW, "{lost} packets lost when charon was killed");
    Ok(())
}

/// Who goes for good takes charon along, also one that somebody else of ours started.
fn goes_for_good(lab: &Lab, daemons: &mut Vec<Flanneld>) -> Result<()> {
    let two = lab.host(2);
    daemons.remove(1).daemon().stop(secs(30))?;
    let pid = charon(two)?;
    ensure!(two.exists(&format!("/proc/{pid}")), "{pid} went with flanneld");
    let cleanup = format!("flanneld --etcd-endpoints={} --cleanup", lab.etcd_endpoint());
    two.sh(&cleanup)?;
    ensure!(!two.exists(&format!("/proc/{pid}")), "charon, process {pid}, is left");
    let left = two.sh("ip xfrm policy; ip xfrm state")?;
    ensure!(left.trim().is_empty(), "{left}");
    Ok(())
}

/// What is done with `ip` and `swanctl` by hand.
fn is_repaired(host: &Host, pods: &[Pod]) -> Result<()> {
    for harm in [
        "ip xfrm policy flush",
        "timeout 60 swanctl --load-creds --clear; timeout 60 swanctl --load-conns",
        "timeout 60 swanctl --terminate --ike \"$(swanctl --list-conns --raw | sed -n 's/^list-conn event {\\([^ ]*\\) .*/\\1/p' | head -1)\" --force; true",
    ] {
        host.sh(harm)?;
        all_reach_all(pods).context(harm)?;
    }
    Ok(())
}

/// A host leaves for good, and comes back.
fn leaves_and_returns(lab: &Lab, daemons: &mut [Flanneld], pods: &[Pod]) -> Result<()> {
    let (one, two) = (lab.host(1), lab.host(2));
    let key = SubnetEnv::read(two)?.key();
    daemons[1].daemon().stop(secs(30))?;
    lab.etcdctl(&["del", &format!("{PREFIX}/subnets/{key}")])?;
    eventually("the other forgets it", FOLLOW, || {
        // Keys of charons that were killed stay until they expire, and nothing says any more what to use them for.
        let said = one.sh("ip xfrm policy; timeout 60 swanctl --list-conns")?;
        ensure!(!said.contains("10.77.0.12"), "{said}");
        Ok(())
    })?;
    daemons[1] = Flanneld::start(lab, two)?;
    daemons[1].ready()?;
    all_reach_all(pods)
}
