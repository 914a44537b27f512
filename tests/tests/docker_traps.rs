//! Traps that engines set for their plugins; each of them has cost somebody a day.
//!
//! | Trap | Test |
//! |---|---|
//! | an automatic pool that overlaps is asked for again, for ever | [`an_overlapping_automatic_pool_is_asked_for_once`] |
//! | a replay that fails bricks the engine; CreateNetwork is never replayed | [`nothing_is_replayed_and_nothing_needs_to_be`] |
//! | a mount whose source is missing at boot kills the engine | [`a_managed_plugin_mounts_only_what_every_boot_has`] |
//! | a call whose connection broke is repeated with an empty body | [`a_broken_call_is_repeated_without_its_body`] |
//! | `Err` against `Error` | `docker_protocol`: every refusal there; `engines_docker`: `wrong_use_is_answered_with_what_to_type` |
//! | one failed GetCapabilities unregisters the driver for the engine's life | [`a_driver_is_there_before_its_store`] |
//! | an engine killed inside RequestAddress or CreateEndpoint never comes back to it | [`an_address_outlives_an_engine_that_died_asking_for_it`], `docker_chaos` |
//! | a dead socket makes `docker volume ls` take 15 s | [`a_dead_socket_is_replaced_and_an_unused_one_removed`] |
//! | an answer that repeats the engine's address is taken for a change | `docker_protocol`: `an_endpoints_answer_holds_only_what_we_chose` |
//! | an EndpointOperInfo that fails fails the container | `docker_protocol`: `operational_info_never_fails` |
//! | another network takes the default route | `docker_networks`: `a_container_may_be_on_several_networks` |
//! | FORWARD drops between two ports of one bridge | [`neighbours_on_a_bridge_reach_each_other_whatever_forward_says`] |
//! | base64 MACs, 25-character ids | `docker_protocol`: `ids_and_macs_come_in_more_than_one_shape` |

use std::os::unix::net::UnixStream;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use flannel_tests::conversation::{Call, HIDDEN_SOCKET, PLUGIN_SOCKET, Proxy, Trap, When};
use flannel_tests::{
    CREATE_WEB, Daemon, Host, IMAGE, Lab, LabPlan, create_network, eventually, in_lab, ping, ping_within,
    secs,
};
use serde_json::Value;

fn plan(name: &str) -> LabPlan {
    Lab::new(name).hosts(1).ip_forward(false).needs(&["dockerd", "docker", "busybox"])
}

fn start_plugin(host: &Host, socket: &str, flags: &[&str]) -> Result<Daemon> {
    let socket_flag = format!("--socket={socket}");
    let daemon = host.spawn(
        "flannel-docker-plugin",
        &[&["flannel-docker-plugin", &socket_flag], flags].concat(),
        &[],
    )?;
    let listens = || UnixStream::connect(host.path(socket)).is_ok();
    eventually("the plugin listens", secs(10), listens).with_context(|| daemon.tail())?;
    Ok(daemon)
}

/// An engine with the image, and a plugin behind a proxy.
fn start_all(host: &Host, flags: &[&str]) -> Result<(Proxy, Daemon, Daemon)> {
    let proxy = Proxy::start(host)?;
    let plugin = start_plugin(host, HIDDEN_SOCKET, flags)?;
    let engine = host.start_dockerd(&[])?;
    host.load_image()?;
    Ok((proxy, plugin, engine))
}

fn named<'a>(calls: &'a [Call], method: &str) -> Vec<&'a Call> {
    calls.iter().filter(|call| call.method.ends_with(method)).collect()
}

/// This host's subnet of the default network without its last byte: `10.100.7.`
fn lease(host: &Host) -> Result<String> {
    let env = host.read("/run/flannel/subnet.env")?;
    let subnet = env.lines().find_map(|line| line.strip_prefix("FLANNEL_SUBNET=")).context(env.clone())?;
    Ok(subnet.rsplit_once('.').context("no address")?.0.to_owned() + ".")
}

#[test]
fn an_overlapping_automatic_pool_is_asked_for_once() {
    in_lab(plan("trap-loop"), |lab| {
        let host = lab.host(1);
        let (proxy, plugin, _engine) = start_all(host, &[])?;
        host.docker(CREATE_WEB)?;
        let automatic = ["network", "create", "-d", "flannel", "--ipam-driver", "flannel", "automatic"];
        // Our own bridge's route is none that the engine compares with.
        proxy.take();
        host.docker(&automatic)?;
        host.docker(&["network", "rm", "automatic"])?;
        ensure!(named(&proxy.take(), "RequestPool").len() == 1);
        // Somebody else's route of link scope is.
        host.out(&[
            "ip",
            "route",
            "add",
            &format!("{}128/26", lease(host)?),
            "dev",
            "eth0",
            "scope",
            "link",
        ])?;
        let start = Instant::now();
        let refused = host.try_docker(&automatic)?;
        ensure!(!refused.ok() && refused.stderr.contains("--subnet 10.100.0.0/16"), "{refused}");
        ensure!(start.elapsed() < secs(10), "it took {:?}", start.elapsed());
        let calls = proxy.take();
        ensure!(named(&calls, "RequestPool").len() == 1, "{calls:?}\n{}", plugin.tail());
        // And with it, the command that the text names works.
        host.docker(&create_network("10.100.0.0/16", "explicit"))?;
        Ok(())
    });
}

