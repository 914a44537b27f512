//! Who holds which address of a node's subnet: host-local's directory, shared by our CNI plugin, our Docker driver and Go
//! host-local (containernetworking/plugins, plugins/ipam/host-local/backend/disk).
//!
//! One file per address, named by it, holding `<container>\r\n<interface>`. Creating the file exclusively is the claim; a flock on
//! `lock` serialises everything else; `last_reserved_ip.<n>` is where the next search starts. `ls` is the debugger. Ours beside that:
//! `boot_id`, because no CNI container survives a reboot and its entries must not either, and a note for each entry (see `note`).
//! Entries of Docker endpoints (their container begins with `docker:`) are not dropped at a reboot: the engine starts its containers
//! again and the driver reconciles them.

mod note;
mod place;

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::net::IpAddr;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use self::note::Note;
use crate::words::name::Attachment;

pub use place::{DEFAULT_ROOT, Retired, ledger_marker};

/// Longest wait for the lock. host-local holds it for milliseconds; a holder that hangs must not hang every container of the node.
pub const LOCK_DEADLINE: Duration = Duration::from_secs(10);

/// The container part of an entry that belongs to a Docker endpoint begins so; no CNI container id can.
pub const DOCKER: &str = "docker:";

/// Why the ledger could not be used.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// A file or directory of it could not be read or written.
    #[error("could not {action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Another process holds the lock and does not let go.
    #[error("{path} is still locked by another process after {} s: look who holds it with `fuser {path}`", .waited.as_secs())]
    Locked {
        /// The lock file.
        path: PathBuf,
        /// How long it was tried.
        waited: Duration,
    },
    /// The address has an owner.
    #[error("{address} is already taken by {owner}")]
    Taken {
        /// The address asked for.
        address: IpAddr,
        /// Who holds it.
        owner: Attachment,
    },
    /// The name that a second configuration gives this ledger already leads to entries that this ledger has too.
    #[error(
        "{name} and {ledger} are ledgers of the same subnet and both hold {address}: stop one of the two containers, then try again"
    )]
    Clash {
        /// Directory of the second configuration.
        name: PathBuf,
        /// The network's ledger.
        ledger: PathBuf,
        /// An address in both.
        address: IpAddr,
    },
    /// The name is taken by another network's ledger.
    #[error(
        "{name} leads to {other}, the ledger of another network; this network's is {ledger}: give the configuration another name"
    )]
    Foreign {
        /// Directory of the configuration.
        name: PathBuf,
        /// Where it leads.
        other: PathBuf,
        /// The network's ledger.
        ledger: PathBuf,
    },
}

impl LedgerError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }
}

/// The ledger of one network on this node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ledger {
    dir: PathBuf,
}

/// An address and who holds it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Entry {
    /// The address.
    pub address: IpAddr,
    /// Its holder. Entries of very old host-locals name no interface; it is empty then.
    pub owner: Attachment,
}

impl Entry {
    /// Whether a Docker endpoint holds it.
    pub fn is_docker(&self) -> bool {
        self.owner.container.starts_with(DOCKER)
    }
}

/// The files of a ledger at one moment.
#[derive(Clone, Debug, Default)]
pub struct Listing {
    addresses: BTreeSet<IpAddr>,
    notes: Vec<Note>,
}

impl Listing {
    /// Every address that has an entry.
    pub fn addresses(&self) -> &BTreeSet<IpAddr> {
        &self.addresses
    }

    fn has_note(&self, address: IpAddr) -> bool {
        self.notes.iter().any(|note| note.address == address)
    }
}

/// Who makes the attachment that an address is claimed for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Maker {
    /// This program: the host's end of its veth pair has the attachment's name.
    Ourselves,
    /// Whoever asked for the address.
    Asker,
}

/// An address of an attachment that is being made: as long as this lives, nobody takes the entry for a dead one's.
#[derive(Debug)]
pub struct Claim {
    _file: Flock<File>,
}

/// What was given back.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Released {
    /// The addresses that were freed.
    pub addresses: Vec<IpAddr>,
    /// The addresses that are held further on, by whomever.
    pub left: BTreeSet<IpAddr>,
    /// Whether other interfaces of the same container hold some of them.
    pub siblings: bool,
}

impl Ledger {
    /// The ledger in this directory. To find a network's, use [`Ledger::open_for`].
    pub fn at(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Locks it, makes it if need be, and drops what an earlier boot left. Waits at most [`LOCK_DEADLINE`].
    pub fn lock(&self) -> Result<HeldLedger<'_>, LedgerError> {
        self.lock_within(LOCK_DEADLINE, &boot_id()?)
    }

