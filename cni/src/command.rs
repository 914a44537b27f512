//! The verbs: what each of them does, from a call and a configuration to an answer.

mod check;
mod upkeep;

use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use flannel_core::act::attach::{self, AttachError, ClaimError, Shared};
use flannel_core::act::pass::chain;
use flannel_core::decide::bridge::{self, BridgeSpec};
use flannel_core::decide::endpoint::{Birth, EndpointRoute, EndpointSpec, host_mac};
use flannel_core::decide::pool::{Pool, PoolError};
use flannel_core::touch::ledger::{Entry, Ledger, LedgerError};
use flannel_core::touch::marker;
use flannel_core::touch::subnet_env::{SubnetEnv, SubnetEnvError};
use flannel_core::touch::world::WorldError;
use flannel_core::touch::world::kernel::{Kernel, Namespace};
use flannel_core::words::addr::{Family, InterfaceAddress, Mac, Prefix};
use flannel_core::words::code::Code;
use flannel_core::words::fact::LinkKind;
use flannel_core::words::name::{Attachment, LinkName};
use serde_json::{Value, json};

use crate::args::{Call, CniArgs, Verb};
use crate::conf::{Conf, Kept, Wish, Worker};
use crate::delegate;
use crate::result::{self, Address, Attached, CniError, Interface, Route, Version};

/// What goes to stdout.
#[derive(Clone, PartialEq, Debug)]
pub(crate) enum Answer {
    /// Nothing: it is done.
    Nothing,
    /// A result of ours.
    Value(Value),
    /// What a delegated plugin printed.
    Printed(Vec<u8>),
}

/// Does what the call asks for.
pub(crate) fn run(call: &Call, conf: &Conf) -> Result<Answer, CniError> {
    let since = |first: Version, verb: &str| match conf.version >= first {
        true => Ok(()),
        false => Err(CniError::new(CniError::INCOMPATIBLE, format!("config version does not allow {verb}"))),
    };
    match call.verb {
        Verb::Add => add(call, conf),
        Verb::Del => del(call, conf),
        Verb::Check => since(Version::V0_4_0, "CHECK").and_then(|()| check::check(call, conf)),
        Verb::Gc => since(Version::V1_1_0, "GC").and_then(|()| upkeep::gc(call, conf)),
        Verb::Status => since(Version::V1_1_0, "STATUS").and_then(|()| upkeep::status(call, conf)),
        Verb::Version => Ok(Answer::Value(result::versions())),
    }
}

fn add(call: &Call, conf: &Conf) -> Result<Answer, CniError> {
    let owner = call.attachment()?;
    let link = call.link()?;
    refuse_own_namespace(call)?;
    let env = subnet_env(conf, CniError::TRY_AGAIN)?;
    if let Worker::Plugin(kind) = conf.worker() {
        return delegate_add(call, conf, &env, &kind);
    }
    let wish = conf.wish(&CniArgs::parse(&call.args)?)?;
    let pools = pools(&env)?;
    let namespace = Namespace::open(Path::new(&call.netns))
        .and_then(Namespace::in_place)
        .map_err(|error| no_namespace(call, &error))?;
    let peer_home = namespace.try_clone().map_err(|error| no_namespace(call, &error))?;
    let mut sandbox = Kernel::open_inside(namespace).map_err(world_error)?;
    let mut host = Kernel::open().map_err(world_error)?;
    host.set_sandbox(peer_home);
    let shared = shared(conf, &wish, &env, &pools)?;
    let ledger =
        Ledger::open_for(&conf.subnet_file, &conf.ledger_root(), &conf.name).map_err(ledger_error)?;
    let scratch = Scratch::of(conf, &owner);
    let fresh = scratch.keep(&kept(conf, &env)).map_err(|error| scratch.error("write", &error))?;

    let place = Place {
        host_link: owner.host_link(conf.network().as_str()),
        link,
        wish: &wish,
        env: &env,
        pools: &pools,
    };
    let mut made = None;
    let attached = attach::attach(&ledger, &owner, (&pools, &wish.ips), |addresses| {
        let spec = place.endpoint(&shared, addresses);
        let bridge_mac = attach::connect(&mut host, Some(&mut sandbox), &shared, &spec)?;
        made = Some((spec, bridge_mac));
        Ok(())
    });
    match (attached, made) {
        (Ok(_), Some((spec, bridge_mac))) => {
            let attached = place.describe(&shared, &spec, bridge_mac, &call.netns);
            Ok(Answer::Value(attached.render(conf.version)))
        }
        (Ok(_), None) => Ok(Answer::Nothing),
        (Err(error), _) => {
            if fresh {
                scratch.remove();
            }
            Err(attach_error(&error))
        }
    }
}

