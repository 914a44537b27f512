//! Three engines in a swarm, with the managed plugin on each: services on flannel networks, every task with an address of its
//! own node's lease, found by name from everywhere.

use std::collections::BTreeSet;
use std::env;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use flannel_tests::{
    Container, Daemon, Host, IMAGE, Lab, LabPlan, MANAGED, MANAGED_NEEDS, eventually, http_get, in_lab,
    ping_within, secs,
};

const VXLAN: &str = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"vxlan"}}"#;

fn plan(name: &str) -> LabPlan {
    Lab::new(name)
        .hosts(3)
        .etcd()
        .ip_forward(false)
        .needs(&["dockerd", "docker", "busybox"])
        .needs(MANAGED_NEEDS)
}

/// The same on every host at once; the answers in their order.
fn everywhere<T: Send>(lab: &Lab, act: impl Fn(&Host) -> Result<T> + Sync) -> Result<Vec<T>> {
    let act = &act;
    thread::scope(|scope| {
        let running: Vec<_> = lab.hosts().iter().map(|host| scope.spawn(move || act(host))).collect();
        running.into_iter().map(|one| one.join().map_err(|_| anyhow!("a host's thread panicked"))?).collect()
    })
}

/// Engines with image and plugin, h1 the manager, h2 and h3 its workers, and the config-only network on each.
fn swarm(lab: &Lab) -> Result<Vec<Daemon>> {
    lab.etcdctl(&["put", "/coreos.com/network/config", VXLAN])?;
    lab.build_managed_plugin()?;
    let endpoints = format!("FLANNELD_ETCD_ENDPOINTS={}", lab.etcd_endpoint());
    let engines = everywhere(lab, |host| {
        let engine = host.start_dockerd(&[])?;
        host.load_image()?;
        host.start_managed_plugin(&[&endpoints])?;
        Ok(engine)
    })?;
    let manager = lab.host(1);
    let address = manager.ip().to_string();
    manager.docker(&["swarm", "init", "--advertise-addr", &address])?;
    let token = manager.docker(&["swarm", "join-token", "-q", "worker"])?;
    let leader = format!("{address}:2377");
    for worker in &lab.hosts()[1..] {
        let own = worker.ip().to_string();
        worker.docker(&["swarm", "join", "--advertise-addr", &own, "--token", &token, &leader])?;
    }
    everywhere(lab, |host| config_only(host, "cfg"))?;
    for host in lab.hosts() {
        // Tasks go where the network's driver is said to be.
        eventually(format!("the manager knows the plugin of {}", host.name()), secs(30), || {
            let plugins = ["node", "inspect", "-f", "{{json .Description.Engine.Plugins}}", host.name()];
            let said = manager.docker(&plugins)?;
            ensure!(said.contains(MANAGED), "{said}");
            Ok(())
        })?;
    }
    Ok(engines)
}

/// The same line on every node.
fn config_only(host: &Host, name: &str) -> Result<()> {
    let create =
        ["network", "create", "--config-only", "--ipam-driver", MANAGED, "--subnet", "10.100.0.0/16"];
    host.docker(&[&create[..], &[name]].concat()).map(drop)
}

/// The one line on a manager.
fn swarm_network(manager: &Host, config: &str, name: &str) -> Result<()> {
    let create =
        ["network", "create", "-d", MANAGED, "--scope", "swarm", "--config-from", config, "--attachable"];
    manager.docker(&[&create[..], &[name]].concat()).map(drop)
}

fn service(manager: &Host, name: &str, args: &[&str]) -> Result<()> {
    let create = ["service", "create", "-d", "--name", name, "--stop-grace-period", "1s"];
    manager.docker(&[&create, args, &[IMAGE, "sleep", "infinity"]].concat()).map(drop)
}

/// The running tasks of a service on one host.
fn tasks(host: &Host, service: &str) -> Result<Vec<Container>> {
    let label = format!("label=com.docker.swarm.service.name={service}");
    let ids = host.docker(&["ps", "-q", "--filter", &label])?;
    ids.split_whitespace().map(|id| host.docker_container(id)).collect()
}

