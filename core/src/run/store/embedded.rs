//! The store of one machine: a directory. For several processes and several namespaced hosts that see the same directory.
//!
//! **Shape** — `<dir>/<network>/config` is the document; `<dir>/<network>/subnets/<key>` is a lease, with exactly etcd's value;
//! `<dir>/<network>/expires/<key>` says when it ends, in seconds since 1970, and a lease without it is a reservation;
//! `<dir>/<network>/revision` counts the writes. The default network is called `default`. `ls` and `cat` are the debugger.
//! **Writes** happen under an flock on `<dir>/.lock`, each as a new file that is renamed into place. Expired leases are swept by
//! whoever holds the lock next. A process that was stopped while it holds the lock costs the others an error, not their life.
//! **Watching** is inotify, and a slow look for what it misses (an expiry, a file system without it).

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use super::shelf::{Shelf, publish_down};
use super::sign::Sign;
use super::{CALL_DEADLINE, Claim, Created, Held, Renewal, Snapshot, StoreError};
use crate::decide::allocate::same_holder;
use crate::touch::whole_file;
use crate::words::lease::{LeaseValue, OwnLease, Subnets};
use crate::words::name::NetworkName;

/// How often the directory is looked at without a notice.
const LOOK: Duration = Duration::from_secs(2);

/// Changes that come this close together are told as one.
const GATHER: Duration = Duration::from_millis(3);

/// No network can have this name.
const LOCK: &str = ".lock";

/// How often a lock that somebody else has is tried again.
const LOCK_POLL: Duration = Duration::from_millis(1);

/// A directory. Cheap to clone.
#[derive(Clone, Debug)]
pub struct EmbeddedStore {
    dir: PathBuf,
}

/// nix's type says what it borrows, tokio wants the number.
struct Notices(Inotify);

impl AsRawFd for Notices {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

/// The files of one network, under the lock.
struct Locked {
    dir: PathBuf,
    _lock: Flock<File>,
}

fn failed(tried: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::File { tried, path, source }
}

/// Takes the lock, or says that it took too long.
fn take(mut file: File) -> io::Result<Flock<File>> {
    let deadline = Instant::now() + CALL_DEADLINE;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(held) => return Ok(held),
            Err((back, Errno::EWOULDBLOCK)) if Instant::now() < deadline => file = back,
            Err((_, Errno::EWOULDBLOCK)) => {
                let text = format!("another process has held it for {:.1} s", CALL_DEADLINE.as_secs_f64());
                return Err(io::Error::new(ErrorKind::TimedOut, text));
            }
            Err((_, errno)) => return Err(errno.into()),
        }
        std::thread::sleep(LOCK_POLL);
    }
}

/// None instead of "there is none".
fn present<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

impl EmbeddedStore {
    /// Opens a directory and makes it if it is not there.
    pub(super) fn open(dir: PathBuf) -> Result<Self, StoreError> {
        fs::create_dir_all(&dir).map_err(failed("make the directory", &dir))?;
        Ok(Self { dir })
    }

    fn place(&self, network: &NetworkName) -> PathBuf {
        self.dir.join(network.as_str())
    }

