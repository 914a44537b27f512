//! The lab itself: what every other suite relies on.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;
use std::{env, fs, thread};

use anyhow::{Result, ensure};
use flannel_tests::{
    BIN_DIR, HttpServer, Lab, PingStream, Place as _, binaries, eventually, http_get, ids, in_lab,
    largest_packet, ping, ping_within, secs, seen_as, sweep, tcp_opens,
};

#[test]
fn hosts_reach_each_other_and_nothing_else() {
    in_lab(Lab::new("reach").hosts(3).behind_router(&[3]), |lab| {
        for from in lab.hosts() {
            for to in lab.hosts() {
                ping_within(secs(2), from, to.ip())?;
                ping_within(secs(2), from, to.ip6())?;
            }
            let route = from.run(&["ping", "-c", "1", "-W", "1", "192.0.2.1"])?;
            ensure!(route.stdout.contains("Net Unreachable"), "the router knows a way out: {route}");
        }
        let hops = lab.host(1).out(&["ip", "route", "get", &lab.host(3).ip().to_string()])?;
        ensure!(hops.contains("via 10.77.0.1"), "h3 is not behind the router: {hops}");
        ensure!(lab.host(3).ip().to_string() == "10.77.1.13");
        Ok(())
    });
}

#[test]
fn a_host_has_its_own_files_and_shares_one_directory() {
    in_lab(Lab::new("files").hosts(2).rp_filter(1), |lab| {
        let (h1, h2) = (lab.host(1), lab.host(2));
        for path in ["/run/a", "/var/run/flannel/a", "/var/lib/a", "/var/log/a", "/etc/a", "/opt/cni/bin/a"] {
            h1.write(path, "h1")?;
            ensure!(h1.out(&["cat", path])? == "h1", "{path} was written elsewhere");
            ensure!(!h2.exists(path) && !Path::new(path).exists(), "{path} appeared outside h1");
        }
        h1.write(&format!("{}/lease", lab.shared_dir()), "10.100.3.0/24")?;
        ensure!(h2.sh(&format!("cat {}/lease", lab.shared_dir()))? == "10.100.3.0/24");
        ensure!(fs::read_to_string(lab.shared_path().join("lease"))? == "10.100.3.0/24");
        // The lock of one host holds on the other.
        let lock = format!("{}/lock", lab.shared_dir());
        let holder = h1.spawn("holder", &["flock", &lock, "sh", "-c", "echo held; sleep 60"], &[])?;
        holder.wait_log("held", secs(5))?;
        ensure!(h2.run(&["flock", "-n", &lock, "true"])?.code == 1);
        holder.crash()?;
        ensure!(!holder.alive());

        ensure!(h1.out(&["hostname"])? == "h1");
        ensure!(h1.sh("cat /proc/sys/net/ipv4/conf/all/rp_filter /proc/sys/net/ipv4/ip_forward")? == "1\n1");
        ensure!(fs::metadata(h1.path(BIN_DIR))?.ino() == fs::metadata(binaries::dir()?)?.ino());
        Ok(())
    });
}

#[test]
fn commands_and_programs_end_as_they_are_told() {
    in_lab(Lab::new("commands").hosts(1), |lab| {
        let host = lab.host(1);
        let said = host.run(&["sh", "-c", "echo out; echo err >&2; exit 3"])?;
        ensure!((said.code, said.stdout.as_str(), said.stderr.as_str()) == (3, "out\n", "err\n"), "{said:?}");
        let error = format!("{:#}", host.sh("echo seen; false").unwrap_err());
        ensure!(
            error.contains("h1: sh -ec") && error.contains("code 1") && error.contains("seen"),
            "{error}"
        );

        let slow = host.run_for(Duration::from_millis(200), &["sh", "-c", "echo begun; sleep 987; true"]);
        let error = format!("{:#}", slow.unwrap_err());
        ensure!(error.contains("still running after 200ms") && error.contains("begun"), "{error}");
        let left = host.sh("for p in /proc/[0-9]*; do tr '\\0' ' ' < $p/cmdline; echo; done")?;
        ensure!(!left.contains("sleep 987"), "a command outlived its deadline:\n{left}");

        let deaf =
            host.spawn("deaf", &["sh", "-c", "trap '' TERM; echo deaf; while :; do sleep 0.05; done"], &[])?;
        deaf.wait_log("deaf", secs(5))?;
        let error = format!("{:#}", deaf.stop(Duration::from_millis(200)).unwrap_err());
        ensure!(error.contains("was killed") && !deaf.alive(), "{error}");

        let polite = host.spawn("polite", &["sleep", "100"], &[("A", "b")])?;
        ensure!(polite.usage()?.rss_kib > 0);
        // Its process is there a moment before its program is.
        eventually("its environment", secs(5), || {
            let environ = fs::read(format!("/proc/{}/environ", polite.pid())).unwrap_or_default();
            environ.split(|&b| b == 0).any(|v| v == b"A=b")
        })?;
        polite.stop(secs(5))?;
        let error = format!("{:#}", polite.wait_log("never", secs(5)).unwrap_err());
        ensure!(error.contains("ended without saying \"never\""), "{error}");
        let missing = host.spawn("missing", &["no-such-program"], &[])?;
        ensure!(!missing.wait(secs(5))?.success());
        ensure!(missing.log().contains("no-such-program"), "{}", missing.tail());
        Ok(())
    });
}

