//! Traps that need no engine to be shown; the others, and the list of all, are in `docker_traps`.

use anyhow::{Context, Result, ensure};
use flannel_tests::{eventually, in_lab, secs};
use serde_json::{Value, json};

use super::engine::{Plugin, endpoint_request, names, program_request};
use super::{ENDPOINT, NETWORK, id, one_host};

/// As swarms have them.
const SWARM_NETWORK: &str = "k3j2h5g7f9d1s4a6p8o0i2u5y";

#[test]
fn an_endpoints_answer_holds_only_what_we_chose() {
    in_lab(one_host("trap-answer"), |lab| {
        let mut plugin = Plugin::start(lab.host(1), &[])?;
        let (pool_id, _) = plugin.create_network(NETWORK, "10.100.0.0/16", json!({}))?;
        for (endpoint, mac, answered) in [("a", "", true), ("b", "02:42:aa:bb:cc:dd", false)] {
            let address = plugin.request_address(&pool_id, "")?;
            let request = endpoint_request(NETWORK, &id(endpoint), &address, mac);
            // Also when it is repeated.
            for _ in 0..2 {
                let answer = plugin.call("NetworkDriver.CreateEndpoint", &request)?;
                let interface = &answer["Interface"];
                for key in ["Address", "AddressIPv6"] {
                    ensure!(interface[key].as_str().is_none_or(str::is_empty), "{key} of {answer}");
                }
                ensure!(interface["MacAddress"].is_string() == answered, "{answer}");
            }
        }
        Ok(())
    });
}

#[test]
fn operational_info_never_fails() {
    in_lab(one_host("trap-info"), |lab| {
        let mut plugin = Plugin::start(lab.host(1), &[])?;
        let (pool_id, _) = plugin.create_network(NETWORK, "10.100.0.0/16", json!({}))?;
        plugin.run(NETWORK, ENDPOINT, &pool_id, "")?;
        let cases = [(NETWORK, ENDPOINT), (NETWORK, "nobody"), ("nowhere", "nobody"), ("", "")];
        for (network, endpoint) in cases {
            let answer = plugin.call("NetworkDriver.EndpointOperInfo", &names(network, endpoint))?;
            ensure!(answer["Value"].is_object(), "{network} {endpoint}: {answer}");
        }
        Ok(())
    });
}

#[test]
fn ids_and_macs_come_in_more_than_one_shape() {
    in_lab(one_host("trap-shapes"), |lab| {
        let host = lab.host(1);
        let mut plugin = Plugin::start(host, &[])?;
        let (pool_id, pool) = plugin.create_network(SWARM_NETWORK, "10.100.0.0/16", json!({}))?;
        let address = plugin.request_address(&pool_id, "")?;
        let mut request = endpoint_request(SWARM_NETWORK, ENDPOINT, &address, "02:42:aa:bb:cc:dd");
        // The same MAC once more, as Go prints bytes.
        request["Options"]["com.docker.network.endpoint.macaddress"] = json!("AkKqu8zd");
        ensure!(plugin.call("NetworkDriver.CreateEndpoint", &request)? == json!({}));
        let joined = plugin.join(SWARM_NETWORK, ENDPOINT)?;
        let link = joined["InterfaceName"]["SrcName"].as_str().context("no SrcName")?;
        let seen = host.out(&["ip", "-o", "link", "show", "dev", link])?;
        ensure!(seen.contains("02:42:aa:bb:cc:dd"), "{seen}");
        // A swarm's network comes again with the same id, after a restart too.
        plugin.end(SWARM_NETWORK, ENDPOINT, &pool_id, &address)?;
        plugin.remove_network(SWARM_NETWORK, &pool_id, &pool.replace(".0/24", ".1"))?;
        plugin.kill_and_restart()?;
        let (again, _) = plugin.create_network(SWARM_NETWORK, "10.100.0.0/16", json!({}))?;
        flannel_tests::eventually("a port", secs(5), || -> Result<()> {
            plugin.run(SWARM_NETWORK, &id("second"), &again, "").map(drop)
        })?;
        let records: Value = serde_json::from_str(
            &host.read(&format!("/var/lib/flannel/docker/networks/{SWARM_NETWORK}.json"))?,
        )?;
        ensure!(records["request"]["NetworkID"] == SWARM_NETWORK, "{records}");
        Ok(())
    });
}

/// Ports move to another network of a container by Revoke and Program, and an engine does not repeat a Revoke that we died over.
#[test]
fn ports_move_within_a_container_without_a_revoke() {
    in_lab(one_host("trap-moved"), |lab| {
        let mut plugin = Plugin::start(lab.host(1), &[])?;
        let (pool_id, _) = plugin.create_network(NETWORK, "10.100.0.0/16", json!({}))?;
        let mut endpoints = Vec::new();
        for (name, sandbox) in [("a", "one"), ("b", "one"), ("c", "other")] {
            let address = plugin.request_address(&pool_id, "")?;
            plugin
                .call("NetworkDriver.CreateEndpoint", &endpoint_request(NETWORK, &id(name), &address, ""))?;
            plugin.join_container(NETWORK, &id(name), &format!("/var/run/docker/netns/{sandbox}"))?;
            endpoints.push((id(name), address));
        }
        let port =
            json!([{"Proto": 6, "IP": "", "Port": 80, "HostIP": "", "HostPort": 8080, "HostPortEnd": 8080}]);
        const PROGRAM: &str = "NetworkDriver.ProgramExternalConnectivity";
        for (endpoint, address) in &endpoints[..2] {
            plugin.call(PROGRAM, &program_request(NETWORK, endpoint, port.clone()))?;
            let to = address.split('/').next().unwrap_or_default();
            eventually("the port leads there", secs(5), || {
                let maps = lab.host(1).out(&["nft", "list", "table", "inet", "flannel_endpoints"])?;
                ensure!(maps.contains(&format!("tcp . 8080 : {to} . 80 ")), "{maps}");
                Ok(())
            })?;
        }
        let refused = plugin.refused(PROGRAM, &program_request(NETWORK, &endpoints[2].0, port))?;
        ensure!(refused.contains("already allocated"), "{refused}");
        Ok(())
    });
}