    /// Who holds what, without locking and without making anything: for who only looks. A ledger that is not there is empty;
    /// an entry that is being written at this moment may be missing.
    pub fn look(&self) -> Result<Vec<Entry>, LedgerError> {
        let files = match fs::read_dir(&self.dir) {
            Ok(files) => files,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(LedgerError::Io { action: "list", path: self.dir.clone(), source }),
        };
        let mut entries = Vec::new();
        for file in files {
            let name = file.map_err(LedgerError::io("list", &self.dir))?.file_name();
            let Some(address) = name.to_str().and_then(|name| name.parse::<IpAddr>().ok()) else { continue };
            // Given back since it was listed: not there.
            let text = fs::read_to_string(self.dir.join(name)).unwrap_or_default();
            entries.extend(parse(&text).map(|owner| Entry { address, owner }));
        }
        Ok(entries)
    }

    fn lock_within(&self, deadline: Duration, boot_id: &str) -> Result<HeldLedger<'_>, LedgerError> {
        let held = HeldLedger { ledger: self, _lock: flock(&self.dir, deadline)? };
        held.forget_earlier_boots(boot_id)?;
        Ok(held)
    }
}

/// A ledger while nobody else can change it. Dropping it unlocks.
#[derive(Debug)]
pub struct HeldLedger<'a> {
    ledger: &'a Ledger,
    _lock: Flock<File>,
}