#[test]
fn nothing_is_replayed_and_nothing_needs_to_be() {
    in_lab(plan("trap-replay"), |lab| {
        let host = lab.host(1);
        let (proxy, mut plugin, mut engine) = start_all(host, &[])?;
        host.docker(CREATE_WEB)?;
        let aux = format!("router={}5", lease(host)?);
        let with_aux =
            ["network", "create", "-d", "flannel", "--ipam-driver", "flannel", "--subnet", "10.100.0.0/16"];
        host.docker(&[&with_aux[..], &["--aux-address", &aux, "aux"]].concat())?;
        let fixed = lease(host)? + "99";
        host.docker_run("c1", &["--restart=always", "--network", "aux", "--ip", &fixed])?;
        for sigkill in [false, true] {
            match sigkill {
                true => engine.crash()?,
                false => drop(engine.stop(secs(60))?),
            }
            plugin.crash()?;
            plugin = start_plugin(host, HIDDEN_SOCKET, &[])?;
            proxy.take();
            engine = host.start_dockerd(&[])?;
            eventually("c1 is back", secs(30), || host.docker_ip("c1", "aux"))?;
            let calls = proxy.take();
            for method in ["RequestPool", "CreateNetwork"] {
                ensure!(named(&calls, method).is_empty(), "{method} was replayed: {calls:?}");
            }
            let asked: Vec<&Value> =
                named(&calls, "RequestAddress").iter().map(|call| &call.request["Address"]).collect();
            ensure!(asked == [&Value::from(fixed.as_str())], "{asked:?}");
            ensure!(host.docker_ip("c1", "aux")? == fixed, "{}", plugin.tail());
        }
        // What a failed replay would have broken.
        host.docker(&["rm", "-f", "c1"])?;
        host.docker(&["network", "rm", "aux", "web"])?;
        engine.stop(secs(60))?;
        host.start_dockerd(&[])?;
        host.docker(CREATE_WEB)?;
        Ok(())
    });
}

#[test]
fn a_managed_plugin_mounts_only_what_every_boot_has() -> Result<()> {
    let config: Value = serde_json::from_str(include_str!("../../config.json"))?;
    let mounts = config["mounts"].as_array().context("no mounts")?;
    ensure!(!mounts.is_empty());
    for mount in mounts {
        let source = mount["source"].as_str().context("a mount without a source")?;
        // /run is a tmpfs: what is below it may not be there yet when an engine starts its plugins.
        ensure!(
            ["/run", "/var/lib", "/proc/sys/net"].contains(&source),
            "{source} may be missing when the engine starts"
        );
        ensure!(mount["settable"].is_null(), "{source} may be set to something that is missing");
    }
    Ok(())
}

#[test]
fn a_broken_call_is_repeated_without_its_body() {
    in_lab(plan("trap-empty"), |lab| {
        let host = lab.host(1);
        let (proxy, plugin, _engine) = start_all(host, &[])?;
        // Only the connection breaks.
        proxy.set(Trap { call: 5, when: When::BeforeRequest, strike: Box::new(|| ()) });
        let failed = host.try_docker(CREATE_WEB)?;
        ensure!(proxy.disarm().is_some_and(|sprung| sprung.contains("RequestPool")), "{failed}");
        ensure!(!failed.ok() && failed.stderr.contains("try again"), "{failed}");
        let calls = proxy.take();
        let asked = named(&calls, "RequestPool");
        ensure!(asked.len() == 2, "{calls:?}");
        ensure!(asked[0].request["Pool"] == "10.100.0.0/16" && asked[0].status == 0, "{asked:?}");
        ensure!(asked[1].request.is_null() && asked[1].status == 400, "{asked:?}");
        // Nothing was made of it, and trying again helps.
        let pools = host.sh("ls /var/lib/flannel/docker/pools")?;
        ensure!(pools.is_empty(), "{pools}\n{}", plugin.tail());
        host.docker(CREATE_WEB)?;
        // The same inside a container's start: the address is free again for whoever asks for it.
        let address = lease(host)? + "33";
        let run = ["run", "--rm", "--network", "web", "--ip", &address, IMAGE, "true"];
        for (call, method) in [(1, "RequestAddress"), (2, "CreateEndpoint"), (3, "Join")] {
            proxy.set(Trap { call, when: When::BeforeAnswer, strike: Box::new(|| ()) });
            let failed = host.try_docker(&run)?;
            ensure!(proxy.disarm().is_some_and(|sprung| sprung.contains(method)), "{method}: {failed}");
            ensure!(!failed.ok(), "{method}: {failed}");
            eventually(format!("{address} can be had after {method}"), secs(15), || host.docker(&run))
                .with_context(|| plugin.tail())?;
        }
        Ok(())
    });
}