/// Waits until a service has exactly so many tasks on each host, and all of them can be entered.
fn settled(lab: &Lab, name: &str, wanted: &[usize]) -> Result<Vec<Container>> {
    eventually(format!("{name} has {wanted:?} tasks"), secs(90), || {
        let found = lab.hosts().iter().map(|host| tasks(host, name)).collect::<Result<Vec<_>>>()?;
        let counts: Vec<usize> = found.iter().map(Vec::len).collect();
        ensure!(
            counts == wanted,
            "{counts:?}\n{}",
            lab.host(1).docker(&["service", "ps", "--no-trunc", name])?
        );
        let found = found.concat();
        for task in &found {
            task.ip()?;
        }
        Ok(found)
    })
}

fn addresses(tasks: &[Container]) -> Result<BTreeSet<String>> {
    tasks.iter().map(Container::ip).collect()
}

/// What a container's resolver says to a name.
fn resolve(from: &Container, name: &str) -> Result<BTreeSet<String>> {
    let said = from.docker_exec(&["nslookup", "-type=a", name, "127.0.0.11"])?;
    let answers = said.split_once("\nName:").with_context(|| said.clone())?.1;
    Ok(answers.lines().filter_map(|line| line.strip_prefix("Address: ")).map(str::to_owned).collect())
}

/// From each of these containers, the names have the addresses of exactly those others, and each of them answers.
fn finds(from: &[Container], names: &[&str], expected: &[Container]) -> Result<()> {
    let wanted = addresses(expected)?;
    for container in from {
        for name in names {
            eventually(format!("{container:?} finds {name}"), secs(30), || {
                let found = resolve(container, name)?;
                ensure!(found == wanted, "{found:?} instead of {wanted:?}");
                Ok(())
            })?;
        }
        for address in &wanted {
            ping_within(secs(10), container, address)?;
        }
    }
    Ok(())
}

/// The first of these containers on each host.
fn one_each(lab: &Lab, containers: &[Container]) -> Vec<Container> {
    let first = |host: &Host| containers.iter().find(|c| c.host().name() == host.name()).cloned();
    lab.hosts().iter().filter_map(first).collect()
}

/// `FLANNEL_SUBNET` of a host without its last byte: `10.100.7.`
fn lease(host: &Host) -> Result<String> {
    let env = host.read("/run/flannel/subnet.env")?;
    let subnet = env.lines().find_map(|line| line.strip_prefix("FLANNEL_SUBNET=")).context(env.clone())?;
    Ok(subnet.rsplit_once('.').context("no address")?.0.to_owned() + ".")
}

const NAMES: &[&str] = &["web", "tasks.web"];