/// The other plugin gets upstream's configuration, and upstream's file is kept for DEL.
fn delegate_add(call: &Call, conf: &Conf, env: &SubnetEnv, kind: &str) -> Result<Answer, CniError> {
    let owner = call.attachment()?;
    let delegated = Value::Object(conf.delegated(env));
    let scratch = Scratch::of(conf, &owner);
    scratch.keep(&delegated).map_err(|error| scratch.error("write", &error))?;
    match delegate::run(kind, &call.path, None, &delegated) {
        Ok(printed) => Ok(Answer::Printed(printed)),
        Err(error) => {
            if let Err(undo) = delegate::run(kind, &call.path, Some("DEL"), &delegated) {
                eprintln!("flannel: taking back a failed ADD: {undo}");
            }
            scratch.remove();
            Err(error)
        }
    }
}

fn del(call: &Call, conf: &Conf) -> Result<Answer, CniError> {
    let owner = call.attachment()?;
    let link = call.link()?;
    let scratch = Scratch::of(conf, &owner);
    let kept = scratch.read();
    match kept.as_ref().map_or_else(|| conf.worker(), Kept::worker) {
        Worker::Plugin(kind) => {
            // Without the file there is nothing to undo: ADD never came so far.
            let Some(kept) = kept else { return Ok(Answer::Nothing) };
            let done = delegate::run(&kind, &call.path, None, &kept.to_value());
            scratch.remove();
            return done.map(Answer::Printed);
        }
        Worker::Ourselves => {}
    }
    if let Some(kept) = kept.filter(Kept::masquerades) {
        // Made by upstream's plugins, with rules for this container alone, which only they know how to find.
        if let Err(error) = delegate::run("bridge", &call.path, None, &kept.to_value()) {
            eprintln!("flannel: rules that the bridge plugin made for this container may be left: {error}");
        }
    }
    unlink(call, conf, &owner, link)?;
    let others = release(conf, &owner)?;
    // Upstream keeps one file for all interfaces of a container; the last one takes it along.
    if !others.iter().any(|entry| entry.owner.container == owner.container) {
        scratch.remove();
    }
    Ok(Answer::Nothing)
}

/// Deletes the veth pair by whatever end can be found.
fn unlink(call: &Call, conf: &Conf, owner: &Attachment, link: LinkName) -> Result<(), CniError> {
    let mut host = Kernel::open().map_err(world_error)?;
    if host.delete_link(owner.host_link(conf.network().as_str())).map_err(world_error)? {
        return Ok(());
    }
    // Not made by us, or gone already.
    if let Some(mut sandbox) = sandbox(call) {
        return delete_veth(&mut sandbox, link);
    }
    match conf.previous.as_ref().and_then(check::host_link) {
        Some(host_link) => delete_veth(&mut host, host_link),
        None => Ok(()),
    }
}

/// The container's namespace if there still is one: runtimes leave the file behind that it was mounted on.
fn sandbox(call: &Call) -> Option<Kernel> {
    if call.netns.is_empty() || is_own_namespace(call) {
        return None;
    }
    let namespace = Namespace::open(Path::new(&call.netns)).ok()?;
    Kernel::open_inside(namespace)
        .inspect_err(|error| eprintln!("flannel: taken for gone: {}", chain(error)))
        .ok()
}

fn delete_veth(world: &mut Kernel, name: LinkName) -> Result<(), CniError> {
    let link = world.link(name).map_err(world_error)?;
    if link.is_some_and(|link| matches!(link.kind, LinkKind::Veth { .. })) {
        world.delete_link(name).map_err(world_error)?;
    }
    Ok(())
}

/// Frees the attachment's addresses. The answer is everyone else's entries.
fn release(conf: &Conf, owner: &Attachment) -> Result<Vec<Entry>, CniError> {
    let found = Ledger::find(&conf.subnet_file, &conf.ledger_root(), &conf.name).map_err(ledger_error)?;
    let Some(ledger) = found else { return Ok(Vec::new()) };
    let held = ledger.lock().map_err(ledger_error)?;
    let mut entries = held.entries().map_err(ledger_error)?;
    let released = held.release_among(&entries, owner).map_err(ledger_error)?;
    entries.retain(|entry| !released.contains(&entry.address));
    Ok(entries)
}

fn subnet_env(conf: &Conf, code: u32) -> Result<SubnetEnv, CniError> {
    SubnetEnv::read(&conf.subnet_file).map_err(|error| {
        let hint = match &error {
            SubnetEnvError::Read { source, .. } if source.kind() == ErrorKind::NotFound => {
                "; is flanneld (or the flannel Docker plugin) running on this node, and has it a lease?"
            }
            _ => "",
        };
        CniError::new(code, "failed to load flannel 'subnet.env' file")
            .with_details(format!("{}{hint}", chain(&error)))
    })
}