#[test]
fn the_machine_is_as_before() {
    if !Lab::new("before").can_run() {
        return;
    }
    let before = machine();
    let lab = Lab::new("before").hosts(2).etcd().start().unwrap();
    let id = lab.id().to_owned();
    let namespaces: Vec<u64> = lab.hosts().iter().map(|h| fs::metadata(h.netns()).unwrap().ino()).collect();
    // A program that left its session and its parent is the hardest to get rid of.
    lab.host(1).sh("setsid sh -c 'setsid sleep 1000 &'").unwrap();
    assert!(inhabitants(&namespaces) >= 3, "the hosts' processes are not seen");
    assert!(ids().contains(&id));
    assert_eq!(machine(), before, "the lab shows in the machine's own network or mounts");
    drop(lab);
    assert_eq!(inhabitants(&namespaces), 0);
    assert!(!ids().contains(&id));
    assert_eq!(machine(), before);
}

/// Set in the process that is going to be killed.
const VICTIM: &str = "LAB_TEST_VICTIM";

#[test]
fn a_killed_test_leaves_nothing() {
    if !Lab::new("victim").can_run() {
        return;
    }
    if env::var_os(VICTIM).is_some() {
        let lab = Lab::new("victim").hosts(2).start().unwrap();
        lab.host(1).sh("setsid sh -c 'setsid sleep 1000 &'").unwrap();
        let namespaces: Vec<String> =
            lab.hosts().iter().map(|h| fs::metadata(h.netns()).unwrap().ino().to_string()).collect();
        println!("\nlab {} {}", lab.id(), namespaces.join(" "));
        thread::sleep(secs(60));
        panic!("nobody killed this test");
    }
    let mut victim = Command::new(env::current_exe().unwrap())
        .args(["--exact", "a_killed_test_leaves_nothing", "--nocapture"])
        .env(VICTIM, "1")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(victim.stdout.take().unwrap()).lines();
    let line =
        lines.map(Result::unwrap).find_map(|line| line.strip_prefix("lab ").map(str::to_owned)).unwrap();
    let (id, namespaces) = line.split_once(' ').unwrap();
    let namespaces: Vec<u64> = namespaces.split(' ').map(|n| n.parse().unwrap()).collect();
    assert!(inhabitants(&namespaces) >= 3, "the hosts' processes are not seen");

    victim.kill().unwrap();
    victim.wait().unwrap();
    eventually("all processes of the lab are gone", secs(10), || inhabitants(&namespaces) == 0).unwrap();
    eventually("the sweep finds nothing more", secs(10), || {
        sweep();
        !ids().iter().any(|other| other == id)
    })
    .unwrap();
}

/// Set in the process that is going to fail: how.
const FAILURE: &str = "LAB_TEST_FAILURE";

