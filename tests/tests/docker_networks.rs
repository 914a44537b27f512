//! Docker networks on flannel as their users make them: who hands out addresses, what `-o` asks for, several networks in one
//! container, and what is kept from whom. Real engines, two hosts.

use anyhow::{Context, Result, ensure};
use flannel_tests::{
    Container, Daemon, Host, HttpServer, IMAGE, Lab, LabPlan, Place as _, eventually, http_get, in_lab, ping,
    ping_within, secs, seen_as, tcp_opens,
};

const CONFIG: &str = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"vxlan"}}"#;
const CIDR: &str = "10.100.0.0/16";
const OUTSIDE: &str = "198.51.100.2";
/// With our own IPAM.
const FLANNEL: &[&str] = &["-d", "flannel", "--ipam-driver", "flannel"];

fn plan(name: &str) -> LabPlan {
    Lab::new(name)
        .hosts(2)
        .etcd()
        .outside()
        .ip_forward(false)
        .needs(&["dockerd", "docker", "busybox", "curl"])
}

/// A plugin on etcd and an engine with the image, on every host. Dropping it ends them.
fn start(lab: &Lab) -> Result<Vec<(Daemon, Daemon)>> {
    lab.etcdctl(&["put", "/coreos.com/network/config", CONFIG])?;
    let endpoints = format!("--etcd-endpoints={}", lab.etcd_endpoint());
    lab.hosts()
        .iter()
        .map(|host| {
            let plugin = host.spawn("flannel-docker-plugin", &["flannel-docker-plugin", &endpoints], &[])?;
            eventually("the plugin's socket", secs(5), || host.exists("/run/docker/plugins/flannel.sock"))
                .with_context(|| plugin.tail())?;
            let dockerd = host.start_dockerd(&[])?;
            host.load_image()?;
            Ok((plugin, dockerd))
        })
        .collect()
}

fn create(host: &Host, name: &str, options: &[&str]) -> Result<()> {
    host.docker(&[&["network", "create"], options, &[name]].concat()).map(drop)
}

/// With our own IPAM, on the default network.
fn create_flannel(host: &Host, name: &str, options: &[&str]) -> Result<()> {
    create(host, name, &[FLANNEL, &["--subnet", CIDR], options].concat())
}

fn run(host: &Host, name: &str, network: &str, options: &[&str]) -> Result<Container> {
    host.docker_run(name, &[&["--network", network], options].concat())
}

/// What is refused, and with which words.
fn refused(host: &Host, command: &[&str], said: &str) -> Result<()> {
    let output = host.try_docker(command)?;
    ensure!(!output.ok() && output.stderr.contains(said), "{command:?}: {output}\nnot: {said}");
    Ok(())
}

/// `FLANNEL_SUBNET` of a host without its last byte: `10.100.7.`
fn lease(host: &Host) -> Result<String> {
    let env = host.read("/run/flannel/subnet.env")?;
    let subnet = env.lines().find_map(|line| line.strip_prefix("FLANNEL_SUBNET=")).context(env.clone())?;
    Ok(subnet.rsplit_once('.').context("no address")?.0.to_owned() + ".")
}

/// What docker inspect shows of a container on a network.
fn shown(host: &Host, container: &str, network: &str, field: &str) -> Result<String> {
    let format = format!("{{{{(index .NetworkSettings.Networks {network:?}).{field}}}}}");
    host.docker(&["inspect", "-f", &format, container])
}

