//! How a Docker network may be asked for: who hands out its addresses, what `-o` says, and what happens when the same is
//! asked for again, in part, or in another order.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use flannel_tests::{Host, Lab, eventually, in_lab, secs};
use serde_json::{Value, json};

use super::engine::{Plugin, endpoint_request, names, network_request, pool_request, post_to};
use super::{ENDPOINT, NETWORK, id, one_host};

const CREATE_NETWORK: &str = "NetworkDriver.CreateNetwork";
const CREATE_ENDPOINT: &str = "NetworkDriver.CreateEndpoint";

/// What an engine sends for `--ipam-driver null`.
fn null_network(network: &str, options: Value) -> Value {
    json!({
        "NetworkID": network,
        "Options": {"com.docker.network.enable_ipv6": false, "com.docker.network.generic": options},
        "IPv4Data": [{"AddressSpace": "null", "Pool": "0.0.0.0/0"}],
        "IPv6Data": [],
    })
}

fn null_endpoint(network: &str, endpoint: &str, options: Value) -> Value {
    let mut request = endpoint_request(network, endpoint, "", "");
    request["Options"] = options;
    request
}

/// A network of our own IPAM with these `-o` options.
fn network_with(network: &str, pool: &str, options: Value) -> Value {
    let gateway = pool.replace(".0/24", ".1/24");
    let mut request = network_request(network, "flannel-local", pool, &gateway);
    request["Options"]["com.docker.network.generic"] = options;
    request
}

fn held(host: &Host) -> Result<Vec<String>> {
    let files = host.sh("ls /var/lib/cni/networks/cbr0 2>/dev/null | grep '^10\\.' || true")?;
    Ok(files.lines().map(str::to_owned).collect())
}

#[test]
fn without_an_ipam_driver_the_endpoint_gets_its_address_with_itself() {
    in_lab(one_host("null-ipam"), |lab| {
        let host = lab.host(1);
        let mut plugin = Plugin::start(host, &[])?;
        let before = host.network_state()?;
        // Nothing runs and nothing is defined: the default network with the default CIDR.
        for _ in 0..2 {
            plugin.call(CREATE_NETWORK, &null_network(NETWORK, json!({})))?;
        }
        let made = plugin.call(CREATE_ENDPOINT, &null_endpoint(NETWORK, ENDPOINT, json!({})))?;
        let address = made["Interface"]["Address"].as_str().context("no address")?.to_owned();
        ensure!(address.starts_with("10.244.") && address.ends_with("/24"), "{made}");
        ensure!(made["Interface"]["MacAddress"].as_str().is_some_and(|mac| mac.starts_with("0a:58:0a:f4:")));
        let again = plugin.call(CREATE_ENDPOINT, &null_endpoint(NETWORK, ENDPOINT, json!({})))?;
        ensure!(again == made, "{made} and then {again}");
        let gateway = address.replace(".2/24", ".1");
        ensure!(plugin.join(NETWORK, ENDPOINT)?["Gateway"] == gateway.as_str());

        let fixed = address.replace(".2/24", ".77");
        let with_ip = |ip: &str| null_endpoint(NETWORK, &id("fixed"), json!({"flannel.ip": ip}));
        let made = plugin.call(CREATE_ENDPOINT, &with_ip(&fixed))?;
        ensure!(made["Interface"]["Address"] == format!("{fixed}/24"), "{made}");
        let other = address.replace(".2/24", ".78");
        for (request, said) in [
            (with_ip(&other), "exists already with address"),
            (null_endpoint(NETWORK, &id("x"), json!({"flannel.ip": fixed})), "already taken"),
            (null_endpoint(NETWORK, &id("x"), json!({"flannel.ip": gateway})), "it is the gateway"),
            (
                null_endpoint(NETWORK, &id("x"), json!({"flannel.ip": "10.9.9.9"})),
                "not in this node's subnet",
            ),
        ] {
            let text = plugin.refused(CREATE_ENDPOINT, &request)?;
            ensure!(text.contains(said), "{text}");
        }
        // The user's MAC is not answered, the address is.
        let mut request = null_endpoint(NETWORK, &id("mac"), json!({}));
        request["Interface"]["MacAddress"] = json!("02:42:aa:bb:cc:dd");
        let made = plugin.call(CREATE_ENDPOINT, &request)?;
        ensure!(
            made["Interface"]["MacAddress"].is_null() && made["Interface"]["Address"].is_string(),
            "{made}"
        );

        ensure!(held(host)?.len() == 3, "{:?}", held(host)?);
        plugin.kill_and_restart()?;
        for endpoint in [ENDPOINT, &id("fixed"), &id("mac")] {
            for _ in 0..2 {
                plugin.call("NetworkDriver.DeleteEndpoint", &names(NETWORK, endpoint))?;
            }
        }
        eventually("the addresses go with their endpoints", secs(3), || {
            held(host).is_ok_and(|held| held.is_empty())
        })?;
        for _ in 0..2 {
            plugin.call("NetworkDriver.DeleteNetwork", &json!({"NetworkID": NETWORK}))?;
        }
        plugin.nothing_is_left(&before)
    });
}

