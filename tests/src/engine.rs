//! Container engines on a host: dockerd and containerd as Debian ships them.

use std::fmt;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::binaries;
use crate::command::Output;
use crate::daemon::Daemon;
use crate::host::{Host, Place};
use crate::image::{self, IMAGE_REFERENCE};
use crate::probe::eventually;

/// How long an engine may take until it answers.
const ENGINE_DEADLINE: Duration = Duration::from_secs(60);

const DOCKER_SOCKET: &str = "/run/docker.sock";
const CONTAINERD_SOCKET: &str = "/run/containerd/containerd.sock";
const CNI_BIN: &str = "/opt/cni/bin";

/// Where Debian's containernetworking-plugins are.
const DEBIAN_CNI: &str = "/usr/lib/cni";

impl Host {
    /// Starts dockerd with these arguments besides its defaults, and waits until it answers.
    pub fn start_dockerd(&self, args: &[&str]) -> Result<Daemon> {
        let daemon = self.spawn("dockerd", &[&["dockerd"], args].concat(), &[])?;
        self.wait_engine(&daemon, || self.dockerd_answers())?;
        Ok(daemon)
    }

    /// Whether dockerd answers on its socket.
    pub fn dockerd_answers(&self) -> bool {
        let ask = || -> Result<bool> {
            let mut socket = UnixStream::connect(self.path(DOCKER_SOCKET))?;
            socket.set_read_timeout(Some(Duration::from_secs(2)))?;
            socket.write_all(b"GET /_ping HTTP/1.0\r\nHost: docker\r\n\r\n")?;
            let mut answer = [0_u8; 64];
            let n = socket.read(&mut answer)?;
            Ok(String::from_utf8_lossy(&answer[..n]).contains(" 200 "))
        };
        ask().unwrap_or(false)
    }

    /// Runs docker; it must succeed. Returns what it printed (trimmed).
    pub fn docker(&self, args: &[&str]) -> Result<String> {
        self.try_docker(args)?.text()
    }

    /// Runs docker where failing is an answer too.
    pub fn try_docker(&self, args: &[&str]) -> Result<Output> {
        self.run(&[&["docker"], args].concat())
    }

    /// Gives dockerd the image [`IMAGE`](crate::IMAGE).
    pub fn load_image(&self) -> Result<()> {
        self.run_input(&["docker", "load", "-q"], image::open()?)?.text().map(|_| ())
    }

    /// Starts a container of [`IMAGE`](crate::IMAGE) that does nothing (`sleep infinity`); `args` are those of `docker run`
    /// before the image.
    pub fn docker_run(&self, name: &str, args: &[&str]) -> Result<Container> {
        let start = ["run", "-d", "--name", name];
        self.docker(&[&start, args, &[image::IMAGE]].concat())?;
        self.docker_container(name)
    }

    /// Starts the machine's etcd in a container with the host's network, listening on all addresses at port 2379; its data
    /// lies in a volume. `args` are those of `docker run` before the image.
    pub fn docker_run_etcd(&self, name: &str, args: &[&str]) -> Result<()> {
        let url = format!("http://{}:2379", self.ip());
        let mut start = vec!["run", "-d", "--name", name, "--network", "host", "-v", "lab-etcd:/data"];
        // The image has no etcd, but the machine has, and its libraries.
        let machine = ["/usr", "/lib", "/lib64"].map(|dir| format!("{dir}:{dir}:ro"));
        for volume in &machine {
            start.extend(["-v", volume]);
        }
        let etcd = ["/usr/bin/etcd", "--data-dir", "/data", "--advertise-client-urls", &url];
        let listen = ["--listen-client-urls", "http://0.0.0.0:2379"];
        self.docker(&[&start, args, &[image::IMAGE], &etcd, &listen].concat()).map(|_| ())
    }

    /// A running container of dockerd.
    pub fn docker_container(&self, name: &str) -> Result<Container> {
        let pid = self.docker(&["inspect", "-f", "{{.State.Pid}}", name])?;
        Container::new(self, name, pid.parse().with_context(|| format!("docker printed pid {pid:?}"))?)
    }

