//! `make quickstart`: two hosts with an engine and the plugin each, one network, a container on each, a ping and a page across.
//!
//! Everything happens in a lab: namespaces of this machine without a link to the outside, gone when this ends. Every
//! command is shown as one would type it on a real host.

use std::io::Write;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};
use flannel_tests::{Host, Lab, SHARED_DIR, eventually, secs};

const NETWORK: &str = "10.244.0.0/16";

fn main() -> ExitCode {
    let plan = Lab::new("quickstart").hosts(2).needs(&["dockerd", "docker", "busybox"]);
    if !plan.can_run() {
        say("quickstart needs root and the programs named above; `make setup` installs them");
        return ExitCode::FAILURE;
    }
    let started = Instant::now();
    let result = plan.start().and_then(|lab| {
        let shown = show(&lab);
        if shown.is_err() {
            say(&lab.dump());
        }
        let gone = lab.tear_down();
        shown.and(gone)
    });
    match result {
        Ok(()) => {
            say(&format!("\nEverything is gone again. It took {:.1} s.", started.elapsed().as_secs_f64()));
            ExitCode::SUCCESS
        }
        Err(error) => {
            say(&format!("\nquickstart failed: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn show(lab: &Lab) -> Result<()> {
    say(
        "Two hosts, h1 and h2, each with its own Docker engine; the plugins share an embedded store (a directory).\n",
    );
    let store = format!("{SHARED_DIR}/store");
    for host in lab.hosts() {
        host.start_dockerd(&[])?;
        host.load_image()?;
        typed(host, &["flannel-docker-plugin", "--store-dir", &store, "&"]);
        host.spawn("plugin", &["flannel-docker-plugin", "--store-dir", &store], &[])?;
        eventually("the plugin listens", secs(5), || host.exists("/run/docker/plugins/flannel.sock"))?;
    }
    say("\nThe same line on both hosts:");
    for host in lab.hosts() {
        run(
            host,
            &[
                "docker",
                "network",
                "create",
                "-d",
                "flannel",
                "--ipam-driver",
                "flannel",
                "--subnet",
                NETWORK,
                "web",
            ],
        )?;
    }
    say("\nA container on each:");
    let [h1, h2] = lab.hosts() else { anyhow::bail!("the lab was asked for two hosts") };
    run(h1, &["docker", "run", "-d", "--name", "one", "--network", "web", "lab", "sleep", "1000"])?;
    let serve = "echo 'hello from h2' > /www/index.html && exec httpd -f -p 80 -h /www";
    run(h2, &["docker", "run", "-d", "--name", "two", "--network", "web", "lab", "sh", "-c", serve])?;
    let address = h2.docker_ip("two", "web")?;

    say("\nFrom the one on h1 to the one on h2:");
    eventually("the ping", secs(10), || {
        h1.try_docker(&["exec", "one", "ping", "-c", "1", "-W", "1", &address]).is_ok_and(|ping| ping.ok())
    })?;
    run(h1, &["docker", "exec", "one", "ping", "-c", "3", &address])?;
    run(h1, &["docker", "exec", "one", "wget", "-q", "-O", "-", &format!("http://{address}/")])?;

    say("\nWhat to look at:");
    run(h1, &["cat", "/run/flannel/subnet.env"])?;
    run(h1, &["ip", "route"])?;
    run(h1, &["bridge", "fdb", "show", "dev", "flannel.1"])?;

    say("\nBreak it, and see it heal:");
    run(h1, &["ip", "link", "delete", "flannel.1"])?;
    let broken = Instant::now();
    let peer = "via .* dev flannel.1 onlink";
    eventually("the repair", secs(10), || h1.sh(&format!("ip route | grep '{peer}'")).is_ok())?;
    say(&format!(
        "  device, neighbor, forwarding entry and route are back after {:.2} s",
        broken.elapsed().as_secs_f64()
    ));
    run(h1, &["docker", "exec", "one", "ping", "-c", "1", "-W", "1", &address])?;

    say("\nAway with it:");
    for (host, container) in [(h1, "one"), (h2, "two")] {
        run(host, &["docker", "rm", "-f", container])?;
        run(host, &["docker", "network", "rm", "web"])?;
    }
    Ok(())
}

fn run(host: &Host, argv: &[&str]) -> Result<()> {
    typed(host, argv);
    let output = host.out(argv).with_context(|| format!("on {}", host.name()))?;
    for line in output.lines() {
        say(&format!("  {line}"));
    }
    Ok(())
}

fn typed(host: &Host, argv: &[&str]) {
    let quoted: Vec<_> = argv
        .iter()
        .map(|word| if word.contains(' ') { format!("\"{word}\"") } else { (*word).to_owned() })
        .collect();
    say(&format!("{} # {}", host.name(), quoted.join(" ")));
}

/// The story is this program's output.
fn say(text: &str) {
    // If nobody reads it any more there is nobody to tell.
    let _ = writeln!(std::io::stdout(), "{text}");
}
