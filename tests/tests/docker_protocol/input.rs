//! What nobody should send: the plugin says what is wrong, keeps its memory, and goes on answering.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use flannel_tests::{Host, eventually, in_lab, secs};
use serde_json::{Value, json};

use super::engine::{Plugin, SOCKET, endpoint_request, network_request, pool_request, program_request};
use super::{ENDPOINT, NETWORK, id, one_host};

/// What the plugin may hold after any of this, KiB: an idle debug build holds a fourth of it.
const RSS_MAX: u64 = 80 * 1024;

/// Whatever was sent: the plugin lives, is as small as before, and answers at once.
fn is_well(plugin: &Plugin<'_>) -> Result<()> {
    let start = Instant::now();
    let answer = plugin.post("NetworkDriver.GetCapabilities", "")?;
    ensure!(answer.status == 200, "{}", answer.body);
    ensure!(start.elapsed() < secs(1), "it answers after {:?}", start.elapsed());
    let usage = plugin.daemon.usage()?;
    ensure!(usage.rss_kib < RSS_MAX, "it holds {} KiB", usage.rss_kib);
    let log = plugin.daemon.log();
    ensure!(!log.contains("panicked"), "{log}");
    Ok(())
}

fn is_refusal(status: u16, body: &str) -> Result<String> {
    let said: Value = serde_json::from_str(body).with_context(|| format!("{status} {body:?}"))?;
    ensure!(status >= 400 && said["Err"].is_string() && said["Err"] == said["Error"], "{status} {said}");
    Ok(said["Err"].as_str().unwrap_or_default().to_owned())
}

/// A request of every method that has a body, as engines send it.
fn requests(pool_id: &str, pool: &str, gateway: &str) -> Vec<(&'static str, Value)> {
    let endpoint = json!({"NetworkID": NETWORK, "EndpointID": ENDPOINT});
    let address = pool.replace(".0/24", ".9/24");
    let mut join = endpoint.clone();
    join["SandboxKey"] = json!("/var/run/docker/netns/7355b04854cc");
    join["Options"] = json!({});
    vec![
        ("IpamDriver.RequestPool", pool_request("10.100.0.0/16", json!({}))),
        ("IpamDriver.ReleasePool", json!({"PoolID": pool_id})),
        ("IpamDriver.RequestAddress", json!({"PoolID": pool_id, "Address": "", "Options": null})),
        ("IpamDriver.ReleaseAddress", json!({"PoolID": pool_id, "Address": gateway})),
        ("NetworkDriver.CreateNetwork", network_request(NETWORK, "flannel-local", pool, gateway)),
        ("NetworkDriver.DeleteNetwork", json!({"NetworkID": NETWORK})),
        ("NetworkDriver.CreateEndpoint", endpoint_request(NETWORK, ENDPOINT, &address, "")),
        ("NetworkDriver.DeleteEndpoint", endpoint.clone()),
        ("NetworkDriver.Join", join),
        ("NetworkDriver.Leave", endpoint.clone()),
        ("NetworkDriver.ProgramExternalConnectivity", program_request(NETWORK, ENDPOINT, json!([]))),
        ("NetworkDriver.RevokeExternalConnectivity", endpoint.clone()),
        ("NetworkDriver.EndpointOperInfo", endpoint),
    ]
}