    /// The first address that dockerd knows of a container, on `network` or, with `""`, on any.
    pub fn docker_ip(&self, name: &str, network: &str) -> Result<String> {
        let format = if network.is_empty() {
            "{{range .NetworkSettings.Networks}}{{.IPAddress}} {{end}}".to_owned()
        } else {
            format!("{{{{(index .NetworkSettings.Networks {network:?}).IPAddress}}}}")
        };
        let said = self.docker(&["inspect", "-f", &format, name])?;
        let first = said.split_whitespace().next().map(str::to_owned);
        first.with_context(|| format!("{}: container {name} has no address", self.name()))
    }

    /// Starts containerd and waits until it answers.
    pub fn start_containerd(&self) -> Result<Daemon> {
        let daemon = self.spawn("containerd", &["containerd"], &[])?;
        self.wait_engine(&daemon, || {
            self.exists(CONTAINERD_SOCKET) && self.run(&["ctr", "version"]).is_ok_and(|said| said.ok())
        })?;
        Ok(daemon)
    }

    /// Runs ctr; it must succeed. Returns what it printed (trimmed).
    pub fn ctr(&self, args: &[&str]) -> Result<String> {
        self.try_ctr(args)?.text()
    }

    /// Runs ctr where failing is an answer too.
    pub fn try_ctr(&self, args: &[&str]) -> Result<Output> {
        self.run(&[&["ctr"], args].concat())
    }

    /// Gives containerd the image [`IMAGE_REFERENCE`].
    pub fn import_image(&self) -> Result<()> {
        self.run_input(&["ctr", "images", "import", "-"], image::open()?)?.text().map(|_| ())
    }

    /// Gives it to one of containerd's namespaces: `k8s.io` is that of Kubernetes.
    pub fn import_image_into(&self, namespace: &str) -> Result<()> {
        let argv = ["ctr", "-n", namespace, "images", "import", "-"];
        self.run_input(&argv, image::open()?)?.text().map(|_| ())
    }

    /// A container that some engine made, by the process that the engine says it has.
    pub fn container(&self, name: &str, pid: i32) -> Result<Container> {
        Container::new(self, name, pid)
    }

    /// Starts a container of [`IMAGE_REFERENCE`] that does nothing; `args` are those of `ctr run` before the image (`--cni`).
    pub fn ctr_run(&self, name: &str, args: &[&str]) -> Result<Container> {
        let start = ["run", "-d", "--null-io"];
        self.ctr(&[&start, args, &[IMAGE_REFERENCE, name, "sleep", "infinity"]].concat())?;
        self.ctr_container(name)
    }

    /// Ends and removes a container of containerd.
    pub fn ctr_remove(&self, name: &str) -> Result<()> {
        self.ctr(&["task", "rm", "-f", name])?;
        self.ctr(&["container", "rm", name]).map(|_| ())
    }

    /// A running container of containerd.
    pub fn ctr_container(&self, name: &str) -> Result<Container> {
        let tasks = self.ctr(&["task", "ls"])?;
        let pid = tasks.lines().find_map(|line| {
            let mut words = line.split_whitespace();
            if words.next() == Some(name) { words.next()?.parse().ok() } else { None }
        });
        Container::new(
            self,
            name,
            pid.with_context(|| format!("{}: no task {name} in\n{tasks}", self.name()))?,
        )
    }

    /// Copies a plugin under test (`flannel`) into /opt/cni/bin, where runtimes look.
    pub fn install_cni(&self, binary: &str) -> Result<()> {
        let from = binaries::path(binary)?;
        let to = self.path(CNI_BIN).join(binary);
        fs::copy(&from, &to)
            .map(|_| ())
            .with_context(|| format!("could not copy {} to {}", from.display(), to.display()))
    }