#[test]
fn a_network_without_our_ipam_is_found_by_its_name() {
    in_lab(one_host("by-name").etcd(), |lab| {
        let host = lab.host(1);
        // As another host defined it.
        let config = r#"{"Network":"10.60.0.0/16","Backend":{"Type":"vxlan","VNI":7}}"#;
        lab.etcdctl(&["put", "/coreos.com/network/web/config", config])?;
        let endpoints = format!("--etcd-endpoints={}", lab.etcd_endpoint());
        let mut plugin = Plugin::start(host, &[&endpoints])?;
        let before = host.network_state()?;
        let (pool_id, pool) = plugin.create_network(NETWORK, "", json!({"network": "web"}))?;
        ensure!(pool.starts_with("10.60."), "{pool}");
        let web = json!({"flannel.network": "web"});
        plugin.call(CREATE_NETWORK, &null_network(&id("null"), web.clone()))?;
        let made = plugin.call(CREATE_ENDPOINT, &null_endpoint(&id("null"), ENDPOINT, json!({})))?;
        ensure!(made["Interface"]["Address"].as_str().is_some_and(|a| a.starts_with("10.60.")), "{made}");

        // Docker's own IPAM inside this host's subnet.
        let mut engines = network_with(&id("engine"), &pool, web.clone());
        engines["IPv4Data"][0]["AddressSpace"] = json!("LocalDefault");
        engines["IPv4Data"][0]["AuxAddresses"] = json!({"router": pool.replace(".0/24", ".9/24")});
        plugin.call(CREATE_NETWORK, &engines)?;
        let aux = json!({"PoolID": pool_id, "Address": pool.replace(".0/24", ".9"), "Options": null});
        let text = plugin.refused("IpamDriver.RequestAddress", &aux)?;
        ensure!(text.contains("auxiliary address"), "{text}");
        let mut elsewhere = network_with(&id("elsewhere"), "10.61.7.0/24", web);
        elsewhere["IPv4Data"][0]["AddressSpace"] = json!("LocalDefault");
        let text = plugin.refused(CREATE_NETWORK, &elsewhere)?;
        ensure!(text.contains(&pool) && text.contains("--ipam-driver flannel"), "{text}");
        let nowhere = null_network(&id("x"), json!({"flannel.network": "nowhere"}));
        let text = plugin.refused(CREATE_NETWORK, &nowhere)?;
        ensure!(text.contains("the store has no config of network nowhere"), "{text}");

        plugin.call("NetworkDriver.DeleteEndpoint", &names(&id("null"), ENDPOINT))?;
        for network in ["null", "engine"] {
            plugin.call("NetworkDriver.DeleteNetwork", &json!({"NetworkID": id(network)}))?;
        }
        host.out(&["ip", "link", "show", "dev", "fl-web"])?;
        plugin.remove_network(NETWORK, &pool_id, &pool.replace(".0/24", ".1"))?;
        eventually("nothing of it is left on this host", secs(8), || -> Result<()> {
            let now = host.network_state()?;
            ensure!(now == before, "{now}\n--- before\n{before}\n{}", plugin.daemon.tail());
            ensure!(!host.exists("/run/flannel/networks/web.env"), "its file is left");
            Ok(())
        })?;
        // What another host defined stays, and nothing is leased.
        let keys = lab.etcdctl(&["get", "--prefix", "--keys-only", "/coreos.com/network/web/"])?;
        ensure!(keys.trim() == "/coreos.com/network/web/config", "{keys}");
        Ok(())
    });
}

