//! Notes: which address is whose, in names alone. A listing of the directory then answers what otherwise takes a read of every entry.
//!
//! A note is a symbolic link `.ADDRESS.CONTAINER.INTERFACE` to the entry, with short hashes for the last two. It is a hint: whoever
//! follows one reads the entry it leads to. It is made after its entry and removed before it, so that a crash leaves an entry
//! without a note, which is read as all were before there were notes. Go host-local, which looks through every file for those with a
//! container's id in them, reads through the link and removes both.

use std::net::IpAddr;

use super::Maker;
use crate::words::name::{Attachment, fingerprint};

const CONTAINER_DIGITS: usize = 12;
const INTERFACE_DIGITS: usize = 8;

/// A note's content, which is its name.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Note {
    pub(super) address: IpAddr,
    container: String,
    interface: String,
}

impl Note {
    pub(super) fn of(address: IpAddr, owner: &Attachment) -> Self {
        let hash = |text: &str, digits: usize| fingerprint(text.as_bytes())[..digits].to_owned();
        Self {
            address,
            container: hash(&owner.container, CONTAINER_DIGITS),
            interface: hash(&owner.interface, INTERFACE_DIGITS),
        }
    }

    pub(super) fn file(&self) -> String {
        format!(".{}.{}.{}", self.address, self.container, self.interface)
    }

    /// Where the link leads, by two ways: the way says who made the attachment.
    pub(super) fn target(&self, maker: Maker) -> String {
        match maker {
            Maker::Ourselves => self.address.to_string(),
            Maker::Asker => format!("./{}", self.address),
        }
    }

    /// None for a file that is something else.
    pub(super) fn parse(file: &str) -> Option<Self> {
        let (rest, interface) = file.strip_prefix('.')?.rsplit_once('.')?;
        let (address, container) = rest.rsplit_once('.')?;
        let hash = |text: &str, digits| text.len() == digits && text.bytes().all(|b| b.is_ascii_hexdigit());
        let shaped = hash(container, CONTAINER_DIGITS) && hash(interface, INTERFACE_DIGITS);
        let address = address.parse().ok().filter(|_| shaped)?;
        Some(Self { address, container: container.to_owned(), interface: interface.to_owned() })
    }

    /// Whether it may be about an interface of the same container.
    pub(super) fn same_container(&self, other: &Self) -> bool {
        self.container == other.container
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_its_name() {
        let owner = Attachment { container: "default-c1".into(), interface: "eth0".into() };
        for address in ["10.5.1.2", "fd00::1:2"] {
            let note = Note::of(address.parse().unwrap(), &owner);
            assert_eq!(Note::parse(&note.file()), Some(note.clone()), "{}", note.file());
            let sibling = Attachment { interface: "net1".into(), ..owner.clone() };
            let sibling = Note::of(note.address, &sibling);
            assert!(sibling != note && sibling.same_container(&note));
        }
        for other in [
            "lock",
            "10.5.1.2",
            ".10.5.1.2",
            ".hidden",
            ".10.5.1.2.zz",
            "last_reserved_ip.0",
            ".x.0123456789ab.01234567",
        ] {
            assert_eq!(Note::parse(other), None, "{other}");
        }
    }
}