#[test]
fn services_and_attached_containers_find_each_other_from_every_node() {
    in_lab(plan("swarm"), |lab| {
        let _engines = swarm(lab)?;
        let (manager, h2, h3) = (lab.host(1), lab.host(2), lab.host(3));
        let before = everywhere(lab, ours)?;
        swarm_network(manager, "cfg", "web")?;
        service(manager, "web", &["--network", "web", "--replicas", "6"])?;
        let all = settled(lab, "web", &[2, 2, 2])?;
        ensure!(addresses(&all)?.len() == 6, "{:?}", addresses(&all)?);
        for task in &all {
            let (ip, lease) = (task.ip()?, lease(task.host())?);
            ensure!(ip.starts_with(&lease), "{task:?}: {ip} is not of {lease}0/24");
        }
        finds(&one_each(lab, &all), NAMES, &all)?;

        // Plain containers may join the network, and are found by tasks of other nodes.
        let guest = h2.docker_run("guest", &["--network", "web"])?;
        finds(std::slice::from_ref(&guest), NAMES, &all)?;
        finds(&one_each(lab, &all), &["guest"], std::slice::from_ref(&guest))?;
        h2.docker(&["rm", "-f", "guest"])?;

        manager.docker(&["service", "scale", "-d", "web=3"])?;
        let few = settled(lab, "web", &[1, 1, 1])?;
        finds(&few, NAMES, &few)?;

        // A rolling update replaces every task, one after the other.
        let update =
            ["service", "update", "-d", "--force", "--update-parallelism", "1", "--update-delay", "0s"];
        manager.docker(
            &[&update[..], &["--update-monitor", "1s", "--env-add", "GENERATION=2", "web"]].concat(),
        )?;
        eventually("the update is complete", secs(90), || {
            let said = manager.docker(&["service", "inspect", "-f", "{{.UpdateStatus.State}}", "web"])?;
            ensure!(said == "completed", "{said}");
            Ok(())
        })?;
        let updated = settled(lab, "web", &[1, 1, 1])?;
        ensure!(updated.iter().all(|new| few.iter().all(|old| old.pid() != new.pid())));
        finds(&updated, NAMES, &updated)?;

        // A drained node gives its tasks to the others.
        manager.docker(&["node", "update", "--availability", "drain", h3.name()])?;
        let moved = eventually("two nodes have three tasks", secs(90), || {
            let found = [tasks(manager, "web")?, tasks(h2, "web")?, tasks(h3, "web")?];
            ensure!(found[2].is_empty() && found[0].len() + found[1].len() == 3, "{found:?}");
            Ok(found.concat())
        })?;
        finds(&one_each(lab, &moved), NAMES, &moved)?;

        // Ports of tasks on the nodes that they run on.
        manager.docker(&["node", "update", "--availability", "active", h3.name()])?;
        let publish =
            ["--network", "web", "--mode", "global", "--publish", "mode=host,target=80,published=8081"];
        let create = ["service", "create", "-d", "--name", "site", "--stop-grace-period", "1s"];
        let serve = [IMAGE, "sh", "-c", "hostname > /www/index.html; exec httpd -f -h /www"];
        manager.docker(&[&create[..], &publish, &serve].concat())?;
        for task in settled(lab, "site", &[1, 1, 1])? {
            let name = task.docker_exec(&["hostname"])?;
            let url = format!("http://{}:8081/", task.host().ip());
            for from in lab.hosts().iter().filter(|from| from.name() != task.host().name()) {
                eventually(format!("{url} from {}", from.name()), secs(20), || {
                    let said = http_get(from, &url)?;
                    ensure!(said.trim() == name, "{said} instead of {name}");
                    Ok(())
                })?;
            }
        }

        manager.docker(&["service", "rm", "web", "site"])?;
        gone(lab, &["web", "site"], &["web"])?;
        nothing_is_left(lab, &before, secs(30))
    });
}

