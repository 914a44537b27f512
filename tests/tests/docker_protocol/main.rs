//! The Docker plugin over its socket, with requests as real engines send them, on the embedded store. No engine is needed:
//! what an engine does between the calls is played here.

mod engine;
mod input;
mod networks;
mod traps;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use flannel_tests::{Lab, LabPlan, eventually, in_lab, secs};
use serde_json::{Value, json};

use engine::{Plugin, SOCKET, endpoint_request, names, network_request, pool_request, program_request};

/// What engines send as `NetworkID` and `EndpointID`.
const NETWORK: &str = "9b6c1f40cafb7e27ff6760ff154a456669ede2c892d0f4f3b37acf3c2ca22d17";
const ENDPOINT: &str = "0b60d1f12c07ade703ac2a06e9aa2ea420550195d848f4a9122ca1dcc07ee910";

fn one_host(name: &str) -> LabPlan {
    Lab::new(name).hosts(1)
}

/// An id of an engine, made of a word.
fn id(word: &str) -> String {
    let hex: String = word.bytes().map(|byte| format!("{byte:02x}")).collect();
    format!("{hex:0<64}")
}

#[test]
fn activation_is_answered_at_once_and_whatever_the_headers() {
    in_lab(one_host("activate"), |lab| {
        // A store that nobody answers for: activation must not care.
        let mut plugin = Plugin::start(lab.host(1), &["--etcd-endpoints=http://10.77.0.99:2379"])?;
        let start = Instant::now();
        let answers = [
            ("Plugin.Activate", json!({"Implements": ["NetworkDriver", "IpamDriver"]})),
            ("NetworkDriver.GetCapabilities", json!({"Scope": "local", "ConnectivityScope": "global"})),
            (
                "IpamDriver.GetCapabilities",
                json!({"RequiresMACAddress": false, "RequiresRequestReplay": false}),
            ),
            (
                "IpamDriver.GetDefaultAddressSpaces",
                json!({"LocalDefaultAddressSpace": "flannel-local", "GlobalDefaultAddressSpace": "flannel-global"}),
            ),
        ];
        for (method, wanted) in &answers {
            // Engines send no body here.
            let answer = plugin.post(method, "")?;
            ensure!(answer.status == 200, "{method}: {}", answer.body);
            ensure!(serde_json::from_str::<Value>(&answer.body)? == *wanted, "{method}: {}", answer.body);
        }
        ensure!(start.elapsed() < secs(1), "activation took {:?}", start.elapsed());

        let later = plugin.send(
            "POST /Plugin.Activate HTTP/1.1\r\nHost: plugin.moby.localhost\r\nContent-Length: 0\r\n\
             Connection: close\r\n\r\n",
        )?;
        ensure!(later.status == 200, "{}", later.body);
        for method in ["NetworkDriver.Frobnicate", "VolumeDriver.List", ""] {
            let answer = plugin.post(method, "{}")?;
            ensure!(answer.status == 404 && answer.body.contains("is not a method"), "{}", answer.body);
        }
        for node in ["DiscoverNew", "DiscoverDelete"] {
            let data = json!({"DiscoveryType": 1, "DiscoveryData": {"Address": "10.77.0.12", "Self": false}});
            plugin.call(&format!("NetworkDriver.{node}"), &data)?;
        }
        let took = plugin.daemon.stop(secs(5))?;
        ensure!(took < secs(2), "it took {took:?} to end");
        ensure!(!lab.host(1).exists(SOCKET), "the socket stays behind");
        Ok(())
    });
}

#[test]
fn a_request_repeated_without_its_body_does_nothing() {
    in_lab(one_host("bodies"), |lab| {
        let plugin = Plugin::start(lab.host(1), &[])?;
        for method in [
            "IpamDriver.RequestPool",
            "IpamDriver.ReleasePool",
            "IpamDriver.RequestAddress",
            "IpamDriver.ReleaseAddress",
            "NetworkDriver.CreateNetwork",
            "NetworkDriver.DeleteNetwork",
            "NetworkDriver.CreateEndpoint",
            "NetworkDriver.DeleteEndpoint",
            "NetworkDriver.Join",
            "NetworkDriver.Leave",
            "NetworkDriver.ProgramExternalConnectivity",
            "NetworkDriver.RevokeExternalConnectivity",
            "NetworkDriver.EndpointOperInfo",
        ] {
            for body in ["", "{}", "{\"PoolID\":", "[]", "\u{0}"] {
                let answer = plugin.post(method, body)?;
                ensure!(answer.status == 400, "{method} with {body:?}: {} {}", answer.status, answer.body);
                let said: Value = serde_json::from_str(&answer.body)?;
                ensure!(said["Err"].is_string() && said["Err"] == said["Error"], "{said}");
            }
        }
        let made =
            lab.host(1).sh("ls /var/lib/flannel/docker/*; ls /var/lib/cni/networks 2>/dev/null || true")?;
        ensure!(!made.contains(".json") && !made.contains("default"), "something was made:\n{made}");
        Ok(())
    });
}

