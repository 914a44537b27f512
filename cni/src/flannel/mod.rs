//! The plugin `flannel`: a container on the node's bridge of a flannel network, as `subnet.env` describes it.
//!
//! The work is done here, unless the configuration names another plugin to do it (upstream: flannel-io/cni-plugin flannel.go).

mod conf;
mod delegation;
mod scratch;
mod upkeep;

use std::io::ErrorKind;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use flannel_core::act::attach::OtherAddresses;
use flannel_core::act::pass::chain;
use flannel_core::decide::bridge::masquerade_table;
use flannel_core::decide::endpoint::EndpointRoute;
use flannel_core::decide::ranges::RangeSet;
use flannel_core::touch::ledger::{Ledger, Released};
use flannel_core::touch::marker;
use flannel_core::touch::subnet_env::{SubnetEnv, SubnetEnvError};
use serde_json::{Value, json};

use crate::args::{Call, CniArgs, Verb};
use crate::bridge::{self, Network, Spared, check, routes, wish::Wish};
use crate::conf::Conf;
use crate::extras::Extras;
use crate::go_leftovers;
use crate::host_local;
use crate::json::{flag, text};
use crate::result::{Answer, CniError};
use crate::sandbox;
use conf::{FlannelConf, Worker};
use scratch::{Kept, Scratch};

/// How long ADD waits for the agent to have a lease: a node that boots starts both at once.
const PATIENCE: Duration = Duration::from_secs(2);

/// Does what the call asks for.
pub(crate) fn run(call: &Call, conf: &Conf) -> Result<Answer, CniError> {
    let conf = &FlannelConf::read(conf)?;
    match call.verb {
        Verb::Add => add(call, conf),
        Verb::Del => del(call, conf),
        Verb::Check => check(call, conf),
        Verb::Gc => upkeep::gc(call, conf),
        Verb::Status => upkeep::status(call, conf),
    }
}

fn add(call: &Call, conf: &FlannelConf<'_>) -> Result<Answer, CniError> {
    let owner = call.attachment()?;
    sandbox::refuse_own(call)?;
    let env = SubnetEnv::await_usable(&conf.subnet_file, PATIENCE)
        .map_err(|error| no_lease(&error, CniError::TRY_AGAIN))?;
    if let Worker::Plugin(kind) = conf.worker() {
        Extras::refuse_beside(&kind, conf.common)?;
        return delegation::add(call, conf, &env, &kind);
    }
    let extras = Extras::read(call, conf.common)?;
    // Before anything is settled for the node.
    let home = sandbox::Home::open(call)?;
    let (network, wish) = network(call, conf, &env)?;
    let ledger = Ledger::open_for(&conf.subnet_file, &conf.ledger_root(), &conf.common.name)?;
    let scratch = Scratch::of(conf, &owner);
    let fresh = scratch.keep(&kept(conf, &env))?;
    let made = bridge::add(call, home, &ledger, &network, &wish).and_then(|made| {
        extras.add(call, conf.common, &made.attached).map(|()| made).map_err(|error| {
            let undone = bridge::unlink(call, &network.name, None, wish.guarded)
                .and_then(|()| bridge::release(Some(&ledger), &owner).map(drop));
            match undone {
                Ok(()) => error,
                Err(undo) => error.but_left(&undo),
            }
        })
    });
    match made {
        Ok(made) => {
            for entry in made.reclaimed {
                if let Err(error) = Extras::del(&entry.owner, conf.common) {
                    say!("flannel: {} is gone, but {error}", entry.owner);
                }
                Scratch::of(conf, &entry.owner).remove();
            }
            Ok(Answer::Value(made.attached.render(conf.common.version)))
        }
        Err(error) => {
            if fresh {
                scratch.remove();
            }
            Err(error)
        }
    }
}

fn del(call: &Call, conf: &FlannelConf<'_>) -> Result<Answer, CniError> {
    let owner = call.attachment()?;
    let scratch = Scratch::of(conf, &owner);
    let kept = scratch.read();
    if let Worker::Plugin(kind) = kept.as_ref().map_or_else(|| conf.worker(), Kept::worker) {
        return delegation::del(call, conf, &kind, kept);
    }
    let mut failed: Vec<CniError> = Vec::new();
    // Both are dropped last. Every step is tried, whatever becomes of the others: what is left by one is no reason to leave more.
    let _closing = Extras::del(&owner, conf.common).map_err(|error| failed.push(error));
    let _rules = kept.filter(Kept::is_upstreams).and_then(|kept| {
        let network = kept.name().unwrap_or(&conf.common.name);
        go_leftovers::remove(network, &owner)
            .inspect_err(|error| say!("flannel: rules that upstream's plugins made may be left: {error}"))
            .ok()
    });
    let guarded = flag(&conf.delegate, "macspoofchk").ok().flatten().unwrap_or(false);
    let unlinked = bridge::unlink(call, conf.network().as_str(), conf.common.previous.as_ref(), guarded);
    // As long as there is an interface with them its addresses are not free.
    let released = unlinked.and_then(|()| {
        let ledger = Ledger::find(&conf.subnet_file, &conf.ledger_root(), &conf.common.name)?;
        bridge::release(ledger.as_ref(), &owner)
    });
    match released {
        Ok(released) => {
            // Upstream keeps one file for all interfaces of a container; the last one takes it along.
            if !released.siblings {
                scratch.remove();
            }
            if let Err(error) = retire(call, conf, &released) {
                say!("flannel: the bridge may have an address that nobody needs any more: {error}");
            }
        }
        Err(error) => failed.push(error),
    }
    match failed.len() {
        0 => Ok(Answer::Nothing),
        1 => Err(failed.remove(0)),
        _ => {
            let all: Vec<String> = failed.iter().map(CniError::to_string).collect();
            Err(CniError::leftover(all.join("; ")))
        }
    }
}

