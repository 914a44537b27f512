//! Ports of this host that lead into a container: `runtimeConfig.portMappings`, for the plugins `flannel` and `portmap`.
//!
//! Both do the same for the same attachment, so the second of a chain finds the work done.

use std::collections::BTreeSet;
use std::net::IpAddr;

use flannel_core::act::hostports::{self, HostPortError, Records};
use flannel_core::act::pass::chain;
use flannel_core::touch::world::kernel::{Kernel, Netfilter};
use flannel_core::words::addr::{Family, InterfaceAddress};
use flannel_core::words::exposure::{PublishedPort, Transport};
use flannel_core::words::hostport::{CallerMasquerade, Holding};
use flannel_core::words::name::{Attachment, LinkName};
use serde_json::Value;

use crate::go_leftovers;
use crate::json::{Object, field, list, text};
use crate::result::CniError;
use crate::state::{self, Record, State};

/// One element of `portMappings`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Mapping {
    protocol: Transport,
    host_port: u16,
    /// As given, also where it stands for all addresses of its family.
    host_ip: Option<IpAddr>,
    port: u16,
}

/// What a runtime asks for.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct PortMappings(Vec<Mapping>);

/// Where a container is, as far as its ports go.
pub(crate) struct Place<'a> {
    pub(crate) network: &'a str,
    pub(crate) owner: Attachment,
    pub(crate) addresses: Vec<InterfaceAddress>,
    /// The host's interface that leads to the container.
    pub(crate) towards: Option<LinkName>,
    /// The host's end of the container's own.
    pub(crate) host_link: Option<LinkName>,
}

/// Holds the packet filter open after ports were taken back: to close it waits for the kernel, unless an interface was deleted
/// meanwhile.
pub(crate) struct Withdrawn {
    _filter: Netfilter,
}

impl PortMappings {
    /// Reads `runtimeConfig`.
    pub(crate) fn read(runtime: &Object) -> Result<Self, CniError> {
        const KEY: &str = "portMappings";
        list(runtime, KEY)?
            .iter()
            .enumerate()
            .map(|(index, value)| {
                let place = format!("{KEY}[{index}]");
                let object = value.as_object().ok_or_else(|| {
                    CniError::decoding(format!("{place} is {value}, an object was expected"))
                })?;
                Mapping::read(object, &place)
            })
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// Whether there is nothing to do.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What they are for a container with these addresses, the first of each family.
    fn published(&self, addresses: &[InterfaceAddress]) -> Result<BTreeSet<PublishedPort>, CniError> {
        let mut published = BTreeSet::new();
        for mapping in &self.0 {
            for port in mapping.published(addresses)? {
                let twice = |other: &&PublishedPort| {
                    (other.host_ip, other.family()) == (port.host_ip, port.family())
                        && (other.protocol, other.host_port) == (port.protocol, port.host_port)
                        && **other != port
                };
                if let Some(other) = published.iter().find(twice) {
                    return Err(CniError::config(format!("portMappings asks for both {other} and {port}")));
                }
                published.insert(port);
            }
        }
        Ok(published)
    }
}

impl Mapping {
    fn read(object: &Object, place: &str) -> Result<Self, CniError> {
        let port = |key: &str| -> Result<u16, CniError> {
            let given = field(object, key).unwrap_or(&Value::Null);
            let number = match given {
                Value::Null => 0,
                Value::Number(number) if number.is_i64() || number.is_u64() => {
                    number.as_i64().unwrap_or(i64::MAX)
                }
                other => {
                    return Err(CniError::decoding(format!(
                        "{place}.{key} is {other}, a number was expected"
                    )));
                }
            };
            u16::try_from(number).ok().filter(|port| *port > 0).ok_or_else(|| {
                CniError::config(format!("{place}.{key} is {number}: a port is a number from 1 to 65535"))
            })
        };
        let protocol = text(object, "protocol")?.unwrap_or_else(|| "tcp".to_owned());
        let protocol = Transport::ALL
            .into_iter()
            .find(|known| known.to_string().eq_ignore_ascii_case(&protocol))
            .ok_or_else(|| {
                CniError::config(format!("{place}.protocol is {protocol:?}: tcp, udp and sctp have ports"))
            })?;
        let host_ip = text(object, "hostIP")?
            .map(|ip| {
                ip.parse::<IpAddr>().map(|ip| ip.to_canonical()).map_err(|_| {
                    CniError::config(format!(
                        "{place}.hostIP is {ip:?}, an address of this host was expected"
                    ))
                })
            })
            .transpose()?;
        if host_ip == Some(IpAddr::from(std::net::Ipv6Addr::LOCALHOST)) {
            return Err(CniError::config(format!(
                "{place}.hostIP is ::1, from where the kernel sends nothing to a container: use 127.0.0.1"
            )));
        }
        Ok(Self { protocol, host_port: port("hostPort")?, host_ip, port: port("containerPort")? })
    }