#[test]
fn a_failing_test_shows_its_hosts() {
    if !Lab::new("failure").can_run() {
        return;
    }
    if let Some(how) = env::var_os(FAILURE) {
        in_lab(Lab::new("failure").hosts(1), |lab| {
            println!("\nlab {}", lab.id());
            lab.host(1).spawn("talker", &["sh", "-c", "echo my last words"], &[])?.wait(secs(5))?;
            assert!(how != "panic", "it panicked");
            lab.host(1).out(&["ip", "link", "show", "dev", "no-such-link"]).map(|_| ())
        });
    }
    for (how, message) in [("panic", "it panicked"), ("error", "Device \"no-such-link\" does not exist")] {
        let output = Command::new(env::current_exe().unwrap())
            .args(["--exact", "a_failing_test_shows_its_hosts", "--nocapture"])
            .env(FAILURE, how)
            .output()
            .unwrap();
        let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat();
        assert!(!output.status.success(), "{said}");
        for part in [message, "=== host h1", "default via 10.77.0.1", "my last words"] {
            assert!(said.contains(part), "no {part:?} in\n{said}");
        }
        let id = said.lines().find_map(|line| line.strip_prefix("lab ")).unwrap();
        assert!(!ids().iter().any(|left| left == id), "{id} was left");
    }
}

#[test]
fn a_lab_has_an_end() {
    in_lab(Lab::new("ttl").hosts(1).time_to_live(secs(1)), |lab| {
        eventually("the host ends by itself", secs(5), || !lab.host(1).alive())
    });
}

#[test]
fn a_rebooted_host_has_its_disks_and_nothing_else() {
    in_lab(Lab::new("reboot").hosts(2).needs(&["dockerd", "docker"]), |lab| {
        let (host, other) = (lab.host(1), lab.host(2));
        let before = host.network_state()?;
        let boot = host.read("/proc/sys/kernel/random/boot_id")?;
        let dockerd = host.start_dockerd(&[])?;
        host.load_image()?;
        host.docker_run("c1", &["--restart=always"])?;
        host.write("/var/lib/flannel/state", "kept")?;
        host.write("/run/flannel/subnet.env", "lost")?;
        host.sh("ip link add flannel.1 type vxlan id 1 dstport 8472; ip route add 10.9.0.0/24 via 10.77.0.12; ip rule add pref 5 table 5")?;

        for _ in 0..2 {
            lab.reboot(host)?;
            ensure!(!dockerd.alive());
            eventually("the network is as before", secs(3), || {
                let after = host.network_state()?;
                ensure!(after == before, "before\n{before}\nafter\n{after}");
                Ok(())
            })?;
            ensure!(host.exists("/var/lib/flannel/state") && !host.exists("/run/flannel"));
            ensure!(host.read("/proc/sys/kernel/random/boot_id")? != boot);
            ping_within(secs(3), other, host.ip())?;
        }
        host.start_dockerd(&[])?;
        let container = eventually("the engine brings c1 back", secs(10), || host.docker_container("c1"))?;
        ping_within(secs(3), host, container.ip()?)
    });
}

/// The machine's own links, addresses, routes, rules and mounts.
fn machine() -> String {
    let script = "ip -o link | cut -d' ' -f1-4; ip -o addr | sed 's/valid_lft.*//'; ip route show table all; ip rule; \
        nft -s list ruleset; cat /proc/self/mountinfo; ls /run/netns 2>/dev/null || true";
    let output = Command::new("sh").args(["-c", script]).output().expect("sh runs");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).expect("text")
}

/// How many processes live in these network namespaces.
fn inhabitants(namespaces: &[u64]) -> usize {
    let all = fs::read_dir("/proc").expect("/proc is there").flatten();
    all.filter(|p| fs::metadata(p.path().join("ns/net")).is_ok_and(|ns| namespaces.contains(&ns.ino())))
        .count()
}

#[test]
fn etcd_answers() {
    in_lab(Lab::new("etcd").hosts(1).etcd(), |lab| {
        lab.etcdctl(&["put", "/a", "b"])?;
        lab.etcd_stop()?;
        ensure!(lab.etcdctl(&["get", "/a"]).is_err());
        lab.etcd_start()?;
        ensure!(lab.etcdctl(&["get", "--print-value-only", "/a"])? == "b");
        Ok(())
    });
}