fn pools(env: &SubnetEnv) -> Result<Vec<Pool>, CniError> {
    let pools: Result<Vec<_>, _> = env.subnets.iter().map(|subnet| Pool::new(subnet.prefix())).collect();
    pools.map_err(|error| CniError::new(CniError::CONFIG, error.to_string()))
}

/// The node's bridge of this network, as this configuration wants it.
fn shared(conf: &Conf, wish: &Wish, env: &SubnetEnv, pools: &[Pool]) -> Result<Shared, CniError> {
    let name = marker::settle_bridge(&conf.subnet_file, wish.bridge, conf.network().bridge())
        .map_err(|error| CniError::new(CniError::CONFIG, chain(&error)))?;
    let subnets: Vec<Prefix> = pools.iter().map(Pool::subnet).collect();
    let rules = match wish.ip_masq.unwrap_or(!env.ip_masq) {
        true => vec![bridge::masquerade(name, &subnets, &env.networks)],
        false => Vec::new(),
    };
    let gateways = pools.iter().map(Pool::gateway).collect();
    let bridge = BridgeSpec { name, gateways, mtu: wish.mtu.unwrap_or(env.mtu), alias: None };
    Ok(Shared { bridge, rules, force_address: wish.force_address })
}

/// Where an endpoint goes, before it has addresses.
struct Place<'a> {
    host_link: LinkName,
    link: LinkName,
    wish: &'a Wish,
    env: &'a SubnetEnv,
    pools: &'a [Pool],
}

impl Place<'_> {
    fn endpoint(&self, shared: &Shared, addresses: &[InterfaceAddress]) -> EndpointSpec {
        let mac = addresses.first().map(|first| Mac::for_address(first.address()));
        EndpointSpec {
            host_link: self.host_link,
            container_link: self.link,
            birth: Birth::InSandbox,
            bridge: shared.bridge.name,
            hairpin: self.wish.hairpin,
            isolated: false,
            mtu: Some(shared.bridge.mtu),
            mac: self.wish.mac.or(mac),
            addresses: addresses.to_vec(),
            gateways: self.pools.iter().map(|pool| pool.gateway().address()).collect(),
            routes: self
                .routes()
                .into_iter()
                .map(|Route { destination, via, metric }| EndpointRoute { destination, via, metric })
                .collect(),
        }
    }

    /// The given ones, the networks, and a default route for each family if wanted and not given: upstream's order.
    fn routes(&self) -> Vec<Route> {
        let networks =
            self.env.networks.iter().map(|network| Route { destination: *network, via: None, metric: 0 });
        let mut routes: Vec<Route> = self.wish.routes.iter().cloned().chain(networks).collect();
        for pool in self.pools.iter().filter(|_| self.wish.default_gateway) {
            let family = pool.subnet().family();
            let given = |route: &Route| {
                route.destination.is_default() && route.destination.family() == family && route.via.is_some()
            };
            if !routes.iter().any(given) {
                routes.push(Route {
                    destination: default_route(family),
                    via: Some(pool.gateway().address()),
                    metric: 0,
                });
            }
        }
        routes
    }

    fn describe(
        &self,
        shared: &Shared,
        spec: &EndpointSpec,
        bridge_mac: Option<Mac>,
        netns: &str,
    ) -> Attached {
        let on_host = |name, mac| Interface { name, mac, mtu: spec.mtu, sandbox: String::new() };
        let container = Interface { sandbox: netns.to_owned(), ..on_host(spec.container_link, spec.mac) };
        let gateway =
            |family: Family| spec.gateways.iter().copied().find(|gateway| Family::of(*gateway) == family);
        Attached {
            interfaces: [
                on_host(shared.bridge.name, bridge_mac),
                on_host(spec.host_link, spec.mac.map(host_mac)),
                container,
            ],
            addresses: spec
                .addresses
                .iter()
                .filter_map(|address| {
                    Some(Address { address: *address, gateway: gateway(address.family())? })
                })
                .collect(),
            routes: self.routes(),
            dns: self.wish.dns.clone(),
        }
    }
}

fn default_route(family: Family) -> Prefix {
    let any = match family {
        Family::V4 => IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED),
        Family::V6 => IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED),
    };
    // A length of 0 fits either family; the host route is never taken.
    Prefix::containing(any, 0).unwrap_or_else(|_| Prefix::host(any))
}