#[test]
fn a_network_comes_and_goes_without_a_trace() {
    in_lab(one_host("comes-and-goes"), |lab| {
        let host = lab.host(1);
        let mut plugin = Plugin::start(host, &[])?;
        let before = host.network_state()?;
        let (pool_id, pool) = plugin.create_network(NETWORK, "10.100.0.0/16", json!({}))?;
        ensure!(pool.starts_with("10.100.") && pool.ends_with(".0/24"), "{pool}");
        let gateway = pool.replace(".0/24", ".1");
        let bridge = host.out(&["ip", "-4", "-o", "addr", "show", "dev", "cni0"])?;
        ensure!(bridge.contains(&format!("{gateway}/24")), "{bridge}");
        let env = host.read("/run/flannel/subnet.env")?;
        ensure!(env.contains(&format!("FLANNEL_SUBNET={gateway}/24")), "{env}");

        let address = plugin.run(NETWORK, ENDPOINT, &pool_id, "")?;
        ensure!(address == pool.replace(".0/24", ".2/24"), "{address}");
        let joined = plugin.join(NETWORK, ENDPOINT)?;
        ensure!(joined["Gateway"] == gateway.as_str(), "{joined}");
        ensure!(joined["InterfaceName"]["DstPrefix"] == "eth", "{joined}");
        let route = json!([{"Destination": "10.100.0.0/16", "RouteType": 0, "NextHop": gateway}]);
        ensure!(joined["StaticRoutes"] == route, "{joined}");
        let src = joined["InterfaceName"]["SrcName"].as_str().context("no SrcName")?;
        let link = host.out(&["ip", "-o", "link", "show", "dev", src])?;
        ensure!(link.contains("mtu 1450") && link.contains(&mac_of(&address)), "{link}");
        let ports = host.out(&["ip", "-o", "link", "show", "master", "cni0"])?;
        ensure!(ports.lines().count() == 1 && ports.contains("mtu 1450"), "{ports}");
        let ip = address.trim_end_matches("/24");
        let entry = host.read(&format!("/var/lib/cni/networks/cbr0/{ip}"))?;
        ensure!(entry == format!("docker:{ENDPOINT}\r\neth"), "{entry:?}");

        plugin.end(NETWORK, ENDPOINT, &pool_id, &address)?;
        eventually("the veth pair is gone", secs(2), || {
            host.out(&["ip", "-o", "link", "show", "master", "cni0"]).is_ok_and(|ports| ports.is_empty())
        })?;
        plugin.remove_network(NETWORK, &pool_id, &gateway)?;
        plugin.nothing_is_left(&before)
    });
}

fn mac_of(address: &str) -> String {
    let hex: Vec<String> = address
        .split(['.', '/'])
        .take(4)
        .map(|part| format!("{:02x}", part.parse::<u8>().unwrap_or_default()))
        .collect();
    format!("0a:58:{}", hex.join(":"))
}

#[test]
fn a_kill_between_any_two_calls_loses_nothing() {
    in_lab(one_host("kill"), |lab| {
        let host = lab.host(1);
        let mut plugin = Plugin::start(host, &[])?;
        let before = host.network_state()?;
        plugin.restless.set(true);
        let (pool_id, pool) = plugin.create_network(NETWORK, "10.100.0.0/16", json!({}))?;
        let first = plugin.run(NETWORK, ENDPOINT, &pool_id, "")?;
        let second = plugin.run(NETWORK, &id("second"), &pool_id, "")?;
        ensure!(first != second, "{first} twice");
        let links = host.out(&["ip", "-o", "link", "show", "master", "cni0"])?;
        ensure!(links.lines().count() == 2, "{links}");
        plugin.end(NETWORK, ENDPOINT, &pool_id, &first)?;
        let third = plugin.run(NETWORK, &id("third"), &pool_id, "")?;
        ensure!(third != first && third != second, "{third} was just given back or is in use");
        plugin.end(NETWORK, &id("second"), &pool_id, &second)?;
        plugin.end(NETWORK, &id("third"), &pool_id, &third)?;
        plugin.remove_network(NETWORK, &pool_id, &pool.replace(".0/24", ".1"))?;
        plugin.kill_and_restart()?;
        plugin.nothing_is_left(&before)
    });
}

