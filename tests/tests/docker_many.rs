//! Many containers on one engine, which is then restarted: all come back, nobody shares an address, and the engine hardly
//! waits for the plugin.
//!
//! The ordinary run has 40 of them, `FLANNEL_TESTS_LONG=1` (and `cargo nextest run --profile long`) has 200.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use flannel_tests::conversation::{HIDDEN_SOCKET, Proxy, time_under_way};
use flannel_tests::{CREATE_WEB, Daemon, Host, IMAGE, Lab, eventually, in_lab, secs};
use serde_json::Value;

/// Every so many gets an address that the user chose.
const FIXED_EVERY: usize = 10;

fn containers() -> usize {
    if std::env::var_os("FLANNEL_TESTS_LONG").is_some_and(|long| long == "1") { 200 } else { 40 }
}

/// Container to address, of those that run on the network.
fn addresses(host: &Host) -> Result<BTreeMap<String, String>> {
    let seen: Value = serde_json::from_str(&host.docker(&["network", "inspect", "web"])?)?;
    let containers = seen[0]["Containers"].as_object().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    Ok(containers
        .values()
        .map(|one| {
            (text(&one["Name"]), text(&one["IPv4Address"]).split('/').next().unwrap_or_default().to_owned())
        })
        .collect())
}

/// All of them run, answer, and have addresses of their own.
fn all_are_well(host: &Host, fixed: &BTreeMap<String, String>) -> Result<()> {
    let found = eventually("all containers are on the network", secs(240), || -> Result<_> {
        let found = addresses(host)?;
        ensure!(found.len() == containers(), "{} of {}", found.len(), containers());
        Ok(found)
    })?;
    let different: std::collections::BTreeSet<&String> = found.values().collect();
    ensure!(different.len() == found.len(), "an address twice: {found:?}");
    for (name, address) in fixed {
        ensure!(found.get(name) == Some(address), "{name} was to have {address}: {:?}", found.get(name));
    }
    let list = found.values().cloned().collect::<Vec<_>>().join(" ");
    eventually("all of them answer", secs(60), || {
        let silent = host.sh(&format!(
            "echo {list} | tr ' ' '\\n' | xargs -P 8 -I@ sh -c 'ping -n -c 1 -W 2 @ > /dev/null || echo @'"
        ))?;
        ensure!(silent.is_empty(), "no answer from {silent}");
        Ok(())
    })?;
    let held = host.sh("ls /var/lib/cni/networks/cbr0 | grep -c '^10\\.'")?;
    ensure!(held == containers().to_string(), "{held} addresses are held");
    let ports = host.sh("ip -o link show master cni0 | wc -l")?;
    ensure!(ports == containers().to_string(), "{ports} ports on the bridge");
    Ok(())
}

/// An engine answers only when it has started all its containers.
fn start_engine(host: &Host) -> Result<(Daemon, Duration)> {
    let start = Instant::now();
    let daemon = host.spawn("dockerd", &["dockerd"], &[])?;
    eventually("the engine answers", secs(400), || host.dockerd_answers()).with_context(|| daemon.tail())?;
    Ok((daemon, start.elapsed()))
}

#[test]
fn all_of_many_containers_come_back_after_the_engines_restart() {
    let plan = Lab::new("docker-many").hosts(1).ip_forward(false).needs(&["dockerd", "docker", "busybox"]);
    in_lab(plan, |lab| {
        let host = lab.host(1);
        let socket = format!("--socket={HIDDEN_SOCKET}");
        let proxy = Proxy::start(host)?;
        let plugin = host.spawn("flannel-docker-plugin", &["flannel-docker-plugin", &socket], &[])?;
        eventually("the plugin listens", secs(10), || host.exists(HIDDEN_SOCKET))
            .with_context(|| plugin.tail())?;
        let (mut engine, empty) = start_engine(host)?;
        host.load_image()?;
        host.docker(CREATE_WEB)?;
        let subnet = host.sh("sed -n 's/^FLANNEL_SUBNET=\\(.*\\)\\.1\\/24/\\1/p' /run/flannel/subnet.env")?;
        let fixed: BTreeMap<String, String> = (0..containers())
            .step_by(FIXED_EVERY)
            .map(|number| (format!("m{number}"), format!("{subnet}.{}", 254 - number / FIXED_EVERY)))
            .collect();
        let mut commands = String::new();
        for number in 0..containers() {
            let name = format!("m{number}");
            let address = fixed.get(&name).map(|address| format!("--ip {address} ")).unwrap_or_default();
            commands.push_str(&format!("-d --restart=always --network web --name {name} {address}{IMAGE}\n"));
        }
        host.write("/run/lab/many", commands)?;
        let start = Instant::now();
        let made = host.run_for(
            secs(600),
            &["sh", "-c", "xargs -P 4 -L 1 docker run < /run/lab/many > /run/lab/made"],
        )?;
        ensure!(made.ok(), "{made}");
        eprintln!("{} containers made in {:.1?}", containers(), start.elapsed());
        all_are_well(host, &fixed)?;

        for sigkill in [false, true] {
            match sigkill {
                true => engine.crash()?,
                false => drop(engine.stop(secs(300))?),
            }
            proxy.take();
            let before = plugin.usage()?.cpu_seconds;
            let took;
            (engine, took) = start_engine(host)?;
            all_are_well(host, &fixed)?;
            let used = plugin.usage()?.cpu_seconds - before;
            let calls = proxy.take();
            let times = |named: &str| {
                let mut times: Vec<f64> =
                    calls.iter().filter(|c| c.method.contains(named)).map(|c| c.ms).collect();
                times.sort_by(f64::total_cmp);
                times
            };
            // What a call takes that does nothing is what this machine takes to switch between processes just now.
            let (all, idle) = (times(""), times("EndpointOperInfo"));
            let idle = idle.get(idle.len() / 2).copied().unwrap_or_default();
            let share: f64 = all.iter().map(|ms| (ms - idle).max(0.0)).sum();
            eprintln!(
                "start (killed: {sigkill}) of an engine with {} containers: {took:.1?}, with none {empty:.1?}; {} calls, median {:.2} ms, \
                 p99 {:.2} ms (one that does nothing {idle:.2} ms); at least one under way for {:.0} ms, sum beyond idle {share:.0} ms; \
                 the plugin's processor time {used:.2} s",
                containers(),
                all.len(),
                all[all.len() / 2],
                all[all.len() * 99 / 100],
                time_under_way(&calls),
            );
            // Processor time, because it hardly depends on what else this machine does.
            let allowed = 0.5 + 0.03 * f64::from(u32::try_from(containers())?);
            ensure!(used < allowed, "the plugin used {used} s");
            let refused: Vec<_> = calls.iter().filter(|call| call.status != 200).collect();
            ensure!(refused.is_empty(), "{refused:?}");
        }
        Ok(())
    });
}
