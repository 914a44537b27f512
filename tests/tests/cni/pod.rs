//! A container that has nothing but a network namespace, as a place for probes.

use std::net::UdpSocket;
use std::process::Command;
use std::time::Duration;

use anyhow::ensure;
use anyhow::{Context, Result};
use flannel_core::touch::world::kernel::Namespace;
use flannel_tests::{Host, HttpServer, Place, eventually, http_get, secs};
use serde_json::Value;

use crate::node::{Node, ip_of};

/// The namespace `id` of a host.
pub(crate) struct Pod<'a> {
    host: &'a Host,
    id: String,
    /// What ADD printed, and its first address.
    pub(crate) result: Value,
    pub(crate) ip: String,
}

impl<'a> Pod<'a> {
    /// Makes the namespace and attaches it.
    pub(crate) fn add(node: &Node<'a>, id: &str, conf: &Value) -> Result<Self> {
        node.container(id)?;
        let result = node.add(id, conf)?;
        Ok(Self { host: node.host, id: id.to_owned(), ip: ip_of(&result), result })
    }

    /// What somebody else attached.
    pub(crate) fn of(host: &'a Host, id: &str, result: Value) -> Self {
        Self { host, id: id.to_owned(), ip: ip_of(&result), result }
    }

    /// Starts a web server on port 80 that says the pod's name.
    pub(crate) fn serve(&self) -> Result<HttpServer> {
        HttpServer::start(self, 80, &self.id)
    }

    /// A UDP socket in the pod.
    pub(crate) fn udp(&self, port: u16) -> Result<UdpSocket> {
        let namespace = Namespace::open(&self.host.path(format!("/run/netns/{}", self.id)))?;
        let socket = namespace.run(|| UdpSocket::bind(("0.0.0.0", port)))??;
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        Ok(socket)
    }
}

impl Place for Pod<'_> {
    fn name(&self) -> String {
        format!("{} {}", self.host.name(), self.id)
    }
    fn host(&self) -> &Host {
        self.host
    }
    fn enter(&self, argv: &[&str]) -> Command {
        self.host.enter(&[&["ip", "netns", "exec", &self.id], argv].concat())
    }
}

/// What somebody at `from` gets at a published port within a few seconds.
pub(crate) fn served(from: &dyn Place, at: &str, text: &str) -> Result<()> {
    eventually(format!("{} reaches http://{at}/", from.name()), secs(10), || {
        let said = http_get(from, &format!("http://{at}/"))?;
        ensure!(said == text, "{said:?} instead of {text:?}");
        Ok(())
    })
    .context("a published port")
}