#[test]
fn networks_come_and_go_in_a_hurry() {
    in_lab(one_host("hurry"), |lab| {
        let host = lab.host(1);
        let mut plugin = Plugin::start(host, &[])?;
        let before = host.network_state()?;
        for round in 0..6 {
            // The network is made again while the one before is still being taken away.
            let network = id(&format!("round {round}"));
            let endpoint = id(&format!("endpoint {round}"));
            let (pool_id, pool) = plugin.create_network(&network, "10.100.0.0/16", json!({}))?;
            let address = plugin.run(&network, &endpoint, &pool_id, "")?;
            let ports = host.out(&["ip", "-o", "link", "show", "master", "cni0"])?;
            ensure!(ports.lines().count() == 1, "one port was to be on the bridge:\n{ports}");
            let bridge = host.out(&["ip", "-4", "-o", "addr", "show", "dev", "cni0"])?;
            ensure!(bridge.contains(&pool.replace(".0/24", ".1/24")), "{bridge} is not of {pool}");
            plugin.end(&network, &endpoint, &pool_id, &address)?;
            plugin.remove_network(&network, &pool_id, &pool.replace(".0/24", ".1"))?;
        }
        plugin.nothing_is_left(&before)
    });
}

#[test]
fn what_is_unknown_or_repeated_is_deleted_all_the_same() {
    in_lab(one_host("repeat"), |lab| {
        let mut plugin = Plugin::start(lab.host(1), &[])?;
        let (pool_id, _) = plugin.create_network(NETWORK, "10.100.0.0/16", json!({}))?;
        let address = plugin.run(NETWORK, ENDPOINT, &pool_id, "")?;
        for _ in 0..2 {
            plugin.end(NETWORK, ENDPOINT, &pool_id, &address)?;
        }
        plugin.end(&id("no network"), &id("no endpoint"), "flannel/none/10.9.9.0/24", "10.9.9.9")?;
        plugin.end(NETWORK, &id("no endpoint"), "StubLocal/10.9.9.0/24", "rubbish")?;
        plugin.call("IpamDriver.ReleasePool", &json!({"PoolID": "rubbish"}))?;
        plugin.call("NetworkDriver.DeleteNetwork", &json!({"NetworkID": id("no network")}))?;

        // The same network and the same endpoint again: an engine that heard no answer.
        plugin.create_network(NETWORK, "10.100.0.0/16", json!({}))?;
        let address = plugin.request_address(&pool_id, "")?;
        for _ in 0..2 {
            plugin
                .call("NetworkDriver.CreateEndpoint", &endpoint_request(NETWORK, ENDPOINT, &address, ""))?;
        }
        let joined = plugin.join(NETWORK, ENDPOINT)?;
        ensure!(plugin.join(NETWORK, ENDPOINT)? == joined);

        let refused = plugin.refused(
            "NetworkDriver.Join",
            &json!({"NetworkID": NETWORK, "EndpointID": id("x"), "SandboxKey": "", "Options": {}}),
        )?;
        ensure!(refused.contains("is unknown"), "{refused}");
        let refused = plugin
            .refused("NetworkDriver.CreateEndpoint", &endpoint_request(&id("x"), ENDPOINT, &address, ""))?;
        ensure!(refused.contains("docker network rm"), "{refused}");
        Ok(())
    });
}

