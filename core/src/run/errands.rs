//! What flanneld answers on the command line: `status`, `leases`, `plan`, `explain`. From the same lock, files, store and kernel that
//! the agent works with; nothing is changed.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::sync::watch;
use tokio::time::timeout;

use super::cli::CommonFlags;
use super::health::Counters;
use super::reconcile::{Inputs, Place, preview};
use super::{cache, daemon, hold, setup, survey};
use crate::act::pass::chain;
use crate::decide::plan::remains;
use crate::touch::subnet_env::SubnetEnv;
use crate::touch::world::World as _;
use crate::touch::world::kernel::Kernel;
use crate::words::addr::{Family, Prefix};
use crate::words::config::NetworkConfig;
use crate::words::fact::{Fact, Facts, TunnelHost};
use crate::words::lease::{LeaseSet, LeaseValue, Subnets};

/// How long the store gets to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// For stdout, and whether all is well.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Answer {
    /// Whole lines.
    pub text: String,
    /// False makes the exit status 1.
    pub well: bool,
}

/// Who serves the network here, with which subnet, and what was written for others. Asks nobody but this host.
pub fn status(flags: &CommonFlags) -> anyhow::Result<Answer> {
    let network = setup::flannelds_network(flags);
    let holder = hold::holder(&flags.subnet_file, &network)?;
    let mut text = String::new();
    match &holder {
        Some(holder) => writeln!(text, "served by    {holder}")?,
        None => writeln!(text, "served by    nobody: no flanneld of this kind runs here")?,
    }
    if let Some(last) = cache::read(&flags.state_dir, &network) {
        if let Ok(parsed) = NetworkConfig::parse(&last.config) {
            let cidrs: Vec<_> = parsed.config.cidrs().map(|cidr| cidr.to_string()).collect();
            writeln!(text, "network      {} ({})", cidrs.join(", "), parsed.config.backend.name())?;
        }
        if let Some(own) = last.own {
            let public = public(&own.value);
            let others = last.leases.leases.len().saturating_sub(1);
            writeln!(text, "lease        {} as {public}; other leases: {others}", own.subnets)?;
        }
    }
    let path = flags.subnet_file.display();
    let env = SubnetEnv::read(&flags.subnet_file);
    match &env {
        Ok(env) => {
            let gateways: Vec<_> = env.gateways().iter().map(ToString::to_string).collect();
            writeln!(
                text,
                "subnet file  {path}: bridge address {}, MTU {}",
                gateways.join(", "),
                env.mtu.bytes()
            )?;
        }
        Err(error) => writeln!(text, "subnet file  {}", chain(error))?,
    }
    Ok(Answer { text, well: holder.is_some() && env.is_ok() })
}

/// Every lease of the network, this node's marked with a star.
pub fn leases(flags: &CommonFlags) -> anyhow::Result<Answer> {
    let known = Known::find(flags)?;
    let mut text = String::new();
    for (subnets, value) in &known.leases.leases {
        let star = if Some(*subnets) == known.own { "*" } else { " " };
        let data = value.advertisement.data.as_ref().map_or("", |data| data.get());
        let line =
            format!("{star} {:<24} {:<16} {:<8} {data}", subnets.to_string(), public(value), backend(value));
        writeln!(text, "{}", line.trim_end())?;
    }
    for finding in &known.leases.findings {
        writeln!(text, "! {finding}")?;
    }
    Ok(Answer { text, well: known.leases.findings.is_empty() })
}