#[test]
fn docker_runs_a_container() {
    // As on a fresh machine: the engine finds forwarding off and turns FORWARD to DROP when it turns it on.
    in_lab(Lab::new("docker").hosts(1).ip_forward(false).needs(&["dockerd", "docker"]), |lab| {
        let host = lab.host(1);
        let dockerd = host.start_dockerd(&[])?;
        ensure!(host.out(&["iptables", "-S", "FORWARD"])?.contains("-P FORWARD DROP"));
        host.load_image()?;
        let container = host.docker_run("c1", &[])?;
        ping(host, container.ip()?)?;
        ping(&container, host.ip())?;
        let _server = HttpServer::start(&container, 80, "hello")?;
        ensure!(http_get(host, &format!("http://{}/", container.ip()?))? == "hello");
        ensure!(host.docker(&["exec", "c1", "hostname", "-i"])? == container.ip()?);
        ensure!(container.netns().exists());
        ensure!(
            host.sh(
                "cat /sys/fs/cgroup/pids/docker/*/pids.current || cat /sys/fs/cgroup/docker/*/pids.current"
            )? == "1"
        );
        host.docker(&["rm", "-f", "c1"])?;
        ensure!(dockerd.usage()?.rss_kib > 1000 && dockerd.usage()?.cpu_seconds > 0.0);
        dockerd.stop(secs(20))?;
        Ok(())
    });
}

#[test]
fn a_container_runs_the_machines_etcd() {
    in_lab(Lab::new("own-etcd").hosts(2).needs(&["dockerd", "docker", "etcd"]), |lab| {
        let host = lab.host(1);
        host.start_dockerd(&[])?;
        host.load_image()?;
        host.docker_run_etcd("store", &["--restart=always"])?;
        let health = format!("http://{}:2379/health", host.ip());
        eventually("etcd answers", secs(20), || http_get(lab.host(2), &health))?;
        Ok(())
    });
}

#[test]
fn containerd_runs_a_container() {
    in_lab(Lab::new("containerd").hosts(2).needs(&["containerd", "ctr", "runc"]), |lab| {
        for host in lab.hosts() {
            let containerd = host.start_containerd()?;
            host.import_image()?;
            let container = host.ctr_run("c1", &[])?;
            let links = container.out(&["ip", "-br", "link"])?;
            ensure!(links.lines().all(|link| !link.starts_with("eth0")), "{links}");
            ensure!(
                host.ctr(&["task", "exec", "--exec-id", "e1", "c1", "cat", "/etc/passwd"])?
                    .starts_with("root:")
            );
            host.ctr_remove("c1")?;
            containerd.stop(secs(20))?;
        }
        Ok(())
    });
}

#[test]
fn pings_are_counted_while_the_cable_is_out() {
    in_lab(Lab::new("stream").hosts(2), |lab| {
        let (h1, h2) = (lab.host(1), lab.host(2));
        let steady = PingStream::start(h1, h2.ip(), Duration::from_millis(10))?;
        thread::sleep(Duration::from_millis(300));
        let seen = steady.stop_after(11)?;
        ensure!(
            seen.sent >= 10 && seen.lost() == 0 && seen.longest_gap < Duration::from_millis(200),
            "{seen:?}"
        );

        let broken = PingStream::start(h1, h2.ip(), Duration::from_millis(10))?;
        thread::sleep(Duration::from_millis(100));
        lab.link(h2, false)?;
        eventually("h2's eth0 without carrier", secs(2), || {
            h2.out(&["ip", "link", "show", "eth0"]).is_ok_and(|link| link.contains("NO-CARRIER"))
        })?;
        thread::sleep(Duration::from_millis(300));
        lab.link(h2, true)?;
        ping_within(secs(3), h1, h2.ip())?;
        let seen = broken.stop()?;
        ensure!(seen.lost() > 10 && seen.longest_gap >= Duration::from_millis(300), "{seen:?}");
        Ok(())
    });
}

#[test]
fn the_largest_packet_is_the_mtu() {
    in_lab(Lab::new("mtu").hosts(2).mtu(1400), |lab| {
        ensure!(largest_packet(lab.host(1), lab.host(2).ip())? == 1400);
        Ok(())
    });
}

#[test]
fn the_world_outside_sees_who_comes() {
    in_lab(Lab::new("outside").hosts(1).outside(), |lab| {
        let (host, outside) = (lab.host(1), lab.outside());
        let _server = HttpServer::start(outside, 8080, "out here")?;
        ensure!(seen_as(host, outside.ip(), 8080)? == host.ip().to_string());
        tcp_opens(host, outside.ip(), 8080)?;
        ensure!(tcp_opens(host, outside.ip(), 8081).is_err());
        Ok(())
    });
}