#[test]
fn addresses_are_nobody_elses() {
    in_lab(one_host("addresses"), |lab| {
        let host = lab.host(1);
        let mut plugin = Plugin::start(host, &[])?;
        let (pool_id, pool) = plugin.create_network(NETWORK, "10.100.0.0/16", json!({}))?;
        let at = |last: u8| pool.replace(".0/24", &format!(".{last}"));
        let asked = |address: String| json!({"PoolID": pool_id, "Address": address, "Options": null});

        let fixed = plugin.run(NETWORK, ENDPOINT, &pool_id, &at(77))?;
        ensure!(fixed == format!("{}/24", at(77)), "{fixed}");
        let text = plugin.refused("IpamDriver.RequestAddress", &asked(at(77)))?;
        ensure!(text.contains("already taken"), "{text}");
        for (address, said) in
            [(at(1), "gateway"), (at(255), "broadcast"), ("10.9.9.9".to_owned(), "not in this node's subnet")]
        {
            let text = plugin.refused("IpamDriver.RequestAddress", &asked(address))?;
            ensure!(text.contains(said), "{text}");
        }
        let text = plugin
            .refused("NetworkDriver.CreateEndpoint", &endpoint_request(NETWORK, &id("thief"), &fixed, ""))?;
        ensure!(text.contains("already taken"), "{text}");

        // A container of CNI on the same host.
        host.write(&format!("/var/lib/cni/networks/cbr0/{}", at(5)), "cni-container\r\neth0")?;
        let text = plugin.refused("IpamDriver.RequestAddress", &asked(at(5)))?;
        ensure!(text.contains("cni-container"), "{text}");

        // The user's MAC is not answered: the engine would take that for a change.
        let address = plugin.request_address(&pool_id, "")?;
        let request = endpoint_request(NETWORK, &id("mac"), &address, "02:42:aa:bb:cc:dd");
        ensure!(plugin.call("NetworkDriver.CreateEndpoint", &request)? == json!({}));
        let joined = plugin.join(NETWORK, &id("mac"))?;
        let src = joined["InterfaceName"]["SrcName"].as_str().context("no SrcName")?;
        let link = host.out(&["ip", "-o", "link", "show", "dev", src])?;
        ensure!(link.contains("02:42:aa:bb:cc:dd"), "{link}");

        // The engine gave up between CreateEndpoint and Join: it only gives the address back.
        let address = plugin.request_address(&pool_id, &at(99))?;
        plugin
            .call("NetworkDriver.CreateEndpoint", &endpoint_request(NETWORK, &id("gave up"), &address, ""))?;
        plugin.release(&pool_id, &address)?;
        plugin.run(NETWORK, &id("next"), &pool_id, &at(99))?;
        Ok(())
    });
}