#[test]
fn addresses_come_in_four_ways_and_all_reach_all() {
    in_lab(plan("docker-ipam"), |lab| {
        let _daemons = start(lab)?;
        let (h1, h2) = (lab.host(1), lab.host(2));
        create_flannel(h1, "cidr", &[])?;
        create(h2, "auto", FLANNEL)?;
        create(h1, "null", &["-d", "flannel", "--ipam-driver", "null"])?;
        let subnet = lease(h2)? + "0/24";
        // It does not know what the ledger has given out, so it gets a range of its own.
        let range = lease(h2)? + "128/25";
        let engines = ["-d", "flannel", "--subnet", &subnet, "--ip-range", &range];
        let gateway = lease(h2)? + "1";
        refused(
            h2,
            &[&["network", "create"], &engines[..], &["wrong"]].concat(),
            &format!("--gateway {gateway}"),
        )?;
        create(h2, "engine", &[&engines[..], &["--gateway", &gateway]].concat())?;
        let all = [
            run(h1, "c1", "cidr", &[])?,
            run(h2, "c2", "auto", &[])?,
            run(h1, "c3", "null", &[])?,
            run(h2, "c4", "engine", &[])?,
        ];
        let mut addresses = std::collections::BTreeSet::new();
        for container in &all {
            let address = container.address("eth0")?;
            ensure!(address.starts_with(&lease(container.host())?) && address.ends_with("/24"), "{address}");
            ensure!(addresses.insert(address.clone()), "{address} twice");
            for other in &all {
                ping_within(secs(5), container, other.ip()?)?;
            }
        }
        null_ipam(h1)?;
        refusals(h1)?;
        a_network_that_another_host_defined(h1, h2)?;

        // What is removed takes nothing of the others along.
        h2.docker(&["rm", "-f", "c2", "c4"])?;
        h2.docker(&["network", "rm", "auto"])?;
        h2.docker(&["network", "rm", "engine"])?;
        eventually("the bridge of the default network is gone", secs(8), || {
            !h2.sh("ip -br link").is_ok_and(|links| links.contains("cni0"))
        })?;
        ensure!(h2.sh("ls /var/lib/cni/networks/cbr0 2>/dev/null | grep -c '^10\\.' || true")? == "0");
        ping(&all[0], shown(h1, "c3", "null", "IPAddress")?)
    });
}

/// The engine shows what we answered, a container keeps no address over a restart, and one can be chosen.
fn null_ipam(host: &Host) -> Result<()> {
    let c3 = host.docker_container("c3")?;
    ensure!(shown(host, "c3", "null", "IPAddress")? == c3.ip()?);
    let link = c3.out(&["ip", "-o", "link", "show", "dev", "eth0"])?;
    ensure!(link.contains(&shown(host, "c3", "null", "MacAddress")?), "{link}");
    let fixed = lease(host)? + "88";
    let option = format!("flannel.ip={fixed}");
    host.docker(&["network", "disconnect", "null", "c3"])?;
    host.docker(&["network", "connect", "--driver-opt", &option, "null", "c3"])?;
    ensure!(c3.out(&["ip", "-4", "-o", "addr"])?.contains(&format!("{fixed}/24")));
    refused(host, &["run", "--rm", "--network", "cidr", "--ip", &fixed, IMAGE, "true"], "already taken")?;
    // By name, too: the engine's DNS knows it.
    host.docker(&["run", "-d", "--name", "asks", "--network", "null", IMAGE, "sleep", "infinity"])?;
    let said = host.docker(&["exec", "asks", "ping", "-c", "1", "-W", "2", "c3"])?;
    ensure!(said.contains(&fixed) && said.contains("1 packets received"), "{said}");
    host.docker(&["restart", "-t", "0", "asks"])?;
    ping_within(secs(5), &host.docker_container("asks")?, &fixed)?;
    host.docker(&["rm", "-f", "asks"]).map(drop)
}

fn refusals(host: &Host) -> Result<()> {
    let command = "docker network create -d flannel --ipam-driver flannel --subnet 10.100.0.0/16 NAME";
    let create = ["network", "create", "-d", "flannel"];
    let own = [&create[..], &["--ipam-driver", "flannel"]].concat();
    for (command, said) in [
        // Docker's own IPAM takes some range.
        ([&create[..], &["wrong"]].concat(), command),
        ([&create[..], &["--subnet", CIDR, "wrong"]].concat(), command),
        (
            [&create[..], &["--ipam-driver", "null", "-o", "flannel.network=nowhere", "wrong"]].concat(),
            "nowhere",
        ),
        ([&own[..], &["-o", "mtu=1400", "wrong"]].concat(), "-o mtu: unknown; known are flannel.network"),
        ([&own[..], &["-o", "com.docker.network.driver.mtu=9000", "wrong"]].concat(), "at most 1450 fit"),
        ([&own[..], &["-o", "com.docker.network.bridge.name=eth0", "wrong"]].concat(), "has the bridge cni0"),
        ([&own[..], &["--ipam-opt", "color=red", "wrong"]].concat(), "color: unknown; known are network"),
    ] {
        refused(host, &command, said)?;
    }
    let connect = ["network", "connect", "--driver-opt"];
    for (option, said) in [
        ("speed=11", "--driver-opt speed: unknown; known is flannel.ip"),
        (&format!("flannel.ip={}9", lease(host)?), "use --ip"),
    ] {
        refused(host, &[&connect[..], &[option, "cidr", "c3"]].concat(), said)?;
    }
    ensure!(!host.docker(&["network", "ls"])?.contains("wrong"));
    Ok(())
}