    /// Runs something under the lock, on a thread that may block.
    async fn locked<T: Send + 'static>(
        &self,
        network: &NetworkName,
        act: impl FnOnce(&Locked) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (dir, lock) = (self.place(network), self.dir.join(LOCK));
        let at = self.dir.clone();
        tokio::task::spawn_blocking(move || {
            let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&lock);
            let file = file.map_err(failed("open", &lock))?;
            let held = take(file).map_err(failed("lock", &lock))?;
            let locked = Locked { dir, _lock: held };
            locked.sweep()?;
            act(&locked)
        })
        .await
        .unwrap_or_else(|error| Err(failed("use", &at)(io::Error::other(error))))
    }

    pub(super) async fn config(&self, network: &NetworkName) -> Result<Option<String>, StoreError> {
        let path = self.place(network).join("config");
        let bytes = present(fs::read(&path)).map_err(failed("read", &path))?;
        Ok(bytes.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
    }

    pub(super) async fn create_config(
        &self,
        network: &NetworkName,
        text: &str,
    ) -> Result<Created, StoreError> {
        let text = text.to_owned();
        self.locked(network, move |locked| {
            let path = locked.dir.join("config");
            match present(fs::read(&path)).map_err(failed("read", &path))? {
                Some(existing) => Ok(Created::Exists(String::from_utf8_lossy(&existing).into_owned())),
                None => locked.write("config", &text).map(|()| Created::Made),
            }
        })
        .await
    }

    pub(super) async fn remove(&self, network: &NetworkName) -> Result<(), StoreError> {
        let name = network.clone();
        self.locked(network, move |locked| {
            let leases = locked.keys()?.len();
            if leases > 0 {
                return Err(StoreError::InUse { network: name, leases });
            }
            match present(fs::remove_dir_all(&locked.dir)) {
                Ok(_) => Ok(()),
                Err(error) => Err(failed("remove", &locked.dir)(error)),
            }
        })
        .await
    }

    pub(super) async fn networks(&self) -> Result<Vec<(NetworkName, String)>, StoreError> {
        let mut networks = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(failed("list", &self.dir))?.flatten() {
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            let Some(name) = entry.file_name().to_str().and_then(|name| NetworkName::new(name).ok()) else {
                continue;
            };
            if let Some(document) = self.config(&name).await? {
                networks.push((name, document));
            }
        }
        networks.sort();
        Ok(networks)
    }

    pub(super) async fn claim(
        &self,
        network: &NetworkName,
        subnets: &Subnets,
        value: &LeaseValue,
        ttl: Duration,
    ) -> Result<Claim, StoreError> {
        let (subnets, value) = (*subnets, value.clone());
        self.locked(network, move |locked| {
            let taken = locked
                .keys()?
                .iter()
                .any(|key| Subnets::parse_key(key).is_ok_and(|held| held.overlap(&subnets)));
            match taken {
                true => Ok(Claim::Taken),
                false => locked.put(subnets, value, Some(ttl)).map(Claim::Made),
            }
        })
        .await
    }

    pub(super) async fn renew(
        &self,
        network: &NetworkName,
        held: &Held,
        value: &LeaseValue,
        ttl: Duration,
    ) -> Result<Renewal, StoreError> {
        let known = held.own.value.clone();
        // Rubbish that somebody wrote over it does not make it anybody else's.
        let ours = move |found: Option<&LeaseValue>| found.is_none_or(|found| same_holder(found, &known));
        self.take_over(network, held.own.subnets, ours, value.clone(), ttl).await
    }

    pub(super) async fn adopt(
        &self,
        network: &NetworkName,
        subnets: &Subnets,
        value: &LeaseValue,
        ttl: Duration,
    ) -> Result<Renewal, StoreError> {
        let known = value.clone();
        let ours = move |found: Option<&LeaseValue>| found.is_some_and(|found| same_holder(found, &known));
        self.take_over(network, *subnets, ours, value.clone(), ttl).await
    }

    /// Writes a lease that is `ours` by its value (none: one that cannot be read). A reservation stays one.
    async fn take_over(
        &self,
        network: &NetworkName,
        subnets: Subnets,
        ours: impl Fn(Option<&LeaseValue>) -> bool + Send + 'static,
        value: LeaseValue,
        ttl: Duration,
    ) -> Result<Renewal, StoreError> {
        self.locked(network, move |locked| {
            let Some(found) = locked.value(&subnets)? else { return Ok(Renewal::Lost(None)) };
            let holder = LeaseValue::from_json(&found).ok();
            if !ours(holder.as_ref()) {
                return Ok(Renewal::Lost(holder));
            }
            let reservation = locked.expires(&subnets)?.is_none();
            if reservation && holder.as_ref() == Some(&value) {
                let (own, revision) = (OwnLease { subnets, value }, locked.revision());
                return Ok(Renewal::Done(Held { own, expires: None, revision, grant: 0 }));
            }
            locked.put(subnets, value, (!reservation).then_some(ttl)).map(Renewal::Done)
        })
        .await
    }

    pub(super) async fn release(
        &self,
        network: &NetworkName,
        subnets: &Subnets,
        value: &LeaseValue,
    ) -> Result<bool, StoreError> {
        let (subnets, value) = (*subnets, value.clone());
        self.locked(network, move |locked| {
            let Some(found) = locked.value(&subnets)? else { return Ok(true) };
            let ours = LeaseValue::from_json(&found).is_ok_and(|holder| same_holder(&holder, &value));
            match ours && locked.expires(&subnets)?.is_some() {
                true => locked.delete(&subnets.key()).map(|()| true),
                false => Ok(false),
            }
        })
        .await
    }

    /// Keeps the receivers up to date until the last one is dropped.
    pub(super) async fn follow(self, network: NetworkName, sender: watch::Sender<Snapshot>) {
        let notices = self.notices(&network).inspect_err(|error| {
            tracing::warn!(
                "network {network}: no notices from {} ({error}); looking every {LOOK:?}",
                self.dir.display()
            );
        });
        let mut notices = notices.ok();
        loop {
            match self.locked(&network, Locked::read).await {
                Ok((mut shelf, revision)) => shelf.publish(&sender, revision),
                Err(error) => {
                    if publish_down(&sender, &error) {
                        tracing::warn!("network {network}: {error}");
                    }
                }
            }
            tokio::select! {
                () = sender.closed() => return,
                () = noticed(&mut notices) => sleep(GATHER).await,
                () = sleep(LOOK) => {}
            }
            // The directory was removed, and now there is another one of that name.
            if notices.is_none() && self.place(&network).exists() {
                notices = self.notices(&network).ok();
            }
        }
    }

    fn notices(&self, network: &NetworkName) -> io::Result<AsyncFd<Notices>> {
        let place = self.place(network);
        fs::create_dir_all(place.join("subnets"))?;
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        let interest = AddWatchFlags::IN_CLOSE_WRITE | AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_DELETE;
        inotify.add_watch(&place, interest)?;
        inotify.add_watch(&place.join("subnets"), interest)?;
        register(inotify)
    }
}