#[test]
fn driver_options_are_kept() {
    in_lab(one_host("options"), |lab| {
        let host = lab.host(1);
        let mut plugin = Plugin::start(host, &[])?;
        let before = host.network_state()?;
        let (pool_id, pool) = plugin.request_pool("10.100.0.0/16", json!({}))?;
        plugin.request_gateway(&pool_id)?;
        let create = |network: &str, options: Value| network_with(network, &pool, options);
        let bridge = |name: &str| json!({"com.docker.network.bridge.name": name});
        for (options, said) in [
            (bridge("eth0"), "an interface eth0 exists on this host"),
            (bridge("a/b"), "cannot name an interface"),
            (json!({"mtu": "1400"}), "-o mtu: unknown; known are"),
            (json!({"com.docker.network.driver.mtu": "big"}), "a number of bytes"),
        ] {
            let text = plugin.refused(CREATE_NETWORK, &create(NETWORK, options))?;
            ensure!(text.contains(said), "{text}");
        }
        host.out(&["ip", "link", "show", "dev", "cni0"])?;

        let all = json!({
            "com.docker.network.bridge.name": "br-web",
            "com.docker.network.driver.mtu": "1300",
            "com.docker.network.container_iface_prefix": "web",
            "flannel.publish": "engine",
            "flannel.network": "default",
        });
        plugin.restless.set(true);
        plugin.call(CREATE_NETWORK, &create(NETWORK, all))?;
        let address = plugin.request_address(&pool_id, "")?;
        plugin.call(CREATE_ENDPOINT, &endpoint_request(NETWORK, ENDPOINT, &address, ""))?;
        let joined = plugin.join(NETWORK, ENDPOINT)?;
        let gateway = pool.replace(".0/24", ".1");
        ensure!(joined["Gateway"].is_null(), "docker_gwbridge leads out: {joined}");
        let route = json!([{"Destination": "10.100.0.0/16", "RouteType": 0, "NextHop": gateway}]);
        ensure!(joined["StaticRoutes"] == route, "{joined}");
        ensure!(joined["InterfaceName"]["DstPrefix"] == "web", "{joined}");
        let ports = host.out(&["ip", "-o", "link", "show", "master", "br-web"])?;
        ensure!(ports.lines().count() == 1 && ports.contains("mtu 1300"), "{ports}");
        eventually("the bridge is the network's", secs(5), || -> Result<()> {
            let link = host.out(&["ip", "-o", "link", "show", "dev", "br-web"])?;
            ensure!(link.contains("mtu 1450"), "{link}");
            ensure!(!host.network_state()?.contains("cni0"), "cni0 is left");
            Ok(())
        })?;
        plugin.restless.set(false);

        // The first comer's name counts.
        let text = plugin.refused(CREATE_NETWORK, &create(&id("two"), bridge("br-two")))?;
        ensure!(text.contains("has the bridge br-web on this host"), "{text}");
        plugin.call(CREATE_NETWORK, &create(&id("two"), bridge("br-web")))?;
        plugin.call(CREATE_NETWORK, &create(&id("three"), json!({})))?;
        // A boot takes the marker away, the journal knows the name.
        host.sh("rm /run/flannel/subnet.bridge; ip link del br-web")?;
        plugin.kill_and_restart()?;
        eventually("the bridge is back", secs(5), || {
            host.out(&["ip", "link", "show", "dev", "br-web"]).is_ok()
        })?;

        plugin.end(NETWORK, ENDPOINT, &pool_id, &address)?;
        for network in [NETWORK, &id("two"), &id("three")] {
            plugin.remove_network(network, &pool_id, &gateway)?;
        }
        plugin.nothing_is_left(&before)
    });
}