/// Where packets of this host to an address go: whose subnet it is, what the kernel has for it, which way it would take.
pub fn explain(flags: &CommonFlags, address: IpAddr) -> anyhow::Result<Answer> {
    let known = Known::find(flags)?;
    let mut text = String::new();
    let cidrs: Vec<Prefix> = known.config.iter().flat_map(|config| config.cidrs()).collect();
    let mut kernel = Kernel::open()?;
    let seen = kernel.observe(&remains(&setup::flannelds_network(flags), cidrs.iter().copied()))?;
    let mut well = true;
    match known
        .leases
        .leases
        .iter()
        .find_map(|(subnets, value)| Some((subnets, holding(subnets, address)?, value)))
    {
        Some((subnets, subnet, _)) if Some(*subnets) == known.own => {
            writeln!(
                text,
                "{address} is in {subnet}, which this host has: its containers are behind its bridge"
            )?;
        }
        Some((_, subnet, value)) => {
            writeln!(text, "{address} is in {subnet}, which {} has ({})", public(value), backend(value))?;
            let facts = about(&seen, subnet, &[value.public(Family::V4), value.public(Family::V6)]);
            well = !facts.is_empty();
            if facts.is_empty() {
                writeln!(text, "the kernel of this host has nothing for that subnet")?;
            }
            facts.iter().try_for_each(|fact| writeln!(text, "  {fact}"))?;
        }
        None => {
            well = false;
            let of_network = cidrs.iter().any(|cidr| cidr.contains(address));
            let place =
                if of_network { "in the network, and in nobody's subnet" } else { "not in the network" };
            writeln!(text, "{address} is {place}")?;
            text.extend(guarded(&mut kernel, &seen, address)?);
        }
    }
    match kernel.way_to(address)? {
        Some(way) if way.local => writeln!(text, "it is an address of this host itself")?,
        Some(way) => {
            let link = way.link.map_or_else(|| "several interfaces".to_owned(), |link| link.to_string());
            let source = way.source.map(|source| format!(" from {source}")).unwrap_or_default();
            writeln!(text, "this host sends it by {link}{source}")?;
        }
        None => {
            well = false;
            writeln!(text, "this host has no route to it")?;
        }
    }
    Ok(Answer { text, well })
}

/// What the next pass would change on this host, as lines that would do so, with the flags that are given; masquerading also if
/// the subnet file says so.
pub fn plan(flags: &CommonFlags) -> anyhow::Result<Answer> {
    let network = setup::flannelds_network(flags);
    let last = cache::read(&flags.state_dir, &network).with_context(|| {
        format!("nothing is known in {} yet: flanneld has had no lease here", flags.state_dir.display())
    })?;
    let config = NetworkConfig::parse(&last.config)?.config;
    let own = last.own.context("flanneld has no lease here yet")?;
    let (_isolation, isolated_from) = watch::channel(BTreeSet::new());
    // It wants the runtime's context, and asks nothing of it.
    let runtime = daemon::runtime()?;
    let _inside = runtime.enter();
    let mut settings =
        setup::agent(flags, &setup::etcd(flags)?, network, Counters::default(), isolated_from)?;
    settings.masquerade |= SubnetEnv::read(&flags.subnet_file).is_ok_and(|env| env.ip_masq);
    settings.uplink.never = Family::BOTH.into_iter().filter_map(|family| own.subnets.of(family)).collect();
    let survey =
        survey::take(&settings, &config, None, None).map_err(|finding| anyhow::anyhow!("{finding}"))?;
    let inputs = Inputs {
        config: Arc::new(config),
        own,
        leases: last.leases,
        uplink: survey.uplink.link,
        sought: settings.uplink.clone(),
        identity: survey.identity,
        isolated_from: BTreeSet::new(),
        former: BTreeSet::new(),
    };
    let lines = preview(Place::of(&settings), &inputs).map_err(anyhow::Error::msg)?;
    let well = lines.is_empty();
    let mut text = if well { "nothing to do: the kernel is as planned\n".to_owned() } else { String::new() };
    lines.iter().try_for_each(|line| writeln!(text, "{line}"))?;
    Ok(Answer { text, well })
}

/// The newest state of the network that can be had.
struct Known {
    leases: Arc<LeaseSet>,
    config: Option<NetworkConfig>,
    own: Option<Subnets>,
}

impl Known {
    /// The store's, else what the agent knew last; then that is said on stderr.
    fn find(flags: &CommonFlags) -> anyhow::Result<Self> {
        let last = cache::read(&flags.state_dir, &setup::flannelds_network(flags));
        // The subnet file is everybody's to read.
        let written = |family| SubnetEnv::previous_subnet(&flags.subnet_file, family);
        let own = last.as_ref().and_then(|last| Some(last.own.as_ref()?.subnets));
        let own = own.or_else(|| Subnets::new(written(Family::V4), written(Family::V6)));
        let parsed = |document: &str| NetworkConfig::parse(document).ok().map(|parsed| parsed.config);
        match daemon::runtime()?.block_on(Self::of_store(flags)) {
            Ok((leases, document)) => Ok(Self { leases, config: document.as_deref().and_then(parsed), own }),
            Err(error) => {
                let last = last.with_context(|| format!("{error:#}; and nothing was known before"))?;
                tracing::warn!("{error:#}; this is what was known last");
                Ok(Self { config: parsed(&last.config), leases: last.leases, own })
            }
        }
    }