#[expect(
    unsafe_code,
    reason = "tokio wants a promise that the descriptor stays the same while it is registered"
)]
fn register(inotify: Inotify) -> io::Result<AsyncFd<Notices>> {
    // SAFETY: the descriptor is owned by the value, which the registration owns; nothing else closes or replaces it.
    Ok(unsafe { AsyncFd::register(Notices(inotify)) }?)
}

/// Waits for a notice; for ever if there are none to be had. They end when the directory is removed.
async fn noticed(notices: &mut Option<AsyncFd<Notices>>) {
    let Some(inotify) = notices else { return std::future::pending().await };
    match inotify.readable().await {
        Ok(mut ready) => {
            // What changed is found by looking.
            let mut ended = false;
            while let Ok(events) = inotify.get_ref().0.read_events() {
                ended |= events.iter().any(|event| event.mask.contains(AddWatchFlags::IN_IGNORED));
            }
            ready.clear_ready();
            if ended {
                *notices = None;
            }
        }
        Err(_) => *notices = None,
    }
}

impl Locked {
    fn path(&self, key: &str) -> PathBuf {
        self.dir.join("subnets").join(key)
    }

    fn expiry_path(&self, key: &str) -> PathBuf {
        self.dir.join("expires").join(key)
    }

    fn keys(&self) -> Result<Vec<String>, StoreError> {
        keys(&self.dir.join("subnets"))
    }

    fn value(&self, subnets: &Subnets) -> Result<Option<String>, StoreError> {
        let path = self.path(&subnets.key());
        let bytes = present(fs::read(&path)).map_err(failed("read", &path))?;
        Ok(bytes.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
    }

    /// When a lease ends, in seconds since 1970. None for a reservation.
    fn expires(&self, subnets: &Subnets) -> Result<Option<f64>, StoreError> {
        self.expiry(&subnets.key())
    }

    fn expiry(&self, key: &str) -> Result<Option<f64>, StoreError> {
        let path = self.expiry_path(key);
        let text = present(fs::read(&path)).map_err(failed("read", &path))?;
        // Rubbish is an end that has passed: a lease that nobody can see ending would stay for ever.
        Ok(text.map(|text| String::from_utf8_lossy(&text).trim().parse().unwrap_or(0.0)))
    }

    /// Removes leases that have ended, and ends whose lease somebody removed by hand: they would end the next one.
    fn sweep(&self) -> Result<(), StoreError> {
        for key in keys(&self.dir.join("expires"))? {
            // What cannot be read or removed (a directory by that name) must not keep everybody from their leases.
            if !self.path(&key).exists() {
                let _ = fs::remove_file(self.expiry_path(&key));
            } else if self.expiry(&key).is_ok_and(|end| end.is_some_and(|end| end <= now())) {
                tracing::info!("lease {key} has expired");
                self.delete(&key)?;
            }
        }
        Ok(())
    }

    fn put(&self, subnets: Subnets, value: LeaseValue, ttl: Option<Duration>) -> Result<Held, StoreError> {
        let key = subnets.key();
        // The end before the lease: a lease without an end would be a reservation.
        if let Some(ttl) = ttl {
            self.write(&format!("expires/{key}"), &format!("{}\n", now() + ttl.as_secs_f64()))?;
        }
        let revision = self.count()?;
        self.write(&format!("subnets/{key}"), &value.to_json())?;
        let expires = ttl.map(|ttl| Instant::now() + ttl);
        Ok(Held { own: OwnLease { subnets, value }, expires, revision, grant: 0 })
    }

    fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.count()?;
        for path in [self.path(key), self.expiry_path(key)] {
            present(fs::remove_file(&path)).map_err(failed("remove", &path))?;
        }
        Ok(())
    }

    /// One more write.
    fn count(&self) -> Result<i64, StoreError> {
        let next = self.revision() + 1;
        self.write("revision", &next.to_string())?;
        Ok(next)
    }

    fn revision(&self) -> i64 {
        fs::read_to_string(self.dir.join("revision"))
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(0)
    }

    fn write(&self, name: &str, text: &str) -> Result<(), StoreError> {
        let path = self.dir.join(name);
        whole_file::write(&path, text.as_bytes(), 0o644).map_err(failed("write", &path))
    }

    fn read(&self) -> Result<(Shelf, i64), StoreError> {
        let mut shelf = Shelf::new();
        let config = self.dir.join("config");
        let document = present(fs::read(&config)).map_err(failed("read", &config))?;
        shelf.config(document.as_deref());
        for key in self.keys()? {
            match present(fs::read(self.path(&key))) {
                Ok(Some(value)) => shelf.put(&key, &value, Sign::Unsigned),
                Ok(None) => {}
                // A directory by that name, for example.
                Err(error) => shelf.unreadable(&key, &error),
            }
        }
        Ok((shelf, self.revision()))
    }
}

/// The files of a directory, which may not be there.
fn keys(dir: &Path) -> Result<Vec<String>, StoreError> {
    let Some(entries) = present(fs::read_dir(dir)).map_err(failed("list", dir))? else {
        return Ok(Vec::new());
    };
    Ok(entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        // A write that was cut off.
        .filter(|name| !name.starts_with('.'))
        .collect())
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}