/// One host says what the network is; the other only names it.
fn a_network_that_another_host_defined(h1: &Host, h2: &Host) -> Result<()> {
    let define = ["--subnet", "10.60.0.0/16", "--ipam-opt", "network=blue", "--ipam-opt", "subnet-len=26"];
    let named = ["-o", "com.docker.network.bridge.name=br-blue"];
    create(h1, "blue", &[FLANNEL, &define, &named].concat())?;
    create(h2, "blue", &[FLANNEL, &["--ipam-opt", "network=blue"]].concat())?;
    create(h2, "bare", &["-d", "flannel", "--ipam-driver", "null", "-o", "flannel.network=blue"])?;
    let b1 = run(h1, "b1", "blue", &[])?;
    for (name, network) in [("b2", "blue"), ("b3", "bare")] {
        let other = run(h2, name, network, &[])?;
        ensure!(other.address("eth0")?.ends_with("/26"), "{}", other.address("eth0")?);
        ping_within(secs(5), &b1, other.ip()?)?;
        ping(&other, b1.ip()?)?;
    }
    ensure!(h1.out(&["ip", "-o", "link", "show", "master", "br-blue"])?.lines().count() == 1);
    // It leaves one host and stays on the other.
    h2.docker(&["rm", "-f", "b2", "b3"])?;
    h2.docker(&["network", "rm", "blue"])?;
    h2.docker(&["network", "rm", "bare"])?;
    eventually("h2 is off the network", secs(8), || !h2.exists("/run/flannel/networks/blue.env"))?;
    h1.read("/run/flannel/networks/blue.env")?;
    h1.docker(&["rm", "-f", "b1"])?;
    h1.docker(&["network", "rm", "blue"]).map(drop)
}

#[test]
fn a_container_may_be_on_several_networks() {
    in_lab(plan("docker-several"), |lab| {
        let _daemons = start(lab)?;
        let (h1, h2) = (lab.host(1), lab.host(2));
        create_flannel(h2, "web", &[])?;
        let remote = run(h2, "remote", "web", &[])?;
        let aux = {
            // The lease is known once the plugin has it.
            eventually("subnet.env", secs(5), || lease(h1))?
        };
        let at = |last: u8| format!("{aux}{last}");
        let (router, range) = (format!("router={}", at(2)), format!("{}/28", at(0)));
        create_flannel(h1, "web", &["--aux-address", &router, "--ip-range", &range])?;
        create(h1, "aaa", &[])?;
        create(h1, "zzz", &[])?;

        several_networks(h1, &remote)?;
        what_the_user_chooses(h1, &remote, &at)?;
        the_engine_publishes(h1, &remote)?;
        Ok(())
    });
}

/// Docker gives the default route to the network whose name comes first; remote nodes stay reachable either way.
fn several_networks(host: &Host, remote: &Container) -> Result<()> {
    for (name, other, default) in [("first", "zzz", "flannel"), ("second", "aaa", "bridge")] {
        host.docker(&["create", "--name", name, "--network", "web", IMAGE, "sleep", "infinity"])?;
        host.docker(&["network", "connect", other, name])?;
        host.docker(&["start", name])?;
        let container = host.docker_container(name)?;
        let routes = container.out(&["ip", "route"])?;
        let gateway = lease(host)? + "1";
        ensure!(
            routes.contains(&format!("default via {gateway}")) == (default == "flannel"),
            "{name}: {routes}"
        );
        ping_within(secs(5), &container, remote.ip()?)?;
        // The answer finds its way back: the remote side starts, too.
        let address = shown(host, name, "web", "IPAddress")?;
        ping(remote, &address)?;
    }
    // While it runs: off, on again, and on with one network more.
    let address = shown(host, "first", "web", "IPAddress")?;
    host.docker(&["network", "disconnect", "web", "first"])?;
    ensure!(ping(remote, &address).is_err(), "{address} still answers");
    host.docker(&["network", "connect", "--alias", "again", "web", "first"])?;
    ping_within(secs(5), &host.docker_container("first")?, remote.ip()?)?;
    let said = host.docker(&["exec", "second", "ping", "-c", "1", "-W", "2", "again"])?;
    ensure!(said.contains("1 packets received"), "{said}");
    host.docker(&["network", "disconnect", "aaa", "second"])?;
    ping_within(secs(5), &host.docker_container("second")?, remote.ip()?)?;
    host.docker(&["rm", "-f", "first", "second"]).map(drop)
}

