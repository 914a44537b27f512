use super::*;

fn owner(container: &str, interface: &str) -> Attachment {
    Attachment { container: container.into(), interface: interface.into() }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn ledger() -> (tempfile::TempDir, Ledger) {
    let dir = tempfile::tempdir().unwrap();
    let ledger = Ledger::at(dir.path().join("cbr0"));
    (dir, ledger)
}

#[test]
fn files_are_host_locals_byte_for_byte() {
    let (_dir, ledger) = ledger();
    let held = ledger.lock().unwrap();
    held.claim(ip("10.5.1.2"), &owner("c1", "eth0")).unwrap();
    held.claim(ip("fd00::2"), &owner("c1", "eth0")).unwrap();
    held.set_last(0, ip("10.5.1.2")).unwrap();
    let read = |name: &str| fs::read(ledger.dir().join(name)).unwrap();
    assert_eq!(read("10.5.1.2"), b"c1\r\neth0");
    assert_eq!(read("fd00::2"), b"c1\r\neth0");
    assert_eq!(read("last_reserved_ip.0"), b"10.5.1.2");
    let mode = |name: &str| fs::metadata(ledger.dir().join(name)).unwrap().mode() & 0o777;
    assert_eq!((mode("10.5.1.2"), mode("lock")), (0o600, 0o750));
    assert_eq!(held.last(0), Some(ip("10.5.1.2")));
    assert_eq!(held.last(1), None);
}

#[test]
fn an_address_is_held_once() {
    let (_dir, ledger) = ledger();
    let held = ledger.lock().unwrap();
    held.claim(ip("10.5.1.2"), &owner("c1", "eth0")).unwrap();
    let error = held.claim(ip("10.5.1.2"), &owner("c2", "eth0")).unwrap_err();
    assert_eq!(error.to_string(), "10.5.1.2 is already taken by c1/eth0");
}

#[test]
fn release_is_by_attachment_and_knows_older_writers() {
    let (_dir, ledger) = ledger();
    let held = ledger.lock().unwrap();
    held.claim(ip("10.5.1.2"), &owner("c1", "eth0")).unwrap();
    held.claim(ip("10.5.1.3"), &owner("c1", "eth1")).unwrap();
    fs::write(ledger.dir().join("10.5.1.4"), "old").unwrap();
    fs::write(ledger.dir().join("10.5.1.5"), "other\neth0").unwrap();
    let release = |container, interface| held.release(&owner(container, interface)).unwrap();
    let first = release("c1", "eth1");
    assert_eq!((first.addresses, first.siblings), (vec![ip("10.5.1.3")], true));
    assert_eq!(first.left, ["10.5.1.2", "10.5.1.4", "10.5.1.5"].map(ip).into());
    let second = release("c1", "eth1");
    assert_eq!((second.addresses, second.siblings, second.left), (vec![], true, first.left));
    assert_eq!(release("old", "eth0").addresses, [ip("10.5.1.4")]);
    let other = release("other", "eth0");
    assert_eq!((other.addresses, other.siblings), (vec![ip("10.5.1.5")], false));
    assert_eq!(held.entries().unwrap(), [Entry { address: ip("10.5.1.2"), owner: owner("c1", "eth0") }]);
}

#[test]
fn a_file_whose_writer_died_is_nobodys() {
    let (_dir, ledger) = ledger();
    let held = ledger.lock().unwrap();
    for file in ["10.5.1.2", "10.5.1.3"] {
        fs::write(ledger.dir().join(file), "").unwrap();
    }
    held.claim(ip("10.5.1.2"), &owner("c1", "eth0")).unwrap();
    assert_eq!(held.entries().unwrap().len(), 1);
    assert_eq!(held.addresses().unwrap(), [ip("10.5.1.2")].into(), "the other one was removed");
    // What power loss leaves.
    fs::write(ledger.dir().join("10.5.1.4"), [0; 40]).unwrap();
    assert_eq!(held.entries().unwrap().len(), 1);
}

/// Names of the notes that are there.
fn notes(ledger: &Ledger) -> Vec<String> {
    let names =
        fs::read_dir(ledger.dir()).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap());
    names.filter(|name| Note::parse(name).is_some()).collect()
}