/// Whether the method looks at a field; the type of what nobody reads does not matter.
fn reads(method: &str, field: &str) -> bool {
    !matches!((method, field), (_, "AddressSpace" | "SandboxKey") | ("NetworkDriver.Join", "Options"))
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "bool",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

/// A value of every kind that JSON has, and texts that could become a path, an option or a number.
fn wrong_values() -> Vec<Value> {
    vec![
        json!(null),
        json!(true),
        json!(-1),
        json!(1e300),
        json!("../../../../etc/passwd"),
        json!("\u{0}\n\u{1b}[31m"),
        json!("x".repeat(100_000)),
        json!([]),
        json!([[[[]]]]),
        json!({}),
        json!({"": {"": null}}),
    ]
}

#[test]
fn a_wrong_type_in_any_field_is_named() {
    in_lab(one_host("wrong-types"), |lab| {
        let mut plugin = Plugin::start(lab.host(1), &[])?;
        let (pool_id, pool) = plugin.create_network(NETWORK, "10.100.0.0/16", json!({}))?;
        let gateway = pool.replace(".0/24", ".1");
        for (method, request) in requests(&pool_id, &pool, &format!("{gateway}/24")) {
            let fields: Vec<String> =
                request.as_object().map(|fields| fields.keys().cloned().collect()).unwrap_or_default();
            for (field, value) in
                fields.iter().flat_map(|field| wrong_values().into_iter().map(move |v| (field, v)))
            {
                let mut wrong = request.clone();
                // Null stands for "nothing" in Go, whatever the kind; other kinds must not pass.
                let other_kind =
                    kind(&value) != kind(&request[field]) && !value.is_null() && !request[field].is_null();
                wrong[field] = value.clone();
                let answer = plugin.post(method, &wrong.to_string())?;
                let what = format!("{method} with {field} {value:.80}");
                ensure!(
                    [200, 400, 500].contains(&answer.status),
                    "{what}: {} {}",
                    answer.status,
                    answer.body
                );
                if other_kind && reads(method, field) {
                    ensure!(answer.status == 400, "{what}: {} {}", answer.status, answer.body);
                }
                if answer.status != 200 {
                    let text = is_refusal(answer.status, &answer.body).context(what)?;
                    ensure!(!text.is_empty());
                }
            }
        }
        let files = lab
            .host(1)
            .sh("find /var/lib/flannel /var/lib/cni /run/flannel -type f | grep -c passwd || true")?;
        ensure!(files == "0", "a path was made of an id");
        is_well(&plugin)
    });
}

#[test]
fn a_wrong_type_below_a_field_is_no_crash() {
    in_lab(one_host("wrong-below"), |lab| {
        let mut plugin = Plugin::start(lab.host(1), &[])?;
        let (pool_id, pool) = plugin.create_network(NETWORK, "10.100.0.0/16", json!({}))?;
        let address = plugin.request_address(&pool_id, "")?;
        let gateway = format!("{}/24", pool.replace(".0/24", ".1"));
        let port =
            json!([{"Proto": 6, "IP": "", "Port": 80, "HostIP": "", "HostPort": 8080, "HostPortEnd": 8080}]);
        // Each list of keys leads to a value that is then replaced.
        let below: Vec<(&str, Value, Vec<&[&str]>)> = vec![
            (
                "NetworkDriver.CreateNetwork",
                network_request(&id("wrong"), "flannel-local", &pool, &gateway),
                vec![
                    &["Options", "com.docker.network.generic"],
                    &["Options", "com.docker.network.generic", "flannel.publish"],
                    &["Options", "com.docker.network.enable_ipv6"],
                    &["Options", "com.docker.network.internal"],
                    &["IPv4Data", "0"],
                    &["IPv4Data", "0", "Pool"],
                    &["IPv4Data", "0", "Gateway"],
                    &["IPv4Data", "0", "AuxAddresses"],
                    &["IPv6Data", "0"],
                ],
            ),
            (
                "NetworkDriver.CreateEndpoint",
                endpoint_request(NETWORK, ENDPOINT, &address, ""),
                vec![
                    &["Interface", "Address"],
                    &["Interface", "AddressIPv6"],
                    &["Interface", "MacAddress"],
                    &["Options", "com.docker.network.portmap"],
                    &["Options", "com.docker.network.endpoint.exposedports"],
                    &["Options", "com.docker.network.endpoint.macaddress"],
                ],
            ),
            (
                "NetworkDriver.ProgramExternalConnectivity",
                program_request(NETWORK, ENDPOINT, port),
                vec![
                    &["Options", "com.docker.network.portmap"],
                    &["Options", "com.docker.network.portmap", "0"],
                    &["Options", "com.docker.network.portmap", "0", "Proto"],
                    &["Options", "com.docker.network.portmap", "0", "Port"],
                    &["Options", "com.docker.network.portmap", "0", "HostIP"],
                    &["Options", "com.docker.network.portmap", "0", "HostPort"],
                    &["Options", "com.docker.network.portmap", "0", "HostPortEnd"],
                ],
            ),
            (
                "IpamDriver.RequestPool",
                pool_request("10.100.0.0/16", json!({"network": "web"})),
                vec![&["Options", "network"], &["Options", "vni"], &["Options", "subnet-len"]],
            ),
            (
                "IpamDriver.RequestAddress",
                json!({"PoolID": pool_id, "Address": "", "Options": {}}),
                vec![
                    &["Options", "RequestAddressType"],
                    &["Options", "com.docker.network.endpoint.macaddress"],
                ],
            ),
        ];
        for (method, request, places) in below {
            for (place, value) in
                places.iter().flat_map(|place| wrong_values().into_iter().map(move |v| (place, v)))
            {
                let mut wrong = request.clone();
                put(&mut wrong, place, value.clone());
                let answer = plugin.post(method, &wrong.to_string())?;
                let what = format!("{method} with {place:?} {value:.80}");
                ensure!(
                    [200, 400, 500].contains(&answer.status),
                    "{what}: {} {}",
                    answer.status,
                    answer.body
                );
                if answer.status != 200 {
                    is_refusal(answer.status, &answer.body).context(what)?;
                }
            }
        }
        is_well(&plugin)
    });
}

/// Puts a value where the keys lead; a number counts in a list, and what is not there is made.
fn put(request: &mut Value, place: &[&str], value: Value) {
    let mut at = request;
    for key in place {
        at = match (at, key.parse::<usize>()) {
            (Value::Array(list), Ok(number)) => {
                while list.len() <= number {
                    list.push(json!({}));
                }
                &mut list[number]
            }
            (other, _) => &mut other[*key],
        };
    }
    *at = value;
}

#[test]
fn garbage_and_unknown_methods_are_answered() {
    in_lab(one_host("garbage"), |lab| {
        let plugin = Plugin::start(lab.host(1), &[])?;
        for method in [
            "",
            "x",
            "NetworkDriver.",
            "NetworkDriver.Frobnicate",
            "VolumeDriver.List",
            "../etc/passwd",
            "%00",
        ] {
            let answer = plugin.post(method, "{}")?;
            let text = is_refusal(answer.status, &answer.body)?;
            ensure!(
                answer.status == 404 && text.contains("is not a method"),
                "{method:?}: {} {text}",
                answer.status
            );
        }
        for verb in ["GET", "PUT", "DELETE", "BREW"] {
            let answer = plugin.send(&format!(
                "{verb} /NetworkDriver.Join HTTP/1.1\r\nHost: \r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            ))?;
            let text = is_refusal(answer.status, &answer.body)?;
            ensure!(answer.status == 405 && text.contains("POST"), "{verb}: {} {text}", answer.status);
        }
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        for body in
            ["\u{0}\u{1}\u{2}", "nonsense", "[]", "\"text\"", "{\"NetworkID\":", "null", deep.as_str()]
        {
            let answer = plugin.post("NetworkDriver.Join", body)?;
            let text = is_refusal(answer.status, &answer.body)?;
            ensure!(answer.status == 400 && text.contains("cannot be read"), "{} {text}", answer.status);
        }
        // No HTTP at all: cut or told so, but not waited for.
        let noise: Vec<u8> = (0..=255).cycle().take(200_000).collect();
        for bytes in [
            &noise[..],
            b"\r\n\r\n\r\n\r\n",
            b"POST / HTTP/9.9\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
        ] {
            let mut stream = connect(lab.host(1))?;
            // It may hang up before all of it is written.
            let _ = stream.write_all(bytes);
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let mut said = Vec::new();
            let _ = stream.read_to_end(&mut said);
            let said = String::from_utf8_lossy(&said);
            ensure!(said.is_empty() || said.starts_with("HTTP/1.1 4"), "{said}");
        }
        // Headers without an end.
        let mut stream = connect(lab.host(1))?;
        let endless = format!("POST /NetworkDriver.Join HTTP/1.1\r\n{}", "X-Y: z\r\n".repeat(200_000));
        let _ = stream.write_all(endless.as_bytes());
        let mut said = String::new();
        let _ = stream.read_to_string(&mut said);
        ensure!(said.starts_with("HTTP/1.1 4"), "{said}");
        is_well(&plugin)
    });
}

fn connect(host: &Host) -> Result<UnixStream> {
    let stream = UnixStream::connect(host.path(SOCKET))?;
    stream.set_read_timeout(Some(secs(20)))?;
    stream.set_write_timeout(Some(secs(20)))?;
    Ok(stream)
}

#[test]
fn a_huge_body_is_refused_unread() {
    const HUGE: usize = 100 * 1024 * 1024;
    in_lab(one_host("huge"), |lab| {
        let host = lab.host(1);
        let plugin = Plugin::start(host, &[])?;
        for chunked in [false, true] {
            let mut stream = connect(host)?;
            let length = match chunked {
                true => "Transfer-Encoding: chunked".to_owned(),
                false => format!("Content-Length: {HUGE}"),
            };
            write!(
                stream,
                "POST /NetworkDriver.Join HTTP/1.1\r\nHost: \r\n{length}\r\nConnection: close\r\n\r\n"
            )?;
            let block = [b'['; 64 * 1024];
            for _ in 0..HUGE / block.len() {
                let framed = match chunked {
                    true => write!(stream, "10000\r\n")
                        .and_then(|()| stream.write_all(&block))
                        .and_then(|()| stream.write_all(b"\r\n")),
                    false => stream.write_all(&block),
                };
                if framed.is_err() {
                    break; // it hung up, as it should
                }
            }
            let mut said = Vec::new();
            let _ = stream.read_to_end(&mut said);
            let said = String::from_utf8_lossy(&said).into_owned();
            let (head, body) = said.split_once("\r\n\r\n").with_context(|| format!("no answer: {said:?}"))?;
            ensure!(head.starts_with("HTTP/1.1 413 "), "{said}");
            ensure!(is_refusal(413, body)?.contains("2048 KiB"), "{said}");
        }
        let peak = plugin.daemon.usage()?.peak_rss_kib;
        ensure!(peak < RSS_MAX, "it held {peak} KiB");
        // What fits is read: thousands of published ports.
        let ports: Vec<Value> = (1..10_000)
            .map(|port| json!({"Proto": 6, "IP": "", "Port": port, "HostIP": "", "HostPort": port, "HostPortEnd": port}))
            .collect();
        let answer = plugin.post(
            "NetworkDriver.ProgramExternalConnectivity",
            &program_request(NETWORK, ENDPOINT, Value::Array(ports)).to_string(),
        )?;
        ensure!(answer.status != 413 && answer.status != 400, "{} {}", answer.status, answer.body);
        is_well(&plugin)
    });
}

#[test]
fn half_requests_do_not_pile_up() {
    in_lab(one_host("half"), |lab| {
        let host = lab.host(1);
        let plugin = Plugin::start(host, &[])?;
        let halves = [
            "",
            "POST /NetworkDriver.Join HT",
            "POST /NetworkDriver.Join HTTP/1.1\r\nContent-Length: 100\r\n\r\n{\"NetworkID\":",
            "POST /NetworkDriver.Join HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n64\r\n{",
        ];
        // More of each than there is room for large bodies, and all of them less than there is room for connections.
        let mut open = Vec::new();
        for half in halves.iter().flat_map(|half| std::iter::repeat_n(half, 60)) {
            let mut stream = connect(host)?;
            stream.write_all(half.as_bytes())?;
            open.push((*half, stream));
        }
        is_well(&plugin)?;
        let refused = plugin.post("NetworkDriver.Join", "{}")?;
        ensure!(refused.status == 400, "a whole request among halves: {} {}", refused.status, refused.body);
        // A body that does not come is given up, with a text.
        for (_, stream) in
            open.iter_mut().filter(|(half, _)| half.contains("Length") || half.contains("chunked"))
        {
            let mut said = [0_u8; 4096];
            let read = stream.read(&mut said)?;
            let said = String::from_utf8_lossy(&said[..read]).into_owned();
            ensure!(said.starts_with("HTTP/1.1 408 ") && said.contains("did not arrive within"), "{said:?}");
        }
        // Nobody is cut off for being idle: engines keep connections for as long as they live.
        let (_, idle) = open.first_mut().context("the idle one")?;
        write!(
            idle,
            "POST /Plugin.Activate HTTP/1.1\r\nHost: \r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        )?;
        let mut said = String::new();
        idle.read_to_string(&mut said)?;
        ensure!(said.starts_with("HTTP/1.1 200 "), "{said:?}");
        drop(open);
        is_well(&plugin)
    });
}

#[test]
fn a_thousand_connections_at_once_are_served() {
    const CONNECTIONS: usize = 1000;
    in_lab(one_host("thousand"), |lab| {
        let host = lab.host(1);
        let plugin = Plugin::start(host, &[])?;
        // All of them open at the same time, and none of them closed by us before it has its answer.
        std::thread::scope(|scope| -> Result<()> {
            let clients: Vec<_> = (0..CONNECTIONS)
                .map(|number| {
                    scope.spawn(move || -> Result<u16> {
                        let mut stream = eventually("a connection", secs(30), || connect(host))?;
                        let body = json!({"NetworkID": id(&format!("n{number}")), "EndpointID": ENDPOINT}).to_string();
                        write!(
                            stream,
                            "POST /NetworkDriver.EndpointOperInfo HTTP/1.1\r\nHost: \r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
                            body.len()
                        )?;
                        stream.set_read_timeout(Some(secs(60)))?;
                        let mut said = String::new();
                        stream.read_to_string(&mut said)?;
                        said.split(' ').nth(1).and_then(|s| s.parse().ok()).with_context(|| format!("{said:?}"))
                    })
                })
                .collect();
            for client in clients {
                let status = client.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
                ensure!(status == 200, "status {status}");
            }
            Ok(())
        })?;
        is_well(&plugin)?;

        // A thousand that say nothing: the oldest make room for who has something to say.
        let silent: Vec<UnixStream> = (0..CONNECTIONS)
            .map(|_| eventually("a silent connection", secs(30), || connect(host)))
            .collect::<Result<_>>()?;
        eventually("an answer", secs(30), || is_well(&plugin))?;
        drop(silent);
        is_well(&plugin)
    });
}

#[test]
fn the_socket_is_roots_alone() {
    in_lab(one_host("root-only"), |lab| {
        let host = lab.host(1);
        let _plugin = Plugin::start(host, &[])?;
        let mode = std::fs::metadata(host.path(SOCKET))?.permissions().mode();
        ensure!(mode & 0o777 == 0o600, "mode {mode:o}");
        let owners = host.sh("stat -c '%U:%G %a' /run/docker/plugins /run/docker/plugins/flannel.sock")?;
        ensure!(owners.lines().all(|line| line.starts_with("root:root ")), "{owners}");
        let dir = owners.lines().next().and_then(|line| u32::from_str_radix(line.split(' ').nth(1)?, 8).ok());
        ensure!(dir.is_some_and(|mode| mode & 0o022 == 0), "others may write there: {owners}");
        // Nobody else can connect.
        let script = "import os, socket\nos.setuid(65534)\ns = socket.socket(socket.AF_UNIX)\n\
                      try:\n  s.connect('/run/docker/plugins/flannel.sock')\n  print('connected')\n\
                      except PermissionError:\n  print('refused')";
        ensure!(host.out(&["python3", "-c", script])? == "refused");
        Ok(())
    });
}
