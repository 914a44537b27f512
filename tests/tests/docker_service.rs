//! The plugin as a service: its systemd units, and a start by socket activation.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use flannel_tests::{CREATE_WEB, Host, Lab, Signal, eventually, in_lab, needs, ping_within, secs};

const SOCKET: &str = "/run/docker/plugins/flannel.sock";

/// A unit file of the repository.
fn unit(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/systemd")).join(name)
}

/// The values of a setting in a unit.
fn setting(name: &str, key: &str) -> Result<Vec<String>> {
    let text = fs::read_to_string(unit(name))?;
    let prefix = format!("{key}=");
    Ok(text.lines().filter_map(|line| line.strip_prefix(&prefix)).map(str::to_owned).collect())
}

#[test]
fn systemd_finds_no_fault_with_the_units() -> Result<()> {
    if !needs::require("systemd-analyze") {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let verify = |units: &[PathBuf]| -> Result<String> {
        let output = Command::new("systemd-analyze").args(["verify", "--man=no"]).args(units).output()?;
        Ok(String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let mut units = Vec::new();
    for name in ["flannel-docker-plugin.socket", "flannel-docker-plugin.service", "flanneld.service"] {
        // What is not installed cannot be started, and that is all that may be wrong.
        let text = fs::read_to_string(unit(name))?.replace("/usr/local/bin/", "/usr/bin/env ");
        let copy = dir.path().join(name);
        fs::write(&copy, text)?;
        units.push(copy);
    }
    let said = verify(&units)?;
    ensure!(said.is_empty(), "{said}");
    // It does find faults.
    fs::write(&units[0], fs::read_to_string(&units[0])?.replace("SocketMode=0600", "SocketMod=0600"))?;
    ensure!(verify(&units)?.contains("SocketMod"), "a misspelled setting is not noticed");
    Ok(())
}

/// A path that systemd cannot find keeps the whole unit from starting (226/NAMESPACE), and a host with Docker has no CNI.
#[test]
fn flannelds_unit_needs_nothing_that_a_host_may_lack() -> Result<()> {
    let paths = setting("flanneld.service", "ReadWritePaths")?.join(" ");
    let (sure, lacking): (Vec<_>, Vec<_>) = paths.split_whitespace().partition(|path| !path.starts_with('-'));
    ensure!(sure == ["/run"], "{sure:?}");
    ensure!(lacking == ["-/var/lib/cni"], "{lacking:?}");
    let may = setting("flanneld.service", "CapabilityBoundingSet")?.join(" ");
    for needed in ["CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_DAC_READ_SEARCH"] {
        ensure!(may.contains(needed), "{needed} is not in {may}");
    }
    Ok(())
}

/// Starts the plugin as the units do: the socket is there first, and the program comes with the first connection, with the
/// capabilities of the service and no others.
fn activate(host: &Host) -> Result<flannel_tests::Daemon> {
    let listen = setting("flannel-docker-plugin.socket", "ListenStream")?;
    ensure!(listen == [SOCKET], "{listen:?}");
    let bounding =
        setting("flannel-docker-plugin.service", "CapabilityBoundingSet")?.join(" ").to_lowercase();
    let kept =
        bounding.split_whitespace().map(|name| name.replace("cap_", "+")).collect::<Vec<_>>().join(",");
    let environment = setting("flannel-docker-plugin.service", "Environment")?;
    let bounding = format!("--bounding-set=-all,{kept}");
    let program = ["setpriv", &bounding, "--no-new-privs", "flannel-docker-plugin"];
    let mut line = vec!["systemd-socket-activate", "-l", SOCKET];
    for variable in &environment {
        line.extend(["-E", variable]);
    }
    line.extend(program);
    let daemon = host.spawn("flannel-docker-plugin", &line, &[])?;
    // There is a moment between a socket's file and its listening.
    daemon.wait_log("Listening on", secs(10))?;
    Ok(daemon)
}

#[test]
fn the_first_connection_starts_the_service() {
    let plan = Lab::new("docker-activation").hosts(1).ip_forward(false);
    let plan = plan.needs(&["dockerd", "docker", "busybox", "systemd-socket-activate", "setpriv"]);
    in_lab(plan, |lab| {
        let host = lab.host(1);
        let plugin = activate(host)?;
        let dockerd = host.start_dockerd(&[])?;
        host.load_image()?;
        ensure!(!plugin.log().contains("listening on"), "it runs before anybody asked\n{}", plugin.tail());
        // The engine's first request waits in the backlog until the program accepts.
        host.docker(CREATE_WEB).with_context(|| plugin.tail())?;
        let c1 = host.docker_run("c1", &["--network", "web", "--restart=always"])?;
        let c2 = host.docker_run("c2", &["--network", "web"])?;
        ping_within(secs(5), &c1, c2.ip()?)?;
        ensure!(host.out(&["cat", "/proc/sys/net/ipv4/ip_forward"])? == "1");

        // The socket's file is systemd's: it stays when the service stops, and the next request starts it again.
        plugin.stop(secs(10))?;
        ensure!(host.exists(SOCKET), "the plugin removed systemd's socket");
        let plugin = activate(host)?;
        // A port below 1024 is held by binding it, which takes a capability.
        let c3 = host.docker_run("c3", &["--network", "web", "-p", "80:80"])?;
        ping_within(secs(5), &c3, c1.ip()?)?;

        // Engine and service start together, the service waiting for its first call; nothing is lost.
        dockerd.stop(secs(30))?;
        plugin.kill(Signal::SIGKILL)?;
        plugin.wait(secs(10))?;
        let plugin = activate(host)?;
        let _dockerd = host.start_dockerd(&[])?;
        let back = eventually("c1 is back", secs(20), || host.docker_container("c1"))
            .with_context(|| plugin.tail())?;
        host.docker(&["start", "c2"])?;
        ping_within(secs(5), &back, host.docker_container("c2")?.ip()?)
    });
}

#[test]
fn a_socket_that_is_not_ours_is_refused_by_name() {
    let plan = Lab::new("docker-wrong-socket").hosts(1).needs(&["systemd-socket-activate"]);
    in_lab(plan, |lab| {
        let host = lab.host(1);
        for (listen, last, said) in [
            (&["-l", "/run/other.sock"][..], " as 3.", "ListenStream=/run/docker/plugins/flannel.sock"),
            (&["-l", "/run/other.sock", "-l", SOCKET], " as 4.", "2 sockets"),
        ] {
            let line = [&["systemd-socket-activate"], listen, &["flannel-docker-plugin"]].concat();
            let daemon = host.spawn("wrong", &line, &[])?;
            daemon.wait_log(last, secs(10))?;
            UnixStream::connect(host.path("/run/other.sock"))?;
            let status = daemon.wait(secs(10))?;
            ensure!(!status.success() && daemon.log().contains(said), "{status}\n{}", daemon.log());
            host.sh(&format!("rm -f /run/other.sock {SOCKET}"))?;
        }
        Ok(())
    });
}
