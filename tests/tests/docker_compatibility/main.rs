//! What works on Docker's bridge driver works on ours: every command on both, side by side.
//!
//! With `FLANNEL_TESTS_COMMAND=TEXT` only commands with that text in their names run, and what they did is printed.
//!
//! A command that differs says why, and docs/reference/docker.md explains it; one that no longer differs fails too.

mod commands;

use std::fmt::Write as _;

use anyhow::{Context, Result, bail, ensure};
use flannel_tests::{Host, IMAGE, Lab, eventually, in_lab, secs};

use crate::commands::{CASES, Case};

const DIFFERENCES: &str = include_str!("../../../docs/reference/docker.md");

/// One driver with its network.
struct Column {
    network: &'static str,
    prefix: &'static str,
    create: &'static str,
    another: &'static str,
    compose: &'static str,
    addresses: String,
    created: String,
    ports: u16,
}

/// What a script did, with everything that must differ taken out of its words.
#[derive(PartialEq, Eq, Debug)]
struct Outcome {
    code: i32,
    said: String,
    complained: String,
}

impl Column {
    fn run(&self, host: &Host, case: &Case) -> Result<Outcome> {
        let (network, prefix, compose) = (self.network, self.prefix, self.compose);
        let prelude = format!(
            "N={network} C={prefix} D='{}' E='{}' A={} B={} I={IMAGE} P={} H={} Y='{compose}'\n",
            self.create,
            self.another,
            self.addresses,
            self.created,
            self.ports,
            host.ip()
        );
        let done = host.run_for(secs(60), &["sh", "-c", &(prelude + case.script)])?;
        Ok(Outcome { code: done.code, said: self.plain(&done.stdout), complained: done.stderr })
    }

    /// Without names, addresses, ids and ports that are the column's own.
    fn plain(&self, text: &str) -> String {
        let mut plain = text.replace(&self.addresses, "ADDRESS.").replace(&self.created, "ADDRESS.");
        plain = plain.replace(self.network, "NETWORK").replace(self.prefix, "NAME");
        let word = |word: &str| match word.len() >= 12 && word.bytes().all(|b| b.is_ascii_hexdigit()) {
            true => "ID".to_owned(),
            false => word.to_owned(),
        };
        let line = |line: &str| line.split(' ').map(word).collect::<Vec<_>>().join(" ");
        plain.lines().map(line).collect::<Vec<_>>().join("\n")
    }
}

fn columns(host: &Host) -> Result<[Column; 2]> {
    let env = host.read("/run/flannel/subnet.env")?;
    let gateway = env.lines().find_map(|line| line.strip_prefix("FLANNEL_SUBNET=")).context(env.clone())?;
    let lease = gateway.rsplit_once('.').context("no address")?.0.to_owned() + ".";
    let bridge = Column {
        network: "bridgenet",
        prefix: "qqb",
        create: "-d bridge --subnet 172.31.5.0/24",
        another: "-d bridge --subnet 172.29.5.0/24",
        compose: "    driver: bridge\\n",
        addresses: "172.30.5.".into(),
        created: "172.31.5.".into(),
        ports: 20_000,
    };
    let flannel = Column {
        network: "flannelnet",
        prefix: "qqf",
        create: "-d flannel --ipam-driver flannel --subnet 10.100.0.0/16",
        another: "-d flannel --ipam-driver flannel --subnet 10.101.0.0/16",
        compose: "    driver: flannel\\n    ipam: {driver: flannel, config: [{subnet: 10.100.0.0/16}]}\\n",
        addresses: lease.clone(),
        created: lease,
        ports: 20_100,
    };
    Ok([bridge, flannel])
}

/// Everything that is not as it should be, for one case.
fn judge(case: &Case, bridge: &Outcome, flannel: &Outcome) -> Result<()> {
    let equal = (bridge.code, &bridge.said) == (flannel.code, &flannel.said);
    match case.differs {
        None => ensure!(equal, "they differ"),
        Some(why) => {
            ensure!(!equal, "they no longer differ: {why}");
            ensure!(DIFFERENCES.contains(why), "docs/reference/docker.md does not explain: {why}");
        }
    }
    Ok(())
}

#[test]
fn what_works_on_bridge_works_on_flannel() {
    let needs = ["dockerd", "docker", "docker-compose", "busybox"];
    in_lab(Lab::new("compat").hosts(1).etcd().ip_forward(false).needs(&needs), |lab| {
        let host = lab.host(1);
        lab.etcdctl(&[
            "put",
            "/coreos.com/network/config",
            r#"{"Network":"10.100.0.0/16","Backend":{"Type":"vxlan"}}"#,
        ])?;
        let endpoints = format!("--etcd-endpoints={}", lab.etcd_endpoint());
        let plugin = host.spawn("plugin", &["flannel-docker-plugin", &endpoints], &[])?;
        eventually("the lease", secs(10), || host.exists("/run/flannel/subnet.env"))
            .with_context(|| plugin.tail())?;
        let _dockerd = host.start_dockerd(&[])?;
        host.load_image()?;
        host.docker(&["network", "create", "-d", "bridge", "--subnet", "172.30.5.0/24", "bridgenet"])?;
        host.sh("docker network create -d flannel --ipam-driver flannel --subnet 10.100.0.0/16 flannelnet")?;
        let [bridge, flannel] = columns(host)?;
        let wanted = std::env::var("FLANNEL_TESTS_COMMAND").unwrap_or_default();
        let cases: Vec<&Case> = CASES.iter().filter(|case| case.name.contains(&wanted)).collect();
        ensure!(!wanted.is_empty() || cases.len() >= 60, "only {} commands", cases.len());
        let run = |column: &Column| -> Result<Vec<Outcome>> {
            cases.iter().map(|case| column.run(host, case)).collect()
        };
        let (one, other) = std::thread::scope(|scope| {
            let one = scope.spawn(|| run(&bridge));
            (one.join(), run(&flannel))
        });
        let Ok(one) = one else { bail!("the bridge's column broke off") };
        let mut wrong = String::new();
        for case in CASES.iter().filter(|case| !DIFFERENCES.contains(&format!("| {} |", case.name))) {
            writeln!(wrong, "{}: not in the table of docs/reference/docker.md", case.name)?;
        }
        for ((case, bridge), flannel) in cases.iter().zip(one?).zip(other?) {
            if !wanted.is_empty() {
                eprintln!("{}: bridge {bridge:?}, flannel {flannel:?}", case.name);
            }
            if let Err(error) = judge(case, &bridge, &flannel) {
                writeln!(wrong, "{}: {error}\n  bridge  {bridge:?}\n  flannel {flannel:?}\n", case.name)?;
            }
        }
        ensure!(wrong.is_empty(), "{wrong}");
        let left = host.docker(&["ps", "-aq"])?;
        ensure!(left.trim().is_empty(), "containers stay: {left}");
        Ok(())
    });
}