    /// Puts Debian's CNI plugins into /opt/cni/bin.
    pub fn install_debian_cni(&self) -> Result<()> {
        let plugins = fs::read_dir(DEBIAN_CNI)
            .with_context(|| format!("could not list {DEBIAN_CNI} (package containernetworking-plugins)"))?;
        for plugin in plugins {
            let plugin = plugin?;
            let to = self.path(CNI_BIN).join(plugin.file_name());
            if !to.exists() {
                symlink(plugin.path(), &to).with_context(|| format!("could not make {}", to.display()))?;
            }
        }
        Ok(())
    }

    fn wait_engine(&self, daemon: &Daemon, answers: impl Fn() -> bool) -> Result<()> {
        let what = format!("{} answers on {}", daemon.name(), self.name());
        let dead = eventually(what, ENGINE_DEADLINE, || {
            let dead = !daemon.alive();
            (dead || answers()).then_some(dead)
        });
        match dead {
            Ok(false) => Ok(()),
            Ok(true) => bail!("{} ended on {}\n{}", daemon.name(), self.name(), daemon.tail()),
            Err(error) => Err(error.context(daemon.tail())),
        }
    }
}

/// A running container. As a [`Place`] it runs the machine's own programs in the container's network namespace: `docker exec`
/// takes a tenth of a second, and the image has few tools.
#[derive(Clone)]
pub struct Container {
    host: Host,
    name: String,
    /// Its first process, as its host counts.
    pid: i32,
}

impl Container {
    fn new(host: &Host, name: &str, pid: i32) -> Result<Self> {
        if pid == 0 {
            bail!("{}: container {name} does not run", host.name());
        }
        Ok(Self { host: host.clone(), name: name.to_owned(), pid })
    }

    /// The host it runs on.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Runs a program of its own image in it, with `docker exec`; it must succeed. Returns what it printed (trimmed).
    pub fn docker_exec(&self, argv: &[&str]) -> Result<String> {
        self.host.docker(&[&["exec", &self.name], argv].concat())
    }

    /// Its first process, as its host counts.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Its network namespace, as a path the test can open; as its host sees it: `/proc/<pid>/ns/net`.
    pub fn netns(&self) -> PathBuf {
        self.host.path(format!("/proc/{}/ns/net", self.pid))
    }

    /// A path in the container as the test can open it.
    pub fn path(&self, inside: impl AsRef<Path>) -> PathBuf {
        let inside = inside.as_ref();
        self.host.path(format!("/proc/{}/root", self.pid)).join(inside.strip_prefix("/").unwrap_or(inside))
    }

    /// The IPv4 address and prefix length of one of its interfaces, as the kernel has it: `10.100.3.2/24`.
    pub fn address(&self, link: &str) -> Result<String> {
        let said = self.out(&["ip", "-4", "-o", "addr", "show", "dev", link])?;
        let address = said.split_whitespace().skip_while(|&word| word != "inet").nth(1);
        address.map(str::to_owned).with_context(|| format!("{}: {link} has no address: {said}", self.name()))
    }

    /// The address of eth0 without its prefix length.
    pub fn ip(&self) -> Result<String> {
        let address = self.address("eth0")?;
        Ok(address.split('/').next().unwrap_or_default().to_owned())
    }

    /// The MTU of one of its interfaces.
    pub fn mtu(&self, link: &str) -> Result<u32> {
        let said = self.out(&["ip", "-o", "link", "show", "dev", link])?;
        let mtu =
            said.split_whitespace().skip_while(|&word| word != "mtu").nth(1).and_then(|n| n.parse().ok());
        mtu.with_context(|| format!("{}: no MTU in {said}", self.name()))
    }
}

impl Place for Container {
    fn name(&self) -> String {
        format!("{} on {}", self.name, self.host.name())
    }

    fn host(&self) -> &Host {
        &self.host
    }

    fn enter(&self, argv: &[&str]) -> Command {
        let pid = self.pid.to_string();
        self.host.enter(&[&["nsenter", "-t", &pid, "-n", "--"], argv].concat())
    }
}

impl fmt::Debug for Container {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&Place::name(self))
    }
}