#[test]
fn a_driver_is_there_before_its_store() {
    in_lab(plan("trap-capabilities").etcd(), |lab| {
        let host = lab.host(1);
        lab.etcd_stop()?;
        let (proxy, _plugin, _engine) =
            start_all(host, &[&format!("--etcd-endpoints={}", lab.etcd_endpoint())])?;
        let start = Instant::now();
        let failed = host.try_docker(CREATE_WEB)?;
        ensure!(!failed.ok() && failed.stderr.contains(":2379"), "the store is not named: {failed}");
        ensure!(start.elapsed() < secs(15), "it took {:?}", start.elapsed());
        let calls = proxy.take();
        for method in ["Plugin.Activate", "NetworkDriver.GetCapabilities", "IpamDriver.GetCapabilities"] {
            ensure!(named(&calls, method).iter().all(|call| call.status == 200), "{calls:?}");
        }
        // The same engine, the same plugin.
        lab.etcd_start()?;
        eventually("the network can be made", secs(30), || host.docker(CREATE_WEB))?;
        Ok(())
    });
}

#[test]
fn an_address_outlives_an_engine_that_died_asking_for_it() {
    in_lab(plan("trap-killed"), |lab| {
        let host = lab.host(1);
        let (proxy, plugin, mut engine) = start_all(host, &[])?;
        host.docker(CREATE_WEB)?;
        let address = lease(host)? + "44";
        let run = ["run", "-d", "--name", "c1", "--network", "web", "--ip", &address, IMAGE];
        for (call, method) in [(1, "RequestAddress"), (2, "CreateEndpoint"), (3, "Join")] {
            let pid = engine.pid();
            let strike = move || {
                // A process that is gone already is as good.
                let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGKILL);
            };
            proxy.set(Trap { call, when: When::BeforeAnswer, strike: Box::new(strike) });
            let failed = host.try_docker(&run)?;
            ensure!(proxy.disarm().is_some_and(|sprung| sprung.contains(method)), "{method}: {failed}");
            engine.crash()?;
            engine = host.start_dockerd(&[])?;
            host.docker(&["rm", "-f", "c1"])?;
            // Nobody tells the plugin that the endpoint will never come. Whoever asks for its address gets it all the same.
            let again = || -> Result<()> {
                let made = host.docker(&run);
                if made.is_err() {
                    host.docker(&["rm", "-f", "c1"])?;
                }
                made.map(drop)
            };
            eventually(format!("{address} can be had after {method}"), secs(60), again)
                .with_context(|| plugin.tail())?;
            ensure!(host.docker_ip("c1", "web")? == address);
            ping_within(secs(5), host, &address)?;
            host.docker(&["rm", "-f", "c1"])?;
        }
        Ok(())
    });
}

#[test]
fn a_dead_socket_is_replaced_and_an_unused_one_removed() {
    in_lab(plan("trap-socket"), |lab| {
        let host = lab.host(1);
        let _engine = host.start_dockerd(&[])?;
        // An engine tries every socket there is, for 15 s each.
        let listing = |what: &str| -> Result<()> {
            let start = Instant::now();
            host.docker(&["volume", "ls"])?;
            ensure!(start.elapsed() < secs(8), "docker volume ls took {:?} {what}", start.elapsed());
            Ok(())
        };
        let plugin = start_plugin(host, PLUGIN_SOCKET, &[])?;
        listing("beside a plugin")?;
        plugin.stop(secs(10))?;
        ensure!(!host.exists(PLUGIN_SOCKET), "the socket stays behind");
        listing("after the plugin has ended")?;
        let plugin = start_plugin(host, PLUGIN_SOCKET, &[])?;
        plugin.crash()?;
        ensure!(host.path(PLUGIN_SOCKET).symlink_metadata().is_ok(), "this test needs a dead socket");
        let plugin = start_plugin(host, PLUGIN_SOCKET, &[])?;
        listing("after the plugin was killed and started again")?;
        let left = host.sh("ls /run/docker/plugins")?;
        ensure!(left == "flannel.sock", "{left}");
        plugin.stop(secs(10)).map(drop)
    });
}

#[test]
fn neighbours_on_a_bridge_reach_each_other_whatever_forward_says() {
    in_lab(plan("trap-forward"), |lab| {
        let host = lab.host(1);
        let bridged = "/proc/sys/net/bridge/bridge-nf-call-iptables";
        if !host.exists(bridged) {
            eprintln!("skipped: this kernel's bridges call no iptables");
            return Ok(());
        }
        let (_proxy, _plugin, _engine) = start_all(host, &[])?;
        host.write(bridged, "1")?;
        host.docker(CREATE_WEB)?;
        let one = host.docker_run("c1", &["--network", "web"])?;
        let two = host.docker_run("c2", &["--network", "web"])?;
        let policy = host.out(&["iptables", "-S", "FORWARD"])?;
        ensure!(policy.contains("-P FORWARD DROP"), "{policy}");
        ensure!(host.read(bridged)?.trim() == "1");
        ping_within(secs(5), &one, two.ip()?)?;
        ping(&two, one.ip()?)
    });
}
