//! The lab itself: what every other suite relies on.

use std::thread;
use std::time::Duration;

use anyhow::ensure;
use flannel_tests::{
    HttpServer, Lab, PingStream, Place as _, eventually, http_get, in_lab, largest_packet, ping, ping_within,
    secs, seen_as, tcp_opens,
};

#[test]
fn hosts_reach_each_other_and_nothing_else() {
    in_lab(Lab::new("reach").hosts(3).behind_router(&[3]), |lab| {
        for from in lab.hosts() {
            for to in lab.hosts() {
                from.out(&["ping", "-c", "1", "-W", "2", &to.ip().to_string()])?;
                from.out(&["ping", "-c", "1", "-W", "2", &to.ip6().to_string()])?;
            }
        }
        let daemon = lab.host(1).spawn("sleeper", &["sh", "-c", "echo hello; sleep 100"], &[])?;
        daemon.wait_log("hello", secs(2))?;
        ensure!(daemon.usage()?.rss_kib > 0);
        daemon.stop(secs(2))?;
        ensure!(!daemon.alive());
        Ok(())
    });
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
    in_lab(Lab::new("docker").hosts(1).needs(&["dockerd", "docker"]), |lab| {
        let host = lab.host(1);
        let dockerd = host.start_dockerd(&[])?;
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
        let seen = steady.stop()?;
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