#[test]
fn notes_spare_the_reading_of_other_entries() {
    let (_dir, ledger) = ledger();
    let held = ledger.lock().unwrap();
    for n in 2..9 {
        held.claim(ip(&format!("10.5.1.{n}")), &owner(&format!("c{n}"), "eth0")).unwrap();
    }
    // Whoever reads this one fails.
    fs::remove_file(ledger.dir().join("10.5.1.3")).unwrap();
    fs::create_dir(ledger.dir().join("10.5.1.3")).unwrap();
    assert!(held.entries().is_err());
    let listing = held.list().unwrap();
    assert_eq!(listing.addresses().len(), 7);
    assert_eq!(held.entries_of(&listing, "new").unwrap(), []);
    assert_eq!(held.release(&owner("c5", "eth0")).unwrap().addresses, [ip("10.5.1.5")]);
    // One without a note is found as well.
    fs::write(ledger.dir().join("10.5.1.9"), "go\r\neth0").unwrap();
    assert_eq!(held.release(&owner("go", "eth0")).unwrap().addresses, [ip("10.5.1.9")]);
}

#[test]
fn notes_go_with_their_entries_and_wrong_ones_mislead_nobody() {
    let (_dir, ledger) = ledger();
    let held = ledger.lock().unwrap();
    held.claim(ip("10.5.1.2"), &owner("c1", "eth0")).unwrap();
    held.claim(ip("10.5.1.3"), &owner("docker:pool", "pending")).unwrap();
    held.reassign(ip("10.5.1.3"), &owner("docker:ep1", "eth0")).unwrap();
    assert_eq!(notes(&ledger).len(), 2);
    // Somebody tidied up by hand, and host-local gave the address away again.
    fs::write(ledger.dir().join("10.5.1.2"), "go\r\neth0").unwrap();
    assert!(held.release(&owner("c1", "eth0")).unwrap().addresses.is_empty());
    assert_eq!(held.release(&owner("go", "eth0")).unwrap().addresses, [ip("10.5.1.2")]);
    held.release_address(ip("10.5.1.3")).unwrap();
    assert!(notes(&ledger).is_empty());
    // host-local itself removes every file that holds the id, by whatever name: the note among them.
    held.claim(ip("10.5.1.4"), &owner("c4", "eth0")).unwrap();
    assert_eq!(fs::read(ledger.dir().join(&notes(&ledger)[0])).unwrap(), b"c4\r\neth0");
}

#[test]
fn an_attachment_is_made_by_one_at_a_time() {
    let (_dir, ledger) = ledger();
    let held = ledger.lock().unwrap();
    let making = held.begin(ip("10.5.1.2"), &owner("c1", "eth0"), Maker::Ourselves).unwrap();
    assert!(held.begin_again(ip("10.5.1.2")).unwrap().is_none());
    drop(making);
    assert!(held.begin_again(ip("10.5.1.2")).unwrap().is_some());
    held.claim(ip("10.5.1.3"), &owner("c2", "eth0")).unwrap();
    let ours: Vec<bool> = held.entries().unwrap().iter().map(|entry| held.is_ours(entry)).collect();
    assert_eq!(ours, [true, false]);
}

#[test]
fn an_entry_changes_hands_in_one_step() {
    let (_dir, ledger) = ledger();
    let held = ledger.lock().unwrap();
    held.claim(ip("10.5.1.2"), &owner("docker:pool", "pending")).unwrap();
    held.reassign(ip("10.5.1.2"), &owner("docker:ep1", "eth0")).unwrap();
    assert_eq!(held.owner(ip("10.5.1.2")).unwrap(), Some(owner("docker:ep1", "eth0")));
    assert_eq!(held.addresses().unwrap().len(), 1);
}

