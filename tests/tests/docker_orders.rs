//! Power comes back, and engine, plugin and etcd start in whatever order: what ran before runs again, and new containers start,
//! without a hand.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use flannel_tests::{
    Daemon, Host, IMAGE, Lab, MANAGED, MANAGED_NEEDS, eventually, http_get, in_lab, ping_within, secs,
};

const ENDPOINTS: &str = "http://127.0.0.1:2379";

/// What starts on a host.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Part {
    Engine,
    Plugin,
    Etcd,
}
use Part::{Engine, Etcd, Plugin};

/// How long a part has to itself before the next one starts.
const APART: Duration = Duration::from_secs(2);

/// Starts a part, and lets it come as far as it can without the others.
fn start(host: &Host, part: Part) -> Result<Daemon> {
    let daemon = match part {
        // Until its driver answers, the engine does not.
        Engine => host.spawn("dockerd", &["dockerd"], &[])?,
        Plugin => host.spawn("plugin", &["flannel-docker-plugin", "--etcd-endpoints", ENDPOINTS], &[])?,
        #[rustfmt::skip]
        Etcd => host.spawn("etcd", &[
            "etcd", "--data-dir", "/var/lib/etcd-lab", "--listen-client-urls", ENDPOINTS, "--advertise-client-urls", ENDPOINTS,
            "--logger", "zap", "--heartbeat-interval", "20", "--election-timeout", "100",
        ], &[])?,
    };
    thread::sleep(APART);
    ensure!(daemon.alive(), "{part:?} ended\n{}", daemon.tail());
    Ok(daemon)
}

fn all_up(host: &Host, daemons: &[Daemon]) -> Result<()> {
    eventually("the engine answers", secs(60), || host.dockerd_answers())
        .with_context(|| daemons.iter().map(Daemon::tail).collect::<Vec<_>>().join("\n"))?;
    eventually("etcd answers", secs(30), || http_get(host, &format!("{ENDPOINTS}/health"))).map(drop)
}

/// The one network and the one container of a host, made once.
fn populate(host: &Host, driver: &str) -> Result<()> {
    let create =
        ["network", "create", "-d", driver, "--ipam-driver", driver, "--subnet", "10.100.0.0/16", "web"];
    eventually("the network can be created", secs(30), || host.docker(&create))?;
    host.docker_run("c0", &["--network", "web", "--restart=always"]).map(drop)
}

/// What ran is back, and something new can be started beside it.
fn all_works(host: &Host, what: &str) -> Result<()> {
    let c0 = eventually(format!("c0 is back after {what}"), secs(40), || host.docker_container("c0"))?;
    let new = eventually(format!("a container starts after {what}"), secs(30), || {
        let _ = host.docker(&["rm", "-f", "c1"]);
        host.docker_run("c1", &["--network", "web"])
    })?;
    ensure!(new.ip()? != c0.ip()?, "{} was given out twice", new.ip()?);
    ping_within(secs(20), &new, c0.ip()?).with_context(|| what.to_owned())?;
    host.docker(&["rm", "-f", "c1"]).map(drop)
}

/// One host that goes through these orders, one after the other, with a power cut before each.
fn service(lab: &Lab, host: &Host, orders: &[[Part; 3]]) -> Result<()> {
    let daemons =
        [Etcd, Plugin, Engine].map(|part| start(host, part)).into_iter().collect::<Result<Vec<_>>>()?;
    all_up(host, &daemons)?;
    host.load_image()?;
    populate(host, "flannel")?;
    for order in orders {
        lab.reboot(host)?;
        let daemons = order.map(|part| start(host, part)).into_iter().collect::<Result<Vec<_>>>()?;
        all_up(host, &daemons)?;
        all_works(host, &format!("{order:?}"))?;
    }
    Ok(())
}

/// The same of a managed plugin, which starts with its engine; at last with etcd in a container of that engine.
fn managed(lab: &Lab, host: &Host) -> Result<()> {
    let daemons = [Etcd, Engine].map(|part| start(host, part)).into_iter().collect::<Result<Vec<_>>>()?;
    all_up(host, &daemons)?;
    host.load_image()?;
    host.start_managed_plugin(&[&format!("FLANNELD_ETCD_ENDPOINTS={ENDPOINTS}")])?;
    populate(host, MANAGED)?;
    for order in [[Engine, Etcd], [Etcd, Engine]] {
        lab.reboot(host)?;
        let daemons = order.map(|part| start(host, part)).into_iter().collect::<Result<Vec<_>>>()?;
        all_up(host, &daemons)?;
        all_works(host, &format!("{order:?}, managed"))?;
    }
    let etcd = "inside its engine, managed";
    lab.reboot(host)?;
    let engine = start(host, Engine)?;
    eventually("the engine answers", secs(60), || host.dockerd_answers()).with_context(|| engine.tail())?;
    host.docker_run_etcd("store", &["--restart=always"])?;
    all_works(host, etcd)?;
    lab.reboot(host)?;
    let engine = start(host, Engine)?;
    all_up(host, &[engine])?;
    all_works(host, etcd)?;
    host.docker(&["run", "--rm", "--network", "web", IMAGE, "true"]).map(drop)
}

#[test]
fn engine_plugin_and_etcd_may_start_in_any_order() {
    let plan =
        Lab::new("docker-orders").hosts(4).ip_forward(false).needs(&["dockerd", "docker", "busybox", "etcd"]);
    in_lab(plan.needs(MANAGED_NEEDS), |lab| {
        lab.build_managed_plugin()?;
        let orders = [
            [[Engine, Plugin, Etcd], [Plugin, Etcd, Engine]],
            [[Engine, Etcd, Plugin], [Etcd, Plugin, Engine]],
            [[Plugin, Engine, Etcd], [Etcd, Engine, Plugin]],
        ];
        thread::scope(|scope| {
            let mut running = vec![scope.spawn(|| managed(lab, lab.host(4)))];
            for (host, orders) in lab.hosts().iter().zip(&orders) {
                running.push(scope.spawn(move || service(lab, host, orders)));
            }
            for one in running {
                one.join().map_err(|_| anyhow!("a host's thread panicked"))??;
            }
            Ok(())
        })
    });
}