#[test]
fn networks_side_by_side_outlive_their_engines() {
    in_lab(plan("swarm-networks"), |lab| {
        let mut engines = swarm(lab)?;
        let (manager, h2, h3) = (lab.host(1), lab.host(2), lab.host(3));
        let before = everywhere(lab, ours)?;
        // Three networks on the same subnets at once: one by Docker's commands, one by the plugin's own, one without an IPAM
        // driver; and an overlay, to move away from.
        for host in [h2, h3, manager] {
            host.out(&["flannel-docker-plugin", "network", "create", "--swarm", "two"])?;
            host.docker(&["network", "create", "--config-only", "--ipam-driver", "null", "three-config"])?;
        }
        swarm_network(manager, "cfg", "web")?;
        swarm_network(manager, "three-config", "three")?;
        manager.docker(&["network", "create", "-d", "overlay", "old"])?;
        for (name, network) in [("one", "web"), ("each", "two"), ("other", "three"), ("moves", "old")] {
            service(manager, name, &["--network", network, "--mode", "global"])?;
        }
        let mut all = Vec::new();
        for (name, names) in
            [("one", ["one", "tasks.one"]), ("each", EACH), ("other", ["other", "tasks.other"])]
        {
            let tasks = settled(lab, name, &[1, 1, 1])?;
            finds(&tasks, &names, &tasks)?;
            all.extend(tasks);
        }
        ensure!(addresses(&all)?.len() == 9, "{:?} for nine tasks", addresses(&all)?);

        // What cannot work says what does.
        manager.docker(&["network", "create", "-d", MANAGED, "--scope", "swarm", "wrong"])?;
        service(manager, "wrong", &["--network", "wrong"])?;
        eventually("the task is rejected with what to type", secs(30), || {
            let said =
                manager.docker(&["service", "ps", "--no-trunc", "-f", "desired-state=shutdown", "wrong"])?;
            ensure!(said.contains("--scope swarm --config-from NAME-config"), "{said}");
            Ok(())
        })?;
        manager.docker(&["service", "rm", "wrong"])?;

        // A worker's engine stops, and its plugin with it; later the manager's. In the long run the worker loses its power:
        // a swarm needs a minute to notice.
        match env::var_os("FLANNEL_TESTS_LONG").is_some_and(|long| long == "1") {
            true => lab.reboot(h2)?,
            false => engines[1].stop(secs(60)).map(drop)?,
        }
        engines[1] = h2.start_dockerd(&[])?;
        back_on(lab, h2, &all)?;
        for (name, names) in [("one", ["one", "tasks.one"]), ("other", ["other", "tasks.other"])] {
            let tasks = settled(lab, name, &[1, 1, 1])?;
            finds(&tasks, &names, &tasks)?;
        }

        // From overlay to flannel as the guide says.
        let on_overlay = settled(lab, "moves", &[1, 1, 1])?;
        let update = ["service", "update", "-d", "--network-add", "web", "--network-rm", "old", "moves"];
        manager.docker(&update)?;
        let moved = eventually("the tasks are on flannel", secs(90), || {
            let found = settled(lab, "moves", &[1, 1, 1])?;
            ensure!(found.iter().all(|new| on_overlay.iter().all(|old| old.pid() != new.pid())));
            Ok(found)
        })?;
        for task in &moved {
            ensure!(task.ip()?.starts_with(&lease(task.host())?), "{task:?} has {}", task.ip()?);
        }
        finds(&moved, &["moves", "tasks.moves"], &moved)?;

        engines[0].stop(secs(60))?;
        engines[0] = manager.start_dockerd(&[])?;
        back_on(lab, manager, &all)?;

        manager.docker(&["service", "rm", "each", "moves", "one", "other"])?;
        gone(lab, &["each", "moves", "one", "other"], &["web", "two", "three", "old", "wrong"])?;
        // What a power cut made an engine forget is noticed after a while.
        nothing_is_left(lab, &before, secs(120))
    });
}

const EACH: [&str; 2] = ["each", "tasks.each"];

/// Waits until the service `each` has a new task on a host, and all find each other.
fn back_on(lab: &Lab, host: &Host, before: &[Container]) -> Result<()> {
    eventually(format!("a new task on {}", host.name()), secs(90), || {
        let back = settled(lab, "each", &[1, 1, 1])?;
        let here = back.iter().find(|task| task.host().name() == host.name()).context("none there")?;
        ensure!(before.iter().all(|old| old.pid() != here.pid()), "still the old one");
        finds(&back, &EACH, &back)
    })
}

/// Waits until the tasks of removed services are gone, and removes the networks.
fn gone(lab: &Lab, services: &[&str], networks: &[&str]) -> Result<()> {
    for host in lab.hosts() {
        eventually(format!("{services:?} are gone from {}", host.name()), secs(60), || {
            for name in services {
                let left = tasks(host, name)?;
                ensure!(left.is_empty(), "{left:?}");
            }
            Ok(())
        })?;
    }
    for name in networks {
        eventually(format!("{name} can be removed"), secs(30), || {
            lab.host(1).docker(&["network", "rm", name])
        })?;
    }
    Ok(())
}

fn nothing_is_left(lab: &Lab, before: &[String], patience: Duration) -> Result<()> {
    for (host, before) in lab.hosts().iter().zip(before) {
        eventually(format!("nothing is left on {}", host.name()), patience, || {
            let now = ours(host)?;
            ensure!(now == *before, "{now}\n--- before\n{before}");
            Ok(())
        })?;
    }
    Ok(())
}

/// What there is of ours on a host: in the kernel (a swarm itself comes with bridges and rules), in the ledger, in the
/// plugin's own directory.
fn ours(host: &Host) -> Result<String> {
    host.sh(
        "{ ip -br link | awk '$1 ~ /^(cni|fl)/ {print $1, $3}'; ip route show table all | grep -F 10.100. || true; \
         ip neigh show nud permanent; nft -s list ruleset | grep -F 10.100. || true; \
         cd /var/lib; find cni docker/plugins/*/propagated-mount -type f | grep -v -e lock -e last_reserved; } \
         | sort",
    )
}