impl HeldLedger<'_> {
    /// One directory listing.
    pub fn list(&self) -> Result<Listing, LedgerError> {
        let dir = &self.ledger.dir;
        let mut listing = Listing::default();
        for file in fs::read_dir(dir).map_err(LedgerError::io("list", dir))? {
            let name = file.map_err(LedgerError::io("list", dir))?.file_name();
            let Some(name) = name.to_str() else { continue };
            match Note::parse(name) {
                Some(note) => listing.notes.push(note),
                None => listing.addresses.extend(name.parse::<IpAddr>().ok()),
            }
        }
        Ok(listing)
    }

    /// Every address that has a file, without looking at who holds it: one directory listing.
    pub fn addresses(&self) -> Result<BTreeSet<IpAddr>, LedgerError> {
        self.list().map(|listing| listing.addresses)
    }

    /// Every entry, by address. Files without an owner (their writer died while it held the lock) are removed, and so are notes
    /// that are wrong: somebody removed or changed the entry by hand.
    pub fn entries(&self) -> Result<Vec<Entry>, LedgerError> {
        let listing = self.list()?;
        let mut entries = Vec::new();
        for address in listing.addresses {
            match self.owner(address)? {
                Some(owner) => entries.push(Entry { address, owner }),
                None => self.remove(&self.file(address))?,
            }
        }
        for note in listing.notes {
            let true_of = |entry: &Entry| Note::of(entry.address, &entry.owner) == note;
            if !entries.iter().any(true_of) {
                self.remove(&self.ledger.dir.join(note.file()))?;
            }
        }
        Ok(entries)
    }

    /// What this attachment holds, and other interfaces of its container. Reads only the entries that the listing's notes lead to, and
    /// those without a note.
    pub fn entries_of(&self, listing: &Listing, container: &str) -> Result<Vec<Entry>, LedgerError> {
        let owner = Attachment { container: container.to_owned(), interface: String::new() };
        let of_container = |note: &&Note| note.same_container(&Note::of(note.address, &owner));
        let noted = listing.notes.iter().filter(of_container).map(|note| note.address);
        let unknown = listing.addresses.iter().copied().filter(|address| !listing.has_note(*address));
        let mut entries = Vec::new();
        for address in noted.chain(unknown).collect::<BTreeSet<_>>() {
            let owner = self.owner(address)?.filter(|owner| owner.container == container);
            entries.extend(owner.map(|owner| Entry { address, owner }));
        }
        Ok(entries)
    }

    /// Claims exactly this address.
    pub fn claim(&self, address: IpAddr, owner: &Attachment) -> Result<(), LedgerError> {
        self.begin(address, owner, Maker::Asker).map(drop)
    }

    /// The same for an attachment that is not there yet.
    pub fn begin(&self, address: IpAddr, owner: &Attachment, maker: Maker) -> Result<Claim, LedgerError> {
        let path = self.file(address);
        let open = || OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        let file = match open() {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                if let Some(owner) = self.owner(address)? {
                    return Err(LedgerError::Taken { address, owner });
                }
                self.remove(&path)?;
                open()
            }
            other => other,
        };
        let written = file.and_then(|file| {
            let mut file = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| errno)?;
            file.write_all(line(owner).as_bytes())?;
            Ok(Claim { _file: file })
        });
        let claim = written.map_err(|source| {
            // An entry without its owner would be reclaimed anyway; do not leave it to that.
            let _ = fs::remove_file(&path);
            LedgerError::Io { action: "write", path: path.clone(), source }
        })?;
        self.note(address, owner, maker);
        Ok(claim)
    }

    /// The same for an address that the attachment holds already; none while somebody else is making this very attachment.
    pub fn begin_again(&self, address: IpAddr) -> Result<Option<Claim>, LedgerError> {
        let path = self.file(address);
        let file = File::open(&path).map_err(LedgerError::io("open", &path))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(file) => Ok(Some(Claim { _file: file })),
            Err((_, Errno::EWOULDBLOCK)) => Ok(None),
            Err((_, errno)) => Err(LedgerError::Io { action: "lock", path, source: errno.into() }),
        }
    }

    /// When the entry was made; none if it cannot be told.
    pub fn since(&self, address: IpAddr) -> Option<SystemTime> {
        fs::metadata(self.file(address)).and_then(|file| file.modified()).ok()
    }

    /// Whether this program made the attachment. host-local writes no notes.
    pub fn is_ours(&self, entry: &Entry) -> bool {
        let note = Note::of(entry.address, &entry.owner);
        let target = fs::read_link(self.ledger.dir.join(note.file()));
        target.is_ok_and(|target| target.as_os_str() == note.target(Maker::Ourselves).as_str())
    }

    /// Gives an entry to another owner, in one step: Docker asks for an address before it names the endpoint.
    pub fn reassign(&self, address: IpAddr, owner: &Attachment) -> Result<(), LedgerError> {
        self.forget(address, self.owner(address)?.as_ref())?;
        let path = self.file(address);
        let temporary = self.ledger.dir.join(format!("reassign.{address}"));
        let written = fs::write(&temporary, line(owner)).and_then(|()| fs::rename(&temporary, &path));
        written.map_err(LedgerError::io("write", &path))?;
        self.note(address, owner, Maker::Asker);
        Ok(())
    }

    /// Who holds the address; none if nobody does, or nobody that can be named.
    pub fn owner(&self, address: IpAddr) -> Result<Option<Attachment>, LedgerError> {
        let path = self.file(address);
        match read_short(&path) {
            Ok(text) => Ok(parse(&text)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(source) => Err(LedgerError::Io { action: "read", path, source }),
        }
    }

    /// Frees everything this attachment holds. As host-local does, entries that name no interface are taken for the
    /// container's if nothing matches in full.
    pub fn release(&self, owner: &Attachment) -> Result<Released, LedgerError> {
        let listing = self.list()?;
        let of = |entries: &[Entry], wanted: &Attachment| -> Vec<IpAddr> {
            entries.iter().filter(|entry| entry.owner == *wanted).map(|entry| entry.address).collect()
        };
        let mut entries = self.entries_of(&listing, &owner.container)?;
        let mut addresses = of(&entries, owner);
        let mut held = listing.addresses;
        if addresses.is_empty() {
            // Before this is taken for nothing to do: notes are only hints.
            entries = self.entries()?;
            held = entries.iter().map(|entry| entry.address).collect();
            addresses = of(&entries, owner);
        }
        if addresses.is_empty() {
            addresses =
                of(&entries, &Attachment { container: owner.container.clone(), interface: String::new() });
        }
        for address in &addresses {
            self.release_address(*address)?;
        }
        held.retain(|address| !addresses.contains(address));
        let sibling =
            |entry: &Entry| entry.owner.container == owner.container && !addresses.contains(&entry.address);
        Ok(Released { siblings: entries.iter().any(sibling), addresses, left: held })
    }

    /// Frees one address, whoever holds it; nothing happens if nobody does.
    pub fn release_address(&self, address: IpAddr) -> Result<(), LedgerError> {
        self.forget(address, self.owner(address)?.as_ref())?;
        self.remove(&self.file(address))
    }

    /// The address given out last for the n-th subnet (0: the first one, whatever its family), where the next search starts.
    /// Anything unreadable is none: it is a hint.
    pub fn last(&self, index: usize) -> Option<IpAddr> {
        read_short(&self.last_file(index)).ok()?.trim().parse().ok()
    }

    /// Remembers the address given out last.
    pub fn set_last(&self, index: usize, address: IpAddr) -> Result<(), LedgerError> {
        let path = self.last_file(index);
        fs::write(&path, address.to_string()).map_err(LedgerError::io("write", &path))
    }

    /// No container of CNI survives a reboot, so no entry of one may. A ledger without `boot_id` was host-local's alone so
    /// far, and may be of this boot: nothing is dropped then.
    fn forget_earlier_boots(&self, now: &str) -> Result<(), LedgerError> {
        let path = self.ledger.dir.join("boot_id");
        let known = match read_short(&path) {
            Ok(known) if known.trim() == now => return Ok(()),
            Ok(known) => Some(known),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(source) => return Err(LedgerError::Io { action: "read", path, source }),
        };
        // Never empty by a crash of ours; by one of the host it may be.
        if known.is_some() {
            for entry in self.entries()?.iter().filter(|entry| !entry.is_docker()) {
                self.release_address(entry.address)?;
            }
        }
        let temporary = self.ledger.dir.join("boot_id.new");
        let written = fs::write(&temporary, now).and_then(|()| fs::rename(&temporary, &path));
        written.map_err(LedgerError::io("write", &path))
    }

    /// A hint only; without it the entry is read when it need not be.
    fn note(&self, address: IpAddr, owner: &Attachment, maker: Maker) {
        let note = Note::of(address, owner);
        let _ = symlink(note.target(maker), self.ledger.dir.join(note.file()));
    }

    fn forget(&self, address: IpAddr, owner: Option<&Attachment>) -> Result<(), LedgerError> {
        match owner {
            Some(owner) => self.remove(&self.ledger.dir.join(Note::of(address, owner).file())),
            None => Ok(()),
        }
    }

    fn remove(&self, path: &Path) -> Result<(), LedgerError> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(LedgerError::Io { action: "remove", path: path.to_owned(), source: error })
            }
            _ => Ok(()),
        }
    }

    fn file(&self, address: IpAddr) -> PathBuf {
        self.ledger.dir.join(address.to_string())
    }

    fn last_file(&self, index: usize) -> PathBuf {
        self.ledger.dir.join(format!("last_reserved_ip.{index}"))
    }
}