    /// On all addresses of a family if none or the unspecified one was given, as upstream has it.
    fn published(&self, addresses: &[InterfaceAddress]) -> Result<Vec<PublishedPort>, CniError> {
        let Self { protocol, host_port, port, .. } = *self;
        let first =
            |family| addresses.iter().map(InterfaceAddress::address).find(|a| Family::of(*a) == family);
        let asked = |family: &Family| self.host_ip.is_none_or(|ip| Family::of(ip) == *family);
        let bound = self.host_ip.filter(|ip| !ip.is_unspecified());
        let ports: Vec<_> = Family::BOTH
            .into_iter()
            .filter(asked)
            .filter_map(first)
            .map(|address| PublishedPort { protocol, host_ip: bound, host_port, address, port })
            .collect();
        match bound {
            Some(ip) if ports.is_empty() => Err(CniError::config(format!(
                "hostIP {ip} of hostPort {host_port} cannot lead into this container: it has no {} address",
                Family::of(ip)
            ))),
            _ => Ok(ports),
        }
    }
}

/// The records, and how to see whether an attachment lives.
struct Books<'a> {
    state: &'a State,
    host: Kernel,
}

impl Books<'_> {
    fn record(&self, holding: &Holding) -> Option<Record> {
        self.state.read(&holding.network, &holding.owner)
    }
}

impl Records for Books<'_> {
    fn find(&mut self, tag: &str) -> Option<Holding> {
        let mut words = tag.split(' ').map(str::to_owned);
        let (network, container, interface) = (words.next()?, words.next()?, words.next()?);
        // A tag that was cut off leads to no file, but it may still be somebody's.
        match self.state.read(&network, &Attachment { container, interface }) {
            Some(record) if record.ports.tag() == tag => Some(record.ports),
            _ => self
                .state
                .of_network(&network)
                .into_iter()
                .map(|record| record.ports)
                .find(|ports| ports.tag() == tag),
        }
    }

    fn is_alive(&mut self, holding: &Holding) -> bool {
        let link = self.record(holding).and_then(|record| record.host_link);
        // Without an interface to look for, it is for the runtime to say.
        link.is_none_or(|link| self.host.link_exists(link).unwrap_or(true))
    }

    fn all(&mut self) -> Vec<Holding> {
        self.state.all().into_iter().map(|record| record.ports).collect()
    }

    fn remove(&mut self, holding: &Holding) {
        if let Err(error) = self.state.remove(&holding.network, &holding.owner) {
            say!("flannel: {error}");
        }
    }
}

impl From<HostPortError> for CniError {
    fn from(error: HostPortError) -> Self {
        match error {
            HostPortError::Held { .. } => Self::config(error.to_string()),
            HostPortError::World(error) => error.into(),
            HostPortError::Unsettled(_) => Self::new(Self::TRY_AGAIN, error.to_string()),
        }
    }
}

/// Gives a container what it asks for, and only that. Nothing of it is there on failure.
pub(crate) fn publish(
    place: &Place<'_>,
    asked: &PortMappings,
    masquerade: CallerMasquerade,
) -> Result<(), CniError> {
    let ports = asked.published(&place.addresses)?;
    if ports.is_empty() {
        return Ok(());
    }
    let wanted = Record {
        ports: Holding {
            network: place.network.to_owned(),
            owner: place.owner.clone(),
            addresses: place.addresses.clone(),
            ports,
            masquerade,
        },
        host_link: place.host_link,
    };
    let state = State::lock()?;
    let mut books = Books { state: &state, host: Kernel::open()? };
    let mut filter = Netfilter::open()?;
    if let Some(had) = state.read(place.network, &place.owner) {
        // An earlier plugin of the chain has done it.
        if had.ports == wanted.ports && hostports::missing(&mut filter, &had.ports)?.is_empty() {
            return Ok(());
        }
        hostports::withdraw(&mut filter, &had.ports)?;
    }
    state.write(&wanted)?;
    let done = make(&mut filter, &mut books, &wanted.ports, place.towards);
    if done.is_err() {
        state.remove(place.network, &place.owner)?;
    }
    done
}

