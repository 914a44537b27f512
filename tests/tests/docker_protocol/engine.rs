//! An engine's side of the plugin's socket: its requests, in the order in which it sends them.

use std::cell::Cell;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use flannel_tests::{Daemon, Host, eventually, secs};
use serde_json::{Value, json};

/// Where engines look for a plugin called flannel.
pub(super) const SOCKET: &str = "/run/docker/plugins/flannel.sock";

/// A plugin on a host, and an engine's side of its socket.
pub(super) struct Plugin<'a> {
    host: &'a Host,
    flags: Vec<&'a str>,
    pub(super) daemon: Daemon,
    /// Kill the plugin with SIGKILL before every call, and start it again.
    pub(super) restless: Cell<bool>,
}

pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) body: String,
}

impl<'a> Plugin<'a> {
    pub(super) fn start(host: &'a Host, flags: &[&'a str]) -> Result<Self> {
        let daemon = spawn(host, flags)?;
        let plugin = Self { host, flags: flags.to_vec(), daemon, restless: Cell::new(false) };
        plugin.listens()?;
        Ok(plugin)
    }

    fn listens(&self) -> Result<()> {
        eventually("the plugin listens", secs(5), || UnixStream::connect(self.socket()).is_ok())
            .with_context(|| self.daemon.tail())
    }

    pub(super) fn socket(&self) -> PathBuf {
        self.host.path(SOCKET)
    }

    pub(super) fn kill_and_restart(&mut self) -> Result<()> {
        self.daemon.crash()?;
        self.daemon = spawn(self.host, &self.flags)?;
        self.listens()
    }

    /// One request, with the headers of engine 20.10: an empty Host and no Content-Type.
    pub(super) fn post(&self, method: &str, body: &str) -> Result<Answer> {
        post_to(&self.socket(), method, body)
    }

    pub(super) fn send(&self, request: &str) -> Result<Answer> {
        send_to(&self.socket(), request)
    }

    /// A call that must succeed.
    pub(super) fn call(&mut self, method: &str, request: &Value) -> Result<Value> {
        if self.restless.get() {
            self.kill_and_restart()?;
        }
        let answer = self.post(method, &format!("{request}\n"))?;
        ensure!(answer.status == 200, "{method} {request}: {} {}", answer.status, answer.body);
        Ok(serde_json::from_str(&answer.body)?)
    }

    /// A call that must be refused; the text, which both halves of an engine find.
    pub(super) fn refused(&self, method: &str, request: &Value) -> Result<String> {
        let answer = self.post(method, &format!("{request}\n"))?;
        ensure!(answer.status == 500, "{method} {request}: {} {}", answer.status, answer.body);
        let said: Value = serde_json::from_str(&answer.body)?;
        ensure!(said["Err"] == said["Error"] && said["Err"].is_string(), "{said}");
        Ok(said["Err"].as_str().unwrap_or_default().to_owned())
    }

    pub(super) fn request_pool(&mut self, subnet: &str, options: Value) -> Result<(String, String)> {
        let answer = self.call("IpamDriver.RequestPool", &pool_request(subnet, options))?;
        let text = |key: &str| answer[key].as_str().map(str::to_owned).context("no text");
        Ok((text("PoolID")?, text("Pool")?))
    }

    pub(super) fn request_address(&mut self, pool_id: &str, address: &str) -> Result<String> {
        let request = json!({"PoolID": pool_id, "Address": address, "Options": null});
        let answer = self.call("IpamDriver.RequestAddress", &request)?;
        Ok(answer["Address"].as_str().context("no address")?.to_owned())
    }

    pub(super) fn request_gateway(&mut self, pool_id: &str) -> Result<String> {
        let options = json!({"RequestAddressType": "com.docker.network.gateway"});
        let request = json!({"PoolID": pool_id, "Address": "", "Options": options});
        let answer = self.call("IpamDriver.RequestAddress", &request)?;
        Ok(answer["Address"].as_str().context("no address")?.to_owned())
    }

    /// What `docker network create` makes an engine send; the pool's id and CIDR.
    pub(super) fn create_network(
        &mut self,
        id: &str,
        subnet: &str,
        options: Value,
    ) -> Result<(String, String)> {
        let (pool_id, pool) = self.request_pool(subnet, options)?;
        let gateway = self.request_gateway(&pool_id)?;
        self.call("NetworkDriver.CreateNetwork", &network_request(id, "flannel-local", &pool, &gateway))?;
        Ok((pool_id, pool))
    }

    /// What `docker run` makes it send; the address.
    pub(super) fn run(
        &mut self,
        network: &str,
        endpoint: &str,
        pool_id: &str,
        address: &str,
    ) -> Result<String> {
        let address = self.request_address(pool_id, address)?;
        let answer =
            self.call("NetworkDriver.CreateEndpoint", &endpoint_request(network, endpoint, &address, ""))?;
        ensure!(answer["Interface"]["Address"].is_null(), "the engine takes that for a change: {answer}");
        ensure!(answer["Interface"]["MacAddress"].is_string(), "no MAC in {answer}");
        self.join(network, endpoint)?;
        self.call(
            "NetworkDriver.ProgramExternalConnectivity",
            &program_request(network, endpoint, json!([])),
        )?;
        for _ in 0..2 {
            let value = self.call("NetworkDriver.EndpointOperInfo", &names(network, endpoint))?;
            ensure!(value == json!({"Value": {}}), "{value}");
        }
        Ok(address)
    }

    /// Into a container of its own.
    pub(super) fn join(&mut self, network: &str, endpoint: &str) -> Result<Value> {
        let sandbox = endpoint.get(..12).unwrap_or(endpoint);
        self.join_container(network, endpoint, &format!("/var/run/docker/netns/{sandbox}"))
    }

    pub(super) fn join_container(&mut self, network: &str, endpoint: &str, sandbox: &str) -> Result<Value> {
        let request = json!({
            "NetworkID": network, "EndpointID": endpoint, "SandboxKey": sandbox,
            "Options": {"com.docker.network.endpoint.exposedports": [], "com.docker.network.portmap": []},
        });
        self.call("NetworkDriver.Join", &request)
    }

    /// What `docker stop` makes it send.
    pub(super) fn end(&mut self, network: &str, endpoint: &str, pool_id: &str, address: &str) -> Result<()> {
        self.call("NetworkDriver.RevokeExternalConnectivity", &names(network, endpoint))?;
        self.call("NetworkDriver.Leave", &names(network, endpoint))?;
        self.call("NetworkDriver.DeleteEndpoint", &names(network, endpoint))?;
        self.release(pool_id, address)
    }

    pub(super) fn release(&mut self, pool_id: &str, address: &str) -> Result<()> {
        let address = address.split('/').next().unwrap_or_default();
        self.call("IpamDriver.ReleaseAddress", &json!({"PoolID": pool_id, "Address": address})).map(drop)
    }

    /// What `docker network rm` makes it send.
    pub(super) fn remove_network(&mut self, id: &str, pool_id: &str, gateway: &str) -> Result<()> {
        self.release(pool_id, gateway)?;
        self.call("IpamDriver.ReleasePool", &json!({"PoolID": pool_id}))?;
        self.call("NetworkDriver.DeleteNetwork", &json!({"NetworkID": id})).map(drop)
    }

    /// Everything as it was before the first network.
    pub(super) fn nothing_is_left(&self, before: &str) -> Result<()> {
        eventually("nothing is left in the kernel", secs(8), || {
            let now = self.host.network_state()?;
            ensure!(now == before, "{now}\n--- before:\n{before}\n{}", self.daemon.tail());
            Ok(())
        })?;
        // The last file goes a moment after the last link.
        eventually("no file is left", secs(8), || {
            let files = self.host.sh(
                "cd /; find var/lib/cni/networks/* run/flannel -type f -o -type l 2>/dev/null || true; \
                 find var/lib/flannel -type f -not -name '*.lock' -not -name lock; true",
            )?;
            ensure!(files.is_empty(), "files are left:\n{files}\n{}", self.daemon.tail());
            Ok(())
        })
    }
}

