//! Taking away what flannel made on this host, without an agent running.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::Path;

use anyhow::{Context, bail};

use super::cli::CommonFlags;
use super::extension::{self, Extension};
use super::health::Counters;
use super::store::NetworkStore;
use super::{cache, hold, ipsec, setup};
use crate::act::pass::converge;
use crate::decide::bridge::masquerade_table;
use crate::decide::{self, plan, publish};
use crate::touch::ledger::{DEFAULT_ROOT, Ledger, Retired};
use crate::touch::marker;
use crate::touch::other_agents::OtherAgent;
use crate::touch::subnet_env::SubnetEnv;
use crate::touch::world::kernel::Kernel;
use crate::words::addr::{InterfaceAddress, Mac, Prefix};
use crate::words::config::NetworkConfig;
use crate::words::fact::Facts;
use crate::words::name::{LinkName, NetworkName};
use crate::words::territory::Territory;

/// Where the CNI plugin keeps what it was called with, unless its configuration says otherwise.
const CNI_DATA: &str = "/var/lib/cni/flannel";

/// Removes devices, routes, rules, files and the lease of a network. Containers that still use it keep it: then nothing
/// is done and the text says who they are.
pub async fn everything(flags: &CommonFlags, store: NetworkStore) -> anyhow::Result<()> {
    let network = store.name().clone();
    let subnet_file = setup::subnet_file(flags, &network);
    let hold = hold::take(&subnet_file, &network).context("stop it first")?;
    ledger(&subnet_file)?;
    let last = cache::read(&flags.state_dir, &network).unwrap_or_default();
    let configured = NetworkConfig::parse(&last.config)
        .into_iter()
        .flat_map(|parsed| parsed.config.cidrs().collect::<Vec<_>>());
    let written = SubnetEnv::read(&subnet_file).map(|env| env.networks).unwrap_or_default();
    let cidrs: BTreeSet<Prefix> = configured.chain(written).collect();
    let bridge = bridge(&subnet_file, &network);
    kernel(&network, cidrs.clone(), bridge)?;
    ipsec::retire(&network, cidrs).await;
    commands(flags, &network).await;
    if let Some(own) = last.own
        && let Err(error) = store.release(&own.subnets, &own.value).await
    {
        tracing::warn!("the lease {} stays in the store until it expires: {error}", own.subnets);
    }
    traces(&subnet_file, &flags.state_dir, &network)?;
    drop(hold);
    hold::remove(&subnet_file, &network);
    // The directories are ours if they are empty; the CNI plugin's, too.
    let _ = subnet_file.parent().map(fs::remove_dir);
    for directory in [&flags.state_dir, Path::new(CNI_DATA), Path::new(DEFAULT_ROOT)] {
        let _ = fs::remove_dir(directory);
    }
    Ok(())
}

/// Whether another agent serves a network on this host: then only what a reader made is anybody's to remove.
pub fn served_by_another(subnet_file: &Path, network: &NetworkName) -> anyhow::Result<bool> {
    let door = hold::Door::open(subnet_file, network)?;
    Ok(door.holder()?.is_some() || OtherAgent::find(subnet_file, door.file()).is_some())
}

/// What a reader made on this host for a network that another agent serves: its rules, and the bridge and the ledger
/// unless other containers use them. Everything else is the other agent's.
pub fn reader(subnet_file: &Path, network: &NetworkName) -> anyhow::Result<()> {
    let mut kernel = Kernel::open()?;
    let mut territory = decide::reader::remains(network);
    territory.tables.insert(publish::table_name(network));
    let unused =
        !matches!(Ledger::retire(subnet_file).context("could not remove the ledger")?, Retired::InUse(_));
    if unused {
        let bridge = bridge(subnet_file, network);
        // One of another MAC was made by somebody else: the CNI plugins leave theirs without containers.
        let ours = |gateway: InterfaceAddress| Mac::for_address(gateway.address());
        let gateways = SubnetEnv::read(subnet_file).map(|env| env.gateways()).unwrap_or_default();
        let mac = kernel.link(bridge)?.and_then(|link| link.mac);
        if mac.is_some() && gateways.into_iter().map(ours).any(|ours| Some(ours) == mac) {
            territory.links.insert(bridge);
        }
    }
    take_away(&mut kernel, &territory)?;
    if unused {
        marker::withdraw(&marker::bridge_marker(subnet_file))?;
        let _ = fs::remove_dir(DEFAULT_ROOT);
    }
    Ok(())
}

/// The name that the first comer chose, else the one by rule.
fn bridge(subnet_file: &Path, network: &NetworkName) -> LinkName {
    let said = marker::read(&marker::bridge_marker(subnet_file)).ok().flatten();
    said.and_then(|said| said.to_str().and_then(|name| LinkName::new(name).ok()))
        .unwrap_or_else(|| network.bridge())
}

/// Removes the ledger if nobody holds an address.
fn ledger(subnet_file: &Path) -> anyhow::Result<()> {
    match Ledger::retire(subnet_file).context("could not remove the ledger")? {
        Retired::Absent | Retired::Gone => Ok(()),
        Retired::InUse(entries) => {
            let held: Vec<_> =
                entries.iter().map(|entry| format!("{} ({})", entry.address, entry.owner)).collect();
            bail!("containers still hold addresses: {}; remove the containers first", held.join(", "))
        }
    }
}

/// Has the extension backend's commands take away what they made.
async fn commands(flags: &CommonFlags, network: &NetworkName) {
    match extension::stands(network, &flags.state_dir) {
        true if flags.allow_extension => {
            Extension::spawn(network, &flags.state_dir, Counters::default()).retire().await;
        }
        true => tracing::warn!(
            "what the commands of the extension backend made stays; with --allow-extension they would take it away"
        ),
        false => {}
    }
}

fn kernel(network: &NetworkName, cidrs: BTreeSet<Prefix>, bridge: LinkName) -> anyhow::Result<()> {
    let mut kernel = Kernel::open()?;
    let mut territory = plan::remains(network, cidrs);
    territory.links.insert(bridge);
    territory.tables.insert(masquerade_table(bridge));
    take_away(&mut kernel, &territory)
}

fn take_away(kernel: &mut Kernel, territory: &Territory) -> anyhow::Result<()> {
    let report = converge(kernel, territory, &Facts::default())?;
    for made in &report.made {
        tracing::info!("{} {}: {}", made.kind, made.verb, made.text);
    }
    match report.failed.first() {
        Some((made, cause)) => bail!("{cause} ({})", made.text),
        None => Ok(()),
    }
}

/// Removes the files that describe a network on this host.
pub(super) fn traces(subnet_file: &Path, state_dir: &Path, network: &NetworkName) -> io::Result<()> {
    let absent_is_fine = |result: io::Result<()>| match result {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    };
    absent_is_fine(fs::remove_file(subnet_file))?;
    marker::withdraw(&marker::bridge_marker(subnet_file))?;
    absent_is_fine(fs::remove_dir_all(cache::directory(state_dir, network)))
}