fn what_the_user_chooses(host: &Host, remote: &Container, at: &dyn Fn(u8) -> String) -> Result<()> {
    // Outside the range, inside the subnet, as with Docker's bridge.
    let fixed = at(200);
    let mac = "02:42:ac:11:00:99";
    create_by_api(host, "chosen", "web", mac, &fixed)?;
    host.docker(&["start", "chosen"])?;
    let chosen = host.docker_container("chosen")?;
    ensure!(chosen.ip()? == fixed);
    let link = chosen.out(&["ip", "addr", "show", "dev", "eth0"])?;
    ensure!(link.contains(mac) && link.contains("169.254.34.68/16"), "{link}");
    ping_within(secs(5), remote, &fixed)?;
    create_by_api(host, "odd", "web", "01:00:00:00:00:01", &at(201))?;
    refused(host, &["start", "odd"], "--mac-address 01:00:00:00:00:01: the address of a group")?;
    refused(host, &["run", "--rm", "--network", "web", "--ip", &fixed, IMAGE, "true"], "already taken")?;
    let auxiliary = "is an auxiliary address";
    refused(host, &["run", "--rm", "--network", "web", "--ip", &at(2), IMAGE, "true"], auxiliary)?;
    let mut given = Vec::new();
    for n in 0..3 {
        let name = format!("range{n}");
        given.push(run(host, &name, "web", &[])?.ip()?);
    }
    ensure!(given.iter().all(|ip| (3..=15).any(|last| *ip == at(last))), "{given:?}");
    host.docker(&["rm", "-f", "chosen", "odd", "range0", "range1", "range2"]).map(drop)
}

/// `docker create` with an address, a link-local one and a MAC: this machine's command line wants a newer engine for that.
fn create_by_api(host: &Host, name: &str, network: &str, mac: &str, ip: &str) -> Result<()> {
    let container = format!(
        r#"{{"Image": "{IMAGE}", "Cmd": ["sleep", "infinity"], "MacAddress": "{mac}",
        "HostConfig": {{"NetworkMode": "{network}"}}, "NetworkingConfig": {{"EndpointsConfig": {{"{network}":
        {{"IPAMConfig": {{"IPv4Address": "{ip}", "LinkLocalIPs": ["169.254.34.68"]}}}}}}}}}}"#
    );
    let url = format!("http://docker/v1.41/containers/create?name={name}");
    let json = "Content-Type: application/json";
    let curl = ["curl", "-sS", "--fail-with-body", "--unix-socket", "/run/docker.sock", "-H", json];
    host.out(&[&curl[..], &["-d", &container, &url]].concat()).map(drop)
}

/// `-o flannel.publish=engine`: docker_gwbridge leads out and publishes, and `docker ps` shows it.
fn the_engine_publishes(host: &Host, remote: &Container) -> Result<()> {
    let options = [
        "-o",
        "flannel.publish=engine",
        "-o",
        "com.docker.network.driver.mtu=1400",
        "-o",
        "com.docker.network.container_iface_prefix=web",
    ];
    create_flannel(host, "shown", &options)?;
    let container = run(host, "shows", "shown", &["-p", "8080:80"])?;
    let routes = container.out(&["ip", "route"])?;
    ensure!(
        routes.contains("10.100.0.0/16 via") && !routes.contains(&format!("default via {}", lease(host)?)),
        "{routes}"
    );
    ensure!(container.mtu("web0")? == 1400, "{}", container.mtu("web0")?);
    ping_within(secs(5), &container, remote.ip()?)?;
    ping(remote, shown(host, "shows", "shown", "IPAddress")?)?;
    ping(&container, OUTSIDE)?;
    let ps = host.docker(&["ps", "--filter", "name=shows", "--format", "{{.Ports}}"])?;
    ensure!(ps.contains("0.0.0.0:8080->80/tcp"), "{ps}");
    let _server = HttpServer::start(&container, 80, "published")?;
    ensure!(http_get(remote.host(), &format!("http://{}:8080/", host.ip()))? == "published");
    host.docker(&["rm", "-f", "shows"])?;
    host.docker(&["network", "rm", "shown"]).map(drop)
}