#[test]
fn wrong_use_is_refused_with_what_to_type() {
    in_lab(one_host("wrong-use"), |lab| {
        let mut plugin = Plugin::start(lab.host(1), &[])?;
        let (pool_id, pool) = plugin.create_network(NETWORK, "10.100.0.0/16", json!({}))?;
        let command = "docker network create -d flannel --ipam-driver flannel --subnet 10.100.0.0/16 NAME";
        let gateway = format!("{}/24", pool.replace(".0/24", ".1"));
        let with = |key: &str, value: Value| {
            let mut request = network_request(&id("wrong"), "flannel-local", &pool, &gateway);
            request["Options"][key] = value;
            request
        };
        let create = "NetworkDriver.CreateNetwork";
        let ask = "IpamDriver.RequestPool";
        let v6 =
            json!({"AddressSpace": "flannel-local", "Pool": "", "SubPool": "", "Options": {}, "V6": true});
        let ranged = |range: &str| {
            let mut request = pool_request("10.100.0.0/16", json!({}));
            request["SubPool"] = json!(range);
            request
        };
        let other_gateway = json!({
            "PoolID": pool_id, "Address": pool.replace(".0/24", ".9"),
            "Options": {"RequestAddressType": "com.docker.network.gateway"},
        });
        let port =
            json!([{"Proto": 6, "IP": "", "Port": 80, "HostIP": "", "HostPort": 8080, "HostPortEnd": 8080}]);
        let two = json!({
            "NetworkID": id("two"), "Options": {}, "IPv6Data": [],
            "IPv4Data": [{"AddressSpace": "flannel-local", "Pool": pool}, {"AddressSpace": "flannel-local", "Pool": pool}],
        });
        let cases = [
            // Docker's own IPAM chose an address range.
            (
                create,
                network_request(&id("wrong"), "LocalDefault", "172.18.0.0/16", "172.18.0.1/16"),
                command,
            ),
            (
                create,
                with("com.docker.network.generic", json!({"flannel.network": "web"})),
                "is of flannel network default",
            ),
            (
                create,
                with("com.docker.network.generic", json!({"com.docker.network.driver.mtu": "1451"})),
                "at most 1450 fit",
            ),
            (
                create,
                with("com.docker.network.generic", json!({"com.docker.network.bridge.name": "fl-b"})),
                "has the bridge cni0 on this host",
            ),
            (create, with("com.docker.network.enable_ipv6", json!(true)), "the engine sent no IPv6 pool"),
            (create, with("com.docker.network.generic", json!({"mtu": "1400"})), "-o mtu: "),
            (create, two, "one pool, 2 were given"),
            (ask, v6, "flannel network default is 10.100.0.0/16 and has no IPv6: leave --ipv6 out"),
            (ask, pool_request("fd00:5::/64", json!({})), "an IPv4 network was wanted"),
            (ask, pool_request("10.100.7.0/16", json!({})), "the network is 10.100.0.0/16"),
            (ask, pool_request("10.100.128.0/17", json!({})), "use --subnet 10.100.0.0/16 to join it"),
            (ask, pool_request("10.0.0.0/8", json!({})), "overlaps flannel network default"),
            (ask, pool_request("10.77.0.0/16", json!({})), "10.77.0.0/24"),
            (ask, pool_request("10.9.0.0/16", json!({"colour": "red"})), "colour: unknown"),
            (
                ask,
                pool_request("10.9.0.0/16", json!({"backend": "tencent-vpc"})),
                "tencent-vpc is not built yet",
            ),
            (ask, pool_request("10.9.0.0/16", json!({"vni": "1"})), "VNI 1 is network default's"),
            (ask, pool_request("10.100.0.0/16", json!({"backend": "host-gw"})), "already defined otherwise"),
            (ask, pool_request("", json!({"network": "nowhere"})), "define it with --subnet"),
            (ask, ranged("10.99.0.0/24"), "is not inside"),
            ("IpamDriver.RequestAddress", other_gateway, "leave --gateway out"),
            (
                "NetworkDriver.ProgramExternalConnectivity",
                program_request(NETWORK, ENDPOINT, port),
                "is unknown: it was never created",
            ),
            (
                "NetworkDriver.CreateEndpoint",
                {
                    let mut request = endpoint_request(
                        NETWORK,
                        &id("opt"),
                        &format!("{}/24", pool.replace(".0/24", ".7")),
                        "",
                    );
                    request["Options"]["mtu"] = json!("1300");
                    request
                },
                "--driver-opt mtu: ",
            ),
        ];
        for (method, request, said) in cases {
            let text = plugin.refused(method, &request)?;
            ensure!(text.contains(said), "{method} {request}\nsays {text:?}\nnot  {said:?}");
        }
        let known = lab.host(1).sh("ls /var/lib/flannel/docker/networks /var/lib/flannel/docker/pools")?;
        ensure!(!known.contains(&id("wrong")) && !known.contains("net-10"), "something was kept:\n{known}");
        Ok(())
    });
}

#[test]
fn an_ip_range_inside_this_hosts_subnet_is_kept_to() {
    in_lab(one_host("range"), |lab| {
        let mut plugin = Plugin::start(lab.host(1), &[])?;
        let (_, pool) = plugin.create_network(NETWORK, "10.100.0.0/16", json!({}))?;
        let mut request = pool_request("10.100.0.0/16", json!({}));
        request["SubPool"] = json!(pool.replace(".0/24", ".192/30"));
        let answer = plugin.call("IpamDriver.RequestPool", &request)?;
        ensure!(answer["Pool"] == pool.as_str(), "{answer}");
        let ranged = answer["PoolID"].as_str().context("no PoolID")?.to_owned();
        ensure!(plugin.request_gateway(&ranged)? == format!("{}/24", pool.replace(".0/24", ".1")));
        for last in 192..=195 {
            let address = plugin.request_address(&ranged, "")?;
            ensure!(address == pool.replace(".0/24", &format!(".{last}/24")), "{address}");
        }
        let full = json!({"PoolID": ranged, "Address": "", "Options": null});
        let text = plugin.refused("IpamDriver.RequestAddress", &full)?;
        ensure!(text.contains("no free address in --ip-range"), "{text}");
        Ok(())
    });
}

