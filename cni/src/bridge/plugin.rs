//! The plugin `bridge`: a bridge of its own for each configuration, addresses from another plugin or none
//! (upstream: containernetworking/plugins plugins/main/bridge/bridge.go).

use std::net::IpAddr;

use flannel_core::act::attach::OtherAddresses;
use flannel_core::decide::bridge::network_masquerade_table;
use flannel_core::touch::world::kernel::{Kernel, Netfilter};
use flannel_core::words::name::NetworkName;
use flannel_core::words::units::Mtu;

use super::network::{Lease, Network, Spared};
use super::wish::Wish;
use super::{check, ipam};
use crate::args::{Call, CniArgs, Verb};
use crate::conf::Conf;
use crate::go_leftovers;
use crate::json::{flag, object, text};
use crate::ports;
use crate::previous::Previous;
use crate::result::{Answer, CniError, Version};
use crate::sandbox::{self, Home};

/// Does what the call asks for.
pub(crate) fn run(call: &Call, conf: &Conf) -> Result<Answer, CniError> {
    match call.verb {
        Verb::Add => add(call, conf),
        Verb::Del => del(call, conf),
        Verb::Check => check(call, conf),
        Verb::Gc => gc(call, conf),
        Verb::Status => match addresses_from(conf)? {
            Some(kind) => ipam::run(&kind, call, conf).map(|_| Answer::Nothing),
            None => Ok(Answer::Nothing),
        },
    }
}

/// The plugin that gives addresses; none for a bridge that only passes frames on.
fn addresses_from(conf: &Conf) -> Result<Option<String>, CniError> {
    match object(&conf.given, "ipam")? {
        Some(ipam) => text(&ipam, "type"),
        None => Ok(None),
    }
}

fn add(call: &Call, conf: &Conf) -> Result<Answer, CniError> {
    sandbox::refuse_own(call)?;
    let mut wish = Wish::read(&conf.given, "", conf, &CniArgs::parse(&call.args)?)?;
    let home = Home::open(call)?;
    let Some(kind) = addresses_from(conf)? else {
        if conf.version < Version::V0_3_0 {
            return Err(CniError::config(format!(
                "a result of version {} has addresses, and without ipam there are none: give the configuration cniVersion 0.3.0 or later",
                conf.version
            )));
        }
        let attached = super::add_leased(call, home, &network(conf, &wish)?, &wish, &[])?;
        return Ok(Answer::Value(attached.render(conf.version)));
    };
    wish.refuse_addresses()?;
    let mut network = network(conf, &wish)?;
    let given = ipam::add(&kind, call, conf)?;
    network.routes = given.routes;
    if wish.dns.is_empty() {
        wish.dns = given.dns;
    }
    let leases: Vec<Lease> = given.leases.into_iter().map(|lease| network.with_gateway(lease)).collect();
    match super::add_leased(call, home, &network, &wish, &leases) {
        Ok(attached) => Ok(Answer::Value(attached.render(conf.version))),
        Err(error) => Err(ipam::take_back(&kind, call, conf, error)),
    }
}

/// What the configuration says of the network; the routes are the address plugin's to say.
fn network(conf: &Conf, wish: &Wish) -> Result<Network, CniError> {
    let spared =
        || Spared { table: network_masquerade_table(&conf.name), networks: Vec::new(), accumulate: true };
    Ok(Network {
        name: conf.name.clone(),
        bridge: wish.bridge.unwrap_or_else(|| NetworkName::default_network().bridge()),
        mtu: wish.mtu.unwrap_or(Mtu::ETHERNET),
        sets: Vec::new(),
        routes: Vec::new(),
        is_gateway: wish.gateway == Some(true),
        others: OtherAddresses::Refuse,
        masquerade: (wish.ip_masq == Some(true)).then(spared),
    })
}

impl Network {
    /// A gateway that nobody named is the first address of the subnet.
    fn with_gateway(&self, lease: Lease) -> Lease {
        let first = || lease.address.prefix().nth(1).filter(|_| self.is_gateway);
        Lease { gateway: lease.gateway.or_else(first), ..lease }
    }
}

/// Takes away whatever there may be. What the configuration says of ADD is not looked at: it may have changed since.
fn del(call: &Call, conf: &Conf) -> Result<Answer, CniError> {
    let owner = call.attachment()?;
    let is = |key| flag(&conf.given, key).map(|flag| flag.unwrap_or(false));
    // Both are dropped last: closing a socket right after rules were deleted waits for the kernel. Ports that our portmap gave and
    // another one was to take back would lead to whoever gets the address next.
    let _ports = ports::withdraw(&conf.name, &owner, false)?;
    let mut rules = None;
    if is("ipMasq")? {
        let filter = rules.insert(Netfilter::open()?);
        go_leftovers::remove_masquerade(filter, &conf.name, &owner)?;
    }
    super::unlink(call, &conf.name, conf.previous.as_ref(), is("macspoofchk")?)?;
    if let Some(kind) = addresses_from(conf)? {
        ipam::run(&kind, call, conf)?;
    }
    Ok(Answer::Nothing)
}

fn check(call: &Call, conf: &Conf) -> Result<Answer, CniError> {
    sandbox::refuse_own(call)?;
    let wish = Wish::read(&conf.given, "", conf, &CniArgs::parse(&call.args)?)?;
    if let Some(kind) = addresses_from(conf)? {
        ipam::run(&kind, call, conf)?;
    }
    let network = network(conf, &wish)?;
    let leases: Vec<Lease> = match conf.previous.as_ref().and_then(Previous::read) {
        None => Vec::new(),
        Some(previous) => {
            let lease =
                |(address, gateway): (_, Option<IpAddr>)| network.with_gateway(Lease { address, gateway });
            previous.leases(call.link()?).into_iter().map(lease).collect()
        }
    };
    let missing = check::check(call, conf, &network, &wish, &leases)?;
    if missing.is_empty() { Ok(Answer::Nothing) } else { Err(check::drift(missing.join("; "))) }
}

/// The address plugin frees what is not listed, and ports that are no more are guarded no longer.
fn gc(call: &Call, conf: &Conf) -> Result<Answer, CniError> {
    if conf.valid.is_none() {
        return Ok(Answer::Nothing);
    }
    if flag(&conf.given, "macspoofchk")? == Some(true) {
        Kernel::open()?.lift_stray_guards()?;
    }
    match addresses_from(conf)? {
        Some(kind) => ipam::run(&kind, call, conf).map(|_| Answer::Nothing),
        None => Ok(Answer::Nothing),
    }
}
