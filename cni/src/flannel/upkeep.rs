//! GC and STATUS: what the runtime asks for between containers.

use std::fs;

use flannel_core::act::pass::chain;
use flannel_core::touch::ledger::{Entry, Ledger};
use flannel_core::touch::world::kernel::Kernel;
use flannel_core::words::code::Code;
use flannel_core::words::name::Attachment;

use super::conf::{FlannelConf, Worker};
use super::scratch::{Kept, Scratch};
use super::{delegation, sets, subnet_env};
use crate::args::Call;
use crate::extras::Extras;
use crate::json::flag;
use crate::result::{Answer, CniError};

/// Takes back what belongs to attachments that are no more. Goes on after a failure, and reports them all.
pub(super) fn gc(call: &Call, conf: &FlannelConf<'_>) -> Result<Answer, CniError> {
    // The runtime did not say what is in use: that is not "nothing".
    let Some(valid) = &conf.common.valid else { return Ok(Answer::Nothing) };
    if let Worker::Plugin(kind) = conf.worker() {
        return delegation::gc(call, conf, &kind, valid);
    }
    let found = Ledger::find(&conf.subnet_file, &conf.ledger_root(), &conf.common.name)?;
    let Some(ledger) = found else { return Ok(Answer::Nothing) };
    let entries = ledger.lock().and_then(|held| held.entries())?;
    let elsewhere = cached_elsewhere(conf);
    let mut host = Kernel::open()?;
    let (mut dead, mut failed): (Vec<&Entry>, Vec<String>) = (Vec::new(), Vec::new());
    // Deleting an interface takes the kernel long; nobody has to wait for the ledger meanwhile.
    for entry in entries.iter().filter(|entry| !entry.is_docker() && !valid.contains(&entry.owner)) {
        match bury(&mut host, conf, &elsewhere, &entry.owner) {
            Ok(true) => dead.push(entry),
            Ok(false) => {}
            Err(error) => failed.push(format!("{}: {error}", entry.owner)),
        }
    }
    let held = ledger.lock()?;
    for entry in &dead {
        let freed = held.owner(entry.address).and_then(|owner| match owner.as_ref() == Some(&entry.owner) {
            true => held.release_address(entry.address),
            false => Ok(()),
        });
        match freed {
            Ok(()) => {}
            Err(error) => failed.push(format!("{}: {error}", entry.address)),
        }
    }
    let left = held.entries()?;
    drop(held);
    for entry in dead {
        if !left.iter().any(|other| other.owner.container == entry.owner.container) {
            Scratch::of(conf, &entry.owner).remove();
        }
    }
    if flag(&conf.delegate, "macspoofchk")?.unwrap_or(false)
        && let Err(error) = host.lift_stray_guards()
    {
        failed.push(chain(&error));
    }
    if let Err(error) = Extras::gc(conf.common, valid) {
        failed.push(error.to_string());
    }
    match failed.is_empty() {
        true => Ok(Answer::Nothing),
        false => {
            let code = Code::LEFTOVER;
            Err(CniError::new(code.number().into(), code.title()).with_details(failed.join("; ")))
        }
    }
}

/// Deletes an attachment's veth pair; false if another configuration that shares the ledger made it, whose runtime
/// we did not hear.
fn bury(
    host: &mut Kernel,
    conf: &FlannelConf<'_>,
    elsewhere: &[String],
    owner: &Attachment,
) -> Result<bool, CniError> {
    let link = owner.host_link(conf.network().as_str());
    let kept = Scratch::of(conf, owner).read();
    match kept.as_ref().and_then(Kept::name) {
        Some(name) if name != conf.common.name => return Ok(false),
        Some(_) => {}
        // Without a file it is not of this configuration: alive if it shows, else what something left.
        None if host.link_exists(link)? => return Ok(false),
        None => {}
    }
    let result = format!("-{}-{}", owner.container, owner.interface);
    if elsewhere.iter().any(|name| name.ends_with(&result)) {
        return Ok(false);
    }
    host.delete_link(link)?;
    Ok(true)
}

/// Results that libcni keeps for attachments of other configurations (libcni/api.go: `NAME-CONTAINER-INTERFACE`).
fn cached_elsewhere(conf: &FlannelConf<'_>) -> Vec<String> {
    const RESULTS: &str = "/var/lib/cni/results";
    let ours = format!("{}-", conf.common.name);
    let files = fs::read_dir(RESULTS).into_iter().flatten().flatten();
    files
        .map(|file| file.file_name().to_string_lossy().into_owned())
        .filter(|name| !name.starts_with(&ours))
        .collect()
}

/// Whether an ADD could succeed now.
pub(super) fn status(call: &Call, conf: &FlannelConf<'_>) -> Result<Answer, CniError> {
    let env = subnet_env(conf, CniError::UNAVAILABLE)?;
    if let Worker::Plugin(kind) = conf.worker() {
        return delegation::status(call, conf, &env, &kind);
    }
    let unavailable = |error: CniError| CniError { code: CniError::UNAVAILABLE, ..error };
    let sets = sets(&env).map_err(unavailable)?;
    let found = Ledger::find(&conf.subnet_file, &conf.ledger_root(), &conf.common.name)?;
    let Some(ledger) = found else { return Ok(Answer::Nothing) };
    let taken = ledger.lock().and_then(|held| held.addresses()).map_err(|error| unavailable(error.into()))?;
    for set in sets {
        if set.taken(&taken) >= set.capacity() {
            return Err(CniError::new(
                CniError::UNAVAILABLE,
                format!("no free address: all {} of {set} are taken", set.capacity()),
            ));
        }
    }
    Ok(Answer::Nothing)
}