#[test]
fn a_reboot_frees_what_cni_held_and_leaves_dockers() {
    let (_dir, ledger) = ledger();
    let lock = |boot| ledger.lock_within(LOCK_DEADLINE, boot).unwrap();
    {
        let held = lock("boot-1");
        held.claim(ip("10.5.1.2"), &owner("c1", "eth0")).unwrap();
        held.claim(ip("10.5.1.3"), &owner("docker:ep", "eth0")).unwrap();
    }
    assert_eq!(lock("boot-1").addresses().unwrap().len(), 2);
    assert_eq!(lock("boot-2").addresses().unwrap(), [ip("10.5.1.3")].into());
    assert_eq!(fs::read_to_string(ledger.dir().join("boot_id")).unwrap(), "boot-2");
    // The host lost power before this was on the disk.
    lock("boot-2").claim(ip("10.5.1.4"), &owner("c1", "eth0")).unwrap();
    fs::write(ledger.dir().join("boot_id"), "").unwrap();
    assert_eq!(lock("boot-3").addresses().unwrap(), [ip("10.5.1.3")].into());
}

#[test]
fn a_ledger_of_host_local_alone_is_taken_as_it_is() {
    let (_dir, ledger) = ledger();
    fs::create_dir(ledger.dir()).unwrap();
    fs::write(ledger.dir().join("10.5.1.2"), "go\r\neth0").unwrap();
    let held = ledger.lock().unwrap();
    assert_eq!(held.entries().unwrap().len(), 1);
}

#[test]
fn the_lock_has_a_deadline() {
    let (_dir, ledger) = ledger();
    let _held = ledger.lock().unwrap();
    let error = ledger.lock_within(Duration::from_millis(30), "boot").unwrap_err().to_string();
    assert!(error.contains("still locked by another process"), "{error}");
}

struct Node {
    dir: tempfile::TempDir,
}

impl Node {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }
    fn subnet_file(&self) -> PathBuf {
        self.dir.path().join("run/subnet.env")
    }
    fn root(&self) -> PathBuf {
        self.dir.path().join("networks")
    }
    fn open(&self, name: &str) -> Result<Ledger, LedgerError> {
        Ledger::open_for(&self.subnet_file(), &self.root(), name)
    }
    fn put(&self, name: &str, address: &str, text: &str) {
        fs::create_dir_all(self.root().join(name)).unwrap();
        fs::write(self.root().join(name).join(address), text).unwrap();
    }
}

#[test]
fn every_configuration_of_a_network_shares_the_first_ones_ledger() {
    let node = Node::new();
    let first = node.open("cbr0").unwrap();
    let second = node.open("podnet").unwrap();
    assert_eq!(first, second);
    assert_eq!(node.open("podnet").unwrap(), first);
    first.lock().unwrap().claim(ip("10.5.1.2"), &owner("c1", "eth0")).unwrap();
    assert!(node.root().join("podnet/10.5.1.2").is_file(), "Go host-local sees it under both names");
    assert!(fs::symlink_metadata(node.root().join("podnet")).unwrap().is_symlink());
}

#[test]
fn after_a_reboot_the_links_still_lead_to_one_place() {
    let node = Node::new();
    let first = node.open("cbr0").unwrap();
    node.open("podnet").unwrap();
    fs::remove_dir_all(node.dir.path().join("run")).unwrap();
    assert_eq!(
        node.open("podnet").unwrap().dir().canonicalize().unwrap(),
        first.dir().canonicalize().unwrap()
    );
    assert_eq!(node.open("cbr0").unwrap().dir().canonicalize().unwrap(), first.dir().canonicalize().unwrap());
}