#[test]
fn closed_containers_are_apart_on_one_bridge_too() {
    in_lab(one_host("closed"), |lab| {
        let host = lab.host(1);
        let mut plugin = Plugin::start(host, &[])?;
        let (pool_id, pool) = plugin.request_pool("10.100.0.0/16", json!({}))?;
        let closed = json!({"com.docker.network.bridge.enable_icc": "false"});
        plugin.call(CREATE_NETWORK, &network_with(NETWORK, &pool, closed))?;
        let filter = "/proc/sys/net/bridge/bridge-nf-call-iptables";
        // With it the packet filter sees what goes from port to port, without it only the bridge itself can tell.
        for (filtered, isolated) in [("1", false), ("0", true)] {
            if host.sh(&format!("echo {filtered} > {filter}")).is_err() && filtered == "1" {
                continue;
            }
            let endpoint = id(filtered);
            let address = plugin.run(NETWORK, &endpoint, &pool_id, "")?;
            let ports = host.out(&["bridge", "-d", "link", "show"])?;
            ensure!(ports.contains("isolated on") == isolated, "{filtered}: {ports}");
            plugin.end(NETWORK, &endpoint, &pool_id, &address)?;
        }
        Ok(())
    });
}

#[test]
fn auxiliary_addresses_outlive_everything_but_their_network() {
    in_lab(one_host("aux"), |lab| {
        let host = lab.host(1);
        let mut plugin = Plugin::start(host, &[])?;
        let before = host.network_state()?;
        let (pool_id, pool) = plugin.request_pool("10.100.0.0/16", json!({}))?;
        let at = |last: u8| pool.replace(".0/24", &format!(".{last}"));
        plugin.request_gateway(&pool_id)?;
        for last in [2, 9] {
            ensure!(plugin.request_address(&pool_id, &at(last))? == format!("{}/24", at(last)));
        }
        let mut request = network_with(NETWORK, &pool, json!({}));
        request["IPv4Data"][0]["AuxAddresses"] =
            json!({"router": format!("{}/24", at(2)), "printer": format!("{}/24", at(9))});
        plugin.call(CREATE_NETWORK, &request)?;
        plugin.kill_and_restart()?;
        let any = plugin.request_address(&pool_id, "")?;
        ensure!(any == format!("{}/24", at(3)), "{any}");
        plugin.release(&pool_id, &any)?;
        let text = plugin.refused(
            "IpamDriver.RequestAddress",
            &json!({"PoolID": pool_id, "Address": at(9), "Options": null}),
        )?;
        ensure!(text.contains("is an auxiliary address (--aux-address) of Docker network"), "{text}");
        // Gone from the ledger by somebody's hand: back with the next sweep, which a start begins with.
        host.sh(&format!("rm /var/lib/cni/networks/cbr0/{}", at(9)))?;
        plugin.kill_and_restart()?;
        eventually("it is kept again", secs(5), || held(host).is_ok_and(|held| held.contains(&at(9))))?;

        // The same request again is the same network; another one is not.
        plugin.call(CREATE_NETWORK, &request)?;
        let address = plugin.request_address(&pool_id, "")?;
        plugin.call(CREATE_ENDPOINT, &endpoint_request(NETWORK, ENDPOINT, &address, ""))?;
        let other = network_with(NETWORK, &pool, json!({}));
        let text = plugin.refused(CREATE_NETWORK, &other)?;
        ensure!(text.contains("made with other options"), "{text}");
        plugin.release(&pool_id, &address)?;
        // Without endpoints it is one that the engine removed while nobody listened.
        plugin.call(CREATE_NETWORK, &other)?;
        ensure!(!held(host)?.contains(&at(9)), "{:?}", held(host)?);
        plugin.call(CREATE_NETWORK, &request)?;

        for last in [1, 2, 9] {
            plugin.release(&pool_id, &at(last))?;
        }
        plugin.call("IpamDriver.ReleasePool", &json!({"PoolID": pool_id}))?;
        plugin.call("NetworkDriver.DeleteNetwork", &json!({"NetworkID": NETWORK}))?;
        plugin.nothing_is_left(&before)
    });
}

