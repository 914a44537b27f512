//! One host with an engine and a plugin that die, a proxy between them, and a container that must notice nothing.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use flannel_tests::conversation::{HIDDEN_SOCKET, Proxy, Trap, When};
use flannel_tests::{Container, Daemon, Host, IMAGE, PingStream, create_network, eventually, secs};
use serde_json::Value;

/// The networks of the scenes: name and CIDR.
pub(super) const NETWORKS: [(&str, &str); 2] = [("web", "10.100.0.0/16"), ("other", "10.60.0.0/16")];

/// Who is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Victim {
    Plugin,
    Engine,
    Both,
}

/// The host and everything on it.
pub(super) struct World<'a> {
    pub(super) host: &'a Host,
    pub(super) proxy: Proxy,
    plugin: Arc<Mutex<Daemon>>,
    engine: Arc<Mutex<Daemon>>,
    /// Times that something was killed; nothing can be left over more often.
    pub(super) kills: usize,
}

pub(super) fn lock<T>(value: &Mutex<T>) -> MutexGuard<'_, T> {
    value.lock().unwrap_or_else(PoisonError::into_inner)
}

fn spawn_plugin(host: &Host) -> Result<Daemon> {
    let socket = format!("--socket={HIDDEN_SOCKET}");
    let daemon = host.spawn("flannel-docker-plugin", &["flannel-docker-plugin", &socket, "-v=1"], &[])?;
    let listens = || std::os::unix::net::UnixStream::connect(host.path(HIDDEN_SOCKET)).is_ok();
    eventually("the plugin listens", secs(10), listens).with_context(|| daemon.tail())?;
    Ok(daemon)
}

impl<'a> World<'a> {
    /// Containers outlive their engine if `live_restore`.
    pub(super) fn start(host: &'a Host, live_restore: bool) -> Result<Self> {
        host.write("/etc/docker/daemon.json", format!("{{\"live-restore\": {live_restore}}}"))?;
        let proxy = Proxy::start(host)?;
        let plugin = Arc::new(Mutex::new(spawn_plugin(host)?));
        let engine = Arc::new(Mutex::new(host.start_dockerd(&[])?));
        host.load_image()?;
        Ok(Self { host, proxy, plugin, engine, kills: 0 })
    }

    /// Kills somebody at a place of the n-th call from now.
    pub(super) fn set_trap(&self, victim: Victim, call: usize, when: When) {
        let (plugin, engine, host) = (Arc::clone(&self.plugin), Arc::clone(&self.engine), self.host.clone());
        let strike = Box::new(move || {
            if victim != Victim::Plugin {
                let _ = lock(&engine).crash();
            }
            if victim != Victim::Engine {
                let mut plugin = lock(&plugin);
                // One that does not come back is seen by `revive`.
                let _ = plugin.crash();
                if let Ok(again) = spawn_plugin(&host) {
                    *plugin = again;
                }
            }
        });
        self.proxy.set(Trap { call, when, strike });
    }

    /// Kills somebody now.
    pub(super) fn kill(&mut self, victim: Victim) -> Result<()> {
        self.kills += 1;
        if victim != Victim::Plugin {
            lock(&self.engine).crash()?;
        }
        if victim != Victim::Engine {
            lock(&self.plugin).crash()?;
        }
        self.revive()
    }

    /// Takes the trap away; if it has sprung, whoever died is started again.
    pub(super) fn disarm(&mut self) -> Result<Option<String>> {
        let sprung = self.proxy.disarm();
        if sprung.is_some() {
            self.kills += 1;
        }
        self.revive()?;
        Ok(sprung)
    }

    /// Starts whoever does not run.
    pub(super) fn revive(&self) -> Result<()> {
        let mut plugin = lock(&self.plugin);
        if !plugin.alive() {
            *plugin = spawn_plugin(self.host)?;
        }
        drop(plugin);
        let mut engine = lock(&self.engine);
        if !engine.alive() {
            *engine = self.host.start_dockerd(&[])?;
        }
        Ok(())
    }

    /// Both logs, for messages.
    pub(super) fn tails(&self) -> String {
        format!("{}\n{}", lock(&self.plugin).tail(), lock(&self.engine).tail())
    }

    /// A panic is a bug whatever was killed.
    pub(super) fn nobody_panicked(&self) -> Result<()> {
        let log = self.host.read("/var/log/lab/flannel-docker-plugin.log").unwrap_or_default();
        ensure!(!log.contains("panicked at"), "the plugin panicked:\n{log}");
        Ok(())
    }

    /// What `docker inspect` says of a container, or of anything; none if there is no such thing.
    pub(super) fn inspect(&self, what: &str, name: &str) -> Result<Option<Value>> {
        let said = self.host.try_docker(&["inspect", "--type", what, name])?;
        if !said.ok() {
            let unknown = ["No such", "not found"].iter().any(|text| said.stderr.contains(text));
            ensure!(unknown, "{said}");
            return Ok(None);
        }
        let list: Value = serde_json::from_str(&said.stdout)?;
        Ok(Some(list[0].clone()))
    }

