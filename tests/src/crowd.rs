//! Thousands of leases of hosts that are not there, and how soon a host follows them.
//!
//! Leases are written as the hosts would, but through etcd's own HTTP gateway: one call is one connection, and nothing has to be
//! executed, so that what is measured is not etcdctl.

use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpStream};
use std::ops::Range;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use flannel_core::touch::world::kernel::Namespace;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, setsockopt, socket,
    sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use serde_json::{Value, json};

use crate::flanneld::{PREFIX, put_config};
use crate::host::Host;
use crate::lab::Lab;

/// The network that the crowd lives in.
pub const NETWORK: &str = "10.128.0.0/9";

/// The interface that the host under test has on the crowd's LAN.
pub const LINK: &str = "lan0";

/// What the host under test holds itself: reserved for it, so that no lease of the crowd is ever in its way.
const OWN: &str = "10.255.255.0-24";
const OWN_PUBLIC: &str = "10.88.0.1";

/// etcd takes up to 128 operations at once unless configured otherwise.
const BATCH: usize = 128;

/// Crowds are numbered below this; see [`subnet`].
const NUMBERS_MAX: usize = 7500;

/// A member's homes are so far apart in the third byte of the address.
const HOMES_APART: usize = 32;

/// Hosts with a lease that exist in etcd only.
#[derive(Debug)]
pub struct Crowd {
    backend: String,
    etcd: PathBuf,
    grant: String,
}

impl Crowd {
    /// Configures the network and puts its host under test on a LAN of its own, a /16, so that every gateway is on its link.
    pub fn new(lab: &Lab, host: &Host, backend: &str) -> Result<Self> {
        host.sh(&format!(
            "ip link add {LINK} type veth peer name lan1; ip addr add {OWN_PUBLIC}/16 dev {LINK}; \
             ip link set lan1 up; ip link set {LINK} up"
        ))?;
        put_config(
            lab,
            &format!(r#"{{"Network":"{NETWORK}","SubnetLen":24,"Backend":{{"Type":"{backend}"}}}}"#),
        )?;
        let etcd = PathBuf::from(format!("/proc/{}/ns/net", lab.etcd_host().pid()));
        let mut crowd = Self { backend: backend.to_owned(), etcd, grant: String::new() };
        let granted = crowd.call("lease/grant", &json!({ "TTL": "86400" }))?;
        crowd.grant = granted["ID"].as_str().context("no ID of the grant")?.to_owned();
        let own = json!({ "PublicIP": OWN_PUBLIC, "PublicIPv6": null, "BackendType": backend });
        crowd.call("kv/put", &crowd.write(&format!("{PREFIX}/subnets/{OWN}"), &own.to_string()))?;
        Ok(crowd)
    }

    /// These come, at their first home; as many at once as etcd takes.
    pub fn join(&self, numbers: Range<usize>) -> Result<()> {
        self.batches(numbers, |n| json!({ "request_put": self.write(&key(n), &self.value(n, 0)) }))
    }

    /// These go.
    pub fn leave(&self, numbers: Range<usize>) -> Result<()> {
        self.batches(numbers, |n| json!({ "request_delete_range": { "key": base64(key(n).as_bytes()) } }))
    }

    /// One comes, or moves to another of its homes (there are 7, counted from 0).
    pub fn put(&self, n: usize, home: usize) -> Result<()> {
        self.call("kv/put", &self.write(&key(n), &self.value(n, home))).map(drop)
    }

    /// One goes.
    pub fn remove(&self, n: usize) -> Result<()> {
        self.call("kv/deleterange", &json!({ "key": base64(key(n).as_bytes()) })).map(drop)
    }

    /// Whether a member that moves gets another route; with vxlan its forwarding entry changes instead.
    pub fn routes_follow_homes(&self) -> bool {
        self.backend == "host-gw"
    }

    fn batches(&self, numbers: Range<usize>, request: impl Fn(usize) -> Value) -> Result<()> {
        ensure!(numbers.end <= NUMBERS_MAX, "a crowd has up to {NUMBERS_MAX}");
        let numbers: Vec<usize> = numbers.collect();
        for some in numbers.chunks(BATCH) {
            let requests: Vec<Value> = some.iter().map(|n| request(*n)).collect();
            let said = self.call("kv/txn", &json!({ "success": requests }))?;
            ensure!(said["succeeded"] == json!(true), "{said}");
        }
        Ok(())
    }

    fn write(&self, key: &str, value: &str) -> Value {
        json!({ "key": base64(key.as_bytes()), "value": base64(value.as_bytes()), "lease": self.grant })
    }

    fn value(&self, n: usize, home: usize) -> String {
        let data = match self.backend.as_str() {
            "vxlan" => format!(
                r#","BackendData":{{"VNI":1,"VtepMAC":"02:00:00:{home:02x}:{:02x}:{:02x}"}}"#,
                n / 256,
                n % 256
            ),
            _ => String::new(),
        };
        let (public, backend) = (public(n, home), &self.backend);
        format!(r#"{{"PublicIP":"{public}","PublicIPv6":null,"BackendType":"{backend}"{data}}}"#)
    }

    fn call(&self, what: &str, request: &Value) -> Result<Value> {
        let body = request.to_string();
        let ask = || -> Result<String> {
            let mut stream = TcpStream::connect(("127.0.0.1", 2379))?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(Duration::from_secs(20)))?;
            let head = format!("POST /v3/{what} HTTP/1.0\r\nContent-Length: {}\r\n\r\n", body.len());
            stream.write_all((head + &body).as_bytes())?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        };
        let answer =
            Namespace::open(&self.etcd)?.run(ask)?.with_context(|| format!("ask etcd for {what}"))?;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
        ensure!(head.contains(" 200 "), "etcd refused {what}: {answer}");
        serde_json::from_str(body).with_context(|| format!("etcd said {body:?}"))
    }
}

/// The subnet of a member, a /24.
pub fn subnet(n: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 128 + octet(n / 256), octet(n % 256), 0)
}