/// As [`Plugin::post`], for a thread of its own.
pub(super) fn post_to(socket: &Path, method: &str, body: &str) -> Result<Answer> {
    let request = format!(
        "POST /{method} HTTP/1.1\r\nHost: \r\nUser-Agent: Go-http-client/1.1\r\nContent-Length: {}\r\n\
         Accept: application/vnd.docker.plugins.v1.2+json\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    send_to(socket, &request)
}

fn send_to(socket: &Path, request: &str) -> Result<Answer> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(secs(10)))?;
    stream.write_all(request.as_bytes())?;
    let mut said = String::new();
    stream.read_to_string(&mut said)?;
    let (head, body) = said.split_once("\r\n\r\n").with_context(|| format!("no answer in {said:?}"))?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    Ok(Answer { status: status.with_context(|| format!("no status in {head:?}"))?, body: body.to_owned() })
}

fn spawn(host: &Host, flags: &[&str]) -> Result<Daemon> {
    host.spawn("flannel-docker-plugin", &[&["flannel-docker-plugin"], flags].concat(), &[])
}

pub(super) fn pool_request(subnet: &str, options: Value) -> Value {
    json!({"AddressSpace": "flannel-local", "Pool": subnet, "SubPool": "", "Options": options, "V6": false})
}

pub(super) fn network_request(id: &str, space: &str, pool: &str, gateway: &str) -> Value {
    json!({
        "NetworkID": id,
        "Options": {"com.docker.network.enable_ipv6": false, "com.docker.network.generic": {}},
        "IPv4Data": [{"AddressSpace": space, "Gateway": gateway, "Pool": pool}],
        "IPv6Data": [],
    })
}

pub(super) fn endpoint_request(network: &str, endpoint: &str, address: &str, mac: &str) -> Value {
    json!({
        "NetworkID": network, "EndpointID": endpoint,
        "Interface": {"Address": address, "AddressIPv6": "", "MacAddress": mac},
        "Options": {"com.docker.network.endpoint.exposedports": [], "com.docker.network.portmap": []},
    })
}

pub(super) fn program_request(network: &str, endpoint: &str, ports: Value) -> Value {
    json!({"NetworkID": network, "EndpointID": endpoint, "Options": {"com.docker.network.portmap": ports}})
}

pub(super) fn names(network: &str, endpoint: &str) -> Value {
    json!({"NetworkID": network, "EndpointID": endpoint})
}
