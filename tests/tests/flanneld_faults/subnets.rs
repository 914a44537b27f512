//! Leases that are lost, and subnets of which there are not enough.

use std::thread;
use std::time::Instant;

use anyhow::{Result, bail, ensure};
use flannel_tests::flanneld::{
    Flanneld, PREFIX, Pod, SUBNET_FILE, SubnetEnv, leases, put_config, time_to_live,
};
use flannel_tests::{Lab, eventually, in_lab, ping_within, secs};

use crate::{FOLLOW, REPEAT, VXLAN};

#[test]
fn a_lease_that_is_lost_is_acquired_again() {
    in_lab(Lab::new("lost").etcd(), |lab| {
        put_config(lab, VXLAN)?;
        let daemons = Flanneld::start_all(lab)?;
        let (env, peer) = (SubnetEnv::read(lab.host(1))?, SubnetEnv::read(lab.host(2))?);
        let pods = [Pod::new(lab.host(1), &env, 2)?, Pod::new(lab.host(2), &peer, 2)?];
        let neighbor = Pod::new(lab.host(1), &env, 3)?;
        ping_within(FOLLOW, &pods[0], pods[1].ip())?;
        // Deleted by hand, as when an operator tidies up too much: the same subnet again.
        lab.etcdctl(&["del", &format!("{PREFIX}/subnets/{}", env.key())])?;
        eventually("the key is back", FOLLOW, || {
            leases(lab).is_ok_and(|leases| leases.contains_key(&env.key()))
        })?;
        ensure!(daemons[0].said("ERROR E109").len() == 1, "{:#?}", daemons[0].said("E109"));
        ensure!(leases(lab)?.len() == 2 && daemons[0].daemon().alive());
        ensure!(time_to_live(lab, &env.key())?.is_some_and(|(left, _)| left > 86_000));
        ping_within(FOLLOW, &pods[0], pods[1].ip())?;
        ensure!(SubnetEnv::read(lab.host(1))? == env);

        // Somebody else has written himself into it: this host must not use it any more.
        let thief = r#"{"PublicIP":"10.77.0.99","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:99"}}"#;
        lab.etcdctl(&["put", &format!("{PREFIX}/subnets/{}", env.key()), thief])?;
        eventually("another subnet", FOLLOW, || {
            let now = SubnetEnv::read(lab.host(1))?;
            ensure!(now.subnet() != env.subnet(), "{}", now.text);
            ensure!(leases(lab)?.contains_key(&now.key()), "{:?}", leases(lab)?);
            Ok(())
        })?;
        ensure!(
            leases(lab)?.get(&env.key()).is_some_and(|value| value == thief),
            "the other's lease was touched"
        );
        // Containers that were there keep each other; that they have to be started again is said, once each.
        let daemon = &daemons[0];
        eventually("what to do is said", FOLLOW, || daemon.said("WARN E139").len() == 1)?;
        ensure!(daemon.said("E139")[0].contains("10.77.0.99"), "{:?}", daemon.said("E139"));
        ensure!(daemon.said("start them again").len() == 1, "{}", daemon.daemon().tail());
        ping_within(FOLLOW, &pods[0], neighbor.ip())?;
        let route = lab.host(1).out(&["ip", "route", "show", &env.subnet()])?;
        ensure!(route.contains("docker0") && !route.contains("flannel"), "{route}");
        // The other host has the new holder, and this one at its new place.
        let now = SubnetEnv::read(lab.host(1))?;
        eventually("the peer follows", FOLLOW, || {
            let routes = lab.host(2).out(&["ip", "route", "show", "dev", "flannel.1"])?;
            ensure!(routes.contains(&env.subnet()) && routes.contains(&now.subnet()), "{routes}");
            Ok(())
        })
    });
}

#[test]
fn the_host_for_whom_no_subnet_is_left_gets_one_once_there_is() {
    const THREE: &str = r#"{"Network":"10.100.0.0/16","SubnetLen":25,"SubnetMin":"10.100.0.0","SubnetMax":"10.100.1.0","Backend":{"Type":"vxlan"}}"#;
    const FOUR: &str = r#"{"Network":"10.100.0.0/16","SubnetLen":25,"SubnetMin":"10.100.0.0","SubnetMax":"10.100.1.128","Backend":{"Type":"vxlan"}}"#;
    in_lab(Lab::new("full").hosts(4).etcd(), |lab| {
        put_config(lab, THREE)?;
        // All at once: they race for three subnets.
        let daemons =
            lab.hosts().iter().map(|host| Flanneld::start(lab, host)).collect::<Result<Vec<_>>>()?;
        let without = eventually("three have a lease, and one says why not", secs(15), || {
            let without: Vec<_> = daemons.iter().filter(|d| !d.host().exists(SUBNET_FILE)).collect();
            let [only] = without[..] else { bail!("{} hosts have no subnet", without.len()) };
            ensure!(only.said("E106").len() == 1, "{}", only.daemon().tail());
            Ok(only)
        })?;
        let keys: Vec<_> = leases(lab)?.into_keys().collect();
        ensure!(keys == ["10.100.0.0-25", "10.100.0.128-25", "10.100.1.0-25"], "{keys:?}");
        let links = without.host().out(&["ip", "-br", "link"])?;
        ensure!(!links.contains("flannel"), "half applied: {links}");
        ensure!(without.health("/readyz")?.0 == 503);
        thread::sleep(REPEAT);
        ensure!(without.said("E106").len() == 1, "{:#?}", without.said("E106"));
        ensure!(without.daemon().alive());

        let pid = without.daemon().pid();
        put_config(lab, FOUR)?;
        let start = Instant::now();
        let env = without.ready()?;
        ensure!(env.subnet() == "10.100.1.128/25" && without.daemon().pid() == pid, "{}", env.text);
        ensure!(start.elapsed() < secs(5), "it took {:?}", start.elapsed());
        for daemon in &daemons {
            daemon.ready()?;
            eventually("routes to all the others", FOLLOW, || {
                let routes = daemon.host().out(&["ip", "route", "show", "dev", "flannel.1"])?;
                ensure!(routes.lines().count() == 3, "{routes}");
                Ok(())
            })?;
        }
        ensure!(leases(lab)?.len() == 4);
        Ok(())
    });
}