fn make(
    filter: &mut Netfilter,
    books: &mut Books<'_>,
    wanted: &Holding,
    towards: Option<LinkName>,
) -> Result<(), CniError> {
    hostports::publish(filter, books, wanted)?;
    let opened = match towards {
        Some(link) if wanted.ports.iter().any(|port| port.family() == Family::V4) => {
            hostports::open_localnet(&mut books.host, link)
        }
        _ => Ok(()),
    };
    let come: Vec<_> = wanted.ports.iter().copied().collect();
    if let Err(error) = opened.and_then(|()| hostports::settle(&mut books.host, &[], &come)) {
        hostports::withdraw(filter, wanted)?;
        return Err(error.into());
    }
    Ok(())
}

/// Takes back what a container has; nothing is opened if it has nothing. `leftovers`: also what upstream's plugin gave it.
pub(crate) fn withdraw(
    network: &str,
    owner: &Attachment,
    leftovers: bool,
) -> Result<Option<Withdrawn>, CniError> {
    if !state::knows(network, owner) {
        if !leftovers {
            return Ok(None);
        }
        let mut filter = Netfilter::open()?;
        if let Err(error) = go_leftovers::remove_ports(&mut filter, network, &owner.container) {
            say!("flannel: rules that upstream's portmap made may be left: {}", chain(&error));
        }
        return Ok(Some(Withdrawn { _filter: filter }));
    }
    let state = State::lock()?;
    let mut filter = Netfilter::open()?;
    if let Some(record) = state.read(network, owner) {
        take_back(&mut filter, &record)?;
    }
    state.remove(network, owner)?;
    Ok(Some(Withdrawn { _filter: filter }))
}

fn take_back(filter: &mut Netfilter, record: &Record) -> Result<(), CniError> {
    hostports::withdraw(filter, &record.ports)?;
    let gone: Vec<_> = record.ports.ports.iter().copied().collect();
    if gone.iter().any(|port| port.protocol != Transport::Tcp) {
        hostports::settle(&mut Kernel::open()?, &gone, &[])?;
    }
    Ok(())
}

/// What is not as it was asked for.
pub(crate) fn missing(
    place: &Place<'_>,
    asked: &PortMappings,
    masquerade: CallerMasquerade,
) -> Result<Vec<String>, CniError> {
    let ports = asked.published(&place.addresses)?;
    if ports.is_empty() {
        return Ok(Vec::new());
    }
    let state = State::lock()?;
    let Some(record) = state.read(place.network, &place.owner) else {
        return Ok(ports.iter().map(|port| format!("port {port} is not published")).collect());
    };
    let mut missing: Vec<String> =
        ports.difference(&record.ports.ports).map(|port| format!("port {port} is not published")).collect();
    let wanted = Holding { ports, masquerade, ..record.ports };
    missing.extend(hostports::missing(&mut Netfilter::open()?, &wanted)?);
    Ok(missing)
}