    async fn of_store(flags: &CommonFlags) -> anyhow::Result<(Arc<LeaseSet>, Option<String>)> {
        let mut snapshots = setup::etcd(flags)?.network(&setup::flannelds_network(flags)).watch();
        let known = async {
            loop {
                snapshots.changed().await.context("the store cannot be read")?;
                let snapshot = snapshots.borrow_and_update().clone();
                if let Some(down) = snapshot.down {
                    anyhow::bail!("{down}");
                }
                if snapshot.known {
                    return Ok((snapshot.leases, snapshot.config));
                }
            }
        };
        timeout(PATIENCE, known).await.context("the store did not answer")?
    }
}

/// The subnet of a lease that holds an address.
fn holding(subnets: &Subnets, address: IpAddr) -> Option<Prefix> {
    subnets.of(Family::of(address)).filter(|subnet| subnet.contains(address))
}

/// Whether tunnels of this host take packets from an address, if there is a guard that minds.
fn guarded(kernel: &mut Kernel, facts: &Facts, address: IpAddr) -> anyhow::Result<Option<String>> {
    let set = TunnelHost::set(Family::of(address));
    let guard = facts.iter().find_map(|fact| match fact {
        Fact::Table(table) if TunnelHost::are_in(&table.name) => Some(table),
        _ => None,
    });
    let Some(guard) = guard.filter(|guard| guard.sets.contains_key(set)) else { return Ok(None) };
    let is_let_in = |fact: &Fact| matches!(fact, Fact::TunnelHost(host) if host.address == address);
    if facts.iter().any(is_let_in) {
        return Ok(Some("the tunnel takes packets from it: it is a host's with a lease\n".to_owned()));
    }
    let dropped = kernel.netfilter()?.strangers(&guard.name)?.unwrap_or_default();
    Ok(Some(format!(
        "no lease names it: what it sends into the tunnel is dropped; packets dropped so far, of all strangers: {dropped}\n"
    )))
}

/// What is there for a peer's subnet: its route, the neighbor and the forwarding entry that belong to that, and the peer's place in
/// the tunnel's guard; or its policies.
fn about(facts: &Facts, subnet: Prefix, publics: &[Option<IpAddr>]) -> Vec<Fact> {
    let mac = facts.iter().find_map(|fact| match fact {
        Fact::Neighbor(neighbor) if neighbor.ip == subnet.base() => Some(neighbor.mac),
        _ => None,
    });
    let concerned = |fact: &&Fact| match fact {
        Fact::Route(route) => route.destination == subnet,
        Fact::Neighbor(neighbor) => neighbor.ip == subnet.base(),
        Fact::Forward(entry) => Some(entry.mac) == mac,
        Fact::TunnelHost(host) => publics.contains(&Some(host.address)),
        Fact::Policy(policy) => policy.source == subnet || policy.destination == subnet,
        _ => false,
    };
    facts.iter().filter(concerned).cloned().collect()
}

fn backend(value: &LeaseValue) -> &str {
    match value.advertisement.backend.as_str() {
        "" => "-",
        backend => backend,
    }
}

fn public(value: &LeaseValue) -> String {
    let v4 = Some(value.public_ip).filter(|v4| !v4.is_unspecified()).map(IpAddr::from);
    let all: Vec<_> =
        v4.into_iter().chain(value.public_ipv6.map(IpAddr::from)).map(|ip| ip.to_string()).collect();
    all.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::words::addr::Mac;
    use crate::words::fact::{Forward, Neighbor};
    use crate::words::name::LinkName;

    #[test]
    fn what_concerns_a_subnet_is_its_own_and_nobody_elses() {
        let link = LinkName::new("flannel.1").unwrap();
        let peer = |n: u8| {
            let mac = Mac([2, 0, 0, 0, 0, n]);
            let ip = IpAddr::from([10, 100, n, 0]);
            let remote = IpAddr::from([192, 0, 2, n]);
            [Fact::Neighbor(Neighbor { link, ip, mac }), Fact::Forward(Forward { link, mac, remote })]
        };
        let facts: Facts = peer(1).into_iter().chain(peer(2)).collect();
        let found: Facts = about(&facts, "10.100.2.0/24".parse().unwrap(), &[]).into_iter().collect();
        assert_eq!(found, peer(2).into_iter().collect());
        assert!(about(&facts, "10.100.3.0/24".parse().unwrap(), &[]).is_empty());
        let key = Subnets::parse_key("10.100.2.0-24").unwrap();
        assert!(holding(&key, "10.100.2.9".parse().unwrap()).is_some());
        assert!(holding(&key, "10.100.3.9".parse().unwrap()).is_none());
    }
}