#[test]
fn networks_keep_from_each_other_what_they_were_told_to() {
    in_lab(plan("docker-policy"), |lab| {
        let _daemons = start(lab)?;
        for host in lab.hosts() {
            create_flannel(host, "web", &[])?;
            create_flannel(host, "inside", &["--internal"])?;
            create_flannel(host, "closed", &["-o", "com.docker.network.bridge.enable_icc=false"])?;
            run(host, "w0", "web", &[])?;
        }
        let _outside = HttpServer::start(lab.outside(), 80, "outside")?;
        an_internal_network_has_no_way_out(lab)?;
        closed_containers_are_called_through_published_ports_only(lab)?;
        a_source_may_be_kept(lab)
    });
}

fn an_internal_network_has_no_way_out(lab: &Lab) -> Result<()> {
    let (h1, h2) = (lab.host(1), lab.host(2));
    let (i1, j1, i2) =
        (run(h1, "i0", "inside", &[])?, run(h1, "j0", "inside", &[])?, run(h2, "i0", "inside", &[])?);
    let out = |container: &Container| -> Result<()> {
        ensure!(tcp_opens(container, OUTSIDE, 80).is_err(), "{container:?} reaches the outside");
        ensure!(ping(container, h2.ip()).is_err(), "{container:?} reaches the other host");
        Ok(())
    };
    for round in ["as it is", "with a default route of its own"] {
        for (from, to) in [(&i1, &j1), (&i1, &i2), (&i2, &i1)] {
            ping_within(secs(5), from, to.ip()?).context(round)?;
        }
        out(&i1).context(round)?;
        if round == "as it is" {
            let routes = i1.out(&["ip", "route"])?;
            ensure!(!routes.contains("default") && routes.contains("10.100.0.0/16 via"), "{routes}");
            ensure!(!i1.out(&["ip", "-br", "link"])?.contains("eth1"), "docker_gwbridge is in");
            i1.out(&["ip", "route", "add", "default", "via", &(lease(h1)? + "1")])?;
        }
    }
    for host in [h1, h2] {
        host.docker(&["rm", "-f", "i0"])?;
    }
    h1.docker(&["rm", "-f", "j0"]).map(drop)
}

fn closed_containers_are_called_through_published_ports_only(lab: &Lab) -> Result<()> {
    let (h1, h2) = (lab.host(1), lab.host(2));
    let k1 = run(h1, "k0", "closed", &["-p", "8081:80"])?;
    let (l1, k2) = (run(h1, "l0", "closed", &[])?, run(h2, "k0", "closed", &[])?);
    let w2 = h2.docker_container("w0")?;
    // They reach others, so what follows is not just a broken network.
    ping_within(secs(5), &k1, w2.ip()?)?;
    ensure!(http_get(&k1, &format!("http://{OUTSIDE}/"))? == "outside");
    let _server = HttpServer::start(&k1, 80, "closed")?;
    for from in [&l1, &k2, &w2] {
        ensure!(ping(from, k1.ip()?).is_err(), "{from:?} calls k1");
        ensure!(tcp_opens(from, k1.ip()?, 80).is_err(), "{from:?} opens a connection to k1");
    }
    let url = format!("http://{}:8081/", h1.ip());
    for from in [&l1, &k2] {
        ensure!(http_get(from, &url)? == "closed", "{from:?}");
    }
    ensure!(http_get(h2, &url)? == "closed");
    for (host, names) in [(h1, &["k0", "l0"][..]), (h2, &["k0"])] {
        host.docker(&[&["rm", "-f"], names].concat())?;
    }
    Ok(())
}

fn a_source_may_be_kept(lab: &Lab) -> Result<()> {
    let h1 = lab.host(1);
    create_flannel(h1, "kept", &["-o", "com.docker.network.bridge.enable_ip_masquerade=false"])?;
    // Whoever does without masquerading has a router that knows the way back.
    lab.router().out(&["ip", "route", "add", "10.100.0.0/16", "via", &h1.ip().to_string()])?;
    let kept = run(h1, "m0", "kept", &[])?;
    let seen = seen_as(&kept, OUTSIDE, 80)?;
    ensure!(seen == kept.ip()?, "seen as {seen}");
    let seen = seen_as(&h1.docker_container("w0")?, OUTSIDE, 80)?;
    ensure!(seen == h1.ip().to_string(), "seen as {seen}");
    Ok(())
}