/// Takes back what belongs to none of a network's attachments. Goes on after a failure, and names them all.
pub(crate) fn collect(network: &str, valid: &[Attachment]) -> Result<Vec<String>, CniError> {
    if !state::knows_root() {
        return Ok(Vec::new());
    }
    let state = State::lock()?;
    let mut filter = Netfilter::open()?;
    let mut failed = Vec::new();
    for record in state.of_network(network) {
        let owner = &record.ports.owner;
        if !valid.contains(owner)
            && let Err(error) = take_back(&mut filter, &record).and_then(|()| state.remove(network, owner))
        {
            failed.push(format!("{owner}: {error}"));
        }
    }
    let mut books = Books { state: &state, host: Kernel::open()? };
    if let Err(error) = hostports::sweep(&mut filter, &mut books, network) {
        failed.push(chain(&error));
    }
    Ok(failed)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn published(mappings: &Value, addresses: &[&str]) -> Result<Vec<String>, CniError> {
        let runtime = json!({ "portMappings": mappings });
        let addresses: Vec<_> = addresses.iter().map(|address| address.parse().unwrap()).collect();
        let mappings = PortMappings::read(runtime.as_object().unwrap())?;
        Ok(mappings.published(&addresses)?.iter().map(ToString::to_string).collect())
    }

    const V4: &str = "10.244.1.5/24";
    const V6: &str = "fd00::5/64";

    #[test]
    fn mappings_are_read_as_go_runtimes_write_them() {
        // containerd's structures have no tags; others' have.
        let go_cni = json!([{ "HostPort": 18080, "ContainerPort": 80, "Protocol": "TCP", "HostIP": "" }]);
        assert_eq!(published(&go_cni, &[V4]).unwrap(), ["0.0.0.0:18080->10.244.1.5:80/tcp"]);
        let podman =
            json!([{ "hostPort": 53, "containerPort": 5353, "protocol": "udp", "hostIP": "192.0.2.1" }]);
        assert_eq!(published(&podman, &[V4, V6]).unwrap(), ["192.0.2.1:53->10.244.1.5:5353/udp"]);
        let bare = json!([{ "hostPort": 1, "containerPort": 65535 }]);
        let both = ["0.0.0.0:1->10.244.1.5:65535/tcp", "[::]:1->[fd00::5]:65535/tcp"];
        assert_eq!(published(&bare, &[V4, V6]).unwrap(), both);
        assert_eq!(published(&Value::Null, &[V4]).unwrap(), [""; 0]);
    }

    #[test]
    fn an_unspecified_address_is_all_of_its_family() {
        let on =
            |ip: &str| json!([{ "hostPort": 80, "containerPort": 80, "hostIP": ip, "protocol": "sctp" }]);
        assert_eq!(published(&on("0.0.0.0"), &[V4, V6]).unwrap(), ["0.0.0.0:80->10.244.1.5:80/sctp"]);
        assert_eq!(published(&on("::"), &[V4, V6]).unwrap(), ["[::]:80->[fd00::5]:80/sctp"]);
        assert_eq!(published(&on("::"), &[V4]).unwrap(), [""; 0]);
        assert_eq!(published(&on("::ffff:192.0.2.1"), &[V4]).unwrap(), ["192.0.2.1:80->10.244.1.5:80/sctp"]);
        for ip in ["fd00::1", "::1", "example.org"] {
            assert_eq!(published(&on(ip), &[V4]).unwrap_err().code, 7, "{ip}");
        }
    }

    #[test]
    fn what_is_no_port_is_refused_by_name() {
        for (mapping, code, word) in [
            (json!({ "hostPort": 0, "containerPort": 80 }), 7, "portMappings[0].hostPort is 0"),
            (json!({ "containerPort": 80 }), 7, "hostPort"),
            (json!({ "hostPort": 80 }), 7, "containerPort is 0"),
            (json!({ "hostPort": 65536, "containerPort": 80 }), 7, "65536"),
            (json!({ "hostPort": -1, "containerPort": 80 }), 7, "-1"),
            (json!({ "hostPort": "80", "containerPort": 80 }), 6, "number was expected"),
            (json!({ "hostPort": 8.5, "containerPort": 80 }), 6, "8.5"),
            (json!({ "hostPort": 80, "containerPort": 80, "protocol": "icmp" }), 7, "icmp"),
            (json!(5), 6, "object"),
        ] {
            let error = published(&json!([mapping]), &[V4]).unwrap_err();
            assert!(error.code == code && error.to_string().contains(word), "{mapping}: {error}");
        }
    }

    #[test]
    fn the_same_twice_is_once_but_not_to_two_places() {
        let one = json!({ "hostPort": 80, "containerPort": 80 });
        assert_eq!(published(&json!([one, one]), &[V4]).unwrap().len(), 1);
        let other = json!({ "hostPort": 80, "containerPort": 81 });
        let error = published(&json!([one, other]), &[V4]).unwrap_err();
        assert!(error.code == 7 && error.to_string().contains("10.244.1.5:81"), "{error}");
        let udp = json!({ "hostPort": 80, "containerPort": 81, "protocol": "udp" });
        assert_eq!(published(&json!([one, udp]), &[V4]).unwrap().len(), 2);
    }
}
