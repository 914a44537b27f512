//! What a Docker user waits for: networks, containers, connecting, published ports. Ours and Docker's bridge take turns on one
//! engine, which is asked by its API: the command line alone would add the same 20 ms to both.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use flannel_tests::flanneld::put_config;
use flannel_tests::{Daemon, Host, IMAGE, Lab, eventually, secs};
use serde_json::{Value, json};

use crate::table::{self, median};

const ROUNDS: usize = 20;
/// Published ports that are there when one more is added.
const PORTS: u16 = 1000;

struct Driver {
    name: &'static str,
    /// A network of it.
    network: &'static str,
    /// `IPAM` of a network that is made.
    ipam: fn(subnet: &str) -> Value,
}

const DRIVERS: [Driver; 2] = [
    Driver { name: "bridge", network: "on-bridge", ipam: |subnet| json!({"Config": [{"Subnet": subnet}]}) },
    Driver {
        name: "flannel",
        network: "on-flannel",
        ipam: |_| json!({"Driver": "flannel", "Config": [{"Subnet": "10.100.0.0/16"}]}),
    },
];

pub(crate) fn run() -> Result<()> {
    let lab = Lab::new("bench-docker").hosts(1).etcd().needs(&["dockerd", "docker", "busybox"]);
    ensure!(lab.can_run(), "this machine lacks something");
    let lab = lab.start()?;
    put_config(&lab, r#"{"Network":"10.100.0.0/16","Backend":{"Type":"vxlan"}}"#)?;
    let host = lab.host(1);
    let plugin = start_plugin(&lab, host)?;
    let _dockerd = host.start_dockerd(&[])?;
    host.load_image()?;
    let engine = Engine(host);
    for driver in &DRIVERS {
        engine.create_network(driver, driver.network, "172.30.0.0/24")?;
    }
    engine.call(
        "POST",
        "/containers/create?name=guest",
        &json!({"Image": IMAGE, "Cmd": ["sleep", "infinity"]}),
    )?;
    engine.call("POST", "/containers/guest/start", &Value::Null)?;

    let mut seen: BTreeMap<(&str, &str), Vec<f64>> = BTreeMap::new();
    for round in 0..ROUNDS {
        for driver in &DRIVERS {
            for (what, took) in engine.round(driver)? {
                seen.entry((what, driver.name)).or_default().push(took);
            }
        }
        eprintln!("round {} of {ROUNDS}", round + 1);
    }
    let first = engine.publish_one(&plugin, "first")?;
    engine.publish_many()?;
    let last = engine.publish_one(&plugin, "last")?;
    let calls = calls(&plugin.log());
    lab.tear_down()?;

    let mut rows = Vec::new();
    for what in STEPS {
        let [bridge, flannel] =
            DRIVERS.map(|driver| seen.get(&(what, driver.name)).cloned().map(median).unwrap_or_default());
        let ratio = format!("{:.2}", flannel / bridge);
        rows.push(vec![
            what.to_owned(),
            format!("{bridge:.1}"),
            format!("{flannel:.1}"),
            ratio,
            "<= 1.1".into(),
        ]);
    }
    table::print(&["ms, medians of 20 rounds", "bridge", "flannel", "ratio", "aim"], &rows);
    println!();
    let rows = calls.into_iter().map(|(method, mut took)| {
        took.sort_by(f64::total_cmp);
        let at = |part: f64| {
            took.get((part * (took.len() - 1) as f64).round() as usize).copied().unwrap_or_default()
        };
        vec![
            method,
            took.len().to_string(),
            format!("{:.2}", at(0.5)),
            format!("{:.2}", at(0.99)),
            "< 5".into(),
        ]
    });
    table::print(&["ms inside the plugin", "calls", "median", "p99", "aim"], &rows.collect::<Vec<_>>());
    println!(
        "\npublishing one port: {first:.2} ms with none before, {last:.2} ms with {PORTS}: ratio {:.2}",
        last / first
    );
    Ok(())
}

const STEPS: [&str; 5] =
    ["network create + rm", "start to first packet", "container rm", "connect", "disconnect"];

/// With a log of every call.
fn start_plugin(lab: &Lab, host: &Host) -> Result<Daemon> {
    let endpoints = format!("--etcd-endpoints={}", lab.etcd_endpoint());
    let plugin = host.spawn("plugin", &["flannel-docker-plugin", &endpoints, "--v=1"], &[])?;
    eventually("the lease", secs(10), || host.exists("/run/flannel/subnet.env"))?;
    Ok(plugin)
}

/// What the plugin says of every call: its method, and milliseconds.
fn calls(log: &str) -> BTreeMap<String, Vec<f64>> {
    let mut calls: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for line in log.lines().filter(|line| line.contains("answered")) {
        let field = |name: &str| line.split(name).nth(1)?.split_whitespace().next();
        let method = field("method=").map(|method| method.trim_matches('"').to_owned());
        if let (Some(method), Some(took)) = (method, field("took=").and_then(milliseconds)) {
            calls.entry(method).or_default().push(took);
        }
    }
    calls
}

/// `968.387µs`, `1.2ms`, `3s`
fn milliseconds(text: &str) -> Option<f64> {
    let unit = text.trim_start_matches(|letter: char| letter.is_ascii_digit() || letter == '.');
    let number: f64 = text.strip_suffix(unit)?.parse().ok()?;
    Some(match unit {
        "ns" => number / 1e6,
        "µs" => number / 1e3,
        "ms" => number,
        "s" => number * 1e3,
        _ => return None,
    })
}

/// The engine's API.
struct Engine<'a>(&'a Host);