#[test]
fn entries_of_a_second_directory_are_taken_along() {
    let node = Node::new();
    node.put("podnet", "10.5.1.7", "go\r\neth0");
    node.put("podnet", "last_reserved_ip.0", "10.5.1.7");
    let first = node.open("cbr0").unwrap();
    first.lock().unwrap().claim(ip("10.5.1.2"), &owner("c1", "eth0")).unwrap();
    assert_eq!(node.open("podnet").unwrap(), first);
    assert_eq!(first.lock().unwrap().addresses().unwrap().len(), 2);
    assert!(fs::symlink_metadata(node.root().join("podnet")).unwrap().is_symlink());
}

#[test]
fn a_clash_moves_nothing_and_is_said() {
    let node = Node::new();
    node.put("podnet", "10.5.1.2", "go\r\neth0");
    node.put("podnet", "10.5.1.3", "go2\r\neth0");
    let first = node.open("cbr0").unwrap();
    first.lock().unwrap().claim(ip("10.5.1.2"), &owner("c1", "eth0")).unwrap();
    let error = node.open("podnet").unwrap_err().to_string();
    assert!(error.contains("10.5.1.2") && error.contains("podnet") && error.contains("cbr0"), "{error}");
    assert!(node.root().join("podnet/10.5.1.3").is_file());
    assert_eq!(first.lock().unwrap().addresses().unwrap().len(), 1);
}

#[test]
fn a_name_of_another_network_is_refused() {
    let node = Node::new();
    let other = node.root().join("other");
    fs::create_dir_all(&other).unwrap();
    std::os::unix::fs::symlink(&other, node.root().join("podnet")).unwrap();
    node.open("cbr0").unwrap();
    let error = node.open("podnet").unwrap_err().to_string();
    assert!(error.contains("another network"), "{error}");
}

#[test]
fn a_ledger_retires_when_nobody_is_in_it() {
    let node = Node::new();
    assert_eq!(Ledger::retire(&node.subnet_file()).unwrap(), Retired::Absent);
    assert_eq!(Ledger::find(&node.subnet_file(), &node.root(), "cbr0").unwrap(), None);
    let ledger = node.open("cbr0").unwrap();
    node.open("podnet").unwrap();
    assert_eq!(Ledger::find(&node.subnet_file(), &node.root(), "x").unwrap(), Some(ledger.clone()));
    ledger.lock().unwrap().claim(ip("10.5.1.2"), &owner("c1", "eth0")).unwrap();
    ledger.lock().unwrap().set_last(0, ip("10.5.1.2")).unwrap();
    let entry = Entry { address: ip("10.5.1.2"), owner: owner("c1", "eth0") };
    assert_eq!(Ledger::retire(&node.subnet_file()).unwrap(), Retired::InUse(vec![entry]));
    ledger.lock().unwrap().release(&owner("c1", "eth0")).unwrap();
    assert_eq!(Ledger::retire(&node.subnet_file()).unwrap(), Retired::Gone);
    assert_eq!(fs::read_dir(node.root()).unwrap().count(), 0);
    assert_eq!(fs::read_dir(node.dir.path().join("run")).unwrap().count(), 0);
    node.open("cbr0").unwrap().lock().unwrap();
}

#[test]
fn many_at_once_never_share_an_address() {
    let (_dir, ledger) = ledger();
    let claimed: Vec<IpAddr> = std::thread::scope(|scope| {
        let ledger = &ledger;
        let threads: Vec<_> = (0..8)
            .map(|n| {
                scope.spawn(move || {
                    (0..20)
                        .map(|i| {
                            let held = ledger.lock().unwrap();
                            let taken = held.addresses().unwrap();
                            let free =
                                (2u8..).map(|d| ip(&format!("10.5.1.{d}"))).find(|a| !taken.contains(a));
                            held.claim(free.unwrap(), &owner(&format!("c{n}-{i}"), "eth0")).unwrap();
                            free.unwrap()
                        })
                        .collect::<Vec<_>>()
                })
            })
            .collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    let distinct: std::collections::BTreeSet<_> = claimed.iter().collect();
    assert_eq!((claimed.len(), distinct.len()), (160, 160));
}