#[test]
fn networks_are_defined_once_and_joined_after_that() {
    in_lab(one_host("define"), |lab| {
        let host = lab.host(1);
        let mut plugin = Plugin::start(host, &[])?;
        let before = host.network_state()?;
        // Nothing said and nothing configured: the default network gets the default CIDR.
        let (first, pool) = plugin.create_network(&id("one"), "", json!({}))?;
        ensure!(
            first.starts_with("flannel/default/10.244.") && pool.starts_with("10.244."),
            "{first} {pool}"
        );
        // The same again, without and with its CIDR; an automatic pool does not make Docker ask for ever.
        let (again, _) = plugin.create_network(&id("two"), "", json!({}))?;
        let (named, _) = plugin.create_network(&id("three"), "10.244.0.0/16", json!({}))?;
        ensure!(first == again && first == named, "{first} {again} {named}");
        // Another CIDR is another network, with a VNI of its own.
        let (other, _) = plugin.create_network(&id("four"), "10.50.0.0/16", json!({}))?;
        ensure!(other.starts_with("flannel/net-10.50.0.0-16/10.50."), "{other}");
        let options = json!({"network": "web", "backend": "vxlan", "subnet-len": "26"});
        let (web, pool) = plugin.create_network(&id("five"), "10.60.0.0/16", options.clone())?;
        ensure!(web.starts_with("flannel/web/10.60.") && pool.ends_with("/26"), "{web} {pool}");
        let (by_name, _) = plugin.create_network(&id("six"), "", json!({"network": "web"}))?;
        let (by_both, _) = plugin.create_network(&id("seven"), "10.60.0.0/16", options)?;
        ensure!(web == by_name && web == by_both, "{web} {by_name} {by_both}");
        let refused = plugin.refused(
            "IpamDriver.RequestPool",
            &pool_request("", json!({"network": "web", "subnet-len": "24"})),
        )?;
        ensure!(refused.contains("\"SubnetLen\":26") && refused.contains("subnet-len=24"), "{refused}");
        let links = host.out(&["ip", "-d", "-o", "link", "show", "type", "vxlan"])?;
        for vni in ["id 1 ", "id 2 ", "id 3 "] {
            ensure!(links.contains(vni), "no device with {vni}in\n{links}");
        }
        for bridge in ["cni0", "fl-web"] {
            host.out(&["ip", "link", "show", "dev", bridge])?;
        }
        host.read("/run/flannel/networks/web.env")?;

        for (network, pool_id) in [
            ("one", &first),
            ("two", &again),
            ("three", &named),
            ("four", &other),
            ("five", &web),
            ("six", &by_name),
            ("seven", &by_both),
        ] {
            plugin.remove_network(&id(network), pool_id, "10.244.0.1")?;
        }
        plugin.nothing_is_left(&before)
    });
}

#[test]
fn a_clusters_default_network_stays_without_its_bridge() {
    in_lab(one_host("cluster").etcd(), |lab| {
        let host = lab.host(1);
        let config = r#"{"Network":"10.100.0.0/16","Backend":{"Type":"vxlan"}}"#;
        lab.etcdctl(&["put", "/coreos.com/network/config", config])?;
        let endpoints = format!("--etcd-endpoints={}", lab.etcd_endpoint());
        let mut plugin = Plugin::start(host, &[&endpoints])?;
        // CNI on this host reads it, whether Docker has a network or not.
        let env = eventually("subnet.env", secs(5), || host.read("/run/flannel/subnet.env"))?;
        let before = eventually("the tunnel", secs(5), || -> Result<String> {
            let now = host.network_state()?;
            ensure!(now.contains("flannel.1") && !now.contains("cni0"), "{now}");
            Ok(now)
        })?;
        for network in ["one", "two"] {
            let (pool_id, pool) = plugin.create_network(&id(network), "10.100.0.0/16", json!({}))?;
            plugin
                .run(&id(network), ENDPOINT, &pool_id, "")
                .and_then(|address| plugin.end(&id(network), ENDPOINT, &pool_id, &address))?;
            plugin.remove_network(&id(network), &pool_id, &pool.replace(".0/24", ".1"))?;
            eventually("the bridge is gone and all else is as before", secs(8), || -> Result<()> {
                let now = host.network_state()?;
                ensure!(now == before, "{now}\n--- before\n{before}\n{}", plugin.daemon.tail());
                ensure!(!host.exists("/var/lib/cni/networks/cbr0"), "the ledger is left");
                Ok(())
            })?;
            ensure!(host.read("/run/flannel/subnet.env")? == env);
        }
        ensure!(lab.etcdctl(&["get", "--print-value-only", "/coreos.com/network/config"])? == config);
        Ok(())
    });
}

