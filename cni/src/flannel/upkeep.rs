//! GC and STATUS: what the runtime asks for between containers.

use std::fs;
use std::io::ErrorKind;
use std::time::SystemTime;

use flannel_core::act::pass::chain;
use flannel_core::touch::ledger::{Entry, Ledger, Released};
use flannel_core::touch::marker;
use flannel_core::touch::subnet_env::SubnetEnv;
use flannel_core::touch::world::kernel::Kernel;
use flannel_core::words::name::{Attachment, LinkName};

use super::conf::{FlannelConf, Worker};
use super::scratch::{Kept, Scratch};
use super::{delegation, retire, sets, subnet_env};
use crate::args::{Call, is_identifier};
use crate::extras::Extras;
use crate::go_leftovers;
use crate::json::flag;
use crate::result::{Answer, CniError};
use crate::upkeep::{self, CachedElsewhere, Collected, Place};

/// Takes back what belongs to attachments that are no more. Goes on after a failure, and reports them all.
pub(super) fn gc(call: &Call, conf: &FlannelConf<'_>) -> Result<Answer, CniError> {
    let start = SystemTime::now();
    // The runtime did not say what is in use: that is not "nothing".
    let Some(valid) = &conf.common.valid else { return Ok(Answer::Nothing) };
    if let Worker::Plugin(kind) = conf.worker() {
        return delegation::gc(call, conf, &kind, valid);
    }
    let mut failed = Vec::new();
    // Closed last.
    let mut rules = Vec::new();
    match collect(conf, valid) {
        Ok(collected) => {
            failed.extend(collected.failed);
            for owner in &collected.buried {
                let kept = Scratch::of(conf, owner).read().filter(Kept::is_upstreams);
                match kept.map(|_| go_leftovers::remove(&conf.common.name, owner)) {
                    Some(Ok(socket)) => rules.push(socket),
                    Some(Err(error)) => failed.push(CniError::from(error).to_string()),
                    None => {}
                }
            }
            remove_scratch(conf, valid, &collected.left, start);
            let left = collected.left.iter().map(|entry| entry.address).collect();
            let released = Released { addresses: collected.freed, left, siblings: false };
            failed.extend(retire(call, conf, &released).err().map(|error| error.to_string()));
        }
        Err(error) => failed.push(error.to_string()),
    }
    if flag(&conf.delegate, "macspoofchk")?.unwrap_or(false)
        && let Err(error) = Kernel::open().and_then(|mut host| host.lift_stray_guards())
    {
        failed.push(chain(&error));
    }
    if let Err(error) = Extras::gc(conf.common, valid) {
        failed.push(error.to_string());
    }
    match failed.is_empty() {
        true => Ok(Answer::Nothing),
        false => Err(CniError::leftover(failed.join("; "))),
    }
}

fn collect(conf: &FlannelConf<'_>, valid: &[Attachment]) -> Result<Collected, CniError> {
    let found = Ledger::find(&conf.subnet_file, &conf.ledger_root(), &conf.common.name)?;
    let Some(ledger) = found else { return Ok(Collected::default()) };
    let network = conf.network();
    let sets = SubnetEnv::read(&conf.subnet_file).ok().and_then(|env| sets(&env).ok()).unwrap_or_default();
    let place = Place { ledger: &ledger, network: network.as_str(), bridge: bridge_name(conf), sets: &sets };
    let elsewhere = CachedElsewhere::read(&conf.common.name);
    upkeep::collect(&place, valid, &|host, owner| is_mine(host, conf, &elsewhere, owner))
}

/// The node's bridge of this network, without settling anything.
fn bridge_name(conf: &FlannelConf<'_>) -> LinkName {
    let said = marker::read(&marker::bridge_marker(&conf.subnet_file)).ok().flatten();
    let said = said.and_then(|name| LinkName::new(name.to_str()?).ok());
    said.unwrap_or_else(|| conf.network().bridge())
}

/// False if another configuration that shares the ledger made the attachment, whose runtime we did not hear.
fn is_mine(
    host: &mut Kernel,
    conf: &FlannelConf<'_>,
    elsewhere: &CachedElsewhere,
    owner: &Attachment,
) -> Result<bool, CniError> {
    if elsewhere.holds(owner) {
        return Ok(false);
    }
    let scratch = Scratch::of(conf, owner);
    match scratch.read() {
        Some(kept) => Ok(kept.name().is_none_or(|name| name == conf.common.name)),
        // One that cannot be read was written by a process that died, as ours do or upstream's.
        None if scratch.exists() => Ok(true),
        // Without a file it is not of this configuration: alive if it shows, else what something left.
        None => Ok(!host.link_exists(owner.host_link(conf.network().as_str()))?),
    }
}

/// Removes the files of containers that have nothing here any more, as far as they are of this configuration, and older than
/// this call: an ADD writes the file before it claims an address.
fn remove_scratch(conf: &FlannelConf<'_>, valid: &[Attachment], left: &[Entry], start: SystemTime) {
    let files = match fs::read_dir(&conf.data_dir) {
        Ok(files) => files,
        Err(error) => {
            if error.kind() != ErrorKind::NotFound {
                say!("flannel: could not list {}: {error}", conf.data_dir.display());
            }
            return;
        }
    };
    let lives = |container: &str| {
        valid.iter().any(|valid| valid.container == container)
            || left.iter().any(|entry| entry.owner.container == container)
    };
    for file in files.flatten() {
        let Ok(container) = file.file_name().into_string() else { continue };
        let old = file
            .metadata()
            .is_ok_and(|file| file.is_file() && file.modified().is_ok_and(|modified| modified <= start));
        if !old || !is_identifier(&container) || lives(&container) {
            continue;
        }
        let scratch = Scratch::of(conf, &Attachment { container, interface: String::new() });
        let ours = |kept: Kept| {
            kept.worker() == Worker::Ourselves && kept.name().is_none_or(|name| name == conf.common.name)
        };
        if scratch.read().is_none_or(ours) {
            scratch.remove();
        }
    }
}

/// Whether an ADD could succeed now, and whether containers are cut off.
pub(super) fn status(call: &Call, conf: &FlannelConf<'_>) -> Result<Answer, CniError> {
    let env = subnet_env(conf, CniError::UNAVAILABLE)?;
    if let Worker::Plugin(kind) = conf.worker() {
        return delegation::status(call, conf, &env, &kind);
    }
    let unavailable = |error: CniError| CniError { code: CniError::UNAVAILABLE, ..error };
    let sets = sets(&env).map_err(unavailable)?;
    let found = Ledger::find(&conf.subnet_file, &conf.ledger_root(), &conf.common.name)
        .map_err(|error| unavailable(error.into()))?;
    let Some(ledger) = found else { return Ok(Answer::Nothing) };
    let network = conf.network();
    let place = Place { ledger: &ledger, network: network.as_str(), bridge: bridge_name(conf), sets: &sets };
    upkeep::status(&place)?;
    Ok(Answer::Nothing)
}