#[test]
fn what_one_engine_gives_back_another_request_keeps() {
    in_lab(one_host("order"), |lab| {
        let mut plugin = Plugin::start(lab.host(1), &[])?;
        let (pool_id, pool) = plugin.create_network(&id("one"), "10.100.0.0/16", json!({}))?;
        // A second network is asked for while the first is being removed.
        let (again, same) = plugin.request_pool("10.100.0.0/16", json!({}))?;
        ensure!((&again, &same) == (&pool_id, &pool));
        plugin.remove_network(&id("one"), &pool_id, &pool.replace(".0/24", ".1"))?;
        // Whatever removing takes, it is over then.
        std::thread::sleep(secs(1));
        plugin.request_gateway(&again)?;
        plugin.call(CREATE_NETWORK, &network_with(&id("two"), &pool, json!({})))?;
        let address = plugin.run(&id("two"), ENDPOINT, &again, "")?;

        // The same endpoint again is the same; with another address or MAC it is not.
        let request = endpoint_request(&id("two"), ENDPOINT, &address, "");
        plugin.call(CREATE_ENDPOINT, &request)?;
        // A repeated CreateEndpoint does not make a running endpoint one that never joined.
        plugin.release(&again, &address)?;
        ensure!(held(lab.host(1))?.len() == 1, "its address was given away");
        let other = endpoint_request(&id("two"), ENDPOINT, &address, "02:42:aa:bb:cc:dd");
        let text = plugin.refused(CREATE_ENDPOINT, &other)?;
        ensure!(text.contains("exists already with address"), "{text}");
        for (mac, said) in [("01:42:aa:bb:cc:dd", "must be even"), ("00:00:00:00:00:00", "cannot have it")] {
            let text =
                plugin.refused(CREATE_ENDPOINT, &endpoint_request(&id("two"), &id("m"), &address, mac))?;
            ensure!(text.contains(said), "{text}");
        }
        let mut named = endpoint_request(&id("two"), &id("m"), &address, "");
        named["Options"]["com.docker.network.endpoint.ifname"] = json!("web0");
        let text = plugin.refused(CREATE_ENDPOINT, &named)?;
        ensure!(text.contains("container_iface_prefix=PREFIX"), "{text}");
        named = endpoint_request(&id("two"), &id("m"), &address, "");
        named["Options"]["flannel.ip"] = json!("10.100.9.9");
        let text = plugin.refused(CREATE_ENDPOINT, &named)?;
        ensure!(text.contains("use --ip 10.100.9.9"), "{text}");

        // A range that holds all of this host's subnet is no restriction.
        let mut whole = pool_request("10.100.0.0/16", json!({}));
        whole["SubPool"] = json!("10.100.0.0/16");
        ensure!(plugin.call("IpamDriver.RequestPool", &whole)?["PoolID"] == again.as_str());
        Ok(())
    });
}

#[test]
fn a_busy_store_holds_up_only_who_needs_it() {
    let plan = Lab::new("busy-store").hosts(1).etcd();
    in_lab(plan, |lab| {
        let config = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"vxlan"}}"#;
        lab.etcdctl(&["put", "/coreos.com/network/config", config])?;
        let endpoints = format!("--etcd-endpoints={}", lab.etcd_endpoint());
        let mut plugin = Plugin::start(lab.host(1), &[&endpoints])?;
        let (pool_id, pool) = plugin.create_network(NETWORK, "10.100.0.0/16", json!({}))?;
        lab.etcd_stop()?;
        let socket = plugin.socket();
        // Another network, which only the store knows.
        let other = std::thread::spawn(move || {
            post_to(&socket, "IpamDriver.RequestPool", &pool_request("10.50.0.0/16", json!({})).to_string())
        });
        std::thread::sleep(Duration::from_millis(300));
        let start = Instant::now();
        plugin.request_pool("10.100.0.0/16", json!({}))?;
        plugin.call(CREATE_NETWORK, &network_with(&id("two"), &pool, json!({})))?;
        plugin.request_address(&pool_id, "")?;
        let waiting = start.elapsed();
        let refused = other.join().map_err(|_| anyhow!("the thread died"))??;
        ensure!(refused.status == 500, "{}", refused.body);
        ensure!(waiting < secs(1), "answers from local state took {waiting:?}");
        Ok(())
    });
}