/// What host-local writes: CRLF between the two, none at the end.
fn line(owner: &Attachment) -> String {
    format!("{}\r\n{}", owner.container, owner.interface)
}

/// Reads what host-local, its predecessors (no interface) and others (a bare line feed) write; none for an empty file.
fn parse(text: &str) -> Option<Attachment> {
    let mut lines = text.trim().lines();
    // A host that lost power may leave zeros where the text was.
    let container = lines.next().filter(|container| !container.is_empty() && !container.contains('\0'))?;
    let interface = lines.next().unwrap_or_default();
    Some(Attachment { container: container.to_owned(), interface: interface.to_owned() })
}

/// Identity of the running boot (Documentation/admin-guide/sysctl/kernel.rst, random).
fn boot_id() -> Result<String, LedgerError> {
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    let text = read_short(path).map_err(LedgerError::io("read", path))?;
    Ok(text.trim().to_owned())
}

/// Reads a file of a short line or two in a single read: these are on the path of every container, and `fs::read` asks
/// for the size first and for more afterwards. The longest is an entry; container ids are file names, 255 bytes at most.
fn read_short(path: &Path) -> io::Result<String> {
    let mut buffer = [0; 512];
    let len = File::open(path)?.read(&mut buffer)?;
    Ok(String::from_utf8_lossy(buffer.get(..len).unwrap_or_default()).into_owned())
}

/// Locks the directory's `lock` file, making both if need be.
fn flock(dir: &Path, deadline: Duration) -> Result<Flock<File>, LedgerError> {
    const PAUSE_FIRST: Duration = Duration::from_micros(200);
    const PAUSE_MAX: Duration = Duration::from_millis(5);
    let path = dir.join("lock");
    let start = Instant::now();
    let mut pause = PAUSE_FIRST;
    let mut file = open_lock(dir, &path)?;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => {
                // Somebody may have removed the empty ledger while we waited; then this lock guards nothing.
                if lock.metadata().map_err(LedgerError::io("look at", &path))?.nlink() > 0 {
                    return Ok(lock);
                }
                file = open_lock(dir, &path)?;
            }
            Err((same, Errno::EWOULDBLOCK | Errno::EINTR)) => file = same,
            Err((_, errno)) => {
                return Err(LedgerError::Io { action: "lock", path, source: errno.into() });
            }
        }
        if start.elapsed() >= deadline {
            return Err(LedgerError::Locked { path, waited: deadline });
        }
        sleep(pause);
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

fn open_lock(dir: &Path, path: &Path) -> Result<File, LedgerError> {
    let open =
        || OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o750).open(path);
    let file = match open() {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            fs::create_dir_all(dir).map_err(LedgerError::io("make the directory", dir))?;
            open()
        }
        other => other,
    };
    file.map_err(LedgerError::io("open", path))
}

#[cfg(test)]
mod tests;