fn public(n: usize, home: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 88, octet(1 + n / 250 + HOMES_APART * home), octet(1 + n % 250))
}

fn octet(n: usize) -> u8 {
    u8::try_from(n).unwrap_or(u8::MAX)
}

fn key(n: usize) -> String {
    format!("{PREFIX}/subnets/{}-24", subnet(n))
}

/// How many routes the host has into the network.
pub fn routes(host: &Host) -> Result<usize> {
    let table = std::fs::read_to_string(format!("/proc/{}/net/route", host.pid()))?;
    // Destinations are in the byte order of the wire, read as a number.
    let crowd = |line: &&str| {
        let destination = line.split('\t').nth(1).and_then(|hex| u32::from_str_radix(hex, 16).ok());
        destination.is_some_and(|hex| hex.to_le_bytes()[0] == 10 && hex.to_le_bytes()[1] >= 128)
    };
    Ok(table.lines().filter(crowd).count())
}

/// Waits until the host has so many routes to members, and says how long that took since `start`.
pub fn await_routes(host: &Host, count: usize, start: Instant, at_most: Duration) -> Result<Duration> {
    loop {
        let seen = routes(host)?;
        if seen == count {
            return Ok(start.elapsed());
        }
        ensure!(start.elapsed() < at_most, "{seen} routes of {count} after {at_most:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The kernel's notices about IPv4 routes of a host.
#[derive(Debug)]
pub struct RouteWatch(OwnedFd);

impl RouteWatch {
    /// From now on.
    pub fn open(host: &Host) -> Result<Self> {
        const RTMGRP_IPV4_ROUTE: u32 = 0x40;
        let net = PathBuf::from(format!("/proc/{}/ns/net", host.pid()));
        let flags = SockFlag::SOCK_CLOEXEC;
        let open = || socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute);
        let fd = Namespace::open(&net)?.run(open)??;
        setsockopt(&fd, sockopt::RcvBufForce, &(8 << 20))?;
        setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::seconds(10))?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, RTMGRP_IPV4_ROUTE))?;
        Ok(Self(fd))
    }

    /// Waits for the notice that a route to a member's subnet has come (or was changed), or has gone.
    pub fn wait(&self, n: usize, come: bool) -> Result<Instant> {
        const RTM_NEWROUTE: u16 = 24;
        const RTM_DELROUTE: u16 = 25;
        const RTA_DST: u16 = 1;
        let wanted = if come { RTM_NEWROUTE } else { RTM_DELROUTE };
        let subnet = subnet(n).octets();
        let mut buffer = vec![0; 64 * 1024];
        let mut seen = String::new();
        for _ in 0..10_000 {
            let len = recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty())
                .with_context(|| format!("no notice of {subnet:?} (come: {come}); others:{seen}"))?;
            let at = Instant::now();
            let kind = u16::from_ne_bytes([buffer[4], buffer[5]]);
            // Behind the headers of netlink (16) and of the route (12): attributes.
            let mut rest = &buffer[28.min(len)..len];
            while let [l0, l1, k0, k1, ..] = *rest {
                let size = usize::from(u16::from_ne_bytes([l0, l1])).max(4);
                let value = rest.get(4..size).unwrap_or_default();
                if u16::from_ne_bytes([k0, k1]) == RTA_DST {
                    if kind == wanted && value == subnet {
                        return Ok(at);
                    }
                    write!(seen, " {kind} {value:?}")?;
                }
                rest = rest.get(size.next_multiple_of(4)..).unwrap_or_default();
            }
        }
        bail!("no notice of {subnet:?} (come: {come}); others:{seen}")
    }
}

/// RFC 4648, with padding.
fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let [a, b, c] = [0, 1, 2].map(|i| u32::from(chunk.get(i).copied().unwrap_or(0)));
        let bits = a << 16 | b << 8 | c;
        for i in 0..4 {
            match i <= chunk.len() {
                true => text.push(char::from(LETTERS[(bits >> (18 - 6 * i) & 63) as usize])),
                false => text.push('='),
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_that_of_the_standard() {
        let cases = [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")];
        for (plain, coded) in cases {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
    }

    #[test]
    fn members_share_nothing() {
        let last = NUMBERS_MAX - 1;
        assert_eq!(subnet(300).to_string(), "10.129.44.0");
        assert!(subnet(last) < Ipv4Addr::new(10, 255, 255, 0));
        assert!(public(last, 0) < public(0, 1) && public(0, 0).to_string() != OWN_PUBLIC);
        assert_eq!(public(0, 6).to_string(), "10.88.193.1");
    }
}