    /// A container's address on a network, if it runs and is on it.
    pub(super) fn address(&self, container: &str, network: &str) -> Result<Option<String>> {
        let Some(seen) = self.inspect("container", container)? else { return Ok(None) };
        let address = seen["NetworkSettings"]["Networks"][network]["IPAddress"].as_str().unwrap_or_default();
        let runs = seen["State"]["Running"] == true;
        Ok((runs && !address.is_empty()).then(|| address.to_owned()))
    }
}

/// What a user does, and goes on doing until it is done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    CreateNetwork(usize),
    Run(&'static str, usize),
    Connect(&'static str, usize),
    Disconnect(&'static str, usize),
    Stop(&'static str),
    Start(&'static str),
    Remove(&'static str),
    RemoveNetwork(usize),
}

/// What a container of the scenes publishes: a port of its own.
fn port(container: &str) -> &'static str {
    match container {
        "w1" => "18081:80",
        "w2" => "18082:80",
        "w3" => "18083:80/udp",
        "w4" => "18084:80",
        _ => "18080:80",
    }
}

/// How long a user tries before he writes a complaint. What an engine forgot while it was being made is held for a minute.
const PATIENCE: Duration = Duration::from_secs(100);

impl Step {
    /// Does it; while it is not done, does it again, as a user would.
    pub(super) fn take(&self, world: &World<'_>) -> Result<()> {
        let mut said = Vec::new();
        let start = Instant::now();
        for round in 0.. {
            if start.elapsed() > PATIENCE {
                break;
            }
            if round > 2 {
                thread::sleep(secs(1));
            }
            if round > 0 && self.is_done(world)? {
                return Ok(());
            }
            for command in self.commands(round) {
                let output = world.host.run_for(secs(100), &[&["docker"], &command[..]].concat())?;
                if !output.ok() {
                    said.push(output.to_string());
                }
            }
            world.revive()?;
            if self.is_done(world)? {
                return Ok(());
            }
        }
        bail!("{self:?} is not done within {PATIENCE:?}:\n{}\n{}", said.join("\n"), world.tails())
    }

    fn commands(&self, round: usize) -> Vec<Vec<&str>> {
        let network = |n: &usize| NETWORKS[*n].0;
        // An engine that was killed between its two files (what a container wants, what the network has) says "is not
        // connected" and "is already connected" at once; a restart of the container makes it read both anew.
        let restart = |name| if round > 1 { vec!["restart", "-t", "1", name] } else { Vec::new() };
        let commands = match self {
            Self::CreateNetwork(n) => {
                let (name, cidr) = NETWORKS[*n];
                vec![create_network(cidr, name).to_vec()]
            }
            Self::Run(name, n) => {
                let remove = if round > 0 { vec!["rm", "-f", name] } else { Vec::new() };
                vec![
                    remove,
                    vec!["run", "-d", "--name", name, "-p", port(name), "--network", network(n), IMAGE],
                ]
            }
            Self::Connect(name, n) => {
                let disconnect = if round > 0 {
                    vec!["network", "disconnect", "-f", network(n), name]
                } else {
                    Vec::new()
                };
                vec![restart(name), disconnect, vec!["network", "connect", network(n), name]]
            }
            Self::Disconnect(name, n) => {
                vec![restart(name), vec!["network", "disconnect", "-f", network(n), name]]
            }
            Self::Stop(name) => vec![vec!["stop", "-t", "1", name]],
            Self::Start(name) => vec![vec!["start", name]],
            Self::Remove(name) => vec![vec!["rm", "-f", name]],
            Self::RemoveNetwork(n) => vec![vec!["network", "rm", network(n)]],
        };
        commands.into_iter().filter(|command| !command.is_empty()).collect()
    }

    fn is_done(&self, world: &World<'_>) -> Result<bool> {
        let runs = |name: &str| -> Result<bool> {
            Ok(world.inspect("container", name)?.is_some_and(|seen| seen["State"]["Running"] == true))
        };
        Ok(match self {
            Self::CreateNetwork(n) => world.inspect("network", NETWORKS[*n].0)?.is_some(),
            Self::RemoveNetwork(n) => world.inspect("network", NETWORKS[*n].0)?.is_none(),
            Self::Run(name, n) | Self::Connect(name, n) => world.address(name, NETWORKS[*n].0)?.is_some(),
            Self::Disconnect(name, n) => {
                let seen = world.inspect("container", name)?.context("no such container")?;
                seen["NetworkSettings"]["Networks"][NETWORKS[*n].0].is_null()
            }
            Self::Stop(name) => !runs(name)?,
            Self::Start(name) => runs(name)?,
            Self::Remove(name) => world.inspect("container", name)?.is_none(),
        })
    }
}

/// A container on the second network that must not notice anything, and the one that pings it.
pub(super) struct Bystander {
    stream: PingStream,
    answers: usize,
}

impl Bystander {
    pub(super) fn watch(from: &Container, to: &Container) -> Result<Self> {
        const EVERY: Duration = Duration::from_millis(100);
        Ok(Self { stream: PingStream::start(from, to.ip()?, EVERY)?, answers: 20 })
    }

    pub(super) fn lost_nothing(self) -> Result<()> {
        let count = self.stream.stop_after(self.answers)?;
        ensure!(count.lost() == 0 && count.received > 0, "{count:?}");
        Ok(())
    }
}