#[test]
fn dockers_own_ipam_may_hand_out_this_hosts_subnet() {
    in_lab(one_host("engine-ipam"), |lab| {
        let host = lab.host(1);
        let mut plugin = Plugin::start(host, &[])?;
        let (pool_id, pool) = plugin.create_network(NETWORK, "10.100.0.0/16", json!({}))?;
        let at = |last: u8| format!("{}/24", pool.replace(".0/24", &format!(".{last}")));
        let own = id("own ipam");
        plugin.call("NetworkDriver.CreateNetwork", &network_request(&own, "LocalDefault", &pool, &at(1)))?;
        plugin.call("NetworkDriver.CreateEndpoint", &endpoint_request(&own, ENDPOINT, &at(2), ""))?;
        plugin.join(&own, ENDPOINT)?;
        // Our own IPAM knows of it.
        ensure!(
            plugin.request_address(&pool_id, "")? == at(3) || plugin.request_address(&pool_id, "")? == at(3)
        );
        let taken = json!({"PoolID": pool_id, "Address": at(2).replace("/24", ""), "Options": null});
        ensure!(plugin.refused("IpamDriver.RequestAddress", &taken)?.contains("already taken"));
        plugin.call("NetworkDriver.DeleteEndpoint", &names(&own, ENDPOINT))?;
        eventually("the address is free again", secs(2), || {
            !host.exists(&format!("/var/lib/cni/networks/cbr0/{}", at(2).replace("/24", "")))
        })?;
        let other = network_request(&id("x"), "LocalDefault", &pool, &at(254));
        ensure!(
            plugin
                .refused("NetworkDriver.CreateNetwork", &other)?
                .contains("the gateway of this host's subnet")
        );
        Ok(())
    });
}

#[test]
fn a_store_that_is_away_is_named_within_five_seconds() {
    in_lab(one_host("store-away"), |lab| {
        let plugin = Plugin::start(lab.host(1), &["--etcd-endpoints=http://127.0.0.1:2379"])?;
        let start = Instant::now();
        let text = plugin.refused("IpamDriver.RequestPool", &pool_request("10.100.0.0/16", json!({})))?;
        ensure!(start.elapsed() < Duration::from_millis(4500), "it took {:?}", start.elapsed());
        ensure!(text.contains("http://127.0.0.1:2379") && text.contains("refused"), "{text}");
        Ok(())
    });
}

#[test]
fn one_plugin_serves_a_host() {
    in_lab(one_host("one-plugin"), |lab| {
        let host = lab.host(1);
        // A dead socket of an earlier one.
        host.sh("mkdir -p /run/docker/plugins; python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind(\"/run/docker/plugins/flannel.sock\")'")?;
        let first = Plugin::start(host, &[])?;
        for flags in [&[][..], &["--socket=/run/docker/plugins/other.sock"]] {
            let second = host.run(&[&["flannel-docker-plugin"], flags].concat())?;
            ensure!(second.code == 1 && second.stderr.contains("already serves this host"), "{second}");
        }
        ensure!(first.post("Plugin.Activate", "")?.status == 200);
        ensure!(!host.exists("/run/docker/plugins/other.sock"));
        Ok(())
    });
}

#[test]
fn cleanup_takes_everything_away() {
    in_lab(one_host("cleanup"), |lab| {
        let host = lab.host(1);
        let before = host.network_state()?;
        let mut plugin = Plugin::start(host, &[])?;
        let (pool_id, _) = plugin.create_network(NETWORK, "10.100.0.0/16", json!({}))?;
        plugin.run(NETWORK, ENDPOINT, &pool_id, "")?;
        plugin.create_network(&id("web"), "10.60.0.0/16", json!({"network": "web"}))?;
        let running = host.run(&["flannel-docker-plugin", "--cleanup"])?;
        ensure!(running.code == 1 && running.stderr.contains("stop it first"), "{running}");
        plugin.daemon.stop(secs(5))?;
        host.out(&["ip", "link", "show", "dev", "cni0"])?;
        host.out(&["flannel-docker-plugin", "--cleanup"])?;
        plugin.nothing_is_left(&before)
    });
}