impl Engine<'_> {
    fn call(&self, method: &str, path: &str, body: &Value) -> Result<Value> {
        let mut stream = UnixStream::connect(self.0.path("/var/run/docker.sock"))?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        let body = if body.is_null() { String::new() } else { body.to_string() };
        write!(
            stream,
            "{method} {path} HTTP/1.0\r\nHost: docker\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no answer")?;
        let status = head.split(' ').nth(1).unwrap_or_default();
        if !status.starts_with('2') {
            bail!("{method} {path}: {head}\n{body}");
        }
        Ok(serde_json::from_str(body).unwrap_or(Value::Null))
    }

    fn create_network(&self, driver: &Driver, name: &str, subnet: &str) -> Result<()> {
        let body = json!({"Name": name, "Driver": driver.name, "IPAM": (driver.ipam)(subnet)});
        self.call("POST", "/networks/create", &body).map(drop)
    }

    /// Every step once.
    fn round(&self, driver: &Driver) -> Result<Vec<(&'static str, f64)>> {
        let name = driver.network;
        let connect =
            |how: &str| self.call("POST", &format!("/networks/{name}/{how}"), &json!({"Container": "guest"}));
        let mut took = Vec::new();
        let started = Instant::now();
        self.create_network(driver, "fresh", "172.31.0.0/24")?;
        self.call("DELETE", "/networks/fresh", &Value::Null)?;
        took.push((STEPS[0], ms(started)));

        let ping = "ping -c1 -W5 $(ip route | awk '/default/ {print $3}')";
        let body = json!({"Image": IMAGE, "Cmd": ["sh", "-c", ping], "HostConfig": {"NetworkMode": name}});
        self.call("POST", "/containers/create?name=fresh", &body)?;
        let started = Instant::now();
        self.call("POST", "/containers/fresh/start", &Value::Null)?;
        let ended = self.call("POST", "/containers/fresh/wait", &Value::Null)?;
        took.push((STEPS[1], ms(started)));
        ensure!(ended["StatusCode"] == 0, "{name}: no packet: {ended}");
        let started = Instant::now();
        self.call("DELETE", "/containers/fresh?force=1", &Value::Null)?;
        took.push((STEPS[2], ms(started)));

        for (step, how) in [(STEPS[3], "connect"), (STEPS[4], "disconnect")] {
            let started = Instant::now();
            connect(how)?;
            took.push((step, ms(started)));
        }
        Ok(took)
    }

    /// Milliseconds inside the plugin to publish the one port of a container, median of ten.
    fn publish_one(&self, plugin: &Daemon, name: &str) -> Result<f64> {
        const METHOD: &str = "NetworkDriver.ProgramExternalConnectivity";
        let before = calls(&plugin.log()).get(METHOD).map_or(0, Vec::len);
        for n in 0..10u16 {
            self.publish(&format!("{name}{n}"), 9000 + n, 1)?;
            self.call("DELETE", &format!("/containers/{name}{n}?force=1"), &Value::Null)?;
        }
        let took = calls(&plugin.log()).remove(METHOD).unwrap_or_default();
        let new = took.get(before..).unwrap_or_default();
        ensure!(!new.is_empty(), "the plugin was not asked to publish");
        Ok(median(new.to_vec()))
    }

    fn publish_many(&self) -> Result<()> {
        (0..PORTS / 100).try_for_each(|n| self.publish(&format!("many{n}"), 10_000 + n * 100, 100))
    }

    fn publish(&self, name: &str, first: u16, count: u16) -> Result<()> {
        let bindings: serde_json::Map<String, Value> = (0..count)
            .map(|n| (format!("{}/tcp", 1000 + n), json!([{"HostPort": (first + n).to_string()}])))
            .collect();
        let host = json!({"NetworkMode": "on-flannel", "PortBindings": bindings});
        let body = json!({"Image": IMAGE, "Cmd": ["sleep", "infinity"], "HostConfig": host});
        self.call("POST", &format!("/containers/create?name={name}"), &body)?;
        self.call("POST", &format!("/containers/{name}/start"), &Value::Null).map(drop)
    }
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}