/// Upstream's text, but for one thing: rules for this container alone are never made, so nobody has to look for them.
fn kept(conf: &Conf, env: &SubnetEnv) -> Value {
    let mut delegated = conf.delegated(env);
    delegated.retain(|key, _| !key.eq_ignore_ascii_case("ipMasq"));
    delegated.insert("ipMasq".to_owned(), json!(false));
    Value::Object(delegated)
}

/// The file upstream keeps for a container: with it there, a node can go back to upstream's plugin at any time, and
/// containers that upstream's plugin made can be taken down.
struct Scratch {
    file: PathBuf,
}

impl Scratch {
    fn of(conf: &Conf, owner: &Attachment) -> Self {
        Self { file: conf.data_dir.join(&owner.container) }
    }

    /// Writes it; true if it was not there before. Not synced: it is void after a crash of the host.
    fn keep(&self, conf: &Value) -> io::Result<bool> {
        let open = |new: bool| {
            let mut options = OpenOptions::new();
            options.write(true).truncate(!new).create_new(new).create(!new).mode(0o600);
            options.open(&self.file)
        };
        let (mut file, fresh) = match open(true) {
            Ok(file) => (file, true),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => (open(false)?, false),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let dir = self.file.parent().unwrap_or_else(|| Path::new("/"));
                fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
                (open(true)?, true)
            }
            Err(error) => return Err(error),
        };
        file.write_all(conf.to_string().as_bytes())?;
        Ok(fresh)
    }

    /// What was kept; none if there is nothing that can be read.
    fn read(&self) -> Option<Kept> {
        let text = match fs::read_to_string(&self.file) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return None,
            Err(error) => {
                eprintln!("flannel: could not read {}: {error}", self.file.display());
                return None;
            }
        };
        match Kept::parse(&text) {
            Ok(kept) => Some(kept),
            Err(error) => {
                eprintln!("flannel: {} cannot be used: {error}", self.file.display());
                None
            }
        }
    }

    fn remove(&self) {
        match fs::remove_file(&self.file) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                eprintln!("flannel: could not remove {}: {error}", self.file.display());
            }
            _ => {}
        }
    }

    fn error(&self, action: &str, error: &io::Error) -> CniError {
        CniError::new(CniError::INPUT, format!("could not {action} {}", self.file.display()))
            .with_details(error.to_string())
    }
}

/// ADD into the host's own namespace would take the host's interface for a container's.
fn refuse_own_namespace(call: &Call) -> Result<(), CniError> {
    if is_own_namespace(call) && !call.any_netns {
        return Err(CniError::new(
            CniError::NETNS,
            format!("plugin's netns and netns from CNI_NETNS should not be the same: {}", call.netns),
        ));
    }
    Ok(())
}

fn is_own_namespace(call: &Call) -> bool {
    let place = |path: &str| fs::metadata(path).map(|meta| (meta.dev(), meta.ino())).ok();
    let own = place("/proc/self/ns/net");
    own.is_some() && place(&call.netns) == own
}

fn no_namespace(call: &Call, error: &io::Error) -> CniError {
    CniError::new(CniError::NETNS, format!("failed to open netns {:?}", call.netns))
        .with_details(error.to_string())
}

fn world_error(error: WorldError) -> CniError {
    CniError::new(Code::CHANGE_FAILED.number().into(), chain(&error))
}

fn ledger_error(error: LedgerError) -> CniError {
    let code = match &error {
        LedgerError::Locked { .. } => CniError::TRY_AGAIN,
        LedgerError::Taken { .. } => Code::ADDRESS_TAKEN.number().into(),
        LedgerError::Clash { .. } | LedgerError::Foreign { .. } => CniError::CONFIG,
        LedgerError::Io { .. } => CniError::INPUT,
    };
    CniError::new(code, chain(&error))
}

fn attach_error(error: &AttachError) -> CniError {
    let code = match error {
        AttachError::Claim(ClaimError::Pool(PoolError::Exhausted { .. })) => CniError::TRY_AGAIN,
        AttachError::Claim(ClaimError::Ledger(LedgerError::Locked { .. })) => CniError::TRY_AGAIN,
        AttachError::Claim(ClaimError::Ledger(LedgerError::Taken { .. })) => {
            Code::ADDRESS_TAKEN.number().into()
        }
        AttachError::Claim(ClaimError::Ledger(_)) => CniError::INPUT,
        AttachError::Claim(_) | AttachError::Plan(_) | AttachError::NoBridge { .. } => CniError::CONFIG,
        AttachError::Exists { .. } => Code::ATTACHMENT_EXISTS.number().into(),
        AttachError::World(_) | AttachError::Unsettled { .. } => Code::CHANGE_FAILED.number().into(),
        AttachError::Undo { .. } => Code::LEFTOVER.number().into(),
    };
    CniError::new(code, chain(error))
}
