//! Backend ipsec where the kernel has ESP: what is on the wire, and what goes on while daemons come and go.

use std::time::Duration;

use anyhow::{Result, ensure};
use flannel_tests::flanneld::{Flanneld, PREFIX, Pod, SubnetEnv, put_config};
use flannel_tests::{
    Host, HttpServer, Lab, PingStream, Place as _, eventually, http_get, in_lab, largest_packet, ping,
    ping_within, secs,
};

/// Keys of 4096 bits take seconds here.
const FOLLOW: Duration = Duration::from_secs(120);
/// How often a packet is sent that must not be lost.
const PACE: Duration = Duration::from_millis(100);

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

/// charon takes its time here.
fn ready(daemon: &Flanneld) -> Result<SubnetEnv> {
    eventually(format!("{} is ready", daemon.host().name()), FOLLOW, || {
        ensure!(daemon.health("/readyz")?.0 == 200, "{}", daemon.daemon().tail());
        Ok(())
    })?;
    SubnetEnv::read(daemon.host())
}

fn all_reach_all(pods: &[Pod]) -> Result<()> {
    for from in pods {
        for to in pods.iter().filter(|to| to.ip() != from.ip()) {
            ping_within(FOLLOW, from, to.ip())?;
        }
    }
    Ok(())
}

/// What is lost between two pods while something happens, and for a while after it.
fn lost_while(from: &Pod, to: &Pod, what: &str, happens: impl FnOnce() -> Result<()>) -> Result<u32> {
    let stream = PingStream::start(from, to.ip(), PACE)?;
    happens()?;
    std::thread::sleep(secs(15));
    let count = stream.stop()?;
    eprintln!("{what}: {count:?}");
    Ok(count.lost())
}

#[test]
#[ignore = "inside the virtual machine"]
fn two_hosts() {
    in_lab(Lab::new("ipsec").etcd().needs(&["swanctl"]), |lab| {
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

        // More than fits is answered, and TCP finds its way.
        let largest = largest_packet(&pods[0], pods[1].ip())?;
        ensure!((1423..1500).contains(&largest), "{largest}");
        let size = (largest + 1 - 28).to_string();
        let said =
            pods[0].run(&["ping", "-n", "-M", "do", "-c", "2", "-s", &size, &pods[1].ip().to_string()])?;
        ensure!(said.stdout.contains("Frag needed") || said.stderr.contains("too long"), "{said}");
        for pod in &pods {
            pod.set_mtu(1423)?;
        }
        ensure!(largest_packet(&pods[0], pods[1].ip())? == 1423);
        // Small: a client that waits two seconds for all of it.
        let text = "0123456789".repeat(2_000);
        let server = HttpServer::start(&pods[1], 8000, &text)?;
        let url = format!("http://{}:8000/", pods[1].ip());
        let come = eventually("the text arrives", FOLLOW, || http_get(&pods[0], &url))?;
        ensure!(come == text, "{} bytes", come.len());
        server.stop()?;

        let one = lab.host(1);
        let lost = lost_while(&pods[1], &pods[0], "restart", || {
            daemons[0].daemon().stop(secs(30))?;
            daemons[0] = Flanneld::start(lab, one)?;
            ready(&daemons[0]).map(drop)
        })?;
        ensure!(lost <= 3, "{lost} packets lost by a restart");
        let lost = lost_while(&pods[0], &pods[1], "a crash", || {
            daemons[0].daemon().crash()?;
            daemons[0] = Flanneld::start(lab, one)?;
            ready(&daemons[0]).map(drop)
        })?;
        ensure!(lost <= 3, "{lost} packets lost by a crash");
        let lost = lost_while(&pods[0], &pods[1], "charon killed", || {
            one.sh("kill -9 $(cat /run/charon.pid)").map(drop)
        })?;
        ensure!(lost <= 3, "{lost} packets lost when charon was killed");
        one.sh("ip xfrm policy flush")?;
        all_reach_all(&pods)?;
        one.sh("timeout 60 swanctl --load-creds --clear; timeout 60 swanctl --load-conns")?;
        all_reach_all(&pods)?;
        one.sh("timeout 60 swanctl --terminate --ike \"$(swanctl --list-conns --raw | sed -n 's/^list-conn event {\\([^ ]*\\) .*/\\1/p' | head -1)\" --force; true")?;
        all_reach_all(&pods)?;

        // A host leaves for good, and comes back.
        let second = daemons.remove(1);
        let key = ready(&second)?.key();
        second.daemon().stop(secs(30))?;
        lab.etcdctl(&["del", &format!("{PREFIX}/subnets/{key}")])?;
        eventually("the other forgets it", FOLLOW, || {
            let said = one.sh("ip xfrm policy; ip xfrm state; timeout 60 swanctl --list-conns")?;
            ensure!(!said.contains("10.77.0.12"), "{said}");
            Ok(())
        })?;
        let second = Flanneld::start(lab, lab.host(2))?;
        ready(&second)?;
        all_reach_all(&pods)?;
        for host in lab.hosts() {
            ensure!(counted(host, "clear")? == 0, "{} was told something in clear", host.name());
        }

        // In UDP, for every host.
        put_config(lab, &config(r#","UDPEncap":true"#))?;
        eventually("ESP comes in UDP", FOLLOW, || {
            let before = counted(lab.host(2), "udp")?;
            (0..20).try_for_each(|_| ping(&pods[0], pods[1].ip()))?;
            let come = counted(lab.host(2), "udp")? - before;
            ensure!(come >= 20, "{come} packets");
            Ok(())
        })?;
        Ok(())
    });
}
