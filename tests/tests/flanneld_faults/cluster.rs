//! A cluster of three etcds of which one after the other is restarted.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use flannel_tests::flanneld::{Flanneld, PREFIX, Pod, SubnetEnv};
use flannel_tests::{Daemon, Host, Lab, PingStream, eventually, in_lab, ping_within, secs};

use crate::{FOLLOW, VXLAN};

/// Three members on one machine, each with its own ports and data.
struct Cluster<'a> {
    host: &'a Host,
    members: Vec<Option<Daemon>>,
}

const MEMBERS: usize = 3;

impl<'a> Cluster<'a> {
    fn start(host: &'a Host) -> Result<Self> {
        let mut cluster = Self { host, members: Vec::new() };
        for member in 0..MEMBERS {
            let daemon = cluster.spawn(member)?;
            cluster.members.push(Some(daemon));
        }
        for member in 0..MEMBERS {
            cluster.healthy(member)?;
        }
        Ok(cluster)
    }

    /// For clients (1) or for the other members (2).
    fn url(&self, kind: usize, member: usize) -> String {
        format!("http://{}:{}", self.host.ip(), 10_000 * kind + 2379 + member)
    }

    fn endpoints(&self) -> String {
        (0..MEMBERS).map(|member| self.url(1, member)).collect::<Vec<_>>().join(",")
    }

    fn spawn(&self, member: usize) -> Result<Daemon> {
        let (client, peer) = (self.url(1, member), self.url(2, member));
        let peers = (0..MEMBERS).map(|member| format!("m{member}={}", self.url(2, member)));
        let peers = peers.collect::<Vec<_>>().join(",");
        let (name, data) = (format!("m{member}"), format!("/run/etcd-{member}"));
        #[rustfmt::skip]
        let argv = [
            "etcd", "--name", &name, "--data-dir", &data, "--listen-client-urls", &client,
            "--advertise-client-urls", &client, "--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer,
            "--initial-cluster", &peers, "--logger", "zap", "--heartbeat-interval", "50", "--election-timeout", "500",
        ];
        self.host.spawn(&name, &argv, &[])
    }

    fn healthy(&self, member: usize) -> Result<()> {
        let url = self.url(1, member);
        eventually(format!("{url} is healthy"), secs(30), || {
            let said = self.host.run(&["etcdctl", "--endpoints", &url, "endpoint", "health"])?;
            ensure!(said.ok(), "{said}");
            Ok(())
        })
    }

    /// By the members that are up; tried again where one of them is just looking for a leader.
    fn ctl(&self, argv: &[&str]) -> Result<String> {
        let endpoints = self.endpoints();
        eventually(format!("etcdctl {argv:?}"), secs(30), || {
            let flags = ["etcdctl", "--endpoints", &endpoints, "--command-timeout", "5s"];
            let said = self.host.run(&[&flags[..], argv].concat())?;
            ensure!(said.ok(), "{said}");
            said.text()
        })
    }

    fn restart(&mut self, member: usize, meanwhile: impl FnOnce(&Self) -> Result<()>) -> Result<()> {
        let running = self.members[member].take().context("it runs")?;
        running.stop(secs(20))?;
        meanwhile(self)?;
        self.members[member] = Some(self.spawn(member)?);
        self.healthy(member)
    }
}

#[test]
fn a_rolling_restart_of_the_cluster_costs_nothing() {
    in_lab(Lab::new("rolling").etcd(), |lab| {
        let mut cluster = Cluster::start(lab.etcd_host())?;
        let config = format!("{PREFIX}/config");
        cluster.ctl(&["put", &config, VXLAN])?;
        let endpoints = cluster.endpoints();
        let start = |host| Flanneld::start_at(&endpoints, host, &["--iface", "eth0", "--ip-masq"]);
        let daemons = lab.hosts().iter().map(start).collect::<Result<Vec<_>>>()?;
        let envs = daemons.iter().map(Flanneld::ready).collect::<Result<Vec<_>>>()?;
        let pods = [Pod::new(lab.host(1), &envs[0], 2)?, Pod::new(lab.host(2), &envs[1], 2)?];
        ping_within(FOLLOW, &pods[0], pods[1].ip())?;
        let stream = PingStream::start(&pods[0], pods[1].ip(), Duration::from_millis(50))?;
        for member in 0..MEMBERS {
            // Who comes while one is away is seen by all.
            let value = format!(
                r#"{{"PublicIP":"10.77.0.{0}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"02:00:00:00:00:{0}"}}}}"#,
                50 + member
            );
            cluster.restart(member, |cluster| {
                cluster.ctl(&["put", &format!("{PREFIX}/subnets/10.100.0.{}-26", 64 * member), &value])?;
                for daemon in &daemons {
                    eventually(format!("{} knows the new peer", daemon.host().name()), secs(30), || {
                        let routes = daemon.host().out(&["ip", "route", "show", "dev", "flannel.1"])?;
                        // Those of before are there still: never fewer.
                        ensure!(routes.lines().count() == 2 + member, "{routes}");
                        Ok(())
                    })?;
                }
                Ok(())
            })?;
        }
        let keys = cluster.ctl(&["get", "--prefix", "--keys-only", &format!("{PREFIX}/subnets/")])?;
        for env in &envs {
            ensure!(keys.contains(&env.key()), "{keys}");
        }
        for (daemon, env) in daemons.iter().zip(&envs) {
            ensure!(SubnetEnv::read(daemon.host())? == *env && daemon.health("/readyz")?.0 == 200);
            // Each member that goes may be said, and what is missing meanwhile; not more.
            let lines = daemon.daemon().log().lines().count();
            if lines > 40 + 10 * MEMBERS || !daemon.said("E109").is_empty() {
                bail!("{lines} lines\n{}", daemon.daemon().log());
            }
        }
        let seen = stream.stop_after(11)?;
        ensure!(seen.sent > 10 && seen.lost() == 0, "{seen:?}");
        Ok(())
    });
}