/// The node may have another subnet by now than the container had. With the last container of the old one its gateway goes.
fn retire(call: &Call, conf: &FlannelConf<'_>, released: &Released) -> Result<(), CniError> {
    if released.addresses.is_empty() {
        return Ok(());
    }
    let Ok(env) = SubnetEnv::read(&conf.subnet_file) else { return Ok(()) };
    let here = |address: &IpAddr| env.subnets.iter().any(|subnet| subnet.prefix().contains(*address));
    if released.addresses.iter().all(here) {
        return Ok(());
    }
    let (network, wish) = network(call, conf, &env)?;
    bridge::retire(&network, &wish, released)
}

fn check(call: &Call, conf: &FlannelConf<'_>) -> Result<Answer, CniError> {
    let owner = call.attachment()?;
    sandbox::refuse_own(call)?;
    let kept = Scratch::of(conf, &owner).read();
    if let Worker::Plugin(kind) = kept.as_ref().map_or_else(|| conf.worker(), Kept::worker) {
        return delegation::check(call, conf, &kind, kept);
    }
    let env = subnet_env(conf, CniError::TRY_AGAIN)?;
    let extras = Extras::read(call, conf.common)?;
    let (network, wish) = network(call, conf, &env)?;
    let ledger = Ledger::find(&conf.subnet_file, &conf.ledger_root(), &conf.common.name)?;
    let mut missing = check::check(call, conf.common, &network, &wish, &[])?;
    missing.extend(check::unclaimed(call, conf.common, ledger.as_ref())?);
    missing.extend(extras.check(call, conf.common)?);
    if missing.is_empty() { Ok(Answer::Nothing) } else { Err(check::drift(missing.join("; "))) }
}

/// The node's bridge network, as the agent and this configuration want it.
fn network(call: &Call, conf: &FlannelConf<'_>, env: &SubnetEnv) -> Result<(Network, Wish), CniError> {
    let mut wish = Wish::read(&conf.delegate, "delegate.", conf.common, &CniArgs::parse(&call.args)?)?;
    let ipam = conf.ipam()?;
    if wish.dns.is_empty() {
        wish.dns = host_local::dns(text(ipam, "resolvConf")?.as_deref().map(Path::new))?;
    }
    let name = conf.network();
    let bridge = marker::settle_bridge(&conf.subnet_file, wish.bridge, name.bridge())
        .map_err(|error| CniError::config(chain(&error)))?;
    let given = routes::read(ipam, "routes", "ipam")?;
    let networks = env.networks.iter().copied().map(EndpointRoute::to);
    let spared =
        || Spared { table: masquerade_table(bridge), networks: env.networks.clone(), accumulate: false };
    let network = Network {
        name: name.as_str().to_owned(),
        bridge,
        mtu: wish.mtu.unwrap_or(env.mtu),
        sets: sets(env)?,
        routes: given.into_iter().chain(networks).collect(),
        is_gateway: wish.gateway.unwrap_or(true),
        // Containers of an earlier subnet of the node may still be there.
        others: OtherAddresses::Keep,
        masquerade: wish.ip_masq.unwrap_or(!env.ip_masq).then(spared),
    };
    Ok((network, wish))
}

fn sets(env: &SubnetEnv) -> Result<Vec<RangeSet>, CniError> {
    let sets: Result<Vec<_>, _> = env.subnets.iter().map(|subnet| RangeSet::whole(subnet.prefix())).collect();
    Ok(sets?)
}

fn subnet_env(conf: &FlannelConf<'_>, code: u32) -> Result<SubnetEnv, CniError> {
    SubnetEnv::read(&conf.subnet_file).map_err(|error| no_lease(&error, code))
}

fn no_lease(error: &SubnetEnvError, code: u32) -> CniError {
    let hint = match error {
        SubnetEnvError::Read { source, .. } if source.kind() == ErrorKind::NotFound => {
            "; is flanneld (or the flannel Docker plugin) running on this node, and has it a lease? Its log tells: \
             journalctl -u flanneld, or kubectl -n kube-flannel logs"
        }
        SubnetEnvError::Missing { .. } | SubnetEnvError::Line { .. } => {
            "; flanneld (or the flannel Docker plugin) writes it anew when it starts"
        }
        _ => "",
    };
    CniError::new(code, "failed to load flannel 'subnet.env' file")
        .with_details(format!("{}{hint}", chain(error)))
}

/// Upstream's text, but for two things: rules for this container alone are never made, so nobody has to look for them,
/// and it says whose it is.
fn kept(conf: &FlannelConf<'_>, env: &SubnetEnv) -> Value {
    let mut delegated = conf.delegated(env);
    delegated.retain(|key, _| !key.eq_ignore_ascii_case("ipMasq"));
    delegated.insert("ipMasq".to_owned(), json!(false));
    delegated.insert(scratch::MAKER.0.to_owned(), json!(scratch::MAKER.1));
    Value::Object(delegated)
}

#[cfg(test)]
mod tests;
