//! The lab itself: what every other suite relies on.

use std::time::Instant;

use anyhow::ensure;
use flannel_tests::{Lab, in_lab, secs};

#[test]
fn hosts_reach_each_other_and_nothing_else() {
    let begun = Instant::now();
    in_lab(Lab::new("reach").hosts(3).behind_router(&[3]), |lab| {
        eprintln!("up after {:?}", begun.elapsed());
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
    eprintln!("gone after {:?}", begun.elapsed());
}

#[test]
fn etcd_answers() {
    let begun = Instant::now();
    in_lab(Lab::new("etcd").hosts(1).etcd(), |lab| {
        eprintln!("up after {:?}", begun.elapsed());
        lab.etcdctl(&["put", "/a", "b"])?;
        lab.etcd_stop()?;
        ensure!(lab.etcdctl(&["get", "/a"]).is_err());
        lab.etcd_start()?;
        ensure!(lab.etcdctl(&["get", "--print-value-only", "/a"])? == "b");
        Ok(())
    });
}
