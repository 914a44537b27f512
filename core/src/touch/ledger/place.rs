//! Where a network's ledger lies. There is **one per network and node**, whatever the configurations that share it are called: a
//! marker beside `subnet.env` says where, and every other configuration's directory is a symbolic link to it, so that Go host-local under
//! any of the names finds the same files.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use super::note::Note;
use super::{Entry, HeldLedger, LOCK_DEADLINE, Ledger, LedgerError, flock};
use crate::touch::marker;

/// Where host-local keeps its directories unless told otherwise.
pub const DEFAULT_ROOT: &str = "/var/lib/cni/networks";

/// The file beside `subnet.env` that says where the network's ledger is.
pub fn ledger_marker(subnet_file: &Path) -> PathBuf {
    subnet_file.with_extension("ledger")
}

/// What became of a ledger that was to go.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Retired {
    /// There was none.
    Absent,
    /// It is gone, with its marker and the links to it.
    Gone,
    /// It stays: these addresses are held.
    InUse(Vec<Entry>),
}

impl Ledger {
    /// The ledger of the network that `subnet_file` describes, for a configuration called `name` that keeps its ledgers
    /// under `root`. The first comer's directory is everyone's.
    ///
    /// Ordinarily this is one readlink, or two for a configuration that was not the first.
    pub fn open_for(subnet_file: &Path, root: &Path, name: &str) -> Result<Self, LedgerError> {
        let own = root.join(name);
        let marker = ledger_marker(subnet_file);
        let failed = LedgerError::io("read", &marker);
        let dir = match marker::read(&marker).map_err(failed)? {
            Some(dir) => dir,
            None => {
                fs::create_dir_all(&own).map_err(LedgerError::io("make the directory", &own))?;
                let own = own.canonicalize().map_err(LedgerError::io("follow", &own))?;
                marker::agree(&marker, &own).map_err(LedgerError::io("make", &marker))?
            }
        };
        if own != dir {
            lead(&own, &dir)?;
        }
        Ok(Self { dir })
    }

    /// The ledger of the network if it has one, without making anything: for what only takes back.
    pub fn find(subnet_file: &Path, root: &Path, name: &str) -> Result<Option<Self>, LedgerError> {
        let marker = ledger_marker(subnet_file);
        let failed = LedgerError::io("read", &marker);
        let dir = marker::read(&marker).map_err(failed)?.unwrap_or_else(|| root.join(name));
        Ok(dir.is_dir().then_some(Self { dir }))
    }

    /// Removes the network's ledger if nobody holds an address, with its marker and every link under its root that leads to it.
    pub fn retire(subnet_file: &Path) -> Result<Retired, LedgerError> {
        let marker = ledger_marker(subnet_file);
        let failed = LedgerError::io("read", &marker);
        let Some(dir) = marker::read(&marker).map_err(failed)? else { return Ok(Retired::Absent) };
        if dir.is_dir() {
            let ledger = Self { dir };
            let held = ledger.lock()?;
            match held.entries()? {
                none if none.is_empty() => held.retire()?,
                entries => return Ok(Retired::InUse(entries)),
            }
        }
        marker::withdraw(&marker).map_err(LedgerError::io("remove", &marker))?;
        Ok(Retired::Gone)
    }
}

impl HeldLedger<'_> {
    /// Who waits for the lock meanwhile finds it unlinked and makes a new directory.
    fn retire(&self) -> Result<(), LedgerError> {
        let dir = &self.ledger.dir;
        let root = dir.parent().unwrap_or(dir);
        for entry in fs::read_dir(root).map_err(LedgerError::io("list", root))?.flatten() {
            let path = entry.path();
            if fs::read_link(&path).is_ok_and(|target| target == *dir) {
                fs::remove_file(&path).map_err(LedgerError::io("remove", &path))?;
            }
        }
        empty(dir)?;
        fs::remove_dir(dir).map_err(LedgerError::io("remove", dir))
    }
}

/// Makes `own` lead to `dir`, taking along the entries it may have.
fn lead(own: &Path, dir: &Path) -> Result<(), LedgerError> {
    const TRIES: usize = 4;
    let mut last = None;
    for _ in 0..TRIES {
        match fs::read_link(own) {
            Ok(target) if target == *dir => return Ok(()),
            Ok(other) => {
                // Another way to the same place is as good.
                if same(own, dir) {
                    return Ok(());
                }
                let (name, ledger) = (own.to_owned(), dir.to_owned());
                return Err(LedgerError::Foreign { name, other, ledger });
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {
                if let Some(root) = own.parent() {
                    fs::create_dir_all(root).map_err(LedgerError::io("make the directory", root))?;
                }
            }
            // A real directory (EINVAL from readlink): Go host-local's, from before.
            Err(_) if same(own, dir) => return Ok(()),
            Err(_) => take_over(own, dir)?,
        }
        match symlink(dir, own) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => last = Some(error),
            Err(error) => return Err(LedgerError::io("make", own)(error)),
        }
    }
    let source = last.unwrap_or_else(|| io::Error::from(ErrorKind::ResourceBusy));
    Err(LedgerError::io("make", own)(source))
}

fn same(own: &Path, dir: &Path) -> bool {
    matches!((own.canonicalize(), dir.canonicalize()), (Ok(own), Ok(dir)) if own == dir)
}

/// Moves all entries of `own` into `dir` under both locks, or none if an address is in both; `own` is gone afterwards.
fn take_over(own: &Path, dir: &Path) -> Result<(), LedgerError> {
    // In the order of their names, so that two who do this the other way round do not wait for each other.
    let (first, second) = if own < dir { (own, dir) } else { (dir, own) };
    let _first = flock(first, LOCK_DEADLINE)?;
    let _second = flock(second, LOCK_DEADLINE)?;
    let (from, to) = (names(own)?, names(dir)?);
    if let Some(address) = from.iter().find(|address| to.contains(address)) {
        return Err(LedgerError::Clash { name: own.to_owned(), ledger: dir.to_owned(), address: *address });
    }
    for address in from {
        let file = own.join(address.to_string());
        let target = dir.join(address.to_string());
        // Root and ledger may lie on different file systems, where rename does not reach.
        let moved = fs::rename(&file, &target)
            .or_else(|_| fs::copy(&file, &target).and_then(|_| fs::remove_file(&file)));
        moved.map_err(LedgerError::io("move", &file))?;
    }
    empty(own)?;
    fs::remove_dir(own).map_err(LedgerError::io("remove", own))
}

fn names(dir: &Path) -> Result<Vec<std::net::IpAddr>, LedgerError> {
    let files = fs::read_dir(dir).map_err(LedgerError::io("list", dir))?;
    Ok(files.flatten().filter_map(|file| file.file_name().to_str()?.parse().ok()).collect())
}

/// Removes what a ledger holds beside entries.
fn empty(dir: &Path) -> Result<(), LedgerError> {
    for file in fs::read_dir(dir).map_err(LedgerError::io("list", dir))?.flatten() {
        let name = file.file_name();
        let name = name.to_string_lossy();
        let ours = name == "lock" || name.starts_with("boot_id") || name.starts_with("last_reserved_ip.");
        if ours || Note::parse(&name).is_some() {
            let path = file.path();
            fs::remove_file(&path).map_err(LedgerError::io("remove", &path))?;
        }
    }
    Ok(())
}
